"""Layers that PyTorch has too, in a form that is computed fast, most of all by a GPU: the same numbers, other kernels.

FastGAN's features lie channels last on a GPU, and some of PyTorch's operations are not made for that. Milliseconds are
those of a profile on an H200: a step of 256 px, batch 8, took 38.
"""

import torch
from torch import nn
from torch.nn import functional as F


class _GatedLinearUnit(torch.autograd.Function):
    """`F.glu` whose gradient lies in memory as the features do. PyTorch's never lies channels last, and on a GPU the
    BatchNorm that it reaches then falls back on kernels that are not made for it."""

    @staticmethod
    def forward(ctx, features):
        ctx.save_for_backward(features)
        return F.glu(features, 1)

    @staticmethod
    def backward(ctx, gradient):
        (features,) = ctx.saved_tensors
        out = torch.empty_like(features)
        return torch.ops.aten.glu_backward.grad_input(gradient, features, 1, grad_input=out)


class GatedLinearUnit(nn.Module):
    """(B, 2 C, H, W) → (B, C, H, W): the first half, times the sigmoid of the second."""

    def forward(self, features):
        return _GatedLinearUnit.apply(features)


class _Halved(torch.autograd.Function):
    """`F.avg_pool2d(features, 2)`; its gradient by repetition: PyTorch's kernel took a GPU 0.9 of 38 ms a step.
    On a CPU its forward one takes five times as long as sums of slices do."""

    @staticmethod
    def forward(ctx, features):
        if features.is_cuda:
            return F.avg_pool2d(features, 2)
        rows = features[:, :, ::2] + features[:, :, 1::2]
        return (rows[..., ::2] + rows[..., 1::2]) / 4

    @staticmethod
    def backward(ctx, gradient):
        return F.interpolate(gradient / 4, scale_factor=2)


class Halved(nn.Module):
    """(B, C, 2 H, 2 W) → (B, C, H, W), the mean of each 2 × 2 pixels."""

    def forward(self, features):
        return _Halved.apply(features)


class Blocks(nn.Module):
    """(B, C, H, W) → (B, C, 4, 4), the mean of each of 4 × 4 blocks.

    What `nn.AdaptiveAvgPool2d` computes here; on large maps that lie channels last it took a GPU 6 of 38 ms a step.
    """

    def forward(self, features):
        return features.unflatten(3, (4, -1)).unflatten(2, (4, -1)).mean((3, 5))
