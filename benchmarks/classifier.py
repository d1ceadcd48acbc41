"""The classifier's training loop against the plain one, and prediction: python benchmarks/classifier.py.

The plain loop is the usual one: torchvision's MobileNetV2, `ImageFolder`, a `DataLoader` with a worker for each core,
and torchvision's transforms. Ours takes images from the cache, where they were decoded once, and changes them a batch
at a time. Both train the same network on the same files, in turn, each time in a process of its own, and the second of
two epochs counts. Prediction goes through `predict_folder`, from JPEG files to the CSV file. The images are real ones
where the environment variable HAM10000_DIR names a folder of HAM10000, smooth noise otherwise.
"""

import argparse
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from common import write_section
from PIL import Image
from train_step import peak_memory

from stgan_utils.lesions import CLASSES

PACKAGES = ("torch", "torchvision", "pillow")
NAME = "classifier-mobilenetv2"


def make_images(folder, count, size, real):
    """`count` JPEG files of `size` px, in a folder for each class in turn, from the files `real` or of noise."""
    for code in CLASSES:
        (folder / code).mkdir(parents=True)
    for i in range(count):
        if real:
            image = Image.open(real[i % len(real)]).convert("RGB")
        else:
            image = Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8))
        image.resize((size, size)).save(folder / CLASSES[i % len(CLASSES)] / f"{i:06d}.jpg", quality=92)


def alone(function, *args):
    """What `function(*args)` returns in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def train_ours(folder, size, batch):
    """Images a second of `finetune.train` in its second epoch, with all that it does there besides (statistics of the
    averaged weights, checkpoint), and the seconds in which the cache was made before."""
    import pandas as pd

    from stgan_utils import data, finetune
    from stgan_utils.config import ClassifierSettings

    table = pd.DataFrame({"path": [str(path) for path in sorted(folder.rglob("*.jpg"))]})
    labels = [Path(path).parent.name for path in table["path"]]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["STGAN_CACHE"] = scratch
        began = perf_counter()
        images = data.image_cache(table, size)
        cached = perf_counter() - began
        settings, ends = ClassifierSettings(size=size, epochs=2, batch_size=batch, pretrained="none"), []
        train = partial(finetune.train, settings, images, labels, range(len(labels)), None, Path(scratch))
        train(on_epoch=lambda _: ends.append(perf_counter()))
    return len(labels) // batch * batch / (ends[1] - ends[0]), cached


def train_plain(folder, size, batch):
    """Images a second of the plain loop in its second epoch."""
    import torch
    from torch.nn import functional as F
    from torchvision import datasets, models
    from torchvision import transforms as T

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views = T.Compose(
        [
            T.Resize((size, size)),
            T.RandomHorizontalFlip(),
            T.RandomVerticalFlip(),
            T.RandomAffine(180, translate=(0.1, 0.1), scale=(0.8, 1.2), interpolation=T.InterpolationMode.BILINEAR),
            T.ColorJitter(0.2, 0.2, 0.2),
            T.ToTensor(),
            T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    files = datasets.ImageFolder(folder, views)
    options = {"num_workers": os.cpu_count(), "persistent_workers": True, "pin_memory": device.type == "cuda"}
    loader = torch.utils.data.DataLoader(files, batch, shuffle=True, drop_last=True, **options)
    model = models.mobilenet_v2(num_classes=len(CLASSES)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(2):
        began = perf_counter()
        for images, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(device)), targets.to(device))
            loss.backward()
            optimizer.step()
            loss.item()
    return len(loader) * batch / (perf_counter() - began)


def predict(folder, count):
    """(images a second, peak memory in bytes) of `predict_folder` for the first `count` images, from file to CSV, by
    the released classifier."""
    from stgan_utils import weights
    from stgan_utils.classifier import Classifier
    from stgan_utils.predict import predict_folder

    model = Classifier.load(weights.path(NAME))
    with tempfile.TemporaryDirectory() as scratch:
        some = Path(scratch, "images")
        some.mkdir()
        for path in sorted(folder.rglob("*.jpg"), key=lambda path: path.name)[:count]:
            (some / path.name).write_bytes(path.read_bytes())
        began = perf_counter()
        written, _ = predict_folder(model, some, Path(scratch, "out.csv"))
        seconds = perf_counter() - began
    assert written == count, (written, count)
    return count / seconds, peak_memory()


def training(folder, args):
    """Markdown: images a second of both loops."""
    ours, plain, cached = [], [], []
    for repeat in range(args.repeats):
        plain.append(alone(train_plain, folder, args.size, args.batch))
        speed, seconds = alone(train_ours, folder, args.size, args.batch)
        ours.append(speed)
        cached.append(seconds)
        print(f"run {repeat + 1}: plain {plain[-1]:.1f}, ours {ours[-1]:.1f} images/s", flush=True)
    ratio = np.array(ours) / plain
    return f"""| | images/s |
|---|---|
| plain loop | {median(plain):.1f} |
| ours | {median(ours):.1f} |
| times as fast (lowest – highest) | **{median(ratio):.2f}×** ({ratio.min():.2f} – {ratio.max():.2f}) |

Decoding into the cache, once and not counted above: {args.images / median(cached):.0f} images/s."""


def prediction(folder, args):
    """Markdown table: images a second and peak memory for a quarter of the images and for all of them."""
    lines = ["| images | images/s | peak memory |", "|---|---|---|"]
    for count in (args.predicted // 4, args.predicted):
        found = [alone(predict, folder, count) for _ in range(args.repeats)]
        speeds, peaks = zip(*found, strict=True)
        lines.append(
            f"| {count:,} | **{median(speeds):.1f}** ({min(speeds):.1f} – {max(speeds):.1f}) "
            f"| {median(peaks) / 2**20:.0f} MiB |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main():
    from stgan_utils import device, weights
    from stgan_utils.classifier import Classifier
    from stgan_utils.config import ClassifierSettings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=320, help="images of an epoch of training (default 320)")
    parser.add_argument("--predicted", type=int, default=1000, help="images predicted (default 1000)")
    parser.add_argument("--size", type=int, default=224, help="side in pixels (default 224)")
    parser.add_argument("--batch", type=int, default=32, help="images a training step (default 32)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each program (default 5)")
    args = parser.parse_args()
    real = sorted(Path(os.environ.get("HAM10000_DIR") or os.devnull).rglob("*.jpg"))
    with tempfile.TemporaryDirectory() as name:
        trained, predicted = Path(name, "trained"), Path(name, "predicted")
        make_images(trained, args.images, args.size, real)
        make_images(predicted, args.predicted, args.size, real)
        trained_table, predicted_table = training(trained, args), prediction(predicted, args)
    views = Classifier.load(weights.path(NAME)).answering["views"]
    source = "real HAM10000 images" if real else "images of smooth noise"
    body = f"""
{args.size}-px JPEG files, {source}; {args.repeats} runs, each in a process of its own; medians.

Training on {args.images:,} images, batch {args.batch}, MobileNetV2 with all its layers learning; ours on
{device.describe(ClassifierSettings().width)}, the plain loop in float32:

{trained_table}

Prediction by `{NAME}` ({views} views of an image, float32), from files to the CSV file:

{predicted_table}
"""
    print(body)
    write_section("Classifier", body, PACKAGES)


if __name__ == "__main__":
    main()
