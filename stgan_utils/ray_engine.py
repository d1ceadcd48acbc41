"""Tasks on the machines of a Ray cluster. Nothing imports this unasked: Ray is an extra.

Every machine has the same Python packages, and sees this package, the data and the run folder under the same paths. A
task goes where its cores and its GPU are free. When its worker is lost, with or without its machine, Ray starts it
again elsewhere, and it goes on from its checkpoint in the run folder; what a task itself raises is not tried again.
"""

import functools
import logging
import os
import secrets
import shutil
import socket
import sys
from pathlib import Path

from stgan_utils import files
from stgan_utils.config import UserError
from stgan_utils.engine import ROOT, Processes, StepFailed, threads
from stgan_utils.progress import Progress

try:
    import ray
except ImportError:
    raise UserError("--engine ray needs Ray, which is not installed: pip install -e '.[ray]' installs it.") from None

LOSSES = 3  # of a task's worker that are made good
POLL = 1.0  # seconds between two looks at how the tasks are


class Cluster:
    """The machines of a Ray cluster; an engine, see `engine.Processes`.

    Args:
        tasks: all that are to be run.
        run_dir: the run folder, under a path that every machine sees.
        jobs: how many tasks may share a machine. Their threads are those of a local run with as many on the smallest
            machine.
        address: HOST:PORT of the cluster, to which this machine must belong, or "auto": the one that was started on
            this machine. None: the variable RAY_ADDRESS says it, or else a cluster is made of this machine alone.

    Raises:
        UserError: no cluster there, or one with another version of Python or Ray; a URL for the run folder.
    """

    room = sys.maxsize  # Ray keeps the queue

    def __init__(self, tasks, run_dir, jobs, address=None):
        if ":/" in str(run_dir):
            raise UserError(f"{run_dir} is no folder: mount the bucket on every machine and give its path there.")
        _connect(address)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        self._cores = int(min(machine["CPU"] for machine in machines))
        self._gpus = any(machine.get("GPU") for machine in machines)
        self._jobs = jobs
        self._notes = Path(run_dir) / "ray" / secrets.token_hex(4)
        self._progress = Progress(tasks, Path(run_dir), self._notes)
        self._names = {}

    def __enter__(self):
        self._notes.mkdir(parents=True)
        self._progress.start()
        return self

    def __exit__(self, *error):
        ray.shutdown()  # ends what still runs
        self._progress.stop()
        shutil.rmtree(self._notes)

    def submit(self, task):
        self.say(task, "queued")
        number = threads(task, self._cores, self._jobs)
        options = {
            "name": task.name,
            "num_cpus": min(int(number), self._cores),
            "num_gpus": int(task.trains and self._gpus),
            "max_retries": LOSSES,
            "scheduling_strategy": "SPREAD",
        }
        ref = _run.options(**options).remote(
            self._notes, task.name, {"OMP_NUM_THREADS": number}, task.work, task.arguments
        )
        self._names[ref] = task.name
        return ref

    def wait(self, refs):
        ended = []
        while not ended:
            ended, _ = ray.wait(list(refs), timeout=POLL)
            self._progress.look()
        return ended

    def result(self, ref):
        try:
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise StepFailed(
                f"{self._names[ref]} lost its worker {LOSSES + 1} times, most often for want of memory: {_line(error)}"
            ) from error

    def say(self, task, what):
        self._progress.say(task.name, what)


def _connect(address):
    # A cluster of our own reports to nobody and works at this process's priority.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    named = os.environ.pop("RAY_ADDRESS", None)  # Ray would take it in place of what is asked for
    address = address or named or "local"
    # What tasks see of this process's variables: where weights and decoded images lie.
    seen = {name: value for name, value in os.environ.items() if name.startswith("STGAN_") or "_WEIGHTS" in name}
    try:
        if address not in ("local", "auto"):  # Ray itself tries for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            address,
            runtime_env={"env_vars": {**seen, "PYTHONPATH": str(ROOT)}},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"There is no Ray cluster at {address!r} that this Ray can use: {_line(error)}") from error


@ray.remote
def _run(notes, name, environment, work, arguments):
    """In a Ray worker: the seconds that `work` took in a process beside it, which ends when the worker is killed."""
    machine = socket.gethostname()
    if not notes.is_dir():
        raise UserError(f"{machine} does not see {notes.parents[1]}: mount the run folder there under the same path.")
    files.write_json(notes / f"{name}.json", {"machine": machine, "node": ray.get_runtime_context().get_node_id()[:8]})
    processes = _processes()
    return processes.result(processes.call(environment, work, arguments))


@functools.cache
def _processes():
    """In a Ray worker: the process in which its tasks run one after the other. What one imported, the next one has."""
    return Processes(1)


def _line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
