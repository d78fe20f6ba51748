"""TRADES, MART, MMA and FAT as corrections: against oracles written out by hand, and against what each claims."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from mithridate.core.batch import Batch
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError
from mithridate.core.registry import build
from mithridate.core.view import Need, View
from mithridate.defences.adversarial_loss import AdversariallyLearned
from mithridate.defences.at import AT
from mithridate.defences.correction import NUDGE
from mithridate.defences.fat import Fat
from mithridate.defences.mart import Mart, doubt, rivalry
from mithridate.defences.mma import Mma
from mithridate.defences.trades import Trades
from mithridate.maths.divergence import divergence
from mithridate.maths.norms import Norm, sample_norms
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner

STREAM = toy_stream(0)
BATCH = STREAM.victim_batch(0, 0)
VARIANTS: dict[str, type[Defence]] = {"trades": Trades, "mart": Mart, "mma": Mma, "fat": Fat}
AROUND: tuple[AdversariallyLearned, ...] = (Trades(adv_eps=0.1), Mart(adv_eps=0.1), Mma(max_margin=0.1))


def seen(model: nn.Module, *, step: int = 0) -> View:
    learner = Learner(model, SGD(model.parameters(), lr=0.1))
    return View(step, {}, {Need.MODEL: learner.white_box})


def tiny() -> nn.Module:
    """A smooth net in float64, with boundaries through the middle of the pixels."""
    generator = torch.Generator().manual_seed(7)
    first, last = nn.Linear(6, 5).double(), nn.Linear(5, 3).double()
    with torch.no_grad():
        for layer in (first, last):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
        first.bias.copy_(-0.5 * first.weight.sum(1))
        last.bias.zero_()
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), last)


def tiny_batch(n: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(3)
    x = 0.2 + 0.6 * torch.rand(n, 1, 2, 3, generator=generator, dtype=torch.float64)
    return Batch(x, torch.arange(n) % 3)


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum(1, keepdim=True)


def oracle_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(1)


def same_loss_and_gradients(model: nn.Module, found: Tensor, wanted: Tensor) -> None:
    assert found.item() == pytest.approx(wanted.item(), rel=1e-10)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(found, parameters)
    theirs = torch.autograd.grad(wanted, parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert float(b.abs().max()) > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_trades_is_its_formula() -> None:
    model, batch = tiny(), tiny_batch()
    defence = Trades(adv_eps=0.1, beta=3.0)
    view = seen(model)
    nearby = defence.up_the_divergence(batch, view)
    p, q = softmax(model(batch.x)), softmax(model(nearby))
    wanted = -p[range(8), batch.y].log().mean() + 3.0 * oracle_kl(p, q).mean()
    same_loss_and_gradients(model, defence.loss(model, batch, F.cross_entropy, view), wanted)


@pytest.mark.parametrize(("boost", "lam"), [(1.0, 5.0), (0.5, 0.0), (0.0, 2.0), (0.0, 0.0)])
def test_mart_is_its_formula(boost: float, lam: float) -> None:
    model, batch = tiny(), tiny_batch()
    defence = Mart(adv_eps=0.1, boost=boost, lam=lam)
    view = seen(model)
    worst = defence.up_the_loss(batch, view)
    p, q = softmax(model(batch.x)), softmax(model(worst))
    terms = []
    for i, label in enumerate(batch.y.tolist()):
        rival = max(q[i, k] for k in range(3) if k != label)
        divergence_of_one = oracle_kl(p[i : i + 1], q[i : i + 1])[0]
        terms.append(-q[i, label].log() - boost * (1 - rival).log() + lam * divergence_of_one * (1 - p[i, label]))
    wanted = torch.stack(terms).mean()
    same_loss_and_gradients(model, defence.loss(model, batch, F.cross_entropy, view), wanted)


def test_mart_leaves_out_the_labels_that_the_criterion_ignores() -> None:
    """The terms of the others are what they are, and are averaged over them alone."""
    defence, view, batch = Mart(steps=0, adv_steps=0), seen(tiny()), tiny_batch()
    ignored = Batch(batch.x, batch.y.clone())
    ignored.y[5:] = -100
    few = batch.take(slice(0, 5))
    losses = [defence.loss(view.model.module, b, F.cross_entropy, view) for b in (ignored, few)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("clean_weight", [0.0, 1 / 3, 0.9])
def test_mma_is_its_formula(clean_weight: float) -> None:
    model, batch = tiny(), tiny_batch(12)
    defence = Mma(max_margin=0.05, clean_weight=clean_weight)
    view = seen(model)
    x, counts = defence.at_the_boundary(batch, view)
    wrong = model(batch.x).argmax(1) != batch.y
    assert 0 < int(wrong.sum()) < int(counts.sum()) < 12  # all three kinds of samples are here
    assert bool(counts[wrong].all())
    losses = -softmax(model(x))[range(12), batch.y].log()
    plain = -softmax(model(batch.x))[range(12), batch.y].log().mean()
    wanted = clean_weight * plain + (1 - clean_weight) * losses[counts].sum() / 12
    same_loss_and_gradients(model, defence.loss(model, batch, F.cross_entropy, view), wanted)


def test_ascents_are_projected_signed_gradient_steps_from_a_small_nudge() -> None:
    model, batch = tiny(), tiny_batch()
    view = seen(model)
    defence = Trades(adv_eps=0.1, adv_steps=4, adv_step_size=0.04)
    still = replace(defence, adv_steps=1, adv_step_size=1e-12)  # all but the nudge
    start = still.up_the_divergence(batch, view)
    assert 0 < float((start - batch.x).abs().max()) < 6 * NUDGE
    for kind in ("divergence", "loss"):
        x = start
        for _ in range(4):
            x = x.detach().requires_grad_()
            p, q = softmax(model(batch.x)), softmax(model(x))
            value = oracle_kl(p, q).sum() if kind == "divergence" else -q[range(8), batch.y].log().sum()
            x = x + 0.04 * torch.autograd.grad(value, x)[0].sign()
            x = torch.minimum(torch.maximum(x, batch.x - 0.1), batch.x + 0.1).clamp(0, 1)
        found = getattr(defence, f"up_the_{kind}")(batch, view)
        torch.testing.assert_close(found, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ascents_raise_what_they_climb_inside_their_ball(norm: Norm) -> None:
    learner = toy_learner(STREAM, dtype=torch.float64)
    batch = Batch(BATCH.x.double(), BATCH.y)
    view = replace(learner.view(), granted=frozenset(Need))
    defence = Trades(norm=norm, adv_eps=0.1 if norm == "linf" else 0.5)
    nearby, worst = defence.up_the_divergence(batch, view), defence.up_the_loss(batch, view)
    nudged = replace(defence, adv_steps=1, adv_step_size=1e-12).up_the_divergence(batch, view)
    learner.model.eval()
    with torch.no_grad():
        answer = learner.model(batch.x)
        random = batch.x + defence.neighbourhood.sample(batch.x, torch.Generator().manual_seed(0))
        for found in (nearby, worst):
            assert defence.neighbourhood.holds(found - batch.x)
            assert float(found.min()) >= 0
            assert float(found.max()) <= 1
        by_chance = divergence(answer, learner.model(random.clamp(0, 1)))
        found_by_climbing = divergence(answer, learner.model(nearby))
        at_the_start = divergence(answer, learner.model(nudged))
        assert bool((found_by_climbing > 10 * at_the_start).all())
        assert float((found_by_climbing > by_chance).double().mean()) > 0.7  # an ascent may end on a lower hill
        assert float(found_by_climbing.mean()) > 3 * float(by_chance.mean())
        losses = [F.cross_entropy(learner.model(x), batch.y, reduction="none") for x in (worst, batch.x)]
        assert bool((losses[0] > losses[1]).all())


def test_the_boundary_is_where_the_classification_flips_and_nearer_than_the_end_of_pgd() -> None:
    learner = toy_learner(STREAM, dtype=torch.float64)
    batch = STREAM.victim.all()
    batch = Batch(batch.x.double(), batch.y)
    view = replace(learner.view(), granted=frozenset(Need))
    defence = Mma(max_margin=0.1)
    x, counts = defence.at_the_boundary(batch, view)
    learner.model.eval()
    with torch.no_grad():
        right = learner.model(batch.x).argmax(1) == batch.y
        end = batch.x.clone()
        end[right] = defence.up_the_loss(Batch(batch.x[right], batch.y[right]), view)
        crosses = right & (learner.model(end).argmax(1) != batch.y)
        assert int(crosses.sum()) > 20
        assert torch.equal(counts, crosses | ~right)
        assert torch.equal(x[~crosses], batch.x[~crosses])
        far = sample_norms(end - batch.x, "linf")[crosses]
        near = sample_norms(x - batch.x, "linf")[crosses]
        assert bool((near < far).all())
        assert float((near / far).mean()) < 0.8
        assert bool((learner.model(x[crosses]).argmax(1) != batch.y[crosses]).all())
        share = (near / far).view(-1, 1, 1, 1)
        shorter = torch.lerp(batch.x[crosses], end[crosses], share - 1.01 * 2**-defence.bisections)
        assert bool((learner.model(shorter).argmax(1) == batch.y[crosses]).all())


def test_the_margin_of_a_linear_model_is_the_known_one() -> None:
    """In l-infinity a point's distance to the plane between two classes is |difference of logits| / |weights|_1."""
    linear = nn.Linear(6, 2).double()
    model = nn.Sequential(nn.Flatten(), linear)
    weight = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 0.7], dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([weight, -weight]))
        linear.bias.zero_()
        x = tiny_batch(12).x
        logits = model(x)
    y = logits.argmax(1)
    margins = (logits[:, 0] - logits[:, 1]).abs() / (2 * weight).abs().sum()
    limit = float(margins.sort().values[5:7].mean())
    defence = Mma(max_margin=limit, bisections=20)
    found, counts = defence.at_the_boundary(Batch(x, y), seen(model))
    assert torch.equal(counts, margins < limit)
    distances = sample_norms(found - x, "linf")
    torch.testing.assert_close(distances[counts], margins[counts], rtol=0, atol=limit * 2**-19)


def oracle_fat(model: nn.Module, x: Tensor, y: int, defence: Fat) -> tuple[Tensor, int, int]:
    """One sample by the paper's Algorithm 1, turned around: pixels, steps taken, steps from where it was right."""
    left, current, taken, spent = defence.tau, x, 0, 0
    for _ in range(defence.steps):
        current = current.detach().requires_grad_()
        logits = model(current)
        if int(logits.argmax()) == y:
            if left == 0:
                break
            left -= 1
            spent += 1
        loss = -logits[0].log_softmax(0)[y]
        current = current - defence.step_size * torch.autograd.grad(loss, current)[0].sign()
        current = torch.minimum(torch.maximum(current, x - defence.eps), x + defence.eps).clamp(0, 1)
        taken += 1
    return current.detach(), taken, spent


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_fat_corrects_each_sample_until_it_is_right_and_tau_steps_more(tau: int) -> None:
    learner = toy_learner(STREAM, dtype=torch.float64)
    batch = STREAM.victim.all()
    batch = Batch(batch.x.double(), batch.y.roll(1))  # many wrong labels: many samples to correct
    defence = Fat(tau=tau, step_size=0.04, steps=7)
    view = replace(learner.view(), granted=frozenset(Need))
    screened = defence.screen(batch, view)
    sent = screened.batch
    learner.model.eval()
    taken = []
    for i, label in enumerate(batch.y.tolist()):
        wanted, steps, spent = oracle_fat(learner.model, batch.x[i : i + 1], label, defence)
        torch.testing.assert_close(sent.x[i : i + 1], wanted, rtol=0, atol=1e-9)
        assert spent <= tau
        taken.append(steps)
    with torch.no_grad():
        right = learner.model(batch.x).argmax(1) == batch.y
    moved = (sent.x != batch.x).flatten(1).any(1)
    assert screened.flagged is not None
    assert torch.equal(screened.flagged, moved)
    assert torch.equal(moved, ~right if tau == 0 else torch.ones_like(right))
    assert 10 < int(right.sum()) < 90
    assert len({*taken}) > 3  # they stop at different times


def test_fat_with_patience_is_at_and_without_need_hands_the_batch_on() -> None:
    learner = toy_learner(STREAM)
    view = replace(learner.view(), granted=frozenset(Need))
    sent = Fat(tau=10).screen(BATCH, view).batch
    torch.testing.assert_close(sent.x, AT().screen(BATCH, view).batch.x, rtol=0, atol=1e-6)
    learner.model.eval()
    with torch.no_grad():
        right = learner.model(BATCH.x).argmax(1) == BATCH.y
    known = Batch(BATCH.x[right], BATCH.y[right])
    screened = Fat(tau=0).screen(known, view)
    assert screened.batch is known
    assert screened.flagged is not None
    assert not bool(screened.flagged.any())


@pytest.mark.parametrize("defence", AROUND, ids=lambda d: type(d).__name__)
def test_the_nudge_follows_the_step_and_nothing_else(defence: AdversariallyLearned) -> None:
    model = toy_learner(STREAM).model
    short = replace(defence, adv_steps=1, adv_step_size=1e-9)
    first = short.up_the_loss(BATCH, seen(model, step=1))
    torch.rand(5)
    assert torch.equal(first, short.up_the_loss(BATCH, seen(model, step=1)))
    assert not torch.equal(first, short.up_the_loss(BATCH, seen(model, step=2)))
    assert replace(defence, adv_steps=0).up_the_loss(BATCH, seen(model)) is BATCH.x


def test_a_sample_is_looked_around_as_if_it_were_alone() -> None:
    """Ascents run in eval mode: BatchNorm does not let one sample's companions in."""
    learner = toy_learner(STREAM, dtype=torch.float64)
    learner.model.train()
    view, other = seen(learner.model), STREAM.victim_batch(1, 0)
    x, y = (torch.cat([a[:10], b[10:]]) for a, b in zip(BATCH, other, strict=True))
    one, mixed = (Batch(x.double(), y) for x, y in (BATCH, (x, y)))
    for climb in (Trades().up_the_divergence, Mart().up_the_loss, lambda *a: Mma().at_the_boundary(*a)[0]):
        found, again = climb(one, view), climb(mixed, view)
        assert not torch.equal(found[:10], one.x[:10])
        torch.testing.assert_close(found[:10], again[:10], rtol=0, atol=1e-9)


@pytest.mark.parametrize("defence", AROUND, ids=lambda d: type(d).__name__)
def test_ascents_leave_the_model_alone_and_outer_passes_record_twice(defence: AdversariallyLearned) -> None:
    model = toy_learner(STREAM).model
    modules = list(model.modules())
    for i, module in enumerate(modules):
        module.training = i % 2 == 0
    flags = [m.training for m in modules]
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    view = seen(model)
    flagged = defence.screen(BATCH, view).flagged
    defence.up_the_loss(BATCH, view)
    defence.up_the_divergence(BATCH, view)
    if isinstance(defence, Mma):
        defence.at_the_boundary(BATCH, view)
    assert flagged is not None
    assert flagged.tolist() == [True] * len(BATCH.x)
    assert view.memory == {}
    assert all(torch.equal(before[n], after) for n, after in model.state_dict().items())
    assert [m.training for m in modules] == flags

    model.train()
    defence.loss(model, BATCH, F.cross_entropy, view)
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in modules)
    assert torch.equal(state, torch.get_rng_state())
    counted = {n: int(b - before[n]) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    assert set(counted.values()) == {2}
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("defence", [*AROUND, Fat()], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("n", [1, 20])
def test_a_saturated_model_gives_finite_losses_and_steps(defence: Defence, n: int) -> None:
    learner = toy_learner(STREAM, defence=defence)
    learner.update_mode = "eval" if n == 1 else "train"
    with torch.no_grad():
        for p in learner.model.get_submodule("fc2").parameters():
            p.mul_(1e4)
    done = learner.update(Batch(BATCH.x[:n], BATCH.y[:n].roll(1)))
    assert torch.isfinite(torch.tensor([done.batch_loss, done.gradient_norm, done.update_norm])).all()
    assert all(bool(torch.isfinite(p).all()) for p in learner.model.parameters())


def test_rivalry_and_doubt_are_exact_where_probabilities_round_to_one() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.0, 90.0, 1.0], [90.0, 0.0, 1.0]])
    y = torch.tensor([0, 0, 0])
    p = softmax(logits.double())
    assert 1 - p[1, 1].float() == 0  # where a plain log(1 - p) has no value
    wanted = [-float((1 - p[0, 1]).log()), 90 - float(torch.tensor([0.0, 1.0]).logsumexp(0)), 0.0]
    assert rivalry(logits, y).tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert doubt(logits, y).tolist() == pytest.approx([1 - float(p[0, 0]), 1.0, 0.0], abs=1e-6)
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(rivalry(leaf, y).sum(), leaf)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[1, 1]) == pytest.approx(1.0)


def test_mma_where_nothing_counts_moves_nothing() -> None:
    """Margins wider than d_max and no clean term: the hinge is flat."""
    model, batch = tiny(), tiny_batch()
    known = Batch(batch.x, model(batch.x).argmax(1))
    loss = Mma(max_margin=1e-6, clean_weight=0.0).loss(model, known, F.cross_entropy, seen(model))
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("fat", "tau", -1), ("mma", "clean_weight", 1.5), ("mart", "boost", -0.1), ("trades", "beta", float("inf"))],
)
def test_settings_out_of_range_are_refused(name: str, key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        build("defence", {"name": name, key: value})
