"""A GAN training on every GPU of the machine, from one call in a notebook.

Accelerate's way from a notebook, `notebook_launcher`, forks the notebook's process. CUDA does not survive that, so it
refuses once the process has used the GPU, and ours always has: the features that KID is measured in are computed there
before a training begins. (On Kaggle an import alone was enough, more than once: huggingface/accelerate, issues 3524 and
3833.) The processes are therefore *spawned*: new interpreters that get what accelerate's launcher gives them, whatever
the notebook did before. Callbacks stay in the notebook's process, where their network and the cell's output are: the
main process of the training sends it what to show or evaluate, and waits.

Outside a notebook, `accelerate launch SCRIPT` does without this room: a `GanTrainer` finds the other processes itself.
"""

import pickle
import signal
import socket
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection, get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from torch.multiprocessing import start_processes

from stgan_utils import checkpoints, parallel
from stgan_utils import device as devices
from stgan_utils.config import UserError
from stgan_utils.runs import Unfinished
from stgan_utils.trainer import GanTrainer

POLL = 0.2  # seconds between two looks at what the processes have sent


def train(settings, images, folder, start=None, evaluate=None, on_sample=None, processes=None):
    """`GanTrainer(settings, images, folder, start, evaluate, on_sample).run()`, on every GPU there is.

    With one GPU or none it is exactly that. With several each gets a process and its share of the batch, and the run
    is the one that a single GPU would have made, up to rounding; a checkpoint may be continued on another number.

    Args:
        processes: how many; by default one a GPU. On a machine without a GPU they compute on the CPU.

    Returns:
        (history, quality): as `GanTrainer.run`.

    Raises:
        UserError, Unfinished: as `GanTrainer`; or the processes cannot share the batch equally.
        torch.multiprocessing.ProcessException: a process failed otherwise or was killed; it says how.
    """
    processes = processes or _gpus()
    if processes == 1 or parallel.launched():
        return GanTrainer(settings, images, folder, start, evaluate, on_sample).run()
    parallel.check_batch(settings.batch_size, processes)
    print(f"{processes} processes train together, each on {settings.batch_size // processes} images of a batch.")
    callbacks = {"evaluate": evaluate, "on_sample": on_sample, "failed": _raise}
    asked = [name for name in ("evaluate", "on_sample") if callbacks[name]]
    space = getattr(evaluate, "feature_space", None)
    torch.cuda.empty_cache()  # what this process has put by is the training's to use
    with _file_of(images) as file:
        # Pickled here: on their own way, tensors would go through /dev/shm, which is small in some containers.
        _run(processes, callbacks, pickle.dumps((settings, file, folder, start, asked, space)))
    header = checkpoints.read_header(folder / "checkpoint.safetensors")
    return pd.DataFrame(header["history"]), pd.DataFrame(header["quality"])


def _gpus():
    return torch.cuda.device_count() if devices.pick().type == "cuda" else 1


def _raise(error):
    raise error


@contextmanager
def _file_of(images):
    """An .npy file of the images, for processes to map: the one they come from (`data.image_cache`) or a temporary."""
    file = str(getattr(images, "filename", ""))
    if file.endswith(".npy") and images.flags.c_contiguous and np.load(file, mmap_mode="r").shape == images.shape:
        yield file
        return
    with TemporaryDirectory() as folder:
        file = str(Path(folder) / "images.npy")
        np.save(file, images)
        yield file


def _run(processes, callbacks, job):
    """Start the processes and serve their calls until they have ended; none is left behind."""
    from accelerate.utils import PrepareForLaunch, patch_environment

    lines, far_ends = zip(*(get_context("spawn").Pipe() for _ in range(processes)), strict=True)
    work = PrepareForLaunch(_work, distributed_type="MULTI_GPU")  # sets each one's rank; also right for CPUs
    # Accelerate prefers XLA wherever torch_xla is installed, even beside GPUs.
    meeting = {"world_size": processes, "master_addr": "127.0.0.1", "master_port": _free_port()}
    with patch_environment(**meeting, use_torch_xla="false"):
        context = start_processes(work, (far_ends, job), processes, join=False, start_method="spawn")
    for end in far_ends:
        end.close()
    open_lines = list(lines)
    try:
        while not context.join(timeout=POLL):
            for line in connection.wait(open_lines, timeout=0):
                try:
                    name, arguments = line.recv()
                except EOFError:  # its process has ended; `join` knows how
                    open_lines.remove(line)
                    continue
                line.send(callbacks[name](*arguments))
    finally:
        for process in context.processes:
            process.kill()  # while it waits for another one, it hears nothing gentler
            process.join()


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _work(lines, job):
    """One of the processes."""
    # Sent when the notebook is interrupted or dies. Python's own handler would wait for the GPU, which may wait for the
    # process that has ended already.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parallel.join()
    for number, line in enumerate(lines):
        if number != parallel.rank():
            line.close()  # else its owner's end would pass unnoticed
    call = partial(_call, lines[parallel.rank()])
    settings, file, folder, start, asked, space = pickle.loads(job)
    images, callbacks = np.load(file, mmap_mode="c"), {name: partial(call, name) for name in asked}
    if "evaluate" in callbacks:
        callbacks["evaluate"].feature_space = space
    try:
        GanTrainer(settings, images, folder, start, **callbacks).run()
    except (UserError, Unfinished) as error:
        call("failed", error)
    torch.distributed.destroy_process_group()


def _call(line, name, *arguments):
    """Have the notebook's process call one of its callbacks, and wait for what it returns."""
    line.send((name, arguments))
    return line.recv()
