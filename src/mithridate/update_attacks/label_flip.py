"""Learn honestly from turned labels."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.core.errors import ConfigError
from mithridate.core.registry import register, settings
from mithridate.core.update_attack import Honest
from mithridate.core.view import Need, View
from mithridate.update_attacks.hostile import Factor, HostileShare, Share


@register("update_attack", "label_flip")
@settings
class LabelFlip(HostileShare):
    """Each hostile client sends the update of its own images with every label moved on by some classes.

    Args:
        shift: Label y becomes (y + shift) modulo the number of classes, >= 1 and no multiple of it.
        scale: What the update is multiplied by, >= 0.

    Raises:
        ConfigError: (from `craft`) the shift leaves every label as it is.

    Source:
        Tolpegin et al., ESORICS 2020, arXiv:2007.08432, section 3 (label flipping in federated learning); the cyclic
        shift is Baruch et al.'s, NeurIPS 2019.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})

    poison_ratio: Share = 0.2
    shift: Annotated[int, Field(ge=1)] = 1
    scale: Factor = 1.0

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """Updates that the wrong labels give.

        Raises:
            ConfigError: The shift leaves every label as it is.
        """
        box = view.model
        with torch.no_grad():
            classes = box.logits(honest.x[0, :1]).shape[1]
        if self.shift % classes == 0:
            raise ConfigError(f"label_flip: shift = {self.shift} leaves every label of {classes} classes as it is.")
        return self.scale * honest.gradients(honest.x, (honest.y + self.shift) % classes)
