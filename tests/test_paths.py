"""Wherever a path goes in, text and `Path` do."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import mithridate as mi
from mithridate.bench.calibration import calibrate_recipe
from mithridate.bench.store import read_run
from mithridate.data.foreign import foreign_batches
from mithridate.data.images import load_images
from mithridate.report import build_report
from mithridate.training.checkpoint import load_snapshot, load_weights, save_snapshot
from mithridate.training.history import History

BESIDE: list[Any] = [
    calibrate_recipe,
    foreign_batches,
    load_images,
    load_snapshot,
    load_weights,
    read_run,
    save_snapshot,
    History,
]
"""What users call that the package does not name at its top."""


def flat(hint: object) -> list[object]:
    """A type, and those that it is made of."""
    return [hint, *(part for argument in get_args(hint) for part in flat(argument))]


def takers() -> dict[str, list[object]]:
    """Every argument of a public function, and every setting, that may be a path, with all that it may be."""
    found = {}
    for public in [*(getattr(mi, name) for name in mi.__all__), *BESIDE]:
        made_by_hand = inspect.isclass(public) and not is_dataclass(public)
        for argument, hint in get_type_hints(public.__init__ if made_by_hand else public).items():
            if argument != "return" and Path in flat(hint):
                found[f"{public.__name__}({argument})"] = flat(hint)
    return found


def test_every_argument_that_takes_a_path_takes_text() -> None:
    found = takers()
    known = {"read_recipe(path)", "run_recipe(out)", "burn_in(cache)", "BurnIn(checkpoint)", "History(folder)"}
    assert known <= found.keys()
    assert [name for name, types in found.items() if str not in types] == []


@pytest.mark.parametrize("given", [str, Path, lambda path: [str(path)]], ids=["text", "path", "list"])
def test_a_single_folder_of_runs_is_text_a_path_or_a_list(
    given: Callable[[Path], str | Path | Sequence[str]], tmp_path: Path
) -> None:
    with pytest.raises(mi.UserError, match=r"no finished run in .*" + tmp_path.name):
        build_report(given(tmp_path), str(tmp_path / "out"))
