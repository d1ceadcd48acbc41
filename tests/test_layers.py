"""Layers beside PyTorch's own: the same numbers, and gradients that lie in memory as the features do."""

import pytest
import torch
from torch import nn

from stgan_utils.layers import Blocks, GatedLinearUnit, Halved


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (GatedLinearUnit(), nn.GLU(dim=1)),
        (Halved(), nn.AvgPool2d(2)),
        (Blocks(), nn.AdaptiveAvgPool2d(4)),
    ],
    ids=["gated", "halved", "blocks"],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layers_are_torchs_and_gradients_lie_as_features_do(ours, plain, layout):
    features = torch.randn(2, 6, 16, 16).contiguous(memory_format=layout).requires_grad_()
    found, expected = ours(features), plain(features)
    torch.testing.assert_close(found, expected)
    towards = torch.randn_like(found)
    gradient, wanted = (torch.autograd.grad(result, features, towards)[0] for result in (found, expected))
    torch.testing.assert_close(gradient, wanted)
    if not isinstance(ours, Blocks):  # of few values, repeated: nothing in memory yet
        assert gradient.is_contiguous(memory_format=layout)
