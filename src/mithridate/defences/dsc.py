"""Discrepancy-aware Sample Correction: correct a sample while an old model disagrees with the current one on it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.component import check_answers
from mithridate.core.defence import Calibration, Defence, Rehearsal, Screened
from mithridate.core.discrepancy import LookingBack, distance, memorization_discrepancy
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.model import answering
from mithridate.core.past import Weights
from mithridate.core.registry import register, settings
from mithridate.core.view import Need, View
from mithridate.defences.correction import Correcting
from mithridate.defences.threshold import Share, quantile_line

PAPER = {
    "stop": "sample",
    "mu": 0.5,
    "tau": 0.02,
    "eps": 0.2,
    "step_size": 0.02,
    "steps": 9,
    "epoch": "half",
    "divergence": "kl_reverse",
}
"""Algorithm 1 with K = 10: its loop runs from n = 1 while n < K, so K - 1 corrections; its discrepancy is D(now, old).
Ball and step, whose sizes the text does not give, are the released code's."""


@register(
    "defence",
    "dsc",
    presets={
        "paper": PAPER,
        "paper-cifar100": {**PAPER, "mu": 1.7, "tau": 0.1},
        "released": {**PAPER, "stop": "batch", "divergence": "kl", "steps": 10},
    },
)
@settings
class DSC(LookingBack, Correcting):
    """Correct a sample while its Memorization Discrepancy is above a threshold that rises with the stream.

    Only the samples still above the threshold are computed on at each step, so a clean stream costs little.

    What breaks it: an attacker who knows the old model and keeps its samples' discrepancy low while poisoning (Eq. 21
    of the paper; at the price of a weaker attack), and a threshold that was set on another data set or model.

    Args:
        steps: Corrections of a sample at most, >= 0; 0 corrects none. The text's Algorithm 1 counts from n = 1 while n
            < K, which is K - 1 of them; the released code makes K.
        divergence: `kl`: KL(old || now), as in Eq. (5) and the released code; `kl_reverse`: KL(now || old), as Eq. (6)
            and Algorithm 1 write it; `js`; `tv`; `l2` of the logits.
        mu: Threshold at the start of the stream, >= 0, in the unit of the divergence; `inf` corrects nothing. The
            paper's 0.5 (CIFAR-10, SVHN) and 1.7 (CIFAR-100) belong to its models: let yours be measured
            (`target_rate`).
        tau: Added to the threshold with every update, >= 0: P = mu + tau * m.
        target_rate: Share of clean samples to be corrected, in (0, 1): `mu` and `tau` are then measured on the trusted
            set before the stream, in a recipe by the engine, in your own loop by `calibrate`. Unset: they are as given.
        stop: `sample`: a sample is left alone as soon as it is at or below P (the text); `batch`: all are corrected
            until the mean over the batch is (the released code).
        on_missing: While the stream is younger than `back` updates: `pass` every sample as it is, or be `closed` and
            learn from none.

    Raises:
        ConfigError: (from `screen`) the wanted checkpoint was not kept, or `target_rate` is set and nobody calibrated.
        DataError: (from `screen`) a discrepancy is not finite.

    Source:
        Zhu et al., ICML 2023, section 3.4, Eq. (6), Algorithm 1; section 4.1 for the threshold's schedule.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.HISTORY})
    neutral: ClassVar[Mapping[str, Any]] = {"mu": math.inf}
    active: ClassVar[Mapping[str, Any]] = {"mu": 0.0, "tau": 0.0, "old": "back", "back": 1, "on_missing": "closed"}

    mu: Annotated[float, Field(ge=0)] = 0.5
    tau: Annotated[float, Field(ge=0)] = 0.02
    target_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    stop: Literal["sample", "batch"] = "sample"
    on_missing: Literal["pass", "closed"] = "pass"

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse inputs that cannot be moved, and targets that its loss or its divergence has no meaning for.

        Raises:
            ConfigError: Says which.
        """
        super().check_inputs(batch)
        if self.steps > 0 and self.divergence != "l2":
            check_answers(batch, who=type(self).__name__)

    def discrepancy(self, batch: Batch, view: View) -> Tensor | None:
        """Of each sample (n,); None while there is no old model."""
        old = self.old_model(view)
        return None if old is None else memorization_discrepancy(view.model, old, batch, kind=self.divergence)

    def above(self, rehearse: Rehearsal) -> Share:
        """Which share of clean samples it would correct.

        Raises:
            ConfigError: There is no old model to compare with.
        """
        m, values = rehearse(self.discrepancy)
        return Share.of(values > self.mu + self.tau * m)

    def measured(self, rehearse: Rehearsal, rate: float) -> "tuple[DSC, Calibration]":
        """The same defence with a threshold above which a share `rate` of clean samples lies.

        Args:
            rehearse: Goes through clean samples.
            rate: In (0, 1).

        Raises:
            ConfigError: There is no old model to compare with.
            DataError: Fewer than two batches, or too few samples to have one above the threshold.

        Source:
            Zhu et al., ICML 2023, section 4.1 "Threshold adjustment" and C.9 set P by hand from clean values, which
            the paper names as a limitation; the quantile line is ours.
        """
        m, values = rehearse(self.discrepancy)
        batches = len(set(m.tolist()))
        if rate * len(values) < 1 or batches < 2:
            raise DataError(
                f"calibrate: {batches} batches of {len(values)} samples in all; a rate of {rate:g} needs at least two "
                f"batches and {math.ceil(1 / rate)} samples."
            )
        mu, tau = quantile_line(m, values, rate)
        return replace(self, mu=mu, tau=tau, target_rate=None), Calibration(
            {"mu": mu, "tau": tau}, *Share.of(values > mu + tau * m)
        )

    def calibrated(self, rehearse: Rehearsal) -> tuple[Defence, Sequence[Calibration]]:
        """With its threshold measured, if `target_rate` asks for that."""
        if self.target_rate is None:
            return self, ()
        defence, found = self.measured(rehearse, self.target_rate)
        return defence, (found,)

    def threshold(self, step: int) -> float:
        """P after `step` updates."""
        return self.mu + self.tau * step

    def screen(self, batch: Batch, view: View) -> Screened:
        """The batch with those samples corrected that are above the threshold."""
        if self.steps == 0 or math.isinf(self.mu):
            return Screened(batch)
        if self.target_rate is not None:
            raise ConfigError(
                f"dsc: target_rate = {self.target_rate:g}, but its threshold was not measured; use the defence that "
                "`calibrate` returns."
            )
        old = self.old_model(view)
        if old is None:
            closed = self.on_missing == "closed"
            return Screened(batch.take(slice(0)) if closed else batch, torch.full((batch.size,), closed))
        x, ever = self._correct(batch, old, view)
        return Screened(Batch(x, batch.y) if bool(ever.any()) else batch, ever.cpu())

    def _correct(self, batch: Batch, old: Weights, view: View) -> tuple[Tensor, Tensor]:
        """Pixels after the correction, and which samples were moved (n,) bool."""
        limit, box = self.threshold(view.step), view.model
        x = batch.x.clone()
        active = torch.arange(len(x), device=x.device)
        ever = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        before, current = old.state_of(box.module), box.parameters
        received: Tensor | None = None
        with answering(box.module, self.precision) as answers:
            for number in range(self.steps):
                piece = x[active].requires_grad_()
                # Of a clean batch few samples are corrected, so that a graph of all would be waste. Most of them go on:
                # then one forward pass serves both the discrepancy and the gradient of the correction.
                with torch.set_grad_enabled(number > 0):
                    now = answers(current, piece)
                if number == 0 and self.correction_loss in {"kl", "ce_kl"}:
                    received = now
                beside = self.beside(x, self.ball, view) if number == 0 and self.correction_loss == "kl" else None
                with torch.no_grad():
                    then, y = answers(before, piece), batch.y[active]
                    scores = distance(then, now, y, criterion=box.criterion, kind=self.divergence)
                if not torch.isfinite(scores).all():
                    raise DataError("DSC: the discrepancy of a sample is not finite; one of the models has diverged.")
                above = self._above(scores, limit)
                if not bool(above.any()):
                    break
                every, active = active, active[above]
                start, y = x[active] if beside is None else beside[active], batch.y[active]
                own = None if received is None else received[active]
                # A pass over these alone is cheaper than one back through twice as many, and the only way where all
                # move.
                if number == 0 or 2 * len(active) < len(every):
                    piece, above = start.requires_grad_(), torch.ones_like(active, dtype=torch.bool)
                    with torch.enable_grad():
                        now = answers(current, piece)
                with torch.enable_grad():
                    loss = self.descended(now[above], y, own, view)
                gradient = torch.autograd.grad(loss, piece)[0][above]
                ever[active] = True
                x[active] = self.stepped(batch.x[active], start.detach(), gradient, view)
        return x, ever

    def _above(self, scores: Tensor, limit: float) -> Tensor:
        """(n,) bool, which samples are corrected further."""
        return torch.full_like(scores, float(scores.mean()) > limit) > 0 if self.stop == "batch" else scores > limit
