"""Helper package of the STGAN notebook suite; import its modules, not this file.

Nothing heavy is imported here, so that ``import stgan_utils`` costs nothing.
"""

__version__ = "0.1.0"
# Where it is published; no account of GitHub can have an underscore in its name, so nobody can stand in for this one.
# Version and address change here alone: `make notebooks` brings them into the notebooks and the README.
REPOSITORY = "https://github.com/YOUR_NAME/stgan-notebooks"
