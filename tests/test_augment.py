"""DiffAugment against plain loops with the same random numbers."""

import numpy as np
import pytest
import torch

from stgan_utils.augment import color, diff_augment, translation
from stgan_utils.config import UserError


def test_color_is_its_formula():
    images = torch.randn(5, 3, 6, 6)
    torch.manual_seed(1)
    got = color(images).numpy()
    torch.manual_seed(1)
    brightness, saturation, contrast = torch.empty(3, 5, 1, 1, 1).uniform_().numpy().reshape(3, 5)
    for i, image in enumerate(images.numpy()):
        x = image + brightness[i] - 0.5
        grey = x.mean(0)
        x = grey + (x - grey) * 2 * saturation[i]
        x = x.mean() + (x - x.mean()) * (0.5 + contrast[i])
        np.testing.assert_allclose(got[i], x, atol=1e-5)


def test_color_ranges_for_every_image_by_itself():
    count = 2000
    # Flat grey: only brightness shows.
    change = color(torch.zeros(count, 3, 2, 2)).mean((1, 2, 3))
    assert -0.5 <= change.min() < -0.48 and 0.48 < change.max() <= 0.5 and change.unique().numel() > count * 0.99
    # A grey pattern: only contrast changes its range of 2.
    pattern = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).expand(count, 3, 2, 2)
    out = color(pattern)
    spread = (out.amax((1, 2, 3)) - out.amin((1, 2, 3))) / 2
    assert 0.499 <= spread.min() < 0.52 and 1.48 < spread.max() <= 1.501
    # Flat colours: saturation (0 … 2) times contrast (0.5 … 1.5).
    flat = torch.tensor([-1.0, 0.0, 1.0])[:, None, None].expand(count, 3, 2, 2)
    out = color(flat)
    spread = (out.amax((1, 2, 3)) - out.amin((1, 2, 3))) / 2
    assert spread.min() < 0.05 and 2.5 < spread.max() <= 3.001


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 40)])
def test_translation_is_the_plain_loop(height, width):
    images = torch.randn(12, 3, height, width)
    torch.manual_seed(2)
    got = translation(images).numpy()
    torch.manual_seed(2)
    reach = height // 8, width // 8
    down = torch.randint(-reach[0], reach[0] + 1, (12, 1)).flatten().tolist()
    right = torch.randint(-reach[1], reach[1] + 1, (12, 1)).flatten().tolist()
    assert len(set(zip(down, right, strict=True))) > 1
    expected = np.zeros_like(got)
    for i, image in enumerate(images.numpy()):
        for row in range(height):
            for column in range(width):
                y, x = row + down[i], column + right[i]
                if 0 <= y < height and 0 <= x < width:
                    expected[i, :, row, column] = image[:, y, x]
    np.testing.assert_array_equal(got, expected)
    assert translation(images).is_contiguous()  # in any other layout the networks would follow it


def test_translation_reaches_an_eighth_both_ways():
    rows = torch.arange(1.0, 17.0)[None, None, :, None].expand(400, 1, 16, 16)
    centre = translation(rows)[:, 0, 8, 8]
    assert set(centre.tolist()) == {7.0, 8.0, 9.0, 10.0, 11.0}  # 9 ± 2


@pytest.mark.parametrize("policy", ["color", "translation", "color,translation"])
def test_gradients_flow_through(policy):
    def seeded(images):
        torch.manual_seed(4)
        return diff_augment(images, policy)

    assert torch.autograd.gradcheck(
        seeded, torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True), fast_mode=True
    )


def test_policies_are_applied_in_their_order():
    images = torch.randn(3, 3, 16, 16)
    torch.manual_seed(5)
    got = diff_augment(images, "color,translation")
    torch.manual_seed(5)
    assert torch.equal(got, translation(color(images)))


def test_no_policy_changes_nothing_and_an_unknown_one_is_named():
    images = torch.randn(2, 3, 8, 8)
    assert diff_augment(images, "") is images
    with pytest.raises(UserError, match=r"'cutout'.*color, translation"):
        diff_augment(images, "color,cutout")
