"""Every result of one quantity in one cell, and how its mean and spread are written."""

import statistics
from dataclasses import dataclass
from math import floor, log10

from mithridate.report.wording import with_spread


@dataclass(frozen=True)
class Statistic:
    """All results of one quantity in one cell.

    Args:
        values: One number a run that has it.
    """

    values: tuple[float, ...] = ()

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


def spread(statistic: Statistic) -> str:
    """Mean and standard deviation of fractions, in percent or points.

    >>> spread(Statistic((0.1, 0.2))), spread(Statistic((0.1,))), spread(Statistic(()))
    ('15.0 ± 7.1', '10.0', '—')
    """
    return with_spread(statistic.mean, statistic.std, scale=100)


def signed(statistic: Statistic) -> str:
    """A difference of fractions in points, with its sign.

    >>> signed(Statistic((0.01, 0.03))), signed(Statistic((-0.02,))), signed(Statistic(()))
    ('+2.0 ± 1.4', '-2.0', '—')
    """
    written = spread(statistic)
    return written if statistic.mean is None or written.startswith(("-", "0.0")) else f"+{written}"


def times(statistic: Statistic) -> str:
    """A ratio with its spread.

    >>> times(Statistic((1.5, 2.5))), times(Statistic(()))
    ('2.0 ± 0.7', '—')
    """
    return with_spread(statistic.mean, statistic.std)


def seconds(statistic: Statistic) -> str:
    """A time: two significant digits of the mean, as many decimals of the spread.

    >>> seconds(Statistic((0.004, 0.006))), seconds(Statistic((12.0,)))
    ('0.0050 ± 0.0014', '12')
    """
    mean = statistic.mean or 0
    digits = max(0, 1 - floor(log10(mean))) if mean > 0 else 1
    return with_spread(statistic.mean, statistic.std, digits)
