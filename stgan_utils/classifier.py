"""MobileNetV2 that takes raw images and answers with named classes: training, saving, loading.

Two rules make the prior system's 11 % impossible. The scaling of the input is part of the model and of its file:
callers hand over `uint8` pixels. The order of the classes is part of the file too, and no position ever leaves this
module: answers are tables with named columns.
"""

import math
import time
import zlib
from collections import Counter
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.models import mobilenet_v2
from tqdm.auto import tqdm

from stgan_utils import checkpoints, device
from stgan_utils.backbone import CHANNELS, load_backbone
from stgan_utils.config import UserError
from stgan_utils.evaluation import balanced_accuracy
from stgan_utils.files import atomic_path
from stgan_utils.lesions import CLASSES

KIND = "mobilenet_v2"
MODEL_FILE, CHECKPOINT_FILE, HISTORY_FILE = "model.safetensors", "checkpoint.safetensors", "history.csv"


class Classifier(nn.Module):
    """MobileNetV2 (width 1.0), dropout, one linear layer.

    Args:
        preprocessing: {"size": side in pixels, "mean": [3], "std": [3]}, the last two for images in [0, 1].
        classes: class codes in the order of the outputs.
        features: feature layers to start from, or None for random ones.
        settings: what it was trained with; kept in the file, used nowhere.
    """

    def __init__(self, preprocessing, classes=CLASSES, features=None, settings=None):
        super().__init__()
        self.preprocessing, self.classes, self.settings = preprocessing, tuple(classes), settings or {}
        self.features = features or mobilenet_v2(weights=None).features
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(CHANNELS, len(self.classes)))
        for name in ("mean", "std"):  # the file's header has them, so that they are there once
            self.register_buffer(name, torch.tensor(preprocessing[name]).view(1, 3, 1, 1), persistent=False)

    @property
    def size(self):
        return self.preprocessing["size"]

    def forward(self, images):
        """Logits (N, classes) of raw images: uint8 (N, S, S, 3), or float (N, 3, S, S) in [0, 1] after augmentation."""
        if images.dtype is torch.uint8:
            images = to_float(images)
        assert images.shape[1:] == (3, self.size, self.size), f"{tuple(images.shape)}, size is {self.size}"
        return self.head(self.features((images - self.mean) / self.std).mean((2, 3)))

    @torch.inference_mode()
    def predict_proba(self, images, rows=None, batch_size=64, tta=False):
        """Probabilities as a DataFrame, one row an image, columns named by class.

        Args:
            images: uint8 (N, S, S, 3) array, memory-mapped or not, S the model's size.
            rows: which of them, in which order; all by default.
            tta: average the logits over the image and its flips (left-right, upside down, both).
        """
        self.eval()
        rows = np.arange(len(images)) if rows is None else np.asarray(rows)
        logits = [self._logits(images[rows[i : i + batch_size]], tta) for i in range(0, len(rows), batch_size)]
        logits = torch.cat(logits) if logits else torch.empty(0, len(self.classes))
        return pd.DataFrame(logits.double().softmax(1).numpy(), columns=list(self.classes))

    def _logits(self, images, tta):
        batch = to_float(torch.from_numpy(np.asarray(images)).to(self.mean.device, non_blocking=True))
        views = [()] if not tta else [(), (3,), (2,), (2, 3)]
        with device.autocast(batch.device):
            return torch.stack([self(batch.flip(view)).float() for view in views]).mean(0).cpu()

    def fused(self):
        """A copy for prediction alone: each BatchNorm folded into the convolution before it."""
        copied = deepcopy(self).eval()
        for block in copied.features.modules():
            if isinstance(block, nn.Sequential):
                for i in range(len(block) - 1):
                    if isinstance(block[i], nn.Conv2d) and isinstance(block[i + 1], nn.BatchNorm2d):
                        block[i], block[i + 1] = fuse_conv_bn_eval(block[i], block[i + 1]), nn.Identity()
        return copied.to(memory_format=torch.channels_last)

    def save(self, path):
        """Weights as safetensors; architecture, class order, preprocessing and settings as JSON in its header."""
        header = {
            "architecture": {"kind": KIND},
            "class_order": list(self.classes),
            "preprocessing": self.preprocessing,
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
        if header.get("architecture") != {"kind": KIND}:
            raise UserError(f"{path} holds no {KIND} classifier.")
        classes, preprocessing = header.get("class_order"), header.get("preprocessing") or {}
        if sorted(classes or ()) != sorted(CLASSES):
            raise UserError(f"{path} has class order {classes}; a classifier names all of {', '.join(CLASSES)}.")
        if not {"size", "mean", "std"} <= preprocessing.keys():
            raise UserError(f"{path} does not say size, mean and std of its input: nobody can know how to feed it.")
        model = cls(preprocessing, classes, settings=header.get("settings"))
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(f"{path} does not fit: {str(error).splitlines()[1].strip()}") from None
        return model.eval()


def to_float(images):
    """uint8 (N, S, S, 3) to float (N, 3, S, S) in [0, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float() / 255


def augment(images):
    """Random views of float (N, 3, S, S) images in [0, 1]; each image its own, the whole batch at once.

    A dermoscope has no up: flips and any quarter turn, ± 20°, zoom ± 20 %, shift ± 10 %, mirrored at the border. Light
    and cameras differ: brightness, contrast, saturation ± 20 %, each channel ± 5 %.
    """
    count, like = len(images), {"device": images.device}
    flip = torch.randint(0, 2, (count,), **like) * 2.0 - 1
    turn = torch.randint(0, 4, (count,), **like) * (math.pi / 2) + torch.empty(count, **like).uniform_(-1, 1) * 0.35
    zoom = torch.exp(torch.empty(count, **like).uniform_(-0.2, 0.2))
    cos, sin = torch.cos(turn) * zoom, torch.sin(turn) * zoom
    shift = torch.empty(2, count, **like).uniform_(-0.2, 0.2)  # the side of the image is 2
    rows = torch.stack([cos * flip, -sin, shift[0], sin * flip, cos, shift[1]], 1)
    grid = F.affine_grid(rows.view(count, 2, 3), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    brightness, contrast, saturation = torch.empty(3, count, 1, 1, 1, **like).uniform_(0.8, 1.2)
    tint = torch.empty(count, 3, 1, 1, **like).uniform_(0.95, 1.05)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * saturation
    level = images.mean((1, 2, 3), keepdim=True)
    return ((images - level) * contrast + level).mul(brightness * tint).clamp(0, 1)


def log_prior(targets):
    """Natural logarithm of each class's share, (classes,) float32, from class numbers."""
    return torch.log(torch.bincount(torch.as_tensor(targets), minlength=len(CLASSES)) / len(targets))


def adjusted_loss(logits, targets, adjustment, label_smoothing=0.0):
    """Logit-adjusted cross-entropy: the loss sees `logits + adjustment`, so that the logits alone learn to be balanced.

    With `adjustment` = τ · log prior, the arg max of the bare logits minimises the *balanced* error for τ = 1 (A. K.
    Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10).
    """
    return F.cross_entropy(logits.float() + adjustment, targets, label_smoothing=label_smoothing)


def train(settings, images, labels, train_rows, val_rows, out_dir, on_epoch=None):
    """Fine-tune on `train_rows`; the weights of the epoch best on `val_rows` go to `out_dir/model.safetensors`.

    AdamW, short warm-up, cosine to 0; pretrained layers learn at 0.3 of the head's rate. Judged and saved is the moving
    average of the weights. After each epoch a checkpoint is written: called again, a killed run goes on and ends the
    same bit for bit (on the CPU). Torch's global generator is seeded.

    Args:
        settings: `ClassifierSettings`.
        images: uint8 (N, S, S, 3) of the settings' size, `data.image_cache`.
        labels: N class codes.
        train_rows: rows to learn from, real and synthetic.
        val_rows: rows to choose the epoch by: real images only.
        on_epoch: called with the history after each epoch.

    Returns:
        History, a DataFrame with one row an epoch: epoch, train_loss, val_loss, val_accuracy, val_balanced_accuracy,
        learning_rate (at the epoch's end), images_per_second (training alone); also in `out_dir/history.csv`.

    Raises:
        UserError: a class without training images, fewer of them than a batch, no validation images, NaN, or an
            `out_dir` that holds another run.
    """
    labels, train_rows, val_rows = np.asarray(labels), np.asarray(train_rows), np.asarray(val_rows)
    out_dir = Path(out_dir)
    targets = torch.tensor([CLASSES.index(label) for label in labels])
    _check_sets(settings, labels, train_rows, val_rows)
    place = device.pick()
    torch.manual_seed(settings.seed)
    pretrained = load_backbone(settings.pretrained)
    model = Classifier(
        {"size": settings.size, **pretrained.preprocessing},
        features=pretrained.features,
        settings=asdict(settings) | {"backbone": pretrained.name},
    ).to(place, memory_format=torch.channels_last)
    optimizer = _optimizer(model, settings, 0.3 if pretrained.sha256 else 1.0)
    scaler = torch.amp.GradScaler(place.type, enabled=device.precision(place) is torch.float16)
    steps = len(train_rows) // settings.batch_size
    total = steps * settings.epochs
    # The average reaches back over about a twentieth of the run.
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / max(1, total / 20)))
    adjustment = (settings.logit_adjustment * log_prior(targets[train_rows])).to(place)

    def view(rows):
        return augment(to_float(torch.from_numpy(np.asarray(images[rows])).to(place, non_blocking=True)))

    run = {**model.settings, "train": _digest(labels, train_rows), "val": _digest(labels, val_rows)}
    history = _resume(out_dir / CHECKPOINT_FILE, run, model, average, optimizer)
    for epoch in range(len(history), settings.epochs):
        # What an epoch draws depends on its number alone: a resumed run needs no generator's state.
        torch.manual_seed(settings.seed * 100_003 + epoch + 1)
        batches = train_rows[torch.randperm(len(train_rows))[: steps * settings.batch_size]].reshape(steps, -1)
        model.train()
        started, loss_sum = time.perf_counter(), torch.zeros((), device=place)
        progress = tqdm(batches, desc=f"epoch {epoch + 1}/{settings.epochs}", unit="batch", leave=False)
        for step, rows in enumerate(progress):
            done = (epoch * steps + step + 0.5) / total
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1, done / 0.1) * (0.5 + 0.5 * math.cos(math.pi * done))
            batch = view(rows)  # in full precision: half a float cannot tell neighbouring pixels apart
            with device.autocast(place):
                logits = model(batch)
            loss = adjusted_loss(logits, targets[rows].to(place), adjustment, settings.label_smoothing)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(model)
            loss_sum += loss.detach()
            if step % 20 == 0 or step == steps - 1:  # reading the loss waits for a GPU
                _stop_at_nan(loss_sum, epoch, step, out_dir)
                progress.set_postfix(loss=f"{loss_sum.item() / (step + 1):.3f}")
        seconds = time.perf_counter() - started
        _stop_at_nan(sum(parameter.sum() for parameter in average.parameters()), epoch, step, out_dir)
        # Running statistics are not those of averaged weights, and in a short run from random weights of no weights at
        # all (they start at variance 1, layers may have 1e-5): measure them.
        update_bn((view(rows) for rows in batches[: max(8, steps // 8)]), average)
        history.append(
            {
                "epoch": epoch + 1,
                "train_loss": loss_sum.item() / steps,
                **_validate(average.module, images, labels, val_rows),
                "learning_rate": optimizer.param_groups[-1]["lr"],
                "images_per_second": batches.size / seconds,
            }
        )
        scores = [row["val_balanced_accuracy"] for row in history]
        if scores[-1] > max(scores[:-1], default=-1):
            average.module.save(out_dir / MODEL_FILE)
        # After the last epoch only the history is left to keep.
        state = _state(model, average, optimizer) if epoch + 1 < settings.epochs else {}
        checkpoints.save(out_dir / CHECKPOINT_FILE, state, {"run": run, "history": history})
        if on_epoch:
            on_epoch(pd.DataFrame(history))
    history = pd.DataFrame(history)
    with atomic_path(out_dir / HISTORY_FILE) as temporary:
        history.to_csv(temporary, index=False)
    return history


def _check_sets(settings, labels, train_rows, val_rows):
    counts = Counter(labels[train_rows])
    empty = [code for code in CLASSES if not counts[code]]
    if empty:
        raise UserError(f"No training image of {', '.join(empty)}: the classifier needs some of each of the 7 classes.")
    if len(train_rows) < settings.batch_size:
        raise UserError(
            f"{len(train_rows)} training images are less than a batch: lower batch_size={settings.batch_size}."
        )
    if not len(val_rows):
        raise UserError("No validation images to choose the best epoch by: enlarge the data or its validation share.")


def _optimizer(model, settings, backbone_share):
    """AdamW; matrices and kernels decay, biases and BatchNorm do not."""
    groups = []
    for part, share in ((model.features, backbone_share), (model.head, 1.0)):
        for decays in (True, False):
            parameters = [parameter for parameter in part.parameters() if (parameter.ndim > 1) is decays]
            decay = settings.weight_decay if decays else 0.0
            groups.append({"params": parameters, "weight_decay": decay, "peak": settings.learning_rate * share})
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def _validate(model, images, labels, rows):
    proba = model.predict_proba(images, rows)
    truth = proba.to_numpy()[np.arange(len(rows)), proba.columns.get_indexer(labels[rows])]
    return {
        "val_loss": float(-np.log(truth.clip(1e-12)).mean()),
        "val_accuracy": float((proba.idxmax(axis=1) == labels[rows]).mean()),
        "val_balanced_accuracy": balanced_accuracy(labels[rows], proba),
    }


def _stop_at_nan(number, epoch, step, out_dir):
    if not torch.isfinite(number):
        kept = f"the state after epoch {epoch} is in {out_dir / CHECKPOINT_FILE}" if epoch else "nothing was saved"
        raise UserError(
            f"The loss is NaN in epoch {epoch + 1}, batch {step + 1} or just before: lower learning_rate; {kept}."
        )


def _digest(labels, rows):
    """Changes with the rows and with their labels."""
    return zlib.crc32(",".join(f"{row} {label}" for row, label in zip(rows, labels[rows], strict=True)).encode())


def _state(model, average, optimizer):
    tensors = checkpoints.prefixed("model", model.state_dict()) | checkpoints.prefixed("average", average.state_dict())
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= checkpoints.prefixed(f"optimizer.{number}", state)
    return tensors


def _resume(path, run, model, average, optimizer):
    """History of the run in `path`, whose state is put into the three; an empty list where there is none."""
    if not path.exists():
        return []
    tensors, header = checkpoints.load(path)
    if header["run"] != run:
        differ = [key for key in run if header["run"].get(key) != run[key]]
        raise UserError(
            f"{path.parent} holds another run ({', '.join(differ)} differ): choose another folder or delete it."
        )
    if tensors:
        model.load_state_dict(checkpoints.without_prefix("model", tensors))
        average.load_state_dict(checkpoints.without_prefix("average", tensors))
        saved = optimizer.state_dict()
        for name, tensor in checkpoints.without_prefix("optimizer", tensors).items():
            number, _, key = name.partition(".")
            saved["state"].setdefault(int(number), {})[key] = tensor
        optimizer.load_state_dict(saved)
    return header["history"]
