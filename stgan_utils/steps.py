"""A step at work: `open_step` begins it or goes on with it, `OpenStep` collects what it shows and writes it down.

What a run folder is, and when a step in it counts as done, is said in `runs`.
"""

import math
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stgan_utils import files, places, runs, versions
from stgan_utils.config import UserError
from stgan_utils.lesions import MINORITY
from stgan_utils.runs import PHANTOM, START

PHANTOM_NAME = "phantom — drawn, not photographed"


def open_step(step, settings, data, run_dir, profile, needs=()):
    """Begins a step, or goes on with one that was cut off: its folder is there and `settings.json` is in it.

    Says what it found, and in a sentence each what will be missed (`outlook`).

    Args:
        step: the notebook's name without `.ipynb`.
        settings: the step's settings, an instance of one of `config.SETTINGS`.
        data: "phantom", a folder or file, or "auto"; see `runs.identify`.
        run_dir: the run folder; a relative one lies where results outlive the session (`places.results`).
        needs: the earlier steps that this one builds on.

    Returns:
        OpenStep.

    Raises:
        UserError: no such data, a run folder that is the dataset's own, an earlier step is missing or was made from
            other data, or the step's folder belongs to a run with other settings.
    """
    automatic, data = data == runs.AUTO, runs.identify(data)
    run_dir = (places.results() / Path(run_dir).expanduser()).resolve()
    for name in (*needs, step):
        _adopt(name, run_dir)
    for name in needs:
        if not runs.result(run_dir, name):
            raise UserError(
                f"{name} has not been run in {run_dir}: run notebooks/{name}.ipynb first{places.advice('earlier')}."
            )
    for name in dict.fromkeys([*needs, START]):
        earlier = runs.result(run_dir, name)
        if step != START and earlier and earlier["data"] != data:
            way_on = f"not from {data}: choose another run folder"
            if automatic and data == PHANTOM:
                way_on = f"which is not here: {places.advice('data')}, or choose another run folder"
            raise UserError(f"{run_dir / name} was made from {earlier['data']}, {way_on}.")
    inputs = runs.fingerprints(run_dir, needs)
    runs.refuse_dataset_folder(run_dir, data)
    runs.check_folder(run_dir, step, settings, data, inputs)
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
            fallback = PHANTOM_NAME if self.phantom else Path(self.data).name
            self.data_name = (runs.result(self.run_dir, START) or {}).get("data_name", fallback)

    @property
    def phantom(self):
        """Whether its images are drawn, not photographed."""
        return self.data == PHANTOM

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
        steps = (runs.result(self.run_dir, f"03_stage2_{code}") or {} for code in MINORITY)
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

        title = drawn(title) if self.phantom else title
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
        mark = runs.fingerprint(self.step, self.settings, self.data, self.inputs, content)
        before = runs.result(self.run_dir, self.step) or {}
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
                "versions": versions.found(),
                "inputs": self.inputs,
                "fingerprint": mark,
                "content": content,
                **({"listing": runs.listing(self.data)} if self.step == START else {}),
                "numbers": numbers,
                "figures": self.figures,
                "tables": self.tables,
                "models": self.models,
                "learnt": drawn(learnt) if self.phantom else learnt,
            }
        )
        files.write_json(self.folder / "result.json", values)
        if values["learnt"]:
            print(values["learnt"])
        print(f"{self.step} · done in {values['seconds']:.0f} s · {self.folder / 'result.json'}")
        return values


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
