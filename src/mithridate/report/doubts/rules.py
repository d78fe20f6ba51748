"""The report doubts itself: rules that say what in the results is not trustworthy, each with its numbers.

A rule is a pure function from rows that are compared with each other (same data set and model) to the doubts it found.
Rules about what attacks did skip the controls, `clean` and `noise`: nobody claims a drop for those.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from operator import sub

from mithridate.bench.store import Run
from mithridate.report.rows import (
    Row,
    Statistic,
    flattened,
    groups,
    seed,
    seeds,
    settings,
    shared,
    spread,
    step_noun,
    undefended,
    updates,
    varying,
)
from mithridate.report.wording import counted, listed, number, plain, points

MIN_SEEDS = 3
"""Fewer different seeds than this say little about the spread."""

QUIET_POINTS = 0.05
"""A phase that loses more accuracy than this (a fraction) before the trigger is not quiet. The phases of Pang et al.,
Table 1, cost 2 to 5 points."""

NEGLIGIBLE = 0.01
"""Changes of accuracy below one point are not argued about."""

BUFFER_SHARE = 0.5
"""From this share of the drop on, BatchNorm statistics explain it."""

START_POINTS = 0.01
"""Cells whose start accuracies differ by more than this (a fraction) did not start equal."""

BUDGET_KEYS = ("eps", "norm", "poison_ratio")
"""The settings of an attack that say how much it may change."""

FEDERATED_BUDGET_KEYS = ("poison_ratio", "trigger_scale", "trigger_norm")
"""The same of an attack on a federation: how many clients it has, and how long an update they send in the end."""

ALL_CORRECTED = 0.95
"""A defence that corrects at least this share of clean samples does not choose which."""

CALIBRATION_FACTOR = 2.0
"""How far what a measured threshold corrects on a clean stream may be outside its confidence interval. That takes
samples for independent, and is of an undefended copy: from half its lower to twice its upper end is allowed."""

ENVIRONMENT_KEYS = (
    "mithridate",
    "commit",
    "python",
    "torch",
    "numpy",
    "cuda",
    "device",
    "device_name",
    "gpu",
    "threads",
    "platform",
    "machine",
)
"""What of `environment.json` can move a result."""

ALL_CELLS = "all cells"


class Severity(StrEnum):
    """How much a doubt takes away."""

    SERIOUS = "serious"
    CAUTION = "caution"
    NOTE = "note"


@dataclass(frozen=True)
class Doubt:
    """One reason not to trust a number.

    Args:
        severity: How much it takes away.
        cell: Attack and defence concerned, or `ALL_CELLS`.
        text: What was found, with numbers.
    """

    severity: Severity
    cell: str
    text: str


@dataclass(frozen=True)
class Examined:
    """What one rule found.

    Args:
        title: The rule in a few words.
        meaning: What it looks for: its docstring's first line.
        doubts: Empty if there was nothing.
    """

    title: str
    meaning: str
    doubts: tuple[Doubt, ...]


def few_seeds(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for cells with fewer than 3 different seeds; with one seed there is no spread at all."""
    cells: dict[tuple[int, str], list[str]] = {}
    for row in rows:
        n = len({seed(run) for run in row.runs})
        if n < MIN_SEEDS:
            cells.setdefault((n, seeds(row.runs)), []).append(row.cell)
    return [
        Doubt(
            Severity.SERIOUS if n == 1 else Severity.CAUTION,
            ALL_CELLS if len(few) == len(rows) > 1 else ", ".join(few),
            f"{counted(str(n), 'seed')} ({which}); at least {MIN_SEEDS} are needed to see a spread.",
        )
        for (n, which), few in cells.items()
    ]


def duplicate_seeds(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for a seed that occurs twice in one cell: such runs are not independent, yet count in n."""
    found = []
    for row in rows:
        twice = [str(s) for s, times in Counter(map(seed, row.runs)).items() if s is not None and times > 1]
        if twice:
            text = f"{len(row.runs)} runs, but seed {listed(twice)} more than once; n and ± are too favourable."
            found.append(Doubt(Severity.SERIOUS, row.cell, text))
    return found


def early_loss(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for attacks that cost more than 5 points before the trigger, or at least as much as the trigger itself."""
    found = []
    for row in _claiming(rows):
        before = row.difference("accuracy_start", "accuracy_before_trigger").mean
        drop = row.statistic("drop").mean
        if before is None or before < NEGLIGIBLE:
            continue
        lost = f"{points(before)} points were"
        if drop is not None and before >= drop:
            text = f"{lost} lost before the trigger and {points(drop)} in its step: not one {step_noun([row])}'s work."
            found.append(Doubt(Severity.SERIOUS, row.cell, text))
        elif before > QUIET_POINTS:
            text = f"{lost} lost before the trigger; a phase is called quiet up to {points(QUIET_POINTS)}."
            found.append(Doubt(Severity.CAUTION, row.cell, text))
    return found


def alarms_before_trigger(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for monitors that raised an alarm before the trigger of an attack: the phase was not quiet."""
    return [
        Doubt(
            Severity.CAUTION,
            row.cell,
            f"a monitor raised an alarm before the trigger in {_of(early, row)}.",
        )
        for row in _claiming(rows)
        if (early := alarmed_early(row))
    ]


def false_alarms(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for monitors that raise alarms although nothing is attacked: their alarms elsewhere mean less."""
    found = []
    for row in rows:
        alarmed = [run for run in row.runs if run.summary.get("alarms")]
        if not row.attacking and alarmed:
            text = f"alarms without an attack in {_of(alarmed, row)}."
            found.append(Doubt(Severity.CAUTION, row.cell, text))
    return found


def no_better_than_noise(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for attacks whose mean drop is not above the mean plus one std of random noise under the same defence."""
    found = []
    for row in _undefended(rows):
        noise = noise_of(row, rows)
        drop = row.statistic("drop")
        if noise is None or drop.mean is None:
            continue
        bar = noise_bar(noise)
        if bar is not None and drop.mean <= bar:
            text = f"drop {spread(drop)} points, noise {spread(noise.statistic('drop'))} points: no better than noise."
            found.append(Doubt(Severity.SERIOUS, row.cell, text))
    return found


def no_noise_baseline(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for defences under which no random noise was run: nothing says that the attack is more than that."""
    without: dict[str, list[str]] = {}
    for defence in dict.fromkeys(row.defence for row in _claiming(rows)):
        attacks = [row for row in _claiming(rows) if row.defence == defence]
        if noise_of(attacks[0], rows) is None:
            without.setdefault(listed([row.attack for row in attacks]), []).append(defence)
    return [
        Doubt(
            Severity.CAUTION,
            f"{'defence' if len(defences) == 1 else 'defences'} {listed(defences)}",
            f"no noise baseline for {names}; add the attack noise with {_equal_budget(rows)}.",
        )
        for names, defences in without.items()
    ]


def includes_zero(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for attacks whose drop, mean ± std over seeds, includes zero."""
    found = []
    for row in _undefended(rows):
        drop = row.statistic("drop")
        if drop.mean is not None and drop.std is not None and drop.mean - drop.std <= 0 <= drop.mean + drop.std:
            text = f"drop {spread(drop)} points (n = {drop.n}) includes zero: no effect that these seeds can show."
            found.append(Doubt(Severity.CAUTION, row.cell, text))
    return found


def buffers_explain(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for drops of which BatchNorm statistics alone explain half: buffers replaced, parameters as before."""
    found = []
    for row in _claiming(rows):
        lost = row.difference("accuracy_before_trigger", "accuracy_after_buffers").mean
        drop = row.statistic("drop").mean
        if lost is not None and drop is not None and drop > NEGLIGIBLE and lost >= BUFFER_SHARE * drop:
            text = (
                f"replacing only the buffers (BatchNorm statistics) costs {points(lost)} of the {points(drop)} points; "
                "the poisoned update of the parameters is not what broke the model."
            )
            found.append(Doubt(Severity.SERIOUS, row.cell, text))
    return found


def chooses_nothing(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for defences that correct nearly all clean samples, no poisoned ones, or no more of those than of clean."""
    found = []
    for defence in dict.fromkeys(row.defence for row in rows):
        cells = [row for row in rows if row.defence == defence]
        clean = [row for row in cells if not row.attacking and row.statistic("flagged_clean").n]
        stream = max(clean, key=lambda row: row.statistic("steps").mean or 0, default=None)
        of_clean = None if stream is None else stream.statistic("flagged_clean").mean
        attacked = [(r, share) for r in _claiming(cells) if (share := r.statistic("flagged_poisoned").mean) is not None]
        if stream is not None and of_clean is not None and of_clean >= ALL_CORRECTED:
            poisoned = listed([f"{points(share)} % of those that {row.attack} poisoned" for row, share in attacked])
            text = (
                f"corrects {points(of_clean)} % of clean samples{f' and {poisoned}' if poisoned else ''}: it takes "
                "everything for poison, so a low attack success says nothing about its threshold."
            )
            found.append(Doubt(Severity.CAUTION, stream.cell, text))
            continue
        beside = "" if of_clean is None else f", of clean ones on a clean stream {points(of_clean)} %"
        for row, share in attacked:
            if share == 0:
                text = f"corrects 0.0 % of the poisoned samples{beside}: its threshold let everything pass."
                found.append(Doubt(Severity.SERIOUS, row.cell, text))
            elif of_clean is not None and share <= of_clean:
                text = (
                    f"corrects {points(share)} % of the poisoned samples{beside}: no more of the one than of the other."
                )
                found.append(Doubt(Severity.CAUTION, row.cell, text))
    return found


def calibration_missed(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for measured thresholds that correct another share of a clean stream than twice around their interval."""
    found = []
    for row in rows:
        if row.attacking or not row.has_phase or row.defence_name != "dsc":  # in a chain, others correct too
            continue
        missed = [
            (run, low, high, share)
            for run in row.runs
            if (interval := _calibrated(run)) and (share := number(run.summary.get("flagged_clean"))) is not None
            for low, high in [interval]
            if not low / CALIBRATION_FACTOR <= share <= high * CALIBRATION_FACTOR
        ]
        if missed:
            each = listed(
                [f"{points(share)} % (calibrated to {points(a)} to {points(b)} %)" for _, a, b, share in missed]
            )
            text = f"corrects {each} of a clean stream in {_of([run for run, *_ in missed], row)}."
            found.append(Doubt(Severity.CAUTION, row.cell, text))
    return found


def _calibrated(run: Run) -> tuple[float, float] | None:
    """The interval of the run's threshold; None without one."""
    calibrations = run.summary.get("calibrations")
    if not isinstance(calibrations, list) or len(calibrations) != 1 or not isinstance(calibrations[0], Mapping):
        return None
    interval = calibrations[0].get("interval")
    if not isinstance(interval, list) or len(interval) != 2:
        return None
    low, high = map(number, interval)
    return None if low is None or high is None else (low, high)


def false_vetoes(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for defences that refuse steps although nothing is attacked: so many batches are not learned from."""
    found = []
    for row in rows:
        refusing = [run for run in row.runs if number(run.summary.get("rolled_back"))]
        if not row.attacking and refusing:
            refused, total = sum(row.statistic("rolled_back").values), sum(map(updates, row.runs))
            text = f"{refused:g} of {total} steps of a clean stream were refused, in {_of(refusing, row)}."
            found.append(Doubt(Severity.CAUTION, row.cell, text))
    return found


def costs_on_clean(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for defences that end a clean stream more than one point below the undefended runs of the same seeds."""
    found = []
    for row in rows:
        none = undefended(row, rows)
        if row.attacking or none is None:
            continue
        change = row.against(none, "accuracy_after_trigger", sub)
        if change.mean is not None and change.mean < -NEGLIGIBLE:
            cost = Statistic(tuple(-value for value in change.values))
            text = f"costs {spread(cost)} points (n = {cost.n}) of accuracy although nothing is attacked."
            found.append(Doubt(Severity.CAUTION, row.cell, text))
    return found


def quarantined(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for samples, or clients' updates, with NaN or infinite numbers: the model learned from fewer."""
    found = []
    for row in rows:
        some = [run for run in row.runs if number(run.summary.get("quarantined"))]
        if some:
            kept = f"{sum(row.statistic('quarantined').values):g}"
            what = f"{counted(kept, 'update')} of clients" if row.federated else counted(kept, "sample")
            numbers = "entries" if row.federated else "pixels"
            text = f"{what} with NaN or infinite {numbers} kept from the model in {_of(some, row)}."
            found.append(Doubt(Severity.NOTE, row.cell, text))
    return found


def diverged(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for runs whose loss became NaN: a collapse of training, which counts in the means."""
    return [
        Doubt(
            Severity.SERIOUS,
            row.cell,
            f"{_of(runs, row)} diverged; the accuracies as measured count in the means.",
        )
        for row in rows
        if (runs := row.with_status("diverged"))
    ]


def halted(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for runs that a monitor stopped before the trigger: they have no drop, and the others are a selection."""
    return [
        Doubt(
            Severity.CAUTION,
            row.cell,
            f"{_of(runs, row)} halted before the trigger; the drop is "
            + (f"that of the other {row.statistic('drop').n}." if row.statistic("drop").n else "unknown."),
        )
        for row in rows
        if (runs := row.with_status("halted"))
    ]


def starts_differ(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for cells that are compared although their mean start accuracies differ by more than one point."""
    starts = {row.cell: start for row in rows if (start := row.statistic("accuracy_start").mean) is not None}
    if not starts:
        return []
    low, high = min(starts, key=starts.__getitem__), max(starts, key=starts.__getitem__)
    if starts[high] - starts[low] <= START_POINTS:
        return []
    text = (
        f"start accuracies span {points(starts[low])} % ({low}) to {points(starts[high])} % ({high}): "
        "drops of unlike models are compared."
    )
    return [Doubt(Severity.CAUTION, ALL_CELLS, text)]


def budgets_differ(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for attacks with different budgets (eps, norm, poison ratio, the trigger's length) side by side."""
    found = []
    for key in dict.fromkeys((*BUDGET_KEYS, *FEDERATED_BUDGET_KEYS)):
        cells: dict[str, list[str]] = {}
        for row in _attacking(rows):
            for value in budget(row).get(key, ()):
                cells.setdefault(value, []).append(row.attack)
        if len(cells) > 1:
            each = "; ".join(f"{value}: {', '.join(dict.fromkeys(attacks))}" for value, attacks in cells.items())
            found.append(Doubt(Severity.CAUTION, ALL_CELLS, f"{key} differs ({each}); a larger budget breaks more."))
    return found


def power_over_optimiser(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for attacks that set the victim's momentum: power over the optimiser, which data alone does not give."""
    found = []
    for row in _attacking(rows):
        momenta = {flattened(run.config).get("attack.weight_momentum") for run in row.runs} - {None}
        if momenta:
            values = listed(sorted(map(str, momenta)))
            text = f"the attack sets the victim's momentum to {values} in the accumulative phase."
            found.append(Doubt(Severity.NOTE, row.cell, text))
    return found


def settings_mixed(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for cells whose runs differ in more than the seed: their mean is of unlike things."""
    found = []
    for row in rows:
        tables = [settings(run) for run in row.runs]
        mixed = varying(tables, shared(tables))
        if mixed:
            text = "; ".join(f"{key} = {values}" for key, values in mixed.items())
            found.append(Doubt(Severity.SERIOUS, row.cell, f"its runs differ in more than the seed: {text}."))
    return found


def versions_mixed(rows: Sequence[Row]) -> list[Doubt]:
    """Looks for different versions or devices behind results that are compared."""
    runs = [run for row in rows for run in row.runs]
    tables = [{key: plain(run.environment[key]) for key in ENVIRONMENT_KEYS if key in run.environment} for run in runs]
    mixed = varying(tables, shared(tables))
    if not mixed:
        return []
    text = "; ".join(f"{key}: {values}" for key, values in mixed.items())
    return [Doubt(Severity.CAUTION, ALL_CELLS, f"the runs were made with unlike software or hardware: {text}.")]


RULES: dict[str, Callable[[Sequence[Row]], list[Doubt]]] = {
    "No better than noise": no_better_than_noise,
    "Lost before the trigger": early_loss,
    "Explained by BatchNorm statistics": buffers_explain,
    "Diverged": diverged,
    "Halted before the trigger": halted,
    "One cell, several settings": settings_mixed,
    "Same seed twice": duplicate_seeds,
    "Too few seeds": few_seeds,
    "Includes zero": includes_zero,
    "Not quiet": alarms_before_trigger,
    "Corrects everything or nothing": chooses_nothing,
    "Threshold off its calibration": calibration_missed,
    "False alarms": false_alarms,
    "False vetoes": false_vetoes,
    "Costs accuracy on a clean stream": costs_on_clean,
    "Quarantined samples": quarantined,
    "No noise baseline": no_noise_baseline,
    "Unequal starts": starts_differ,
    "Unequal budgets": budgets_differ,
    "Unequal machines": versions_mixed,
    "Power over the optimiser": power_over_optimiser,
}
"""Every rule by its title."""


def examine(rows: Sequence[Row]) -> list[Examined]:
    """Ask every rule about every group of rows that are compared.

    Args:
        rows: All rows of the report.

    Returns:
        One answer a rule, those with the gravest doubts first, those without doubts last.
    """
    compared = groups(rows)
    answers = []
    for title, rule in RULES.items():
        doubts = []
        for members in compared.values():
            where = f"{members[0].subject}: " if len(compared) > 1 else ""
            doubts += [replace(doubt, cell=where + doubt.cell) for doubt in rule(members)]
        answers.append(Examined(title, (rule.__doc__ or "").partition("\n")[0], tuple(doubts)))
    ranks = list(Severity)
    return sorted(answers, key=lambda a: min((ranks.index(d.severity) for d in a.doubts), default=len(ranks)))


def budget(row: Row) -> dict[str, tuple[str, ...]]:
    """The budget settings of a cell that its runs record, with all values that occur."""
    tables = [flattened(run.config) for run in row.runs]
    keys = FEDERATED_BUDGET_KEYS if row.federated else BUDGET_KEYS
    every = {key: tuple(dict.fromkeys(v for t in tables if (v := t.get(f"attack.{key}")) is not None)) for key in keys}
    return {key: values for key, values in every.items() if values}


def noise_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The noise to compare an attack with: same defence; of equal budget if there is such, else the most harmful."""
    noises = [other for other in rows if other.is_noise and other.defence == row.defence and other.statistic("drop").n]
    return max(noises, key=lambda n: (budget(n) == budget(row), n.statistic("drop").mean), default=None)


def noise_bar(noise: Row) -> float | None:
    """What a drop must exceed: the noise's mean plus its std (0 for a single run)."""
    drop = noise.statistic("drop")
    return None if drop.mean is None else drop.mean + (drop.std or 0)


def alarmed_early(row: Row) -> list[Run]:
    """The runs in which a monitor raised an alarm before the trigger."""
    early = []
    for run in row.runs:
        first, steps = run.summary.get("first_alarm_step"), run.summary.get("steps")
        if isinstance(first, int) and isinstance(steps, int) and first <= steps:
            early.append(run)
    return early


def _equal_budget(rows: Sequence[Row]) -> str:
    return "as many hostile clients" if step_noun(rows) == "round" else "the same eps"


def _of(some: Sequence[Run], row: Row) -> str:
    return (
        f"{len(some)} of {counted(str(len(row.runs)), 'run')} ({'seed' if len(some) == 1 else 'seeds'} {seeds(some)})"
    )


def _attacking(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.attacking]


def _undefended(rows: Iterable[Row]) -> list[Row]:
    """Attacks without a defence, or under one where there is no such row: leaving no effect is a defence's success."""
    claiming = _claiming(rows)
    bare = {row.attack for row in claiming if row.defence_name == "none"}
    return [row for row in claiming if row.defence_name == "none" or row.attack not in bare]


def _claiming(rows: Iterable[Row]) -> list[Row]:
    """Attacks but for the noise, of which nobody claims a drop."""
    return [row for row in rows if row.attacking and not row.is_noise]
