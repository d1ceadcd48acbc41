"""What a step says it found, and what it warns of: only where it matters."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from stgan_utils import config, device, fastgan, outlook, places, steps


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device.pick.cache_clear()
    yield
    device.pick.cache_clear()


@pytest.fixture
def disk(monkeypatch):
    def free(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))

    free(50e9)
    return free


STAGE1 = config.resolve("stage1", "kaggle")


def begun(tmp_path, settings=STAGE1, profile="kaggle"):
    return steps.OpenStep("step", settings, "phantom", profile, tmp_path, {}, data_name="HAM10000, n = 7")


def warned(tmp_path, kind, profile, **given):
    return outlook.warnings(begun(tmp_path, config.resolve(kind, profile, given), profile))


def test_line_has_data_device_precision_time_and_room(disk, tmp_path):
    parts = outlook.line(begun(tmp_path, config.resolve("stage1", "smoke", {"max_minutes": 30}))).split(" · ")
    assert parts[0] == "data: HAM10000, n = 7" and parts[1] == device.describe() and "float32" in parts[1]
    assert parts[2:4] == [f"{places.cores()} cores", "stops after 30 minutes"]
    assert parts[4:] == ["50.0 GB of disk free", str(tmp_path / "step")]
    assert "minutes" not in outlook.line(begun(tmp_path, config.resolve("data", "smoke")))


def test_memory_of_a_gpu(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=15.8e9))
    assert " · cuda (Tesla T4), float16 · 15.8 GB of GPU memory · " in outlook.line(begun(tmp_path))
    assert warned(tmp_path, "stage1", "kaggle") == []


@pytest.mark.parametrize(
    ("variable", "way_on"),
    [
        ("KAGGLE_KERNEL_RUN_TYPE", "GPU T4 × 2 (or L4)"),
        ("COLAB_RELEASE_TAG", "Change runtime type, T4 GPU"),
        ("HOME", "use a machine with one"),
    ],
)
def test_no_gpu_matters_to_what_trains_at_full_size(disk, tmp_path, monkeypatch, variable, way_on):
    monkeypatch.setenv(variable, "x")
    (said,) = [each for each in warned(tmp_path, "stage1", "kaggle", max_minutes=500) if "Drive" not in each]
    assert way_on in said and "real-cpu" in said
    for kind, profile in (("stage1", "demo"), ("data", "kaggle"), ("dedup", "kaggle")):
        assert not any("GPU" in each for each in warned(tmp_path, kind, profile))


def test_kaggle_wants_a_time_limit_and_colab_drive(disk, tmp_path, monkeypatch):
    assert not any("lost" in each or "limit" in each for each in warned(tmp_path, "stage1", "kaggle"))
    monkeypatch.setattr(places, "DRIVE", tmp_path / "drive")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    (said,) = warned(tmp_path / "content", "data", "demo")
    assert said.startswith("What is made here is lost with the session: mount Google Drive")
    assert warned(tmp_path / "drive" / "runs", "data", "demo") == []
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "x")
    assert "max_minutes = 500" in warned(tmp_path, "stage1", "kaggle")[-1]
    assert not any("max_minutes" in each for each in warned(tmp_path, "stage1", "kaggle", max_minutes=500))


def test_a_disk_too_small_for_the_step(disk, tmp_path):
    disk(1e9)
    (said,) = outlook.warnings(begun(tmp_path, STAGE1, "real-cpu"))
    assert said.startswith("The disk is nearly full: 1.0 GB free below") and "run_dir" in said
    assert warned(tmp_path, "stage1", "demo") == []
    disk(1e8)
    assert warned(tmp_path, "data", "demo")


def test_a_disk_too_small_for_decoded_images(disk, tmp_path, monkeypatch):
    monkeypatch.setenv("STGAN_CACHE", str(tmp_path / "cache"))
    disk(5e9)
    for kind, said in (("baseline", 0), ("classifier", 1)):  # 1.5 GB, and 7.8 GB with 42,000 generated images
        step = begun(tmp_path, config.resolve(kind, "kaggle", {"size": 224}), "real-cpu")
        assert not outlook.warnings(step)  # of phantom images there are few
        step.data = "/ham10000"
        found = outlook.warnings(step)
        assert len(found) == said and all(f"below {tmp_path / 'cache'}" in each for each in found)


def test_room_is_enough_for_two_checkpoints_and_the_images():
    with torch.device("meta"):
        networks = fastgan.Generator(256, 64, 256), fastgan.Discriminator(256, 64)
    generator, discriminator = (sum(p.numel() for p in network.parameters()) * 4 for network in networks)
    checkpoint = 2 * generator + discriminator + 2 * (generator + discriminator)  # the average too, and Adam's moments
    assert 2 * checkpoint + 2 * generator < outlook.room_needed(STAGE1) < 4 * checkpoint
    stage2 = config.resolve("stage2", "kaggle", {"lesion": "DF", "generate": 1000})
    assert outlook.room_needed(stage2) - outlook.room_needed(STAGE1) == 1000 * 256 * 256 * 3
