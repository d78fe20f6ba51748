"""The attacker who knows that a gate stands after the step, and stays inside its tolerance."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.optim import SGD

from mithridate.attacks.budget import Budgeted, Factor
from mithridate.core.attack import Attack
from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox, answer
from mithridate.core.modes import BatchNormMode, in_mode
from mithridate.core.past import Epoch
from mithridate.core.registry import build, config_of, register, settings
from mithridate.core.seeding import no_draws
from mithridate.core.sgd import LearningRate, Momentum
from mithridate.core.tolerance import Tolerance, in_equal_parts, quality
from mithridate.core.view import Need, View
from mithridate.maths.norms import Ball

INNER = "inner."
"""Prefix of the inner attack's notes."""
SEEN, BUFFER = "seen.", "buffer."
"""Prefixes of the parameters seen last and of the momentum inferred from them, by name."""
BUDGET = ("eps", "norm", "poison_ratio")
INNER_DEFAULT = {"name": "accumulative", "trigger_update": "after_step"}


@register("attack", "gate_aware")
@settings
class GateAware(Tolerance, Budgeted):
    """Shrink another attack's poison, batch by batch, until the step that it causes would pass a gate.

    Before a batch is sent, the victim's step on it is rehearsed on a copy of the model, and the result measured on
    S_val. The perturbation is tried whole; if it does not pass, the largest share of it that does is looked for by
    bisection (as if smaller poison always did less), and if none is found, the clean batch is sent. The victim's steps
    are SGD's, and its momentum is read off the last two states seen: (before - now) / lr. So the rehearsal is exact, up
    to rounding, where the beliefs below are; it is not where a defence changes batch or gradient, or, until the second
    step, where the optimiser came with a momentum of its own. It looks one step ahead only: where even the clean batch
    would not pass, because of the momentum that earlier poison left, say, that is what it sends.

    Args:
        eps: Radius of the ball, >= 0, in pixel units of [0, 1] (8/255 is about 0.031); the inner attack's too, whatever
            a preset of it says.
        norm: Of the ball: `linf` or `l2`; the inner attack's too.
        poison_ratio: Share of each batch that is changed, in [0, 1]; the inner attack's too.
        inner: The attack that is shrunk, a table as in a recipe, without the three fields above:
            `{name = "pgd", steps = 5}`. It is completed with that attack's defaults. By default `accumulative` with
            `after_step`: the trigger is then crafted for the model as the shrunk batch really left it.
        max_loss_rise: By how much the mean loss on S_val may rise in a step, in the unit of the criterion, >= 0;
            `inf` is off.
        max_accuracy_drop: By how much the accuracy of the worst class of S_val may fall, a fraction, >= 0; `inf` is
            off.
        level: Of the paired test that the gate is believed to make, in [0, 1); 0 is off.
        test: Which one: `flips` or `chances`.
        reference: Compared with what: the `previous` state, the `best` so far, or the state at the `start`.
        trusted_size: Samples of S_val that are measured, as many as the gate is believed to trust, >= 2: a test sees
            more in more samples. Unset: all.
        forget_momentum: The gate is believed to empty the optimiser's state when it refuses a step.
        halvings: Steps of the bisection, >= 0: the share is found to within 2^-halvings; 0: all or nothing.
        victim_lr: Learning rate that the victim is believed to use, in (0, 1e6).
        victim_momentum: Its momentum factor, in [0, 1); a `weight_momentum` of the inner attack takes its place in the
            phase.
        victim_weight_decay: Its L2 penalty, >= 0.
        update_mode: BatchNorm in its updates: `train` or `eval`.
        shrink_trigger: The trigger is held to the tolerance too; False: it is sent as it is, gate or no gate.

    Raises:
        ConfigError: The inner attack's name, key or value is wrong, or its table has a budget of its own.

    Source:
        This library's own: a defence is judged by an attacker who knows it (Tramer et al., NeurIPS 2020,
        arXiv:2002.08347), here one who knows the gate's rule, tolerance and kind of data (validation before deployment,
        as in RONI, Nelson et al., LEET 2008). The model of the victim's step is SGD as in torch.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.VALIDATION, Need.TRIGGER, Need.ACCURACY})

    restrained: ClassVar[bool] = True

    inner: dict[str, Any] = Field(default_factory=lambda: dict(INNER_DEFAULT))
    trusted_size: Annotated[int, Field(ge=2)] | None = None
    forget_momentum: bool = False
    halvings: Annotated[int, Field(ge=0)] = 4
    victim_lr: LearningRate = 0.1
    victim_momentum: Momentum = 0.9
    victim_weight_decay: Factor = 0.0
    update_mode: BatchNormMode = "train"
    shrink_trigger: bool = False

    def __post_init__(self) -> None:
        where = "[attack] gate_aware, inner"
        own = [key for key in BUDGET if key in self.inner]
        if own:
            raise ConfigError(f"{where}: {', '.join(own)} belongs beside `inner`, not in it; both share one budget.")
        budget = {key: getattr(self, key) for key in BUDGET}
        built: Attack = build("attack", {**self.inner, **budget}, where=where)
        # The class is frozen: these are set once, here, and follow from the fields.
        object.__setattr__(self, "inner", {k: v for k, v in config_of(built).items() if k not in BUDGET})
        object.__setattr__(self, "attack", built)
        object.__setattr__(self, "needs", built.needs | {Need.MODEL, Need.VALIDATION})
        object.__setattr__(self, "weight_momentum", built.weight_momentum)

    def __hash__(self) -> int:
        """Equal attacks have equal hashes; the inner table itself has none."""
        return hash((self.built, self.max_loss_rise, self.max_accuracy_drop, self.level, self.reference, self.halvings))

    @property
    def built(self) -> Attack:
        """The inner attack as a settings object."""
        built: Attack = self.__dict__["attack"]
        return built

    @property
    def ball(self) -> Ball:
        """The inner attack's."""
        return self.built.ball

    @property
    def trigger_ball(self) -> Ball:
        """The inner attack's."""
        return self.built.trigger_ball

    @property
    def ratio(self) -> float:
        """The inner attack's."""
        return self.built.ratio

    @property
    def lookback(self) -> int:
        """The inner attack's."""
        return self.built.lookback

    @property
    def old_epochs(self) -> frozenset[Epoch | None]:
        """The inner attack's."""
        return self.built.old_epochs

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse what the inner attack refuses.

        Raises:
            ConfigError: It cannot work on inputs or targets of this kind.
        """
        self.built.check_inputs(batch)

    def ready(self, view: View) -> bool:
        """When the inner attack is."""
        with self._inside(view) as own:
            return self.built.ready(own)

    def after_step(self, view: View, rng: Generator) -> None:
        """The inner attack adapts."""
        with self._inside(view) as own:
            self.built.after_step(own, rng)

    def ascent(self, view: View) -> tuple[float, float] | None:
        """The inner attack's, before its batch was shrunk."""
        with self._inside(view) as own:
            return self.built.ascent(own)

    def positions(self, n: int, view: View, rng: Generator) -> Tensor:
        """The inner attack's, so that the two agree."""
        with self._inside(view) as own:
            return self.built.positions(n, own, rng)

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """The inner attack's batch, shrunk."""
        with self._inside(view) as own:
            x = self.built.poison(batch, own, rng=rng).x
        factor = self.victim_momentum if self.weight_momentum is None else self.weight_momentum
        return self._shrunk(batch, x, view, factor)

    def craft_trigger(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """The inner attack's trigger, shrunk if asked for."""
        with self._inside(view) as own:
            x = self.built.trigger(batch, own, rng=rng).x
        return self._shrunk(batch, x, view, self.victim_momentum) if self.shrink_trigger else x

    def _inside(self, view: View) -> AbstractContextManager[View]:
        """What the inner attack sees."""
        return view.inside(INNER, self.built.needs, type(self.built).__name__)

    def _shrunk(self, batch: Batch, x: Tensor, view: View, factor: float) -> Tensor:
        """As much of the perturbation as passes."""
        box, buffer = view.model, self._momentum(view)
        samples = in_equal_parts(view.validation, self.trusted_size)
        limit = self.compared_with(view.memory, quality(box, samples))

        def passes(x: Tensor) -> bool:
            twin = rehearsed(
                box,
                Batch(x, batch.y),
                buffer,
                lr=self.victim_lr,
                momentum=factor,
                weight_decay=self.victim_weight_decay,
                mode=self.update_mode,
            )
            return not self.faults(limit, quality(WhiteBox(twin, box.criterion), samples))

        if passes(x):
            return x
        sent, share, step = batch.x, 0.0, 1.0
        for _ in range(self.halvings):
            step /= 2
            tried = batch.x + (share + step) * (x - batch.x)
            if passes(tried):
                sent, share = tried, share + step
        return sent

    def _momentum(self, view: View) -> dict[str, Tensor]:
        """The victim's momentum buffer, from the model now and as it was before the last step; none at first.

        A model that has not moved was rolled back, its momentum too, unless the gate forgets it: what was inferred
        before still holds.
        """
        now = view.model.parameters
        seen = {name: view.memory[SEEN + name] for name in now if SEEN + name in view.memory}
        if seen and any(not torch.equal(p, seen[name]) for name, p in now.items()):
            view.memory.update({BUFFER + name: (seen[name] - p) / self.victim_lr for name, p in now.items()})
        elif seen and self.forget_momentum:
            view.memory.update({BUFFER + name: torch.zeros_like(p) for name, p in now.items()})
        view.memory.update({SEEN + name: p.clone() for name, p in now.items()})
        return {name: view.memory[BUFFER + name] for name in now if BUFFER + name in view.memory}


def rehearsed(
    box: WhiteBox,
    batch: Batch,
    buffer: Mapping[str, Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float = 0.0,
    mode: BatchNormMode = "train",
) -> nn.Module:
    """A copy of the model after one step of SGD on a batch; the model itself and global randomness stay as they are.

    Args:
        box: The model.
        batch: What it would learn from.
        buffer: The optimiser's momentum buffer by parameter; empty for a fresh one.
        lr: Its learning rate.
        momentum: Its momentum factor.
        weight_decay: Its L2 penalty.
        mode: BatchNorm in the step; statistics are recorded in `train`.
    """
    twin = copy.deepcopy(box.module)
    optimiser = SGD(twin.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    optimiser.zero_grad(set_to_none=True)
    for name, parameter in twin.named_parameters():
        if name in buffer:
            optimiser.state[parameter]["momentum_buffer"] = buffer[name].clone()
    with in_mode(twin, mode), no_draws(twin), torch.enable_grad():  # dropout draws from the global generator
        torch.autograd.backward(box.criterion(answer(twin, batch.x), batch.y))
    optimiser.step()
    return twin
