from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mithridate.bench.store import Run
from mithridate.report import build_report
from mithridate.report.doubts.rules import examine
from mithridate.report.figures.secrecy import (
    accumulative_points,
    by_bound,
    clipping_table,
    convergence,
    federated_drawings,
    secrecy,
)
from mithridate.report.findings import headline, setting
from mithridate.report.measures import measure_sections, measures
from mithridate.report.rows import columns, groups, rows, settings
from mithridate.report.terminal import summary_table

Make = Callable[..., Run]
Save = Callable[[Run], Run]

CLIPS: dict[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "linf-1": {"name": "clip", "clip_norm": 1.0, "norm": "linf", "label": "linf-1"},
    "narrow": {"name": "clip", "clip_norm": 0.1, "norm": "l2", "label": "narrow"},
    "wide": {"name": "clip", "clip_norm": 10.0, "norm": "l2", "label": "wide"},
}


@pytest.fixture(scope="module")
def federated(make_run: Make) -> Make:
    """One run of a federation, shaped like those that the library writes."""

    def make(
        attack: str = "accumulative",
        *,
        defence: str = "none",
        seed: int = 0,
        rounds: int = 3,
        before: float = 0.95,
        after: float = 0.7,
        folder: Path = Path("store"),
        clients: int = 25,
        label: str | None = None,
        **attack_settings: Any,
    ) -> Run:
        steps = 0 if attack == "direct" else rounds
        run = make_run(
            attack=attack,
            defence=defence,
            seed=seed,
            accuracies=(0.98,) * (steps or 1) + ((before,) if steps else ()),
            after=after,
            label=label,
            folder=folder / f"{rounds}",
            config={
                "attack": {"name": attack, "poison_ratio": 1.0, **attack_settings}
                | ({"label": label} if label else {}),
                "defence": CLIPS[defence],
                "clients": {"clients": clients, "partition": "iid"},
                "federated": {"rounds": rounds, "seeds": [seed]},
            },
        )
        config = {key: value for key, value in run.config.items() if key != "run"}
        return replace(run, config=config, trace=[{**step, "poison_linf": None} for step in run.trace])

    return make


def test_words_say_rounds_and_clients(federated: Make) -> None:
    found = rows([federated("clean", after=0.95), federated("direct", after=0.97, before=0.98), federated()])
    sentence, details = headline(found)
    assert sentence.startswith("One round cost 25.0 points (n = 1) after a quiet phase of 3 rounds")
    assert "the same kind of round alone (direct) cost 1.0 points" in sentence
    assert "batch" not in sentence + " ".join(details) + setting(found)
    assert "25 clients" in setting(found)
    assert "up to 100.0 % of the clients were hostile" in setting(found)
    assert "phase (rounds)" in columns(found)
    assert "rounds" in [column.header for column in summary_table(found).columns]


def test_online_runs_keep_their_words(make_run: Make, federated: Make) -> None:
    online = rows([make_run()])
    assert "phase (batches)" in columns(online)
    assert "batch" in headline(online)[0]
    assert "clients" not in setting(online)
    both = rows([make_run(), federated(lam=0.1)])
    assert [row.dataset for row in both] == ["digits", "digits, federated"]
    assert "phase (steps)" in columns(both)


def test_a_clean_trigger_is_called_unpoisoned_unless_it_is_scaled(federated: Make) -> None:
    honest = rows([federated(trigger="clean", trigger_scale=1.0)])
    assert headline(honest)[0].startswith("One unpoisoned round")
    for change in ({"trigger_scale": 10.0}, {"trigger_norm": 3.0}, {"trigger": "reversed"}):
        (row,) = rows([federated(**{"trigger": "clean", "trigger_scale": 1.0, **change})])
        assert row.poisons_trigger


def test_a_longer_trigger_is_not_the_same_kind(federated: Make) -> None:
    found = rows([federated("direct", after=0.9, before=0.98, trigger_scale=10.0), federated(trigger_scale=1.0)])
    assert "a round alone (direct)" in headline(found)[0]
    unequal = next(answer for answer in examine(found) if answer.title == "Unequal budgets")
    assert "trigger_scale differs" in unequal.doubts[0].text


def test_seeds_are_no_difference_of_settings(federated: Make) -> None:
    first, second = federated(seed=0), federated(seed=1)
    assert settings(first) == settings(second)


def test_federations_of_several_lengths_are_told_apart(federated: Make) -> None:
    assert {row.attack for row in rows([federated(rounds=3), federated(rounds=8)])} == {
        "accumulative, 3 rounds",
        "accumulative, 8 rounds",
    }
    assert {row.attack for row in rows([federated(rounds=3), federated(rounds=3, seed=1)])} == {"accumulative"}


def test_refused_updates_are_not_called_samples(federated: Make) -> None:
    run = federated()
    run = replace(run, summary={**run.summary, "quarantined": 2})
    (doubt,) = next(a for a in examine(rows([run])) if a.title == "Quarantined samples").doubts
    assert doubt.text.startswith("2 updates of clients with NaN or infinite entries")


def test_measures_count_rounds(federated: Make) -> None:
    runs = [federated(attack, defence=d) for attack in ("clean", "accumulative") for d in ("none", "wide")]
    clean, attacked = measure_sections(measures(rows(runs)))
    assert "seconds a round" in clean.head
    assert "phase (rounds)" in attacked.head


def test_columns_stand_in_the_order_of_the_paper(federated: Make) -> None:
    found = rows([federated("clean", defence=name) for name in CLIPS])
    assert [row.defence for row in by_bound(found)] == ["none", "wide", "narrow", "linf-1"]


def test_the_table_holds_each_accuracy_where_it_belongs(federated: Make) -> None:
    runs = [federated("clean", defence=d, after=0.95) for d in ("narrow", "none", "linf-1")]
    runs += [federated("direct", label=f"d{k}", trigger_scale=k, after=0.9 - k / 100) for k in (20.0, 1.0)]
    runs += [federated(label="a8", trigger="clean", lam=0.08, after=0.1 + s / 10, seed=s) for s in (0, 1)]
    runs += [federated(label="a8", trigger="clean", lam=0.08, after=0.64, defence="linf-1")]
    table = clipping_table(groups(rows(runs)))
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
    (lines,) = clipping_table(groups(rows(runs))).rows.values()
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
    (lines,) = clipping_table(groups(rows(runs))).rows.values()
    assert [line[0] for line in lines] == [name]


def test_the_table_tells_defences_of_one_bound_apart(federated: Make) -> None:
    same = federated(defence="wide", label="a")
    other = replace(
        same,
        config={**same.config, "defence": {**CLIPS["wide"], "label": "sharp", "how": "project"}},
        summary={**same.summary, "defence": "sharp"},
    )
    head = clipping_table(groups(rows([same, other]))).head
    assert head[2:] == ("l2 ≤ 10 (sharp)", "l2 ≤ 10 (wide)")


def test_no_table_without_a_bound_or_of_online_runs(make_run: Make, federated: Make) -> None:
    assert not clipping_table(groups(rows([federated("clean"), federated()]))).rows
    assert not clipping_table(groups(rows([make_run(), make_run(defence="clip")]))).rows


def test_points_join_lengths_and_keep_weights_apart(federated: Make) -> None:
    runs = [
        federated(
            lam=lam, label=f"lam{lam}", rounds=rounds, before=0.96 - 0.01 * rounds * lam, after=0.9 - lam * rounds
        )
        for lam in (0.05, 0.02)
        for rounds in (8, 2)
    ]
    points = accumulative_points(rows(runs))["none"]
    assert list(points) == ["lam = 0.02", "lam = 0.05"]
    assert [point.rounds for point in points["lam = 0.05"]] == [2, 8]
    longest = points["lam = 0.05"][1]
    assert longest.before.mean == pytest.approx(0.956)
    assert longest.after.mean == pytest.approx(0.5)


def test_other_settings_that_differ_name_the_line(federated: Make) -> None:
    runs = [federated(label=trigger, lam=0.02, trigger=trigger) for trigger in ("clean", "reversed")]
    points = accumulative_points(rows(runs))["none"]
    assert set(points) == {"lam = 0.02, trigger = clean", "lam = 0.02, trigger = reversed"}


def test_runs_without_a_trigger_are_no_points(federated: Make) -> None:
    reached = federated(seed=1, lam=0.02, before=0.5)
    halted = replace(reached, summary={**reached.summary, "drop": None, "accuracy_after_trigger": None})
    ((point,),) = accumulative_points(rows([federated(lam=0.02), halted]))["none"].values()
    assert (point.before.values, point.after.values) == ((0.95,), (0.7,))
    assert secrecy(rows([halted])) is None


def test_secrecy_says_how_to_read_it(federated: Make) -> None:
    drawing = secrecy(rows([federated(lam=0.02), federated(lam=0.02, defence="wide", after=0.9)]))
    assert drawing is not None
    assert "towards the bottom right is worse" in drawing.caption
    assert "95.0 to 70.0 percent after 3 rounds" in drawing.alt
    assert drawing.png.startswith(b"\x89PNG")


def test_convergence_needs_two_defences_and_no_attack(federated: Make) -> None:
    clean = [federated("clean", defence=d, after=after) for d, after in (("none", 0.97), ("narrow", 0.91))]
    drawing = convergence(rows(clean))
    assert drawing is not None
    assert "none: ends at 97.0 percent. narrow: ends at 91.0 percent." in drawing.alt
    assert convergence(rows([clean[0], federated(defence="narrow")])) is None


def test_convergence_follows_the_longest_federation(federated: Make) -> None:
    lengths = ((3, 0.5), (9, 0.97))
    clean = [federated("clean", defence=d, rounds=n, after=end) for d in ("none", "wide") for n, end in lengths]
    drawing = convergence(rows(clean))
    assert drawing is not None
    assert "50.0" not in drawing.alt
    assert drawing.alt.count("97.0") == 2


def test_the_same_runs_give_the_same_bytes(federated: Make) -> None:
    runs = [federated(attack, defence=d, lam=0.02) for attack in ("clean", "accumulative") for d in ("none", "wide")]
    first, second = federated_drawings(rows(runs)), federated_drawings(rows(runs))
    assert len(first) == 2
    assert [(one.svg, one.png) for one in first] == [(one.svg, one.png) for one in second]


def test_online_runs_get_none_of_it(make_run: Make) -> None:
    assert (
        federated_drawings(rows([make_run(), make_run(attack="clean"), make_run(attack="clean", defence="clip")])) == []
    )


def test_the_report_holds_figures_and_table(federated: Make, save_run: Save, tmp_path: Path) -> None:
    for attack in ("clean", "accumulative"):
        for defence in ("none", "wide"):
            save_run(federated(attack, defence=defence, lam=0.02, folder=tmp_path / "store"))
    paths = build_report([tmp_path / "store" / "3"], tmp_path / "out")
    html = paths.html.read_text(encoding="utf-8")
    assert "After the trigger round, by bound" in html
    assert "Secrecy against destruction" in html
    assert "Convergence under each defence" in html
    assert "No attacked run stored images" not in html
    assert "rounds until the trigger" in html
    assert '<th scope="col">phase (rounds)</th>' in html
    assert "phase (batches)" not in html
    assert {path.name for path in paths.figures} >= {"secrecy-digits-small_cnn.svg", "convergence-digits-small_cnn.png"}
