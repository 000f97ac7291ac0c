"""Where the model of a row lies, and having it there: brought, restored, or fetched."""

from __future__ import annotations

from pathlib import Path

from fusion.errors import RunError
from harness import mirror
from harness.hashing import folder_hash
from harness.plan import Plan
from harness.store import read_manifest, url


def model_folder(plan: Plan, row: str, weights: bool = True) -> Path:
    """The folder of a row's model.

    weights: if False, no more need be there than its configuration and tokenizer.
    """
    folder = plan.folders[row]
    if folder is None:
        what = "a repeat" if plan.recipe.variants[row].repeat else "an ensemble"
        raise RunError(f"{row}: {what} has no weights of its own")
    if url() and not folder.is_dir() and not folder.is_relative_to(plan.home):
        return _of_the_hub(plan, row, folder)
    mirror.bring(folder, but=() if weights else mirror.WEIGHTS)
    manifest = read_manifest(folder)
    if manifest and "kept" in manifest:
        from harness.keeping import weights_again

        weights_again(plan.home, row, folder)
    snapshot = (manifest or {}).get("facts", {}).get("snapshot")
    return Path(snapshot) if snapshot else folder


def _of_the_hub(plan: Plan, row: str, elsewhere: Path) -> Path:
    """A model of the hub that the machine of the command has, fetched here, too."""
    from fusion.models import fetch

    source = plan.recipe.sources[row]
    if elsewhere == Path(source.path).expanduser():
        raise RunError(f"sources.{row}.path: {source.path} is not on this machine")
    found = fetch(source.path, source.revision)
    if folder_hash(plan.home, found) != plan.identities[row]:
        raise RunError(
            f"sources.{row}: {found} is not what {elsewhere} is on the machine of the command; "
            "give the source a `revision`, or both machines the same HF_HOME"
        )
    return found
