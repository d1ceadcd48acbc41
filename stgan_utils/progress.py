"""How the tasks of a cluster are: a line for every change and, on a terminal, one table of all of them."""

import time

from rich.live import Live
from rich.table import Column, Table

from stgan_utils import files
from stgan_utils.engine import say

RUNNING = "running"


class Progress:
    """Lines with the time of day, and a table: redrawn on a terminal, elsewhere printed once, at the end.

    Args:
        tasks: `engine.Task`s.
        run_dir: the run folder; how far a training is comes from the `history.csv` in its folder.
        notes: a folder in which every worker leaves `<task>.json` when it begins: {"machine", "node"}.
    """

    def __init__(self, tasks, run_dir, notes):
        self._run_dir, self._notes_dir = run_dir, notes
        self._states = {task.name: "waiting" for task in tasks}
        self._notes, self._since = {}, {}
        self._live = Live(get_renderable=self._table, auto_refresh=False)
        self.start, self.stop = self._live.start, self._live.stop

    def say(self, name, what):
        """A task has come to another state."""
        self._states[name] = what
        say(name, what)

    def look(self):
        """Says which tasks have begun since the last look, again on another machine too, and redraws the table."""
        for path in sorted(self._notes_dir.rglob("[!.]*.json")):  # the others are half written
            name = path.relative_to(self._notes_dir).with_suffix("").as_posix()
            note = files.read_json(path)
            if note != self._notes.get(name):
                self._notes[name], self._since[name] = note, time.monotonic()
                say(name, f"on {note['machine']}, node {note['node']}")
                self._states[name] = RUNNING
        self._live.refresh()

    def _table(self):
        table = Table("step", Column("state", no_wrap=True), "minutes", "machine", "at")
        for name, state in self._states.items():
            note = self._notes.get(name, {"machine": ""})
            minutes = f"{(time.monotonic() - self._since[name]) / 60:.1f}" if state == RUNNING else ""
            table.add_row(name, state, minutes, note["machine"], self._reached(name))
        return table

    def _reached(self, name):
        """Such as "iteration 250": what the training's last checkpoint holds."""
        history = self._run_dir / name / "history.csv"
        if not history.exists():
            return ""
        head, *rows = (line.split(",")[0] for line in history.read_text(encoding="utf-8").splitlines())
        return f"{head} {rows[-1]}" if rows else ""
