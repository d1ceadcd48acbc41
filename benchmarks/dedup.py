"""Deduplication against the plain loop over `imagehash`, side by side: python benchmarks/dedup.py [--count N].

The images are real ones where the environment variable HAM10000_DIR names a folder of HAM10000, smooth noise otherwise:
256-px PNG files, as the generators write them. Both programs run in turn, and their lists of kept and removed images
have to be identical. Ends with the growth of the filter in its worst case (random hashes: everything is kept).
"""

import argparse
import os
import tempfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter

import imagehash
import numpy as np
import pandas as pd
from common import write_section
from PIL import Image

from stgan_utils import dedup

THRESHOLD = 10
PACKAGES = ("numpy", "pillow", "imagehash", "pywavelets", "scipy")


def make_images(folder, count, real):
    """`count` PNG files of 256 px from the files `real`, mirrored when they are used up, or else of noise."""

    def make(i):
        if real:
            image = Image.open(real[i % len(real)]).convert("RGB").resize((256, 256))
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i // len(real) % 2 else image
        else:  # every tenth is a copy of the one before, grain aside
            smooth = np.random.default_rng(i - 1 if i % 10 == 9 else i).integers(0, 256, (12, 12, 3), np.uint8)
            pixels = np.asarray(Image.fromarray(smooth).resize((256, 256)), np.int16)
            grain = np.random.default_rng(i).integers(-6, 7, pixels.shape)
            image = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
        image.save(folder / f"{i:06d}.png")

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, range(count)))
    return sorted(folder.iterdir())


def plain(paths):
    """The plain loop: seconds of hashing and of comparing, and who was removed by which hash."""
    start = perf_counter()
    hashes = {"phash": {}, "whash": {}}
    for path in paths:
        image = Image.open(path).convert("RGB")
        hashes["phash"][path] = imagehash.phash(image)
        hashes["whash"][path] = imagehash.whash(image)
    hashed = perf_counter()
    removed = {}
    for kind, values in hashes.items():
        kept = []
        for path in paths:
            if path in removed:
                continue
            for other in kept:
                if values[path] - values[other] < THRESHOLD:
                    removed[path] = kind
                    break
            else:
                kept.append(path)
    return hashed - start, perf_counter() - hashed, {str(path): kind for path, kind in removed.items()}


def ours(paths):
    """The same by `stgan_utils.dedup`."""
    start = perf_counter()
    hashes = dedup.hash_images(paths)
    hashed = perf_counter()
    table = dedup.filter_hashes(hashes, THRESHOLD, THRESHOLD)
    seconds = perf_counter() - hashed
    removed = table[~table["kept"]]
    return hashed - start, seconds, dict(zip(removed["path"], removed["removed_by"], strict=True))


def side_by_side(paths, repeats):
    """Markdown table of both programs' median seconds, after checking that they agree."""
    dedup.hash_images(paths[:2])  # imports and first calls
    runs = []
    for repeat in range(repeats):
        theirs, mine = plain(paths), ours(paths)
        assert mine[2] == theirs[2], "the plain loop and ours removed different images"
        runs.append((theirs[:2], mine[:2]))
        print(f"run {repeat + 1}: plain {sum(theirs[:2]):.1f} s, ours {sum(mine[:2]):.2f} s", flush=True)
    seconds = np.array(runs)  # (repeat, program, hashing and filter)
    seconds = np.concatenate([seconds, seconds.sum(axis=2, keepdims=True)], axis=2)
    lines = ["| | plain loop | ours | ratio (lowest – highest) |", "|---|---|---|---|"]
    for column, name in enumerate(("hashing", "filter alone", "end to end")):
        before, after = seconds[:, 0, column], seconds[:, 1, column]
        ratio = before / after
        lines.append(
            f"| {name} | {median(before):.2f} s | {median(after):.3f} s "
            f"| **{median(ratio):.1f}×** ({ratio.min():.1f} – {ratio.max():.1f}) |"
        )
    by = [list(mine[2].values()).count(kind) for kind in ("phash", "whash")]
    return "\n".join(lines), f"{len(paths)} → {len(paths) - by[0]} after pHash → {len(paths) - sum(by)} after wHash"


def growth(counts, repeats):
    """Markdown table: seconds and peak memory of both passes over random hashes."""
    rng = np.random.default_rng(0)
    lines = ["| hashes | seconds (both passes) | ns a pair | peak memory |", "|---|---|---|---|"]
    for count in counts:
        names = [f"{i:06d}" for i in range(count)]
        phash, whash = rng.integers(0, 2**64, (2, count), dtype=np.uint64)
        hashes = pd.DataFrame({"path": names, "phash": phash, "whash": whash})
        seconds = []
        for _ in range(repeats):
            start = perf_counter()
            table = dedup.filter_hashes(hashes, THRESHOLD, THRESHOLD)
            seconds.append(perf_counter() - start)
        tracemalloc.start()
        dedup.filter_hashes(hashes, THRESHOLD, THRESHOLD)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        pairs = count * (count - 1)  # twice n (n - 1) / 2
        lines.append(
            f"| {count:,} ({table['kept'].mean():.1%} kept) | {median(seconds):.3f} "
            f"| {median(seconds) / pairs * 1e9:.2f} | {peak / 2**20:.0f} MiB |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6500, help="images (default 6500)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each program (default 5)")
    parser.add_argument("--growth", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="numbers of hashes")
    args = parser.parse_args()
    real = sorted(Path(os.environ.get("HAM10000_DIR") or os.devnull).rglob("*.jpg"))
    with tempfile.TemporaryDirectory() as folder:
        table, kept = side_by_side(make_images(Path(folder), args.count, real), args.repeats)
    source = "real HAM10000 images" if real else "images of smooth noise"
    body = f"""
{args.count:,} {source}, 256-px PNG, thresholds {THRESHOLD} and {THRESHOLD}: {kept}.
Kept and removed lists identical. Plain loop: open, convert, `imagehash.phash`, `imagehash.whash`, then compare with
every kept hash. Both in turn, {args.repeats} times; medians.

{table}

Growth of the filter alone in its worst case, random hashes (peak memory: what the filter itself allocates):

{growth(args.growth, args.repeats)}
"""
    print(body)
    write_section("Deduplication", body, PACKAGES)


if __name__ == "__main__":
    main()
