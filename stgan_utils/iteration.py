"""One iteration of a GAN training: a batch, the discriminator's step, the generator's, the average of its weights."""

import weakref
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from stgan_utils import device as devices
from stgan_utils import parallel
from stgan_utils.augment import diff_augment
from stgan_utils.config import UserError
from stgan_utils.fastgan import Discriminator, Generator, quadrant_of, small_view
from stgan_utils.graphs import Replayed
from stgan_utils.losses import Projector, barlow_twins, hinge_d_loss, hinge_g_loss, perceptual_distance
from stgan_utils.order import Order

BARLOW_LAMBDA = 0.5  # weight of the off-diagonal part, both parts being means


class Iteration:
    """The networks of a training and their optimisers; `step` is one iteration, for Stage 1 and for Stage 2.

    In a script that `accelerate launch` started, it joins the other processes and takes its share of each batch.

    Args:
        settings: `Stage1Settings` or `Stage2Settings`.
        images: (N, S, S, 3) uint8, all of them used for training; may be memory-mapped.
        start: (generator, discriminator) to begin from instead of random weights: Stage 2.

    Raises:
        UserError: fewer images than a batch, images of another size, a batch that the processes cannot share equally.
    """

    def __init__(self, settings, images, start=None):
        if len(images) < settings.batch_size:
            raise UserError(
                f"There are {len(images)} training images, fewer than a batch of {settings.batch_size}: "
                "lower batch_size, or add images."
            )
        if images.shape[1:] != (settings.size, settings.size, 3):
            raise UserError(f"The images are {images.shape[1]} px, the settings ask for {settings.size} px.")
        parallel.join()
        parallel.check_batch(settings.batch_size, parallel.size())
        self.settings = settings
        self.device = devices.pick()
        self.images = torch.from_numpy(np.asarray(images))
        if self.device.type == "cuda":
            self.images = self.images.to(self.device)
        self._build(start)
        self.iteration = 0

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
        # No reference to itself: the networks leave the GPU's memory as soon as nobody needs them.
        self._losses = partial(type(self)._iterate, weakref.proxy(self))
        if self.recorded:
            self._losses = Replayed(self._losses)

    def _modules(self):
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema,
            "projector": self.projector,
        }

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
        seen = [view.detach().requires_grad_() for view in fake]  # the generator's gradients are taken here, then on
        found = self._discriminator_step(real, self._logits_of(seen))
        return found | self._generator_step(fake, seen, self._logits_of(seen))

    def _logits_of(self, views):
        with devices.autocast(self.device, self.generator.ngf):
            return self._judge(*views).logits

    def _discriminator_step(self, real, fake_logits):
        s = self.settings
        view = diff_augment(real, s.augment)
        with devices.autocast(self.device, self.generator.ngf):
            judged = self._judge(view, small_view(view))
            d_real, d_fake = hinge_d_loss(judged.logits, fake_logits)
            reconstruction = self._reconstruction(view, judged)
            # The distances of a batch's images add up, as in FastGAN's code, where its paper may be read as their mean.
            total = d_real + d_fake + s.batch_size * reconstruction
            losses = {"d_real": d_real, "d_fake": d_fake, "reconstruction": reconstruction}
            if self.barlow:
                other = diff_augment(real, s.augment)
                embed = [self.projector(j.last.mean((2, 3))) for j in (judged, self._judge(other, small_view(other)))]
                on_diag, off_diag = barlow_twins(*map(parallel.gathered, embed))
                weighted = self.ramp * (on_diag + BARLOW_LAMBDA * off_diag)
                total = total + weighted
                losses |= {"bt_on_diag": on_diag, "bt_off_diag": off_diag, "bt_weighted": weighted}
        self._descend(self.optimizer_d, [self.scaler.scale(total)])
        return losses

    def _generator_step(self, fake, seen, logits):
        loss = hinge_g_loss(logits)
        self.scaler.scale(loss).backward(inputs=seen)
        self._descend(self.optimizer_g, fake, [view.grad for view in seen])
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

    def _descend(self, optimizer, tensors, gradients=None):
        optimizer.zero_grad(set_to_none=True)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Of these alone: the discriminator passes the generator's gradients on, at two thirds of the cost of its own.
        torch.autograd.backward(tensors, gradients, inputs=trained)
        parallel.average(parameter.grad for parameter in trained if parameter.grad is not None)
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
