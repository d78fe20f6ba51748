"""A store in which everything that is scored follows a formula."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from mithridate.bench.store import Run
from mithridate.report.rows import Row, rows
from mithridate.report.scores import CLEAN, OOD, POISONED

Say = Callable[[Mapping[str, Any], str, int], float]
"""A score by the detector's table, the kind of sample and its number."""

EPOCHS = (2, 6, 10)
LAST = 12
TABLES: list[dict[str, Any]] = [
    *({"name": "discrepancy", "label": f"d{epoch}", "epoch": epoch} for epoch in EPOCHS),
    *({"name": "loss", "label": f"l{epoch}", "epoch": epoch} for epoch in EPOCHS),
    {"name": "loss"},
    {"name": "gda"},
]


def formula(seed: int, eps: float = 0.2) -> Say:
    """Discrepancy = k (clean), (2 + eps) k (poisoned), k / 2 (ood), plus the seed; loss since = minus k / 10."""

    def say(table: Mapping[str, Any], kind: str, sample: int) -> float:
        k: int = LAST - table.get("epoch", LAST)
        if table["name"] == "discrepancy":
            return -(k * {CLEAN: 1.0, POISONED: 2.0 + eps, OOD: 0.5}[kind] + seed)
        if table["name"] == "loss":
            return 0.1 * k if "epoch" in table else -{CLEAN: 0.1, POISONED: 1.0, OOD: 3.0}[kind]
        return {CLEAN: 10.0, POISONED: -100 * eps, OOD: 0.0}[kind] + sample

    return say


@pytest.fixture(scope="session")
def scored(with_scores: Callable[..., Run]) -> Callable[..., Run]:
    """The run with 4 scores of every detector of `TABLES`, step and kind of sample."""

    def make(run: Run, say: Say | None = None, *, ood: bool = True) -> Run:
        poisons = run.config["attack"]["name"] != "clean"
        steps = [int(s["step"]) for s in run.trace if s["phase"] != "start" and (s["poisoned"] or not poisons)]
        kinds = [CLEAN, POISONED if poisons else "same", *([OOD] if ood else [])]
        say = say or formula(0)
        said = {
            table.get("label", table["name"]): {
                step: {kind: [say(table, CLEAN if kind == "same" else kind, i) for i in range(4)] for kind in kinds}
                for step in steps
            }
            for table in TABLES
        }
        made = with_scores(run, said, TABLES)
        return replace(made, config={**made.config, "burn_in": {"epochs": LAST, "checkpoints": list(EPOCHS)}})

    return make


@pytest.fixture(scope="session")
def scored_rows(make_run: Callable[..., Run], scored: Callable[..., Run]) -> list[Row]:
    """Vanilla and accumulative at two budgets and a clean stream, three seeds, defended and not."""
    runs = []
    for defence in ("none", "clip"):
        for seed in range(3):
            common: dict[str, Any] = {"defence": defence, "seed": seed}
            runs.append(scored(make_run(attack="clean", after=0.97, **common), formula(seed)))
            for eps in (0.1, 0.2):
                named: dict[str, Any] = {**common, "eps": eps}
                many = make_run(label=f"acc-{eps}", after=0.9 - eps, **named)
                single = make_run(attack="vanilla", label=f"vanilla-{eps}", accuracies=(0.96,), after=0.95, **named)
                runs += [scored(run, formula(seed, eps)) for run in (many, single)]
    return rows(runs)


def undefended(found: Sequence[Row], attack: str) -> Row:
    (row,) = (row for row in found if (row.attack, row.defence) == (attack, "none"))
    return row


@pytest.fixture(scope="session")
def attacked(scored_rows: list[Row]) -> Row:
    """The strongest attack, undefended."""
    return undefended(scored_rows, "acc-0.2")


@pytest.fixture(scope="session")
def quiet(scored_rows: list[Row]) -> Row:
    """The clean stream, undefended."""
    return undefended(scored_rows, "clean")
