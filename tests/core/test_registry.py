"""Names, settings and messages of the registry, tried on components that are registered for one test only."""

import dataclasses
import tomllib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
import tomli_w
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from mithridate.core import registry
from mithridate.core.errors import ConfigError
from mithridate.core.registry import (
    KINDS,
    Entry,
    build,
    config_of,
    defaults,
    entries,
    entry,
    fields_of,
    make,
    register,
    settings,
)

NAME, OTHER = "zyzzyva", "quokka-47"


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import the real components first, then work on a copy that is thrown away."""
    copy = {kind: dict(entries(kind)) for kind in KINDS}
    monkeypatch.setattr(registry, "_entries", copy)
    yield
    monkeypatch.undo()
    assert all(NAME not in entries(kind) for kind in KINDS)


@settings
class Toy:
    """Do as told.

    A second paragraph.

    Args:
        eps: Radius.

    Source:
        Someone et al., ICML 2030,
        section 3.

    Shape:
        none.
    """

    eps: Annotated[float, Field(ge=0)] = 0.1
    steps: Annotated[int, Field(ge=1)] = 3
    mode: Literal["soft", "hard"] = "soft"
    floor: float | None = None
    sizes: tuple[int, ...] = (1, 2)
    loud: bool = False
    text: str = Field(default="a", min_length=1)
    names: list[str] = Field(default_factory=lambda: ["x"])


PRESETS: dict[str, dict[str, Any]] = {"paper": {"eps": 0.5, "steps": 100}, "released": {"steps": 2}}


@pytest.fixture
def toy() -> type[Toy]:
    return register("attack", NAME, presets=PRESETS)(Toy)


# Settings.


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Toy().eps = 2.0  # type: ignore[misc]  # on purpose: what is refused


def test_settings_are_keyword_only() -> None:
    with pytest.raises((TypeError, ValidationError)):
        Toy(0.1)  # type: ignore[call-arg]  # on purpose: what is refused
    assert all(f.kw_only for f in dataclasses.fields(Toy))


def test_settings_are_checked_without_the_registry_too() -> None:
    with pytest.raises(ValidationError):
        Toy(eps=-1.0)
    with pytest.raises(ValidationError):
        Toy(epz=1.0)  # type: ignore[call-arg]  # on purpose: what is refused


def test_a_default_out_of_range_is_found() -> None:
    @settings
    class Wrong:
        eps: Annotated[float, Field(ge=0)] = -1.0

    with pytest.raises(ValidationError):
        Wrong()


# Building.


def test_build_takes_defaults_then_preset_then_fields(toy: type[Toy]) -> None:
    assert build("attack", {"name": NAME}) == toy()
    assert build("attack", {"name": NAME, "preset": "paper"}) == toy(eps=0.5, steps=100)
    assert build("attack", {"name": NAME, "preset": "paper", "steps": 7}) == toy(eps=0.5, steps=7)
    assert build("attack", {"name": NAME, "preset": "released"}) == toy(steps=2)
    assert type(build("attack", {"name": NAME})) is toy


def test_build_leaves_its_table_alone(toy: type[Toy]) -> None:
    table = {"name": NAME, "preset": "paper", "steps": 7}
    build("attack", table)
    assert table == {"name": NAME, "preset": "paper", "steps": 7}
    assert PRESETS["paper"] == {"eps": 0.5, "steps": 100}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"eps": 0.1}, r"^\[attack\] has no `name`.*zyzzyva"),
    "unknown name": ({"name": "zyzyva"}, "unknown attack 'zyzyva': did you mean 'zyzzyva'"),
    "unknown preset": (
        {"name": NAME, "preset": "papre"},
        "unknown preset 'papre': did you mean 'paper'.*paper, released",
    ),
    "unknown key": ({"name": NAME, "epz": 0.1}, r"^\[attack\] zyzzyva: unknown key 'epz': did you mean 'eps'"),
    "type": ({"name": NAME, "eps": "wide"}, r"^\[attack\] zyzzyva: eps = 'wide': .*number"),
    "whole number": ({"name": NAME, "steps": 2.5}, r"steps = 2\.5: .*integer"),
    "range": ({"name": NAME, "eps": -0.1}, r"eps = -0\.1: .*greater than or equal to 0"),
    "range in Field()": ({"name": NAME, "text": ""}, "text = '': .*at least 1 character"),
    "choice": ({"name": NAME, "mode": "sofd"}, "mode = 'sofd': .*'soft' or 'hard'"),
    "none": ({"name": NAME, "eps": None}, "eps = None"),
    "inside a list": ({"name": NAME, "sizes": [1, "two"]}, r"sizes\.1 = 'two'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_refused_with_the_field_named(case: str, toy: type[Toy]) -> None:
    table, message = WRONG[case]
    with pytest.raises(ConfigError, match=message) as caught:
        build("attack", table)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_every_wrong_field_is_told_at_once(toy: type[Toy]) -> None:
    with pytest.raises(ConfigError, match=r"eps = -1.*; steps = 0"):
        build("attack", {"name": NAME, "eps": -1, "steps": 0})


def test_the_place_is_named(toy: type[Toy]) -> None:
    with pytest.raises(ConfigError, match=r"^grid row 3 zyzzyva: unknown key"):
        build("attack", {"name": NAME, "epz": 1}, where="grid row 3")


def test_a_missing_value_and_a_rule_across_fields_read_well() -> None:
    @settings
    class Pair:
        low: int
        high: int = 3

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("low must not exceed high")

    with pytest.raises(ConfigError, match=r"^here: low has no default; give it a value\.$"):
        make(Pair, {}, where="here")
    with pytest.raises(ConfigError, match=r"^here: low must not exceed high\.$"):
        make(Pair, {"low": 4}, where="here")
    assert make(Pair, {"low": 2}, where="here").high == 3


# There and back.

toys = st.builds(
    Toy,
    eps=st.floats(0, 10),
    steps=st.integers(1, 1000),
    mode=st.sampled_from(["soft", "hard"]),
    floor=st.none() | st.floats(allow_nan=False),
    sizes=st.lists(st.integers(-(2**40), 2**40)).map(tuple),
    loud=st.booleans(),
    text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1),
    names=st.lists(st.text("ab", max_size=2)),
)


@hypothesis_settings(deadline=None)
@given(toys)
def test_a_component_and_its_table_are_the_same_thing(made: Toy) -> None:
    """Through TOML, as a stored run does it."""
    registry._entries["attack"][NAME] = Entry("attack", NAME, Toy, {})
    try:
        table = config_of(made)
        assert build("attack", tomllib.loads(tomli_w.dumps(table))) == made
    finally:
        del registry._entries["attack"][NAME]
    assert ("floor" in table) == (made.floor is not None)
    assert table["name"] == NAME
    assert {k: v for k, v in table.items() if k != "name"} == fields_of(made)


def test_a_field_that_may_be_none_must_default_to_none() -> None:
    """Else a run with None would be stored as a run with the default."""

    @settings
    class Lossy:
        floor: float | None = 0.8

    with pytest.raises(ConfigError, match=r"'zyzzyva': floor may be None, so its default must be None, not 0\.8"):
        register("monitor", NAME)(Lossy)
    assert NAME not in entries("monitor")


def test_only_registered_components_have_a_table() -> None:
    with pytest.raises(ConfigError, match="Toy is not a registered component"):
        config_of(Toy())


# Names.


def test_a_name_belongs_to_one_kind(toy: type[Toy]) -> None:
    assert entry("attack", NAME).cls is toy
    with pytest.raises(ConfigError, match="unknown defence"):
        entry("defence", NAME)
    assert register("defence", NAME)(toy) is toy
    assert entry("defence", NAME).cls is toy


def test_a_taken_name_is_refused(toy: type[Toy]) -> None:
    class Other:
        pass

    with pytest.raises(ConfigError, match=rf"attack '{NAME}' is registered already, by {Toy.__module__}"):
        register("attack", NAME)(Other)
    assert entry("attack", NAME).cls is toy


def test_a_class_of_the_same_name_from_another_module_is_another_class(toy: type[Toy]) -> None:
    stranger = dataclasses.make_dataclass("Toy", [("eps", float, 0.1)], frozen=True, kw_only=True)
    stranger.__module__ = "somewhere.else"
    with pytest.raises(ConfigError, match="registered already"):
        register("attack", NAME)(stranger)


def test_registering_a_class_again_takes_its_newer_self(toy: type[Toy]) -> None:
    """As when a notebook cell or a module is run again."""
    again = dataclasses.make_dataclass(Toy.__qualname__, [("eps", float, 0.1)], frozen=True, kw_only=True)
    again.__module__ = Toy.__module__
    register("attack", NAME)(again)
    assert entry("attack", NAME).cls is again


def test_entries_are_sorted_and_a_copy(toy: type[Toy]) -> None:
    register("attack", OTHER)(toy)
    found = entries("attack")
    assert list(found) == sorted(found)
    assert {NAME, OTHER} <= set(found)
    found.clear()
    assert NAME in entries("attack")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_package_with_a_component(kind: registry.Kind) -> None:
    assert entries(kind)
    for name, found in entries(kind).items():
        assert (found.kind, found.name) == (kind, name)
        assert found.cls.__module__.startswith(f"mithridate.{registry._PACKAGES[kind]}.")


# What the docs' tables show.


def test_summary_source_and_fields_come_from_the_class(toy: type[Toy]) -> None:
    found = entry("attack", NAME)
    assert found.summary == "Do as told."
    assert found.source == "Someone et al., ICML 2030, section 3."
    assert found.presets == PRESETS
    assert (
        defaults(toy)
        == found.fields
        == {
            "eps": 0.1,
            "steps": 3,
            "mode": "soft",
            "floor": None,
            "sizes": (1, 2),
            "loud": False,
            "text": "a",
            "names": ["x"],
        }
    )


def test_a_field_without_default_and_a_class_without_docstring() -> None:
    class Bare:
        low: int
        plain: list[int] = dataclasses.field(default_factory=lambda: [4])
        required: float = Field(gt=0)

    found = Entry("attack", NAME, settings(Bare), {})
    assert found.fields == {"low": dataclasses.MISSING, "plain": [4], "required": dataclasses.MISSING}
    assert found.source == ""
    assert Entry("attack", NAME, int, {}).summary == int.__doc__.partition("\n")[0]  # type: ignore[union-attr]  # int has a docstring
