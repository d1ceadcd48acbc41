"""Tasks side by side: which of them may start, and the processes that they run in.

`run_all` keeps the order. An engine is where the tasks run: `Processes` of this machine, or the machines of a cluster
(`ray_engine.Cluster`). Nothing heavy is imported.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path

from stgan_utils import places
from stgan_utils.config import UserError
from stgan_utils.runs import Unfinished

ROOT = Path(__file__).resolve().parents[1]


class StepFailed(Exception):
    """A task failed and it is not the user's doing; the message names it, and a notebook's cell."""


@dataclass(frozen=True)
class Task:
    """One call, `work(*arguments)`, in a process of its own; it goes on by itself where an earlier one was cut off."""

    name: str  # also its folder in the run folder
    work: Callable  # of a module: another process finds it by its name
    arguments: tuple
    needs: tuple = ()  # names of tasks; one that is not asked for is not waited for
    peers: int = 1  # how many of its kind may run side by side: they share a machine's cores
    trains: bool = True  # wants a GPU
    done: Callable = lambda: False  # whether nothing is left to do


def choose(name, tasks, run_dir, jobs, address=None):
    """The engine of that name, "local" or "ray"; see `Processes` and `ray_engine.Cluster`.

    Raises:
        UserError: no such engine, no room for a single job, an address without Ray, or a cluster that is not there.
    """
    if jobs < 1:
        raise UserError(f"jobs is {jobs}, it must be at least 1.")
    if name == "ray":
        from stgan_utils.ray_engine import Cluster

        return Cluster(tasks, run_dir, jobs, address)
    if name != "local":
        raise UserError(f"engine is {name!r}, it must be 'local' or 'ray'.")
    if address:
        raise UserError("--address is that of a Ray cluster: say --engine ray as well.")
    return Processes(jobs)


def run_all(tasks, engine):
    """Runs tasks in order, as many side by side as the engine has room for, each once those that it needs are through.

    After a failure those then running are finished and no other is started.

    Raises:
        UserError, StepFailed, Unfinished: the first failure; the others are printed.
    """
    waiting, running, failures = list(tasks), {}, []
    with engine:
        while running or (waiting and not failures):
            pending = {task.name for task in (*waiting, *running.values())}
            ready = [] if failures else [task for task in waiting if not pending & set(task.needs)]
            if ready and len(running) < engine.room:  # one at a time: a skipped one takes no room
                task = ready[0]
                waiting.remove(task)
                if task.done():
                    engine.say(task, "done before, skipped")
                else:
                    running[engine.submit(task)] = task
                continue
            for handle in engine.wait(running):
                task = running.pop(handle)
                try:
                    engine.say(task, f"done in {engine.result(handle):.0f} s")
                except (UserError, StepFailed, Unfinished) as error:
                    engine.say(task, "stopped" if isinstance(error, Unfinished) else "failed")
                    failures.append(error)
    for error in failures[1:]:
        print(error, flush=True)
    if failures:
        raise failures[0]


class Processes:
    """Processes of this machine, up to `jobs` side by side, each with its share of the cores.

    An engine: `room` for how many tasks, `submit` one for a handle, `wait` until some have ended, the `result` of each
    (seconds, or what it raised), `say` how a task is; leaving its block ends what still runs.
    """

    def __init__(self, jobs):
        self.room = jobs
        self._pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_begin_worker, initargs=(_spinning(),))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind:  # Ctrl-C: do not wait for a training to end
            for worker in active_children():
                _end(worker.pid)
        self._pool.shutdown()

    def submit(self, task):
        self.say(task, "started")
        return self.call({"OMP_NUM_THREADS": threads(task, places.cores(), self.room)}, task.work, task.arguments)

    def call(self, environment, work, arguments):
        """As `submit`, with the environment variables that the work is to see."""
        return self._pool.submit(_timed, environment, work, arguments)

    def wait(self, futures):
        return wait(futures, return_when=FIRST_COMPLETED).done

    def result(self, future):
        try:
            return future.result()
        except BrokenProcessPool:
            raise StepFailed("A process died, most often for want of memory; the same command goes on.") from None

    def say(self, task, what):
        say(task.name, what)


def say(name, what):
    """A line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {name}: {what}", flush=True)


def threads(task, cores, jobs):
    """Threads for a task, as text, by its kind alone, never by what happens to run beside it.

    The number decides the order of floating-point sums. The six of Stage 2 share a machine's cores; the other steps
    come one by one. The variable OMP_NUM_THREADS goes before.
    """
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // min(jobs, task.peers)))


def _timed(environment, work, arguments):
    os.environ.update(environment)
    limit_threads()
    began = time.monotonic()
    work(*arguments)
    return time.monotonic() - began


def limit_threads():
    """Makes libraries that are loaded keep to OMP_NUM_THREADS: they read the variable only when they are loaded, which
    can be as early as with the module of the function that a process is to call."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    if number := os.environ.get("OMP_NUM_THREADS"):
        threadpool_limits(int(number))
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(int(number))


def _spinning():
    """Environment variables by which threads wait for each other, read when torch is loaded; {} as OpenMP has it.

    Threads that are done with their part of a computation spin until the others are. GNU OpenMP's 300,000 rounds starve
    the one that is waited for where another program keeps a core busy: on 2 cores a training all but stands still. With
    1,000 it goes on at half its speed; where nothing else runs they would cost a sixth. So what the cores do now
    decides, unless the user has.
    """
    import psutil  # comes with ipykernel

    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return {}
    busy = psutil.cpu_percent(interval=0.1) / 100 * psutil.cpu_count()
    return {"GOMP_SPINCOUNT": "1000"} if busy > 0.5 else {}


def _begin_worker(environment):
    """In each process that runs tasks: this package, and an end when its parent ends."""
    os.environ.update(environment)
    # The kernel is this Python, whatever kernels the user has registered, and imports this very package.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    end_with_parent()


def end_with_parent():
    """Lets this process, one of multiprocessing's, end with all that it started when the one that started it ends.

    A pipeline that was killed must not leave a training behind that writes where the next one writes.
    """

    def watch():
        connection.wait([parent_process().sentinel])
        _end(os.getpid())

    threading.Thread(target=watch, daemon=True).start()


def _end(pid):
    """Kills a process and what it started, itself last."""
    import psutil  # comes with ipykernel

    process = psutil.Process(pid)
    for one in (*process.children(recursive=True), process):
        one.kill()
