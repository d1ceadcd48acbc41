"""Where tests find real images, a backbone, a small phantom dataset, a finished run and a Ray cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """What takes longest first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: "cluster" not in item.fixturenames)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Decoded images go to a folder of this test run, not into the user's cache."""
    os.environ["STGAN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def ham10000():
    """Folder of real HAM10000 images (`HAM10000_DIR`)."""
    folder = Path(os.environ.get("HAM10000_DIR", ROOT.parent / "shared" / "ham10000"))
    if not (folder / "HAM10000_metadata.csv").exists():
        pytest.skip(f"no real images at {folder}: set HAM10000_DIR")
    return folder


@pytest.fixture(scope="session")
def backbone():
    """File of pretrained MobileNetV2 weights (`MOBILENET_V2_WEIGHTS`)."""
    file = Path(
        os.environ.get("MOBILENET_V2_WEIGHTS", ROOT.parent / "shared" / "weights" / "mobilenet_v2_features.pth")
    )
    if not file.exists():
        pytest.skip(f"no backbone at {file}: set MOBILENET_V2_WEIGHTS")
    return file


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory):
    """A small phantom dataset laid out as HAM10000 on Kaggle: 210 images of 64 px."""
    from stgan_utils import phantom

    folder = tmp_path_factory.mktemp("phantom")
    phantom.write_dataset(folder, count=210, size=64, seed=0)
    return folder


def command(*words, cwd=ROOT):
    """`python -m` with these words, on this code: a `subprocess.CompletedProcess`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """A run folder that the smoke profile has gone through from the first step to the report, one for all workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "smoke"
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.html").exists():
            ran = command("stgan_utils", "run", "--data", "phantom", "--profile", "smoke", "--out", folder, "--jobs", 2)
            assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A real Ray cluster in processes of this machine: a head with one core, to which nodes can be added."""
    pytest.importorskip("ray")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # Ray's 15 starves beside other tests
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield nodes
    nodes.shutdown()
