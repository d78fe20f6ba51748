"""Discrepancy-aware gradient clipping: shorten an update only if it would move the model suspiciously."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from mithridate.core.defence import Defence
from mithridate.core.discrepancy import LookingBack
from mithridate.core.errors import ConfigError
from mithridate.core.model import Weights, frozen_statistics
from mithridate.core.registry import register, settings
from mithridate.core.update import Gradient
from mithridate.core.view import Need, View
from mithridate.maths.divergence import divergence
from mithridate.maths.norms import Norm, clip_rows


@register("defence", "dgc")
@settings
class DGC(LookingBack, Defence):
    """Clip an update whose plain step would raise the Memorization Discrepancy of trusted samples above a threshold.

    Zhu et al. describe only that the discrepancy is "an auxiliary for gradient clipping operations" in the federated
    setting. Our reading: for each row, the model after a plain step of length `lr` is compared with the old model on
    the trusted inputs (no label is used); rows whose mean discrepancy exceeds the threshold are clipped, the others
    pass as they are.

    What breaks it: what breaks clipping, in many small updates; an update that harms where trusted samples do not look;
    and momentum, which the plain step does not know of.

    Args:
        divergence: `kl`: KL(old || now); `kl_reverse`; `js`; `tv`; `l2` of the logits.
        old: Which old model: a burn-in `checkpoint`, or the model some updates `back`.
        epoch: Of the checkpoint; unset: the earliest one kept.
        back: Updates to look back with `old = "back"`, k.
        threshold: Mean discrepancy above which a row is clipped, >= 0, in the unit of the divergence; 0 clips every
            row, `inf` none. A step after which the model answers with NaN counts as above it.
        clip_norm: The bound, > 0; `inf` never clips.
        norm: In which norm: `l2` or `linf`.
        lr: Length of the plain step, > 0; the server's learning rate.
        trusted_size: Use only the first so many trusted samples, >= 1; unset: all.

    Raises:
        ConfigError: (from `bound`) the wanted checkpoint was not kept, or some parameters are left out of distances.

    Source:
        Zhu et al., ICML 2023, C.10, Table 13.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.HISTORY, Need.TRUSTED})
    neutral: ClassVar[Mapping[str, Any]] = {"clip_norm": math.inf}
    active: ClassVar[Mapping[str, Any]] = {"clip_norm": 0.1, "threshold": 0.0, "old": "checkpoint"}

    threshold: Annotated[float, Field(ge=0)] = 0.5
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    norm: Norm = "l2"
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    trusted_size: Annotated[int, Field(ge=1)] | None = None

    def bound(self, gradient: Gradient, view: View) -> Gradient:
        """The rows, suspicious ones clipped."""
        if math.isinf(self.clip_norm) or math.isinf(self.threshold):
            return gradient
        old = self.old_model(view)
        if old is None:
            return gradient
        own = {name for name, p in view.model.module.named_parameters() if p.requires_grad}
        if set(gradient.shapes) != own:
            raise ConfigError('dgc: it steps on whole updates; set distances = "all" in [federated].')
        clipped = clip_rows(gradient.rows, self.clip_norm, self.norm)
        if self.threshold == 0:  # a discrepancy of nothing can round to less than nothing
            return gradient.with_rows(clipped)
        suspicious = ~(self._discrepancies(gradient, old, view) <= self.threshold)  # NaN is
        return gradient.with_rows(torch.where(suspicious.unsqueeze(1), clipped, gradient.rows))

    @torch.no_grad()
    def _discrepancies(self, gradient: Gradient, old: Weights, view: View) -> Tensor:
        """(rows,), of the model after a plain step on each row."""
        x = view.trusted.x[: self.trusted_size]
        module, parameters = view.model.module, view.model.parameters
        before = old.logits(module, x)
        found = []
        with frozen_statistics(module, "eval"):
            for row in range(len(gradient.rows)):
                step = gradient.named(row)
                stepped = {name: p - self.lr * step[name] for name, p in parameters.items()}
                found.append(divergence(before, functional_call(module, stepped, (x,)), self.divergence).mean())
        return torch.stack(found)
