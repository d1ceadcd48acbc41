"""Models are written with what they are, and read exactly or not at all: ours and FastGAN's own files."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stgan_utils import checkpoints, versions
from stgan_utils.config import UserError
from stgan_utils.fastgan import Discriminator, Generator
from stgan_utils.lesions import CLASSES


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    generator, discriminator = Generator(64, 8, nz=32), Discriminator(64, 8, decoder_width=16)
    with torch.no_grad():
        for _ in range(3):  # BatchNorm statistics and singular vectors that are not the initial ones
            images, small = generator(torch.randn(4, 32), with_small=True)
            discriminator.reconstruct(discriminator(images, small), 0)
        for layer, _ in generator.noise_layers():
            layer.weight.fill_(0.2)
    return generator.eval(), discriminator.eval()


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fastgan_file(path, networks, prefix="module.", **more):
    """A file in FastGAN's own format, from our networks: the names of the tensors are the same."""
    g, d = ({f"{prefix}{name}": t for name, t in net.state_dict().items()} for net in networks)
    torch.save({"g": g, "d": d, **more}, path)
    return path


# --- ours ------------------------------------------------------------------------------------------------------


def test_generator_round_trip(networks, tmp_path):
    generator, path = networks[0], tmp_path / "g.safetensors"
    checkpoints.save_generator(path, generator, {"iteration": 7, "settings": {"size": 64}})
    loaded = checkpoints.load_generator(path)
    assert same_state(loaded, generator) and not loaded.training
    z = torch.randn(3, 32)
    torch.manual_seed(0)
    images = loaded(z)
    assert images.shape == (3, 3, 64, 64)
    torch.manual_seed(0)
    assert torch.equal(images, generator(z))
    header = checkpoints.read_header(path)
    assert header["class_order"] == list(CLASSES) == ["AKIEC", "BCC", "BKL", "DF", "MEL", "NV", "VASC"]
    assert header["architecture"] == {"kind": "fastgan", "size": 64, "ngf": 8, "nz": 32}
    assert header["iteration"] == 7 and header["settings"] == {"size": 64}
    assert header["git_commit"] == versions.git_commit()


def test_training_checkpoint_holds_average_and_live_weights(networks, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    torch.manual_seed(1)
    live = Generator(64, 8, nz=32)
    tensors = {
        **checkpoints.prefixed("generator", live.state_dict()),
        **checkpoints.prefixed("ema", networks[0].state_dict()),
        **checkpoints.prefixed("discriminator", networks[1].state_dict()),
    }
    checkpoints.save(path, tensors, {"architecture": checkpoints.generator_architecture(live)})
    assert same_state(checkpoints.load_generator(path), networks[0])
    assert same_state(checkpoints.load_generator(path, ema=False), live)
    loaded = checkpoints.load_discriminator(path)
    assert same_state(loaded, networks[1]) and not loaded.training and loaded.decoder_width == 16


def test_git_commit_without_git_is_none(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert versions.git_commit() is None


@pytest.mark.parametrize("load", [checkpoints.load_generator, checkpoints.load_discriminator])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_no_such_file(tmp_path, load, name):
    with pytest.raises(UserError, match="There is no file"):
        load(tmp_path / name)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:4], lambda b: b"", lambda b: b"text" * 50])
@pytest.mark.parametrize("load", [checkpoints.load_generator, checkpoints.load_discriminator, checkpoints.read_header])
def test_damaged_file_of_ours(networks, tmp_path, load, damage):
    path = tmp_path / "g.safetensors"
    checkpoints.save_generator(path, networks[0], {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"g\.safetensors is damaged or no checkpoint"):
        load(path)


def test_safetensors_that_hold_something_else(networks, tmp_path):
    path = tmp_path / "other.safetensors"
    checkpoints.save(path, {"classifier.weight": torch.zeros(2)}, {"architecture": {"kind": "mobilenet_v2"}})
    with pytest.raises(UserError, match="holds no FastGAN generator"):
        checkpoints.load_generator(path)
    checkpoints.save_generator(path, networks[0], {})
    with pytest.raises(UserError, match="holds no discriminator"):
        checkpoints.load_discriminator(path)
    checkpoints.save_file({"a": torch.zeros(2)}, path)  # safetensors of somebody else: no header
    with pytest.raises(UserError, match="no checkpoint of this package"):
        checkpoints.load_generator(path)


def test_a_file_of_another_format(networks, tmp_path, monkeypatch):
    path = tmp_path / "g.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", "stgan-2")
        checkpoints.save_generator(path, networks[0], {})
        assert checkpoints.read_header(path)["format"] == "stgan-2"
    with pytest.raises(UserError, match="has the format 'stgan-2', this version reads 'stgan-1'"):
        checkpoints.load_generator(path)


@pytest.mark.parametrize("change", ["missing", "left over", "shape"])
def test_ours_with_other_tensors(networks, tmp_path, change):
    path = tmp_path / "g.safetensors"
    state = checkpoints.prefixed("generator", networks[0].state_dict())
    if change == "missing":
        del state["generator.feat_32.1.weight_orig"]
    elif change == "left over":
        state["generator.feat_32.9.weight"] = torch.zeros(1)
    else:
        state["generator.feat_32.1.weight_orig"] = torch.zeros(1, 2, 3, 3)
    checkpoints.save(path, state, {"architecture": checkpoints.generator_architecture(networks[0])})
    with pytest.raises(UserError, match=r"g\.safetensors does not fit.*feat_32"):
        checkpoints.load_generator(path)


# --- FastGAN's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
def test_fastgan_file(networks, tmp_path, prefix):
    path = fastgan_file(tmp_path / "70000.pth", networks, prefix)
    generator, discriminator = checkpoints.load_generator(path), checkpoints.load_discriminator(path)
    assert same_state(generator, networks[0]) and same_state(discriminator, networks[1])
    assert not generator.training and not discriminator.training
    assert (generator.size, generator.ngf, generator.nz, discriminator.decoder_width) == (64, 8, 32, 16)


@pytest.mark.parametrize("size", [128, 256, 512])
def test_sizes_are_read_from_the_tensors(tmp_path, size):
    networks = Generator(size, 8, nz=16), Discriminator(size, 8)
    path = fastgan_file(tmp_path / "1.pth", networks)
    assert same_state(checkpoints.load_generator(path), networks[0])
    assert same_state(checkpoints.load_discriminator(path), networks[1])


def test_average_is_a_list_in_parameter_order(networks, tmp_path):
    average = [torch.randn_like(p) for p in networks[0].parameters()]
    path = fastgan_file(tmp_path / "all_70000.pth", networks, g_ema=average, opt_g={}, opt_d={})
    averaged, live = checkpoints.load_generator(path), checkpoints.load_generator(path, ema=False)
    assert all(torch.equal(p, a) for p, a in zip(averaged.parameters(), average, strict=True))
    assert same_state(live, networks[0])
    for (name, buffer), expected in zip(averaged.named_buffers(), networks[0].buffers(), strict=True):
        assert torch.equal(buffer, expected), name  # an average has none: those of the live network


@pytest.mark.parametrize("how", ["short", "long", "shapes", "no list"])
def test_average_that_does_not_match(networks, tmp_path, how):
    average = [p.detach().clone() for p in networks[0].parameters()]
    average = {"short": average[:-1], "long": [*average, average[0]], "shapes": average[::-1], "no list": 5}[how]
    path = fastgan_file(tmp_path / "all_1.pth", networks, g_ema=average)
    with pytest.raises(UserError, match=r"g_ema.*does not match"):
        checkpoints.load_generator(path)
    checkpoints.load_generator(path, ema=False)


@pytest.mark.parametrize(("part", "load"), [("g", checkpoints.load_generator), ("d", checkpoints.load_discriminator)])
def test_keys_missing_or_left_over(networks, tmp_path, part, load):
    path = fastgan_file(tmp_path / "1.pth", networks)
    whole = torch.load(path, weights_only=True)
    for name in list(whole[part])[::20]:
        if name.endswith("num_batches_tracked"):
            continue
        torch.save({**whole, part: {k: v for k, v in whole[part].items() if k != name}}, path)
        with pytest.raises(UserError, match=r"missing|does not fit"):
            load(path)
    torch.save({**whole, part: {**whole[part], "module.extra.weight": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=r"0 keys missing.*1 left over.*extra\.weight"):
        load(path)


@pytest.mark.parametrize("load", [checkpoints.load_generator, checkpoints.load_discriminator])
@pytest.mark.parametrize(
    "contents",
    [[1, 2], {}, {"g": 3, "d": 3}, {"g": {}, "d": {}}, {"state_dict": {"a": torch.zeros(1)}}, torch.zeros(3)]
    + [{part: {name: 5} for part in "gd"} for name in ("init.init.0.weight_orig", "down_from_big.0.weight_orig")]
    + [{part: {"init.init.0.weight_orig": torch.zeros(2, 256, 4, 4)} for part in "gd"}],
)
def test_pytorch_files_that_are_no_fastgan(tmp_path, load, contents):
    path = tmp_path / "1.pth"
    torch.save(contents, path)
    with pytest.raises(UserError, match=r"1\.pth"):
        load(path)


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_not_executed(tmp_path, zipped):
    path, mark = tmp_path / "all_1.pth", tmp_path / "executed"
    contents = {"g": Payload(mark), "d": Payload(mark), "g_ema": []}
    if zipped:
        torch.save(contents, path)
    else:
        path.write_bytes(pickle.dumps(contents, protocol=2))
    for load in (checkpoints.load_generator, checkpoints.load_discriminator):
        with pytest.raises(UserError, match="not opened"):
            load(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # it would have been


def test_any_bytes_are_one_sentence(networks, tmp_path):
    path = fastgan_file(tmp_path / "1.pth", networks)
    whole = path.read_bytes()
    stream = torch.Generator().manual_seed(0)
    noise = [bytes(torch.randint(256, (40,), generator=stream).tolist()) for _ in range(60)]
    # The second kind starts as a pickle does.
    for contents in [whole[: len(whole) // 2], whole[:100], b"", b"text", *noise, *(b"\x80\x02" + n for n in noise)]:
        path.write_bytes(contents)
        with pytest.raises(UserError, match=r"1\.pth"):
            checkpoints.load_generator(path)


REFERENCE = """
import sys

import torch

folder, path = sys.argv[1:]
sys.path.insert(0, folder)
import models

torch.manual_seed(0)
generator = models.Generator(ngf=16, nz=256, im_size={size})
discriminator = models.Discriminator(ndf=16, im_size={size})
with torch.no_grad():
    for _ in range(3):
        images = generator(torch.randn(4, 256))
        discriminator(images, "real")
    for name, weight in generator.named_parameters():
        if weight.shape == (1,):
            weight.fill_(0.3)
generator.eval(), discriminator.eval()
z = torch.randn(2, 256)
torch.manual_seed(1)
with torch.no_grad():
    images = generator(z)
    logits, rebuilt, part = discriminator(images, "real")
state = {{"module." + k: v for k, v in generator.state_dict().items()}}
average = [p.detach().clone() for p in generator.parameters()]
torch.save({{"g": state, "d": discriminator.state_dict(), "g_ema": average}}, path + "/all_1.pth")
torch.save({{"z": z, "images": images, "logits": logits, "rebuilt": rebuilt, "part": part}}, path + "/made.pth")
"""


@pytest.mark.parametrize("size", [256, 512])
def test_the_public_code_makes_the_same_images(tmp_path, size):
    """Against a clone of FastGAN's public code, run by itself in a process of its own."""
    folder = os.environ.get("FASTGAN_REFERENCE", "")
    if not (Path(folder) / "models.py").exists() or not folder:
        pytest.skip("FASTGAN_REFERENCE names no clone of FastGAN's public code")
    subprocess.run([sys.executable, "-c", REFERENCE.format(size=size), folder, str(tmp_path)], check=True, cwd=folder)
    made = torch.load(tmp_path / "made.pth", weights_only=True)
    generator = checkpoints.load_generator(tmp_path / "all_1.pth")
    discriminator = checkpoints.load_discriminator(tmp_path / "all_1.pth")
    assert (generator.size, discriminator.size, discriminator.decoder_width) == (size, size, 32)
    torch.manual_seed(1)
    with torch.no_grad():
        images, small = generator(made["z"], with_small=True)
        judged = discriminator(images, small)
        rebuilt = discriminator.reconstruct(judged, made["part"])
    big, little = judged.logits.reshape(2, 2, 25).unbind(1)
    theirs = torch.cat([big.flatten(), little.flatten()])
    pairs = [(images, made["images"][0]), (small, made["images"][1]), (theirs, made["logits"])]
    for ours, reference in [*pairs, *zip(rebuilt, made["rebuilt"], strict=True)]:
        assert torch.allclose(ours, reference, atol=1e-4)
    assert images.std() > 0.01
