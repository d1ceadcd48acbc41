"""Each loss against an independent computation."""

import numpy as np
import pytest
import torch
from torchvision.models import VGG16_Weights, squeezenet1_1

from stgan_utils import backbone as bb
from stgan_utils.config import UserError
from stgan_utils.losses import Projector, barlow_twins, hinge_d_loss, hinge_g_loss, perceptual_distance


def test_hinge_is_the_plain_sum():
    real, fake = torch.randn(8, 50), torch.randn(8, 50)
    torch.manual_seed(3)
    got = [value.item() for value in hinge_d_loss(real, fake)]
    torch.manual_seed(3)
    margins = 0.8 + 0.2 * torch.rand(8, 50).numpy(), 0.8 + 0.2 * torch.rand(8, 50).numpy()
    assert got[0] == pytest.approx(np.maximum(0, margins[0] - real.numpy()).mean(), rel=1e-5)
    assert got[1] == pytest.approx(np.maximum(0, margins[1] + fake.numpy()).mean(), rel=1e-5)
    assert hinge_g_loss(fake).item() == pytest.approx(-fake.numpy().mean(), rel=1e-5)


def test_hinge_of_half_precision_logits_bears_the_first_scale_of_fp16():
    logits = torch.randn(2, 50, dtype=torch.float16, requires_grad=True)
    for loss in (*hinge_d_loss(logits, logits), hinge_g_loss(logits)):
        (gradient,) = torch.autograd.grad(torch.amp.GradScaler("cpu").scale(loss), logits)
        assert loss.dtype is torch.float32 and gradient.isfinite().all() and gradient.any()


def test_hinge_signs_and_margin_bounds():
    one = torch.ones(100, 100)
    real, fake = hinge_d_loss(one, -one)  # confidently right: nothing to learn
    assert real == 0 and fake == 0
    real, fake = hinge_d_loss(-3 * one, 3 * one)  # wrong: 3 + margin, which is 0.9 on average
    assert real.item() == pytest.approx(3.9, abs=0.01) and fake.item() == pytest.approx(3.9, abs=0.01)
    # Margins lie in [0.8, 1): just below 0.8 every logit still counts, and none costs more than 1.
    logits = torch.full((100, 100), 0.8, requires_grad=True)
    real, _ = hinge_d_loss(logits - 1e-4, -one)
    real.backward()
    assert (logits.grad != 0).all() and 0.09 < real.item() < 0.11
    assert max(hinge_d_loss(torch.zeros(1), torch.zeros(1))[0].item() for _ in range(1000)) < 1
    assert hinge_g_loss(3 * one) < hinge_g_loss(one)  # the generator wants high logits


def test_barlow_twins_closed_form():
    z_a = np.array([[1.0, 2.0, 0.5], [3.0, -1.0, 0.0], [0.0, 4.0, 1.0], [2.0, 1.0, -2.0]])
    z_b = np.array([[1.5, 1.0, 2.0], [2.0, 0.0, 1.0], [0.0, 3.0, -1.0], [1.0, 2.0, 0.0]])
    c = np.corrcoef(z_a.T, z_b.T)[:3, 3:]
    on = np.mean((1 - np.diag(c)) ** 2)
    off = np.mean([c[i, j] ** 2 for i in range(3) for j in range(3) if i != j])
    got = barlow_twins(torch.tensor(z_a), torch.tensor(z_b))
    assert got[0].item() == pytest.approx(on, rel=1e-4) and got[1].item() == pytest.approx(off, rel=1e-4)


def test_barlow_twins_of_equal_and_of_unrelated_views():
    torch.manual_seed(0)
    batch = 2000
    z_a, z_b = torch.randn(2, batch, 32)
    equal_on, equal_off = barlow_twins(z_a, z_a)
    on, off = barlow_twins(z_a, z_b)
    assert equal_on.item() == pytest.approx(0, abs=1e-6)
    assert on.item() == pytest.approx(1, abs=0.03) and off.item() == pytest.approx(1 / batch, rel=0.15)
    assert equal_on + 0.5 * equal_off < on + 0.5 * off
    collapsed = z_a[:, :1].expand(-1, 32)  # every dimension the same
    assert barlow_twins(collapsed, collapsed)[1].item() == pytest.approx(1, abs=1e-3)


def test_barlow_twins_does_not_depend_on_scale_shift_or_dimension():
    torch.manual_seed(0)
    z_a, z_b = torch.randn(2, 64, 16)
    moved = z_a * torch.logspace(-1, 2, 16) + torch.linspace(-5, 5, 16)
    for got, expected in zip(barlow_twins(moved, z_b), barlow_twins(z_a, z_b), strict=True):
        assert got.item() == pytest.approx(expected.item(), rel=1e-3)
    narrow, wide = (barlow_twins(*torch.randn(2, 64, dimensions)) for dimensions in (16, 256))
    assert narrow[0].item() == pytest.approx(wide[0].item(), rel=0.15)
    assert narrow[1].item() == pytest.approx(wide[1].item(), rel=0.15)


def test_barlow_twins_is_float32_and_trains_the_projector():
    z = torch.randn(8, 4, dtype=torch.bfloat16)
    assert all(value.dtype == torch.float32 for value in barlow_twins(z, z))
    projector = Projector(12, 6)
    on, off = barlow_twins(projector(torch.randn(8, 12)), projector(torch.randn(8, 12)))
    (on + off).backward()
    assert projector(torch.randn(8, 12)).shape == (8, 6)
    assert all(torch.isfinite(p.grad).all() for p in projector.parameters())


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Torch's cache is an empty folder (returned) and every download fails."""

    def fail(*_, **__):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return tmp_path


def check_distance(distance):
    torch.manual_seed(0)
    images, targets = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    images.requires_grad_(), targets.requires_grad_()
    value = distance(images, targets)
    value.backward()
    assert value.shape == () and value > 0
    assert images.grad.abs().sum() > 0
    assert targets.grad is None
    assert not any(p.requires_grad for p in distance.parameters())
    assert distance(targets, targets).item() == pytest.approx(0, abs=1e-7)
    nearer = targets.detach() + 0.05 * torch.randn_like(targets)
    assert distance(nearer, targets) < value
    both = distance(torch.cat([images, nearer]), targets).item()  # two pictures of each target
    assert both == pytest.approx((value.item() + distance(nearer, targets).item()) / 2, rel=1e-4)


def test_l1():
    distance = perceptual_distance("l1")
    check_distance(distance)
    a, b = torch.randn(2, 2, 3, 8, 8)
    assert distance(a, b).item() == pytest.approx(np.abs(a.numpy() - b.numpy()).mean(), rel=1e-5)


def test_mobilenet(backbone, monkeypatch):
    monkeypatch.setenv(bb.VARIABLE, str(backbone))
    check_distance(perceptual_distance("mobilenet"))


def test_mobilenet_scales_images_as_its_weights_want(backbone, monkeypatch):
    monkeypatch.setenv(bb.VARIABLE, str(backbone))
    loaded = bb.load_backbone(required=True)
    mean, std = (torch.tensor(loaded.preprocessing[name])[:, None, None] for name in ("mean", "std"))
    pair = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x, expected = (pair.flatten(0, 1) - mean) / std, 0
    with torch.no_grad():
        for depth, layer in enumerate(loaded.features.eval()[:14]):
            x = layer(x)
            if depth in (1, 3, 6, 13):
                unit = x / x.norm(dim=1, keepdim=True)
                expected += (unit[0] - unit[1]).square().sum(0).mean().item() / 4
        got = perceptual_distance("mobilenet")(*(pair * 2 - 1)).item()  # it takes them in [-1, 1]
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")  # lpips calls it the old way
def test_squeeze_reads_the_file_that_the_error_asks_for(offline):
    with pytest.raises(UserError, match=r"squeezenet1_1-b8a52dc0\.pth") as error:
        perceptual_distance("squeeze")
    folder = offline / "hub" / "checkpoints"
    assert str(folder) in str(error.value)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(squeezenet1_1(weights=None).state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    distance = perceptual_distance("squeeze")
    check_distance(distance)
    images, targets = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    expected = distance.distance(images, targets).mean()  # as the package itself computes it
    assert distance(images, targets).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_vgg_without_weights_says_which_file_and_what_needs_none(offline):
    with pytest.raises(UserError, match=r"'vgg'.*'l1'") as error, torch.device("meta"):  # 500 MB of nothing
        perceptual_distance("vgg")
    assert VGG16_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1] in str(error.value)
    assert str(offline / "hub" / "checkpoints") in str(error.value)


def test_mobilenet_without_weights_says_which_file(monkeypatch, tmp_path):
    monkeypatch.delenv(bb.VARIABLE, raising=False)
    monkeypatch.setattr(bb, "SHARED_FILE", tmp_path / "absent.pth")
    monkeypatch.setattr(bb, "hub_file", lambda url: None)
    with pytest.raises(UserError, match=rf"mobilenet_v2-.*{bb.VARIABLE}"):
        perceptual_distance("mobilenet")
