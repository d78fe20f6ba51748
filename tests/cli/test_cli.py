"""The command line: what a user types, what comes back, and which mistakes end with exit code 2 and nothing written."""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from typer.main import get_command

from mithridate.bench.store import read_runs
from mithridate.cli import app as cli
from mithridate.core.descriptions import described_fields
from mithridate.core.files import locked
from mithridate.core.names import built_in
from mithridate.core.plugins import offered
from mithridate.core.registry import KINDS, Kind, entries
from mithridate.data.catalogue import DATASETS
from mithridate.data.settings import OWN
from mithridate.simulation.online import run_online
from tests.command import Result, invoke, python, started
from tests.recipes import files, tiny_text

COMMANDS = (
    "demo",
    "run",
    "status",
    "calibrate",
    "reproduce",
    "leaderboard",
    "report",
    "quarantine",
    "list",
    "audit",
)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_text('title = "A [tiny] recipe"'), encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# Help.


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text))


def test_the_first_page_names_every_command() -> None:
    assert {c.name or str(getattr(c.callback, "__name__", "")) for c in cli.app.registered_commands} == set(COMMANDS)
    page = invoke("--help")
    assert page.code == 0
    for command in COMMANDS:
        assert command in page.out
    bare = invoke()
    assert "mithridate demo" in bare.out + bare.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_each_option(command: str) -> None:
    page = invoke(command, "--help")
    assert page.code == 0
    assert f"mithridate {command}" in plain(page.out) or f"{command} [OPTIONS]" in plain(page.out)

    group: Any = get_command(cli.app)
    assert len(group.commands[command].help) > 60
    (found,) = (
        c.callback for c in cli.app.registered_commands if (c.name or getattr(c.callback, "__name__", "")) == command
    )
    assert found is not None
    hints = get_type_hints(inspect.unwrap(found), include_extras=True)  # as declared: old versions of typer lose some
    del hints["return"]
    for name, hint in hints.items():
        (info,) = hint.__metadata__
        assert info.help, f"{command}: {name} has no help"
        assert words(info.help) in words(plain(page.out)), f"{command}: the help of {name} is not on the page"


def test_help_needs_no_torch() -> None:
    code = "import sys, mithridate.cli; print('torch' in sys.modules)"
    assert python(code).stdout.strip() == "False"


# Calibration.

CALIBRATED = """
[data]
name = "digits"
[burn_in]
epochs = 4
batch_size = 50
checkpoints = [2]
[attack]
name = "clean"
[[defence]]
name = "none"
[[defence]]
name = "dsc"
target_rate = 0.2
[run]
seeds = [0, 1]
"""


def test_calibrate_prints_the_threshold_and_the_share_on_unseen_batches(tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(CALIBRATED, encoding="utf-8")
    page = invoke("calibrate", str(recipe), "--threads", "1", "--unseen", "4", columns=120)
    assert page.code == 0, page.err
    rows = re.findall(r"(\d) (\S+) (\S+) ([\d.]+)% of 97 \[.*?\] ([\d.]+)% of 200 ", page.out)
    assert [row[0] for row in rows] == ["0", "1"], page.out
    for _, mu, _, seen, unseen in rows:
        assert float(mu) > 0
        assert 12 < float(seen) < 28
        assert 5 < float(unseen) < 45
    assert list((tmp_path / "work").iterdir()) == []  # nothing is written but the cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "1.5"], "between 0 and 1"),
        (["--defence", "dcs"], "did you mean 'dsc'"),
        (["--unseen", "400"], "at most"),
        (["--set", "defence.dsc.epoch=3"], "dsc looks back at burn-in epoch 3"),
    ],
)
def test_calibrate_says_what_is_wrong(tmp_path: Path, options: Sequence[str], message: str) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(CALIBRATED, encoding="utf-8")
    page = invoke("calibrate", str(recipe), "--threads", "1", *options, columns=200)
    assert page.code == 2
    assert message in page.err


def test_calibrate_needs_a_dsc(tmp_path: Path) -> None:
    recipe = tmp_path / "bare.toml"
    recipe.write_text('[attack]\nname = "clean"\n', encoding="utf-8")
    page = invoke("calibrate", str(recipe))
    assert page.code == 2
    assert "no defence dsc" in page.err


# Lists.

SHELVES: dict[str, Kind] = {f"{kind}s": kind for kind in KINDS}


def listed(page: Result, name: str) -> bool:
    return f" {name} " in page.out


@pytest.mark.parametrize("shelf", SHELVES)
def test_a_list_names_every_component_and_one_of_them_tells_all(shelf: str) -> None:
    page = invoke("list", shelf, columns=80)
    assert page.code == 0
    known = {
        name: entry for name, entry in entries(SHELVES[shelf]).items() if entry.built_in
    }  # no other test's plug-in
    assert built_in(SHELVES[shelf]) == {name: entry.summary for name, entry in known.items()}
    for name, entry in known.items():
        assert listed(page, name)
        assert entry.summary[:30] in page.out
    name, entry = max(known.items(), key=lambda item: len(item[1].fields))
    one = invoke("list", shelf, name, columns=80)
    assert one.code == 0
    for text in (entry.summary, *entry.fields, *entry.presets, entry.source):
        assert " ".join(text.split()) in one.out
    for text in described_fields(entry.cls).values():
        assert all(word in one.out for word in text.split())


def test_data_sets_are_listed_and_one_of_them_tells_all() -> None:
    page = invoke("list", "datasets", columns=80)
    assert [name for name in (*DATASETS, *OWN) if not listed(page, name)] == []
    for name, info in DATASETS.items():
        one = invoke("list", "datasets", name, columns=80)
        assert info.hub_id in one.out
        assert info.summary in one.out
        assert "batch_size = unset" in one.out
        assert "settings of [data]" in one.out
    assert "x_train" in invoke("list", "datasets", "npz").out


def test_a_name_that_is_not_there_is_answered_with_the_nearest() -> None:
    for shelf, name, message in (
        ("attacks", "noize", "unknown attack 'noize': did you mean 'noise'"),
        ("datasets", "cifar1O", "unknown data set 'cifar1O': did you mean 'cifar10'"),
        ("models", "a:b", "the module a cannot be imported"),
    ):
        page = invoke("list", shelf, name)
        assert page.code == 2
        assert message in page.err


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_list_of_everything_is_a_line_each_and_needs_no_torch(columns: int) -> None:
    code = "import sys; from mithridate.cli.app import app; sys.argv = ['mithridate', 'list']\n"
    code += "try: app()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    done = python(code, env={"COLUMNS": str(columns)})
    if not offered():  # what others registered is known only by running their code
        assert done.stderr.strip() == "False"
    lines = done.stdout.splitlines()
    names = [name for kind in KINDS for name in built_in(kind)] + [*DATASETS, *OWN]
    assert len(names) < len(lines) < len(names) + 20
    assert max(map(len, lines)) <= columns
    assert [name for name in names if not any(line.startswith(f"  {name} ") for line in lines)] == []


# A run and its report.


def test_a_run_writes_the_store_and_a_report(recipe: Path, cache: Path) -> None:
    call = ("run", recipe, "--device", "cpu", "--threads", 1, "--cache", cache, "--seeds", "0,1")
    done = invoke(*call, "--set", "attack.eps=0.25")
    assert (done.code, done.err) == (0, "")
    out = Path("runs") / "tiny"  # the default
    runs = read_runs([out])
    assert [run.path.name for run in runs] == ["noise__none__seed0", "noise__none__seed1"]
    assert [run.config["attack"]["eps"] for run in runs] == [0.25, 0.25]
    assert "A [tiny] recipe" in done.out
    for run in runs:
        assert f"{run.path.name}: {run.summary['accuracy_start']:.1%} ->" in done.out
    assert "report: runs/tiny/report.html" in done.out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "noise" in page
    assert "A [tiny] recipe" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.?https?:", page)

    before = {run.path.name: files(run.path) for run in runs}
    refused = invoke(*call, "--set", "attack.eps=0.25")
    assert refused.code == 2
    assert "exists; go on with --resume" in refused.err
    again = invoke(*call, "--set", "attack.eps=0.25", "--resume")
    assert again.code == 0
    assert "2 of 2 runs were finished already" in again.out
    assert {run.path.name: files(run.path) for run in runs} == before
    other = invoke(*call, "--set", "attack.eps=0.5", "--resume")
    assert other.code == 2
    assert "made with other settings (attack.eps)" in other.err

    alone = invoke("report", out / "noise__none__seed1", "--out", "elsewhere")
    assert alone.code == 0
    assert {"report.html", "summary.csv", "runs.csv", "summary.md"} <= {p.name for p in Path("elsewhere").iterdir()}
    table = invoke("report", out / "noise__none__seed1", "--out", "elsewhere", "--format", "latex")
    assert table.out == " ".join(Path("elsewhere/summary.tex").read_text(encoding="utf-8").split())
    assert table.out.startswith("% \\usepackage{booktabs}")
    both = invoke("report", out, out / "noise__none__seed0")
    assert both.code == 0
    assert (out / "report.html").is_file()


def test_an_interrupt_says_how_to_go_on(recipe: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        return run_online(*args, **options)

    monkeypatch.setattr("mithridate.bench.running.run_online", interrupted)
    call = ("run", recipe, "--device", "cpu", "--cache", cache, "--out", "runs")
    first = invoke(*call)
    assert first.code == 130
    assert "interrupted" in first.err
    assert "--resume" in first.err
    assert invoke(*call).code == 2
    assert invoke(*call, "--resume").code == 0
    assert len(read_runs([Path("runs")])) == 1


def test_the_demo_is_the_shipped_recipe_and_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    told: list[Path] = []
    opened: list[str] = []
    monkeypatch.setattr(cli, "run_and_report", lambda *args, **options: seen.append((args, options)))
    monkeypatch.setattr("mithridate.cli.results.tell_story", told.append)
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(cli, "cores", lambda: 1)
    done = invoke("demo", "--out", "here", "--open")
    assert done.code == 0
    assert told == [Path("here")]
    assert opened[0].endswith("here/report.html")
    assert "no browser was found here" in done.out
    (path, out), options = seen[0]
    assert path.name == "demo.toml"
    assert path.is_file()
    assert out == Path("here")
    assert options["resume"] is True
    assert options["jobs"] == 1, "it takes no more cores than it may use"


def test_a_second_demo_in_the_same_folder_is_refused_and_leaves_the_first_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "run_and_report", lambda *args, **options: pytest.fail("it ran"))
    with locked(Path("here") / ".demo.lock"):
        second = invoke("demo", "--out", "here")
    assert second.code == 2
    assert "another process is at work in here" in second.err


# Mistakes: exit code 2, one message, nothing written.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "attack.epz=0.1"], "unknown key 'epz': did you mean 'eps'"),
        (["--set", "attack.name=noize"], "unknown attack 'noize': did you mean 'noise'"),
        (["--set", "atack.eps=0.1"], "unknown table 'atack': did you mean 'attack'"),
        (["--set", "attack.eps"], "write table.key=value"),
        (["--set", "attack.eps=-1"], "eps = -1"),
        (["--set", "run.steps=99"], "99 accumulative batches and the trigger batch"),
        (["--set", "data.victim=9999"], "too few for"),
        (["--set", "model.name=resnet18", "--set", "model.width=-3"], "width = -3"),
        (["--set", "burn_in.checkpoint=none.pt"], "none.pt"),
        (["--seeds", "0,x"], "--seeds 0,x: give whole numbers"),
        (["--seeds", ""], "give whole numbers"),
        (["--seeds=-1"], "seeds = [-1]"),
        (["--device", "cuda"], "CUDA was asked for"),
        (["--device", "gpu"], "'gpu' is not one of"),
        (["--threads", "-1"], "--threads"),
        (["--fast"], "No such option"),
    ],
    ids=" ".join,
)
def test_a_mistake_in_a_run_is_told(
    recipe: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: Sequence[str],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = invoke("run", recipe, "--cache", cache, "--out", "runs", *options)
    assert done.code == 2
    assert message in plain(done.err).replace("│ ", "")
    assert "Traceback" not in done.err
    assert list(Path.cwd().iterdir()) == []


def test_a_missing_data_set_without_a_network_is_told(recipe: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    recipe.write_text('[data]\nname = "cifar10"\n[attack]\nname = "noise"\n', encoding="utf-8")
    for options, env in (
        (["--data-root", tmp_path / "empty"], {}),
        ([], {"MITHRIDATE_DATA": str(tmp_path / "empty")}),
    ):
        done = invoke("run", recipe, "--cache", cache, "--out", "runs", *options, env=env)
        assert done.code == 2
        assert "cifar10: no split" in done.err
        assert "uoft-cs/cifar10" in done.err
        assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no recipe"),
        ("[attack", "not readable TOML"),
        ("", "the recipe has no [attack]"),
        ("[atack]\n", "unknown table [atack]: did you mean 'attack'"),
        ("attack = 3\n", "[attack] must be a table"),
    ],
)
def test_a_bad_recipe_is_told(recipe: Path, content: str | None, message: str) -> None:
    recipe.unlink()
    if content is not None:
        recipe.write_text(content, encoding="utf-8")
    done = invoke("run", recipe)
    assert done.code == 2
    assert message in done.err
    assert list(Path.cwd().iterdir()) == []


def test_mistakes_in_a_report_are_told(tmp_path: Path) -> None:
    missing = invoke("report", tmp_path / "none")
    assert missing.code == 2
    assert "is not a directory" in missing.err
    (tmp_path / "empty").mkdir()
    empty = invoke("report", tmp_path / "empty")
    assert empty.code == 2
    assert "no finished run in" in empty.err
    assert list((tmp_path / "empty").iterdir()) == []
    assert invoke("report").code == 2
    assert invoke("list", "attack").code == 2
    assert invoke("frobnicate").code == 2


@pytest.mark.slow
def test_a_process_ends_with_that_code_and_no_traceback() -> None:
    Path("a.toml").write_text('[attack]\nname = "noise"\n[run]\nstep = 3\n', encoding="utf-8")
    done = started("run", "a.toml", folder=Path.cwd())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: [run]: unknown key 'step': did you mean 'steps'?")
    assert len(done.stderr.splitlines()) == 1
    assert [p.name for p in Path.cwd().iterdir()] == ["a.toml"]
