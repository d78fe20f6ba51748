"""What every defence must pass."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mithridate.attacks.noise import Noise
from mithridate.core.batch import AnyBatch, tensors_of
from mithridate.core.defence import Defence, Screened, Verdict, checked, overrides
from mithridate.core.domain import Domain
from mithridate.core.errors import ConfigError
from mithridate.core.past import Weights
from mithridate.core.registry import entries
from mithridate.core.targets import Criterion
from mithridate.core.updates import Updates
from mithridate.core.view import View
from mithridate.data.shards import Shards
from mithridate.simulation.clients import FederatedRun, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.testing.checks.evidence import Evidence
from mithridate.testing.checks.subject import Check, entry_of, fresh, made, named_choices, variants
from mithridate.testing.checks.witness import Witness, bits, same_tensors, through_file, unsaveable
from mithridate.testing.checks.worlds import (
    World,
    image_world,
    other_worlds,
    state_of,
    stream_of,
    tabular_world,
    untimed,
)
from mithridate.testing.toy import toy_learner
from mithridate.training.learner import Learner
from mithridate.update_attacks.clean import CleanUpdates

POISON = 0.15
"""Radius of the noise that poisons the toy stream, in pixel units."""


@lru_cache(maxsize=64)
def exercised(cls: Any) -> Evidence:  # noqa: ANN401  (the class of a defence)
    """What is found when a defence is tried in all its settings; tried once."""
    evidence = Evidence()
    with evidence.trying(cls.__name__):
        defences = _settings(cls)
        for defence in defences:
            with evidence.trying(defence, breach="screened"):
                _run_and_resume(defence, evidence)
        if evidence.crashed:
            return evidence
        active: Defence = made(cls, cls.active)
        with evidence.trying(active, "batch of one"):
            _try_batch_of_one(active, evidence)
        with evidence.trying(active, "dtype"):
            _try_float64(active, evidence)
        with evidence.trying(active, "domain"):
            _try_other_domain(active, evidence)
        with evidence.trying(active, "other inputs"):
            _try_other_inputs(active)
    return evidence


def _settings(cls: Any) -> list[Defence]:  # noqa: ANN401  (the class of a defence)
    """As it is, switched on, off, in every preset and named choice, and around other components."""
    tables: list[Mapping[str, Any]] = [{}, cls.active, cls.neutral, *entry_of(cls).presets.values()]
    tables += [{**cls.active, **choice} for choice in named_choices(cls)]
    fields = entry_of(cls).fields
    if "detector" in fields:
        tables += [{**cls.active, "detector": {"name": name}} for name in entries("detector")]
    if "parts" in fields:
        parts = {name: {"name": name, **entry.cls.active} for name, entry in entries("defence").items()}
        del parts["chain"]
        tables += [{"parts": [parts["clip"], part]} for part in parts.values()]
        tables += [{"parts": [parts[name] for name in ("fat", "filter", "skip", "gate", "bound_update", "ema")]}]
    return variants(cls, tables)


class _Watched(Defence):
    """A defence whose every moment is watched, while a learner asks for it.

    Args:
        defence: The one that is asked.
        evidence: Where faults go; None where they were looked for before.
        world: Where it stands.
    """

    def __init__(self, defence: Defence, evidence: Evidence | None, world: World) -> None:
        self.defence, self.evidence, self.world = defence, evidence, world
        self.needs = defence.needs  # type: ignore[misc]  # as of the one it stands for
        self.witness = Witness(defence, evidence, world)

    @property
    def lookback(self) -> int:
        return self.defence.lookback

    def _watching(self, moment: str, view: View, **handed: object) -> AbstractContextManager[None]:
        # A forward pass in update mode records statistics.
        may = [name for name, _ in self.world.learner.model.named_buffers()] if moment == "loss" else []
        return self.witness.watching(moment, handed, notes=view.memory, may=may)

    def begin(self, view: View) -> None:
        with self._watching("begin", view):
            self.defence.begin(view)

    def screen(self, batch: AnyBatch, view: View) -> Screened:
        received = batch.clone()
        with self._watching("screen", view, batch=batch):
            screened = self.defence.screen(batch, view)
        checked(self.defence, received, screened)
        if self.evidence is not None:
            _judge(self.defence, received, screened, view.domain, self.evidence)
        return screened

    def loss(self, model: nn.Module, batch: AnyBatch, criterion: Criterion, view: View) -> Tensor:
        with self._watching("loss", view, batch=batch):
            return self.defence.loss(model, batch, criterion, view)

    def bound(self, updates: Updates, view: View) -> Updates:
        with self._watching("bound", view, updates=updates.rows):
            bounded = self.defence.bound(updates, view)
        self._same_kind("bound", {"rows": updates.rows}, {"rows": bounded.rows})
        return bounded

    def admit(self, before: Weights, view: View) -> Verdict:
        with self._watching("admit", view, before=before):
            verdict = self.defence.admit(before, view)
        if verdict.parameters is not None:
            self._same_kind("admit", before.parameters, verdict.parameters)
        return verdict

    def committed(self, view: View) -> None:
        with self._watching("committed", view):
            self.defence.committed(view)

    def serve(self, view: View) -> Weights | None:
        with self._watching("serve", view):
            weights = self.defence.serve(view)
        if weights is not None:
            now = Weights.of(self.world.learner.model)
            self._same_kind("serve", {**now.parameters, **now.buffers}, {**weights.parameters, **weights.buffers})
        return weights

    def _same_kind(self, moment: str, given: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> None:
        wanted, got = ({key: (t.dtype, t.shape, t.device) for key, t in some.items()} for some in (given, back))
        wrong = [key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)]
        if wrong and self.evidence is not None:
            key = min(wrong)
            self.evidence.add("dtype", self.defence, f"`{moment}` makes of {key} {wanted.get(key)} {got.get(key)}")


def _guarded(world: World, defence: Defence, evidence: Evidence | None) -> Learner:
    """The learner of a world, behind a defence that is watched; it goes by the name of its class in messages."""
    watched: type[_Watched] = type(type(defence).__name__, (_Watched,), {})
    world.learner.defence = watched(defence, evidence, world)
    return world.learner


def _judge(defence: Defence, received: AnyBatch, screened: Screened, domain: Domain, evidence: Evidence) -> None:
    """Hold what a defence let through against what it received, and against what it says of it."""
    batch, flagged, weights = screened
    dropped = batch.size < received.size
    if dropped and (flagged is None or batch.size != int((~flagged).sum())):
        return  # it corrects samples and drops others: nobody can tell which is which
    left = received.take(~flagged) if dropped and flagged is not None else received
    if bits(batch.y) != bits(left.y):
        evidence.add("labels", defence, "`screen` changed labels")
    treated = torch.zeros(left.size, dtype=torch.bool)
    for before, after in zip(tensors_of(left.x), tensors_of(batch.x), strict=True):
        if (before.shape, before.dtype, before.device) != (after.shape, after.dtype, after.device):
            evidence.add("dtype", defence, f"`screen` makes {after.dtype} {tuple(after.shape)} of {before.dtype}")
            return
        treated |= (before != after).flatten(1).any(1).cpu() if before.ndim > 1 else (before != after).cpu()
    if bool(treated.any()) and not domain.holds(batch.x):
        evidence.add("domain", defence, "`screen` leaves the domain")
    if weights is not None:
        treated |= (weights < weights.max()).cpu()
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            evidence.add("screened", defence, "`screen` gives weights that are negative or not finite")
    if flagged is None and bool(treated.all()):
        return  # all samples alike
    told = torch.zeros_like(treated) if flagged is None or dropped else flagged
    if bool((treated & ~told).any()):
        evidence.add("screened", defence, "`screen` corrects samples or gives them less weight, and flags them not")


def _run_and_resume(defence: Defence, evidence: Evidence) -> None:
    """Three steps; then the first again, and the last from what was saved in the middle."""
    world = image_world()
    first, second, third = world.batches
    learner = _guarded(world, defence, evidence)
    learner.update(first)
    after_first = state_of(learner)
    learner.update(second)
    if unsaveable(learner.memory):
        return  # that is on record
    notes, snapshot, past = through_file(learner.memory), learner.snapshot(), world.past.tensors()
    learner.update(third)
    score = learner.evaluate([world.validation])

    again = _guarded(image_world(), fresh(defence), None)
    again.update(first)
    if not same_tensors(state_of(again), after_first):
        evidence.add("repeats", defence, "makes another step of the same batch")
    other = image_world()
    resumed = _guarded(other, fresh(defence), None)
    resumed.restore(snapshot)
    resumed.memory.update(notes)
    other.past.load(past)
    resumed.update(third)
    same = repr(resumed.evaluate([world.validation])) == repr(score)  # NaN is not equal to itself
    if not (same and same_tensors(state_of(resumed), state_of(learner))):
        evidence.add("resumes", defence, "goes on otherwise once its notes were saved")


def _try_batch_of_one(defence: Defence, evidence: Evidence) -> None:
    world = image_world()
    learner = _guarded(world, defence, None)
    learner.update_mode = "eval"
    for batch in world.batches:
        if not math.isfinite(learner.update(batch.take(slice(1))).update_norm):
            evidence.add("batch of one", defence, "breaks the model on a single sample")


def _try_float64(defence: Defence, evidence: Evidence) -> None:
    world = image_world(torch.float64)
    learner = _guarded(world, defence, evidence)
    for batch in world.batches:
        learner.update(batch)
    learner.evaluate([world.validation])
    changed = [name for name, p in learner.model.named_parameters() if p.dtype != torch.float64]
    if changed:
        evidence.add("dtype", defence, f"makes other numbers than float64 of {changed}")


def _try_other_domain(defence: Defence, evidence: Evidence) -> None:
    """Rows of features, each with bounds of its own; a defence of images alone says so, and is let off."""
    world = tabular_world()
    try:
        defence.check_inputs(world.batches[0])
    except ConfigError:
        return
    learner = _guarded(world, defence, evidence)
    for batch in world.batches:
        learner.update(batch)


def _try_other_inputs(defence: Defence) -> None:
    for world in other_worlds():
        try:
            defence.check_inputs(world.batches[0])
        except ConfigError:
            continue
        learner = _guarded(world, defence, None)
        for batch in world.batches:
            learner.update(batch)
        learner.evaluate([world.validation])


def check_keeps_labels(cls: type) -> None:
    """What `screen` lets through has the labels that it came with."""
    exercised(cls).require("labels")


def check_says_what_it_screened(cls: type) -> None:
    """`screen` flags what it drops, corrects or gives less weight, or treats all samples alike."""
    exercised(cls).require("screened")


def check_stays_in_the_domain(cls: type) -> None:
    """What `screen` corrects stays valid: pixels in [0, 1], z-scored features each within bounds of their own."""
    exercised(cls).require("domain")


@lru_cache(maxsize=1)
def _undefended() -> Sequence[Mapping[str, Any]]:
    return _trace(None)


def _trace(defence: Defence | None) -> Sequence[Mapping[str, Any]]:
    """The trace of a poisoned toy run, without what the clock decides."""
    stream = stream_of(0)
    run = OnlineRun(steps=3, lr=0.05, images=0)
    outcome = run_online(toy_learner(stream, defence=defence), stream, Noise(eps=POISON), run, seed=0)
    return untimed(outcome.trace)


def check_neutral(cls: Any) -> None:  # noqa: ANN401  (the class of a defence)
    """With its neutral settings the run is the undefended run, bit for bit."""
    if exercised(cls).crashed:
        return  # that is on record
    assert _trace(made(cls, cls.neutral)) == _undefended(), f"{cls.__name__} with {cls.neutral} changes the run"


def check_acts(cls: Any) -> None:  # noqa: ANN401  (the class of a defence)
    """With its active settings the run differs from the undefended one, unless both are the same: it never acts."""
    if cls.active != cls.neutral and not exercised(cls).crashed:
        assert _trace(made(cls, cls.active)) != _undefended(), f"{cls.__name__} with {cls.active} changes nothing"


def check_bound_by_lengths(cls: type) -> None:
    """Where `bound` is content with the lengths of rows, it does to rows what it says of lengths, in every setting."""
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.0, 1e-3, 0.1, 1, 9, 1e3]]).T
    lengths, shapes = torch.linalg.vector_norm(rows, dim=1), {"all": torch.Size([4])}
    for defence in _settings(cls):
        if not overrides(defence, "bound"):
            continue
        view = toy_learner(stream_of(0), defence=defence).view()
        try:
            bounded = defence.bound(Updates(rows.clone(), shapes), view).rows
        except ConfigError:
            continue  # it needs whole updates of the model
        unformed = defence.bound(Updates(rows.clone, shapes, lengths=lengths), view)
        assert torch.allclose(bounded, unformed.rows), f"{defence} bounds rows otherwise when it knows their lengths"
        if unformed.factors is not None:
            assert torch.allclose(bounded, rows * unformed.factors.unsqueeze(1)), f"{defence}: wrong factors"


def check_federation(cls: Any) -> None:  # noqa: ANN401  (the class of a defence)
    """A federation that it does not refuse beforehand works."""
    if exercised(cls).crashed:
        return  # that is on record
    clients = 10
    defence: Defence = made(cls, cls.active)
    federation = federate(stream_of(0), Shards(clients=clients), seed=0)
    for bound in ("after", "before"):
        run = FederatedRun(rounds=2, lr=0.05, bound=bound)
        try:
            defence.check_federation(run, clients)
        except ConfigError:
            continue
        try:
            outcome = run_federated(toy_learner(federation.stream, defence=defence), federation, CleanUpdates(), run)
        except Exception as error:
            raise AssertionError(f"{defence} takes part in a federation, which then fails: {error}") from error
        assert outcome.status == "finished", f"{defence}: a clean federation that bounds {bound} {outcome.status}"


CHECKS: Sequence[Check] = (
    check_keeps_labels,
    check_says_what_it_screened,
    check_stays_in_the_domain,
    check_neutral,
    check_acts,
    check_bound_by_lengths,
    check_federation,
)
