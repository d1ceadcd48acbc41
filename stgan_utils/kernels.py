"""Jupyter kernels that begin with everything imported: forks of a process that did it once.

A notebook's imports, most of all torch's, take longer than what many notebooks do. So each worker of a run starts one
process that imports it all and runs nothing (Python's "forkserver"); its kernels are forks of that one. On a machine
with a GPU they are programs as ever: what a driver keeps of a process does not survive a fork, and no import promises
to leave the driver alone. So they are off Linux, where libraries of the system forbid it.
"""

import contextlib
import os
import sys
from multiprocessing import forkserver, get_context, reduction
from pathlib import Path
from unittest.mock import patch

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from stgan_utils.engine import end_with_parent, limit_threads

IMPORTED = (
    "ipykernel.kernelapp",
    "torch._dynamo",  # the first optimiser would import it
    *(f"stgan_utils.{name}" for name in ("ablation", "anatomy", "dedup", "gradcam", "launch", "plots_gan", "report")),
)
INLINE = "module://matplotlib_inline.backend_inline"  # as ipykernel has it
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, and Windows' for Linux
_context = get_context("forkserver")


def may_fork():
    """Whether this is Linux without a GPU."""
    return sys.platform == "linux" and not any(map(os.path.exists, _GPUS))


def prepare():
    """Let the imports begin, beside whatever this process goes on with."""
    if may_fork():
        _context.set_forkserver_preload(list(IMPORTED))
        with patch.dict(os.environ, MPLBACKEND=INLINE):  # which matplotlib reads when it is imported
            forkserver.ensure_running()


class KernelManager(AsyncKernelManager):
    """jupyter_client's manager, whose kernel is a `Fork` where it may be one."""

    async def _async_pre_start_kernel(self, **options):
        if may_fork():
            self.provisioner = Fork(kernel_id=self.kernel_id or "", kernel_spec=self.kernel_spec, parent=self)
        return await super()._async_pre_start_kernel(**options)


class Fork(LocalProvisioner):
    """A kernel on this machine that is no new program; all else about it is as jupyter_client has it."""

    async def launch_kernel(self, cmd, env=None, cwd=None, **_):
        arguments, self.cwd = cmd[cmd.index("ipykernel_launcher") + 1 :], Path(cwd or os.getcwd())
        self.process = _Process(arguments, dict(os.environ if env is None else env), self.cwd, _StandardError())
        self.pid = self.process.pid
        return self.connection_info


class _Process:
    """What a provisioner expects of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, *call):
        self._process = _context.Process(target=_become_kernel, args=call)
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self):
        self._process.join()
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)


class _StandardError:
    """This process's standard error as it is when the fork is made, for the fork."""

    def __getstate__(self):
        return {"copy": reduction.DupFd(2)}

    def take(self):
        os.dup2(self.copy.detach(), 2)


def _become_kernel(arguments, env, cwd, standard_error):
    """In the fork: what `python -m ipykernel_launcher ARGUMENTS` is in `env` and `cwd`."""
    from ipykernel.kernelapp import launch_new_instance

    os.setsid()  # Ctrl-C in a terminal is for the run, which ends its kernels itself
    os.chdir(cwd)
    standard_error.take()
    end_with_parent()
    os.environ.clear()
    os.environ.update(env)
    limit_threads()  # libraries were loaded before the fork
    launch_new_instance(argv=[*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])
