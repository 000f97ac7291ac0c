"""The two errors a user can meet; everything else is a bug and keeps its traceback.

    RecipeError   the user's file is wrong       exit 2
    RunError      the world is wrong             exit 1

A message says where, what was found, what is allowed and what to do.
"""

from __future__ import annotations

import os
import re


class RecipeError(Exception):
    """The recipe, or an argument beside it, is wrong; holds all its mistakes at once."""


class RunError(Exception):
    """The world is wrong: a missing model, a changed file, no disk space."""


def of_system(error: Exception) -> OSError:
    """The system's error behind one of a library that has its number in words: (os error 28)."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(error))
