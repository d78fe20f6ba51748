"""The checks of defences: a defence that breaks one rule fails the check of that rule, and no other."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.component import check_moves
from mithridate.core.defence import ADMITTED, Defence, Screened, Verdict
from mithridate.core.errors import ConfigError
from mithridate.core.model import answer
from mithridate.core.past import Weights
from mithridate.core.registry import settings
from mithridate.core.targets import Criterion
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.defences.none import Standard
from mithridate.simulation.clients import FederatedRun


@settings
class Damped(Defence):
    """Take a share of every update.

    Args:
        share: In (0, 1]; 1 is no defence.

    Source:
        These tests.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"share": 1.0}
    active: ClassVar[Mapping[str, Any]] = {"share": 0.5}

    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    @property
    def on(self) -> bool:
        """Faults are there only while it is on, so that neutral settings stay neutral."""
        return self.share < 1

    def bound(self, updates: Updates, view: View) -> Updates:
        if not self.on:
            return updates
        return updates.scaled(torch.full_like(updates.lengths(), self.share))


class OfTensors(Damped):
    def check_inputs(self, batch: AnyBatch) -> None:
        check_moves(batch, who="it")


class Sees(Damped):
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.TRUSTED, Need.TRAINING, Need.HISTORY})


def some(module: nn.Module) -> Tensor:
    return next(module.parameters()).detach()


class DrawsFromTorch(Damped):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        return Screened(batch, torch.rand(batch.size) > 2 if self.on else None)


class DrawsFromNumpy(Damped):
    def begin(self, view: View) -> None:
        np.random.rand()  # noqa: NPY002  (the fault)


class MovesParametersInScreen(Sees):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        some(view.model.module).mul_(0.9 if self.on else 1)
        return Screened(batch)


class MovesParametersInAdmit(Sees):
    def admit(self, before: Weights, view: View) -> Verdict:
        if self.on:
            some(view.model.module).mul_(0.9)
        return ADMITTED


class MovesParametersInServe(Sees):
    def serve(self, view: View) -> Weights | None:
        if self.on:
            some(view.model.module).mul_(0.9)
        return None


class MovesParametersInLoss(Sees):
    def loss(self, model: nn.Module, batch: AnyBatch, criterion: Criterion, view: View) -> Tensor:
        loss = super().loss(model, batch, criterion, view)
        if self.on:
            some(model).data.mul_(0.9)
        return loss


class RecordsStatistics(Sees):
    def begin(self, view: View) -> None:
        if self.on:
            for buffer in view.model.module.buffers():
                buffer.add_(1)


class LeavesGradientsInBegin(Sees):
    def begin(self, view: View) -> None:
        for parameter in view.model.module.parameters():
            parameter.grad = torch.zeros_like(parameter)


class LeavesGradientsInLoss(Damped):
    def loss(self, model: nn.Module, batch: AnyBatch, criterion: Criterion, view: View) -> Tensor:
        if self.on:
            torch.autograd.backward(criterion(answer(model, batch.x), batch.y))
        return super().loss(model, batch, criterion, view)


class LeavesEvalMode(Sees):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        view.model.module.eval()
        return Screened(batch)


class LeavesTrainMode(Sees):
    def committed(self, view: View) -> None:
        view.model.module.train()


class NotesAText(Damped):
    def begin(self, view: View) -> None:
        view.memory["when"] = "now"  # type: ignore[assignment]  # the fault


class NotesUnderANumber(Damped):
    def committed(self, view: View) -> None:
        view.memory[3] = torch.zeros(1)  # type: ignore[index]  # the fault


class NotesAGradient(Sees):
    def committed(self, view: View) -> None:
        view.memory["weight"] = next(view.model.module.parameters()) * 2


class RemembersOnItself(Damped):
    def bound(self, updates: Updates, view: View) -> Updates:
        before = getattr(self, "before", 0.0) if self.on else 0.0
        object.__setattr__(self, "before", float(updates.rows.norm()))
        return super().bound(updates, view).scaled(torch.tensor([1 / (1 + before)]).to(updates.rows))


SEEN: list[float] = []


class RemembersInItsModule(Damped):
    def bound(self, updates: Updates, view: View) -> Updates:
        SEEN.append(0.0)
        return super().bound(updates, view).scaled(torch.tensor([1 / len(SEEN) if self.on else 1.0]).to(updates.rows))


class RemembersTheFirstBatch(Damped):
    # Set once in the life of a process: nothing that is computed afterwards shows it.
    first: ClassVar[dict[str, Tensor]] = {}

    def screen(self, batch: AnyBatch, view: View) -> Screened:
        self.first.setdefault("batch", batch.y.clone())
        return Screened(batch)


class ChangesLabels(Damped):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        return Screened(batch._replace(y=batch.y.flip(0))) if self.on else Screened(batch)


class WritesLabels(Damped):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        if self.on:
            batch.y.zero_()
        return Screened(batch)


class WritesToTrustedSamples(Sees):
    def begin(self, view: View) -> None:
        view.trusted.y.zero_()


class WritesToTrainingSamples(Sees):
    def admit(self, before: Weights, view: View) -> Verdict:
        next(iter(view.training)).y.zero_()
        return ADMITTED


class WritesToItsPast(Sees):
    def serve(self, view: View) -> Weights | None:
        old = view.history.checkpoint()
        assert old is not None
        next(iter(old.parameters.values())).zero_()
        return None


class WritesToRows(Damped):
    def bound(self, updates: Updates, view: View) -> Updates:
        updates.rows.mul_(0.5 if self.on else 1)
        return super().bound(updates, view)


class WritesToTheStart(Damped):
    def admit(self, before: Weights, view: View) -> Verdict:
        if self.on:
            next(iter(before.parameters.values())).zero_()
        return ADMITTED


class DropsUnflagged(Damped):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        return Screened(batch.take(slice(1, None))) if self.on else Screened(batch)


class FlagsTooFew(Damped):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        flagged = torch.arange(batch.size) < 1
        return Screened(batch.take(slice(2, None)), flagged) if self.on else Screened(batch)


class CorrectsUnflagged(OfTensors):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        x = batch.x.clone()
        x[0] = 0.5
        return Screened(Batch(x, batch.y)) if self.on else Screened(batch)


class WeighsUnflagged(Damped):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        weights = torch.where(torch.arange(batch.size) < 2, 0.5, 1.0)
        return Screened(batch, torch.zeros(batch.size, dtype=torch.bool), weights) if self.on else Screened(batch)


class WeighsBelowZero(Damped):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        return Screened(batch, None, torch.full((batch.size,), -1.0)) if self.on else Screened(batch)


class LeavesTheDomain(OfTensors):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        return Screened(Batch(batch.x - 0.5, batch.y)) if self.on else Screened(batch)


class IsNeverNeutral(Damped):
    neutral: ClassVar[Mapping[str, Any]] = {"share": 0.9}


class NeverActs(Damped):
    active: ClassVar[Mapping[str, Any]] = {"share": 1 - 1e-12}


class BoundsByOtherLengths(Damped):
    def bound(self, updates: Updates, view: View) -> Updates:
        bounded = super().bound(updates, view)
        return (
            bounded.scaled(torch.full_like(updates.lengths(), 0.5)) if self.on and updates.factors is None else bounded
        )


class MakesFloat32Rows(Damped):
    def bound(self, updates: Updates, view: View) -> Updates:
        return updates.with_rows(super().bound(updates, view).rows.float())


class ServesFloat32(Sees):
    def serve(self, view: View) -> Weights | None:
        now = Weights.of(view.model.module).copied()
        return Weights({name: p.float() for name, p in now.parameters.items()}, now.buffers) if self.on else None


class NeedsTwoSamples(OfTensors):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        assert batch.x[1].isfinite().all()
        return Screened(batch)


class LooksAtMore(Damped):
    def committed(self, view: View) -> None:
        view.trusted.x.mean()


class CannotLearnInFederations(Damped):
    def bound(self, updates: Updates, view: View) -> Updates:
        if updates.losses is None:
            raise ConfigError("it needs the loss of the batch.")
        return super().bound(updates, view)

    def check_federation(self, run: Any, clients: int) -> None:
        assert isinstance(run, FederatedRun)


class TakesTensorsAlone(Damped):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        return Screened(batch, None if batch.x.ndim else torch.zeros(batch.size, dtype=torch.bool))


class CannotRun(Damped):
    def committed(self, view: View) -> None:
        del view.memory["no such note"]


STATE = {"keeps_state_in_notes", "resumes"}

BROKEN: dict[type, set[str]] = {
    DrawsFromTorch: {"draws_from_no_global_generator"},
    DrawsFromNumpy: {"draws_from_no_global_generator"},
    MovesParametersInScreen: {"leaves_the_model_alone"},
    MovesParametersInAdmit: {"leaves_the_model_alone"},
    MovesParametersInServe: {"leaves_the_model_alone"},
    MovesParametersInLoss: {"leaves_the_model_alone"},
    RecordsStatistics: {"leaves_the_model_alone"},
    LeavesGradientsInBegin: {"leaves_gradients_alone"},
    LeavesGradientsInLoss: {"leaves_gradients_alone"},
    LeavesEvalMode: {"leaves_train_flags_alone"},
    LeavesTrainMode: {"leaves_train_flags_alone"},
    NotesAText: {"notes_can_be_saved"},
    NotesUnderANumber: {"notes_can_be_saved"},
    NotesAGradient: {"notes_can_be_saved"},
    RemembersOnItself: {*STATE, "bound_by_lengths"},
    RemembersInItsModule: {*STATE, "repeats", "bound_by_lengths"},
    RemembersTheFirstBatch: {"keeps_state_in_notes"},
    ChangesLabels: {"keeps_labels"},
    WritesLabels: {"keeps_labels", "leaves_inputs_alone"},
    WritesToTrustedSamples: {"leaves_inputs_alone"},
    WritesToTrainingSamples: {"leaves_inputs_alone"},
    WritesToItsPast: {"leaves_inputs_alone"},
    WritesToRows: {"leaves_inputs_alone", "bound_by_lengths"},
    WritesToTheStart: {"leaves_inputs_alone"},
    DropsUnflagged: {"says_what_it_screened"},
    FlagsTooFew: {"says_what_it_screened"},
    CorrectsUnflagged: {"says_what_it_screened"},
    WeighsUnflagged: {"says_what_it_screened"},
    WeighsBelowZero: {"says_what_it_screened"},
    LeavesTheDomain: {"stays_in_the_domain"},
    IsNeverNeutral: {"neutral"},
    NeverActs: {"acts"},
    BoundsByOtherLengths: {"bound_by_lengths"},
    MakesFloat32Rows: {"keeps_dtype"},
    ServesFloat32: {"keeps_dtype"},
    NeedsTwoSamples: {"batch_of_one"},
    LooksAtMore: {"declares_needs"},
    CannotLearnInFederations: {"federation"},
    TakesTensorsAlone: {"says_which_inputs_it_takes"},
    CannotRun: {"runs"},
}


@pytest.mark.parametrize("cls", [Damped, Standard])
def test_what_they_are_made_of_passes(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("defence", cls) == set()


@pytest.mark.slow
@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_who_breaks_a_rule_fails_its_check_and_no_other(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("defence", cls) == BROKEN[cls]
