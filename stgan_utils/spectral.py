"""Spectral norm (T. Miyato et al., ICLR 2018, arXiv:1802.05957): weights divided by their largest singular value.

The same numbers as `torch.nn.utils.spectral_norm`, names inside checkpoint files included, from half of the operations:
FastGAN normalises 120 weights an iteration, and on a GPU what a step waits for are its thousands of small kernels.
Computed in float32 whatever the precision around it; what comes out has that precision, and lies in memory as a
convolution wants it.
"""

import torch
from torch import nn
from torch.nn import functional as F


def spectral_norm(module):
    """The convolution itself: from now on each pass in training mode makes one power iteration, then uses W / σ.

    Its parameter is called `weight_orig`, the singular vectors are the buffers `weight_u` and `weight_v`; `weight` is
    what the last pass used.
    """
    weight = module.weight
    del module.weight
    module.register_parameter("weight_orig", weight)
    for name, vector in zip(("weight_u", "weight_v"), _start(_matrix(module, weight.detach())), strict=True):
        module.register_buffer(name, vector)
    module.weight = weight.detach()
    module.register_forward_pre_hook(_normalise)
    return module


def _matrix(module, weight):
    """A row for each output of the convolution: (outputs, all else)."""
    return (weight.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else weight).flatten(1)


def _start(matrix):
    return [F.normalize(matrix.new_empty(side).normal_(), dim=0) for side in matrix.shape]


def _normalise(module, _):
    weight, u, v = module.weight_orig, module.weight_u, module.weight_v
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        matrix = _matrix(module, weight.detach())
        if module.training:
            with torch.no_grad():
                right = matrix.T @ u
                right /= torch.linalg.vector_norm(right)
                left = matrix @ right
                sigma = torch.linalg.vector_norm(left)
                left /= sigma
                # The buffers get copies: another pass may come before the gradients of this one.
                torch._foreach_copy_([u, v], [left, right])
        else:
            left, right, sigma = u, v, torch.dot(u, matrix @ v)
        outer = isinstance(module, nn.ConvTranspose2d)
        module.weight = _Divided.apply(weight, left, right, sigma, outer, dtype)


class _Divided(torch.autograd.Function):
    """W / σ, σ = uᵀ W v with fixed u and v: its gradient is (G - <G, W / σ> u vᵀ) / σ for G, that of W / σ."""

    @staticmethod
    def forward(ctx, weight, u, v, sigma, transposed, dtype):
        ctx.save_for_backward(weight, u, v, sigma)
        ctx.transposed = transposed
        # GPUs want channels last; on CPUs the gradients of weights take up to four times as long in it.
        layout = torch.channels_last if weight.is_cuda else torch.contiguous_format
        divided = torch.empty_like(weight, dtype=dtype, memory_format=layout)
        return torch.div(weight, sigma, out=divided)

    @staticmethod
    def backward(ctx, gradient):
        weight, u, v, sigma = ctx.saved_tensors
        gradient = torch.div(gradient, sigma, out=torch.empty_like(weight))
        share = torch.dot(gradient.flatten(), weight.flatten()) / sigma
        rows = gradient.transpose(0, 1) if ctx.transposed else gradient
        v = v.view(rows.shape[1:])
        rows.addcmul_(u.view(-1, 1, 1, 1) * share, v, value=-1)
        return gradient, None, None, None, None, None
