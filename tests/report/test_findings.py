from collections.abc import Callable
from dataclasses import replace

import pytest

from mithridate.bench.store import Run
from mithridate.report.findings import findings, headline, key_numbers, setting, strongest
from mithridate.report.rows import Row, rows

Make = Callable[..., Run]
MakeRow = Callable[..., Row]

QUIET = (0.98, 0.97, 0.96, 0.96, 0.96)


def controls(make_row: MakeRow) -> list[Row]:
    return [
        make_row(-0.001, -0.001, 0.0, attack="clean"),
        make_row(0.01, 0.02, 0.0, attack="noise"),
        make_row(0.009, 0.01, 0.008, attack="vanilla", accuracies=(0.98,)),
    ]


def test_the_finding_of_the_paper(make_row: MakeRow) -> None:
    made = [
        *controls(make_row),
        make_row(0.18, 0.19, 0.176, accuracies=QUIET),
        make_row(0.03, 0.031, 0.029, defence="clip"),
    ]
    sentence, details = headline(made)
    assert sentence == (
        "One batch cost 18.2 points (n = 3) after a quiet phase of 4 batches; "
        "the same kind of batch alone (vanilla) cost 0.9 points (n = 3)."
    )
    assert details == (
        "The attack is accumulative.",
        "Random noise cost 1.0 points (n = 3).",
        "Without an attack the trigger step gained 0.1 points (n = 3).",
        "Under clip it cost 3.0 ± 0.1 points (n = 3).",
    )


def test_a_loud_phase_is_not_called_quiet(make_row: MakeRow) -> None:
    loud = make_row(0.18, 0.19, 0.2, accuracies=(0.98, 0.9), alarms={1: "too loud"})
    sentence, _ = headline([*controls(make_row), loud])
    assert "after a phase of 1 batch that had already cost 8.0 points and raised alarms in 3 of 3 runs" in sentence
    assert "quiet" not in sentence


def test_an_attack_like_noise_is_not_a_finding(make_row: MakeRow) -> None:
    noise = make_row(0.17, 0.19, 0.18, attack="noise")
    assert headline([noise, make_row(0.18, 0.18, 0.18)])[0].startswith("No attack is shown to work: the largest drop")


def test_a_drop_that_may_be_chance_is_not_a_finding(make_row: MakeRow) -> None:
    assert headline([make_row(0.5, 0.0, -0.1)])[0].startswith("No attack is shown to work")


def test_a_shown_attack_is_preferred_to_a_larger_chance(make_row: MakeRow) -> None:
    sentence, details = headline([make_row(0.6, 0.0, 0.0, label="wild"), make_row(0.1, 0.11, 0.1, label="steady")])
    assert sentence.startswith("One batch cost 10.3 points")
    assert details[0] == "The attack is steady."


def test_two_numbers_say_what_the_attack_cost_and_what_stands_against_it(make_row: MakeRow) -> None:
    def said(rows: list[Row]) -> list[tuple[str, str]]:
        return [(number.value, number.says) for number in key_numbers(rows)]

    clean, noise, alone = controls(make_row)
    attack = make_row(0.18, 0.19, 0.176, accuracies=QUIET)
    lost = ("18.2 points", "lost in one batch of accumulative, n = 3")
    assert said([clean, noise, alone, attack]) == [lost, ("0.9 points", "lost in such a batch alone (vanilla), n = 3")]
    assert said([clean, noise, attack]) == [lost, ("1.0 points", "lost in a batch of noise, n = 3")]
    assert said([clean, attack]) == [lost, ("0.1 points", "gained in a batch of clean, n = 3")]
    assert said([attack]) == [lost]
    assert said([clean]) == [("0.1 points", "gained in the trigger step of clean, n = 3")]
    (weak,) = key_numbers([make_row(0.5, 0.0, -0.1)])
    assert "not shown to be more than chance" in weak.says
    assert key_numbers([make_row(0.1, after=None)]) == ()


def test_a_phase_of_unknown_cost_is_not_called_quiet(make_row: MakeRow) -> None:
    assert "a quiet phase of" in headline([make_row(0.2, 0.2, accuracies=QUIET)])[0]
    (sentence, _) = headline([make_row(0.2, 0.2, accuracies=QUIET, summary={"accuracy_start": None})])
    assert "quiet" not in sentence
    assert "that had a cost that was not measured" in sentence


def test_unequal_budgets_are_not_the_same_kind(make_row: MakeRow) -> None:
    alone = make_row(0.01, 0.01, attack="vanilla", accuracies=(0.98,), eps=0.1)
    assert "; a batch alone (vanilla) cost 1.0 points" in headline([alone, make_row(0.2, 0.2)])[0]


def test_an_unpoisoned_trigger_is_compared_with_no_attack(make_row: MakeRow) -> None:
    sentence, _ = headline([make_row(0.0, 0.0, attack="clean"), make_row(0.2, 0.2, poisoned_trigger=False)])
    assert sentence.startswith("One unpoisoned batch cost 20.0 points")
    assert "alone (clean) cost 0.0 points" in sentence


def test_a_batch_alone_is_said_to_be_alone(make_row: MakeRow) -> None:
    assert headline([make_row(0.2, 0.2, attack="vanilla", accuracies=(0.98,))])[0] == (
        "One batch alone cost 20.0 points (n = 2) (vanilla)."
    )


def test_without_an_undefended_cell_the_defence_is_named(make_row: MakeRow) -> None:
    assert "points (n = 2) under clip after" in headline([make_row(0.2, 0.2, defence="clip")])[0]


def test_nothing_attacked_and_nothing_triggered(make_run: Make, make_row: MakeRow) -> None:
    assert headline([make_row(0.01, attack="clean")])[0].startswith("There is no attack in these runs to judge")
    halted = make_run(after=None, status="halted")
    assert headline(rows([halted]))[0] == "No attack reached its trigger."
    assert headline(rows([make_run(attack="clean", after=None, status="halted")]))[0].startswith("Nothing was attacked")


def test_halted_defended_runs_are_counted(make_run: Make, make_row: MakeRow) -> None:
    stopped = rows([make_run(defence="clip", seed=seed, after=None, status="halted") for seed in (0, 1)])
    _, details = headline([make_row(0.2, 0.2), *stopped])
    assert details[-1] == "Under clip it did not reach its trigger; a monitor stopped 2 of 2 runs before the trigger."


def test_a_defence_is_named_with_what_it_held_and_what_it_cost(defended_rows: list[Row]) -> None:
    _, details = headline(defended_rows)
    assert details[-2:] == (
        "Under dsc it cost 5.0 ± 1.0 points (n = 3) and left 91.0 ± 1.0 %; a clean stream left 94.0 ± 2.0 %, "
        "2.0 ± 1.0 points below no defence (n = 3).",
        "Under gate it cost 1.0 ± 0.0 points (n = 3) and left 95.0 ± 0.0 %; a clean stream left 96.0 ± 1.0 %, "
        "as without a defence (n = 3).",
    )


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ((0.02, -0.01, 0.0), "0.3 ± 1.5 points below no defence (n = 3, within its spread)"),
        ((-0.02, -0.021, -0.022), "2.1 ± 0.1 points above no defence (n = 3)"),
        ((0.02,), "2.0 points below no defence (one seed)"),
    ],
)
def test_what_a_clean_stream_cost_is_only_as_strong_as_the_seeds(
    make_row: MakeRow, costs: tuple[float, ...], said: str
) -> None:
    made = [
        *controls(make_row),
        make_row(0.2, 0.2, 0.2),
        make_row(0.1, 0.1, 0.1, defence="clip"),
        make_row(
            *(end + cost for end, cost in zip((-0.001, -0.001, 0.0), costs, strict=False)),
            attack="clean",
            defence="clip",
        ),
    ]
    assert headline(made)[1][-1].endswith(f", {said}.")


def test_a_defence_without_an_undefended_clean_stream_is_not_compared(make_row: MakeRow) -> None:
    made = [make_row(0.2, 0.2), *(make_row(0.1, 0.1, attack=a, defence="clip") for a in ("accumulative", "clean"))]
    assert headline(made)[1][-1] == (
        "Under clip it cost 10.0 ± 0.0 points (n = 2) and left 86.0 ± 0.0 %; a clean stream left 86.0 ± 0.0 %."
    )


def test_the_strongest_attack_is_the_one_that_is_shown_to_work(make_row: MakeRow) -> None:
    wild, steady = make_row(0.6, 0.0, 0.0, label="wild"), make_row(0.1, 0.11, 0.1, label="steady")
    assert strongest([wild, steady]) is steady
    assert strongest([wild]) is wild
    assert strongest([make_row(0.3, attack="noise"), make_row(0.0, attack="clean")]) is None


def test_the_setting_is_read_from_the_runs(make_row: MakeRow) -> None:
    made = [*controls(make_row), make_row(0.2, 0.2, 0.2, defence="clip")]
    assert setting(made) == (
        "A small_cnn that keeps learning from a stream of digits after a burn-in of 12 epochs was attacked by noise, "
        "vanilla and accumulative, under the defences none and clip: 12 runs, seeds 0, 1, 2. "
        "No pixel was moved by more than 0.200 of its range [0, 1]."
    )


def test_the_setting_says_on_how_many_samples_was_read(make_run: Make) -> None:
    def run(seed: int, read: int | None) -> Run:
        made = make_run(seed=seed, summary={} if read is None else {"read_samples": read})
        return replace(made, trace=[{**row, "test_samples": 10_000} for row in made.trace])

    assert setting(rows([run(0, 1000), run(1, 1000)])).endswith(
        " What attackers and monitors had read when a phase ended is accuracy on 1,000 of 10,000 test samples; the "
        "results are of all."
    )
    assert " on 1,000 of 10,000 test samples in 1 of 2 runs;" in setting(rows([run(0, 1000), run(1, 10_000)]))
    for read in (10_000, None):
        assert "had read" not in setting(rows([run(0, read)]))


def test_one_finding_a_group(make_run: Make) -> None:
    assert [f.subject for f in findings(rows([make_run(), make_run(dataset="mnist")]))] == [
        "small_cnn on digits",
        "small_cnn on mnist",
    ]
