"""Training learns, resumes and stops as promised; order and scaling stay bound to the file."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import update_bn

from stgan_utils import checkpoints, finetune
from stgan_utils import classifier as clf
from stgan_utils.backbone import IMAGENET_SCALING, KERAS_SCALING, load_lite
from stgan_utils.config import ClassifierSettings, UserError
from stgan_utils.evaluation import balanced_accuracy
from stgan_utils.lesions import CLASSES, PRIOR_TRAINING_ORDER
from stgan_utils.views import ASIDE, aside, augment

SETTINGS = ClassifierSettings(size=32, epochs=2, batch_size=16, pretrained="none")
COLOURS = np.array(
    [[230, 30, 30], [30, 230, 30], [30, 30, 230], [230, 230, 30], [230, 30, 230], [30, 230, 230], [128, 128, 128]]
)


def toy(count, seed=0):
    """Noisy squares, each class of its own colour: uint8 (count, 32, 32, 3) and labels."""
    rng = np.random.default_rng(seed)
    number = np.arange(count) % 7
    images = COLOURS[number][:, None, None] + rng.normal(0, 20, (count, 32, 32, 3))
    return images.clip(0, 255).astype(np.uint8), np.array(CLASSES)[number]


@pytest.fixture(scope="module")
def pictures():
    return toy(14)[0]


@pytest.fixture
def model(pictures):
    """Random weights that tell the pictures apart: statistics measured on them, answers far from even."""
    torch.manual_seed(0)
    model = clf.Classifier({"size": 32, **IMAGENET_SCALING})
    update_bn([torch.from_numpy(pictures)], model)
    with torch.no_grad():
        model.head[1].weight.mul_(10)
    return model.eval()


# --- loss ---------------------------------------------------------------------------------------------------------


def test_adjusted_loss_closed_form():
    targets = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 5, 6])
    prior = torch.tensor([3, 1, 1, 1, 1, 2, 1]) / 10
    assert torch.allclose(finetune.log_prior(targets).exp(), prior)
    logits, tau = torch.randn(10, 7, generator=torch.Generator().manual_seed(0)), 0.7
    losses = finetune.adjusted_loss(logits, targets, tau * finetune.log_prior(targets))
    # Menon et al., eq. 10: −log( π_y^τ e^{f_y} / Σ π_c^τ e^{f_c} )
    raised = prior**tau * logits.exp()
    assert torch.allclose(losses, -torch.log(raised[range(10), targets] / raised.sum(1)))
    # Logits that know nothing cost the prior's entropy: to gain, they must tell images apart, not guess the majority.
    silent = finetune.adjusted_loss(torch.zeros(10, 7), targets, finetune.log_prior(targets))
    assert silent.mean() == pytest.approx(-(prior * prior.log()).sum().item(), rel=1e-5)


def test_no_other_answers_are_better_for_the_mean_of_both_accuracies():
    """Against every other way to weigh classes, on a problem whose true posteriors are known."""
    rng = np.random.default_rng(0)
    prior = np.array([0.03, 0.04, 0.1, 0.01, 0.08, 0.72, 0.02])
    truth = rng.choice(7, 200_000, p=prior)
    distances = (rng.normal(0, 1, (len(truth), 6)) + np.eye(7, 6)[truth] * 1.5)[:, None] - np.eye(7, 6) * 1.5
    likelihood = np.exp(-(distances**2).sum(2) / 2)  # what logit adjustment leaves: P(y | image) / π_y, up to a factor

    def gain(share, weights):
        right = (likelihood * weights).argmax(1) == truth
        return (1 - share) * np.mean([right[truth == y].mean() for y in range(7)]) + share * right.mean()

    log_prior = torch.log(torch.tensor(prior))
    for share in (0, 0.15, 0.5, 1):
        weights = finetune.class_weights(share, log_prior)
        assert list(weights) == list(CLASSES)
        ours = np.array(list(weights.values()))
        best = max(gain(share, ours * np.exp(rng.normal(0, 0.5, 7))) for _ in range(30))
        assert gain(share, ours) > best - 2e-3
    assert set(finetune.class_weights(0, log_prior).values()) == {1.0}
    assert np.allclose(ours / ours.sum(), prior)  # accuracy alone: the prior put back


def test_temperature_is_found_again_below_class_weights():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 7, generator=generator).double() * 2
    weights = torch.tensor([1, 2, 0.5, 1, 3, 8, 0.7]).double().log()
    targets = (logits + weights).softmax(1).multinomial(1, generator=generator)[:, 0]
    assert finetune.fitted_temperature(logits * 3, targets, weights) == pytest.approx(3, rel=0.03)
    assert finetune.fitted_temperature(logits * 3, targets) != pytest.approx(3, rel=0.1)


# --- order and scaling --------------------------------------------------------------------------------------------


def test_scaling_is_in_the_file_and_applied_inside(model, pictures, tmp_path):
    """Raw pixels in; another scaling in the header means other answers, so nobody can lose it unnoticed."""
    raw, answers = torch.from_numpy(pictures), []
    for scaling, scaled in (
        (KERAS_SCALING, raw.double() / 127.5 - 1),
        (IMAGENET_SCALING, (raw / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])),
    ):
        model.preprocessing = {"size": 32, **scaling}
        model.save(tmp_path / "model.safetensors")
        loaded = clf.Classifier.load(tmp_path / "model.safetensors")
        with torch.no_grad():
            expected = model.head(model.features(scaled.permute(0, 3, 1, 2).float()).mean((2, 3)))
            answers.append(loaded(raw).softmax(1))
            assert torch.allclose(answers[-1], expected.softmax(1), atol=1e-3)
        assert loaded.preprocessing == {"size": 32, **scaling}
    assert (answers[0] - answers[1]).abs().max() > 0.1
    with pytest.raises(AssertionError, match="size is 32"):
        loaded(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))


def test_order_in_the_file_names_the_columns(model, pictures, tmp_path):
    model.save(tmp_path / "model.safetensors")
    proba = clf.Classifier.load(tmp_path / "model.safetensors").predict_proba(pictures)
    assert list(proba.columns) == list(CLASSES)
    assert np.allclose(proba.sum(axis=1), 1, atol=1e-12)

    # The same outputs under other names: the header decides what an output means.
    tensors, header = checkpoints.load(tmp_path / "model.safetensors")
    checkpoints.save(tmp_path / "renamed", tensors, header | {"class_order": list(PRIOR_TRAINING_ORDER)})
    renamed = clf.Classifier.load(tmp_path / "renamed").predict_proba(pictures)
    assert list(renamed.columns) == list(PRIOR_TRAINING_ORDER)
    assert np.array_equal(renamed.to_numpy(), proba.to_numpy())

    # Outputs and names permuted together: another file, the same answers and accuracy.
    order = [CLASSES.index(code) for code in PRIOR_TRAINING_ORDER]
    tensors |= {name: tensors[name][order] for name in ("head.1.weight", "head.1.bias")}
    checkpoints.save(tmp_path / "permuted", tensors, header | {"class_order": list(PRIOR_TRAINING_ORDER)})
    permuted = clf.Classifier.load(tmp_path / "permuted").predict_proba(pictures)
    pd.testing.assert_frame_equal(permuted[list(CLASSES)], proba)
    labels = proba.idxmax(axis=1)
    assert labels.nunique() > 2
    assert balanced_accuracy(labels, permuted) == 1 > balanced_accuracy(labels, renamed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_order": None}, "class order"),
        ({"class_order": ["NV", "MEL"]}, "class order"),
        ({"preprocessing": None}, "size, mean and std"),
        ({"preprocessing": {"size": 32}}, "size, mean and std"),
        ({"architecture": {"kind": "fastgan"}}, "no mobilenet_v2"),
    ],
)
def test_files_that_do_not_say_how_to_use_them_are_refused(model, tmp_path, change, message):
    model.save(tmp_path / "model.safetensors")
    tensors, header = checkpoints.load(tmp_path / "model.safetensors")
    checkpoints.save(tmp_path / "changed", tensors, header | change)
    with pytest.raises(UserError, match=message):
        clf.Classifier.load(tmp_path / "changed")


def test_a_file_says_which_network_it_holds(pictures, tmp_path):
    lite = load_lite("none")
    teacher = clf.Classifier({"size": 32, **lite.preprocessing}, features=lite.features, network=lite.network).eval()
    teacher.save(tmp_path / "teacher.safetensors")
    read = clf.Classifier.load(tmp_path / "teacher.safetensors")
    pd.testing.assert_frame_equal(read.predict_proba(pictures), teacher.predict_proba(pictures))


def test_damaged_and_foreign_files_are_refused(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    tensors, header = checkpoints.load(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "bare")
    (tmp_path / "cut").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    checkpoints.save(tmp_path / "less", dict(list(tensors.items())[1:]), header)
    for name, message in (("bare", "bare"), ("cut", "cut"), ("less", "does not fit"), ("absent", "no file")):
        with pytest.raises(UserError, match=message):
            clf.Classifier.load(tmp_path / name)


def test_folding_batch_norm_keeps_the_answers(model, pictures):
    proba = model.predict_proba(pictures)
    pd.testing.assert_frame_equal(model.fused().predict_proba(pictures), proba, atol=1e-3)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.fused().modules())
    pd.testing.assert_frame_equal(
        model.predict_proba(pictures, rows=[5, 2], batch_size=1), proba.loc[[5, 2]].reset_index(drop=True), atol=1e-3
    )


def test_answers_by_two_views_are_their_mean(model, pictures):
    batch = clf.to_float(torch.from_numpy(pictures))
    with torch.no_grad():
        first, second = (model(aside(batch, view)) for view in (0, 1))
    assert not torch.allclose(first, second, atol=0.1)
    model.answering["views"] = 2
    torch.testing.assert_close(model.logits(pictures), (first + second) / 2, atol=1e-3, rtol=0)


def test_weights_multiply_what_it_answers_by_name(model, pictures, tmp_path):
    even = model.predict_proba(pictures)
    model.answering["weights"] = {"NV": 4.0, "DF": 0.5}
    model.save(tmp_path / "model.safetensors")
    expected = even.assign(NV=even["NV"] * 4, DF=even["DF"] / 2)
    expected = expected.div(expected.sum(axis=1), axis=0)
    loaded = clf.Classifier.load(tmp_path / "model.safetensors")
    pd.testing.assert_frame_equal(loaded.predict_proba(pictures), expected)
    pd.testing.assert_frame_equal(loaded.fused().predict_proba(pictures), expected, atol=1e-3)
    # Another order of the outputs: the weights stay with their classes.
    tensors, header = checkpoints.load(tmp_path / "model.safetensors")
    order = [CLASSES.index(code) for code in PRIOR_TRAINING_ORDER]
    tensors |= {name: tensors[name][order] for name in ("head.1.weight", "head.1.bias")}
    checkpoints.save(tmp_path / "permuted", tensors, header | {"class_order": list(PRIOR_TRAINING_ORDER)})
    permuted = clf.Classifier.load(tmp_path / "permuted").predict_proba(pictures)
    pd.testing.assert_frame_equal(permuted[list(CLASSES)], expected)


def test_views_aside_are_the_image_turned_and_zoomed():
    """Against Pillow, in the middle that no border reaches."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
    images, middle = clf.to_float(torch.from_numpy(np.array(smooth))[None]), slice(32, 64)
    for view, (degrees, zoom) in enumerate(ASIDE):
        low, high = 96 - 48 * zoom, 96 + 48 * zoom  # of the image with a border of 48 px
        turned = ImageOps.expand(smooth, 48).rotate(degrees, Image.Resampling.BILINEAR)
        expected = turned.resize((96, 96), Image.Resampling.BILINEAR, box=(low, low, high, high))
        found = aside(images, view)[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(found - np.asarray(expected, float))[middle, middle].mean() < 3
        assert np.abs(found - np.asarray(smooth, float))[middle, middle].mean() > 10


# --- training -----------------------------------------------------------------------------------------------------


def test_augment_keeps_range_and_content_and_varies():
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).repeat(64, 1, 1, 1)
    torch.manual_seed(1)
    views = augment(images)
    assert views.shape == images.shape and views.min() >= 0 and views.max() <= 1
    assert len({view.mean().item() for view in views}) == 64  # each image its own draw
    assert views.mean() == pytest.approx(images.mean().item(), abs=0.03)
    torch.manual_seed(1)
    assert torch.equal(views, augment(images))
    # A longer reach changes the light more; none leaves flips and quarter turns, which only move pixels.
    light = [augment(images, reach).mean((1, 2, 3)).std() for reach in (0.5, 1, 2)]
    assert light == sorted(light) and light[2] > 2 * light[0]
    moved = augment(images, 0).flatten(2).sort().values
    assert torch.allclose(moved, images.flatten(2).sort().values, atol=1e-4)


def test_learns_a_separable_set_from_nothing(tmp_path):
    images, labels = toy(203)
    settings = replace(SETTINGS, epochs=8, learning_rate=3e-3)
    history = finetune.train(settings, images, labels, np.arange(168), np.arange(168, 203), tmp_path)
    best = history["val_balanced_accuracy"].max()
    assert best > 0.95
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0] / 2
    # What was saved is the best epoch, and it does as well when it is loaded.
    model = clf.Classifier.load(tmp_path / finetune.MODEL_FILE)
    assert balanced_accuracy(labels[168:], model.predict_proba(images[168:])) == pytest.approx(best)
    assert model.settings["backbone"] == "MobileNetV2 (random weights)"


def test_an_accuracy_share_changes_the_answers_and_nothing_that_is_learnt(tmp_path):
    images, labels = toy(120)
    labels[np.arange(120) % 2 == 0] = "NV"  # half of the squares whatever their colour
    sets = (images, labels, np.arange(90), np.arange(90, 120))
    models = []
    for share in (0.0, 0.5):
        folder = tmp_path / str(share)
        finetune.train(replace(SETTINGS, epochs=1, accuracy_share=share), *sets, folder)
        models.append(clf.Classifier.load(folder / finetune.MODEL_FILE))
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models), strict=True))
    log_prior = finetune.log_prior([CLASSES.index(label) for label in labels[:90]])
    assert models[0].answering["weights"] == dict.fromkeys(CLASSES, 1.0)
    assert models[1].answering["weights"] == finetune.class_weights(0.5, log_prior)
    assert models[1].answering["weights"]["NV"] > 1 > models[1].answering["weights"]["DF"]


def test_killed_and_resumed_ends_bit_identical(tmp_path):
    images, labels = toy(64)
    sets = (images, labels, np.arange(49), np.arange(49, 64))
    through = finetune.train(SETTINGS, *sets, tmp_path / "through")

    class Killed(Exception):
        pass

    def kill(history):
        raise Killed

    with pytest.raises(Killed):
        finetune.train(SETTINGS, *sets, tmp_path / "killed", on_epoch=kill)
    torch.rand(5)  # the resumed process has another past
    epochs = []
    resumed = finetune.train(SETTINGS, *sets, tmp_path / "killed", on_epoch=lambda history: epochs.append(len(history)))
    assert epochs == [2]
    speed = ["images_per_second"]
    pd.testing.assert_frame_equal(through.drop(columns=speed), resumed.drop(columns=speed), check_exact=True)
    ours, theirs = (load_file(tmp_path / run / finetune.MODEL_FILE) for run in ("through", "killed"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    # A finished run is not trained again, and another run does not mix with it.
    pd.testing.assert_frame_equal(finetune.train(SETTINGS, *sets, tmp_path / "killed"), resumed)
    with pytest.raises(UserError, match="learning_rate differ"):
        finetune.train(replace(SETTINGS, learning_rate=0.1), *sets, tmp_path / "killed")
    with pytest.raises(UserError, match="train, prior differ"):
        finetune.train(SETTINGS, images, labels, np.arange(48), sets[3], tmp_path / "killed")
    with pytest.raises(UserError, match="images differ"):
        finetune.train(SETTINGS, 255 - images, *sets[1:], tmp_path / "killed")
    # What it began with counts, not where that lay.
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes((tmp_path / "killed" / finetune.MODEL_FILE).read_bytes())
    here, there = (replace(SETTINGS, continue_from=str(tmp_path / n / "model.safetensors")) for n in ("here", "there"))
    second = finetune.train(here, *sets, tmp_path / "second")
    pd.testing.assert_frame_equal(finetune.train(there, *sets, tmp_path / "second"), second)
    (tmp_path / "there" / "model.safetensors").write_bytes((tmp_path / "second" / finetune.MODEL_FILE).read_bytes())
    for other in (there, SETTINGS):
        with pytest.raises(UserError, match="begun_with differ"):
            finetune.train(other, *sets, tmp_path / "second")


def test_a_finished_training_stays_as_it_is_on_another_processor(tmp_path, monkeypatch):
    """Where scores differ in their last digits the temperature would: another file, and every later step refused."""
    images, labels = toy(64)
    run = replace(SETTINGS, epochs=1), images, labels, np.arange(49), np.arange(49, 64), tmp_path
    finetune.train(*run)
    before = (tmp_path / finetune.MODEL_FILE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "fitted_temperature", lambda *args: 1.5)
        finetune.train(*run)
        assert (tmp_path / finetune.MODEL_FILE).read_bytes() == before
        (tmp_path / finetune.HISTORY_FILE).unlink()  # killed before the temperature was found: that is still to do
        finetune.train(*run)
    assert clf.Classifier.load(tmp_path / finetune.MODEL_FILE).answering["temperature"] == 1.5


def test_goes_on_with_a_file_of_another_class_order(tmp_path):
    """The labels must meet the outputs by name: the same network goes the same way, however its file orders them."""
    images, labels = toy(64)
    clf.Classifier({"size": 32, **IMAGENET_SCALING}, settings={"backbone": "none"}).save(tmp_path / "ours")
    tensors, header = checkpoints.load(tmp_path / "ours")
    order = [CLASSES.index(code) for code in PRIOR_TRAINING_ORDER]
    tensors |= {name: tensors[name][order] for name in ("head.1.weight", "head.1.bias")}
    checkpoints.save(tmp_path / "permuted", tensors, header | {"class_order": list(PRIOR_TRAINING_ORDER)})
    models = []
    for name in ("ours", "permuted"):
        settings = replace(SETTINGS, epochs=1, continue_from=str(tmp_path / name))
        finetune.train(settings, images, labels, np.arange(49), np.arange(49, 64), tmp_path / f"from {name}")
        models.append(clf.Classifier.load(tmp_path / f"from {name}" / finetune.MODEL_FILE))
    assert models[0].classes == models[1].classes == CLASSES
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models), strict=True))


def test_a_teacher_is_followed_where_it_contradicts_the_labels(tmp_path):
    """Labels say one thing, the teacher is sure of another class: it gets its share of each image's loss."""
    images, labels = toy(210)
    own = np.array([CLASSES.index(label) for label in labels])
    share = np.array([0, 0, 1, 1, 0.5, 0.5, 0.5])[own]
    taught = np.eye(7)[(own + 1) % 7], share
    settings = replace(SETTINGS, epochs=12, learning_rate=3e-3, logit_adjustment=0.0)
    finetune.train(settings, images, labels, np.arange(210), None, tmp_path, taught=taught)
    proba = clf.Classifier.load(tmp_path / finetune.MODEL_FILE).predict_proba(images).to_numpy()
    for part in (0, 0.5, 1):
        rows = np.flatnonzero(share == part)
        assert proba[rows, own[rows]].mean() == pytest.approx(1 - part, abs=0.15)
        assert proba[rows, (own[rows] + 1) % 7].mean() == pytest.approx(part, abs=0.15)


def test_wrong_sets_and_nan_say_what_to_do(tmp_path):
    images, labels = toy(40)
    rows, val = np.arange(30), np.arange(30, 40)
    with pytest.raises(UserError, match="No training image of DF, VASC"):
        finetune.train(SETTINGS, images, labels, rows[~np.isin(labels[:30], ["DF", "VASC"])], val, tmp_path)
    with pytest.raises(UserError, match="lower batch_size=64"):
        finetune.train(replace(SETTINGS, batch_size=64), images, labels, rows, val, tmp_path)
    with pytest.raises(UserError, match="validation"):
        finetune.train(SETTINGS, images, labels, rows, val[:0], tmp_path)
    with pytest.raises(UserError, match=r"NaN in epoch \d.*lower learning_rate"):
        finetune.train(replace(SETTINGS, weight_decay=math.inf), images, labels, rows, val, tmp_path)
    assert not (tmp_path / finetune.MODEL_FILE).exists()


def test_temperature_divides_the_logits(model, pictures):
    logits = model.logits(pictures)
    model.answering["temperature"] = 2.5
    np.testing.assert_allclose(model.predict_proba(pictures), (logits.double() / 2.5).softmax(1), atol=1e-6)


def test_answers_in_the_middle_of_a_training_are_those_of_eval_mode(model, pictures):
    expected = model.predict_proba(pictures)
    pd.testing.assert_frame_equal(model.train().predict_proba(pictures), expected)


def test_fused_is_a_copy(model):
    before = model.state_dict().keys()
    model.fused()
    assert model.state_dict().keys() == before


def test_matrices_and_kernels_alone_decay_and_each_part_has_its_rate(model):
    groups = finetune._optimizer(model, replace(SETTINGS, weight_decay=0.1, learning_rate=1e-2), 0.3).param_groups
    found = {parameter: (group["weight_decay"], group["peak"]) for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        peak = 1e-2 if name.startswith("head.") else 3e-3
        assert found[parameter] == (0.1 if parameter.ndim > 1 else 0.0, pytest.approx(peak)), name


def begun_with(model, folder):
    model.settings = {"backbone": "none"}
    model.save(folder / "start.safetensors")
    return replace(SETTINGS, epochs=1, continue_from=str(folder / "start.safetensors"))


def test_what_has_learnt_before_learns_slower(model, tmp_path, monkeypatch):
    shares, optimizer = [], finetune._optimizer
    monkeypatch.setattr(finetune, "_optimizer", lambda *args: shares.append(args[2]) or optimizer(*args))
    sets = (*toy(64), np.arange(49), np.arange(49, 64))
    finetune.train(replace(SETTINGS, epochs=1), *sets, tmp_path / "new")
    finetune.train(begun_with(model, tmp_path), *sets, tmp_path / "on")
    assert shares == [1.0, 0.3]


def test_the_rate_rises_for_a_tenth_and_falls_to_nothing(tmp_path):
    history = finetune.train(SETTINGS, *toy(64), np.arange(48), np.arange(48, 64), tmp_path)
    done = np.array([2.5, 5.5]) / 6  # in the middle of the last batch of each epoch
    expected = SETTINGS.learning_rate * (0.5 + 0.5 * np.cos(np.pi * done))
    np.testing.assert_allclose(history["learning_rate"], expected)


def test_frozen_blocks_stay_as_they_were(model, tmp_path):
    settings = replace(begun_with(model, tmp_path), frozen_blocks=3)
    finetune.train(settings, *toy(64), np.arange(49), np.arange(49, 64), tmp_path / "run")
    before, after = (load_file(tmp_path / name) for name in ("start.safetensors", f"run/{finetune.MODEL_FILE}"))
    for name, tensor in before.items():
        if name.startswith(("features.0.", "features.1.", "features.2.")):
            assert torch.equal(tensor, after[name]), name
        elif tensor.ndim > 1:
            assert not torch.equal(tensor, after[name]), name


def test_balanced_sampling_draws_each_class_as_often():
    torch.manual_seed(0)
    targets = torch.arange(7).repeat_interleave(torch.tensor([700, 10, 10, 10, 20, 30, 20]))
    drawn = finetune._draw(replace(SETTINGS, sampling="balanced", logit_adjustment=0.0, epoch_images=7000), targets)
    assert len(drawn) == 7000 and (torch.bincount(targets[drawn]) / 1000 - 1).abs().max() < 0.15


@pytest.mark.parametrize(
    "change",
    [
        {"label_smoothing": 0.5},
        {"mix": "mixup"},
        {"augmentation": "strong"},
        {"augmentation": "trivial"},
        {"logit_adjustment": 0.0},
    ],
)
def test_no_setting_is_passed_over(change, tmp_path):
    images, labels = toy(40)
    labels[28:] = "NV"  # the classes are not even
    losses = [
        finetune.train(replace(SETTINGS, epochs=1, **more), images, labels, np.arange(40), None, tmp_path / name)
        for name, more in (("without", {}), ("with", change))
    ]
    assert losses[0]["train_loss"].item() != losses[1]["train_loss"].item()


def test_another_seed_draws_another_order(model, tmp_path):
    settings = begun_with(model, tmp_path)
    losses = [
        finetune.train(replace(settings, seed=seed), *toy(40), np.arange(40), None, tmp_path / str(seed))["train_loss"]
        for seed in (0, 1)
    ]
    assert losses[0].item() != losses[1].item()


def test_the_best_epoch_is_kept_and_not_the_last(tmp_path, monkeypatch):
    scores, kept = iter([0.5, 0.9, 0.7]), []
    monkeypatch.setattr(finetune, "balanced_accuracy", lambda *_: next(scores))

    def weight(_=None):
        kept.append(load_file(tmp_path / finetune.MODEL_FILE)["head.1.weight"])

    sets = (*toy(64), np.arange(49), np.arange(49, 64))
    finetune.train(replace(SETTINGS, epochs=3), *sets, tmp_path, on_epoch=weight)
    weight()
    assert not torch.equal(kept[0], kept[1]) and torch.equal(kept[1], kept[2]) and torch.equal(kept[1], kept[3])


def test_temperature_is_fitted_to_validation_images_below_the_class_weights(tmp_path):
    images, labels = toy(64)
    labels[::2] = "NV"
    val = np.arange(49, 64)
    settings = replace(SETTINGS, epochs=1, accuracy_share=0.5, views=2)
    finetune.train(settings, images, labels, np.arange(49), val, tmp_path)
    model = clf.Classifier.load(tmp_path / finetune.MODEL_FILE)
    targets = [CLASSES.index(label) for label in labels[val]]
    expected = finetune.fitted_temperature(model.logits(images, val), targets, model.log_weights)
    assert model.answering["temperature"] == pytest.approx(expected, rel=1e-3)
    assert model.answering["views"] == 2
