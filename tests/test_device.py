"""Which processor and precision are chosen, by what a pretended CUDA says of itself."""

import contextlib

import pytest
import torch

from stgan_utils import device


@pytest.fixture
def gpu(monkeypatch):
    """Pretends a GPU: gpu(name, capability, archs this torch was built for)."""

    def pretend(
        name, capability, archs=("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [*archs, "compute_120"])

    device.pick.cache_clear()
    yield pretend
    device.pick.cache_clear()


def test_a_gpu_without_kernels_is_passed_over_with_advice(gpu, capsys):
    gpu("Tesla P100-PCIE-16GB", (6, 0))
    assert device.pick() == torch.device("cpu")
    said = capsys.readouterr().out
    assert "P100" in said and "T4 × 2" in said and "L4" in said
    device.pick()
    assert capsys.readouterr().out == ""  # once is enough


@pytest.mark.parametrize(
    ("name", "capability", "precision"),
    [
        ("Tesla V100", (7, 0), torch.float16),
        ("Tesla T4", (7, 5), torch.float16),
        ("NVIDIA A100", (8, 0), torch.bfloat16),
        ("NVIDIA L4", (8, 9), torch.bfloat16),  # sm_86 kernels run on it
        ("NVIDIA H100", (9, 0), torch.bfloat16),
        ("NVIDIA B200", (10, 0), torch.bfloat16),
        ("RTX 5090", (12, 0), torch.bfloat16),
    ],
)
def test_supported_gpus_and_their_precision(gpu, name, capability, precision):
    gpu(name, capability)
    assert device.pick() == torch.device("cuda")
    assert device.precision(torch.device("cuda")) is precision
    assert device.describe() == f"cuda ({name}), {str(precision).removeprefix('torch.')}"


def test_a_p100_with_kernels_works_in_float32(gpu):
    gpu("Tesla P100", (6, 0), archs=("sm_60", "sm_70"))
    assert device.pick() == torch.device("cuda")
    assert device.precision(torch.device("cuda")) is torch.float32


def test_older_minor_version_is_not_enough(gpu):
    gpu("a card of sm_80", (8, 0), archs=("sm_86",))
    assert device.pick() == torch.device("cpu")


def test_cpu_is_float32_without_autocast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device.pick.cache_clear()
    cpu = device.pick()
    assert cpu.type == "cpu" and device.precision(cpu) is torch.float32
    assert isinstance(device.autocast(cpu), contextlib.nullcontext)
    assert device.describe().startswith("cpu (") and device.describe().endswith("float32")
    device.pick.cache_clear()


def test_only_wide_networks_take_bf16_and_only_on_cpus_that_compute_in_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(device, "_computes_bf16", lambda: True)
    assert device.precision(cpu, width=64) is torch.bfloat16
    assert device.precision(cpu, width=16) is torch.float32 and device.precision(cpu) is torch.float32
    with device.autocast(cpu, width=64):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype is torch.bfloat16
    monkeypatch.setattr(device, "_computes_bf16", lambda: False)
    assert device.precision(cpu, width=64) is torch.float32
