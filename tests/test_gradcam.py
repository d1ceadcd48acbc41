"""Grad-CAM: for a linear head on averaged maps it has a closed form, computed here without hook or gradient."""

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import update_bn

from stgan_utils.backbone import IMAGENET_SCALING
from stgan_utils.classifier import Classifier, to_float
from stgan_utils.gradcam import _enlarged, grad_cam
from stgan_utils.lesions import CLASSES, PRIOR_TRAINING_ORDER

SIZE = 96  # maps of 3 × 3


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(pictures):
    torch.manual_seed(0)
    model = Classifier({"size": SIZE, **IMAGENET_SCALING}, PRIOR_TRAINING_ORDER)  # codes are no positions
    update_bn([torch.from_numpy(pictures)], model)
    return model.eval()


def by_hand(model, images, codes):
    """Weights of the head in place of gradients: their mean over the H × W cells is w / HW, and HW drops out."""
    with torch.no_grad():
        features = model.features((to_float(torch.from_numpy(images)) - model.mean) / model.std)
        weights = model.head[1].weight[[model.classes.index(code) for code in codes]]
        maps = torch.einsum("nk,nkhw->nhw", weights, features).clamp_min(0).numpy()
    cells, pixels = np.arange(0, SIZE, 32), np.arange(SIZE)
    for axis in (1, 2):
        maps = np.apply_along_axis(lambda line: np.interp(pixels, cells, line), axis, maps)
    return maps / maps.max((1, 2), keepdims=True).clip(1e-12)


def test_equals_the_closed_form(model, pictures):
    maps = grad_cam(model, pictures, CLASSES)
    assert maps.shape == (7, SIZE, SIZE) and maps.dtype == np.float32
    assert maps.min() >= 0 and np.isclose(maps.max((1, 2)), 1).sum() >= 5  # the others' class has nothing for it
    assert np.allclose(maps, by_hand(model, pictures, CLASSES), atol=1e-4)


def test_depends_on_the_class_and_on_its_own_image_alone(model, pictures):
    maps = grad_cam(model, pictures, ["MEL"] * 7)
    assert not np.allclose(maps, grad_cam(model, pictures, ["NV"] * 7), atol=0.1)
    assert np.allclose(maps[2:3], grad_cam(model, pictures[2:3], ["MEL"]), atol=1e-3)


def test_leaves_the_model_as_it_was_and_takes_frozen_and_fused_ones(model, pictures):
    before = model.predict_proba(pictures)
    expected = grad_cam(model, pictures, CLASSES)
    assert not model.features._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert before.equals(model.predict_proba(pictures))
    assert np.allclose(grad_cam(model.fused().requires_grad_(False), pictures, CLASSES), expected, atol=1e-2)


def test_a_cell_is_drawn_where_it_looks(model):
    """What the middle of a map depends on, by its gradient in the image, lies around the pixel where it is drawn."""
    size, cell = 320, 5
    image = torch.zeros(1, 3, size, size, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.features(image)[0, :, cell, cell].sum(), image)
    strength = gradient.square().sum((0, 1))
    looked_at = (strength.sum(0) * torch.arange(size)).sum() / strength.sum()
    spot = torch.zeros(1, 1, 10, 10)
    spot[0, 0, cell, cell] = 1
    row, column = divmod(_enlarged(spot, size)[0].argmax().item(), size)
    assert row == column == 32 * cell
    assert abs(looked_at - column) < 5 < abs(looked_at - (32 * cell + 15.5))


def test_nothing_for_a_class_is_a_map_of_zeros(model, pictures):
    silent = Classifier(model.preprocessing, model.classes, model.features)
    torch.nn.init.constant_(silent.head[1].weight, -1)  # features are never negative, so all of them speak against it
    assert not grad_cam(silent, pictures[:1], ["DF"]).any()
