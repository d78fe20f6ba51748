"""The auditor audited: what must fail fails, what must pass passes, and one seed shows nothing."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mithridate as mi
from mithridate.audit import Audited, Target
from mithridate.core.errors import UserError
from mithridate.core.seeding import generator
from mithridate.models import build_model
from mithridate.testing.toy import toy_stream
from tests.audit.targets import QUICK, divisible, frozen, rows, table_target, token_target, toy_target, weak

pytestmark = pytest.mark.slow  # an audit is many runs


def audited(target: Any, out: Path | None = None, **plan: Any) -> Audited:
    values: dict[str, Any] = {"budget": QUICK, "damage": {"step": 10, "phase": 20}, **plan}
    return mi.audit.run(values, target=target, out=out)


def test_a_planted_weakness_fails() -> None:
    found = audited(weak, attacks=["noise", "label_flip"])
    assert (found.verdict, found.exit_code) == ("fail", 1)
    assert found.reasons[0].startswith("label_flip cost ")
    assert {f.rule for f in found.findings if f.level == "error"} <= {"MITH001", "MITH002"}
    assert all(f.identifiers for f in found.findings)


def test_a_frozen_model_passes_whatever_is_tried() -> None:
    found = audited(frozen)
    assert (found.verdict, found.exit_code) == ("pass", 0)
    tried = {r.attack for r in found.sides[0].rulings if not r.control}
    assert tried == {"vanilla", "accumulative", "gradient_inversion", "label_flip", "worst_samples"}
    assert (
        found.statement
        == "No tried attack within this budget cost more than 10 points in one step or 20 over the phase."
    )
    assert "safe" not in found.model_dump_json()


def test_one_seed_is_inconclusive_however_bad_it_is() -> None:
    found = audited(weak, attacks=["noise", "label_flip"], seeds=[0])
    assert (found.verdict, found.exit_code) == ("inconclusive", 3)
    assert found.reasons[0].startswith("too few seeds: 1")


def test_the_verdict_is_of_the_guarded_model() -> None:
    guarded = audited(lambda seed: table_target(seed, lr=10.0, defence="gate"), attacks=["noise", "label_flip"])
    assert [side.guarded for side in guarded.sides] == [False, True]
    assert guarded.sides[0].verdict == "fail"
    assert guarded.verdict == guarded.sides[1].verdict
    assert guarded.sides[1].clean_steps == 3 * 4
    assert max(run.refused for run in guarded.runs if run.attack == "label_flip") > 0
    assert all(f.level == "note" for f in guarded.findings if not f.guarded)


def test_the_guard_of_the_users_loop_is_tried_and_taken_off_it() -> None:
    def target(seed: int, *, told: bool = True) -> Target:
        plain = table_target(seed, lr=10.0)
        guard = mi.guard.attach(plain.model, plain.optimizer, defence=mi.defences.Gate(), trusted=plain.trusted)
        return replace(plain, defence=guard if told else None)

    plan: dict[str, Any] = {"attacks": ["label_flip"], "seeds": [0]}
    by_guard = audited(target, **plan)
    by_defence = audited(lambda seed: table_target(seed, lr=10.0, defence="gate"), **plan)
    assert [run.accuracy for run in by_guard.runs] == [run.accuracy for run in by_defence.runs]
    assert by_guard.sides[0].rulings != by_guard.sides[1].rulings
    with pytest.raises(UserError, match=r"guarded already; give the guard itself"):
        audited(lambda seed: target(seed, told=False), **plan)


def test_the_gates_limits_are_the_attackers_beliefs() -> None:
    gate = mi.defences.Gate(max_loss_rise=0.3, reference="start", forget_momentum=True)
    found = audited(
        lambda seed: table_target(seed, lr=0.02, defence=gate), attacks=["gate_aware"], seeds=[0], guard="on"
    )
    (run,) = [run for run in found.runs if run.attack == "gate_aware"]
    expected = {"max_loss_rise": 0.3, "reference": "start", "forget_momentum": True, "victim_lr": 0.02}
    assert expected.items() <= run.settings.items()


def test_token_ids_are_attacked_by_labels_and_by_choice() -> None:
    found = audited(token_target)
    side = found.sides[0]
    assert {r.attack for r in side.rulings if not r.control} == {"label_flip", "worst_samples"}
    assert set(side.skipped) == {"noise", "vanilla", "accumulative", "gradient_inversion", "gate_aware", "hiding"}
    assert "needs one tensor of floats" in side.skipped["vanilla"]
    assert found.verdict == "fail"


def test_no_attack_that_applies_is_inconclusive() -> None:
    found = audited(token_target, attacks=["vanilla", "noise"])
    assert found.verdict == "inconclusive"
    assert "no attack applies to this target (noise: " in found.reasons[0]


class Rounded(nn.Module):
    """Through which no gradient reaches the inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x.mul(255).round().div(255))


def test_a_model_without_gradients_is_not_said_to_resist_them() -> None:
    def target(seed: int) -> Target:
        plain = table_target(seed, lr=0.0)
        return replace(plain, model=Rounded(plain.model))

    found = audited(target, attacks=["noise", "vanilla"])
    assert found.verdict == "inconclusive"
    assert "no gradient reaches them" in found.sides[0].skipped["vanilla"]


def test_a_radius_of_its_own_for_every_feature() -> None:
    found = audited(table_target, budget={**QUICK, "eps": 0.5, "unit": "std"}, attacks=["noise", "vanilla"], seeds=[0])
    (run,) = [run for run in found.runs if run.attack == "vanilla"]
    first, second = run.settings["scale"]
    assert 500 < second / first < 2000
    with pytest.raises(UserError, match="eps lists 3 numbers, and a sample has 2"):
        audited(table_target, budget={**QUICK, "eps": [1.0, 2.0, 3.0]}, attacks=["noise"])


def test_one_model_for_all_seeds_begins_anew_and_is_left_as_it_was() -> None:
    """A function may load a model once, and give it again and again."""
    once = table_target(0, lr=10.0)
    before = copy.deepcopy((once.model.state_dict(), once.optimizer.state_dict()))
    found = audited(lambda seed: once, attacks=["label_flip"])
    starts = {run.accuracy[0] for run in found.runs}
    assert len(starts) == 1
    assert min(run.accuracy[-1] for run in found.runs) < min(starts) - 0.3
    for name, tensor in before[0].items():
        assert torch.equal(once.model.state_dict()[name], tensor)
    assert once.optimizer.state_dict() == before[1]
    assert "gave the same model and stream in every seed" in found.notes[0]
    assert "gave the same model" not in str(audited(weak, attacks=["label_flip"]).notes)


def test_finished_runs_are_not_made_again_and_others_are(tmp_path: Path) -> None:
    def again(**plan: Any) -> tuple[Audited, list[str]]:
        lines: list[str] = []
        values = {"budget": QUICK, "attacks": ["noise", "label_flip"], "seeds": [0], **plan}
        return mi.audit.run(values, target=frozen, out=tmp_path, watch=lines.append), lines

    first, _ = again()
    files = {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    second, _ = again()
    assert first == second
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir()} == files
    damaged = tmp_path / "runs" / min(files)
    damaged.write_text("{", encoding="utf-8")
    third, _ = again()
    assert [run.key for run in third.runs] == [run.key for run in first.runs]
    again(budget={**QUICK, "poison_ratio": 0.5})
    assert len(list((tmp_path / "runs").iterdir())) > len(files)


def test_a_federation_is_attacked_by_updates() -> None:
    plan: dict[str, Any] = {"federated": {"clients": 5, "hostile": 0.6, "scale": 20}, "attacks": ["noise", "sign_flip"]}
    found = audited(divisible, **plan)
    unguarded, guarded = found.sides
    names = {r.attack for r in unguarded.rulings}
    assert names == {"clean", "noise", "sign_flip"}
    assert unguarded.verdict == "fail"
    assert guarded.verdict == found.verdict
    (first, *_) = [f for f in found.findings if not f.guarded and f.attack == "sign_flip"]
    assert "NISTAML.011" in {identifier.id for identifier in first.identifiers}


def test_a_federation_needs_samples_that_can_be_divided() -> None:
    with pytest.raises(UserError, match="stream is a list of batches; give a Stream"):
        audited(table_target, federated={"clients": 2})
    with pytest.raises(UserError, match="unknown attack 'vanilla'"):
        audited(weak, federated={"clients": 2}, attacks=["vanilla"])


@pytest.mark.slow
def test_images_are_tried_by_everything_and_batch_norm_is_told_apart() -> None:
    """A net with BatchNorm: where an attack cost too much, it is tried with the statistics frozen, too."""
    found = audited(lambda seed: toy_target(seed, lr=0.3))
    assert found.verdict == "fail"
    again = [run for run in found.runs if run.frozen]
    assert {"clean", "label_flip"} <= {run.attack for run in again}
    told = {r.attack: r.frozen for r in found.sides[0].rulings if r.measure == "phase"}
    assert told["label_flip"] is not None


@pytest.mark.slow
def test_a_net_that_does_not_move_passes() -> None:
    assert audited(lambda seed: toy_target(seed, lr=0.0)).verdict == "pass"


@pytest.mark.slow
def test_a_guard_that_looks_back_is_hidden_from() -> None:
    def target(seed: int) -> Target:
        fresh = build_model({"name": "small_cnn", "width": 8}, toy_stream(seed).info, seed=seed)
        guard = {"name": "dsc", "epoch": 0, "target_rate": 0.2}
        return toy_target(seed, lr=0.05, defence=guard, older={0: fresh.state_dict()})

    found = audited(target, attacks=["accumulative", "hiding"], seeds=[0], guard="on")
    (run,) = [run for run in found.runs if run.attack == "hiding" and not run.frozen]
    assert run.settings["beta"] > 0
    assert run.settings["hide"] == "pixels"


def test_a_loader_of_a_users_own_is_a_stream() -> None:
    """Shuffled by its generator, its last batch smaller, on a sequence of pairs."""

    def target(seed: int) -> Target:
        x, y = rows(110, generator("loader", seed))
        shuffled = torch.Generator().manual_seed(seed)
        loader = DataLoader(TensorDataset(x, y), batch_size=25, shuffle=True, generator=shuffled)
        return table_target(seed, lr=10.0, stream=loader)

    found = audited(target, attacks=["noise", "label_flip"], budget={**QUICK, "batches": 4})
    assert found.verdict == "fail"
    assert all(len(run.accuracy) == 6 for run in found.runs if run.attack == "label_flip")
    with pytest.raises(UserError, match="has 5 batches, and a run takes 6"):
        audited(target, attacks=["label_flip"], budget={**QUICK, "batches": 5})
