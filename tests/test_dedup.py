"""Hashes against imagehash bit for bit, the filter against the plain loop."""

import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stgan_utils import dedup
from stgan_utils.config import UserError


def as_bits(value):
    """A uint64 as imagehash holds it: 8×8 bool."""
    return np.array([int(value) >> k & 1 for k in range(64)], bool).reshape(8, 8)


def assert_equals_imagehash(paths):
    for row in dedup.hash_images(paths).itertuples():
        for kind in ("phash", "whash"):
            with Image.open(row.path) as image:
                expected = getattr(imagehash, kind)(image).hash
            np.testing.assert_array_equal(as_bits(getattr(row, kind)), expected, err_msg=f"{kind} of {row.path}")


def plain_loop(values, threshold):
    """Position of the kept hash that removes each, or None: the loop of the prior system, one pair at a time."""
    hashes = [imagehash.ImageHash(as_bits(value)) for value in values]
    kept, removed_by = [], []
    for i, value in enumerate(hashes):
        removed_by.append(next((k for k in kept if value - hashes[k] < threshold), None))
        if removed_by[-1] is None:
            kept.append(i)
    return removed_by


def clustered(rng, count, centres, flips):
    """`count` hashes around `centres` random ones, up to `flips` bits off."""
    values = rng.choice(rng.integers(0, 2**64, centres, dtype=np.uint64), count)
    for _ in range(flips):
        values = values ^ (rng.integers(0, 2, count, dtype=np.uint64) << rng.integers(0, 64, count, dtype=np.uint64))
    return values


def table_of(phash, whash):
    paths = [f"{i:05d}.png" for i in range(len(phash))]
    return pd.DataFrame({"path": paths, "phash": np.asarray(phash, np.uint64), "whash": np.asarray(whash, np.uint64)})


@pytest.fixture(scope="module")
def real_paths(ham10000):
    return sorted(ham10000.glob("HAM10000_images_part_*/*.jpg"))


@pytest.fixture(scope="module")
def real_hashes(real_paths):
    """1,500 real images, each of another lesion."""
    return dedup.hash_images(real_paths[:: len(real_paths) // 1500][:1500])


def test_real_images_hash_as_imagehash_does(real_paths):
    assert_equals_imagehash(real_paths[:: len(real_paths) // 400][:400])


def test_synthetic_images_hash_as_imagehash_does(tmp_path):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    arrays = {
        "black": np.zeros((40, 40)),
        "white": np.full((64, 64), 255),
        "grey": np.full((100, 100), 77),
        "across": np.tile(np.arange(128), (128, 1)),
        "down": np.tile(np.arange(128)[:, None], (1, 128)),
        "diagonal": x + y,
        "chessboard": (x // 8 + y // 8) % 2 * 255,
        "halves": (x < 32) * 200,
        "one_pixel": (x + y == 0) * 255,
    }
    sizes = [(64, 64), (33, 70), (70, 33), (8, 8), (9, 15), (5, 12), (31, 16), (224, 224), (127, 256), (1, 1)]
    for size in sizes:
        for levels in (2, 3, 5, 256):  # few grey levels: many ties at the median
            for repeat in range(8):
                noise = rng.integers(0, levels, size) * (255 // (levels - 1))
                arrays[f"noise_{size}_{levels}_{repeat}"] = noise
    for repeat in range(60):  # flat blocks of few levels: block means equal to the last digit, and to the median
        arrays[f"blocks_{repeat}"] = np.kron(rng.integers(0, 2 + repeat % 6, (8, 8)) * 37, np.ones((8, 8)))
    paths = []
    for name, array in arrays.items():
        paths.append(tmp_path / f"{name}.png")
        Image.fromarray(array.astype(np.uint8)).save(paths[-1])
    for mode in ("RGB", "RGBA", "P", "1", "LA", "CMYK"):
        for repeat in range(5):
            paths.append(tmp_path / f"{mode}_{repeat}.{'tif' if mode == 'CMYK' else 'png'}")
            smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((90, 75))
            smooth.convert(mode).save(paths[-1])
    paths.append(tmp_path / "transparent.png")
    smooth.save(paths[-1], transparency=smooth.getpixel((0, 0)))
    assert_equals_imagehash(paths)


def test_ties_at_the_median_are_left_to_imagehash(monkeypatch):
    asked = []
    monkeypatch.setattr(imagehash, "whash", lambda image, plain=imagehash.whash: asked.append(image) or plain(image))
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (256, 256), np.uint8))
    assert dedup._whash_bits(noise).any() and not asked
    dedup._whash_bits(Image.new("L", (64, 64), 77))
    assert len(asked) == 1


def test_hashes_keep_the_order_given_and_do_not_depend_on_jobs(tmp_path):
    rng = np.random.default_rng(1)
    paths = [tmp_path / f"{name}.png" for name in "dacb"]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    one, many = dedup.hash_images(paths, jobs=1), dedup.hash_images(paths, jobs=3)
    pd.testing.assert_frame_equal(one, many)
    assert one["path"].tolist() == [str(path) for path in paths]
    assert one["phash"].dtype == one["whash"].dtype == np.uint64
    assert len(dedup.deduplicate([])) == 0


def test_hashes_are_the_same_without_the_fast_decoder(tmp_path, monkeypatch):
    path = tmp_path / "lesion.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 64, 3), np.uint8)).save(path)
    decoded = []
    decode = dedup.imagecodecs.png_decode
    monkeypatch.setattr(dedup.imagecodecs, "png_decode", lambda content: decoded.append(1) or decode(content))
    fast = dedup.hash_images([path])
    monkeypatch.setattr(dedup, "imagecodecs", None)
    pd.testing.assert_frame_equal(dedup.hash_images([path]), fast)
    assert decoded == [1]


def test_grey_of_16_bits_is_hashed_by_its_upper_eight(tmp_path):
    """`convert` would cut it off at 255: all white, and every image a copy of every other."""
    shades = np.random.default_rng(0).integers(0, 65_536, (64, 64), np.uint16)
    Image.fromarray(shades).save(tmp_path / "deep.png")
    Image.fromarray((shades >> 8).astype(np.uint8)).save(tmp_path / "flat.png")
    Image.fromarray(np.ones((64, 64), np.int32)).save(tmp_path / "unknown.tif")
    deep, flat = dedup.hash_images([tmp_path / "deep.png", tmp_path / "flat.png"])[["phash", "whash"]].to_numpy()
    np.testing.assert_array_equal(deep, flat)
    with pytest.raises(UserError, match=r"unknown\.tif cannot be read \(pixels of 32 bits"):
        dedup.hash_images([tmp_path / "unknown.tif"])


@pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
def test_unreadable_image_is_named(tmp_path, damage):
    path = tmp_path / "lesion.png"
    if damage == "text":
        path.write_text("no image")
    elif damage == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"lesion\.png cannot be read .* or leave it out"):
        dedup.deduplicate([path])


@pytest.mark.parametrize("pairs", [1, 100, dedup.PAIRS])
def test_filter_equals_the_plain_loop(monkeypatch, pairs):
    monkeypatch.setattr(dedup, "PAIRS", pairs)  # one row at a time, small blocks, one block
    rng = np.random.default_rng(2)
    for centres, flips, thresholds in ((20, 8, (10, 6)), (60, 14, (12, 30)), (200, 0, (1, 10)), (5, 20, (10, 65))):
        hashes = table_of(clustered(rng, 200, centres, flips), clustered(rng, 200, centres, flips))
        result = dedup.filter_hashes(hashes.sample(frac=1, random_state=0), *thresholds)

        expected = hashes.assign(kept=True, removed_by=None, duplicate_of=None, distance=None)
        for kind, threshold in zip(("phash", "whash"), thresholds, strict=True):
            left = expected.index[expected["kept"]]
            values = hashes[kind]
            for position, first in zip(left, plain_loop(values[left], threshold), strict=True):
                if first is not None:
                    distance = int(values[position] ^ values[left[first]]).bit_count()
                    removal = (False, kind, hashes["path"][left[first]], distance)
                    expected.loc[position, ["kept", "removed_by", "duplicate_of", "distance"]] = removal
        assert set(expected["removed_by"].dropna()) == {"phash", "whash"}
        pd.testing.assert_frame_equal(result, expected.astype({"distance": "Int64"}), check_dtype=False)


def test_threshold_is_strict_and_zero_removes_nothing():
    nine, ten = (1 << 9) - 1, (1 << 10) - 1
    hashes = table_of([0, nine, ten << 20], [0, ten << 40, ten])
    result = dedup.filter_hashes(hashes, phash_threshold=10, whash_threshold=0)
    assert result["kept"].tolist() == [True, False, True]  # 9 bits off goes, exactly 10 stays
    assert result["distance"].tolist() == [pd.NA, 9, pd.NA]
    assert dedup.filter_hashes(hashes, 0, 10)["kept"].all()
    assert dedup.filter_hashes(hashes, 0, 11)["kept"].tolist() == [True, False, False]
    copies = table_of([5] * 4, [7] * 4)
    assert dedup.filter_hashes(copies, 0, 0)["kept"].all()
    assert dedup.filter_hashes(copies, 1, 0)["duplicate_of"].tolist() == [None, *["00000.png"] * 3]


def test_first_in_sorted_order_wins_and_a_removed_image_removes_nothing():
    # Each is 6 bits from the one before: b goes for a; c is 12 from a, and b is no longer there to remove it.
    chain = table_of([0, 0b111111, 0b111111111111], [1 << 1, 1 << 30, 1 << 60]).assign(path=["a", "b", "c"])
    result = dedup.filter_hashes(chain[::-1], 10, 0)
    assert result["path"].tolist() == ["a", "b", "c"]
    assert result["kept"].tolist() == [True, False, True]


def test_kept_per_threshold_and_sparing_threshold():
    values = clustered(np.random.default_rng(3), 300, 250, 25)
    thresholds = range(0, 65, 4)
    kept = dedup.kept_per_threshold(values, thresholds)
    assert kept.to_dict() == {t: sum(by is None for by in plain_loop(values, t)) for t in thresholds}
    auto = dedup.sparing_threshold(values, at_most=0.05)
    share = 1 - dedup.kept_per_threshold(values, range(65)) / len(values)
    assert share[auto] <= 0.05 and (share[auto + 1 :] > 0.05).all() and auto > 0


def test_nearest_equals_looking_at_every_pair(monkeypatch):
    monkeypatch.setattr(dedup, "PAIRS", 300)
    rng = np.random.default_rng(4)
    values, reference = clustered(rng, 70, 30, 10), clustered(rng, 50, 30, 10)
    index, distance = dedup.nearest(values, reference)
    for i, value in enumerate(values.tolist()):
        bits = [(value ^ other).bit_count() for other in reference.tolist()]
        assert (distance[i], index[i]) == (min(bits), bits.index(min(bits)))
    with pytest.raises(UserError, match="reference"):
        dedup.nearest(values, reference[:0])


def test_popcount_without_numpy_2():
    values = np.random.default_rng(5).integers(0, 2**64, 1000, dtype=np.uint64)
    values[:2] = 0, 2**64 - 1
    expected = [value.bit_count() for value in values.tolist()]
    assert dedup._popcount_portable(values).tolist() == expected
    assert dedup._popcount(values).tolist() == expected


def test_the_control_on_real_distinct_lesions(real_hashes):
    """At the prior system's thresholds pHash spares distinct lesions, wHash throws about half of them away."""
    kept = {kind: dedup.kept_per_threshold(real_hashes[kind], [10])[10] / 1500 for kind in ("phash", "whash")}
    assert 0.93 < kept["phash"] < 0.99
    assert 0.40 < kept["whash"] < 0.65
    for kind in ("phash", "whash"):
        auto = dedup.sparing_threshold(real_hashes[kind])
        assert 0 < auto < 10
        removed = 1500 - dedup.kept_per_threshold(real_hashes[kind], [auto, auto + 1])
        assert removed[auto] <= 15 < removed[auto + 1]


def test_colours_of_16_bits_are_hashed_as_imagehash_does(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65_536, (64, 64, 3), np.uint16)
    (tmp_path / "deep.png").write_bytes(dedup.imagecodecs.png_encode(deep))
    assert_equals_imagehash([tmp_path / "deep.png"])
