"""The run folder: what each step leaves in it, and what the next step may rely on.

Every step owns `RUN_DIR/<step>/`. `settings.json` says what the folder was begun with, `result.json` that the step was
finished. Both are compared with what is asked for, so that two runs never mix in one folder.
"""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import stgan_utils
from stgan_utils import files, places
from stgan_utils.config import UserError
from stgan_utils.lesions import MINORITY

PHANTOM = "phantom"
AUTO = "auto"
PHANTOM_NAME = "phantom — drawn, not photographed"
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


def open_step(step, settings, data, run_dir, profile, needs=()):
    """Begins a step, or goes on with one that was cut off: its folder is there and `settings.json` is in it.

    Says what it found, and in a sentence each what will be missed (`outlook`).

    Args:
        step: the notebook's name without `.ipynb`.
        settings: the step's settings, an instance of one of `config.SETTINGS`.
        data: "phantom", a folder or file, or "auto"; see `identify`.
        run_dir: the run folder; a relative one lies where results outlive the session (`places.results`).
        needs: the earlier steps that this one builds on.

    Returns:
        OpenStep.

    Raises:
        UserError: no such data, a run folder that is the dataset's own, an earlier step is missing or was made from
            other data, or the step's folder belongs to a run with other settings.
    """
    automatic, data = data == AUTO, identify(data)
    run_dir = (places.results() / Path(run_dir).expanduser()).resolve()
    for name in (*needs, step):
        _adopt(name, run_dir)
    for name in needs:
        if not result(run_dir, name):
            raise UserError(
                f"{name} has not been run in {run_dir}: run notebooks/{name}.ipynb first{places.advice('earlier')}."
            )
    for name in dict.fromkeys([*needs, START]):
        earlier = result(run_dir, name)
        if step != START and earlier and earlier["data"] != data:
            way_on = f"not from {data}: choose another run folder"
            if automatic and data == PHANTOM:
                way_on = f"which is not here: {places.advice('data')}, or choose another run folder"
            raise UserError(f"{run_dir / name} was made from {earlier['data']}, {way_on}.")
    inputs = fingerprints(run_dir, needs)
    refuse_dataset_folder(run_dir, data)
    check_folder(run_dir, step, settings, data, inputs)
    files.sweep(run_dir / step)
    begun = {"step": step, "settings": asdict(settings), "data": data, "profile": profile, "inputs": inputs}
    files.write_json(run_dir / step / "settings.json", begun)
    from stgan_utils import outlook  # IPython

    opened = OpenStep(step, settings, data, profile, run_dir, inputs)
    outlook.introduce(opened, drawn_for_want=automatic and data == PHANTOM)
    return opened


def _adopt(step, run_dir):
    """Copies a step, and what it builds on, that another notebook ran and that Kaggle mounted for this one."""
    if (run_dir / step).exists():
        return
    left = next(places.mounted(f"{run_dir.name}/{step}/settings.json"), None)
    if left is None:
        return
    from stgan_utils.layouts import whole_folder  # pandas

    with whole_folder(run_dir / step) as temporary:
        shutil.copytree(left.parent, temporary, dirs_exist_ok=True)
    print(f"{step}: from {left.parent}")
    for earlier in files.read_json(left)["inputs"]:
        _adopt(earlier, run_dir)


def drawn(text):
    """What a text says of real images, said of phantom ones; names such as `real-cpu` stay."""
    return re.sub(r"\b([Rr])eal\b(?!-)", lambda found: "Phantom" if found[1] == "R" else "phantom", text)


def save_figure(fig, path, source):
    """Saves a matplotlib Figure with what it was drawn from below it: `source`, as `OpenStep.data_name`.

    Drawn from phantom images it says so in colour, and none of its texts calls them real.
    """
    from matplotlib.text import Text

    look = {"fontsize": 7, "color": "0.4"}
    if PHANTOM_NAME in source:
        look = {"fontsize": 8, "color": "#a33c00"}
        for text in fig.findobj(Text):
            text.set_text(drawn(text.get_text()))
    # Below the axes, where `bbox_inches="tight"` makes room for it.
    fig.text(0.99, -0.01, f"data: {source}", ha="right", va="top", **look)
    with files.atomic_path(path) as temporary:
        fig.savefig(temporary, dpi=110, bbox_inches="tight", facecolor="white")


@dataclass
class OpenStep:
    """A step at work: collects figures, tables and models, and `finish` writes them down.

    `data_name` is what figures and the report call the data; step 00 sets it, such as "HAM10000, n = 10,015".
    """

    step: str
    settings: object
    data: str
    profile: str
    run_dir: Path
    inputs: dict
    data_name: str = ""
    figures: list = field(default_factory=list)
    tables: list = field(default_factory=list)
    models: list = field(default_factory=list)

    def __post_init__(self):
        from stgan_utils import device  # torch: only a step at work pays for it

        self.device = device.describe(getattr(self.settings, "width", 0))
        self._started = time.monotonic()
        if not self.data_name:
            fallback = PHANTOM_NAME if self.data == PHANTOM else Path(self.data).name
            self.data_name = (result(self.run_dir, START) or {}).get("data_name", fallback)

    @property
    def folder(self):
        """Where this step writes."""
        return self.run_dir / self.step

    def earlier(self, name):
        """The `result.json` of an earlier step.

        Raises:
            UserError: it has not been run.
        """
        return files.read_json(self.run_dir / name / "result.json")

    @property
    def made_by(self):
        """Whose weights made this run's generated images, for figures that show them; None: its own."""
        steps = (result(self.run_dir, f"03_stage2_{code}") or {} for code in MINORITY)
        released = [step["numbers"]["released"] for step in steps if "released" in step.get("numbers", {})]
        return f"generated: released weights {', '.join(released)}" if released else None

    def figure(self, fig, name, caption, data_name=None):
        """Saves a matplotlib Figure as `figures/<name>.png`, as `save_figure` does, and shows it above its caption.

        Args:
            data_name: what it was drawn from, where that is not this run's data alone.
        """
        from IPython.display import Image, Markdown, display

        source = data_name or self.data_name
        path = self.folder / "figures" / f"{name}.png"
        save_figure(fig, path, source)
        caption = drawn(caption) if PHANTOM_NAME in source else caption
        self.figures.append({"file": str(path.relative_to(self.folder)), "caption": caption})
        display(Image(filename=str(path)), Markdown(f"*{caption}*"))

    def table(self, table, title):
        """Remembers a DataFrame for the report, its index too where that has a name, and shows it below its title.

        The title calls phantom images what they are, as in `figure`.
        """
        from IPython.display import Markdown, display

        title = drawn(title) if self.data == PHANTOM else title
        display(Markdown(f"**{title}**"), table)
        flat = table.reset_index() if table.index.names != [None] else table
        rows = [list(row) for row in flat.itertuples(index=False, name=None)]
        self.tables.append({"title": title, "columns": [str(name) for name in flat.columns], "rows": rows})

    def model(self, path, origin="made here"):
        """Remembers a model file, its checksum and its origin: "made here", or what it was used for and whose it is."""
        path = Path(path).resolve()
        # Inside the run folder relative to the step's own, so that a run can be moved.
        name = os.path.relpath(path, self.folder) if path.is_relative_to(self.run_dir) else path
        self.models.append({"file": Path(name).as_posix(), "origin": origin, "sha256": files.sha256(path)})

    def finish(self, numbers, learnt, content=None):
        """Writes `result.json`: from now on the step counts as done.

        A finished step that is gone through again, and finds all of it there, keeps the time that it took.

        Args:
            numbers: what was measured, a mapping of anything JSON can hold and NumPy's own numbers; NaN becomes null.
            learnt: one sentence for the report; it calls phantom images what they are, as in `figure`.
            content: a digest of what later steps take from this one besides its models, whose checksums count anyway.

        Returns:
            What was written, as a dict.
        """
        content = [content, *(model["sha256"] for model in self.models)]
        mark = fingerprint(self.step, self.settings, self.data, self.inputs, content)
        before = result(self.run_dir, self.step) or {}
        spent = before["seconds"] if before.get("fingerprint") == mark else 0
        values = _plain(
            {
                "step": self.step,
                "settings": asdict(self.settings),
                "data": self.data,
                "data_name": self.data_name,
                "profile": self.profile,
                "seed": getattr(self.settings, "seed", None),
                "seconds": max(spent, round(time.monotonic() - self._started, 1)),
                "device": self.device,
                "versions": _versions(),
                "inputs": self.inputs,
                "fingerprint": mark,
                "content": content,
                **({"listing": listing(self.data)} if self.step == START else {}),
                "numbers": numbers,
                "figures": self.figures,
                "tables": self.tables,
                "models": self.models,
                "learnt": drawn(learnt) if self.data == PHANTOM else learnt,
            }
        )
        files.write_json(self.folder / "result.json", values)
        if values["learnt"]:
            print(values["learnt"])
        print(f"{self.step} · done in {values['seconds']:.0f} s · {self.folder / 'result.json'}")
        return values


def fingerprints(run_dir, steps):
    """{step: the fingerprint in its `result.json`, None where it has not been finished}."""
    return {name: (result(run_dir, name) or {}).get("fingerprint") for name in steps}


def _compared(settings):
    values = settings if isinstance(settings, dict) else asdict(settings)
    return {name: value for name, value in values.items() if name not in NOT_COMPARED}


def _plain(value):
    """The value as JSON can hold it: NumPy's numbers and arrays as Python's, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # NumPy, pandas and torch alike
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def _versions():
    found = {"python": platform.python_version(), "stgan_utils": stgan_utils.__version__}
    for name in ("torch", "torchvision", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "git": git_commit()}


def git_commit():
    """The commit of the checkout that this package runs from, or None: installed, or on a machine without git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # git itself would go on to a repository that happens to lie around it
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
