"""Fronts in front of fronts: notes do not mix, and what is inside is asked."""

import torch

from mithridate.aggregators.bucketing import Bucketing
from mithridate.aggregators.centered_clipping import CENTRE
from mithridate.testing.checks.aggregator import a_round, again

NESTED = {"name": "nnm", "inner": {"name": "centered_clipping", "clip_norm": 1.0}}


def test_nested_fronts_keep_their_notes_apart() -> None:
    rule = Bucketing(worker_momentum=0.5, inner=NESTED)
    rows, context, _ = a_round(0)
    context = again(context)
    first = rule.aggregate(rows, context)
    assert set(context.memory) == {"momentum.clients", "momentum.rows", f"inner.inner.{CENTRE}"}
    assert torch.equal(context.memory[f"inner.inner.{CENTRE}"], first)
    assert not torch.equal(rule.aggregate(rows, context), first)
    assert rule.most_hostile(40) == 2  # a tenth of 20 buckets
    assert set(rule.unmet) == {"translation", "scale", "consensus"}


def test_the_inner_rule_sees_no_weights() -> None:
    rows, context, _ = a_round(0)
    rule = Bucketing(bucket_size=1, inner={"name": "mean"})
    weights = torch.arange(1.0, len(rows) + 1)
    assert torch.allclose(rule.aggregate(rows, again(context, weights=weights)), rows.mean(0))
