"""audit.json is the truth; the other files say the same, in forms that their own schemas take."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import mithridate as mi
from mithridate.audit import Audited
from mithridate.audit.output import FORMS, write_outputs
from mithridate.audit.output.evidence import lines
from mithridate.audit.result import schema_text
from tests.audit.targets import QUICK, frozen, weak

SCHEMAS = Path(__file__).parent / "schemas"
SHIPPED = Path(mi.__file__).parent / "audit" / "output" / "audit.schema.json"


def audited(target: Any, **plan: Any) -> Audited:
    values = {"budget": QUICK, "damage": {"step": 10, "phase": 20}, "attacks": ["noise", "label_flip"], **plan}
    return mi.audit.run(values, target=target)


@pytest.fixture(scope="module")
def each() -> dict[str, Audited]:
    """One audit of every verdict."""
    found = {"fail": audited(weak), "pass": audited(frozen), "inconclusive": audited(weak, seeds=[0])}
    assert {name: one.verdict for name, one in found.items()} == {name: name for name in found}
    return found


VERDICTS = pytest.mark.parametrize("verdict", ["pass", "fail", "inconclusive"])


@VERDICTS
def test_the_truth_comes_back_from_its_file_and_makes_the_same_outputs(each: dict[str, Audited], verdict: str) -> None:
    whole = each[verdict]
    again = Audited.model_validate_json(FORMS["audit.json"](whole))
    assert again == whole
    for name, form in FORMS.items():
        if verdict == "fail" or name != "audit.html":  # a page is drawn, which takes its time
            assert form(again) == form(whole)


def test_the_shipped_schema_is_that_of_the_code() -> None:
    assert SHIPPED.read_text(encoding="utf-8") == schema_text()


@VERDICTS
def test_json_keeps_to_its_schema(each: dict[str, Audited], verdict: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema, of the extra `test`")
    schema = json.loads(SHIPPED.read_text(encoding="utf-8"))
    values = json.loads(FORMS["audit.json"](each[verdict]))
    jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**values, "verdict": "safe"}, schema)


@VERDICTS
def test_sarif_keeps_to_its_schema_and_names_the_plan(each: dict[str, Audited], verdict: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema, of the extra `test`")
    schema = json.loads((SCHEMAS / "sarif-2.1.0-rtm.5.json").read_text(encoding="utf-8"))
    log = json.loads(FORMS["audit.sarif"](each[verdict]))
    jsonschema.validate(log, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**log, "version": "2.0.0"}, schema)
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        (place,) = result["locations"]
        assert place["physicalLocation"]["artifactLocation"]["uri"] == "audit.toml"
    levels = {result["level"] for result in run["results"]}
    assert levels == {"pass": set(), "fail": {"error"}, "inconclusive": {"warning"}}[verdict]


@VERDICTS
def test_junit_keeps_to_its_schema_and_counts(each: dict[str, Audited], verdict: str) -> None:
    xmlschema = pytest.importorskip("xmlschema", reason="needs xmlschema, of the extra `test`")
    schema = xmlschema.XMLSchema(SCHEMAS / "junit-10.xsd")
    text = FORMS["audit.xml"](each[verdict])
    schema.validate(text)
    with pytest.raises(xmlschema.XMLSchemaValidationError):
        schema.validate(text.replace("testcase", "case"))
    root = ElementTree.fromstring(text)  # noqa: S314  (our own text)
    failures, errors = len(root.findall(".//failure")), len(root.findall(".//error"))
    assert (failures > 0, errors > 0) == (verdict == "fail", verdict == "inconclusive")
    assert root.get("failures") == str(failures)
    assert root.get("tests") == str(len(root.findall(".//testcase")))


def test_rules_keep_their_ids() -> None:
    from mithridate.audit.identifiers import RULES

    assert {rule.id: rule.name for rule in RULES} == {
        "MITH001": "OneStepCostsTooMuch",
        "MITH002": "PhaseCostsTooMuch",
        "MITH003": "CleanStreamCostsTooMuch",
        "MITH010": "Inconclusive",
    }


def test_every_identifier_names_an_edition() -> None:
    from mithridate.audit.identifiers import IDENTIFIERS

    named = {identifier for several in IDENTIFIERS.values() for identifier in several}
    assert {"NISTAML.011", "NISTAML.012", "NISTAML.013", "AML.T0020", "ML02:2023"} <= {i.id for i in named}
    assert all(re.search(r"20\d\d|AISVS 1\.0|ATLAS", i.catalogue) for i in named)


@VERDICTS
def test_ten_lines_come_first_and_never_say_safe(each: dict[str, Audited], verdict: str) -> None:
    first = lines(each[verdict])
    assert 4 <= len(first) <= 10
    page, text = FORMS["audit.html"](each[verdict]), FORMS["audit.md"](each[verdict])
    assert text.startswith(f"# {verdict.upper()}: ")
    assert verdict.upper() in page
    assert not re.search(r"\bsafe\b|\bsecure\b", text + page.partition("<body>")[2], flags=re.IGNORECASE)


def test_a_hostile_name_is_text_everywhere(each: dict[str, Audited]) -> None:
    bad = '</td><script>alert("1")</script>\x00| `x`'
    hostile = each["fail"].model_copy(update={"target": bad, "reasons": [bad], "statement": bad})
    for name in ("audit.html", "audit.md"):
        assert "<script>alert" not in FORMS[name](hostile)
    ElementTree.fromstring(FORMS["audit.xml"](hostile))  # noqa: S314  (our own text)


def test_files_are_whole_or_not_there(each: dict[str, Audited], tmp_path: Path) -> None:
    write_outputs(each["pass"], tmp_path)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == set(FORMS)
