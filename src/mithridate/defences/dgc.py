"""Discrepancy-aware gradient clipping: bound an update only if it would move the model suspiciously."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.defence import Defence, Rounds
from mithridate.core.discrepancy import LookingBack, distance, memorization_discrepancy
from mithridate.core.errors import ConfigError
from mithridate.core.past import Past, Weights
from mithridate.core.registry import register, settings
from mithridate.core.sgd import LearningRate
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.maths.norms import Norm, clip_rows

START = "start"
"""Where the mean discrepancy before the first update is noted."""


@register("defence", "dgc")
@settings
class DGC(LookingBack, Defence):
    """Clip or drop an update whose plain step raises the Memorization Discrepancy of trusted samples above a threshold.

    Zhu et al. describe only that the discrepancy is "an auxiliary for gradient clipping operations" in the federated
    setting. Our reading: for each row, the model after a plain step of length `lr` is compared with the old model on
    the trusted inputs (no label is used); rows whose mean discrepancy exceeds the threshold are clipped, or dropped;
    the others pass as they are. The threshold can rise as that of their sample correction does, P = mu + tau * m.

    What breaks it: what breaks clipping, in many small updates; an update that harms where trusted samples do not look;
    and momentum, which the plain step does not know of. A threshold that rises with the rounds rises for the attacker
    too.

    Args:
        threshold: Mean discrepancy above which a row is flagged, >= 0, in the unit of the divergence; 0 flags every
            row, `inf` none. A step after which the model answers with NaN counts as above it.
        rise: By how much the threshold grows with every update made, tau, >= 0: an honest model moves away from its
            past, too.
        relative: `threshold` and `rise` are multiples of the mean discrepancy before the first update: how far a model
            has moved since its old self depends on its burn-in. With `old = "checkpoint"` alone.
        flagged: What becomes of a flagged row: `clip` to `clip_norm`, or `drop`: it becomes zero and counts as the
            update of a client that changes nothing. Online, where the batch's gradient is the only row, a dropped one
            is a step with a zero gradient: momentum and weight decay still move the model.
        clip_norm: The bound, > 0; `inf` never clips.
        norm: In which norm: `l2` or `linf`.
        back: Updates to look back with `old = "back"`, k, >= 0; 0 is the model before the step, as what is compared is
            the model after a row's step.
        lr: Length of the plain step, in (0, 1e6); the server's learning rate (1 on Flower, whose clients send whole
            models).
        trusted_size: Use only the first so many trusted samples, >= 1; unset: all.

    Raises:
        ConfigError: `relative` with `old = "back"`; (from `bound`) the wanted checkpoint was not kept, or some
            parameters have no gradient.

    Source:
        Zhu et al., ICML 2023, C.10, Table 13.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.HISTORY, Need.TRUSTED})
    neutral: ClassVar[Mapping[str, Any]] = {"clip_norm": math.inf}
    active: ClassVar[Mapping[str, Any]] = {"clip_norm": 0.1, "threshold": 0.0, "old": "checkpoint"}

    threshold: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 0.5
    rise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    relative: bool = False
    flagged: Literal["clip", "drop"] = "clip"
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    norm: Norm = "l2"
    back: Annotated[int, Field(ge=0)] = 20
    lr: LearningRate = 0.1
    trusted_size: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        if self.relative and self.old != "checkpoint":
            raise ConfigError(
                '[defence] dgc: relative compares with the discrepancy before the first update, and with old = "back" '
                'there is none yet; set old = "checkpoint", or relative = false.'
            )

    def past(self, view: View) -> Past:
        """The old model may be the current one, such as the start of a federation: a row's step is compared with it."""
        return view.history_and_now

    def bound(self, updates: Updates, view: View) -> Updates:
        """The rows, suspicious ones clipped or dropped."""
        if math.isinf(self.threshold) or (self.flagged == "clip" and math.isinf(self.clip_norm)):
            return updates
        old = self.old_model(view)
        if old is None:
            return updates
        own = {name for name, p in view.model.module.named_parameters() if p.requires_grad}
        if set(updates.shapes) != own:
            raise ConfigError("dgc: it steps on whole updates, and some parameters have none.")
        rows = updates.rows
        bounded = torch.zeros_like(rows) if self.flagged == "drop" else clip_rows(rows, self.clip_norm, self.norm)
        threshold = (self.threshold + self.rise * view.step) * self._unit(old, view)
        if threshold == 0:  # a discrepancy of nothing can round to less than nothing
            return updates.with_rows(bounded)
        suspicious = ~(self._discrepancies(updates, old, view) <= threshold)  # NaN is
        return updates.with_rows(torch.where(suspicious.unsqueeze(1), bounded, rows))

    def check_federation(self, run: Rounds, clients: int) -> None:
        """It steps on whole updates.

        Raises:
            ConfigError: Some parameters are left out of distances.
        """
        if run.distances != "all":
            raise ConfigError('dgc: it steps on whole updates; set distances = "all" in [federated].')

    def _unit(self, old: Weights, view: View) -> float:
        """What the threshold is a multiple of, noted at the first update."""
        if not self.relative:
            return 1.0
        if START not in view.memory:
            trusted = view.trusted.take(slice(self.trusted_size))
            view.memory[START] = memorization_discrepancy(view.model, old, trusted, kind=self.divergence).mean()
        return float(view.memory[START])

    @torch.no_grad()
    def _discrepancies(self, updates: Updates, old: Weights, view: View) -> Tensor:
        """(rows,), of the model after a plain step on each row."""
        trusted, box = view.trusted.take(slice(self.trusted_size)), view.model
        before = old.logits(box.module, trusted.x)
        means = []
        for row in range(len(updates.rows)):
            step = updates.named(row)
            stepped = {name: p - self.lr * step[name] for name, p in box.parameters.items()}
            now = box.logits(trusted.x, parameters=stepped)
            means.append(distance(before, now, trusted.y, criterion=box.criterion, kind=self.divergence).mean())
        return torch.stack(means)
