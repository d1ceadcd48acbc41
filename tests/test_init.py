"""What `import stgan_utils` does to what is loaded after it."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SET_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("set_by_user", "rounds"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(set_by_user, rounds):
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_USER} | set_by_user
    loads = [sys.executable, "-c", "import stgan_utils, torch"]
    said = subprocess.run(
        loads, cwd=ROOT, env=environment | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True
    ).stderr  # of the OpenMP library that torch brings
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said) == [rounds]
