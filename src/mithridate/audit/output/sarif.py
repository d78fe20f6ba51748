"""An audit as SARIF 2.1.0, for code scanning: a result a finding, at the audit.toml."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from mithridate.audit.identifiers import RULES
from mithridate.audit.result import Audited, AuditFinding

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def sarif(audited: Audited) -> str:
    """One run of the tool; its rules have the same ids in every audit."""
    driver = {
        "name": "mithridate",
        "version": version("mithridate"),
        "rules": [
            {
                "id": rule.id,
                "name": rule.name,
                "shortDescription": {"text": rule.summary},
                "fullDescription": {"text": rule.summary},
                "help": {"text": rule.mend},
            }
            for rule in RULES
        ],
    }
    run = {
        "tool": {"driver": driver},
        "results": [_result(audited, finding) for finding in audited.findings],
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": True, "exitCode": audited.exit_code}],
        "properties": {"verdict": audited.verdict, "statement": audited.statement},
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1)


def _result(audited: Audited, finding: AuditFinding) -> Mapping[str, Any]:
    index = [rule.id for rule in RULES].index(finding.rule)
    same = f"{finding.rule}/{finding.attack}/{finding.measure}/{finding.guarded}"
    where = {"artifactLocation": {"uri": quote(audited.file)}, "region": {"startLine": 1}}
    return {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": finding.level,
        "message": {"text": finding.message},
        "locations": [{"physicalLocation": where}],
        "partialFingerprints": {"auditFinding/v1": same},
        "properties": {
            "attack": finding.attack,
            "measure": finding.measure,
            "guarded": finding.guarded,
            "identifiers": [identifier.model_dump() for identifier in finding.identifiers],
        },
    }
