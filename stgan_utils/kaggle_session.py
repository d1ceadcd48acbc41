"""A step's session on Kaggle, inside the kernel that `kaggle_kernels.push` sent: what it starts from, what it leaves.

It leaves one archive as the kernel's output: `<step>.zip`, or `<step>.unfinished.zip` where `max_minutes` were over.
"""

import shutil
from pathlib import Path
from zipfile import ZipFile

from stgan_utils import download, files, pipeline, runs

UNFINISHED = ".unfinished"


def begin_session(step, data, run_dir, mounts):
    """Unpacks what earlier kernels and this step's last session made; a session that runs out of time ends well.

    A kernel that fails has no output that a later one could use. So `runs.Unfinished` is printed, the checkpoint is
    packed, and the cells that are left do nothing.

    Args:
        step: the step's name.
        data: where the data set should be mounted.
        run_dir: the run folder, below the folder that Kaggle keeps.
        mounts: where Kaggle mounts the kernel's sources.

    Returns:
        Where the data set is mounted.
    """
    mounts, run_dir = Path(mounts), Path(run_dir)
    for depth in (1, 2, 3):  # <kernel>/ or notebooks/<owner>/<kernel>/
        for archive in sorted(mounts.glob("*/" * depth + "*.zip")):
            name = archive.stem.removesuffix(UNFINISHED)
            if any(name == known.name for known in pipeline.STEPS):
                (run_dir / name).mkdir(parents=True, exist_ok=True)
                download.unzip(archive, run_dir / name)
                print(f"{name}: {'goes on' if archive.stem != name else 'unpacked'} from {archive}")

    def stop(shell, kind, error, trace, tb_offset=None):
        print(error)
        end_session(step, run_dir)
        shell.input_transformers_cleanup.append(lambda lines: ["pass\n"])

    def forgive(result):
        if isinstance(result.error_in_exec, runs.Unfinished):
            result.error_in_exec = None

    from IPython import get_ipython

    get_ipython().set_custom_exc((runs.Unfinished,), stop)
    get_ipython().events.register("post_run_cell", forgive)
    if Path(data).exists():
        return data
    return next(map(str, mounts.glob(f"datasets/*/{Path(data).name}")), data)


def end_session(step, run_dir):
    """Packs the step's folder beside the run folder, which is deleted: what earlier kernels made is theirs to keep."""
    run_dir = Path(run_dir).resolve()
    folder = run_dir / step
    ending = "" if (folder / "result.json").exists() else UNFINISHED
    with files.atomic_path(run_dir.parent / f"{step}{ending}.zip") as temporary, ZipFile(temporary, "w") as archive:
        archive.comment = str(run_dir).encode()  # paths in tables begin with it
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    shutil.rmtree(run_dir)
