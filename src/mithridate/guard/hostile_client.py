"""What a hostile client of a federation sends instead of its honest update: pure functions of states.

States are full models (parameters and buffers) as tensors by name; an update is a state minus the global one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.registry import settings
from mithridate.core.seeding import generator
from mithridate.maths.calculus import (
    Normalise,
    Objective,
    Parameters,
    add,
    alignment_gradient,
    gradient,
    hessian_vector_product,
    product_gradient,
    unit,
)
from mithridate.maths.norms import Norm, clip_rows

Kind = Literal["accumulative", "sign_flip", "nan", "huge", "shape", "missing", "count", "garbage"]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Tensors = Mapping[str, Tensor]
Memory = dict[str, Tensor]
"""What the client remembers between rounds: its velocity and its trigger."""

CYCLE: tuple[Kind, ...] = ("nan", "shape", "missing", "huge")
"""What `garbage` sends in turn."""

GARBAGE: tuple[Kind, ...] = (*CYCLE, "count", "garbage")
"""Kinds that only break things; they need neither model nor data."""

HUGE = 1e30
"""What `huge` puts into every weight: finite in float32, ruinous in an average."""

ABSURD_COUNT = 10**15
"""The number of examples that `count` claims."""


@settings
class Hostile:
    """A hostile client: one that poisons by accumulation, or one that sends garbage.

    `accumulative` moves the model, round by round, to where one trigger update does the most harm. What it wants the
    whole federation to do in a round is `honest_weight` times the honest update, plus a step of length lr * lam along
    the gradient of <grad L(S_val), P>, P being the trigger update; in round `trigger_round` it wants lr * trigger_scale
    times P itself, and afterwards it is honest again. With a wish W and its own honest update U it sends
    boost * W - (boost - 1) * U: the recovered offset, as far as one client can know it, its own honest update standing
    for those of all others. `boost` = number of clients (of equal weight) / hostile ones makes the wish come true.

    Which P: `optimised` is Algorithm 2 as printed, P(G_T) starting at the reversed trigger gradient and moving by
    -alpha * grad L(S_T) every round; `reverse` is Eq. (13), P = -grad L(S_T) of the current model, so that the two
    gradients are aligned and the trigger round then ascends; `clean` is the released code, P = grad L(S_T), so that
    the gradients are turned against each other and an ordinary step on clean data does the harm.

    Algorithm 2 also adds random vectors M that sum to zero over the clients; here over the hostile ones, which derive
    them from a common seed.

    Args:
        kind: `accumulative`; `sign_flip` (the honest update reversed, times `boost`); or garbage: `nan`, `huge` (1e30
            in every weight), `shape` (every array of another shape), `missing` (one array left out), `count` (an honest
            model and an absurd number of examples), `garbage` (`nan`, `shape`, `missing`, `huge` in turn, one a round;
            each hostile client begins one later in that order than the one before it in `partitions`).
        partitions: Numbers of the hostile clients (`partition-id` of the node).
        trigger_round: Server round of the trigger, from 1; earlier ones are accumulative.
        trigger: `optimised`, `reverse` or `clean`, see above.
        trigger_scale: Length of the trigger step in units of lr, s of the released code, >= 0.
        lam: Weight of the gradient of the product, >= 0.
        alpha: Step of the optimised trigger, >= 0.
        lr: Step size beta of the federation that the wish is expressed in, > 0.
        momentum: Of the accumulative steps, in [0, 1); the released code's victim has 0.9.
        normalise: How gradients enter their product: as they are (`none`, the text), as one unit vector (`global`, the
            released code's cosine) or one a tensor (`tensor`).
        honest_weight: Share of the honest update in the wish, in [0, 1]: the text has 1, the released code 0.
        boost: Factor of the recovered offset, >= 1.
        bootstrap: Draw S_val anew each round, with replacement.
        noise: Standard deviation of the entries of M, >= 0; without effect for a single hostile client.
        max_norm: eta, the longest update that it dares to send, > 0; `inf` is off.
        norm: Of `max_norm`.
        seed: Of all that is drawn.

    Raises:
        ConfigError: No partition is named.

    Source:
        Pang et al., NeurIPS 2021, section 3.3, Eq. (10)-(14), Algorithm 2 and Appendix C.1.
    """

    kind: Kind = "accumulative"
    partitions: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    trigger_round: Annotated[int, Field(ge=1)] = 20
    trigger: Literal["optimised", "reverse", "clean"] = "reverse"
    trigger_scale: Factor = 1.0
    lam: Factor = 0.02
    alpha: Factor = 0.0
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    normalise: Normalise = "none"
    honest_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    boost: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    bootstrap: bool = False
    noise: Factor = 0.0
    max_norm: Annotated[float, Field(gt=0)] = math.inf
    norm: Norm = "l2"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.partitions:
            raise ConfigError("hostile: no partition is named, so nobody would be hostile; name one or more.")


@dataclass(frozen=True, eq=False)
class Accomplice:
    """What the accumulative client holds besides the global model that the server sends it.

    Args:
        module: Of the federation's architecture; its weights are overwritten.
        validation: Its own images S_val.
        trigger: Its local batch S_T that becomes the trigger.
    """

    module: nn.Module
    validation: Batch
    trigger: Batch


def hostile_state(
    model: Tensors,
    honest: Tensors,
    hostile: Hostile,
    *,
    server_round: int,
    partition: int,
    memory: Memory,
    accomplice: Callable[[], Accomplice],
) -> dict[str, Tensor]:
    """What the client sends in place of its honest state. Buffers and counters are the honest ones, garbage apart.

    Args:
        model: The global state that it was sent.
        honest: Its state after honest local training.
        hostile: Settings.
        server_round: From 1.
        partition: Which of the hostile clients it is; one of `hostile.partitions`.
        memory: Its notes; written to.
        accomplice: Gives what the accumulative attack needs; not called by other kinds.
    """
    if hostile.kind in GARBAGE:
        turn = server_round - 1 + hostile.partitions.index(partition)
        return _garbage(honest, CYCLE[turn % len(CYCLE)] if hostile.kind == "garbage" else hostile.kind)
    floats = [name for name, t in honest.items() if t.is_floating_point()]
    if hostile.kind == "sign_flip":
        update = {name: -hostile.boost * (honest[name] - model[name].to(honest[name])) for name in floats}
    elif server_round > hostile.trigger_round:
        return dict(honest)
    else:
        with_what = accomplice()
        with_what.module.load_state_dict(dict(model))
        parameters = [name for name, p in with_what.module.named_parameters() if p.requires_grad]
        own = {name: honest[name] - model[name].to(honest[name]) for name in parameters}
        update = _accumulative(own, with_what, hostile, server_round, partition, memory)
    update = _bounded(update, hostile)
    return {name: model[name].to(t) + update[name] if name in update else t.clone() for name, t in honest.items()}


def _garbage(honest: Tensors, kind: Kind) -> dict[str, Tensor]:
    if kind == "count":
        return dict(honest)  # what it lies about is no array
    if kind == "missing":
        return {name: honest[name] for name in list(honest)[1:]}
    if kind == "shape":
        return {name: torch.cat([t.reshape(-1), t.reshape(-1)]) for name, t in honest.items()}
    value = math.nan if kind == "nan" else HUGE
    return {name: torch.full_like(t, value) if t.is_floating_point() else t for name, t in honest.items()}


def _accumulative(
    own: Parameters, accomplice: Accomplice, hostile: Hostile, server_round: int, partition: int, memory: Memory
) -> Parameters:
    """The update to send in a round up to the trigger's."""
    box = WhiteBox(accomplice.module, F.cross_entropy)
    validation = accomplice.validation
    if hostile.bootstrap:
        rng = generator("hostile validation", hostile.seed, server_round)
        drawn = torch.randint(len(validation.y), (len(validation.y),), generator=rng).to(validation.y.device)
        validation = Batch(validation.x[drawn], validation.y[drawn])
    with box.objective("eval") as objective:
        at = box.parameters
        g_trigger = gradient(objective, at, *accomplice.trigger)
        poison = _trigger_update(g_trigger, hostile, memory)
        if server_round == hostile.trigger_round:
            wish = {name: -hostile.lr * hostile.trigger_scale * t for name, t in poison.items()}
        else:
            uphill = _product_gradient(objective, at, validation, accomplice.trigger, g_trigger, poison, hostile)
            velocity = {name: -hostile.lr * hostile.lam * t for name, t in uphill.items()}
            if hostile.momentum:
                velocity = {n: t + hostile.momentum * memory.get(f"v.{n}", 0.0) for n, t in velocity.items()}
                memory.update({f"v.{name}": t for name, t in velocity.items()})
            wish = add(velocity, own, scale=hostile.honest_weight)
    sent = add({name: hostile.boost * t for name, t in wish.items()}, own, scale=-(hostile.boost - 1))
    noise = _zero_sum_noise(sent, hostile, server_round, partition)
    return add(sent, noise) if noise else sent


def _trigger_update(g: Parameters, hostile: Hostile, memory: Memory) -> Parameters:
    """P(G_T), as if it were a gradient: the server steps against it."""
    if hostile.trigger == "clean":
        return g
    reverse = {name: -t for name, t in g.items()}
    if hostile.trigger == "reverse":
        return reverse
    if not any(name.startswith("p.") for name in memory):
        poison = _bounded(reverse, hostile)
    else:
        poison = _bounded(add({name: memory[f"p.{name}"] for name in g}, g, scale=-hostile.alpha), hostile)
    memory.update({f"p.{name}": t for name, t in poison.items()})
    return poison


def _product_gradient(
    objective: Objective,
    at: Parameters,
    validation: Batch,
    trigger: Batch,
    g_trigger: Parameters,
    poison: Parameters,
    hostile: Hostile,
) -> Parameters:
    """Gradient in the parameters of <grad L(S_val), P>, which the accumulative steps descend."""
    g_validation = gradient(objective, at, *validation)
    if hostile.trigger == "optimised":  # P is a number that was fixed before: only the validation gradient moves
        towards = alignment_gradient(g_validation, unit(poison, hostile.normalise), hostile.normalise)
        return hessian_vector_product(objective, at, *validation, towards)
    found = product_gradient(
        objective, at, validation, trigger, normalise=hostile.normalise, gradients=(g_validation, g_trigger)
    )
    return found if hostile.trigger == "clean" else {name: -t for name, t in found.items()}


def _zero_sum_noise(like: Parameters, hostile: Hostile, server_round: int, partition: int) -> Parameters:
    """M of this client: what all hostile clients draw sums to zero. Empty where there is nothing to hide in."""
    if not hostile.noise or len(hostile.partitions) == 1:
        return {}

    def draw(rng: Generator) -> Parameters:
        return {
            n: hostile.noise * torch.randn(t.shape, generator=rng, dtype=t.dtype).to(t.device) for n, t in like.items()
        }

    drawn = {p: draw(generator("hostile noise", hostile.seed, server_round, p)) for p in set(hostile.partitions)}
    mean = {name: torch.stack([d[name] for d in drawn.values()]).mean(0) for name in like}
    return add(drawn[partition], mean, scale=-1.0)


def _bounded(update: Parameters, hostile: Hostile) -> Parameters:
    """The update, no longer than eta as a whole."""
    if math.isinf(hostile.max_norm):
        return update
    row = torch.cat([t.reshape(-1) for t in update.values()]).unsqueeze(0)
    pieces = torch.split(clip_rows(row, hostile.max_norm, hostile.norm)[0], [t.numel() for t in update.values()])
    return {name: piece.view(update[name].shape) for name, piece in zip(update, pieces, strict=True)}
