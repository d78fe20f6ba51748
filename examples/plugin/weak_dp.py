"""A defence that comes as a package of its own."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

import mithridate as mi
from mithridate.core.seeding import generator
from mithridate.maths.norms import clip_rows


@mi.register("defence", "weak_dp")
@mi.settings
class WeakDP(mi.Defence):
    """Clip each update, then add Gaussian noise, so that no single batch or client sets a parameter exactly.

    The noise is far too small to prove privacy with, hence weak. It is the same for all runs with one `seed`.

    What breaks it: many small updates the same way, whose sum outgrows the noise, as the accumulative attack sends
    them; and more noise slows clean learning.

    Args:
        clip_norm: Largest l2 length of an update, > 0, in the units of the gradient; `inf` never clips.
        noise: Standard deviation of the noise in each parameter, >= 0, same unit.
        seed: Of the noise, >= 0.

    Source:
        Sun et al., "Can You Really Backdoor Federated Learning?", 2019, arXiv:1911.07963, "(Weak) differential
        privacy"; the default values are ours.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"clip_norm": math.inf, "noise": 0.0}
    active: ClassVar[Mapping[str, Any]] = {"clip_norm": 0.1, "noise": 0.01}

    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.001
    seed: Annotated[int, Field(ge=0)] = 0

    def bound(self, updates: mi.Updates, view: mi.View) -> mi.Updates:
        """Shorten each row that is too long, then blur all of them."""
        rows = clip_rows(updates.rows, self.clip_norm, "l2", how="scale")
        if self.noise == 0:
            return updates.with_rows(rows)
        drawn = torch.randn(rows.shape, generator=generator("weak_dp", self.seed, view.step), dtype=rows.dtype)
        return updates.with_rows(rows + self.noise * drawn.to(rows.device))
