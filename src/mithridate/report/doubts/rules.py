"""The rules by which a report doubts itself, in the order in which it names doubts of equal severity.

A rule is a pure function from rows that are compared with each other (same data set and model) to its doubts, each with
its numbers; the first line of its docstring stands in the report. Rules about what attacks did skip the controls,
`clean` and `noise`: nobody claims a drop for those.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from operator import sub

from mithridate.bench.store import Run
from mithridate.report.comparisons import BUDGET_KEYS, FEDERATED_BUDGET_KEYS, budget, noise_bar, noise_of, undefended
from mithridate.report.doubts.doubt import ALL_CELLS, Doubt, Severity
from mithridate.report.rows import Row, seed, seeds, step_noun, updates
from mithridate.report.settings import config_table, flattened, shared, varying
from mithridate.report.statistic import Statistic, spread
from mithridate.report.wording import counted, listed, noun_of, number, one_line, points

Rule = Callable[[Sequence[Row]], list[Doubt]]

RULES: dict[str, Rule] = {}
"""Every rule by its title."""

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

ALL_CORRECTED = 0.95
"""A defence that corrects at least this share of clean samples does not choose which."""

CALIBRATION_FACTOR = 2.0
"""How far outside its confidence interval the share that a measured threshold corrects on a clean stream may lie: from
half the lower to twice the upper end, since the interval takes samples for independent and is of an undefended copy."""

ROUNDING = 1e-4
"""How far beyond its eps a pixel may lie by rounding in single precision, or in half."""

NOT_OF_THE_MACHINE = ("cpus", "burn_in", "resumed")
"""The entries of `environment.json` that are no difference between machines: how many cores there are, and what was
another within one run, of which there is a rule of its own."""


def _rule(title: str) -> Callable[[Callable[[Sequence[Row]], Iterable[Doubt]]], Rule]:
    """Adds a rule to `RULES`."""

    def add(find: Callable[[Sequence[Row]], Iterable[Doubt]]) -> Rule:
        @wraps(find)
        def rule(rows: Sequence[Row]) -> list[Doubt]:
            return list(find(rows))

        RULES[title] = rule
        return rule

    return add


@_rule("No better than noise")
def no_better_than_noise(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks whose mean drop is not above the mean plus one std of random noise under the same defence."""
    for row in _unopposed(rows):
        drop, noise, bar = row.statistic("drop"), noise_of(row, rows), noise_bar(row, rows)
        if drop.mean is not None and noise is not None and bar is not None and drop.mean <= bar:
            text = f"drop {spread(drop)} points, noise {spread(noise.statistic('drop'))} points: no better than noise."
            yield Doubt(Severity.SERIOUS, row.cell, text)


@_rule("Phase of 0 batches")
def no_phase(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks that have a phase before their trigger, and were given or took no step for it."""
    for row in _claiming(rows):
        empty = [run for run in row.runs if run.summary.get("phase_asked") and run.summary.get("steps") == 0]
        if empty:
            text = (
                f"phase of {counted(0, step_noun([row]))} in {_of(empty, row)}, although the attack has one: what is "
                "shown is its trigger alone."
            )
            yield Doubt(Severity.SERIOUS, row.cell, text)


@_rule("Floor above the start")
def floor_above_start(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks whose accuracy floor lies above the start accuracy, so that their phase ends after one step."""
    for row in _claiming(rows):
        tables = (row.attack_settings, row.attack_settings.get("inner", {}))  # the latter is that of `gate_aware`
        floor = next((f for table in tables if (f := number(table.get("accuracy_floor"))) is not None), None)
        start = row.statistic("accuracy_start").mean
        if floor is not None and start is not None and floor > start:
            text = (
                f"the phase ends below {points(floor)} %, and the model starts at {points(start)} %: it ends after one "
                f"{step_noun([row])}, whatever that does; take max_drop, which counts from the start."
            )
            yield Doubt(Severity.SERIOUS, row.cell, text)


@_rule("Lost before the trigger")
def early_loss(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks that cost more than 5 points before the trigger, or at least as much as the trigger itself."""
    for row in _claiming(rows):
        before = row.difference("accuracy_start", "accuracy_before_trigger").mean
        drop = row.statistic("drop").mean
        if before is None or before < NEGLIGIBLE:
            continue
        lost = f"{points(before)} points were"
        if drop is not None and before >= drop:
            text = f"{lost} lost before the trigger and {points(drop)} in its step: not one {step_noun([row])}'s work."
            yield Doubt(Severity.SERIOUS, row.cell, text)
        elif before > QUIET_POINTS:
            text = f"{lost} lost before the trigger; a phase is called quiet up to {points(QUIET_POINTS)}."
            yield Doubt(Severity.CAUTION, row.cell, text)


@_rule("Explained by BatchNorm statistics")
def buffers_explain(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for drops of which BatchNorm statistics alone explain half: buffers replaced, parameters as before."""
    for row in _claiming(rows):
        lost = row.difference("accuracy_before_trigger", "accuracy_after_buffers").mean
        drop = row.statistic("drop").mean
        if lost is not None and drop is not None and drop > NEGLIGIBLE and lost >= BUFFER_SHARE * drop:
            text = (
                f"replacing only the buffers (BatchNorm statistics) costs {points(lost)} of the {points(drop)} points; "
                "the poisoned update of the parameters is not what broke the model."
            )
            yield Doubt(Severity.SERIOUS, row.cell, text)


@_rule("Diverged")
def diverged(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for runs whose loss became NaN: a collapse of training, which counts in the means."""
    for row in rows:
        if runs := row.with_status("diverged"):
            text = f"{_of(runs, row)} diverged; the accuracies as measured count in the means."
            yield Doubt(Severity.SERIOUS, row.cell, text)


@_rule("Halted before the trigger")
def halted(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for runs that a monitor stopped before the trigger: they have no drop, and the others are a selection."""
    for row in rows:
        if runs := row.with_status("halted"):
            n = row.statistic("drop").n
            drop = f"that of the other {n}" if n else "unknown"
            text = f"{_of(runs, row)} halted before the trigger; the drop is {drop}."
            yield Doubt(Severity.CAUTION, row.cell, text)


@_rule("Shown apart")
def settings_apart(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for runs of the same labels that differ in more than the seed: they are shown apart, and are not pooled."""
    for key in rows[0].apart if rows else ():
        values = list(dict.fromkeys(row.apart[key] for row in rows))
        if len(values) > 1:
            text = f"runs of the same name differ in {key} ({' | '.join(values)}); each value has rows of its own."
            yield Doubt(Severity.NOTE, ALL_CELLS, text)


@_rule("Same seed twice")
def duplicate_seeds(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for a seed that occurs twice in one cell: such runs are not independent, yet count in n."""
    for row in rows:
        twice = [str(s) for s, times in Counter(map(seed, row.runs)).items() if s is not None and times > 1]
        if twice:
            text = f"{len(row.runs)} runs, but seed {listed(twice)} more than once; n and ± are too favourable."
            yield Doubt(Severity.SERIOUS, row.cell, text)


@_rule("Too few seeds")
def few_seeds(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for cells with fewer than 3 different seeds; with one seed there is no spread at all."""
    cells: dict[tuple[int, str], list[str]] = {}
    for row in rows:
        n = len({seed(run) for run in row.runs})
        if n < MIN_SEEDS:
            cells.setdefault((n, seeds(row.runs)), []).append(row.cell)
    for (n, which), few in cells.items():
        where = ALL_CELLS if len(few) == len(rows) > 1 else ", ".join(few)
        text = f"{counted(n, 'seed')} ({which}); at least {MIN_SEEDS} are needed to see a spread."
        yield Doubt(Severity.SERIOUS if n == 1 else Severity.CAUTION, where, text)


@_rule("Few test samples")
def few_test_samples(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for test parts so small that a single sample is more than one point of accuracy."""
    sizes = {number(config_table(run, "data").get("test")) for row in rows for run in row.runs} - {None}
    for size in sorted(size for size in sizes if size is not None and 0 < size * NEGLIGIBLE < 1):
        text = f"accuracy is measured on {counted(int(size), 'sample')}: each is {points(1 / size)} points."
        yield Doubt(Severity.CAUTION, ALL_CELLS, text)


@_rule("Includes zero")
def includes_zero(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks whose drop, mean ± std over seeds, includes zero."""
    for row in _unopposed(rows):
        drop = row.statistic("drop")
        if drop.mean is not None and drop.std is not None and drop.mean - drop.std <= 0 <= drop.mean + drop.std:
            text = f"drop {spread(drop)} points (n = {drop.n}) includes zero: no effect that these seeds can show."
            yield Doubt(Severity.CAUTION, row.cell, text)


@_rule("Not quiet")
def alarms_before_trigger(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for monitors that raised an alarm before the trigger of an attack: the phase was not quiet."""
    for row in rows:
        if row.claims_drop and (early := row.alarmed_early()):
            text = f"a monitor raised an alarm before the trigger in {_of(early, row)}."
            yield Doubt(Severity.CAUTION, row.cell, text)


@_rule("Corrects everything or nothing")
def chooses_nothing(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for defences that correct nearly all clean samples, no poisoned ones, or no more of those than of clean."""
    for defence in dict.fromkeys(row.defence for row in rows):
        cells = [row for row in rows if row.defence == defence]
        clean = [row for row in cells if not row.attacking and row.statistic("flagged_clean").n]
        stream = max(clean, key=lambda row: row.mean_steps, default=None)
        of_clean = None if stream is None else stream.statistic("flagged_clean").mean
        attacked = [(r, share) for r in _claiming(cells) if (share := r.statistic("flagged_poisoned").mean) is not None]
        if stream is not None and of_clean is not None and of_clean >= ALL_CORRECTED:
            poisoned = listed([f"{points(share)} % of those that {row.attack} poisoned" for row, share in attacked])
            text = (
                f"corrects {points(of_clean)} % of clean samples{f' and {poisoned}' if poisoned else ''}: it takes "
                "everything for poison, so a low attack success says nothing about its threshold."
            )
            yield Doubt(Severity.CAUTION, stream.cell, text)
            continue
        beside = "" if of_clean is None else f", of clean ones on a clean stream {points(of_clean)} %"
        for row, share in attacked:
            if share == 0:
                text = f"corrects 0.0 % of the poisoned samples{beside}: its threshold let everything pass."
                yield Doubt(Severity.SERIOUS, row.cell, text)
            elif of_clean is not None and share <= of_clean:
                text = (
                    f"corrects {points(share)} % of the poisoned samples{beside}: no more of the one than of the other."
                )
                yield Doubt(Severity.CAUTION, row.cell, text)


@_rule("Threshold off its calibration")
def calibration_missed(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for measured thresholds that correct another share of a clean stream than twice around their interval."""
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
            yield Doubt(Severity.CAUTION, row.cell, text)


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


@_rule("False alarms")
def false_alarms(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for monitors that raise alarms although nothing is attacked: their alarms elsewhere mean less."""
    for row in rows:
        alarmed = [run for run in row.runs if run.summary.get("alarms")]
        if not row.attacking and alarmed:
            text = f"alarms without an attack in {_of(alarmed, row)}."
            yield Doubt(Severity.CAUTION, row.cell, text)


@_rule("False vetoes")
def false_vetoes(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for defences that refuse steps although nothing is attacked: so many batches are not learned from."""
    for row in rows:
        refusing = _with(row, "rolled_back")
        if not row.attacking and refusing:
            refused, total = sum(row.statistic("rolled_back").values), sum(map(updates, row.runs))
            text = f"{refused:g} of {total} steps of a clean stream were refused, in {_of(refusing, row)}."
            yield Doubt(Severity.CAUTION, row.cell, text)


@_rule("Costs accuracy on a clean stream")
def costs_on_clean(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for defences that end a clean stream more than one point below the undefended runs of the same seeds."""
    for row in rows:
        none = undefended(row, rows)
        if row.attacking or none is None:
            continue
        change = row.against(none, "accuracy_after_trigger", sub)
        if change.mean is not None and change.mean < -NEGLIGIBLE:
            cost = Statistic(tuple(-value for value in change.values))
            text = f"costs {spread(cost)} points (n = {cost.n}) of accuracy although nothing is attacked."
            yield Doubt(Severity.CAUTION, row.cell, text)


@_rule("Quarantined samples")
def quarantined(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for samples, or clients' updates, with NaN or infinite numbers: the model learned from fewer."""
    for row in rows:
        if runs := _with(row, "quarantined"):
            n = f"{sum(row.statistic('quarantined').values):g}"
            what = f"{counted(n, 'update')} of clients" if row.federated else counted(n, "sample")
            numbers = "entries" if row.federated else "pixels"
            text = f"{what} with NaN or infinite {numbers} kept from the model in {_of(runs, row)}."
            yield Doubt(Severity.NOTE, row.cell, text)


@_rule("No noise baseline")
def no_noise_baseline(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for defences under which no random noise was run: nothing says that the attack is more than that."""
    without: dict[str, list[str]] = {}
    claiming = _claiming(rows)
    for defence in dict.fromkeys(row.defence for row in claiming):
        attacks = [row for row in claiming if row.defence == defence]
        if noise_of(attacks[0], rows) is None:
            without.setdefault(listed([row.attack for row in attacks]), []).append(defence)
    equal = "as many hostile clients" if step_noun(rows) == "round" else "the same eps"
    for names, defences in without.items():
        text = f"no noise baseline for {names}; add the attack noise with {equal}."
        yield Doubt(Severity.CAUTION, f"{noun_of(len(defences), 'defence')} {listed(defences)}", text)


@_rule("Unequal starts")
def starts_differ(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for cells that are compared although their mean start accuracies differ by more than one point."""
    starts = {row.cell: start for row in rows if (start := row.statistic("accuracy_start").mean) is not None}
    if not starts:
        return
    low, high = min(starts, key=starts.__getitem__), max(starts, key=starts.__getitem__)
    if starts[high] - starts[low] > START_POINTS:
        text = (
            f"start accuracies span {points(starts[low])} % ({low}) to {points(starts[high])} % ({high}): "
            "drops of unlike models are compared."
        )
        yield Doubt(Severity.CAUTION, ALL_CELLS, text)


@_rule("Unequal budgets")
def budgets_differ(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks with different budgets (eps, norm, poison ratio, the trigger's length) side by side."""
    for key in dict.fromkeys((*BUDGET_KEYS, *FEDERATED_BUDGET_KEYS)):
        cells: dict[str, list[str]] = {}
        for row in rows:
            for value in budget(row).get(key, ()) if row.attacking else ():
                cells.setdefault(value, []).append(row.attack)
        if len(cells) > 1:
            each = "; ".join(f"{value}: {', '.join(dict.fromkeys(attacks))}" for value, attacks in cells.items())
            yield Doubt(Severity.CAUTION, ALL_CELLS, f"{key} differs ({each}); a larger budget breaks more.")


@_rule("Left its ball")
def left_its_ball(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks that moved a pixel further than their eps, as the released trigger does, whose ball drifts."""
    for row in rows:
        eps = number(row.attack_settings.get("eps"))
        moved = [c for run in row.runs for step in run.trace if (c := number(step.get("poison_linf"))) is not None]
        if row.attacking and eps is not None and moved and max(moved) > eps * (1 + ROUNDING) + ROUNDING:
            text = (
                f"a pixel was moved by {max(moved):.3g}, and eps is {eps:.3g}: no attack that keeps to it is its like."
            )
            yield Doubt(Severity.CAUTION, row.cell, text)


@_rule("Unequal machines")
def versions_mixed(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for different versions or devices behind results that are compared."""
    runs = [run for row in rows for run in row.runs]
    tables = [
        flattened({key: value for key, value in run.environment.items() if key not in NOT_OF_THE_MACHINE})
        for run in runs
    ]
    if mixed := varying(tables, shared(tables)):
        text = "; ".join(f"{key}: {values}" for key, values in mixed.items())
        yield Doubt(Severity.CAUTION, ALL_CELLS, f"the runs were made with unlike software or hardware: {text}.")


@_rule("Made in two places")
def made_in_two_places(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for runs whose burn-in or first part was made by other software, threads or hardware than the rest."""
    for what, key in (("started from a burn-in", "burn_in"), ("went on with a part", "resumed")):
        changed = {id(run): _changed_environment(run.environment.get(key)) for row in rows for run in row.runs}
        for row in rows:
            some = [run for run in row.runs if changed[id(run)]]
            if some:
                names = listed(list(dict.fromkeys(name for run in some for name in changed[id(run)])))
                text = f"{_of(some, row)} {what} of another environment ({names}): their bits are of no one machine."
                yield Doubt(Severity.CAUTION, row.cell, text)


def _changed_environment(entry: object) -> list[str]:
    """What differed, as `key: here, there`."""
    tables = entry if isinstance(entry, list) else [entry]
    return [
        f"{one_line(key)}: {one_line(value)}"
        for table in tables
        if isinstance(table, Mapping)
        for key, value in table.items()
        if key != "after_step"
    ]


@_rule("Power over the optimiser")
def power_over_optimiser(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks that set the victim's momentum: power over the optimiser, which data alone does not give."""
    for row in rows:
        momenta = {flattened(run.config).get("attack.weight_momentum") for run in row.runs} - {None}
        if row.attacking and momenta:
            values = listed(sorted(map(str, momenta)))
            text = f"the attack sets the victim's momentum to {values} in the accumulative phase."
            yield Doubt(Severity.NOTE, row.cell, text)


def _of(some: Sequence[Run], row: Row) -> str:
    return f"{len(some)} of {counted(len(row.runs), 'run')} ({noun_of(len(some), 'seed')} {seeds(some)})"


def _with(row: Row, metric: str) -> list[Run]:
    """The runs whose summary counts at least one of `metric`."""
    return [run for run in row.runs if number(run.summary.get(metric))]


def _claiming(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.claims_drop]


def _unopposed(rows: Iterable[Row]) -> list[Row]:
    """Undefended attacks, and defended ones that were not run undefended: where both are, the defended one may fail."""
    claiming = _claiming(rows)
    bare = {row.attack for row in claiming if row.defence_name == "none"}
    return [row for row in claiming if row.defence_name == "none" or row.attack not in bare]
