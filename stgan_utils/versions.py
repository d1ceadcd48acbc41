"""What a result was made with: the versions of the packages that matter, and this package's commit."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import stgan_utils


def found():
    """{name: version} of Python, this package, torch, torchvision and numpy (None: not there); "git": its commit."""
    numbers = {"python": platform.python_version(), "stgan_utils": stgan_utils.__version__}
    for name in ("torch", "torchvision", "numpy"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = None
    return {**numbers, "git": git_commit()}


def git_commit():
    """The commit of the checkout that this package runs from, or None: installed, or on a machine without git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # git itself would go on to a repository that happens to lie around it
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
