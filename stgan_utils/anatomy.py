"""A look inside the two networks while they work: the maps that notebook 02 shows.

FastGAN, B. Liu et al., ICLR 2021: skip-layer excitation (section 3.1), the self-supervised discriminator (section 3.2).
"""

from typing import NamedTuple

import numpy as np
import torch

from stgan_utils import generation
from stgan_utils.fastgan import quadrant_of, small_view

SIDE = 64  # of the map that the 4-px map gates: there in a generator of any size


class Excitation(NamedTuple):
    """What the skip-layer excitation 4 → 64 px sees and does for B images; float32 in main memory, pictures uint8."""

    pictures: np.ndarray  # (B, S, S, 3)
    coarse: np.ndarray  # (B, C, 4, 4)
    gates: np.ndarray  # (B, D) in (0, 1): one factor a channel
    before: np.ndarray  # (B, D, 64, 64)
    after: np.ndarray  # (B, D, 64, 64): `before` times its gates


def excitation(generator, seed, indices):
    """The maps of images number `indices` of a seed, taken by forward hooks while `generation` draws those images.

    Returns:
        `Excitation`.
    """
    layer, taken = getattr(generator, f"se_{SIDE}"), {}

    def keep(module, inputs, output):
        taken.update(coarse=inputs[0], before=inputs[1], after=output)

    def keep_gates(module, inputs, output):
        taken["gates"] = output.flatten(1)

    hooks = [layer.register_forward_hook(keep), layer.main.register_forward_hook(keep_gates)]
    try:
        pictures = generation.draw(generator, *generation.latents(generator, seed, indices))
    finally:
        for hook in hooks:
            hook.remove()
    return Excitation(pictures, **{name: maps.float().cpu().numpy() for name, maps in taken.items()})


@torch.inference_mode()
def rebuilt(discriminator, images, quadrant=0):
    """Images beside what the discriminator's three decoders rebuild of them from its features.

    Args:
        discriminator: a `fastgan.Discriminator`; it is put into eval mode, and its mode is given back.
        images: uint8 (N, S, S, 3) of its size.
        quadrant: which quarter the third decoder is asked for, as `Discriminator.reconstruct` counts.

    Returns:
        {name of the row: uint8 (N, s, s, 3)} in the order to be shown; what is rebuilt has s = min(S, 128).
    """
    place, training = next(discriminator.parameters()).device, discriminator.training
    x = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).to(place).float() / 127.5 - 1
    discriminator.eval()
    try:
        whole, from_small, part = discriminator.reconstruct(discriminator(x, small_view(x)), quadrant)
    finally:
        discriminator.train(training)
    rows = {
        "real image": x,
        "rebuilt from the last map": whole,
        "rebuilt from the small view": from_small,
        "real, one quarter": quadrant_of(x, quadrant),
        "rebuilt from a quarter of a map": part,
    }
    return {name: generation.to_uint8(pictures) for name, pictures in rows.items()}
