"""What the presets of defences say is what they do: each rule is stated anew here, in plain torch and float64.

The statements follow the texts of Zhu et al. (ICML 2023) and what is known of their released code; they share no line
with the library.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.defence import Defence
from mithridate.core.past import Weights
from mithridate.core.registry import build
from mithridate.core.updates import Updates
from mithridate.core.view import View
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.history import History
from mithridate.training.learner import Learner

STREAM = toy_stream(0)
BATCH = STREAM.victim_batch(3, 0)
BATCH = Batch(
    (BATCH.x.double() + 0.2 * torch.randn(BATCH.x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1),
    BATCH.y,
)
TOLERANCE = 1e-9
"""Of pixels, in float64: steps of 0.02 add up exactly but for rounding."""


@pytest.fixture(scope="module")
def old() -> nn.Module:
    """The model at epoch 2."""
    return toy_learner(STREAM, dtype=torch.float64, epochs=2).model.eval()


@pytest.fixture(scope="module")
def learner(old: nn.Module) -> Learner:
    """The model at epoch 4, which looks back at one of epoch 2, half of its burn-in, and wrongly at others."""
    learner = toy_learner(STREAM, dtype=torch.float64)
    other = toy_learner(STREAM, dtype=torch.float64, epochs=1).model
    learner.history = History(checkpoints={1: Weights.of(other), 2: Weights.of(old)}, length=4)
    learner.model.eval()
    return learner


def sent(learner: Learner, defence: Defence, step: int) -> Tensor:
    learner.defence = defence
    view: View = replace(learner.view(), memory={}, step=step)
    screened = defence.screen(BATCH, view).batch
    assert isinstance(screened.x, Tensor)
    return screened.x


def down(model: nn.Module, x: Tensor, y: Tensor, centre: Tensor, extra: Tensor | None = None) -> Tensor:
    """One step of 0.02 down the summed cross-entropy (and `extra`'s divergence), in the ball of 0.2 and in [0, 1]."""
    x = x.detach().requires_grad_()
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    if extra is not None:
        loss = loss + (extra * (extra.log() - logits.log_softmax(1))).mean()  # over samples and classes
    (g,) = torch.autograd.grad(loss, x)
    moved = x.detach() - 0.02 * g.sign()
    return torch.max(torch.min(moved, centre + 0.2), centre - 0.2).clamp(0, 1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row of probabilities."""
    divergences: Tensor = torch.sum(p * (p.log() - q.log()), 1)
    return divergences


@torch.no_grad()
def answers(model: nn.Module, x: Tensor) -> Tensor:
    probabilities: Tensor = torch.softmax(model(x), 1)
    return probabilities


def released_dsc(model: nn.Module, old: nn.Module, threshold: float) -> Tensor:
    """Ten corrections of the whole batch while the mean of KL(old || now) is above the threshold."""
    x: Tensor = BATCH.x
    for _ in range(10):
        if float(kl(answers(old, x), answers(model, x)).mean()) <= threshold:
            break
        x = down(model, x, BATCH.y, BATCH.x)
    return x


def printed_dsc(model: nn.Module, old: nn.Module, threshold: float, k: int = 10) -> Tensor:
    """Algorithm 1, sample by sample: while D(now, old) > P and n < K, from n = 1."""
    corrected = []
    for i in range(len(BATCH.x)):
        centre, y = BATCH.x[i : i + 1], BATCH.y[i : i + 1]
        x, n = centre, 1
        while float(kl(answers(model, x), answers(old, x))) > threshold and n < k:
            x = down(model, x, y, centre)
            n += 1
        corrected.append(x)
    return torch.cat(corrected)


@pytest.mark.parametrize("step", [0, 7])
@pytest.mark.parametrize(
    ("preset", "mu", "tau"), [("paper", 0.5, 0.02), ("paper-cifar100", 1.7, 0.1), ("released", 0.5, 0.02)]
)
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.02])
def test_dsc(learner: Learner, old: nn.Module, preset: str, mu: float, tau: float, step: int, scale: float) -> None:
    """At the preset's own threshold, and at lower ones, where corrections go on for longer."""
    fields: dict[str, Any] = {} if scale == 1 else {"mu": scale * mu, "tau": scale * tau}
    defence = build("defence", {"name": "dsc", "preset": preset, **fields})
    rule = released_dsc if preset == "released" else printed_dsc
    expected = rule(learner.model, old, scale * (mu + tau * step))
    assert float((sent(learner, defence, step) - expected).abs().max()) < TOLERANCE


def test_dsc_is_seen_to_act(learner: Learner, old: nn.Module) -> None:
    """Else the comparison above would compare nothing with nothing."""
    printed = (printed_dsc(learner.model, old, 0.05) - BATCH.x).flatten(1).abs().amax(1)
    counts = set((printed / 0.02).round().int().tolist())
    assert {0, 9} <= counts  # K - 1 of them at most
    assert len(counts) > 3
    moved = float((released_dsc(learner.model, old, 0.0) - BATCH.x).abs().max())
    assert moved == pytest.approx(0.2)  # K of them


def test_at_released(learner: Learner) -> None:
    """Ten steps down cross-entropy plus the mean, over samples and classes, of KL to the received batch's answers."""
    x, received = BATCH.x, answers(learner.model, BATCH.x)
    for _ in range(10):
        x = down(learner.model, x, BATCH.y, BATCH.x, received)
    at = build("defence", {"name": "at", "preset": "released"})
    found = sent(learner, at, 0)
    assert float((found - x).abs().max()) < TOLERANCE
    assert not torch.allclose(found, sent(learner, build("defence", {"name": "at"}), 0), atol=1e-3)


@pytest.mark.parametrize("defence", ["at", "dsc", "fat"])
@pytest.mark.parametrize("loss", ["ce", "ce_kl", "kl", "cw"])
def test_a_correction_lowers_the_loss_that_is_named(learner: Learner, defence: str, loss: str) -> None:
    fields: dict[str, Any] = {"mu": 0.0, "tau": 0.0} if defence == "dsc" else {"tau": 10} if defence == "fat" else {}
    x, by_ce = (
        sent(learner, build("defence", {"name": defence, "correction_loss": what, "steps": 5, **fields}), 0)
        for what in (loss, "ce")
    )
    model, y = learner.model, BATCH.y

    @torch.no_grad()
    def value(x: Tensor) -> float:
        logits = model(x)
        ce, others = F.cross_entropy(logits, y), logits.scatter(1, y[:, None], -torch.inf).amax(1)
        away = kl(answers(model, BATCH.x), logits.softmax(1)).mean()
        gap = (others - logits.gather(1, y[:, None])[:, 0]).mean()
        return float({"ce": ce, "ce_kl": ce + away / 4, "kl": away, "cw": gap}[loss])

    assert float((x - BATCH.x).abs().max()) <= 0.2 + TOLERANCE
    if loss == "kl":  # it holds the answer to what it was, and the text says so
        assert 0 < value(x) < 0.5 * value(by_ce)
    else:
        assert value(x) < 0.5 * value(BATCH.x) if value(BATCH.x) > 0 else value(x) < value(BATCH.x)


def test_clip_released() -> None:
    """Every gradient is shortened as a whole until its largest entry is 0.01."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 30, generator=g, dtype=torch.float64) * torch.tensor([3.0, 1e-2, 1e-3, 1e-4, 0.0])[:, None]
    clip = build("defence", {"name": "clip", "preset": "released"})
    found = clip.bound(Updates(rows, {"w": torch.Size([30])}), View()).rows
    for before, after in zip(rows, found, strict=True):
        largest = float(before.abs().max())
        assert torch.allclose(after, before * min(1.0, 0.01 / largest) if largest else before, rtol=1e-12, atol=0)
