"""What a classifier's answers are worth: figures with intervals, by subgroup, and the post-mortem's arithmetic.

Answers come as a DataFrame with one column a class; columns are found by name, whatever their order.
"""

from itertools import permutations

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from stgan_utils.lesions import CLASSES, MAJORITY

ECE_BINS = 15
AGE_BANDS = {"0–29": 0, "30–44": 30, "45–59": 45, "60–74": 60, "75+": 75}  # name: first year
SUBGROUPS = ("age", "sex", "localization", "dx_type", "dataset")  # columns of the dataset table


def evaluate(y_true, proba, groups=None, bootstrap=1000, seed=0):
    """Every figure of a classifier on one set of images, with 95 % intervals.

    Intervals are percentiles over bootstrap resamples of *lesions*: pictures of one lesion are no independent evidence.
    A thousand resamples through scikit-learn would take a minute; here all of them are one matrix product a figure,
    and the tests hold the figures equal to scikit-learn's and torchmetrics'. A share that no resample moves, such as 12
    lesions of 12, has Wilson's interval (JASA 1927) instead. A resample's means are of the classes it has.

    Args:
        y_true: N class codes.
        proba: N rows of probabilities, columns named by class.
        groups: N lesion ids; None: every image is its own.
        bootstrap: resamples; 0 leaves the intervals None.

    Returns:
        A dict fit for JSON:
        `images`, `lesions`, `classes` (order of the matrix), `confusion_matrix` (rows true, columns predicted);
        `metrics`: {name: {"value", "low", "high"}} of accuracy, balanced_accuracy (mean recall), macro_f1, macro_auc
        (one against the rest), mel_sensitivity_at_90 and _at_95 (% specificity), ece (top answer, 15 bins); ece also
        has "if_calibrated", what perfectly calibrated answers of these probabilities would come to on average: chance
        alone opens gaps, and more of them in a resample, so the middle of its interval lies above its value;
        `per_class`: {code: {"images", "recall", "precision", "auc"}}, the last three with intervals;
        `trivial`: accuracy, balanced_accuracy and macro_f1 of answering NV always.
        A figure that the images do not define (a class without images) is None and left out of the means; the F1 of a
        class that was only ever answered is 0 and counts, as in scikit-learn.

    Raises:
        ValueError: columns that are not the classes, labels that are none, answers that are not finite, images of no
            lesion.
    """
    y_true, proba = _aligned(y_true, proba)
    weights, lesions = _resamples(len(y_true), groups, bootstrap, seed)
    figures = _figures(y_true, proba, weights)
    always = np.tile(np.array(CLASSES) == MAJORITY, (len(y_true), 1))
    trivial = _from_confusion(_confusion(y_true, always, weights[:1]))
    counts = np.bincount(y_true, minlength=len(CLASSES))
    matrix = _confusion(y_true, proba, weights[:1])[0].astype(int)
    lesion = np.arange(len(y_true)) if groups is None else np.asarray(groups)
    shares = {
        "accuracy": lesions,
        "recall": [len(set(lesion[y_true == i])) for i in range(len(CLASSES))],
        "precision": [len(set(lesion[proba.argmax(1) == i])) for i in range(len(CLASSES))],
    }
    metrics = {name: _interval(values, shares.get(name)) for name, values in figures.items() if values.ndim == 1}
    metrics["ece"]["if_calibrated"] = _ece_if_calibrated(proba, seed)
    return {
        "images": len(y_true),
        "lesions": int(lesions),
        "classes": list(CLASSES),
        "confusion_matrix": matrix.tolist(),
        "metrics": metrics,
        "per_class": {
            code: {"images": int(counts[i])}
            | {
                name: _interval(values[:, i], shares[name][i] if name in shares else None)
                for name, values in figures.items()
                if values.ndim == 2
            }
            for i, code in enumerate(CLASSES)
        },
        "trivial": {
            "always": MAJORITY,
            **{name: float(trivial[name][0]) for name in ("accuracy", "balanced_accuracy", "macro_f1")},
        },
    }


def paired_difference(y_true, proba, other, groups=None, bootstrap=1000, seed=0):
    """Balanced accuracy of `proba` minus that of `other` on the same images, with its 95 % interval.

    Both are scored on the same resamples of lesions, so what is hard for both drops out of the interval.

    Returns:
        {"value", "low", "high"}.
    """
    weights, _ = _resamples(len(y_true), groups, bootstrap, seed)
    ours, theirs = (
        _from_confusion(_confusion(*_aligned(y_true, p), weights))["balanced_accuracy"] for p in (proba, other)
    )
    return _interval(ours - theirs)


def over_seeds(y_true, probas, others, groups=None, bootstrap=1000, seed=0):
    """Mean figures of a recipe trained with several seeds, and what it gains over another one.

    A resample draws lesions and, apart from them, seeds: the interval holds what another sample of lesions *and*
    another training of the classifier would have changed, not another training of the GANs. The same draws serve both
    recipes, seed by seed.

    Args:
        y_true: N class codes.
        probas: for each seed N rows of probabilities, columns named by class; other columns are passed over.
        others: the same of the recipe to compare with.
        groups, bootstrap, seed: as `evaluate`.

    Returns:
        {name: {"value", "low", "high"}} of accuracy, balanced_accuracy, macro_auc, mel_sensitivity_at_90 and difference
        (of the balanced accuracies).
    """
    if len(probas) != len(others):
        raise ValueError(f"{len(probas)} seeds beside {len(others)}")
    weights, _ = _resamples(len(y_true), groups, bootstrap, seed)
    picks = np.random.default_rng([seed, 1]).integers(len(probas), size=(bootstrap, len(probas)))
    picks = np.vstack([np.arange(len(probas)), picks])

    def averaged(figures, name):
        return np.stack([figure[name] for figure in figures], 1)[np.arange(bootstrap + 1)[:, None], picks].mean(1)

    ours = [_figures(*_aligned(y_true, proba[list(CLASSES)]), weights) for proba in probas]
    theirs = [_from_confusion(_confusion(*_aligned(y_true, proba[list(CLASSES)]), weights)) for proba in others]
    names = ("accuracy", "balanced_accuracy", "macro_auc", "mel_sensitivity_at_90")
    found = {name: averaged(ours, name) for name in names}
    found["difference"] = found["balanced_accuracy"] - averaged(theirs, "balanced_accuracy")
    return {name: _interval(values) for name, values in found.items()}


def balanced_accuracy(y_true, proba):
    """Mean recall over the classes that `y_true` has."""
    y_true, proba = _aligned(y_true, proba)
    return float(_from_confusion(_confusion(y_true, proba, np.ones((1, len(y_true)))))["balanced_accuracy"][0])


def _resamples(count, groups, bootstrap, seed):
    """Weights (1 + bootstrap, count), and the number of lesions.

    Row 0 is the set itself, the others say how often a resample of lesions drew each image.
    """
    lesion = pd.factorize(np.asarray(groups))[0] if groups is not None else np.arange(count)
    if lesion.min() < 0:
        raise ValueError(f"{(lesion < 0).sum()} images have no lesion id")
    lesions = lesion.max() + 1
    draws = np.random.default_rng(seed).multinomial(lesions, np.full(lesions, 1 / lesions), size=bootstrap)
    return np.vstack([np.ones(count), draws[:, lesion]]), lesions


def _aligned(y_true, proba):
    """Class numbers (N,) and probabilities (N, 7), both in the order of `CLASSES`."""
    if sorted(proba.columns) != sorted(CLASSES):
        raise ValueError(f"columns are {list(proba.columns)}, they must be the classes {CLASSES}")
    y_true = np.asarray(y_true)
    if len(y_true) != len(proba) or not set(y_true) <= set(CLASSES):
        raise ValueError(f"{len(y_true)} labels for {len(proba)} rows, among them {sorted(set(y_true) - set(CLASSES))}")
    answers = proba[list(CLASSES)].to_numpy(float)
    if not np.isfinite(answers).all():
        raise ValueError(f"{(~np.isfinite(answers)).any(1).sum()} rows of answers are not finite")
    return np.array([CLASSES.index(code) for code in y_true]), answers


def _interval(values, lesions=None):
    """Row 0's value and the 2.5 and 97.5 percentiles of the other rows; None where there is none.

    Args:
        lesions: of how many lesions the values are a share; Wilson's interval where all of them or none are in it.
    """
    drawn = values[1:][~np.isnan(values[1:])]
    value, low, high = values[0], *(np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan))
    if lesions and len(drawn) and value in (0, 1):
        low, high = binomtest(round(value * lesions), lesions).proportion_ci(method="wilson")
    known = {"value": value, "low": low, "high": high}
    return {name: None if np.isnan(figure) else float(figure) for name, figure in known.items()}


def _figures(y_true, proba, weights):
    """{name: (B,) or, for figures of a class, (B, 7)} for weights (B, N)."""
    figures = _from_confusion(_confusion(y_true, proba, weights))
    auc, sensitivity = [], {}
    for i, code in enumerate(CLASSES):
        false_rate, true_rate = _roc(y_true == i, proba[:, i], weights)
        auc.append((np.diff(false_rate) * (true_rate[:, 1:] + true_rate[:, :-1]) / 2).sum(1))
        if code == "MEL":
            for percent in (90, 95):
                allowed = false_rate <= 1 - percent / 100 + 1e-9
                best = np.where(allowed, true_rate, 0).max(1)
                sensitivity[f"mel_sensitivity_at_{percent}"] = np.where(np.isnan(auc[-1]), np.nan, best)
    auc = np.stack(auc, 1)
    return figures | {"macro_auc": _mean(auc), **sensitivity, "ece": _ece(y_true, proba, weights), "auc": auc}


def _confusion(y_true, proba, weights):
    """(B, 7, 7), rows true, columns predicted."""
    cell = y_true * len(CLASSES) + proba.argmax(1)
    return (weights @ np.eye(len(CLASSES) ** 2)[cell]).reshape(-1, len(CLASSES), len(CLASSES))


def _from_confusion(matrix):
    with np.errstate(invalid="ignore"):
        hits, true, predicted = np.diagonal(matrix, axis1=1, axis2=2), matrix.sum(2), matrix.sum(1)
        recall, precision, f1 = hits / true, hits / predicted, 2 * hits / (true + predicted)
    return {
        "accuracy": hits.sum(1) / true.sum(1),
        "balanced_accuracy": _mean(recall),
        "macro_f1": _mean(f1),
        "recall": recall,
        "precision": precision,
    }


def _mean(values):
    """Mean over the classes that have a value."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1) / known.sum(1)


def _roc(positive, score, weights):
    """False and true positive rates (B, K) as the threshold falls; equal scores fall together. NaN without a side."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)
    rates = []
    for side in (~positive, positive):
        summed = np.cumsum(weights[:, order] * side[order], axis=1)
        with np.errstate(invalid="ignore"):
            rate = summed[:, last] / summed[:, -1:]
        rates.append(np.hstack([np.zeros((len(weights), 1)), rate]))
    return rates


def _ece(y_true, proba, weights):
    """Expected calibration error of the top answer over equal bins (C. Guo et al., ICML 2017)."""
    bins, confidence, hit = _bins(y_true, proba, ECE_BINS)
    gap = weights @ (np.eye(ECE_BINS)[bins] * (hit - confidence)[:, None])
    return np.abs(gap).sum(1) / weights.sum(1)


def _ece_if_calibrated(proba, seed, draws=1000):
    """Mean ECE where each answer is right with just the probability that it gives."""
    bins, confidence, _ = _bins(np.zeros(len(proba)), proba, ECE_BINS)
    hit = np.random.default_rng(seed).random((draws, len(proba))) < confidence
    return float(np.abs((hit - confidence) @ np.eye(ECE_BINS)[bins]).sum(1).mean() / len(proba))


def _bins(y_true, proba, count):
    confidence = proba.max(1)
    bins = np.clip(np.ceil(confidence * count).astype(int) - 1, 0, count - 1)
    return bins, confidence, proba.argmax(1) == y_true


def reliability_curve(y_true, proba, bins=ECE_BINS):
    """One row a non-empty bin of the top answer's probability: confidence (mean), accuracy, images."""
    y_true, proba = _aligned(y_true, proba)
    number, confidence, hit = _bins(y_true, proba, bins)
    frame = pd.DataFrame({"confidence": confidence, "accuracy": hit.astype(float), "images": 1})
    return frame.groupby(number).agg({"confidence": "mean", "accuracy": "mean", "images": "sum"}).reset_index(drop=True)


def by_subgroup(table, y_true, proba, column, bootstrap=200, seed=0):
    """Accuracy and balanced accuracy in each group of images, with counts, so that nobody reads 3 images as a fact.

    Args:
        table: dataset table of the N images, with `lesion_id` and `column`; ages are put into bands.

    Returns:
        DataFrame, one row a group: `group, images, lesions, classes` (present) and `value`, `_low`, `_high` of each
        figure. Images without an entry in `column` are the group "unknown". The interval of a balanced accuracy is that
        of `_mean_recall`: of a class of few lesions many resamples would have none.
    """
    values = table[column]
    if column == "age":
        values = pd.cut(values, [*AGE_BANDS.values(), np.inf], right=False, labels=list(AGE_BANDS))
    values = values.astype(object).where(values.notna(), "unknown").to_numpy()
    y_true, rows = np.asarray(y_true), []
    for group in sorted(set(values), key=str):
        chosen = values == group
        result = evaluate(y_true[chosen], proba[chosen], table["lesion_id"].to_numpy()[chosen], bootstrap, seed)
        row = {"group": group, "images": result["images"], "lesions": result["lesions"]}
        row["classes"] = len(set(y_true[chosen]))
        lesions = table[chosen].groupby(y_true[chosen])["lesion_id"].nunique()
        recalls = [result["per_class"][code]["recall"]["value"] for code in lesions.index]
        result["metrics"]["balanced_accuracy"] = _mean_recall(np.array(recalls), lesions.to_numpy(), seed)
        for name in ("accuracy", "balanced_accuracy"):
            figure = result["metrics"][name]
            row |= {name: figure["value"], f"{name}_low": figure["low"], f"{name}_high": figure["high"]}
        rows.append(row)
    return pd.DataFrame(rows)


def _mean_recall(recalls, lesions, seed, draws=4000):
    """The mean of classes' recalls, with the middle 95 % of its posterior.

    K. H. Brodersen et al., "The balanced accuracy and its posterior distribution", ICPR 2010, with Jeffreys' prior: of
    what a single lesion of a class shows, a bootstrap takes no doubt into account.

    Args:
        recalls, lesions: those of each class that is there.
    """
    hits = recalls * lesions
    drawn = np.random.default_rng(seed).beta(hits + 0.5, lesions - hits + 0.5, size=(draws, len(lesions))).mean(1)
    value, (low, high) = recalls.mean(), np.percentile(drawn, [2.5, 97.5])
    return {"value": float(value), "low": float(min(low, value)), "high": float(max(high, value))}


def by_subgroups(table, y_true, proba, bootstrap=200, seed=0):
    """`by_subgroup` for each of `SUBGROUPS` that tells these images apart, one below the other.

    Returns:
        DataFrame: `column`, then the columns of `by_subgroup`; empty where no column tells them apart.
    """
    known = [column for column in SUBGROUPS if column in table and table[column].nunique(dropna=False) > 1]
    found = [by_subgroup(table, y_true, proba, column, bootstrap, seed).assign(column=column) for column in known]
    return pd.concat(found, ignore_index=True).set_index("column").reset_index() if found else pd.DataFrame()


def relabel_columns(matrix, order_as_labelled, true_order):
    """A confusion matrix whose columns were named in one order and are really in another, put right.

    Args:
        matrix: (7, 7), rows true and columns predicted, both named in `order_as_labelled`.
        true_order: what each column really stands for.

    Returns:
        DataFrame with rows and columns in `order_as_labelled`, each column now under its true name.
    """
    columns = pd.DataFrame(np.asarray(matrix), index=list(order_as_labelled), columns=list(true_order))
    return columns[list(order_as_labelled)]


def permutation_scores(matrix, classes=CLASSES):
    """Accuracy and balanced accuracy of a confusion matrix under all 5,040 readings of its columns, best first.

    Returns:
        DataFrame: `order` (tuple: what each column would stand for), `accuracy`, `balanced_accuracy`.
    """
    matrix = np.asarray(matrix, float)
    orders = np.array(list(permutations(range(len(classes)))))
    hits = matrix[orders, np.arange(len(classes))]  # column j stands for class orders[:, j]
    recall = hits / matrix.sum(1)[orders]
    scores = pd.DataFrame({"accuracy": hits.sum(1) / matrix.sum(), "balanced_accuracy": recall.mean(1)})
    scores.insert(0, "order", [tuple(classes[i] for i in order) for order in orders])
    return scores.sort_values(["accuracy", "balanced_accuracy"], ascending=False, ignore_index=True)
