"""The order of the notebooks, and running them.

A step is one call: a notebook and its parameters in, `RUN_DIR/<step>/result.json` out (`run_step`). Everything else
here decides which steps are left to do; `engine` runs them side by side. Nothing heavy is imported: a run that finds
everything done ends at once.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from stgan_utils import engine, files, places, runs
from stgan_utils.config import SETTINGS, UserError, resolve
from stgan_utils.engine import StepFailed
from stgan_utils.lesions import MINORITY

NOTEBOOKS = places.repository() / "notebooks"
TRAIN = ("baseline", "stage1", "stage2", "classifier")  # the kinds of step that want a GPU


@dataclass(frozen=True)
class Step:
    """One notebook of the sequence; `kind` is its key in `config.SETTINGS`."""

    name: str
    kind: str
    needs: tuple = ()
    lesion: str | None = None
    folder: Path = NOTEBOOKS

    @property
    def notebook(self):
        return self.folder / f"{self.name}.ipynb"

    def settings(self, profile, given):
        """The step's settings under a profile and the values given; see `config.resolve`."""
        return resolve(self.kind, profile, {**given, **({"lesion": self.lesion} if self.lesion else {})})


def _steps():
    start, baseline, stage1 = runs.START, "01_baseline", "02_stage1_global_gan"
    stage2 = tuple(f"03_stage2_{code}" for code in MINORITY)
    before_report = (
        Step(start, "data"),
        Step(baseline, "baseline", (start,)),
        Step(stage1, "stage1", (start, baseline)),  # distances may be measured in the baseline's features
        *(Step(name, "stage2", (start, baseline, stage1), code) for name, code in zip(stage2, MINORITY, strict=True)),
        Step("04_deduplicate", "dedup", (start, *stage2)),
        Step("05_classifier", "classifier", (start, baseline, "04_deduplicate")),
        Step("06_post_mortem", "post_mortem", (start, baseline, "05_classifier")),
    )
    return (*before_report, Step("07_report", "report", tuple(step.name for step in before_report)))


STEPS = _steps()


def run(data, profile, out, only=None, start=None, jobs=1, force=False, params=None, on="local", address=None):
    """Runs what is left to do of the sequence and prints a line for each step.

    Args:
        data: "phantom", or a dataset's folder or file.
        profile: one of `profiles.PROFILES`.
        out: the run folder.
        only: run the steps whose name begins with this, and no others.
        start: begin at the first step whose name begins with this.
        jobs: how many notebooks may run side by side on one machine; each gets its share of the cores.
        force: delete what the chosen steps left there before, and run them again; where step 00 is one of them, the
            others once it is through.
        params: {setting: value} for every step that knows the setting; "stage1.iterations" means one kind of step.
        on, address: "local", or "ray" and a cluster's address; see `engine.choose`.

    Raises:
        UserError: anything asked for is wrong, or another run works in that folder; known before any work starts.
        StepFailed, runs.Unfinished: a notebook failed, or ran out of time. Steps then running are finished, no other is
            started, and the same call goes on from there.
    """
    asked, data, out = data, runs.identify(data), Path(out).expanduser().resolve()
    given = given_per_kind(params or {})
    chosen = _choose(only, start)
    settings = {step.name: step.settings(profile, given[step.kind]) for step in chosen}
    if (out / "notebooks").resolve() in {step.notebook.parent.resolve() for step in chosen}:
        raise UserError(f"{out} holds the notebooks themselves: choose another run folder (--out), such as runs/demo.")
    runs.refuse_dataset_folder(out, data)
    for step in chosen:
        if not step.notebook.exists():
            raise UserError(f"There is no notebook {step.notebook}: run from a clone of the repository.")
        if not force:
            runs.check_folder(out, step.name, settings[step.name], data)
        if getattr(settings[step.name], "weights", "train") not in ("train", "auto"):
            from stgan_utils import weights  # pandas: only who asks for weights by name pays for it

            weights.choose_released(settings[step.name])

    def parameters(step):
        overrides = {name: getattr(settings[step.name], name) for name in given[step.kind]}
        return {"data": data, "run_dir": str(out), "profile": profile, **overrides}

    def done(step):
        # The page tells of the other steps: it is made anew whenever one of them has run since.
        stale = step.kind == "report" and _written(out, step.name) < max(_written(out, name) for name in step.needs)
        return not stale and runs.is_done(out, step.name, settings[step.name], data)

    def task(step):
        peers = sum(other.kind == step.kind for other in STEPS)
        call, trains = (step, parameters(step)), step.kind in TRAIN
        return engine.Task(step.name, run_step, call, step.needs, peers, trains, partial(done, step))

    tasks, reported = [task(step) for step in chosen], chosen[-1].kind == "report"
    place = engine.choose(on, tasks, out, jobs, address)
    if (asked, data) == (runs.AUTO, runs.PHANTOM):
        print("There is no HAM10000 here: the images are phantom, drawn and no evidence.", flush=True)
    with alone_in(out):
        files.sweep(out / "notebooks")
        if force and chosen[0].name == runs.START:  # that the data can be read is known before hours of work go
            shutil.rmtree(out / runs.START, ignore_errors=True)
            engine.run_all(tasks[:1], engine.choose(on, tasks[:1], out, jobs, address))
            del chosen[0], tasks[0]
        if force:
            for step in chosen:
                shutil.rmtree(out / step.name, ignore_errors=True)
        engine.run_all(tasks, place)
    if reported:
        print(f"report: {out / 'report.html'}", flush=True)


def run_step(step, parameters):
    """Runs one notebook with papermill; afterwards `result.json` stands in the step's folder.

    The executed notebook lies in `RUN_DIR/notebooks/`, after a failure too; what a kernel that died wrote to standard
    error lies beside it.

    Args:
        step: a Step.
        parameters: `data`, `run_dir`, `profile` and settings of the step that differ from the profile's.

    Returns:
        Seconds it took.

    Raises:
        UserError, runs.Unfinished: as the notebook raised it.
        StepFailed: any other error in a cell, a kernel that died, a notebook that wrote no result.
    """
    from stgan_utils import kernels

    kernels.prepare()
    import papermill
    from nbclient.exceptions import DeadKernelError

    began, failure = time.monotonic(), None
    executed = Path(parameters["run_dir"]) / "notebooks" / step.notebook.name
    with files.atomic_path(executed) as temporary, _stderr_kept() as said:
        try:
            papermill.execute_notebook(
                *(str(path).replace("{", "{{").replace("}", "}}") for path in (step.notebook, temporary)),
                parameters,
                kernel_name="python3",
                progress_bar=False,
                cwd=str(step.notebook.parent),
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
                kernel_manager_class=kernels.KernelManager,
            )
        except papermill.PapermillExecutionError as error:
            failure = error
        except DeadKernelError as error:
            failure, last_words = error, said()
    if isinstance(failure, DeadKernelError):
        cells = [cell for cell in files.read_json(executed)["cells"] if cell["cell_type"] == "code"]
        number = sum(cell["metadata"]["papermill"]["start_time"] is not None for cell in cells)
        executed.with_suffix(".stderr.txt").write_bytes(last_words)
        raise StepFailed(f"{step.name} died in cell In [{number}], most often for want of memory; see {executed}.")
    if failure is not None:
        own = {"UserError": UserError, "Unfinished": runs.Unfinished}.get(failure.ename)
        if own:
            raise own(failure.evalue)
        reason = (failure.evalue.strip().splitlines() or [""])[-1]
        raise StepFailed(
            f"{step.name} failed in cell In [{failure.exec_count}] with {failure.ename}: {reason}; see {executed}."
        )
    if runs.result(parameters["run_dir"], step.name) is None:
        raise StepFailed(f"{step.name} ended without a result.json: its last cell must call step.finish.")
    return time.monotonic() - began


@contextlib.contextmanager
def _stderr_kept():
    """Keeps what this process and a kernel that it starts write to standard error, libraries in C too, from the user.

    A user reads one sentence of ours there, not what libzmq has to say of a kernel that ends. Yields a function that
    returns what was written.
    """
    sys.stderr.flush()
    shown = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield lambda: os.pread(log.fileno(), 1 << 20, 0)
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            os.close(shown)


@contextlib.contextmanager
def alone_in(out):
    """Two programs in one run folder would write the same files: the second is refused.

    Raises:
        UserError: another works there.
    """
    import filelock

    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(f"Another run works in {out}: wait until it ends, or choose another folder (--out).") from None


def given_per_kind(params, elsewhere=None):
    """{kind of step: {setting: value}}; a name that no step knows is refused, and a file that is not there.

    Args:
        params: as in `run`.
        elsewhere: the folder of another machine, where the steps will run, that files named in `params` lie below.
    """
    known = {kind: {field.name for field in fields(settings)} - {"lesion"} for kind, settings in SETTINGS.items()}
    given = {kind: {} for kind in known}
    for key, value in params.items():
        kind, _, name = key.rpartition(".")
        takers = [taker for taker in known if name in known[taker] and kind in ("", taker)]
        if not takers:
            names = sorted(set().union(*known.values()))
            raise UserError(f"No step has a setting {key!r}; there are {', '.join(names)}.")
        if name in ("start_from", "continue_from", "images") and value:
            value = _placed(name, value, elsewhere)
        for taker in takers:
            # A setting of one kind goes before the same setting of every kind, in whatever order they stand.
            if kind or f"{taker}.{name}" not in params:
                given[taker][name] = value
    return given


def _placed(name, path, elsewhere):
    if elsewhere:
        if not str(path).startswith(f"{elsewhere}/"):
            raise UserError(f"{name} is {path!r}: the steps run elsewhere, where it lies below {elsewhere}/.")
        return path
    path = Path(path).expanduser().resolve()  # notebooks run in their own folder
    if not path.exists():
        raise UserError(f"{name} is '{path}', there is no such {'folder' if name == 'images' else 'file'}.")
    return str(path)


def _choose(only, start):
    names = [step.name for step in STEPS]
    for wanted in (only, start):
        if wanted is not None and (len(wanted) < 2 or not any(name.startswith(wanted) for name in names)):
            raise UserError(f"No step {wanted!r}; there are {', '.join(names)}.")
    first = 0 if start is None else next(i for i, name in enumerate(names) if name.startswith(start))
    chosen = [step for step in STEPS[first:] if only is None or step.name.startswith(only)]
    if not chosen:
        raise UserError(f"Step {only!r} comes before {start!r}: nothing is left to run; say one of the two.")
    return chosen


def _written(out, name):
    path = out / name / "result.json"
    return path.stat().st_mtime_ns if path.exists() else 0
