"""Pooled features of any classifier: what goes into its last linear layer."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.model import answer
from mithridate.core.modes import frozen_statistics
from mithridate.core.watch import Observed


@torch.no_grad()
def observe(module: nn.Module, batches: Iterable[AnyBatch]) -> Observed:
    """What a model makes of samples, in eval mode; the model is not changed.

    Args:
        module: Any classifier whose last `nn.Linear` gives the logits.
        batches: The samples; one pass is made.

    Raises:
        ConfigError: The model has no linear layer, or the last one takes something else than one vector a sample.
        DataError: There is no batch.
    """
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ConfigError(
            f"{type(module).__name__} has no nn.Linear, whose input would be the features that detectors look at; put "
            "one at its end, or use the detectors `discrepancy` and `loss`, which need none."
        )
    features: list[Tensor] = []
    handle = linear[-1].register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].detach()))
    logits, labels = [], []
    try:
        with frozen_statistics(module, "eval"):
            for x, y in batches:
                logits.append(answer(module, x))
                labels.append(Batch(x, y).with_class_numbers().y)
    finally:
        handle.remove()
    if not logits:
        raise DataError("no clean samples to look at: give the training batches at least one sample ([data] burn_in).")
    if [f.ndim for f in features] != [2] * len(logits) or list(map(len, features)) != list(map(len, logits)):
        raise ConfigError(
            f"the last nn.Linear of {type(module).__name__} is not fed one vector a sample, once a batch, so its input "
            "is no pooled feature; use the detectors `discrepancy` and `loss`, which need none."
        )
    return Observed(torch.cat(features), torch.cat(logits), torch.cat(labels))
