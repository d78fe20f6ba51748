"""What every component must pass: named checks, each a function that raises AssertionError with what is wrong.

An author runs them on one class:

    for check in attack_checks():
        check(MyAttack)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from statistics import mean
from typing import Any

import torch

from mithridate.attacks.noise import Noise
from mithridate.core import Attack, Batch, Defence, Need, View
from mithridate.data.stream import Stream
from mithridate.errors import ConfigError, UserError
from mithridate.learning.learner import Learner
from mithridate.learning.online import OnlineRun, Outcome, run_online
from mithridate.norms import Norm
from mithridate.registry import KINDS, build, config_of, entries
from mithridate.testing.toy import toy_learner, toy_stream

Check = Callable[[type], None]
TIMES = ("seconds", "craft_seconds", "update_seconds")
BUDGET = 0.15
"""Radius used on the toy stream, in pixel units."""
INNER_STEPS = 3
SEEDS = (0, 1, 2, 3)


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
    for field in dataclasses.fields(cls):
        choices = getattr(field.type, "__args__", ())
        if choices and all(isinstance(c, str) for c in choices) and field.name != "norm":
            made += [build(kind, {**base, field.name: choice}) for choice in choices]
    return list(dict.fromkeys(made))


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
        attack.fed(view, torch.Generator().manual_seed(1))
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
            assert _is_control(cls) or float(radius.max()) > 0.5 * attack.ball.eps or act == attack.trigger, (
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
    """On the toy stream the victim ends with a larger mean loss than under noise of the same budget and schedule.

    Controls are exempt: they are what is compared with.
    """
    if _is_control(cls):
        return
    kind, name = _kind_and_name(cls)
    attack: Attack = build(kind, {"name": name, **_small(cls)})
    phase = not attack.ready(View(0, {}, {Need.ACCURACY: (1.0, 1.0)}))
    noise = Noise(eps=BUDGET, phase=phase)
    ours, chance = _losses_after(attack, "linf"), _losses_after(noise, "linf")
    assert mean(ours) > mean(chance), f"{name}: mean test loss {mean(ours):.4g}, noise {mean(chance):.4g}"


def _trace(outcome: Outcome) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in outcome.trace]


def _defended(defence: Defence | None) -> Outcome:
    stream = _stream(0)
    attack = Noise(eps=BUDGET)
    return run_online(toy_learner(stream, defence=defence), stream, attack, OnlineRun(steps=3, lr=0.05), seed=0)


def check_neutral(cls: type) -> None:
    """With its neutral settings the run is the undefended run, bit for bit."""
    kind, name = _kind_and_name(cls)
    defence: Defence = build(kind, {"name": name, **cls.neutral})  # type: ignore[attr-defined]
    assert _trace(_defended(defence)) == _trace(_defended(None)), f"{name} with {cls.neutral} changes the run"  # type: ignore[attr-defined]


def check_acts(cls: type) -> None:
    """With its active settings the run differs from the undefended one."""
    kind, name = _kind_and_name(cls)
    if cls.active == cls.neutral:  # type: ignore[attr-defined]
        return
    defence: Defence = build(kind, {"name": name, **cls.active})  # type: ignore[attr-defined]
    assert _trace(_defended(defence)) != _trace(_defended(None)), f"{name} with {cls.active} changes nothing"  # type: ignore[attr-defined]


def check_defence_leaves_the_batch_alone(cls: type) -> None:
    """The received batch is not written to."""
    kind, name = _kind_and_name(cls)
    stream = _stream(0)
    learner = toy_learner(stream, defence=build(kind, {"name": name, **cls.active}))  # type: ignore[attr-defined]
    batch = stream.victim_batch(0, 0)
    kept = batch.x.clone()
    learner.update(batch)
    assert torch.equal(batch.x, kept), f"{name} wrote to the batch that it was given"


def check_learns_from_one(cls: type) -> None:
    """A batch of one image works, with BatchNorm in eval mode."""
    kind, name = _kind_and_name(cls)
    stream = _stream(0)
    learner = toy_learner(stream, defence=build(kind, {"name": name, **cls.active}))  # type: ignore[attr-defined]
    learner.update_mode = "eval"
    batch = stream.victim_batch(0, 0)
    done = learner.update(Batch(batch.x[:1], batch.y[:1]))
    assert math.isfinite(done.update_norm), f"{name} breaks on a batch of one"


def check_declares_views(cls: type) -> None:
    """It runs when it is granted just what it declares."""
    kind, name = _kind_and_name(cls)
    stream = _stream(0)
    learner = toy_learner(stream, defence=build(kind, {"name": name}))
    try:
        learner.update(stream.victim_batch(0, 0))
    except UserError as error:
        raise AssertionError(f"{name}: {error}") from error
