from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mithridate.bench.store import Run
from mithridate.report import build_report
from mithridate.report.doubts import examine
from mithridate.report.federation import by_bound
from mithridate.report.findings import headline, setting
from mithridate.report.rows import rows
from mithridate.report.tables.results import columns
from mithridate.report.terminal import summary_table

Make = Callable[..., Run]
Save = Callable[[Run], Run]


def test_words_say_rounds_and_clients(federated: Make) -> None:
    found = rows([federated("clean", after=0.95), federated("direct", after=0.97, before=0.98), federated()])
    sentence, details = headline(found)
    assert sentence.startswith("One round cost 25.0 points (n = 1) after a quiet phase of 3 rounds")
    assert "the same kind of round alone (direct) cost 1.0 points" in sentence
    assert "batch" not in sentence + " ".join(details) + setting(found)
    assert "25 clients" in setting(found)
    assert "up to 100.0 % of the clients were hostile" in setting(found)
    assert "phase (rounds)" in columns(found)
    assert "phase\nrounds" in [column.header for column in summary_table(found).columns]


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


def test_columns_stand_in_the_order_of_the_paper(federated: Make, clips: Mapping[str, object]) -> None:
    found = rows([federated("clean", defence=name) for name in clips])
    assert [row.defence for row in by_bound(found)] == ["none", "wide", "narrow", "linf-1"]


@pytest.mark.slow
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
