"""Plans and target functions that are wrong are one sentence; a function that takes too long is no verdict."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import mithridate as mi
from mithridate.audit import Audited, Target, read_plan
from mithridate.core.batch import Batch
from mithridate.core.errors import UserError
from tests.audit.targets import QUICK, table_target
from tests.command import invoke


def audited(target: Any, **plan: Any) -> Audited:
    return mi.audit.run({"budget": QUICK, "attacks": ["noise"], "seeds": [0], **plan}, target=target)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tarket = 'a:b'", r"unknown key 'tarket': did you mean 'target'\?"),
        ("[budget]\nepsilon = 1", r"\[budget\]: unknown key 'epsilon': did you mean 'eps'\?"),
        ("[damage]\nsteps = 1", r"\[damage\]: unknown key 'steps': did you mean 'step'\?"),
        ("file = 'x'", "unknown key 'file'"),
        ("budget = 3", r"budget = 3: give a table"),
        ("[budget]\nbatches = 0", "batches = 0"),
        ("[budget]\neps = 'many'", "'many': give a number >= 0, a fraction as text"),
        ("attacks = ['vanila']", r"unknown attack 'vanila': did you mean 'vanilla'\?"),
        ("guard = 'maybe'", "guard = 'maybe'"),
        ("seeds = []", "give at least one"),
        ("seeds = [1, 1]", "each once"),
        ("target =", "is no TOML"),
    ],
)
def test_a_plan_that_is_wrong_says_where(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        read_plan(path)


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_plan(tmp_path / "audit.toml")


def raises(seed: int) -> Target:
    raise KeyError("weights")


def part(**others: Any) -> Any:
    """A target of which something is another."""
    return lambda seed: replace(table_target(seed), **others)


BAD: list[tuple[Any, str]] = [
    (raises, r"the target function raises raised KeyError: 'weights' \(.*test_bad_input.py, line \d+\)"),
    (lambda seed: None, "gave a NoneType; it must return mi.audit.Target"),
    (lambda seed: Target(nn.Linear(2, 2)), "raised TypeError: .*missing"),  # type: ignore[call-arg]
    (lambda: None, "raised TypeError: .*unexpected keyword argument 'seed'"),
    (part(test=None), "no test samples"),
    (part(stream=None), "no stream"),
    (part(stream=[]), "has 0 batches, and a run takes 4"),
    (part(stream=7), "stream is a int; give a list or a loader"),
    (part(stream=[(torch.zeros(2, 2), torch.zeros(3))] * 5), "2 in 'inputs' and 3 targets"),
    (part(stream=[{"x": torch.zeros(2, 2)}] * 5), "a mapping without labels"),
    (part(stream=[(torch.full((2, 2), torch.nan), torch.zeros(2, dtype=torch.int64))] * 5), "NaN or infinity"),
    (part(stream=[(torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2).long())] * 5), "inputs are bytes"),
    (part(test=Batch(torch.zeros(9, 3), torch.zeros(9).long())), "of another kind than the stream's first batch"),
    (part(optimizer=SGD(nn.Linear(2, 2).parameters(), lr=0.1)), "has none of the trainable parameters"),
    (part(optimizer="sgd"), "optimiser is 'sgd'"),
    (part(criterion=lambda x, y: F.cross_entropy(x, y, reduction="none")), "a loss is one number"),
    (part(defence="gait"), "unknown defence 'gait'.*did you mean 'gate'"),
    (part(defence=3), "defence = 3: give a defence, its name"),
    (part(defence={"name": "gate", "trusted": 1}), "unknown key 'trusted'"),
    (part(defence="gate", trusted=None), "trusted set"),
    (part(defence="dsc", trusted=table_target(0).test), "looks back at an older state"),
    (part(defence="filter", trusted=table_target(0).test), r"compares with samples .* training=\.\.\."),
]


@pytest.mark.parametrize(("target", "told"), BAD, ids=[told[:40] for _, told in BAD])
def test_a_target_that_is_wrong_is_one_sentence(target: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        audited(target)


def test_a_guard_that_is_asked_for_and_not_there() -> None:
    with pytest.raises(UserError, match="the target has no defence"):
        audited(table_target, guard="on")


def test_images_outside_their_range_need_a_domain() -> None:
    def target(seed: int) -> Target:
        images = Batch(4 * torch.rand(8, 1, 4, 4), torch.arange(8) % 2)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        return Target(model, SGD(model.parameters(), lr=0.1), F.cross_entropy, [images] * 5, test=images)

    with pytest.raises(UserError, match=r"images leave \[0, 1\]"):
        audited(target)


def test_numbers_as_targets_have_no_accuracy_to_lose() -> None:
    def target(seed: int) -> Target:
        model = nn.Linear(2, 1)
        batches = [Batch(torch.randn(8, 2), torch.randn(8, 1)) for _ in range(5)]
        return Target(
            model, SGD(model.parameters(), lr=0.1), F.mse_loss, batches, test=batches[0], validation=batches[1]
        )

    with pytest.raises(UserError, match="there is no accuracy to lose"):
        audited(target)


def hour(seed: int) -> Target:
    time.sleep(3600)
    raise AssertionError("never reached")


def test_a_function_that_takes_an_hour_is_ended_by_the_budget() -> None:
    began = time.monotonic()
    found = audited(hour, budget={**QUICK, "seconds": 0.2})
    assert time.monotonic() - began < 20
    assert (found.verdict, found.exit_code) == ("inconclusive", 3)
    assert found.reasons[0] == "budget spent: 0.2 s were over while the target function worked, seed 0"


def test_a_budget_that_ends_within_a_run_keeps_what_was_finished(tmp_path: Path) -> None:
    """The second seed's stream is endless in time, not in number; the first seed's runs are there afterwards."""

    def batches(seed: int) -> Iterator[Batch]:
        for batch in table_target(seed).stream:
            time.sleep(3600 if seed else 0)
            yield batch

    def target(seed: int) -> Target:
        return replace(table_target(seed), stream=list(batches(seed)))

    plan = {"budget": {**QUICK, "seconds": 1.5}, "attacks": ["noise", "label_flip"], "seeds": [0, 1, 2]}
    found = mi.audit.run(plan, target=target, out=tmp_path)
    assert found.verdict == "inconclusive"
    assert found.reasons[0].startswith("budget spent: 1.5 s were over while the target function worked, seed 1")
    assert len(list((tmp_path / "runs").iterdir())) == len(found.runs) > 0


TARGET = """
from tests.audit.targets import frozen, weak

def good(seed):
    return frozen(seed)

def bad(seed):
    raise RuntimeError("no [weights] here")
"""


@pytest.mark.parametrize(
    ("name", "seeds", "code", "said"),
    [
        pytest.param(
            *("good", "[0, 1, 2]", 0, "PASS: No tried attack within this budget cost more than 10 points"),
            marks=pytest.mark.slow,
        ),
        ("weak", "[0, 1, 2]", 1, "FAIL: label_flip cost"),
        ("weak", "[0]", 3, "INCONCLUSIVE: It cannot be told: too few seeds: 1"),
        ("bad", "[0]", 2, "error: the target function bad raised RuntimeError: no [weights] here"),
        ("goood", "[0]", 2, "has no function 'goood': did you mean 'good'?"),
    ],
)
def test_the_command_ends_as_the_verdict_says(name: str, seeds: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "audited_model.py").write_text(TARGET, encoding="utf-8")
    plan = tmp_path / "audit.toml"
    plan.write_text(
        f'target = "audited_model.py:{name}"\nseeds = {seeds}\nattacks = ["noise", "label_flip"]\n'
        "[budget]\neps = 0.15\nbatches = 3\ninner_steps = 2\n[damage]\nstep = 10\nphase = 20\n",
        encoding="utf-8",
    )
    done = invoke("audit", plan, "--out", tmp_path / "out")
    assert done.code == code, done.err
    assert said in done.out + done.err
    assert "Traceback" not in done.err
    assert (tmp_path / "out" / "audit.json").exists() is (code != 2)


def test_seeds_of_the_command_take_the_place_of_the_plans(tmp_path: Path) -> None:
    (tmp_path / "audited_again.py").write_text(TARGET, encoding="utf-8")
    plan = tmp_path / "audit.toml"
    plan.write_text(
        'target = "audited_again.py:good"\nattacks = ["label_flip"]\n[budget]\nbatches = 1\n', encoding="utf-8"
    )
    done = invoke("audit", plan, "--out", tmp_path / "out", "--seeds", "5")
    assert done.code == 3
    assert Audited.model_validate_json((tmp_path / "out" / "audit.json").read_bytes()).plan["seeds"] == [5]
