from collections.abc import Callable
from pathlib import Path
from typing import Any

from mithridate.bench.store import Run
from mithridate.report.doubts import examine
from mithridate.report.doubts.doubt import Severity
from mithridate.report.doubts.rules import RULES
from mithridate.report.rows import Row, rows

Make = Callable[..., Run]
MakeRow = Callable[..., Row]


def test_every_rule_can_be_asked_about_anything(make_run: Make) -> None:
    strange: list[dict[str, Any]] = [
        {"after": None, "status": "halted"},
        {"attack": "clean", "accuracies": (0.9,)},
        {"attack": "noise", "summary": {"drop": None, "first_alarm_step": "x", "steps": None}},
        {"summary": dict.fromkeys(("accuracy_start", "accuracy_before_trigger", "seed", "status"))},
        {"attack": "clean", "defence": "dsc", "summary": {"rolled_back": "x", "steps": None, "flagged_clean": True}},
    ]
    for how in strange:
        assert len(examine(rows([make_run(**how)]))) == len(RULES)
    assert len(examine(rows([make_run(**how) for how in strange]))) == len(RULES)


def test_graver_answers_come_first_and_cells_name_their_group(make_run: Make) -> None:
    answers = examine(rows([make_run(), make_run(dataset="mnist"), make_run(dataset="mnist", attack="noise")]))
    ranks = [min((list(Severity).index(d.severity) for d in a.doubts), default=9) for a in answers]
    assert ranks == sorted(ranks)
    assert all(d.cell.startswith(("small_cnn on digits: ", "small_cnn on mnist: ")) for a in answers for d in a.doubts)
    assert all(answer.meaning.endswith(".") for answer in answers)


def test_a_sound_experiment_raises_no_doubt(make_row: MakeRow) -> None:
    sound = [
        make_row(0.001, 0.0, 0.002, attack="clean"),
        make_row(0.01, 0.02, 0.01, attack="noise"),
        make_row(0.2, 0.22, 0.19),
    ]
    assert [answer.title for answer in examine(sound) if answer.doubts] == []


def test_the_page_of_doubts_has_every_rule_with_what_raises_it() -> None:
    page = Path(__file__).parents[3].joinpath("docs", "doubts.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    told = {title: raised.lower() for title, _, raised in rows}
    assert told == {answer.title: answer.meaning.removeprefix("Looks for ").lower() for answer in examine([])}
