"""Helper package of the STGAN notebook suite; import its modules, not this file.

Nothing heavy is imported here, so that ``import stgan_utils`` costs nothing. It sets one environment variable, which
torch's threads read when torch is loaded later.
"""

import os

__version__ = "0.1.0"
# Where it is published; no account of GitHub can have an underscore in its name, so nobody can stand in for this one.
# Version and address change here alone: `make notebooks` brings them into the notebooks and the README.
REPOSITORY = "https://github.com/YOUR_NAME/stgan-notebooks"

# Threads that are done with their part of a computation spin until the others are. GNU OpenMP's 300,000 rounds starve
# the one that is waited for where another program keeps a core busy: on 2 cores a training all but stands still. With
# 1,000 it goes on at half its speed; alone it would be a sixth slower. So the load of the last minute decides, once for
# a process and all that it starts.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() and hasattr(os, "getloadavg"):
    os.environ["GOMP_SPINCOUNT"] = "1000" if os.getloadavg()[0] > 0.5 else "300000"
