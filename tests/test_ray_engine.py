"""The sequence on a real Ray cluster of two nodes, one of which is lost in Stage 2; and a driver that is killed."""

import os
import re
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


class Driver:
    """`run` on the command line, in a process of its own, of these steps."""

    def __init__(self, tmp_path, *words, steps=pipeline.STEPS):
        script = tmp_path / "driver.py"
        script.write_text(
            "from pathlib import PosixPath\n\nfrom stgan_utils import __main__, pipeline\n"
            "from stgan_utils.pipeline import Step\n\n"
            "if __name__ == '__main__':\n"
            f"    pipeline.STEPS = {steps!r}\n"
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
    fails = pipeline.Step(runs.START, "data", folder=tmp_path)
    write_notebook(fails, f"{once}raise config.UserError('Bring more.')")
    driver = Driver(tmp_path, "--out", tmp_path / "run", *on_ray(cluster), steps=(fails,))
    assert driver.end() == (2, "Bring more.\n")
    assert (tmp_path / "run" / "tries").read_text() == "x"


def test_no_notebook_outlives_its_worker_or_the_driver(cluster, tmp_path):
    forever = "import os\n(step.run_dir / f'pid{os.getpid()}').touch()\nwhile True:\n    time.sleep(0.1)"
    endless = pipeline.Step(runs.START, "data", folder=tmp_path)
    write_notebook(endless, forever)
    driver = Driver(tmp_path, "--out", tmp_path / "run", *on_ray(cluster), steps=(endless,))

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


def test_the_sequence_comes_out_the_same_bit_for_bit_though_a_node_is_lost_in_stage_2(smoke, cluster, tmp_path):
    lost = cluster.add_node(num_cpus=1)
    out = tmp_path / "ray"
    driver = Driver(tmp_path, "--data", "phantom", "--out", out, *on_ray(cluster))
    names = [step.name for step in pipeline.STEPS]

    def at_work():
        """Steps of Stage 2 that the node has brought to a checkpoint and no further than that."""
        there = [name for name in names if name.startswith("03_") and driver.nodes_of(name) == [lost.node_id[:8]]]
        begun = [name for name in there if (out / name / "checkpoint.safetensors").exists()]
        return [name for name in begun if not runs.result(out, name)]

    wait_for(lambda: at_work() or driver.process.poll() is not None, 400)
    (cut,) = at_work()
    cluster.remove_node(lost, allow_graceful=False)
    assert not runs.result(out, cut)
    drawn = (out / cut / "samples" / "000000.png").stat().st_mtime_ns
    assert driver.end() == (0, "")
    assert driver.nodes_of(cut) == [lost.node_id[:8], cluster.head_node.node_id[:8]]
    # It went on from the checkpoint: what is drawn before the first iteration was not drawn again.
    assert (out / cut / "samples" / "000000.png").stat().st_mtime_ns == drawn
    table = driver.said[driver.said.rindex("machine") :]
    for name in names:
        assert re.search(rf"{name} .*done in", table)
        assert runs.result(out, name)["models"] == runs.result(smoke, name)["models"], name
    made = sorted(path.relative_to(smoke) for path in smoke.glob("03_stage2_*/images/*.png"))
    assert len(made) == 6 * 24
    for file in (*made, "05_classifier/test_predictions.csv"):
        assert (out / file).read_bytes() == (smoke / file).read_bytes(), file


def test_where_there_is_no_cluster_is_said_at_once(tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no Ray cluster at '127\.0\.0\.1:1'.*refused"):
        engine.choose("ray", [], tmp_path, 1, "127.0.0.1:1")
    with pytest.raises(UserError, match="no Ray cluster at 'nonsense'"):
        engine.choose("ray", [], tmp_path, 1, "nonsense")
    with pytest.raises(UserError, match="mount the bucket"):
        engine.choose("ray", [], tmp_path / "s3://bucket/run", 1)
    assert time.monotonic() - began < 20
