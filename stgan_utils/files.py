"""Files that appear whole or not at all."""

import errno
import hashlib
import json
import os
import re
import secrets
from contextlib import contextmanager
from pathlib import Path

from stgan_utils.config import UserError


@contextmanager
def atomic_path(path):
    """A temporary file beside `path`; renamed over it when the block ends well, removed when it does not.

    A link stays, what it leads to is replaced.

    Raises:
        UserError: `path` is a folder or a device, or the disk is full; what stood at `path` before is untouched.
        OSError: its folder cannot be written to; raised before the block is entered.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is a folder or a device: name a file.")
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as Pillow and NumPy choose the format by it.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors writes a file of its own, which nobody else may read
            temporary.chmod(mode)
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


def sweep(folder):
    """Removes what `atomic_path` left half written below a folder when the program was killed.

    Only for a folder that no other program is writing to.
    """
    ours, of_safetensors = r"\..+\.[0-9a-f]{8}(\.\w+)?", r"\.tmp\w{6}"
    for path in Path(folder).rglob(".*"):
        if re.fullmatch(f"{ours}|{of_safetensors}", path.name) and path.is_file():
            path.unlink()


def refuse_input(out, inputs):
    """Nothing, unless `out` is one of the files that are to be read.

    Raises:
        UserError: it is, and would be lost.
    """
    if Path(out).exists() and any(os.path.exists(each) and os.path.samefile(each, out) for each in inputs):
        raise UserError(f"{out} is one of the files to be read, and would be lost: choose another place.")


def shown(text):
    """The text as any file or terminal can hold it: what is not UTF-8 in a file's name becomes an escape."""
    return str(text).encode("utf-8", "backslashreplace").decode()


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
