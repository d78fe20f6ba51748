"""Where cells are run, one after the other, in one process: what they share stays in memory from one to the next."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mithridate.bench import store
from mithridate.bench.failure import Failure
from mithridate.bench.origin import Origin, inputs_key, samples_key, settings_key
from mithridate.bench.place import Place, Standing
from mithridate.bench.prepare import Prepared, RunContext, choose_device, other_images, prepare, with_surrogate
from mithridate.bench.recipe import Cell, Recipe
from mithridate.bench.running import run_cell
from mithridate.bench.watcher import Watcher
from mithridate.core.batch import Batch
from mithridate.core.errors import BusyError, DataError, StoreError, WriteError
from mithridate.core.files import locked
from mithridate.core.registry import fields_of
from mithridate.core.view import Need
from mithridate.data.stream import Stream, open_stream
from mithridate.models import build_model
from mithridate.simulation.clients import federate
from mithridate.simulation.evaluation import require_evaluation
from mithridate.simulation.online import OnlineRun
from mithridate.training.burn_in import burn_in


@dataclass(frozen=True)
class Terms:
    """How cells are run, the same in every process.

    Args:
        out: Directory of the store, absolute.
        device: `cpu` or `cuda`.
        cache: Directory for decoded images and burn-ins.
        data_root: A local mirror of the hub's image sets.
        resume: Whether what stands in a cell's directory may be gone on with.
    """

    out: Path
    device: str
    cache: Path
    data_root: str | Path | None = None
    resume: bool = False


@dataclass(frozen=True)
class Ended:
    """How a cell ended.

    Args:
        summary: The outcome; None if it failed.
        skipped: Whether it was found finished.
        failure: Why it failed; None if it did not.
    """

    summary: dict[str, Any] | None
    skipped: bool = False
    failure: Failure | None = None

    @property
    def busy(self) -> bool:
        """Whether it was left to another process, which is at work on it."""
        return self.failure is not None and self.failure.busy


@dataclass(frozen=True)
class _Samples:
    """A stream that is open.

    Args:
        keys: The settings that lead to it, as they were asked for and with all sizes as numbers.
        stream: Gives the samples.
        ood: Other images that detectors score.
        key: Of all of them.
    """

    keys: frozenset[str]
    stream: Stream
    ood: Sequence[Batch]
    key: str


class Workplace:
    """Runs cells; keeps the samples that were opened last, and what the last cell's seed was prepared with.

    Args:
        terms: How.
        watcher: Follows progress.
    """

    def __init__(self, terms: Terms, watcher: Watcher) -> None:
        self.terms, self.watcher = terms, watcher
        self._device = choose_device(terms.device)
        self._samples: _Samples | None = None
        self._prepared: tuple[str, Prepared | Failure] | None = None

    def places(self, variant: Recipe) -> list[Place]:
        """Where the runs of a recipe without variants are written, all of it checked.

        Raises:
            UserError: Anything in the recipe, the data or the store that cannot work, as far as it shows beforehand.
        """
        samples = self._opened(variant)
        stream = samples.stream
        variant = replace(variant, data=stream.settings)  # sizes as numbers of samples
        cells = list(variant.cells())
        _check_runs(cells, stream)
        _check_needs(cells, stream)
        model = build_model(variant.model, stream.info, seed=0)
        if variant.burn_in.checkpoint is not None:  # a finished model: it is loaded, to see whether it fits
            burn_in(model, stream, variant.burn_in, seed=0)
        return [self._place(cell, samples) for cell in cells]

    def run(self, run: str, cell: Callable[[], Cell], origin: Origin, *, patient: bool = False) -> Ended:
        """Run a cell, go on with it, or find it finished; an error of its own is recorded in its directory.

        Args:
            run: Its id.
            cell: Makes it.
            origin: What it is to be made from; it was checked by `places`.
            patient: Wait, where another process is at work on it, until that has ended; else its failure says so.

        Raises:
            WriteError: The file system refuses, which no other cell would survive either.
        """
        try:
            return self._run(cell(), origin, patient=patient)
        except WriteError:
            raise
        except (BusyError, StoreError) as error:  # the directory is another's: nothing is written there
            return Ended(None, failure=Failure.of(error))
        except Exception as error:  # whatever a component or a machine can raise: the other cells go on
            return Ended(None, failure=self._recorded(run, Failure.of(error)))

    def _run(self, cell: Cell, origin: Origin, *, patient: bool) -> Ended:
        samples = self._opened(cell.recipe)
        place = self._place(cell, samples)
        if place.origin != origin:
            raise DataError("the samples, or the files that its settings name, have changed since the grid was begun.")
        if place.standing() is Standing.FINISHED:
            return Ended(place.summary(), skipped=True)
        context = RunContext(samples.stream, samples.ood, self._device, self.terms.cache, self.watcher)
        prepared = self._ready(cell, context)
        if isinstance(prepared, Failure):
            return Ended(None, failure=self._recorded(cell.run_id, prepared))
        self.watcher.prepared(cell)
        with ExitStack() as held:
            lock = place.directory / store.LOCK
            try:
                held.enter_context(locked(lock, timeout=0))
            except BusyError:
                if not patient:
                    raise
                self.watcher.waiting(cell)
                held.enter_context(locked(lock))
            if place.standing() is Standing.FINISHED:  # by another process, while this one prepared or waited
                return Ended(place.summary(), skipped=True)
            return Ended(run_cell(place, with_surrogate(prepared, cell, context), context))

    def _recorded(self, run: str, failure: Failure) -> Failure:
        directory = self.terms.out / run
        with suppress(BusyError), locked(directory / store.LOCK, timeout=0):
            return failure.write(directory)
        return failure

    def _opened(self, recipe: Recipe) -> _Samples:
        key = _samples_settings(recipe)
        if self._samples is None or key not in self._samples.keys:
            self._samples = self._prepared = None  # at most one stream in memory
            terms = self.terms
            stream = open_stream(recipe.data, data_root=terms.data_root, cache=terms.cache)
            sized = replace(recipe, data=stream.settings)
            ood = other_images(sized, stream, self._device, terms.data_root, terms.cache)
            keys = frozenset({key, _samples_settings(sized)})
            self._samples = _Samples(keys, stream, ood, samples_key(stream, ood))
        return self._samples

    def _place(self, cell: Cell, samples: _Samples) -> Place:
        config = cell.config()
        origin = Origin(settings_key(config), samples.key, inputs_key(samples.key, config))
        return Place(cell, self.terms.out / cell.run_id, origin, self.terms.resume)

    def _ready(self, cell: Cell, context: RunContext) -> Prepared | Failure:
        """What the cell starts from; an error is kept, for the next cell of the seed would only meet it again."""
        key = prepared_key(cell)
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = None
            try:
                self._prepared = key, prepare(cell, context)
            except (WriteError, BusyError):
                raise
            except Exception as error:  # see `run`
                self._prepared = key, Failure.of(error)
        return self._prepared[1]


def prepared_key(cell: Cell) -> str:
    """A hash of what decides what a cell is prepared with: burn-in, detectors."""
    config = cell.config()
    alone = {"title", "variant", "attack", "defence", "surrogate", "monitor", "clients"}
    shared = {k: v for k, v in config.items() if k not in alone}
    if "federated" in shared:
        shared["federated"] = {k: v for k, v in shared["federated"].items() if k != "rule"}
    return _hash(shared)


def burn_in_shared(cell: Cell) -> str:
    """A hash that is the same for cells that surely share a burn-in; others may, by what the cache knows."""
    config = cell.config()
    return _hash([config["data"], config["model"], config["burn_in"], cell.burn_in_seed])


def _samples_settings(recipe: Recipe) -> str:
    """A hash of what decides which samples are opened."""
    ood = [recipe.ood, recipe.run.steps, bool(recipe.detectors)] if recipe.ood else None
    return _hash([fields_of(recipe.data), ood])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _check_needs(cells: Sequence[Cell], stream: Stream) -> None:
    """Refuse components that need a part of the stream that the recipe leaves empty."""
    empty = {
        need for need, part in ((Need.VALIDATION, stream.validation), (Need.TRUSTED, stream.trusted)) if not len(part)
    }
    for cell in cells:
        for label, needs in (
            (cell.attack.label, cell.attack.component.needs),
            (cell.defence.label, cell.defence.component.needs),
        ):
            for need in needs & empty:
                raise DataError(
                    f"{label} needs the {need}, and [data] {need.name.lower()} has no sample; give it some."
                )


def _check_runs(cells: Sequence[Cell], stream: Stream) -> None:
    """Refuse a stream that is too short, inputs that a component cannot work on, and what a federation cannot do."""
    sample = stream.victim.batch(slice(1))
    for cell in cells:
        run, clients = cell.recipe.run, cell.recipe.clients
        require_evaluation(stream.test, run)
        for component in (cell.attack.component, cell.defence.component, *(d.component for d in cell.recipe.detectors)):
            component.check_inputs(sample)
        if isinstance(run, OnlineRun):
            stream.require(run.steps)
        elif clients is not None:
            federate(stream, clients, seed=cell.seed).require(run)
            run.check(run.per_round or clients.clients, len(stream.trusted) > 0)
            cell.defence.component.check_federation(run, run.per_round or clients.clients)
