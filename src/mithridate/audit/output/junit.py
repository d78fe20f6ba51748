"""An audit as JUnit XML: a test case an attack and measure, so that any CI shows it."""

from xml.etree import ElementTree

from mithridate.audit.output.evidence import SAYS, points, side_name
from mithridate.audit.result import WHERE, Audited, Ruled, Side


def junit(audited: Audited) -> str:
    """A suite a side; only that which the verdict is of can fail."""
    root = ElementTree.Element("testsuites", name="mithridate audit")
    for side in audited.sides:
        _suite(root, side, decisive=side is audited.sides[-1])
    totals = {key: sum(int(suite.get(key, "0")) for suite in root) for key in ("tests", "failures", "errors")}
    for key, total in totals.items():
        root.set(key, str(total))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suite(root: ElementTree.Element, side: Side, *, decisive: bool) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=f"the model {side_name(side)}")
    counted = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}

    def case(name: str, outcome: str = "", message: str = "") -> None:
        element = ElementTree.SubElement(suite, "testcase", name=_clean(name), classname=f"audit.{_room(side)}")
        counted["tests"] += 1
        if outcome:
            counted[{"failure": "failures", "error": "errors"}.get(outcome, outcome)] += 1
            ElementTree.SubElement(element, outcome, message=_clean(message))

    for r in side.rulings:
        name = f"{r.attack} {WHERE[r.measure]}"
        if decisive and r.says == "above" and (not r.control or r.attack == "clean"):
            case(name, "failure", _message(r))
        elif r.says == "below":
            case(name)
        else:
            case(name, "skipped", _message(r))
    for name, why in side.skipped.items():
        case(name, "skipped", f"not tried: {why}")
    if decisive and side.verdict == "inconclusive":
        case("verdict", "error", f"inconclusive: {'; '.join(side.reasons)}")
    for key, count in counted.items():
        suite.set(key, str(count))


def _room(side: Side) -> str:
    return "guarded" if side.guarded else "unguarded"


def _message(r: Ruled) -> str:
    return f"{points(r.cost)} points, {r.allowed:g} allowed: {SAYS[r.says]}"


def _clean(text: str) -> str:
    """Text without characters that XML cannot hold."""
    return "".join(c if c.isprintable() else " " for c in text)
