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
import zlib
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from stgan_utils import checkpoints, generation, parallel
from stgan_utils.config import UserError
from stgan_utils.files import atomic_path
from stgan_utils.iteration import Iteration
from stgan_utils.runs import Unfinished

LOG_EVERY = 10  # iterations between two readings of the losses: each one makes the device wait
SAMPLE_SEED = 1234  # of the sample grid and of evaluation: the same latents each time
GRID = 8  # samples a row and rows of a grid

# Settings that a checkpoint does not depend on; the folder of a step is more particular (`runs.check_folder`).
FREE_SETTINGS = ("iterations", "max_minutes", "checkpoint_every", "sample_every", "ablation_iterations")


def samples(generator):
    """The pictures of the sample grid, (64, S, S, 3) uint8: the same latents at every iteration and in every run."""
    return generation.sample(generator, SAMPLE_SEED, range(GRID * GRID))


def _finite(module):
    numbers = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack(torch._foreach_norm(numbers)).isfinite().all())


class GanTrainer(Iteration):
    """A whole training: `run` is the loop.

    Args:
        settings: `Stage1Settings` or `Stage2Settings`.
        images: (N, S, S, 3) uint8, all of them used for training; may be memory-mapped.
        folder: the run's folder; a checkpoint in it is continued.
        start: (generator, discriminator) to begin from instead of random weights: Stage 2.
        evaluate: called with (M, S, S, 3) uint8 generated images, returns a dict with "kid"; None: never. Its
            `feature_space`, if it has one, is in the checkpoint: figures of another one do not compare.
        on_sample: called with (iteration, grid (H, W, 3) uint8) whenever a grid is drawn.

    Raises:
        UserError: fewer images than a batch, images of another size, a checkpoint of other settings or images, a batch
            that the processes cannot share equally.
    """

    def __init__(self, settings, images, folder, start=None, evaluate=None, on_sample=None):
        super().__init__(settings, images, start)
        self.folder, self.evaluate, self.on_sample = folder, evaluate, on_sample
        self.images_crc = zlib.crc32(np.ascontiguousarray(images))
        self.best, self.history, self.quality = None, [], []
        if self.checkpoint.exists():
            self._resume()

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
                "Train anew in another run folder with a lower learning_rate."
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
            self._measure(self.iteration, self.ema)

    def _measure(self, iteration, generator):
        pictures = generation.sample(generator, SAMPLE_SEED, range(self.settings.quality_images))
        found = {"iteration": iteration, **self.evaluate(pictures)}
        self.quality.append(found)
        if self.best is None or found["kid"] < self.best["kid"]:
            self.best = found
            checkpoints.save_generator(self.best_file, generator, self._header(iteration=iteration, quality=found))

    def _measure_anew(self):
        """KID in this session's feature space of the best generator so far and of the one at the start, as which `ema`
        must still be; what was measured in another space is dropped."""
        best = checkpoints.load_generator(self.best_file).to(self.device)
        iteration = checkpoints.read_header(self.best_file)["iteration"]
        self.best, self.quality = None, []
        self._measure(iteration, best)  # first: killed here, it is still in its file
        if iteration > 0:
            self._measure(0, self.ema)
        self.quality.reverse()

    # --- checkpoints -------------------------------------------------------------------------------------------

    @property
    def checkpoint(self):
        return self.folder / "checkpoint.safetensors"

    @property
    def best_file(self):
        return self.folder / "best.safetensors"

    @property
    def feature_space(self):
        return getattr(self.evaluate, "feature_space", None)

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
            feature_space=self.feature_space,
            images=self.images_crc,
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
        if header.get("images", self.images_crc) != self.images_crc:
            raise UserError(
                f"{self.checkpoint} was trained on other images: choose another run folder, or delete that file to "
                "train anew."
            )
        self.iteration, self.best = header["iteration"], header["best"]
        self.history, self.quality = header["history"], header["quality"]
        measures = self.best and self.evaluate and parallel.is_main() and self.iteration < self.settings.iterations
        if measures and header.get("feature_space", self.feature_space) != self.feature_space:
            print(f"KID: {self.feature_space} from here on; the start and the best generator are measured anew in it.")
            self._measure_anew()
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
        if header["scaler"]:  # empty where the session before had no need of one
            self.scaler.load_state_dict(header["scaler"])
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        elif self.device.type == "cuda":  # from a CPU
            torch.cuda.manual_seed(self.settings.seed + self.iteration)
