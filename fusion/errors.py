"""The two errors a user can meet; everything else is a bug and keeps its traceback.

    RecipeError   the user's file is wrong       exit 2
    RunError      the world is wrong             exit 1

A message says where, what was found, what is allowed and what to do.
"""


class RecipeError(Exception):
    """The recipe, or an argument beside it, is wrong; holds all its mistakes at once."""


class RunError(Exception):
    """The world is wrong: a missing model, a changed file, no disk space."""
