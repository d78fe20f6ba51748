"""`audit.toml`: what is audited, what an attacker may do, and how much damage is allowed."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from mithridate.core.errors import ConfigError, nearest, shown
from mithridate.core.files import path_of
from mithridate.core.settings import make, settings
from mithridate.maths.norms import Norm

Points = Annotated[float, Field(ge=0, le=100)]


def _radii(value: object) -> float | tuple[float, ...]:
    several = isinstance(value, list | tuple)
    numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    good = [isinstance(n, float | int) and not isinstance(n, bool) and math.isfinite(n) and n >= 0 for n in numbers]
    if not numbers or not all(good):
        raise ValueError("give a number >= 0, a fraction as text such as '8/255', or a list with one number a feature")
    return tuple(map(float, numbers)) if several else float(numbers[0])


Radii = Annotated[float | tuple[float, ...], PlainValidator(_radii)]

ATTACKS: Mapping[str, str] = {
    "noise": "random perturbations of the same size, the control",
    "vanilla": "one poisoned batch",
    "accumulative": "quiet batches that prepare for one",
    "gradient_inversion": "batches whose gradient climbs the loss",
    "gate_aware": "the accumulative attack, held below what the user's gate refuses",
    "hiding": "the accumulative attack, hidden from a defence that looks back",
    "label_flip": "the user's batches with wrong labels",
    "worst_samples": "the user's own samples, those that harm most",
}
"""What can be tried beside the clean stream, in the order in which it is."""

FEDERATED: Mapping[str, str] = {
    "noise": "random updates, the control",
    "label_flip": "honest updates of wrong labels",
    "sign_flip": "updates turned round",
    "alie": "updates a little off, all the same way",
    "min_max": "updates as far off as the honest ones are from each other",
    "ipm": "updates against the honest mean",
    "direct": "updates that climb the loss",
    "accumulative": "quiet rounds that prepare for one",
}
"""The same of a federation."""


@settings
class AuditBudget:
    """What an attacker may do, and what the audit may take.

    Args:
        eps: How far an input may be moved, >= 0, in the unit that `unit` says: a number, a fraction as text ("8/255"),
            or a list with one number a feature.
        unit: `value`: the inputs' own (pixels in [0, 1]); `std`: standard deviations of each feature in the stream,
            for tables whose columns have different scales.
        norm: Of that distance: `linf`, each value alone, or `l2`, all together.
        poison_ratio: Share of each batch that may be changed, in [0, 1]; of a federation, `hostile` says it.
        labels: The attacker may change labels, too.
        samples: The attacker may send samples of the user's in place of others.
        batches: Batches before the last one, >= 1; of a federation, rounds.
        inner_steps: Steps of crafting a batch, >= 1.
        seconds: That an audit may take, > 0; what is finished by then is kept, and the same command goes on.
    """

    eps: Radii = 8 / 255
    unit: Literal["value", "std"] = "value"
    norm: Norm = "linf"
    poison_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    labels: bool = True
    samples: bool = True
    batches: Annotated[int, Field(ge=1)] = 10
    inner_steps: Annotated[int, Field(ge=1)] = 10
    seconds: Annotated[float, Field(gt=0)] = 3600.0


@settings
class Damage:
    """How much accuracy an attack may cost, in points (0 to 100).

    Args:
        step: In any one step, in [0, 100].
        phase: In [0, 100], from the first batch to the last, compared with the same stream left clean.
    """

    step: Points = 5.0
    phase: Points = 10.0


@settings
class FederatedAudit:
    """A federation in place of one stream.

    Args:
        clients: Among whom the stream's samples are divided, >= 2; all take part in every round.
        hostile: Share of them that is hostile, in [0, 1], rounded up to a whole client.
        scale: How many times as long as an honest update a hostile one may be, > 0.
        rule: The server's robust rule, a table as in a recipe; unset: the mean.
    """

    clients: Annotated[int, Field(ge=2)] = 10
    hostile: Annotated[float, Field(ge=0, le=1)] = 0.2
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    rule: dict[str, Any] | None = None


@settings
class AuditPlan:
    """What is audited and how.

    Args:
        target: `package.module:function` or `file.py:function`; see `audit.Target`.
        seeds: One run of each attack a seed, paired with the clean stream of the same seed; each >= 0 and once. Fewer
            than three show nothing.
        guard: `on`: the target's defence stands in every step; `off`: nothing does; `both`: one after the other, and
            the verdict is of the defended model. Unset: `both` if the target has a defence.
        attacks: Which are tried; empty: all that fit.
        budget: Of the attacker, and of the audit.
        damage: That is allowed.
        federated: Audit a federation of clients that send updates; unset: a stream.
        folder: Where relative paths of the target begin.
        file: The audit.toml, as findings name it.

    Raises:
        ConfigError: An attack is unknown, or seeds are none or repeated.
    """

    target: str = ""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)
    guard: Literal["on", "off", "both"] | None = None
    attacks: tuple[str, ...] = ()
    budget: AuditBudget = Field(default_factory=AuditBudget)
    damage: Damage = Field(default_factory=Damage)
    federated: FederatedAudit | None = None
    folder: str = "."
    file: str = "audit.toml"

    def __post_init__(self) -> None:
        known = FEDERATED if self.federated else ATTACKS
        for name in self.attacks:
            if name not in known:
                raise ConfigError(f"audit: attacks: unknown attack {shown(name)}: {nearest(name, known)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("audit: seeds: give at least one, each once, such as seeds = [0, 1, 2].")

    def with_seeds(self, seeds: Sequence[int]) -> "AuditPlan":
        """The same plan with other seeds."""
        return replace(self, seeds=tuple(seeds))

    def wants(self, attack: str) -> bool:
        """Whether an attack is to be tried."""
        return not self.attacks or attack in self.attacks


TABLES: Mapping[str, type] = {"budget": AuditBudget, "damage": Damage, "federated": FederatedAudit}
"""The tables of an audit.toml."""

ELSEWHERE = frozenset({"folder", "file"})
"""Fields that say where the file is, and are not in it."""


def plan_of(values: Mapping[str, Any], *, folder: Path | None = None, file: str = "audit.toml") -> AuditPlan:
    """A plan from plain values.

    Args:
        values: As in an audit.toml.
        folder: Where relative paths begin; unset: the current folder.
        file: What findings call the file.

    Raises:
        ConfigError: An unknown key (names the nearest), a wrong type or range.
    """
    top: dict[str, Any] = {key: value for key, value in values.items() if key not in TABLES}
    if wrong := ELSEWHERE & top.keys():
        raise ConfigError(f"{file}: unknown key {shown(min(wrong))}: {nearest(min(wrong), _keys())}")
    for name, cls in TABLES.items():
        if name in values:
            if not isinstance(values[name], Mapping):
                raise ConfigError(f"{file}: {name} = {shown(values[name])}: give a table, [{name}].")
            top[name] = make(cls, values[name], where=f"{file}: [{name}]")
    if unknown := top.keys() - _keys():
        raise ConfigError(f"{file}: unknown key {shown(min(unknown))}: {nearest(min(unknown), _keys())}")
    return make(AuditPlan, {**top, "folder": str(folder or Path.cwd()), "file": file}, where=file)


def _keys() -> set[str]:
    return {"target", "seeds", "guard", "attacks", *TABLES}


def read_plan(path: str | Path) -> AuditPlan:
    """The plan that an audit.toml holds.

    Args:
        path: The file; relative paths in it begin where it lies.

    Raises:
        ConfigError: It is not there, no TOML, or its values are wrong.
    """
    file = path_of(path)
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); give the path of an audit.toml.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is no TOML: {error}; mend that line.") from error
    return plan_of(values, folder=file.absolute().parent, file=file.name)
