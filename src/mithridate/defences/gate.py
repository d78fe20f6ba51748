"""A gate after the step: measure on trusted samples, then commit or roll back."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from mithridate.core.batch import AnyBatch
from mithridate.core.defence import ADMITTED, Defence, Rounds, Verdict
from mithridate.core.modes import Precision
from mithridate.core.past import Weights
from mithridate.core.registry import register, settings
from mithridate.core.tolerance import Quality, Tolerance, check_trusted, in_equal_parts, quality
from mithridate.core.view import Need, View

KEPT, REACHED, MOVES = "kept", "reached", "moves"
"""Notes: the quality of the committed state, that of the one that the last step reached, and by how much the trusted
loss changes in a step that stays, on average over about the last ten."""

REMEMBERED = 0.9
"""What an earlier step counts in that average, of the next one."""


@register(
    "defence", "gate", presets={"paired": {"max_loss_rise": math.inf, "max_accuracy_drop": math.inf, "level": 0.01}}
)
@settings
class Gate(Tolerance, Defence):
    """Keep a step only if the model is still good on a trusted set; else roll all of it back, momentum and buffers too.

    The model is measured in eval mode, as it learns (an average that `ema` serves is not what is measured). A state is
    measured once: what the kept one measured is the next step's start. A step after which the loss is NaN or infinite
    is refused, unless both limits and `level` are off. In a chain, put the gate last, so that it measures the step that
    will be kept.

    Preset `paired` has no fixed limits: it refuses what the trusted samples show (`level`), of 100 samples a loss of 7
    points at once, of 1000 one of less than one. As long as steps are small, a test of `flips` refuses hardly any clean
    one; that of `chances` sees more, also that a clean stream makes a model slightly worse, where it does.

    What breaks it: poison that stays inside the tolerance step by step (choose `reference`: with `previous` the losses
    add up without end, with `best` and `start` they cannot); damage that the trusted set does not show, such as a
    backdoor, one class that it lacks, or a class of few samples; and with `best` or `start`, a stream whose clean task
    really changes, which is then refused for ever.

    A noisy stream breaks limits by itself, and `noise` makes room for it: then a step must also raise the trusted loss
    by more than so many times what steps usually change it.

    Args:
        trusted_size: Trusted samples that are used, >= 2, always the same, in equal parts from every class; all if
            there are no more. The pass over them is what a gate costs: 100 take about 0.3 of a step on a batch of as
            many. Fewer samples notice less: one of ten in a class is already 0.1 of its accuracy.
        noise: Of the room for a noisy stream, >= 0; 0 makes none. About 5 lets nearly no clean step be refused, once a
            few have shown what is usual. An attacker who moves the loss back and forth widens it.
        precision: Of the pass over the trusted samples: `float32`, `tf32` or `bfloat16`, with which an answer near the
            border of two classes may turn.
        forget_momentum: A refused step also leaves the optimiser without its state. Otherwise this is taken back with
            the step, and a momentum that earlier poison left pushes every clean step the wrong way, and has it refused.

    Raises:
        DataError: The trusted samples are of one class, or their labels do not fit the model; before any step is made.
        ConfigError: `level` is set, and targets are neither class numbers nor many labels.

    Source:
        Engineering practice (validation before deployment). Close published relatives: RONI ("reject on negative
        impact"), Nelson et al., LEET 2008, and the validation set of Xie et al., Zeno, ICML 2019, arXiv:1805.10032.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.TRUSTED})
    neutral: ClassVar[Mapping[str, Any]] = {"max_loss_rise": math.inf, "max_accuracy_drop": math.inf}
    active: ClassVar[Mapping[str, Any]] = {"max_loss_rise": 0.0, "max_accuracy_drop": 0.0, "reference": "best"}

    trusted_size: Annotated[int, Field(ge=2)] = 100
    noise: Annotated[float, Field(ge=0)] = 0.0
    precision: Precision = "float32"
    forget_momentum: bool = False

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse targets that the paired test says nothing about, if it is asked for."""
        self.check_targets(batch.y)

    def begin(self, view: View) -> None:
        """Before the first step, trusted set and model are tried together."""
        if not self.off and KEPT not in view.memory:
            trusted = self._trusted(view)
            check_trusted(trusted, who="gate")
            self.check_targets(trusted.y)
            view.memory[KEPT] = quality(view.model, trusted, precision=self.precision).note()

    def admit(self, before: Weights, view: View) -> Verdict:
        """Admit the step if no limit is broken."""
        if self.off:
            return ADMITTED
        now = quality(view.model, self._trusted(view), precision=self.precision)
        view.memory[REACHED] = now.note()
        reference = self.compared_with(view.memory, Quality.read(view.memory[KEPT]))
        faults = self.faults(reference, now)
        if self.noise and MOVES in view.memory and math.isfinite(now.loss):
            usual = float(view.memory[MOVES])
            faults = faults if now.loss - reference.loss > self.noise * usual else []
        measures = {"trusted_loss": now.loss, "trusted_worst": now.worst}
        if not faults:
            return Verdict(admit=True, measures=measures)
        return Verdict(False, f"gate: {'; '.join(faults)}", forget=self.forget_momentum, measures=measures)

    def committed(self, view: View) -> None:
        """The next step starts from what this one reached."""
        if self.off:
            return
        if self.noise:
            moved = abs(float(view.memory[REACHED][0] - view.memory[KEPT][0]))
            usual = float(view.memory.get(MOVES, moved))
            view.memory[MOVES] = torch.tensor(REMEMBERED * usual + (1 - REMEMBERED) * moved, dtype=torch.float64)
        view.memory[KEPT] = view.memory.pop(REACHED)

    def check_federation(self, run: Rounds, clients: int) -> None:
        """A gate looks at the model alone, and guards a federation as it is."""

    def _trusted(self, view: View) -> AnyBatch:
        """The trusted samples that are used."""
        return in_equal_parts(view.trusted, self.trusted_size)
