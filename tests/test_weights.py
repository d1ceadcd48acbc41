"""Weights are found where they are, fetched when they are not, never used unchecked; every failure is one sentence."""

import copy
import errno
import hashlib
import http.server
import io
import json
import pickle
import shutil
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import jsonschema
import pytest
import torch

from stgan_utils import __main__ as cli
from stgan_utils import checkpoints, classifier, config, download, weights
from stgan_utils.config import UserError
from stgan_utils.fastgan import Discriminator, Generator
from stgan_utils.lesions import CLASSES, MINORITY
from stgan_utils.profiles import PROFILES

ROOT, SCHEMA = weights.ROOT, weights.ROOT / "stgan_utils" / "weights_manifest.schema.json"
CONTENT = bytes(range(256)) * 2000  # half a megabyte


def asset(name="model", content=CONTENT, repo=None, kaggle=None, url=None, unpack=False):
    return {
        "name": name,
        "stage": "stage1",
        "lesion_class": None,
        "architecture": {"kind": "fastgan", "size": 64, "ngf": 16, "nz": 256},
        "class_order": None,
        "preprocessing": None,
        "file": f"{name}.bin" if not unpack else name,
        "unpack": unpack,
        "bytes": content and len(content),
        "sha256": content and hashlib.sha256(content).hexdigest(),
        "licence": "none",
        "trained_on": {"data": "", "split": "", "iterations": None, "command": None, "commit": None},
        "figures": None,
        "sources": {"repo": repo, "kaggle": kaggle, "url": url},
    }


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository with a manifest, a cache and Kaggle's mounts, all of them empty."""
    monkeypatch.setenv("STGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STGAN_WEIGHTS", raising=False)
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    monkeypatch.setattr(weights, "MANIFEST", tmp_path / "weights_manifest.json")
    monkeypatch.setattr(weights, "KAGGLE_INPUT", tmp_path / "kaggle")
    return tmp_path


def declare(place, *assets):
    manifest = {"format": "stgan-weights-1", "assets": list(assets)}
    jsonschema.validate(manifest, json.loads(SCHEMA.read_text()))
    (place / "weights_manifest.json").write_text(json.dumps(manifest))


def in_cache(place):
    """What a fetch has left, but for the locks."""
    return sorted(file.name for file in (place / "cache" / "weights").iterdir() if not file.name.endswith(".lock"))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append((self.headers["Range"], self.headers["If-Range"]))
        content = server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start = 0
        if self.headers["Range"] and server.ranges and self.headers["If-Range"] in (None, server.etag):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        half = start + (len(content) - start) // 2
        self.wfile.write(content[start:half])
        if server.breaks:
            server.breaks -= 1
            return None
        if server.stalls:
            server.stalls -= 1
            self.wfile.flush()
            time.sleep(server.pause)
        return self.wfile.write(content[half:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """Serves `files`; breaks the connection in the middle `breaks` times, pauses there `stalls` times."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.etag, server.ranges = {"/model": CONTENT}, [], '"1"', True
    server.breaks, server.stalls, server.pause = 0, 0, 1.0
    server.url = f"http://127.0.0.1:{server.server_port}/model"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


# --- the manifest -----------------------------------------------------------------------------------------------


def test_the_manifest_fits_its_schema_and_names_what_is_there():
    manifest = json.loads((ROOT / "weights_manifest.json").read_text())
    jsonschema.validate(manifest, json.loads(SCHEMA.read_text()))
    assets = {each["name"]: each for each in manifest["assets"]}
    assert len(assets) == len(manifest["assets"])
    slugs = {each["sources"]["kaggle"]["slug"] for each in assets.values() if each["sources"]["kaggle"]}
    assert {
        "shridharspol/fastgan-weights-70k-iter",
        "shridharspol/stgan-stage2-finetuned-weights",
        "shridharspol/synthetic-data-ham10000",
    } <= slugs
    released = {name: ROOT / each["sources"]["repo"] for name, each in assets.items() if each["sources"]["repo"]}
    for name, file in released.items():
        assert weights.digest(file) == (assets[name]["sha256"], assets[name]["bytes"]), name
    assert sum(assets[name]["bytes"] for name in released) <= 60e6


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "0"},
        {"lesion_class": "XYZ"},
        {"stage": "stage3"},
        {"file": "../model.bin"},
        {"name": "a b"},
        {"architecture": {"kind": "fastgan", "size": 64}},
        {"class_order": ["NV", "MEL"]},
        {"extra": 1},
        {"sources": {"repo": "/etc/passwd", "kaggle": None, "url": None}},
        {"sources": {"repo": None, "kaggle": None, "url": "file:///etc/passwd"}},
    ],
)
def test_the_schema_refuses(change):
    manifest = {"format": "stgan-weights-1", "assets": [asset(url="https://example.org/x")]}
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(manifest, schema)
    wrong = copy.deepcopy(manifest)
    wrong["assets"][0] |= change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)
    missing = copy.deepcopy(manifest)
    del missing["assets"][0][next(iter(set(change) & set(asset())), "licence")]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(missing, schema)


def test_the_schema_knows_the_classes():
    assert json.loads(SCHEMA.read_text())["$defs"]["class"]["enum"] == list(CLASSES)


# --- where things are -------------------------------------------------------------------------------------------


def test_order_of_search(place, monkeypatch):
    declare(place, asset(repo="weights/model.bin", kaggle={"slug": "somebody/some-set", "file": "deep/model.bin"}))
    wanted = [
        place / "by_hand" / "model.bin",
        place / "by_variable" / "model.bin",
        place / "weights" / "model.bin",
        place / "kaggle" / "some-set" / "deep" / "model.bin",
        place / "kaggle" / "datasets" / "somebody" / "some-set" / "model.bin",
        place / "cache" / "weights" / "model.bin",
    ]
    for file in [*wanted, place / "kaggle" / "another-set" / "model.bin"]:
        file.parent.mkdir(parents=True)
        file.write_bytes(CONTENT)
    monkeypatch.setenv("STGAN_WEIGHTS", str(wanted[1].parent))
    assert weights.path("model", wanted[0].parent) == wanted[0]
    for file in wanted[1:]:
        assert weights.path("model") == file
        file.unlink()
    assert weights.find("model") is None
    with pytest.raises(UserError, match=r"no folder .*by_nobody: correct --dir"):
        weights.find("model", place / "by_nobody")


def test_a_released_file_is_found_in_any_mount(place):
    declare(place, asset(repo="weights/model.bin"))
    file = place / "kaggle" / "my-copy" / "weights" / "model.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    assert weights.path("model") == file


def test_unknown_names_and_files(place):
    declare(place, asset())
    with pytest.raises(UserError, match="no weights 'modle'; the manifest names model"):
        weights.path("modle")
    with pytest.raises(UserError, match=r"no file modle\.pth, nor weights of that name; there are model"):
        weights.resolve("modle.pth")
    with pytest.raises(UserError, match="cannot be downloaded"):
        weights.fetch("model")
    weights.MANIFEST.unlink()
    with pytest.raises(UserError, match="clone of the repository"):
        weights.manifest()


def test_a_flipped_byte_is_refused_wherever_the_file_is(place, server):
    declare(place, asset(repo="weights/model.bin"), asset("other", url=server.url))
    broken = CONTENT[:1000] + bytes([CONTENT[1000] ^ 1]) + CONTENT[1001:]
    released, cached = place / "weights" / "model.bin", place / "cache" / "weights" / "other.bin"
    for file in (released, cached):
        file.parent.mkdir(parents=True)
        file.write_bytes(broken)
    sentence = rf"model\.bin is damaged, or not model: .*{hashlib.sha256(broken).hexdigest()[:12]}.*git checkout"
    for use in (weights.path, weights.fetch, weights.resolve, lambda name: weights.resolve(released)):
        with pytest.raises(UserError, match=sentence):
            use("model")
    assert [(name, bool(wrong)) for name, _, wrong in weights.verify()] == [("model", True), ("other", True)]
    assert weights.fetch("other") == cached  # its own copy it replaces
    assert cached.read_bytes() == CONTENT
    released.write_bytes(CONTENT)
    assert [wrong for _, _, wrong in weights.verify()] == [None, None]
    assert weights.resolve(released) == released


def test_an_unknown_checksum_is_recorded_at_first_use(place, server, capsys):
    declare(place, asset(content=None, url=server.url))
    file = weights.fetch("model")
    lock, digest = place / "cache" / "weights.lock.json", hashlib.sha256(CONTENT).hexdigest()
    assert json.loads(lock.read_text()) == {"model": {"sha256": digest, "bytes": len(CONTENT)}}
    said = capsys.readouterr().err
    assert digest in said and str(lock) in said and "later copies must match" in said
    assert weights.path("model") == file and "later copies" not in capsys.readouterr().err
    server.files["/model"] = b"other"
    file.unlink()
    with pytest.raises(UserError, match=r"weights\.lock\.json says 512,000 bytes"):
        weights.fetch("model")
    assert in_cache(place) == []


RELEASED = {
    asset["name"]: asset
    for asset in json.loads((ROOT / "weights_manifest.json").read_text())["assets"]
    if asset["sources"]["repo"]
}


@pytest.fixture(params=[*RELEASED] or [pytest.param(None, marks=pytest.mark.skip("nothing is released yet"))])
def released(request, tmp_path):
    """Each released file, as a copy that may be spoilt: its name and place."""
    file = tmp_path / RELEASED[request.param]["file"]
    shutil.copyfile(ROOT / RELEASED[request.param]["sources"]["repo"], file)
    return request.param, file


def test_a_released_file_that_was_changed_or_cut_is_refused(released):
    name, file = released
    whole = file.read_bytes()
    assert weights.path(name, file.parent) == file
    for at in (8, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=f"is damaged, or not {name}: its .* SHA-256"):
            weights.path(name, file.parent)
    for length in (0, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"is cut short, or not {name}: it has {length:,} bytes, .* {len(whole):,}"):
            weights.path(name, file.parent)


def test_a_released_file_without_one_of_its_tensors_is_refused(released):
    name, file = released
    tensors, header = checkpoints.load(file)
    load = classifier.Classifier.load if RELEASED[name]["stage"] == "classifier" else checkpoints.load_generator
    load(file)
    del tensors[max(key for key in tensors if not key.startswith("discriminator") and tensors[key].ndim == 4)]
    checkpoints.save(file, tensors, header)
    with pytest.raises(UserError, match="does not fit"):
        load(file)


# --- in place of training ---------------------------------------------------------------------------------------


@pytest.fixture
def shelf(place):
    """A repository with Stage 1 and Stage 2 of DF at 64 px, Stage 1 at 128 px, and a set of the prior system's kind."""
    declared = []
    for name, size, lesion in (("stage1-64px", 64, None), ("stage2-df-64px", 64, "DF"), ("stage1-128px", 128, None)):
        file = place / "weights" / f"{name}.safetensors"
        tensors = checkpoints.prefixed("generator", Generator(size, 8, nz=32).state_dict())
        checkpoints.save(file, tensors, {"architecture": {"kind": "fastgan", "size": size, "ngf": 8, "nz": 32}})
        entry = asset(name, file.read_bytes(), repo=f"weights/{name}.safetensors") | {"file": file.name}
        entry |= {"stage": "stage2" if lesion else "stage1", "lesion_class": lesion}
        declared.append(entry | {"architecture": {"kind": "fastgan", "size": size, "ngf": 8, "nz": 32}})
    theirs = asset("theirs", None, kaggle={"slug": "a/b", "file": None}, unpack=True)
    declare(place, *declared, theirs | {"stage": "stage2", "lesion_class": ["DF"]})
    return place


def wanted(weights="auto", lesion=None, **more):
    settings = {"size": 64, "ngf": 8, "nz": 32, "weights": weights} | more
    return config.Stage2Settings(lesion=lesion, **settings) if lesion else config.Stage1Settings(**settings)


def chosen(*given, **more):
    found = weights.choose_released(wanted(*given, **more))
    return found and found["name"]


def test_auto_takes_what_fits_in_everything_and_is_here(shelf):
    assert chosen() == "stage1-64px" and chosen(lesion="DF") == "stage2-df-64px" and chosen(size=128) == "stage1-128px"
    assert chosen("train") is None
    for other in ({"ngf": 16}, {"nz": 256}, {"size": 256}, {"lesion": "MEL"}):
        assert chosen(**other) is None
    (shelf / "weights" / "stage1-64px.safetensors").unlink()
    assert chosen() is None  # it would have to be fetched
    weights.MANIFEST.unlink()
    assert chosen() is None


def test_auto_takes_nothing_that_is_not_of_the_release(place):
    """The prior system's GAN saw every image, this run's test lesions too."""
    theirs = asset(kaggle={"slug": "a/b", "file": "model.bin"})
    declare(place, theirs)
    mounted = place / "kaggle" / "b" / "model.bin"
    mounted.parent.mkdir(parents=True)
    mounted.write_bytes(CONTENT)
    assert chosen(ngf=16, nz=256) is None and chosen("model") == "model"


def test_a_name_must_fit_in_class_and_size_alone(shelf):
    assert chosen("stage1-64px", ngf=64, nz=256) == "stage1-64px"  # the widths are the file's
    for given, sentence in (
        ({"weights": "stage1-128px", "size": 256}, r"'stage1-128px' \(stage1, all classes, 128 px\), but .* 256 px"),
        ({"weights": "stage2-df-64px"}, r"\(stage2, DF, 64 px\), but what is asked for is stage1, all classes, 64 px"),
        ({"weights": "stage2-df-64px", "lesion": "MEL"}, r"\(stage2, DF, 64 px\), but .* stage2, MEL, 64 px"),
        ({"weights": "stage1-64px", "lesion": "DF"}, r"but what is asked for is stage2, DF, 64 px"),
        ({"weights": "theirs", "lesion": "DF"}, r"'theirs' \(stage2"),
        ({"weights": "stage1-65px"}, r"no weights 'stage1-65px'; the manifest names stage1-64px"),
    ):
        with pytest.raises(UserError, match=sentence) as raised:
            chosen(**given)
        assert "\n" not in str(raised.value)


def test_released_weights_and_a_start_of_training_exclude_each_other():
    with pytest.raises(UserError, match="start_from is for training, but weights is 'auto'"):
        wanted(lesion="DF", start_from="all_1.pth")


def test_what_is_used_is_the_checked_file_and_is_named(shelf, server):
    target = shelf / "run" / "checkpoint.safetensors"
    for broken, sentence in ((lambda b: b[:-1], "cut short"), (lambda b: b[:-1] + b"?", "damaged")):
        file = shelf / "weights" / "stage1-64px.safetensors"
        whole = file.read_bytes()
        file.write_bytes(broken(whole))
        with pytest.raises(UserError, match=sentence):
            weights.use_released(weights.entry("stage1-64px"), target)
        assert not target.exists()
        file.write_bytes(whole)
    said = weights.use_released(weights.entry("stage1-64px"), target)
    digest = hashlib.sha256(whole).hexdigest()
    assert said.startswith(f"**Nothing is trained here: released weights `stage1-64px`, SHA-256 `{digest}`.**")
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest

    # Found only now, they do not take the place of what was trained meanwhile.
    checkpoints.save(target, {"rng.cpu": torch.get_rng_state()}, {"kind": "training", "iteration": 900})
    trained = target.read_bytes()
    with pytest.raises(UserError, match=r"holds a training of this run.*weights='train'"):
        weights.use_released(weights.entry("stage1-64px"), target)
    assert target.read_bytes() == trained


def test_weights_asked_for_by_name_are_fetched_and_foreign_ones_converted(place, server):
    live = Generator(64, 8, nz=32)
    buffer = io.BytesIO()
    torch.save({"g": live.state_dict(), "d": Discriminator(64, 8).state_dict()}, buffer)
    server.files["/model"] = buffer.getvalue()
    entry = asset("model", buffer.getvalue(), url=server.url) | {"file": "all_1.pth"}
    declare(place, entry)
    target = place / "run" / "checkpoint.safetensors"
    said = weights.use_released(weights.choose_released(wanted("model")), target)
    assert hashlib.sha256(buffer.getvalue()).hexdigest() in said
    assert checkpoints.read_header(target)["converted_from"] == entry["sha256"]
    assert all(torch.equal(t, live.state_dict()[k]) for k, t in checkpoints.load_generator(target).state_dict().items())
    assert checkpoints.load_discriminator(target).size == 64

    # The same way, a pickle that would do something: its checksum may be right, it is opened all the same as tensors.
    target.unlink()
    mark = place / "executed"
    evil = pickle.dumps({"g": Payload(mark), "d": Payload(mark)}, protocol=2)
    server.files["/model"] = evil
    declare(place, asset("evil", evil, url=server.url) | {"file": "evil.pth"})
    with pytest.raises(UserError, match=r"evil\.pth holds more than tensors, or is damaged; it was not opened"):
        weights.use_released(weights.entry("evil"), target)
    assert not mark.exists() and not any(target.parent.iterdir())


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_the_quick_profile_fits_what_is_released():
    for kind, lesions in (("stage1", [{}]), ("stage2", [{"lesion": code} for code in MINORITY])):
        for lesion in lesions:
            settings = config.resolve(kind, "quick", lesion)
            assert settings.weights == "auto"
            if RELEASED:
                assert weights.choose_released(settings), lesion
    others = set(PROFILES) - {"quick"}
    assert {config.resolve(kind, name).weights for kind in ("stage1", "stage2") for name in others} == {"train"}


# --- from a URL -------------------------------------------------------------------------------------------------


def test_fetch_downloads_once(place, server):
    declare(place, asset(url=server.url))
    file = weights.fetch("model")
    assert file == place / "cache" / "weights" / "model.bin" and file.read_bytes() == CONTENT
    assert weights.fetch("model") == weights.path("model") == weights.resolve("model") == file
    assert len(server.asked) == 1 and in_cache(place) == ["model.bin"]


@pytest.mark.parametrize("etag", ['"1"', None])
def test_a_cut_connection_is_taken_up_in_the_middle(place, server, etag):
    declare(place, asset(url=server.url))
    server.breaks, server.etag = 1, etag
    assert weights.fetch("model").read_bytes() == CONTENT
    assert server.asked == [(None, None), (f"bytes={len(CONTENT) // 2}-", etag)]


def test_a_broken_download_goes_on_in_the_next_session(place, server):
    declare(place, asset(url=server.url))
    server.breaks = download.ATTEMPTS
    with pytest.raises(UserError, match=r"broke off .* bytes: run the same command to go on from there"):
        weights.fetch("model")
    part = (place / "cache" / "weights" / "model.bin.part").stat().st_size
    assert 0 < part < len(CONTENT) and weights.find("model") is None
    assert weights.fetch("model").read_bytes() == CONTENT
    assert server.asked[-1] == (f"bytes={part}-", '"1"') and in_cache(place) == ["model.bin"]


@pytest.mark.parametrize("change", ["version", "no ranges", "shorter"])
def test_a_part_of_something_else_is_not_continued(place, server, change):
    declare(place, asset(content=None, url=server.url))
    server.breaks = download.ATTEMPTS
    with pytest.raises(UserError, match="broke off"):
        weights.fetch("model")
    if change == "version":
        server.files["/model"], server.etag = CONTENT[::-1], '"2"'
    elif change == "shorter":
        server.files["/model"], server.etag = CONTENT[:100], '"2"'
    else:
        server.ranges = False
    assert weights.fetch("model").read_bytes() == server.files["/model"]


def test_wrong_checksum_and_wrong_size(place, server):
    declare(place, asset(url=server.url))
    server.files["/model"] = CONTENT[::-1]
    with pytest.raises(UserError, match=r"is damaged, or not model: .* what was downloaded is deleted"):
        weights.fetch("model")
    assert in_cache(place) == []
    server.files["/model"] = CONTENT[:-1]
    with pytest.raises(UserError, match="another file by now: it has 511,999 bytes, not 512,000"):
        weights.fetch("model")
    assert in_cache(place) == []


def test_no_answer_no_network_not_there(place, server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    declare(place, asset(url=server.url), asset("b", url=server.url + "s"), asset("c", url="http://127.0.0.1:9/c"))
    server.stalls, server.pause = download.ATTEMPTS, 0.6
    with pytest.raises(UserError, match=r"broke off .*timed out.* go on from there.* by hand"):
        weights.fetch("model")
    with pytest.raises(UserError, match=r"models cannot be had: the server answered 404.* by hand: --dir or STGAN_W"):
        weights.fetch("b")
    with pytest.raises(UserError, match=r"cannot be reached .* is there a network"):
        weights.fetch("c")
    assert [name for name in in_cache(place) if "model" not in name] == []
    assert weights.fetch("model").read_bytes() == CONTENT


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_no_space(place, server, monkeypatch, when):
    declare(place, asset(url=server.url))
    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    else:

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(download, "tqdm", full)
    with pytest.raises(UserError, match=r"no room for 1 MB in .*: free some space, or set STGAN_CACHE"):
        weights.fetch("model")
    assert [name for name in in_cache(place) if not name.endswith(".version")] == []


def test_two_processes_fetch_the_same_file(place, server):
    declare(place, asset(url=server.url))
    server.stalls, server.pause = 2, 1.0
    script = f"""
import pathlib
from stgan_utils import weights
weights.MANIFEST = pathlib.Path({str(weights.MANIFEST)!r})
print(weights.fetch("model"))
"""
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, cwd=ROOT, text=True) for _ in "ab"]
    for each in both:
        out, err = each.communicate(timeout=300)
        assert each.returncode == 0, err
        assert Path(out.strip()).read_bytes() == CONTENT
    assert len(server.asked) == 1 and in_cache(place) == ["model.bin"]


# --- from Kaggle ------------------------------------------------------------------------------------------------


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Kaggle:
    """What is used of the package's client; `sent` is what it leaves in the folder, {name: bytes}, or raises."""

    def __init__(self, sent):
        self.sent, self.asked = sent, []

    def dataset_download_file(self, dataset, file_name, path, quiet):
        self._send(path, dataset, file_name)

    def dataset_download_files(self, dataset, path, quiet, unzip):
        assert not unzip  # the package's own unpacking trusts the archive
        self._send(path, dataset)

    def _send(self, path, *asked):
        self.asked.append(asked)
        print("Dataset URL: …")
        if isinstance(self.sent, Exception):
            raise self.sent
        for name, content in self.sent.items():
            Path(path, name).write_bytes(content)


@pytest.fixture
def kaggle(monkeypatch):
    def sends(sent):
        api = Kaggle(sent)
        monkeypatch.setattr(download, "kaggle_api", lambda: api)
        return api

    return sends


@pytest.mark.parametrize("sent", [{"m.pth": CONTENT}, {"m.pth.zip": zipped({"m.pth": CONTENT})}])
def test_a_file_from_kaggle(place, kaggle, capsys, sent):
    declare(place, asset(kaggle={"slug": "a/b", "file": "deep/m.pth"}))
    api = kaggle(sent)
    assert weights.fetch("model").read_bytes() == CONTENT
    assert api.asked == [("a/b", "deep/m.pth")] and in_cache(place) == ["model.bin"]
    assert capsys.readouterr().out == ""  # `weights path` prints the path alone


def test_a_whole_set_from_kaggle_and_from_its_mount(place, kaggle, capsys):
    declare(place, asset("set", None, kaggle={"slug": "a/b", "file": None}, unpack=True))
    kaggle({"b.zip": zipped({"x/AKIEC.pth": b"1", "labels.csv": b"2"})})
    folder = weights.fetch("set")
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*")) == ["labels.csv", "x/AKIEC.pth"]
    assert in_cache(place) == ["set"]
    lines = [f"{hashlib.sha256(c).hexdigest()}  {name}\n" for name, c in (("x/AKIEC.pth", b"1"), ("labels.csv", b"2"))]
    recorded = json.loads((place / "cache" / "weights.lock.json").read_text())["set"]
    assert recorded == {"sha256": hashlib.sha256("".join(sorted(lines)).encode()).hexdigest(), "bytes": 2}
    with pytest.raises(UserError, match=r"set is a folder; name one of its files: .*AKIEC\.pth"):
        weights.resolve("set")
    mounted = place / "kaggle" / "b"
    shutil.copytree(folder, mounted)
    assert weights.path("set") == mounted
    (mounted / "x" / "AKIEC.pth").write_bytes(b"3")
    with pytest.raises(UserError, match="is damaged, or not set"):
        weights.path("set")


class HttpError(Exception):
    def __init__(self, status):
        super().__init__("refused")
        self.response = types.SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (HttpError(403), "does not let this token have it"),
        (HttpError(404), "has none of that name"),
        (ConnectionError("Name or service not known\nlong story"), "cannot be reached .*known.: is there a network"),
        (OSError(errno.ENOSPC, "No space left on device"), "no room"),
        ({"other.txt": b""}, "Kaggle sent other.txt instead"),
        ({}, "Kaggle sent nothing instead"),
    ],
)
def test_kaggle_fails(place, kaggle, sent, sentence):
    declare(place, asset(kaggle={"slug": "a/b", "file": "m.pth"}))
    kaggle(sent)
    with pytest.raises(UserError, match=sentence) as raised:
        weights.fetch("model")
    assert "by hand: --dir or STGAN_WEIGHTS" in str(raised.value) and "\n" not in str(raised.value)
    assert [name for name in in_cache(place) if (place / "cache" / "weights" / name).is_file()] == []


def test_without_kaggle_the_url_serves(place, kaggle, server):
    declare(place, asset(kaggle={"slug": "a/b", "file": "m.pth"}, url=server.url))
    kaggle(HttpError(403))
    assert weights.fetch("model").read_bytes() == CONTENT


@pytest.mark.parametrize("ending", ["exit(1)", "raise OSError('Could not find kaggle.json')"])
def test_importing_kaggle_without_a_token_ends_nothing(tmp_path, monkeypatch, capsys, ending):
    package = tmp_path / "kaggle"
    package.mkdir()
    (package / "__init__.py").write_text(f"print('You must log in')\n{ending}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "kaggle"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"Kaggle wants an API token.*kaggle\.json"):
        download.kaggle_api()
    assert capsys.readouterr().out == ""


# --- archives ---------------------------------------------------------------------------------------------------


def linked():
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    return zipped({link: "/etc/passwd"})


@pytest.mark.parametrize(
    ("archive", "sentence"),
    [
        (zipped({"good": b"1", "../evil": b"2"}), r"not unpacked: its '\.\./evil' would leave the folder"),
        (zipped({"a/../../evil": b"2"}), "would leave"),
        (zipped({"/tmp/evil": b"2"}), "would leave"),
        (zipped({"..\\evil": b"2"}), "would leave"),
        (zipped({"C:\\evil": b"2"}), "would leave"),
        (linked(), "'link' would leave"),
        (zipped({"good": CONTENT})[:-100], "damaged or no zip archive"),
        (zipped({"good": CONTENT}).replace(CONTENT[:999], CONTENT[1:1000]), "damaged or no zip archive"),
        (b"text", "damaged or no zip archive"),
    ],
)
def test_unsafe_and_damaged_archives_leave_nothing(place, kaggle, archive, sentence):
    declare(place, asset("set", None, kaggle={"slug": "a/b", "file": None}, unpack=True))
    kaggle({"b.zip": archive})
    with pytest.raises(UserError, match=sentence):
        weights.fetch("set")
    assert in_cache(place) == [] and not list(place.rglob("evil")) and not Path("/tmp/evil").exists()


# --- the command line -------------------------------------------------------------------------------------------


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["stgan_utils", "weights", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_commands(place, server, monkeypatch, capsys):
    far = asset("far", None, kaggle={"slug": "a/b", "file": "x"})
    declare(place, asset(repo="weights/model.bin"), asset("near", url=server.url), far)
    file = place / "weights" / "model.bin"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    code, out, _ = run(monkeypatch, capsys, "list")
    lines = out.splitlines()
    assert code == 0 and "0.5 MB" in lines[0] and str(file) in lines[0]
    assert f"to fetch from {server.url}" in lines[1] and "? MB  to fetch from Kaggle, a/b" in lines[2]

    def none():
        raise UserError("Kaggle wants an API token.")

    monkeypatch.setattr(download, "kaggle_api", none)
    code, out, err = run(monkeypatch, capsys, "fetch", "--all")  # one that fails keeps the others from nothing
    assert code == 2 and "near: " in out and "Kaggle wants an API token." in err.splitlines()[-1]
    assert run(monkeypatch, capsys, "path", "near")[:2] == (0, f"{place / 'cache' / 'weights' / 'near.bin'}\n")
    code, out, _ = run(monkeypatch, capsys, "verify")
    assert code == 0 and [line.split(":")[0] for line in out.splitlines()] == ["model", "near"]
    file.unlink()
    assert "missing: `git checkout weights`" in run(monkeypatch, capsys, "list")[1].splitlines()[0]
    file.write_bytes(CONTENT[1:])
    code, out, err = run(monkeypatch, capsys, "verify")
    assert code == 2 and out.startswith("near") and err.startswith(str(file)) and err.count("\n") == 1
    other = place / "by_hand"
    other.mkdir()
    (other / "model.bin").write_bytes(CONTENT)
    assert run(monkeypatch, capsys, "path", "model", "--dir", other)[:2] == (0, f"{other / 'model.bin'}\n")
    assert run(monkeypatch, capsys, "path", "nothing")[0] == 2
    assert run(monkeypatch, capsys, "fetch")[0] == 2


def test_foreign_weights_that_were_exchanged_are_converted_anew(place, server):
    target = place / "run" / "checkpoint.safetensors"
    for number in (1, 2):
        live, buffer = Generator(64, 8, nz=32), io.BytesIO()
        torch.save({"g": live.state_dict(), "d": Discriminator(64, 8).state_dict()}, buffer)
        server.files["/model"] = buffer.getvalue()
        declare(place, asset(f"model{number}", buffer.getvalue(), url=server.url) | {"file": f"all_{number}.pth"})
        weights.use_released(weights.entry(f"model{number}"), target)
        found = checkpoints.load_generator(target).state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in live.state_dict().items())


def test_a_copy_that_fails_leaves_what_was_there(shelf, monkeypatch):
    target = shelf / "run" / "checkpoint.safetensors"
    weights.use_released(weights.entry("stage1-64px"), target)
    before = target.read_bytes()

    def full(source, to):
        Path(to).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="disk is full"):
        weights.use_released(weights.entry("stage1-64px"), target)
    assert target.read_bytes() == before


def test_a_set_from_a_url_is_unpacked_and_replaced_where_it_was_damaged(place, server):
    server.files["/model"] = zipped({"AKIEC.pth": CONTENT})
    line = f"{hashlib.sha256(CONTENT).hexdigest()}  AKIEC.pth\n"
    known = {"bytes": len(CONTENT), "sha256": hashlib.sha256(line.encode()).hexdigest()}
    declare(place, asset("set", url=server.url, unpack=True) | known)  # of what is in the archive
    file = weights.fetch("set") / "AKIEC.pth"
    file.write_bytes(CONTENT[::-1])
    assert weights.fetch("set") == file.parent and file.read_bytes() == CONTENT and len(server.asked) == 2


def test_a_part_of_nobody_knows_what_is_not_continued(place, server):
    """No checksum and no version: what is on the server now may be another file, and the mix would be recorded."""
    declare(place, asset(content=None, url=server.url))
    server.breaks, server.etag = download.ATTEMPTS, None
    with pytest.raises(UserError, match="broke off"):
        weights.fetch("model")
    server.files["/model"] = CONTENT[::-1]
    assert weights.fetch("model").read_bytes() == CONTENT[::-1]


def test_a_download_that_was_killed_when_all_had_come_is_taken(place, server):
    declare(place, asset(url=server.url))
    part = place / "cache" / "weights" / "model.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT)
    assert weights.fetch("model").read_bytes() == CONTENT and not server.asked


def test_an_archive_with_a_password_and_one_too_large_are_one_sentence(place, kaggle, monkeypatch):
    declare(place, asset("set", None, kaggle={"slug": "a/b", "file": None}, unpack=True))
    locked = bytearray(zipped({"good": b"1"}))
    locked[6] |= 1
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    kaggle({"b.zip": bytes(locked)})
    with pytest.raises(UserError, match=r"damaged or no zip archive .*password"):
        weights.fetch("set")
    kaggle({"b.zip": zipped({"good": CONTENT})})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="no room for 1 MB"):
        weights.fetch("set")
    assert in_cache(place) == []
