import numpy as np

from mithridate.report.detectors import detectors
from mithridate.report.figures.score_distributions import BINS, FLOOR, bins, distributions
from mithridate.report.rows import Row
from mithridate.report.scores import ACCUMULATIVE, ScoredSamples


def test_distributions_show_each_detector_once(attacked: Row) -> None:
    panels = {panel.info.label: panel for panel in distributions(attacked, ACCUMULATIVE)}
    assert list(panels) == ["d6", "d10", "l6", "l10", "loss", "gda"]  # the latest, and the one at half of 12 epochs
    assert len(panels["gda"].scores.clean) == 3 * 3 * 4  # seeds, batches, samples
    assert panels["gda"].auroc.values == (1.0, 1.0, 1.0)
    assert set(panels["loss"].scores.poisoned) == {1.0}
    assert (panels["d6"].scores.poisoned > 0).all()


def test_bins_are_shared_and_logarithmic_where_nothing_is_negative(scored_rows: list[Row]) -> None:
    infos = {info.label: info for info in detectors(scored_rows)}
    spread = ScoredSamples(np.geomspace(1e-12, 1, 200), np.geomspace(1e-3, 10, 200), np.array([1e9]))
    edges = bins(infos["d2"], spread)
    assert (len(edges), edges[0]) == (BINS + 1, FLOOR)
    assert np.allclose(np.diff(np.log(edges)), np.log(edges[1] / edges[0]))
    assert 5 < edges[-1] < 10
    even = bins(infos["gda"], ScoredSamples(np.linspace(-9, 0, 200), np.linspace(-20, -5, 200), np.array([1e9])))
    assert np.allclose(np.diff(even), even[1] - even[0])
    assert (even[0] > -20, even[-1] < 0) == (True, True)
    assert (np.diff(bins(infos["gda"], ScoredSamples(np.ones(3), np.ones(3), np.empty(0)))) > 0).all()
    assert (np.diff(bins(infos["d2"], ScoredSamples(np.zeros(3), np.zeros(3), np.empty(0)))) > 0).all()
