"""The two networks: shapes, formulas, and that what is frozen stays as it is, to the bit."""

import numpy as np
import pytest
import torch
from torch import nn

from stgan_utils.config import UserError
from stgan_utils.fastgan import (
    Discriminator,
    Generator,
    NoiseInjection,
    SkipLayerExcitation,
    UpConv2d,
    quadrant_of,
    small_size,
    small_view,
)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_shapes(size):
    ngf = 8
    generator, discriminator = Generator(size, ngf, nz=32), Discriminator(size, ngf)
    with torch.no_grad():
        images, small = generator(torch.randn(2, 32), with_small=True)
        judged = discriminator(images, small)
        rebuilt = discriminator.reconstruct(judged, 3)
    side = {64: 32, 128: 64, 256: 128, 512: 128}[size]
    assert images.shape == (2, 3, size, size) and small.shape == (2, 3, side, side)
    assert small_size(size) == side and small_view(images).shape == small.shape
    assert judged.logits.shape == (2, 2 * 25)
    assert judged.last.shape == (2, 8 * ngf, 8, 8)
    assert judged.middle.shape == (2, 4 * ngf, 16, 16) and judged.small.shape == (2, 4 * ngf, 8, 8)
    assert [r.shape for r in rebuilt] == [(2, 3, min(size, 128), min(size, 128))] * 3


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        assert round(parameters(Generator(256, 64)) / 1e6, 1) == 29.1
        assert round(parameters(Discriminator(256, 64)) / 1e6, 1) == 11.5


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_other_sizes_are_refused(network):
    with pytest.raises(UserError, match=r"100 px.*64, 128, 256, 512"):
        network(100)


def test_skip_layer_excitation_is_its_formula():
    torch.manual_seed(0)
    block = SkipLayerExcitation(6, 10)
    small, large = torch.randn(2, 6, 8, 8), torch.randn(2, 10, 32, 32)
    with torch.no_grad():
        out = block(small, large).numpy()
    four, one = (block.main[i].weight.detach().double().numpy() for i in (1, 3))  # divided by their norms
    pooled = small.double().numpy().reshape(2, 6, 4, 2, 4, 2).mean((3, 5))
    hidden = np.einsum("bchw,ochw->bo", pooled, four)
    hidden = hidden / (1 + np.exp(-hidden))
    gate = 1 / (1 + np.exp(-hidden @ one[:, :, 0, 0].T))
    np.testing.assert_allclose(out, large.numpy() * gate[:, :, None, None], atol=1e-5)


@pytest.mark.parametrize("side", [4, 8, 16])
def test_up_convolution_is_nearest_then_the_convolution(side):
    torch.manual_seed(0)
    layer = UpConv2d(5, 6).double()
    features = torch.randn(2, 5, side, side, dtype=torch.float64, requires_grad=True)
    found = layer(features)
    twice = features.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = nn.functional.conv2d(twice, layer.weight, padding=1)
    torch.testing.assert_close(found, expected)
    towards = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad(found, (features, layer.weight), towards),
        torch.autograd.grad(expected, (features, layer.weight), towards),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_small_view_is_the_mean_of_each_block():
    images = torch.randn(2, 3, 64, 64)
    expected = images.numpy().reshape(2, 3, 32, 2, 32, 2).mean((3, 5))
    np.testing.assert_allclose(small_view(images).numpy(), expected, atol=1e-6)


def test_noise_starts_without_effect_and_can_be_given():
    generator = Generator(64, 8)
    layers = [module for module in generator.modules() if isinstance(module, NoiseInjection)]
    assert [layer for layer, _ in generator.noise_layers()] == layers
    assert [side for _, side in generator.noise_layers()] == [8, 8, 32, 32]
    assert all(layer.weight.item() == 0 for layer in layers)
    layer, features = layers[0], torch.randn(2, 4, 8, 8)
    assert torch.equal(layer(features), features)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.noise = torch.randn(2, 1, 8, 8)
        assert torch.equal(layer(features), features + 0.5 * layer.noise)
        layer.noise = None
        assert not torch.equal(layer(features), layer(features))


def test_weights_start_as_fastgan_starts():
    for network in (Generator(64, 16), Discriminator(64, 16)):
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.weight_orig.numel() > 5000:
                assert module.bias is None
                assert abs(module.weight_orig.std().item() - 0.02) < 0.002
        scales = torch.cat([m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d)]).detach()
        assert abs(scales.mean().item() - 1) < 0.005 and abs(scales.std().item() - 0.02) < 0.005


def test_spectral_norm_of_the_weights_used_is_one():
    torch.manual_seed(0)
    generator, discriminator = Generator(64, 8, nz=32), Discriminator(64, 8)
    with torch.no_grad():
        for _ in range(25):  # one power iteration each
            judged = discriminator(*generator(torch.randn(2, 32), with_small=True))
            discriminator.reconstruct(judged, 0)
    layers = [m for net in (generator, discriminator) for m in net.modules() if hasattr(m, "weight_orig")]
    assert len(layers) == 39
    for layer in layers:
        weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_quadrants_of_features_and_of_images_are_the_same_corners():
    discriminator = Discriminator(64, 8)
    discriminator.decoder_part = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        judged = discriminator(images, small_view(images))
        for quadrant, (rows, columns) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):  # top left, top right, …
            part = discriminator.reconstruct(judged, quadrant)[2]
            corner = judged.middle[:, :, 8 * rows : 8 * rows + 8, 8 * columns : 8 * columns + 8]
            assert torch.equal(part, corner)
            wanted = images[:, :, 32 * rows : 32 * rows + 32, 32 * columns : 32 * columns + 32]
            assert torch.equal(quadrant_of(images, quadrant), wanted)
            assert torch.equal(quadrant_of(images, torch.tensor([quadrant])), wanted)


def test_features_of_a_quadrant_come_from_that_quadrant():
    torch.manual_seed(0)
    discriminator = Discriminator(64, 8).eval()
    images = torch.zeros(4, 3, 64, 64)
    for quadrant in range(4):
        images[quadrant].unflatten(1, (2, 32)).unflatten(3, (2, 32))[:, quadrant // 2, :, quadrant % 2] = 1.0
    with torch.no_grad():
        seen, nothing = (discriminator(view, small_view(view)).middle for view in (images, 0 * images))
        change = seen - nothing
    for quadrant in range(4):
        energy = [quadrant_of(change[quadrant : quadrant + 1], q).square().sum().item() for q in range(4)]
        assert int(np.argmax(energy)) == quadrant


FROZEN_OF_TWO = ("down_from_big.", "down_from_small.0.", "down_16.", "down_from_small.2.")  # at 64 px


def train_once(discriminator):
    trained = [p for p in discriminator.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    images = torch.randn(4, 3, 64, 64)
    judged = discriminator(images, small_view(images))
    (judged.logits.mean() + sum(r.square().mean() for r in discriminator.reconstruct(judged, 1))).backward()
    optimizer.step()


def test_frozen_blocks_stay_bit_identical_and_the_rest_learns():
    torch.manual_seed(0)
    discriminator = Discriminator(64, 8).train()
    assert discriminator.freeze(2) is discriminator
    for _ in range(3):
        before = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
        train_once(discriminator)
        assert {n for n, p in discriminator.named_parameters() if p.grad is None} == {
            n for n, _ in discriminator.named_parameters() if n.startswith(FROZEN_OF_TWO)
        }
        for name, tensor in discriminator.state_dict().items():
            frozen = name.startswith(FROZEN_OF_TWO)
            # A layer with one output has a left singular vector of one entry, ±1: nothing there can change.
            if frozen or tensor.numel() > 1:
                assert torch.equal(tensor, before[name]) == frozen, name
        discriminator.eval()
        discriminator.train()  # as a loop does after an evaluation; must not thaw anything


def test_freezing_more_blocks_freezes_deeper_and_too_many_are_refused():
    discriminator = Discriminator(64, 8)
    assert len(discriminator.blocks()) == 4
    discriminator.freeze(0)
    assert all(p.requires_grad for p in discriminator.parameters())
    discriminator.freeze(4)
    learning = {name.split(".")[0] for name, p in discriminator.named_parameters() if p.requires_grad}
    assert learning == {"rf_big", "rf_small", "decoder_big", "decoder_part", "decoder_small"}
    with pytest.raises(UserError, match=r"freeze_blocks is 5.*64 px has 4"):
        Discriminator(64, 8).freeze(5)


def test_noise_does_not_widen_half_precision():
    layer = NoiseInjection()
    assert layer(torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16
