"""The checks of aggregators: a rule that breaks one of them fails that check, and no other."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from mithridate.aggregators.mean import Mean
from mithridate.aggregators.median import Median
from mithridate.core.aggregator import Aggregator, Context, Property, Spread
from mithridate.core.errors import ConfigError


class BoastsOfRobustness(Mean):
    average: ClassVar[bool] = False

    def most_hostile(self, n: int) -> int:
        return (n - 1) // 2

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        return 0.0


class TakesTheFirst(Median):
    average: ClassVar[bool] = True

    def most_hostile(self, n: int) -> int:
        return 0

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        return rows[0].clone()


class DeclaresNoFault(Median):
    unmet: ClassVar[Mapping[Property, str]] = {"scale": "for no reason that anyone could give"}


class Shrinks(Median):
    def combine(self, rows: Tensor, context: Context) -> Tensor:
        made = super().combine(rows, context)
        return made.div(1 + made.norm())


class WritesToRows(Median):
    def combine(self, rows: Tensor, context: Context) -> Tensor:
        made = super().combine(rows, context)
        rows.add_(0.0).copy_(rows.sort(dim=0).values)
        return made


class WritesToTheTrustedUpdate(Median):
    def combine(self, rows: Tensor, context: Context) -> Tensor:
        if context.trusted is not None:
            context.trusted.mul_(2)
        return super().combine(rows, context)


class DrawsFromTorch(Median):
    def combine(self, rows: Tensor, context: Context) -> Tensor:
        return super().combine(rows, context) + 0 * torch.rand(rows.shape[1]).to(rows)


class HidesItsWeights(Mean):
    weighted: ClassVar[bool] = False


class BoastsOfWeights(Median):
    weighted: ClassVar[bool] = True


class IsTooModest(Median):
    average: ClassVar[bool] = True

    def most_hostile(self, n: int) -> int:
        return 0


class RemembersOnItself(Median):
    def combine(self, rows: Tensor, context: Context) -> Tensor:
        object.__setattr__(self, "rounds", getattr(self, "rounds", 0) + 1)
        return super().combine(rows, context)


SEEN: list[float] = []


class RemembersInItsModule(Median):
    def combine(self, rows: Tensor, context: Context) -> Tensor:
        SEEN.append(0.0)
        return super().combine(rows, context) * (1 + 1e-13 * len(SEEN))


class NotesANumber(Median):
    def combine(self, rows: Tensor, context: Context) -> Tensor:
        context.memory["rounds"] = 1  # type: ignore[assignment]  # the fault
        return super().combine(rows, context)


class HandsOutItsNotes(Median):
    def combine(self, rows: Tensor, context: Context) -> Tensor:
        made = super().combine(rows, context)
        context.memory["last"] = made
        return made


class ForgetsItsClients(Median):
    remembers_clients: ClassVar[bool] = True


class LosesPrecision(Median):
    def combine(self, rows: Tensor, context: Context) -> Tensor:
        return super().combine(rows.half() if rows.dtype == torch.float32 else rows, context).to(rows)


class TakesTwoRowsAtLeast(Median):
    def check(self, n: int) -> None:
        if n < 2:
            raise ConfigError("too few.")


class TakesNoRows(Median):
    def aggregate(self, rows: Tensor, context: Context) -> Tensor:
        return super().aggregate(rows, context) if len(rows) else rows.sum(0)


class TakesNaN(Median):
    def aggregate(self, rows: Tensor, context: Context) -> Tensor:
        return super().aggregate(rows.nan_to_num(), context) if len(rows) else super().aggregate(rows, context)


class GivesAGradient(Mean):
    def aggregate(self, rows: Tensor, context: Context) -> Tensor:
        return super().aggregate(rows, context) + 0 * rows[0]


class CannotRun(Median):
    def combine(self, rows: Tensor, context: Context) -> Tensor:
        return context.memory["no such note"]


BROKEN: dict[type, set[str]] = {
    BoastsOfRobustness: {"hostile_rows"},
    TakesTheFirst: {"any_order", "average_is_declared"},
    DeclaresNoFault: {"scale"},
    Shrinks: {"scale", "translation", "consensus", "hostile_rows"},
    WritesToRows: {"leaves_inputs_alone"},
    WritesToTheTrustedUpdate: {"leaves_inputs_alone"},
    DrawsFromTorch: {"draws_from_no_global_generator"},
    HidesItsWeights: {"weights"},
    BoastsOfWeights: {"weights"},
    IsTooModest: {"average_is_declared"},
    RemembersOnItself: {"keeps_state_in_notes"},
    RemembersInItsModule: {"keeps_state_in_notes", "repeats", "resumes", "weights"},
    NotesANumber: {"notes_can_be_saved"},
    HandsOutItsNotes: {"notes_can_be_saved"},
    ForgetsItsClients: {"notes_can_be_saved"},
    LosesPrecision: {"keeps_dtype"},
    TakesTwoRowsAtLeast: {"number_of_rows"},
    TakesNoRows: {"number_of_rows"},
    TakesNaN: {"unusable_rows"},
    GivesAGradient: {"gives_no_gradient"},
    CannotRun: {"runs"},
}


@pytest.mark.slow  # both are registered, and pass in test_components
@pytest.mark.parametrize("cls", [Mean, Median])
def test_what_they_are_made_of_passes(cls: type[Aggregator], failing: Callable[..., set[str]]) -> None:
    assert failing("aggregator", cls) == set()


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_who_breaks_a_rule_fails_its_check_and_no_other(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("aggregator", cls) == BROKEN[cls]
