"""Doubts about a defence's threshold: whether it tells poisoned samples from clean ones."""

from collections.abc import Iterator, Mapping, Sequence

from mithridate.bench.store import Run
from mithridate.report.doubts.doubt import Doubt, Severity
from mithridate.report.doubts.rule import rule
from mithridate.report.doubts.selection import claiming_rows, share_of_runs
from mithridate.report.rows import Row
from mithridate.report.wording import listed, number, points

ALL_CORRECTED = 0.95
"""A defence that corrects at least this share of clean samples does not choose which."""

CALIBRATION_FACTOR = 2.0
"""How far outside its confidence interval the share that a measured threshold corrects on a clean stream may lie: from
half the lower to twice the upper end, since the interval takes samples for independent and is of an undefended copy."""


@rule("Corrects everything or nothing")
def chooses_nothing(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for defences that correct nearly all clean samples, no poisoned ones, or no more of those than of clean."""
    for defence in dict.fromkeys(row.defence for row in rows):
        cells = [row for row in rows if row.defence == defence]
        clean = [row for row in cells if not row.attacking and row.statistic("flagged_clean").n]
        stream = max(clean, key=lambda row: row.mean_steps, default=None)
        of_clean = None if stream is None else stream.statistic("flagged_clean").mean
        attacked = [
            (r, share) for r in claiming_rows(cells) if (share := r.statistic("flagged_poisoned").mean) is not None
        ]
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


@rule("Threshold off its calibration")
def calibration_missed(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for measured thresholds that correct under half, or over twice, the share that they were measured for."""
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
            text = f"corrects {each} of a clean stream in {share_of_runs([run for run, *_ in missed], row)}."
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
