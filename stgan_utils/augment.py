"""DiffAugment: the same random changes for what the discriminator sees, real or generated.

S. Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS 2020 (arXiv:2006.10738). Every
operation is differentiable, so that the generator learns through it, and draws its numbers for each image.
"""

from functools import partial

import torch

from stgan_utils import parallel
from stgan_utils.config import UserError


def color(images):
    """Brightness ± 0.5, saturation × 0 … 2, contrast × 0.5 … 1.5, in that order."""
    numbers = parallel.drawn(torch.rand, (3, len(images), 1, 1, 1), dim=1, dtype=images.dtype, device=images.device)
    brightness, saturation, contrast = numbers.unbind()
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (saturation * 2)
    level = images.mean((1, 2, 3), keepdim=True)
    return level + (images - level) * (contrast + 0.5)


def translation(images, ratio=0.125):
    """Shift by up to `ratio` of the side in both directions; what comes in from outside is 0."""
    count, _, height, width = images.shape
    device = images.device

    def shift(most):
        return parallel.drawn(partial(torch.randint, -most, most + 1), (count, 1), device=device)

    down, right = shift(int(height * ratio)), shift(int(width * ratio))
    rows = torch.arange(height, device=device) + down
    columns = torch.arange(width, device=device) + right
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    picked = images[
        torch.arange(count, device=device)[:, None, None],
        :,
        rows.clamp(0, height - 1)[:, :, None],
        columns.clamp(0, width - 1)[:, None, :],
    ]
    # Contiguous, because whatever takes the images goes on in the layout that they come in.
    return (picked * inside[..., None]).permute(0, 3, 1, 2).contiguous()


POLICIES = {"color": color, "translation": translation}


def diff_augment(images, policy):
    """Random changes named in `policy`, in its order.

    Args:
        images: (B, C, H, W), about [-1, 1].
        policy: names of `POLICIES` joined by commas, such as "color,translation"; "" changes nothing.

    Raises:
        UserError: a name that there is no policy for.
    """
    for name in filter(None, policy.split(",")):
        if name not in POLICIES:
            raise UserError(f"augment names {name!r}, there are {', '.join(POLICIES)}.")
        images = POLICIES[name](images)
    return images
