"""The run folder: what each step leaves in it, and what the next step may rely on.

Every step owns `RUN_DIR/<step>/`. `settings.json` says what the folder was begun with, `result.json` that the step was
finished. Both are compared with what is asked for, so that two runs never mix in one folder.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from stgan_utils import files, places
from stgan_utils.config import UserError

PHANTOM = "phantom"
AUTO = "auto"
START = "00_start_here"
# How long a session may work, and what is tried out beside the training, have no say in what later steps get.
NOT_COMPARED = ("max_minutes", "ablation_iterations")


class Unfinished(Exception):
    """A step stopped in good order before its end (its time was up) and goes on when it is run again.

    The message says where it stopped; the command line prints it and exits with status 4.
    """


def identify(data):
    """What tells one dataset from another: "phantom", or the resolved path of a folder or file.

    Args:
        data: one of these; or "auto": the HAM10000 that `places.dataset` finds on Kaggle or Colab, else "phantom".

    Raises:
        UserError: there is nothing at that path.
    """
    if str(data) == AUTO:
        data = places.dataset() or PHANTOM
    if str(data) == PHANTOM:
        return PHANTOM
    path = Path(data).expanduser().resolve()
    if not path.exists():
        raise UserError(f"There is no {path}: give data as a dataset's folder or file, or as '{PHANTOM}'.")
    return str(path)


def fingerprint(step, settings, data, inputs, content=None):
    """16 hex digits that are equal exactly when step, settings, data, the earlier steps' fingerprints and content are.

    Args:
        content: what a finished step made, or read in the dataset: later steps rest on that, and not on the settings
            alone that it was made with.
    """
    canonical = json.dumps([step, _compared(settings), data, inputs, content], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def listing(data):
    """A digest of the names and sizes of a dataset's files: another one, and step 00 has to look again.

    Neither hidden files nor run folders that lie in the dataset's count. Of a dataset named by a file, the files beside
    it and below.
    """
    if data == PHANTOM:
        return PHANTOM
    folder = Path(data) if Path(data).is_dir() else Path(data).parent
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        if START in folders:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        there = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [[str(file.relative_to(folder)), file.stat().st_size] for file in there if file.exists()]
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()[:16]


def result(run_dir, step):
    """What a step's `result.json` holds, or None where the step has not been finished."""
    path = Path(run_dir) / step / "result.json"
    return files.read_json(path) if path.exists() else None


def is_done(run_dir, step, settings, data):
    """Whether the step was finished with these settings, this data (as `identify` gives it) and the present inputs."""
    stored = result(run_dir, step)
    if stored is None:
        return False
    if step == START and stored.get("listing") != listing(data):
        return False
    inputs = fingerprints(run_dir, stored["inputs"])
    return stored["fingerprint"] == fingerprint(step, settings, data, inputs, stored.get("content"))


def refuse_dataset_folder(run_dir, data):
    """Nothing, unless the run folder is the dataset's own: then files that come or go there would not be noticed.

    Raises:
        UserError: it is.
    """
    if data != PHANTOM and Path(run_dir).resolve() == (Path(data).parent if Path(data).is_file() else Path(data)):
        raise UserError(f"{run_dir} is the dataset's own folder: choose another run folder (--out).")


def check_folder(run_dir, step, settings, data, inputs=None):
    """Nothing, where the step's folder is new, empty or was begun with the same settings, data and inputs.

    Args:
        inputs: {earlier step: fingerprint}; None leaves them out of the comparison (they may be about to change).

    Raises:
        UserError: the folder holds work of another run; the message names what differs.
    """
    folder = Path(run_dir) / step
    begun_with = folder / "settings.json"
    made = {path.name for path in folder.iterdir()} - {begun_with.name, "figures"} if folder.exists() else ()
    if not begun_with.exists() or not made:  # pictures of what was to be done are no work to lose
        return
    begun = files.read_json(begun_with)
    # A setting that came later than the folder stood at what is its default now.
    there, asked = {**_compared(type(settings)()), **_compared(begun["settings"])}, _compared(settings)
    differ = [
        f"{name} {there.get(name)!r} there, {asked.get(name)!r} asked for"
        for name in dict.fromkeys([*there, *asked])
        if there.get(name) != asked.get(name)
    ]
    if begun["data"] != data:
        differ.append(f"data {begun['data']!r} there, {data!r} asked for")
    if inputs is not None and asked:  # a step with nothing to set, the report, is made of whatever is there now
        differ += [f"{name} was made anew" for name in inputs if begun["inputs"].get(name) != inputs[name]]
    if differ:
        raise UserError(
            f"{folder} belongs to a run with other settings ({'; '.join(differ)}): choose another run folder (--out), "
            "or use --force or delete that folder to make it anew."
        )


def fingerprints(run_dir, steps):
    """{step: the fingerprint in its `result.json`, None where it has not been finished}."""
    return {name: (result(run_dir, name) or {}).get("fingerprint") for name in steps}


def _compared(settings):
    values = settings if isinstance(settings, dict) else asdict(settings)
    return {name: value for name, value in values.items() if name not in NOT_COMPARED}
