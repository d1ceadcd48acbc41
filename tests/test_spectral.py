"""Spectral norm against torch's own, number by number."""

import pytest
import torch
from torch import nn

from stgan_utils.fastgan import UpConv2d
from stgan_utils.spectral import spectral_norm

KINDS = {
    "conv": lambda: nn.Conv2d(6, 10, 3, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(6, 10, 4, bias=False),
    "up": lambda: UpConv2d(6, 10),
}


@pytest.fixture(params=KINDS)
def both(request):
    """A convolution with our spectral norm and the same one with torch's."""
    pair = []
    for norm in (spectral_norm, nn.utils.spectral_norm):
        torch.manual_seed(0)
        pair.append(norm(KINDS[request.param]()))
    return pair


def test_files_hold_the_same_names_and_the_same_start(both):
    ours, theirs = (layer.state_dict() for layer in both)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_passes_gradients_and_vectors_are_those_of_torch(both):
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in both]
    for _ in range(4):
        real, fake = torch.randn(2, 3, 6, 8, 8)
        for layer, optimizer in zip(both, optimizers, strict=True):
            optimizer.zero_grad()
            # Two passes before one backward pass, as a discriminator's on real and on generated images.
            (layer(real).square().mean() - layer(fake).sin().mean()).backward()
        ours, theirs = both
        torch.testing.assert_close(ours.weight_orig.grad, theirs.weight_orig.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_in_eval_mode_nothing_moves_and_the_answer_is_torchs(both):
    images = torch.randn(2, 6, 8, 8)
    for layer in both:
        layer(images)
        layer.eval()
    before = {name: tensor.clone() for name, tensor in both[0].state_dict().items()}
    torch.testing.assert_close(both[0](images), both[1](images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in both[0].state_dict().items())


def test_the_norm_is_taken_in_full_precision_and_comes_out_in_half():
    layer, images = spectral_norm(nn.Conv2d(6, 10, 3, bias=False)), torch.randn(2, 6, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(images).float().square().mean().backward()
    assert layer.weight.dtype is torch.bfloat16 and layer.weight_orig.grad.dtype is torch.float32
    exact = layer.weight_orig / torch.dot(layer.weight_u, layer.weight_orig.flatten(1) @ layer.weight_v)
    assert torch.equal(layer.weight, exact.bfloat16())


def test_a_layer_that_is_not_trained_still_finds_its_singular_vectors():
    layer = spectral_norm(nn.Conv2d(6, 10, 3, bias=False))
    layer.weight_orig.requires_grad_(False)
    images = torch.randn(2, 6, 8, 8, requires_grad=True)
    before = layer.weight_u.clone()
    layer(images).mean().backward()
    assert images.grad is not None and layer.weight_orig.grad is None and not torch.equal(layer.weight_u, before)
