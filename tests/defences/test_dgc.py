"""Discrepancy-aware clipping: which rows are clipped, by how much, and what it is measured on."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from mithridate.core.defence import Defence
from mithridate.core.discrepancy import memorization_discrepancy
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.past import Weights
from mithridate.core.registry import build
from mithridate.core.updates import Updates
from mithridate.core.view import View
from mithridate.data.shards import Shards
from mithridate.data.stream import Stream
from mithridate.defences.chain import chain
from mithridate.defences.clip import Clip
from mithridate.defences.dgc import DGC
from mithridate.maths.norms import clip_rows
from mithridate.simulation.clients import FederatedRun, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.per_client.gradients import client_gradients
from mithridate.training.history import History
from mithridate.training.learner import Learner

LR = 0.2


def learner_of(burned_in: Learner, stream: Stream, defence: Defence, **options: Any) -> Learner:
    model = copy.deepcopy(burned_in.model)
    settings: dict[str, Any] = {"trusted": stream.trusted.all(), "history": burned_in.history, **options}
    return Learner(model, SGD(model.parameters(), lr=LR, momentum=0.9), defence=defence, **settings)


def rows_of(learner: Learner, stream: Stream) -> Updates:
    """Rows of five clients, at given lengths: two honest, one of nothing, two turned round to undo what was learned."""
    _, data = federate(stream, Shards(clients=5), seed=0).round(0, FederatedRun())
    rows = client_gradients(learner.model, learner.criterion, data.x, data.y)
    rows = rows / rows.norm(dim=1, keepdim=True) * torch.tensor([0.5, 0.5, -15.0, 0.0, -5.0]).unsqueeze(1)
    return Updates(rows, {name: p.shape for name, p in learner.model.named_parameters()})


def discrepancies(learner: Learner, gradient: Updates, old: Weights, kind: Any, size: int | None = None) -> Tensor:
    """The oracle: a model that really takes the plain step, row by row."""
    found = []
    for row in range(len(gradient.rows)):
        model = copy.deepcopy(learner.model)
        with torch.no_grad():
            for name, g in gradient.named(row).items():
                model.get_parameter(name).sub_(LR * g)
        assert learner.trusted is not None
        box = WhiteBox(model, learner.criterion)
        found.append(memorization_discrepancy(box, old, learner.trusted.take(slice(size)), kind=kind).mean())
    return torch.stack(found)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("kind", "size"), [("kl", None), ("js", 7), ("l2", 7), ("tv", None)])
def test_only_rows_that_raise_the_discrepancy_are_clipped(
    burned_in: Learner, stream: Stream, kind: Any, size: int | None, norm: Any
) -> None:
    learner = learner_of(burned_in, stream, Defence())
    gradient = rows_of(learner, stream)
    assert learner.history is not None
    old = learner.history.checkpoint()
    assert old is not None
    found = discrepancies(learner, gradient, old, kind, size)
    ordered = found.sort().values
    for between in range(4):
        if ordered[between + 1] - ordered[between] < 1e-3:
            continue
        threshold = float(ordered[between] + ordered[between + 1]) / 2
        defence = DGC(divergence=kind, threshold=threshold, clip_norm=0.01, norm=norm, lr=LR, trusted_size=size)
        learner.defence = defence
        bounded = defence.bound(gradient, learner.view()).rows
        clipped = clip_rows(gradient.rows, 0.01, norm)
        suspicious = found > threshold
        assert int(suspicious.sum()) == 4 - between
        assert torch.equal(bounded[suspicious], clipped[suspicious])
        assert torch.equal(bounded[~suspicious], gradient.rows[~suspicious])


def test_turned_rows_are_the_suspicious_ones(burned_in: Learner, stream: Stream) -> None:
    """Looking back at the model as it is now, honest steps move it less than the long turned ones."""
    history = History(keep=2)
    learner = learner_of(burned_in, stream, Defence(), history=history)
    history.record(0, learner.model)
    gradient = rows_of(learner, stream)
    now = history.back(0)
    assert now is not None
    found = discrepancies(learner, gradient, now, "kl")
    assert float(found[[0, 1, 3]].max()) < 0.5 * float(found[[2, 4]].min())
    threshold = 1.5 * float(found[[0, 1, 3]].max())
    bounded = DGC(old="back", back=0, threshold=threshold, lr=LR).bound(gradient, _granted(learner)).rows
    assert (bounded != gradient.rows).any(1).tolist() == [False, False, True, False, True]
    assert bounded[[2, 4]].norm(dim=1).tolist() == pytest.approx([1.0, 1.0], rel=1e-4)
    assert float(torch.cosine_similarity(bounded[2], gradient.rows[2], dim=0)) == pytest.approx(1, abs=1e-5)


def _granted(learner: Learner) -> View:
    """What a DGC may see of a learner."""
    learner.defence = DGC()
    return learner.view()


def test_a_threshold_of_zero_clips_every_row_and_an_infinite_one_none(burned_in: Learner, stream: Stream) -> None:
    history = History(keep=2)
    learner = learner_of(burned_in, stream, Defence(), history=history)
    history.record(0, learner.model)  # the old model is the current one: a tiny step has no discrepancy
    gradient = rows_of(learner, stream)
    gradient = gradient.with_rows(torch.cat([gradient.rows[:3], 1e-6 * gradient.rows[2:3], gradient.rows[4:]]))
    for clip_norm in (1e-5, 0.05):
        learner.defence = DGC(old="back", back=0, threshold=0.0, clip_norm=clip_norm, lr=LR)
        bounded = learner.defence.bound(gradient, learner.view()).rows
        assert torch.equal(bounded, clip_rows(gradient.rows, clip_norm, "l2"))
        learner.defence = DGC(old="back", back=0, threshold=math.inf, clip_norm=clip_norm, lr=LR)
        assert learner.defence.bound(gradient, learner.view()) is gradient
    learner.defence = DGC(old="back", back=0, threshold=0.0, clip_norm=math.inf)
    assert learner.defence.bound(gradient, learner.view()) is gradient


def test_a_step_to_nowhere_is_suspicious(burned_in: Learner, stream: Stream) -> None:
    """So long a row that the stepped model answers with NaN is clipped, not let through."""
    learner = learner_of(burned_in, stream, DGC(threshold=0.5, clip_norm=0.1, lr=LR))
    gradient = rows_of(learner, stream)
    huge = gradient.with_rows(gradient.rows[:1] * torch.tensor([[1e25]]))
    bounded = learner.defence.bound(huge, learner.view()).rows
    assert float(bounded.norm()) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("flagged", ["clip", "drop"])
def test_the_threshold_rises_with_every_update_made(burned_in: Learner, stream: Stream, flagged: Any) -> None:
    """At each step the rows above P = threshold + rise * step are bounded, and no others."""
    learner = learner_of(burned_in, stream, Defence())
    updates = rows_of(learner, stream)
    assert learner.history is not None
    learner.defence = DGC(threshold=math.inf, lr=LR)
    old = learner.history.checkpoint()
    assert old is not None
    means = learner.defence._discrepancies(updates, old, learner.view())
    ordered = means.sort().values.tolist()
    assert ordered[0] > 0
    rise = ordered[1] / 2  # after so many steps the threshold is halfway to the second
    learner.defence = DGC(threshold=ordered[0] / 2, rise=rise, flagged=flagged, clip_norm=0.01, lr=LR)
    counts = []
    for step in (0, 1, 1000):
        learner.step = step
        bounded = learner.defence.bound(updates, learner.view()).rows
        above = means > ordered[0] / 2 + rise * step
        counts.append(int(above.sum()))
        expected = clip_rows(updates.rows, 0.01, "l2") if flagged == "clip" else torch.zeros_like(updates.rows)
        assert torch.equal(bounded[above], expected[above])
        assert torch.equal(bounded[~above], updates.rows[~above])
    assert counts[0] == 5
    assert counts[0] > counts[1] > counts[2]


def test_a_relative_threshold_is_a_multiple_of_what_the_first_update_found(burned_in: Learner, stream: Stream) -> None:
    """Also when the model has moved since: the reference stays that of the start."""
    probe = DGC(threshold=math.inf, lr=LR, trusted_size=7)
    learner = learner_of(burned_in, stream, probe)
    updates = rows_of(learner, stream)
    assert learner.history is not None
    assert learner.trusted is not None
    old, view = learner.history.checkpoint(), learner.view()
    assert old is not None
    start = float(memorization_discrepancy(view.model, old, learner.trusted.take(slice(7))).mean())
    low, high = probe._discrepancies(updates, old, view).sort().values[[1, 3]].tolist()
    middle = (low + high) / 2
    defence = DGC(threshold=middle / start, relative=True, clip_norm=0.01, lr=LR, trusted_size=7)
    absolute = DGC(threshold=middle, clip_norm=0.01, lr=LR, trusted_size=7)
    for scale in (1.0, 1.2):
        with torch.no_grad():
            learner.model.get_parameter(next(iter(updates.shapes))).mul_(scale)
        bounded = defence.bound(updates, view).rows
        assert torch.equal(bounded, absolute.bound(updates, view).rows)
    assert 0 < int((bounded != updates.rows).any(1).sum()) < 5
    with pytest.raises(ConfigError, match=r'relative .*old = "checkpoint"'):
        DGC(old="back", relative=True)


def test_a_dropped_row_is_zero_whatever_the_bound(burned_in: Learner, stream: Stream) -> None:
    learner = learner_of(burned_in, stream, DGC(threshold=0.0, flagged="drop", clip_norm=math.inf, lr=LR))
    updates = rows_of(learner, stream)
    assert not learner.defence.bound(updates, learner.view()).rows.any()
    learner.defence = DGC(threshold=math.inf, flagged="drop", lr=LR)
    assert learner.defence.bound(updates, learner.view()) is updates


def test_online_a_dropped_batch_moves_the_model_by_momentum_alone(burned_in: Learner, stream: Stream) -> None:
    learner = learner_of(burned_in, stream, Defence(), update_mode="eval")
    learner.update(stream.victim_batch(0, 0))
    velocity = {p: s["momentum_buffer"].clone() for p, s in learner.optimiser.state.items()}
    before = learner.snapshot().parameters
    learner.defence = DGC(threshold=0.0, flagged="drop", lr=LR)
    learner.update(stream.victim_batch(1, 0))
    for name, p in learner.model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - LR * 0.9 * velocity[p])


def test_a_young_stream_has_nothing_to_look_back_at(burned_in: Learner, stream: Stream) -> None:
    learner = learner_of(burned_in, stream, DGC(old="back", back=3, threshold=0.0), history=History(keep=4))
    gradient = rows_of(learner, stream)
    assert learner.defence.bound(gradient, learner.view()) is gradient
    assert DGC(old="back", back=3).lookback == 3
    learner.defence = DGC(epoch=77)
    with pytest.raises(ConfigError, match="DGC looks back at burn-in epoch 77"):
        learner.defence.bound(gradient, learner.view())


def test_it_leaves_model_and_rows_alone(burned_in: Learner, stream: Stream) -> None:
    learner = learner_of(burned_in, stream, DGC(threshold=0.1, clip_norm=0.01))
    gradient = rows_of(learner, stream)
    kept = gradient.rows.clone()
    for i, module in enumerate(learner.model.modules()):
        module.training = i % 2 == 0
    before = learner.snapshot()
    assert not torch.equal(learner.defence.bound(gradient, learner.view()).rows, kept)
    after = learner.snapshot()
    assert torch.equal(gradient.rows, kept)
    assert all(torch.equal(before.parameters[n], after.parameters[n]) for n in before.parameters)
    assert all(torch.equal(before.buffers[n], after.buffers[n]) for n in before.buffers)
    flags = [m.training for m in learner.model.modules()]
    assert flags == [i % 2 == 0 for i in range(len(flags))]


@pytest.mark.parametrize("bound", ["after", "before"])
def test_in_rounds_it_stops_a_direct_trigger(burned_in: Learner, stream: Stream, bound: Any) -> None:
    run = FederatedRun(rounds=0, lr=LR, momentum=0.0, bound=bound, batch_norm="frozen")
    attack = build("update_attack", {"name": "direct", "poison_ratio": 0.1, "trigger_norm": 20.0})
    federation = federate(stream, Shards(clients=10), seed=0)
    drops, lengths = [], []
    for threshold in (math.inf, 1.0):
        history = History(keep=1)
        defence = chain(DGC(old="back", back=0, threshold=threshold, clip_norm=0.1, lr=LR))
        learner = learner_of(burned_in, stream, defence, history=history)
        history.record(0, learner.model)
        outcome = run_federated(learner, federation, attack, run)
        assert outcome.drop is not None
        drops.append(outcome.drop)
        length = outcome.trace[1]["bounded_norm"]
        assert length is not None
        lengths.append(length)
    assert drops[0] > 0.3
    assert drops[1] < 0.1
    assert lengths[1] < 1 < lengths[0]


def test_a_chunk_of_refused_rows_is_no_chunk(burned_in: Learner, stream: Stream) -> None:
    """Bounding no row at all would be an error; the round goes on."""
    run = FederatedRun(rounds=0, lr=LR, bound="before")
    learner = learner_of(burned_in, stream, DGC())
    with torch.no_grad():
        next(learner.model.parameters()).fill_(torch.nan)
    outcome = run_federated(
        learner, federate(stream, Shards(clients=4), seed=0), build("update_attack", {"name": "clean"}), run
    )
    assert outcome.quarantined == 4
    assert outcome.status == "diverged"


def test_it_needs_whole_updates(burned_in: Learner, stream: Stream) -> None:
    run = FederatedRun(rounds=0, lr=LR, distances="without_norm")
    clean = build("update_attack", {"name": "clean"})
    federation = federate(stream, Shards(clients=4), seed=0)
    with pytest.raises(ConfigError, match='dgc: it steps on whole updates; set distances = "all"'):
        run_federated(learner_of(burned_in, stream, DGC()), federation, clean, run)
    run_federated(learner_of(burned_in, stream, Clip()), federation, clean, run)


@pytest.mark.parametrize(
    "values",
    [
        {"threshold": -1.0},
        {"rise": -0.1},
        {"rise": math.inf},
        {"flagged": "keep"},
        {"clip_norm": 0.0},
        {"lr": 0.0},
        {"trusted_size": 0},
        {"norm": "l1"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(values: dict[str, Any]) -> None:
    (key,) = values
    with pytest.raises(ConfigError, match=key):
        build("defence", {"name": "dgc", **values})
