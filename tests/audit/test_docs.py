"""What the docs and the examples show runs."""

import re
import tomllib
from pathlib import Path

import pytest

from mithridate.audit import plan_of, read_plan, run
from mithridate.audit.plan import ATTACKS, FEDERATED

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_every_key_and_attack_is_described() -> None:
    for table in ("budget", "damage", "federated"):
        for key in vars(getattr(plan_of({"federated": {}}), table)):
            assert f"`{key}`" in TEXT or re.search(rf"^{key} = ", TEXT, flags=re.MULTILINE), key
    for name in {**ATTACKS, **FEDERATED}:
        assert f"`{name}`" in TEXT


@pytest.mark.parametrize("name", ["digits", "table", "tokens"])
def test_the_plans_of_the_examples_can_be_read(name: str) -> None:
    plan = read_plan(ROOT / "examples" / "audit" / f"{name}.toml")
    file, _, function = plan.target.partition(":")
    source = (ROOT / "examples" / "audit" / file).read_text(encoding="utf-8")
    assert f"def {function}(seed" in source
    assert "def guarded(seed" in source


@pytest.mark.slow
def test_the_example_of_the_docs_runs(tmp_path: Path) -> None:
    (python,), (toml,) = blocks("python"), blocks("toml")
    (tmp_path / "model.py").write_text(python, encoding="utf-8")
    (tmp_path / "audit.toml").write_text(toml, encoding="utf-8")
    assert plan_of(tomllib.loads(toml)).seeds == (0, 1, 2)
    audited = run(tmp_path / "audit.toml", out=tmp_path / "audit")
    assert [side.guarded for side in audited.sides] == [False, True]
    assert all(run.accuracy[0] > 0.8 for run in audited.runs)
    assert (tmp_path / "audit" / "audit.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "table", "tokens"])
def test_the_examples_run(name: str) -> None:
    if name == "tokens":
        pytest.importorskip("transformers", reason="needs transformers")
    plan = read_plan(ROOT / "examples" / "audit" / f"{name}.toml").with_seeds([0])
    audited = run(plan)
    assert audited.verdict == "inconclusive"
    assert audited.reasons[0].startswith("too few seeds")
