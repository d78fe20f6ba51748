"""What every model must pass."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from mithridate.core.modes import frozen_statistics
from mithridate.testing.checks.evidence import Evidence
from mithridate.testing.checks.subject import Check, fields_in, made, named_choices, variants
from mithridate.testing.checks.witness import Witness, bits, same_tensors
from mithridate.testing.checks.worlds import stream_of
from mithridate.testing.toy import TOY

SMALL = {"width": 8, "groups": 4}
"""Sizes that build in no time, of the models that have these fields."""
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""How near two sums of the same terms in another order are, relative to logits of about 1."""


@lru_cache(maxsize=64)
def exercised(cls: type) -> Evidence:
    """What is found when a model is built and asked in all its settings; tried once."""
    evidence = Evidence()
    small = fields_in(cls, SMALL)
    with evidence.trying(cls.__name__):
        for settings in variants(cls, [{}, small, *({**small, **choice} for choice in named_choices(cls))]):
            with evidence.trying(settings):
                _build(settings, evidence)
        if evidence.crashed:
            return evidence
        settings = made(cls, small)
        for dtype in CLOSE:
            with evidence.trying(settings, "dtype"):
                _ask(settings, dtype, evidence)
    return evidence


def _build(settings: Any, evidence: Evidence) -> None:  # noqa: ANN401  (whatever has `build`)
    """The same seed gives the same bits, another seed others; and so do logits, in eval mode."""
    with Witness(settings, evidence).watching("build", {}):
        module: nn.Module = settings.build(TOY, seed=1)
    again, other = settings.build(TOY, seed=1).state_dict(), settings.build(TOY, seed=2).state_dict()
    if not same_tensors(module.state_dict(), again):
        evidence.add("repeats", settings, "builds another model of the same seed")
    if module.state_dict() and same_tensors(module.state_dict(), other):
        evidence.add("repeats", settings, "builds the same model of every seed")
    batch = stream_of(0).test.batch(slice(4))
    with torch.no_grad(), frozen_statistics(module, "eval"):
        with Witness(settings, evidence).watching("forward", {"x": batch.x}, module=module):
            logits = module(batch.x)
        if bits(module(batch.x)) != bits(logits):
            evidence.add("repeats", settings, "answers otherwise the second time, in eval mode")
    if logits.shape != (batch.size, len(TOY.classes)):
        evidence.add("shape", settings, f"gives {tuple(logits.shape)} for {batch.size} images of 4 classes")


def _ask(settings: Any, dtype: torch.dtype, evidence: Evidence) -> None:  # noqa: ANN401  (whatever has `build`)
    """In eval mode samples do not look at each other; types are kept, and slopes reach pixels and parameters."""
    module: nn.Module = settings.build(TOY, seed=1).to(dtype)
    x = stream_of(0).test.batch(slice(6)).x.to(dtype).requires_grad_()
    with frozen_statistics(module, "eval"):
        logits = module(x)
        alone = torch.cat([module(piece) for piece in torch.split(x, [1, 5])])
    if logits.dtype != dtype:
        evidence.add("dtype", settings, f"gives {logits.dtype} in {dtype}")
    size = max(1.0, float(logits.detach().abs().max()))
    if not torch.allclose(logits, alone, rtol=0, atol=CLOSE[dtype] * size):
        evidence.add("company", settings, "answers otherwise of a sample in other company, in eval mode")
    slopes = torch.autograd.grad(logits.square().sum(), [x, *module.parameters()], allow_unused=True)
    if slopes[0] is None or not bool(slopes[0].flatten(1).abs().amax(1).gt(0).all()):
        evidence.add("shape", settings, "has no slope in its pixels")


def check_gives_logits(cls: type) -> None:
    """(n, classes) for n images, differentiable in the pixels."""
    exercised(cls).require("shape")


def check_samples_do_not_look_at_each_other(cls: type) -> None:
    """In eval mode the answer to a sample is the same in other company and alone."""
    exercised(cls).require("company")


CHECKS: Sequence[Check] = (check_gives_logits, check_samples_do_not_look_at_each_other)
