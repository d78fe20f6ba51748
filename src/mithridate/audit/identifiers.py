"""The rules of an audit, and their names in the lists of others, each with its edition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mithridate.audit.result import WHERE, AuditFinding, Identifier, Level, Ruled, Side

Kind = Literal["inputs", "labels", "samples", "updates", "none"]
"""What was poisoned."""


@dataclass(frozen=True)
class AuditRule:
    """A thing that an audit may tell.

    Args:
        id: Stays the same for ever.
        name: In CamelCase, as SARIF wants it.
        summary: One sentence.
        mend: What to do.
    """

    id: str
    name: str
    summary: str
    mend: str


STEP = AuditRule(
    "MITH001",
    "OneStepCostsTooMuch",
    "One learning step on a poisoned batch costs more accuracy than is allowed.",
    "Put a guard into the loop that takes a bad step back, lower the learning rate, or take fewer samples from one "
    "source in a batch.",
)
PHASE = AuditRule(
    "MITH002",
    "PhaseCostsTooMuch",
    "A stream of poisoned batches costs more accuracy than is allowed, compared with the same stream left clean.",
    "Put a guard into the loop that compares with a state that does not move (a gate with reference = start or best), "
    "and hold back samples of sources that are not trusted.",
)
CLEAN = AuditRule(
    "MITH003",
    "CleanStreamCostsTooMuch",
    "Learning from the clean stream alone costs more accuracy than is allowed.",
    "Lower the learning rate, or look at the stream: nobody has to attack this model.",
)
OPEN = AuditRule(
    "MITH010",
    "Inconclusive",
    "The audit could not tell.",
    "Do what the message says, and audit again.",
)
RULES: Sequence[AuditRule] = (STEP, PHASE, CLEAN, OPEN)

KINDS: Mapping[str, Kind] = {"label_flip": "labels", "worst_samples": "samples"}
"""What an attack poisons, by its name; of those not here, the inputs."""

_NIST = "NIST AI 100-2e2025"
_ATLAS = "MITRE ATLAS"
_OWASP_ML = "OWASP Machine Learning Security Top 10, 2023"
_OWASP_LLM = "OWASP Top 10 for LLM Applications, 2026 (LLM04:2025 in the edition of 2025)"
_AISVS = "OWASP AISVS 1.0"

_POISONED_DATA = (
    Identifier(catalogue=_ATLAS, id="AML.T0020", title="Poison Training Data", checked=True),
    Identifier(catalogue=_ATLAS, id="AML.T0031", title="Erode AI Model Integrity", checked=False),
    Identifier(catalogue=_OWASP_ML, id="ML02:2023", title="Data Poisoning Attack", checked=True),
    Identifier(catalogue=_OWASP_ML, id="ML08:2023", title="Model Skewing", checked=True),
    Identifier(catalogue=_OWASP_LLM, id="LLM05:2026", title="Data and Model Poisoning", checked=False),
    Identifier(catalogue=_AISVS, id="1.4.2", title="detection of poisoning in training pipelines", checked=False),
    Identifier(catalogue=_AISVS, id="3.3.2", title="rollback of the complete model state", checked=False),
)
_DATA = Identifier(catalogue=_NIST, id="NISTAML.013", title="Data Poisoning", checked=False)
_CLEAN_LABEL = Identifier(catalogue=_NIST, id="NISTAML.012", title="Clean-label Poisoning", checked=False)

IDENTIFIERS: Mapping[Kind, Sequence[Identifier]] = {
    "inputs": (_CLEAN_LABEL, *_POISONED_DATA),
    "labels": (_DATA, *_POISONED_DATA),
    "samples": (_CLEAN_LABEL, *_POISONED_DATA),
    "updates": (
        Identifier(catalogue=_NIST, id="NISTAML.011", title="Model Poisoning", checked=False),
        Identifier(catalogue=_ATLAS, id="AML.T0018.000", title="Poison AI Model", checked=False),
        Identifier(catalogue=_ATLAS, id="AML.T0031", title="Erode AI Model Integrity", checked=False),
        Identifier(catalogue=_OWASP_ML, id="ML10:2023", title="Model Poisoning", checked=False),
        Identifier(catalogue=_OWASP_LLM, id="LLM05:2026", title="Data and Model Poisoning", checked=False),
        Identifier(catalogue=_AISVS, id="3.3.2", title="rollback of the complete model state", checked=False),
    ),
    "none": (),
}
"""By what was poisoned. NIST's report, ATLAS's present names and OWASP's list of 2026 were read in the words of others
(November 2026), and AISVS in a copy of its repository whose numbers had moved between drafts: these are not
`checked`."""


def findings_of(sides: Sequence[Side], *, federated: bool = False) -> list[AuditFinding]:
    """What is to be told of an audit, the side that the verdict is of first.

    Args:
        sides: The unguarded model, and the guarded one if there is one, which comes last.
        federated: What is poisoned are updates.
    """
    findings: list[AuditFinding] = []
    for side in reversed(sides):
        decisive = side is sides[-1]
        above = [r for r in side.rulings if r.says == "above" and not (r.control and r.attack != "clean")]
        attacked = [r for r in above if not r.control]
        for r in attacked or above:
            rule = CLEAN if r.control else STEP if r.measure == "step" else PHASE
            kind: Kind = "none" if r.control else "updates" if federated else KINDS.get(r.attack, "inputs")
            findings.append(_finding(side, rule, r, _told(r, side, decisive), "error" if decisive else "note", kind))
        if decisive and side.verdict == "inconclusive":
            findings += [
                _finding(side, OPEN, None, f"{text[0].upper()}{text[1:]}.", "warning", "none") for text in side.reasons
            ]
    return findings


def _finding(side: Side, rule: AuditRule, r: Ruled | None, message: str, level: Level, kind: Kind) -> AuditFinding:
    return AuditFinding(
        rule=rule.id,
        level=level,
        message=message,
        attack="" if r is None else r.attack,
        measure="" if r is None else r.measure,
        guarded=side.guarded,
        identifiers=list(IDENTIFIERS[kind]),
    )


def _told(r: Ruled, side: Side, decisive: bool) -> str:
    low, high = (f"{bound:.1f}" if bound is not None else "?" for bound in (r.cost.low, r.cost.high))
    who = "the guarded model" if side.guarded else "the model" if decisive else "the model without its guard"
    name = "learning from the clean stream" if r.attack == "clean" else r.attack
    return (
        f"{name} cost {who} {r.cost.mean:.1f} points of accuracy {WHERE[r.measure]} (95 % interval {low} to {high}, "
        f"{r.cost.seeds} seeds; {r.allowed:g} allowed)."
    )
