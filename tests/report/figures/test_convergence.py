from collections.abc import Callable

from mithridate.bench.store import Run
from mithridate.report.figures.convergence import convergence
from mithridate.report.rows import rows

Make = Callable[..., Run]


def test_convergence_needs_two_defences_and_no_attack(federated: Make) -> None:
    clean = [federated("clean", defence=d, after=after) for d, after in (("none", 0.97), ("narrow", 0.91))]
    drawing = convergence(rows(clean))
    assert drawing is not None
    assert "none: ends at 97.0 percent. narrow: ends at 91.0 percent." in drawing.alt
    assert convergence(rows([clean[0], federated(defence="narrow")])) is None


def test_convergence_follows_the_longest_federation(federated: Make) -> None:
    lengths = ((3, 0.5), (9, 0.97))
    clean = [federated("clean", defence=d, rounds=n, after=end) for d in ("none", "wide") for n, end in lengths]
    drawing = convergence(rows(clean))
    assert drawing is not None
    assert "50.0" not in drawing.alt
    assert drawing.alt.count("97.0") == 2
