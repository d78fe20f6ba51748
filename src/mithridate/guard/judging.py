"""Steps of a loop since the last judgement: where they started, what they were made on, and what becomes of them."""

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from mithridate.core.batch import AnyBatch
from mithridate.core.defence import Defence, Verdict
from mithridate.guard import ranks
from mithridate.guard.attempt import Attempt
from mithridate.guard.surroundings import Stateful, Surroundings
from mithridate.training.step import DefendedStep


class Judging:
    """Judges a loop's steps, one or several at a time, and takes back what is refused.

    Args:
        step: The model and what defends it.
        optimizer: That the loop steps.
        also: What a refused step leaves as it was besides.
        warm_up: Steps, >= 0, that are not defended.
        every: Steps between two judgements, >= 1.
    """

    def __init__(
        self, step: DefendedStep, optimizer: Optimizer, also: Sequence[Stateful], *, warm_up: int, every: int
    ) -> None:
        self.step, self.optimizer, self.warm_up, self.every = step, optimizer, warm_up, every
        self.defence = step.defence
        known = {id(p) for p in step.model.parameters()}
        outside = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
        self.around = Surroundings(also, outside)
        self.attempts = 0
        self.mine = False
        """Whether passes through the model and steps of the optimiser are the guard's own, and no steps of the loop."""
        self.attempt = Attempt()
        self.made = 0
        """Steps of the optimiser since the last judgement."""
        self.window: list[tuple[Any, list[AnyBatch]]] = []
        """Of each of these, if several are judged at once: what the loop gave, and the batches that were seen."""
        self._unsettled = False
        self._rates: list[dict[str, Any]] = []
        self._calm = self._buffers()
        self._versions = self._now()

    def begin(self, *, seen: bool = True) -> None:
        """Remember where the loop stands, if no step has begun yet.

        Args:
            seen: Whether nothing of the step has happened yet; else its forward passes went unseen, and have moved the
                buffers.
        """
        if self.attempt.begun:
            return
        self.settle()
        self.attempt.begun = True
        if self.made:
            return  # in the middle of a window
        self.step.defence = Defence() if self.attempts < self.warm_up else self.defence
        if self.step.history is not None:
            self.step.history.record(self.step.step, self.step.model)
        with self.by_itself():
            moved = None
            if not seen and self._versions == self._now():
                moved = self._buffers()
                self._put_buffers(self._calm)
            self.step.start()
            if moved is not None:
                self._put_buffers(moved)
        self.around.save()

    def bound(self) -> None:
        """Let the defence bound the gradients; ones that are not finite move nothing, and the step is refused."""
        scale = getattr(self.optimizer, "grad_scale", None)
        found = getattr(self.optimizer, "found_inf", None)
        if found is not None and bool(found):
            self.attempt.held_back = True
            return
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        finite = math.isfinite(get_total_norm(gradients)) or all(bool(g.isfinite().all()) for g in gradients)
        if not finite:
            self.attempt.fault = self.step.unfit_gradient() or "a gradient is not finite"
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None
            return
        if not self.step.defence.acts("bound"):
            return
        with self.by_itself():
            for g in gradients if scale is not None else ():
                g.div_(scale)
            self.step.bound()
            for g in gradients if scale is not None else ():
                g.mul_(scale)

    def made_one(self, given: Any) -> bool:  # noqa: ANN401  (any form of batch)
        """Count a step of the optimiser; whether it is time to judge.

        Args:
            given: The batch as the loop had it; None if it did not say.
        """
        self.made += 1
        self.attempts += 1
        if self.every > 1:
            self.window.append((given, self.attempt.seen))
        if self.made >= self.every or self.attempt.fault:
            return True
        self.step.step += 1
        self.attempt = self.attempt.next()
        return False

    def judge(self, *, everything: bool) -> Verdict:
        """The verdict of all ranks on the steps since the last one, done.

        Args:
            everything: Whether what the loop moved besides is behind us, too, so that it can be taken back at once.
        """
        made = self.made
        self.step.step -= made - 1  # of a window, whose steps were counted as they came
        with self.by_itself():
            fault = self.attempt.fault
            verdict = Verdict(admit=False, reason=fault) if fault else self.step.judged()
            verdict = ranks.agreed(verdict, self.step.model)
            self.step.conclude(verdict)
        if verdict.admit:
            self.step.step += made - 1
        else:
            self.around.restore()
            if everything:
                self.around.restore_parts()
            else:
                self._unsettled = bool(self.around.parts)
                groups = self.optimizer.param_groups
                self._rates = [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in groups]
        return verdict

    def forget(self) -> None:
        """The optimiser held a step back: none was made, and what was made before it is still to be judged."""
        if self.made:
            self.attempt = self.attempt.next()
        else:
            self.close()

    def close(self) -> None:
        """The steps so far are judged, or forgotten."""
        self.attempt = Attempt()
        self.made, self.window = 0, []
        self._calm = self._buffers()
        self._versions = self._now()

    def abandon(self) -> None:
        """Undo everything since the last judgement, as if it had never been tried."""
        self.step.step -= self.made
        self.step.abandon()
        self.around.restore()
        self.around.restore_parts()
        self.close()

    def settle(self) -> None:
        """Undo what moved besides for a refused step after it was judged."""
        if not self._unsettled:
            return
        self.around.restore_parts()
        for group, rates in zip(self.optimizer.param_groups, self._rates, strict=True):
            for key, value in rates.items():
                if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value
        self._unsettled = False

    @contextmanager
    def own_time(self) -> Iterator[None]:
        """What the block takes is the guard's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.attempt.seconds += time.perf_counter() - start

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        """What happens to the model inside the block is the guard's own doing."""
        before, self.mine = self.mine, True
        try:
            yield
        finally:
            self.mine = before

    def _buffers(self) -> dict[str, Tensor]:
        return {name: b.detach().clone() for name, b in self.step.model.named_buffers()}

    @torch.no_grad()
    def _put_buffers(self, values: Mapping[str, Tensor]) -> None:
        for name, buffer in self.step.model.named_buffers():
            buffer.copy_(values[name])

    def _now(self) -> list[int]:
        return [p._version for p in self.step.model.parameters()]
