"""Views of real and generated images for the classifier, random ones to learn from and fixed ones to answer by: what a
dermoscope could have seen as well."""

import math

import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from stgan_utils.lesions import CLASSES

# The views by which a classifier answers: turned by so many degrees, so many times as much of the image shown. None is
# the file as it is: what a network learns from was turned and resampled by `augment`, and is never so sharp. They are
# half the work of the file and its flips; `benchmarks/views.py` sets both side by side.
ASIDE = ((15, 1.15), (195, 0.87))
_trivial = v2.TrivialAugmentWide()
_MIX = {
    "mixup": v2.MixUp(alpha=0.2, num_classes=len(CLASSES)),
    "cutmix": v2.CutMix(alpha=1.0, num_classes=len(CLASSES)),
}


def augment(images, reach=1.0):
    """Random views of float (N, 3, S, S) images in [0, 1]; each image its own, the whole batch at once.

    A dermoscope has no up: flips and any quarter turn, ± 20°, zoom ± 20 %, shift ± 10 %, mirrored at the border. Light
    and cameras differ: brightness, contrast, saturation ± 20 %, each channel ± 5 %. `reach` multiplies all of these
    ranges: clinics that a network has not seen differ by more.
    """
    count, like = len(images), {"device": images.device}
    flip = torch.randint(0, 2, (count,), **like) * 2.0 - 1
    turn = torch.randint(0, 4, (count,), **like) * (math.pi / 2)
    turn = turn + torch.empty(count, **like).uniform_(-1, 1) * 0.35 * reach
    zoom = torch.exp(torch.empty(count, **like).uniform_(-0.2, 0.2) * reach)
    shift = torch.empty(2, count, **like).uniform_(-0.2, 0.2) * reach  # the side of the image is 2
    images = _moved(images, turn, zoom, flip, shift)

    brightness, contrast, saturation = torch.empty(3, count, 1, 1, 1, **like).uniform_(-0.2, 0.2) * reach + 1
    tint = torch.empty(count, 3, 1, 1, **like).uniform_(-0.05, 0.05) * reach + 1
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * saturation
    level = images.mean((1, 2, 3), keepdim=True)
    return ((images - level) * contrast + level).mul(brightness * tint).clamp(0, 1)


def aside(images, view):
    """Float (N, 3, S, S) images in [0, 1] as number `view` of `ASIDE` shows them."""
    degrees, zoom = ASIDE[view]
    numbers = torch.tensor([math.radians(degrees), zoom, 1, 0, 0], device=images.device)
    turn, zoom, flip, *shift = numbers[:, None].expand(-1, len(images))
    return _moved(images, turn, zoom, flip, shift)


def _moved(images, turn, zoom, flip, shift):
    """Each image turned by `turn` radians, `zoom` times as much of it shown, mirrored where `flip` is -1, shifted.

    All but the images are (N,), `shift` two of them, the side of an image being 2. Borders are mirrored.
    """
    cos, sin = torch.cos(turn) * zoom, torch.sin(turn) * zoom
    rows = torch.stack([cos * flip, -sin, shift[0], sin * flip, cos, shift[1]], 1)
    grid = F.affine_grid(rows.view(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def trivial_augment(images):
    """TrivialAugment (S. G. Müller, F. Hutter, ICCV 2021), as torchvision has it: one random strong operation an image.

    Args and returns: uint8 (N, S, S, 3).
    """
    return torch.stack([_trivial(image) for image in images.permute(0, 3, 1, 2)]).permute(0, 2, 3, 1)


def mix(images, targets, kind):
    """Pairs of images joined, their labels in the same shares.

    Args:
        images: float (N, 3, S, S).
        targets: class numbers (N,).
        kind: "mixup" (H. Zhang et al., ICLR 2018, α = 0.2), "cutmix" (S. Yun et al., ICCV 2019, α = 1) or "none".

    Returns:
        (images, targets): float (N, 3, S, S), and class shares (N, classes) or, for "none", the class numbers.
    """
    return (images, targets) if kind == "none" else _MIX[kind](images, targets)
