"""The pipeline on tiny notebooks: what runs, what is skipped, and what a failure leaves behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import filelock
import nbformat
import pytest

from stgan_utils import pipeline, runs
from stgan_utils.config import UserError
from stgan_utils.pipeline import Step, StepFailed

ROOT = Path(__file__).resolve().parents[1]
BEGIN = """
import sys, time, types
from pathlib import Path
# Torch takes seconds to import and these notebooks compute nothing.
sys.modules["stgan_utils.device"] = types.SimpleNamespace(describe=lambda: "cpu")
from stgan_utils import config, report, runs, steps
step = steps.open_step({name!r}, config.resolve({kind!r}, profile, globals()), data, run_dir, profile, {needs!r})
"""
# Each waits for the other: only side by side do they end.
MEET = """
(step.run_dir / {mine!r}).touch()
while not (step.run_dir / {other!r}).exists():
    time.sleep(0.05)
"""


def write_notebook(step, body):
    cells = [nbformat.v4.new_code_cell("data = 'phantom'\nrun_dir = '.'\nprofile = 'smoke'\niterations = None")]
    cells[0].metadata["tags"] = ["parameters"]
    begin = BEGIN.format(name=step.name, kind=step.kind, needs=step.needs)
    cells += [nbformat.v4.new_code_cell(source) for source in (begin, body, "step.finish({}, 'learnt')")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), step.notebook)


@pytest.fixture
def sequence(tmp_path, monkeypatch):
    """Four steps: 00, then 01 and 02 that only end side by side, then the report."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    start, baseline, stage1 = runs.START, "01_baseline", "02_stage1_global_gan"
    steps = (
        Step(start, "data", folder=folder),
        Step(baseline, "baseline", (start,), folder=folder),
        Step(stage1, "stage1", (start,), folder=folder),
        Step("07_report", "report", (start, baseline, stage1), folder=folder),
    )
    bodies = ("", MEET.format(mine="a", other="b"), MEET.format(mine="b", other="a"), "report.build(run_dir)")
    for step, body in zip(steps, bodies, strict=True):
        write_notebook(step, body)
    monkeypatch.setattr(pipeline, "STEPS", steps)
    return steps


def written(out, steps):
    return {step.name: (out / step.name / "result.json").stat().st_mtime_ns for step in steps}


def test_runs_side_by_side_then_skips_then_refuses_other_settings(sequence, tmp_path, capsys):
    out = tmp_path / "run {1}"  # papermill would take this for a format
    pipeline.run("phantom", "smoke", out, jobs=2, params={"iterations": "9", "stage1.seed": 5})
    first = written(out, sequence)
    stored = runs.result(out, "02_stage1_global_gan")["settings"]
    assert (stored["iterations"], stored["seed"]) == (9, 5)
    assert runs.result(out, "01_baseline")["settings"]["seed"] == 0
    assert (out / "report.html").exists()
    assert {path.name for path in (out / "notebooks").iterdir()} == {step.notebook.name for step in sequence}
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out

    began = time.monotonic()
    pipeline.run("phantom", "smoke", out, params={"iterations": 9, "stage1.seed": 5, "max_minutes": 1})
    assert time.monotonic() - began < 1
    assert capsys.readouterr().out.count("done before, skipped") == len(sequence)
    assert written(out, sequence) == first

    with pytest.raises(UserError, match="iterations 9 there, 10 asked for"):
        pipeline.run("phantom", "smoke", out, params={"iterations": 10, "stage1.seed": 5})
    assert written(out, sequence) == first

    pipeline.run("phantom", "smoke", out, only="02", force=True, params={"stage1.iterations": 10})
    again = written(out, sequence)
    assert {name for name in first if again[name] != first[name]} == {"02_stage1_global_gan"}
    assert runs.result(out, "02_stage1_global_gan")["settings"]["iterations"] == 10

    # The page is behind now, and it alone.
    capsys.readouterr()
    pipeline.run("phantom", "smoke", out, start="07")
    assert "07_report: done in" in capsys.readouterr().out


def test_the_notebooks_themselves_are_not_written_over(sequence):
    before = sequence[0].notebook.read_bytes()
    with pytest.raises(UserError, match="holds the notebooks themselves"):
        pipeline.run("phantom", "smoke", sequence[0].folder.parent, only="00")
    assert sequence[0].notebook.read_bytes() == before


def test_what_is_made_anew_is_deleted_once_the_data_were_read(sequence, tmp_path):
    out = tmp_path / "run"
    pipeline.run("phantom", "smoke", out, jobs=2)
    write_notebook(sequence[0], "raise ValueError")
    with pytest.raises(StepFailed):
        pipeline.run("phantom", "smoke", out, jobs=2, force=True)
    assert [bool(runs.result(out, step.name)) for step in sequence] == [False, True, True, True]
    # Cut off later, the run goes on without being forced again, with the other settings as well.
    write_notebook(sequence[0], "")
    write_notebook(sequence[1], "raise ValueError")
    write_notebook(sequence[2], "")
    with pytest.raises(StepFailed):
        pipeline.run("phantom", "smoke", out, force=True, params={"seed": 1})
    write_notebook(sequence[1], "")
    pipeline.run("phantom", "smoke", out, params={"seed": 1})
    assert runs.result(out, "02_stage1_global_gan")["settings"]["seed"] == 1
    assert all(runs.result(out, step.name) for step in sequence)


def test_failure_names_the_cell_and_the_same_call_goes_on(sequence, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    # The report stands for every later step: it must not start.
    start, broken = sequence[0], Step("01_baseline", "baseline", (runs.START,), folder=sequence[0].folder)
    last = Step("07_report", "report", (runs.START, "01_baseline"), folder=start.folder)
    monkeypatch.setattr(pipeline, "STEPS", (start, broken, last))
    write_notebook(broken, "if not Path('mended').exists():\n    raise ValueError('no luck\\nat all')")
    write_notebook(last, "")
    with pytest.raises(StepFailed, match=r"01_baseline failed in cell In \[4\] with ValueError: at all; see .*01_base"):
        pipeline.run("phantom", "smoke", out)
    assert "ValueError" in (out / "notebooks" / "01_baseline.ipynb").read_text()
    assert not runs.result(out, "07_report")
    before = written(out, [start])

    (start.folder / "mended").touch()
    capsys.readouterr()
    pipeline.run("phantom", "smoke", out)
    assert written(out, [start]) == before
    assert runs.result(out, "07_report")
    assert capsys.readouterr().out.count("skipped") == 1


def run_alone(step, out, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return pipeline.run_step(step, {"data": "phantom", "run_dir": str(out), "profile": "smoke"})


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("raise config.UserError('Bring more images.')", UserError, r"^Bring more images\.$"),
        ("raise runs.Unfinished('Stopped at iteration 3.')", runs.Unfinished, r"^Stopped at iteration 3\.$"),
        ("import os; os.kill(os.getpid(), 9)", StepFailed, r"00_start_here died in cell In \[4\].*memory"),
        ("step.finish = print", StepFailed, r"without a result\.json"),
    ],
)
def test_how_a_notebook_ends_is_told(body, error, message, sequence, tmp_path, monkeypatch):
    write_notebook(sequence[0], body)
    with pytest.raises(error, match=message):
        run_alone(sequence[0], tmp_path / "run", monkeypatch)
    assert not (tmp_path / "run" / runs.START / "result.json").exists()
    beside = ["00_start_here.stderr.txt"] if "died" in message else []
    names = sorted(path.name for path in (tmp_path / "run" / "notebooks").iterdir())
    assert names == ["00_start_here.ipynb", *beside]


def test_what_libraries_in_c_say_is_kept_from_the_user_and_beside_a_notebook_that_died(
    sequence, tmp_path, monkeypatch, capfd
):
    # The kernel's own standard error, as libzmq writes to it when a kernel ends.
    assertion = "import os; os.write(sys.__stderr__.fileno(), b'Assertion failed\\n')"
    write_notebook(sequence[0], assertion)
    run_alone(sequence[0], tmp_path / "run", monkeypatch)
    write_notebook(sequence[0], f"{assertion}; os.kill(os.getpid(), 9)")
    with pytest.raises(StepFailed):
        run_alone(sequence[0], tmp_path / "other", monkeypatch)
    assert capfd.readouterr().err == ""
    assert "Assertion failed" in (tmp_path / "other" / "notebooks" / "00_start_here.stderr.txt").read_text()
    os.write(2, b"ours again")
    assert capfd.readouterr().err == "ours again"


def test_a_folder_of_images_is_looked_for_where_the_command_was_given_not_where_notebooks_run(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert pipeline.given_per_kind({"images": "photos"})["dedup"] == {"images": str((tmp_path / "photos").resolve())}


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_works(sequence, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with filelock.FileLock(out / ".lock"), pytest.raises(UserError, match="Another run works in"):
        pipeline.run("phantom", "smoke", out, only="00", force=True)
    assert not runs.result(out, runs.START)
    pipeline.run("phantom", "smoke", out, only="00")
    assert runs.result(out, runs.START)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"params": {"iteratoins": 1}}, "No step has a setting 'iteratoins'; there are .*iterations"),
        ({"params": {"baseline.iterations": 1}}, "No step has a setting 'baseline.iterations'"),
        ({"params": {"lesion": "MEL"}}, "No step has a setting 'lesion'"),
        ({"params": {"iterations": "many"}}, "iterations is 'many', it must be a whole number"),
        ({"params": {"start_from": "nothing.pth"}}, r"nothing\.pth', there is no such file"),
        ({"params": {"images": "nowhere"}}, r"nowhere', there is no such folder"),
        ({"params": {"stage1.weights": "none-such"}}, "There are no weights 'none-such'; the manifest names "),
        (
            {"params": {"stage1.weights": "prior-stage1-256px"}},
            r"'prior-stage1-256px' \(stage1, all classes, 256 px\), but what is asked for is .* 64 px",
        ),
        ({"profile": "smok"}, "No profile 'smok'"),
        ({"only": "09"}, "No step '09'; there are 00_start_here"),
        ({"start": "x"}, "No step 'x'"),
        ({"only": ""}, "No step ''"),  # a shell's unset variable is no wish for all of them
        ({"only": "0"}, "No step '0'"),
        ({"jobs": 0}, "jobs is 0"),
        ({"on": "spark"}, "engine is 'spark', it must be 'local' or 'ray'"),
        ({"address": "h:1"}, "say --engine ray as well"),
        ({"data": "nowhere"}, "There is no "),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(asked, message, sequence, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        pipeline.run(**{"data": "phantom", "profile": "smoke", "out": out} | asked)
    assert not out.exists()


def test_ray_is_asked_for_where_it_is_missing(sequence, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "stgan_utils.ray_engine", raising=False)
    with pytest.raises(UserError, match=r"pip install -e '\.\[ray\]'"):
        pipeline.run("phantom", "smoke", tmp_path / "run", on="ray")
    assert not (tmp_path / "run").exists()


def test_order_is_one_in_which_every_step_finds_what_it_needs():
    seen = set()
    for step in pipeline.STEPS:
        assert set(step.needs) <= seen
        assert step.settings("smoke", {}) is not None
        seen.add(step.name)
    stage2 = [step for step in pipeline.STEPS if step.kind == "stage2"]
    assert [step.settings("demo", {}).lesion for step in stage2] == ["AKIEC", "BCC", "BKL", "DF", "MEL", "VASC"]


def test_a_killed_pipeline_leaves_no_notebook_running(sequence, tmp_path):
    forever = "import os\n(step.run_dir / 'pid').write_text(str(os.getpid()))\nwhile True:\n    time.sleep(0.1)"
    write_notebook(sequence[0], forever)
    script = tmp_path / "start.py"
    script.write_text(
        "from pathlib import Path\nfrom stgan_utils import pipeline\n"
        "if __name__ == '__main__':\n"
        f"    pipeline.STEPS = (pipeline.Step('00_start_here', 'data', folder=Path({str(sequence[0].folder)!r})),)\n"
        f"    pipeline.run('phantom', 'smoke', {str(tmp_path / 'run')!r})\n"
    )
    process = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)})
    pid_file = tmp_path / "run" / "pid"
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text(), 120)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not alive(int(pid_file.read_text())))


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():  # Linux: one that nobody has waited for counts as ended
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return subprocess.run(["ps", "-p", str(pid)], capture_output=True).returncode == 0


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_class_notebooks_are_those_of_the_template():
    sys.path.insert(0, str(pipeline.NOTEBOOKS))
    import render_classes

    template = render_classes.TEMPLATE.read_text(encoding="utf-8")
    for step in pipeline.STEPS:
        if step.lesion:
            rendered = render_classes.render(template, step.lesion)
            json.loads(rendered)
            assert step.notebook.read_text(encoding="utf-8") == rendered, f"{step.notebook.name}: run `make notebooks`"
    with pytest.raises(ValueError, match="COLOR"):
        render_classes.render("{{COLOR}}", "MEL")
