"""The networks in whose feature spaces images are compared.

Images are uint8 arrays (N, H, W, 3), RGB; features are float32 arrays (N, D). Figures compare only with figures of the
same space, so every one of them names it.
"""

import hashlib
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from stgan_utils import backbone, device
from stgan_utils.config import UserError

KINDS = ("auto", "inception", "mobilenet", "baseline", "random")


class FeatureExtractor:
    """Turns images into feature vectors; made by `feature_extractor`.

    `name` is the feature space as every figure must call it, `dim` the number of features D, `note` a sentence on what
    figures in this space compare with, `file` what the weights were read from, None for random ones.
    """

    def __init__(self, name, dim, note, network, file=None):
        self.name, self.dim, self.note, self.file = name, dim, note, file
        self._network = network.eval().requires_grad_(False)
        # Distance, diversity and memorisation ask for the same few sets one after another.
        self._recent = OrderedDict()

    @torch.inference_mode()
    def __call__(self, images, batch_size=16):
        """Features, float32 (N, D), of uint8 images (N, H, W, 3) of any size."""
        images = np.ascontiguousarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 (N, H, W, 3), not {images.dtype} {images.shape}")
        key = (images.shape, hashlib.blake2b(images).digest())
        if key not in self._recent:
            network, starts = self._network.to(device.pick()), range(0, len(images), batch_size)
            batches = (torch.tensor(images[i : i + batch_size], device=device.pick()) for i in starts)
            self._recent[key] = torch.cat([network(batch.permute(0, 3, 1, 2))[0].cpu() for batch in batches]).numpy()
        self._recent.move_to_end(key)
        if len(self._recent) > 4:
            self._recent.popitem(last=False)
        return self._recent[key].copy()


def feature_extractor(kind="auto", baseline=None):
    """The network whose features are compared.

    Args:
        kind: "inception", torch-fidelity's Inception-v3, the one of published FID and KID; "mobilenet", pretrained
            MobileNetV2 at 128 px; "baseline", this run's own classifier; "random", MobileNetV2 with random weights
            (seed 0); "auto", the first of them that can be had, but Inception, some twenty times slower, only on a GPU
            or where the environment variable INCEPTION_WEIGHTS names its file.
        baseline: file of a classifier (safetensors).

    Raises:
        UserError: the kind asked for cannot be had, or INCEPTION_WEIGHTS names no file.
    """
    if kind not in KINDS:
        raise UserError(f"The feature extractor is {kind!r}, it must be one of {', '.join(KINDS)}.")
    named = os.environ.get("INCEPTION_WEIGHTS")
    if kind == "inception" or (kind == "auto" and (named or device.pick().type == "cuda")):
        path = Path(named) if named else backbone.hub_file(URL_INCEPTION_V3)
        if path or kind == "inception":
            note = "Inception-v3 features: figures compare with published ones that are of as many images."
            return FeatureExtractor("Inception-v3", 2048, note, _inception(path), path)
    if kind == "mobilenet" or (kind == "auto" and backbone.pretrained_source()):
        model = backbone.load_backbone(required=True)
        name, file = model.name, backbone.pretrained_source().path
        note = "Figures compare with figures of the same network, not with published ones (Inception-v3)."
    elif kind == "baseline" or (kind == "auto" and baseline):
        if not baseline:
            raise UserError("The feature extractor 'baseline' needs a classifier's file; run step 01 first.")
        from stgan_utils.classifier import Classifier

        model = Classifier.load(baseline)
        name, file = "MobileNetV2 (this run's baseline)", baseline
        note = "Features of a classifier trained in this run: figures compare only within this run."
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = backbone.load_backbone("none")
        name, file = "MobileNetV2 (random weights, seed 0)", None
        note = "Features of an untrained network: figures compare only with each other, and say little of what is seen."
    return FeatureExtractor(name, backbone.CHANNELS, note, _Pooled(model.features, model.preprocessing), file)


def _inception(path):
    try:
        # Refuses a file that holds anything but tensors, which torch-fidelity would go on to execute.
        torch.load(path, map_location="cpu", weights_only=True)
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:
        raise UserError(
            f"No Inception-v3 from {path or 'the network'}: fetch {URL_INCEPTION_V3} and let the environment variable "
            "INCEPTION_WEIGHTS name that file."
        ) from error


class _Pooled(nn.Module):
    """Resizing, scaling, features averaged over the image: a tuple, as torch-fidelity's extractors return it."""

    SIZE = 128

    def __init__(self, features, preprocessing):
        super().__init__()
        self.features = features
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocessing[name]).view(1, 3, 1, 1))

    def forward(self, images):
        images = nn.functional.interpolate(images.float() / 255, size=self.SIZE, mode="bilinear", antialias=True)
        return (self.features((images - self.mean) / self.std).mean((2, 3)),)
