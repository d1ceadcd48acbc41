"""Helper package of the STGAN notebook suite; import its modules, not this file.

Nothing heavy is imported here, so that ``import stgan_utils`` costs nothing.
"""

__version__ = "0.1.0"
