from collections.abc import Callable

from mithridate.report.comparisons import noise_of, undefended
from mithridate.report.rows import Row

MakeRow = Callable[..., Row]


def test_undefended_is_the_same_attack_on_the_same_data(make_row: MakeRow) -> None:
    none, other, elsewhere = make_row(0.1), make_row(0.1, label="other"), make_row(0.1, dataset="mnist")
    defended = make_row(0.1, defence="clip")
    assert undefended(defended, [elsewhere, other, defended, none]) is none
    assert undefended(defended, [elsewhere, other]) is None
    assert undefended(none, [none]) is None


def test_noise_of_the_same_budget_is_the_bar(make_row: MakeRow) -> None:
    loud = make_row(0.3, attack="noise", label="loud", eps=0.4)
    same = make_row(0.01, attack="noise", label="same", eps=0.2)
    attack = make_row(0.1)
    assert noise_of(attack, [loud, same, attack]) is same
    assert noise_of(attack, [loud, attack]) is loud
    assert noise_of(attack, [attack]) is None
