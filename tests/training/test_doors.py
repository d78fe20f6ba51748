"""What comes in at the learner's door: single bad samples are kept out and counted, what fits nothing is told."""

import math
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from mithridate.attacks.pgd import PGD
from mithridate.attacks.vanilla import Vanilla
from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.defence import Defence, Screened
from mithridate.core.domain import PIXELS, Domain
from mithridate.core.errors import ConfigError, DataError, UserError
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.defences.at import AT
from mithridate.defences.bound_update import BoundUpdate
from mithridate.defences.chain import chain
from mithridate.defences.clip import Clip
from mithridate.defences.ema import Ema
from mithridate.defences.fat import Fat
from mithridate.defences.gate import Gate
from mithridate.defences.skip import Skip
from mithridate.training.history import History
from mithridate.training.learner import Learner

CLASSES, WIDTH = 3, 5


def batch_of(seed: int = 0, n: int = 8) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(n, WIDTH, generator=rng), torch.randint(CLASSES, (n,), generator=rng))


def model_of(outputs: int = CLASSES) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, outputs))


def learner_of(defence: Defence | None = None, *, model: nn.Module | None = None, **options: Any) -> Learner:
    model = model or model_of()
    optimiser = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return Learner(model, optimiser, defence=defence, trusted=batch_of(50, n=30), **options)


def state(learner: Learner) -> dict[str, Tensor]:
    snapshot = learner.snapshot()
    momenta = {
        f"{i}.{k}": t for i, s in snapshot.optimiser["state"].items() for k, t in s.items() if isinstance(t, Tensor)
    }
    return {**snapshot.parameters, **snapshot.buffers, **momenta, "step": torch.tensor(snapshot.step)}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return sorted(a.keys() ^ b.keys()) + [k for k in a.keys() & b.keys() if not torch.equal(a[k], b[k])]


DEFENCES: dict[str, Callable[[], Defence]] = {
    "none": Defence,
    "clip": lambda: Clip(clip_norm=1.0),
    "clip by clamping": lambda: Clip(clip_norm=1.0, norm="linf", how="project"),
    "bound_update": lambda: BoundUpdate(clip_norm=0.1),
    "gate": Gate,
    "skip": lambda: Skip(warmup=3),
    "ema": Ema,
    "at": lambda: AT(steps=1),
    "chain": lambda: chain(Clip(clip_norm=1.0), Gate(), Ema()),
}


# Single bad samples.


def spoiled(kind: str) -> Batch:
    batch = batch_of(3)
    if kind in ("nan", "inf"):
        batch.x[2, 1] = float(kind)
    elif kind == "outside":
        batch.x[2, 1] = 1.5
    else:
        batch.y[2] = {"label too high": CLASSES, "negative label": -1, "absurd label": 2**62}[kind]
    return batch


BAD = ["nan", "inf", "outside", "label too high", "negative label", "absurd label"]


@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later batch"])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", DEFENCES)
def test_one_bad_sample_is_quarantined_and_counted(name: str, kind: str, first: bool) -> None:
    learner, twin = (learner_of(DEFENCES[name](), domain=PIXELS) for _ in range(2))
    if not first:
        learner.update(batch_of(1))
        twin.update(batch_of(1))
    others = torch.arange(8) != 2
    done, expected = learner.update(spoiled(kind)), twin.update(batch_of(3).take(others))
    assert (done.quarantined, done.learned) == (1, 7)
    assert done.flagged is not None
    assert bool(done.flagged[2])
    assert done.batch_loss == expected.batch_loss
    assert done.verdict[:2] == expected.verdict[:2]
    assert differing(state(learner), state(twin)) == []


@pytest.mark.parametrize("kind", BAD)
def test_a_batch_of_nothing_else_teaches_nothing(kind: str) -> None:
    learner = learner_of(domain=PIXELS)
    bad = spoiled(kind).take(torch.tensor([2, 2, 2]))
    for _ in range(2):
        before = state(learner)
        done = learner.update(bad)
        assert (done.quarantined, done.learned, done.verdict.admit) == (3, 0, False)
        assert "quarantined" in done.verdict.reason
        assert differing(state(learner), before) == []
        learner.update(batch_of(1))


def test_labels_left_out_of_the_loss_and_targets_that_are_no_classes_are_none_of_it() -> None:
    ignored = batch_of(3)
    ignored.y[2] = -100
    assert learner_of().update(ignored).quarantined == 0
    numbers = learner_of(model=model_of(1), criterion=lambda z, y: F.mse_loss(z.squeeze(1), y.float() / 10))
    assert numbers.update(Batch(batch_of().x, torch.arange(8) * 7)).quarantined == 0


WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
@pytest.mark.parametrize("name", DEFENCES)
def test_class_numbers_of_any_whole_type_are_those_of_int64(name: str, dtype: torch.dtype) -> None:
    learner, twin = (learner_of(DEFENCES[name](), domain=PIXELS) for _ in range(2))
    for seed in (1, 2, 3):
        batch = spoiled("label too high") if seed == 3 else batch_of(seed)
        done, expected = learner.update(Batch(batch.x, batch.y.to(dtype))), twin.update(batch)
        assert done.quarantined == expected.quarantined == (seed == 3)
        assert done.batch_loss == expected.batch_loss
    assert differing(state(learner), state(twin)) == []
    test = batch_of(9, n=40)
    score = learner.evaluate([Batch(test.x, test.y.to(dtype))])
    assert score == twin.evaluate([test])
    assert 0 <= score.accuracy <= 1


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_class_numbers_of_any_whole_type_are_trusted_and_attacked(dtype: torch.dtype) -> None:
    trusted, batch = batch_of(50, n=30), batch_of(1)
    model = model_of()
    learner = Learner(model, SGD(model.parameters(), lr=0.1), trusted=Batch(trusted.x, trusted.y.to(dtype)))
    assert learner.trusted is not None
    assert learner.trusted.y.dtype == torch.int64
    sent = [
        PGD(eps=0.1, steps=1).poison(
            Batch(batch.x, y),
            View(available={Need.MODEL: learner.white_box}),
            rng=torch.Generator().manual_seed(0),
        )
        for y in (batch.y, batch.y.to(dtype))
    ]
    assert torch.equal(sent[0].x, sent[1].x)
    assert sent[1].y.dtype == dtype


def test_targets_that_are_no_whole_numbers_stay_what_they_are() -> None:
    for y in (torch.rand(4), torch.rand(4, 2).double(), torch.rand(4) > 0.5):
        assert Batch(torch.rand(4, 2), y).with_class_numbers().y is y


def soft(value: float | None = None, *, n: int = 8) -> Batch:
    """Targets that are probabilities; a number in the third of them, if one is given."""
    y = torch.rand(n, CLASSES, generator=torch.Generator().manual_seed(4)).softmax(1)
    if value is not None:
        y[2, 1] = value
    return Batch(batch_of(3, n=n).x, y)


@pytest.mark.parametrize(
    "criterion",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        partial(F.cross_entropy, label_smoothing=0.1),
        F.binary_cross_entropy_with_logits,
        nn.BCEWithLogitsLoss(),
    ],
    ids=["function", "module", "partial", "many labels", "many labels, module"],
)
@pytest.mark.parametrize("value", [-0.5, 1.5, -1e30, math.nan])
def test_targets_that_are_no_probabilities_are_quarantined(criterion: Any, value: float) -> None:
    learner, twin = (plain(criterion=criterion) for _ in range(2))
    done, expected = learner.update(soft(value)), twin.update(soft().take(torch.arange(8) != 2))
    assert (done.quarantined, done.learned) == (1, 7)
    assert done.batch_loss == expected.batch_loss
    assert differing(state(learner), state(twin)) == []
    if not math.isnan(value):
        with pytest.raises(DataError, match=r"1 of 8 targets hold numbers outside \[0, 1\]"):
            learner.evaluate([soft(value)])


def test_probabilities_and_numbers_to_regress_on_are_learned_from() -> None:
    ends = soft()
    ends.y[0], ends.y[1] = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    assert plain().update(ends).quarantined == 0
    assert plain(criterion=F.mse_loss).update(soft(-7.0)).quarantined == 0


def test_labels_of_positions_are_looked_at_too() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x.unsqueeze(-1))
            return out

    learner = learner_of(model=Positions(), criterion=lambda z, y: F.cross_entropy(z.transpose(1, 2), y))
    learner.trusted = None
    y = torch.zeros(8, WIDTH, dtype=torch.int64)
    y[4, 3] = CLASSES
    assert learner.update(Batch(batch_of().x, y)).quarantined == 1


def test_a_model_that_says_more_or_less_than_its_last_layer_is_asked() -> None:
    class Head(nn.Module):
        """Two linear layers, of which the first one answers."""

        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.answers, self.unused = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, outputs)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.answers(x)
            return out

    batch = batch_of(3)
    batch.y[:] = torch.arange(8) % CLASSES
    batch.y[2] = CLASSES
    assert learner_of(model=Head(2)).update(batch).quarantined == 1
    more = learner_of(model=Head(9))
    more.update(batch_of(1))
    assert more.update(batch).quarantined == 1


def test_token_numbers_have_a_domain_too() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(4 * WIDTH, CLASSES))
    learner = Learner(model, SGD(model.parameters(), lr=0.1), domain=Domain(0, 9))
    x = torch.randint(10, (8, WIDTH), generator=torch.Generator().manual_seed(0))
    x[1, 1], x[5, 0] = 10, -1
    done = learner.update(Batch(x, batch_of().y))
    assert (done.quarantined, done.learned) == (2, 6)


def test_bounds_of_another_shape_than_a_sample_are_told() -> None:
    learner = learner_of(domain=Domain(torch.zeros(WIDTH + 1), torch.ones(WIDTH + 1)))
    with pytest.raises(DataError, match=r"shape \(5,\), and the domain's bounds \(6,\)"):
        learner.update(batch_of())


# What BatchNorm cannot train on.


class DroppingAllButOne(Defence):
    def screen(self, batch: AnyBatch, view: View) -> Screened:
        flagged = torch.arange(batch.size) > 0
        return Screened(batch.take(~flagged), flagged)


@pytest.mark.parametrize(
    ("name", "why"),
    [*product(["none", "clip", "gate", "at", "chain"], ["received", "quarantine"]), ("one that drops", "defence")],
)
def test_a_batch_that_batch_norm_cannot_train_on_is_a_verdict(name: str, why: str) -> None:
    defence = DroppingAllButOne() if why == "defence" else DEFENCES[name]()
    learner = learner_of(defence, domain=PIXELS)
    batch = batch_of(3, n=1 if why == "received" else 8)
    if why == "quarantine":
        batch.x[1:] = math.nan
    if why != "defence":
        learner.update(batch_of(1))
    before = state(learner)
    done = learner.update(batch)
    assert not done.verdict.admit
    assert "too few for BatchNorm" in done.verdict.reason
    assert differing(state(learner), before) == []
    assert done.quarantined == (7 if why == "quarantine" else 0)
    learner.defence = Defence()
    assert learner.update(batch_of(4)).verdict.admit


def test_a_single_sample_is_enough_where_statistics_are_frozen() -> None:
    learner = learner_of()
    learner.model.get_submodule("1").eval()
    assert learner.update(batch_of(3, n=1)).verdict.admit
    assert learner_of(update_mode="eval").update(batch_of(3, n=1)).verdict.admit


# Gradients and steps that are not fit.


class Wild(torch.autograd.Function):
    """The identity, with a gradient of one's choice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.value, None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", DEFENCES)
def test_a_gradient_that_is_not_finite_reaches_no_weight(name: str, value: float) -> None:
    """The loss is finite, so that no look at it would find out."""
    chosen = [1.0]
    learner = learner_of(
        DEFENCES[name](),
        criterion=lambda z, y: F.cross_entropy(Wild.apply(z, chosen[0]), y),  # type: ignore[no-untyped-call]
    )
    learner.update(batch_of(1))
    before, served = state(learner), learner.evaluate([batch_of(9)])
    chosen[0] = value
    done = learner.update(batch_of(2))
    assert math.isfinite(done.batch_loss)
    assert not done.verdict.admit
    assert "is not finite" in done.verdict.reason
    chosen[0] = 1.0
    assert differing(state(learner), before) == []
    assert learner.evaluate([batch_of(9)]) == served
    assert learner.update(batch_of(2)).verdict.admit


def test_a_bound_that_makes_nan_is_a_verdict() -> None:
    class Breaking(Defence):
        def bound(self, updates: Updates, view: View) -> Updates:
            return updates.with_rows(updates.rows / 0.0 * 0.0)

    learner = learner_of(Breaking())
    before = state(learner)
    assert "is not finite" in learner.update(batch_of()).verdict.reason
    assert differing(state(learner), before) == []


def test_a_step_that_overflows_is_a_verdict() -> None:
    learner = learner_of(criterion=lambda z, y: 1e4 * F.cross_entropy(z, y))
    for group in learner.optimiser.param_groups:
        group["lr"] = 1e38
    before = state(learner)
    assert "would make '0.weight' not finite" in learner.update(batch_of()).verdict.reason
    assert differing(state(learner), before) == []


def test_statistics_that_overflow_are_a_verdict() -> None:
    """The variance of huge inputs is infinite, and the loss and its gradient are finite all the same."""
    learner = learner_of()
    batch = batch_of()
    before = state(learner)
    done = learner.update(Batch(batch.x * 1e25, batch.y))
    assert math.isfinite(done.gradient_norm)
    assert "'1.running_var' not finite" in done.verdict.reason
    assert differing(state(learner), before) == []


def test_infinities_that_belong_to_a_model_are_no_fault() -> None:
    class Masked(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, CLASSES + 1)
            self.register_buffer("mask", torch.tensor([0.0] * CLASSES + [-math.inf]))

        def forward(self, x: Tensor) -> Tensor:
            self.mask = self.mask.clone()
            out: Tensor = self.linear(x) + self.mask
            return out

    learner = learner_of(model=Masked())
    assert learner.update(batch_of()).verdict.admit


# What fits nothing.


class Answering(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.answer = nn.Linear(WIDTH, CLASSES), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.linear(x))


def plain(**options: Any) -> Learner:
    learner = learner_of(**options)
    learner.trusted = None
    return learner


NUMBERS = Batch(batch_of().x, torch.linspace(0, 1, 8))

CASES: dict[str, tuple[Callable[[], Learner], AnyBatch, str]] = {
    "labels as floats": (plain, Batch(batch_of().x, batch_of().y.float()), r"targets torch\.float32 \(8,\)"),
    "yes or no": (plain, Batch(batch_of().x, batch_of().y > 0), r"targets torch\.bool"),
    "a column of labels": (plain, Batch(batch_of().x, batch_of().y[:, None]), r"\(8, 1\)"),
    "too wide": (plain, Batch(torch.rand(8, WIDTH + 1), batch_of().y), r"cannot take inputs of float32 \(n, 6\)"),
    "doubles": (plain, Batch(batch_of().x.double(), batch_of().y), r"cannot take inputs of float64"),
    "a mapping": (plain, Batch({"x": batch_of().x}, batch_of().y), r"cannot take inputs of \{'x': float32 \(n, 5\)\}"),
    "classes": (lambda: plain(model=Answering(lambda z: z.argmax(1))), batch_of(), r"gives torch\.int64"),
    "no tensor": (lambda: plain(model=Answering(lambda z: [z])), batch_of(), "gives a list"),
    "one number": (lambda: plain(model=Answering(lambda z: z.mean())), batch_of(), r"of shape \(\)"),
    "complex": (lambda: plain(model=Answering(lambda z: z + 0j)), batch_of(), r"gives torch\.complex64"),
    "pairs of all": (lambda: plain(model=model_of(1), criterion=F.mse_loss), NUMBERS, r"\(8, 1\).*targets.*\(8,\)"),
    "detached": (lambda: plain(model=Answering(torch.detach)), batch_of(), "no trainable parameter has a part"),
    "a pair": (plain, (batch_of().x, batch_of().y), "is a tuple"),  # type: ignore[dict-item]
    "nothing": (plain, batch_of().take(slice(0)), "at least one"),
}


@pytest.mark.parametrize(
    ("case", "later"), [(case, later) for case, (make, *_) in CASES.items() for later in {False, make is plain}]
)
def test_what_fits_nothing_is_refused_in_a_sentence_and_the_history_is_as_before(case: str, later: bool) -> None:
    make, batch, message = CASES[case]
    learner = make()
    learner.history = History(keep=2)
    if later:
        learner.update(batch_of(1))
        learner.update(batch_of(2))
    before, past = state(learner), learner.history.tensors()
    with pytest.raises(UserError, match=message) as caught:
        learner.update(batch)
    assert len(str(caught.value)) < 500
    assert differing(state(learner), before) == []
    assert differing(learner.history.tensors(), past) == []
    if case not in {"detached", "nothing"}:
        with pytest.raises(UserError, match=message):
            learner.evaluate([batch])


def test_an_error_of_the_models_own_on_inputs_that_it_took_before_stays_what_it_was() -> None:
    learner = learner_of()
    learner.update(batch_of())
    learner.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learner.update(batch_of())


def test_there_must_be_something_to_evaluate() -> None:
    with pytest.raises(DataError, match="no sample to evaluate"):
        learner_of().evaluate([])


def test_labels_of_a_test_set_are_looked_at() -> None:
    batch = batch_of()
    batch.y[0] = CLASSES
    with pytest.raises(DataError, match=r"batch to evaluate: labels span \[0, 3\]"):
        learner_of().evaluate([batch])


def test_there_must_be_something_to_train() -> None:
    frozen = model_of().requires_grad_(requires_grad=False)
    with pytest.raises(ConfigError, match="no parameter of Sequential is trainable"):
        Learner(frozen, SGD(model_of().parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="no parameter of ReLU is trainable"):
        Learner(nn.ReLU(), SGD(model_of().parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="the optimiser has none of the trainable parameters"):
        Learner(model_of(), SGD(model_of().parameters(), lr=0.1))
    lazy = nn.Sequential(nn.LazyLinear(CLASSES))
    with pytest.raises(ConfigError, match="call it once on a batch"):
        Learner(lazy, SGD(lazy.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("trusted", "message"),
    [
        (batch_of().take(slice(0)), "at least one"),
        (Batch(batch_of().x * math.nan, batch_of().y), "NaN or infinity"),
        ((batch_of().x, batch_of().y), "is a tuple"),
    ],
)
def test_trusted_samples_are_looked_at_when_the_learner_is_made(trusted: Any, message: str) -> None:
    model = model_of()
    with pytest.raises(DataError, match=message):
        Learner(model, SGD(model.parameters(), lr=0.1), trusted=trusted)


@pytest.mark.parametrize("attack", [PGD(eps=0.1, steps=1), Vanilla(eps=0.1, steps=1)], ids=["pgd", "vanilla"])
@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.full((8,), CLASSES), r"labels span \[3, 3\], but the model has 3 outputs"),
        (torch.full((8,), CLASSES, dtype=torch.uint8), r"labels span \[3, 3\], but the model has 3 outputs"),
        (torch.zeros(8), r"targets torch\.float32"),
    ],
    ids=["out of range", "out of range, uint8", "floats"],
)
def test_attacks_tell_targets_that_fit_nothing(attack: Any, y: Tensor, message: str) -> None:
    view = View(available={Need.MODEL: learner_of().white_box, Need.VALIDATION: batch_of(5), Need.TRIGGER: batch_of(6)})
    with pytest.raises(DataError, match=message):
        attack.poison(Batch(batch_of().x, y), view, rng=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("defence", "batch", "message"),
    [
        (AT, Batch(torch.ones(8, WIDTH, dtype=torch.int64), batch_of().y), "needs one tensor of floats"),
        (lambda: chain(Clip(), AT()), Batch([batch_of().x], batch_of().y), "needs one tensor of floats"),
        (Fat, Batch(batch_of().x, batch_of().y.float()), "needs class numbers"),
    ],
    ids=["whole numbers", "a sequence", "targets of another type"],
)
def test_a_defence_is_asked_of_every_batch_whether_it_can_work_on_it(
    defence: Callable[[], Defence], batch: AnyBatch, message: str
) -> None:
    learner = learner_of(defence())
    learner.update(batch_of())
    before = state(learner)
    with pytest.raises(ConfigError, match=message):
        learner.update(batch)
    assert differing(state(learner), before) == []


@pytest.mark.parametrize("defence", [Defence, AT, Gate], ids=["none", "at", "gate"])
def test_batches_that_were_made_in_inference_mode_are_learned_from(defence: Callable[[], Defence]) -> None:
    plain, other = learner_of(defence()), learner_of(defence())
    with torch.inference_mode():
        batch = batch_of(1)
    plain.update(batch_of(1))
    other.update(batch)
    assert differing(state(plain), state(other)) == []


class Tokens(nn.Module):
    """The mean embedding of token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(10, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.embedding(x).mean(1))
        return logits


@pytest.mark.parametrize("number", [-1, 10])
def test_token_numbers_that_the_model_has_not_are_told_later_too(number: int) -> None:
    learner = learner_of(model=Tokens())
    batch = Batch(torch.arange(40).reshape(8, 5) % 10, batch_of().y)
    learner.update(batch)
    before = state(learner)
    with pytest.raises(DataError, match="Tokens cannot take inputs of int64"):
        learner.update(Batch(torch.full_like(batch.x, number), batch.y))
    assert differing(state(learner), before) == []


# What is no learner at all, and batches with nothing to learn from.


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("model", "m", "model is 'm'; give a torch.nn.Module"),
        ("optimiser", "sgd", "optimiser is 'sgd'; give a torch optimiser"),
        ("criterion", "ce", "criterion is 'ce'; give a function"),
        ("defence", "clip", "defence is 'clip'; give a defence"),
        ("defence", Clip, "defence is the class Clip; give a defence"),
    ],
)
def test_what_is_no_model_optimiser_criterion_or_defence_is_told_at_once(what: str, value: Any, message: str) -> None:
    model = nn.Linear(WIDTH, CLASSES)
    parts: dict[str, Any] = {"model": model, "optimiser": SGD(model.parameters(), lr=0.1), what: value}
    with pytest.raises(ConfigError, match=re.escape(message)):
        Learner(parts.pop("model"), parts.pop("optimiser"), **parts)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_an_optimiser_that_cannot_take_the_step_is_told_at_once(kind: Any) -> None:
    model = nn.Linear(WIDTH, CLASSES)
    with pytest.raises(ConfigError, match=f"{kind.__name__} needs sparse gradients or a closure"):
        Learner(model, kind(model.parameters()))


def test_a_batch_without_a_target_that_counts_is_a_verdict() -> None:
    learner = learner_of()
    before = learner.snapshot()
    done = learner.update(Batch(batch_of().x, torch.full_like(batch_of().y, -100)))
    assert not done.verdict.admit
    assert "nothing to learn from" in done.verdict.reason
    assert all(torch.equal(p, before.parameters[name]) for name, p in learner.model.named_parameters())


def test_loss_and_accuracy_count_targets_however_batches_are_cut() -> None:
    learner, batch = learner_of(), batch_of(8)
    y = torch.where(torch.arange(8) > 3, -100, batch.y)
    whole = learner.evaluate([Batch(batch.x[:4], y[:4])])
    cut = [Batch(batch.x[:3], y[:3]), Batch(batch.x[3:6], y[3:6]), Batch(batch.x[6:], y[6:])]
    assert learner.evaluate(cut).loss == pytest.approx(whole.loss, rel=1e-5)
    assert learner.evaluate(cut).accuracy == whole.accuracy


def test_the_head_of_a_model_need_not_be_its_last_layer() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.aside = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 50)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)  # type: ignore[no-any-return]

    batch = batch_of(8)
    y = torch.where(torch.arange(8) == 2, CLASSES + 2, batch.y)
    assert learner_of(model=Two()).update(Batch(batch.x, y)).quarantined == 1


class WritingInPlace(Defence):
    def bound(self, updates: Updates, view: View) -> Updates:
        updates.rows.mul_(-1)
        return updates


def test_a_bound_that_writes_to_the_rows_in_place_counts() -> None:
    plain, turned = learner_of(), learner_of(defence=WritingInPlace())
    start = plain.snapshot().parameters
    for learner in (plain, turned):
        learner.update(batch_of())
    for (name, a), b in zip(plain.model.named_parameters(), turned.model.parameters(), strict=True):
        assert torch.allclose(a - start[name], start[name] - b, atol=1e-6)
