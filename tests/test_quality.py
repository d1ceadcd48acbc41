"""Distances between real and generated images, against independent computations and on real lesions."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.linalg import sqrtm
from torch.optim.swa_utils import update_bn
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.kid import poly_mmd

from stgan_utils import backbone as backbones
from stgan_utils import dedup, quality
from stgan_utils import features as spaces
from stgan_utils.config import UserError

SIZE = 64


def normal(n, dim, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(shift, 1, (n, dim)).astype(np.float32)


def filtered(images, change):
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


@pytest.fixture(scope="module")
def extractor(backbone):
    return spaces.feature_extractor("mobilenet")


@pytest.fixture(scope="module")
def lesions(ham10000):
    """120 real melanomas, one image a lesion, uint8 (120, 64, 64, 3)."""
    table = pd.read_csv(ham10000 / "HAM10000_metadata.csv").query("dx == 'mel'").sort_values("image_id")
    files = {file.stem: file for file in ham10000.rglob("*.jpg")}
    return np.stack(
        [np.asarray(Image.open(files[name]).convert("RGB").resize((SIZE, SIZE))) for name in table.image_id[:120]]
    )


@pytest.fixture
def noise():
    """Pictures that need no dataset: uint8 (12, 64, 64, 3)."""
    return np.random.default_rng(0).integers(0, 256, (12, SIZE, SIZE, 3), dtype=np.uint8)


# --- KID


def plain_kid(real, fake):
    def kernel(x, y):
        return (float(np.dot(x, y)) / len(x) + 1) ** 3

    within = [
        sum(kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
        for s in (real, fake)
    ]
    across = sum(kernel(x, y) for x in real for y in fake) / (len(real) * len(fake))
    return sum(within) - 2 * across


def test_kid_is_the_plain_double_loop():
    real, fake = normal(7, 5), normal(11, 5, 0.4, seed=1)
    assert quality.kid(real, fake)["kid"] == pytest.approx(plain_kid(real.astype(float), fake.astype(float)), rel=1e-9)


def test_kid_agrees_with_torchmetrics_and_torch_fidelity_on_whole_sets():
    real, fake = torch.from_numpy(normal(60, 32)).double(), torch.from_numpy(normal(60, 32, 0.2, seed=1)).double()
    ours = quality.kid(real.numpy(), fake.numpy())
    theirs = kid_features_to_metric(real, fake, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert ours["kid"] == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-9)
    assert ours["kid"] == pytest.approx(float(poly_mmd(real, fake)), rel=1e-9)
    assert ours["subset_size"] == 60


def test_kid_resample_is_the_weighted_double_loop():
    """Each resample leaves out the pairs of an image with itself, also when it was drawn several times."""
    kernel, weights = normal(6, 6).astype(float), np.array([[2.0, 0, 1, 0, 3, 0]])
    drawn = [i for i, times in enumerate(weights[0]) for _ in range(int(times))]
    pairs = [kernel[i, j] for i in drawn for j in drawn if i != j]
    assert quality._pair_means(kernel, weights)[0] == pytest.approx(np.mean(pairs))


def test_kid_interval_holds_the_truth_as_often_as_it_says():
    # Gaussians with shift s: E k(x, y) is known, so the true distance is; dimension 1 has (xy + 1)³ in closed form.
    shift, hits = 0.8, 0
    moments = [1, shift, shift**2 + 1, shift**3 + 3 * shift]  # E x^0 … E x^3 of N(shift, 1)
    centred = [1, 0, 1, 0]
    binomial = [1, 3, 3, 1]
    truth = sum(b * (m - c) ** 2 for b, m, c in zip(binomial, moments, centred, strict=True))
    for trial in range(100):
        real, fake = normal(42, 1, seed=2 * trial), normal(80, 1, shift, seed=2 * trial + 1)
        result = quality.kid(real, fake, trial, subsets=300)
        hits += result["low"] <= truth <= result["high"]
    assert 86 <= hits <= 100


def test_kid_is_deterministic_and_cuts_large_sets():
    real, fake = normal(300, 8), normal(200, 8, 0.1, seed=1)
    assert quality.kid(real, fake, seed=3) == quality.kid(real, fake, seed=3)
    assert quality.kid(real, fake, seed=3)["low"] != quality.kid(real, fake, seed=4)["low"]
    assert quality.kid(real, fake, most=50)["subset_size"] == 50


def test_kid_of_one_image_is_refused():
    with pytest.raises(UserError, match="2 images of each kind"):
        quality.kid(normal(1, 8), normal(9, 8))


def test_kid_of_halves_of_one_class_is_nothing(lesions, extractor):
    result = quality.kid(extractor(lesions)[::2], extractor(lesions)[1::2])
    assert result["low"] < 0 < result["high"]
    assert abs(result["kid"]) < 0.05


def test_kid_rises_with_blur_and_noise(lesions, extractor):
    distance = quality.DistanceToReal(lesions[:60], extractor)
    rest, rng = lesions[60:100], np.random.default_rng(0)
    blurred = [rest] + [filtered(rest, lambda image, r=r: image.filter(ImageFilter.GaussianBlur(r))) for r in (1, 3)]
    noisy = [np.clip(rest + rng.normal(0, sigma, rest.shape), 0, 255).astype(np.uint8) for sigma in (0, 10, 40)]
    for sets in (blurred, noisy):
        steps = [distance(images) for images in sets]
        assert steps[0]["kid"] < steps[1]["kid"] < steps[2]["kid"]
        assert steps[2]["kid_low"] > steps[0]["kid_high"]


# --- FID, precision and recall


def test_fid_of_a_set_with_itself_is_nothing():
    features = normal(40, 64)  # fewer images than features too
    assert quality.fid(features, features) == pytest.approx(0, abs=1e-4)


def test_fid_is_the_closed_form_of_two_gaussians():
    mixing = np.random.default_rng(5).normal(size=(6, 6))
    real, fake = normal(500, 6), normal(400, 6, 0.5, seed=1) @ mixing
    first, second = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    gap = real.mean(0, dtype=float) - fake.mean(0)
    closed = gap @ gap + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert quality.fid(real, fake) == pytest.approx(closed, rel=1e-6)


def test_precision_and_recall():
    real = normal(80, 4)
    assert quality.precision_recall(real, real) == {"precision": 1, "recall": 1}
    assert quality.precision_recall(real, real + 100) == {"precision": 0, "recall": 0}
    # Every generated image is real-looking, but they cover one corner: high precision, low recall.
    corner = real[:1] + 0.01 * normal(80, 4, seed=1)
    ours = quality.precision_recall(real, corner)
    assert ours["precision"] == 1
    assert ours["recall"] < 0.2
    theirs = calculate_precision_recall_full(torch.from_numpy(corner).double(), torch.from_numpy(real).double())
    assert sorted(theirs) == pytest.approx(sorted(ours.values()))  # its order of inputs differs between versions


# --- feature extractors


def test_features_do_not_depend_on_batches_or_neighbours(noise, extractor):
    whole = extractor(noise)
    assert whole.shape == (12, extractor.dim)
    assert whole.dtype == np.float32
    network = spaces.feature_extractor("mobilenet")
    np.testing.assert_allclose(network(noise, batch_size=5), whole, atol=1e-4)
    np.testing.assert_allclose(network(noise[3:4])[0], whole[3], atol=1e-4)


def test_remembered_features_are_not_shared(noise, extractor):
    first = extractor(noise)
    kept = first.copy()
    first += 1
    np.testing.assert_array_equal(extractor(noise), kept)
    noise[0] = 0
    assert not np.allclose(extractor(noise)[0], kept[0])


def test_random_features_repeat_and_leave_the_generator_alone(noise):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = (spaces.feature_extractor("random") for _ in range(2))
    assert torch.rand(1) == expected
    assert "random" in first.name
    np.testing.assert_array_equal(first(noise), second(noise))


def test_a_training_is_summed_up_by_its_nearest_iteration():
    history = pd.DataFrame({"iteration": [0, 50, 100], "kid": [0.4, 0.1, 0.2]})
    expected = {"kid_start": 0.4, "kid_best": 0.1, "kid_best_iteration": 50, "kid_end": 0.2}
    assert quality.summary(history) == expected


def test_auto_takes_the_baseline_where_nothing_is_pretrained(monkeypatch, tmp_path, noise):
    from stgan_utils.classifier import Classifier

    monkeypatch.setattr(backbones, "pretrained_source", lambda: None)
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(backbones, "hub_file", lambda url: None)
    random = spaces.feature_extractor()
    assert "random" in random.name and random.file is None
    torch.manual_seed(1)
    model = Classifier({"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3})
    update_bn([torch.from_numpy(noise)], model)  # or random weights give next to nothing, whatever the scaling
    model.save(tmp_path / "model.safetensors")
    extractor = spaces.feature_extractor(baseline=tmp_path / "model.safetensors")
    assert "baseline" in extractor.name and extractor.file == tmp_path / "model.safetensors"
    batch = torch.nn.functional.interpolate(
        torch.from_numpy(noise).permute(0, 3, 1, 2) / 255, size=128, mode="bilinear", antialias=True
    )
    with torch.inference_mode():
        expected = model.eval().features((batch - 0.5) / 0.5).mean((2, 3))
    np.testing.assert_allclose(extractor(noise), expected.numpy(), atol=1e-3)
    assert expected.std() > 0.1


def test_inception_says_which_file_it_needs(monkeypatch, tmp_path):
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(backbones, "hub_file", lambda url: None)
    with pytest.raises(UserError, match="INCEPTION_WEIGHTS"):
        spaces.feature_extractor("inception")
    for name, content in (("absent.pth", None), ("text.pth", b"no weights")):
        if content:
            (tmp_path / name).write_bytes(content)
        monkeypatch.setenv("INCEPTION_WEIGHTS", str(tmp_path / name))
        with pytest.raises(UserError, match=name):
            spaces.feature_extractor()
    with pytest.raises(UserError, match="'clip'"):
        spaces.feature_extractor("clip")


# --- diversity, the whole lot


def test_diversity_tells_copies_from_different_images(lesions, extractor):
    few = np.repeat(lesions[:2], 20, axis=0)
    similarity = [quality.ms_ssim_diversity(images)["ms_ssim"] for images in (few, lesions)]
    spread = [quality.lpips_diversity(images, extractor)["diversity"] for images in (few, lesions)]
    assert similarity[0] > similarity[1]
    assert spread[0] < spread[1]
    same = np.repeat(lesions[:1], 5, axis=0)
    assert quality.ms_ssim_diversity(same)["ms_ssim"] == pytest.approx(1, abs=1e-4)
    assert quality.lpips_diversity(same, extractor)["diversity"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("side", "scales"), [(43, 2), (44, 3), (64, 3), (128, 4), (175, 4), (176, 5)])
def test_ms_ssim_takes_as_many_scales_as_fit(side, scales, monkeypatch):
    monkeypatch.setattr(quality, "PAIRS", 20)
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    result = quality.ms_ssim_diversity(images)
    assert result["scales"] == scales
    assert 0 <= result["ms_ssim"] <= 1


def test_pairs_are_of_different_images_in_zero_to_one(monkeypatch):
    monkeypatch.setattr(quality, "PAIRS", 40)
    images = np.full((3, 4, 4, 3), np.array([0, 51, 255]).reshape(3, 1, 1, 1), np.uint8)
    seen = []
    mean = quality._mean_over_pairs(lambda a, b: seen.append((a - b).abs().mean((1, 2, 3))) or seen[-1], images, 0)
    seen = torch.cat(seen).numpy()
    assert set(seen.round(3)) == {np.float32(0.2), np.float32(0.8), np.float32(1)} and len(seen) == 40
    assert mean == pytest.approx(seen.mean())


def test_evaluate_is_json_and_warns_of_small_sets(lesions, extractor, monkeypatch):
    monkeypatch.setattr(quality, "PAIRS", 40)
    made = filtered(lesions[60:100], lambda image: image.filter(ImageFilter.GaussianBlur(1)))
    result = quality.evaluate(lesions[:60], made, extractor)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result == quality.evaluate(lesions[:60], made, extractor)
    assert (result["n_real"], result["n_fake"], result["neighbours"]) == (60, 40, 3)
    assert result["feature_space"] == extractor.name
    assert any("FID from 40 images in 1280 dimensions" in warning for warning in result["warnings"])
    # Two images of each kind are the fewest that can be compared.
    fewest = quality.evaluate(lesions[:2], made[:2], extractor)
    json.dumps(fewest, allow_nan=False)
    assert fewest["neighbours"] == 1
    assert fewest["kid_low"] <= fewest["kid"] <= fewest["kid_high"]


# --- memorisation


def test_nearest_real_finds_planted_copies(lesions, extractor):
    train, fresh = lesions[:80], lesions[80:]
    brighter = np.clip(train[17].astype(int) + 6, 0, 255).astype(np.uint8)
    made = np.concatenate([train[33:34], brighter[None], fresh[:6]])
    table = quality.nearest_real(made, train, extractor)
    assert list(table.real_by_feature[:2]) == list(table.real_by_hash[:2]) == [33, 17]
    assert table.feature_distance[0] == pytest.approx(0, abs=1e-5)
    assert table.hash_distance[0] == 0
    assert table.feature_distance[1] < table.feature_distance[2:].min()
    assert table.hash_distance[1] < table.hash_distance[2:].min()


def test_hashes_are_those_of_the_deduplication(noise, tmp_path):
    for index, image in enumerate(noise):
        Image.fromarray(image).save(tmp_path / f"{index:02}.png")
    files = dedup.hash_images(sorted(tmp_path.glob("*.png"))).phash.to_numpy()
    index, distance = dedup.nearest(quality._phashes(noise), files)
    np.testing.assert_array_equal(index, np.arange(12))
    assert not distance.any()


def test_memorisation_summary_tells_copies_from_fresh_images(lesions, extractor):
    train, held_out, others = lesions[:60], lesions[60:90], lesions[90:]
    control = quality.nearest_real(held_out, train, extractor)
    copied = filtered(train[:30], lambda image: image.filter(ImageFilter.GaussianBlur(0.5)))
    copies = quality.memorisation_summary(quality.nearest_real(copied, train, extractor), control)
    fresh = quality.memorisation_summary(quality.nearest_real(others, train, extractor), control)
    for kind in ("feature", "hash"):
        assert copies[kind]["below_limit"] > 0.9
        assert copies[kind]["nearer"] > 0.95
        assert copies[kind]["p_value"] < 1e-6
        assert 0.25 < fresh[kind]["nearer"] < 0.75
        assert fresh[kind]["p_value"] > 0.001
    assert copies["feature"]["ratio"] < fresh["feature"]["ratio"]
    json.dumps(copies, allow_nan=False)


@pytest.mark.parametrize("count", [9, 88, 1000])
def test_share_below_the_limit_that_fresh_images_have_themselves(count):
    """Distances of fresh and generated images drawn from one distribution, a thousand times."""
    rng, below = np.random.default_rng(count), []
    for _ in range(1000):
        made, control = (
            pd.DataFrame({"feature_distance": rng.random(n), "hash_distance": rng.random(n)}) for n in (200, count)
        )
        found = quality.memorisation_summary(made, control)["feature"]
        below.append(found["below_limit"])
    assert np.mean(below) == pytest.approx(found["below_limit_expected"], rel=0.12)
