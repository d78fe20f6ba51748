"""Files of the store and the cache that are cut off, changed, lost or exchanged; then a report, or `--resume`."""

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

from mithridate.bench.watcher import Watcher
from tests.recipes import tiny_text
from tools.faults import runs
from tools.faults.case import Result, UnpreparedError, drawn
from tools.faults.processes import forked, import_what

LIMIT = 200
"""Seconds of one run, on a busy machine, too."""

DAMAGES = ("truncate", "flip", "zero", "delete", "swap")
Stage = Literal["finished", "unfinished", "fresh"]
STAGES: tuple[Stage, ...] = ("finished", "unfinished", "fresh")

IMAGES = tiny_text("", "data.name=mnist", "run.steps=2")
RECIPES = {**runs.RECIPES, "images": IMAGES}
SEEDS = {"online": (0,), "federated": (0,), "detectors": (0, 1), "images": (0,)}


class Place(NamedTuple):
    """What is damaged, and what is done then.

    Args:
        recipe: Its name in `RECIPES`.
        stage: What there is: `finished` runs, an `unfinished` one among them, or only the cache (`fresh`).
        file: Path below the scene's folder.
        action: `report`, or `run` (with `--resume` where there are runs).
    """

    recipe: str
    stage: Stage
    file: str
    action: Literal["report", "run"]


@dataclass
class Files:
    """Damages by number: each one of each file before any twice."""

    seed: int
    shared: Path
    full: int = 600
    places: list[tuple[Place, str]] = field(default_factory=list)
    right: dict[str, Any] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make finished and unfinished runs of every recipe, and such of other settings, and list their files."""
        self._write_mirror()
        for recipe in RECIPES:
            self.right[recipe] = import_what(partial(self._furnish, recipe, "finished"), limit=LIMIT)
            import_what(partial(self._furnish, recipe, "finished", other=True), limit=LIMIT)
            for other in (False, True):
                _, died = forked(partial(self._furnish, recipe, "unfinished", other=other), limit=LIMIT)
                if died != "SIGKILL":
                    raise UnpreparedError(f"{recipe}: a run that should have been killed was not: {died}")
                cache = self._folder(recipe, "finished", other=other) / "cache"
                shutil.copytree(cache, self._folder(recipe, "fresh", other=other) / "cache")
        self.places = [(place, damage) for place in self._all_places() for damage in DAMAGES]
        drawn("file places", self.seed, 0).shuffle(self.places)
        self.full = max(self.full, len(self.places))

    def case(self, number: int, folder: Path) -> Result:
        """Damage a file, then report or go on."""
        rng = drawn("files", self.seed, number)
        place, damage = self.places[number % len(self.places)]
        source = self._folder(place.recipe, place.stage)
        shutil.copytree(source, folder, dirs_exist_ok=True)
        done = DAMAGE[damage](folder / place.file, rng, (folder, self._folder(place.recipe, place.stage, other=True)))
        what = f"{place.recipe}, {place.stage}: {place.file}: {done}; {place.action}"
        report = place.action == "report"
        told, died = forked(
            lambda: runs.contents(folder / "runs") if report else self._gone_on(place, folder), limit=LIMIT
        )
        if died:
            return Result("exception", what, died)
        if "refused" in told:
            named = Path(place.file).name in told["refused"] or (
                damage == "swap" and done.split()[-1] in told["refused"]
            )
            return Result("refused" if named else "exception", what, ("" if named else "not named: ") + told["refused"])
        return self._judged(place, what, told)

    def _judged(self, place: Place, what: str, told: Any) -> Result:  # noqa: ANN401  (JSON)
        right = self.right[place.recipe]
        for key in ("timeless", "reported"):
            if told[key] != right[key]:
                keys = "" if key == "reported" else ", ".join(sorted(_differing(told[key], right[key])))
                return Result("silent", what, f"other rows ({key}) {keys}")
        stored = self._stored(place)
        changed = [run for run in stored if told["whole"][run] != stored[run]]
        if len(changed) > told.get("ran", 0):
            return Result("silent", what, f"other times or another environment, not made anew: {', '.join(changed)}")
        return Result("redone" if changed else "same", what)

    def _stored(self, place: Place) -> dict[str, str]:
        """The digests of the runs that were finished before."""
        kept: dict[str, str] = self.right[f"{place.recipe}, {place.stage}"]
        return kept

    def _folder(self, recipe: str, stage: Stage, *, other: bool = False) -> Path:
        return self.shared / f"{recipe}-{stage}{'-other' if other else ''}"

    def _recipe(self, recipe: str, *, other: bool = False) -> str:
        text = RECIPES[recipe]
        return text.replace("lr = 0.05", "lr = 0.04") if other else text

    def _carried_out(
        self, recipe: str, folder: Path, *, resume: bool, other: bool = False, watcher: Watcher | None = None
    ) -> dict[str, Any]:
        return runs.start(
            self._recipe(recipe, other=other),
            folder / "runs",
            folder / "cache",
            resume=resume,
            seeds=SEEDS[recipe],
            watcher=watcher,
            data_root=self.shared / "mirror",
        )

    def _furnish(self, recipe: str, stage: Stage, *, other: bool = False) -> dict[str, Any]:
        """Make runs, and say what they hold; those that shall be unfinished are killed in the last one."""
        folder = self._folder(recipe, stage, other=other)
        watcher = _Killer() if stage == "unfinished" else None
        told = self._carried_out(recipe, folder, resume=False, other=other, watcher=watcher)
        if "refused" in told:
            raise UnpreparedError(told["refused"])
        return runs.contents(folder / "runs")

    def _all_places(self) -> Sequence[Place]:
        places: list[Place] = []
        for recipe in RECIPES:
            for stage in STAGES:
                folder = self._folder(recipe, stage)
                self.right[f"{recipe}, {stage}"] = _whole(folder)
                for path in sorted(folder.rglob("*")):
                    if not path.is_file() or not path.stat().st_size:
                        continue
                    file = str(path.relative_to(folder))
                    places.append(Place(recipe, stage, file, "run"))
                    if stage == "finished" and file.startswith("runs"):
                        places.append(Place(recipe, stage, file, "report"))
        return places

    def _gone_on(self, place: Place, folder: Path) -> dict[str, Any]:
        told = self._carried_out(place.recipe, folder, resume=place.stage != "fresh")
        return told if "refused" in told else {**runs.contents(folder / "runs"), **told}

    def _write_mirror(self) -> None:
        """A mirror of a hub's image set with few images: 28x28, the digits in a frame."""
        digits = load_digits()
        pixels = np.zeros((300, 28, 28), np.uint8)
        pixels[:, 10:18, 10:18] = np.rint(digits.images[:300] * (255 / 16))
        folder = self.shared / "mirror" / "ylecun" / "mnist" / "mnist"
        folder.mkdir(parents=True)
        for split, some in (("train", slice(0, 220)), ("test", slice(220, 300))):
            images = [{"bytes": _png(image), "path": None} for image in pixels[some]]
            table = pa.table({"image": images, "label": digits.target[some].tolist()})
            pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


class _Killer(Watcher):
    """Kills the process in the last run's second step."""

    last = False

    def cell(self, cell: Any, number: int, of: int) -> None:  # noqa: ANN401  (a `Cell`)
        self.last = number == of - 1

    def step(self, cell: Any, done: int, steps: int, accuracy: float) -> None:  # noqa: ANN401  (a `Cell`)
        if self.last and done == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def _whole(folder: Path) -> dict[str, str]:
    """Digests of the finished runs in a folder, read in a child: this process must have computed nothing."""
    if not any((folder / "runs").glob("*/summary.json")):
        return {}
    told = import_what(lambda: runs.contents(folder / "runs"), limit=LIMIT)
    whole: dict[str, str] = told["whole"]
    return whole


def _differing(a: dict[str, str], b: dict[str, str]) -> set[str]:
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


def _png(pixels: Any) -> bytes:  # noqa: ANN401  (an array)
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _truncated(path: Path, rng: Random, _: tuple[Path, Path]) -> str:
    size = path.stat().st_size
    left = rng.randrange(size)
    os.truncate(path, left)
    return f"truncated to {left} of {size} bytes"


def _flipped(path: Path, rng: Random, _: tuple[Path, Path]) -> str:
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bit {bit} of {8 * len(data)} flipped"


def _zeroed(path: Path, rng: Random, _: tuple[Path, Path]) -> str:
    data = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        begin, end = 0, len(data)
    else:
        begin = rng.choice([i for i, byte in enumerate(data) if byte])
        end = min(len(data), begin + rng.choice([1, 8, 64, 512]))
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    return f"bytes {begin} to {end} of {len(data)} zeroed"


def _deleted(path: Path, rng: Random, _: tuple[Path, Path]) -> str:
    path.unlink()
    return "deleted"


def _swapped(path: Path, rng: Random, folders: tuple[Path, Path]) -> str:
    """Exchanged with a file of the same kind, of another run, seed, epoch or recipe; with another content."""
    here = folders[0]
    content = path.read_bytes()
    area = path.relative_to(here).parts[0]
    files = [p for f in folders for p in sorted((f / area).rglob("*")) if p.is_file() and p != path]
    alike = [p for p in files if p.suffix == path.suffix and p.read_bytes() != content]
    same_name = [p for p in alike if p.name == path.name]
    if not alike:
        return _deleted(path, rng, folders) + " (there is no other such file)"
    partner = rng.choice(same_name if same_name and rng.random() < 0.8 else alike)
    path.write_bytes(partner.read_bytes())
    if partner.is_relative_to(here):
        partner.write_bytes(content)
        return f"swapped with {partner.relative_to(here)}, that is {partner.name}"
    return f"replaced by that of a run with other settings, {partner.name}"


DAMAGE: dict[str, Callable[[Path, Random, tuple[Path, Path]], str]] = {
    "truncate": _truncated,
    "flip": _flipped,
    "zero": _zeroed,
    "delete": _deleted,
    "swap": _swapped,
}


def make(seed: int, shared: Path) -> Files:
    """The kind, for a seed, with what its cases share in a folder."""
    return Files(seed, shared)
