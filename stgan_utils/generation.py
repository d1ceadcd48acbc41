"""Making images: every one from its own numbers, so that any single image can be made again from its row."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from stgan_utils import device as devices
from stgan_utils.config import UserError
from stgan_utils.files import atomic_path
from stgan_utils.layouts import IMAGE_SUFFIXES

BATCH = 64


def latents(generator, seed, indices):
    """What image number i of a seed is made of: z and one noise plane a noise layer.

    Drawn on the CPU from a random stream of its own per image, so that neither the batch nor the device changes it.

    Returns:
        z: (B, nz); noise: a list of (B, 1, side, side), one for each of `generator.noise_layers()`.
    """
    zs, planes = [], [[] for _ in generator.noise_layers()]
    for index in indices:
        stream = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, int(index)]).generate_state(1)[0]))
        zs.append(torch.randn(generator.nz, generator=stream))
        for plane, (_, side) in zip(planes, generator.noise_layers(), strict=True):
            plane.append(torch.randn(1, side, side, generator=stream))
    return torch.stack(zs), [torch.stack(plane) for plane in planes]


@torch.inference_mode()
def sample(generator, seed, indices):
    """Images number `indices` of a seed.

    Args:
        generator: in eval mode is meant; it is put there, and its mode is given back.
        seed: any non-negative integer.
        indices: which images.

    Returns:
        (N, S, S, 3) uint8.
    """
    indices = list(indices)
    device = next(generator.parameters()).device
    training = generator.training
    generator.eval()
    pictures = []
    try:
        for start in range(0, len(indices), BATCH):
            z, noise = latents(generator, seed, indices[start : start + BATCH])
            for (layer, _), plane in zip(generator.noise_layers(), noise, strict=True):
                layer.noise = plane.to(device)
            with devices.autocast(device):
                pictures.append(to_uint8(generator(z.to(device))))
    finally:
        for layer, _ in generator.noise_layers():
            layer.noise = None
        generator.train(training)
    return np.concatenate(pictures)


def to_uint8(images):
    """(B, 3, S, S) about [-1, 1] → (B, S, S, 3) uint8 in main memory."""
    scaled = (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def write_images(generator, code, count, seed, folder, checkpoint_sha256):
    """Write `count` images of one class as PNG, and `synthetic.csv` with a row for each.

    Images that are there already are kept: a killed run goes on where it was.

    Args:
        generator: a generator of `fastgan`.
        code: the class, which names the files: AKIEC_0001.png …
        count: how many.
        seed: with a latent index, all that an image depends on besides the checkpoint.
        folder: where `images/` and `synthetic.csv` go.
        checkpoint_sha256: of the file that the generator was loaded from.

    Returns:
        DataFrame: file (relative to `folder`), class, seed, latent_index, checkpoint_sha256.
    """
    rows = pd.DataFrame(
        {
            "file": [f"images/{code}_{index + 1:04d}.png" for index in range(count)],
            "class": code,
            "seed": seed,
            "latent_index": range(count),
            "checkpoint_sha256": checkpoint_sha256,
        }
    )
    missing = rows[[not (folder / file).exists() for file in rows["file"]]]
    for start in range(0, len(missing), BATCH):
        batch = missing.iloc[start : start + BATCH]
        for file, picture in zip(batch["file"], sample(generator, seed, batch["latent_index"]), strict=True):
            with atomic_path(folder / file) as temporary:
                Image.fromarray(picture).save(temporary)
    with atomic_path(folder / "synthetic.csv") as temporary:
        rows.to_csv(temporary, index=False)
    return rows


def list_synthetic(run_dir):
    """What Stage 2 has made in a run folder: DataFrame `class`, `path`, sorted by path.

    Raises:
        UserError: nothing yet.
    """
    tables = [
        pd.read_csv(file).assign(path=lambda rows, file=file: [str(file.parent / name) for name in rows["file"]])
        for file in sorted(Path(run_dir).glob("03_stage2_*/synthetic.csv"))
    ]
    if not tables:
        raise UserError(f"There are no generated images in {run_dir}: run notebooks/03_stage2_*.ipynb first.")
    return pd.concat(tables)[["class", "path"]].sort_values("path", ignore_index=True)


def list_images(folder):
    """The images of any folder, its sub-folders taken as classes: DataFrame `class`, `path`, sorted by path.

    Raises:
        UserError: no such folder, or no image in it.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"There is no image ({', '.join(IMAGE_SUFFIXES)}) in {folder}.")
    rows = [(path.parent.name if path.parent != folder else "all", str(path)) for path in paths]
    return pd.DataFrame(rows, columns=["class", "path"])
