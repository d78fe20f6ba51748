"""Runs -> rows: one row a cell (data set, model, attack, defence), every result kept, means and spreads over seeds."""

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mithridate.bench.store import Run
from mithridate.report.wording import (
    MISSING,
    decimal,
    markdown_safe,
    number,
    plain,
    points,
    said_of,
    span,
    spreadsheet_safe,
)

METRICS = (
    "accuracy_start",
    "accuracy_before_trigger",
    "accuracy_after_trigger",
    "accuracy_after_buffers",
    "drop",
    "steps",
    "alarms",
    "seconds",
)
"""The numbers of `summary.json` that are averaged over seeds; accuracies and the drop are fractions."""

RUN_METRICS = (
    *METRICS,
    "rolled_back",
    "quarantined",
    "flagged_clean",
    "flagged_poisoned",
    "update_seconds",
)
"""The numbers of `summary.json` that `runs.csv` lists; older stores lack the last ones."""

COLUMNS = (
    "attack",
    "defence",
    "start (%)",
    "before trigger (%)",
    "after trigger (%)",
    "drop (points)",
    "phase (batches)",
    "alarms",
    "n",
    "seconds",
)
"""Headings of the table that people read, as of online runs; the first two columns are names."""

Record = Mapping[str, str | float | int | None]


@dataclass(frozen=True)
class Statistic:
    """All results of one quantity in one cell.

    Args:
        values: One number a run that has it.
    """

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """How many runs have the number."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """The arithmetic mean; None without values."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """The standard deviation with n - 1 in the denominator; None for fewer than two values."""
        return statistics.stdev(self.values) if self.n > 1 else None


@dataclass(frozen=True)
class Row:
    """One cell of the experiment.

    Args:
        dataset: Name of the data set.
        model: Name of the model.
        attack: Label of the attack.
        defence: Label of the defence.
        runs: Its runs, in the store's order.
    """

    dataset: str
    model: str
    attack: str
    defence: str
    runs: tuple[Run, ...]

    @property
    def group(self) -> tuple[str, str]:
        """What rows must share to be compared: data set and model."""
        return self.dataset, self.model

    @property
    def subject(self) -> str:
        """Model and data set in words."""
        return f"{self.model} on {self.dataset}"

    @property
    def cell(self) -> str:
        """Attack and defence in words."""
        return f"{self.attack} \u00d7 {self.defence}"

    @property
    def attack_name(self) -> str:
        """The component's name, whatever its label."""
        return _component(self.runs[0], "attack")

    @property
    def defence_name(self) -> str:
        """The component's name, whatever its label."""
        return _component(self.runs[0], "defence")

    @property
    def attacking(self) -> bool:
        """Whether anything is attacked: all but `clean`."""
        return self.attack_name != "clean"

    @property
    def is_noise(self) -> bool:
        """Whether it is the control that an attack must beat."""
        return self.attack_name == "noise"

    @property
    def federated(self) -> bool:
        """Whether its runs are of a federation: their steps are rounds, and clients are hostile, not images."""
        return "federated" in self.runs[0].config

    @property
    def poisons_before_trigger(self) -> bool:
        """Whether any batch before the trigger was changed, or any client hostile in it, in any run."""
        return any(
            (number(step.get("poisoned")) or 0) > 0
            for run in self.runs
            for step in run.trace
            if step.get("phase") == "accumulative"
        )

    @property
    def poisons_trigger(self) -> bool:
        """Whether the trigger batch was changed in any run.

        Of a federation: whether hostile clients sent anything but the honest update in the trigger round.
        """
        attack = _table(self.runs[0], "attack")
        if self.federated and attack.get("trigger") == "clean":
            return attack.get("trigger_scale", 1.0) != 1.0 or "trigger_norm" in attack
        return any(
            (number(step.get("poisoned")) or 0) > 0
            for run in self.runs
            for step in run.trace
            if step.get("phase") == "trigger"
        )

    @property
    def has_phase(self) -> bool:
        """Whether any run took steps before the trigger step."""
        return any(steps > 0 for steps in self.statistic("steps").values)

    def statistic(self, metric: str) -> Statistic:
        """All results of one metric of the summary; runs without a finite number are left out."""
        return self.each(lambda run: number(run.summary.get(metric)))

    def each(self, quantity: Callable[[Run], float | None]) -> Statistic:
        """All results of a quantity that is computed run by run; runs without it are left out."""
        found = map(quantity, self.runs)
        return Statistic(tuple(value for value in found if value is not None))

    def against(self, other: "Row", metric: str, compare: Callable[[float, float], float]) -> Statistic:
        """One metric compared with that of another row, seed by seed, over the seeds that both have.

        Args:
            other: What to compare with.
            metric: A number of the summary.
            compare: From this row's number and the other's, such as `operator.sub`.
        """
        theirs = {seed(run): value for run in other.runs if (value := number(run.summary.get(metric))) is not None}
        pairs = ((number(run.summary.get(metric)), theirs.get(seed(run))) for run in self.runs)
        return Statistic(tuple(compare(a, b) for a, b in pairs if a is not None and b is not None))

    def difference(self, first: str, second: str) -> Statistic:
        """`first - second` run by run, over the runs that have both."""
        pairs = ((number(run.summary.get(first)), number(run.summary.get(second))) for run in self.runs)
        return Statistic(tuple(a - b for a, b in pairs if a is not None and b is not None))

    def with_status(self, status: str) -> list[Run]:
        """The runs that ended so."""
        return [run for run in self.runs if run.summary.get("status") == status]


def undefended(row: Row, among: Iterable[Row]) -> Row | None:
    """The row of the same attack, data set and model without a defence; None if there is none, or it is this one."""
    if row.defence_name == "none":
        return None
    same = (other for other in among if (other.group, other.attack) == (row.group, row.attack))
    return next((other for other in same if other.defence_name == "none"), None)


def updates(run: Run) -> int:
    """How many batches the run's learner was sent, the trigger included; 0 if the run did not say."""
    steps = number(run.summary.get("steps"))
    return 0 if steps is None else int(steps) + (number(run.summary.get("accuracy_after_trigger")) is not None)


def seed(run: Run) -> int | None:
    """The run's seed, None if it did not record one."""
    value = run.summary.get("seed", _table(run, "run").get("seed"))
    return value if isinstance(value, int) else None


def seeds(runs: Iterable[Run]) -> str:
    """The seeds of some runs in words."""
    return ", ".join(MISSING if seed(run) is None else str(seed(run)) for run in runs)


def rows(runs: Sequence[Run]) -> list[Row]:
    """Group runs into cells.

    Args:
        runs: As read from the store.

    Returns:
        By data set and model; in those undefended cells first; in those `clean`, `noise`, then the attacks, short
        phases first. Federations beside online runs are another data set, as the two are not to be compared; those of
        several lengths are told apart by it, as part of the attack's label.
    """
    cells: dict[tuple[str, str, str, str], list[Run]] = {}
    beside = ", federated" if len({bool(_rounds(run)) for run in runs}) > 1 else ""

    def group(run: Run) -> tuple[str, str]:
        return _label(run, "dataset", "data") + (beside if _rounds(run) else ""), _label(run, "model", "model")

    lengths: dict[tuple[str, str], set[int]] = {}
    for run in runs:
        lengths.setdefault(group(run), set()).update(_rounds(run))
    for run in runs:
        named, attack = group(run), _label(run, "attack", "attack")
        if len(lengths[named]) > 1:
            attack += "".join(f", {rounds} rounds" for rounds in _rounds(run))
        cells.setdefault((*named, attack, _label(run, "defence", "defence")), []).append(run)
    made = [Row(*key, runs=tuple(found)) for key, found in cells.items()]

    def order(row: Row) -> tuple[object, ...]:
        rank = {"clean": 0, "noise": 1}.get(row.attack_name, 2)
        return (*row.group, row.defence_name != "none", row.defence, rank, row.statistic("steps").mean or 0, row.attack)

    return sorted(made, key=order)


def groups(found: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows that may be compared with each other, by data set and model."""
    by_group: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        by_group.setdefault(row.group, []).append(row)
    return by_group


def step_noun(found: Sequence[Row]) -> str:
    """What one step of these runs takes in: a `batch`, a `round` of a federation, or a `step` of either."""
    kinds = {row.federated for row in found}
    return "step" if len(kinds) > 1 else "round" if True in kinds else "batch"


def columns(found: Sequence[Row]) -> tuple[str, ...]:
    """`COLUMNS` for these rows."""
    return tuple(said_of(step_noun(found), name) for name in COLUMNS)


def summary_records(found: Sequence[Row]) -> list[Record]:
    """One record a cell: names, number of runs by outcome, and mean, std and n of every metric."""
    records: list[Record] = []
    for row in found:
        record: dict[str, str | float | int | None] = {
            "dataset": row.dataset,
            "model": row.model,
            "attack": row.attack,
            "defence": row.defence,
            "runs": len(row.runs),
            "diverged": len(row.with_status("diverged")),
            "halted": len(row.with_status("halted")),
        }
        for metric in METRICS:
            statistic = row.statistic(metric)
            record |= {f"{metric}_mean": statistic.mean, f"{metric}_std": statistic.std, f"{metric}_n": statistic.n}
        records.append(record)
    return records


def run_records(found: Sequence[Row]) -> list[Record]:
    """One record a run: names, outcome and every metric."""
    return [
        {
            "run": plain(run.path.name),
            "dataset": row.dataset,
            "model": row.model,
            "attack": row.attack,
            "defence": row.defence,
            "seed": seed(run),
            "status": plain(run.summary.get("status", "")),
            "stopped_by": plain(run.summary.get("stopped_by", "")),
            "first_alarm_step": number(run.summary.get("first_alarm_step")),
            **{metric: number(run.summary.get(metric)) for metric in RUN_METRICS},
        }
        for row in found
        for run in row.runs
    ]


def to_csv(records: Sequence[Record]) -> str:
    """Records as CSV: numbers in full precision, nothing where there is none, names that no spreadsheet evaluates."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: spreadsheet_safe(v) if isinstance(v, str) else v for k, v in record.items()})
    return text.getvalue()


def displayed(row: Row) -> tuple[str, ...]:
    """One row as people read it, column by column as in `COLUMNS`."""
    drop = row.statistic("drop")
    total = len(row.runs)
    seconds = row.statistic("seconds").mean
    return (
        row.attack,
        row.defence,
        spread(row.statistic("accuracy_start")),
        spread(row.statistic("accuracy_before_trigger")),
        spread(row.statistic("accuracy_after_trigger")),
        spread(drop),
        span(row.statistic("steps").values),
        span(row.statistic("alarms").values),
        str(total) if drop.n == total else f"{drop.n} of {total}",
        MISSING if seconds is None else decimal(seconds),
    )


def spread(statistic: Statistic) -> str:
    """Mean and standard deviation of fractions, in percent or points.

    >>> spread(Statistic((0.1, 0.2))), spread(Statistic((0.1,))), spread(Statistic(()))
    ('15.0 ± 7.1', '10.0', '—')
    """
    if statistic.mean is None:
        return MISSING
    return points(statistic.mean) + ("" if statistic.std is None else f" ± {points(statistic.std)}")


def to_markdown(found: Sequence[Row]) -> str:
    """A GitHub table of all rows; data set and model are columns only where they differ."""
    several = len(groups(found)) > 1
    return markdown_table(
        [*(("data set", "model") if several else ()), *columns(found)],
        [(*(row.group if several else ()), *displayed(row)) for row in found],
        names=4 if several else 2,
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, names: int) -> str:
    """A GitHub table; cells are shown as they are, never as markup.

    Args:
        head: The headings, which are ours.
        rows: Each as long as `head`.
        names: How many columns on the left hold names; the others hold numbers and are set to the right.
    """
    lines = [head, ["---"] * names + ["---:"] * (len(head) - names), *([*map(markdown_safe, row)] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `table.key -> value`, both as text."""
    flat: dict[str, str] = {}
    for key, value in table.items():
        name = f"{prefix}{plain(key)}"
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{name}.")
        else:
            flat[name] = plain(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False))
    return flat


def settings(run: Run) -> dict[str, str]:
    """The run's settings but the title and the seed, flattened."""
    apart = {"title", "run.seed", "run.seeds", "federated.seeds"}
    return {key: value for key, value in flattened(run.config).items() if key not in apart}


def shared(tables: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The entries that all tables have with the same value."""
    return {key: value for key, value in tables[0].items() if all(table.get(key) == value for table in tables)}


def varying(tables: Sequence[Mapping[str, str]], apart_from: Mapping[str, str]) -> dict[str, str]:
    """The other entries; where the tables disagree, all their values.

    Args:
        tables: Some runs' settings or environments.
        apart_from: Keys to leave out.
    """
    keys = dict.fromkeys(key for table in tables for key in table if key not in apart_from)
    return {key: " | ".join(dict.fromkeys(table.get(key, "unset") for table in tables)) for key in keys}


def _rounds(run: Run) -> tuple[int, ...]:
    """How many rounds before its trigger a federation was given; nothing for an online run."""
    rounds = _table(run, "federated").get("rounds")
    return (rounds,) if isinstance(rounds, int) else ()


def _table(run: Run, name: str) -> Mapping[str, Any]:
    table = run.config.get(name, {})
    return table if isinstance(table, Mapping) else {}


def _component(run: Run, kind: str) -> str:
    return plain(_table(run, kind).get("name", run.summary.get(kind, "unknown")))


def _label(run: Run, key: str, kind: str) -> str:
    table = _table(run, kind)
    return plain(run.summary.get(key) or table.get("label") or table.get("name") or "unknown") or "unknown"
