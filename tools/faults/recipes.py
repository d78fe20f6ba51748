"""Recipes and `--set`s that are changed at random: refused in words, or taken; some that are taken run, tiny."""

import copy
import dataclasses
import datetime
import os
import signal
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, cast

import tomli_w
import typer.testing

from mithridate.bench import engine
from mithridate.bench.engine import run_recipe
from mithridate.bench.recipe import TABLES, Recipe, make_recipe, read_recipe
from mithridate.bench.watcher import Watcher
from mithridate.cli.app import app
from mithridate.core.errors import UserError
from mithridate.core.registry import KINDS, defaults, entries
from mithridate.data.settings import StreamSettings
from mithridate.data.shards import Shards
from mithridate.simulation.clients import FederatedRun
from mithridate.simulation.online import OnlineRun
from mithridate.training.burn_in import BurnIn
from tools.faults import runs
from tools.faults.case import LONGEST, Result, drawn, exception_of
from tools.faults.processes import import_what

SHIPPED = Path(__file__).parents[2] / "recipes"

SECONDS = 10
"""Of the processor, after which a check of a recipe hangs."""

TRAINING_SECONDS = 5
"""Of the processor, after which a run is stopped; that it takes long is no fault: a recipe may ask for much."""

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 255, -(2**31), 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 2**64, 10**18, 10**30),
    *(0.0, -0.0, 0.5, 1.0, -1.0, 1.5, 1e-320, 1e-30, 1e30, 1e308, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *("", " ", "none", "x", "nan", "inf", "1", "true", "eps", "digits", "auto", "name", "a" * 2000, "\u0000", "\ufeff"),
    *(
        "名前",
        "naïve",
        "\u202eabc",
        "🧪",
        "[bold]x[/]",
        "[/]",
        "..",
        "../../etc/passwd",
        "~",
        "/dev/null",
        "con",
        "a b",
    ),
    *("json:loads", "json:nothing", "no.such.module:X", ":", "a:", ":b", "a.b.c:d.e", "{x}", "%s", "\\", '"', "'''"),
    *("8/255", "1/0", "-1/3", "1e400", "0x10", "1_000", "x" * 65, "A", "seed0", "__", "a__b", "linf", "train", "eval"),
)
DATES = (datetime.date(2020, 1, 1), datetime.time(1, 2), datetime.datetime(2020, 1, 1, 1, 2, tzinfo=datetime.UTC))

TINY = (
    *("data.burn_in=60", "data.victim=60", "data.validation=20", "data.trusted=10", "data.test=40"),
    *("data.batch_size=10", "model.name='small_cnn'", "model.width=2", "burn_in.epochs=1", "burn_in.batch_size=20"),
)

Node = dict[str, Any] | list[Any]


class _Stop(BaseException):
    """All checks are passed; training would begin."""


class _TimeUp(BaseException):
    """It takes too long."""


class _Stopper(Watcher):
    def cell(self, *_: object) -> None:
        raise _Stop


@dataclass
class Recipes:
    """Changed recipes, by number."""

    seed: int
    shared: Path
    full: int = 5000
    texts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def prepare(self) -> None:
        """Read the recipes that are changed, and all names of components."""
        self.texts = [path.read_text(encoding="utf-8") for path in sorted(SHIPPED.glob("*.toml"))]
        self.texts += [*runs.RECIPES.values()] * 3
        self.names = sorted({name for kind in KINDS for name in entries(kind)})
        os.environ.pop("MITHRIDATE_DATA", None)  # images that take long to read are none of a recipe's mistakes
        os.environ["HF_HUB_OFFLINE"] = "1"
        for number, recipe in enumerate(runs.RECIPES.values()):
            folder = self.shared / f"imports-{number}"
            import_what(partial(runs.start, recipe, folder / "runs", folder / "cache"), limit=300)

    def case(self, number: int, folder: Path) -> Result:
        """Change a recipe, and hand it in."""
        rng = drawn("recipes", self.seed, number)
        written = self._written(rng)
        path = folder / rng.choice(["recipe.toml", "r [b]x.toml", "名.toml"])
        path.write_bytes(written.data)
        what = f"{written.what}; --set {list(written.changes)}" if written.changes else written.what
        try:
            with _at_most(SECONDS):
                if rng.random() < 0.1:
                    return self._by_command(path, written, what, rng)
                recipe = read_recipe(path, changes=written.changes, seeds=written.seeds)
                if fault := _not_itself(recipe):
                    return Result("silent", what, fault)
                self._checked(recipe, folder)
            if rng.random() < 0.25:
                self._run_tiny(path, written, folder)
        except UserError as error:
            return _judged(str(error), what)
        except _TimeUp:
            return Result("exception", what, f"its checks take more than {SECONDS} s")
        except Exception as error:  # that is what is looked for
            return Result("exception", what, exception_of(error))
        return Result("same", what)

    def _checked(self, recipe: Recipe, folder: Path) -> None:
        """All that `mithridate run` looks at before it trains."""
        try:
            self._start(recipe, folder, _Stopper())
        except _Stop:
            return

    def _start(self, recipe: Recipe, folder: Path, watcher: Watcher) -> None:
        grid = run_recipe(
            recipe,
            folder / "runs",
            device="cpu",
            cache=folder / "cache",
            data_root=self.shared / "no mirror",
            watcher=watcher,
        )
        runs.raise_failure(grid)

    def _run_tiny(self, path: Path, written: "Written", folder: Path) -> None:
        federated = "clients" in path.read_text(encoding="utf-8", errors="replace")
        loop = ("federated.rounds=1", "clients.clients=6") if federated else ("run.steps=1",)
        recipe = read_recipe(path, changes=[*written.changes, *TINY, *loop], seeds=[0])
        if recipe.data.name != "digits":
            return
        try:
            with _at_most(TRAINING_SECONDS):
                self._start(recipe, folder, Watcher())
        except _TimeUp:
            return

    def _by_command(self, path: Path, written: "Written", what: str, rng: Random) -> Result:
        """The same by `mithridate run`, up to where training would begin."""
        arguments = ["run", str(path), "--out", str(path.parent / "out"), "--cache", str(path.parent / "cache")]
        arguments += [part for change in written.changes for part in ("--set", change)]
        if rng.random() < 0.5:
            arguments += ["--seeds", rng.choice(["", "0", "0,0", "-1", "1,", "a", "9" * 30, "0.5", "0,1", "²"])]
        if rng.random() < 0.3:
            arguments += ["--threads", rng.choice(["0", "1", "-1", "99999999999", "x", "1.5"])]
        before = engine.run_recipe
        engine.run_recipe = cast("Any", _dry)  # what the command calls
        try:
            ended = typer.testing.CliRunner().invoke(app, arguments)
        except _Stop:
            return Result("same", what)
        finally:
            engine.run_recipe = before
        what = f"{what}; {arguments[4:]}"
        if ended.exception and not isinstance(ended.exception, SystemExit):
            return Result("exception", what, exception_of(ended.exception))
        if ended.exit_code != 2:
            return Result("exception", what, f"exit code {ended.exit_code}")
        said = ended.stderr.removeprefix("error:").strip()
        return _judged(said, what) if "Usage:" not in said else Result("refused", what, said)

    def _written(self, rng: Random) -> "Written":
        """A recipe's text and `--set`s, with one to four changes."""
        tables = tomllib.loads(rng.choice(self.texts))
        if rng.random() < 0.6:
            tables["data"] = {"name": "digits"}
        how: list[str] = []
        for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 2, 3])):
            how.append(self._changed(tables, rng) if rng.random() < 0.4 else self._set_well(tables, rng))
        try:
            data = tomli_w.dumps(tables).encode()
        except (TypeError, ValueError):  # what TOML cannot hold is nobody's recipe
            data = b"title = 'none'"
        if rng.random() < 0.15:
            data, said = rng.choice(TEXT_CHANGES)(data, rng)
            how.append(said)
        changes = [self._a_set(tables, rng) for _ in range(rng.choice([0, 0, 0, 0, 1, 2]))]
        seeds = rng.choice([None] * 60 + [[0], [], [-1], [1, 1], [2**70]])
        return Written(data, changes, seeds, "; ".join(how) or "as it is")

    def _changed(self, tables: dict[str, Any], rng: Random) -> str:  # noqa: PLR0911  (one a way)
        """Change one place, and say what."""
        path, node = rng.choice(list(_nodes(tables)))
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys or rng.random() < 0.1:
            key: Any = rng.choice([*TEXTS, *TABLES, "preset", "label", "name", "eps", "rule", "parts"])
            value = self._junk(rng)
            if isinstance(node, list):
                node.append(value)
            else:
                node[key] = value
            return f"{path}: new {key if isinstance(node, dict) else ''} = {value!r:.60}"
        key = rng.choice(keys)
        old = node[key]
        match rng.randrange(8):
            case 0:
                del node[key]
                return f"{path}.{key}: gone"
            case 1 if isinstance(node, dict):
                name = rng.choice([f"{key}x", key[:-1], key.upper(), rng.choice(TEXTS), rng.choice(TABLES)])
                node[name] = node.pop(key)
                return f"{path}.{key}: called {name!r:.40}"
            case 2:
                node[key] = [old] if not isinstance(old, list) else (old[0] if old else "x")
                return f"{path}.{key}: one more list, or one less"
            case 3 if isinstance(old, list):
                node[key] = rng.choice([[], old * 2, [*old, self._junk(rng)], old[::-1]])
                return f"{path}.{key} = {node[key]!r:.60}"
            case 4 if isinstance(old, str):
                node[key] = rng.choice(self.names)
                return f"{path}.{key} = {node[key]!r}"
            case 5 if isinstance(old, int | float) and not isinstance(old, bool):
                node[key] = rng.choice([-old, old * 10**6, old + 1, float(old), str(old), bool(old), old / 3, old * 0])
                return f"{path}.{key} = {node[key]!r:.60}"
            case 6:
                _, other = rng.choice(list(_nodes(tables)))
                node[key] = copy.deepcopy(other)
                return f"{path}.{key}: another table"
            case _:
                node[key] = self._junk(rng)
                return f"{path}.{key} = {node[key]!r:.60}"

    def _set_well(self, tables: dict[str, Any], rng: Random) -> str:
        """Set a field that there is to a value of its own kind, however large."""
        path, node, fields = rng.choice(list(_settings(tables)))
        key = rng.choice(sorted(fields))
        default = node.get(key, fields[key])
        if isinstance(default, bool):
            value: Any = not default
        elif isinstance(default, int):
            value = rng.choice([rng.randrange(10), rng.randrange(10), rng.choice(NUMBERS[:16]), -default, 10 * default])
        elif isinstance(default, float):
            value = rng.choice([rng.uniform(0, 1), rng.uniform(-1, 10), rng.choice(NUMBERS), -default, 10 * default])
        elif isinstance(default, str):
            value = rng.choice([*rng.choices(self.names, k=3), *TEXTS[-12:]])
        elif default is None or default is dataclasses.MISSING:
            value = rng.choice([rng.choice(NUMBERS), rng.uniform(0, 1), rng.randrange(5), rng.choice(TEXTS), True])
        else:
            value = rng.choice([[rng.choice(NUMBERS)], [rng.randrange(3)], [], default])
            value = list(value) if isinstance(value, tuple) else value
        node[key] = value
        return f"{path}.{key} = {value!r:.60}"

    def _junk(self, rng: Random) -> Any:  # noqa: ANN401  (whatever TOML can hold)
        def deep(inner: Any, levels: int) -> Any:  # noqa: ANN401  (whatever TOML can hold)
            for _ in range(levels):
                inner = [inner] if rng.random() < 0.5 else {"a": inner}
            return inner

        return rng.choice(
            [
                rng.choice(NUMBERS),
                rng.choice(NUMBERS),
                rng.uniform(-2, 2),
                rng.choice(TEXTS),
                rng.choice(self.names),
                rng.random() < 0.5,
                rng.choice(DATES),
                [rng.choice(NUMBERS) for _ in range(rng.randrange(4))],
                {"name": rng.choice(self.names)},
                {rng.choice(TEXTS): rng.choice(NUMBERS)},
                [{"name": rng.choice(self.names)}, {"name": rng.choice(TEXTS)}],
                deep(rng.choice(TEXTS), rng.choice([1, 3, 40])),
            ]
        )

    def _a_set(self, tables: Mapping[str, Any], rng: Random) -> str:
        """The text of a `--set`: of a place that there is, mostly."""
        paths: list[str] = []
        for table, contents in tables.items():
            for part in contents if isinstance(contents, list) else [contents]:
                if isinstance(part, dict):
                    paths += [f"{table}.{key}" for key in part]
                    paths += [f"{table}.{part.get('label', part.get('name'))}.{key}" for key in part]
        path = rng.choice(paths) if paths and rng.random() < 0.8 else ".".join(rng.choices([*TEXTS, *TABLES], k=2))
        value = self._junk(rng)
        try:
            text = tomli_w.dumps({"v": value}).partition("=")[2].strip()
        except (TypeError, ValueError):
            text = str(value)
        return rng.choice([f"{path}={text}", f"{path}={value}", f"{path}={value}", f"{path}", f" {path} = {text} "])


class Written(NamedTuple):
    """What is handed in.

    Args:
        data: The recipe's bytes.
        changes: `--set`s.
        seeds: In place of the recipe's.
        what: What was changed.
    """

    data: bytes
    changes: list[str]
    seeds: list[int] | None
    what: str


def _nodes(tables: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Every table and list in a recipe, and where it is."""
    yield path or "(top)", tables
    inner = tables.items() if isinstance(tables, dict) else enumerate(tables)
    for key, value in inner:
        if isinstance(value, dict | list):
            yield from _nodes(value, f"{path}.{key}" if path else str(key))


def _settings(tables: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], Mapping[str, Any]]]:
    """The tables of a recipe, with the settings that each has, and their defaults."""
    loops = {"data": StreamSettings, "burn_in": BurnIn, "run": OnlineRun, "federated": FederatedRun, "clients": Shards}
    for table, contents in tables.items():
        for number, part in enumerate(contents if isinstance(contents, list) else [contents]):
            if not isinstance(part, dict):
                continue
            kind = "update_attack" if table == "attack" and "federated" in tables else table
            if table in loops:
                yield table, part, defaults(loops[table])
            elif kind in KINDS:
                known = entries(kind).get(str(part.get("name")))
                if known is not None and known.fields:
                    yield f"{table}.{number}", part, known.fields
    yield "run", tables.setdefault("federated" if "federated" in tables else "run", {}), {"seeds": (0,)}


def _judged(message: str, what: str) -> Result:
    if not message or len(message) >= LONGEST:
        return Result("exception", what, f"a message of {len(message)} characters: {message[:200]}")
    return Result("refused", what, message)


def _not_itself(recipe: Recipe) -> str:
    """How the settings of a run differ, once they are written and read again; empty if they do not."""
    for cell in [cell for cell, _ in zip(recipe.cells(), range(3), strict=False)]:
        config = cell.config()
        again = next(iter(make_recipe(tomllib.loads(tomli_w.dumps(config))).cells())).config()
        if repr(again) != repr(config):  # NaN differs from itself
            keys = [key for key in config.keys() | again.keys() if repr(config.get(key)) != repr(again.get(key))]
            return f"{cell.run_id}: written and read again, other settings in {', '.join(sorted(keys))}"
    return ""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """So many seconds of the processor, which does not count how busy the machine is."""
    rung = False

    def ring(*_: object) -> None:
        nonlocal rung
        rung = True
        raise _TimeUp

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except Exception as error:
        if rung:  # what native code makes of it
            raise _TimeUp from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _dry(recipe: Recipe, out: Path, **_: object) -> None:
    raise _Stop


def _with_mark(data: bytes, _: Random) -> tuple[bytes, str]:
    return b"\xef\xbb\xbf" + data, "a byte-order mark"


def _as_utf16(data: bytes, _: Random) -> tuple[bytes, str]:
    return data.decode().encode("utf-16"), "UTF-16"


def _windows(data: bytes, _: Random) -> tuple[bytes, str]:
    return data.replace(b"\n", b"\r\n"), "lines that end in CR LF"


def _cut(data: bytes, rng: Random) -> tuple[bytes, str]:
    return data[: rng.randrange(len(data) + 1)], "cut off"


def _byte(data: bytes, rng: Random) -> tuple[bytes, str]:
    place = rng.randrange(len(data) + 1)
    return data[:place] + bytes([rng.randrange(256)]) + data[place:], "a random byte"


def _line(data: bytes, rng: Random) -> tuple[bytes, str]:
    lines = data.split(b"\n")
    line = rng.choice(lines)
    lines.insert(rng.randrange(len(lines) + 1), line)
    return b"\n".join(lines), f"a line elsewhere, too: {line[:40]!r}"


def _lost(data: bytes, rng: Random) -> tuple[bytes, str]:
    lines = data.split(b"\n")
    line = lines.pop(rng.randrange(len(lines)))
    return b"\n".join(lines), f"a line is lost: {line[:40]!r}"


def _value(data: bytes, rng: Random) -> tuple[bytes, str]:
    places = [i for i, byte in enumerate(data) if byte == ord("=")]
    if not places:
        return data, "as it is"
    place = rng.choice(places) + 1
    value = rng.choice(
        [
            b"9" * 5000,
            b"[" * 300 + b"]" * 300,
            b"[" * 5000,
            b"{a=" * 200 + b"1" + b"}" * 200,
            b"1e999",
            b"'''",
            b"0x" + b"f" * 5000,
        ]
    )
    end = data.find(b"\n", place)
    return data[:place] + b" " + value + data[end:], f"a value {value[:8]!r}... of {len(value)} bytes"


TEXT_CHANGES: tuple[Callable[[bytes, Random], tuple[bytes, str]], ...] = (
    _with_mark,
    _as_utf16,
    _windows,
    _cut,
    _byte,
    _line,
    _lost,
    _value,
)


def make(seed: int, shared: Path) -> Recipes:
    """The kind, for a seed, with what its cases share in a folder."""
    return Recipes(seed, shared)
