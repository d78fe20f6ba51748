import warnings
from collections.abc import Callable
from dataclasses import replace

from mithridate.bench.store import Run
from mithridate.report.figures.loss_and_norms import loss_and_norms
from mithridate.report.rows import rows

Make = Callable[..., Run]


def test_extreme_norms_are_drawable(make_run: Make) -> None:
    run = make_run()
    trace = [dict(step) | {"gradient_norm": 10.0 ** (60 * i), "update_norm": 0.0} for i, step in enumerate(run.trace)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss_and_norms(rows([replace(run, trace=trace)])) is not None
