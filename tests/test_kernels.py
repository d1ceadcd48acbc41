"""Kernels that are forks compute what fresh ones do, say where they are, and end with whoever started them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest

from stgan_utils import kernels

ROOT = Path(__file__).resolve().parents[1]
# Convolutions add up in an order that the number of threads decides.
ASKED = """
import os, sys
imported = "torch" in sys.modules
import json, numpy, torch
from threadpoolctl import threadpool_info
import matplotlib
torch.manual_seed(0)
images, kernel = torch.randn(4, 16, 64, 64), torch.randn(32, 16, 3, 3, requires_grad=True)
(torch.nn.functional.conv2d(images, kernel) ** 2).mean().backward()
print(json.dumps({
    "imported": imported,
    "pid": os.getpid(),
    "cwd": os.getcwd(),
    "threads": [torch.get_num_threads(), *sorted({one["num_threads"] for one in threadpool_info()})],
    "variable": os.environ.get("ASKED"),
    "backend": matplotlib.get_backend(),
    "gradient": kernel.grad.double().sum().item().hex(),
    "drawn": torch.rand(1).item(),
    "modules": "stgan_utils.pipeline" in sys.modules,
}))
"""


def execute(source, folder):
    """What a notebook of one cell printed."""
    kernels.prepare()
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=kernel)
    nbformat.write(notebook, folder / "in.ipynb")
    done = papermill.execute_notebook(
        str(folder / "in.ipynb"),
        str(folder / "out.ipynb"),
        kernel_name="python3",
        progress_bar=False,
        cwd=str(folder),
        kernel_manager_class=kernels.KernelManager,
    )
    return "".join(output["text"] for output in done["cells"][-1]["outputs"] if output["name"] == "stdout")


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_fork_is_as_a_fresh_kernel_but_has_everything_imported(threads, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setenv("ASKED", "heard")
    forked = json.loads(execute(ASKED, tmp_path))
    monkeypatch.setattr(kernels, "_GPUS", ("/dev/null",))
    fresh = json.loads(execute(ASKED, tmp_path))
    assert (forked.pop("imported"), fresh.pop("imported")) == (True, False)
    assert forked.pop("pid") != fresh.pop("pid")
    assert forked == fresh
    assert forked["variable"] == "heard" and forked["cwd"] == str(tmp_path)
    assert set(forked["threads"]) == {int(threads)}


def test_forks_share_nothing(tmp_path):
    first, second = (
        execute("import sys; print(getattr(sys, 'left', 'nothing')); sys.left = 1", tmp_path) for _ in "ab"
    )
    assert first == second == "nothing\n"


def test_a_signal_to_a_fork_that_has_ended_is_none(tmp_path):
    kernels.prepare()
    process = kernels._Process(["--version"], dict(os.environ), tmp_path, kernels._StandardError())
    assert process.wait() == 0
    process.send_signal(signal.SIGKILL)
    assert process.poll() == 0


def test_a_fork_ends_when_the_process_that_started_it_is_killed(tmp_path):
    source = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    script = f"from pathlib import Path; import test_kernels; test_kernels.execute({source!r}, Path.cwd())"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"}
    runner = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    file, began = tmp_path / "pid", time.monotonic()
    while not (file.exists() and file.read_text()):
        assert runner.poll() is None and time.monotonic() - began < 120
        time.sleep(0.1)
    kernel = psutil.Process(int(file.read_text()))
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    kernel.wait(timeout=30)
