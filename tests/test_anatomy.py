"""What is shown of the networks' insides is what they computed, and looking changes nothing."""

import numpy as np
import pytest
import torch

from stgan_utils import anatomy, generation
from stgan_utils.fastgan import Discriminator, Generator, NoiseInjection, small_view


def networks(size):
    torch.manual_seed(0)
    generator, discriminator = Generator(size, ngf=8, nz=16), Discriminator(size, ndf=8)
    for module in generator.modules():
        if isinstance(module, NoiseInjection):  # 0 at the start: noise of another image would not show
            torch.nn.init.constant_(module.weight, 0.5)
    return generator.eval(), discriminator.train()


@pytest.mark.parametrize("size", [64, 128])
@torch.no_grad()
def test_maps_are_those_of_a_walk_through_the_generator_by_hand(size):
    generator, _ = networks(size)
    taken = anatomy.excitation(generator, 3, [5, 9])
    assert not generator.se_64._forward_hooks and not generator.se_64.main._forward_hooks
    z, noise = generation.latents(generator, 3, [5, 9])
    for (layer, _), plane in zip(generator.noise_layers(), noise, strict=True):
        layer.noise = plane
    coarse = features = generator.init(z)
    for side in (8, 16, 32, 64):
        features = getattr(generator, f"feat_{side}")(features)
    gates = generator.se_64.main(coarse)
    for name, expected in {"coarse": coarse, "gates": gates[:, :, 0, 0], "before": features}.items():
        np.testing.assert_allclose(getattr(taken, name), expected, atol=1e-6)
    np.testing.assert_allclose(taken.after, features * gates, atol=1e-6)
    assert (taken.pictures == generation.sample(generator, 3, [5, 9])).all()


@torch.no_grad()
def test_rebuilt_are_the_decoders_answers_and_the_mode_stays():
    _, discriminator = networks(64)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    rows = anatomy.rebuilt(discriminator, images, quadrant=2)
    assert discriminator.training
    real, whole, from_small, quarter, part = rows.values()
    assert (real == images).all() and (quarter == images[:, 32:, :32]).all()
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    discriminator.eval()
    expected = discriminator.reconstruct(discriminator(x, small_view(x)), 2)
    for shown, tensor in zip((whole, from_small, part), expected, strict=True):
        assert abs(shown.astype(int) - generation.to_uint8(tensor)).max() <= 1
