"""The processes that tasks run in: what they see of their environment."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from stgan_utils import engine, places
from stgan_utils.config import UserError
from stgan_utils.engine import Processes, StepFailed, Task, run_all

SET_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def write_environment(file):
    file.write_text(" ".join(f"{name}={os.environ[name]}" for name in SET_BY_USER if name in os.environ))


@pytest.mark.parametrize(
    ("busy", "set_by_user", "seen"),
    [
        (0.1, {}, ""),
        (1.0, {}, "GOMP_SPINCOUNT=1000"),
        (1.0, {"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT=77"),
        (1.0, {"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY=active"),
    ],
)
def test_beside_other_programs_threads_that_wait_soon_sleep(monkeypatch, tmp_path, busy, set_by_user, seen):
    for name in SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100 * busy / psutil.cpu_count())
    with engine.Processes(1) as processes:
        processes.result(processes.call({}, write_environment, (tmp_path / "seen",)))
    assert (tmp_path / "seen").read_text() == seen


def write_threads(file):
    file.write_text(str(torch.get_num_threads()))


def test_a_task_has_its_share_of_the_cores_though_torch_is_loaded_with_its_function(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(places, "cores", lambda: 6)
    tasks = [engine.Task(str(i), write_threads, (tmp_path / str(i),), peers=peers) for i, peers in enumerate((5, 1))]
    engine.run_all(tasks, engine.Processes(2))
    assert [int((tmp_path / task.name).read_text()) for task in tasks] == [3, 6]


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_is_one_sentence():
    with pytest.raises(StepFailed, match="A process died, most often for want of memory"):
        run_all([Task("arm", killed, ())], Processes(1))


class Threads(Processes):
    """Tasks as threads, which can share an event."""

    def __init__(self, jobs):
        self.room, self._pool = jobs, ThreadPoolExecutor(jobs)

    def call(self, environment, work, arguments):
        return self._pool.submit(lambda: work(*arguments) or 0)


def test_a_task_that_is_done_leaves_its_place_to_the_next(capsys):
    """Two places: while the first task still works, the second is skipped and the third runs."""
    third_ran = threading.Event()
    tasks = [
        Task("first", third_ran.wait, (30,)),
        Task("second", print, (), done=lambda: True),
        Task("third", third_ran.set, (), needs=("second",)),
    ]
    run_all(tasks, Threads(2))
    said = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert said[:3] == ["first: started", "second: done before, skipped", "third: started"]
    assert {line.split(" in ")[0] for line in said[3:]} == {"first: done", "third: done"}


def fail(text, seconds=0):
    time.sleep(seconds)
    raise UserError(text)


def test_after_a_failure_none_is_started_and_every_failure_is_told(capsys):
    """The second still works when the first fails: there would be a place for the third."""
    tasks = [Task("first", fail, ("No luck.",)), Task("second", fail, ("None here.", 0.5)), Task("third", print, ())]
    with pytest.raises(UserError, match="No luck"):
        run_all(tasks, Threads(2))
    said = capsys.readouterr().out
    assert "third" not in said and "None here." in said and "No luck" not in said


def test_the_user_s_number_of_threads_goes_before(monkeypatch):
    task = Task("arm", print, ())
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert engine.threads(task, 6, 1) == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert engine.threads(task, 6, 1) == "6"
