"""The detectors of runs as their settings describe them, and which belong together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mithridate.bench.store import Run
from mithridate.report.rows import Row
from mithridate.report.settings import config_table, flattened
from mithridate.report.wording import one_line


@dataclass(frozen=True)
class DetectorInfo:
    """A detector as a run's settings describe it.

    Args:
        key: What the store calls it.
        label: What people read: the key without unprintable characters.
        name: The component's name; the label if the settings do not have it.
        epoch: The burn-in epoch that it looks back at; None if it does not, or looks back in updates.
        interval: Epochs from there to the end of the burn-in: the backtracking interval k. None without an epoch.
        family: Its name and its settings without the epoch: detectors that differ in their epoch alone share it.
        divergence: The distance that it measures with; empty if none.
    """

    key: str
    label: str
    name: str
    epoch: int | None
    interval: int | None
    family: str
    divergence: str

    @property
    def is_discrepancy(self) -> bool:
        """Whether its score is minus the Memorization Discrepancy."""
        return self.name == "discrepancy"

    @property
    def is_loss(self) -> bool:
        """Whether its score is minus a cross-entropy, or a difference of two."""
        return self.name == "loss"


def detectors(rows: Sequence[Row]) -> list[DetectorInfo]:
    """The detectors that scored anything, each once, in the order of the recipes."""
    by_key: dict[str, DetectorInfo] = {}
    for row in rows:
        for run in row.runs:
            for info in _detectors_of(run):
                by_key.setdefault(info.key, info)
    return list(by_key.values())


def representatives(infos: Sequence[DetectorInfo]) -> list[DetectorInfo]:
    """Of detectors that differ only in their epoch, the latest ("static") and the one nearest to half the burn-in.

    Half the burn-in is where the released code of Zhu et al. looks back to (epoch 20 of 40).

    Args:
        infos: All detectors.

    Returns:
        The chosen ones in the order given; detectors without an epoch are all among them.
    """
    chosen = {info.key for family in _families(infos) for info in (family[0], reference(family))}
    return [info for info in infos if info.interval is None or info.key in chosen]


def looking_back(infos: Sequence[DetectorInfo], name: str) -> list[list[DetectorInfo]]:
    """Families of detectors with an epoch, which differ in nothing else; in each the longest interval last.

    Args:
        infos: All detectors.
        name: Name of the component: `discrepancy` or `loss`.
    """
    return _families([info for info in infos if info.name == name])


def reference(family: Sequence[DetectorInfo]) -> DetectorInfo:
    """The detector that looks back about half the burn-in; of two equally near, the one that looks further back.

    Args:
        family: Detectors with an epoch, one at least.
    """
    return min(family, key=lambda info: (abs((info.epoch or 0) - (info.interval or 0)), info.epoch or 0))


def _families(infos: Sequence[DetectorInfo]) -> list[list[DetectorInfo]]:
    families: dict[str, list[DetectorInfo]] = {}
    for info in infos:
        if info.interval is not None:
            families.setdefault(info.family, []).append(info)
    return [sorted(family, key=lambda info: info.interval or 0) for family in families.values()]


def _detectors_of(run: Run) -> Iterator[DetectorInfo]:
    """The detectors that a run's scores name, in the order of its settings; those that the settings lack come last."""
    tables = run.config.get("detector", [])
    known = {str(t.get("label", t.get("name"))): t for t in (tables if isinstance(tables, list) else [tables])}
    scored = dict.fromkeys(map(str, run.scores["detector"])) if run.scores else {}
    for key in [*(key for key in known if key in scored), *(key for key in scored if key not in known)]:
        table = known.get(key, {"name": key})
        epoch, last = _epoch(run, table), config_table(run, "burn_in").get("epochs")
        yield DetectorInfo(
            key=key,
            label=one_line(key),
            name=one_line(table["name"]),
            epoch=epoch,
            interval=last - epoch if isinstance(last, int) and epoch is not None else None,
            family=str(sorted(flattened({k: v for k, v in table.items() if k not in {"label", "epoch"}}).items())),
            divergence=one_line(table.get("divergence", "")),
        )


def _epoch(run: Run, table: Mapping[str, Any]) -> int | None:
    """The epoch that a detector looks back at; a discrepancy without one looks at the earliest that was kept."""
    burn_in = config_table(run, "burn_in")
    if table.get("old") == "back" or "checkpoint" in burn_in:
        return None
    epoch = table.get("epoch")
    if epoch is None and table.get("name") == "discrepancy":
        epoch = min(burn_in.get("checkpoints", ()), default=None)
    epochs = burn_in.get("epochs")
    if epoch == "half" and isinstance(epochs, int):
        epoch = epochs // 2
    return epoch if isinstance(epoch, int) else None
