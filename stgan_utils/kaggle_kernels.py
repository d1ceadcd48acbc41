"""Steps as Kaggle kernels: push them, ask how they are, bring what they made into a run folder.

A kernel is a step's notebook with its parameters and two cells of ours (`kaggle_session`), which unpack what earlier
kernels made and leave one archive as this one's output. Pushed again, an unfinished step has its own last output among
its sources and goes on from it. `RUN_DIR/kaggle/<step>/` holds what was pushed last.
"""

import contextlib
import csv
import io
import json
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from stgan_utils import download, files, pipeline, places, runs
from stgan_utils.config import UserError
from stgan_utils.kaggle_session import UNFINISHED

MOUNTS, RUN_DIR = "/kaggle/input", "/kaggle/working/run"
MAX_MINUTES = 500  # sessions end at 9 to 12 hours, and what they had written is then lost
ACCELERATOR = "NvidiaTeslaT4"  # Kaggle's name for T4 × 2; without one it may choose a GPU that torch has dropped
TITLE_LENGTH = 50  # Kaggle answers a longer one with "internal server error"
BEGIN = """from stgan_utils import kaggle_session

data = kaggle_session.begin_session({step!r}, data, run_dir, {mounts!r})"""
END = "kaggle_session.end_session({step!r}, run_dir)"


def push(
    wanted, run_dir, dataset=places.HAM10000, profile="kaggle", package=None, internet=True, params=None, dry_run=False
):
    """Sends steps to Kaggle, where they run, and prints a line for each.

    Args:
        wanted: how a step's name begins, or "all": every step whose earlier steps are done on Kaggle.
        run_dir: the run folder here; it remembers what was pushed.
        dataset: owner/name of the images on Kaggle.
        profile, params: as in `pipeline.run`.
        package: owner/name of a Kaggle data set that holds this package; by default the notebook installs it.
        internet: whether the kernels may use it.
        dry_run: print what would be sent, whether or not its earlier steps are done, and send nothing.

    Raises:
        UserError: wrong input, no token, no network, a `kaggle` package too old for steps that train, Kaggle refuses,
            or a step that was named waits for another.
    """
    run_dir, steps = Path(run_dir).expanduser().resolve(), _choose(wanted)
    if not internet and not package:
        raise UserError("Without internet the kernel cannot install the package: name a data set that holds it.")
    for slug in filter(None, (dataset, package)):
        if not re.fullmatch(r"[^/\s]+/[^/\s]+", slug):
            raise UserError(f"{slug!r} names no Kaggle data set: it must be OWNER/NAME, such as {places.HAM10000}.")
    for step in steps:
        _check_title(run_dir, step.name)  # of all before the first is sent
    given = pipeline.given_per_kind(params or {}, elsewhere="/kaggle")
    settings = {step.name: step.settings(profile, given[step.kind]) for step in steps}
    api = None
    try:
        api = download.kaggle_api()
    except UserError:
        if not dry_run:
            raise
    states = {step.name: _state(api, run_dir, step.name) for step in pipeline.STEPS} if api else {}
    for step in steps:
        state = states.get(step.name, "not pushed")
        waits = [f"{name} ({states[name]})" for name in step.needs if states and states[name] != "done"]
        if not dry_run and state in ("done", "queued", "running"):
            print(f"{step.name}: {state}, left alone")
        elif not dry_run and wanted == "all" and state.startswith("failed"):
            print(f"{step.name}: {state}; once that is mended, push it by its name")
        elif not dry_run and waits:
            if wanted != "all":
                raise UserError(f"{step.name} waits for {', '.join(waits)} on Kaggle: push that first.")
            print(f"{step.name}: waits for {', '.join(waits)}")
        else:
            own = {name: getattr(settings[step.name], name) for name in given[step.kind]}
            if getattr(settings[step.name], "max_minutes", 0) is None:
                own["max_minutes"] = MAX_MINUTES
            mounted = f"{MOUNTS}/{dataset.split('/')[-1]}"
            notebook = _notebook(step, {"data": mounted, "run_dir": RUN_DIR, "profile": profile, **own})
            owner = api.get_config_value("username") if api else "YOUR-NAME"
            sources = [*_earlier(step), *([step.name] if _goes_on(run_dir, step.name, state) else [])]
            metadata = _metadata(step, owner, run_dir, [dataset, *filter(None, [package])], sources, internet)
            if dry_run:
                print(f"{step.name}: {json.dumps(metadata, indent=1)}\nparameters: {notebook.metadata.papermill}")
            else:
                print(f"{step.name}: pushed, {_send(api, run_dir / 'kaggle' / step.name, notebook, metadata)}")


def status(run_dir):
    """{step: state} of what was pushed from a run folder.

    "queued", "running", "done", "unfinished" (its time was up: push it again), or "failed" and why.

    Raises:
        UserError: nothing was pushed, no token, no network.
    """
    run_dir = Path(run_dir).expanduser().resolve()
    pushed = [step.name for step in pipeline.STEPS if (run_dir / "kaggle" / step.name).exists()]
    if not pushed:
        raise UserError(f"Nothing was pushed to Kaggle from {run_dir}: `kaggle push` comes first.")
    api = download.kaggle_api()
    return {name: _state(api, run_dir, name) for name in pushed}


def pull(wanted, run_dir, data):
    """Brings what kernels made into the run folder, so that `pipeline.run` with `data` goes on from there.

    A step that is done here, or that has come as far here, is left alone; an unfinished one is brought with its
    checkpoint, in place of an earlier one of the same settings. Prints a line for each.

    Args:
        wanted: how a step's name begins, or "all": whatever there is.
        run_dir: the run folder here.
        data: where the same data set lies here, laid out as on Kaggle.

    Raises:
        UserError: no such data, no token, no network, a damaged archive, work of another run in the folder, a run that
            works there now; or a step that was named has left nothing.
    """
    run_dir, data = Path(run_dir).expanduser().resolve(), runs.identify(data)
    states = status(run_dir)
    with pipeline.alone_in(run_dir):
        for step in _choose(wanted):
            state = states.get(step.name, "not pushed")
            if runs.result(run_dir, step.name):
                print(f"{step.name}: done here, left alone")
            elif state in ("done", "unfinished"):
                brought = _bring(download.kaggle_api(), run_dir, step.name, state, data)
                print(f"{step.name}: {state}, {'brought' if brought else 'as far here, left alone'}")
            elif wanted == "all":
                print(f"{step.name}: {state}")
            else:
                raise UserError(f"{step.name} has left nothing on Kaggle: {state}.")


# --- to Kaggle ---------------------------------------------------------------------------------------------------


def _choose(wanted):
    chosen = [step for step in pipeline.STEPS if wanted == "all" or (wanted[1:] and step.name.startswith(wanted))]
    if not chosen:
        raise UserError(f"No step {wanted!r}; there are all, {', '.join(step.name for step in pipeline.STEPS)}.")
    return chosen


def _earlier(step):
    """Names of all steps before this one that it builds on, also by way of others: 05 reads the images of 03."""
    by_name = {one.name: one for one in pipeline.STEPS}
    found = {earlier for name in step.needs for earlier in (name, *_earlier(by_name[name]))}
    return [one.name for one in pipeline.STEPS if one.name in found]


def _notebook(step, parameters):
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    if not step.notebook.exists():
        raise UserError(f"There is no notebook {step.notebook}: push from a clone of the repository.")
    notebook = parameterize_notebook(load_notebook_node(str(step.notebook)), parameters)
    injected = [cell.metadata.get("tags") for cell in notebook.cells].index(["injected-parameters"])
    begin = nbformat.v4.new_code_cell(BEGIN.format(step=step.name, mounts=MOUNTS), id="begin-session")
    end = nbformat.v4.new_code_cell(END.format(step=step.name), id="end-session")
    notebook.cells.insert(injected + 1, begin)
    notebook.cells.append(end)
    return notebook


def _metadata(step, owner, run_dir, datasets, sources, internet):
    kernel = _kernel(owner, run_dir, step.name)
    return {
        "id": kernel,
        "title": _title(kernel),
        "code_file": step.notebook.name,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": step.kind in pipeline.TRAIN,
        **({"machine_shape": ACCELERATOR} if step.kind in pipeline.TRAIN else {}),
        "enable_internet": internet,
        "dataset_sources": datasets,
        "competition_sources": [],
        "kernel_sources": [_kernel(owner, run_dir, name) for name in sources],
        "model_sources": [],
    }


def _title(kernel):
    """Kaggle makes the kernel's address of its title."""
    return kernel.split("/")[1].replace("-", " ")


def _check_title(run_dir, step):
    title = _title(_kernel("", run_dir, step))
    if len(title) > TITLE_LENGTH:
        raise UserError(f"Kaggle allows {TITLE_LENGTH} letters and {title!r} has {len(title)}: rename the run folder.")


def _kernel(owner, run_dir, step):
    """owner/slug of a step's kernel: as it was pushed, or as it will be."""
    pushed = run_dir / "kaggle" / step / "kernel-metadata.json"
    if pushed.exists():
        return files.read_json(pushed)["id"]
    return f"{owner}/{re.sub('[^a-z0-9]+', '-', f'stgan {run_dir.name} {step}'.lower())}"


def _goes_on(run_dir, step, state):
    """Whether an earlier session left a checkpoint; one that failed since did not take it away."""
    if not state.startswith("failed"):
        return state == "unfinished"
    pushed = files.read_json(run_dir / "kaggle" / step / "kernel-metadata.json")
    return pushed["id"] in pushed["kernel_sources"]


def _send(api, folder, notebook, metadata):
    """Pushes; `folder` then holds what was sent. Returns the kernel's address."""
    import nbformat

    if "machine_shape" in metadata:
        _check_accelerator()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        nbformat.write(notebook, made / metadata["code_file"])
        files.write_json(made / "kernel-metadata.json", metadata)
        answer = _ask(metadata["id"], api.kernels_push, str(made))
        refused = [answer.error] if answer.error else [*answer.invalid_dataset_sources, *answer.invalid_kernel_sources]
        if refused:
            raise UserError(f"{metadata['id']} was not pushed as it should be, Kaggle refuses: {', '.join(refused)}.")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    return answer.url


def _check_accelerator():
    from kagglesdk.kernels.types.kernels_api_service import ApiSaveKernelRequest  # comes with kaggle

    if not hasattr(ApiSaveKernelRequest, "machine_shape"):
        raise UserError(
            "This kaggle package cannot ask for T4 × 2, and Kaggle may then choose a GPU that torch has dropped: steps "
            "that train are pushed with kaggle 1.8.4 or newer, which needs Python 3.11."
        )


# --- from Kaggle -------------------------------------------------------------------------------------------------


def _state(api, run_dir, step):
    if not (run_dir / "kaggle" / step).exists():
        return "not pushed"
    kernel = _kernel(None, run_dir, step)
    answer = _ask(kernel, api.kernels_status, kernel)
    state = answer.status.name.lower()
    if state in ("queued", "running", "new_script"):
        return "running" if state == "running" else "queued"
    if state != "complete":
        why = f" ({' '.join(answer.failure_message.split())})" if answer.failure_message else ""
        return f"failed: {state}{why}, see https://www.kaggle.com/code/{kernel}"
    names, page = [], None
    while page != "":
        listed = _ask(kernel, api.kernels_list_files, kernel, page_token=page)
        names, page = [*names, *(file.name for file in listed.files)], listed.next_page_token or ""
    for found, ending in (("done", ""), ("unfinished", UNFINISHED)):
        if f"{step}{ending}.zip" in names:
            return found
    return f"failed: it left no {step}.zip, see https://www.kaggle.com/code/{kernel}"


def _bring(api, run_dir, step, state, data):
    """Downloads a step's archive; its folder appears whole, with the paths of this machine, or not at all.

    Returns:
        False where this machine's unfinished work has come as far: then it stays.
    """
    kernel = _kernel(None, run_dir, step)
    with TemporaryDirectory(dir=run_dir, prefix=".kaggle") as temporary:
        archive = Path(temporary) / f"{step}{'' if state == 'done' else UNFINISHED}.zip"
        _ask(kernel, api.kernels_output, kernel, temporary)
        if not archive.exists():
            raise UserError(f"Kaggle sent no {archive.name} of {kernel}: try again.")
        made = Path(temporary) / step
        made.mkdir()
        download.unzip(archive, made)
        with ZipFile(archive) as opened:
            there = opened.comment.decode()
        _settle(made, run_dir, step, there, data)
        if state == "unfinished" and _progress(run_dir / step) >= _progress(made):
            return False
        if (run_dir / step).exists():  # an earlier checkpoint
            os.replace(run_dir / step, Path(temporary) / "before")
        os.replace(made, run_dir / step)
    return True


def _progress(folder):
    """How far an unfinished step has come: iterations of a GAN, epochs of a classifier; -1 without a checkpoint."""
    from stgan_utils import checkpoints  # torch

    checkpoint = folder / "checkpoint.safetensors"
    if not checkpoint.exists():
        return -1
    header = checkpoints.read_header(checkpoint)
    return header.get("iteration", len(header["history"]))


def _settle(made, run_dir, step, run_dir_there, data):
    """Turns Kaggle's paths in a step's tables and results into this machine's, and its fingerprints with them."""
    begun = files.read_json(made / "settings.json")
    runs.check_folder(run_dir, step, begun["settings"], data)
    here = {run_dir_there: str(run_dir), begun["data"]: data}
    for name in begun["inputs"]:
        if not runs.result(run_dir, name):
            raise UserError(f"{step} builds on {name}, which is not in {run_dir}: pull that first.")
    if begun["inputs"] != {name: _fingerprint(run_dir, name, begun["data"]) for name in begun["inputs"]}:
        raise UserError(f"{step} on Kaggle was made from other earlier steps than those in {run_dir}: push it again.")

    for path in made.rglob("*.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            rows = [[_moved(cell, here) for cell in row] for row in csv.reader(file)]
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        if step == runs.START and path.name == "table.csv":
            at = rows[0].index("path")
            missing = sum(not Path(row[at]).exists() for row in rows[1:])
            if missing:
                raise UserError(f"{data} lacks {missing:,} of the images: it must be laid out as {begun['data']}.")
    inputs = {name: _fingerprint(run_dir, name, data) for name in begun["inputs"]}
    for path in (made / "settings.json", made / "result.json"):
        if path.exists():
            values = {**files.read_json(path), "data": data, "inputs": inputs}
            if "fingerprint" in values:
                values["fingerprint"] = runs.fingerprint(step, values["settings"], data, inputs, values.get("content"))
            files.write_json(path, values)


def _moved(text, here):
    for old, new in here.items():
        if text == old or text.startswith(f"{old}/"):
            return new + text[len(old) :]
    return text


def _fingerprint(run_dir, step, data):
    """The fingerprint of a step that is done here, had its data lain at `data`."""
    made = runs.result(run_dir, step)
    inputs = {name: _fingerprint(run_dir, name, data) for name in made["inputs"]}
    return runs.fingerprint(step, made["settings"], data, inputs, made.get("content"))


def _ask(kernel, call, *arguments, **options):
    """What the `kaggle` package answers; what it prints is dropped.

    Raises:
        UserError: no network, or Kaggle refuses.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return call(*arguments, **options)
    except Exception as error:  # the package's versions share no class of errors
        code = getattr(getattr(error, "response", None), "status_code", None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if code is None and isinstance(error, OSError):
            raise UserError(f"Kaggle cannot be reached ({reason}): is there a network?") from None
        raise UserError(f"{kernel}: Kaggle refuses ({reason}): is it yours, and is the token still good?") from None
