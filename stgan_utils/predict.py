"""From images on disk to the ISIC 2018 Task 3 submission format, without holding more than a few batches."""

import contextlib
import csv
import io
import os
import sys
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import UnidentifiedImageError
from tqdm.auto import tqdm

from stgan_utils import data, device
from stgan_utils.config import UserError
from stgan_utils.files import atomic_path, refuse_input, shown
from stgan_utils.layouts import IMAGE_SUFFIXES, files_below, is_hidden, is_image

# Columns of the submission format, after `image`.
ISIC_ORDER = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")


def predict_folder(model, source, out, batch_size=None):
    """Write a classifier's probabilities for every image as CSV: `image,MEL,NV,BCC,AKIEC,BKL,DF,VASC`.

    One row an image, sorted by image id (the file's name without its suffix); each row sums to 1 within rounding.

    Args:
        model: `Classifier`; moved to the device that `device.pick` chooses.
        source: a folder (read with all below it), one image file, or a zip archive (read without unpacking it).
        out: file to write, whole or not at all; "-" is standard output.
        batch_size: images at a time; by default 32 on a CPU, 256 on a GPU.

    Returns:
        (rows written, [(file, why) that could not be read and has no row]).

    Raises:
        UserError: no such source, no image in it or none that can be read, two images of one id, a damaged archive, or
            an `out` that is the source or one of its images.
    """
    place = device.pick()
    model = model.fused().to(place)
    batch_size = batch_size or (256 if place.type == "cuda" else 32)
    written, unreadable = 0, []
    with _open_source(source) as (files, read), _open_out(out, _read_from(source, files)) as stream:
        for image_id in [each for each in files if each != shown(each)]:
            unreadable.append((shown(files.pop(image_id)), "its name is not UTF-8"))
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", *ISIC_ORDER])
        with tqdm(total=len(files), unit="image", desc="predict", file=sys.stderr) as progress:
            for names, images in _batches(sorted(files.items()), read, model.size, batch_size):
                good = [isinstance(image, np.ndarray) for image in images]
                unreadable += [
                    (name, image) for (_, name), image, ok in zip(names, images, good, strict=True) if not ok
                ]
                if any(good):
                    pixels = np.stack([image for image, ok in zip(images, good, strict=True) if ok])
                    table = model.predict_proba(pixels, batch_size=batch_size)[list(ISIC_ORDER)]
                    ids = [image_id for (image_id, _), ok in zip(names, good, strict=True) if ok]
                    for image_id, row in zip(ids, table.to_numpy(), strict=True):
                        writer.writerow([image_id, *(f"{value:.8f}" for value in row)])
                written += sum(good)
                progress.update(len(images))
        if not written:  # raised in here, so that no file is written
            raise UserError(f"None of the {len(unreadable)} image(s) in {source} can be read ({unreadable[0][1]}).")
    return written, unreadable


def _batches(files, read, size, batch_size):
    """([(id, name)], [pixels or the reason why there are none]), decoded by threads two batches ahead."""

    def decode(name):
        try:
            return data.load_images([read(name)], size)[0]
        except UnidentifiedImageError:
            return "not an image"
        except Exception as error:  # Pillow's decoders fail in many ways; to the caller they are one
            return str(error) or type(error).__name__

    ahead = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), batch_size):
            names = files[start : start + batch_size]
            ahead.append((names, [pool.submit(decode, name) for _, name in names]))
            if len(ahead) > 2:
                names, futures = ahead.popleft()
                yield names, [future.result() for future in futures]
        for names, futures in ahead:
            yield names, [future.result() for future in futures]


@contextlib.contextmanager
def _open_source(source):
    """({image id: name}, function that opens a name) of a folder, an archive or one file."""
    source = Path(source)
    if not source.exists():
        raise UserError(f"There is no {source}.")
    if source.is_dir():
        yield _by_id(source, [source / path for path in _images(files_below(source))]), str
    elif zipfile.is_zipfile(source) or source.suffix.lower() == ".zip":
        with _open_archive(source) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            yield _by_id(source, _images(names)), lambda name: io.BytesIO(archive.read(name))
    elif source.is_file() and is_image(Path(source.name)):
        yield {source.stem: source}, str
    else:
        raise UserError(f"{source} is no folder, zip archive or image: give one of {', '.join(IMAGE_SUFFIXES)}.")


def _images(names):
    """The names that are those of images; says on standard error which others get no row."""
    paths = [PurePosixPath(name) for name in names]
    others = Counter(path.suffix.lower() or path.name for path in paths if not (is_image(path) or is_hidden(path)))
    if others:
        kinds = ", ".join(f"{shown(kind)} ({count})" for kind, count in others.most_common(5))
        print(f"no image by its ending, so passed over: {others.total()} file(s): {kinds}", file=sys.stderr)
    return [name for name, path in zip(names, paths, strict=True) if is_image(path)]


def _read_from(source, files):
    """The files of the disk that are read: an archive is one."""
    return files.values() if Path(source).is_dir() else [source]


def _open_archive(source):
    try:
        return zipfile.ZipFile(source)
    except zipfile.BadZipFile as error:
        raise UserError(f"{source} is a damaged archive ({error}): make or download it again.") from None


def _by_id(source, names):
    if not names:
        raise UserError(f"There is no image in {source} ({', '.join(IMAGE_SUFFIXES)}).")
    ids = [PurePosixPath(name).stem for name in names]
    twice = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if twice:
        raise UserError(f"{source} holds {len(twice)} image name(s) twice, such as {twice[0]}: rename or split them.")
    return dict(zip(ids, names, strict=True))


@contextlib.contextmanager
def _open_out(out, inputs):
    if str(out) == "-":
        yield sys.stdout
    else:
        refuse_input(out, inputs)
        with atomic_path(out) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
            yield stream
