"""Names, settings and messages of the registry, tried on components that are registered for one test only."""

import copy
import dataclasses
import inspect
import pickle
import tomllib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
import tomli_w
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import Field
from pydantic.errors import PydanticUndefinedAnnotation

import mithridate as mi
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
    retire,
    settings,
)

NAME, OTHER = "zyzzyva", "quokka-47"


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import the real components first, then work on a copy that is thrown away."""
    known = {kind: dict(entries(kind)) for kind in KINDS}
    monkeypatch.setattr(registry, "_entries", known)
    monkeypatch.setattr(registry, "_retired", {kind: dict(names) for kind, names in registry._retired.items()})
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
    with pytest.raises(TypeError, match="positional"):
        Toy(0.1)  # type: ignore[call-arg]  # on purpose: what is refused
    assert all(f.kw_only for f in dataclasses.fields(Toy))
    assert list(inspect.signature(Toy).parameters) == [f.name for f in dataclasses.fields(Toy)]


class Undecorated(Toy):
    """As an author's subclass that adds no field."""


def test_settings_are_checked_without_the_registry_too() -> None:
    """What `mi.UserError` catches, and no error of pydantic's."""
    with pytest.raises(mi.UserError, match=r"^Toy: eps = -1\.0: input should be greater than or equal to 0\.$"):
        Toy(eps=-1.0)
    with pytest.raises(mi.UserError, match=r"^Toy: eps = 'wide': .*number"):
        Toy(eps="wide")  # type: ignore[arg-type]  # on purpose: what is refused
    with pytest.raises(mi.UserError, match=r"^Toy: unknown key 'epz': did you mean 'eps'\?"):
        Toy(epz=1.0)  # type: ignore[call-arg]  # on purpose: what is refused
    with pytest.raises(mi.UserError, match=r"^Toy: steps = 0: "):
        dataclasses.replace(Toy(), steps=0)
    with pytest.raises(mi.UserError, match=r"^Undecorated: steps = 0: "):
        Undecorated(steps=0)


def test_settings_are_ordinary_values() -> None:
    made = Toy(eps=0.5, sizes=(3,))
    assert made == Toy(eps=0.5, sizes=(3,))
    assert made != Toy(eps=0.25, sizes=(3,))
    assert dataclasses.replace(made, eps=0.25) == Toy(eps=0.25, sizes=(3,))
    assert copy.deepcopy(made) == made
    assert pickle.loads(pickle.dumps(made)) == made  # noqa: S301  (our own bytes)
    assert hash(mi.defences.Clip(clip_norm=2.0)) == hash(mi.defences.Clip(clip_norm=2.0))


def test_a_default_out_of_range_is_found() -> None:
    @settings
    class Wrong:
        eps: Annotated[float, Field(ge=0)] = -1.0

    with pytest.raises(ConfigError, match=r"^Wrong: eps = -1\.0"):
        Wrong()


def test_a_type_that_is_not_there_is_found_at_once() -> None:
    """Found later, pydantic would put its own checks in place of ours."""

    class Early:
        rule: "NoSuchType"  # type: ignore[name-defined]  # noqa: F821  (on purpose: what is refused)

    with pytest.raises(PydanticUndefinedAnnotation):
        settings(Early)


def test_settings_inside_settings_name_the_inner_field() -> None:
    @settings
    class Outer:
        toy: Toy = Toy()

    assert Outer(toy=Toy(steps=5)).toy.steps == 5
    with pytest.raises(ConfigError, match=r"^Outer: toy\.steps = 0: "):
        make(Outer, {"toy": {"steps": 0}}, where="Outer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """A dataclass that checks itself."""

    low: int
    high: int = 3

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low must not exceed high")


def test_a_plain_dataclass_is_made_with_the_same_messages() -> None:
    assert make(Plain, {"low": 1}, where="here") == Plain(low=1)
    for values, message in (
        ({}, r"^here: low has no default; give it a value\.$"),
        ({"low": 1, "hihg": 2}, r"^here: unknown key 'hihg': did you mean 'high'\?"),
        ({"low": 4}, r"^here: low must not exceed high"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(Plain, values, where="here")


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
    registry._entries["attack"][NAME] = Entry("attack", NAME, Toy, {}, origin="a plug-in")
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


def test_a_class_that_another_process_could_not_find_has_no_table() -> None:
    @settings
    class Local:
        pass

    with pytest.raises(ConfigError, match="Local is not a registered component"):
        config_of(Local())
    register("attack", NAME)(Local)
    assert config_of(Local()) == {"name": NAME}  # the best there is


def test_what_the_program_itself_registered_is_named_by_its_place(toy: type[Toy]) -> None:
    """A recipe read by another process knows nothing of this one's names."""
    assert config_of(toy(eps=0.5))["name"] == f"{__name__}:Toy"
    assert config_of(mi.defences.Clip())["name"] == "clip"


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


def test_a_class_without_settings_is_refused() -> None:
    class Bare:
        pass

    with pytest.raises(ConfigError, match="'zyzzyva': Bare is no dataclass; put `@settings` below `@register`"):
        register("attack", NAME)(Bare)
    assert NAME not in entries("attack")


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
    built_in = {name: found for name, found in entries(kind).items() if found.built_in}
    assert built_in
    for name, found in built_in.items():
        assert (found.kind, found.name) == (kind, name)
        assert found.cls.__module__.startswith(f"mithridate.{kind}s.")


def test_a_wrong_kind_names_the_nearest() -> None:
    message = "^unknown kind of component 'defense': did you mean 'defence'"
    wrong: Any = "defense"
    for call in (
        lambda: build(wrong, {"name": "clip"}),
        lambda: entry(wrong, "clip"),
        lambda: entries(wrong),
        lambda: register(wrong, NAME),
        lambda: retire(wrong, NAME, "never."),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_a_retired_name_says_how_to_write_it_now(toy: type[Toy]) -> None:
    retire("defence", NAME, "write rule = {name = 'median'} in [federated].")
    with pytest.raises(ConfigError, match=r"^defence 'zyzzyva' is no more: write rule = .* in \[federated\]\.$"):
        build("defence", {"name": NAME})
    with pytest.raises(ConfigError, match=r"^unknown defence 'zyzyva': Known"):
        build("defence", {"name": "zyzyva"})
    assert build("attack", {"name": NAME}) == toy()  # another kind
    assert NAME not in entries("defence")


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
