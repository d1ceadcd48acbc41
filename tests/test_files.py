"""Files appear whole or not at all, and a full disk is one sentence."""

import errno
import hashlib
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from stgan_utils import files
from stgan_utils.config import UserError


def test_success_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        with files.atomic_path(path) as temporary:
            assert temporary.parent == path.parent and temporary.suffix == ".txt"
            temporary.write_text(text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_others_may_read_what_others_may_read_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with files.atomic_path(tmp_path / "weights.safetensors") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_and_a_device_too(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with files.atomic_path(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(UserError, match="is a folder or a device: name a file"), files.atomic_path(place):
            pass
    assert (tmp_path / "pipe").is_fifo()


def test_sweeping_takes_what_a_kill_left_and_nothing_else(tmp_path):
    context = files.atomic_path(tmp_path / "images" / "DF_0001.png")
    left = context.__enter__()
    kept = [tmp_path / name for name in (".lock", ".hidden.png", "a.0123abcd.png", "images/DF_0002.png")]
    for path in kept:
        path.write_text("kept")
    (tmp_path / ".tmp3ZqGe9").write_text("safetensors'")
    assert left.exists()
    files.sweep(tmp_path)
    assert not left.exists() and not (tmp_path / ".tmp3ZqGe9").exists() and all(path.exists() for path in kept)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EACCES, "denied")])
def test_failure_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UserError, match=r"disk is full: .*a\.txt"), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_json_round_trip_and_its_errors(tmp_path):
    path = tmp_path / "a.json"
    value = {"class": "AKIEC", "p": [0.1, None, True], "σ": "×"}
    files.write_json(path, value)
    assert files.read_json(path) == value
    with pytest.raises(ValueError):
        files.write_json(path, {"kid": float("nan")})  # no JSON
    assert files.read_json(path) == value
    path.write_text('{"half":')
    with pytest.raises(UserError, match=r"a\.json is not JSON"):
        files.read_json(path)
    with pytest.raises(UserError, match=r"no file .*b\.json"):
        files.read_json(tmp_path / "b.json")


def test_sha256_of_more_than_one_block(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 5000)
    assert files.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
