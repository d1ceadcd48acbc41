"""The layouts in which HAM10000 is handed around, each read into one raw table.

A raw table has `image_id, lesion_id, label, path` and the extras that the layout knows. It is as good as its source:
`label` may be no class of ours, `path` is "" where there is no image, `lesion_id` is missing where the layout has none.
`data.load_dataset` does the judging.
"""

import errno
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from PIL import Image

from stgan_utils.config import UserError
from stgan_utils.files import sha256
from stgan_utils.lesions import CLASSES

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp")
EXTRAS = ("age", "sex", "localization", "dx_type", "dataset", "synthetic")
DEPTH = 3  # Kaggle mounts a dataset up to this many folders below /kaggle/input


def read_layout(source, cache):
    """(name of the layout, raw table) of a folder, or of the one file that describes a dataset.

    Args:
        source: a folder that holds a dataset itself or up to three folders deeper, or a metadata, ground-truth or
            `.npz` file. Images are looked for anywhere below the folder (that of the file, or the one that holds ISIC's
            `…_GroundTruth/`), by their file name.
        cache: folder for images that have to be unpacked first (DermaMNIST).

    Raises:
        UserError: no such folder, nothing in it that we know, or more than one dataset.
    """
    source = Path(os.path.abspath(Path(source).expanduser()))
    if not source.exists():
        raise UserError(f"There is no folder {source}; give a dataset's folder, or 'phantom' for the embedded one.")
    if source.is_file():
        found = [(name, source, read) for name, pattern, read in LAYOUTS if _matches(pattern, source)]
        # ISIC's archives unpack into `…_GroundTruth/` beside `…_Input/`.
        folder = source.parent.parent if source.parent.name.endswith("_GroundTruth") else source.parent
    else:
        found, folder = _search(source), source
    if not found:
        raise UserError(
            f"{source} is no dataset that we know: expected HAM10000_metadata(.csv), "
            "ISIC2018_Task3_Training_GroundTruth.csv, synthetic_dataset_labels.csv, dermamnist*.npz "
            "or a folder per class."
        )
    if len(found) > 1:
        listed = ", ".join(str(path.relative_to(folder)) for _, path, _ in found)
        raise UserError(f"{folder} holds more than one dataset ({listed}); name one of them.")
    name, path, read = found[0]
    return name, read(path, folder, cache)


@contextmanager
def whole_folder(folder):
    """A temporary folder beside `folder`; renamed to it when the block ends well, removed when it does not.

    Where another process has put a filled folder there meanwhile, that one stays: both were making the same.

    Raises:
        UserError: the disk is full.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        with suppress(OSError):
            folder.rmdir()  # an empty one is in the way on Windows
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"The disk is full: {folder} was not written; free some space and run again.") from error
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _matches(pattern, path):
    return re.fullmatch(pattern, path.name, re.IGNORECASE)


def _search(folder):
    """Every dataset at the shallowest level that has one; where kinds meet, the first in `LAYOUTS` counts."""
    level = [folder]
    for _ in range(DEPTH + 1):
        entries = [sorted(each.iterdir()) for each in level]
        files = [path for paths in entries for path in paths if path.is_file()]
        for name, pattern, read in LAYOUTS:
            if found := [(name, path, read) for path in files if _matches(pattern, path)]:
                return found
        folders = [[path for path in paths if path.is_dir() and not path.name.startswith(".")] for paths in entries]
        if found := [
            ("folder per class", parent, _read_class_folders)
            for parent, below in zip(level, folders, strict=True)
            if sum(path.name.upper() in CLASSES for path in below) >= 2
        ]:
            return found
        level = [path for below in folders for path in below]
    return []


def is_image(path):
    """Whether a path, relative to the folder that was named, is that of an image, by its suffix.

    Hidden files and the doubles that macOS puts into archives are none, nor is what a killed program half wrote.
    """
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path)


def is_hidden(path):
    """Whether a path, relative to the folder that was named, has a part that systems hide or that macOS added."""
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def images_below(folder):
    """Paths of all images below a folder, linked folders too, sorted."""
    return [Path(folder, path) for path in files_below(folder) if is_image(path)]


def files_below(folder):
    """Paths of all files below a folder, relative to it, linked folders too, sorted."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(path.relative_to(folder) for path in paths)


def _find_images(ids, folder):
    """Path of each id's image, "" where there is none. Kaggle has every image twice: the first path by name counts,
    and before other formats, which may be masks, a JPEG."""
    paths, jpeg = {}, (".jpg", ".jpeg", ".jfif")
    for path in sorted(images_below(folder), key=lambda path: (path.suffix.lower() not in jpeg, str(path))):
        paths.setdefault(path.stem, str(path))
    return [paths.get(each, "") for each in ids]


def _read_text(file, *columns):
    """A comma- or tab-separated file (Dataverse hands out both) with at least these columns."""
    try:
        with open(file, encoding="utf-8-sig") as text:
            separator = "\t" if "\t" in text.readline() else ","
        names = dict.fromkeys(("image_id", "lesion_id", "image", "filename"), str)  # 0001 is no number
        frame = pd.read_csv(file, sep=separator, encoding="utf-8-sig", dtype=names)
    except (UnicodeDecodeError, pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise UserError(f"{file} is not a readable table ({error}); download it again.") from None
    if missing := [column for column in columns if column not in frame]:
        raise UserError(f"{file} has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}.")
    return frame


def _labels_of_one_hot(frame, file):
    """Class codes of one-hot columns, found **by name**: no two published files agree on their order."""
    named = {str(column).strip().upper(): column for column in frame}
    if missing := [code for code in CLASSES if code not in named]:
        raise UserError(f"{file} has no column {', '.join(missing)}; one-hot labels need a column for every class.")
    try:
        hot = frame[[named[code] for code in CLASSES]].to_numpy(float) == 1
    except ValueError as error:
        raise UserError(f"{file} has one-hot labels that are not numbers ({error}); they must be 0 or 1.") from None
    codes = np.array(CLASSES)
    return ["+".join(codes[row]) or "no class" for row in hot]


def _stems(names):
    """The names without the suffix of an image; other dots are part of an id."""
    names = map(str, names)
    return [str(PurePath(name).with_suffix("")) if name.lower().endswith(IMAGE_SUFFIXES) else name for name in names]


def _read_ham10000(file, folder, cache):
    """Kaggle's `HAM10000_metadata.csv` and Dataverse's `HAM10000_metadata` or `.tab`."""
    frame = _read_text(file, "image_id", "lesion_id", "dx")
    frame = frame.rename(columns={"dx": "label"})
    return frame.assign(image_id=_stems(frame["image_id"]), path=_find_images(_stems(frame["image_id"]), folder))


def _read_isic(file, folder, cache):
    """One-hot ground truth; lesions from `ISIC2018_Task3_*_LesionGroupings.csv` where there is one below the folder."""
    frame = _read_text(file, "image")
    ids = _stems(frame["image"])
    table = pd.DataFrame({"image_id": ids, "label": _labels_of_one_hot(frame, file), "path": _find_images(ids, folder)})
    groupings = [path for path in folder.rglob("*LesionGroupings*.csv") if not is_hidden(path.relative_to(folder))]
    if groupings:
        lesions = pd.concat([_read_text(each, "image", "lesion_id") for each in sorted(groupings)])
        lesions = lesions.drop_duplicates("image")
        lesions = lesions.rename(columns={"image": "image_id", "diagnosis_confirm_type": "dx_type"})
        table = table.merge(lesions, on="image_id", how="left")
    return table


def _read_prior(file, folder, cache):
    """The prior system's set: `NV_0001_R.jpg` is real, `NV_0001_F.jpg` generated; no lesion ids.

    The class stands in the file name too: where it contradicts the columns, the label is reported as unknown.
    """
    frame = _read_text(file, "filename")
    ids = _stems(frame["filename"])
    labels = [
        label if (named := each.split("_")[0]) == label or named not in CLASSES else f"{label} in a file named {named}"
        for each, label in zip(ids, _labels_of_one_hot(frame, file), strict=True)
    ]
    synthetic = [each.endswith("_F") for each in ids]
    return pd.DataFrame({"image_id": ids, "label": labels, "path": _find_images(ids, folder), "synthetic": synthetic})


def _read_dermamnist(file, folder, cache):
    """DermaMNIST (28, 64, 128 or 224 px); its images are written once, as PNG, to `cache`.

    Its own split is not kept: it puts images of one lesion on both sides (K. Abhishek et al., Sci. Data 12, 196, 2025).
    It has no lesion ids, so a split by lesion cannot mend that; use one of the other layouts for figures that count.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images = np.concatenate([arrays[f"{part}_images"] for part in ("train", "val", "test")])
            labels = np.concatenate([arrays[f"{part}_labels"].ravel() for part in ("train", "val", "test")])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{file} is not a DermaMNIST file ({error}); download it again.") from None
    fits = images.dtype == np.uint8 and images.shape[3:] == (3,) and images.ndim == 4 and len(labels) == len(images)
    if not fits or labels.dtype.kind not in "iu":
        raise UserError(f"{file} is not a DermaMNIST file: it has no uint8 RGB images with a number for each.")
    pictures = cache / f"dermamnist-{sha256(file)[:16]}"
    ids = [f"dermamnist_{number:05d}" for number in range(len(images))]
    if not pictures.exists():
        with whole_folder(pictures) as temporary:
            for each, image in zip(ids, images, strict=True):
                Image.fromarray(image).save(temporary / f"{each}.png", compress_level=1)
    known = dict(enumerate(CLASSES))
    return pd.DataFrame(
        {
            "image_id": ids,
            "label": [known.get(int(label), str(label)) for label in labels],
            "path": [str(pictures / f"{each}.png") for each in ids],
        }
    )


def _read_class_folders(parent, folder, cache):
    """A folder per class, named by its code in any case; no lesion ids. The id is `CLASS/name`: names may repeat."""
    rows = [
        (str(path.relative_to(parent).with_suffix("")), below.name, str(path))
        for below in sorted(parent.iterdir())
        if below.is_dir() and not below.name.startswith(".")
        for path in images_below(below)
    ]
    return pd.DataFrame(rows, columns=["image_id", "label", "path"])


# In the order in which they count where one folder has several; the prior system's set carries ISIC's test labels too.
LAYOUTS = (
    ("prior system's published set", r"synthetic_dataset_labels\.csv", _read_prior),
    ("HAM10000", r"HAM10000_metadata(\.csv|\.tab)?", _read_ham10000),
    ("ISIC 2018 Task 3", r"ISIC2018_Task3_Training_GroundTruth\.csv", _read_isic),
    ("ISIC 2018 Task 3 test", r"ISIC2018_Task3_Test_GroundTruth\.csv", _read_isic),
    ("DermaMNIST", r"dermamnist(_\d+)?\.npz", _read_dermamnist),
)
