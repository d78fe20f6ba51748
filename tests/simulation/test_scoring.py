"""What is stored beside scores: how far poisoning moved the answers."""

import numpy as np

from mithridate.attacks.noise import Noise
from mithridate.detectors.discrepancy import Discrepancy
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.simulation.scoring import fit_scorers
from mithridate.testing import toy_learner, toy_stream


def test_moved_answers_are_stored_for_the_samples_that_were_poisoned_and_change_nothing() -> None:
    stream, run = toy_stream(), OnlineRun(steps=2, images=0)
    outcomes = []
    for moved in (False, True):
        learner = toy_learner(stream)
        scorers = fit_scorers({"d": Discrepancy(epoch=0, moved_answers=moved)}, learner, None, seed=0)
        attack = Noise(eps=0.2, poison_ratio=0.5)
        outcomes.append(run_online(learner, stream, attack, run, scorers=scorers))
    plain, beside = (outcome.scores for outcome in outcomes)
    scored = np.isin(beside["source"], ["clean", "received"])
    assert all(np.array_equal(plain[name], beside[name][scored]) for name in plain)
    assert [row["accuracy"] for row in outcomes[0].trace] == [row["accuracy"] for row in outcomes[1].trace]
    received = beside["source"] == "received"
    for name in ("moved_now", "moved_then"):
        mask = beside["source"] == name
        for column in ("step", "sample", "poisoned"):
            assert np.array_equal(beside[column][mask], beside[column][received])
        poisoned, distance = beside["poisoned"][mask], beside["score"][mask]
        assert 0 < poisoned.mean() < 1
        assert np.abs(distance[~poisoned]).max() < 1e-6
        assert distance[poisoned].mean() > 5 * np.abs(distance[~poisoned]).max()
