"""Several processes on one training: equal to one process with the same total batch, and ended in good order.

Run as a script by `accelerate launch`, this file is one of two processes on CPUs (gloo). What they make is compared
with one process in double precision, where rounding leaves nothing but the mathematics to differ.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from stgan_utils import checkpoints, launch, parallel, trainer
from stgan_utils.config import Stage1Settings, Stage2Settings, UserError
from stgan_utils.runs import Unfinished
from stgan_utils.trainer import GanTrainer

ROOT = Path(__file__).resolve().parents[1]
TINY = {"size": 64, "ngf": 8, "nz": 16, "batch_size": 4, "quality_images": 4, "sample_every": 1000}
STAGE1 = Stage1Settings(iterations=3, checkpoint_every=2, evaluate_every=1000, seed=1, **TINY)
STAGE2 = Stage2Settings(
    iterations=4, checkpoint_every=2, evaluate_every=2, seed=2, lesion="DF", bt_ramp=3, noise_decay=9, **TINY
)
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)  # fewer than three batches


def kid_of_mean(pictures):
    return {"kid": float(pictures.mean())}


kid_of_mean.feature_space = "their mean"


def in_double(patch):
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    patch.setattr(trainer, "GRID", 2)
    torch.set_default_dtype(torch.float64)


class DoubleStart(tuple):
    """Networks to start from that put the process which they are sent to into double precision."""

    def __reduce__(self):
        return _arrive_in_double, tuple(self)


def _arrive_in_double(*start):
    in_double(pytest.MonkeyPatch())
    return start


def stage2(folder, stage1, settings=STAGE2, **more):
    path = stage1 / "checkpoint.safetensors"
    start = checkpoints.load_generator(path), checkpoints.load_discriminator(path)
    return {"settings": settings, "images": IMAGES, "folder": folder, "start": start, "evaluate": kid_of_mean} | more


def train_both(folder):
    """Stage 1, and Stage 2 stopped in time at its first checkpoint; returns the last trainer."""
    GanTrainer(STAGE1, IMAGES, folder / "1", evaluate=kid_of_mean).run()
    gan = GanTrainer(**stage2(folder / "2", folder / "1", replace(STAGE2, max_minutes=0)))
    with pytest.raises(Unfinished, match="iteration 2 of 4 after 0 minutes"):
        gan.run()
    return gan


def share_everything(folder):
    """What each of the two processes does."""
    in_double(pytest.MonkeyPatch())
    gan = train_both(folder)
    torch.save({name: module.state_dict() for name, module in gan._modules().items()}, folder / f"{parallel.rank()}.pt")

    with pytest.raises(UserError) as odd:
        GanTrainer(replace(STAGE1, batch_size=3), IMAGES, folder / "odd")
    poisoned = GanTrainer(replace(STAGE1, checkpoint_every=1), IMAGES, folder / "nan")
    if not parallel.is_main():
        poisoned.perceptual = lambda images, targets: images.mean() * float("nan")
    with pytest.raises(UserError) as nan:
        poisoned.run()
    (folder / f"{parallel.rank()}.txt").write_text(f"{odd.value}\n{nan.value}")


@pytest.fixture
def double():
    with pytest.MonkeyPatch.context() as patch:
        in_double(patch)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        in_double(patch)
        train_both(folder)
        torch.set_default_dtype(torch.float32)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), __file__, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_checkpoint(a, b, rtol=1e-9):
    """Every tensor to `rtol` of its norm, random streams and counters exactly, and the same history."""
    (ours, first), (theirs, second) = (checkpoints.load(folder / "checkpoint.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, theirs[name]), name
        else:
            # What should be 0 is not: the gradient of a bias that Barlow Twins subtracts again.
            assert (tensor - theirs[name]).norm() <= rtol * tensor.norm() + 1e-12, name
    assert first["iteration"] == second["iteration"] and first["settings"] == second["settings"]
    for rows in ("history", "quality"):
        pd.testing.assert_frame_equal(pd.DataFrame(first[rows]), pd.DataFrame(second[rows]), rtol=rtol)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_two_processes_train_what_one_trains(one, two, stage):
    assert_same_checkpoint(two / stage, one / stage)
    ours, theirs = (sorted(path.name for path in (folder / stage).rglob("*")) for folder in (two, one))
    assert ours == theirs


def test_the_processes_hold_the_same_networks_to_the_bit(two):
    first, second = (torch.load(two / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys() == {"generator", "discriminator", "ema", "projector"}
    for module in first:
        assert all(torch.equal(tensor, second[module][name]) for name, tensor in first[module].items())


def test_cut_with_two_processes_goes_on_with_one(one, two, tmp_path, double):
    for folder in (one, two):
        run = shutil.copytree(folder / "2", tmp_path / folder.name)
        history, _ = GanTrainer(**stage2(run, one / "1")).run()
        assert history["iteration"].tolist() == [2, 4]
    assert_same_checkpoint(tmp_path / two.name, tmp_path / one.name)


def test_a_number_that_is_none_in_one_process_stops_all(two):
    said = {(two / f"{rank}.txt").read_text().splitlines()[1] for rank in (0, 1)}
    assert len(said) == 1
    assert re.match(r"The loss reconstruction, .* was no longer a number by iteration 1; none was kept yet", said.pop())


def test_a_batch_that_cannot_be_shared_is_refused(two, tmp_path):
    with pytest.raises(
        UserError, match=r"A batch of 3 cannot be shared equally by 2 processes.*a multiple of 2"
    ) as error:
        launch.train(replace(STAGE1, batch_size=3), IMAGES, tmp_path, processes=2)
    assert not list(tmp_path.iterdir())
    assert {(two / f"{rank}.txt").read_text().splitlines()[0] for rank in (0, 1)} == {str(error.value)}


def test_launched_from_here_callbacks_are_called_here(one, tmp_path, capsys, double):
    seen = []

    def look(iteration, grid):
        assert grid.shape == (128, 128, 3) and grid.dtype == np.uint8
        seen.append((iteration, os.getpid()))

    job = stage2(tmp_path, one / "1", on_sample=look)
    job["start"] = DoubleStart(job["start"])
    stopped = job | {"settings": replace(STAGE2, sample_every=2, max_minutes=0)}
    with pytest.raises(Unfinished, match="iteration 2 of 4 after 0 minutes"):
        launch.train(**stopped, processes=2)
    assert seen == [(0, os.getpid()), (2, os.getpid())] and not active_children()
    np.save(tmp_path / "images.npy", IMAGES)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="c")
    history, quality = launch.train(**job | {"images": mapped}, processes=2)
    expected = launch.train(**stage2(tmp_path / "one", one / "1"), processes=1)
    for ours, theirs in zip((history, quality), expected, strict=True):
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-9)
    said = capsys.readouterr().out
    assert "2 processes train together, each on 2 images of a batch." in said and "from here on" not in said
    assert checkpoints.read_header(tmp_path / "checkpoint.safetensors")["feature_space"] == "their mean"


def test_a_killed_process_ends_the_others_and_is_named(tmp_path):
    def kill(iteration, grid):
        os.kill(active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(ProcessExitedException, match="terminated with signal SIGKILL"):
        launch.train(STAGE1, IMAGES, tmp_path, on_sample=kill, processes=2)
    assert not active_children()


if __name__ == "__main__":
    share_everything(Path(sys.argv[1]))
