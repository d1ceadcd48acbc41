"""The command line as a user meets it: exit statuses, one sentence for wrong input, and no waiting."""

import os
import subprocess
import sys

import pandas as pd
import pytest
from PIL import Image

from stgan_utils import __main__ as cli
from stgan_utils import engine, pipeline, runs
from stgan_utils.config import UserError


def command(*words):
    return subprocess.run([sys.executable, "-m", "stgan_utils", *map(str, words)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("run", "--data", "no/such/folder", "--out", "x"), "There is no "),
        (("run", "--profile", "tiny"), "No profile 'tiny'"),
        (("run", "-p", "iterations"), "-p takes two words"),
        (("run", "-pseed"), "-p takes two words"),
        (("run", "-p", "seed=3", "--only", "02"), "-p takes two words"),
        (("run", "-p", "seed", "--force"), "-p takes two words"),
        (("run", "--only", "02", "--from", "04"), "Step '02' comes before '04'"),
        (("run", "-p", "iteratoins", "3"), "No step has a setting 'iteratoins'"),
    ],
)
def test_wrong_input_is_one_sentence_and_status_2(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(engine.ROOT))
    done = command(*words)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("run", "--data", "phantom"), ("dedup", "images")])
def test_a_place_that_cannot_be_written_to_is_one_sentence(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(engine.ROOT))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "one.png")
    done = command(*words, "--out", "file/below")
    assert done.returncode == 2 and "file" in done.stderr and "choose another place" in done.stderr
    assert done.stderr.count("\n") == 1 and (tmp_path / "file").read_text() == "mine"


def test_files_that_variables_name_lie_where_the_command_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STGAN_CACHE", "cache")
    monkeypatch.setattr(pipeline, "run", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["stgan_utils", "run"])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ["STGAN_CACHE"] == str(tmp_path / "cache")


def test_help_loads_nothing_heavy():
    script = "import sys\nfrom stgan_utils.__main__ import app\n"
    script += "print({'torch', 'pandas', 'matplotlib', 'papermill'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=engine.ROOT)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("Mend it."), 2), (pipeline.StepFailed("It broke."), 1), (runs.Unfinished("Time is up."), 4)],
)
def test_statuses_of_a_run(error, status, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    monkeypatch.setattr(sys, "argv", ["stgan_utils", "run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    assert capsys.readouterr().err == f"{error}\n"


def test_run_hands_everything_on(monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "run", lambda *given: seen.append(given))
    words = "run --data d --profile smoke --out o --from 03 --jobs 3 --force -p seed 1 -p stage1.iterations a=b "
    words += "--engine ray --address h:1"
    monkeypatch.setattr(sys, "argv", ["stgan_utils", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    data, profile, out, only, start, jobs, force, params, on, address = seen[0]
    assert (data, profile, str(out), only, start, jobs, force) == ("d", "smoke", "o", None, "03", 3, True)
    assert params == {"seed": "1", "stage1.iterations": "a=b"}
    assert (on, address) == ("ray", "h:1")


def test_dedup_writes_a_row_an_image_and_deletes_nothing(phantom_dir, tmp_path, monkeypatch, capsys):
    images = phantom_dir / "HAM10000_images_part_1"
    monkeypatch.setattr(sys, "argv", ["stgan_utils", "dedup", str(images), "--out", str(tmp_path / "d.csv")])
    count = len(list(images.iterdir()))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    table = pd.read_csv(tmp_path / "d.csv")
    assert len(table) == count == len(list(images.iterdir()))
    assert f"{table['kept'].sum():,} of {count:,} images kept" in capsys.readouterr().out
