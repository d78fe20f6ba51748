"""Which attacks are tried on a target within the budget, and why others are not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from mithridate.attacks import (
    Accumulative,
    Clean,
    GateAware,
    GradientInversion,
    Noise,
    Vanilla,
    WorstSamples,
    WrongLabels,
)
from mithridate.audit.plan import ATTACKS, FEDERATED, AuditPlan, FederatedAudit
from mithridate.audit.scaling import Scaled
from mithridate.core.attack import Attack
from mithridate.core.batch import AnyBatch
from mithridate.core.component import check_classes, check_moves
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError, UserError, said
from mithridate.core.model import WhiteBox
from mithridate.core.registry import build, entry
from mithridate.core.tolerance import Tolerance
from mithridate.core.update_attack import UpdateAttack
from mithridate.core.view import Need
from mithridate.defences.chain import Chain
from mithridate.maths.calculus import NoDerivativeError

CONTROLS = frozenset({"clean", "clean_trigger", "noise", "noise_trigger"})
"""What is no attack: the clean stream, one clean batch, and noise in their places."""


@dataclass(frozen=True)
class Trial:
    """One attack as it is tried.

    Args:
        name: As in `plan.ATTACKS`; a control's has `_trigger` if it is one batch alone.
        attack: The component.
        at_once: It has no batches before the last one.
        guarded_only: It is about the defence, and tried where that stands.
    """

    name: str
    attack: Attack | UpdateAttack
    at_once: bool = False
    guarded_only: bool = False


@dataclass(frozen=True)
class Facts:
    """What decides which attacks fit.

    Args:
        batch: Any of the stream.
        box: The model.
        defence: The guard; None if there is none.
        optimiser: Of the model.
        older: Whether there are states from before.
        scale: By which inputs are divided before an attack sees them; None: they are not.
    """

    batch: AnyBatch
    box: WhiteBox
    defence: Defence | None
    optimiser: torch.optim.Optimizer
    older: bool
    scale: Tensor | None


def attempts(plan: AuditPlan, facts: Facts) -> tuple[list[Trial], dict[str, str]]:
    """What is tried, the controls first, and why the rest is not, by name.

    Args:
        plan: Which are wanted, and the budget.
        facts: Of the target.
    """
    tried: list[Trial] = []
    skipped: dict[str, str] = {}
    for name in ATTACKS:
        if not plan.wants(name):
            continue
        try:
            tried += list(_of(name, plan, facts))
        except UserError as error:
            skipped[name] = said(error)
    ratio = plan.budget.poison_ratio
    controls = [Trial("clean", Clean(poison_ratio=ratio))]
    if any(one.at_once for one in tried if one.name not in CONTROLS):
        controls.append(Trial("clean_trigger", Clean(poison_ratio=ratio, phase=False), at_once=True))
    else:
        tried = [one for one in tried if one.name != "noise_trigger"]
    return controls + tried, skipped


def update_attempts(plan: AuditPlan, federated: FederatedAudit) -> list[Trial]:
    """What is tried on a federation, the controls first.

    Args:
        plan: Which are wanted.
        federated: How many clients are hostile.
    """

    def attack(name: str, **values: object) -> UpdateAttack:
        known = entry("update_attack", name).fields
        longer: dict[str, Any] = {k: federated.scale for k in ("scale", "trigger_scale") if k in known}
        built: UpdateAttack = build("update_attack", {"name": name, **longer, **values}, where="[federated]")
        return built

    wanted = [name for name in FEDERATED if plan.wants(name)]
    tried = [Trial("clean", attack("clean"))]
    if "direct" in wanted:
        tried.append(Trial("clean_trigger", attack("clean", phase=False), at_once=True))
    return tried + [
        Trial(name, attack(name, poison_ratio=federated.hostile), at_once=name == "direct") for name in wanted
    ]


def _of(name: str, plan: AuditPlan, facts: Facts) -> Iterator[Trial]:
    """An attack, as often as it is tried.

    Raises:
        UserError: It does not fit; says why.
    """
    budget = plan.budget
    if name in ("label_flip", "worst_samples"):
        replacing: Attack = (WrongLabels if name == "label_flip" else WorstSamples)(poison_ratio=budget.poison_ratio)
        if not (budget.labels if name == "label_flip" else budget.samples):
            raise ConfigError(f"[budget] {'labels' if name == 'label_flip' else 'samples'} = false")
        if name == "label_flip":
            check_classes(facts.batch, who=name)
        yield Trial(name, replacing)
        return
    check_moves(facts.batch, who=name)
    radius = 1.0 if isinstance(budget.eps, tuple) else budget.eps
    ball: dict[str, Any] = {"eps": radius, "norm": budget.norm, "poison_ratio": budget.poison_ratio}
    if radius == 0 or budget.poison_ratio == 0:
        raise ConfigError("[budget] leaves inputs as they are")
    if name == "noise":
        yield Trial("noise", _scaled(Noise(**ball), facts))
        yield Trial("noise_trigger", _scaled(Noise(**ball, phase=False), facts), at_once=True)
        return
    check_slope(facts.box, facts.batch)
    crafted: dict[str, Any] = {**ball, "steps": budget.inner_steps}
    quiet: dict[str, Any] = {"trigger_mode": "reoptimised", "trigger_update": "after_step", "normalise": "tensor"}
    if name == "vanilla":
        yield Trial(name, _scaled(Vanilla(**crafted, normalise="tensor"), facts), at_once=True)
    elif name == "gradient_inversion":
        yield Trial(name, _scaled(GradientInversion(**crafted), facts))
    elif name == "accumulative":
        yield Trial(name, _scaled(Accumulative(**crafted, **quiet), facts))
    elif name == "gate_aware":
        knows = _believed(facts)
        inner = {"name": "accumulative", "steps": budget.inner_steps, **quiet}
        yield Trial(name, _scaled(GateAware(**ball, inner=inner, **knows), facts), guarded_only=True)
    elif name == "hiding":
        _check_hiding(facts)
        hides: dict[str, Any] = {"beta": 2.0, "hide": "pixels", "hide_trigger": True}
        yield Trial(name, Accumulative(**crafted, **quiet, **hides), guarded_only=True)


def _scaled(attack: Attack, facts: Facts) -> Attack:
    """The attack, in the unit of the budget where that is another than the inputs'."""
    return attack if facts.scale is None else Scaled(attack, facts.scale)


def gates_of(defence: Defence | None) -> Sequence[Tolerance]:
    """The parts of a defence that judge by a tolerance, in order.

    Args:
        defence: Of the target; None if there is none.
    """
    parts: Sequence[object] = defence.built if isinstance(defence, Chain) else [defence]
    return [part for part in parts if isinstance(part, Tolerance)]


def _believed(facts: Facts) -> Mapping[str, Any]:
    """What an attacker who knows the gate and the optimiser believes of them.

    Raises:
        ConfigError: There is no gate, or it is not SGD.
    """
    gates = gates_of(facts.defence)
    if not gates:
        raise ConfigError("no gate stands in the step, whose tolerance it could keep to")
    group = facts.optimiser.param_groups[0]
    if type(facts.optimiser) is not SGD or group["nesterov"] or group["dampening"] or not group["lr"] > 0:
        raise ConfigError(f"it rehearses steps of plain SGD, and the optimiser is {type(facts.optimiser).__name__}")
    gate = gates[0]
    limits = {key: getattr(gate, key) for key in ("max_loss_rise", "max_accuracy_drop", "level", "test", "reference")}
    return {
        **limits,
        "trusted_size": getattr(gate, "trusted_size", None),
        "forget_momentum": getattr(gate, "forget_momentum", False),
        "victim_lr": float(group["lr"]),
        "victim_momentum": float(group["momentum"]),
        "victim_weight_decay": float(group["weight_decay"]),
    }


def _check_hiding(facts: Facts) -> None:
    if facts.defence is None or Need.HISTORY not in facts.defence.needs:
        raise ConfigError("no defence looks back")
    if not facts.older:
        raise ConfigError("the target names no `older` state, that it could look like")
    if facts.scale is not None:
        raise ConfigError("it is not built for a budget in another unit than the inputs'")


def check_slope(box: WhiteBox, batch: AnyBatch) -> None:
    """Refuse a model through which no gradient reaches the inputs.

    Raises:
        ConfigError: There is none, or it is zero everywhere.
    """
    x = batch.x.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            (g,) = torch.autograd.grad(box.criterion(box.logits(x), batch.y), [x], allow_unused=True)
    except (RuntimeError, NoDerivativeError) as error:
        raise ConfigError(f"the model is not differentiable in its inputs: {said(error)}") from error
    if g is None or not bool(g.ne(0).any()):
        raise ConfigError("the model is not differentiable in its inputs: no gradient reaches them")


def records_statistics(model: nn.Module) -> bool:
    """Whether a layer keeps running statistics of the batches that it learns from."""
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and m.training for m in model.modules()
    )
