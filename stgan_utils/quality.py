"""How far generated images are from real ones, how varied they are, and whether they are copies.

Every figure is measured in the feature space of one network and compares only with figures of the same space; all
results name it. Images are uint8 arrays (N, H, W, 3), RGB; features are float32 arrays (N, D).
"""

import functools

import imagehash
import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.stats import mannwhitneyu
from sklearn.metrics import pairwise_distances_argmin_min
from torch_fidelity import metric_fid
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
from torchvision.models import SqueezeNet1_1_Weights

from stgan_utils import backbone, dedup, device, losses
from stgan_utils.config import UserError

PAIRS = 200  # random pairs of images behind each diversity figure
MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Z. Wang et al., 2003


def _kernel(a, b):
    """Polynomial kernel (x·y / D + 1)³ of KID."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _pair_means(kernel, weights):
    """Mean of `kernel` over pairs of different images, each image counted as often as `weights` (B, N) says → (B,)."""
    total = np.einsum("bi,bi->b", weights @ kernel, weights) - weights**2 @ np.diag(kernel)
    with np.errstate(invalid="ignore"):
        return total / (weights.sum(1) ** 2 - (weights**2).sum(1))


def kid(real_features, fake_features, seed=0, subsets=1000, most=2000):
    """Kernel Inception Distance (M. Bińkowski et al., ICLR 2018, eq. 4) and its 95 % interval.

    The value is the unbiased estimate of MMD² from all images at once: it needs no subset size that small classes could
    not fill, its expectation is the same for any number of images, and it may fall a little below 0. The interval is a
    percentile bootstrap over images, `subsets` resamples of either set; pairs of an image with itself are left out, as
    they would make every resample look farther off. Between 42 real lesions and 200 of another class it held the true
    distance in 95 of 100 trials; between two sets of one class it is wider than need be. (Subsets without replacement,
    the usual way, give an interval of width 0 when the subset is the whole class.)

    Args:
        real_features, fake_features: (N, D) and (M, D), at least 2 rows each.
        subsets: resamples behind the interval.
        most: a larger set is cut to this many images, drawn by `seed`.

    Returns:
        {"kid", "low", "high", "std" (of the resamples), "subset_size" (images of the smaller set, as used)}.
    """
    rng = np.random.default_rng(seed)
    real, fake = (
        np.asarray(x if len(x) <= most else x[rng.choice(len(x), most, replace=False)], dtype=np.float64)
        for x in (real_features, fake_features)
    )
    smaller = min(len(real), len(fake))
    if smaller < 2:
        raise UserError(f"KID needs 2 images of each kind or more; there are {len(real)} real, {len(fake)} generated.")
    kernels = _kernel(real, real), _kernel(fake, fake), _kernel(real, fake)

    def mmd(weights, fake_weights):
        across = np.einsum("bi,bi->b", weights @ kernels[2], fake_weights) / (len(real) * len(fake))
        return _pair_means(kernels[0], weights) + _pair_means(kernels[1], fake_weights) - 2 * across

    value = mmd(np.ones((1, len(real))), np.ones((1, len(fake))))[0]
    drawn = mmd(*(rng.multinomial(n, np.full(n, 1 / n), subsets).astype(np.float64) for n in (len(real), len(fake))))
    drawn = drawn[np.isfinite(drawn)]  # of a handful of images, one resample may be a single image over and over
    low, high = np.percentile(drawn, (2.5, 97.5))
    figures = {"kid": value, "low": low, "high": high, "std": drawn.std()}
    return {key: float(x) for key, x in figures.items()} | {"subset_size": smaller}


class DistanceToReal:
    """KID to one set of real images, whose features are computed once: for use inside a training loop.

    Calling it with generated images returns {"kid", "kid_low", "kid_high"}.
    """

    def __init__(self, real_images, extractor, seed=0):
        self.extractor, self.seed, self.feature_space = extractor, seed, extractor.name
        self.real_features = extractor(real_images)

    def __call__(self, fake_images):
        result = kid(self.real_features, self.extractor(fake_images), self.seed)
        return {"kid": result["kid"], "kid_low": result["low"], "kid_high": result["high"]}


def summary(history):
    """What a training's `quality.csv` comes to: {"kid_start", "kid_best", "kid_best_iteration", "kid_end"}, floats."""
    best = history.loc[history["kid"].idxmin()]
    found = {"start": history["kid"].iloc[0], "best": best["kid"], "best_iteration": best["iteration"]}
    return {f"kid_{name}": float(value) for name, value in (found | {"end": history["kid"].iloc[-1]}).items()}


def fid(real_features, fake_features):
    """Fréchet distance of two Gaussians fitted to the features (M. Heusel et al., NeurIPS 2017), by torch-fidelity.

    With no more images than features the covariances are singular and the value is biased upward: in MobileNetV2's 1280
    features the two halves of 491 real melanomas are 197 apart, melanomas and naevi 222. `evaluate` warns; read KID.
    """
    sets = (torch.tensor(x, dtype=torch.float64) for x in (real_features, fake_features))
    statistics = map(metric_fid.fid_features_to_statistics, sets)
    return metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]


def precision_recall(real_features, fake_features, k=3):
    """Precision and recall of T. Kynkäänniemi et al. (NeurIPS 2019).

    Precision: share of generated images that lie within the distance to the k-th nearest real neighbour of some real
    image; recall: the same with the roles swapped. Both in [0, 1]; each set needs more than `k` images.
    (torch-fidelity swapped its two inputs at 0.4, so that precision would silently become recall between versions.)
    """
    real, fake = (torch.tensor(x, dtype=torch.float64) for x in (real_features, fake_features))

    def covered(points, centres):
        radius = torch.cdist(centres, centres).kthvalue(k + 1).values  # the first neighbour is the point itself
        return float((torch.cdist(points, centres) <= radius).any(1).double().mean())

    return {"precision": covered(fake, real), "recall": covered(real, fake)}


def _pairs(count, seed):
    """Index arrays of `PAIRS` random pairs of different images out of `count` (at least 2)."""
    rng = np.random.default_rng(seed)
    first = rng.integers(count, size=PAIRS)
    return first, (first + rng.integers(1, count, size=PAIRS)) % count


def _mean_over_pairs(measure, images, seed, batch_size=20):
    """Mean of `measure(a, b) -> (B,)` over random pairs; a, b: float (B, 3, H, W) in [0, 1]."""
    values = []
    batches = (np.array_split(indices, PAIRS // batch_size) for indices in _pairs(len(images), seed))
    for chosen in zip(*batches, strict=True):
        a, b = (torch.from_numpy(images[i]).to(device.pick()).permute(0, 3, 1, 2).float() / 255 for i in chosen)
        with torch.inference_mode():
            values.append(measure(a, b).flatten().cpu())
    return float(torch.cat(values).mean())


def ms_ssim_diversity(images, seed=0):
    """Mean MS-SSIM over random pairs (A. Odena et al., ICML 2017): 1 if all images are alike, lower is more varied.

    Five scales need 176 pixels a side, four 99, three 44, two 11: smaller images are compared at as many as fit, with
    those scales' weights brought to sum 1. Figures with different `scales` do not compare.

    Returns:
        {"ms_ssim": in [0, 1], "scales": 2 … 5}.
    """
    side = min(images.shape[1:3])
    scales = max(n for n in range(2, 6) if side // (n - 1) ** 2 > 10)  # torchmetrics' condition
    betas = tuple(beta / sum(MS_SSIM_BETAS[:scales]) for beta in MS_SSIM_BETAS[:scales])
    measure = functools.partial(ms_ssim, reduction="none", data_range=1.0, betas=betas)
    return {"ms_ssim": _mean_over_pairs(measure, images, seed), "scales": scales}


def lpips_diversity(images, extractor, seed=0):
    """Mean perceptual distance over random pairs: higher is more varied.

    Returns:
        {"diversity", "measure"}: LPIPS (R. Zhang et al., CVPR 2018) or, where its network cannot be had, the mean
        cosine distance of the extractor's features; `measure` says which.
    """
    if backbone.hub_file(SqueezeNet1_1_Weights.IMAGENET1K_V1.url):  # 5 MB; AlexNet's would be 233
        measure = functools.partial(losses.Lpips("squeeze").distance.to(device.pick()), normalize=True)
        return {"diversity": _mean_over_pairs(measure, images, seed), "measure": "LPIPS (SqueezeNet)"}
    features = extractor(images)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    first, second = _pairs(len(features), seed)
    value = float(np.mean(1 - (features[first] * features[second]).sum(1)))
    return {"diversity": value, "measure": f"mean cosine distance, {extractor.name}"}


def evaluate(real_images, fake_images, extractor, seed=0):
    """Every figure on a set of generated images, ready for `result.json`.

    Args:
        real_images, fake_images: uint8 (N, S, S, 3), at least 2 each, all of one size.

    Returns:
        dict of numbers and texts: `kid`, `kid_low`, `kid_high`, `kid_std`, `subset_size`, `fid`, `precision`, `recall`,
        `neighbours` (k of the two), `ms_ssim_fake`, `ms_ssim_real`, `ms_ssim_scales`, `diversity_fake`,
        `diversity_real`, `diversity_measure`, `feature_space`, `n_real`, `n_fake`, `warnings` (list of sentences).
    """
    sets = {"real": real_images, "fake": fake_images}
    real, fake = extractor(real_images), extractor(fake_images)
    distance = kid(real, fake, seed)
    fewest = min(len(real), len(fake))
    neighbours = min(3, fewest - 1)
    similarity = {kind: ms_ssim_diversity(images, seed) for kind, images in sets.items()}
    spread = {kind: lpips_diversity(images, extractor, seed) for kind, images in sets.items()}
    return {
        "kid": distance["kid"],
        **{f"kid_{key}": distance[key] for key in ("low", "high", "std")},
        "subset_size": distance["subset_size"],
        "fid": fid(real, fake),
        **precision_recall(real, fake, neighbours),
        "neighbours": neighbours,
        **{f"ms_ssim_{kind}": value["ms_ssim"] for kind, value in similarity.items()},
        "ms_ssim_scales": similarity["fake"]["scales"],
        **{f"diversity_{kind}": value["diversity"] for kind, value in spread.items()},
        "diversity_measure": spread["fake"]["measure"],
        "feature_space": extractor.name,
        "n_real": len(real),
        "n_fake": len(fake),
        "warnings": _warnings(fewest, extractor, similarity, spread),
    }


def _warnings(fewest, extractor, similarity, spread):
    found = [extractor.note]
    if fewest <= extractor.dim:
        found.append(f"FID from {fewest} images in {extractor.dim} dimensions is biased upward; read KID.")
    if fewest < 50:
        found.append(f"KID from {fewest} images is uncertain; read its interval.")
        found.append(f"Precision and recall from {fewest} images depend on single images.")
    if similarity["fake"]["scales"] < 5:
        found.append(f"MS-SSIM at {similarity['fake']['scales']} of 5 scales, as the images are small.")
    if not spread["fake"]["measure"].startswith("LPIPS"):
        found.append(f"LPIPS weights cannot be had here; diversity is the {spread['fake']['measure']}.")
    return found


def _phashes(images):
    bits = np.stack([imagehash.phash(Image.fromarray(image)).hash.ravel() for image in images])
    return np.packbits(bits, axis=1, bitorder="little").view("<u8")[:, 0]  # dedup's order of bits


def nearest_real(fake_images, real_images, extractor):
    """Each image's nearest real image, by features and by hash.

    Returns:
        DataFrame, one row an image: `fake_index`, `real_by_feature`, `feature_distance` (cosine, 0 … 2),
        `real_by_hash`, `hash_distance` (pHash, differing bits of 64).
    """
    features = extractor(fake_images), extractor(real_images)
    by_feature, feature_distance = pairwise_distances_argmin_min(*features, metric="cosine")
    by_hash, hash_distance = dedup.nearest(_phashes(fake_images), _phashes(real_images))
    table = {"real_by_feature": by_feature, "feature_distance": feature_distance.astype(float)}
    table |= {"real_by_hash": by_hash, "hash_distance": hash_distance}
    return pd.DataFrame(table).rename_axis("fake_index").reset_index()


def memorisation_summary(nearest, control):
    """Whether generated images lie nearer to the training images than fresh real images do.

    The idea of C. Meehan et al. (AISTATS 2020): a generator that copies puts its images nearer to the training set than
    held-out real images of the same class are. Far-off images pass this test whatever they are, so read KID first.

    Args:
        nearest: `nearest_real(generated, train)`.
        control: `nearest_real(held-out real images, train)`.

    Returns:
        {"n", "n_control", "feature": {...}, "hash": {...}, "warnings": [...]}; for each distance its `median`,
        `median_control` and their `ratio` (None if the control's median is 0), `limit` (the control's 1st percentile),
        `below_limit` (share of generated images below it), `below_limit_expected` (what it is on average without
        copying: 0.01 for many held-out images, 0.11 for nine, whose limit is hardly more than the nearest one's
        distance), `nearer` (chance that a generated image is nearer than a held-out one; 0.5 is expected, 1 is copying)
        and `p_value` (one-sided Mann-Whitney test of that).
    """
    summary = {"n": len(nearest), "n_control": len(control), "warnings": []}
    if len(control) < 100:
        summary["warnings"].append(
            f"The limit from {len(control)} held-out images is little more than their nearest one."
        )
    for kind in ("feature", "hash"):
        made, fresh = nearest[f"{kind}_distance"], control[f"{kind}_distance"]
        test = mannwhitneyu(made, fresh, alternative="less")
        limit = float(np.percentile(fresh, 1))
        summary[kind] = {
            "median": float(made.median()),
            "median_control": float(fresh.median()),
            "ratio": float(made.median() / fresh.median()) if fresh.median() > 0 else None,
            "limit": limit,
            "below_limit": float((made < limit).mean()),
            "below_limit_expected": (1 + 0.01 * (len(fresh) - 1)) / (len(fresh) + 1),
            "nearer": float(1 - test.statistic / (len(made) * len(fresh))),
            "p_value": float(test.pvalue),
        }
    return summary
