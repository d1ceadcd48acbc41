"""Settings: what takes precedence, and that a wrong value is named before any work starts."""

from dataclasses import fields, is_dataclass

import pytest

from stgan_utils import augment, config
from stgan_utils.config import UserError, resolve
from stgan_utils.profiles import PROFILES


def test_given_before_profile_before_default():
    profile = PROFILES["kaggle"]["stage1"]
    settings = resolve("stage1", "kaggle", {"iterations": 5, "size": None, "data": "x", "not_a_setting": 1})
    assert settings.iterations == 5 != profile["iterations"]
    assert settings.size == profile["size"] != config.Stage1Settings().size
    assert settings.ema_decay == config.Stage1Settings().ema_decay and "ema_decay" not in profile


def test_every_profile_resolves_for_every_step_and_names_only_known_settings():
    for name, profile in PROFILES.items():
        for step, kind in config.SETTINGS.items():
            assert is_dataclass(resolve(step, name))
            assert set(profile.get(step, {})) <= {field.name for field in fields(kind)}, (name, step)
        assert set(profile) <= set(config.SETTINGS)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("iterations", "10", 10),
        ("iterations", 10.0, 10),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", "0.01", 0.01),
        ("max_minutes", "", None),
        ("max_minutes", "12", 12.0),
        ("max_minutes", 0, 0.0),
        ("augment", "", ""),
        ("seed", 0, 0),
    ],
)
def test_text_and_numbers_become_the_settings_kind(name, value, wanted):
    got = getattr(resolve("stage2", "smoke", {name: value}), name)
    assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", "ten"),
        ("iterations", 10.5),
        ("iterations", "10.5"),
        ("iterations", [10]),
        ("iterations", float("inf")),
        ("iterations", 0),
        ("learning_rate", "fast"),
        ("learning_rate", 0),
        ("learning_rate", -1e-4),
        ("learning_rate", float("nan")),
        ("max_minutes", "soon"),
        ("size", 100),
        ("ngf", 12),
        ("ngf", 0),
        ("batch_size", 1),
        ("ema_decay", 1),
        ("seed", -1),
        ("seed", 1_754_000_000_000_000),  # a time in microseconds
        ("perceptual", "lpips"),
        ("augment", "color,cutout"),
        ("checkpoint_every", 0),
        ("freeze_blocks", -1),
        ("bt_weight", -0.1),
        ("noise_sigma", -0.1),
        ("ablation_iterations", -1),
        ("generate", -5),
        ("bt_ramp", -1),
        ("noise_decay", -1),
        ("max_minutes", -1),
        ("max_minutes", float("nan")),
    ],
)
def test_wrong_value_is_named(name, value):
    with pytest.raises(UserError, match=rf"^{name} ") as error:
        resolve("stage2", "smoke", {name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("step", "name", "value"),
    [
        ("data", "phantom_images", 10),
        ("data", "on_bad", "ignore"),
        ("dedup", "phash_threshold", 65),
        ("dedup", "whash_threshold", -1),
        ("baseline", "size", 16),
        ("baseline", "epochs", 0),
        ("baseline", "pretrained", "vgg"),
        ("baseline", "accuracy_share", 1.5),
        ("baseline", "seed", -1),
        ("baseline", "learning_rate", -1),
        ("baseline", "weight_decay", -1),
        ("baseline", "label_smoothing", 1),
        ("baseline", "logit_adjustment", -1),
        ("data", "phantom_size", 0),
        ("data", "seed", 2**32),
        ("classifier", "synthetic", "all"),
    ],
)
def test_wrong_value_of_the_other_steps_is_named(step, name, value):
    with pytest.raises(UserError, match=f"^{name} is "):
        resolve(step, "smoke", {name: value})


def test_an_accuracy_share_wants_balanced_answers():
    with pytest.raises(UserError, match=r"accuracy_share is 0\.2.*logit_adjustment = 1"):
        resolve("classifier", "smoke", {"accuracy_share": 0.2, "logit_adjustment": 0.5})
    assert resolve("classifier", "smoke", {"accuracy_share": 0.2}).accuracy_share == 0.2


def test_imbalance_is_made_up_for_once():
    with pytest.raises(UserError, match=r"sampling is 'balanced' and logit_adjustment 1.*twice"):
        resolve("baseline", "smoke", {"sampling": "balanced"})
    assert resolve("baseline", "smoke", {"sampling": "balanced", "logit_adjustment": 0}).sampling == "balanced"


def test_unknown_profile_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'fast'.*smoke, demo, real-cpu, kaggle"):
        resolve("stage1", "fast")


def test_augmentations_are_those_there_are():
    assert tuple(augment.POLICIES) == config.AUGMENTATIONS
