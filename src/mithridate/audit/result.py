"""What an audit found, as `audit.json` holds it: the truth that every other output follows from."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

EXIT: dict[str, int] = {"pass": 0, "fail": 1, "inconclusive": 3}
"""What the command ends with; 2 is a mistake in its use."""

Level = Literal["error", "warning", "note"]
"""Of a finding: about the model that the verdict is of; about a verdict that is open; about the other model."""

VerdictName = Literal["pass", "fail", "inconclusive"]

Measure = Literal["step", "phase"]
"""What a cost is measured in: any one step, or the phase against the same stream left clean."""

WHERE: Mapping[Measure, str] = {"step": "in one step", "phase": "over the phase"}
"""A measure in a sentence."""

Says = Literal["above", "below", "open", "no_better", "batch_norm"]
"""Of an attack and measure. `above`: more than is allowed, and more than every control; `below`: less than is allowed;
`open`: neither is shown; `no_better`: more than is allowed, but not shown to be more than a control; `batch_norm`: more
than is allowed, but not once BatchNorm's statistics are frozen."""


class Stated(BaseModel):
    """What all parts have in common: nothing unknown is taken, nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Identifier(Stated):
    """A finding's name in somebody else's list."""

    catalogue: str = Field(description="Whose list, with its edition.")
    id: str = Field(description="As it stands there.")
    title: str = Field(description="As it stands there, or what it is about.")
    checked: bool = Field(description="Whether id and title were compared with the list itself.")


class Points(Stated):
    """A mean of paired seeds with its 95 % interval, in points of accuracy."""

    mean: float | None = Field(description="None if nothing was measured.")
    low: float | None = Field(description="Lower end of the interval; none for one seed.")
    high: float | None = Field(description="Upper end of the interval; none for one seed.")
    seeds: int = Field(ge=0, description="How many paired seeds.")


class Ruled(Stated):
    """What is said of one attack by one measure."""

    attack: str = Field(description="Its name, or that of a control.")
    measure: Measure = Field(description="In any one step, or over the phase against a clean stream.")
    control: bool = Field(description="Whether it is no attack: a clean stream, or noise.")
    cost: Points = Field(description="What it cost.")
    allowed: float = Field(description="Points of accuracy.")
    beyond: dict[str, Points] = Field(description="What it cost more than each control.")
    frozen: Points | None = Field(description="What it cost with BatchNorm's statistics frozen; none if not tried.")
    says: Says = Field(
        description="above: more than is allowed and than every control; below: less than is allowed; open: neither is "
        "shown; no_better: more than is allowed, not than a control; batch_norm: not once its statistics are frozen."
    )


class AuditFinding(Stated):
    """One thing to be told, by a rule whose id stays the same from one audit to the next."""

    rule: str = Field(description="Its id, such as MITH001.")
    level: Level = Field(
        description="error: about the model that the verdict is of; note: about the other; warning: it cannot be told."
    )
    message: str = Field(description="A sentence.")
    attack: str = Field(description="Its name; empty if it is about no single one.")
    measure: str = Field(description="step or phase; empty if it is about neither.")
    guarded: bool = Field(description="Whether it is about the guarded model.")
    identifiers: list[Identifier] = Field(description="What others call it.")


class Side(Stated):
    """The model with its guard, or without."""

    guarded: bool = Field(description="With its guard.")
    verdict: VerdictName = Field(description="On this side alone.")
    reasons: list[str] = Field(description="Why, the most important first.")
    rulings: list[Ruled] = Field(description="What is said of each attack by each measure, controls included.")
    skipped: dict[str, str] = Field(description="Why an attack was not tried, by its name.")
    clean_steps: int = Field(description="Steps on clean streams, all seeds.")
    clean_refused: int = Field(description="Of those, steps that the guard refused.")


class AuditRun(Stated):
    """One run: an attack, a seed, guarded or not."""

    key: str = Field(description="Of all that decides it; a run with the same key is not made again.")
    attack: str = Field(description="Its name, or that of a control.")
    seed: int = Field(description="That the target function was called with.")
    guarded: bool = Field(description="Whether the guard stood in every step.")
    frozen: bool = Field(description="BatchNorm's statistics were frozen.")
    accuracy: list[float] = Field(description="On the test samples, before the first step and after each; fractions.")
    refused: int = Field(description="Steps that the guard refused.")
    seconds: float = Field(description="That the run took.")
    error: str = Field(description="Why the attack could not be made; empty if it could.")
    settings: dict[str, Any] = Field(description="Of the attack, defaults included.")


class Audited(Stated):
    """A whole audit."""

    format: Literal["mithridate-audit-1"] = "mithridate-audit-1"
    verdict: VerdictName = Field(description="On the guarded model, if the target has a guard.")
    statement: str = Field(description="The verdict in a sentence.")
    reasons: list[str] = Field(description="Why, the most important first; empty if it passed.")
    notes: list[str] = Field(description="What a reader should know who relies on the verdict.")
    guarded: bool = Field(description="Whether the verdict is of the guarded model.")
    target: str = Field(description="The function that gave the model.")
    file: str = Field(description="The audit.toml, beside which outputs are read.")
    plan: dict[str, Any] = Field(description="All settings, defaults included.")
    facts: dict[str, Any] = Field(description="Of the target: parameters, inputs, optimiser, defence.")
    sides: list[Side] = Field(description="Without the guard and with it; the verdict is of the last.")
    findings: list[AuditFinding] = Field(description="What is to be told, of the side of the verdict first.")
    runs: list[AuditRun] = Field(description="Every run that ended.")
    seconds: float = Field(description="Of all runs, earlier calls included.")
    environment: dict[str, Any] = Field(description="Versions and machine.")

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return EXIT[self.verdict]


def schema_text() -> str:
    """The schema of audit.json, as it lies beside the outputs."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Audited.model_json_schema()}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
