"""What every component says of itself: what it looks at, how far back, and which inputs it can work on."""

from typing import ClassVar

import torch
from torch import Tensor

from mithridate.core.batch import AnyBatch
from mithridate.core.errors import ConfigError
from mithridate.core.past import Epoch
from mithridate.core.view import Need


class Component:
    """The base of attacks, defences, detectors and update attacks."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """What it sees besides what it is handed. An honest comparison names this beside each result."""

    @property
    def lookback(self) -> int:
        """How many updates back it looks in the model's history; 0 if only at burn-in checkpoints or not at all."""
        return 0

    @property
    def old_epochs(self) -> frozenset[Epoch | None]:
        """Burn-in epochs whose models it looks back at, None being the earliest kept; a run without them is refused.

        By default the earliest, for who declares the history and looks no number of updates back.
        """
        return frozenset({None}) if Need.HISTORY in self.needs and self.lookback == 0 else frozenset()

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse inputs of a kind that it cannot work on; asked before a run, and of a defence at every batch.

        Args:
            batch: One batch as the stream will yield it.

        Raises:
            ConfigError: Says which kind it needs.
        """


def check_moves(batch: AnyBatch, *, who: str) -> None:
    """Refuse inputs that cannot be moved by small amounts; for components that move them.

    Args:
        batch: Any batch of the stream.
        who: The component, for the message.

    Raises:
        ConfigError: They are not one tensor of floats.
    """
    x = batch.x
    if isinstance(x, Tensor) and x.is_floating_point():
        return
    what = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__} of tensors"
    raise ConfigError(
        f"{who} moves inputs by small amounts and needs one tensor of floats, such as pixels or features; these inputs "
        f"are {what}. Take a component that leaves inputs alone."
    )


def check_classes(batch: AnyBatch, *, who: str) -> None:
    """Refuse targets that are no class numbers, for components that compare them with the class that a model says.

    Args:
        batch: Any batch of the stream.
        who: The component, for the message.

    Raises:
        ConfigError: They are not one int64 a sample.
    """
    y = batch.y
    if y.ndim == 1 and y.dtype == torch.int64:
        return
    raise ConfigError(
        f"{who} compares targets with the class that the model says, and needs class numbers (int64, one a sample); "
        f"these targets are {y.dtype} of shape {tuple(y.shape)}. Take a component that looks at losses or updates only."
    )


def check_answers(batch: AnyBatch, *, who: str) -> None:
    """Refuse targets that are numbers, for components that take a model's answers for probabilities.

    Args:
        batch: Any batch of the stream.
        who: The component, for the message.

    Raises:
        ConfigError: They are neither class numbers nor in [0, 1], as probabilities and labels are.
    """
    y = batch.y
    if not y.is_floating_point() or not bool(((y < 0) | (y > 1)).any()):  # NaN is dealt with elsewhere
        return
    raise ConfigError(
        f"{who} takes a model's answers for probabilities of classes or labels, and these targets ({y.dtype} of shape "
        f'{tuple(y.shape)}) are numbers outside [0, 1]. Where there is the choice, set divergence = "l2"; else take a '
        "component that looks at losses or updates only."
    )
