"""Where this runs – Kaggle, Colab or any other machine – and what follows for data, weights and results.

Kaggle mounts what a notebook was given as input and keeps what lies in its working folder; of Colab nothing outlives
the session but Google Drive, once that is mounted. `STGAN_ROOT` stands in for `/`, so any folder can be laid out so.
"""

import os
from contextlib import suppress
from importlib import metadata
from pathlib import Path

KAGGLE, COLAB = "Kaggle", "Colab"
_ROOT = Path(os.environ.get("STGAN_ROOT", "/"))
KAGGLE_INPUT, KAGGLE_WORKING = _ROOT / "kaggle" / "input", _ROOT / "kaggle" / "working"
CONTENT, DRIVE = _ROOT / "content", _ROOT / "content" / "drive" / "MyDrive"
HAM10000 = "kmader/skin-cancer-mnist-ham10000"
HAM10000_FILES = ("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")
KAGGLE_DEPTH = 5  # notebooks/<owner>/<slug>/runs/<name>
COLAB_DEPTH = 3  # drive/MyDrive/<folder>: every level of a large Drive costs seconds


def place():
    """`KAGGLE`, `COLAB` or None, by the variables that the two set; Kaggle's image is built on Colab's."""
    return KAGGLE if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else COLAB if "COLAB_RELEASE_TAG" in os.environ else None


def repository():
    """The folder of manifest, released weights and notebooks: this checkout, or where the wheel put them."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "weights_manifest.json").exists():
        with suppress(metadata.PackageNotFoundError):
            for file in metadata.files("stgan-utils") or ():
                if file.name == "weights_manifest.json":
                    return Path(file.locate()).resolve().parent
    return checkout


def dataset():
    """The folder of a HAM10000 that was attached here (Kaggle) or lies in Drive or the session's disk (Colab), or None.

    Elsewhere nothing is looked for.
    """
    downloads = Path.home() / ".cache" / "kagglehub" / "datasets" / HAM10000  # where Kaggle's downloader keeps it
    tops = {
        KAGGLE: [(KAGGLE_INPUT, KAGGLE_DEPTH)],
        COLAB: [(KAGGLE_INPUT, KAGGLE_DEPTH), (downloads, 2), (CONTENT, COLAB_DEPTH)],
    }
    folders = (folder for top, depth in tops.get(place(), ()) for folder in _below(top, depth))
    return next((folder for folder in folders if any((folder / name).is_file() for name in HAM10000_FILES)), None)


def mounted(name):
    """Files or folders of that name among what Kaggle mounted, nearest first."""
    return (folder / name for folder in _below(KAGGLE_INPUT, KAGGLE_DEPTH) if (folder / name).exists())


def results():
    """The folder in which a relative run folder lies: one that outlives the session where there is one."""
    if place() == KAGGLE:
        return KAGGLE_WORKING
    return DRIVE / "stgan" if place() == COLAB and DRIVE.is_dir() else Path.cwd()


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def advice(on):
    """What to do here where "data", a "gpu", the "internet" or an "earlier" step is missing: part of a sentence."""
    return _ADVICE[on].get(place(), _ADVICE[on][None])


def _below(top, depth):
    """`top` and the folders up to `depth` levels below it, level by level, by name."""
    level = [top]
    for _ in range(depth + 1):
        yield from level
        below = []
        for folder in level:
            with suppress(OSError), os.scandir(folder) as entries:
                below += [Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        level = sorted(below)


_ADVICE = {
    "data": {
        KAGGLE: f"add {HAM10000} (Add Input, Datasets)",
        COLAB: f"run `import kagglehub; kagglehub.dataset_download('{HAM10000}')`, or mount a Drive with HAM10000 in a "
        "folder",
        None: "name HAM10000's folder as `data`",
    },
    "gpu": {
        KAGGLE: "choose Settings, Accelerator, GPU T4 × 2 (or L4)",
        COLAB: "choose Runtime, Change runtime type, T4 GPU (or L4)",
        None: "use a machine with one",
    },
    "internet": {
        KAGGLE: "switch it on (Settings, Internet), or add a data set that holds",
        COLAB: "reconnect the runtime, or download",
        None: "connect the machine, or download",
    },
    "earlier": {
        KAGGLE: ", save its version and add its output here (Add Input, Notebooks)",
        COLAB: " with Google Drive mounted, here too: notebooks on Colab share nothing else",
        None: "",
    },
}
