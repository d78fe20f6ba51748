from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from mithridate.bench.store import Run
from mithridate.report.rows import rows
from mithridate.report.tables.clipping import clipping_table

Make = Callable[..., Run]


def test_the_table_holds_each_accuracy_where_it_belongs(federated: Make) -> None:
    runs = [federated("clean", defence=d, after=0.95) for d in ("narrow", "none", "linf-1")]
    runs += [federated("direct", label=f"d{k}", trigger_scale=k, after=0.9 - k / 100) for k in (20.0, 1.0)]
    runs += [federated(label="a8", trigger="clean", lam=0.08, after=0.1 + s / 10, seed=s) for s in (0, 1)]
    runs += [federated(label="a8", trigger="clean", lam=0.08, after=0.64, defence="linf-1")]
    table = clipping_table(rows(runs))
    assert table.head == ("method", "loss scaling", "no clip", "l2 ≤ 0.1", "linf ≤ 1")
    assert table.rows == {
        "small_cnn on digits": [
            ["no attack", "—", "95.0", "95.0", "95.0"],
            ["poisoned trigger", "1", "89.0", "—", "—"],
            ["poisoned trigger", "20", "70.0", "—", "—"],
            ["accumulative phase + clean trigger", "0.08", "15.0 ± 7.1", "—", "64.0"],
        ]
    }


def test_the_table_tells_attacks_of_one_scaling_apart(federated: Make) -> None:
    runs = [federated(label=label, lam=0.02, defence=d, after=0.5) for label in ("a", "b") for d in ("none", "wide")]
    (lines,) = clipping_table(rows(runs)).rows.values()
    assert [line[0] for line in lines] == [f"accumulative phase + clean trigger ({label})" for label in ("a", "b")]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"trigger_scale": 1.0}, "accumulative phase + clean trigger"),
        ({"trigger_scale": 10.0}, "accumulative phase + clean trigger, 10 times its length"),
        ({"trigger_scale": 10.0, "trigger_norm": 2.0}, "accumulative phase + clean trigger"),
    ],
)
def test_the_table_says_how_long_the_trigger_of_a_phase_is(
    federated: Make, settings: dict[str, float], name: str
) -> None:
    runs = [federated(label="a", trigger="clean", lam=0.02, defence=d, **settings) for d in ("none", "wide")]
    (lines,) = clipping_table(rows(runs)).rows.values()
    assert [line[0] for line in lines] == [name]


def test_the_table_tells_defences_of_one_bound_apart(
    federated: Make, clips: Mapping[str, Mapping[str, object]]
) -> None:
    same = federated(defence="wide", label="a")
    other = replace(
        same,
        config={**same.config, "defence": {**clips["wide"], "label": "sharp", "how": "project"}},
        summary={**same.summary, "defence": "sharp"},
    )
    head = clipping_table(rows([same, other])).head
    assert head[2:] == ("l2 ≤ 10 (sharp)", "l2 ≤ 10 (wide)")


def test_no_table_without_a_bound_or_of_online_runs(make_run: Make, federated: Make) -> None:
    assert not clipping_table(rows([federated("clean"), federated()])).rows
    assert not clipping_table(rows([make_run(), make_run(defence="clip")])).rows
