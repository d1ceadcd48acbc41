"""What `import stgan_utils` does to what is loaded after it."""

import importlib
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import stgan_utils

SET_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("load", "set_by_user", "rounds"),
    [
        (0.1, {}, "300000"),
        (1.0, {}, "1000"),
        (1.0, {"GOMP_SPINCOUNT": "77"}, "77"),
        (1.0, {"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_beside_other_programs_threads_that_wait_soon_sleep(monkeypatch, load, set_by_user, rounds):
    monkeypatch.setattr(os, "environ", set_by_user)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    importlib.reload(stgan_utils)
    assert os.environ.get("GOMP_SPINCOUNT") == rounds


def test_torch_is_loaded_with_it():
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_USER}
    script = "import os, stgan_utils, torch; print(os.environ['GOMP_SPINCOUNT'])"
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", ran.stderr) == [ran.stdout.strip()]
