"""Files appear whole or not at all, and a full disk is one sentence."""

import errno
import hashlib

import pytest
from safetensors import SafetensorError

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
