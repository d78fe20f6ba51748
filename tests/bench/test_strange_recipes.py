"""Recipes from strangers: whatever a file, a table or a `--set` holds, it is taken, or refused in one short message."""

import copy
import datetime
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mithridate.bench.inheritance import LARGEST
from mithridate.bench.recipe import make_recipe, read_recipe
from mithridate.core.errors import LONGEST, ConfigError, UserError
from mithridate.data import DATASETS
from mithridate.models import build_model

TINY = '[attack]\nname = "noise"\n'

ONLINE: dict[str, Any] = {
    "title": "a title",
    "data": {"name": "digits", "batch_size": 20, "burn_in": 150, "split": "all"},
    "model": {"name": "small_cnn", "width": 4},
    "burn_in": {"epochs": 1, "lr": 0.1, "checkpoints": [0]},
    "surrogate": {"kind": "trained", "model": {"name": "vgg11"}},
    "attack": [{"name": "noise", "eps": 0.1}, {"name": "accumulative", "steps": 2, "label": "acc"}],
    "defence": [{"name": "none"}, {"name": "clip", "clip_norm": 1.0}],
    "detector": {"name": "loss"},
    "monitor": [{"name": "accuracy_floor"}],
    "run": {"steps": 2, "seeds": [0, 1], "lr": 0.01},
}
FEDERATED: dict[str, Any] = {
    "data": {"name": "digits"},
    "attack": {"name": "accumulative"},
    "clients": {"clients": 10, "partition": "iid"},
    "federated": {"rounds": 3, "rule": [{"name": "krum"}, {"name": "mean"}], "seeds": [0]},
}
DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
STRANGE: tuple[Any, ...] = (
    *([], [[]], {}, [{}], {"a": {"b": []}}, ["name"], [1, "a", 2.5], DEEP, {"": ""}),
    *(-1, 0, 2**63, -(2**63) - 1, 10**400, 16**5000, 1.5, float("nan"), float("inf"), -0.0, True),
    *("", " ", "x" * 10_000, "a\0b", "a\nb", "\x1b[31m", "[bold]", "~nobody/x", ":", "a:b", "../x", "none", "1/0", "é"),
    *(datetime.date(2020, 1, 1), datetime.time(1, 2)),
)


def places(tables: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in nested tables."""
    for key, value in tables.items() if isinstance(tables, dict) else enumerate(tables):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(tables: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    whole = copy.deepcopy(tables)
    inside: Any = whole
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return whole


def refused(tables: dict[str, Any]) -> str | None:
    """The message that the tables are refused with; None if they are taken. No other exception."""
    try:
        for cell in make_recipe(tables).cells():
            cell.config()
    except UserError as error:
        return str(error)
    return None


CASES = [(tables, path) for tables in (ONLINE, FEDERATED) for path in places(tables)]


@pytest.mark.parametrize(("tables", "path"), CASES, ids=[".".join(map(str, path)) for _, path in CASES])
def test_a_strange_value_anywhere_is_taken_or_told(tables: dict[str, Any], path: tuple[Any, ...]) -> None:
    messages = [refused(changed(tables, path, value)) for value in STRANGE]
    assert any(messages)
    assert max(len(message) for message in messages if message) <= LONGEST


@pytest.mark.parametrize("seed", range(3))
def test_several_strange_values_at_once(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311  (no secret)
    told = 0
    for _ in range(100):
        tables, path = rng.choice(CASES)
        strange = changed(tables, path, rng.choice(STRANGE))
        table = rng.choice([key for key, value in strange.items() if isinstance(value, dict)] or ["data"])
        strange.setdefault(table, {})[rng.choice(["name", "label", "x" * 3000, "", "a.b", "\0"])] = rng.choice(STRANGE)
        told += refused(strange) is not None
    assert told > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": []}, r"attack = \[\]: name one at least"),
        ({"defence": []}, r"defence = \[\]: name one at least"),
        ({"attack": [{}]}, r"\[attack\] has no `name`"),
        ({"attack": {"name": ["noise"]}}, r"\[attack\] name = \['noise'\]: give one name, as text"),
        ({"model": {"name": ["small_cnn", "vgg11"]}}, r"\[model\] name = .*give one name"),
        ({"title": ["a"]}, r"title = \['a'\]: give a line of text"),
        ({"run": {"seeds": [2**63]}}, r"seeds = .*whole numbers from 0 to 2\*\*63 - 1"),
        ({"run": {"steps": 10**400}}, r"steps = 1000.*too large for a whole number of 64 bits"),
        ({"run": {"lr": 1e308}}, r"lr = 1e\+308: larger than float32 can hold"),
        ({"data": {"name": "npz", "path": "a\0b"}}, "NUL character"),
        ({"data": {"name": "npz", "path": "~nobody-here/x"}}, "write the path without ~"),
        ({"data": {"name": "npz", "path": "a\udcff"}}, "give the path of a file or folder"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe({**ONLINE, **change})


def test_a_model_larger_than_any_memory_is_told() -> None:
    with pytest.raises(ConfigError, match=r"SmallCNN cannot be made with these settings .*too large"):
        build_model({"name": "small_cnn", "width": 10**6}, DATASETS["digits"], seed=0)


def test_an_empty_array_of_rules_is_no_rule() -> None:
    with pytest.raises(ConfigError, match=r"rule = \[\]"):
        make_recipe({**FEDERATED, "federated": {"rule": []}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TINY.encode("utf-16"), "is not readable TOML: 'utf-8' codec"),
        (b"\xff\xfe\x00", "is not readable TOML"),
        (TINY.encode() + b"eps = " + b"1" * 5000, "is not readable TOML: Exceeds the limit"),
        (TINY.encode() + b"eps = 0x" + b"f" * 5000, "too large for a whole number"),
        (TINY.encode() + b"eps = " + b"[" * 100_000, "is not readable TOML: it is nested too deep"),
        (TINY.encode() + b"eps = " + b"[" * 200 + b"]" * 200, "nested too deep"),
        (TINY.encode() + b"eps = 1e999", "eps = inf"),
        (TINY.encode() + b"a." * 200 + b"b = 1", "nested too deep"),
        (TINY.encode() + b"[grid]\n" + b"a." * 2000 + b"b = 1", "nested too deep"),
        (TINY.encode() + b"\0", "is not readable TOML"),
        (TINY.encode() + b"#" * LARGEST, "and no recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_told(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a [bold] name.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(path)
    assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_editors_of_all_kinds_write_recipes(before: bytes, ending: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_bytes(before + TINY.encode().replace(b"\n", ending))
    assert [attack.label for attack in read_recipe(path).attacks] == ["noise"]


def test_a_name_too_long_for_the_file_system_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not readable"):
        read_recipe(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000, "0x" + "f" * 5000, "[]", "{}", "nan", "\0", "'", "1e999"])
def test_a_strange_change_is_told(value: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    for key in ("attack.eps", "model.width", "data.name", "burn_in.epochs", "run.seeds"):
        with pytest.raises(ConfigError) as caught:
            read_recipe(path, changes=[f"{key}={value}"])
        assert len(str(caught.value)) <= LONGEST
