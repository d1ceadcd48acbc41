"""From any known dataset to one checked table, its split by lesion, and its images decoded once."""

import contextlib
import hashlib
import io
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from stgan_utils import phantom as phantom_images
from stgan_utils.config import DataSettings, UserError
from stgan_utils.files import atomic_path, sha256, shown, write_json
from stgan_utils.layouts import EXTRAS, read_layout
from stgan_utils.lesions import CLASSES

SPLITS = ("train", "val", "test")
FRACTIONS = (0.70, 0.15, 0.15)
NO_IMAGES = "{} holds no image that can be used; check that the images lie below this folder."
NO_LESION_IDS = (
    "does not say which images show the same lesion: some may be in two splits, which flatters test figures."
)
PHANTOM = (DataSettings.phantom_images, DataSettings.phantom_size, DataSettings.seed)


def cache_folder():
    """Where decoded images and what was learnt about files are kept: `STGAN_CACHE`, else `~/.cache/stgan`."""
    folder = Path(os.environ.get("STGAN_CACHE") or Path.home() / ".cache" / "stgan")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The cache folder {folder} cannot be made ({error}); set STGAN_CACHE to another.") from None
    return folder


def load_dataset(source, on_bad="error", bad_csv=None, phantom=PHANTOM):
    """The table of a dataset: one row an image, sorted by `image_id`.

    Columns: `image_id, lesion_id, label` (one of `CLASSES`), `path` (str, absolute) and, where the layout has them,
    `age, sex, localization, dx_type, dataset, synthetic` (True: made by a GAN). Every image has been decoded once.
    Lesions that have an identical file in common count as one. Where a layout has no lesion ids, every other image
    counts as its own: a warning says so (`has_lesion_ids`).

    Args:
        source: "phantom", or a folder (or the one file that describes the dataset) in a layout of `layouts.py`.
        on_bad: "error" refuses a dataset with missing or unreadable images, unknown labels or duplicate ids;
            "skip" leaves those rows out, lists them in `bad_csv` and warns.
        bad_csv: file for the rows left out (image_id, label, path, problem); by default `bad_images.csv` in the
            current folder.
        phantom: (images, side in pixels, seed) of the embedded dataset; drawn once, then kept in the user's cache.

    Raises:
        UserError: no such folder, an unknown layout, or (`on_bad="error"`) bad rows, counted and named.
    """
    _, table, bad = _read(source, phantom)
    if on_bad == "error" and len(bad):
        raise UserError(
            f"{source}: {len(bad)} image(s) cannot be used: {'; '.join(_by_problem(bad))}. "
            "`data check` lists them all. Mend them, or leave them out with on_bad='skip' (`run … -p on_bad skip`)."
        )
    if on_bad == "skip":
        bad_csv = Path(bad_csv or "bad_images.csv")
        with atomic_path(bad_csv) as temporary:
            bad.to_csv(temporary, index=False)
        if len(bad):
            warnings.warn(
                f"{len(bad)} image(s) left out, listed in {bad_csv}: {'; '.join(_by_problem(bad))}", stacklevel=2
            )
    if not len(table):
        raise UserError(NO_IMAGES.format(source))
    if not has_lesion_ids(table):
        warnings.warn(f"{source} {NO_LESION_IDS}", stacklevel=2)
    return table


def has_lesion_ids(table):
    """Whether the layout said which images show the same lesion; where it did not, each stands for its own."""
    first = table.groupby("lesion_id")["image_id"].transform("min")  # what a lesion without an id is called by `_read`
    return not (table["lesion_id"] == first).all()


def _read(source, phantom=PHANTOM):
    """(layout, table of good rows, table of bad rows with `problem`)."""
    drawn = str(source) == "phantom"
    if drawn:
        count, size, seed = phantom
        # A change of the drawing code makes another dataset.
        drawing = sha256(phantom_images.__file__)[:8]
        source = cache_folder() / f"phantom-{count}x{size}-seed{seed}-{drawing}"
        if not source.exists():
            phantom_images.write_dataset(source, count, size, seed)
    layout, table = read_layout(source, cache_folder())
    layout = "the embedded dataset, drawn" if drawn else layout
    if not len(table):
        raise UserError(NO_IMAGES.format(source))
    labels = [shown(label) for label in table["label"]]
    table["label"] = [label.strip().upper() if label.strip().upper() in CLASSES else label for label in labels]
    named = table["path"] == table["path"].map(shown)  # an archive of Windows may hold names that no CSV file can
    facts = _file_facts(table["path"][named])
    digest = table["path"].map(lambda path: facts.get(path, ""))

    # Of rows that agree on an id the first is good; where they disagree on the label none is.
    repeated = table.duplicated("image_id") | (table.groupby("image_id")["label"].transform("nunique") > 1)
    problem = pd.Series("", index=table.index)
    if "synthetic" in table:
        table["synthetic"] = _yes_or_no(table["synthetic"], source)
        # One lesion, then, on two sides: generated images are always trained on.
        problem[table["synthetic"] & digest.isin(digest[~table["synthetic"]])] = "generated copy of a real image"
    problem[digest == ""] = "unreadable"
    problem[table["path"] == ""] = "missing"
    problem[~named] = "file name is not UTF-8"
    for column in ("image_id", "path"):
        table[column] = table[column].where(named, table[column].map(shown))
    problem[repeated] = "duplicate id"
    unknown = ~table["label"].isin(CLASSES)
    problem[unknown] = "unknown label " + table["label"][unknown]

    known = table["lesion_id"] if "lesion_id" in table else pd.Series(np.nan, table.index, object)
    table["lesion_id"] = known.fillna(table["image_id"])
    columns = ["image_id", "lesion_id", "label", "path", *(column for column in EXTRAS if column in table)]
    good = table.loc[problem == "", columns].sort_values("image_id", ignore_index=True)
    good["lesion_id"] = _joined(good["lesion_id"], good["path"].map(facts))
    bad = table.assign(problem=problem).loc[problem != "", ["image_id", "label", "path", "problem"]]
    return layout, good, bad.sort_values(["problem", "image_id"], ignore_index=True)


def _yes_or_no(column, source):
    meant = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    values = column.astype(str).str.lower().map(meant)
    if values.isna().any():
        raise UserError(f"{source}: the column {column.name} must say True or False for every image.")
    return values.astype(bool)


def _joined(lesion_ids, digests):
    """Lesion ids in which lesions that have a file in common are one, named by the first of their ids."""
    while True:
        joined = lesion_ids.groupby(digests).transform("min").groupby(lesion_ids).transform("min")
        if joined.equals(lesion_ids):
            return joined
        lesion_ids = joined


def _named(ids, most=3):
    ids = list(map(str, ids))
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def _by_problem(bad, most=3):
    return [f"{len(rows)} {problem} ({_named(rows['image_id'], most)})" for problem, rows in bad.groupby("problem")]


def _file_facts(paths):
    """{path: SHA-256 of the file, or "" if it cannot be decoded} of the files that exist.

    Files are read once: what was learnt is kept in the cache folder, by path, size and time of change.
    """
    stats = {path: os.stat(path) for path in {*paths} if path and os.path.exists(path)}
    if not stats:
        return {}
    folders = "\n".join(sorted({os.path.dirname(path) for path in stats}))
    store = cache_folder() / f"files-{hashlib.sha256(folders.encode()).hexdigest()[:16]}.json"
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    marks = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
    # What could not be read is tried again: a network drive may have hiccuped.
    new = sorted(path for path in stats if known.get(path, [])[:2] != marks[path] or not known[path][2])
    if new:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = tqdm(pool.map(_digest, new), "checking images", len(new), leave=False, disable=len(new) < 2000)
            known |= {path: [*marks[path], digest] for path, digest in zip(new, digests, strict=True)}
        write_json(store, known)
    return {path: known[path][2] for path in stats}


def _digest(path):
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (1, 1))  # JPEG: every byte is read, few pixels are made
            _check_mode(image)
            image.load()
    except Exception:  # Pillow's decoders fail in many ways; to us they are one
        return ""
    return hashlib.sha256(content).hexdigest()


def split_by_lesion(table, fractions=FRACTIONS, seed=0):
    """The table with a column `split` ("train", "val" or "test"): stratified by class, no lesion on two sides.

    Within a class the lesions are put in the order of a hash of their id and the seed, and cut where the *images* reach
    the fractions; so the result depends neither on the order of the rows nor on the machine, library or version. Each
    split gets its fraction of a class to within one lesion, and at least one lesion of every class that has three.
    Generated images (`synthetic`) all go to "train".

    Args:
        table: with `image_id, lesion_id, label`.
        fractions: of train, val and test; sum 1, none negative.
        seed: another seed, another split.

    Raises:
        UserError: fractions that do not add up, or a lesion with two labels.
    """
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"fractions is {tuple(fractions)}; it must be three shares that sum to 1.")
    if len(torn := _two_labels(table)):
        raise UserError(
            f"{len(torn)} lesion(s), counting those that share a file as one, have images of two classes "
            f"({_named(torn)}); correct their labels."
        )
    real = table[~table["synthetic"].astype(bool)] if "synthetic" in table else table
    of_lesion = {}
    for _, rows in real.groupby("label"):
        images = rows["lesion_id"].value_counts()
        order = sorted(images.index, key=lambda lesion: hashlib.sha256(f"{seed}:{lesion}".encode()).digest())
        ends = images[order].cumsum().to_numpy()
        middles = (ends - images[order].to_numpy() / 2) / ends[-1]
        cuts = [0, *np.searchsorted(middles, np.cumsum(fractions[:-1])), len(order)]
        needed = [int(fraction > 0) for fraction in fractions]
        if len(order) >= sum(needed):
            for i in (1, 2):
                cuts[i] = max(cuts[i], cuts[i - 1] + needed[i - 1])
            for i in (2, 1):
                cuts[i] = min(cuts[i], cuts[i + 1] - needed[i])
        for split, start, end in zip(SPLITS, cuts, cuts[1:], strict=False):
            of_lesion |= dict.fromkeys(order[start:end], split)
    split = table["lesion_id"].map(of_lesion).where(table.index.isin(real.index), "train")
    return assert_disjoint(table.assign(split=split))


def _two_labels(table):
    labels = table.groupby("lesion_id")["label"].nunique()
    return labels.index[labels > 1]


def assert_disjoint(table):
    """The table itself, if every image has one split, and every lesion too.

    Raises:
        UserError: an unknown split, an image twice, or a lesion on two sides; the message names them.
    """
    if len(wrong := table.loc[~table["split"].isin(SPLITS), "image_id"]):
        raise UserError(f"{len(wrong)} image(s) have no split of {', '.join(SPLITS)} ({_named(wrong)}).")
    if len(twice := table.loc[table["image_id"].duplicated(), "image_id"]):
        raise UserError(f"{len(twice)} image(s) stand in the table twice ({_named(twice)}).")
    splits = table.groupby("lesion_id")["split"].nunique()
    if len(torn := splits.index[splits > 1]):
        raise UserError(f"{len(torn)} lesion(s) are in two splits ({_named(torn)}); make the split again.")
    return table


def save_table(table, path):
    with atomic_path(path) as temporary:
        assert_disjoint(table).to_csv(temporary, index=False)


def content(table):
    """SHA-256 of what a table with splits says and of its image files, wherever they lie."""
    facts = _file_facts(table["path"])
    known = table.drop(columns="path").assign(file=table["path"].map(facts))
    return hashlib.sha256(known.to_csv(index=False).encode()).hexdigest()


def read_table(path):
    """A table that `save_table` wrote, its split checked again.

    Raises:
        UserError: no such file, a column missing, an unknown label, or a lesion in two splits.
    """
    if not Path(path).exists():
        raise UserError(f"There is no dataset table {path}; run step 00 (notebooks/00_start_here.ipynb) first.")
    try:
        table = pd.read_csv(path, dtype={"image_id": str, "lesion_id": str})
    except (ValueError, pd.errors.ParserError):  # an empty file too
        raise UserError(f"{path} is no table; run step 00 again.") from None
    if missing := [column for column in ("image_id", "lesion_id", "label", "path", "split") if column not in table]:
        raise UserError(f"{path} has no column {', '.join(missing)}; run step 00 again.")
    if len(unknown := set(table["label"]) - set(CLASSES)):
        raise UserError(f"{path} has unknown label(s) {_named(sorted(map(str, unknown)))}; run step 00 again.")
    return assert_disjoint(table)


def image_cache(table, size, folder=None):
    """The table's images, decoded once: uint8 (N, size, size, 3), RGB, memory-mapped, in the table's row order.

    Of each image, upright, its largest central square, scaled (bicubic, antialiased): round stays round, whatever the
    format. The file is named by the content of every image file, so a changed image is noticed; another process that
    makes the same file at the same time does no harm.

    Args:
        table: with `path`.
        size: side in pixels.
        folder: where the file is kept; by default the user's cache.

    Raises:
        UserError: an image is missing or unreadable, or the disk is full.
    """
    paths = list(table["path"])
    facts = _file_facts(paths)
    if bad := [path for path in paths if not facts.get(path)]:
        raise UserError(f"{len(bad)} image(s) are missing or unreadable ({_named(bad)}); load the dataset again.")
    content = "\n".join(["upright central square", str(size), *(facts[path] for path in paths)])
    key = hashlib.sha256(content.encode()).hexdigest()
    file = Path(folder or cache_folder()) / f"images-{size}px-{key[:16]}.npy"
    if not file.exists():
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), size, size, 3)}
        with atomic_path(file) as temporary, open(temporary, "wb") as out, ThreadPoolExecutor(os.cpu_count()) as pool:
            np.lib.format.write_array_header_1_0(out, header)
            # Written in order, not into a memory map: on a full disk a map kills the process instead of raising.
            for pixels in tqdm(
                pool.map(lambda path: _decode(path, size), paths),
                f"decoding to {size} px",
                len(paths),
                leave=False,
                disable=len(paths) < 2000,
            ):
                out.write(pixels)
    return np.load(file, mmap_mode="c")  # copy on write: torch warns at arrays that it may not write


def load_images(paths, size):
    """A few images for a figure, (N, size, size, 3) uint8: as `image_cache` gives them, and nothing is kept."""
    return np.stack([np.frombuffer(_decode(path, size), np.uint8).reshape(size, size, 3) for path in paths])


def eight_bits(image):
    """An opened image whose pixels have 8 bits: of 16 bits of grey, which Pillow would cut off at 255, the upper ones.

    Raises:
        ValueError: pixels of 32 bits.
    """
    _check_mode(image)
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode.startswith("I") else image


def _check_mode(image):
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # an older Pillow's name for 16 bits in PNG
        raise ValueError("pixels of 32 bits, whose range nobody knows")  # converted, 0 … 1 would all be black


def _decode(path, size):
    with Image.open(path) as image:
        with contextlib.suppress(Exception):  # of damaged EXIF, which fails in many ways, nothing else depends on
            ImageOps.exif_transpose(image, in_place=True)  # a camera stores how it was held, and turns no pixel
        return ImageOps.fit(eight_bits(image).convert("RGB"), (size, size), Image.Resampling.BICUBIC).tobytes()


def check(source, phantom=PHANTOM):
    """What `data check` prints: counts per class and split, every bad image, identical files, and what would leak.

    Bad images are listed, never raised.

    Returns:
        (the text, how many images are bad or lesions have two classes: what `run` would refuse).

    Raises:
        UserError: no such folder, an unknown layout, or no image in it.
    """
    layout, table, bad = _read(source, phantom)
    facts = _file_facts(table["path"])
    same = table.groupby(table["path"].map(facts))["image_id"].agg(list)
    same = same[same.str.len() > 1]
    torn = _two_labels(table)
    table = split_by_lesion(table[~table["lesion_id"].isin(torn)])
    counts = pd.crosstab(table["label"], table["split"]).reindex(index=CLASSES, columns=SPLITS, fill_value=0)
    counts.insert(0, "lesions", table.groupby("label")["lesion_id"].nunique().reindex(CLASSES, fill_value=0))
    counts.insert(1, "images", counts[list(SPLITS)].sum(axis=1))
    counts.loc["all"] = counts.sum()

    images = table["lesion_id"].value_counts()
    several = images[images > 1]
    # Chance that a lesion's images, dealt one by one, do not all land in the same split.
    torn_apart = sum(1 - sum(fraction**count for fraction in FRACTIONS) for count in several)
    lines = [
        f"{source}: {layout}",
        "",
        counts.rename_axis(None).rename_axis(None, axis=1).to_string(),
        "",
        f"bad images: {len(bad)}",
        *(f"  {line}" for line in _by_problem(bad, most=len(bad))),
        f"lesions with images of two classes: {len(torn)}" + (f" ({_named(torn)})" if len(torn) else ""),
        f"identical files: {len(same)} group(s)" + (f" ({_named(map(' = '.join, same))})" if len(same) else ""),
        f"lesions with several images: {len(several)}; a random split by image would put about {torn_apart:.0f} "
        "of them on two sides, the split by lesion none"
        if has_lesion_ids(table)
        else f"lesions with several images: not known; this layout {NO_LESION_IDS}",
    ]
    return "\n".join(lines) + "\n", len(bad) + len(torn)
