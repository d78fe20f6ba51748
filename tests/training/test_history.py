from pathlib import Path

import pytest
import torch
from torch import nn

from mithridate.core.errors import CheckpointError, ConfigError
from mithridate.core.past import Snapshot, Weights
from mithridate.training.checkpoint import save_snapshot
from mithridate.training.history import History


def model_at(value: float) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    for p in model.parameters():
        nn.init.constant_(p, value)
    return model


def level(weights: Weights | None) -> float | None:
    return None if weights is None else float(weights.parameters["1.bias"][0])


def recorded(history: History, steps: int) -> History:
    for step in range(steps):
        history.record(step, model_at(float(step)))
    return history


@pytest.mark.parametrize("on_disk", [False, True])
def test_looks_back_by_updates_and_forgets_the_oldest(tmp_path: Path, on_disk: bool) -> None:
    history = recorded(History(keep=4, folder=tmp_path if on_disk else None), 10)
    assert [level(history.back(k)) for k in range(6)] == [9, 8, 7, 6, None, None]
    assert len(list(tmp_path.glob("*.safetensors"))) == (4 if on_disk else 0)


def test_every_other_update_answers_with_a_state_that_is_old_enough() -> None:
    history = recorded(History(every=3, keep=10), 9)
    assert [level(history.back(k)) for k in (0, 1, 3, 4)] == [6, 3, 3, 0]


def test_a_recorded_state_does_not_follow_the_model() -> None:
    history, model = History(keep=2), model_at(1.0)
    history.record(0, model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(5)
    assert level(history.back(0)) == 1


def test_nothing_kept_is_nothing_found() -> None:
    history = recorded(History(), 3)
    assert history.back(0) is None
    with pytest.raises(ConfigError, match="no older one is kept"):
        history.checkpoint()


def test_tensors_carry_it_over() -> None:
    one, other = recorded(History(keep=3), 5), History(keep=3)
    other.load(one.tensors())
    assert [level(other.back(k)) for k in range(4)] == [level(one.back(k)) for k in range(4)] == [4, 3, 2, None]


def test_checkpoints_by_epoch(tmp_path: Path) -> None:
    paths = {}
    for epoch in (3, 6):
        state = dict(model_at(float(epoch)).named_parameters())
        paths[epoch] = tmp_path / f"{epoch}.safetensors"
        save_snapshot(paths[epoch], Snapshot(state, {}, {"state": {}, "param_groups": []}, 0))
    history = History(checkpoints=paths, length=12)
    assert [level(history.checkpoint(epoch)) for epoch in (None, 3, 6, "half")] == [3, 3, 6, 6]
    assert level(History(checkpoints=paths, length=7).checkpoint("half")) == 3  # rounded down
    with pytest.raises(ConfigError, match=r"DSC looks .* epoch 5, which is not kept \(older models: 3, 6\)"):
        history.checkpoint(5, who="DSC")
    with pytest.raises(ConfigError, match="epoch 12, the model that the stream starts with"):
        history.checkpoint(12)
    with pytest.raises(ConfigError, match="give its history the `length`"):
        History(checkpoints=paths).checkpoint("half")


def test_an_old_model_of_another_architecture_is_refused() -> None:
    weights = Weights({"0.weight": torch.zeros(3, 3)}, {}, "elsewhere")
    with pytest.raises(CheckpointError, match="elsewhere"):
        weights.logits(model_at(0.0), torch.zeros(1, 2))


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": -1}])
def test_impossible_sizes(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        History(**wrong)  # type: ignore[arg-type]  # on purpose: what is refused


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("made", [0, 2, 6])
@pytest.mark.parametrize("again", [False, True], ids=["next update", "the same update again"])
def test_what_was_recorded_for_an_update_that_failed_is_forgotten(
    tmp_path: Path, on_disk: bool, made: int, again: bool
) -> None:
    history = recorded(History(keep=3, folder=tmp_path if on_disk else None), made)
    before, files = history.tensors(), {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    step = max(made - again, 0)

    def fail() -> None:
        with history.recording(step, model_at(100.0)):
            assert level(history.back(0)) == 100
            assert len({key.partition(".")[0] for key in history.tensors()}) <= 3
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail()
    after = history.tensors()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    with history.recording(step, model_at(100.0)):
        pass
    assert level(history.back(0)) == 100
    assert len(list(tmp_path.iterdir())) == (min(step + 1, 3) if on_disk else 0)
