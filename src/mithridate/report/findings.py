"""What the data says in words: a headline only as strong as the results behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import sub

from mithridate.bench.store import Run
from mithridate.report.comparisons import budget, noise_bar, noise_of, undefended
from mithridate.report.rows import Row, groups, seed, seeds, step_noun
from mithridate.report.settings import flattened, shared
from mithridate.report.statistic import Statistic, spread
from mithridate.report.steadiness import is_quiet, quiet_limit
from mithridate.report.wording import counted, decimal, listed, noun_of, number, out_of, points, span


@dataclass(frozen=True)
class KeyNumber:
    """A number that is seen before anything is read.

    Args:
        value: With its unit.
        says: What it is the number of.
    """

    value: str
    says: str


@dataclass(frozen=True)
class Finding:
    """What one group of rows shows.

    Args:
        subject: Model and data set.
        setting: What was attacked, one or two sentences.
        headline: The result in one sentence.
        details: Further sentences: the baselines, the defences.
        numbers: At most two: what the attack cost, and what is to be held against it.
        group: Data set and model, as `Row.group` has them.
    """

    subject: str
    setting: str
    headline: str
    details: tuple[str, ...]
    numbers: tuple[KeyNumber, ...]
    group: tuple[str, str]


def findings(rows: Sequence[Row]) -> list[Finding]:
    """One finding a group of comparable rows."""
    return [
        Finding(members[0].subject, setting(members), *headline(members), key_numbers(members), group)
        for group, members in groups(rows).items()
    ]


def setting(rows: Sequence[Row]) -> str:
    """What was attacked, from the settings and from what the runs measured.

    Args:
        rows: Rows of one data set and model.
    """
    runs = [run for row in rows for run in row.runs]
    settings = shared([flattened(run.config) for run in runs])
    epochs = settings.get("burn_in.epochs")
    burn_in = f" after a burn-in of {counted(epochs, 'epoch')}" if epochs else ""
    attacks = list(dict.fromkeys(row.attack for row in rows if row.attacking))
    defences = list(dict.fromkeys(row.defence for row in rows))
    by_seed = {seed(run): run for run in runs}
    all_seeds = f"{noun_of(len(by_seed), 'seed')} {seeds(by_seed.values())}"
    changes = [c for run in runs for step in run.trace if (c := number(step.get("poison_linf"))) is not None]
    largest = (
        f" No pixel was moved by more than {decimal(max(changes), 3)} of its range [0, 1]." if any(changes) else ""
    )
    against = f"was attacked by {listed(attacks)}" if attacks else "was not attacked"
    return (
        f"{_learning(rows, settings)}{burn_in} {against}, "
        f"under the {noun_of(len(defences), 'defence')} {listed(defences)}: "
        f"{counted(len(runs), 'run')}, {all_seeds}.{largest}{_hostile(rows)}{_read(runs)}"
    )


def _learning(rows: Sequence[Row], settings: Mapping[str, str]) -> str:
    """The model and what it learns from."""
    if step_noun(rows) != "round":
        return f"A {rows[0].model} that keeps learning from a stream of {rows[0].dataset}"
    clients, some = settings.get("clients.clients"), settings.get("federated.per_round")
    who = counted(clients, "client") if clients else "clients"
    each = f" ({some} a round)" if some else ""
    return f"A {rows[0].model} that keeps learning from {who}{each} with images of {rows[0].dataset}"


def _hostile(rows: Sequence[Row]) -> str:
    """How many clients of a federation were hostile at most; nothing of online runs."""
    traces = [run.trace for row in rows if row.federated for run in row.runs]
    shares = [share for trace in traces for step in trace if (share := number(step.get("poisoned")))]
    return f" In attacked rounds, up to {points(max(shares))} % of the clients were hostile." if shares else ""


def _read(runs: Sequence[Run]) -> str:
    """On how many test samples attackers and monitors had read accuracy; nothing where it was always on all of them."""
    sizes = [(number(run.summary.get("read_samples")), number(run.trace[0].get("test_samples"))) for run in runs]
    subsets = [f"{some:,} of {whole:,}" for some, whole in sizes if some is not None and whole and some < whole]
    if not subsets:
        return ""
    where = "" if len(subsets) == len(runs) else f" in {len(subsets)} of {counted(len(runs), 'run')}"
    sizes_read = listed(list(dict.fromkeys(subsets)))
    return (
        f" What attackers and monitors had read when a phase ended is accuracy on {sizes_read} test samples{where}; "
        "the results are of all."
    )


def headline(rows: Sequence[Row]) -> tuple[str, tuple[str, ...]]:
    """The strongest claim that the rows support, and what belongs beside it.

    An attack is said to have cost something only if its mean drop is above zero by more than one std over seeds and
    above the mean plus one std of noise under the same defence; the phase is called quiet only if it lost no more than
    a clean stream does by itself and no monitor raised an alarm in it.

    Args:
        rows: Rows of one data set and model.
    """
    bare = _undefended(rows)
    best = strongest(rows)
    if best is None:
        attacked = any(row.claims_drop for row in bare)
        return ("No attack reached its trigger." if attacked else _without_attack(bare)), ()
    if not _supported(best, rows):
        return (
            f"No attack is shown to work: the largest drop in a trigger step is {_cost(best)}, by {best.attack}, "
            "and neither chance nor noise is excluded.",
            _defended(best, rows),
        )
    under = "" if best.defence_name == "none" else f" under {best.defence}"
    noun = step_noun([best])
    what = f"One {noun}" if best.poisons_trigger else f"One unpoisoned {noun}"
    alone = _alone(best, bare)
    if not best.poisons_before_trigger:
        return f"{what} alone cost {_cost(best)}{under} ({best.attack}).", _beside(best, bare) + _defended(best, rows)
    sentence = f"{what} cost {_cost(best)}{under} {_phase(best, rows)}"
    if alone is not None:
        same = f"the same kind of {noun}" if _same_kind(best, alone) else f"a {noun}"
        sentence += f"; {same} alone ({alone.attack}) {_effect(alone)}"
    return f"{sentence}.", (f"The attack is {best.attack}.", *_beside(best, bare), *_defended(best, rows))


def key_numbers(rows: Sequence[Row]) -> tuple[KeyNumber, ...]:
    """What the strongest attack cost in its trigger step, and beside it the first of these that there is.

    The same kind of trigger without a phase, random noise, a step that nobody attacks.

    Args:
        rows: Rows of one data set and model.
    """
    bare, best = _undefended(rows), strongest(rows)
    if best is None:
        return tuple(
            _key_number(row, f"in the trigger step of {row.attack}") for row in bare if row.statistic("drop").n
        )[:2]
    noun = step_noun([best])
    alone = _alone(best, bare) if best.poisons_before_trigger else None
    clean = _clean(bare)
    shown = "" if _supported(best, rows) else ", not shown to be more than chance or noise"
    numbers = [_key_number(best, f"in one {noun} of {best.attack}{shown}")]
    if alone is not None:
        numbers.append(_key_number(alone, f"in such a {noun} alone ({alone.attack})"))
    elif (control := noise_of(best, bare) or clean) is not None and control.statistic("drop").n:
        numbers.append(_key_number(control, f"in a {noun} of {control.attack}"))
    return tuple(numbers)


def _key_number(row: Row, where: str) -> KeyNumber:
    drop = row.statistic("drop").mean or 0
    return KeyNumber(f"{points(abs(drop))} points", f"{'gained' if drop < 0 else 'lost'} {where}, {_n(row)}")


def strongest(rows: Sequence[Row]) -> Row | None:
    """The attack on no defence with the largest mean drop, those shown to work first; None if there is no drop.

    Args:
        rows: Rows of one data set and model.
    """
    tried = [row for row in _undefended(rows) if row.claims_drop and row.statistic("drop").n]
    return max(tried, key=lambda row: (_supported(row, rows), row.statistic("drop").mean or 0), default=None)


def _undefended(rows: Sequence[Row]) -> list[Row]:
    """The undefended rows; where everything is defended, those of the first defence."""
    return [row for row in rows if row.defence_name == "none"] or [r for r in rows if r.defence == rows[0].defence]


def _clean(rows: Sequence[Row]) -> Row | None:
    """The first clean stream that took its trigger step."""
    return next((row for row in rows if not row.attacking and row.statistic("drop").n), None)


def _cost(row: Row) -> str:
    return f"{points(row.statistic('drop').mean or 0)} points ({_n(row)})"


def _effect(row: Row) -> str:
    drop = row.statistic("drop").mean or 0
    return f"gained {points(-drop)} points ({_n(row)})" if drop < 0 else f"cost {_cost(row)}"


def _n(row: Row) -> str:
    return f"n = {out_of(row.statistic('drop').n, len(row.runs))}"


def _supported(row: Row, rows: Sequence[Row]) -> bool:
    drop, bar = row.statistic("drop"), noise_bar(row, rows)
    return drop.mean is not None and drop.mean - (drop.std or 0) > 0 and (bar is None or drop.mean > bar)


def _phase(row: Row, rows: Sequence[Row]) -> str:
    length = counted(span(row.statistic("steps").values), step_noun([row]))
    lost = row.difference("accuracy_start", "accuracy_before_trigger").mean
    alarmed = row.alarmed_early()
    limit, _ = quiet_limit(row, rows)
    if is_quiet(row, rows):
        return f"after a quiet phase of {length}"
    noted = ["had a cost that was not measured"] if lost is None else []
    noted += [f"had already cost {points(lost)} points"] if lost is not None and lost > limit else []
    noted += [f"raised alarms in {len(alarmed)} of {counted(len(row.runs), 'run')}"] if alarmed else []
    return f"after a phase of {length} that {listed(noted)}"


def _alone(best: Row, rows: Sequence[Row]) -> Row | None:
    """The row of a trigger without a poisoned phase: equal budget first, then the same attack or another alone."""
    if not best.poisons_trigger:
        return _clean(rows)
    alone = [row for row in rows if row.claims_drop and row.poisons_trigger and not row.poisons_before_trigger]
    return max(
        (row for row in alone if row.statistic("drop").n),
        key=lambda row: (
            _same_kind(best, row),
            row.attack_name in {best.attack_name, "vanilla", "direct"},
            row.statistic("drop").mean,
        ),
        default=None,
    )


def _same_kind(best: Row, alone: Row) -> bool:
    return not alone.attacking or budget(best) == budget(alone)


def _beside(best: Row, undefended: Sequence[Row]) -> tuple[str, ...]:
    """The controls: noise, and no attack at all."""
    noise = noise_of(best, undefended)
    clean = _clean(undefended)
    return (
        *([f"Random noise{_called(noise)} {_effect(noise)}."] if noise is not None else []),
        *([f"Without an attack{_called(clean)} the trigger step {_effect(clean)}."] if clean is not None else []),
    )


def _called(row: Row) -> str:
    return "" if row.attack == row.attack_name else f" ({row.attack})"


def _defended(best: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    """Sentences on the attack under the other defences, each beside what its defence does to a clean stream."""
    sentences = []
    for row in rows:
        if row.attack != best.attack or row.defence == best.defence:
            continue
        stopped = len(row.with_status("halted"))
        drop = row.statistic("drop")
        cost = f"it cost {spread(drop)} points ({_n(row)})" if drop.n else "it did not reach its trigger"
        total = counted(len(row.runs), "run")
        halted = f"; a monitor stopped {stopped} of {total} before the trigger" if stopped else ""
        sentences.append(f"Under {row.defence} {cost}{_ends(row, rows)}{halted}.")
    return tuple(sentences)


def _ends(row: Row, rows: Sequence[Row]) -> str:
    """Where a defended model ended, beside the end of a clean stream under the same defence, if there is one."""
    final = "accuracy_after_trigger"
    under = [r for r in rows if r.defence == row.defence and not r.attacking and r.has_phase and r.statistic(final).n]
    if not under or not row.statistic(final).n:
        return ""
    clean = max(under, key=lambda r: r.mean_steps)
    none = undefended(clean, rows)
    change = Statistic() if none is None else clean.against(none, final, sub)
    return f" and left {spread(row.statistic(final))} %; a clean stream left {spread(clean.statistic(final))} %" + (
        f", {_changed(change)}" if change.n else ""
    )


def _changed(change: Statistic) -> str:
    """A difference to no defence, and whether the seeds can show it."""
    mean, std = change.mean or 0, change.std
    if all(points(abs(value)) == "0.0" for value in change.values):
        return f"as without a defence (n = {change.n})"
    if std is None:
        shown = "one seed"
    else:
        shown = f"n = {change.n}" if abs(mean) > std else f"n = {change.n}, within its spread"
    size = Statistic(tuple(value if mean >= 0 else -value for value in change.values))
    where = "above" if mean >= 0 else "below"
    return f"{spread(size)} points {where} no defence ({shown})"


def _without_attack(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row.statistic("drop").n]
    if not measured:
        return "Nothing was attacked, and no run reached its trigger step."
    effects = listed([f"{_effect(row)} ({row.attack})" for row in measured])
    return f"There is no attack in these runs to judge; the trigger step {effects}."
