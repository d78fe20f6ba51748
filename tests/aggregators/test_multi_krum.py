"""Multi-Krum averages what Krum ranks: more rows, less noise."""

import torch

from mithridate.aggregators.krum import Krum
from mithridate.aggregators.multi_krum import MultiKrum
from mithridate.testing.checks.aggregator import a_round, again


def test_keeping_one_is_krum() -> None:
    rows, context, _ = a_round(3)
    one = MultiKrum(hostile=4, keep=1).aggregate(rows, again(context))
    assert torch.equal(one, Krum(hostile=4).aggregate(rows, again(context)))


def test_the_mean_of_many_is_nearer_to_the_honest_mean_than_one_row() -> None:
    errors = []
    for seed in range(10):
        rows, context, _ = a_round(seed)
        rows[:5] = 1e30
        honest = rows[5:].mean(0)
        made = [rule.aggregate(rows, again(context)) for rule in (Krum(hostile=5), MultiKrum(hostile=5))]
        errors.append([float((point - honest).norm()) for point in made])
    krum, multi = torch.tensor(errors).mean(0).tolist()
    assert multi < 1e-6 < krum  # all 19 honest rows are kept
