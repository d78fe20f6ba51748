"""What every output shows: ten lines first, then tables; words and numbers, no layout."""

from collections.abc import Mapping, Sequence

from mithridate.audit.identifiers import RULES
from mithridate.audit.result import WHERE, Audited, AuditRun, Points, Ruled, Says, Side
from mithridate.report.tables.section import TableSection, Toned
from mithridate.report.wording import MISSING

SAYS: Mapping[Says, str] = {
    "above": "too much",
    "below": "within what is allowed",
    "open": "not shown either way",
    "no_better": "no better than noise",
    "batch_norm": "BatchNorm alone",
}

MENDS: Mapping[str, str] = {rule.id: rule.mend for rule in RULES}

TONES: Mapping[Says, str] = {"above": "apart", "below": "near"}
"""The colour of a cell, by what is said in it."""


def side_name(side: Side) -> str:
    """What a side is called."""
    return "with its guard" if side.guarded else "without a guard"


def headline(audited: Audited) -> str:
    """The verdict, as a title."""
    return f"{audited.verdict.upper()}: {audited.statement}"


def lines(audited: Audited) -> list[str]:
    """Ten lines at most that say it all."""
    facts = audited.facts
    said = []
    if facts:
        said.append(
            f"Audited: {audited.target}, {facts['model']} with {facts['parameters']:,} parameters and "
            f"{facts['optimiser']}, batches of {facts['batch_size']}, inputs {facts['inputs']}."
        )
    said.append(f"The verdict is of the model {side_name(audited.sides[-1])}.")
    said.append(_attacker(audited))
    said.append(f"Seeds: {', '.join(map(str, audited.plan['seeds']))}.")
    for side in audited.sides:
        worst = worst_of(side)
        if worst is not None:
            said.append(
                f"The worst {side_name(side)}: {worst.attack}, {points(worst.cost)} points {WHERE[worst.measure]} "
                f"({worst.allowed:g} allowed)."
            )
        if side.guarded and side.clean_steps:
            said.append(f"On clean streams the guard refused {side.clean_refused} of {side.clean_steps} steps.")
    if skipped := audited.sides[-1].skipped:
        said.append(f"Not tried: {', '.join(sorted(skipped))} (reasons below).")
    said += audited.notes
    if audited.verdict == "pass":
        said.append("This says what was tried, and nothing about other attacks.")
    return said[:10]


def _attacker(audited: Audited) -> str:
    """What an attacker may do."""
    budget, federated = audited.plan["budget"], audited.plan.get("federated")
    if federated:
        rule = (federated.get("rule") or {"name": "the mean"})["name"]
        return (
            f"{100 * federated['hostile']:g} % of {federated['clients']} clients are hostile, and the server takes "
            f"{rule}; there are {budget['batches']} rounds and a last one."
        )
    powers = [f"move inputs by {_eps(budget)}"] if audited.facts.get("movable", True) else []
    powers += ["change labels"] if budget["labels"] else []
    powers += ["send other samples"] if budget["samples"] else []
    return (
        f"In {100 * budget['poison_ratio']:g} % of each batch an attacker may {' or '.join(powers) or 'do nothing'}; "
        f"there are {budget['batches']} batches and a last one."
    )


def worst_of(side: Side) -> Ruled | None:
    """The attack that cost most beyond what is allowed; None if none ran."""
    ran = [r for r in side.rulings if not r.control and r.cost.mean is not None]
    return max(ran, key=lambda r: (r.cost.mean or 0.0) - r.allowed, default=None)


def tables(audited: Audited) -> list[TableSection]:
    """The evidence: costs on each side, what was not tried, and every run."""
    parts = [_findings(audited), *(_costs(side) for side in reversed(audited.sides))]
    skipped = [(side_name(side), name, why) for side in audited.sides for name, why in side.skipped.items()]
    parts.append(
        TableSection(
            "not-tried",
            "Not tried",
            "Attacks that did not fit the target or the budget, and why.",
            ("attack", "model", "why"),
            {"": [(name, side, Toned(why, "text")) for side, name, why in skipped]} if skipped else {},
            names=3,
        )
    )
    parts.append(_identified(audited))
    parts.append(
        TableSection(
            "runs",
            "Every run",
            "Accuracy on the test samples before the first step and after the last, and the largest fall in one step.",
            ("attack", "model", "seed", "start", "end", "largest fall", "refused", "seconds"),
            {"": [_run(run) for run in audited.runs]} if audited.runs else {},
        )
    )
    return [part for part in parts if not part.empty]


def _costs(side: Side) -> TableSection:
    rows = [_ruled(r) for r in sorted(side.rulings, key=lambda r: (r.control, r.measure != "step"))]
    return TableSection(
        f"costs-{'guarded' if side.guarded else 'unguarded'}",
        f"What each attack cost the model {side_name(side)}",
        "Points of accuracy, mean over paired seeds with its 95 % interval. In one step: the largest fall from one "
        "step to the next. Over the phase: how much lower it ends than on the same stream left clean. "
        f"Verdict: {side.verdict}.",
        ("attack", "measure", "said", "cost", "allowed", "statistics frozen", "more than its controls"),
        {"": rows} if rows else {},
        note="clean and noise are controls: the same stream, left alone or changed at random. Statistics frozen: the "
        "same with BatchNorm in eval mode, tried where an attack cost more than is allowed.",
        names=3,
    )


def _ruled(r: Ruled) -> Sequence[str]:
    beyond = "; ".join(f"{name.replace('_', ' ')} {points(b)}" for name, b in r.beyond.items())
    return (
        f"{r.attack} (control)" if r.control else r.attack,
        "one step" if r.measure == "step" else "phase",
        Toned(SAYS[r.says], f"name {TONES.get(r.says, 'absent')}"),
        points(r.cost),
        f"{r.allowed:g}",
        MISSING if r.frozen is None else points(r.frozen),
        Toned(beyond or MISSING, "text"),
    )


def _findings(audited: Audited) -> TableSection:
    rows = [(f.rule, f.level, Toned(f.message, "text"), Toned(MENDS[f.rule], "text")) for f in audited.findings]
    return TableSection(
        "findings",
        "Findings",
        "What the audit has to tell; a note is of the model that the verdict is not of.",
        ("rule", "level", "finding", "what to do"),
        {"": rows} if rows else {},
        names=4,
    )


def _identified(audited: Audited) -> TableSection:
    rows = {
        (i.catalogue, i.id, i.title, "yes" if i.checked else "no"): None
        for f in audited.findings
        for i in f.identifiers
    }
    return TableSection(
        "identifiers",
        "The findings in the lists of others",
        "Under which names these findings stand elsewhere, each with its edition.",
        ("list", "id", "title", "compared with the list itself"),
        {"": list(rows)} if rows else {},
        names=4,
    )


def _run(run: AuditRun) -> Sequence[str]:
    falls = [a - b for a, b in zip(run.accuracy, run.accuracy[1:], strict=False)]
    model = f"{'guarded' if run.guarded else 'unguarded'}{', frozen' if run.frozen else ''}"
    return (
        run.attack,
        model,
        str(run.seed),
        f"{100 * run.accuracy[0]:.1f}",
        f"{100 * run.accuracy[-1]:.1f}",
        f"{100 * max([*falls, 0.0]):.1f}",
        str(run.refused),
        f"{run.seconds:.1f}",
    )


def points(cost: Points) -> str:
    """A cost with its interval.

    >>> points(Points(mean=1.25, low=1.0, high=1.5, seeds=3)), points(Points(mean=2.0, low=None, high=None, seeds=1))
    ('1.2 [1.0, 1.5]', '2.0 (one seed)')
    """
    if cost.mean is None:
        return MISSING
    if cost.low is None or cost.high is None:
        return f"{cost.mean:.1f} (one seed)"
    return f"{cost.mean:.1f} [{cost.low:.1f}, {cost.high:.1f}]"


def _eps(budget: Mapping[str, object]) -> str:
    eps = budget["eps"]
    written = f"{len(eps)} radii of their own" if isinstance(eps, list) else f"{eps:.4g}"
    unit = " standard deviations" if budget["unit"] == "std" else ""
    return f"{written}{unit} ({budget['norm']})"
