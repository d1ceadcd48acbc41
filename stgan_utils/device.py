"""Which processor computes, and with what precision."""

import ctypes
import os
from contextlib import nullcontext
from functools import lru_cache

import torch

WIDE = 32  # from here on the step of a network on a CPU is faster in bf16, below it is slower


def _supported(major, minor):
    """Whether this torch has kernels for a GPU of that compute capability.

    `torch.cuda.is_available()` does not tell: Kaggle's P100 (sm_60) is available and dies at the first operation,
    because its torch was built without sm_60. Kernels run on their own major version from their minor version on.
    """
    built = [arch.removeprefix("sm_") for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    return any(int(arch[:-1]) == major and int(arch[-1]) <= minor for arch in built if arch.isdigit())


def keep_memory():
    """Have glibc keep freed memory for the next tensor; without effect where the C library is another.

    By default it gives every large block back to the kernel, which clears it page by page when the next tensor asks:
    half the time of a training step on a CPU (`benchmarks/`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        for parameter, value in ((-4, 0), (-1, -1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(parameter, value)


@lru_cache
def pick():
    """The GPU if this torch can use it, else the CPU; a GPU that it has no kernels for is named and passed over."""
    if not torch.cuda.is_available():
        keep_memory()
        return torch.device("cpu")
    capability = torch.cuda.get_device_capability()
    if _supported(*capability):
        return torch.device("cuda")
    print(
        f"{torch.cuda.get_device_name()} is not supported by this torch {torch.__version__} "
        f"(compute capability {capability[0]}.{capability[1]}): the CPU is used. On Kaggle choose GPU T4 × 2 or L4."
    )
    keep_memory()
    return torch.device("cpu")


def _computes_bf16():
    """Whether this CPU computes in bfloat16 (AVX-512 BF16 or AMX) instead of imitating it."""
    asked = (getattr(torch.cpu, f"_is_{feature}_supported", None) for feature in ("avx512_bf16", "amx_tile"))
    return any(ask() for ask in asked if ask)


def precision(device, width=0):
    """bf16 from compute capability 8.0, fp16 (with loss scaling) from 7.0, else float32.

    On a CPU that computes in bf16, networks of `width` (channels of the widest images: FastGAN's `ngf`, 32 of
    MobileNetV2) `WIDE` and above take it: their step is up to 1.7 times as fast (`benchmarks/`).
    """
    if device.type != "cuda":
        return torch.bfloat16 if width >= WIDE and _computes_bf16() else torch.float32
    major = torch.cuda.get_device_capability(device)[0]
    return torch.bfloat16 if major >= 8 else torch.float16 if major >= 7 else torch.float32


def autocast(device, width=0):
    """Context in which operations take the precision of device and width; does nothing in float32."""
    dtype = precision(device, width)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype)


def describe(width=0):
    """One line for logs and `result.json`, such as "cuda (NVIDIA L4), bfloat16" or "cpu (2 threads), float32"; the
    precision is that of networks of `width`, see `precision`."""
    device = pick()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device.type} ({name}), {str(precision(device, width)).removeprefix('torch.')}"
