"""Files that appear whole or not at all."""

import errno
import hashlib
import json
import os
import secrets
from contextlib import contextmanager
from pathlib import Path

from stgan_utils.config import UserError


@contextmanager
def atomic_path(path):
    """A temporary path beside `path`; renamed over it when the block ends well, removed when it does not.

    Raises:
        UserError: `path` is a folder, or the disk is full; what stood at `path` before is untouched.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as Pillow and NumPy choose the format by it.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        # safetensors hands the system's error on as the text of an exception of its own.
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            raise UserError(f"The disk is full: {path} was not written; free some space and run again.") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path):
    """The value in a JSON file.

    Raises:
        UserError: no such file, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); delete it and run the step again.") from None


def sha256(path):
    """The file's SHA-256 in hex, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
