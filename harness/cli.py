"""The `kfuse` command: arguments in, one call of a stage, exit code out.

Exit codes: 0 done, 1 the world is wrong or some rows could not be made or measured (they are
named), 2 the recipe or the arguments are wrong. Heavy libraries load only when a stage needs them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fusion.errors import RecipeError, RunError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Fuse language models and measure, honestly, what it brought.

A recipe (YAML) names source models, baselines and fused variants; kfuse builds what is missing,
measures every row on the same suites and writes one report.

    kfuse run quickstart            two real models, six rows, four suites

    kfuse run my.yaml --dry-run     what would be done, and its size

    kfuse run my.yaml --only fused corpus.tokens=100_000

    kfuse help                      pages on recipes, reproduction, statistics, machines and more

Results are kept in $KFUSE_HOME, or ./runs. Running again continues, or says that all is done.""",
)

ALL = ("build", "evaluate", "report")
RecipeName = Annotated[str, typer.Argument(help="a recipe file, or the name of a bundled recipe")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="overrides, as in variants.fused.train.fuse.clm_weight=0.8"),
]
Only = Annotated[
    list[str] | None, typer.Option("--only", help="this row and what it needs; repeatable")
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, help="at most N questions a suite: seeded, stratified, marked partial"
    ),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="DIR", help="read questions from this folder where it has them"),
]
Executor = Annotated[
    str,
    typer.Option("--executor", help="local, or ray: every job a task of a cluster, same results"),
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="of ray's cluster; else RAY_ADDRESS, else this machine alone"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="show what would be done, do nothing")]


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    only: Only = None,
    limit: Limit = None,
    data: Data = None,
    dry_run: DryRun = False,
    executor: Executor = "local",
    address: Address = None,
) -> None:
    """Build, measure and report everything that a recipe names."""
    given = _with(overrides, limit, data)
    _carry_out(recipe, given, only, ALL, dry_run, executor, address)


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    only: Only = None,
    limit: Limit = None,
    data: Data = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="a100, h100 or h200: GPU-hours by its data sheet, not by this machine"),
    ] = None,
) -> None:
    """Before any compute: what each suite can show, and tokens, FLOPs, time, disk and memory.

    Exit 1 if it cannot fit on this machine, or on each GPU. Models that are not here yet count if
    the recipe says their `parameters`.
    """
    from harness.run import foresee

    print(foresee(recipe, _with(overrides, limit, data), only or [], gpu))


@app.command()
def status(
    recipe: RecipeName,
    overrides: Overrides = None,
    only: Only = None,
    limit: Limit = None,
    watch: Annotated[bool, typer.Option("--watch", help="stay, and show it live")] = False,
) -> None:
    """How a recipe's jobs stand: done, running and where, waiting for what, failed and why.

    Reads the store alone, so it can be asked beside a run, on another machine, or after a crash.
    """
    from harness.status import status as show

    show(recipe, _with(overrides, limit, None), only or [], watch)


@app.command()
def build(
    recipe: RecipeName,
    overrides: Overrides = None,
    only: Only = None,
    dry_run: DryRun = False,
    executor: Executor = "local",
    address: Address = None,
) -> None:
    """Only build: fetch models, pack the corpus, capture distributions, train, merge."""
    _carry_out(recipe, overrides, only, ("build",), dry_run, executor, address)


@app.command()
def join(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Train with the host that runs this recipe, on each other one of its `machine.hosts`.

    All hosts share the store at the same path, and have the same versions. Ends when all is
    trained or that host no longer runs, or after ten minutes in which none did. The exit code is 0
    if all is trained, or else by the last training that it had a part in.
    """
    from harness.hosts import join as train_with

    try:
        code = train_with(recipe, overrides or [])
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)


@app.command()
def evaluate(
    recipe: RecipeName,
    overrides: Overrides = None,
    only: Only = None,
    limit: Limit = None,
    data: Data = None,
    dry_run: DryRun = False,
    executor: Executor = "local",
    address: Address = None,
) -> None:
    """Only measure the rows that are built."""
    given = _with(overrides, limit, data)
    _carry_out(recipe, given, only, ("evaluate",), dry_run, executor, address)


@app.command()
def report(
    recipe: Annotated[
        str, typer.Argument(help="a recipe, or folders: runs, folders of runs, reports")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="overrides of a recipe, or further folders")
    ] = None,
    limit: Limit = None,
    data: Data = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="of folders: the row that gains are against")
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="of folders: what the report is called")
    ] = "runs",
) -> None:
    """Only report, from what is built and measured: a recipe's rows, or any finished runs."""
    from harness.verdicts import holds_runs, report_runs

    paths = [Path(part) for part in [recipe, *(overrides or [])]]
    if holds_runs(paths[0]):
        report_runs(paths, reference, name)
        return
    if reference or name != "runs":
        raise RecipeError(
            f"--reference and --name belong to folders of runs; {recipe} holds none, and a recipe "
            "says `reference:` itself"
        )
    _carry_out(recipe, _with(overrides, limit, data), stages=("report",))


@app.command()
def rescore(
    recipe: RecipeName,
    overrides: Overrides = None,
    only: Only = None,
    limit: Limit = None,
    data: Data = None,
) -> None:
    """Derive every score again from the stored records, without a model."""
    from harness.run import rescore as derive

    raise typer.Exit(derive(recipe, _with(overrides, limit, data), only or []))


@app.command()
def export(
    runs: Annotated[list[Path], typer.Argument(help="folders of evaluations/ in the store")],
    to: Annotated[Path, typer.Option("--to", help="where to write")],
) -> None:
    """Write measurements as lm-eval writes them: results JSON, and samples JSONL by task."""
    from harness.export import export as write

    for path in write(runs, to):
        print(path)


@app.command()
def restore(
    name: Annotated[str, typer.Argument(help="a row's folder, or its name in the store's models/")],
    to: Annotated[Path, typer.Option("--to", help="where to write the model")],
    base: Annotated[
        Path | None, typer.Option("--base", help="the model that the difference was taken from")
    ] = None,
) -> None:
    """Write a row whose recipe said `keep` as an ordinary model folder again."""
    from harness.keeping import restore_to
    from harness.store import home

    print(restore_to(home(), name, to, base))


Base = Annotated[str, typer.Argument(help="a row of a report, or a run's folder")]
Candidate = Annotated[str, typer.Argument(help="the row or run that is judged")]
ReportName = Annotated[
    str | None, typer.Option("--report", help="the report that has both rows: its name or path")
]


@app.command()
def compare(
    base: Base,
    candidate: Candidate,
    report: ReportName = None,
    items: Annotated[int, typer.Option(min=0, help="differing items to show a suite")] = 20,
    csv: Annotated[Path | None, typer.Option(help="write all differing items here")] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            min=1e-6, help="a gain whose interval is within this (0.01: a point) is equivalent"
        ),
    ] = None,
) -> None:
    """Two rows item by item: gains with intervals, and the items where the rows differ."""
    from harness.verdicts import compare as show

    print(show(base, candidate, report, items, csv, margin))


@app.command()
def gate(
    base: Base,
    candidate: Candidate,
    report: ReportName = None,
    gate: Annotated[
        Path | None, typer.Option("--gate", help="rules (YAML); else no suite may lose 0.02")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="write the summary here, too")] = None,
    junit: Annotated[Path | None, typer.Option(help="write JUnit XML here")] = None,
) -> None:
    """Regression test: exit 0 pass, 1 fail, 2 cannot be judged, 3 inconclusive."""
    from harness.verdicts import gate as judge

    text, code = judge(base, candidate, gate, report, markdown, junit)
    print(text)
    raise typer.Exit(code)


@app.command()
def leaderboard(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="runs, folders of runs, reports, lm-eval's result files (.json), or tables of "
            "published scores (.csv with row, suite, score, source)"
        ),
    ],
    form: Annotated[
        str, typer.Option("--format", help="markdown, csv, latex, html or json")
    ] = "markdown",
    published: Annotated[
        bool, typer.Option("--published", help="also what papers printed of these suites")
    ] = False,
) -> None:
    """Rank rows suite by suite, with what the ranks are worth."""
    from harness.verdicts import leaderboard as rank

    print(rank(runs, form, published), end="")


@app.command(name="inspect-alignment")
def inspect_alignment(
    source: Annotated[str, typer.Argument(help="a model, named as in a recipe's `path`")],
    target: Annotated[str, typer.Argument(help="the model that would learn from it")],
    text: Annotated[Path | None, typer.Option("--text", help="a text of your own")] = None,
    vocabulary: Annotated[str, typer.Option("--vocabulary", help="a vocabulary map")] = "prefix",
) -> None:
    """How well a source's tokens and vocabulary meet a target's, on a text."""
    from harness.inspection import inspect_alignment as describe

    print(describe(source, target, text, vocabulary))


@app.command(name="list")
def list_() -> None:
    """Suites, fusion functions, vocabulary maps, merge methods, ensemble rules and recipes."""
    from harness.doctor import listing

    print(listing())


@app.command()
def doctor() -> None:
    """What this machine has: devices, memory, disk, sandbox, hub, languages of programs."""
    from harness.doctor import examine, languages

    print(examine(), end="\n\n", flush=True)
    for line in languages():
        print(line, flush=True)


@app.command(name="help")
def help_(
    page: Annotated[
        str | None, typer.Argument(help="the page to show; without one they are listed")
    ] = None,
) -> None:
    """Pages on recipes, reproduction, faults, statistics, machines and own methods."""
    from harness.pages import show

    show(page)


@app.command()
def schema() -> None:
    """The JSON Schema of recipes, for editors."""
    from harness.recipe import schema as recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


def _carry_out(
    recipe: str,
    overrides: list[str] | None,
    only: list[str] | None = None,
    stages: tuple[str, ...] = ALL,
    dry_run: bool = False,
    executor: str = "local",
    address: str | None = None,
) -> None:
    """Carry out the stages and leave with their exit code."""
    try:
        from harness.run import run

        code = run(recipe, overrides or [], only or [], stages, dry_run, executor, address)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        code = 130
    raise typer.Exit(code)


def _with(overrides: list[str] | None, limit: int | None, data: str | None) -> list[str]:
    """Overrides, and options as further ones."""
    out = list(overrides or [])
    if limit:
        out.append(f"evaluate.limit={limit}")
    if data:
        out.append(f"evaluate.data={json.dumps(str(Path(data).absolute()))}")
    return out


def main() -> None:
    """Run the command; user's and world's errors become a message and an exit code."""
    try:
        app()
    except RecipeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        from harness.store import AWAY, home, world

        if error.errno not in AWAY:
            raise
        print(world(error, Path(error.filename or home())), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
