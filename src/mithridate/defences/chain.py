"""Several defences as one, in order."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mithridate.core.batch import AnyBatch
from mithridate.core.defence import (
    Calibration,
    Defence,
    Rehearsal,
    Rounds,
    Screened,
    Verdict,
    checked,
    overrides,
)
from mithridate.core.errors import ConfigError
from mithridate.core.past import Epoch, Weights
from mithridate.core.registry import build, config_of, register, settings
from mithridate.core.targets import Criterion
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View


@register(
    "defence",
    "chain",
    presets={
        "recommended": {
            "parts": [
                {"name": "gate", "preset": "paired", "reference": "start", "forget_momentum": True},
                {"name": "promote"},
            ],
        },
        "light": {
            "parts": [
                {
                    "name": "gate",
                    "preset": "paired",
                    "reference": "start",
                    "forget_momentum": True,
                    "trusted_size": 50,
                },
                {"name": "promote", "trusted_size": 250},
            ],
        },
    },
)
@settings
class Chain(Defence):
    """Several defences in order, each with its own notes and seeing only what it declares itself.

    Batch and gradient go through every part in turn; what samples weigh is multiplied. At most one part may have a loss
    of its own. After the step each part is asked in turn, on the model as the parts before it left it; the first
    refusal rolls the step back, and the parts after it are not asked. Where a part shortens the step, those that have
    judged the longer one are asked again; each part shortens it once at most. The last part that serves another model
    than the one that learns is the one that answers. A chain among the parts is replaced by its own parts.

    Preset `recommended` needs a trusted set and no setting that belongs to a model: a gate takes back a step that a
    hundred trusted samples show to be harmful, and `promote` tests an average of what is left on five hundred before
    anybody is answered by it. On digits (`results/leaderboard`: three seeds, six attacks, one of which knows a gate's
    limits) and in loops on CIFAR-10, tokens and rows (`results/loops`, three seeds) no attack moved what is served by
    half a point; but on CIFAR-10 and tokens no average passed its test in so few steps, so that the model of the start
    went on answering, while the one that learns was worn down behind it. What breaks it: damage that the trusted set
    does not show, such as a backdoor; a steady attacker, who cannot harm what is served but keeps it from being
    renewed; and a task that really changes, while the trusted set stays as it was. `light` is the same with half of the
    trusted samples, for a third of a step.

    What breaks it: whatever breaks all its parts at once; and a bad order: `skip` before `clip`, else it sees clipped
    gradients.

    Args:
        parts: One table a defence, as in a recipe: `[{name = "clip", clip_norm = 1.0}, {name = "gate"}]`; none is no
            defence. Tables are completed with the parts' defaults.

    Raises:
        ConfigError: A part's name, key or value is wrong (the message says which part), or two parts have a loss of
            their own.

    Source:
        Composition of gradient transformations as in optax (`optax.chain`), with the learner's other moments.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"parts": []}
    active: ClassVar[Mapping[str, Any]] = {"parts": [{"name": "clip", "clip_norm": 0.1}]}

    parts: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        defences: list[Defence] = []
        for i, table in enumerate(self.parts):
            part = build("defence", table, where=f"[defence] chain, part {i}")
            defences += part.built if isinstance(part, Chain) else [part]
        tables = tuple(config_of(part) for part in defences)
        losses = [i for i, part in enumerate(defences) if overrides(part, "loss")]
        if len(losses) > 1:
            names = " and ".join(f"part {i} ({tables[i]['name']})" for i in losses)
            raise ConfigError(
                f"[defence] chain: {names} each have a loss of their own, and only one can be learned from; take out "
                "the others."
            )
        needs = frozenset[Need]().union(*(part.needs for part in defences))
        if sum(overrides(part, "admit") for part in defences) > 1:
            needs |= {Need.MODEL}  # to show each part the step that the one before it shortened
        # The class is frozen: these are set once, here, and follow from `parts`.
        object.__setattr__(self, "parts", tables)
        object.__setattr__(self, "defences", tuple(defences))
        object.__setattr__(self, "needs", needs)

    def __hash__(self) -> int:
        """Equal chains have equal hashes; the tables themselves have none."""
        return hash(tuple(part["name"] for part in self.parts))

    @property
    def lookback(self) -> int:
        """How many updates back the part looks that looks back furthest."""
        return max((part.lookback for part in self.built), default=0)

    @property
    def old_epochs(self) -> frozenset[Epoch | None]:
        """What any part looks back at."""
        return frozenset[Epoch | None]().union(*(part.old_epochs for part in self.built))

    @property
    def built(self) -> tuple[Defence, ...]:
        """The parts as settings objects."""
        built: tuple[Defence, ...] = self.__dict__["defences"]
        return built

    @contextmanager
    def _asked(self, view: View, moment: str = "") -> Iterator[list[tuple[Defence, View]]]:
        """The parts that do something at a moment (all of them by default), each with a view of its own.

        A part's notes go back into the chain's under `<index>.`.
        """
        with ExitStack() as stack:
            yield [
                (part, stack.enter_context(view.inside(f"{i}.", part.needs, type(part).__name__)))
                for i, part in enumerate(self.built)
                if not moment or overrides(part, moment)
            ]

    def acts(self, moment: str) -> bool:
        """Whether any part does anything at a moment of the step."""
        return any(part.acts(moment) for part in self.built)

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse what any part refuses."""
        for part in self.built:
            part.check_inputs(batch)

    def begin(self, view: View) -> None:
        """Every part takes its notes."""
        with self._asked(view, "begin") as asked:
            for part, inside in asked:
                part.begin(inside)

    def screen(self, batch: AnyBatch, view: View) -> Screened:
        """The batch after every part; what follows an empty one is not asked."""
        received = batch.size
        place = torch.arange(received)  # where each sample that is left stood in the batch as received
        flagged: Tensor | None = None
        weights: Tensor | None = None
        with self._asked(view, "screen") as asked:
            for part, inside in asked:
                if batch.size == 0:
                    break
                said = checked(part, batch, part.screen(batch, inside))
                if said.flagged is not None:
                    flags = said.flagged.cpu()
                    flagged = torch.zeros(received, dtype=torch.bool) if flagged is None else flagged
                    flagged[place[flags]] = True
                    if said.batch.size < batch.size:
                        if said.batch.size != int((~flags).sum()):
                            raise AssertionError(
                                f"{type(part).__name__} flags more samples than it drops, so a chain cannot know which "
                                "are left: let one defence drop, and another one correct or weigh"
                            )
                        place = place[~flags]
                        weights = None if weights is None else weights[~flags.to(weights.device)]
                if said.weights is not None:
                    weights = said.weights if weights is None else weights * said.weights
                batch = said.batch
        return Screened(batch, flagged, weights)

    def loss(self, model: nn.Module, batch: AnyBatch, criterion: Criterion, view: View) -> Tensor:
        """The loss of the part that has one, or the plain one."""
        with self._asked(view, "loss") as asked:
            for part, inside in asked:
                return part.loss(model, batch, criterion, inside)
        return super().loss(model, batch, criterion, view)

    def bound(self, updates: Updates, view: View) -> Updates:
        """The updates after every part."""
        with self._asked(view, "bound") as asked:
            for part, inside in asked:
                updates = part.bound(updates, inside)
        return updates

    def admit(self, before: Weights, view: View) -> Verdict:
        """The first refusal, or the step as every part left it."""
        reasons: dict[int, str] = {}
        measures: dict[str, float] = {}
        shortened: Mapping[str, Tensor] | None = None
        with self._asked(view, "admit") as asked, ExitStack() as shown:
            waiting, may_shorten = list(range(len(asked))), set(range(len(asked)))
            while waiting:
                number = waiting.pop(0)
                part, inside = asked[number]
                said = part.admit(before, inside)
                measures.update(said.measures)
                if not said.admit:
                    return said._replace(measures=measures)
                reasons[number] = said.reason
                if said.parameters is None or number not in may_shorten:
                    continue
                may_shorten.remove(number)
                shortened = said.parameters
                waiting = [*range(number + 1, len(asked)), *range(number)]  # these have not judged this shorter step
                if waiting:
                    shown.enter_context(_showing(view.model.module, shortened))
        reason = "; ".join(filter(None, reasons.values()))
        return Verdict(admit=True, reason=reason, parameters=shortened, measures=measures)

    def committed(self, view: View) -> None:
        """Every part takes notes of the state that was reached."""
        with self._asked(view, "committed") as asked:
            for part, inside in asked:
                part.committed(inside)

    def serve(self, view: View) -> Weights | None:
        """What the last part serves that serves anything."""
        served = None
        with self._asked(view, "serve") as asked:
            for part, inside in asked:
                served = part.serve(inside) or served
        return served

    def check_federation(self, run: Rounds, clients: int) -> None:
        """Refuse what any part refuses."""
        for part in self.built:
            part.check_federation(run, clients)

    def calibrated(self, rehearse: Rehearsal) -> tuple[Defence, Sequence[Calibration]]:
        """With every part's thresholds measured."""
        pairs = [part.calibrated(rehearse) for part in self.built]
        found = [calibration for _, several in pairs for calibration in several]
        return (chain(*(part for part, _ in pairs)) if found else self), found


def chain(*parts: Defence) -> Chain:
    """Compose defences, the first one first.

    Args:
        parts: Settings objects of registered defences.

    Raises:
        ConfigError: A part is not registered, or two have a loss of their own.
    """
    return Chain(parts=tuple(config_of(part) for part in parts))


@contextmanager
def _showing(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """A model with other parameters inside the block; it is as it was afterwards."""
    own = dict(module.named_parameters())
    before = {name: p.detach().clone() for name, p in own.items()}
    _write(own, parameters)
    try:
        yield
    finally:
        _write(own, before)


@torch.no_grad()
def _write(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into tensors, by name."""
    for name, tensor in into.items():
        tensor.copy_(values[name])
