"""Burn-in: trained once for all that agree on it, and the same bits however often it is killed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR

from mithridate.core import compiling
from mithridate.core.batch import Batch
from mithridate.core.errors import CheckpointError, ConfigError, WriteError
from mithridate.core.modes import Precision, passes_in
from mithridate.core.past import Snapshot, Weights
from mithridate.data.stream import Part, Stream, StreamSettings, open_stream
from mithridate.maths.norms import Norm
from mithridate.models import build_model
from mithridate.testing import toy_stream
from mithridate.training.burn_in import BurnIn, BurnInResult, Schedule, burn_in, burn_in_key
from mithridate.training.checkpoint import load_snapshot
from mithridate.training.history import History
from mithridate.training.learner import Learner, Update
from mithridate.training.rollback import put_weights
from tests.command import started
from tests.recipes import TINY

CONFIG = {"name": "small_cnn", "width": 4}
HOW = BurnIn(epochs=3, batch_size=40, lr=0.05, checkpoints=(0, 2))
CONSTANT = replace(HOW, schedule="constant")


@pytest.fixture(scope="module")
def stream() -> Stream:
    whole = toy_stream(0)
    return replace(whole, burn_in=Part("burn_in", whole.burn_in.x[:120], whole.burn_in.y[:120]))


def model_of(stream: Stream, seed: int = 0, config: Mapping[str, Any] = CONFIG) -> nn.Module:
    return build_model(config, stream.info, seed=seed)


def train(
    stream: Stream,
    cache: Path | None,
    how: BurnIn = HOW,
    *,
    seed: int = 0,
    config: Mapping[str, Any] = CONFIG,
    epochs: list[int] | None = None,
    kill_after: int | None = None,
) -> BurnInResult:
    def on_epoch(done: int, of: int) -> None:
        assert of == how.epochs
        if epochs is not None:
            epochs.append(done)
        if done == kill_after:
            raise KeyboardInterrupt

    model = model_of(stream, seed, config)
    return burn_in(model, stream, how, seed=seed, model_config=config, cache=cache, on_epoch=on_epoch)


def tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    state = {f"{i}.{k}": v for i, values in snapshot.optimiser["state"].items() for k, v in values.items()}
    return {**snapshot.parameters, **snapshot.buffers, **state, "step": torch.tensor(snapshot.step)}


def differing(a: Snapshot, b: Snapshot) -> list[str]:
    one, two = tensors(a), tensors(b)
    return sorted(one.keys() ^ two.keys()) + [k for k in one.keys() & two.keys() if not torch.equal(one[k], two[k])]


def file_of(result: BurnInResult, epoch: int = 3) -> Path:
    """A kept snapshot's file; the last one's stands beside those of older ones."""
    path = next(iter(result.epochs.values()))
    assert isinstance(path, Path)
    return path.with_name(f"epoch-{epoch:04d}.safetensors")


@pytest.fixture(scope="module")
def unkilled(stream: Stream, tmp_path_factory: pytest.TempPathFactory) -> BurnInResult:
    return train(stream, tmp_path_factory.mktemp("unkilled"))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_it_learns(schedule: Schedule) -> None:
    """Four classes: chance is a quarter."""
    accuracies = []
    for seed in range(5):
        stream = toy_stream(seed)
        model = model_of(stream, seed, {"name": "small_cnn", "width": 8})
        how = BurnIn(epochs=4, batch_size=20, lr=0.05, schedule=schedule)
        assert burn_in(model, stream, how, seed=seed).final.step == 4 * 12
        accuracies.append(Learner(model, SGD(model.parameters(), lr=0.05)).evaluate([stream.test.all()]).accuracy)
    assert median(accuracies) > 0.8


TORCHS: dict[Schedule, Callable[[SGD, int], LRScheduler]] = {
    "constant": lambda optimiser, steps: ConstantLR(optimiser, factor=1.0),
    "linear": lambda optimiser, steps: LinearLR(optimiser, start_factor=1.0, end_factor=0.0, total_iters=steps),
    "cosine": lambda optimiser, steps: CosineAnnealingLR(optimiser, T_max=steps),
    "steps": lambda optimiser, steps: MultiStepLR(optimiser, [steps // 3, steps * 2 // 3, 9 * steps], gamma=0.2),
}
STEPS: dict[str, Any] = {"lower_after": (1, 2, 9), "lower_by": 0.2}


@pytest.mark.parametrize("schedule", TORCHS)
@pytest.mark.parametrize(("images", "steps"), [(120, 3), (110, 3), (81, 2)])  # the last image of 81 is left out
def test_rates_are_those_of_torchs_schedules_step_by_step(
    stream: Stream, schedule: Schedule, images: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, rates = Learner.update, list[float]()

    def spy(self: Learner, batch: Batch) -> Update:
        rates.append(self.optimiser.param_groups[0]["lr"])
        return update(self, batch)

    monkeypatch.setattr(Learner, "update", spy)
    part = stream.burn_in
    shorter = replace(stream, burn_in=Part("burn_in", part.x[:images], part.y[:images]))
    how = BurnIn(epochs=3, batch_size=40, lr=0.05, schedule=schedule, **(STEPS if schedule == "steps" else {}))
    final = train(shorter, None, how).final
    optimiser = SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    theirs, expected = TORCHS[schedule](optimiser, 3 * steps), list[float]()
    for _ in range(3 * steps):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        theirs.step()
    assert rates == pytest.approx(expected, rel=1e-12)
    assert final.optimiser["param_groups"][0]["lr"] == 0.05  # who goes on with this optimiser begins anew


def test_the_second_call_trains_nothing(stream: Stream, tmp_path: Path) -> None:
    first, second = list[int](), list[int]()
    a = train(stream, tmp_path, epochs=first)
    b = train(stream, tmp_path, epochs=second)
    assert (first, second) == ([1, 2, 3], [])
    assert (a.reused, b.reused) == (False, True)
    assert a.key == b.key
    assert a.key
    assert a.seconds == b.seconds > 0  # of the training, whenever that was
    assert a.epochs == b.epochs
    assert differing(a.final, b.final) == []


def test_a_cache_is_not_asked_without_what_the_model_was_built_from(stream: Stream, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`model_config` does not say it"):
        burn_in(model_of(stream), stream, HOW, seed=0, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_model_itself_ends_up_burned_in(stream: Stream, tmp_path: Path, unkilled: BurnInResult) -> None:
    for _ in range(2):  # trained, then fetched
        model = model_of(stream)
        burn_in(model, stream, HOW, seed=0, model_config=CONFIG, cache=tmp_path)
        held = dict(model.named_parameters()) | dict(model.named_buffers())
        wanted = {**unkilled.final.parameters, **unkilled.final.buffers}
        assert [k for k in wanted if not torch.equal(held[k], wanted[k])] == []


def test_without_a_cache_the_bits_are_the_same(stream: Stream, unkilled: BurnInResult) -> None:
    bare = train(stream, None)
    assert (bare.key, bare.epochs, bare.reused) == ("", {}, False)
    assert differing(bare.final, unkilled.final) == []


@pytest.mark.parametrize("kills", [(1,), (2,), (3,), (1, 2)], ids=str)
def test_killed_and_resumed_equals_unkilled(
    stream: Stream, tmp_path: Path, unkilled: BurnInResult, kills: Sequence[int]
) -> None:
    done: list[int] = []
    for epoch in kills:
        with pytest.raises(KeyboardInterrupt):
            train(stream, tmp_path, epochs=done, kill_after=epoch)
    resumed = train(stream, tmp_path, epochs=done)
    assert done == [1, 2, 3]  # no epoch was trained twice
    assert resumed.key == unkilled.key
    assert differing(resumed.final, unkilled.final) == []
    for epoch in (0, 2, 3):
        again, once = (load_snapshot(file_of(result, epoch))[0] for result in (resumed, unkilled))
        assert differing(again, once) == []


def test_killed_within_an_epoch_it_goes_on_from_the_last_whole_one(
    stream: Stream, tmp_path: Path, unkilled: BurnInResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, made = Learner.update, 0

    def failing(self: Learner, batch: Any) -> Any:
        nonlocal made
        made += 1
        if made == 5:
            raise KeyboardInterrupt
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", failing)
        with pytest.raises(KeyboardInterrupt):
            train(stream, tmp_path)
    done: list[int] = []
    resumed = train(stream, tmp_path, epochs=done)
    assert done == [2, 3]
    assert differing(resumed.final, unkilled.final) == []


def test_only_the_epochs_that_were_asked_for_are_kept(unkilled: BurnInResult) -> None:
    """The last is no older model: whoever looked back at it would compare the model with itself."""
    assert list(unkilled.epochs) == [0, 2]
    files = {*unkilled.epochs.values(), file_of(unkilled)}
    assert {p for p in file_of(unkilled).parent.iterdir() if p.suffix == ".safetensors"} == files


def test_zero_epochs_leave_the_model_as_initialised(stream: Stream, tmp_path: Path) -> None:
    how = BurnIn(epochs=0)
    for cache in (None, tmp_path, tmp_path):
        result = train(stream, cache, how)
        initial = dict(model_of(stream).named_parameters())
        assert [k for k in initial if not torch.equal(initial[k], result.final.parameters[k])] == []
    assert result.reused


CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"how": replace(HOW, lr=0.04)},
    "schedule": {"how": CONSTANT},
    "length": {"how": replace(HOW, epochs=4)},
    "steps": {"how": replace(HOW, schedule="steps", lower_after=(1,))},
    "steps by": {"how": replace(HOW, schedule="steps", lower_after=(1,), lower_by=0.5)},
    "clipping": {"how": replace(HOW, clip_norm=0.1)},
    "another norm": {"how": replace(HOW, clip_norm=0.01, norm="linf")},
    "momentum": {"how": replace(HOW, momentum=0.8)},
    "weight decay": {"how": replace(HOW, weight_decay=0.0)},
    "batch size": {"how": replace(HOW, batch_size=60)},
    "precision": {"how": replace(HOW, precision="bfloat16")},
    "seed": {"seed": 1},
    "width": {"config": {**CONFIG, "width": 2}},
    "norm": {"config": {**CONFIG, "norm": "none"}},
}


@pytest.mark.parametrize("what", [*CHANGES, "data", "augmentation"])
def test_whatever_changes_the_result_changes_the_key(
    stream: Stream, tmp_path: Path, unkilled: BurnInResult, what: str
) -> None:
    other = stream
    if what == "data":
        other = toy_stream(1)
    if what == "augmentation":
        other = replace(stream, settings=replace(stream.settings, augment=True))
    done: list[int] = []
    result = train(other, tmp_path, **{"epochs": done, **CHANGES.get(what, {})})
    assert result.key != unkilled.key
    assert done != []
    assert differing(result.final, unkilled.final) != []


def test_at_a_constant_rate_burn_ins_of_other_lengths_share_their_epochs(stream: Stream, tmp_path: Path) -> None:
    apart = {n: train(stream, None, replace(CONSTANT, epochs=n, checkpoints=())).final for n in (0, 2, 3)}
    done: list[int] = []
    short = train(stream, tmp_path, replace(CONSTANT, epochs=2, checkpoints=()), epochs=done)
    assert done == [1, 2]
    longer = train(stream, tmp_path, replace(CONSTANT, checkpoints=(1,)), epochs=done)
    assert done == [1, 2, 1, 2, 3]  # epoch 1 was not kept
    whole = train(stream, tmp_path, CONSTANT, epochs=done)
    assert short.key == longer.key == whole.key
    for epoch in (0, 2, 3):
        assert differing(load_snapshot(file_of(whole, epoch))[0], apart[epoch]) == []
    assert differing(longer.final, apart[3]) == []
    again = train(stream, tmp_path, replace(CONSTANT, epochs=2, checkpoints=(1,)), epochs=done)
    assert again.reused
    assert differing(again.final, apart[2]) == []
    assert again.seconds < whole.seconds


def test_at_a_constant_rate_a_longer_burn_in_goes_on_where_a_shorter_one_ended(stream: Stream, tmp_path: Path) -> None:
    done: list[int] = []
    train(stream, tmp_path, replace(CONSTANT, epochs=2, checkpoints=()), epochs=done)
    train(stream, tmp_path, replace(CONSTANT, epochs=3, checkpoints=(2,)), epochs=done)
    assert done == [1, 2, 3]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_where_the_rate_depends_on_the_length_no_epoch_is_shared(
    stream: Stream, tmp_path: Path, schedule: Schedule
) -> None:
    how = replace(HOW, schedule=schedule)
    whole = train(stream, tmp_path, how)
    done: list[int] = []
    short = train(stream, tmp_path, replace(how, epochs=2, checkpoints=()), epochs=done)
    assert done == [1, 2]
    assert short.key != whole.key
    assert differing(short.final, load_snapshot(file_of(whole, 2))[0]) != []


def test_runs_that_name_a_seed_share_one_burn_in(stream: Stream, tmp_path: Path) -> None:
    how = replace(HOW, seed=5)
    model = model_of(stream, 5)
    first = burn_in(model, stream, how, seed=0, model_config=CONFIG, cache=tmp_path)
    second = burn_in(model_of(stream, 5), stream, how, seed=1, model_config=CONFIG, cache=tmp_path)
    assert second.reused
    assert differing(first.final, second.final) == []


def test_an_augmented_burn_in_repeats(stream: Stream) -> None:
    shifted = replace(stream, settings=replace(stream.settings, augment=True))
    a, b = train(shifted, None), train(shifted, None)
    assert differing(a.final, b.final) == []


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, seen = Learner.update, list[Tensor]()

    def spy(self: Learner, batch: Batch) -> Update:
        seen.append(batch.x)
        return update(self, batch)

    monkeypatch.setattr(Learner, "update", spy)
    for seed in (0, 1):
        train(stream, None, replace(HOW, epochs=2, checkpoints=()), seed=seed)
    orders = [torch.cat(seen[i : i + 3]).flatten(1) for i in range(0, 12, 3)]
    stored = stream.burn_in.all().x.flatten(1)
    for i, order in enumerate(orders):
        assert sorted(order.tolist()) == sorted(stored.tolist())
        assert not torch.equal(order, stored)
        assert not any(torch.equal(order, other) for other in orders[:i])


def test_a_lone_last_sample_is_left_out(stream: Stream) -> None:
    part = stream.burn_in
    lone = replace(stream, burn_in=Part("burn_in", part.x[:41], part.y[:41]))
    assert train(lone, None, replace(HOW, epochs=1, checkpoints=())).final.step == 1
    pair = replace(stream, burn_in=Part("burn_in", part.x[:42], part.y[:42]))
    assert train(pair, None, replace(HOW, epochs=1, checkpoints=())).final.step == 2


def test_a_finished_checkpoint_is_taken_instead_of_training(
    stream: Stream, tmp_path: Path, unkilled: BurnInResult
) -> None:
    how = BurnIn(epochs=3, checkpoint=str(file_of(unkilled)))
    done: list[int] = []
    result = train(stream, tmp_path / "cache", how, seed=1, epochs=done)
    assert done == []
    assert not (tmp_path / "cache").exists()
    assert (result.key, result.final.step) == ("", 0)
    for name, p in unkilled.final.parameters.items():
        assert torch.equal(result.final.parameters[name], p)
    for name, b in unkilled.final.buffers.items():
        assert torch.equal(result.final.buffers[name], b)


def test_a_checkpoint_of_another_model_is_refused(stream: Stream, unkilled: BurnInResult) -> None:
    with pytest.raises(CheckpointError, match="does not fit the model"):
        train(stream, None, BurnIn(checkpoint=str(file_of(unkilled))), config={**CONFIG, "width": 8})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


def swap(path: Path) -> None:
    other = path.with_name("epoch-0002.safetensors")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "one bit": flip,
    "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "missing": Path.unlink,
    "of another epoch": swap,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_trained_again(stream: Stream, tmp_path: Path, unkilled: BurnInResult, damage: str) -> None:
    DAMAGES[damage](file_of(train(stream, tmp_path)))
    again = train(stream, tmp_path)
    assert not again.reused
    assert differing(again.final, unkilled.final) == []
    for epoch in (0, 2, 3):
        assert differing(load_snapshot(file_of(again, epoch))[0], load_snapshot(file_of(unkilled, epoch))[0]) == []
    assert train(stream, tmp_path).reused


def test_a_snapshot_of_another_burn_in_is_not_taken(stream: Stream, tmp_path: Path, unkilled: BurnInResult) -> None:
    ours, theirs = train(stream, tmp_path), train(stream, tmp_path, seed=1)
    file_of(ours).write_bytes(file_of(theirs).read_bytes())
    again = train(stream, tmp_path)
    assert not again.reused
    assert differing(again.final, unkilled.final) == []


def test_a_cache_that_can_only_be_read_serves(stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(stream, tmp_path)

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("mithridate.core.files.FileLock.acquire", read_only)
        patch.setattr("mithridate.core.files.tempfile.mkstemp", read_only)
        patch.setattr(Path, "mkdir", read_only)
        assert differing(train(stream, tmp_path).final, first.final) == []
        with pytest.raises(WriteError, match="cannot be written"):
            train(stream, tmp_path, seed=1)


def test_what_a_killed_writer_left_is_removed(stream: Stream, tmp_path: Path) -> None:
    folder = file_of(train(stream, tmp_path)).parent
    (folder / ".epoch-0003.safetensors.x.part").write_bytes(b"half")
    (folder / "epoch-0003.safetensors").unlink()
    train(stream, tmp_path)
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ""}  # the lock has no suffix


def test_it_says_where_it_was_trained(stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = train(stream, tmp_path).environments
    assert [e["cpu_capability"] for e in here] == [torch.backends.cpu.get_cpu_capability()]
    with pytest.raises(KeyboardInterrupt):
        train(stream, tmp_path, seed=1, kill_after=2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    assert train(stream, tmp_path).environments == here  # of the training, not of who asks
    both = train(stream, tmp_path, seed=1).environments
    assert [e["cpu_capability"] for e in both] == [here[0]["cpu_capability"], "OTHER"]


def test_older_states_of_a_finished_model_come_from_files(stream: Stream, unkilled: BurnInResult) -> None:
    older = {str(epoch): str(file_of(unkilled, epoch)) for epoch in (0, 2)}
    how = BurnIn(epochs=3, checkpoint=str(file_of(unkilled)), older=older)
    assert how.older_epochs == [0, 2]
    history = History(checkpoints=train(stream, None, how).epochs, length=how.epochs)
    kept = History(checkpoints=unkilled.epochs, length=3)
    for epoch in (0, 2):
        given, trained = history.checkpoint(epoch), kept.checkpoint(epoch)
        assert all(torch.equal(given.parameters[n], p) for n, p in trained.parameters.items())
        assert all(torch.equal(given.buffers[n], b) for n, b in trained.buffers.items())
    with pytest.raises(ConfigError, match="epoch 1, which is not kept"):
        history.checkpoint("half")


def test_an_older_state_that_is_the_model_itself_is_refused(stream: Stream, unkilled: BurnInResult) -> None:
    last = str(file_of(unkilled))
    with pytest.raises(ConfigError, match=r"older, epoch 2: .* holds the model of `checkpoint` itself"):
        train(stream, None, BurnIn(checkpoint=last, older={"2": last}))


def test_older_states_are_read_as_carefully_as_the_model(
    stream: Stream, unkilled: BurnInResult, tmp_path: Path
) -> None:
    last = str(file_of(unkilled))
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        train(stream, None, BurnIn(checkpoint=last, older={"2": str(tmp_path / "gone.safetensors")}))
    with pytest.raises(ConfigError, match="older"):
        BurnIn(checkpoint=last, older={"2.5": last})


def test_checkpoints_belong_to_a_training_and_older_files_to_a_finished_model() -> None:
    assert (
        BurnIn(checkpoint="model.pt", checkpoints=(20,)).older_epochs == []
    )  # none is kept: who looks back is refused
    with pytest.raises(ConfigError, match="no `checkpoint`"):
        BurnIn(older={"20": "model.pt"})
    with pytest.raises(ConfigError, match=r"older \[20\]: not before the end of 20 epochs"):
        BurnIn(epochs=20, checkpoint="model.pt", older={"10": "a.pt", "20": "b.pt"})


def test_the_last_epoch_is_no_older_model() -> None:
    assert BurnIn(epochs=40, checkpoints=(40, 20, 10)).older_epochs == [10, 20]
    assert BurnIn(epochs=0, checkpoints=(0,)).older_epochs == []


def test_checkpoints_after_the_end_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoints \[4, 9\] come after the last of 3 epochs"):
        BurnIn(epochs=3, checkpoints=(1, 4, 3, 9))


# Steps of the rate, clipping, and the curve.


def test_what_nothing_uses_is_not_in_the_key(stream: Stream) -> None:
    def key(how: BurnIn) -> str:
        return burn_in_key(stream, model_of(stream), CONFIG, how, seed=0, device=torch.device("cpu"))

    assert key(HOW) == key(replace(HOW, norm="linf")) == key(replace(HOW, lower_by=0.5))
    assert key(HOW) != key(replace(HOW, clip_norm=1.0)) != key(replace(HOW, clip_norm=1.0, norm="linf"))


def test_steps_and_their_epochs_belong_together() -> None:
    wrong: dict[str, Any]
    for wrong in ({"schedule": "steps"}, {"lower_after": (1,)}, {"schedule": "steps", "lower_after": ()}):
        with pytest.raises(ConfigError, match="belong together"):
            BurnIn(**wrong)


def test_before_its_first_step_a_rate_is_constant_and_epochs_are_shared(stream: Stream, tmp_path: Path) -> None:
    later = replace(CONSTANT, schedule="steps", lower_after=(3,))
    assert differing(train(stream, None, later).final, train(stream, None, CONSTANT).final) == []
    done: list[int] = []
    train(stream, tmp_path, later)
    longer = train(stream, tmp_path, replace(later, epochs=4), epochs=done)
    assert done == [4]
    assert differing(longer.final, train(stream, None, replace(CONSTANT, epochs=4)).final) != []


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_gradient_of_a_clipped_burn_in_is_bounded_and_a_wide_bound_changes_no_bit(
    stream: Stream, norm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, lengths = SGD.step, list[float]()

    def spy(self: SGD, closure: None = None) -> None:
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        lengths.append(float(torch.linalg.vector_norm(torch.cat(gradients), 2 if norm == "l2" else torch.inf)))
        step(self, closure)

    monkeypatch.setattr(SGD, "step", spy)
    plain = train(stream, None).final
    bound = median(lengths) / 2
    assert differing(train(stream, None, replace(HOW, clip_norm=2 * max(lengths), norm=norm)).final, plain) == []
    lengths.clear()
    assert differing(train(stream, None, replace(HOW, clip_norm=bound, norm=norm)).final, plain) != []
    assert max(lengths) <= bound * (1 + 1e-5)


@pytest.mark.parametrize("kill_after", [None, 2])
def test_a_measured_burn_in_has_the_same_bits_and_the_curve_of_its_models(
    stream: Stream, tmp_path: Path, unkilled: BurnInResult, kill_after: int | None
) -> None:
    how = replace(HOW, evaluate_every=1, checkpoints=(1, 2))
    if kill_after:
        with pytest.raises(KeyboardInterrupt):
            train(stream, tmp_path, how, kill_after=kill_after)
    trained, fetched = (train(stream, tmp_path, how) for _ in range(2))
    assert differing(trained.final, unkilled.final) == []
    assert fetched.reused
    assert list(trained.curve) == list(fetched.curve) == list(train(stream, None, how).curve)
    assert [point.epoch for point in trained.curve] == [1, 2, 3]
    for epoch, accuracy, loss in trained.curve:
        model = model_of(stream)
        learner = Learner(model, SGD(model.parameters(), lr=0.05))
        old = load_snapshot(file_of(trained, epoch))[0]
        put_weights(model, Weights(old.parameters, old.buffers))
        assert (accuracy, loss) == learner.evaluate(stream.test.batches(500))


def test_a_curve_has_a_point_every_so_many_epochs_and_none_if_nobody_asks(
    stream: Stream, unkilled: BurnInResult
) -> None:
    assert [p.epoch for p in train(stream, None, replace(HOW, evaluate_every=2)).curve] == [2]
    assert list(unkilled.curve) == []


# Precision, and compiling.


def test_what_came_later_left_the_keys_as_they_were(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU precision always counts: torch's own is another one there."""
    dumps, plans = json.dumps, list[Any]()

    def spy(plan: Any, **options: Any) -> str:
        plans.append(plan)
        return dumps(plan, **options)

    monkeypatch.setattr("mithridate.training.burn_in.json.dumps", spy)

    def key(device: str, how: BurnIn) -> str:
        return burn_in_key(stream, model_of(stream), CONFIG, how, seed=0, device=torch.device(device))

    cpu, cuda = (
        [key(device, replace(HOW, precision=precision)) for precision in ("float32", "tf32", "bfloat16")]
        for device in ("cpu", "cuda")
    )
    assert plans[0]["burn_in"].keys() == {"batch_size", "epochs", "lr", "momentum", "schedule", "weight_decay"}
    assert cpu[0] == cpu[1] != cpu[2]
    assert len({*cuda}) == 3
    assert key("cpu", replace(HOW, compile=True)) not in {*cpu, *cuda}


def test_only_the_passes_are_in_bfloat16(stream: Stream) -> None:
    model, passes, gradients = model_of(stream), set[torch.dtype](), set[torch.dtype]()
    model.register_forward_hook(lambda module, args, out: passes.add(out.dtype))
    for p in model.parameters():
        p.register_hook(lambda g: gradients.add(g.dtype))  # type: ignore[no-untyped-call]  # torch gives it no types
    final = burn_in(model, stream, replace(HOW, precision="bfloat16"), seed=0).final
    assert passes == {torch.bfloat16}
    assert gradients == {torch.float32}
    assert {t.dtype for t in tensors(final).values() if t.is_floating_point()} == {torch.float32}
    with pytest.raises(AssertionError):
        torch.testing.assert_close(final.parameters, train(stream, None).final.parameters)


def test_on_a_gpu_the_passes_of_a_burn_in_round_as_they_may(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags are torch's own, and can be set without a GPU: the learner is taken for one that is on it."""
    allowed: list[bool] = []
    update = Learner.update

    def spy(self: Learner, batch: Any) -> Update:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return update(self, batch)

    monkeypatch.setattr(Learner, "update", spy)
    monkeypatch.setattr(
        "mithridate.training.burn_in.passes_in", lambda precision, _: passes_in(precision, torch.device("cuda"))
    )
    precision: Precision
    for precision in ("float32", "tf32"):
        train(stream, None, BurnIn(epochs=1, batch_size=120, precision=precision))
    assert allowed == [False, True]


@pytest.mark.slow
def test_a_burn_in_in_bfloat16_comes_as_far() -> None:
    """Ten times as slow on a processor without it."""
    accuracies: dict[Precision, list[float]] = {"float32": [], "bfloat16": []}
    for seed in range(5):
        stream = open_stream(StreamSettings(name="digits", seed=seed))
        for precision, found in accuracies.items():
            model = model_of(stream, seed, {"name": "small_cnn", "width": 8})
            burn_in(model, stream, BurnIn(epochs=4, batch_size=50, lr=0.05, precision=precision), seed=seed)
            learner = Learner(model, SGD(model.parameters(), lr=0.05))
            found.append(learner.evaluate(stream.test.batches(500)).accuracy)
    assert abs(median(accuracies["bfloat16"]) - median(accuracies["float32"])) < 0.015


def resumed(stream: Stream, how: BurnIn, tmp_path: Path) -> tuple[BurnInResult, BurnInResult]:
    """A burn-in that was killed and resumed, and the same one that was not."""
    with pytest.raises(KeyboardInterrupt):
        train(stream, tmp_path / "killed", how, kill_after=1)
    done: list[int] = []
    again = train(stream, tmp_path / "killed", how, epochs=done)
    assert done == [2, 3]
    return again, train(stream, tmp_path / "whole", how)


def test_a_burn_in_in_bfloat16_is_resumed_with_the_same_bits(stream: Stream, tmp_path: Path) -> None:
    again, whole = resumed(stream, replace(HOW, precision="bfloat16"), tmp_path)
    assert differing(again.final, whole.final) == []


def test_steps_of_a_compiled_burn_in_are_compiled_once_and_nothing_else_is(
    stream: Stream, tmp_path: Path, unkilled: BurnInResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a compiler that leaves things as they are, so that it has the bits of the other, and all its names."""
    graphs = 0

    def backend(graph: Any, examples: object) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    again, whole = resumed(stream, replace(HOW, compile=True, evaluate_every=1), tmp_path)
    assert graphs == 1  # three burn-ins, whose batches are of one size; those that measure are of another
    for final in (again.final, whole.final):
        assert differing(final, unkilled.final) == []
        assert list(final.parameters) == list(unkilled.final.parameters)
    model = model_of(stream)
    burn_in(model, stream, replace(HOW, compile=True), seed=0)
    assert model._compiled_call_impl is None
    assert graphs == 1


def test_a_burn_in_that_cannot_be_compiled_says_so(
    stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: Any, examples: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(compiling, "BACKEND", backend)
    with pytest.raises(ConfigError, match=r"^\[burn_in\] compile = true: .*no compiler"):
        train(stream, tmp_path, replace(HOW, compile=True, checkpoints=()))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where it loads its compiler
def test_compiled_for_real_it_has_the_same_weights(
    stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))
    again, whole = resumed(stream, replace(HOW, compile=True), tmp_path)
    assert differing(again.final, whole.final) == []
    one = replace(HOW, epochs=1, checkpoints=())
    plain, fast = (train(stream, None, replace(one, compile=flag)).final for flag in (False, True))
    torch.testing.assert_close(fast.parameters, plain.parameters, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast.buffers, plain.buffers, rtol=1e-4, atol=1e-5)
    assert differing(fast, plain) != []  # another order of sums: it was compiled


@pytest.mark.slow
def test_a_machine_without_a_compiler_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(TINY, encoding="utf-8")
    env = {"CXX": str(tmp_path / "nowhere"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch")}
    command = ["run", "r.toml", "--out", "out", "--cache", "cache", "--set", "burn_in.compile=true"]
    done = started(*command, folder=tmp_path, env=env)
    assert done.returncode == 1  # as of any run that failed
    assert "Traceback" not in done.stderr
    assert "compile = true: torch cannot compile here" in " ".join(done.stderr.split())
