"""Fine-tuning the classifier: the loss, the draws, the loop; a killed run goes on."""

import math
import time
import zlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from tqdm.auto import tqdm

from stgan_utils import checkpoints, device
from stgan_utils.backbone import load_backbone
from stgan_utils.classifier import Classifier, to_float
from stgan_utils.config import UserError
from stgan_utils.evaluation import balanced_accuracy
from stgan_utils.files import atomic_path, sha256
from stgan_utils.lesions import CLASSES
from stgan_utils.views import augment, mix, trivial_augment

MODEL_FILE, CHECKPOINT_FILE, HISTORY_FILE = "model.safetensors", "checkpoint.safetensors", "history.csv"
STRONG = 1.5  # reach of "strong" augmentation


def log_prior(targets):
    """Natural logarithm of each class's share, (classes,) float32, from class numbers."""
    return torch.log(torch.bincount(torch.as_tensor(targets), minlength=len(CLASSES)) / len(targets))


def adjusted_loss(logits, targets, adjustment, label_smoothing=0.0):
    """Logit-adjusted cross-entropy of each image, (N,).

    The loss sees `logits + adjustment`, so that the logits alone learn to be balanced.

    With `adjustment` = τ · log prior, the arg max of the bare logits minimises the *balanced* error for τ = 1 (A. K.
    Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10). `targets` are class numbers (N,) or,
    for mixed images, shares (N, classes).
    """
    return F.cross_entropy(logits.float() + adjustment, targets, label_smoothing=label_smoothing, reduction="none")


def class_weights(accuracy_share, log_prior):
    """What to multiply balanced answers by, so that the arg max is the best one for both measures of accuracy.

    A right answer to an image of class y adds (1 - a) / (K π_y) + a to (1 - a) · balanced accuracy + a · accuracy, K
    classes of which y has the share π_y: the best answer is the largest P(y | image) times that (as in A. K. Menon et
    al., ICLR 2021, for a = 0). Logit adjustment leaves P(y | image) / π_y, so (1 - a) / K + a π_y is what is missing.

    Args:
        accuracy_share: a, 0 … 1.
        log_prior: natural logarithms of π, (classes,).

    Returns:
        {class code: weight}, 1 for each where a = 0.
    """
    weights = 1 - accuracy_share + accuracy_share * len(CLASSES) * log_prior.double().exp()
    return dict(zip(CLASSES, weights.tolist(), strict=True))


def fitted_temperature(logits, targets, log_weights=0.0):
    """The temperature T for which softmax(logits / T + log_weights) has the lowest cross-entropy (C. Guo et al., ICML
    2017).

    Args:
        logits: (N, classes) of images that were not trained on.
        targets: class numbers (N,).
        log_weights: (classes,), `Classifier.log_weights`.
    """
    targets = torch.as_tensor(targets)

    def cost(log_temperature):
        return F.cross_entropy(logits.double() / math.exp(log_temperature) + log_weights, targets).item()

    return math.exp(minimize_scalar(cost, bounds=(-3, 3), method="bounded").x)


def train(
    settings,
    images,
    labels,
    train_rows,
    val_rows,
    out_dir,
    prior_rows=None,
    taught=None,
    on_epoch=None,
    load=load_backbone,
):
    """Fine-tune on `train_rows`; the weights of the epoch best on `val_rows` go to `out_dir/model.safetensors`.

    AdamW, short warm-up, cosine to 0; pretrained layers learn at 0.3 of the head's rate. Judged and saved is the
    moving average of the weights; the temperature is fitted on `val_rows` at the end. After each epoch a checkpoint is
    written: called again, a killed run goes on and ends the same bit for bit (on the CPU), a finished one is left as it
    is. Torch's global generator is seeded.

    Args:
        settings: `ClassifierSettings`.
        images: uint8 (N, S, S, 3) of the settings' size, `data.image_cache`.
        labels: N class codes.
        train_rows: rows to learn from, real and synthetic.
        val_rows: rows to choose the epoch by: real images only. None: nothing is left to choose by (the refit of a
            recipe on all images); the last epoch's weights are kept, with the settings' temperature.
        prior_rows: rows whose class shares logit adjustment makes up for; `train_rows` by default. The real ones of
            them where generated images join: a network that can tell both kinds apart has learnt from the real ones
            alone how common each class is among real images.
        taught: what other networks answer: (N, classes) balanced probabilities in the order of `CLASSES`, and (N,), the
            share, 0 … 1, that the cross-entropy with them has in an image's loss (G. Hinton et al., arXiv:1503.02531).
            Not together with `mix`.
        on_epoch: called with the history after each epoch.
        load: `backbone.load_backbone` or `backbone.load_lite`: what network it is.

    Returns:
        History, a DataFrame with one row an epoch: epoch, train_loss, learning_rate (at the epoch's end),
        images_per_second (training alone) and, where there are `val_rows`, val_loss, val_accuracy,
        val_balanced_accuracy; also in `out_dir/history.csv`.

    Raises:
        UserError: a class without training images, fewer of them than a batch, no validation images, NaN, or an
            `out_dir` that holds another run.
    """
    labels, train_rows, out_dir = np.asarray(labels), np.asarray(train_rows), Path(out_dir)
    targets = torch.tensor([CLASSES.index(label) for label in labels])
    _check_sets(settings, labels, train_rows, val_rows)
    place = device.pick()
    torch.manual_seed(settings.seed)
    prior_rows = train_rows if prior_rows is None else np.asarray(prior_rows)
    prior = log_prior(targets[prior_rows])
    model, learnt = _start(settings, prior, place, load)
    optimizer = _optimizer(model, settings, 0.3 if learnt else 1.0)
    scaler = torch.amp.GradScaler(place.type, enabled=device.precision(place) is torch.float16)
    steps = min(len(train_rows), settings.epoch_images or len(train_rows)) // settings.batch_size
    total = steps * settings.epochs
    # The average reaches back over about a twentieth of the run.
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / max(1, total / 20)))
    adjustment = (settings.logit_adjustment * prior).to(place)

    reach = STRONG if settings.augmentation == "strong" else 1.0

    def view(rows):
        batch = torch.from_numpy(np.asarray(images[rows]))
        if settings.augmentation == "trivial":
            batch = trivial_augment(batch)
        return augment(to_float(batch.to(place, non_blocking=True)), reach)

    sets = {"train": train_rows, "val": val_rows, "prior": prior_rows}
    run = model.settings | {name: _digest(labels, rows) for name, rows in sets.items()}
    run["images"] = zlib.crc32(np.ascontiguousarray(images))
    source = run.pop("continue_from")  # what it is counts, and not where: a run folder may be moved
    run["begun_with"] = sha256(source) if source else None
    if taught is not None:
        answers, share = (torch.from_numpy(np.asarray(part, np.float32)) for part in taught)
        run["taught"] = zlib.crc32(answers.numpy().tobytes() + share.numpy().tobytes())
    history = _resume(out_dir / CHECKPOINT_FILE, run, model, average, optimizer)
    if len(history) == settings.epochs and (out_dir / HISTORY_FILE).exists():
        # Only looked at: on another processor the temperature differs in its last digits, and the file with it.
        return pd.DataFrame(history)
    for epoch in range(len(history), settings.epochs):
        # What an epoch draws depends on its number alone: a resumed run needs no generator's state.
        torch.manual_seed(settings.seed * 100_003 + epoch + 1)
        batches = train_rows[_draw(settings, targets[train_rows])[: steps * settings.batch_size]].reshape(steps, -1)
        _train_mode(model, settings)
        started, loss_sum = time.perf_counter(), torch.zeros((), device=place)
        progress = tqdm(batches, desc=f"epoch {epoch + 1}/{settings.epochs}", unit="batch", leave=False)
        for step, rows in enumerate(progress):
            done = (epoch * steps + step + 0.5) / total
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1, done / 0.1) * (0.5 + 0.5 * math.cos(math.pi * done))
            batch = view(rows)  # in full precision: half a float cannot tell neighbouring pixels apart
            batch, wanted = mix(batch, targets[rows].to(place), settings.mix)
            with device.autocast(place, settings.width):
                logits = model(batch)
            loss = adjusted_loss(logits, wanted, adjustment, settings.label_smoothing)
            if taught is not None:
                heard = F.cross_entropy(logits.float(), answers[rows].to(place), reduction="none")
                loss = loss.lerp(heard, share[rows].to(place))
            loss = loss.mean()
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
        _measure_statistics(average.module, settings, (view(rows) for rows in batches[: max(8, steps // 8)]))
        history.append(
            {
                "epoch": epoch + 1,
                "train_loss": loss_sum.item() / steps,
                **_validate(average.module, images, labels, val_rows),
                "learning_rate": optimizer.param_groups[-1]["lr"],
                "images_per_second": batches.size / seconds,
            }
        )
        scores = [row.get("val_balanced_accuracy", row["epoch"]) for row in history]
        if scores[-1] > max(scores[:-1], default=-1):
            average.module.save(out_dir / MODEL_FILE)
        # After the last epoch only the history is left to keep.
        state = _state(model, average, optimizer) if epoch + 1 < settings.epochs else {}
        checkpoints.save(out_dir / CHECKPOINT_FILE, state, {"run": run, "history": history})
        if on_epoch:
            on_epoch(pd.DataFrame(history))
    if val_rows is not None:
        _calibrate(out_dir / MODEL_FILE, images, targets, val_rows, place)
    history = pd.DataFrame(history)
    with atomic_path(out_dir / HISTORY_FILE) as temporary:
        history.to_csv(temporary, index=False)
    return history


def _check_sets(settings, labels, train_rows, val_rows):
    counts = Counter(labels[train_rows])
    empty = [code for code in CLASSES if not counts[code]]
    if empty:
        raise UserError(f"No training image of {', '.join(empty)}: the classifier needs some of each of the 7 classes.")
    drawn = min(len(train_rows), settings.epoch_images or len(train_rows))
    if drawn < settings.batch_size:
        raise UserError(f"{drawn} training images are less than a batch: lower batch_size={settings.batch_size}.")
    if val_rows is not None and not len(val_rows):
        raise UserError("No validation images to choose the best epoch by: enlarge the data or its validation share.")


def _start(settings, prior, place, load):
    """(the model to begin with, whether it has learnt something before)."""
    if settings.continue_from:
        model = Classifier.load(settings.continue_from)
        _order_outputs(model)
        model.preprocessing = {**model.preprocessing, "size": settings.size}
        name, learnt = model.settings["backbone"], True
    else:
        pretrained = load(settings.pretrained)
        preprocessing = {"size": settings.size, **pretrained.preprocessing}
        model = Classifier(preprocessing, features=pretrained.features, network=pretrained.network)
        name, learnt = pretrained.name, pretrained.sha256 is not None
    model.settings = asdict(settings) | {"backbone": name}
    weights = class_weights(settings.accuracy_share, prior)
    model.answering = {"views": settings.views, "temperature": settings.temperature, "weights": weights}
    model.features[: settings.frozen_blocks].requires_grad_(False)
    return model.to(place, memory_format=torch.channels_last), learnt


def _order_outputs(model):
    """Puts the outputs into the order of the targets, that of `CLASSES`: a file may have another."""
    order, last = [model.classes.index(code) for code in CLASSES], model.head[-1]
    last.load_state_dict({name: values[order] for name, values in last.state_dict().items()})
    model.classes = CLASSES


def _train_mode(model, settings):
    """Frozen blocks keep their BatchNorm statistics as well."""
    model.train()
    model.features[: settings.frozen_blocks].eval()


def _measure_statistics(model, settings, views):
    """BatchNorm statistics of averaged weights, frozen blocks aside.

    Running statistics are not those of averaged weights, and in a short run from random weights of no weights at all
    (they start at variance 1, layers may have 1e-5).
    """
    frozen, learning = model.features[: settings.frozen_blocks], model.features[settings.frozen_blocks :]
    update_bn((frozen.eval()(model.scaled(batch)) for batch in views), learning)


def _draw(settings, targets):
    """An epoch's order of the training images: each once, or each class as often as any other."""
    if settings.sampling == "balanced":
        weights = 1.0 / torch.bincount(targets)[targets]
        return torch.multinomial(weights, settings.epoch_images or len(targets), replacement=True)
    return torch.randperm(len(targets))


def _optimizer(model, settings, backbone_share):
    """AdamW; matrices and kernels decay, biases and BatchNorm do not."""
    groups = []
    for part, share in ((model.features, backbone_share), (model.head, 1.0)):
        learning = [parameter for parameter in part.parameters() if parameter.requires_grad]
        for decays in (True, False):
            parameters = [parameter for parameter in learning if (parameter.ndim > 1) is decays]
            decay = settings.weight_decay if decays else 0.0
            groups.append({"params": parameters, "weight_decay": decay, "peak": settings.learning_rate * share})
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def _validate(model, images, labels, rows):
    if rows is None:
        return {}
    proba = model.predict_proba(images, rows)
    truth = proba.to_numpy()[np.arange(len(rows)), proba.columns.get_indexer(labels[rows])]
    return {
        "val_loss": float(-np.log(truth.clip(1e-12)).mean()),
        "val_accuracy": float((proba.idxmax(axis=1) == labels[rows]).mean()),
        "val_balanced_accuracy": balanced_accuracy(labels[rows], proba),
    }


def _calibrate(path, images, targets, val_rows, place):
    model = Classifier.load(path).to(place)
    logits = model.logits(images, val_rows)
    model.answering["temperature"] = fitted_temperature(logits, targets[val_rows], model.log_weights)
    model.save(path)


def _stop_at_nan(number, epoch, step, out_dir):
    if not torch.isfinite(number):
        kept = f"the state after epoch {epoch} is in {out_dir / CHECKPOINT_FILE}" if epoch else "nothing was saved"
        raise UserError(
            f"The loss is NaN in epoch {epoch + 1}, batch {step + 1} or just before: train anew in another folder "
            f"with a lower learning_rate; {kept}."
        )


def _digest(labels, rows):
    """Changes with the rows and with their labels."""
    if rows is None:
        return None
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
    # Checkpoints once did not say which images, and of the weights that they began with only where they lay.
    begun_with = (run["begun_with"] or "weights") if header["run"].get("continue_from") else None
    there = {"images": run["images"], "begun_with": begun_with} | header["run"]
    if differ := [key for key in run if there.get(key) != run[key]]:
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
