"""How values may be spelled: fractions as text, and `none` for what a TOML file cannot say."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

import mithridate as mi
from mithridate.core.errors import ConfigError
from mithridate.core.registry import build, defaults, entries, make, settings
from mithridate.data.settings import StreamSettings


@settings
class Spelled:
    """Fields of every kind that a fraction or `none` may meet."""

    eps: Annotated[float, Field(ge=0, le=1)] = 0.5
    bound: float | None = None
    several: tuple[float, ...] = ()
    steps: int | None = None
    mode: Literal["none", "hard"] = "hard"
    text: str = ""
    place: str | None = None


@dataclass(frozen=True, kw_only=True)
class Bare:
    """As an author writes it without our decorator."""

    eps: float = 0.5
    bound: float | None = None


@pytest.mark.parametrize(("text", "number"), [("8/255", 8 / 255), (" 16 / 255 ", 16 / 255), ("0.5/2.55", 0.5 / 2.55)])
@pytest.mark.parametrize("cls", [Spelled, Bare])
def test_a_fraction_is_the_float_that_python_makes_of_it(cls: type[Any], text: str, number: float) -> None:
    for key in ("eps", "bound"):
        assert getattr(make(cls, {key: text}, where="here"), key) == number
    assert Spelled(eps=text, several=(text, 0.25)).several == (number, 0.25)  # type: ignore[arg-type]  # text, as in a recipe


@pytest.mark.parametrize("text", ["8/0", "8/", "/255", "8/x", "1/2/3", "nan/255", "8/1e-999", "inf/inf"])
def test_what_is_no_fraction_is_refused_in_one_line(text: str) -> None:
    for cls in (Spelled, Bare):
        with pytest.raises(
            ConfigError, match=r"^here: eps = .*: give a number, or a fraction of two such as '8/255'\.$"
        ):
            make(cls, {"eps": text}, where="here")


def test_a_fraction_has_the_fields_range() -> None:
    with pytest.raises(ConfigError, match=r"eps = 2\.0: .*less than or equal to 1"):
        Spelled(eps="2/1")  # type: ignore[arg-type]  # text, as in a recipe


def test_text_and_whole_numbers_are_no_fractions() -> None:
    assert Spelled(text="8/255", place="a/b").text == "8/255"
    with pytest.raises(ConfigError, match=r"steps = '4/2'"):
        Spelled(steps="4/2")  # type: ignore[arg-type]  # on purpose: what is refused


def test_none_unsets_what_may_be_none_and_is_a_choice_where_it_is_one() -> None:
    unset = Spelled(bound="none", steps="none", place="none", mode="none", text="none")  # type: ignore[arg-type]  # as in a recipe
    assert (unset.bound, unset.steps, unset.place) == (None, None, None)
    assert (unset.mode, unset.text) == ("none", "none")
    with pytest.raises(ConfigError, match="eps = 'none'"):
        Spelled(eps="none")  # type: ignore[arg-type]  # on purpose: it must be a number


def test_none_unsets_what_a_preset_sets() -> None:
    table = {"name": "accumulative", "preset": "paper"}
    assert build("attack", table).accuracy_floor == 0.8
    assert build("attack", {**table, "accuracy_floor": "none"}).accuracy_floor is None
    assert build("attack", {**table, "preset": "none"}) == mi.attacks.Accumulative()


@pytest.mark.parametrize("kind", ["attack", "update_attack", "aggregator", "defence", "detector", "monitor"])
def test_every_float_of_a_component_takes_a_fraction(kind: Any) -> None:
    compared = 0
    for name, entry in entries(kind).items():
        for key, default in defaults(entry.cls).items():
            if type(default) is float and 0 < default < math.inf:
                try:
                    expected = build(kind, {"name": name, key: default / 4})
                except ConfigError:
                    continue  # out of its range, or a rule across fields
                assert build(kind, {"name": name, key: f"{default}/4"}) == expected, (name, key)
                compared += 1
    assert compared > 0


def test_pixel_fields_of_the_data_take_fractions_too() -> None:
    made = StreamSettings(name="cifar10", std=("51/255", 0.1994, "1/5"))  # type: ignore[arg-type]  # text, as in a recipe
    assert made.std == (0.2, 0.1994, 0.2)
    assert mi.attacks.Noise(eps="8/255").eps == 8 / 255  # type: ignore[arg-type]  # text, as in a recipe


def test_none_leaves_what_a_function_of_models_would_have_without_it() -> None:
    table = {"name": "torch.nn:Linear", "in_features": 2, "out_features": 3}
    made = build("model", {**table, "device": "none"})
    assert made == build("model", table)
    assert "device" not in made.recipe_table()
    assert build("model", {**table, "in_features": "none"}).settings["in_features"] == "none"  # it has no None to leave


@pytest.mark.parametrize(("name", "key"), [("pgd", "eps"), ("pgd", "steps")])
def test_a_switch_is_no_number(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = true: that is no switch"):
        build("attack", {"name": name, key: True})
    assert build("attack", {"name": "accumulative", "resample_validation": True}).resample_validation
