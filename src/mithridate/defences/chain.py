"""Several defences as one, in order."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mithridate.core.batch import Batch
from mithridate.core.defence import ADMITTED, FLAGGED, Defence, Verdict, row_factors
from mithridate.core.errors import ConfigError
from mithridate.core.model import Criterion, Snapshot, Weights
from mithridate.core.registry import build, config_of, register, settings
from mithridate.core.update import Gradient
from mithridate.core.view import Need, View


@register("defence", "chain")
@settings
class Chain(Defence):
    """Several defences in order, each with its own notes and seeing only what it declares itself.

    Batch and gradient go through every part in turn. At most one part may change the loss; parts that only note it
    (`skip`) are told it. After the step each part is asked in turn, on the model as the parts before it left it; the
    first refusal rolls the step back, and the parts after it are not asked. The last part that serves another model
    than the one that learns is the one that answers.

    What breaks it: whatever breaks all its parts at once; and a bad order. `skip` before `clip` (else it sees clipped
    gradients), `bound_update` before `gate` (else the gate measures a step that is not the one kept).

    Args:
        parts: One table a defence, as in a recipe: `[{name = "clip", clip_norm = 1.0}, {name = "gate"}]`; none is no
            defence. Tables are completed with the parts' defaults.

    Raises:
        ConfigError: A part's name, key or value is wrong (the message says which part), or two parts change the loss.

    Source:
        Composition of gradient transformations as in optax (`optax.chain`), with the learner's other moments.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"parts": []}
    active: ClassVar[Mapping[str, Any]] = {"parts": [{"name": "clip", "clip_norm": 0.1}]}

    parts: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        built: list[Defence] = [
            build("defence", part, where=f"[defence] chain, part {i}") for i, part in enumerate(self.parts)
        ]
        changing = [i for i, part in enumerate(built) if _changes_loss(part)]
        if len(changing) > 1:
            names = " and ".join(f"part {i} ({self.parts[i]['name']})" for i in changing)
            raise ConfigError(f"[defence] chain: {names} all change the loss, and only one can; take out the others.")
        needs = frozenset[Need]().union(*(part.needs for part in built))
        if sum(_overrides(part, "admit") for part in built) > 1:
            needs |= {Need.MODEL}  # to show each part the step that the one before it shortened
        # The class is frozen: these are set once, here, and follow from `parts`.
        object.__setattr__(self, "parts", tuple(config_of(part) for part in built))
        object.__setattr__(self, "defences", tuple(built))
        object.__setattr__(self, "needs", needs)

    def __hash__(self) -> int:
        """Equal chains have equal hashes; the tables themselves have none."""
        return hash(tuple(part["name"] for part in self.parts))

    @property
    def lookback(self) -> int:
        """How many updates back the part looks that looks back furthest."""
        return max((part.lookback for part in self.built), default=0)

    @property
    def built(self) -> tuple[Defence, ...]:
        """The parts as settings objects."""
        built: tuple[Defence, ...] = self.__dict__["defences"]
        return built

    @contextmanager
    def _views(self, view: View) -> Iterator[list[View]]:
        """One view a part, with its own notes, which go back into the chain's under `<index>.`."""
        views = [
            View(view.step, _under(f"{i}.", view.memory), view.things, part.needs, type(part).__name__)
            for i, part in enumerate(self.built)
        ]
        try:
            yield views
        finally:
            for i, own in enumerate(views):
                prefix = f"{i}."
                for key in [key for key in view.memory if key.startswith(prefix)]:
                    if key.removeprefix(prefix) not in own.memory:
                        del view.memory[key]
                view.memory.update({prefix + key: value for key, value in own.memory.items()})

    def screen(self, batch: Batch, view: View) -> Batch:
        """The batch after every part; what follows an empty one is not asked."""
        received = len(batch.x)
        place = torch.arange(received)  # where each sample that is left stood in the batch as received
        flagged: Tensor | None = None
        with self._views(view) as views:
            for part, own in zip(self.built, views, strict=True):
                if received and len(batch.x) == 0:  # a server of a federation shows an empty batch to take notes at
                    break
                own.memory.pop(FLAGGED, None)
                batch = part.screen(batch, own)
                said = own.memory.get(FLAGGED)
                if said is not None and len(said) == len(place):
                    flagged = torch.zeros(received, dtype=torch.bool) if flagged is None else flagged
                    flagged[place[said.cpu()]] = True
                    place = place if len(batch.x) == len(place) else place[~said.cpu()]
        if flagged is not None:
            view.memory[FLAGGED] = flagged
        return batch

    def loss(self, model: nn.Module, batch: Batch, criterion: Criterion, view: View) -> Tensor:
        """The loss of the part that changes it, or the plain one; the others that ask for it are told."""
        with self._views(view) as views:
            pairs = list(zip(self.built, views, strict=True))
            changing = [pair for pair in pairs if _changes_loss(pair[0])]
            if changing:
                part, own = changing[0]
                loss = part.loss(model, batch, criterion, own)
            else:
                loss = super().loss(model, batch, criterion, view)
            for part, own in pairs:
                if _overrides(part, "loss") and not _changes_loss(part):
                    part.loss(nn.Identity(), batch, lambda *_: loss, own)  # the loss is there; the model stays alone
        return loss

    def bound(self, gradient: Gradient, view: View) -> Gradient:
        """The gradient after every part."""
        with self._views(view) as views:
            for part, own in zip(self.built, views, strict=True):
                gradient = part.bound(gradient, own)
        return gradient

    def factors(self, lengths: Tensor) -> Tensor | None:
        """All parts' factors, each part's from the lengths that those before it leave."""
        total = torch.ones_like(lengths)
        for part in self.built:
            own = row_factors(part, lengths * total)
            if own is None:
                return None
            total = total * own
        return total

    def aggregate(self, gradient: Gradient, view: View) -> Gradient:
        """What the last part makes of a round that has a rule of its own, or the mean."""
        with self._views(view) as views:
            ruling = [pair for pair in zip(self.built, views, strict=True) if _overrides(pair[0], "aggregate")]
            if ruling:
                part, own = ruling[-1]
                return part.aggregate(gradient, own)
        return super().aggregate(gradient, view)

    def admit(self, before: Snapshot, view: View) -> Verdict:
        """The first refusal, or the step as every part left it."""
        verdict = ADMITTED
        with self._views(view) as views:
            asked = [pair for pair in zip(self.built, views, strict=True) if _overrides(pair[0], "admit")]
            for place, (part, own) in enumerate(asked, start=1):
                said = part.admit(before, own)
                if not said.admit:
                    return said
                if said.parameters is not None and place < len(asked):
                    _show(view.model.module, said.parameters)
                verdict = Verdict(
                    admit=True,
                    reason="; ".join(reason for reason in (verdict.reason, said.reason) if reason),
                    parameters=verdict.parameters if said.parameters is None else said.parameters,
                )
        return verdict

    def serve(self, view: View) -> Weights | None:
        """What the last part serves that serves anything."""
        served = None
        with self._views(view) as views:
            for part, own in zip(self.built, views, strict=True):
                served = part.serve(own) or served
        return served


def chain(*parts: Defence) -> Chain:
    """Compose defences, the first one first.

    Args:
        parts: Settings objects of registered defences.

    Raises:
        ConfigError: A part is not registered, or two change the loss.
    """
    return Chain(parts=tuple(config_of(part) for part in parts))


def _overrides(part: Defence, moment: str) -> bool:
    return getattr(type(part), moment) is not getattr(Defence, moment)


def _changes_loss(part: Defence) -> bool:
    """Whether the part's loss may be another than the plain one."""
    if isinstance(part, Chain):
        return any(_changes_loss(inner) for inner in part.built)
    return _overrides(part, "loss") and not part.observes_loss


def _under(prefix: str, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in memory.items() if key.startswith(prefix)}


@torch.no_grad()
def _show(module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(parameters[name])
