"""The steps on a real Ray cluster of two nodes: one is lost in the middle of Stage 2, and a driver is killed."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import ROOT
from test_pipeline import alive, wait_for, write_notebook

from stgan_utils import engine, pipeline, runs
from stgan_utils.config import UserError

ray = pytest.importorskip("ray")
START = pipeline.STEPS[0]
STAGE2 = ("03_stage2_DF", "03_stage2_VASC")
BEFORE = ("00_start_here", "01_baseline", "02_stage1_global_gan")
# Stage 2 is long enough to be cut off between two checkpoints.
LENGTH = {"iterations": 20, "checkpoint_every": 5, "evaluate_every": 20, "quality_images": 16}
SETTINGS = [word for name, value in LENGTH.items() for word in ("-p", f"stage2.{name}", str(value))]


class Driver:
    """`run` on the command line, in a process of its own, with no steps but those that are named."""

    def __init__(self, tmp_path, *words, names=BEFORE + STAGE2, folder=pipeline.NOTEBOOKS):
        script = tmp_path / "driver.py"
        script.write_text(
            "from dataclasses import replace\nfrom pathlib import Path\nfrom stgan_utils import __main__, pipeline\n"
            "if __name__ == '__main__':\n"
            f"    chosen = [step for step in pipeline.STEPS if step.name in {names!r}]\n"
            f"    pipeline.STEPS = tuple(replace(step, folder=Path({str(folder)!r})) for step in chosen)\n"
            "    __main__.main()\n"
        )
        command = [sys.executable, script, "run", "--profile", "smoke", *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=pipe, stderr=pipe)
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.said += line

    def end(self):
        """(exit status, standard error)"""
        errors, status = self.process.stderr.read(), self.process.wait()
        self._reader.join()
        return status, errors

    def nodes_of(self, step):
        return re.findall(rf"{step}: on .*, node (\w+)", self.said)


def on_ray(cluster):
    return ("--engine", "ray", "--address", cluster.address)


def test_a_task_that_fails_is_told_as_it_is_here_and_not_tried_again(cluster, tmp_path):
    once = "with open(step.run_dir / 'tries', 'a') as file:\n    file.write('x')\n"
    write_notebook(pipeline.Step(START.name, "data", folder=tmp_path), f"{once}raise config.UserError('Bring more.')")
    driver = Driver(tmp_path, "--out", tmp_path / "run", *on_ray(cluster), names=(START.name,), folder=tmp_path)
    assert driver.end() == (2, "Bring more.\n")
    assert (tmp_path / "run" / "tries").read_text() == "x"


def test_no_notebook_outlives_its_worker_or_the_driver(cluster, tmp_path):
    forever = "import os\n(step.run_dir / f'pid{os.getpid()}').touch()\nwhile True:\n    time.sleep(0.1)"
    write_notebook(pipeline.Step(START.name, "data", folder=tmp_path), forever)
    driver = Driver(tmp_path, "--out", tmp_path / "run", *on_ray(cluster), names=(START.name,), folder=tmp_path)

    def kernels():
        return {int(path.name[3:]) for path in (tmp_path / "run").glob("pid*")}

    wait_for(kernels, 120)
    (first,) = kernels()
    (worker,) = (one for one in psutil.Process(first).parents() if one.name().startswith("ray::"))
    worker.kill()
    wait_for(lambda: not alive(first), 60)
    wait_for(lambda: len(kernels()) == 2, 120)  # begun again
    (second,) = kernels() - {first}
    driver.process.kill()
    wait_for(lambda: not alive(second), 60)


def test_what_trains_takes_a_gpu_where_the_cluster_has_one(cluster, tmp_path, capsys):
    with_gpu = cluster.add_node(num_cpus=1, num_gpus=1)
    tasks = [engine.Task(name, time.sleep, (0,), trains=name != "looks") for name in ("one", "two", "looks")]
    engine.run_all(tasks, engine.choose("ray", tasks, tmp_path, 1, cluster.address))
    nodes = dict(re.findall(r"(\w+): on .*, node (\w+)", capsys.readouterr().out))
    cluster.remove_node(with_gpu)
    assert nodes["one"] == nodes["two"] == with_gpu.node_id[:8] and "looks" in nodes


def models(run_dir):
    return {name: [model["sha256"] for model in runs.result(run_dir, name)["models"]] for name in STAGE2}


def test_a_node_lost_in_stage_2_changes_nothing(smoke, cluster, tmp_path):
    out = tmp_path / "ray"
    for name in BEFORE:
        shutil.copytree(smoke / name, tmp_path / "local" / name)
        shutil.copytree(smoke / name, out / name)
    local = Driver(tmp_path, "--out", tmp_path / "local", "--jobs", 2, *SETTINGS)
    assert local.end() == (0, "")

    lost = cluster.add_node(num_cpus=1)
    driver = Driver(tmp_path, "--out", out, *on_ray(cluster), *SETTINGS)
    wait_for(lambda: all(map(driver.nodes_of, STAGE2)) or driver.process.poll() is not None, 400)
    (step,) = (name for name in STAGE2 if driver.nodes_of(name) == [lost.node_id[:8]])  # the other is on the head
    wait_for((out / step / "checkpoint.safetensors").exists, 120)
    cluster.remove_node(lost, allow_graceful=False)
    assert not runs.result(out, step)
    first = (out / step / "samples" / "000000.png").stat().st_mtime_ns
    assert driver.end() == (0, "")
    assert driver.nodes_of(step) == [lost.node_id[:8], cluster.head_node.node_id[:8]]
    # It went on from the checkpoint: what is drawn before the first iteration was not drawn again.
    assert (out / step / "samples" / "000000.png").stat().st_mtime_ns == first
    assert models(out) == models(tmp_path / "local")
    table = driver.said[driver.said.rindex("machine") :]
    assert all(re.search(rf"{name} .*done in", table) for name in STAGE2)


def test_where_there_is_no_cluster_is_said_at_once(tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no Ray cluster at '127\.0\.0\.1:1'.*refused"):
        engine.choose("ray", [], tmp_path, 1, "127.0.0.1:1")
    with pytest.raises(UserError, match="no Ray cluster at 'nonsense'"):
        engine.choose("ray", [], tmp_path, 1, "nonsense")
    with pytest.raises(UserError, match="mount the bucket"):
        engine.choose("ray", [], tmp_path / "s3://bucket/run", 1)
    assert time.monotonic() - began < 20
