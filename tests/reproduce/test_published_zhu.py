"""The printed numbers of Zhu et al.: every row and column of every table is there, and each item finds its runs."""

from collections.abc import Sequence
from itertools import product

import pytest

from mithridate.reproduce.item import PACKAGE, SCALES, PublishedCell, item_names, read_item, read_published

OUTCOME = ("start", "batches", "before", "after", "change")
DEFENCES = ("ST", "GC", "AT", "DSC")
INTERVALS = tuple(map(str, range(4, 37, 4)))
THRESHOLDS = ("0.8+0.02m", "0.5+0.02m", "0.4+0.02m", "0.3+0.02m", "0.1+0.02m")
SETS = ("CIFAR-10", "SVHN", "CIFAR-100")

HEADINGS: dict[int, dict[str, Sequence[str]]] = {
    1: {"data": SETS, "attack": ("Clean Oracle", "Accu. Poison"), "defence": DEFENCES, "measure": OUTCOME},
    2: {
        "defence": ("DSC",),
        "attack": ("PGD", "KL (TRADES)", "CW_inf"),
        "measure": ("start", "before", "after", "change"),
    },
    3: {"defence": ("ST",), "beta": ("0", "0.05", "0.1", "0.2"), "measure": ("start", "before", "after", "change")},
    4: {
        "data": ("CIFAR-10",),
        "model": ("ResNet", "VGG-11", "SmallCNN"),
        "k": INTERVALS,
        "measure": ("discrepancy_clean", "discrepancy_poisoned"),
    },
    5: {"data": SETS, "defence": DEFENCES, "measure": ("seconds", "after")},
    6: {"data": SETS, "batch": tuple(map(str, range(1, 12))), "measure": ("discrepancy_clean",)},
    7: {
        "data": ("CIFAR-10",),
        "stream": ("Clean", "Poison"),
        "threshold": THRESHOLDS,
        "batch": tuple(map(str, range(1, 9))),
        "measure": ("accuracy",),
    },
    8: {"threshold": ("High P", "Medium P", "Low P"), "measure": ("accuracy", "attack_success")},
    9: {"epoch": ("10", "20", "30"), "threshold": ("as for epoch 20", "adjusted"), "measure": OUTCOME},
    10: {"defence": ("ST", "AT", "TRADES", "MART", "MMD", "FAT", "DSC"), "measure": OUTCOME},
    12: {"data": ("CIFAR-10", "CIFAR-100"), "measure": ("start", "after", "flagged_clean")},
    13: {
        "attack": ("Clean Oracle", "Accu. Poisoned"),
        "defence": ("ST", "GC", "DGC"),
        "round": ("10", "100", "200", "300", "400", "500"),
        "measure": ("accuracy",),
    },
}
"""The headings of each table but the eleventh, whose rows are no product."""

ACCESS = ("White-box", "Black-box [30]", "Black-box [20]", "Black-box [10]")


def headings_of(number: int) -> tuple[list[str], list[tuple[str, ...]]]:
    """Key columns, and what each printed number stands under."""
    if number == 11:
        rows = [("CIFAR-10 (Clean Oracle)", "-"), *(("Accu. Poison (DSC)", access) for access in ACCESS)]
        return ["attack", "access"], [(*row, measure) for row in rows for measure in OUTCOME]
    columns = HEADINGS[number]
    return [key for key in columns if key != "measure"], list(product(*columns.values()))


def published(number: int) -> list[PublishedCell]:
    keys, _ = headings_of(number)
    return read_published(PACKAGE, f"zhu2023-table{number}.csv", set(keys))


def cell(number: int, *under: str) -> PublishedCell:
    (found,) = (c for c in published(number) if (*c.keys.values(), c.measure) == under)
    return found


@pytest.mark.parametrize("number", range(1, 14))
def test_each_row_and_column_is_there_once(number: int) -> None:
    keys, expected = headings_of(number)
    cells = published(number)
    assert all(list(c.keys) == keys for c in cells)
    assert sorted((*c.keys.values(), c.measure) for c in cells) == sorted(expected)


def test_empty_are_only_the_dashes_of_the_paper_and_what_our_copy_does_not_show() -> None:
    empty: set[tuple[str | int, ...]] = {
        (number, *c.keys.values(), c.measure) for number in range(1, 14) for c in published(number) if c.value is None
    }
    dashes: set[tuple[str | int, ...]] = {(11, "CIFAR-10 (Clean Oracle)", "-", m) for m in ("batches", "change")}
    dashes |= {(1, s, "Clean Oracle", d, m) for s, d, m in product(SETS, DEFENCES, ("batches", "change"))}
    ends = dict(zip(THRESHOLDS, (4, 5, 5, 5, 5), strict=True))
    dashes |= {(7, "CIFAR-10", "Poison", p, str(m), "accuracy") for p, end in ends.items() for m in range(end + 1, 9)}
    unreadable: set[tuple[str | int, ...]] = {(1, "CIFAR-10", "Clean Oracle", "GC", m) for m in ("before", "after")}
    unreadable |= {(4, "CIFAR-10", "SmallCNN", k, "discrepancy_poisoned") for k in ("4", "8")}
    unreadable |= {(4, "CIFAR-10", "SmallCNN", "8", "discrepancy_clean")}
    unreadable |= {(9, epoch, "adjusted", "batches") for epoch in ("10", "20", "30")}
    assert empty == dashes | unreadable


def test_a_spread_is_given_where_the_paper_prints_one() -> None:
    spread = {1: 36, 9: 18, 10: 21, 11: 12}
    for number in range(1, 14):
        assert sum(c.std is not None for c in published(number)) == spread.get(number, 0)


@pytest.mark.parametrize(
    ("number", "under", "value", "std"),
    [
        (1, ("CIFAR-10", "Accu. Poison", "ST", "after"), 50.4, 5.03),
        (1, ("SVHN", "Accu. Poison", "DSC", "batches"), 9, None),
        (1, ("CIFAR-100", "Clean Oracle", "GC", "after"), 60.2, None),
        (2, ("DSC", "KL (TRADES)", "change"), -3.04, None),
        (3, ("ST", "0.2", "after"), 74.9, None),
        (4, ("CIFAR-10", "VGG-11", "36", "discrepancy_poisoned"), 14.53571, None),
        (4, ("CIFAR-10", "SmallCNN", "12", "discrepancy_poisoned"), 1.08457, None),
        (5, ("SVHN", "DSC", "seconds"), 0.0689, None),
        (6, ("CIFAR-100", "8", "discrepancy_clean"), 3.3778, None),
        (7, ("CIFAR-10", "Poison", "0.8+0.02m", "4", "accuracy"), 66.5, None),
        (7, ("CIFAR-10", "Clean", "0.3+0.02m", "5", "accuracy"), 87, None),
        (8, ("Medium P", "attack_success"), 37.5, None),
        (9, ("20", "adjusted", "after"), 77.8, 0.22),
        (9, ("30", "as for epoch 20", "change"), -13.6, 4.64),
        (10, ("MART", "change"), -9.1, 1.2),
        (11, ("Accu. Poison (DSC)", "Black-box [10]", "before"), 82.5, 0.02),
        (12, ("CIFAR-100", "flagged_clean"), 24, None),
        (13, ("Accu. Poisoned", "DGC", "500", "accuracy"), 79.84, None),
    ],
)
def test_numbers_typed_in_again_agree(number: int, under: tuple[str, ...], value: float, std: float | None) -> None:
    found = cell(number, *under)
    assert (found.value, found.std) == (value, std)


def test_a_change_is_the_difference_of_the_accuracies_beside_it() -> None:
    printed_otherwise = {("SVHN", "Accu. Poison", "ST"), ("20", "adjusted"), ("30", "adjusted")}
    for number in (1, 2, 3, 9, 10, 11):
        by_row: dict[tuple[str, ...], dict[str, float]] = {}
        for c in published(number):
            if c.value is not None:
                by_row.setdefault(tuple(c.keys.values()), {})[c.measure] = c.value
        for row, values in by_row.items():
            if "change" in values and row not in printed_otherwise:
                assert values["change"] == pytest.approx(values["after"] - values["before"], abs=0.15)


NAMES = [name for name in item_names() if name.startswith("zhu2023-")]


def test_each_table_and_figure_is_an_item() -> None:
    assert [*(f"zhu2023-table{n}" for n in range(1, 14)), *(f"zhu2023-figure{n}" for n in range(1, 13))] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_printed_value_and_every_claim_is_about_some_runs(name: str) -> None:
    item = read_item(name)
    assert item.checks
    if item.table is not None:
        named = {key: set(choices) for key, choices in item.table.choices.items()}
        for c in item.table.cells:
            assert all(value in named[key] for key, value in c.keys.items())
            assert item.table.selection(c) is not None
    recipes = {scale: [part.recipe(scale) for part in item.parts] for scale in SCALES}
    for check in item.checks:
        for selection in (s for part in check.parts for s in part.selections):
            for label in ("attack", "defence", "variant"):
                wanted = dict(selection.where).get(label, ())
                present = {
                    {"attack": cell.attack.label, "defence": cell.defence.label, "variant": cell.recipe.variant}[label]
                    for scale in ("paper", "small")
                    for recipe in recipes[scale]
                    for cell in recipe.cells()
                }
                assert not wanted or any(p == w or p.startswith(f"{w}+") for p in present for w in wanted)
