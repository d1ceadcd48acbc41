"""The one GAN loop, for Stage 1 and for Stage 2.

A run lives in a folder: `checkpoint.safetensors` (everything that the run needs to go on), `history.csv` (losses),
`quality.csv` (distance to real images), `samples/` (the same latents each time), `best.safetensors` (the averaged
generator where KID was lowest) and `generator.safetensors` (the averaged generator at the end). A killed run continues
from its checkpoint and ends, on a CPU, bit-identical to one never killed: every random number comes from a stream that
the checkpoint keeps, and nothing depends on when the clock was read. Several processes may share a run (`parallel.py`);
the main one writes the files, which do not tell how many there were.
"""

import math
import time
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm

from stgan_utils import checkpoints, generation, parallel
from stgan_utils import device as devices
from stgan_utils.augment import diff_augment
from stgan_utils.config import UserError
from stgan_utils.fastgan import Discriminator, Generator, quadrant_of, small_view
from stgan_utils.files import atomic_path
from stgan_utils.graphs import Replayed
from stgan_utils.losses import Projector, barlow_twins, hinge_d_loss, hinge_g_loss, perceptual_distance
from stgan_utils.order import Order
from stgan_utils.runs import Unfinished

LOG_EVERY = 10  # iterations between two readings of the losses: each one makes the device wait
BARLOW_LAMBDA = 0.5  # weight of the off-diagonal part, both parts being means
SAMPLE_SEED = 1234  # of the sample grid and of evaluation: the same latents each time
GRID = 8  # samples a row and rows of a grid

# Settings that may change between two sessions of one run without changing what is trained.
FREE_SETTINGS = ("iterations", "max_minutes", "checkpoint_every", "sample_every", "ablation_iterations")


def samples(generator):
    """The pictures of the sample grid, (64, S, S, 3) uint8: the same latents at every iteration and in every run."""
    return generation.sample(generator, SAMPLE_SEED, range(GRID * GRID))


def _finite(module):
    numbers = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack(torch._foreach_norm(numbers)).isfinite().all())


class GanTrainer:
    """State and one iteration of a GAN training; `run` is the loop.

    In a script that `accelerate launch` started, it joins the other processes and takes its share of each batch.

    Args:
        settings: `Stage1Settings` or `Stage2Settings`.
        images: (N, S, S, 3) uint8, all of them used for training; may be memory-mapped.
        folder: the run's folder; a checkpoint in it is continued.
        start: (generator, discriminator) to begin from instead of random weights: Stage 2.
        evaluate: called with (M, S, S, 3) uint8 generated images, returns a dict with "kid"; None: never.
        on_sample: called with (iteration, grid (H, W, 3) uint8) whenever a grid is drawn.

    Raises:
        UserError: fewer images than a batch, images of another size, a checkpoint of other settings, a batch that the
            processes cannot share equally.
    """

    def __init__(self, settings, images, folder, start=None, evaluate=None, on_sample=None):
        if len(images) < settings.batch_size:
            raise UserError(
                f"There are {len(images)} training images, fewer than a batch of {settings.batch_size}: "
                "lower batch_size, or add images."
            )
        if images.shape[1:] != (settings.size, settings.size, 3):
            raise UserError(f"The images are {images.shape[1]} px, the settings ask for {settings.size} px.")
        parallel.join()
        parallel.check_batch(settings.batch_size, parallel.size())
        self.settings, self.folder = settings, folder
        self.evaluate, self.on_sample = evaluate, on_sample
        self.device = devices.pick()
        self.images = torch.from_numpy(np.asarray(images))
        if self.device.type == "cuda":
            self.images = self.images.to(self.device)
        self._build(start)
        self.iteration, self.best = 0, None
        self.history, self.quality = [], []
        if self.checkpoint.exists():
            self._resume()

    def _build(self, start):
        s = self.settings
        torch.manual_seed(s.seed)
        if start is None:
            self.generator, self.discriminator = Generator(s.size, s.ngf, s.nz), Discriminator(s.size, s.ngf)
        else:
            self.generator, self.discriminator = start
            if self.generator.size != s.size:
                raise UserError(
                    f"The checkpoint to start from makes images of {self.generator.size} px, {s.size} px are asked "
                    f"for: set size to {self.generator.size}, or choose another checkpoint."
                )
        self.ema = Generator(self.generator.size, self.generator.ngf, self.generator.nz)
        self.ema.load_state_dict(self.generator.state_dict())
        self.ema.requires_grad_(False).eval()
        self.discriminator.freeze(getattr(s, "freeze_blocks", 0))
        self.barlow = getattr(s, "bt_weight", 0) > 0
        self.projector = Projector(self.discriminator.rf_big[0].in_channels)
        self.perceptual = perceptual_distance(s.perceptual, devices.precision(self.device, self.generator.ngf))
        parallel.synchronise(self.generator, self.discriminator, self.projector)
        for module in self._modules().values():
            module.to(self.device)
        self.perceptual.to(self.device, memory_format=torch.channels_last)  # no gradients of weights there
        self.generator.train()
        self.discriminator.train()

        # The kernels of a step are small, launching them one by one takes longer than they do.
        self.recorded = self.device.type == "cuda" and parallel.size() == 1
        torch.backends.cudnn.benchmark = True  # shapes do not change

        def adam(*modules):
            trained = [p for module in modules for p in module.parameters() if p.requires_grad]
            kind = {"fused": True, "capturable": self.recorded}
            return torch.optim.Adam(trained, lr=s.learning_rate, betas=(0.5, 0.999), **kind)

        self.optimizer_g = adam(self.generator)
        self.optimizer_d = adam(self.discriminator, *([self.projector] if self.barlow else []))
        # Half precision underflows without it; bfloat16 and float32 do not.
        half = devices.precision(self.device) is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.order = Order(len(self.images), s.batch_size, s.seed, self.images.device)
        self.rows = self.order.rows(0)
        self.quadrant = torch.zeros(1, dtype=torch.long, device=self.device)
        self.noise, self.ramp = torch.zeros(2, device=self.device)
        self._mixed, self._copied = self._averaged()
        self._losses = Replayed(self._iterate) if self.recorded else self._iterate

    def _modules(self):
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema,
            "projector": self.projector,
        }

    # --- one iteration -----------------------------------------------------------------------------------------

    def step(self):
        """One iteration: batch, discriminator, generator, average. Returns the losses as tensors on the device."""
        self._set_inputs()
        losses = self._losses()
        self._average()
        self.iteration += 1
        return losses

    def _set_inputs(self):
        """What the iteration's number decides goes into tensors that stay in place: a recorded step reads it there."""
        self.rows.copy_(self.order.rows(self.iteration))
        self.quadrant.fill_(int(torch.randint(4, ())))
        self.noise.fill_(self._noise())
        if self.barlow:
            self.ramp.fill_(self._ramp())

    def _iterate(self):
        real = self._batch()
        z = parallel.drawn(torch.randn, (len(real), self.generator.nz), device=self.device)
        with devices.autocast(self.device, self.generator.ngf):
            fake = [diff_augment(view, self.settings.augment) for view in self.generator(z, with_small=True)]
        return self._discriminator_step(real, fake) | self._generator_step(fake)

    def _discriminator_step(self, real, fake):
        s = self.settings
        view = diff_augment(real, s.augment)
        with devices.autocast(self.device, self.generator.ngf):
            judged = self._judge(view, small_view(view))
            d_real, d_fake = hinge_d_loss(judged.logits, self._judge(*(f.detach() for f in fake)).logits)
            rebuild = self._reconstruction(view, judged)
            total = d_real + d_fake + rebuild
            losses = {"d_real": d_real, "d_fake": d_fake, "reconstruction": rebuild}
            if self.barlow:
                other = diff_augment(real, s.augment)
                embed = [self.projector(j.last.mean((2, 3))) for j in (judged, self._judge(other, small_view(other)))]
                on_diag, off_diag = barlow_twins(*map(parallel.gathered, embed))
                weighted = self.ramp * (on_diag + BARLOW_LAMBDA * off_diag)
                total = total + weighted
                losses |= {"bt_on_diag": on_diag, "bt_off_diag": off_diag, "bt_weighted": weighted}
        self._descend(self.optimizer_d, total)
        return losses

    def _generator_step(self, fake):
        # The discriminator passes gradients on here but needs none of its own: a third of its backward is saved.
        trained = [p for p in self.discriminator.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        with devices.autocast(self.device, self.generator.ngf):
            loss = hinge_g_loss(self._judge(*fake).logits)
        self._descend(self.optimizer_g, loss)
        for parameter in trained:
            parameter.requires_grad_(True)
        return {"g": loss}

    def _judge(self, images, small):
        if getattr(self.settings, "noise_sigma", 0) > 0:
            views = (images, small)
            images, small = (view + self.noise * parallel.drawn_like(torch.randn_like, view) for view in views)
        return self.discriminator(images, small)

    def _reconstruction(self, real, judged):
        """Perceptual distance between real images and what the decoders rebuild of them (paper, section 3.2)."""
        whole, from_small, part = self.discriminator.reconstruct(judged, self.quadrant)
        side = whole.shape[-1]

        def scaled(images):
            return F.interpolate(images, size=side, mode="area" if images.shape[-1] > side else "nearest")

        pair = torch.cat([whole, from_small])  # of one target, whose features are then needed only once
        return 2 * self.perceptual(pair, scaled(real)) + self.perceptual(part, scaled(quadrant_of(real, self.quadrant)))

    def _descend(self, optimizer, loss):
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        parallel.average(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        self.scaler.step(optimizer)
        self.scaler.update()

    @torch.no_grad()
    def _average(self):
        """Exponential moving average of weights and BatchNorm statistics; faster at first, to forget the start."""
        decay = min(self.settings.ema_decay, (1 + self.iteration) / (10 + self.iteration))
        torch._foreach_lerp_(*self._mixed, 1 - decay)
        torch._foreach_copy_(*self._copied)

    def _averaged(self):
        """(tensors of the average, their live ones) that are mixed, and the same of those that are copied."""
        averaged, live = self.ema.state_dict(), self.generator.state_dict()
        # The singular vectors of spectral norm and BatchNorm's counters are states, not quantities to average.
        copied = [name for name in live if name.endswith(("_u", "_v", "num_batches_tracked"))]
        mixed = [name for name in live if name not in copied]
        return [([averaged[name] for name in names], [live[name] for name in names]) for names in (mixed, copied)]

    def _batch(self):
        """The iteration's real images, this process's share of them: (B, 3, S, S) in [-1, 1], half of them mirrored."""
        batch = self.images[self.rows].permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
        mirrored = parallel.drawn(torch.rand, (len(batch),), device=self.device) < 0.5
        return torch.where(mirrored[:, None, None, None], batch.flip(3), batch)

    def _ramp(self):
        s = self.settings
        return s.bt_weight * min(1.0, (self.iteration + 1) / max(1, s.bt_ramp))

    def _noise(self):
        s = self.settings
        return getattr(s, "noise_sigma", 0) * max(0.0, 1 - self.iteration / max(1, getattr(s, "noise_decay", 1)))

    # --- the loop ----------------------------------------------------------------------------------------------

    def run(self):
        """Train to the end.

        Returns:
            (history, quality): DataFrames of losses and of distances to real images; the latter in the main process.

        Raises:
            Unfinished: `max_minutes` are over; the checkpoint is written, the same call goes on.
            UserError: a loss is no longer a number; the last good checkpoint is named.
        """
        s, main = self.settings, parallel.is_main()
        end = math.inf if s.max_minutes is None else time.monotonic() + 60 * s.max_minutes
        pending = []
        if main and self.iteration == 0:
            self._look(force=True)
        pace = 2 if parallel.size() == 1 else 30  # seconds; in a notebook, another process's bar is a line each time
        with tqdm(total=s.iterations, initial=self.iteration, unit="it", mininterval=pace, disable=not main) as bar:
            while self.iteration < s.iterations:
                pending.append(self.step())
                bar.update()
                last = self.iteration == s.iterations
                checkpoint = last or self.iteration % s.checkpoint_every == 0
                out_of_time = False
                if checkpoint or self.iteration % LOG_EVERY == 0:
                    self._log(pending, bar)
                    pending = []
                    # The clock is read only here, so that it cuts no row of the history in two.
                    out_of_time = parallel.from_main(time.monotonic() > end)
                if main:
                    self._look(force=last)
                    if checkpoint or out_of_time:
                        self.save()
                if out_of_time and not last:
                    parallel.from_main(None)  # it has written: whoever ends first may take the others along
                    raise Unfinished(
                        f"Stopped at iteration {self.iteration} of {s.iterations} after {s.max_minutes:g} minutes; "
                        "run the same command again to go on."
                    )
        if main:
            checkpoints.save_generator(self.folder / "generator.safetensors", self.ema, self._header())
        parallel.from_main(None)  # its files are complete when any process goes on
        return pd.DataFrame(self.history), pd.DataFrame(self.quality)

    def _log(self, pending, bar):
        means = {name: torch.stack([losses[name].detach() for losses in pending]).mean() for name in pending[0]}
        parallel.average(means.values())  # of the whole batch: what is not a number is none in any process
        mean = {name: float(value) for name, value in means.items()}
        broken = [f"loss {name}" for name, value in mean.items() if not np.isfinite(value)]
        # A finite loss can still have had a gradient that was not: such weights must not reach a checkpoint.
        broken += [f"state of the {name}" for name, module in self._modules().items() if not _finite(module)]
        if broken:
            kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint.exists() else "none was kept yet"
            raise UserError(
                f"The {', '.join(broken)} was no longer a number by iteration {self.iteration}; {kept}. "
                "Lower learning_rate and run again."
            )
        self.history.append({"iteration": self.iteration, **mean})
        rate = bar.format_dict["rate"] or 0
        bar.set_postfix(
            {"images/s": f"{rate * self.settings.batch_size:.0f}", **{k: f"{v:.2f}" for k, v in mean.items()}},
            refresh=False,
        )

    def _look(self, force):
        """Draw the sample grid and measure the distance to real images, when they are due."""
        s = self.settings
        if force or self.iteration % s.sample_every == 0:
            pictures = samples(self.ema)
            grid = generation.mosaic(pictures, GRID)
            with atomic_path(self.folder / "samples" / f"{self.iteration:06d}.png") as temporary:
                Image.fromarray(grid).save(temporary)
            if self.on_sample:
                self.on_sample(self.iteration, grid)
        if self.evaluate and (force or self.iteration % s.evaluate_every == 0):
            pictures = generation.sample(self.ema, SAMPLE_SEED, range(s.quality_images))
            found = {"iteration": self.iteration, **self.evaluate(pictures)}
            self.quality.append(found)
            if self.best is None or found["kid"] < self.best["kid"]:
                self.best = found
                checkpoints.save_generator(self.folder / "best.safetensors", self.ema, self._header(quality=found))

    # --- checkpoints -------------------------------------------------------------------------------------------

    @property
    def checkpoint(self):
        return self.folder / "checkpoint.safetensors"

    def _header(self, **more):
        return {
            "settings": asdict(self.settings),
            "iteration": self.iteration,
            "architecture": checkpoints.generator_architecture(self.generator),
            **more,
        }

    def save(self):
        """Write everything that the run needs to go on; history and quality also as CSV."""
        tensors, optimizers = {"rng.cpu": torch.get_rng_state()}, {}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for name, module in self._modules().items():
            tensors |= checkpoints.prefixed(name, module.state_dict())
        for name, optimizer in (("optimizer_g", self.optimizer_g), ("optimizer_d", self.optimizer_d)):
            state = optimizer.state_dict()
            optimizers[name] = state["param_groups"]
            for index, slots in state["state"].items():
                tensors |= checkpoints.prefixed(f"{name}.{index}", slots)
        header = self._header(
            kind="training",
            optimizers=optimizers,
            scaler=self.scaler.state_dict(),
            best=self.best,
            history=self.history,
            quality=self.quality,
        )
        # The checkpoint last: what a kill between them leaves behind is then written again.
        for name, rows in (("history", self.history), ("quality", self.quality)):
            with atomic_path(self.folder / f"{name}.csv") as temporary:
                pd.DataFrame(rows).to_csv(temporary, index=False)
        checkpoints.save(self.checkpoint, tensors, header)

    def _resume(self):
        tensors, header = checkpoints.load(self.checkpoint)
        asked = asdict(self.settings)
        # A setting that came later than the checkpoint stood at what is its default now.
        there = asdict(type(self.settings)()) | header.get("settings", {})
        differ = [name for name, value in asked.items() if name not in FREE_SETTINGS and there.get(name) != value]
        if differ:
            raise UserError(
                f"{self.checkpoint} was trained with other settings ({', '.join(differ)}): choose another run folder, "
                "or delete that file to train anew."
            )
        for name, module in self._modules().items():
            module.load_state_dict(checkpoints.without_prefix(name, tensors))
        for name, optimizer in (("optimizer_g", self.optimizer_g), ("optimizer_d", self.optimizer_d)):
            slots = {}
            for key, tensor in checkpoints.without_prefix(name, tensors).items():
                index, slot = key.split(".")
                slots.setdefault(int(index), {})[slot] = tensor
            # What the optimiser may do here, this device decides, not the one that wrote the checkpoint.
            groups = [group | {"capturable": self.recorded} for group in header["optimizers"][name]]
            optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.scaler.load_state_dict(header["scaler"])
        self.iteration, self.best = header["iteration"], header["best"]
        self.history, self.quality = header["history"], header["quality"]
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
