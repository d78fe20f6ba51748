"""Numbers of a run by name: what tables, figures and checks of a reproduced item are about."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from mithridate.bench.store import Run
from mithridate.core.errors import ConfigError, nearest
from mithridate.report.detectors import DetectorInfo, detectors
from mithridate.report.figures.burn_in_curves import burn_in_curve
from mithridate.report.rows import Row
from mithridate.report.scores import (
    MOVED_NOW,
    MOVED_THEN,
    PHASES,
    finite_mean,
    mean_moved,
    quality,
    samples,
    samples_of,
)
from mithridate.report.steadiness import mean_accuracy
from mithridate.report.wording import number

Quantity = Callable[[Run, str], float | None]
"""(run, what stands behind the colon of its name) -> the number; None if the run has not got it."""


def _summary(key: str, scale: float = 1) -> Quantity:
    def of(run: Run, _: str) -> float | None:
        value = number(run.summary.get(key))
        return None if value is None else scale * value

    return of


def _phase_cost(run: Run, _: str) -> float | None:
    start, before = (number(run.summary.get(f"accuracy_{when}")) for when in ("start", "before_trigger"))
    return None if start is None or before is None else 100 * (start - before)


def _attack_success(run: Run, _: str) -> float | None:
    flagged = number(run.summary.get("flagged_poisoned"))
    return None if flagged is None else 100 * (1 - flagged)


def _mean_accuracy(run: Run, _: str) -> float | None:
    mean = mean_accuracy(run)
    return None if mean is None else 100 * mean


def _accuracy_at(run: Run, step: str) -> float | None:
    """After a step, or after a share of the steps that the run was given."""
    if step.endswith("%"):
        loop = run.config.get("federated") or run.config.get("run") or {}
        step = str(round(float(step[:-1]) / 100 * loop.get("rounds", loop.get("steps", 0))))
    value = _in_trace(run, f"accuracy:{step}")
    return None if value is None else 100 * value


def _in_trace(run: Run, what: str) -> float | None:
    """`COLUMN:K` of the trace: at step K, the last one, the trigger's, or the mean, median or largest of all steps."""
    column, _, place = what.partition(":")
    steps = run.trace[1:] if place in {"mean", "median", "max", "last"} else run.trace
    values = {int(step["step"]): value for step in steps if (value := number(step.get(column))) is not None}
    if not values:
        return None
    match place:
        case "mean" | "median":
            return (statistics.fmean if place == "mean" else statistics.median)(values.values())
        case "max":
            return max(values.values())
        case "last":
            return values[max(values)]
        case "trigger":
            fired = [int(step["step"]) for step in run.trace if step.get("phase") == "trigger"]
            return values.get(fired[0]) if fired else None
        case _ if place.isdecimal():
            return values.get(int(place))
    raise ConfigError(f"trace:{what}: say which step: a number, last, trigger, mean, median, max; as trace:loss:last.")


def _trace_column(column: str, place: str = "mean") -> Quantity:
    return lambda run, asked: _in_trace(run, f"{column}:{asked or place}")


def _burn_in_accuracy(run: Run, epoch: str) -> float | None:
    curve = burn_in_curve(run)
    return curve.get(max(curve) if epoch == "last" else int(epoch)) if curve else None


def _burn_in_best(run: Run, _: str) -> float | None:
    return max(burn_in_curve(run).values(), default=None)


QUANTITIES: Mapping[str, Quantity] = {
    "start": _summary("accuracy_start", 100),
    "before": _summary("accuracy_before_trigger", 100),
    "after": _summary("accuracy_after_trigger", 100),
    "drop": _summary("drop", 100),
    "change": _summary("drop", -100),
    "phase_cost": _phase_cost,
    "batches": _summary("steps"),
    "mean_accuracy": _mean_accuracy,
    "accuracy_at": _accuracy_at,
    "burn_in_accuracy": _burn_in_accuracy,
    "burn_in_best": _burn_in_best,
    "flagged_clean": _summary("flagged_clean", 100),
    "attack_success": _attack_success,
    "seconds": _trace_column("update_seconds", "median"),  # one step that another process delays counts little
    "craft_seconds": _trace_column("craft_seconds", "median"),
    "loss_at": _trace_column("loss"),
    "grad_norm_at": _trace_column("gradient_norm"),
    "update_norm_at": _trace_column("update_norm"),
    "trace": _in_trace,
    "summary": lambda run, key: number(run.summary.get(key)),
}
"""Of a run. Accuracies in percent, drops in points, times in seconds."""

OF_DETECTOR = {"auroc": 1, "auroc_ood": 1, "tpr_at_1": 100, "tpr_at_5": 100, "score_clean": 1, "score_poisoned": 1}
OF_DETECTOR |= {"score_ood": 1, "score_ratio": 1, "score_gap": 1, MOVED_NOW: 1, MOVED_THEN: 1, "score_clean_at": 1}
"""Of a detector of a run, and what they are multiplied by; behind the colon the phase, of `score_clean_at` the step.

`score_gap`: poisoned minus clean; `moved_now`, `moved_then`: how far poisoning moved answers, see `Discrepancy`."""


STEPS = "steps"
"""Where the mean score of each step's clean samples stands, beside the phases."""

QUALITIES = "detectors"
"""Where the summary of a record has what its detectors were worth, since it has no single scores."""


def check_measure(measure: str) -> None:
    """Refuse a measure that is not there.

    Args:
        measure: By name, with what stands behind its colon.

    Raises:
        ConfigError: There is none of that name, or no such phase.
    """
    name, _, what = measure.partition(":")
    if name not in {*QUANTITIES, *OF_DETECTOR}:
        raise ConfigError(f"unknown measure '{name}': {nearest(name, [*QUANTITIES, *OF_DETECTOR])}")
    if name in OF_DETECTOR and name != "score_clean_at" and what and what not in PHASES:
        raise ConfigError(f"{measure}: unknown phase '{what}': {nearest(what, PHASES)}")
    if name in {"accuracy_at", "trace", "summary", "burn_in_accuracy", "score_clean_at"} and not what:
        raise ConfigError(f"{measure}: say of what, as in accuracy_at:10, trace:loss:last or summary:alarms.")


def quantity(run: Run, measure: str, *, detector: str = "") -> float | None:
    """A number of a run.

    Args:
        run: A finished run.
        measure: By name, with what stands behind its colon.
        detector: Label of the detector that it is of, if it is of one; the only one if empty.

    Returns:
        None if the run has not got it.

    Raises:
        ConfigError: Unknown measure, or several detectors and none named.
    """
    check_measure(measure)
    name, _, what = measure.partition(":")
    if name in QUANTITIES:
        return QUANTITIES[name](run, what)
    recorded: Mapping[str, Any] = run.summary.get(QUALITIES) or {}
    of = recorded or _scored(run)
    if not detector and len(of) > 1:
        raise ConfigError(f"{len(of)} detectors scored {run.path.name}: say which by `detector = ...`.")
    label = next((label for label in of if detector in {"", label} or label.startswith(f"{detector}+")), None)
    if label is None:
        return None
    if name == "score_clean_at":
        return (recorded[label][STEPS] if recorded else _by_step(run, of[label])).get(what)
    phase = what or PHASES[-1]
    values = recorded[label][phase] if recorded else _of_phase(run, of[label], phase)
    value = values.get("ratio" if name == "score_ratio" else name)
    return None if value is None else OF_DETECTOR[name] * value


def qualities(run: Run) -> Mapping[str, Mapping[str, Mapping[str, float | None]]]:
    """What each detector of a run is worth, by label and phase; of a record, what was kept of that.

    Beside the phases stands the mean score of each step's clean samples. A discrepancy or a loss is stored as a score,
    whose low values are suspicious; here it has its own sign.
    """
    recorded: Mapping[str, Any] = run.summary.get(QUALITIES) or {}
    return recorded or {
        label: {phase: _of_phase(run, info, phase) for phase in PHASES} | {STEPS: _by_step(run, info)}
        for label, info in _scored(run).items()
    }


def _scored(run: Run) -> dict[str, DetectorInfo]:
    """The detectors that scored anything, by label."""
    return {info.label: info for info in detectors([Row("", "", "", "", (run,))])}


def _of_phase(run: Run, info: DetectorInfo, phase: str) -> dict[str, float | None]:
    values = quality(info, samples(run, info.key, phase))
    signed = {name: _sign(info) * v if v is not None and name.startswith("score_") else v for name, v in values.items()}
    clean, poisoned = signed["score_clean"], signed["score_poisoned"]
    gap = None if clean is None or poisoned is None else poisoned - clean
    moved = {which: mean_moved(run, info.key, which, phase) for which in (MOVED_NOW, MOVED_THEN)}
    return {**signed, "score_gap": gap, **moved}


def _by_step(run: Run, info: DetectorInfo) -> dict[str, float | None]:
    means = {str(s["step"]): finite_mean(samples_of(run, info.key, [int(s["step"])]).clean) for s in run.trace[1:]}
    return {step: None if mean is None else _sign(info) * mean for step, mean in means.items()}


def _sign(info: DetectorInfo) -> int:
    return -1 if info.is_discrepancy or info.is_loss else 1
