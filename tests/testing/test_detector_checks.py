"""The checks of detectors: a detector that breaks one rule fails the check of that rule, and no other."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest
import torch
from torch import Generator, Tensor

from mithridate.core.batch import AnyBatch
from mithridate.core.view import Memory, View
from mithridate.core.watch import Observed
from mithridate.detectors.kd import KernelDensity
from mithridate.detectors.loss import Loss


class DrawsFromTorch(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        return super().score(batch, view, fitted) + 1e-9 * torch.rand(batch.size)


class DrawsWhileFitting(KernelDensity):
    def fit(self, clean: Observed, *, rng: Generator) -> Memory:
        return {**super().fit(clean, rng=rng), "drawn": torch.rand(1)}


class WritesToItsBatch(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        scores = super().score(batch, view, fitted)
        batch.y.copy_(batch.y.flip(0))
        return scores


class WritesToItsNotes(KernelDensity):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        scores = super().score(batch, view, fitted)
        fitted["bandwidth"].add_(0.0).nextafter_(torch.tensor(torch.inf, dtype=torch.float64))
        return scores


class WritesToCleanSamples(KernelDensity):
    def fit(self, clean: Observed, *, rng: Generator) -> Memory:
        notes = super().fit(clean, rng=rng)
        clean.features.zero_()
        return notes


class MovesParameters(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        scores = super().score(batch, view, fitted)
        next(iter(view.model.parameters.values())).mul_(1 + 1e-5)
        return scores


class LeavesGradients(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        for parameter in view.model.module.parameters():
            parameter.grad = None
        return super().score(batch, view, fitted)


class LeavesEvalMode(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        view.model.module.eval()
        return super().score(batch, view, fitted)


class RemembersOnItself(KernelDensity):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        if not hasattr(self, "first"):
            object.__setattr__(self, "first", batch.size)
        return super().score(batch, view, fitted)


class RemembersWhatItWasFittedTo(KernelDensity):
    def fit(self, clean: Observed, *, rng: Generator) -> Memory:
        object.__setattr__(self, "shift", float(len(clean.y)))
        return super().fit(clean, rng=rng)

    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        return super().score(batch, view, fitted) + getattr(self, "shift", 0.0)


class NotesANumber(KernelDensity):
    def fit(self, clean: Observed, *, rng: Generator) -> Memory:
        return {**super().fit(clean, rng=rng), "samples": len(clean.y)}  # type: ignore[dict-item]  # the fault


class NotesNothing(Loss):
    fits: ClassVar[bool] = True


class LooksAtMore(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        view.trusted.x.mean()
        return super().score(batch, view, fitted)


class ScoresTheBatch(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        scores = super().score(batch, view, fitted)
        return (scores - scores.mean()) / (scores.std() + 1 if batch.size > 1 else 1)


class GivesAColumn(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        scores = super().score(batch, view, fitted)
        return scores[:, None] if batch.size == 20 else scores


class GivesGradients(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        return super().score(batch, view, fitted).requires_grad_()


class ScoresInWholeNumbers(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        scores = super().score(batch, view, fitted)
        return scores.round().long() if scores.dtype == torch.float64 else scores


class NeedsTwoSamples(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        scores = super().score(batch, view, fitted)
        return scores if batch.size > 1 else scores - 1


class ScoresUpsideDown(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        return -super().score(batch, view, fitted)


class TakesTensorsAlone(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        shift: Tensor = 0 * batch.x.flatten(1).sum(1)
        return super().score(batch, view, fitted) + shift


class CannotRun(Loss):
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        return fitted["no such note"]


BROKEN: dict[type, set[str]] = {
    DrawsFromTorch: {"draws_from_no_global_generator"},
    DrawsWhileFitting: {"draws_from_no_global_generator"},
    WritesToItsBatch: {"leaves_inputs_alone"},
    WritesToItsNotes: {"leaves_inputs_alone"},
    WritesToCleanSamples: {"leaves_inputs_alone"},
    MovesParameters: {"leaves_the_model_alone"},
    LeavesGradients: {"leaves_gradients_alone"},
    LeavesEvalMode: {"leaves_train_flags_alone"},
    RemembersOnItself: {"keeps_state_in_notes"},
    RemembersWhatItWasFittedTo: {"keeps_state_in_notes", "resumes"},
    NotesANumber: {"notes_can_be_saved"},
    NotesNothing: {"notes_can_be_saved"},
    LooksAtMore: {"declares_needs"},
    ScoresTheBatch: {"scores_in_any_company", "batch_of_one"},
    GivesAColumn: {"gives_scores"},
    GivesGradients: {"gives_scores"},
    ScoresInWholeNumbers: {"keeps_dtype"},
    NeedsTwoSamples: {"batch_of_one"},
    ScoresUpsideDown: {"separates"},
    TakesTensorsAlone: {"says_which_inputs_it_takes"},
    CannotRun: {"runs"},
}


@pytest.mark.slow  # both are registered, and pass in test_components
@pytest.mark.parametrize("cls", [KernelDensity, Loss])
def test_what_they_are_made_of_passes(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("detector", cls) == set()


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_who_breaks_a_rule_fails_its_check_and_no_other(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("detector", cls) == BROKEN[cls]
