"""What every component must pass, of whatever kind."""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping, Sequence

import tomli_w

from mithridate.core.descriptions import described_fields
from mithridate.core.errors import ConfigError
from mithridate.core.registry import Kind, fields_of
from mithridate.testing.checks import aggregator, attack, defence, detector, model, monitor, update_attack
from mithridate.testing.checks.evidence import Evidence
from mithridate.testing.checks.subject import BASES, Check, entry_of, made

EXERCISED: Mapping[Kind, Callable[[type], Evidence]] = {
    "aggregator": aggregator.exercised,
    "attack": attack.exercised,
    "defence": defence.exercised,
    "detector": detector.exercised,
    "model": model.exercised,
    "monitor": monitor.exercised,
    "update_attack": update_attack.exercised,
}


def _evidence(cls: type) -> Evidence:
    return EXERCISED[entry_of(cls).kind](cls)


def check_defaults(cls: type) -> None:
    """It derives from its kind's base, can be made without arguments, is frozen, and its fields are keyword-only."""
    base = BASES.get(entry_of(cls).kind, object)
    assert issubclass(cls, base), f"{cls.__name__} does not derive from {base.__name__}"
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} is no dataclass: decorate it with `settings`"
    try:
        component = cls()
    except Exception as error:
        raise AssertionError(f"{cls.__name__} cannot be made without arguments: {error}") from error
    for field in dataclasses.fields(cls):
        assert field.kw_only, f"{cls.__name__}.{field.name} is not keyword-only"
        try:
            setattr(component, field.name, getattr(component, field.name))
        except (dataclasses.FrozenInstanceError, AttributeError):
            continue
        raise AssertionError(f"{cls.__name__} is not frozen")


def check_round_trip(cls: type) -> None:
    """The table that a recipe would hold builds an equal object, by default and in every preset."""
    for preset, values in {"": {}, **entry_of(cls).presets}.items():
        component = made(cls, values)
        table = tomllib.loads(tomli_w.dumps(fields_of(component)))
        again, where = made(cls, table), f"{cls.__name__}{f', preset {preset},' if preset else ''}"
        assert again == component, f"{where} does not come back from its table {table}: {again}"
        assert hash(again) == hash(component), f"{where}: equal objects have other hashes"


def check_unknown_key(cls: type) -> None:
    """A misspelt setting is an error, not silence: in a recipe one that names it, and in Python."""
    try:
        made(cls, {"no_such_setting": 1})
    except ConfigError as error:
        told = str(error)
    else:
        told = "nothing, and accepts it"
    assert "no_such_setting" in told, f"{cls.__name__} does not say which key is unknown, but {told}"
    try:
        cls(no_such_setting=1)
    except Exception:  # of whatever type: it is refused
        return
    raise AssertionError(f"{cls.__name__}(no_such_setting=1) is accepted")


def check_described(cls: type) -> None:
    """It has a first line, a source, and a word on every field: its own, or one of a class that it derives from."""
    entry = entry_of(cls)
    line = entry.summary
    described = line.endswith((".", ":")) and " " in line
    assert described, f"{cls.__name__} has no one-line description, but {line!r}"
    assert entry.source, f"{cls.__name__} names no source"
    missing = sorted(entry.fields.keys() - described_fields(cls).keys())
    assert not missing, f"{cls.__name__} does not describe {missing}"


def check_runs(cls: type) -> None:
    """It does its work in every setting, on inputs that are as they should be."""
    _evidence(cls).require("runs")


def check_declares_needs(cls: type) -> None:
    """It works when it is granted just what it declares, and looks at nothing else."""
    _evidence(cls).require("needs")


def check_leaves_inputs_alone(cls: type) -> None:
    """Whatever it is handed or can look at has the bits that it had: batches, labels, the trusted set, rows."""
    _evidence(cls).require("inputs")


def check_leaves_the_model_alone(cls: type) -> None:
    """Parameters and buffers are as before: a component changes a model through what it returns."""
    _evidence(cls).require("model")


def check_leaves_gradients_alone(cls: type) -> None:
    """`.grad` of every parameter is as before."""
    _evidence(cls).require("gradients")


def check_leaves_train_flags_alone(cls: type) -> None:
    """Every module is in the mode in which it was."""
    _evidence(cls).require("train flags")


def check_draws_from_no_global_generator(cls: type) -> None:
    """The global generators of torch, numpy and random are as before."""
    _evidence(cls).require("generators")


def check_keeps_state_in_notes(cls: type) -> None:
    """The object, its classes and their modules hold what they held: what is remembered is in the notes."""
    _evidence(cls).require("state")


def check_notes_can_be_saved(cls: type) -> None:
    """Notes are tensors by name, without gradients, and come back from a file as they were."""
    _evidence(cls).require("notes")


def check_repeats(cls: type) -> None:
    """Another object with the same settings, notes and generator state gives the same bits."""
    _evidence(cls).require("repeats")


def check_resumes(cls: type) -> None:
    """A run that is killed and goes on from what was saved ends as the one that was not."""
    _evidence(cls).require("resumes")


def check_batch_of_one(cls: type) -> None:
    """A single sample works; of an attack on federated rounds, a single hostile client, and a round of hostile ones."""
    _evidence(cls).require("batch of one")


def check_keeps_dtype(cls: type) -> None:
    """What comes in float64 goes out in float64 (rows of an aggregator: in float32, too), on the same device."""
    _evidence(cls).require("dtype")


def check_says_which_inputs_it_takes(cls: type) -> None:
    """With token ids in a mapping, and with numbers as targets, it works, or `check_inputs` refuses before the run."""
    _evidence(cls).require("other inputs")


_SETTINGS: Sequence[Check] = (check_defaults, check_round_trip, check_unknown_key, check_described)
_CALLS: Sequence[Check] = (check_runs, check_draws_from_no_global_generator, check_keeps_state_in_notes, check_repeats)
_MODEL: Sequence[Check] = (check_leaves_the_model_alone, check_leaves_gradients_alone, check_leaves_train_flags_alone)
_NOTES: Sequence[Check] = (check_notes_can_be_saved, check_resumes)
_SAMPLES: Sequence[Check] = (
    check_declares_needs,
    check_leaves_inputs_alone,
    *_MODEL,
    *_NOTES,
    check_batch_of_one,
    check_keeps_dtype,
)

CHECKS: Mapping[Kind, Sequence[Check]] = {
    "aggregator": (
        *_SETTINGS,
        *_CALLS,
        check_declares_needs,
        check_leaves_inputs_alone,
        *_NOTES,
        check_keeps_dtype,
        *aggregator.CHECKS,
    ),
    "attack": (*_SETTINGS, *_CALLS, *_SAMPLES, check_says_which_inputs_it_takes, *attack.CHECKS),
    "defence": (*_SETTINGS, *_CALLS, *_SAMPLES, check_says_which_inputs_it_takes, *defence.CHECKS),
    "detector": (*_SETTINGS, *_CALLS, *_SAMPLES, check_says_which_inputs_it_takes, *detector.CHECKS),
    "model": (*_SETTINGS, *_CALLS, *_MODEL, check_keeps_dtype, *model.CHECKS),
    "monitor": (*_SETTINGS, *_CALLS, check_leaves_inputs_alone, *monitor.CHECKS),
    "update_attack": (*_SETTINGS, *_CALLS, *_SAMPLES, *update_attack.CHECKS),
}
"""By kind, in the order in which they are worth reading."""
