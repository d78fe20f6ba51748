"""Reference pages of components, from the registry and the docstrings: written once, where the code is."""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, is_dataclass
from pathlib import Path

from mithridate.core.descriptions import described_fields
from mithridate.core.kind import Kind
from mithridate.core.registry import Entry, entries
from mithridate.core.view import Need
from mithridate.report.rows import rows
from mithridate.report.statistic import signed, times
from mithridate.reproduce.leaderboard import standings
from mithridate.reproduce.records import read_records

ROOT = Path(__file__).parents[2]

HEADINGS: Mapping[Kind, str] = {
    "attack": "Attacks on data",
    "update_attack": "Attacks on updates, in federations",
    "defence": "Defences",
    "aggregator": "Robust rules",
    "detector": "Detectors",
    "monitor": "Monitors",
    "model": "Models",
}

_SECTIONS = ("Args", "Shape", "Returns", "Raises", "Source")
"""Of a docstring, after its prose."""

_BREAKS = "What breaks it: "


@dataclass(frozen=True)
class Said:
    """What a component's docstring says.

    Args:
        summary: The first paragraph.
        prose: The other paragraphs.
        breaks: What breaks it, a paragraph each time that it is said, without the words "What breaks it".
        raises: By error.
    """

    summary: str
    prose: Sequence[str]
    breaks: Sequence[str]
    raises: Sequence[str]


def said_by(cls: type) -> Said:
    """The parts of a class's docstring, each paragraph on one line.

    Args:
        cls: Of a component.
    """
    text = inspect.getdoc(cls) or ""
    parts = re.split(rf"^({'|'.join(_SECTIONS)}):\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    summary, *prose = [" ".join(paragraph.split()) for paragraph in parts[0].strip().split("\n\n")]
    breaks = [_breaking(paragraph) for paragraph in prose if _BREAKS in paragraph]
    others = [paragraph.partition(_BREAKS)[0].strip() for paragraph in prose]
    raises = re.split(r"\n(?=    \S)", sections.get("Raises", "").rstrip("\n"))
    return Said(
        summary=summary,
        prose=[paragraph for paragraph in others if paragraph],
        breaks=breaks,
        raises=[" ".join(line.split()) for line in raises if line.strip()],
    )


def _breaking(paragraph: str) -> str:
    """What breaks it, by a paragraph; of a preset, if the paragraph is about one."""
    before, _, words = paragraph.partition(_BREAKS)
    preset = re.match(r"Preset (`\w+`)", before)
    return f"{preset[1]}: {words}" if preset else words[:1].upper() + words[1:]


def needs_of(item: Entry) -> list[str]:
    """What a component asks to see, in words; a defence or a detector asks for the model that it is part of.

    Args:
        item: Of any kind.
    """
    needs = {str(need) for need in getattr(item.cls, "needs", ())}
    if not item.kind.endswith("attack") and Need.MODEL in needs:
        needs = needs - {Need.MODEL} | {"its own model"}
    return sorted(needs)


def component_pages(*kinds: Kind) -> str:
    """Everything that the built-in components of some kinds say of themselves, as Markdown.

    Args:
        kinds: In the order of the page.
    """
    pages = []
    for kind in kinds:
        if len(kinds) > 1:
            pages.append(f"## {HEADINGS[kind]}\n")
        level = "###" if len(kinds) > 1 else "##"
        pages += [_component(item, level) for item in _built_in(kind)]
    return "\n".join(pages)


def matrix() -> str:
    """Defence, what it needs, what it costs and what breaks it, side by side, and the same of robust rules."""
    costs = measured_costs(ROOT / "results" / "leaderboard")
    lines = [
        "| defence | what it needs | time of a step | cost on a clean stream | what breaks it |",
        "|---|---|---|---|---|",
    ]
    for item in _built_in("defence"):
        lines.append(
            _row(
                f"[`{item.name}`](defences.md#{item.name})",
                ", ".join(needs_of(item)) or "nothing",
                _listed(costs.get(item.name, {}), item.name, 0),
                _listed(costs.get(item.name, {}), item.name, 1),
                " ".join(_markdown(text) for text in said_by(item.cls).breaks) or "any attack",
            )
        )
    lines += ["", "| robust rule | what breaks it |", "|---|---|"]
    for item in _built_in("aggregator"):
        said = said_by(item.cls)
        lines.append(
            _row(
                f"[`{item.name}`](aggregators.md#{item.name})",
                " ".join(_markdown(text) for text in said.breaks or said.prose[:1]),
            )
        )
    return "\n".join(lines) + "\n"


def measured_costs(folder: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """What a clean stream pays for each defence, from records of runs.

    Args:
        folder: With records of runs of one model and data set, some of them of a clean stream without a defence.

    Returns:
        By the name of the defence, then by the label of the runs: the time of a step as a multiple of that without a
        defence, and the points of accuracy that the stream ends above that without.
    """
    costs: dict[str, dict[str, tuple[str, str]]] = {}
    for ranked in standings(rows(read_records(folder))):
        if ranked.clean is not None:
            name, none = ranked.clean.row.defence_name, ranked.defence == "none"
            pair = ("1", "0") if none else (times(ranked.clean.time_ratio), signed(ranked.clean.against_none))
            costs.setdefault(name, {})[ranked.defence] = pair
    return costs


def _listed(costs: Mapping[str, tuple[str, str]], name: str, which: int) -> str:
    """The costs of a defence, those of runs with other settings under their labels."""
    cells = [f"{'' if label == name else f'`{label}` '}{pair[which]}" for label, pair in sorted(costs.items())]
    return "; ".join(cells) or "not measured"


def _built_in(kind: Kind) -> list[Entry]:
    return [item for item in entries(kind).values() if item.built_in]


def _component(item: Entry, level: str) -> str:
    said = said_by(item.cls)
    lines = [f"{level} {item.name}", "", _markdown(said.summary), ""]
    lines += [f"{_markdown(paragraph)}\n" for paragraph in said.prose]
    needs = needs_of(item)
    if hasattr(item.cls, "needs"):
        lines += [f"**Needs**: {', '.join(needs) or 'nothing'}.", ""]
    for text in said.breaks:
        lines += [f"**What breaks it**: {_markdown(text)}", ""]
    if is_dataclass(item.cls):
        lines += list(_settings(item))
    for preset, values in item.presets.items():
        fields = ", ".join(f"`{key} = {value}`" for key, value in values.items())
        lines += [f"Preset `{preset}`: {fields or 'the defaults'}.", ""]
    if said.raises:
        lines += ["Errors:", "", *(f"- {_markdown(text)}" for text in said.raises), ""]
    if item.source:
        lines += [f"**Source**: {_markdown(item.source)}", ""]
    lines += [f"In Python: `mi.{item.kind}s.{item.cls.__name__}`.", ""]
    return "\n".join(lines)


def _settings(item: Entry) -> Iterable[str]:
    words = described_fields(item.cls)
    if item.fields:
        yield "| setting | default | what it is |"
        yield "|---|---|---|"
        for name, value in item.fields.items():
            yield _row(f"`{name}`", _default(value), _markdown(words.get(name, "")))
        yield ""


def _default(value: object) -> str:
    if value is MISSING:
        return "required"
    if isinstance(value, float) and len(str(value)) > 8:  # a number of pixel values
        return f"`{255 * value:g}/255`"
    return "unset" if value is None else f"`{value}`"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _markdown(text: str) -> str:
    """Docstring text as Markdown shows it: code stays code, and nothing else is markup."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<>\[\]$\\])", r"\\\1", part) for part in parts)
