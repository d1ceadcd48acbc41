"""Perceptual hashes of images, and the greedy filter that removes near-copies.

The hashes are those of the `imagehash` package, bit for bit: pHash (low DCT frequencies of the 32×32 image against
their median) and wHash (Haar wavelet), 8×8 each, held as one `uint64`: bit k is element k of imagehash's flattened
array. The prior system's filter is the default: in the order of sorted names, an image goes when its Hamming distance
to an image kept so far is **below** (not at) 10 bits, first by pHash, then by wHash among the survivors. The first kept
one wins.
"""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from stgan_utils.config import UserError
from stgan_utils.data import eight_bits

try:
    import imagecodecs
except ImportError:  # a place without internet: slower, the same hashes
    imagecodecs = None

BITS = 64
# Pairs compared at a time, whatever the number of hashes: 2 MiB of XORs, about a core's own cache. Fewer before
# NumPy 2.0, where popcount takes several steps, each with memory of its own.
PAIRS = 1 << (18 if hasattr(np, "bitwise_count") else 15)


def hash_images(paths, jobs=None):
    """pHash and wHash of every image, as `imagehash.phash(Image.open(path))` and `imagehash.whash(...)` give them.

    But of 16 bits of grey the upper eight count (`data.eight_bits`): imagehash would see white wherever one is set.

    Args:
        paths: image files, any format and mode that Pillow reads.
        jobs: threads (decoding and resizing hold no lock of Python's); default one a core.

    Returns:
        DataFrame `path` (str), `phash`, `whash` (uint64), in the order of `paths`.

    Raises:
        UserError: an image is missing or damaged, or has pixels of 32 bits; the message names it.
    """
    paths = [str(path) for path in paths]
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        hashes = np.array(list(pool.map(_hash_image, paths)), np.uint64).reshape(-1, 2)
    return pd.DataFrame({"path": pd.Series(paths, dtype=str), "phash": hashes[:, 0], "whash": hashes[:, 1]})


def deduplicate(paths, phash_threshold=10, whash_threshold=10, jobs=None):
    """Hash the images and filter them: `hash_images`, then `filter_hashes`; see there."""
    return filter_hashes(hash_images(paths, jobs), phash_threshold, whash_threshold)


def filter_hashes(hashes, phash_threshold=10, whash_threshold=10):
    """Which images stay: a greedy pHash pass in the order of sorted paths, then a wHash pass over its survivors.

    Args:
        hashes: DataFrame with `path`, `phash`, `whash`, as from `hash_images`, in any order.
        phash_threshold, whash_threshold: bits, 0-64; an image goes when its distance to a kept one is strictly below.
            0 removes nothing.

    Returns:
        DataFrame, one row an image, sorted by path: `path`, `phash`, `whash`, `kept` (bool), `removed_by` ("phash",
        "whash" or missing), `duplicate_of` (path of the earliest kept image that is near enough, or missing; an image
        kept by the pHash pass may itself go in the wHash pass), `distance` (bits between the two, Int64 or missing).
    """
    table = hashes[["path", "phash", "whash"]].sort_values("path", kind="stable", ignore_index=True)
    table["kept"], table["removed_by"], table["duplicate_of"] = True, None, None
    table["distance"] = pd.array([None] * len(table), "Int64")
    for kind, threshold in (("phash", phash_threshold), ("whash", whash_threshold)):
        passed = np.flatnonzero(table["kept"])
        values = table[kind].to_numpy(np.uint64)
        original = _greedy(values[passed], threshold)
        gone, original = passed[original >= 0], passed[original[original >= 0]]
        table.loc[gone, "kept"] = False
        table.loc[gone, "removed_by"] = kind
        table.loc[gone, "duplicate_of"] = table["path"].to_numpy()[original]
        table.loc[gone, "distance"] = _popcount(values[gone] ^ values[original])
    return table


def kept_per_threshold(values, thresholds):
    """How many of `values` (uint64 hashes in the order of sorted names) one greedy pass keeps, at each threshold.

    Returns:
        Series `kept` (int), indexed by `threshold`.
    """
    kept = [int((_greedy(values, threshold) < 0).sum()) for threshold in thresholds]
    return pd.Series(kept, index=pd.Index(thresholds, name="threshold"), name="kept")


def sparing_threshold(values, at_most=0.01):
    """The "auto" threshold: the largest, 0-64, whose greedy pass removes at most `at_most` of what are no copies.

    Args:
        values: uint64 hashes of real images of distinct lesions, in the order of sorted names. The estimate is as
            coarse as their number: below 100 images, 1 % means that none may go.
        at_most: share of them, 0-1.
    """
    kept = kept_per_threshold(values, range(BITS + 1))
    return int(kept.index[len(values) - kept <= at_most * len(values)].max())


def nearest(values, reference):
    """For each hash the nearest of `reference`, the first of them at a tie.

    Args:
        values, reference: uint64 hashes, shapes (N,) and (M,).

    Returns:
        `index` into `reference` (N, int64) and `distance` in bits (N, int64).

    Raises:
        UserError: `reference` is empty.
    """
    if not len(reference):
        raise UserError("There are no reference images to compare with; give at least one.")
    values, reference = np.asarray(values, np.uint64), np.asarray(reference, np.uint64)
    index, distance = np.empty(len(values), np.int64), np.empty(len(values), np.int64)
    rows = max(1, PAIRS // len(reference))
    for start in range(0, len(values), rows):
        block = slice(start, start + rows)
        bits = _popcount(values[block, None] ^ reference)
        index[block] = bits.argmin(axis=1)
        distance[block] = bits.min(axis=1)
    return index, distance


def _greedy(values, threshold):
    """For each hash the position of the earliest kept one nearer than `threshold` that removed it; -1: it is kept."""
    values = np.asarray(values, np.uint64)
    removed_by = np.full(len(values), -1)
    left = np.arange(len(values))  # neither kept nor removed so far
    while len(left):
        rows = max(1, PAIRS // len(left))
        near = _popcount(values[:rows, None] ^ values) < threshold
        near[:, :rows] = np.triu(near[:, :rows], 1)  # only what comes later
        hits = np.flatnonzero(near.any(axis=1))
        for row in hits:
            if removed_by[left[row]] < 0:
                later = left[near[row]]
                removed_by[later[removed_by[later] < 0]] = left[row]
        left, values = left[rows:], values[rows:]
        if len(hits):
            stays = removed_by[left] < 0
            left, values = left[stays], values[stays]
    return removed_by


def _popcount_portable(values):
    """Number of set bits of each uint64, for NumPy below 2.0 (H. S. Warren, Hacker's Delight, figure 5-2)."""
    part = values >> 1
    part &= 0x5555555555555555
    values = values - part  # a copy; the rest is done in place, because fresh memory costs more than the arithmetic
    np.right_shift(values, 2, out=part)
    part &= 0x3333333333333333
    values &= 0x3333333333333333
    values += part
    np.right_shift(values, 4, out=part)
    values += part
    values &= 0x0F0F0F0F0F0F0F0F
    values *= 0x0101010101010101
    values >>= 56
    return values.astype(np.uint8)


_popcount = getattr(np, "bitwise_count", _popcount_portable)


def _hash_image(path):
    try:
        grey = _open_grey(path)
    except Exception as error:  # Pillow's decoders raise nearly every kind for a damaged file
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image" if unknown else getattr(error, "strerror", None) or error
        raise UserError(f"The image {path} cannot be read ({reason}); restore the file or leave it out.") from error
    return _pack(imagehash.phash(grey).hash), _pack(_whash_bits(grey))


def _open_grey(path):
    """`Image.open(path).convert("L")`; what the generators write, 8-bit RGB in PNG, is decoded by a faster library.

    Decoding is most of the time that a hash takes. PNG loses nothing, so that both decoders give the same pixels.
    """
    content = Path(path).read_bytes()
    if imagecodecs and content.startswith(b"\x89PNG\r\n\x1a\n") and content[24:26] == bytes((8, 2)):  # depth, RGB
        try:
            return Image.fromarray(imagecodecs.png_decode(content)).convert("L")
        except RuntimeError:  # damaged: Pillow makes the best of it, or says what is wrong
            pass
    with Image.open(io.BytesIO(content)) as image:
        return eight_bits(image).convert("L")


def _whash_bits(grey):
    """`imagehash.whash(grey).hash`, 8×8 bool, without the wavelets.

    What imagehash keeps of its Haar decomposition is, up to one factor, the sums of the 8×8 blocks of the resized
    image, less their mean; a bit says "above the median of the 64". Sums of pixels are whole numbers: two of them are
    equal, or further apart than rounding can reach. So comparing them decides every bit, unless the two in the middle
    are equal: then imagehash's bits at the median are rounding noise of its wavelets, and only imagehash can tell.
    """
    side = max(2 ** int(np.log2(min(grey.size))), 8)
    pixels = np.asarray(grey.resize((side, side), Image.Resampling.LANCZOS)).reshape(8, side // 8, 8, side // 8)
    sums = pixels.sum(axis=1, dtype=np.uint32).sum(axis=2, dtype=np.uint64)
    below, above = np.sort(sums, axis=None)[31:33]
    return sums > below if below < above else imagehash.whash(grey).hash


def _pack(bits):
    return np.packbits(bits, bitorder="little").view("<u8")[0]
