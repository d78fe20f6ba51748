"""What detectors are shown of a model, and what a detector that fits nothing remembers."""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from mithridate.core.batch import Batch
from mithridate.core.view import Need, View
from mithridate.core.watch import Detector, Monitor, Observed


def test_what_is_right_is_what_is_classified_as_labelled() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    seen = Observed(torch.arange(6.0).view(3, 2), logits, torch.tensor([0, 0, 0]))
    assert seen.predicted.tolist() == [0, 1, 0]
    right = seen.right()
    assert right.features.tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert torch.equal(right.logits, logits[[0, 2]])
    assert right.y.tolist() == [0, 0]


def test_an_author_of_a_detector_writes_the_score_alone() -> None:
    class Brightness(Detector):
        def score(self, batch: Batch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
            return -batch.x.flatten(1).mean(1)

    detector = Brightness()
    seen = Observed(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    assert detector.fit(seen, rng=Generator()) == {}
    assert (detector.needs, detector.lookback, detector.fits) == (frozenset({Need.MODEL}), 0, True)
    assert Detector.__abstractmethods__ == {"score"}
    assert Monitor.__abstractmethods__ == {"alarm"}
