"""The command line: parse, build, call, print."""

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from mithridate.cli.blame import blamed
from mithridate.cli.command import Command, P, reports_mistakes
from mithridate.cli.machine import cores, default_jobs, use_threads
from mithridate.cli.options import (
    MOST_JOBS,
    CacheOption,
    ChangesOption,
    DataRootOption,
    Device,
    DeviceOption,
    Engine,
    EngineOption,
    Form,
    JobsOption,
    PageForm,
    PluginsOption,
    Review,
    ScaleName,
    SeedsOption,
    Shelf,
    ThreadsOption,
    seeds_of,
)
from mithridate.cli.results import end_with, report_on, report_on_guard
from mithridate.cli.run import run_and_report, shipped_recipe
from mithridate.cli.terminal import take_any_text
from mithridate.core.errors import ConfigError
from mithridate.core.files import locked

app = typer.Typer(
    name="mithridate",
    help=(
        "Attack, inspect and defend models that learn from live data streams.\n\n"
        "Start with `mithridate demo`: it poisons a small model on real digits and writes a report."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(asked: bool) -> None:
    if asked:
        print(version("mithridate"))
        raise typer.Exit


@app.callback()
def _before_commands(
    *,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


def _command(name: str | None = None) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Declare a command, by default under the name of its function."""
    return lambda function: app.command(name, cls=Command)(reports_mistakes(function))


@_command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Where runs and report go; made if missing.")] = Path(
        "demo-report"
    ),
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_JOBS,
            help="Runs at a time, each in its own process; by default 2, where there are as many cores.",
        ),
    ] = None,
    threads: ThreadsOption = 1,
    cache: CacheOption = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Poison a small model on real handwritten digits, defend it, and report what broke and what held.

    Needs no network and no data: the digits come with scikit-learn. A federation of fifty clients learns, three times
    over: with nobody hostile, with one hostile round, and with the same round after four hundred quiet ones; without a
    defence and with the recommended one. Runs that are in the directory already are kept: a second call only prints
    them.
    """
    from mithridate.cli.results import open_page, tell_story

    jobs = jobs or min(2, cores())
    use_threads(threads, jobs=jobs)
    with locked(out_dir / ".demo.lock", timeout=0):  # a second demo would take runs away from the first one's story
        run_and_report(shipped_recipe("demo.toml"), out_dir, cache=cache, device="cpu", resume=True, jobs=jobs)
        tell_story(out_dir)
    if show:
        open_page(out_dir / "report.html")


@_command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A TOML file; the project's `recipes/` has some.")],
    changes: ChangesOption = None,
    plugins: PluginsOption = None,
    seeds: SeedsOption = None,
    device: DeviceOption = Device.auto,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Where runs and report go; `runs/RECIPE` by default.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip finished runs, continue killed ones and try failed ones again.")
    ] = False,
    jobs: JobsOption = None,
    engine: EngineOption = Engine.local,
    yes: Annotated[bool, typer.Option("--yes", help="Run a grid of any size without asking.")] = False,
    threads: ThreadsOption = 0,
    data_root: DataRootOption = None,
    cache: CacheOption = None,
) -> None:
    """Run a recipe: every attack against every defence with every seed, then the report.

    Each run gets a directory in the run store with its settings, one row a step and its outcome. The burn-in is trained
    once and shared by all runs that agree on it. A run that fails is told of at the end, with exit code 1; the others
    go on.
    """
    jobs = jobs or default_jobs(engine.value)
    use_threads(threads, jobs=jobs)
    run_and_report(
        recipe,
        out_dir or Path("runs") / recipe.stem,
        changes=changes or [],
        plugins=plugins or [],
        seeds=seeds_of(seeds),
        yes=yes,
        data_root=data_root,
        cache=cache,
        device=device.value,
        resume=resume,
        jobs=jobs,
        engine=engine.value,
    )


@_command()
def calibrate(
    recipe: Annotated[Path, typer.Argument(help="A TOML file with a defence `dsc`.")],
    changes: ChangesOption = None,
    plugins: PluginsOption = None,
    defence: Annotated[
        str | None, typer.Option(help="Label of the `dsc` to calibrate, if the recipe has several.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Share of clean samples to be corrected; the recipe's target_rate, or 0.05, by default."),
    ] = None,
    unseen: Annotated[int, typer.Option(min=1, help="Clean batches of the stream to check the threshold on.")] = 10,
    seeds: SeedsOption = None,
    device: DeviceOption = Device.auto,
    threads: ThreadsOption = 0,
    data_root: DataRootOption = None,
    cache: CacheOption = None,
) -> None:
    """Measure the threshold P = mu + tau m of DSC on the trusted set, and check it on clean batches that it never saw.

    With `target_rate` in the recipe, `run` does the same by itself before every stream.
    """
    from mithridate.cli.calibration import print_thresholds

    use_threads(threads, jobs=1)
    print_thresholds(
        recipe,
        plugins=plugins or [],
        changes=changes or [],
        seeds=seeds_of(seeds),
        defence=defence,
        rate=rate,
        unseen=unseen,
        device=device.value,
        data_root=data_root,
        cache=cache,
    )


@_command()
def status(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The --out directory of a run.")],
) -> None:
    """Show how far a grid is: which runs have finished, failed, begun or wait, and how long the rest may take.

    It only looks: a command that is at work in the directory is not disturbed.
    """
    from mithridate.bench.status import status as status_of
    from mithridate.cli.standing import print_status

    print_status(status_of(directory))


@_command()
def report(
    directories: Annotated[
        list[Path], typer.Argument(help="Run directories, or directories that hold them; or the folder of a guard.")
    ],
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Where the report goes; the first directory by default.")
    ] = None,
    form: Annotated[
        PageForm,
        typer.Option(
            "--format",
            help="`html`: the page, and its tables in the terminal; `md`, `csv`, `latex`: the table of results is "
            "printed, and nothing else. All files are written in any case.",
        ),
    ] = PageForm.html,
) -> None:
    """Write tables, figures and one self-contained HTML page from finished runs.

    Rows lie beside the page as CSV and Parquet, tables for GitHub and LaTeX, and figures as SVG, PNG and PDF. Of the
    folder that a guard writes in a training of yours: one page that says what was refused, when and why.
    """
    from mithridate.guard.step_log import is_guard_folder

    if not any(map(is_guard_folder, directories)):
        report_on(directories, out_dir or directories[0], form.value)
    elif len(directories) == 1:
        report_on_guard(directories[0], out_dir, form.value)
    else:
        raise ConfigError("a guard's folder has a page of its own; give it alone.")


@_command()
def quarantine(
    action: Annotated[
        Review,
        typer.Argument(
            help="`list`: a table of all batches; `show`: all that is known of some; `release`: move them out; `drop`: "
            "delete them for good."
        ),
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A guard's folder, or the quarantine inside it.")],
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of batches, as `list` shows them.")
    ] = None,
    all_of_them: Annotated[bool, typer.Option("--all", help="Every batch, instead of ids.")] = False,
    to: Annotated[Path | None, typer.Option(help="With `release`: the folder that batches are moved to.")] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="With `show`: draw the images of the batch.")
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="With `show`: print token ids as text; the function takes a list of them. Modules are also looked for "
            "in the current directory.",
        ),
    ] = None,
) -> None:
    """Look through the batches that a guard refused, and release or drop them.

    Nothing leaves the quarantine by itself. What is released lies in a folder of its own, and
    `mithridate.guard.read_batch` gives it back as it was.
    """
    from mithridate.cli.quarantine import Wishes, review

    review(action.value, directory, Wishes(ids or [], all_of_them, to, pictures, decoder))


@_command()
def audit(
    plan: Annotated[
        Path, typer.Argument(metavar="AUDIT.toml", help="What is audited, the attacker's budget, the damage allowed.")
    ],
    out_dir: Annotated[Path, typer.Option("--out", help="Where the files go; made if missing.")] = Path("audit"),
    seeds: SeedsOption = None,
    threads: ThreadsOption = 0,
) -> None:
    """Audit a model of your own: what could one batch, or a stream of them, do to it.

    A function of yours gives model, optimiser, criterion, stream, test samples and perhaps its defence; the attacks
    that fit are tried on it within the budget, once a seed, beside the clean stream and noise. Ends with 0 if no tried
    attack cost more than is allowed, 1 if one did, 3 if it cannot be told, and 2 if the plan or the function is wrong.
    Finished runs are kept: the same command goes on where a killed one was.
    """
    from mithridate.audit import read_plan
    from mithridate.cli.audit import audit_and_print

    use_threads(threads, jobs=1)
    wanted = read_plan(plan)
    if (given := seeds_of(seeds)) is not None:
        wanted = wanted.with_seeds(given)
    with blamed(out_dir):
        audited = audit_and_print(wanted, out_dir)
    if audited.exit_code:
        raise typer.Exit(audited.exit_code)


@_command()
def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Tables and figures, such as zhu2023-table1 or pang2021-figure3; `all` for every one."),
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Show all, with the claim and what is finished.")] = False,
    scale: Annotated[
        ScaleName,
        typer.Option(
            help="`smoke`: digits, seconds, shows that it runs; `small`: real images and a narrow ResNet, for two CPU "
            "cores; `paper`: the full protocol."
        ),
    ] = ScaleName.smoke,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH=VALUE[,VALUE]",
            help="Make only some of the runs, by label or setting: defence=none,dsc, variant=svhn, data.name=cifar10; "
            "repeatable: all must be so.",
        ),
    ] = None,
    changes: ChangesOption = None,
    seeds: SeedsOption = None,
    form: Annotated[Form, typer.Option("--format", help="How tables are printed.")] = Form.table,
    device: DeviceOption = Device.auto,
    out_dir: Annotated[Path, typer.Option("--out", help="Runs and page go to OUT/NAME/SCALE.")] = Path("reproduced"),
    record: Annotated[
        Path | None, typer.Option(help="Keep a small JSON file of every run in this folder, such as results.")
    ] = None,
    jobs: JobsOption = None,
    engine: EngineOption = Engine.local,
    threads: ThreadsOption = 0,
    data_root: DataRootOption = None,
    cache: CacheOption = None,
) -> None:
    """Reproduce a published table or figure: our numbers beside the paper's, and a verdict on each of its claims.

    Runs that are finished are kept, and killed ones continued: the same command goes on where it was.
    """
    from mithridate.cli.reproduce import chosen_items, list_items, reproduce_items

    if list_all:
        list_items(out_dir)
        return
    items = chosen_items(names or [])
    jobs = jobs or default_jobs(engine.value)
    use_threads(threads, jobs=jobs)
    with blamed(out_dir):
        failures, of = reproduce_items(
            items,
            scale.value,
            out_dir,
            seeds=seeds_of(seeds),
            changes=changes or [],
            only=only or [],
            form=form.value,
            record=record,
            device=device.value,
            data_root=data_root,
            cache=cache,
            jobs=jobs,
            engine=engine.value,
        )
    end_with(failures, of)


@_command()
def leaderboard(
    added: Annotated[
        list[str] | None,
        typer.Argument(
            help="Defences to try and add, by NAME or package.module:Class; `all`: those of the recipe. Without any, "
            "only the page is made."
        ),
    ] = None,
    results: Annotated[Path, typer.Option(help="The folder of the runs' records.")] = Path("results/leaderboard"),
    recipe: Annotated[
        Path | None, typer.Option(help="The attacks that a new defence is tried on; the library's own by default.")
    ] = None,
    changes: ChangesOption = None,
    plugins: PluginsOption = None,
    seeds: SeedsOption = None,
    device: DeviceOption = Device.auto,
    out_dir: Annotated[Path, typer.Option("--out", help="Where page and runs go.")] = Path("leaderboard"),
    jobs: JobsOption = None,
    engine: EngineOption = Engine.local,
    threads: ThreadsOption = 0,
    data_root: DataRootOption = None,
    cache: CacheOption = None,
) -> None:
    """Build the page that ranks defences by the worst attack on each; and try new defences on all attacks.

    A new defence is run against every attack of the recipe, its records are put beside the others, and the page is
    made anew. With `--set defence.NAME.key=value` it has other settings than its own.
    """
    from mithridate.cli.reproduce import add_defences, build_leaderboard

    if added:
        jobs = jobs or default_jobs(engine.value)
        use_threads(threads, jobs=jobs)
        with blamed(out_dir):
            failures, of = add_defences(
                added,
                recipe or shipped_recipe("leaderboard.toml"),
                results,
                out_dir,
                plugins=plugins or [],
                changes=changes or [],
                seeds=seeds_of(seeds),
                device=device.value,
                data_root=data_root,
                cache=cache,
                jobs=jobs,
                engine=engine.value,
            )
        end_with(failures, of)
    build_leaderboard(results, out_dir)


@_command("list")
def list_(
    what: Annotated[Shelf | None, typer.Argument(help="Which kind; all of them by default.")] = None,
    name: Annotated[str | None, typer.Argument(help="One of that kind, to be shown with all its settings.")] = None,
    plugins: PluginsOption = None,
) -> None:
    """Show the components by name, a line each; or one of them: what it is, its settings, defaults, presets and source.

    Those of installed packages and plug-ins are among them, each with its package or file.
    """
    from mithridate.cli.listing import list_component, list_dataset, list_names
    from mithridate.core.kind import KINDS
    from mithridate.core.plugins import offered
    from mithridate.core.registry import broken_packages

    kinds = {Shelf(f"{kind}s"): kind for kind in KINDS}
    more = bool(plugins or offered())
    if name is None:
        shelves = [what] if what else list(Shelf)
        chosen = [kinds[shelf] for shelf in shelves if shelf in kinds]
        list_names(chosen, datasets=Shelf.datasets in shelves, plugins=plugins or [], more=more)
    elif what is Shelf.datasets:
        list_dataset(name)
    elif what is not None:
        list_component(kinds[what], name, plugins=plugins or [])
    if more and (broken := broken_packages()):
        raise ConfigError("\n".join(broken))


def main() -> None:
    """Prepare the process, and run the command that was typed."""
    # Threads that spin while they wait make a shared machine crawl; this must be said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["MPLBACKEND"] = "agg"  # figures are drawn without a screen, whatever the user's other ones need
    # The current directory, as with `python -m`, but last: it hides nothing that is installed.
    sys.path.append("")
    take_any_text()
    app()
