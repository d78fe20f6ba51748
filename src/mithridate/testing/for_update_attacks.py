"""What every attack on federated rounds must pass besides `component_checks`; used as those of `conformance`."""

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor

from mithridate.core.batch import Batch
from mithridate.core.errors import UserError
from mithridate.core.registry import build, entries
from mithridate.core.update_attack import Honest, UpdateAttack
from mithridate.core.view import Need, View
from mithridate.data.shards import Shards
from mithridate.maths.norms import Norm, sample_norms
from mithridate.simulation.clients import FederatedRun, Federation, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.per_client.gradients import client_gradients
from mithridate.testing.conformance import MARGIN, TIMES, Check
from mithridate.testing.toy import toy_learner, toy_stream
from mithridate.training.learner import Learner

CLIENTS, HOSTILE = 10, 4
"""Clients of the toy federation, ten images each, and how many of them are hostile where it matters."""

RUN = FederatedRun(rounds=3, lr=0.05)
LONG_RUN = FederatedRun(rounds=10, lr=0.05, batch_norm="frozen")
"""Where harm is measured: statistics of so few samples would move the test loss more than most attacks."""
SEEDS = (0, 1, 2, 3, 4)
RADIUS = 0.05
"""Shorter than what any attack would send to the toy federation."""


def update_attack_checks() -> Sequence[Check]:
    """Checks for attacks on federated rounds, besides `component_checks`."""
    return (
        check_update_repeats,
        check_leaves_the_round_alone,
        check_shape_and_dtype,
        check_one_hostile_client,
        check_nobody_hostile,
        check_update_declares_needs,
        check_radius,
        check_harm,
    )


def _name(cls: type) -> str:
    return next(name for name, entry in entries("update_attack").items() if entry.cls is cls)


def _variants(cls: Any) -> list[UpdateAttack]:  # noqa: ANN401  (a registered class)
    """The class as it is, with each preset, and once for every value of its named choices."""
    name = _name(cls)
    tables: list[dict[str, Any]] = [{"name": name}]
    tables += [{"name": name, "preset": preset} for preset in entries("update_attack")[name].presets]
    tables += [
        {"name": name, field.name: choice}
        for field in dataclasses.fields(cls)
        for choice in getattr(field.type, "__args__", ())
        if isinstance(choice, str)
    ]
    made: list[UpdateAttack] = [build("update_attack", table) for table in tables]
    return list(dict.fromkeys(made))


@lru_cache(maxsize=8)
def _federation(seed: int) -> Federation:
    return federate(toy_stream(seed), Shards(clients=CLIENTS), seed=seed)


def _round(learner: Learner, hostile: int, dtype: torch.dtype = torch.float32) -> tuple[Honest, dict[Need, Any]]:
    """A round of the toy federation, as an attacker sees it before it sends, and all that could be granted."""
    federation = _federation(0)
    _, data = federation.round(0, RUN)
    x, y = data.x.to(dtype), data.y
    rows = client_gradients(learner.model, learner.criterion, x, y)
    honest = rows[hostile:]
    total = honest.sum(0)
    seen = Honest(
        total,
        total.clone(),
        len(honest),
        x[:hostile],
        y[:hostile],
        honest,
        lambda x, y: client_gradients(learner.model, learner.criterion, x, y),
    )
    validation = federation.stream.validation.all()
    things = {
        Need.MODEL: learner.white_box,
        Need.VALIDATION: Batch(validation.x.to(dtype), validation.y),
        Need.TRIGGER: Batch(x.flatten(0, 1), y.flatten()),
        Need.ACCURACY: (0.9, 0.9),
    }
    return seen, things


def _view(attack: UpdateAttack, things: dict[Need, Any]) -> View:
    return View(0, {}, things, attack.needs, type(attack).__name__)


def _all_sent(attack: UpdateAttack, honest: Honest, view: View) -> tuple[Tensor, Tensor]:
    """What it sends in a round, and then in the trigger round."""
    rng = torch.Generator().manual_seed(5)
    first = attack.craft(honest, view, rng)
    attack.after_step(view, rng)
    return first, attack.craft_trigger(honest, view, rng)


def check_update_repeats(cls: type) -> None:
    """The same generator state gives the same bits, in a round and in the trigger round."""
    learner = toy_learner(_federation(0).stream)
    honest, things = _round(learner, HOSTILE)
    for attack in _variants(cls):
        one, two = (_all_sent(attack, honest, _view(attack, things)) for _ in range(2))
        assert torch.equal(one[0], two[0]), f"{attack}: what it sends in a round differs"
        assert torch.equal(one[1], two[1]), f"{attack}: what it sends in the trigger round differs"


def check_leaves_the_round_alone(cls: type) -> None:
    """Honest rows and sums, its own data, model, gradients, flags and global randomness are as before."""
    learner = toy_learner(_federation(0).stream)
    modules = list(learner.model.modules())
    for i, module in enumerate(modules):
        module.training = i % 2 == 0
    parameter = next(learner.model.parameters())
    parameter.grad = torch.ones_like(parameter)
    for attack in _variants(cls):
        honest, things = _round(learner, HOSTILE)
        kept, _ = _round(learner, HOSTILE)
        before, state = learner.snapshot(), torch.get_rng_state()
        view = _view(attack, things)
        attack.ready(view) if Need.ACCURACY in attack.needs else None
        _all_sent(attack, honest, view)
        after = learner.snapshot()
        for field in ("total", "bounded_total", "n_honest", "x", "y", "rows", "own"):
            old, now = getattr(kept, field), getattr(honest, field)
            same = torch.equal(old, now) if isinstance(old, Tensor) else old == now
            assert same, f"{attack} changed `{field}` of what it was shown"
        for what in ("parameters", "buffers"):
            for name, tensor in getattr(before, what).items():
                assert torch.equal(tensor, getattr(after, what)[name]), f"{attack} changed {what} '{name}'"
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.ones_like(parameter)), f"{attack} changed .grad"
        flags = [m.training for m in modules]
        assert flags == [i % 2 == 0 for i in range(len(modules))], f"{attack} left a train flag changed"
        assert torch.equal(state, torch.get_rng_state()), f"{attack} drew from the global generator"


def check_shape_and_dtype(cls: type) -> None:
    """One finite row a hostile client, in the honest rows' dtype, on their device, without a gradient."""
    for dtype in (torch.float32, torch.float64):
        learner = toy_learner(_federation(0).stream, dtype=dtype)
        honest, things = _round(learner, HOSTILE, dtype)
        for attack in _variants(cls):
            for sent in _all_sent(attack, honest, _view(attack, things)):
                assert sent.shape == honest.own.shape, f"{attack} sends {tuple(sent.shape)}"
                assert sent.dtype == dtype, f"{attack} sends {sent.dtype} in a round of {dtype}"
                assert sent.device == honest.own.device, f"{attack} sends to {sent.device}"
                assert not sent.requires_grad, f"{attack} sends rows with a gradient"
                assert bool(sent.isfinite().all()), f"{attack} sends NaN or infinity"


def check_one_hostile_client(cls: type) -> None:
    """A single hostile client works; so does a round without honest ones, unless the attack looks at their rows."""
    learner = toy_learner(_federation(0).stream)
    for hostile in (1, CLIENTS):
        if hostile == CLIENTS and cls.every_row:  # type: ignore[attr-defined]  # an UpdateAttack
            continue
        honest, things = _round(learner, hostile)
        for attack in _variants(cls):
            first, second = _all_sent(attack, honest, _view(attack, things))
            assert len(first) == len(second) == hostile, f"{attack} sends other rows than {hostile}"


def _trace(attack: UpdateAttack) -> list[dict[str, Any]]:
    federation = _federation(0)
    outcome = run_federated(toy_learner(federation.stream), federation, attack, RUN)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in outcome.trace]


def check_nobody_hostile(cls: type) -> None:
    """With poison_ratio = 0 the run is the honest run, bit for bit."""
    name = _name(cls)
    attack: UpdateAttack = build("update_attack", {"name": name, "poison_ratio": 0.0})
    clean: UpdateAttack = build("update_attack", {"name": "clean", "phase": not _at_once(attack)})
    assert _trace(attack) == _trace(clean), f"{name} with poison_ratio = 0 changes the run"


def _at_once(attack: UpdateAttack) -> bool:
    """Whether it has no phase before the trigger."""
    return attack.ready(View(0, {}, {Need.ACCURACY: (1.0, 1.0)}))


def check_update_declares_needs(cls: type) -> None:
    """A run goes through when it is granted just what it declares."""
    name = _name(cls)
    for attack in _variants(cls):
        try:
            _trace(dataclasses.replace(attack, poison_ratio=HOSTILE / CLIENTS))  # type: ignore[type-var]  # settings are dataclasses
        except UserError as error:
            raise AssertionError(f"{name}: {error}") from error


def check_radius(cls: type) -> None:
    """An attack with a `radius` sends nothing longer, in either norm."""
    fields = {f.name for f in dataclasses.fields(cls)}
    if "radius" not in fields:
        return
    learner = toy_learner(_federation(0).stream)
    honest, things = _round(learner, HOSTILE)
    for variant in _variants(cls):
        free = _all_sent(variant, honest, _view(variant, things))
        norm: Norm = getattr(variant, "norm", "l2")
        assert max(float(sample_norms(sent, norm).max()) for sent in free) > RADIUS, f"{variant}: RADIUS is too large"
        attack: UpdateAttack = dataclasses.replace(variant, radius=RADIUS)  # type: ignore[type-var]  # settings are dataclasses
        for sent in _all_sent(attack, honest, _view(attack, things)):
            longest = float(sample_norms(sent, norm).max())
            assert longest <= RADIUS * (1 + 1e-5), f"{attack} sends a row of {norm} length {longest}"


class _AsNoise(UpdateAttack):
    """Random rows, each as long as what another attack would have sent."""

    def __init__(self, attack: UpdateAttack) -> None:
        self.attack = attack
        self.needs, self.every_row = attack.needs, attack.every_row  # type: ignore[misc]  # as of the one it stands for

    @property
    def ratio(self) -> float:
        return self.attack.ratio

    def ready(self, view: View) -> bool:
        return self.attack.ready(view)

    def after_step(self, view: View, rng: Generator) -> None:
        self.attack.after_step(view, rng)

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return _random(self.attack.craft(honest, view, rng), rng)

    def craft_trigger(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return _random(self.attack.craft_trigger(honest, view, rng), rng)


def _random(rows: Tensor, rng: Generator) -> Tensor:
    drawn = torch.randn(rows.shape, generator=rng, dtype=rows.dtype).to(rows.device)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    noise: Tensor = drawn * (lengths / torch.linalg.vector_norm(drawn, dim=1, keepdim=True))
    return noise


def _loss_after(attack: UpdateAttack, seed: int, epochs: int) -> float:
    """Test loss after the trigger round; a model that came to NaN has lost without limit."""
    federation = _federation(seed)
    learner = toy_learner(federation.stream, seed=seed, epochs=epochs)
    loss = float(run_federated(learner, federation, attack, LONG_RUN).trace[-1]["loss"])
    return loss if math.isfinite(loss) else math.inf


def check_harm(cls: type) -> None:
    """On toy federations it leaves a larger test loss than random rows of the same lengths; controls are exempt.

    By the median over seeds, either of a model that has learned or of one that has only begun to: rows that hide among
    the honest ones hold up learning, and hardly harm a model that has done with it. An attack that turns the model
    little by little has few rounds here: `lam` is 1, where there is one.
    """
    if cls.control:  # type: ignore[attr-defined]  # an UpdateAttack
        return
    name = _name(cls)
    strong = {"lam": 1.0} if "lam" in {f.name for f in dataclasses.fields(cls)} else {}
    attack: UpdateAttack = build("update_attack", {"name": name, "poison_ratio": HOSTILE / CLIENTS, **strong})
    found = []
    for epochs in (4, 1):
        ratios = [_loss_after(attack, seed, epochs) / _loss_after(_AsNoise(attack), seed, epochs) for seed in SEEDS]
        if median(ratios) > MARGIN:
            return
        found.append(f"after {epochs} epochs {median(ratios):.3g}")
    raise AssertionError(f"{name}: median test loss as a multiple of that under noise of the same length: {found}")
