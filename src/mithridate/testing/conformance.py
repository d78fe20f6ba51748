"""What every component must pass: named checks, each a function that raises AssertionError with what is wrong.

An author runs them on one class:

    for check in attack_checks():
        check(MyAttack)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from statistics import mean, median
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mithridate.attacks.noise import Noise
from mithridate.core.attack import Attack
from mithridate.core.batch import Batch
from mithridate.core.defence import Defence, overrides
from mithridate.core.errors import ConfigError, UserError
from mithridate.core.features import observe
from mithridate.core.past import Weights
from mithridate.core.registry import KINDS, build, config_of, entries
from mithridate.core.updates import Updates
from mithridate.core.view import Memory, Need, View
from mithridate.core.watch import Detector
from mithridate.data.stream import Stream
from mithridate.maths.norms import Norm
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.simulation.run import Outcome
from mithridate.testing.toy import toy_learner, toy_stream
from mithridate.training.history import History
from mithridate.training.learner import Learner

Check = Callable[[type], None]
TIMES = ("seconds", "craft_seconds", "update_seconds")
BUDGET = 0.15
"""Radius used on the toy stream, in pixel units."""
INNER_STEPS = 3
SEEDS = (0, 1, 2, 3, 4)
MARGIN = 1.05
"""How much larger a loss must be than under noise, by the median over seeds."""


def component_checks() -> Sequence[Check]:
    """Checks for components of every kind."""
    return (check_defaults, check_round_trip, check_unknown_key, check_described)


def attack_checks() -> Sequence[Check]:
    """Checks for attacks, besides `component_checks`."""
    return (
        check_repeats,
        check_leaves_the_world_alone,
        check_batch_of_one,
        check_keeps_dtype,
        check_budget,
        check_zero_budget,
        check_zero_ratio,
        check_partial_ratio,
        check_declares_needs,
        check_beats_noise,
    )


def defence_checks() -> Sequence[Check]:
    """Checks for defences, besides `component_checks`."""
    return (
        check_neutral,
        check_acts,
        check_defence_leaves_the_batch_alone,
        check_learns_from_one,
        check_declares_views,
        check_factors,
    )


def detector_checks() -> Sequence[Check]:
    """Checks for detectors, besides `component_checks`."""
    return (
        check_separates,
        check_scores_in_any_company,
        check_detector_leaves_the_world_alone,
        check_fit_repeats,
        check_fitted_can_be_saved,
        check_detector_declares_needs,
    )


def _kind_and_name(cls: type) -> tuple[Any, str]:
    for kind in KINDS:
        for name, entry in entries(kind).items():
            if entry.cls is cls:
                return kind, name
    raise AssertionError(f"{cls.__name__} is not registered")


def check_defaults(cls: type) -> None:
    """It can be made without arguments, is frozen, and its fields are keyword-only."""
    made = cls()
    assert dataclasses.is_dataclass(made), f"{cls.__name__} is no dataclass"
    for field in dataclasses.fields(made):
        assert field.kw_only, f"{cls.__name__}.{field.name} is not keyword-only"
        try:
            setattr(made, field.name, getattr(made, field.name))
        except (dataclasses.FrozenInstanceError, AttributeError):
            continue
        raise AssertionError(f"{cls.__name__} is not frozen")


def check_round_trip(cls: type) -> None:
    """Its table builds an equal object; a field may be None only by default, since TOML cannot say None."""
    kind, name = _kind_and_name(cls)
    for preset in (None, *entries(kind)[name].presets):
        made = build(kind, {"name": name} | ({"preset": preset} if preset else {}))
        assert build(kind, config_of(made)) == made, f"{name} (preset {preset}) does not come back from its table"


def check_unknown_key(cls: type) -> None:
    """A misspelt setting is an error, not silence."""
    kind, name = _kind_and_name(cls)
    try:
        build(kind, {"name": name, "no_such_setting": 1})
    except ConfigError as error:
        if "no_such_setting" not in str(error):
            raise AssertionError(f"{name} does not say which key is unknown: {error}") from error
        return
    raise AssertionError(f"{name} accepts an unknown key")


def check_described(cls: type) -> None:
    """It has a first line, a source, and a word on every field."""
    kind, name = _kind_and_name(cls)
    entry = entries(kind)[name]
    assert entry.summary.endswith((".", ":")), f"{name} has no one-line description"
    assert entry.source, f"{name} names no source"
    text = cls.__doc__ or ""
    declared = {f.name for f in dataclasses.fields(cls)}
    if not _is_control(cls):
        missing = [f for f in sorted(declared) if f"{f}:" not in text]
        assert not missing, f"{name} does not describe {missing}"


def _is_control(cls: type) -> bool:
    return bool(getattr(cls, "control", False))


def _may_hold_back(cls: type) -> bool:
    """Controls, and attacks that send less than their budget on purpose (`restrained`)."""
    return _is_control(cls) or bool(getattr(cls, "restrained", False))


@lru_cache(maxsize=8)
def _stream(seed: int) -> Stream:
    return toy_stream(seed)


def _things(learner: Learner, stream: Stream) -> dict[Need, Any]:
    return {
        Need.MODEL: learner.white_box,
        Need.VALIDATION: stream.validation.all(),
        Need.TRIGGER: stream.trigger_batch(3, 0),
        Need.ACCURACY: (0.9, 0.9),
        Need.TRUSTED: stream.trusted.all(),
        Need.SURROGATE: toy_learner(stream, seed=1).white_box,
    }


def _as_dtype(things: Mapping[Need, Any], dtype: torch.dtype) -> dict[Need, Any]:
    return {need: Batch(v.x.to(dtype), v.y) if isinstance(v, Batch) else v for need, v in things.items()}


def _small(cls: type) -> dict[str, Any]:
    """Settings for the toy stream: its budget, and few inner steps where there are any."""
    has_steps = "steps" in {f.name for f in dataclasses.fields(cls)}
    return {"eps": BUDGET} | ({"steps": INNER_STEPS} if has_steps else {})


def _variants(cls: Any) -> list[Attack]:  # noqa: ANN401  (a registered attack class)
    """The class at the toy budget, in both balls, and once for every value of its named choices."""
    kind, name = _kind_and_name(cls)
    base = {"name": name, **_small(cls)}
    made = [
        build(kind, {**base, "norm": norm, "eps": BUDGET if norm == "linf" else 4 * BUDGET}) for norm in ("linf", "l2")
    ]
    made += [build(kind, {**base, field: choice}) for field, choice in _choices(cls) if field != "norm"]
    return list(dict.fromkeys(made))


def _choices(cls: Any) -> list[tuple[str, str]]:  # noqa: ANN401  (a registered class)
    """Every value of every field that is a named choice."""
    return [
        (field.name, choice)
        for field in dataclasses.fields(cls)
        if all(isinstance(choice, str) for choice in getattr(field.type, "__args__", (None,)))
        for choice in getattr(field.type, "__args__", ())
    ]


def check_repeats(cls: type) -> None:
    """The same generator state gives the same bits, for a batch and for the trigger."""
    stream = _stream(0)
    learner = toy_learner(stream)
    batch = stream.victim_batch(0, 0)
    for attack in _variants(cls):
        results = []
        for _ in range(2):
            view = View(0, {}, _things(learner, stream), attack.needs)
            rng = torch.Generator().manual_seed(5)
            results.append(
                (attack.poison(batch, view, rng=rng).x, attack.trigger(stream.trigger_batch(3, 0), view, rng=rng).x)
            )
        assert torch.equal(results[0][0], results[1][0]), f"{attack}: two poisoned batches differ"
        assert torch.equal(results[0][1], results[1][1]), f"{attack}: two triggers differ"


def check_leaves_the_world_alone(cls: type) -> None:
    """Batch, parameters, buffers, gradients and every module's train flag are as before; global randomness too."""
    stream = _stream(0)
    learner = toy_learner(stream)
    modules = list(learner.model.modules())
    for i, module in enumerate(modules):
        module.training = i % 2 == 0
    parameter = next(learner.model.parameters())
    parameter.grad = torch.ones_like(parameter)
    for attack in _variants(cls):
        batch = stream.victim_batch(0, 0)
        kept = Batch(batch.x.clone(), batch.y.clone())
        before = learner.snapshot()
        state = torch.get_rng_state()
        view = View(0, {}, _things(learner, stream), attack.needs)
        attack.poison(batch, view, rng=torch.Generator().manual_seed(1))
        attack.after_step(view, torch.Generator().manual_seed(1))
        attack.trigger(stream.trigger_batch(3, 0), view, rng=torch.Generator().manual_seed(1))
        after = learner.snapshot()
        assert torch.equal(batch.x, kept.x), f"{attack} changed its input"
        assert torch.equal(batch.y, kept.y), f"{attack} changed the labels"
        for what in ("parameters", "buffers"):
            for name, tensor in getattr(before, what).items():
                assert torch.equal(tensor, getattr(after, what)[name]), f"{attack} changed {what} '{name}'"
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.ones_like(parameter)), f"{attack} changed .grad"
        assert [m.training for m in modules] == [i % 2 == 0 for i in range(len(modules))], (
            f"{attack} left a train flag changed"
        )
        assert torch.equal(state, torch.get_rng_state()), f"{attack} drew from the global generator"


def check_batch_of_one(cls: type) -> None:
    """A batch of one image works, with BatchNorm in eval mode."""
    stream = _stream(0)
    learner = toy_learner(stream)
    batch = stream.victim_batch(0, 0)
    one = Batch(batch.x[:1], batch.y[:1])
    for attack in _variants(cls):
        if getattr(attack, "craft_mode", "eval") == "train":
            continue  # the variance of one value is not defined
        view = View(0, {}, {**_things(learner, stream), Need.TRIGGER: one}, attack.needs)
        sent = attack.poison(one, view, rng=torch.Generator().manual_seed(0))
        assert sent.x.shape == one.x.shape, f"{attack} changed the shape"


def check_keeps_dtype(cls: type) -> None:
    """float64 in, float64 out, on the same device."""
    stream = _stream(0)
    learner = toy_learner(stream, dtype=torch.float64)
    batch = stream.victim_batch(0, 0)
    double = Batch(batch.x.double(), batch.y)
    attack = _variants(cls)[0]
    view = View(0, {}, _as_dtype(_things(learner, stream), torch.float64), attack.needs)
    sent = attack.poison(double, view, rng=torch.Generator().manual_seed(0))
    assert sent.x.dtype == torch.float64, f"{attack} returns {sent.x.dtype}"
    assert sent.x.device == double.x.device, f"{attack} moved the batch"


def check_budget(cls: type) -> None:
    """Every variant stays inside its ball and inside [0, 1], keeps labels, and uses some of the budget."""
    stream = _stream(0)
    learner = toy_learner(stream)
    for attack in _variants(cls):
        view = View(0, {}, _things(learner, stream), attack.needs)
        for batch, act in ((stream.victim_batch(1, 0), attack.poison), (stream.trigger_batch(3, 0), attack.trigger)):
            sent = act(batch, view, rng=torch.Generator().manual_seed(0))
            flat = (sent.x - batch.x).flatten(1).double()
            radius = flat.abs().amax(1) if attack.ball.norm == "linf" else flat.norm(dim=1)
            assert float(radius.max()) <= attack.ball.eps + 1e-5, f"{attack} left its ball: {float(radius.max())}"
            assert _may_hold_back(cls) or float(radius.max()) > 0.5 * attack.ball.eps or act == attack.trigger, (
                f"{attack} hardly uses its budget"
            )
            assert float(sent.x.min()) >= 0, f"{attack} goes below 0"
            assert float(sent.x.max()) <= 1, f"{attack} goes above 1"
            assert torch.equal(sent.y, batch.y), f"{attack} changed labels"


def check_zero_budget(cls: type) -> None:
    """With eps = 0 the batch comes back bit for bit."""
    _check_identity(cls, {"eps": 0.0})


def check_zero_ratio(cls: type) -> None:
    """With poison_ratio = 0 the batch comes back bit for bit."""
    _check_identity(cls, {"eps": BUDGET, "poison_ratio": 0.0})


def _check_identity(cls: type, values: Mapping[str, Any]) -> None:
    kind, name = _kind_and_name(cls)
    attack: Attack = build(kind, {"name": name, **values})
    stream = _stream(0)
    learner = toy_learner(stream)
    view = View(0, {}, _things(learner, stream), attack.needs)
    batch = stream.victim_batch(0, 0)
    for act in (attack.poison, attack.trigger):
        assert torch.equal(act(batch, view, rng=torch.Generator().manual_seed(0)).x, batch.x), (
            f"{attack} is not the identity"
        )


def check_partial_ratio(cls: type) -> None:
    """Half a poisoned batch leaves the same other half clean, batch after batch and in the trigger."""
    kind, name = _kind_and_name(cls)
    attack: Attack = build(kind, {"name": name, "eps": BUDGET, "poison_ratio": 0.5})
    stream = _stream(0)
    learner = toy_learner(stream)
    view = View(0, {}, _things(learner, stream), attack.needs)
    changed = []
    for step, act in ((0, attack.poison), (1, attack.poison), (3, attack.trigger)):
        batch = stream.victim_batch(step, 0)
        sent = act(batch, view, rng=torch.Generator().manual_seed(step))
        changed.append((sent.x != batch.x).flatten(1).any(1))
    limit = int(0.5 * len(changed[0]) + 0.5)
    assert int(torch.stack(changed).any(0).sum()) <= limit, f"{attack} poisons more than half, or moves about"


def check_declares_needs(cls: type) -> None:
    """It runs when it is granted just what it declares."""
    stream = _stream(0)
    learner = toy_learner(stream)
    for attack in _variants(cls):
        things = {need: v for need, v in _things(learner, stream).items() if need in attack.needs}
        view = View(0, {}, things, attack.needs, type(attack).__name__)
        attack.ready(view)
        attack.poison(stream.victim_batch(0, 0), view, rng=torch.Generator().manual_seed(0))


@lru_cache(maxsize=128)
def _losses_after(attack: Attack, norm: Norm) -> tuple[float, ...]:
    """Test loss after the trigger, one a seed, on the toy stream."""
    out = []
    for seed in SEEDS:
        stream = _stream(seed)
        learner = toy_learner(stream, seed=seed)
        run = OnlineRun(steps=3, lr=0.05, images=0)
        out.append(float(run_online(learner, stream, attack, run, seed=seed).trace[-1]["loss"]))
    return tuple(out)


def check_beats_noise(cls: type) -> None:
    """On toy streams the victim ends with a larger loss than under noise of the same budget and schedule.

    By the median over seeds of their ratio. Controls are exempt: they are what is compared with.
    """
    if _is_control(cls):
        return
    kind, name = _kind_and_name(cls)
    attack: Attack = build(kind, {"name": name, **_small(cls)})
    phase = not attack.ready(View(0, {}, {Need.ACCURACY: (1.0, 1.0)}))
    noise = Noise(eps=BUDGET, phase=phase)
    ours, chance = _losses_after(attack, "linf"), _losses_after(noise, "linf")
    ratio = median(a / b for a, b in zip(ours, chance, strict=True))
    assert ratio > MARGIN, f"{name}: median test loss as a multiple of that under noise {ratio:.3g}"


def _trace(outcome: Outcome) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in outcome.trace]


def _defended(defence: Defence | None) -> Outcome:
    stream = _stream(0)
    attack = Noise(eps=BUDGET)
    return run_online(toy_learner(stream, defence=defence), stream, attack, OnlineRun(steps=3, lr=0.05), seed=0)


def check_neutral(cls: Any) -> None:  # noqa: ANN401  (a registered defence class)
    """With its neutral settings the run is the undefended run, bit for bit."""
    kind, name = _kind_and_name(cls)
    defence: Defence = build(kind, {"name": name, **cls.neutral})
    assert _trace(_defended(defence)) == _trace(_defended(None)), f"{name} with {cls.neutral} changes the run"


def check_acts(cls: Any) -> None:  # noqa: ANN401  (a registered defence class)
    """With its active settings the run differs from the undefended one."""
    kind, name = _kind_and_name(cls)
    if cls.active == cls.neutral:
        return
    defence: Defence = build(kind, {"name": name, **cls.active})
    assert _trace(_defended(defence)) != _trace(_defended(None)), f"{name} with {cls.active} changes nothing"


def check_defence_leaves_the_batch_alone(cls: Any) -> None:  # noqa: ANN401  (a registered defence class)
    """The received batch is not written to."""
    kind, name = _kind_and_name(cls)
    stream = _stream(0)
    learner = toy_learner(stream, defence=build(kind, {"name": name, **cls.active}))
    batch = stream.victim_batch(0, 0)
    kept = batch.x.clone()
    learner.update(batch)
    assert torch.equal(batch.x, kept), f"{name} wrote to the batch that it was given"


def check_learns_from_one(cls: Any) -> None:  # noqa: ANN401  (a registered defence class)
    """A batch of one image works, with BatchNorm in eval mode."""
    kind, name = _kind_and_name(cls)
    stream = _stream(0)
    learner = toy_learner(stream, defence=build(kind, {"name": name, **cls.active}))
    learner.update_mode = "eval"
    batch = stream.victim_batch(0, 0)
    done = learner.update(Batch(batch.x[:1], batch.y[:1]))
    assert math.isfinite(done.update_norm), f"{name} breaks on a batch of one"


def check_factors(cls: Any) -> None:  # noqa: ANN401  (a registered defence class)
    """Where `bound` is content with the lengths of rows, it does to rows what it says of lengths, in every setting."""
    kind, name = _kind_and_name(cls)
    settings: list[dict[str, Any]] = [dict(cls.neutral), dict(cls.active)]
    settings += [{**settings[1], field: choice} for field, choice in _choices(cls)]
    stream = _stream(0)
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.0, 1e-3, 0.1, 1, 9, 1e3]]).T
    lengths = torch.linalg.vector_norm(rows, dim=1)
    shapes = {"all": torch.Size([4])}
    for values in settings:
        defence: Defence = build(kind, {"name": name, **values})
        if not overrides(defence, "bound"):
            continue
        view = toy_learner(stream, defence=defence).view()
        try:
            bounded = defence.bound(Updates(rows, shapes), view).rows
        except ConfigError:
            continue  # it needs whole updates of the model
        unformed = defence.bound(Updates(lambda: rows, shapes, lengths=lengths), view)
        assert torch.allclose(bounded, unformed.rows), f"{defence} bounds rows otherwise when it knows their lengths"
        if unformed.factors is not None:
            assert torch.allclose(bounded, rows * unformed.factors.unsqueeze(1)), f"{defence}: wrong factors"


def check_declares_views(cls: type) -> None:
    """It runs when it is granted just what it declares."""
    kind, name = _kind_and_name(cls)
    stream = _stream(0)
    learner = toy_learner(stream, defence=build(kind, {"name": name}))
    try:
        learner.update(stream.victim_batch(0, 0))
    except UserError as error:
        raise AssertionError(f"{name}: {error}") from error


def _detectors(cls: type) -> list[Detector]:
    """The class as it is, and once for every value of its named choices."""
    kind, name = _kind_and_name(cls)
    tables = [{"name": name}, *({"name": name, field: choice} for field, choice in _choices(cls))]
    made: list[Detector] = [build(kind, table) for table in tables]
    return list(dict.fromkeys(made))


def _scores(detector: Detector, learner: Learner, batch: Batch, fitted: Memory) -> Tensor:
    """What the detector says, granted just what it declares."""
    things: dict[Need, Any] = {Need.MODEL: learner.white_box, Need.HISTORY: learner.history}
    granted = {need: thing for need, thing in things.items() if need in detector.needs}
    return detector.score(batch, View(learner.step, {}, granted, detector.needs, type(detector).__name__), fitted)


def _fitted(detector: Detector, stream: Stream, seed: int = 0) -> Memory:
    """What it remembers of the toy stream's burn-in images, as the burned-in model sees them."""
    if not detector.fits:
        return {}
    clean = observe(toy_learner(stream, seed=seed).model, stream.burn_in.batches(60))
    return detector.fit(clean, rng=torch.Generator().manual_seed(3))


def _retaught(stream: Stream, seed: int) -> Learner:
    """A toy learner that was then taught that class 0 is class 1, and remembers how it was before."""
    learner = toy_learner(stream, seed=seed)
    before = learner.snapshot()
    learner.history = History(checkpoints={0: Weights(before.parameters, before.buffers, "before")})
    for x, y in stream.burn_in.batches(20):
        learner.update(Batch(x, torch.where(y == 0, 1, y)))
    return learner


def _auroc(clean: Tensor, odd: Tensor) -> float:
    """How often a clean sample scores above an odd one; ties count half."""
    above, equal = clean[:, None] > odd, clean[:, None] == odd
    return float((above.double() + 0.5 * equal.double()).mean())


def check_separates(cls: type) -> None:
    """With its defaults it puts blatant anomalies below clean images, AUROC above 0.9 on average over two streams.

    A detector that is fitted must do so for inverted images. Another may instead for images of a class that the model
    was just taught to call by the name of another one: they are wrong as labelled, and the model has changed its mind.
    """
    kind, name = _kind_and_name(cls)
    detector: Detector = build(kind, {"name": name})
    inverted, renamed = [], []
    for seed in (0, 1):
        stream = _stream(seed)
        test, learner, changed = stream.test.all(), toy_learner(stream, seed=seed), _retaught(stream, seed)
        fitted = _fitted(detector, stream, seed)
        odd = _scores(detector, learner, Batch(1 - test.x, test.y), fitted)
        inverted.append(_auroc(_scores(detector, learner, test, fitted), odd))
        scores = _scores(detector, changed, test, fitted)
        renamed.append(_auroc(scores[test.y != 0], scores[test.y == 0]))
    found = {"inverted images": mean(inverted)} | ({} if detector.fits else {"a renamed class": mean(renamed)})
    assert max(found.values()) > 0.9, f"{name} does not separate blatant anomalies; AUROC: {found}"


def check_scores_in_any_company(cls: type) -> None:
    """A sample has the same score in a batch, in another order, in pieces and alone: one number, not NaN."""
    stream = _stream(0)
    learner = _retaught(stream, 0)
    x, y = stream.victim_batch(0, 0)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(2))
    for detector in _detectors(cls):
        fitted = _fitted(detector, stream)
        whole = _scores(detector, learner, Batch(x, y), fitted)
        assert whole.shape == y.shape, f"{detector} gives {tuple(whole.shape)} scores of {len(y)} samples"
        assert whole.device == x.device, f"{detector} gives scores on {whole.device} of a batch on {x.device}"
        assert not whole.requires_grad, f"{detector} gives scores with a gradient"
        assert not whole.isnan().any(), f"{detector} gives NaN"
        permuted = _scores(detector, learner, Batch(x[order], y[order]), fitted)
        places = torch.split(torch.arange(len(y)), [7, 1, 12])
        pieces = [_scores(detector, learner, Batch(x[i], y[i]), fitted) for i in places]
        for what, other in (("in another order", permuted), ("in pieces", torch.cat(pieces)[order])):
            assert torch.allclose(whole[order], other, rtol=1e-3, atol=1e-4), f"{detector} scores otherwise {what}"


def check_detector_leaves_the_world_alone(cls: type) -> None:
    """Batch, notes, parameters, buffers, gradients and train flags are as before; global randomness too."""
    stream = _stream(0)
    learner = _retaught(stream, 0)
    modules = list(learner.model.modules())
    for i, module in enumerate(modules):
        module.training = i % 2 == 0
    parameter = next(learner.model.parameters())
    parameter.grad = torch.ones_like(parameter)
    for detector in _detectors(cls):
        before, state = learner.snapshot(), torch.get_rng_state()
        fitted = _fitted(detector, stream)
        batch = stream.victim_batch(0, 0)
        kept, notes = Batch(batch.x.clone(), batch.y.clone()), {name: t.clone() for name, t in fitted.items()}
        _scores(detector, learner, batch, fitted)
        after = learner.snapshot()
        for what in ("parameters", "buffers"):
            for name, tensor in getattr(before, what).items():
                assert torch.equal(tensor, getattr(after, what)[name]), f"{detector} changed {what} '{name}'"
        assert torch.equal(batch.x, kept.x), f"{detector} changed the batch"
        assert torch.equal(batch.y, kept.y), f"{detector} changed the labels"
        assert fitted.keys() == notes.keys(), f"{detector} changed what it was fitted to"
        assert all(torch.equal(fitted[name], t) for name, t in notes.items()), (
            f"{detector} changed what it was fitted to"
        )
        assert torch.equal(parameter.grad, torch.ones_like(parameter)), f"{detector} changed .grad"
        flags = [m.training for m in modules]
        assert flags == [i % 2 == 0 for i in range(len(modules))], f"{detector} left a train flag changed"
        assert torch.equal(state, torch.get_rng_state()), f"{detector} drew from the global generator"


def check_fit_repeats(cls: type) -> None:
    """The same generator state and samples give the same notes and scores, bit for bit; it notes something at all."""
    stream = _stream(0)
    learner = _retaught(stream, 0)
    batch = stream.victim_batch(0, 0)
    for detector in _detectors(cls):
        one, two = (_fitted(detector, stream) for _ in range(2))
        assert bool(one) is detector.fits, f"{detector}: fits is {detector.fits}, and it notes {sorted(one)}"
        assert one.keys() == two.keys(), f"{detector} notes other things the second time"
        assert all(torch.equal(one[name], two[name]) for name in one), f"{detector}: two fits differ"
        scores = [_scores(detector, learner, batch, fitted) for fitted in (one, two)]
        assert torch.equal(*scores), f"{detector}: scores differ"


def check_fitted_can_be_saved(cls: type) -> None:
    """What it remembers goes through a safetensors file, and gives the same scores afterwards, bit for bit."""
    stream = _stream(0)
    learner = _retaught(stream, 0)
    batch = stream.victim_batch(0, 0)
    for detector in _detectors(cls):
        fitted = _fitted(detector, stream)
        read = safetensors.torch.load(safetensors.torch.save({name: t.contiguous() for name, t in fitted.items()}))
        scores = [_scores(detector, learner, batch, notes) for notes in (fitted, read)]
        assert torch.equal(*scores), f"{detector} scores otherwise once its notes were saved"


def check_detector_declares_needs(cls: type) -> None:
    """It scores when it is granted just what it declares."""
    stream = _stream(0)
    learner = _retaught(stream, 0)
    for detector in _detectors(cls):
        try:
            _scores(detector, learner, stream.victim_batch(0, 0), _fitted(detector, stream))
        except UserError as error:
            raise AssertionError(f"{detector}: {error}") from error
