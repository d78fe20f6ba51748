"""Serve an average of the model's states only once it was tested, and learn on behind it."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from mithridate.core.average import moved_along, weights_of
from mithridate.core.batch import AnyBatch
from mithridate.core.defence import Defence, Rounds
from mithridate.core.past import Weights
from mithridate.core.registry import register, settings
from mithridate.core.tolerance import PairedTest, Quality, Tolerance, check_trusted, in_equal_parts, quality
from mithridate.core.view import Memory, Need, View

SERVED = "served."
"""Prefix of the notes of what is served."""
QUALITY, AGE = "quality", "age"
"""Notes: the quality of what is served, and the steps since the last test."""


@register("defence", "promote")
@settings
class Promote(Tolerance, Defence):
    """Serve an average of the model's states that was tested on trusted samples, and learn on behind it.

    The model learns as it would. Every few steps its average is measured; it is served from then on if it passes, or
    else what was served before stays. So nobody is answered by a step before it was tested, the pass over many trusted
    samples is shared by several steps, and a refusal costs freshness and nothing else: the test may be strict. The
    model that learns is not protected: put a gate before it in the chain, or attack after attack wears it down.

    What breaks it: damage that the trusted set does not show, such as a backdoor; poison that never ends, with which
    nothing new is served any more (what was served before goes on); with `best` or `start`, a stream whose task really
    changes, since trusted samples of the old task refuse it; and a stream that must be learned from at once.

    Args:
        max_loss_rise: By how much the mean loss may rise, in the unit of the criterion, >= 0; `inf` is off.
        max_accuracy_drop: By how much the accuracy of the worst class may fall, a fraction, >= 0; `inf` is off.
        level: Of the paired test, in [0, 1); 0 is off.
        test: `chances` or `flips`, as of a gate.
        reference: Compared with what: the one that is served (`previous`), the `best` that was, or that of the `start`.
        every: Steps between two tests, >= 1: what is served is at most so old, if all pass.
        trusted_size: Trusted samples that are used, >= 2, always the same, in equal parts from every class; all if
            there are no more. 500 every 10 steps cost a sixth of a step each on batches of 100.
        decay: Of the average, in [0, 1): about 1 / (1 - decay) states are averaged; 0: the newest alone.

    Raises:
        DataError: The trusted samples are of one class, or their labels do not fit the model; before any step is made.
        ConfigError: `level` is set, and targets are neither class numbers nor many labels.

    Source:
        Engineering practice: a candidate is validated before it is deployed. The average: Polyak and Juditsky, SIAM J.
        Control Optim. 1992. The tests: McNemar, Psychometrika 1947; Student, Biometrika 1908.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.TRUSTED})
    neutral: ClassVar[Mapping[str, Any]] = {"every": 1, "decay": 0.0, "level": 0.0}
    active: ClassVar[Mapping[str, Any]] = {"every": 1, "decay": 0.5}

    max_loss_rise: Annotated[float, Field(ge=0, allow_inf_nan=True)] = math.inf
    max_accuracy_drop: Annotated[float, Field(ge=0, allow_inf_nan=True)] = math.inf
    level: Annotated[float, Field(ge=0, lt=1)] = 0.2
    test: PairedTest = "chances"
    reference: Literal["previous", "best", "start"] = "best"
    every: Annotated[int, Field(ge=1)] = 10
    trusted_size: Annotated[int, Field(ge=2)] = 500
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9

    @property
    def idle(self) -> bool:
        """Whether it serves the model as it is."""
        return self.off and self.decay == 0 and self.every == 1

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse targets that the paired test says nothing about, if it is asked for."""
        self.check_targets(batch.y)

    def begin(self, view: View) -> None:
        """What is served starts at the model as it is before the first update."""
        if self.idle or view.memory:
            return
        samples = in_equal_parts(view.trusted, self.trusted_size)
        check_trusted(samples, who="promote")
        self.check_targets(samples.y)
        view.memory[QUALITY] = quality(view.model, samples).note()
        start = moved_along({}, view.model.module, self.decay)
        view.memory.update(start | _served(start) | {AGE: torch.tensor(0)})

    def committed(self, view: View) -> None:
        """The average takes in the state that was reached, and is served if it is its turn and it passes."""
        if self.idle:
            return
        average = moved_along(view.memory, view.model.module, self.decay)
        view.memory.update(average)
        view.memory[AGE] = (view.memory[AGE] + 1) % self.every
        if view.memory[AGE]:
            return
        candidate = weights_of(average, view.model.module, "average")
        now = quality(view.model, in_equal_parts(view.trusted, self.trusted_size), candidate)
        if not self.faults(self.compared_with(view.memory, Quality.read(view.memory[QUALITY])), now):
            view.memory.update(_served(average) | {QUALITY: now.note()})

    def serve(self, view: View) -> Weights | None:
        """What passed last."""
        if self.idle or not view.memory:
            return None
        served = {key.removeprefix(SERVED): t for key, t in view.memory.items() if key.startswith(SERVED)}
        return weights_of(served, view.model.module, "average that passed")

    def check_federation(self, run: Rounds, clients: int) -> None:
        """It looks at the model alone, and serves a federation as it is."""


def _served(average: Memory) -> Memory:
    return {SERVED + key: t.clone() for key, t in average.items()}
