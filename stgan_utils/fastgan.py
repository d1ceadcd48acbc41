"""FastGAN's generator and discriminator.

B. Liu, Y. Zhu, K. Song, A. Elgammal, "Towards Faster and Stabilized GAN Training for High-fidelity Few-shot Image
Synthesis", ICLR 2021 (openreview 1Fqg133qRaI). Written from the paper; the names of modules are those inside FastGAN's
own checkpoint files, and modules are created in that order, so that such files load exactly. Sizes below 256 px leave
out what is above them.

Convention: images are (B, 3, S, S), about [-1, 1]; feature maps are named by their side (`feat_64` is 64 px) in the
generator, and by how often the image has been halved (`down_8`: an eighth of 512) in the discriminator.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from stgan_utils import parallel
from stgan_utils.config import SIZES, UserError
from stgan_utils.layers import Blocks, GatedLinearUnit, Halved
from stgan_utils.spectral import spectral_norm

# Channels at each side in pixels, as multiples of the network's width.
GENERATOR_WIDTHS = {4: 16, 8: 8, 16: 4, 32: 2, 64: 2, 128: 1, 256: 0.5, 512: 0.25}
DISCRIMINATOR_WIDTHS = {8: 16, 16: 8, 32: 4, 64: 2, 128: 1, 256: 0.5, 512: 0.25}
DECODER_WIDTHS = {16: 4, 32: 2, 64: 2, 128: 1}

# Skip-layer excitation: the side that gates → the side that is gated.
GENERATOR_SKIPS = {64: 4, 128: 8, 256: 16, 512: 32}


def conv(inputs, outputs, kernel, stride=1, padding=0):
    return spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False))


def leaky():
    # In place: what comes before it, a convolution or BatchNorm, does not need its own result again.
    return nn.LeakyReLU(0.2, inplace=True)


class UpConv2d(nn.Conv2d):
    """Twice the side by nearest, then a 3×3 convolution with padding 1: (B, C, H, W) → (B, D, 2H, 2W).

    From 8 px on both are done as one transposed convolution of stride 2, whose 4×4 kernel holds the sums of those 3×3
    weights that meet the same pixel: equal up to rounding, for 4 products a pixel in place of 9.
    """

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        # Column by column: which of the 9 weights go into each of the 16, which are mirrored as the operation wants.
        single = torch.eye(9).view(9, 1, 3, 3)
        sums = F.avg_pool2d(single, 2, stride=1, padding=1, divisor_override=1).flip(2, 3).flatten(1)
        self.register_buffer("sums", sums, persistent=False)

    def forward(self, features):
        # On smaller maps, summing the many weights costs more than it saves.
        if features.shape[-1] < 8:
            return super().forward(F.interpolate(features, scale_factor=2))
        kernel = (self.weight.transpose(0, 1).flatten(2) @ self.sums).unflatten(2, (4, 4))
        return F.conv_transpose2d(features, kernel, stride=2, padding=1)


def upsample(inputs, outputs):
    """Two places in a block, as in FastGAN's files: the first has no weights there either."""
    return [nn.Identity(), spectral_norm(UpConv2d(inputs, outputs))]


class NoiseInjection(nn.Module):
    """Adds one plane of unit Gaussian noise, times a learnt weight that starts at 0.

    `noise`, if set to a (B, 1, H, W) tensor, is used in place of fresh noise: an image can then be made again.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.noise = None

    def forward(self, features):
        batch, _, height, width = features.shape
        noise = self.noise
        if noise is None:
            noise = parallel.drawn(torch.randn, (batch, 1, height, width), device=features.device)
        # In the precision of the features: the weight's would be that of all that follows in the block.
        return features + (self.weight * noise).to(features.dtype)


class SkipLayerExcitation(nn.Module):
    """Gates the channels of a large feature map with a small one: y = large · sigmoid(f(small)) (paper, eq. 1)."""

    def __init__(self, small, large):
        super().__init__()
        self.main = nn.Sequential(Blocks(), conv(small, large, 4), nn.SiLU(), conv(large, large, 1), nn.Sigmoid())

    def forward(self, small, large):
        return large * self.main(small)


def up_block(inputs, outputs):
    """Twice the side: nearest, convolution, BatchNorm, gated linear unit."""
    return nn.Sequential(*upsample(inputs, outputs * 2), nn.BatchNorm2d(outputs * 2), GatedLinearUnit())


def compound_up_block(inputs, outputs):
    """As `up_block`, with noise, and a second convolution at the new side."""
    layers = []
    for convolution in (upsample(inputs, outputs * 2), [conv(outputs, outputs * 2, 3, padding=1)]):
        layers += [*convolution, NoiseInjection(), nn.BatchNorm2d(outputs * 2), GatedLinearUnit()]
    return nn.Sequential(*layers)


class InitLayer(nn.Module):
    """z (B, nz) → (B, channels, 4, 4)."""

    def __init__(self, nz, channels):
        super().__init__()
        first = spectral_norm(nn.ConvTranspose2d(nz, channels * 2, 4, bias=False))
        self.init = nn.Sequential(first, nn.BatchNorm2d(channels * 2), GatedLinearUnit())

    def forward(self, z):
        return self.init(z[:, :, None, None])


def initialise(module):
    """Weights from N(0, 0.02), BatchNorm scales from N(1, 0.02), as FastGAN starts."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        # Spectral norm keeps the trained weight under this name.
        nn.init.normal_(getattr(module, "weight_orig", module.weight), 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def small_size(size):
    """Side of the second, smaller view that the discriminator judges: 128 px, or half of what is no larger."""
    return 128 if size > 128 else size // 2


def small_view(images):
    """(B, 3, S, S) → (B, 3, s, s) with s = `small_size(S)`, by averaging."""
    return F.interpolate(images, size=small_size(images.shape[-1]), mode="area")


def _check_size(size):
    if size not in SIZES:
        raise UserError(f"There is no FastGAN of {size} px here; sizes are {', '.join(map(str, SIZES))}.")


class Generator(nn.Module):
    """z (B, nz) → images (B, 3, size, size), about [-1, 1] (FastGAN applies no tanh up to 512 px).

    Args:
        size: 64, 128, 256 or 512 px.
        ngf: width; 64 in the paper (29.1 M parameters at 256 px).
        nz: length of the latent.

    Raises:
        UserError: another size.
    """

    def __init__(self, size=256, ngf=64, nz=256):
        super().__init__()
        _check_size(size)
        self.size, self.ngf, self.nz = size, ngf, nz
        width = {side: int(times * ngf) for side, times in GENERATOR_WIDTHS.items()}

        self.init = InitLayer(nz, width[4])
        self._add_blocks(width, [side for side in (8, 16, 32, 64, 128, 256) if side <= size])
        self._add_skips(width, [side for side in (64, 128, 256) if side <= size])
        if size > 128:
            self.to_128 = conv(width[128], 3, 1)
        self.to_big = conv(width[size], 3, 3, padding=1)
        if size > 256:
            self._add_blocks(width, [512])
            self._add_skips(width, [512])
        self.apply(initialise)

    def _add_blocks(self, width, sides):
        for side in sides:
            block = compound_up_block if side in (8, 32, 128, 512) else up_block
            setattr(self, f"feat_{side}", block(width[side // 2], width[side]))

    def _add_skips(self, width, sides):
        for side in sides:
            setattr(self, f"se_{side}", SkipLayerExcitation(width[GENERATOR_SKIPS[side]], width[side]))

    def forward(self, z, with_small=False):
        """Images, or (images, their smaller view (B, 3, s, s)) as the discriminator takes them."""
        features = {4: self.init(z)}
        side = 4
        while side < self.size:
            side *= 2
            features[side] = getattr(self, f"feat_{side}")(features[side // 2])
            if side in GENERATOR_SKIPS:
                features[side] = getattr(self, f"se_{side}")(features[GENERATOR_SKIPS[side]], features[side])
        images = self.to_big(features[self.size])
        if not with_small:
            return images
        return images, self.to_128(features[128]) if self.size > 128 else small_view(images)

    def noise_layers(self):
        """[(module, side of its noise plane in pixels)] in the order in which they are met."""
        layers = []
        side = 4
        while side < self.size:
            side *= 2
            block = getattr(self, f"feat_{side}")
            layers += [(module, side) for module in block if isinstance(module, NoiseInjection)]
        return layers


class DownBlock(nn.Module):
    """Half the side: 4×4 convolution of stride 2, BatchNorm, LeakyReLU."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.main = nn.Sequential(conv(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), leaky())

    def forward(self, features):
        return self.main(features)


class ResidualDownBlock(nn.Module):
    """Half the side: the mean of two convolutions and of a pooled 1×1 path."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.main = nn.Sequential(
            *DownBlock(inputs, outputs).main,
            conv(outputs, outputs, 3, 1, 1),
            nn.BatchNorm2d(outputs),
            leaky(),
        )
        self.direct = nn.Sequential(Halved(), conv(inputs, outputs, 1), nn.BatchNorm2d(outputs), leaky())

    def forward(self, features):
        return (self.main(features) + self.direct(features)) / 2


class Decoder(nn.Module):
    """Features (B, C, 8, 8) → a picture of `size` px in [-1, 1]: the discriminator's self-supervision."""

    def __init__(self, inputs, base, size):
        super().__init__()
        layers = [nn.AdaptiveAvgPool2d(8)]
        for side in (16, 32, 64, 128):
            if side <= size:
                outputs = DECODER_WIDTHS[side] * base
                layers.append(up_block(inputs, outputs))
                inputs = outputs
        self.main = nn.Sequential(*layers, conv(inputs, 3, 3, padding=1), nn.Tanh())

    def forward(self, features):
        return self.main(features)


class Judgement(NamedTuple):
    """What the discriminator makes of a batch: `logits` (B, n), and the features that decoders and losses read."""

    logits: torch.Tensor
    last: torch.Tensor  # (B, 8 ndf, 8, 8)
    middle: torch.Tensor  # (B, 4 ndf, 16, 16)
    small: torch.Tensor  # (B, 4 ndf, 8, 8), of the smaller view


class Discriminator(nn.Module):
    """(images, smaller view) → `Judgement`; 25 logits (5×5) from each of the two branches.

    Args:
        size: 64, 128, 256 or 512 px.
        ndf: width; 64 in the paper (11.5 M parameters at 256 px).
        decoder_width: the decoders' width; half of `ndf` unless given.

    Raises:
        UserError: another size.
    """

    def __init__(self, size=256, ndf=64, decoder_width=None):
        super().__init__()
        _check_size(size)
        self.size, self.ndf, self.decoder_width = size, ndf, decoder_width or ndf // 2
        width = {side: int(times * ndf) for side, times in DISCRIMINATOR_WIDTHS.items()}
        # `down_k` leaves 512 / k channels' worth of side: down_64 ends at 8 px whatever the image's size.
        self.downs = [k for k in (4, 8, 16, 32, 64) if k >= 2048 // min(size, 256) // 2]
        stem = width[2 * min(size, 256)]
        first = conv(3, stem, 4, 2, 1) if size > 256 else conv(3, stem, 3, 1, 1)
        self.down_from_big = nn.Sequential(first, leaky())
        for k in self.downs:
            setattr(self, f"down_{k}", ResidualDownBlock(width[2048 // k], width[1024 // k]))
        self.rf_big = nn.Sequential(
            conv(width[16], width[8], 1),
            nn.BatchNorm2d(width[8]),
            leaky(),
            conv(width[8], 1, 4),
        )
        self.skips = {target: source for target, source in ((16, 2), (32, 4), (64, 8)) if source * 2 >= self.downs[0]}
        for target, source in self.skips.items():
            setattr(self, f"se_{source}_{target}", SkipLayerExcitation(width[1024 // source], width[1024 // target]))
        small = small_size(size)
        layers = [conv(3, width[2 * small], 4, 2, 1), leaky()]
        while small > 16:
            layers.append(DownBlock(width[2 * small], width[small]))
            small //= 2
        self.down_from_small = nn.Sequential(*layers)
        self.rf_small = conv(width[32], 1, 4)
        self.decoder_big = Decoder(width[16], self.decoder_width, size)
        self.decoder_part = Decoder(width[32], self.decoder_width, size)
        self.decoder_small = Decoder(width[32], self.decoder_width, size)
        self._frozen = []
        self.apply(initialise)

    def forward(self, images, small):
        features = {self.downs[0] // 2: self.down_from_big(images)}
        for k in self.downs:
            features[k] = getattr(self, f"down_{k}")(features[k // 2])
            if k in self.skips:
                source = self.skips[k]
                features[k] = getattr(self, f"se_{source}_{k}")(features[source], features[k])
        from_small = self.down_from_small(small)
        logits = torch.cat([self.rf_big(features[64]).flatten(1), self.rf_small(from_small).flatten(1)], dim=1)
        return Judgement(logits, features[64], features[32], from_small)

    def reconstruct(self, judged, quadrant):
        """Pictures rebuilt from features: of the whole, of the whole from the smaller view, of one quadrant.

        Args:
            judged: a `Judgement` of real images.
            quadrant: 0 … 3: top left, top right, bottom left, bottom right; or a tensor (1,) of it.

        Returns:
            Three (B, 3, s, s) in [-1, 1], s = min(size, 128).
        """
        part = self.decoder_part(quadrant_of(judged.middle, quadrant))
        return self.decoder_big(judged.last), self.decoder_small(judged.small), part

    def blocks(self):
        """Feature blocks counted from the image, each a list of modules: what `freeze(n)` freezes the first n of."""
        stems = [[self.down_from_big, self.down_from_small[0]]]
        for k in self.downs:
            skip = [getattr(self, f"se_{self.skips[k]}_{k}")] if k in self.skips else []
            stems.append([getattr(self, f"down_{k}"), *skip])
        for block, module in zip(stems[1:], self.down_from_small[2:], strict=False):
            block.append(module)
        return stems

    def freeze(self, count):
        """Freeze the first `count` blocks: no gradient, no BatchNorm statistics, no spectral-norm update.

        Freeze-D, S. Mo et al., 2020 (arXiv:2002.10964).

        Raises:
            UserError: there are fewer blocks.
        """
        blocks = self.blocks()
        if count > len(blocks):
            raise UserError(f"freeze_blocks is {count}; a discriminator of {self.size} px has {len(blocks)} blocks.")
        self._frozen = [module for block in blocks[:count] for module in block]
        for module in self._frozen:
            module.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self


def quadrant_of(images, quadrant):
    """One quarter of (B, C, S, S), (B, C, S/2, S/2), counted as in `Discriminator.reconstruct`.

    Its rows and columns are looked up, not cut out: nothing waits for the value of a `quadrant` on a GPU.
    """
    half = images.shape[-1] // 2
    side = torch.arange(half, device=images.device)
    return images.index_select(2, side + half * (quadrant // 2)).index_select(3, side + half * (quadrant % 2))
