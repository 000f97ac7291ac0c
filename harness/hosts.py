"""Several hosts that train one recipe's targets: one runs it, the others join through the store.

All share the store, at the same path. The host that runs says so in `running/` for as long as it
builds, and where to meet while it trains. A host that joins does nothing but train with it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from glob import escape
from pathlib import Path
from typing import Any

from fusion.errors import RecipeError, RunError
from harness.launching import PATIENCE, help_out
from harness.plan import Plan, plan
from harness.progress import lives, say, signs, working
from harness.recipe import Loaded, load
from harness.store import home, provenance, unlike, url

GLANCE = 1.0  # seconds between two looks at what the host that runs says
ABSENT = 5  # glances without its sign after which it is gone: a shared folder may miss a few
LOOK = 30  # glances without anybody who runs, after which it is asked whether anything is left


def calling(planned: Plan, recipe: str) -> AbstractContextManager[None]:
    """Say in the store, until this ends, that a recipe that several hosts train is built here."""
    if planned.recipe.machine.hosts == 1:
        return nullcontext()
    return working(planned.home, _name(recipe), made_by=provenance())


def join(reference: str, overrides: Sequence[str] = ()) -> int:
    """Train with the host that runs this recipe until it has built all; the exit code.

    It may come earlier or later than that host, and again after it was interrupted: 0 if all is
    trained in the end, or the last training that it helped with. RecipeError if the recipe is for
    one host; RunError if this one has other versions than the one that runs.
    """
    loaded = load(reference, overrides)
    if loaded.recipe.machine.hosts == 1:
        raise RecipeError(
            f"{loaded.name}: machine.hosts is 1, so nobody is waited for; say `machine.hosts=2`, "
            "or as many as there are, here and where the recipe runs"
        )
    refuse_objects(loaded)
    code, away, met, helped, started = 1, 0, False, "", time.monotonic()
    while True:
        sign = _sign(home(), loaded.name)
        if sign is None:
            away += 1
            over = away > ABSENT if met else time.monotonic() - started > PATIENCE
            if over or (not met and away % LOOK == 1 and not _left(loaded)):
                return _ended(loaded, met, code)
            if not met and away == 1:
                say(f"waiting for `kfuse run {reference}` on the store {home()}")
        else:
            away, met = 0, True
            if unfit := unlike(sign["made_by"]):
                raise RunError(unfit)
            call = sign.get("training")
            if call and call["id"] != helped:
                helped = call["id"]
                code = _help(call)
        time.sleep(GLANCE)


def refuse_objects(loaded: Loaded) -> None:
    """RecipeError if several hosts are to train in an object store, each with files of its own."""
    if loaded.recipe.machine.hosts > 1 and url():
        raise RecipeError(
            f"machine.hosts: is {loaded.recipe.machine.hosts}, but hosts train together in a "
            f"folder that they share, and KFUSE_HOME is {url()}; leave it out, or share a folder"
        )


def _ended(loaded: Loaded, met: bool, code: int) -> int:
    """Say how it stands where nobody runs a recipe, or is met at all; the exit code."""
    left = _left(loaded)
    if not left:
        say(f"{loaded.name}: all is trained; nothing is left to join")
        return 0
    if met:
        say(f"{loaded.name}: no longer run, and not trained: {', '.join(left)}; see `kfuse status`")
    else:
        say(
            f"{loaded.name}: nobody has run it on the store {home()} for {PATIENCE // 60} minutes; "
            "join again when it is run (`kfuse status` tells what has failed)"
        )
    return code


def _name(recipe: str) -> str:
    return f"hosts-{recipe}"


def _sign(store: Path, recipe: str) -> dict[str, Any] | None:
    """What the host that runs this recipe says, if there is one; rather of one that trains.

    Of two that run it one has the lock, and the other waits.
    """
    name = _name(recipe)
    found = [s for s in signs(store, f"{escape(name)}.*") if s["folder"] == name and lives(s)]
    return next((sign for sign in found if sign.get("training")), found[0] if found else None)


def _left(loaded: Loaded) -> list[str]:
    """The targets that are still to be trained."""
    planned = plan(loaded.recipe, home())
    return [step.name for step in planned.builds() if step.kind == "train" and not step.done]


def _help(call: dict[str, Any]) -> int:
    name = Path(call["job"]).parent.name
    try:
        say(f"train {name} with {call['endpoint']}")
        help_out(call)
    except RunError as error:
        say(f"train {name}: {error}")
        return 1
    return 0
