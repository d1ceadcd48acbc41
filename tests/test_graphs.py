"""The recorded training step, where there is a GPU: equal to the plain one, new random numbers each time, resumable."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stgan_utils import checkpoints, trainer
from stgan_utils import device as devices
from stgan_utils.config import Stage1Settings, Stage2Settings
from stgan_utils.graphs import Replayed
from stgan_utils.trainer import GanTrainer

pytestmark = pytest.mark.skipif(devices.pick().type != "cuda", reason="needs a GPU")
TINY = {"size": 64, "ngf": 8, "nz": 32, "batch_size": 3, "sample_every": 99, "evaluate_every": 99, "quality_images": 2}
STAGE1 = Stage1Settings(iterations=12, checkpoint_every=6, **TINY)
STAGE2 = Stage2Settings(iterations=12, checkpoint_every=6, lesion="DF", bt_ramp=6, noise_decay=8, **TINY)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def small_grid(monkeypatch):
    monkeypatch.setattr(trainer, "GRID", 2)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def precision(request, monkeypatch):
    monkeypatch.setattr(devices, "precision", lambda *_: request.param)
    return request.param


def test_replays_read_their_input_and_draw_new_numbers():
    number = torch.zeros((), device="cuda")

    def function():
        return {"twice": 2 * number, "drawn": torch.rand((), device="cuda")}

    replayed, found = Replayed(function), []
    for index in range(8):
        number.fill_(index)
        found.append(replayed())
    assert replayed.graph is not None
    assert [float(one["twice"]) for one in found] == [2.0 * index for index in range(8)]
    assert len({float(one["drawn"]) for one in found}) == 8


def test_what_cannot_be_recorded_goes_on_as_it_is(capsys):
    number = torch.ones((), device="cuda")
    replayed = Replayed(lambda: {"waited": number * number.item()})
    assert [float(replayed()["waited"]) for _ in range(6)] == [1.0] * 6
    assert replayed.graph is None and "could not be recorded" in capsys.readouterr().out
    assert torch.rand(4, device="cuda").std() > 0  # the stream of random numbers is whole


@pytest.mark.parametrize("settings", [STAGE1, STAGE2], ids=["stage1", "stage2"])
def test_the_recorded_step_is_the_plain_step(settings, tmp_path, precision):
    recorded, plain = (GanTrainer(settings, IMAGES, tmp_path / name) for name in ("recorded", "plain"))
    plain._losses = plain._losses.function
    found = []
    for gan in (recorded, plain):
        torch.manual_seed(5)
        found.append([{name: loss.item() for name, loss in gan.step().items()} for _ in range(13)])
    assert recorded._losses.graph is not None
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=0.1, abs=0.1)  # sums in another order grow apart
    assert recorded.optimizer_g.state_dict()["state"][0]["step"] == 13 or precision is torch.float16


def test_a_killed_run_goes_on_as_one_never_killed(tmp_path):
    whole, _ = GanTrainer(STAGE1, IMAGES, tmp_path / "whole", evaluate=lambda _: {"kid": 0.0}).run()
    GanTrainer(replace(STAGE1, iterations=6), IMAGES, tmp_path / "cut", evaluate=lambda _: {"kid": 0.0}).run()
    again = GanTrainer(STAGE1, IMAGES, tmp_path / "cut", evaluate=lambda _: {"kid": 0.0})
    # The comparison below would miss what an optimiser has forgotten, or the random stream.
    tensors, _ = checkpoints.load(tmp_path / "cut" / "checkpoint.safetensors")
    for name in ("optimizer_g", "optimizer_d"):
        for number, slots in getattr(again, name).state_dict()["state"].items():
            for slot, tensor in slots.items():
                assert torch.equal(tensor.cpu(), tensors[f"{name}.{number}.{slot}"]) and tensor.any()
    assert torch.equal(torch.cuda.get_rng_state(again.device), tensors["rng.cuda"])
    resumed, _ = again.run()
    np.testing.assert_allclose(resumed.iloc[-1], whole.iloc[-1], rtol=0.1, atol=0.1)  # bf16, nothing deterministic


def test_a_checkpoint_of_the_gpu_goes_on_on_a_cpu(tmp_path, monkeypatch):
    GanTrainer(replace(STAGE1, iterations=6), IMAGES, tmp_path, evaluate=lambda _: {"kid": 0.0}).run()
    monkeypatch.setattr(devices, "pick", lambda: torch.device("cpu"))
    monkeypatch.setattr(devices, "precision", lambda *_: torch.float32)
    GanTrainer(STAGE1, IMAGES, tmp_path, evaluate=lambda _: {"kid": 0.0}).run()
    assert checkpoints.read_header(tmp_path / "checkpoint.safetensors")["iteration"] == 12


def test_a_checkpoint_of_a_cpu_goes_on_on_the_gpu(tmp_path, monkeypatch, precision):
    with monkeypatch.context() as patch:
        patch.setattr(devices, "pick", lambda: torch.device("cpu"))
        patch.setattr(devices, "precision", lambda *_: torch.float32)
        GanTrainer(replace(STAGE1, iterations=6), IMAGES, tmp_path, evaluate=lambda _: {"kid": 0.0}).run()
    history, _ = GanTrainer(STAGE1, IMAGES, tmp_path, evaluate=lambda _: {"kid": 0.0}).run()
    assert history["iteration"].iloc[-1] == 12 and np.isfinite(history.to_numpy()).all()
