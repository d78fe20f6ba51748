"""Wrong labels: what a stream whose labels come from its users is open to."""

from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from mithridate.attacks.substituting import Substituting
from mithridate.core.attack import Power
from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.component import check_classes
from mithridate.core.errors import ConfigError
from mithridate.core.registry import register, settings
from mithridate.core.targets import IGNORED
from mithridate.core.view import Need, View


@register("attack", "label_flip")
@settings
class WrongLabels(Substituting):
    """Send every sample with a wrong label; inputs of any kind are left as they are.

    Args:
        rule: Which wrong one: the `next` class, so that all samples of a class err alike, which did most harm on the
            toy stream; the class that the model takes for least likely (`least_likely`), whose gradient is the longest;
            or a `random` one.

    Raises:
        ConfigError: (from `poison`) the model has one output alone.

    Source:
        Biggio, Nelson and Laskov, ACML 2011 (label noise by an adversary); in federated learning Tolpegin et al.,
        ESORICS 2020, arXiv:2007.08432. The least likely class: Kurakin et al., ICLR 2017, arXiv:1611.01236, there as
        the target of an adversarial example.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})
    power: ClassVar[Power] = "labels"

    rule: Literal["next", "least_likely", "random"] = "next"

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse targets that are no class numbers.

        Raises:
            ConfigError: They are not one int64 a sample.
        """
        check_classes(batch, who="label_flip")

    def substitute(self, batch: AnyBatch, view: View, mask: Tensor, rng: Generator) -> AnyBatch:
        """The same inputs with other labels."""
        with torch.no_grad():
            logits = view.model.logits(batch.x)
        classes = logits.shape[-1]
        if classes < 2:
            raise ConfigError(
                "label_flip: the model has one output alone, so that no label can be turned; take an attack on inputs."
            )
        true = batch.y.clamp_min(0)  # a label that no loss counts stays what it is, below
        if self.rule == "least_likely":
            wrong = logits.scatter(1, true.unsqueeze(1), torch.inf).argmin(1)
        elif self.rule == "next":
            wrong = (true + 1) % classes
        else:
            shift = torch.randint(1, classes, (batch.size,), generator=rng).to(true.device)
            wrong = (true + shift) % classes
        return Batch(batch.x, torch.where(batch.y == IGNORED, batch.y, wrong))
