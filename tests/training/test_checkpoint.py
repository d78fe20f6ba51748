"""Checkpoints: what is written comes back, foreign weights fit or are refused by name, and no file may run code."""

import argparse
import io
import json
import math
import os
import pickle
import random
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from mithridate.core.batch import Batch
from mithridate.core.errors import CheckpointError
from mithridate.models import build_model
from mithridate.testing.toy import CLASSES, TOY
from mithridate.training.checkpoint import load_snapshot, load_weights, save_snapshot
from mithridate.training.learner import Learner


def small_model(seed: int = 0, width: int = 4) -> nn.Module:
    return build_model({"name": "small_cnn", "width": width}, TOY, seed=seed)


def learner_of(optimiser: str, seed: int = 0) -> Learner:
    model = small_model(seed)
    if optimiser == "adamw":
        return Learner(model, AdamW(model.parameters(), lr=0.01, amsgrad=True))
    return Learner(model, SGD(model.parameters(), lr=0.05, momentum=0.9 if optimiser == "momentum" else 0))


def learn(learner: Learner, seeds: range) -> dict[str, Tensor]:
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        learner.update(Batch(torch.rand(8, *TOY.shape, generator=rng), torch.randint(CLASSES, (8,), generator=rng)))
    after = learner.snapshot()
    return {**after.parameters, **after.buffers, "step": torch.tensor(after.step)}


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    return sorted(a.keys() ^ b.keys()) + [
        k for k in a.keys() & b.keys() if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])
    ]


# Our own.


@pytest.mark.parametrize("optimiser", ["plain", "momentum", "adamw"])
@pytest.mark.parametrize("made", [0, 3])
def test_a_learner_goes_on_from_a_file_as_if_nothing_had_happened(tmp_path: Path, optimiser: str, made: int) -> None:
    learner = learner_of(optimiser)
    learn(learner, range(made))
    path = tmp_path / "deep" / "state.safetensors"
    save_snapshot(path, learner.snapshot())
    read, extra, note = load_snapshot(path)
    assert read.step == made
    assert (extra, note) == ({}, None)
    again = learner_of(optimiser, seed=1)
    again.restore(read)
    assert differing(learn(again, range(10, 13)), learn(learner, range(10, 13))) == []


def test_extra_tensors_and_a_note_come_back(tmp_path: Path) -> None:
    extra = {"attack.positions.4": torch.tensor([3, 1, 2, 0]), "flag": torch.tensor([True]), "empty": torch.zeros(0, 2)}
    extra["strided"] = torch.arange(6.0).view(2, 3).T
    note = {"rows": [{"step": 1, "loss": 0.1 + 0.2, "verdict": 'ü "', "none": None}]}
    path = tmp_path / "a.safetensors"
    save_snapshot(path, learner_of("momentum").snapshot(), extra=extra, note=note)
    _, found, read = load_snapshot(path)
    assert differing(found, extra) == []
    assert read == note


def test_a_diverged_state_comes_back(tmp_path: Path) -> None:
    learner = learner_of("plain")
    with torch.no_grad():
        next(iter(learner.model.parameters())).fill_(math.nan)
    save_snapshot(tmp_path / "a.safetensors", learner.snapshot(), note=[math.nan, math.inf])
    read, _, note = load_snapshot(tmp_path / "a.safetensors")
    assert next(iter(read.parameters.values())).isnan().all()
    assert math.isnan(note[0])
    assert note[1] == math.inf


def header(path: Path, text: str) -> Path:
    safetensors.torch.save_file({"parameter.a": torch.zeros(1)}, path, metadata={"mithridate": text})
    return path


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"format": "mithridate-snapshot-99"}', '{"format": "mithridate-snapshot-1"}']
)
def test_a_foreign_header_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_snapshot(header(tmp_path / "a.safetensors", text))


def test_a_snapshot_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_snapshot(path, learner_of("momentum").snapshot())
    whole = path.read_bytes()
    model = small_model(2)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            load_snapshot(path)
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            load_weights(path, model)
    assert differing(model.state_dict(), before) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("none.safetensors", "none.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_weights(tmp_path / name, small_model())
        with pytest.raises(CheckpointError, match=name):
            load_snapshot(tmp_path / name)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.pt"):
        load_weights(tmp_path / "folder.pt", small_model())


# Weights from elsewhere.

WEIGHTS = {name: t.clone() for name, t in small_model(7).state_dict().items()}


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in WEIGHTS.items()}


PAPERS = {"epoch": 3, "args": argparse.Namespace(lr=0.1, net="resnet"), "acc": 81.2, "net": prefixed("module.")}


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        PAPERS,
        {"model": WEIGHTS},
        {"state_dict": prefixed("module.")},
        prefixed("net."),
        {"net": prefixed("1.")},
    ],
    ids=["bare", "papers", "model", "state_dict", "wrapped", "sequential"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pt_files_fill_a_model(tmp_path: Path, content: Any, zipped: bool) -> None:
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    model = small_model()
    assert differing(model.state_dict(), WEIGHTS) != []
    load_weights(tmp_path / "a.pt", model)
    assert differing(model.state_dict(), WEIGHTS) == []


@pytest.mark.parametrize("prefix", ["", "module.", "net.", "module.net."])
def test_safetensors_fill_a_model(tmp_path: Path, prefix: str) -> None:
    safetensors.torch.save_file(prefixed(prefix), tmp_path / "a.safetensors")
    model = small_model()
    load_weights(tmp_path / "a.safetensors", model)
    assert differing(model.state_dict(), WEIGHTS) == []


def test_our_own_snapshots_fill_a_model(tmp_path: Path) -> None:
    learner = learner_of("momentum", seed=7)
    learn(learner, range(2))
    save_snapshot(tmp_path / "a.safetensors", learner.snapshot(), extra={"x": torch.zeros(1)})
    model = small_model()
    load_weights(tmp_path / "a.safetensors", model)
    assert differing(model.state_dict(), learner.model.state_dict()) == []


def test_weights_that_do_not_fit_are_named_and_change_nothing(tmp_path: Path) -> None:
    without = {name: t for name, t in WEIGHTS.items() if name != "fc2.bias"}
    wrong_classes = {**WEIGHTS, "fc2.weight": torch.zeros(CLASSES + 1, 16), "fc2.bias": torch.zeros(CLASSES + 1)}
    cases: list[tuple[dict[str, Tensor], str]] = [
        (small_model(7, width=8).state_dict(), r"of another shape \['convolutions.0.weight'"),
        (wrong_classes, r"2 of another shape \['fc2.bias', 'fc2.weight'\]"),
        (without, r"1 tensors missing \['fc2.bias'\]"),
        ({**WEIGHTS, "head.weight": torch.zeros(1)}, r"1 unexpected \['head.weight'\]"),
        ({"elsewhere": torch.zeros(1)}, r"unexpected \['elsewhere'\]"),
    ]
    model = small_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for content, message in cases:
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=message) as caught:
            load_weights(tmp_path / "a.pt", model)
        assert "a.pt" in str(caught.value)
        assert "set [model]" in str(caught.value)
    assert differing(model.state_dict(), before) == []


@pytest.mark.parametrize("content", [[1, 2], "text", None, {"net": {"a": 1}}, {"a": WEIGHTS}], ids=repr)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_weights(tmp_path / "a.pt", small_model())


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["plain pickle", "torch", "legacy", "among weights"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, how: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    content: Any = {"net": {**WEIGHTS, "x": Bomb(marker)}} if how == "among weights" else Bomb(marker)
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    model = small_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"a\.pt .*be read safely"):
        load_weights(path, model)
    assert not marker.exists()
    assert differing(model.state_dict(), before) == []
    torch.load(path, weights_only=False) if how != "plain pickle" else pickle.loads(path.read_bytes())  # noqa: S301  (its own pickle, to show what would happen)
    assert marker.exists()  # so the bomb was live


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_damaged_pt_files_are_refused_or_harmless(tmp_path: Path, zipped: bool) -> None:
    memory = io.BytesIO()
    torch.save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, memory, _use_new_zipfile_serialization=zipped)
    whole = memory.getvalue()
    rng = random.Random(0)  # noqa: S311  (no secret)
    damaged = [whole[:end] for end in range(0, len(whole), 29)]
    for _ in range(100):
        changed = bytearray(whole)
        for _ in range(rng.choice([1, 3, 10])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        damaged.append(bytes(changed))
    refused = 0
    for data in damaged:
        (tmp_path / "a.pt").write_bytes(data)
        try:
            load_weights(tmp_path / "a.pt", nn.Linear(3, 2))
        except CheckpointError:
            refused += 1
    assert refused >= len(whole) // 29  # all that were cut off


def test_a_note_that_json_cannot_hold_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_snapshot(tmp_path / "a.safetensors", learner_of("plain").snapshot(), note={1, 2})
    assert list(tmp_path.iterdir()) == []


def test_the_header_is_json_and_tensors_are_named_by_what_they_are(tmp_path: Path) -> None:
    learner = learner_of("momentum")
    learn(learner, range(1))
    save_snapshot(tmp_path / "a.safetensors", learner.snapshot(), note="n")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as handle:
        held = json.loads(handle.metadata()["mithridate"])
        kinds = {name.partition(".")[0] for name in handle.keys()}  # noqa: SIM118  (a safetensors handle is no mapping)
    assert held["step"] == 1
    assert held["note"] == "n"
    assert kinds == {"parameter", "buffer", "optimiser"}


# Wrapped, tied, and other people's.


class Tied(nn.Module):
    """An embedding that is its own answer layer, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(x).mean(1))
        return out


class Named(nn.Module):
    """Its children are really called what wrappers are called."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.weight = nn.Linear(3, 2), nn.Parameter(torch.zeros(2))
        self._module = nn.Linear(2, 2)


class Nested(nn.Module):
    """So that taking a wrapper's name off makes another parameter's name."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential()
        self.module.add_module("module", nn.Linear(3, 2))
        self.module.register_parameter("weight", nn.Parameter(torch.zeros(4)))


class Wrapper(nn.Module):
    """Puts its name before the names of what it wraps."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


def wrapped(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name in reversed(names):
        model = Wrapper(name, model)
    return model


def filled(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    model = make()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": small_model,
    "tied": Tied,
    "named": Named,
    "nested": Nested,
}


@pytest.mark.parametrize(
    "names", [(), *permutations(["module", "_module", "_orig_mod"]), ("module", "module")], ids=str
)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", ["checkpoint", "model", "both"])
def test_wrappers_in_any_order_are_taken_off(name: str, names: tuple[str, ...], which: str, tmp_path: Path) -> None:
    source, target = filled(MODELS[name], 1), filled(MODELS[name], 2)
    saved = wrapped(source, names) if which != "model" else source
    torch.save(saved.state_dict(), tmp_path / "a.pt")
    load_weights(tmp_path / "a.pt", wrapped(target, names) if which != "checkpoint" else target)
    assert differing(target.state_dict(), source.state_dict()) == []


def test_an_averaged_model_fills_the_model_that_it_averages(tmp_path: Path) -> None:
    source, target = filled(small_model, 1), filled(small_model, 2)
    averaged = torch.optim.swa_utils.AveragedModel(Wrapper("module", source))
    averaged.update_parameters(Wrapper("module", source))
    torch.save({"model_state_dict": averaged.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    load_weights(tmp_path / "a.pt", target)
    assert differing(target.state_dict(), source.state_dict()) == []


def test_a_part_that_was_wrapped_by_itself_is_found(tmp_path: Path) -> None:
    source, target = filled(small_model, 1), filled(small_model, 2)
    state = {name.replace("convolutions.", "convolutions._orig_mod."): t for name, t in source.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    load_weights(tmp_path / "a.pt", target)
    assert differing(target.state_dict(), source.state_dict()) == []


@pytest.mark.parametrize("missing", ["embedding.weight", "head.weight"])
def test_a_tied_parameter_may_come_under_one_name(missing: str, tmp_path: Path) -> None:
    """As safetensors saves it, and as our own snapshots do."""
    source, target = filled(Tied, 1), filled(Tied, 2)
    assert isinstance(target, Tied)
    state = {name: t for name, t in source.state_dict().items() if name != missing}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    load_weights(tmp_path / "a.safetensors", target)
    assert differing(target.state_dict(), source.state_dict()) == []
    assert target.head.weight is target.embedding.weight


def test_a_learner_with_tied_weights_goes_on_from_a_file(tmp_path: Path) -> None:
    def fresh() -> Learner:
        model = filled(Tied, 1)
        return Learner(model, AdamW(model.parameters(), lr=0.1))

    def learn_tokens(learner: Learner, seeds: range) -> None:
        for seed in seeds:
            rng = torch.Generator().manual_seed(seed)
            learner.update(Batch(torch.randint(5, (8, 4), generator=rng), torch.randint(5, (8,), generator=rng)))

    learner, again = fresh(), fresh()
    learn_tokens(learner, range(3))
    save_snapshot(tmp_path / "a.safetensors", learner.snapshot())
    again.restore(load_snapshot(tmp_path / "a.safetensors")[0])
    model = filled(Tied, 2)
    load_weights(tmp_path / "a.safetensors", model)
    assert differing(model.state_dict(), learner.model.state_dict()) == []
    for one in (learner, again):
        learn_tokens(one, range(3, 6))
    assert differing(again.model.state_dict(), learner.model.state_dict()) == []


@pytest.mark.parametrize(
    "key", ["net", "model", "state_dict", "model_state_dict", "model_state", "network", "module", "weights", "params"]
)
def test_a_state_dict_may_lie_under_any_usual_key(key: str, tmp_path: Path) -> None:
    optimiser = SGD(small_model().parameters(), lr=0.1).state_dict()
    torch.save({key: WEIGHTS, "optimizer_state_dict": optimiser, "epoch": 3}, tmp_path / "a.pt")
    torch.save({"state_dict": {key: prefixed("module.")}, "params": {"lr": 0.1}}, tmp_path / "b.pt")
    for file in ("a.pt", "b.pt"):
        model = small_model()
        load_weights(tmp_path / file, model)
        assert differing(model.state_dict(), WEIGHTS) == []


def test_several_state_dicts_are_not_chosen_from(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "state_dict": small_model(8).state_dict()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"several state dicts \(model, state_dict\)"):
        load_weights(tmp_path / "a.pt", small_model())


def spoiled(name: str, value: Any) -> dict[str, Tensor]:
    state = {key: t.clone() for key, t in WEIGHTS.items()}
    if isinstance(value, torch.dtype):
        state[name] = state[name].to(value)
    else:
        state[name].view(-1)[0] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (spoiled("fc2.weight", math.nan), r"'fc2.weight' holds 1 of \d+ values that are NaN or infinite"),
        (spoiled("fc2.bias", -math.inf), "'fc2.bias' holds 1 of 4 values"),
        (spoiled("fc2.weight", torch.int8), r"'fc2.weight' is torch\.int8"),
        (spoiled("fc2.weight", torch.complex64), r"'fc2.weight' is torch\.complex64"),
    ],
    ids=["nan", "infinite", "quantised", "complex"],
)
def test_weights_that_no_training_gives_are_refused(state: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a.pt")
    model = small_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path / "a.pt", model)
    assert differing(model.state_dict(), before) == []


def test_ties_that_a_checkpoint_does_not_keep_are_told(tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in filled(Tied, 1).state_dict().items()}
    state["head.weight"][0, 0] += 1
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"'embedding\.weight' and 'head\.weight' are one parameter in the model"):
        load_weights(tmp_path / "a.pt", filled(Tied, 2))


def test_what_is_meant_to_be_infinite_may_be(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    source, target = filled(Masked, 1), filled(Masked, 2)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    load_weights(tmp_path / "a.pt", target)
    assert differing(target.state_dict(), source.state_dict()) == []


def test_a_checkpoint_in_half_precision_fills_a_model_in_single(tmp_path: Path) -> None:
    torch.save({name: t.half() if t.is_floating_point() else t for name, t in WEIGHTS.items()}, tmp_path / "a.pt")
    model = small_model()
    load_weights(tmp_path / "a.pt", model)
    assert torch.equal(model.state_dict()["fc2.weight"], WEIGHTS["fc2.weight"].half().float())
