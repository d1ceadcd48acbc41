"""Weights that others made: what there is (`weights_manifest.json`), where it is here, and getting what is not.

Looked for in this order: a folder given by hand (`--dir`, `STGAN_WEIGHTS`), the repository, Kaggle's mounts, the user's
cache; then downloaded into the cache. Nothing is used before its SHA-256 was compared. Where the manifest knows none
(the prior system's files), the first use writes it to a lock file, and every later one must match.
"""

import contextlib
import hashlib
import os
import shutil
import sys
from pathlib import Path, PurePosixPath

from filelock import FileLock

from stgan_utils import download, places
from stgan_utils.config import UserError
from stgan_utils.data import cache_folder
from stgan_utils.files import atomic_path, read_json, sha256, write_json
from stgan_utils.layouts import whole_folder

ROOT = places.repository()
MANIFEST = ROOT / "weights_manifest.json"
KAGGLE_INPUT = places.KAGGLE_INPUT
VARIABLE = "STGAN_WEIGHTS"


def manifest():
    """The entries of the manifest by name.

    Raises:
        UserError: the package was installed without its repository, or the manifest is damaged.
    """
    if not MANIFEST.exists():
        raise UserError(f"There is no {MANIFEST.name} beside the package: use it from a clone of the repository.")
    return {asset["name"]: asset for asset in read_json(MANIFEST)["assets"]}


def entry(name):
    """One entry of the manifest.

    Raises:
        UserError: there is none of this name.
    """
    assets = manifest()
    if name not in assets:
        raise UserError(f"There are no weights {str(name)!r}; the manifest names {', '.join(assets)}.")
    return assets[name]


def find(name, folder=None):
    """Where an asset is on this machine, unchecked, or None; `folder` is searched first."""
    return next((place for place in _places(entry(name), folder) if place.exists()), None)


def _places(asset, folder):
    file, sources = asset["file"], asset["sources"]
    if folder := folder or os.environ.get(VARIABLE):
        if not Path(folder).is_dir():
            raise UserError(f"There is no folder {folder}: correct --dir or {VARIABLE}.")
        yield Path(folder, file)
    if sources["repo"]:
        yield ROOT / sources["repo"]
    if KAGGLE_INPUT.is_dir():
        # Kaggle mounts a data set as <slug> or as datasets/<owner>/<slug>, already unpacked.
        wanted = PurePosixPath(sources["kaggle"]["slug"]).name if sources["kaggle"] else "*"
        for pattern in (wanted, f"datasets/*/{wanted}"):
            for mount in sorted(KAGGLE_INPUT.glob(pattern)):
                yield from [mount] if asset["unpack"] else sorted(mount.rglob(file))
    yield _cache() / file


def path(name, folder=None):
    """The checked file (or folder) of an asset: found here, or downloaded.

    Raises:
        UserError: an unknown name, another checksum than the manifest or the lock file names, or no way to get it.
    """
    found = find(name, folder)
    return check(name, found) if found else fetch(name, folder)


def resolve(name_or_file, folder=None):
    """The file that a name of the manifest stands for, or a file given by its path; released files are checked.

    Raises:
        UserError: neither; or as `path`; or an asset of several files, one of which has to be named.
    """
    assets, file = manifest(), Path(name_or_file)
    repo = {name: ROOT / asset["sources"]["repo"] for name, asset in assets.items() if asset["sources"]["repo"]}
    released = [name for name, place in repo.items() if file.exists() and place.exists() and file.samefile(place)]
    if str(name_or_file) in assets:
        file = path(str(name_or_file), folder)
    elif released:
        check(released[0], file)
    if file.is_dir():
        inside = [str(each) for each in sorted(file.rglob("*")) if each.suffix in (".pth", ".safetensors")]
        raise UserError(f"{name_or_file} is a folder; name one of its files: {', '.join(inside) or 'it has none'}.")
    if not file.exists():
        raise UserError(f"There is no file {name_or_file}, nor weights of that name; there are {', '.join(assets)}.")
    return file


# --- in place of training ---------------------------------------------------------------------------------------


def choose_released(settings):
    """The entry of the manifest that stands in for a step's training, or None: it trains.

    With "auto", weights of the repository's release that are on this machine and have class, size and widths of the
    settings. With a name, any weights of that class and size; the widths are then theirs.

    Args:
        settings: `Stage1Settings` or `Stage2Settings`.

    Raises:
        UserError: weights asked for by name are not there, or draw something else.
    """
    lesion, named = getattr(settings, "lesion", None), settings.weights
    wanted = {"stage": "stage2" if lesion else "stage1", "lesion_class": lesion, "unpack": False}
    if named == "train":
        return None
    if named == "auto":
        wanted["architecture"] = {"kind": "fastgan"} | {name: getattr(settings, name) for name in ("size", "ngf", "nz")}
        released = [each for each in manifest().values() if each["sources"]["repo"]] if MANIFEST.exists() else []
        return next((each for each in released if wanted.items() <= each.items() and find(each["name"])), None)
    asset = entry(named)
    size = (asset["architecture"] or {}).get("size")
    if not wanted.items() <= asset.items() or size != settings.size:
        there, asked = (
            f"{each['stage']}, {each['lesion_class'] or 'all classes'}, {side} px"
            for each, side in ((asset, size), (wanted, settings.size))
        )
        raise UserError(
            f"weights is {named!r} ({there}), but what is asked for is {asked}: name others (`weights list` shows "
            "them), or set size, or weights to 'train'."
        )
    return asset


def use_released(asset, target):
    """Put the checked file of an asset at `target`, as one of our files; FastGAN's own format is converted.

    Returns:
        Markdown: what is used in place of a training, in bold, with name and SHA-256 (of the file as published).

    Raises:
        UserError: as `path`; or as `checkpoints.convert`; or `target` holds a training, which is not thrown away.
    """
    from stgan_utils import checkpoints  # torch

    source, known = path(asset["name"]), asset["trained_on"]
    if target.exists() and checkpoints.read_header(target).get("kind") == "training":
        raise UserError(
            f"{target} holds a training of this run: go on with it by weights='train', or delete that file to take "
            f"{asset['name']}."
        )
    if source.suffix == ".safetensors":
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    elif not target.exists() or checkpoints.read_header(target).get("converted_from") != sha256(source):
        checkpoints.convert(source, target)  # once: the file names the commit that made it
    return (
        f"**Nothing is trained here: released weights `{asset['name']}`, SHA-256 `{sha256(source)}`.** Trained on "
        f"{known['data']} ({known['split']}); licence: {asset['licence']}. Lesions among those images are no fair test "
        "of what is made with these weights."
    )


# --- checksums --------------------------------------------------------------------------------------------------


def digest(place):
    """(SHA-256, bytes) of a file, or of a folder: of the lines `sha256  relative/path`, sorted."""
    if place.is_file():
        return sha256(place), place.stat().st_size
    inside = [file for file in place.rglob("*") if file.is_file()]
    lines = sorted(f"{sha256(file)}  {file.relative_to(place).as_posix()}\n" for file in inside)
    return hashlib.sha256("".join(lines).encode()).hexdigest(), sum(file.stat().st_size for file in inside)


def check(name, place, advice="delete it and fetch it again; `git checkout weights` brings back what was released"):
    """`place`, if its checksum is the known one; a checksum that nobody knows yet is written to the lock file.

    Raises:
        UserError: it is another; `advice` ends the sentence.
    """
    known, source = entry(name), MANIFEST.name
    found, size = digest(place)
    if not known["sha256"]:
        known, source = _recorded(name, found, size), str(_lock_file())
    if known["bytes"] and size < known["bytes"]:
        raise UserError(
            f"{place} is cut short, or not {name}: it has {size:,} bytes, {source} says {known['bytes']:,} bytes; "
            f"{advice}."
        )
    if found != known["sha256"]:
        raise UserError(
            f"{place} is damaged, or not {name}: its {size:,} bytes have SHA-256 {found[:12]}…, {source} says "
            f"{known['bytes']:,} bytes and {known['sha256'][:12]}…; {advice}."
        )
    return place


def _recorded(name, found, size):
    """What the lock file says of an asset; it is told, if it says nothing."""
    with _locked("lock-file"):
        recorded = read_json(_lock_file()) if _lock_file().exists() else {}
        if name not in recorded:
            recorded[name] = {"sha256": found, "bytes": size}
            write_json(_lock_file(), recorded)
            text = f"{name}: nobody knew its SHA-256; {found} is now in {_lock_file()}, and later copies must match."
            print(text, file=sys.stderr)
    return recorded[name]


def verify(folder=None):
    """(name, where, what is wrong or None) of every asset that is on this machine."""
    for name in manifest():
        if place := find(name, folder):
            try:
                yield name, check(name, place), None
            except UserError as error:
                yield name, place, str(error)


def _cache():
    return cache_folder() / "weights"


def _lock_file():
    return cache_folder() / "weights.lock.json"


def _locked(name):
    """One process at a time; the system frees it when a process dies."""
    _cache().mkdir(parents=True, exist_ok=True)
    return FileLock(_cache() / f".{name}.lock")


# --- getting what is not here -----------------------------------------------------------------------------------


def fetch(name, folder=None):
    """Download an asset into the cache, unless it is here; a download that was cut off goes on where it was.

    Raises:
        UserError: no source, no network, no Kaggle token, a wrong checksum, a disk too small, an unsafe archive. What
            was downloaded stays for the next try only if the connection broke.
    """
    asset = entry(name)
    target = _cache() / asset["file"]
    with _locked(name):
        if found := find(name, folder):
            if found != target:
                return check(name, found)
            with contextlib.suppress(UserError):  # a damaged one in the cache is replaced
                return check(name, found)
        part = _cache() / f"{asset['file']}.part"
        _download(asset, part)
        try:
            advice = "what was downloaded is deleted, try again or ask who published it"
            if asset["unpack"]:
                download.remove(target)
                with whole_folder(target) as temporary:
                    download.unzip(part, temporary)
                    check(name, temporary, advice)
            else:
                os.replace(check(name, part, advice), target)
        finally:
            download.remove(part)
            download.remove(download.version_of(part))
    return target


def _download(asset, part):
    """Fill `part` from the first source that has it."""
    kaggle, url = asset["sources"]["kaggle"], asset["sources"]["url"]
    failures = []
    if kaggle:
        try:
            return download.from_kaggle(kaggle["slug"], kaggle["file"], part)
        except UserError as error:
            failures.append(str(error))
    if url:
        try:
            return download.from_url(url, part, None if asset["unpack"] else asset["bytes"], bool(asset["sha256"]))
        except UserError as error:
            failures.append(str(error))
    if not failures:
        raise UserError(f"{asset['name']} cannot be downloaded: `git checkout weights` brings released files back.")
    raise UserError(f"{' '.join(failures)} Or download {asset['file']} by hand: --dir or {VARIABLE} names its folder.")
