"""`generate`, older and halved weights, and what a release makes of a run."""

import json
import math
import re
import shutil
import sys

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.optim.swa_utils import update_bn

from stgan_utils import __main__ as cli
from stgan_utils import checkpoints, classifier, data, files, generation, release, versions, weights
from stgan_utils.config import UserError
from stgan_utils.fastgan import Discriminator, Generator
from stgan_utils.lesions import CLASSES, MINORITY


def trained(seed=0):
    """As if trained: with BatchNorm statistics of its own, so that latent and noise show."""
    torch.manual_seed(seed)
    generator = Generator(64, 8, nz=32)
    with torch.no_grad():
        for layer, _ in generator.noise_layers():
            layer.weight.fill_(0.1)
        for module in generator.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        for _ in range(3):
            generator(torch.randn(8, 32))
    return generator.eval()


@pytest.fixture(scope="module")
def generator():
    return trained()


@pytest.fixture(scope="module")
def checkpoint(generator, tmp_path_factory):
    file = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
    checkpoints.save_generator(file, generator, {"settings": {"lesion": "DF"}, "iteration": 5})
    return file


def furthest(a, b):
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["stgan_utils", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


# --- generate ---------------------------------------------------------------------------------------------------


def test_generate(generator, checkpoint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ("--weights", checkpoint, "--count", 11, "--out", out, "--seed", 3, "--truncation", 0.7)
    code, said, err = command(monkeypatch, capsys, "generate", *words)
    assert code == 0 and "11 images" in said, err
    rows = pd.read_csv(out / "synthetic.csv")
    assert rows["file"].tolist() == [f"images/DF_{i:04d}.png" for i in range(1, 12)]
    assert (rows["truncation"] == 0.7).all() and (rows["seed"] == 3).all() and (rows["class"] == "DF").all()
    assert (rows["checkpoint_sha256"] == files.sha256(checkpoint)).all()
    expected = generation.sample(generator, 3, range(11), truncation=0.7)
    assert furthest(expected, generation.sample(generator, 3, range(11))) > 10
    written = [np.asarray(Image.open(out / file)) for file in rows["file"]]
    assert furthest(written, expected) <= 1
    grid = np.asarray(Image.open(out / "grid.png"))
    assert grid.shape == (128, 512, 3)
    assert np.array_equal(grid[:64, 64:128], written[1]) and np.array_equal(grid[64:, 128:192], written[10])
    assert (grid[64:, 192:] == 255).all()
    with Image.open(out / "interpolation.gif") as film:
        assert film.n_frames == 72 and film.size == (64, 64) and film.info["loop"] == 0
    assert sorted(file.name for file in out.iterdir()) == ["grid.png", "images", "interpolation.gif", "synthetic.csv"]

    code, _, err = command(monkeypatch, capsys, "generate", *words)
    assert code == 2 and "is there already: let --out name a new folder" in err and err.count("\n") == 1


def test_generate_again_is_the_same_bytes(checkpoint, tmp_path):
    for name in "ab":
        generation.generate(checkpoint, 3, tmp_path / name, seed=1)
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"count": 0}, "count is 0.*at least 1"),
        ({"seed": -1}, "seed -1"),
        ({"truncation": 0.0}, "truncation 0"),
        ({"truncation": math.nan}, "truncation nan"),
        ({"code": "../x"}, "lesion is '../x'"),
    ],
)
def test_wrong_numbers(checkpoint, tmp_path, wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        generation.generate(checkpoint, **{"count": 1, "folder": tmp_path / "out", **wrong})
    assert not any(tmp_path.iterdir())


def test_the_folder_that_one_is_in_is_refused_before_anything_is_drawn(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="let --out name a new one"):
        generation.generate(checkpoint, 1, ".")


def test_a_failure_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("killed")

    monkeypatch.setattr(generation, "interpolation", fail)
    with pytest.raises(RuntimeError):
        generation.generate(checkpoint, 2, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_truncation_scales_the_latent_and_not_the_noise(generator):
    z, noise = generation.latents(generator, 1, [4])
    less, same = generation.latents(generator, 1, [4], truncation=0.5)
    assert torch.equal(less, z * 0.5) and all(torch.equal(a, b) for a, b in zip(noise, same, strict=True))


def test_slerp_keeps_to_the_circle():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    for share in (0.0, 0.25, 0.5, 1.0):
        angle = share * math.pi / 2
        expected = torch.tensor([2 * math.cos(angle), 2 * math.sin(angle)])
        assert torch.allclose(generation.slerp(a, b, share), expected, atol=1e-6)


def test_interpolation_passes_the_images_and_closes(generator):
    frames = generation.interpolation(generator, 3, stops=3, steps=4)
    assert frames.shape == (12, 64, 64, 3)
    assert furthest(frames[0], generation.sample(generator, 3, [0])[0]) <= 1
    steps = [np.abs(frames[i].astype(int) - frames[i - 1]).mean() for i in range(12)]  # the first: from last to first
    assert max(steps) < 3 * np.median(steps)
    z, noise = generation.latents(generator, 3, range(3))
    second = generation.draw(generator, z[1:2], [plane[:1] for plane in noise])[0]
    assert furthest(frames[4], second) <= 1


# --- other people's and halved weights ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    torch.manual_seed(0)
    return Generator(256, 8, 16)


def renamed(generator, big, small):
    names = {"to_big": big, "to_128": small}
    return {
        ".".join(names.get(part, part) for part in name.split(".")): t for name, t in generator.state_dict().items()
    }


@pytest.mark.parametrize(("big", "small"), [("to_rgb", "to_128"), ("to_big", "to_rgb"), ("to_rgb_1", "to_rgb_0")])
def test_older_names_are_told_by_the_kernel(large, tmp_path, big, small):
    torch.save({"g": renamed(large, big, small)}, tmp_path / "1.pth")
    loaded = checkpoints.load_generator(tmp_path / "1.pth").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in large.state_dict().items())


@pytest.mark.parametrize("small", [True, False])
def test_two_outputs_under_one_name_are_refused(large, tmp_path, small):
    """What the prior system's notebooks did: both became `to_rgb`, the second overwrote the first, and nobody saw."""
    state = renamed(large, "to_rgb", "lost") if small else renamed(large, "lost", "to_rgb")
    state = {name: t for name, t in state.items() if not name.startswith("lost")}
    torch.save({"g": state}, tmp_path / "1.pth")
    with pytest.raises(UserError, match=rf"keys missing \['to_{'128' if small else 'big'}"):
        checkpoints.load_generator(tmp_path / "1.pth")


def test_ambiguous_and_strange_outputs_are_refused(large, tmp_path):
    state = renamed(large, "to_rgb", "to_128")
    both = state | {name.replace("to_rgb", "to_big"): t for name, t in state.items() if name.startswith("to_rgb")}
    strange = state | {"to_rgb.weight_orig": torch.zeros(3, 4, 5, 5)}
    twice = state | {f"module.{name}": t for name, t in state.items()}
    for wrong, sentence in (
        (both, "are both 'to_big'"),
        (strange, "neither a 1×1 nor a 3×3"),
        (twice, "with and without 'module.'"),
    ):
        torch.save({"g": wrong}, tmp_path / "1.pth")
        with pytest.raises(UserError, match=sentence):
            checkpoints.load_generator(tmp_path / "1.pth")


def test_convert(tmp_path, monkeypatch, capsys):
    live, averaged, critic = trained(), trained(seed=1), Discriminator(64, 8)
    source, target = tmp_path / "all_1.pth", tmp_path / "out" / "ours.safetensors"
    g = {f"module.{name}": tensor for name, tensor in live.state_dict().items()}
    torch.save({"g": g, "d": critic.state_dict(), "g_ema": list(averaged.parameters())}, source)
    assert command(monkeypatch, capsys, "weights", "convert", source, target)[:2] == (0, f"{target}\n")
    for load in (
        checkpoints.load_generator,
        lambda file: checkpoints.load_generator(file, ema=False),
        checkpoints.load_discriminator,
    ):
        before, after = load(source).state_dict(), load(target).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())
    assert checkpoints.read_header(target)["converted_from"] == files.sha256(source)
    code, _, err = command(monkeypatch, capsys, "weights", "convert", source, tmp_path / "ours.pth")
    assert code == 2 and "end in .safetensors" in err
    before = target.read_bytes()
    code, _, err = command(monkeypatch, capsys, "weights", "convert", target, target)  # much of it would be left out
    assert code == 2 and "one of our files already" in err and target.read_bytes() == before
    source.write_bytes(source.read_bytes()[:-5000])
    code, _, err = command(monkeypatch, capsys, "weights", "convert", source, tmp_path / "two.safetensors")
    assert code == 2 and "all_1.pth" in err and not (tmp_path / "two.safetensors").exists()


def test_half_precision_is_loaded_as_float32(generator, checkpoint, tmp_path):
    tensors, header = checkpoints.load(checkpoint)
    checkpoints.save(tmp_path / "half.safetensors", release.half(tensors), header)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * checkpoint.stat().st_size
    loaded = checkpoints.load_generator(tmp_path / "half.safetensors")
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32, torch.int64}
    assert furthest(generation.sample(loaded, 0, range(16)), generation.sample(generator, 0, range(16))) <= 2


# --- a release --------------------------------------------------------------------------------------------------


def save_classifier(file):
    torch.manual_seed(0)
    model = classifier.Classifier({"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3})
    update_bn([torch.rand(8, 3, 64, 64)], model)  # else its features are nearly the same for all images
    model.answering["weights"] = dict.fromkeys(CLASSES, 1.0) | {"NV": 1.25}
    model.eval().save(file)
    return file


@pytest.fixture(scope="module")
def finished(phantom_dir, tmp_path_factory):
    """A run folder as far as a release reads it; nothing in it is trained."""
    run_dir = tmp_path_factory.mktemp("run")
    table = data.load_dataset(phantom_dir).iloc[:140].copy()
    table["label"] = [CLASSES[i % 7] for i in range(140)]
    table["lesion_id"] = [f"L{i}" for i in range(140)]
    table["split"] = [("train", "train", "val", "test")[i // 7 % 4] for i in range(140)]
    data.save_table(table, run_dir / "00_start_here" / "table.csv")

    def result(step, numbers, settings=()):
        common = {"data": "phantom", "data_name": "phantom, n = 140", "profile": "smoke"}
        files.write_json(
            run_dir / step / "result.json", common | {"numbers": numbers, "settings": {"seed": 0, **dict(settings)}}
        )

    result("00_start_here", {"counts": {code: {"train": 10, "val": 5, "test": 5} for code in CLASSES}})
    save_classifier(run_dir / "01_baseline" / "model.safetensors")
    for seed, step in enumerate(["02_stage1_global_gan", *(f"03_stage2_{code}" for code in MINORITY)]):
        lesion = {"lesion": step.split("_")[-1]} if "stage2" in step else {}
        settings = {"iterations": 9, "ngf": 8, "start_from": "", **lesion}
        header = {"settings": settings, "iteration": 7}
        checkpoints.save_generator(run_dir / step / "best.safetensors", trained(seed=seed), header)
        memorised = {kind: {"nearer": 0.5, "p_value": 0.4} for kind in ("feature", "hash")}
        result(step, {"memorisation": memorised | {"n": 16, "n_control": 5}}, settings)
    critic = checkpoints.prefixed("discriminator", Discriminator(64, 8).state_dict())
    checkpoints.save(run_dir / "02_stage1_global_gan" / "checkpoint.safetensors", critic, {})
    return run_dir


@pytest.fixture(scope="module")
def chosen(finished):
    """A recipe's folder as `arms` leaves it: judged after the train split, gone on with all images."""
    arm = finished / "arms" / "release"
    for part, more in (("seed0", {"validation": {"epoch": 1}}), ("refit", {})):
        model = save_classifier(arm / part / "model.safetensors")
        known = {"arm": "release", "model_sha256": files.sha256(model), "training_images": {"real": {"NV": 9}}}
        files.write_json(arm / part / "result.json", known | more)
    accuracy = {"balanced_accuracy": {"value": 0.6, "low": 0.5, "high": 0.7}}
    files.write_json(arm / "seed0" / "test" / "result.json", {"images": 35, "metrics": accuracy})
    return arm


@pytest.fixture
def repository(tmp_path, monkeypatch):
    manifest = files.read_json(weights.MANIFEST)  # before any release
    manifest["assets"] = [asset for asset in manifest["assets"] if not asset["sources"]["repo"]]
    files.write_json(tmp_path / "weights_manifest.json", manifest)
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    monkeypatch.setattr(weights, "MANIFEST", tmp_path / "weights_manifest.json")
    monkeypatch.setenv("STGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(release, "GENERATED", 16)
    return tmp_path


def test_release(finished, chosen, repository, phantom_dir, monkeypatch, capsys):
    before = set(weights.manifest())
    words = ("weights", "release", finished, "--classifier", chosen / "refit")
    code, said, err = command(monkeypatch, capsys, *words)
    assert code == 0, err
    assert said.splitlines()[-1].startswith("together")
    manifest = json.loads(weights.MANIFEST.read_text())
    jsonschema.validate(manifest, json.loads(release.SCHEMA.read_text()))
    made = {"stage1-64px", "classifier-mobilenetv2", *(f"stage2-{code.lower()}-64px" for code in MINORITY)}
    assert set(weights.manifest()) == before | made
    assert {wrong for name, _, wrong in weights.verify() if name in made} == {None}
    assert sum(weights.entry(name)["bytes"] for name in made) < 20e6
    left = {file.name for file in (repository / "weights").iterdir()}
    assert left == {f"{name}.safetensors" for name in made} | {"samples.png", "README.md"}
    assert Image.open(repository / "weights" / "samples.png").size == (512, 448)

    entry = weights.entry("stage2-vasc-64px")
    assert entry["lesion_class"] == "VASC" and entry["architecture"] == {
        "kind": "fastgan",
        "size": 64,
        "ngf": 8,
        "nz": 32,
    }
    assert entry["trained_on"]["iterations"] == 7 and entry["trained_on"]["commit"] == versions.git_commit()
    assert entry["trained_on"]["command"].endswith("smoke --out RUN -p stage1.iterations 9 -p stage2.iterations 9")
    assert entry["trained_on"]["data"] == "phantom, n = 140: the 10 images of VASC in the train split"
    assert weights.entry("stage1-64px")["trained_on"]["data"].endswith("the 70 images in the train split")
    distances = entry["figures"]["kid_held_out"]["VASC"], entry["figures"]["kid_held_out_of_stage1"]["VASC"]
    for figures in distances:
        assert figures["low"] < figures["kid"] < figures["high"] and figures["real"] == 10
    assert distances[0] != distances[1]
    assert distances[1] == weights.entry("stage1-64px")["figures"]["kid_held_out"]["VASC"]
    assert str(finished) not in weights.MANIFEST.read_text()

    known = weights.entry("classifier-mobilenetv2")
    assert known["figures"]["went_on_with_all_images"] and known["class_order"] == list(CLASSES)
    assert known["figures"]["test"] == {"images": 35, "balanced_accuracy": {"value": 0.6, "low": 0.5, "high": 0.7}}
    assert known["trained_on"]["command"].endswith("arms refit release --run RUN")
    assert "every image" in known["trained_on"]["split"]
    assert known["figures"]["answering"]["weights"]["NV"] == 1.25
    card = (repository / "weights" / "README.md").read_text()
    assert "NV 1.25" in card
    shutil.copy(next(phantom_dir.rglob("*.jpg")), repository / "lesion.jpg")
    monkeypatch.chdir(repository)
    example = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], example)  # as its reader would run it
    assert example["drawn"].shape == (8, 3, 64, 64) and list(example["answers"]) == list(CLASSES)
    baseline = classifier.Classifier.load(chosen / "refit" / "model.safetensors")
    released = classifier.Classifier.load(weights.path("classifier-mobilenetv2"))
    images = np.stack([np.asarray(Image.open(file)) for file in sorted(phantom_dir.rglob("*.jpg"))[:4]])
    assert np.allclose(released.predict_proba(images), baseline.predict_proba(images), atol=5e-3)
    stage1 = weights.path("stage1-64px")
    assert checkpoints.load_discriminator(stage1).size == checkpoints.load_generator(stage1).size == 64

    # What is released serves `generate` by name and `predict` by default.
    code, _, err = command(
        monkeypatch, capsys, "generate", "--weights", "stage2-df-64px", "--count", 2, "--out", repository / "out"
    )
    assert code == 0 and (repository / "out" / "images" / "DF_0002.png").exists(), err
    words = ("predict", "--images", repository / "out" / "images", "--out", repository / "preds.csv")
    assert command(monkeypatch, capsys, *words)[0] == 0
    assert len(pd.read_csv(repository / "preds.csv")) == 2
    file = repository / "weights" / "classifier-mobilenetv2.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for model in ((), ("--model", file)):
        code, _, err = command(monkeypatch, capsys, *words, *model)
        assert code == 2 and "is damaged, or not classifier-mobilenetv2" in err and err.count("\n") == 1


def test_the_model_card_says_what_the_manifest_says(finished, chosen, repository, monkeypatch):
    def distance(self, file, classes):
        if file.stem == "stage1-64px":
            return {code: {"kid": 0.5, "low": 0.45, "high": 0.55, "real": 10, "generated": 16} for code in CLASSES}
        kid = {"stage2-bcc-64px": 0.6, "stage2-df-64px": 0.49}.get(file.stem, 0.4)
        return {c: {"kid": kid, "low": kid - 0.04, "high": kid + 0.04, "real": 10, "generated": 16} for c in CLASSES}

    monkeypatch.setattr(release.HeldOutDistance, "__call__", distance)
    release.release(finished)
    card = (repository / "weights" / "README.md").read_text()
    assert "| BCC | 10 | 0.600 (0.560 – 0.640) | 0.500 (0.450 – 0.550) | **no** |" in card
    assert "| DF | 10 | 0.490 (0.450 – 0.530) | 0.500 (0.450 – 0.550) | yes, but the intervals overlap |" in card
    assert "| MEL | 10 | 0.400 (0.360 – 0.440) | 0.500 (0.450 – 0.550) | yes |" in card
    assert "It is **not** lower for BCC." in card and "samples.png" in card and str(finished) not in card
    for wanted in ("CC BY-NC 4.0", "180161", "Not a medical device", "Memorisation", "phantom, n = 140", "| 16 / 5 |"):
        assert wanted in card, wanted
    for name, asset in weights.manifest().items():
        assert (f"`{name}`" in card and asset["sha256"][:16] in card) == bool(asset["sources"]["repo"])
    assert "predict" not in card and "classifier-mobilenetv2" not in weights.manifest()

    generators = {name: weights.entry(name) for name in ("stage1-64px", "stage2-df-64px")}
    release.release(classifier=chosen / "seed0")
    assert {name: weights.entry(name) for name in generators} == generators
    known = weights.entry("classifier-mobilenetv2")
    assert not known["figures"]["went_on_with_all_images"] and "by lesion" in known["trained_on"]["split"]
    assert "| balanced accuracy | 0.600 (0.500 – 0.700) |" in (repository / "weights" / "README.md").read_text()
    release.release(finished)
    assert weights.entry("classifier-mobilenetv2") == known  # a release without one leaves it alone


def test_a_release_is_refused_whole(finished, chosen, repository, monkeypatch):
    manifest = weights.MANIFEST.read_text()
    monkeypatch.setattr(release, "LIMIT", 1_000_000)
    monkeypatch.setattr(release.HeldOutDistance, "__call__", lambda self, file, classes: dict.fromkeys(CLASSES, 0))
    with pytest.raises(UserError, match=r"MB together, 1 MB may be released"):
        release.release(finished)
    monkeypatch.setattr(release, "FURTHEST", -1)
    with pytest.raises(UserError, match=r"In half precision, pictures of .* change by . grey levels"):
        release.release(finished)
    assert not any((repository / "weights").iterdir()) and weights.MANIFEST.read_text() == manifest
    with pytest.raises(UserError, match=r"Nothing to release"):
        release.release()
    with pytest.raises(UserError, match=r"is not a finished run: 00_start_here, .* is not done"):
        release.release(repository)
    other = repository / "other"
    shutil.copytree(chosen / "refit", other)
    (other / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"tells of another model\.safetensors"):
        release.release(finished, other)
    borrowed = repository / "borrowed"
    shutil.copytree(finished, borrowed)
    stage1 = files.read_json(borrowed / release.STAGE1 / "result.json")
    files.write_json(borrowed / release.STAGE1 / "result.json", stage1 | {"numbers": {"released": "stage1-64px"}})
    with pytest.raises(UserError, match=r"trained nothing in 02_stage1_global_gan: it used released weights"):
        release.release(borrowed)
    with pytest.raises(UserError, match=r"nothing holds no trained classifier: model\.safetensors and result\.json"):
        release.release(finished, repository / "nothing")
