"""Runs -> rows: one row a cell (data set, model, attack, defence) with every result of its runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mithridate.bench.store import Run
from mithridate.report.labels import labels
from mithridate.report.settings import config_table
from mithridate.report.statistic import Statistic
from mithridate.report.wording import MISSING, number, one_line


@dataclass(frozen=True)
class Row:
    """One cell of the experiment.

    Args:
        dataset: Name of the data set; see `labels` for what may stand behind this and the other names.
        model: Name of the model.
        attack: Label of the attack.
        defence: Label of the defence.
        runs: Its runs, in the store's order.
        apart: Settings in which runs of the same labels differ anywhere in the report, with this cell's values.
    """

    dataset: str
    model: str
    attack: str
    defence: str
    runs: tuple[Run, ...]
    apart: Mapping[str, str] = field(default_factory=dict)

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
    def names(self) -> dict[str, str]:
        """What tells the cell from other cells, as columns of a file."""
        names = {"dataset": self.dataset, "model": self.model, "attack": self.attack, "defence": self.defence}
        return {**names, **self.apart}

    @property
    def attack_name(self) -> str:
        """Name of the attack's component, whatever its label."""
        return _component(self.runs[0], "attack")

    @property
    def defence_name(self) -> str:
        """Name of the defence's component, whatever its label; without one, of the server's robust rule."""
        name = _component(self.runs[0], "defence")
        rule = config_table(self.runs[0], "federated").get("rule")
        if name == "none" and isinstance(rule, Mapping) and rule["name"] != "mean":
            return str(rule["name"])
        return name

    @property
    def attack_settings(self) -> Mapping[str, Any]:
        """The attack as the recipe sets it, from the first run."""
        return config_table(self.runs[0], "attack")

    @property
    def defence_settings(self) -> Mapping[str, Any]:
        """The defence as the recipe sets it, from the first run."""
        return config_table(self.runs[0], "defence")

    @property
    def attacking(self) -> bool:
        """Whether anything is attacked: all but `clean`."""
        return self.attack_name != "clean"

    @property
    def is_noise(self) -> bool:
        """Whether it is the control that an attack must beat."""
        return self.attack_name == "noise"

    @property
    def claims_drop(self) -> bool:
        """Whether it is an attack that ought to break something: neither `clean` nor the noise."""
        return self.attacking and not self.is_noise

    @property
    def federated(self) -> bool:
        """Whether its runs are of a federation: their steps are rounds, and clients are hostile, not images."""
        return "federated" in self.runs[0].config

    @property
    def poisons_before_trigger(self) -> bool:
        """Whether any batch before the trigger was changed, or any client hostile in it, in any run."""
        return self._poisoned_in("accumulative")

    @property
    def poisons_trigger(self) -> bool:
        """Whether the trigger batch was changed in any run.

        Of a federation: whether hostile clients sent anything but the honest update in the trigger round.
        """
        attack = self.attack_settings
        if self.federated and attack.get("trigger") == "clean":
            return attack.get("trigger_scale", 1.0) != 1.0 or "trigger_norm" in attack
        return self._poisoned_in("trigger")

    def _poisoned_in(self, phase: str) -> bool:
        steps = (step for run in self.runs for step in run.trace if step.get("phase") == phase)
        return any((number(step.get("poisoned")) or 0) > 0 for step in steps)

    @property
    def has_phase(self) -> bool:
        """Whether any run took steps before the trigger step."""
        return any(steps > 0 for steps in self.statistic("steps").values)

    @property
    def mean_steps(self) -> float:
        """Steps before the trigger step, mean over its runs; 0 if no run counted them."""
        return self.statistic("steps").mean or 0.0

    def statistic(self, metric: str) -> Statistic:
        """All results of one metric of the summary; runs without a finite number are left out."""
        return self.each(lambda run: number(run.summary.get(metric)))

    def each(self, quantity: Callable[[Run], float | None]) -> Statistic:
        """All results of a quantity that is computed run by run; runs without it are left out."""
        return Statistic(tuple(value for run in self.runs if (value := quantity(run)) is not None))

    def against(self, other: "Row", metric: str, compare: Callable[[float, float], float]) -> Statistic:
        """One metric compared with that of another row, seed by seed, over the seeds that both have.

        Args:
            other: What to compare with.
            metric: A number of the summary.
            compare: From this row's number and the other's, such as `operator.sub`.
        """
        of_other = {seed(run): value for run in other.runs if (value := number(run.summary.get(metric))) is not None}
        pairs = ((number(run.summary.get(metric)), of_other.get(seed(run))) for run in self.runs)
        return Statistic(tuple(compare(a, b) for a, b in pairs if a is not None and b is not None))

    def difference(self, first: str, second: str) -> Statistic:
        """`first - second` run by run, over the runs that have both."""
        pairs = ((number(run.summary.get(first)), number(run.summary.get(second))) for run in self.runs)
        return Statistic(tuple(a - b for a, b in pairs if a is not None and b is not None))

    def with_status(self, status: str) -> list[Run]:
        """The runs that ended `finished`, `halted` or `diverged`."""
        return [run for run in self.runs if run.summary.get("status") == status]

    def alarmed_early(self) -> list[Run]:
        """The runs in which a monitor raised an alarm before the trigger."""

        def early(run: Run) -> bool:
            first, steps = run.summary.get("first_alarm_step"), run.summary.get("steps")
            return isinstance(first, int) and isinstance(steps, int) and first <= steps

        return list(filter(early, self.runs))


def updates(run: Run) -> int:
    """How many batches the run's learner was sent, the trigger included; 0 if the run did not say."""
    steps = number(run.summary.get("steps"))
    return 0 if steps is None else int(steps) + (number(run.summary.get("accuracy_after_trigger")) is not None)


def seed(run: Run) -> int | None:
    """The run's seed, None if it did not record one."""
    value = run.summary.get("seed", config_table(run, "run").get("seed"))
    return value if isinstance(value, int) else None


def seeds(runs: Iterable[Run]) -> str:
    """The seeds of some runs in words."""
    return ", ".join(MISSING if seed(run) is None else str(seed(run)) for run in runs)


def rows(runs: Sequence[Run]) -> list[Row]:
    """Group runs into cells; runs that differ in more than the seed are of different cells.

    Args:
        runs: As read from the store.

    Returns:
        By data set and model; among those undefended cells first; among those `clean`, `noise`, then the attacks, short
        phases first. Beside online runs, federations count as another data set, as the two are not to be compared.
        Where federations differ in their length, the attack's label says it.
    """
    cells: dict[tuple[str, str, str, str], list[tuple[Run, Mapping[str, str]]]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        cells.setdefault((label.dataset, label.model, label.attack, label.defence), []).append((run, label.apart))

    def order(row: Row) -> tuple[object, ...]:
        rank = {"clean": 0, "noise": 1}.get(row.attack_name, 2)
        return (*row.group, row.defence_name != "none", row.defence, rank, row.mean_steps, row.attack)

    every = [Row(*names, tuple(run for run, _ in members), members[0][1]) for names, members in cells.items()]
    return sorted(every, key=order)


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows that may be compared with each other, by data set and model."""
    by_group: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    return by_group


def step_noun(rows: Sequence[Row]) -> str:
    """What one step of these runs takes in: a `batch`, a `round` of a federation, or a `step` of either."""
    kinds = {row.federated for row in rows}
    return "step" if len(kinds) > 1 else "round" if True in kinds else "batch"


def _component(run: Run, kind: str) -> str:
    return one_line(config_table(run, kind).get("name", run.summary.get(kind, "unknown")))
