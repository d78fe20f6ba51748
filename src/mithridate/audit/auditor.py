"""An audit from its plan to its verdict: every attack against every seed, with and without the guard."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mithridate.audit.attempts import CONTROLS, Facts, Trial, attempts, records_statistics, update_attempts
from mithridate.audit.costs import costs_of
from mithridate.audit.deadline import BudgetSpentError, Deadline
from mithridate.audit.identifiers import findings_of
from mithridate.audit.output import write_outputs
from mithridate.audit.plan import AuditPlan, plan_of, read_plan
from mithridate.audit.result import Audited, AuditRun, Measure, Points, Ruled, Side
from mithridate.audit.rows import FinishedRuns, key_of
from mithridate.audit.scaling import Scaled
from mithridate.audit.target import Target, called, guard_of, samples_of, target_function
from mithridate.audit.verdict import Judged, Reach, judged
from mithridate.audit.victim import GivenBatches, Victim
from mithridate.audit.wording import notes_of, statement
from mithridate.core.attack import Attack
from mithridate.core.environment import environment
from mithridate.core.errors import ConfigError, said
from mithridate.core.files import path_of
from mithridate.core.modes import BatchNormMode
from mithridate.core.registry import config_of, fields_of
from mithridate.guard.json_lines import plain_json
from mithridate.simulation.clients import FederatedRun
from mithridate.simulation.federated import run_federated
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.simulation.run import Outcome, Progress

Watch = Callable[[str], None]
"""Called with a line on every run that ends."""


@dataclass
class _Side:
    """What is known of the model with its guard, or without.

    Args:
        guarded: With it.
        runs: That have ended.
        skipped: Why attacks were not tried, by name.
    """

    guarded: bool
    runs: list[AuditRun] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def run(
    plan: AuditPlan | Mapping[str, Any] | str | Path,
    *,
    target: Callable[..., Target] | None = None,
    out: str | Path | None = None,
    watch: Watch | None = None,
) -> Audited:
    """Try on a model what a batch, or a stream of them, could do to it.

    Args:
        plan: An audit.toml, what it holds as a mapping, or an `AuditPlan`.
        target: The target function itself, in place of its name in the plan; called once a seed, with `seed=`.
        out: A folder for finished runs and for audit.json, audit.html, audit.md, audit.xml (JUnit) and audit.sarif. The
            same call goes on where a killed one was. Unset: nothing is written.
        watch: Called with a line on every run that ends.

    Returns:
        The verdict and all that it rests on; what audit.json holds.

    Raises:
        UserError: The plan or the target is wrong; nothing has been concluded then.
    """
    if isinstance(plan, Mapping):
        plan = plan_of(plan)
    elif not isinstance(plan, AuditPlan):
        plan = read_plan(plan)
    folder = None if out is None else path_of(out)
    function = target or target_function(plan.target, Path(plan.folder))
    audit = _Audit(plan, FinishedRuns(folder), watch or (lambda line: None))
    spent = ""
    try:
        for seed in plan.seeds:
            audit.seed(function, seed)
    except BudgetSpentError:
        spent = f"{plan.budget.seconds:g} s were over {audit.standing}"
    name = plan.target or f"{function.__module__}:{getattr(function, '__qualname__', 'target')}"
    audited = audit.concluded(name, spent)
    if folder is not None:
        write_outputs(audited, folder)
    return audited


class _Audit:
    """One call of `run`."""

    def __init__(self, plan: AuditPlan, finished: FinishedRuns, watch: Watch) -> None:
        self.plan, self.finished, self.watch = plan, finished, watch
        self.deadline = Deadline(plan.budget.seconds)
        self.sides: dict[bool, _Side] = {}
        self.facts: dict[str, Any] = {}
        self.standing = "before anything had begun"
        self.seconds = 0.0
        self.environment = environment(torch.device("cpu"))
        self.beginnings: list[str] = []

    def seed(self, function: Callable[..., Target], seed: int) -> None:
        """Everything that is tried in one seed."""
        self.standing = f"while the target function worked, seed {seed}"
        with self.deadline.interrupting():
            target = called(function, seed)
            samples = samples_of(target, 1 if self.plan.federated else self.plan.budget.batches + 1, seed)
            victim = Victim(target, samples, guard_of(target), seed)
        self.facts = self.facts or victim.facts()
        self.environment = environment(victim.device)
        self.beginnings.append(victim.beginning)
        try:
            self._sides(victim)
        finally:
            victim.put_back()

    def _sides(self, victim: Victim) -> None:
        """Everything that is tried, without the guard and with it."""
        for guarded in self._guards(victim):
            side = self.sides.setdefault(guarded, _Side(guarded))
            tried, skipped = self._attempts(victim, guarded)
            side.skipped |= skipped
            for attempt in tried:
                self._try(victim, side, attempt, frozen=False)
            if records_statistics(victim.target.model):
                self._freeze(victim, side, tried)

    def _attempts(self, victim: Victim, guarded: bool) -> tuple[list[Trial], dict[str, str]]:
        """What is tried, and why the rest is not."""
        if self.plan.federated:
            return update_attempts(self.plan, self.plan.federated), {}
        target, samples = victim.target, victim.samples
        facts = Facts(
            samples.batches[0].to(victim.device),
            victim.learner(guarded=False).white_box,
            victim.defence if guarded else None,
            target.optimizer,
            bool(target.older),
            victim.scale(self.plan.budget),
        )
        return attempts(self.plan, facts)

    def _guards(self, victim: Victim) -> Sequence[bool]:
        """Without the guard first, then with it."""
        wanted = self.plan.guard
        if victim.defence is None:
            if wanted in ("on", "both"):
                raise ConfigError(f'guard = "{wanted}", and the target has no defence; give Target(..., defence=...).')
            return (False,)
        return {"on": (True,), "off": (False,), "both": (False, True), None: (False, True)}[wanted]

    def _freeze(self, victim: Victim, side: _Side, tried: Sequence[Trial]) -> None:
        """What costs too much is tried again with BatchNorm's statistics frozen, beside the controls of its kind."""
        costs = {(c.attack, c.measure): c.values.get(victim.seed, 0.0) for c in costs_of(side.runs)}
        allowed = self._allowed
        dear = {name for (name, measure), cost in costs.items() if cost > allowed[measure] and name not in CONTROLS}
        if not dear:
            return
        wanted = [one for one in tried if one.name in dear]
        controls = {"clean_trigger" if one.at_once else "clean" for one in wanted}
        for attempt in [*(one for one in tried if one.name in controls), *wanted]:
            self._try(victim, side, attempt, frozen=True)

    @property
    def _allowed(self) -> dict[Measure, float]:
        return {"step": self.plan.damage.step, "phase": self.plan.damage.phase}

    def _try(self, victim: Victim, side: _Side, attempt: Trial, *, frozen: bool) -> None:
        """One run, unless it has been made."""
        self.deadline.check()
        how = "guarded" if side.guarded else "unguarded"
        how += ", statistics frozen" if frozen else ""
        self.standing = f"during {attempt.name}, {how}, seed {victim.seed}"
        settings = _settings(attempt)
        key = key_of(
            {
                "target": victim.fingerprint,
                "seed": victim.seed,
                "guarded": side.guarded,
                "frozen": frozen,
                "attack": attempt.name,
                "settings": settings,
                "batches": self.plan.budget.batches,
                "federated": self.plan.federated and fields_of(self.plan.federated),
                "environment": self.environment,
            }
        )
        done = self.finished.get(key)
        if done is None:
            outcome: Outcome | None = None
            error = ""
            with self.deadline.interrupting():
                try:
                    outcome = self._outcome(victim, attempt, guarded=side.guarded, frozen=frozen)
                except ConfigError as reason:
                    if attempt.name in CONTROLS:  # then it is the user's mistake
                        raise
                    error = said(reason)
            done = AuditRun(
                key=key,
                attack=attempt.name,
                seed=victim.seed,
                guarded=side.guarded,
                frozen=frozen,
                accuracy=[] if outcome is None else [row["accuracy"] or 0.0 for row in outcome.trace],
                refused=0 if outcome is None else outcome.rolled_back,
                seconds=0.0 if outcome is None else round(outcome.seconds, 3),
                error=error,
                settings=settings,
            )
            self.finished.put(done)
        if done.error:
            side.skipped[attempt.name] = done.error
            return
        side.runs.append(done)
        self.seconds += done.seconds
        start, end = done.accuracy[0], done.accuracy[-1]
        self.watch(
            f"seed {victim.seed}, {how}: {attempt.name}, accuracy {start:.1%} to {end:.1%}, {done.seconds:.1f} s"
        )

    def _outcome(self, victim: Victim, attempt: Trial, *, guarded: bool, frozen: bool) -> Outcome:
        """The run itself."""
        mode: BatchNormMode = "eval" if frozen else "train"
        learner, attack = victim.learner(guarded=guarded, mode=mode), attempt.attack
        if isinstance(attack, Attack):
            run = OnlineRun(steps=self.plan.budget.batches, update_mode=mode, images=0)
            batches = GivenBatches.of(victim.samples)
            return run_online(learner, batches, attack, run, seed=victim.seed, on_step=self._on_step)
        federated = self.plan.federated
        if federated is None:
            raise ConfigError(f"{attempt.name} attacks updates of clients; give the plan a table [federated].")
        rounds = FederatedRun(
            rounds=self.plan.budget.batches,
            rule=federated.rule,
            batch_norm="frozen" if frozen else "synchronised",
        )
        federation = victim.federation(federated.clients)
        return run_federated(learner, federation, attack, rounds, on_step=self._on_step)

    def _on_step(self, progress: Progress) -> None:
        self.deadline.check()

    def concluded(self, target: str, spent: str) -> Audited:
        """The verdict, from whatever has ended."""
        sides = [self._side(side, spent) for _, side in sorted(self.sides.items())]
        if not sides:
            empty = judged([], self._allowed, controls=CONTROLS, tried=[], skipped={}, budget_spent=spent)
            sides = [self._stated(_Side(False), empty)]
        last = sides[-1]
        plan = _plain(self.plan)
        return Audited(
            verdict=last.verdict,
            statement=statement(last.verdict, last.reasons, self.plan),
            reasons=last.reasons,
            notes=notes_of(
                last,
                self.sides[last.guarded].runs if self.sides else [],
                alike=len(self.beginnings) > 1 and len(set(self.beginnings)) == 1,
            ),
            guarded=last.guarded,
            target=target,
            file=self.plan.file,
            plan=plan,
            facts=self.facts,
            sides=sides,
            findings=findings_of(sides, federated=self.plan.federated is not None),
            runs=[run for _, side in sorted(self.sides.items()) for run in side.runs],
            seconds=round(self.seconds, 3),
            environment=self.environment,
        )

    def _side(self, side: _Side, spent: str) -> Side:
        costs = list(costs_of(side.runs))
        tried = sorted({cost.attack for cost in costs} - CONTROLS)
        verdict = judged(costs, self._allowed, controls=CONTROLS, tried=tried, skipped=side.skipped, budget_spent=spent)
        return self._stated(side, verdict)

    def _stated(self, side: _Side, verdict: Judged) -> Side:
        clean = [run for run in side.runs if run.attack == "clean" and not run.frozen]
        return Side(
            guarded=side.guarded,
            verdict=verdict.verdict,
            reasons=list(verdict.reasons),
            rulings=[
                Ruled(
                    attack=r.attack,
                    measure=r.measure,
                    control=r.attack in CONTROLS,
                    cost=_points(r.cost),
                    allowed=r.allowed,
                    beyond={name: _points(b) for name, b in r.beyond.items()},
                    frozen=None if r.frozen is None else _points(r.frozen),
                    says=r.says,
                )
                for r in verdict.rulings
            ],
            skipped=side.skipped,
            clean_steps=sum(len(run.accuracy) - 1 for run in clean),
            clean_refused=sum(run.refused for run in clean),
        )


def _points(cost: Reach) -> Points:
    def number(value: float) -> float | None:
        return round(value, 6) if math.isfinite(value) else None

    return Points(mean=number(cost.mean), low=number(cost.low), high=number(cost.high), seeds=cost.n)


def _settings(attempt: Trial) -> dict[str, object]:
    """Of the attack, as JSON has them."""
    attack = attempt.attack
    if not isinstance(attack, Scaled):
        return _in_json(config_of(attack))
    scale = [float(f"{s:.6g}") for s in attack.scale.flatten().tolist()]
    return _in_json({**config_of(attack.inner), "scale": scale})


def _plain(plan: AuditPlan) -> dict[str, object]:
    """All settings, as JSON has them."""
    values = {key: value for key, value in fields_of(plan).items() if key not in ("folder", "file")}
    for name in ("budget", "damage", "federated"):
        if name in values:
            values[name] = fields_of(values[name])
    return _in_json(values)


def _in_json(table: Mapping[str, object]) -> dict[str, object]:
    return {key: plain_json(value) for key, value in table.items()}
