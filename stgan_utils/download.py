"""Getting files from elsewhere: a URL, Kaggle, a zip archive. What arrives is not trusted: the caller checks it."""

import contextlib
import errno
import http.client
import io
import os
import shutil
import stat
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import PurePosixPath

from tqdm.auto import tqdm

from stgan_utils.config import UserError

TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 3  # to go on after a cut connection


def remove(place):
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


def _no_room(place, size):
    return f"There is no room for {size / 1e6:,.0f} MB in {place}: free some space, or set STGAN_CACHE to another disk."


def from_url(url, part, size=None, known=False):
    """Download a URL to the file `part`, from where that ends if it is there.

    Args:
        url: http or https.
        part: where to; stays for the next try if the connection breaks, and is removed if it can be of no use.
        size: the file's bytes, if they are known.
        known: the caller knows the checksum, so that a part may be continued though the server names no version.

    Raises:
        UserError: no network, an HTTP error, another size, a broken connection, no room.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _go_on(url, part, size, known)
        except urllib.error.HTTPError as error:
            raise UserError(f"{url} cannot be had: the server answered {error.code} {error.reason}.") from None
        except urllib.error.URLError as error:
            raise UserError(f"{url} cannot be reached ({error.reason}): is there a network?") from None
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS:
                here = part.stat().st_size if part.exists() else 0
                reason = str(error).strip() or type(error).__name__
                raise UserError(
                    f"{url} broke off ({reason}) after {here:,} bytes: run the same command to go on from there."
                ) from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                remove(part)
                raise UserError(_no_room(part.parent, size or 0)) from None
            raise


def _go_on(url, part, size, known):
    version = version_of(part)
    start = part.stat().st_size if part.exists() and (version.exists() or known) else 0
    if start and start == size:
        return
    request = urllib.request.Request(url)
    if start:
        request.add_header("Range", f"bytes={start}-")
        if version.exists():
            request.add_header("If-Range", version.read_text())
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != 206 or not (response.headers["Content-Range"] or "").startswith(f"bytes {start}-"):
            # From the start, whatever was asked for: another version by now, or a server that knows no ranges.
            start = 0
            remove(part)
            remove(version)
        length = int(response.headers["Content-Length"] or 0)
        if length and size and start + length != size:
            remove(part)
            raise UserError(f"{url} is another file by now: it has {start + length:,} bytes, not {size:,}.")
        if shutil.disk_usage(part.parent).free < length:
            remove(part)
            raise UserError(_no_room(part.parent, length))
        if identity := response.headers["ETag"] or response.headers["Last-Modified"]:
            version.write_text(identity)
        total = start + length if length else size
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=PurePosixPath(url).name)
        with bar, open(part, "ab") as file:
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))
        if total and part.stat().st_size < total:
            raise ConnectionError("the connection was closed")


def version_of(part):
    """Beside a partial download: which version of the file it is part of, in the server's words."""
    return part.with_name(f"{part.name}.version")


def from_kaggle(slug, file, part):
    """Download one file of a Kaggle data set, or all of it as a zip archive, to `part`.

    The `kaggle` package goes on with a partial download by itself, in a folder beside `part`.

    Args:
        slug: owner/name.
        file: path in the data set, or None.
        part: where to.

    Raises:
        UserError: no token, no network, no such data set or file, no room.
    """
    api = kaggle_api()
    folder = part.with_name(f"{part.name}.kaggle")
    folder.mkdir(exist_ok=True)
    wanted = PurePosixPath(file or f"{PurePosixPath(slug).name}.zip").name
    what = f"{slug}, {file or 'all files'}"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            if file:
                api.dataset_download_file(slug, file, path=str(folder), quiet=False)
            else:
                api.dataset_download_files(slug, path=str(folder), quiet=False, unzip=False)
    except Exception as error:  # the package's versions share no class of errors
        status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
        if getattr(error, "errno", None) == errno.ENOSPC:
            remove(folder)
            raise UserError(_no_room(part.parent, 0)) from None
        if status in (401, 403, 404):
            remove(folder)
            reason = "has none of that name" if status == 404 else "does not let this token have it"
            raise UserError(f"{what}: Kaggle {reason} ({status}).") from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what}: Kaggle cannot be reached ({reason}): is there a network?") from None
    try:
        if (folder / f"{wanted}.zip").exists():  # so Kaggle hands out single files that compress well
            unzip(folder / f"{wanted}.zip", folder)
        if not (folder / wanted).exists():
            raise UserError(f"{what}: Kaggle sent {', '.join(sorted(os.listdir(folder))) or 'nothing'} instead.")
        os.replace(folder / wanted, part)
    finally:
        remove(folder)


def kaggle_api():
    """The `kaggle` package's client, signed in. Importing the package signs in too, and may end the process.

    Raises:
        UserError: no token, or no such package.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from kaggle.api.kaggle_api_extended import KaggleApi

            api = KaggleApi()
            api.authenticate()
    except ImportError as error:
        raise UserError(f"The kaggle package cannot be used ({error}): pip install kaggle.") from None
    except (SystemExit, Exception) as error:  # exit(1), OSError or ValueError, by version
        raise UserError(
            f"Kaggle wants an API token, and there is none that works ({type(error).__name__}): make one at kaggle.com "
            "under Settings, API, and save it as ~/.kaggle/kaggle.json."
        ) from None
    return api


def unzip(archive, folder):
    """Unpack a zip archive, every member inside `folder`.

    Raises:
        UserError: a member that would land elsewhere, a link, a damaged archive, or no room for it.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            for member in members:
                name = member.filename.replace("\\", "/")
                outside = name.startswith("/") or ".." in name.split("/") or ":" in name.split("/")[0]
                if outside or stat.S_ISLNK(member.external_attr >> 16):
                    raise UserError(f"{archive.name} is not unpacked: its {member.filename!r} would leave the folder.")
            size = sum(member.file_size for member in members)
            if shutil.disk_usage(folder).free < size:
                raise UserError(_no_room(folder.parent, size))
            opened.extractall(folder)
    except (zipfile.BadZipFile, EOFError, RuntimeError, zlib.error) as error:  # RuntimeError: encrypted
        raise UserError(f"{archive.name} is damaged or no zip archive ({error}).") from None
