"""A classifier that takes raw images and answers with named classes: the model and its file. Training: `finetune`.

Two rules make the prior system's 11 % impossible. The scaling of the input is part of the model and of its file:
callers hand over `uint8` pixels. The order of the classes is part of the file too, and no position ever leaves this
module: answers are tables with named columns.
"""

from copy import deepcopy

import numpy as np
import pandas as pd
import torch
from torch import nn

from stgan_utils import checkpoints
from stgan_utils.backbone import CHANNELS, MOBILENET, NETWORKS, fold_batch_norm
from stgan_utils.config import UserError
from stgan_utils.lesions import CLASSES
from stgan_utils.views import ASIDE, aside


class Classifier(nn.Module):
    """A pretrained network's features, dropout, one linear layer.

    Args:
        preprocessing: {"size": side in pixels, "mean": [3], "std": [3]}, the last two for images in [0, 1].
        classes: class codes in the order of the outputs.
        answering: {"views": 1, it looks at the image as it is, or 2, it averages the logits of the views `views.ASIDE`;
            "temperature": what the logits are divided by before they become probabilities (C. Guo et al., ICML 2017);
            "weights": {class code: what its probability is multiplied by before all are scaled to sum to 1}, 1 for a
            class that is not named}.
        features: feature layers to start from, or None for random ones.
        settings: what it was trained with; kept in the file, used nowhere.
        network: whose features, a name in `backbone.NETWORKS`: MobileNetV2 (width 1.0), or what teaches it.
    """

    def __init__(self, preprocessing, classes=CLASSES, features=None, settings=None, answering=None, network=MOBILENET):
        super().__init__()
        self.network = network
        self.answering = {"views": 1, "temperature": 1.0, "weights": {}} | (answering or {})
        self.preprocessing, self.classes, self.settings = preprocessing, tuple(classes), settings or {}
        self.features = features or NETWORKS[network]()
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(CHANNELS, len(self.classes)))
        for name in ("mean", "std"):  # the file's header has them, so that they are there once
            self.register_buffer(name, torch.tensor(preprocessing[name]).view(1, 3, 1, 1), persistent=False)

    @property
    def size(self):
        return self.preprocessing["size"]

    @property
    def log_weights(self):
        """Natural logarithms of the weights that it answers with, (classes,) float64."""
        return torch.tensor([self.answering["weights"].get(code, 1.0) for code in self.classes]).double().log()

    def forward(self, images):
        """Logits (N, classes) of raw images: uint8 (N, S, S, 3), or float (N, 3, S, S) in [0, 1] after augmentation."""
        if images.dtype is torch.uint8:
            images = to_float(images)
        assert images.shape[1:] == (3, self.size, self.size), f"{tuple(images.shape)}, size is {self.size}"
        return self.head(self.features(self.scaled(images)).mean((2, 3)))

    def scaled(self, images):
        """What the first convolution sees of float images in [0, 1]."""
        return (images - self.mean) / self.std

    def predict_proba(self, images, rows=None, batch_size=64):
        """Probabilities as a DataFrame, one row an image, columns named by class.

        Args:
            images: uint8 (N, S, S, 3) array, memory-mapped or not, S the model's size.
            rows: which of them, in which order; all by default.
            batch_size: images at a time.
        """
        logits = self.logits(images, rows, batch_size).double() / self.answering["temperature"]
        return pd.DataFrame((logits + self.log_weights).softmax(1).numpy(), columns=list(self.classes))

    @torch.inference_mode()
    def logits(self, images, rows=None, batch_size=64):
        """Logits (N, classes) float32 on the CPU, averaged over the model's views; arguments as `predict_proba`."""
        self.eval()
        rows = np.arange(len(images)) if rows is None else np.asarray(rows)
        logits = [self._logits(images[rows[i : i + batch_size]]) for i in range(0, len(rows), batch_size)]
        return torch.cat(logits) if logits else torch.empty(0, len(self.classes))

    def _logits(self, images):
        batch = to_float(torch.from_numpy(np.asarray(images)).to(self.mean.device, non_blocking=True))
        views = [batch] if self.answering["views"] == 1 else [aside(batch, view) for view in range(len(ASIDE))]
        # In float32 everywhere: in bf16 a probability moves by up to 0.1, and one first answer in fifty with it.
        return torch.stack([self(view) for view in views]).mean(0).cpu()

    def fused(self):
        """A copy for prediction alone: each BatchNorm folded into the convolution before it."""
        copied = deepcopy(self).eval()
        fold_batch_norm(copied.features)
        return copied.to(memory_format=torch.channels_last)

    def save(self, path):
        """Weights as safetensors; all that belongs to them (class order, preprocessing, …) as JSON in its header."""
        header = {
            "architecture": {"kind": self.network},
            "class_order": list(self.classes),
            "preprocessing": self.preprocessing,
            "answering": self.answering,
            "settings": self.settings,
        }
        checkpoints.save(path, self.state_dict(), header)

    @classmethod
    def load(cls, path):
        """The classifier in a file that `save` wrote, in eval mode, on the CPU; order and scaling are the file's.

        Raises:
            UserError: no such file, none of ours, no classifier, without class order or preprocessing, other weights.
        """
        tensors, header = checkpoints.load(path)
        network = (header.get("architecture") or {}).get("kind")
        if network not in NETWORKS:
            raise UserError(f"{path} holds no {' or '.join(NETWORKS)} classifier.")
        classes, preprocessing = header.get("class_order"), header.get("preprocessing") or {}
        if sorted(classes or ()) != sorted(CLASSES):
            raise UserError(f"{path} has class order {classes}; a classifier names all of {', '.join(CLASSES)}.")
        if not {"size", "mean", "std"} <= preprocessing.keys():
            raise UserError(f"{path} does not say size, mean and std of its input: nobody can know how to feed it.")
        said = {name: header.get(name) for name in ("settings", "answering")}
        model = cls(preprocessing, classes, network=network, **said)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(f"{path} does not fit: {str(error).splitlines()[1].strip()}") from None
        return model.eval()


def to_float(images):
    """uint8 (N, S, S, 3) to float (N, 3, S, S) in [0, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float() / 255
