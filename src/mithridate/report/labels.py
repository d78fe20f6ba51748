"""What a run's cell is called: labels, and after them the settings in which runs of the same labels differ.

Runs are pooled only if they differ in nothing but the seed. What the attack's settings differ in is said behind the
attack's label, the defence's behind the defence's, and all else behind data set and model, which decide what may be
compared.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from mithridate.bench.store import Run
from mithridate.report.settings import config_table, settings
from mithridate.report.wording import one_line

LONGEST = 32
"""Values with more characters are shortened in labels, and told apart by a few digits of a hash."""

UNSET = "unset"


@dataclass(frozen=True)
class Labels:
    """What a run's cell is called.

    Args:
        dataset: The data set, with the settings that belong to neither model, attack nor defence.
        model: The model.
        attack: The attack.
        defence: The defence.
        apart: All settings in which any runs of the same labels differ, with the run's values.
    """

    dataset: str
    model: str
    attack: str
    defence: str
    apart: Mapping[str, str]


def labels(runs: Sequence[Run]) -> list[Labels]:
    """The labels of each run, so that runs with equal ones differ in nothing but the seed."""
    compared = [_compared(run) for run in runs]
    federations = len({bool(rounds(run)) for run in runs}) > 1
    named = [
        Labels(
            _label(run, "dataset", "data") + (", federated" if federations and rounds(run) else ""),
            _label(run, "model", "model"),
            _label(run, "attack", "attack"),
            _label(run, "defence", "defence"),
            {},
        )
        for run in runs
    ]
    differing: dict[str, None] = {}

    def split(by: Callable[[Labels], Hashable], part: str) -> None:
        """Put the settings of one label behind it where runs that share some labels differ in them."""
        members: dict[Hashable, list[int]] = {}
        for i, label in enumerate(named):
            members.setdefault(by(label), []).append(i)
        for indices in members.values():
            varying = [key for key in _varying([compared[i] for i in indices]) if _part(key) == part]
            differing.update(dict.fromkeys(varying))
            for i in indices:
                said = "".join(f", {_said(key, compared[i].get(key, UNSET), part)}" for key in varying)
                named[i] = replace(named[i], **{part: getattr(named[i], part) + said})

    split(lambda n: (n.dataset, n.model), "model")
    split(lambda n: (n.dataset, n.model), "dataset")
    split(lambda n: (n.dataset, n.model, n.attack), "attack")
    split(lambda n: (n.dataset, n.model, n.defence), "defence")
    lengths: dict[Hashable, set[int]] = {}
    for label, run in zip(named, runs, strict=True):
        lengths.setdefault((label.dataset, label.model), set()).update(rounds(run))
    for i, (label, run) in enumerate(zip(named, runs, strict=True)):
        if len(lengths[label.dataset, label.model]) > 1:
            said = "".join(f", {number} rounds" for number in rounds(run))
            named[i] = replace(label, attack=label.attack + said)
    return [
        replace(label, apart={key: table.get(key, UNSET) for key in differing})
        for label, table in zip(named, compared, strict=True)
    ]


def rounds(run: Run) -> tuple[int, ...]:
    """How many rounds before its trigger a federation was given; nothing for an online run."""
    number = config_table(run, "federated").get("rounds")
    return (number,) if isinstance(number, int) else ()


def _label(run: Run, key: str, kind: str) -> str:
    table = config_table(run, kind)
    return one_line(run.summary.get(key) or table.get("label") or table.get("name") or "unknown") or "unknown"


def _compared(run: Run) -> dict[str, str]:
    """What runs must share to be pooled: settings, samples and start models by what they are, and code of plug-ins."""
    compared = {key: value for key, value in settings(run).items() if key != "plugins"}
    if samples := run.summary.get("samples_key"):
        compared.pop("data.path", None)
        compared["data.samples"] = one_line(samples)
    if (inputs := run.summary.get("inputs_key")) and compared.pop("burn_in.checkpoint", UNSET) != UNSET:
        compared = {key: value for key, value in compared.items() if not key.startswith("burn_in.older")}
        compared["burn_in.files"] = one_line(inputs)
    for name, digest in (run.environment.get("code") or {}).items():
        compared[f"code.{PurePath(name).name}"] = one_line(digest)
    return compared


def _varying(tables: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for key in dict.fromkeys(key for table in tables for key in table):
        if len({table.get(key, UNSET) for table in tables}) > 1:
            yield key


def _part(key: str) -> str:
    """The label that a setting belongs behind; none for the length of a federation, which has words of its own."""
    table = key.partition(".")[0]
    if table in {"attack", "surrogate"}:
        return "attack"
    if table == "defence" or key.startswith("federated.rule"):
        return "defence"
    if key == "federated.rounds":
        return ""
    return "model" if table == "model" else "dataset"


def _said(key: str, value: str, part: str) -> str:
    if len(value) > LONGEST:
        value = f"{value[: LONGEST - 8]}… {hashlib.sha256(value.encode()).hexdigest()[:6]}"
    return f"{key.removeprefix(f'{part}.')} {value}"
