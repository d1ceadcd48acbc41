"""The arms differ in one thing, their curves are those of the networks, and nothing else is touched."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from stgan_utils import ablation, trainer
from stgan_utils.config import Stage1Settings, Stage2Settings
from stgan_utils.fastgan import Discriminator, small_view

TINY = {"size": 64, "ngf": 8, "nz": 16, "batch_size": 3, "quality_images": 4}
SETTINGS = Stage2Settings(lesion="DF", ablation_iterations=2, bt_ramp=40, max_minutes=1, **TINY)
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(autouse=True, scope="module")
def small_grid():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "GRID", 2)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1")
    trainer.GanTrainer(Stage1Settings(iterations=1, **TINY), IMAGES, folder).run()
    return folder / "checkpoint.safetensors"


def extractor(images):
    return images.reshape(len(images), -1)[:, ::501].astype(np.float32)


extractor.name = "pixels"


@pytest.fixture(scope="module")
def curves(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return ablation.run(SETTINGS, IMAGES, start, extractor, folder), folder


def test_each_arm_changes_one_setting_and_the_ramp_fits():
    both, *others = (asdict(arm) for arm in ablation.arms(replace(SETTINGS, ablation_iterations=40)).values())
    assert (both["iterations"], both["bt_ramp"], both["freeze_blocks"], both["bt_weight"]) == (40, 10, 2, 1.0)
    changed = [{name: arm[name] for name in arm if arm[name] != both[name]} for arm in others]
    assert changed == [{"freeze_blocks": 0}, {"bt_weight": 0.0}]


def test_arms_start_alike_and_part_and_only_the_figures_stay(curves):
    found, folder = curves
    assert [path.name for path in folder.iterdir()] == ["ablation.json"]
    iterations = found.groupby("arm", sort=False)["iteration"].apply(list).to_dict()
    assert iterations == {arm: [0, 1, 2] for arm in ablation.ARMS}
    of = found.set_index(["iteration", "arm"])[["kid", "barlow", "margin"]]
    assert (of.loc[0] == of.loc[0].iloc[0]).all(axis=None)
    assert of.loc[2, "barlow"].nunique() == len(ablation.ARMS)


def test_asked_again_nothing_is_trained(curves, tmp_path):
    found, folder = curves
    again = ablation.run(SETTINGS, IMAGES, tmp_path / "no checkpoint here", extractor, folder)
    assert again.equals(found)


def test_a_killed_run_goes_on_and_ends_the_same(curves, start, tmp_path):
    found, calls = curves[0], []

    def killed_in_the_second_arm(images):
        calls.append(len(images))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return extractor(images)

    def check(images):
        assert not first.exists() or first.stat().st_mtime_ns == written
        return extractor(images)

    killed_in_the_second_arm.name = check.name = extractor.name
    with pytest.raises(KeyboardInterrupt):
        ablation.run(SETTINGS, IMAGES, start, killed_in_the_second_arm, tmp_path)
    first = tmp_path / "trainings" / "both" / "checkpoint.safetensors"
    written = first.stat().st_mtime_ns
    assert ablation.run(SETTINGS, IMAGES, start, check, tmp_path).equals(found)


@pytest.mark.parametrize("changed", ["length", "feature space"])
def test_a_killed_run_begins_anew_where_its_arms_would_not_compare(changed, start, tmp_path):
    settings = replace(SETTINGS, ablation_iterations=4 if changed == "length" else 2)
    calls = []

    def other(images):
        calls.append(len(images))
        if len(calls) == 9:
            raise KeyboardInterrupt
        return extractor(images) / 2

    other.name = extractor.name if changed == "length" else "half of the pixels"
    with pytest.raises(KeyboardInterrupt):
        ablation.run(settings, IMAGES, start, other, tmp_path)
    found = ablation.run(SETTINGS, IMAGES, start, extractor, tmp_path)
    assert found.groupby("arm")["iteration"].apply(list).to_list() == [[0, 1, 2]] * 3
    assert found[found["iteration"] == 0]["kid"].nunique() == 1 and set(found["feature_space"]) == {"pixels"}
    assert [path.name for path in tmp_path.iterdir()] == ["ablation.json"]


def test_what_the_discriminator_is_asked_costs_no_random_number():
    torch.manual_seed(0)
    discriminator = Discriminator(64, ndf=8).train()
    state = torch.get_rng_state()
    made = IMAGES[::-1].copy() // 2
    found = ablation.asked(discriminator, IMAGES, made, augment="")
    assert (torch.get_rng_state() == state).all() and discriminator.training
    discriminator.eval()
    with torch.no_grad():
        real, fake = (
            discriminator(x, small_view(x))
            for x in (torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1 for images in (IMAGES, made))
        )
    assert found["margin"] == pytest.approx(float(real.logits.mean() - fake.logits.mean()), abs=1e-5)
    # Two equal views: what is left on the diagonal comes from features that hardly vary.
    features = real.last.mean((2, 3)).numpy().astype(float)
    z = (features - features.mean(0)) / (features.std(0) + 1e-5)
    c = z.T @ z / len(z)
    off = c[~np.eye(len(c), dtype=bool)]
    assert found["barlow"] == pytest.approx(((1 - np.diag(c)) ** 2).mean() + 0.5 * (off**2).mean(), rel=1e-3)
