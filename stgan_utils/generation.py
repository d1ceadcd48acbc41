"""Making images: every one from its own numbers, so that any single image can be made again from its row."""

import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from stgan_utils import checkpoints
from stgan_utils import device as devices
from stgan_utils.config import UserError
from stgan_utils.files import atomic_path, sha256, shown
from stgan_utils.layouts import IMAGE_SUFFIXES, images_below, whole_folder
from stgan_utils.lesions import CLASSES

BATCH = 16  # larger ones fall out of a CPU's caches and gain a GPU little
GRID = 64  # images on a grid at most


def latents(generator, seed, indices, truncation=1.0):
    """What image number i of a seed is made of: z and one noise plane a noise layer.

    Drawn on the CPU from a random stream of its own per image, so that neither the batch nor the device changes it.

    Args:
        truncation: z is multiplied by it. Below 1, images are closer to the average one: fewer failures, less variety.

    Returns:
        z: (B, nz); noise: a list of (B, 1, side, side), one for each of `generator.noise_layers()`.
    """
    zs, planes = [], [[] for _ in generator.noise_layers()]
    for index in indices:
        stream = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, int(index)]).generate_state(1)[0]))
        zs.append(torch.randn(generator.nz, generator=stream))
        for plane, (_, side) in zip(planes, generator.noise_layers(), strict=True):
            plane.append(torch.randn(1, side, side, generator=stream))
    return torch.stack(zs) * truncation, [torch.stack(plane) for plane in planes]


def sample(generator, seed, indices, truncation=1.0):
    """Images number `indices` of a seed.

    Args:
        generator: in eval mode is meant; it is put there, and its mode is given back.
        seed: any non-negative integer.
        indices: which images.
        truncation: see `latents`.

    Returns:
        (N, S, S, 3) uint8.
    """
    indices = list(indices)
    starts = range(0, len(indices), BATCH)
    return np.concatenate(
        [draw(generator, *latents(generator, seed, indices[start : start + BATCH], truncation)) for start in starts]
    )


@torch.inference_mode()
def draw(generator, z, noise):
    """The images of given latents, one batch: arguments as `latents` returns them, result as `sample`'s."""
    device = next(generator.parameters()).device
    training = generator.training
    generator.eval()
    try:
        for (layer, _), plane in zip(generator.noise_layers(), noise, strict=True):
            layer.noise = plane.to(device)
        with devices.autocast(device):
            return to_uint8(generator(z.to(device)))
    finally:
        for layer, _ in generator.noise_layers():
            layer.noise = None
        generator.train(training)


def interpolation(generator, seed, stops=6, steps=12, truncation=1.0):
    """A walk through the latents of images 0 … stops − 1 of a seed and back to the first, in `steps` frames each.

    Between two latents on the great circle (slerp): a straight line would pass through shorter, untypical ones. The
    noise is that of image 0 throughout.

    Returns:
        (stops · steps, S, S, 3) uint8.
    """
    z, noise = latents(generator, seed, range(stops), truncation)
    frames = []
    for start, end in zip(z, z.roll(-1, 0), strict=True):
        t = torch.arange(steps)[:, None] / steps
        path = torch.stack([slerp(start, end, float(at)) for at in t])
        frames.append(draw(generator, path, [plane[:1].expand(steps, -1, -1, -1) for plane in noise]))
    return np.concatenate(frames)


def slerp(start, end, t):
    """The vector a share t ∈ [0, 1] of the way from `start` to `end` on their great circle (K. Shoemake, 1985)."""
    angle = torch.acos(torch.nn.functional.cosine_similarity(start, end, dim=0))
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)


def mosaic(images, columns=8):
    """(N, S, S, 3) uint8 in rows of `columns`, white where the last row ends early: one image, without gaps."""
    rows = -(-len(images) // columns)
    sheet = np.full((rows * columns, *images.shape[1:]), 255, np.uint8)
    sheet[: len(images)] = images
    return np.concatenate(np.concatenate(sheet.reshape(rows, columns, *images.shape[1:]), axis=1), axis=1)


def to_uint8(images):
    """(B, 3, S, S) about [-1, 1] → (B, S, S, 3) uint8 in main memory."""
    scaled = (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def write_images(generator, code, count, seed, folder, checkpoint_sha256, truncation=1.0):
    """Write `count` images of one class as PNG, and `synthetic.csv` with a row for each.

    A killed run goes on where it was. Images that other numbers or another checkpoint made are made anew, so that a row
    always tells the truth of its image: the table is written after they are gone and before the first new one.

    Args:
        generator: a generator of `fastgan`.
        code: the class, which names the files: AKIEC_0001.png …
        count: how many.
        seed: with a latent index, all that an image depends on besides the checkpoint.
        folder: where `images/` and `synthetic.csv` go.
        checkpoint_sha256: of the file that the generator was loaded from.
        truncation: see `latents`.

    Returns:
        DataFrame: file (relative to `folder`), class, seed, latent_index, truncation, checkpoint_sha256.
    """
    rows = pd.DataFrame(
        {
            "file": [f"images/{code}_{index + 1:04d}.png" for index in range(count)],
            "class": code,
            "seed": seed,
            "latent_index": range(count),
            "truncation": truncation,
            "checkpoint_sha256": checkpoint_sha256,
        }
    )
    table = folder / "synthetic.csv"
    if not (table.exists() and table.read_text(encoding="utf-8") == rows.to_csv(index=False)):
        for stale in (folder / "images").glob("*.png"):
            stale.unlink()
        with atomic_path(table) as temporary:
            rows.to_csv(temporary, index=False)
    missing = rows[[not (folder / file).exists() for file in rows["file"]]]

    def save(file, picture):
        with atomic_path(folder / file) as temporary:
            Image.fromarray(picture).save(temporary)

    written = iter(())
    with ThreadPoolExecutor() as pool:  # a batch is written while the next is drawn
        for start in range(0, len(missing), BATCH):
            batch = missing.iloc[start : start + BATCH]
            pictures = sample(generator, seed, batch["latent_index"], truncation)
            list(written)  # raises what went wrong
            written = pool.map(save, batch["file"], pictures)
        list(written)
    return rows


def generate(checkpoint, count, folder, seed=0, truncation=1.0, code=None):
    """A new folder of images made by a generator's file: what `write_images` writes, `grid.png`, `interpolation.gif`.

    Args:
        checkpoint: any file that `checkpoints.load_generator` reads.
        count: how many images.
        folder: where to; it appears when all of it is made.
        seed, truncation: see `sample`.
        code: names the files; by default the class that the checkpoint was trained for, else ALL.

    Returns:
        As `write_images`.

    Raises:
        UserError: a folder with something in it, numbers out of range, or as `checkpoints.load_generator`.
    """
    folder = Path(folder).resolve()
    if folder == Path.cwd():
        raise UserError("The folder that you are in cannot appear whole: let --out name a new one.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: let --out name a new folder.")
    if count < 1 or seed < 0 or not 0 < truncation < math.inf:
        raise UserError(
            f"count is {count}, seed {seed}, truncation {truncation:g}: count must be at least 1, seed not negative, "
            "truncation above 0 (1 is none)."
        )
    generator = checkpoints.load_generator(checkpoint).to(devices.pick(), memory_format=torch.channels_last)
    header = checkpoints.read_header(checkpoint) if str(checkpoint).endswith(".safetensors") else {}
    code = code or header.get("settings", {}).get("lesion") or "ALL"
    if not re.fullmatch(r"[A-Za-z0-9-]+", code):
        raise UserError(f"lesion is {code!r}, it must be letters and digits: it names the files.")
    with whole_folder(folder) as made:
        rows = write_images(generator, code, count, seed, made, sha256(checkpoint), truncation)
        grid = mosaic(np.stack([np.asarray(Image.open(made / file)) for file in rows["file"][:GRID]]))
        Image.fromarray(grid).save(made / "grid.png")
        first, *others = _film(interpolation(generator, seed, truncation=truncation))
        first.save(made / "interpolation.gif", save_all=True, append_images=others, duration=60, loop=0)
    return rows


def _film(frames):
    """Frames with one palette for them all: with one for each, colours flicker and the file takes six times as long."""
    side, sheet = frames.shape[1], Image.fromarray(mosaic(frames, columns=1)).quantize()
    return [sheet.crop((0, top, side, top + side)) for top in range(0, sheet.height, side)]


def list_synthetic(run_dir):
    """What Stage 2 has made in a run folder: DataFrame `class`, `path`, sorted by path.

    Raises:
        UserError: nothing yet, or nothing to make.
    """
    tables = [
        pd.read_csv(file).assign(path=lambda rows, file=file: [str(file.parent / name) for name in rows["file"]])
        for file in sorted(Path(run_dir).glob("03_stage2_*/synthetic.csv"))
    ]
    if not tables:
        raise UserError(f"There are no generated images in {run_dir}: run notebooks/03_stage2_*.ipynb first.")
    made = pd.concat(tables)[["class", "path"]].sort_values("path", ignore_index=True)
    if not len(made):
        raise UserError(f"No class in {run_dir} lacks images to be as large as the largest: set generate for step 03.")
    return made


def movable(kept, run_dir):
    """The table of step 04 as it is written: files of the run folder by where they lie in it, since it may be moved."""

    def inside(path):
        return os.path.relpath(path, run_dir) if path and Path(path).is_relative_to(run_dir) else path

    return kept.assign(**{name: kept[name].map(inside, na_action="ignore") for name in ("path", "duplicate_of")})


def list_kept(run_dir, which="kept"):
    """What step 04 left of the generated images: DataFrame `label`, `path`, in the order of its table.

    Args:
        which: "kept" by its thresholds, "auto" by those that spare real lesions, "raw" for all images.

    Raises:
        UserError: step 04 has not run, or knew no real lesions ("auto"), or its images are of no class of ours.
    """
    file = Path(run_dir) / "04_deduplicate" / "dedup.csv"
    if not file.exists():
        raise UserError(f"{file} is missing: run step 04_deduplicate first.")
    made = pd.read_csv(file, dtype={"path": str}).rename(columns={"class": "label"})
    made["path"] = [str(Path(run_dir).resolve() / path) for path in made["path"]]  # `movable`; others are absolute
    made["label"] = made["label"].astype(str).str.upper()
    if unknown := sorted(set(made["label"]) - set(CLASSES)):
        raise UserError(
            f"{file} has images of class {', '.join(unknown)}: put them into folders named {', '.join(CLASSES)} "
            "and run step 04 again."
        )
    column = {"kept": "kept", "auto": "kept_auto", "raw": None}[which]
    if column and column not in made:
        raise UserError(f"{file} was made without real lesions, so nothing is known of sparing thresholds: use 'kept'.")
    return (made[made[column]] if column else made)[["label", "path"]]


def list_images(folder):
    """The images of any folder, its sub-folders taken as classes: DataFrame `class`, `path`, sorted by path.

    Raises:
        UserError: no such folder, no image in it, or names that are not UTF-8.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    paths = images_below(folder)
    if not paths:
        raise UserError(f"There is no image ({', '.join(IMAGE_SUFFIXES)}) in {folder}.")
    if unnamed := [path for path in paths if str(path) != shown(path)]:
        raise UserError(
            f"{len(unnamed)} file name(s) are not UTF-8 ({shown(unnamed[0])}), and no table can hold them: rename them."
        )
    rows = [(path.parent.name if path.parent != folder else "all", str(path)) for path in paths]
    return pd.DataFrame(rows, columns=["class", "path"])
