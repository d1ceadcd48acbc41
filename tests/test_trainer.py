"""The GAN loop: resuming to the bit, the best checkpoint, and stopping in good order when something goes wrong."""

import copy
import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from stgan_utils import checkpoints, iteration, trainer
from stgan_utils import device as devices
from stgan_utils.config import Stage1Settings, Stage2Settings, UserError
from stgan_utils.fastgan import Discriminator, Generator, quadrant_of, small_view
from stgan_utils.losses import hinge_d_loss
from stgan_utils.runs import Unfinished
from stgan_utils.trainer import GanTrainer

ROOT = Path(__file__).resolve().parents[1]
RARE = {"sample_every": 1000, "evaluate_every": 1000, "quality_images": 2}
TINY = {"size": 64, "ngf": 8, "nz": 32, "batch_size": 3, **RARE}
STAGE1 = Stage1Settings(iterations=12, checkpoint_every=3, **TINY)
STAGE2 = Stage2Settings(
    iterations=6, checkpoint_every=2, lesion="DF", freeze_blocks=2, bt_ramp=4, noise_decay=5, seed=1, **TINY
)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(autouse=True, scope="module")
def small_grid():
    patch = pytest.MonkeyPatch()
    patch.setattr(trainer, "GRID", 2)
    yield
    patch.undo()


def kid_of_mean(pictures):
    return {"kid": float(pictures.mean())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a Stage-1 run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    GanTrainer(STAGE1, IMAGES, folder, evaluate=kid_of_mean).run()
    return folder


def stage2(folder, whole, settings=STAGE2, **more):
    path = whole / "checkpoint.safetensors"
    start = checkpoints.load_generator(path), checkpoints.load_discriminator(path)
    return GanTrainer(settings, IMAGES, folder, start=start, evaluate=kid_of_mean, **more)


@pytest.fixture(scope="module")
def whole2(tmp_path_factory, whole):
    """Folder of a Stage-2 run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole2")
    stage2(folder, whole).run()
    return folder


def tensors(path):
    return checkpoints.load(path)[0]


def assert_same_run(a, b):
    for name in ("checkpoint.safetensors", "generator.safetensors", "best.safetensors"):
        ours, theirs = tensors(a / name), tensors(b / name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], name
    for name in ("history.csv", "quality.csv"):
        assert (a / name).read_text() == (b / name).read_text()
    first, second = (checkpoints.read_header(folder / "checkpoint.safetensors") for folder in (a, b))
    assert first["history"] == second["history"] and first["best"] == second["best"]
    assert sorted(p.name for p in (a / "samples").iterdir()) == sorted(p.name for p in (b / "samples").iterdir())


# --- resuming ----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np, torch
from stgan_utils import config, trainer
folder, settings, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
trainer.GRID = 2
images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
settings = config.Stage1Settings(**json.loads(settings))
trainer.GanTrainer(settings, images, Path(folder), evaluate=lambda x: {"kid": float(x.mean())}).run()
"""


def test_killed_and_resumed_is_bit_identical_to_never_killed(tmp_path, whole):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(asdict(STAGE1)), str(torch.get_num_threads())]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while not (tmp_path / "checkpoint.safetensors").exists():
        assert process.poll() is None and time.monotonic() - began < 400
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reached = checkpoints.read_header(tmp_path / "checkpoint.safetensors")["iteration"]
    assert 0 < reached < STAGE1.iterations and not (tmp_path / "generator.safetensors").exists()

    GanTrainer(STAGE1, IMAGES, tmp_path, evaluate=kid_of_mean).run()
    assert_same_run(tmp_path, whole)


def test_bf16_on_the_cpu_learns_the_same_and_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "WIDE", STAGE1.ngf)  # as wide as is quick where bf16 is imitated
    wide = replace(STAGE1, iterations=4, checkpoint_every=2)
    folders = {name: tmp_path / name for name in ("float32", "whole", "cut")}
    monkeypatch.setattr(devices, "_computes_bf16", lambda: False)
    exact, _ = GanTrainer(wide, IMAGES, folders["float32"], evaluate=kid_of_mean).run()
    monkeypatch.setattr(devices, "_computes_bf16", lambda: True)
    near, _ = GanTrainer(wide, IMAGES, folders["whole"], evaluate=kid_of_mean).run()
    assert 0 < abs(exact - near).iloc[0].max() < 0.02  # later on, small differences have grown
    with pytest.raises(Unfinished):
        GanTrainer(replace(wide, max_minutes=0), IMAGES, folders["cut"], evaluate=kid_of_mean).run()
    GanTrainer(wide, IMAGES, folders["cut"], evaluate=kid_of_mean).run()
    assert_same_run(folders["whole"], folders["cut"])


def test_stage2_broken_off_and_resumed_is_bit_identical(tmp_path, whole, whole2, monkeypatch):
    step = GanTrainer.step

    def breaks(self):
        if self.iteration == 3:  # one past a checkpoint
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GanTrainer, "step", breaks)
        stage2(tmp_path, whole).run()
    assert checkpoints.read_header(tmp_path / "checkpoint.safetensors")["iteration"] == 2
    history, quality = stage2(tmp_path, whole).run()
    assert_same_run(tmp_path, whole2)
    assert history["iteration"].tolist() == [2, 4, 6] and quality["iteration"].tolist() == [0, 6]


def test_stopped_in_time_and_resumed_is_bit_identical(tmp_path, whole):
    for reached in (3, 6):
        with pytest.raises(Unfinished, match=f"iteration {reached} of 12 after 0 minutes.*run the same command again"):
            GanTrainer(replace(STAGE1, max_minutes=0), IMAGES, tmp_path, evaluate=kid_of_mean).run()
    GanTrainer(STAGE1, IMAGES, tmp_path, evaluate=kid_of_mean).run()
    assert_same_run(tmp_path, whole)


def test_a_finished_run_is_not_trained_again(tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "copy")
    gan = GanTrainer(replace(STAGE1, max_minutes=0), IMAGES, folder, evaluate=lambda _: pytest.fail("evaluated again"))
    history, quality = gan.run()
    pd.testing.assert_frame_equal(history, pd.read_csv(whole / "history.csv"))
    assert history["iteration"].tolist() == [3, 6, 9, 10, 12] and quality["iteration"].tolist() == [0, 12]
    assert_same_run(folder, whole)


def test_evaluating_and_sampling_do_not_disturb_training(tmp_path, whole2, whole):
    often = replace(STAGE2, evaluate_every=1, sample_every=1)
    seen = []
    stage2(tmp_path, whole, often, on_sample=lambda iteration, grid: seen.append((iteration, grid.shape))).run()
    ours, theirs = (tensors(folder / "checkpoint.safetensors") for folder in (tmp_path, whole2))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert seen == [(i, (128, 128, 3)) for i in range(7)]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [f"{i:06d}.png" for i in range(7)]


# --- what is trained ---------------------------------------------------------------------------------------------


def test_stage2_leaves_frozen_blocks_as_they_were_and_trains_the_rest(whole, whole2):
    before, after = (
        checkpoints.without_prefix("discriminator", tensors(folder / "checkpoint.safetensors"))
        for folder in (whole, whole2)
    )
    frozen = ("down_from_big.", "down_from_small.0.", "down_16.", "down_from_small.2.")
    for name in before:
        if name.startswith(frozen):
            assert torch.equal(before[name], after[name]), name
        elif name.endswith("weight_orig"):
            assert not torch.equal(before[name], after[name]), name


def test_stage2_logs_both_parts_of_barlow_twins_and_ramps_their_weight(whole2):
    history = pd.read_csv(whole2 / "history.csv")
    both = history["bt_on_diag"] + iteration.BARLOW_LAMBDA * history["bt_off_diag"]
    assert (history["bt_on_diag"] > 0).all() and (history["bt_off_diag"] > 0).all()
    # Rows are means of two iterations: with a ramp of 4, between a quarter and a half, then more, then all of it.
    share = history["bt_weighted"] / (STAGE2.bt_weight * both)
    assert 0.25 < share[0] < 0.5 and 0.75 < share[1] < 1 and share[2] == pytest.approx(1)


def test_instance_noise_falls_to_nothing(tmp_path, whole):
    gan = stage2(tmp_path, whole)
    sigmas = []
    for gan.iteration in range(7):
        sigmas.append(gan._noise())
    assert sigmas == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0, 0])


def test_barlow_twins_can_be_switched_off(tmp_path, whole):
    gan = stage2(tmp_path, whole, replace(STAGE2, bt_weight=0, noise_sigma=0, freeze_blocks=0, iterations=1))
    projector = {name: tensor.clone() for name, tensor in gan.projector.state_dict().items()}
    history, _ = gan.run()
    assert not any(name.startswith("bt_") for name in history)
    assert all(torch.equal(tensor, projector[name]) for name, tensor in gan.projector.state_dict().items())


def test_every_image_comes_once_an_epoch_and_half_are_mirrored(tmp_path):
    images = np.empty((20, 64, 64, 3), np.uint8)
    images[:, :, :32] = np.arange(20)[:, None, None, None]  # left half: which image
    images[:, :, 32:] = 200
    gan = GanTrainer(replace(STAGE1, batch_size=6), images, tmp_path)
    seen, mirrored = [], 0
    for gan.iteration in range(40):  # 240 images, twelve epochs
        gan._set_inputs()
        batch = (gan._batch() * 127.5 + 127.5).round()
        assert batch.shape == (6, 3, 64, 64) and batch.min() >= 0 and batch.max() == 200
        left, right = batch[:, 0, 0, 0], batch[:, 0, 0, -1]
        seen += torch.minimum(left, right).int().tolist()
        mirrored += int((left == 200).sum())
    epochs = np.reshape(seen, (12, 20))
    assert (np.sort(epochs, axis=1) == np.arange(20)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 12
    assert 80 < mirrored < 160


def test_no_layer_changes_the_layout_of_a_step(tmp_path, whole):
    gan = stage2(tmp_path, whole)
    if gan.device.type == "cuda":
        pytest.skip("GPUs train channels last")
    seen = []
    for network in (gan.generator, gan.discriminator):
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    gan.step()
    assert len(seen) > 100 and all(features.is_contiguous() for features in seen)


def test_gradients_are_those_of_plain_code(tmp_path):
    """The discriminator's from where both networks stand, the generator's after the discriminator has stepped."""
    gan = GanTrainer(replace(STAGE1, augment=""), IMAGES, tmp_path)
    generator, discriminator = copy.deepcopy((gan.generator, gan.discriminator))
    state = torch.get_rng_state()
    losses = gan.step()

    torch.set_rng_state(state)
    quadrant = int(torch.randint(4, ()))
    real = gan._batch()
    fake = generator(torch.randn(3, 32), with_small=True)
    judged_fake = discriminator(*fake)
    judged = discriminator(real, small_view(real))
    hinge = sum(hinge_d_loss(judged.logits, judged_fake.logits))
    rebuilt = discriminator.reconstruct(judged, quadrant)
    targets = real, real, quadrant_of(real, torch.tensor([quadrant])).repeat_interleave(2, 2).repeat_interleave(2, 3)
    distances = [(pictures - target).abs().mean() for pictures, target in zip(rebuilt, targets, strict=True)]
    total = hinge + 3 * sum(distances)  # of each of the three images
    wanted = torch.autograd.grad(total, list(discriminator.parameters()), allow_unused=True)
    torch.testing.assert_close(losses["reconstruction"], sum(distances))
    discriminator.load_state_dict(gan.discriminator.state_dict() | _vectors(discriminator))
    (-discriminator(*fake).logits.mean()).backward()

    for parameter, gradient in zip(gan.discriminator.parameters(), wanted, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    for ours, theirs in zip(gan.generator.parameters(), generator.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-7)


def _vectors(module):
    """The states of a module's spectral norm."""
    return {name: tensor for name, tensor in module.state_dict().items() if name.endswith(("_u", "_v"))}


def test_average_is_the_plain_loop(tmp_path):
    gan = GanTrainer(replace(STAGE1, ema_decay=0.2), IMAGES, tmp_path)
    expected = {name: tensor.double().clone() for name, tensor in gan.generator.state_dict().items()}
    for decay in (1 / 10, 2 / 11, 0.2, 0.2):  # (1 + i) / (10 + i) until that is above ema_decay
        gan.step()
        for name, live in gan.generator.state_dict().items():
            copied = name.endswith(("_u", "_v", "num_batches_tracked"))
            expected[name] = live.double() if copied else decay * expected[name] + (1 - decay) * live.double()
    for name, tensor in gan.ema.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert not any(p.requires_grad for p in gan.ema.parameters()) and not gan.ema.training


def test_best_is_where_kid_was_lowest_not_the_last(tmp_path):
    kids, averages = iter([3.0, 1.0, 2.0]), []

    def evaluate(pictures):
        assert pictures.shape == (2, 64, 64, 3) and pictures.dtype == np.uint8
        averages.append({name: tensor.clone() for name, tensor in gan.ema.state_dict().items()})
        return {"kid": next(kids), "kid_low": 0.0}

    gan = GanTrainer(replace(STAGE1, iterations=4, evaluate_every=2), IMAGES, tmp_path, evaluate=evaluate)
    _, quality = gan.run()
    assert quality.to_dict("list") == {"iteration": [0, 2, 4], "kid": [3.0, 1.0, 2.0], "kid_low": [0.0] * 3}
    header = checkpoints.read_header(tmp_path / "best.safetensors")
    assert header["iteration"] == 2 and header["quality"]["kid"] == 1.0
    best = checkpoints.load_generator(tmp_path / "best.safetensors").state_dict()
    assert all(torch.equal(best[name], averages[1][name]) for name in best)
    last = checkpoints.load_generator(tmp_path / "generator.safetensors").state_dict()
    assert all(torch.equal(last[name], averages[2][name]) for name in last)
    assert any(not torch.equal(best[name], last[name]) for name in best)


@pytest.mark.parametrize("better", ["best", "start"])
def test_kids_of_another_feature_space_are_not_compared(tmp_path, better, capsys):
    """A session that has other features to measure by: half of the old space's lowest would beat all that follow."""

    class Space:
        def __init__(self, name, kids):
            self.feature_space, self.kids, self.seen = name, iter(kids), []

        def __call__(self, pictures):
            self.seen.append(pictures)
            return {"kid": next(self.kids)}

    settings = replace(STAGE1, iterations=4, evaluate_every=2, checkpoint_every=2)
    there = Space("Inception", [0.3, 0.1, 0.2])
    GanTrainer(settings, IMAGES, tmp_path, evaluate=there).run()
    here = Space("MobileNet", [5.0, 9.0, 4.0] if better == "best" else [9.0, 5.0, 6.0])
    _, quality = GanTrainer(replace(settings, iterations=6), IMAGES, tmp_path, evaluate=here).run()
    assert "MobileNet from here on" in capsys.readouterr().out
    kids = {0: 9.0, 2: 5.0, 6: 4.0} if better == "best" else {0: 5.0, 2: 9.0, 6: 6.0}
    assert dict(zip(quality["iteration"], quality["kid"], strict=True)) == kids
    assert (here.seen[0] == there.seen[1]).all() and (here.seen[1] == there.seen[0]).all()  # the best, the start
    header = checkpoints.read_header(tmp_path / "best.safetensors")
    assert (header["iteration"], header["quality"]["kid"]) == ((6, 4.0) if better == "best" else (0, 5.0))
    # A finished run is only looked at; one that goes on in the same space measures nothing twice.
    GanTrainer(replace(settings, iterations=6), IMAGES, tmp_path, evaluate=Space("Inception", [])).run()
    assert checkpoints.read_header(tmp_path / "best.safetensors") == header
    GanTrainer(replace(settings, iterations=8), IMAGES, tmp_path, evaluate=Space("MobileNet", []))


def test_headers_say_what_the_files_are(whole):
    for name in ("checkpoint.safetensors", "generator.safetensors", "best.safetensors"):
        header = checkpoints.read_header(whole / name)
        assert header["settings"] == asdict(STAGE1) and header["class_order"][5] == "NV"
        assert header["architecture"] == {"kind": "fastgan", "size": 64, "ngf": 8, "nz": 32}


# --- when something goes wrong -----------------------------------------------------------------------------------


def poison_from(iteration, poison, monkeypatch):
    step = GanTrainer.step

    def poisoned(self):
        if self.iteration == iteration:
            self.perceptual = poison
        return step(self)

    monkeypatch.setattr(GanTrainer, "step", poisoned)


@pytest.mark.parametrize(
    ("poison", "broken"),
    [
        (lambda images, targets: images.mean() * float("nan"), "loss reconstruction"),
        # The value is 0, its gradient is not a number: only the weights show it.
        (lambda images, targets: (images * 0).square().sum().sqrt(), "state of the discriminator"),
    ],
    ids=["loss", "gradient"],
)
def test_nan_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, monkeypatch, poison, broken):
    poison_from(2, poison, monkeypatch)
    settings = replace(STAGE1, iterations=6, checkpoint_every=1)
    with pytest.raises(UserError, match=rf"{broken}.* by iteration 3; .*checkpoint\.safetensors\. Train anew .* lower"):
        GanTrainer(settings, IMAGES, tmp_path).run()
    kept, header = checkpoints.load(tmp_path / "checkpoint.safetensors")
    assert header["iteration"] == 2
    assert all(tensor.isfinite().all() for tensor in kept.values() if tensor.is_floating_point())
    assert checkpoints.load_generator(tmp_path / "checkpoint.safetensors")(torch.randn(1, 32)).isfinite().all()
    assert not (tmp_path / "generator.safetensors").exists()


def test_nan_before_any_checkpoint_says_so(tmp_path, monkeypatch):
    poison_from(0, lambda images, targets: images.mean() * float("inf"), monkeypatch)
    with pytest.raises(UserError, match=r"by iteration 3; none was kept yet"):
        GanTrainer(STAGE1, IMAGES, tmp_path).run()
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, whole):
    save_file = checkpoints.save_file

    def full(contents, path, **more):
        if json.loads(more["metadata"]["header"])["iteration"] > 3:
            Path(path).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(contents, path, **more)

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"disk is full: .*checkpoint\.safetensors"):
        patch.setattr(checkpoints, "save_file", full)
        GanTrainer(STAGE1, IMAGES, tmp_path, evaluate=kid_of_mean).run()
    assert checkpoints.read_header(tmp_path / "checkpoint.safetensors")["iteration"] == 3
    assert not list(tmp_path.glob(".*"))
    GanTrainer(STAGE1, IMAGES, tmp_path, evaluate=kid_of_mean).run()  # some space was made
    assert_same_run(tmp_path, whole)


def test_fewer_images_than_a_batch(tmp_path):
    with pytest.raises(UserError, match="2 training images, fewer than a batch of 3"):
        GanTrainer(STAGE1, IMAGES[:2], tmp_path)


def test_images_of_another_size(tmp_path):
    with pytest.raises(UserError, match="images are 32 px, the settings ask for 64 px"):
        GanTrainer(STAGE1, IMAGES[:, :32, :32], tmp_path)


def test_start_of_another_size(tmp_path):
    path = tmp_path / "all_1.pth"
    torch.save({"g": Generator(128, 8, 32).state_dict(), "d": Discriminator(128, 8).state_dict()}, path)
    start = checkpoints.load_generator(path), checkpoints.load_discriminator(path)
    with pytest.raises(UserError, match="images of 128 px, 64 px are asked for: set size to 128"):
        GanTrainer(STAGE2, IMAGES, tmp_path, start=start)


def test_checkpoint_of_other_settings(whole):
    before = (whole / "checkpoint.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"other settings \(seed, learning_rate\)"):
        GanTrainer(replace(STAGE1, seed=5, learning_rate=1e-3), IMAGES, whole)
    assert (whole / "checkpoint.safetensors").read_bytes() == before
    free = replace(STAGE1, iterations=13, max_minutes=5, checkpoint_every=7, sample_every=9)
    assert GanTrainer(free, IMAGES, whole).iteration == 12  # these change nothing that was trained


def test_checkpoint_of_other_images(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match="trained on other images"):
        GanTrainer(STAGE1, IMAGES[::-1].copy(), tmp_path / "run", evaluate=kid_of_mean)


def test_a_trainer_that_nobody_holds_leaves_the_memory(tmp_path):
    gan = GanTrainer(STAGE1, IMAGES, tmp_path)
    gan.step()
    gone = weakref.ref(gan)
    gc.disable()  # on a GPU, waiting for the collector means that two trainings have to fit
    try:
        del gan
        assert gone() is None
    finally:
        gc.enable()


def test_too_many_frozen_blocks(tmp_path, whole):
    with pytest.raises(UserError, match="freeze_blocks is 9"):
        stage2(tmp_path, whole, replace(STAGE2, freeze_blocks=9))


def test_checkpoint_of_a_device_that_did_not_scale_its_losses(tmp_path, whole, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.setattr(devices, "precision", lambda *_: torch.float16)
    gan = GanTrainer(STAGE1, IMAGES, folder)
    assert gan.iteration == STAGE1.iterations and gan.scaler.is_enabled()


def test_checkpoint_from_before_a_setting_was_there(tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "copy")
    tensors, header = checkpoints.load(folder / "checkpoint.safetensors")
    del header["settings"]["weights"]
    checkpoints.save(folder / "checkpoint.safetensors", tensors, header)
    assert GanTrainer(STAGE1, IMAGES, folder).iteration == STAGE1.iterations
    with pytest.raises(UserError, match=r"other settings \(weights\)"):
        GanTrainer(replace(STAGE1, weights="auto"), IMAGES, folder)


def test_the_seed_decides_where_a_training_begins(tmp_path):
    begun = [GanTrainer(replace(STAGE1, seed=seed), IMAGES, tmp_path) for seed in (3, 3, 4)]
    first, again, other = (gan.generator.state_dict()["init.init.0.weight_orig"] for gan in begun)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_rate_is_the_settings_and_the_momentum_fastgan_s(tmp_path):
    gan = GanTrainer(replace(STAGE1, learning_rate=1e-3), IMAGES, tmp_path)
    for optimizer in (gan.optimizer_g, gan.optimizer_d):
        assert [(group["lr"], tuple(group["betas"])) for group in optimizer.param_groups] == [(1e-3, (0.5, 0.999))]


def test_the_discriminator_sees_real_and_generated_images_augmented_alike(tmp_path, monkeypatch):
    """Augmented on one side alone, it would learn to tell the augmentation."""
    policies, judged, rebuilt = [], [], []

    def marked(images, policy):
        policies.append(policy)
        return 0 * images + 0.25

    monkeypatch.setattr(iteration, "diff_augment", marked)
    gan = GanTrainer(STAGE1, IMAGES, tmp_path)
    gan.discriminator.register_forward_pre_hook(lambda _, images: judged.extend(images))
    gan.perceptual = lambda images, targets: rebuilt.append(targets) or images.square().mean()
    gan.step()
    assert len(judged) == 6 and len(rebuilt) == 2  # what it rebuilds is what it has seen
    assert all((images == 0.25).all() for images in (*judged, *rebuilt))
    assert set(policies) == {STAGE1.augment}


def test_barlow_twins_compares_two_views_of_the_real_images_and_is_learnt_from(tmp_path, whole):
    gan = stage2(tmp_path, whole, replace(STAGE2, noise_sigma=0))
    projector, judged = copy.deepcopy(gan.projector.state_dict()), []
    gan.discriminator.register_forward_pre_hook(lambda _, images: judged.append(images[0]))
    gan.step()
    fake, view, other, again = judged
    assert torch.equal(fake, again) and not torch.equal(view, other)
    assert not torch.equal(gan.projector.state_dict()["0.weight"], projector["0.weight"])


def test_samples_are_drawn_by_the_average(tmp_path, monkeypatch):
    drawn, samples = [], trainer.samples
    monkeypatch.setattr(trainer, "samples", lambda generator: drawn.append(generator) or samples(generator))
    gan = GanTrainer(replace(STAGE1, iterations=1), IMAGES, tmp_path)
    gan.run()
    assert drawn == [gan.ema] * 2  # at the start, at the end


def test_a_minute_has_sixty_seconds(tmp_path, monkeypatch):
    clock = itertools.count(0, 25)  # read at the start and at each checkpoint
    monkeypatch.setattr(trainer, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(Unfinished, match="iteration 9 of 12 after 1 minutes"):
        GanTrainer(replace(STAGE1, max_minutes=1), IMAGES, tmp_path).run()


def test_a_training_that_ends_as_its_time_does_has_ended(tmp_path):
    GanTrainer(replace(STAGE1, iterations=3, max_minutes=0), IMAGES, tmp_path).run()
    assert (tmp_path / "generator.safetensors").exists()
