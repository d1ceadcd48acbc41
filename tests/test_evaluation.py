"""Figures against scikit-learn, torchmetrics and hand counts; the post-mortem's numbers against what was published."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional.classification import multiclass_calibration_error

from stgan_utils import evaluation as ev
from stgan_utils import prior
from stgan_utils.files import write_json
from stgan_utils.lesions import CLASSES, PRIOR_TRAINING_ORDER


@pytest.fixture(scope="module")
def answers():
    """400 images of 250 lesions; answers right more often than not, with ties among the scores."""
    rng = np.random.default_rng(0)
    y_true = rng.choice(CLASSES, 400, p=[0.1, 0.1, 0.1, 0.05, 0.15, 0.45, 0.05])
    logits = rng.normal(size=(400, 7)) + 1.2 * (y_true[:, None] == np.array(CLASSES))
    proba = np.exp(logits.round(1))
    proba = pd.DataFrame(proba / proba.sum(1, keepdims=True), columns=CLASSES)
    return y_true, proba, rng.integers(0, 250, 400)


def test_figures_equal_scikit_learn_and_torchmetrics(answers):
    y_true, proba, lesions = answers
    result = ev.evaluate(y_true, proba, lesions, bootstrap=0)
    y_pred = proba.idxmax(axis=1)
    expected = {
        "accuracy": sk.accuracy_score(y_true, y_pred),
        "balanced_accuracy": sk.balanced_accuracy_score(y_true, y_pred),
        "macro_f1": sk.f1_score(y_true, y_pred, average="macro"),
        "macro_auc": sk.roc_auc_score(y_true, proba, multi_class="ovr", labels=list(CLASSES)),
        "ece": multiclass_calibration_error(
            torch.tensor(proba.to_numpy()), torch.tensor([CLASSES.index(y) for y in y_true]), num_classes=7, n_bins=15
        ).item(),
    }
    for percent in (90, 95):
        fpr, tpr, _ = sk.roc_curve(y_true == "MEL", proba["MEL"])
        expected[f"mel_sensitivity_at_{percent}"] = tpr[fpr <= 1 - percent / 100 + 1e-9].max()
    assert {name: figure["value"] for name, figure in result["metrics"].items()} == pytest.approx(expected, abs=1e-6)
    recall = sk.recall_score(y_true, y_pred, average=None, labels=list(CLASSES))
    precision = sk.precision_score(y_true, y_pred, average=None, labels=list(CLASSES))
    for i, code in enumerate(CLASSES):
        figures = result["per_class"][code]
        assert figures["images"] == (y_true == code).sum()
        assert figures["recall"]["value"] == pytest.approx(recall[i])
        assert figures["precision"]["value"] == pytest.approx(precision[i])
        assert figures["auc"]["value"] == pytest.approx(sk.roc_auc_score(y_true == code, proba[code]))
    assert result["confusion_matrix"] == sk.confusion_matrix(y_true, y_pred, labels=list(CLASSES)).tolist()
    assert (result["images"], result["lesions"]) == (400, len(set(lesions)))


def test_balanced_accuracy_by_hand():
    # NV: 3 of 4, MEL: 1 of 2, no other class: (0.75 + 0.5) / 2; plain accuracy would be 4 of 6.
    y_true = ["NV", "NV", "NV", "NV", "MEL", "MEL"]
    y_pred = ["NV", "NV", "NV", "DF", "MEL", "NV"]
    proba = pd.DataFrame([[float(code == pred) for code in CLASSES] for pred in y_pred], columns=CLASSES)
    assert ev.balanced_accuracy(y_true, proba) == pytest.approx(0.625)
    result = ev.evaluate(y_true, proba, bootstrap=20)
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(4 / 6)
    assert result["per_class"]["VASC"]["recall"] == {"value": None, "low": None, "high": None}
    assert result["trivial"] == {
        "always": "NV",
        "accuracy": pytest.approx(4 / 6),
        "balanced_accuracy": 0.5,
        "macro_f1": pytest.approx(sk.f1_score(y_true, ["NV"] * 6, average="macro")),
    }


def test_columns_are_read_by_name(answers):
    y_true, proba, lesions = answers
    shuffled = proba[list(PRIOR_TRAINING_ORDER)]
    assert ev.evaluate(y_true, shuffled, lesions, 10) == ev.evaluate(y_true, proba, lesions, 10)
    with pytest.raises(ValueError, match="columns"):
        ev.evaluate(y_true, proba.rename(columns={"NV": "nevus"}))
    with pytest.raises(ValueError, match="400 rows"):
        ev.evaluate(y_true[:-1], proba)


def test_intervals_hold_the_value_repeat_and_write_as_json(answers, tmp_path):
    result = ev.evaluate(*answers, bootstrap=300)
    figures = [*result["metrics"].values()]
    figures += [f[name] for f in result["per_class"].values() for name in ("recall", "precision", "auc")]
    for figure in figures:
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["low"] < figure["high"]
    assert result == ev.evaluate(*answers, bootstrap=300)
    write_json(tmp_path / "result.json", result)  # refuses NaN


def test_interval_is_that_of_a_plain_bootstrap_over_lesions(answers):
    y_true, proba, lesions = answers
    hit = (proba.idxmax(axis=1) == y_true).to_numpy()
    rng = np.random.default_rng(1)
    rows = [np.flatnonzero(lesions == lesion) for lesion in np.unique(lesions)]
    drawn = [hit[np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])].mean() for _ in range(2000)]
    figure = ev.evaluate(y_true, proba, lesions, bootstrap=2000)["metrics"]["accuracy"]
    assert (figure["low"], figure["high"]) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.006)
    # Ten pictures of each lesion are no more evidence than one.
    many = ev.evaluate(np.repeat(y_true, 10), proba.loc[proba.index.repeat(10)], np.repeat(lesions, 10), 500)
    assert many["metrics"]["accuracy"]["low"] == pytest.approx(figure["low"], abs=0.01)


def test_a_share_that_no_resample_moves_has_an_interval_all_the_same(answers):
    """12 lesions of 12, three pictures each: by Wilson 0.757 … 1, as for 12 pictures; the others' by resampling."""
    y_true = np.repeat(["VASC"] * 12 + ["NV"] * 30, 3)
    proba = pd.DataFrame(np.where(np.array(CLASSES) == y_true[:, None], 0.7, 0.05), columns=CLASSES)
    proba.loc[100:, list(CLASSES)] = np.where(np.array(CLASSES) == "MEL", 0.7, 0.05)
    result = ev.evaluate(y_true, proba, np.repeat(np.arange(42), 3), bootstrap=200)
    recall = {code: result["per_class"][code]["recall"] for code in ("VASC", "NV")}
    assert recall["VASC"] == pytest.approx({"value": 1, "low": 0.7575, "high": 1}, abs=1e-3)
    assert recall["NV"]["high"] < 1
    assert result["per_class"]["MEL"]["precision"]["value"] == 0 < result["per_class"]["MEL"]["precision"]["high"]
    every = ev.evaluate(["VASC"] * 12, proba[:12], bootstrap=200)["metrics"]["accuracy"]
    assert every == pytest.approx({"value": 1, "low": 0.7575, "high": 1}, abs=1e-3)


def test_ece_if_calibrated_is_that_of_answers_right_as_often_as_they_say(answers):
    _, proba, _ = answers
    rng = np.random.default_rng(5)
    drawn = [
        multiclass_calibration_error(torch.tensor(proba.to_numpy()), torch.tensor(right), num_classes=7, n_bins=15)
        for right in np.stack([rng.choice(7, 300, p=row) for row in proba.to_numpy()], 1)
    ]
    found = ev.evaluate(*answers, bootstrap=0)["metrics"]["ece"]
    assert found["if_calibrated"] == pytest.approx(float(np.mean(drawn)), rel=0.05)
    assert found["if_calibrated"] < found["value"]  # these answers are not


def test_answers_that_are_not_finite_and_images_of_no_lesion_are_refused(answers):
    y_true, proba, lesions = answers
    broken = proba.copy()
    broken.iloc[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 rows of answers are not finite"):
        ev.evaluate(y_true, broken, bootstrap=0)
    with pytest.raises(ValueError, match="2 images have no lesion id"):
        ev.evaluate(y_true, proba, pd.Series(lesions, dtype=object).mask(np.arange(400) < 2), bootstrap=0)


def test_reliability_curve_adds_up_to_the_ece(answers):
    y_true, proba, _ = answers
    curve = ev.reliability_curve(y_true, proba)
    assert curve["images"].sum() == 400
    ece = ((curve["accuracy"] - curve["confidence"]).abs() * curve["images"]).sum() / 400
    assert ece == pytest.approx(ev.evaluate(y_true, proba, bootstrap=0)["metrics"]["ece"]["value"])


def test_subgroups_partition_the_images(answers):
    y_true, proba, lesions = answers
    rng = np.random.default_rng(2)
    age = pd.Series(rng.choice([0, 29, 30, 74, 75, np.nan], 400))
    table = pd.DataFrame({"lesion_id": lesions, "age": age, "sex": rng.choice(["female", "male"], 400)})
    by_age = ev.by_subgroup(table, y_true, proba, "age", bootstrap=20).set_index("group")
    assert by_age["images"].to_dict() == {
        "0–29": (age < 30).sum(),
        "30–44": (age == 30).sum(),
        "60–74": (age == 74).sum(),
        "75+": (age == 75).sum(),
        "unknown": age.isna().sum(),
    }
    by_sex = ev.by_subgroup(table, y_true, proba, "sex", bootstrap=20).set_index("group")
    men = (table["sex"] == "male").to_numpy()
    expected = sk.balanced_accuracy_score(y_true[men], proba.idxmax(axis=1)[men])
    assert by_sex.loc["male", "balanced_accuracy"] == pytest.approx(expected)


def test_the_mean_recall_of_classes_of_few_lesions_has_an_interval_that_covers():
    """Groups of four classes, one of them with a single lesion, whose recalls are known."""
    rng, truth, counts = np.random.default_rng(6), np.array([0.9, 0.7, 0.8, 0.5]), np.array([1, 3, 12, 30])
    codes = np.repeat(CLASSES[:4], counts)
    table = pd.DataFrame({"lesion_id": [f"L{number}" for number in range(46)], "sex": "female"})
    inside = []
    for _ in range(200):
        right = rng.random(46) < np.repeat(truth, counts)
        answer = np.where(right, codes, CLASSES[6])
        proba = pd.DataFrame(np.where(np.array(CLASSES) == answer[:, None], 0.7, 0.05), columns=CLASSES)
        row = ev.by_subgroup(table, codes, proba, "sex", bootstrap=1).iloc[0]
        low, value, high = row[["balanced_accuracy_low", "balanced_accuracy", "balanced_accuracy_high"]]
        assert low <= value <= high and high - low > 0.2
        inside.append(low <= truth.mean() <= high)
    assert np.mean(inside) > 0.88
    # Two pictures of each lesion are no more evidence than one.
    twice = ev.by_subgroup(table.loc[table.index.repeat(2)], codes.repeat(2), proba.loc[proba.index.repeat(2)], "sex")
    pd.testing.assert_series_equal(
        twice.filter(like="balanced").iloc[0], row.filter(like="balanced"), check_dtype=False
    )


def test_subgroups_are_those_that_tell_the_images_apart(answers):
    y_true, proba, lesions = answers
    sex = np.where(np.arange(400) % 3, "female", None)
    table = pd.DataFrame({"lesion_id": lesions, "sex": sex, "dataset": "one source", "age": np.nan})
    groups = ev.by_subgroups(table, y_true, proba, bootstrap=20)
    assert groups["column"].tolist() == ["sex", "sex"]
    assert groups[["group", "images"]].to_numpy().tolist() == [["female", 266], ["unknown", 134]]
    assert ev.by_subgroups(table[["lesion_id", "dataset"]], y_true, proba).empty


def test_post_mortem_of_the_prior_system():
    matrix = np.array(prior.CONFUSION)
    assert matrix.sum() == 1512
    assert np.trace(matrix) == 173
    assert np.trace(matrix) / 1512 == pytest.approx(0.1144, abs=5e-5)
    right = ev.relabel_columns(matrix, CLASSES, PRIOR_TRAINING_ORDER)
    assert list(right.columns) == list(right.index) == list(CLASSES)
    assert np.trace(right) == 1045
    scores = ev.permutation_scores(matrix)
    best = scores.iloc[0]
    assert best["order"] == PRIOR_TRAINING_ORDER
    assert best["accuracy"] == pytest.approx(0.691, abs=5e-4)
    assert best["balanced_accuracy"] == pytest.approx(0.533, abs=5e-4)
    assert len(set(scores["order"])) == 5040
    assert scores["balanced_accuracy"].max() == best["balanced_accuracy"]
    assert scores.set_index("order").loc[[CLASSES], "accuracy"].item() == pytest.approx(173 / 1512)
    # Its mixed validation, from the same diagonal as published there: 93.3 %, with NV, all real, behind the others.
    right, nv = sum(prior.MIXED_RIGHT.values()), prior.MIXED_RIGHT["NV"]
    assert right / prior.MIXED_IMAGES == pytest.approx(0.933, abs=5e-4)
    others = (right - nv) / (prior.MIXED_IMAGES - prior.MIXED_NV_IMAGES)
    assert (nv / prior.MIXED_NV_IMAGES, others) == pytest.approx((0.874, 0.951), abs=5e-4)


def test_paired_difference_is_narrower_than_two_intervals_and_exact_on_a_known_case():
    rng = np.random.default_rng(0)
    truth = rng.choice(CLASSES, 600)
    good = pd.DataFrame(rng.dirichlet(np.ones(7), 600), columns=list(CLASSES))
    # The other arm answers the same, but for the first 60 images, which the first arm gets right.
    for row in range(60):
        good.loc[row] = 0.0
        good.loc[row, truth[row]] = 1.0
    other = good.copy()
    other.loc[:59] = good.loc[:59, list(CLASSES)].to_numpy()[:, [1, 2, 3, 4, 5, 6, 0]]
    found = ev.paired_difference(truth, good, other)
    expected = ev.balanced_accuracy(truth, good) - ev.balanced_accuracy(truth, other)
    assert found["value"] == pytest.approx(expected)
    assert 0 < found["low"] < expected < found["high"]
    alone = ev.evaluate(truth, good)["metrics"]["balanced_accuracy"]
    assert found["high"] - found["low"] < alone["high"] - alone["low"]
    same = ev.paired_difference(truth, good, good[list(reversed(CLASSES))])
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_figures_over_seeds_are_those_of_a_plain_bootstrap_over_lesions_and_seeds():
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.choice(CLASSES, 120), 2)
    lesions = np.repeat(np.arange(120), 2)

    def seeds(strength):
        answers = []
        for _ in range(3):
            proba = rng.dirichlet(np.ones(7), 240)
            proba[np.arange(240), [CLASSES.index(code) for code in truth]] += strength * rng.random(240)
            answers.append(pd.DataFrame(proba / proba.sum(1, keepdims=True), columns=list(CLASSES)))
        return answers

    good, poor = seeds(1.0), seeds(0.5)
    found = ev.over_seeds(truth, good, poor, lesions, bootstrap=400)
    means = [np.mean([ev.balanced_accuracy(truth, proba) for proba in arm]) for arm in (good, poor)]
    assert found["balanced_accuracy"]["value"] == pytest.approx(means[0])
    assert found["difference"]["value"] == pytest.approx(means[0] - means[1])
    drawn = []
    for _ in range(400):  # the plain loop, other draws
        rows = np.concatenate([2 * (i := rng.integers(120, size=120)), 2 * i + 1])
        pick = rng.integers(3, size=3)
        scores = [
            np.mean([ev.balanced_accuracy(truth[rows], arm[seed].iloc[rows]) for seed in pick]) for arm in (good, poor)
        ]
        drawn.append([scores[0], scores[0] - scores[1]])
    for name, column in (("balanced_accuracy", 0), ("difference", 1)):
        low, high = np.percentile(np.array(drawn)[:, column], [2.5, 97.5])
        assert found[name]["low"] == pytest.approx(low, abs=0.02)
        assert found[name]["high"] == pytest.approx(high, abs=0.02)
    same = ev.over_seeds(truth, good, good, lesions, bootstrap=50)["difference"]
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_ten_pictures_of_each_lesion_narrow_no_interval(answers):
    """Neither that of a difference nor that of a subgroup."""
    y_true, proba, lesions = answers
    other = proba.sample(frac=1, random_state=0).reset_index(drop=True)
    table = pd.DataFrame({"lesion_id": lesions, "sex": "female"})
    repeated = np.repeat(np.arange(400), 10)
    many = y_true[repeated], *(each.iloc[repeated].reset_index(drop=True) for each in (proba, other))
    one = ev.paired_difference(y_true, proba, other, lesions, bootstrap=300)
    ten = ev.paired_difference(*many, lesions[repeated], bootstrap=300)
    assert (ten["low"], ten["high"]) == pytest.approx((one["low"], one["high"]))
    group = ev.by_subgroup(table, y_true, proba, "sex", bootstrap=50)
    groups = ev.by_subgroup(table.iloc[repeated], *many[:2], "sex", bootstrap=50)
    assert group.loc[0, "lesions"] == groups.loc[0, "lesions"] == len(set(lesions))
    assert groups.loc[0, "accuracy_low"] == pytest.approx(group.loc[0, "accuracy_low"])


def test_reliability_curve_of_other_bins(answers):
    curve = ev.reliability_curve(*answers[:2], bins=3)
    assert len(curve) <= 3 and curve["images"].sum() == 400
