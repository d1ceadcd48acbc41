"""The notebooks, unchanged, where people run them: folders laid out as Kaggle, as Colab and as a bare checkout.

Nothing is installed there but what the place has, and no network can be reached.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import venv
from pathlib import Path

import matplotlib
import nbformat
import papermill
import psutil
import pytest
import torch
from conftest import ROOT
from nbclient.exceptions import DeadKernelError

import stgan_utils
from stgan_utils import backbone, checkpoints, config, data, places, runs, steps, trainer, weights
from stgan_utils.classifier import Classifier
from stgan_utils.config import UserError
from stgan_utils.files import sha256

sys.path.insert(0, str(ROOT / "notebooks"))
import render_setup

START, BASELINE, STAGE1 = "00_start_here", "01_baseline", "02_stage1_global_gan"
QUICK = config.resolve("stage1", "quick")
RELEASED = weights.choose_released(QUICK)
# In each kernel, before anything else: what was installed in place of the checkout of these tests is not there.
FORGET = """import pathlib, sys
sys.meta_path[:] = [each for each in sys.meta_path if not getattr(each, "__module__", "").startswith("__editable__")]
sys.path[:] = [each for each in sys.path if not pathlib.Path(each, "pyproject.toml").exists()]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty machine: its root folder."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(FORGET)
    for name in ("STGAN_CACHE", "STGAN_WEIGHTS", backbone.VARIABLE, "INCEPTION_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())  # looking for fonts anew costs seconds
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("STGAN_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "python"))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # which decides the order of sums
    return tmp_path


def repository(folder):
    """A clone, but for the weights that are not needed here."""
    for name in ("stgan_utils", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "weights").mkdir()
    for name in (
        RELEASED["sources"]["repo"],
        "weights_manifest.json",
        "pyproject.toml",
        "requirements.txt",
        "README.md",
    ):
        shutil.copy(ROOT / name, folder / name)
    return folder


def run(name, cwd, **parameters):
    """Executes a notebook as it is committed; returns what its cells said."""
    executed = cwd / f"{name}.ipynb"
    papermill.execute_notebook(
        str(ROOT / "notebooks" / f"{name}.ipynb"),
        str(executed),
        {"profile": "smoke", **parameters},
        kernel_name="python3",
        progress_bar=False,
        cwd=str(cwd),
    )
    outputs = [output for cell in json.loads(executed.read_text())["cells"] for output in cell.get("outputs", ())]
    return "".join("".join(each.get("text") or each.get("data", {}).get("text/markdown", "")) for each in outputs)


TINY = {"size": 32, "epoch_images": 32, "bootstrap": 10}


def test_kaggle(place, phantom_dir, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    working, mounts = place / "kaggle" / "working", place / "kaggle" / "input"
    working.mkdir(parents=True)
    repository(mounts / "datasets" / "somebody" / "package" / "stgan-notebooks")
    images = mounts / "datasets" / places.HAM10000
    shutil.copytree(phantom_dir, images)

    said = run(START, working)
    assert "data: skin-cancer-mnist-ham10000 · cpu (" in said and " of disk free · " in said and "phantom" not in said
    assert runs.result(working / "runs" / "demo", START)["data"] == str(images)
    said = run(BASELINE, working, **TINY)
    assert "switch it on (Settings, Internet), or add a data set that holds mobilenet_v2-" in said

    # The next notebook is another session: what the earlier ones left is among its inputs.
    shutil.move(working, mounts / "notebooks" / "somebody" / "baseline")
    working.mkdir()
    said = run(STAGE1, working, weights="auto", size=QUICK.size, ngf=QUICK.ngf, quality_images=8)
    assert f"{BASELINE}: from {mounts}" in said
    assert f"**Nothing is trained here: released weights `{RELEASED['name']}`" in said
    done = runs.result(working / "runs" / "demo", STAGE1)
    assert RELEASED["sha256"] in {model["sha256"] for model in done["models"]}
    assert done["data"] == str(images)


def test_colab_disconnected_in_the_middle_of_stage_1(place, phantom_dir, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    content, drive = place / "content", place / "content" / "drive" / "MyDrive"
    shutil.copytree(phantom_dir, drive / "HAM10000")
    install(place, monkeypatch)
    run_dir = drive / "stgan" / "runs" / "demo"
    length = {"ngf": 8, "batch_size": 2, "iterations": 40, "checkpoint_every": 24, "quality_images": 8}
    length |= {"sample_every": 40, "evaluate_every": 40}

    assert "data: HAM10000 · cpu (" in run(START, content)
    baseline = steps.open_step(BASELINE, config.resolve("baseline", "smoke"), drive / "HAM10000", run_dir, "smoke")
    Classifier({"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}).save(baseline.folder / "model.safetensors")
    baseline.finish({}, "")
    checkpoint = run_dir / STAGE1 / "checkpoint.safetensors"
    threading.Thread(target=kill_kernel_at, args=(checkpoint,), daemon=True).start()
    with pytest.raises(DeadKernelError):
        run(STAGE1, content, **length)
    assert checkpoints.read_header(checkpoint)["iteration"] == 24

    # Another machine, with the same Drive.
    shutil.rmtree(place / "home")
    said = run(STAGE1, content, **length)
    assert str(run_dir) in said and "lost with the session" not in said

    table = data.read_table(run_dir / START / "table.csv")
    images = data.image_cache(table[table["split"] == "train"], 64)
    trainer.GanTrainer(config.resolve("stage1", "smoke", length), images, place / "undisturbed").run()
    for name in ("checkpoint.safetensors", "generator.safetensors"):
        cut, whole = (checkpoints.load_generator(folder / name) for folder in (run_dir / STAGE1, place / "undisturbed"))
        assert all(torch.equal(cut.state_dict()[key], tensor) for key, tensor in whole.state_dict().items())


def kill_kernel_at(checkpoint):
    while not checkpoint.exists():
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        if any("ipykernel" in word for word in process.cmdline()):
            process.kill()


def install(place, monkeypatch):
    """What the first cell does on Colab, with a clone in place of the address: no torch, only ours.

    In an environment of its own that sees the packages of this one: else pip uninstalls the checkout from this one.
    """
    clone, prefix = repository(place / "clone"), place / "usr"
    venv.create(prefix)
    site = prefix / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    monkeypatch.setenv("PYTHONPATH", f"{place / 'python'}{os.pathsep}{site}")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    options = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    published = f"{stgan_utils.REPOSITORY}/archive/refs/tags/v{stgan_utils.__version__}.tar.gz"
    cell = first_cell().replace(published, clone.as_uri())
    cell += "\nfrom stgan_utils import places; print(places.repository())"
    ran = execute(cell, place / "content", options, prefix / "bin" / "python")
    assert {path.name.split("-")[0] for path in site.iterdir()} == {"stgan_utils", "packages.pth"}, ran.stderr
    for name in ("weights_manifest.json", RELEASED["sources"]["repo"], f"notebooks/{START}.ipynb"):
        assert Path(ran.stdout.strip(), name).is_relative_to(prefix) and Path(ran.stdout.strip(), name).exists()


def first_cell():
    notebook = nbformat.read(ROOT / "notebooks" / f"{START}.ipynb", as_version=4)
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


def execute(cell, cwd, options, python=sys.executable):
    environment = {**os.environ, **options}
    return subprocess.run([python, "-c", cell], cwd=cwd, env=environment, capture_output=True, text=True)


def test_bare_checkout(place):
    clone = repository(place / "clone")
    said = run(START, clone / "notebooks")
    assert "**There is no HAM10000 here, so the images are phantom" in said and "HAM10000's folder as `data`" in said
    said = run(BASELINE, clone / "notebooks", **TINY)
    assert str(clone / "notebooks" / "runs" / "demo" / BASELINE) in said
    done = runs.result(clone / "notebooks" / "runs" / "demo", BASELINE)
    assert done["data"] == "phantom" and done["models"][0]["sha256"] == sha256(
        clone / "notebooks" / "runs" / "demo" / BASELINE / done["models"][0]["file"]
    )


def test_nowhere_to_be_found_and_no_network(place):
    (place / "empty").mkdir()
    ran = execute(first_cell(), place / "empty", {})
    assert (
        ran.returncode and "ModuleNotFoundError: The package cannot be installed. No internet? On Kaggle" in ran.stderr
    )


# --- setup cell and badges ---------------------------------------------------------------------------------------


def test_every_notebook_installs_this_version_and_opens_it():
    for path, name in render_setup.targets().items():
        text = path.read_text(encoding="utf-8")
        assert render_setup.render(text, name) == text, f"{path.name}: make notebooks"
    assert f"/v{stgan_utils.__version__}.tar.gz" in first_cell()
    assert f"\nversion: {stgan_utils.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert render_setup.render_readme(readme) == readme, "make notebooks"
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        badges = render_setup.badges(path.name.replace(".template", "_{{CODE}}"))
        assert nbformat.read(path, as_version=4).cells[0].source.startswith(f"{badges}\n\n# ")
        assert badges in readme or "template" in path.name


# --- finding things ----------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose root is a temporary folder, for this process; `machine(variable)` makes it Kaggle or Colab."""
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(places, "KAGGLE_INPUT", tmp_path / "kaggle" / "input")
    monkeypatch.setattr(places, "KAGGLE_WORKING", tmp_path / "kaggle" / "working")
    monkeypatch.setattr(places, "CONTENT", tmp_path / "content")
    monkeypatch.setattr(places, "DRIVE", tmp_path / "content" / "drive" / "MyDrive")
    return lambda variable: monkeypatch.setenv(variable, "x")


@pytest.mark.parametrize(
    ("variable", "folder"),
    [
        ("KAGGLE_KERNEL_RUN_TYPE", "kaggle/input/skin-cancer-mnist-ham10000"),
        ("KAGGLE_KERNEL_RUN_TYPE", f"kaggle/input/datasets/{places.HAM10000}/deeper"),
        ("COLAB_RELEASE_TAG", "content/ham"),
        ("COLAB_RELEASE_TAG", "content/drive/MyDrive/ham"),
        ("COLAB_RELEASE_TAG", "kaggle/input/skin-cancer-mnist-ham10000"),
        ("COLAB_RELEASE_TAG", f"home/.cache/kagglehub/datasets/{places.HAM10000}/versions/2"),
    ],
)
@pytest.mark.parametrize("file", places.HAM10000_FILES)
def test_auto_is_the_ham10000_of_the_place(machine, tmp_path, variable, folder, file):
    assert runs.identify("auto") == "phantom"
    machine(variable)
    assert runs.identify("auto") == "phantom"
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / file).touch()
    assert runs.identify("auto") == str(tmp_path / folder)
    assert runs.identify("phantom") == "phantom"


def test_auto_looks_nowhere_on_a_machine_of_ones_own(machine, tmp_path):
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "HAM10000_metadata.csv").touch()
    assert runs.identify("auto") == "phantom"


def test_results_go_where_they_outlive_the_session(machine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert places.results() == tmp_path
    machine("COLAB_RELEASE_TAG")
    assert places.results() == tmp_path
    places.DRIVE.mkdir(parents=True)
    assert places.results() == places.DRIVE / "stgan"
    machine("KAGGLE_KERNEL_RUN_TYPE")  # whose image is built on Colab's
    assert places.results() == places.KAGGLE_WORKING


@pytest.mark.parametrize(
    ("variable", "advice"),
    [("KAGGLE_KERNEL_RUN_TYPE", "add its output here"), ("COLAB_RELEASE_TAG", "with Google Drive mounted")],
)
def test_a_missing_step_is_said_with_the_way_on(machine, tmp_path, variable, advice):
    machine(variable)
    with pytest.raises(UserError, match=rf"run notebooks/{START}\.ipynb first.*{advice}"):
        steps.open_step(BASELINE, config.resolve("baseline", "smoke"), "phantom", tmp_path / "run", "smoke", (START,))


def test_images_that_this_session_lacks_are_asked_for_again(machine, tmp_path, phantom_dir):
    settings = config.resolve("data", "smoke")
    steps.open_step(START, settings, phantom_dir, tmp_path / "run", "smoke").finish({}, "")
    machine("COLAB_RELEASE_TAG")
    with pytest.raises(UserError, match=rf"was made from {phantom_dir}, which is not here: run `import kagglehub; "):
        steps.open_step(BASELINE, config.resolve("baseline", "smoke"), "auto", tmp_path / "run", "smoke", (START,))


def test_an_unfinished_step_goes_on_from_the_input_of_the_next_session(machine, tmp_path):
    machine("KAGGLE_KERNEL_RUN_TYPE")
    settings = config.resolve("data", "smoke")
    left = places.KAGGLE_INPUT / "notebooks" / "somebody" / "start"
    begun = steps.open_step(START, settings, "phantom", left / "runs" / "demo", "smoke")
    (begun.folder / "checkpoint").write_text("half")
    opened = steps.open_step(START, settings, "phantom", "runs/demo", "smoke")
    assert opened.folder == places.KAGGLE_WORKING / "runs" / "demo" / START
    assert (opened.folder / "checkpoint").read_text() == "half"
    (opened.folder / "checkpoint").write_text("whole")  # what is made here is not taken back
    steps.open_step(START, settings, "phantom", "runs/demo", "smoke")
    assert (opened.folder / "checkpoint").read_text() == "whole"
    assert not runs.result(places.KAGGLE_WORKING / "runs" / "other", START)


def test_a_file_of_pretrained_weights_is_taken_from_a_mount(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("the network was asked"))
    file = places.KAGGLE_INPUT / "weights" / "deeper" / "net-cf80cd8a.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    name = f"net-{sha256(file)[:8]}.pth"
    file.rename(file.with_name(name))
    assert backbone.hub_file(f"https://example.org/{name}").read_bytes() == b"weights"


def test_a_file_of_another_content_is_not_taken(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *given, **_: asked.append(given))
    (places.KAGGLE_INPUT / "weights").mkdir(parents=True)
    (places.KAGGLE_INPUT / "weights" / "net-00000000.pth").write_bytes(b"others")
    path = backbone.hub_file("https://example.org/net-00000000.pth")
    assert asked and not Path(path).exists()
