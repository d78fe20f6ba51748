"""The numbers of Pang et al., NeurIPS 2021, as data: each row and column of each table is there, and once."""

import csv
from importlib.resources import files
from itertools import product

import pytest

BUDGETS = ("8/255", "16/255", "0.1")
PHASE = "+ accumulative phase"
MOMENTUM, SVAL, OPTIMISED = f"{PHASE} + weight momentum", f"{PHASE} + re-sampling Sval", f"{PHASE} + optimizing P"
BOTH = f"{OPTIMISED} + weight momentum"
AROUND = ("before", "after", "change")
SCALINGS = ("1", "10", "20", "50")
LAMS = ("0.01", "0.02", "0.05", "0.08")
LINF = ("No clip", "linf 10", "linf 1", "linf 0.1")
BOUNDS = ("No clip", "l2 10", "l2 1", "l2 0.1", *LINF[1:])

Heading = tuple[str, ...]


def tricks(of_clean: tuple[str, ...], of_poisoned: tuple[str, ...]) -> set[Heading]:
    """Tables 1 and 7: their rows nest, and each prints accuracy around the trigger and its change."""
    clean = product(["Clean trigger"], ["-"], of_clean, AROUND)
    return {*clean, *product(["Poisoned trigger"], BUDGETS, of_poisoned, AROUND)}


def bounds(phase: str, lams: tuple[str, ...], clips: tuple[str, ...]) -> set[Heading]:
    """Tables 3 to 5: direct and accumulative rows against clipping."""
    direct = product(["Poisoned trigger"], SCALINGS, clips, ["after"])
    return {*direct, *product([phase], lams, clips, ["after"])}


HEADINGS: dict[str, set[Heading]] = {
    "table1": tricks(("alone", PHASE, SVAL, MOMENTUM), ("alone", PHASE, SVAL, MOMENTUM, OPTIMISED, BOTH)),
    "table2": set(
        product(["+ Poisoned trigger P", "+ Optimizing P"], map(str, range(10, 101, 10)), ["before", "after", "drop"])
    ),
    "table3": bounds("Accumulative phase + Clean trigger", LAMS, BOUNDS),
    "table4": bounds("Accu. phase", LAMS, LINF),
    "table5": bounds("Accu. phase", ("0.08",), LINF),
    "table6": set(product(["0.01", "0.02"], ["Clean", "Poisoned"], ["50", "100", "200", "500"], ["after"])),
    "table7": tricks(("alone", PHASE, MOMENTUM), ("alone", PHASE, MOMENTUM, OPTIMISED, BOTH)),
    "figure1": {
        *product(["Poisoning attack", "Accumulative poisoning attack"], ["before", "after"]),
        ("Accumulative poisoning attack", "batches"),
    },
    "timing": {(f"{name} poisoning attack", "craft_seconds") for name in ("Vanilla", "Accumulative")},
}
"""By table: what every printed number stands under, its measure last."""

SPOTS = [
    ("table1", ("Clean trigger", "-", "alone", "change"), (0.69, None)),
    ("table1", ("Clean trigger", "-", MOMENTUM, "after"), (70.17, 1.50)),
    ("table1", ("Poisoned trigger", "8/255", SVAL, "change"), (-3.27, 0.62)),
    ("table1", ("Poisoned trigger", "16/255", BOTH, "change"), (-11.09, 0.57)),
    ("table1", ("Poisoned trigger", "0.1", BOTH, "before"), (81.34, 0.15)),
    ("table2", ("+ Poisoned trigger P", "70", "after"), (76.10, None)),
    ("table2", ("+ Optimizing P", "10", "drop"), (6.23, None)),
    ("table3", ("Poisoned trigger", "20", "l2 10", "after"), (72.07, None)),
    ("table3", ("Poisoned trigger", "50", "linf 0.1", "after"), (82.95, None)),
    ("table3", ("Accumulative phase + Clean trigger", "0.05", "l2 1", "after"), (63.47, None)),
    ("table4", ("Accu. phase", "0.08", "linf 1", "after"), (14.23, None)),
    ("table5", ("Poisoned trigger", "20", "linf 10", "after"), (89.24, None)),
    ("table5", ("Accu. phase", "0.08", "linf 0.1", "after"), (51.28, None)),
    ("table6", ("0.02", "Poisoned", "200", "after"), (34.36, None)),
    ("table7", ("Clean trigger", "-", MOMENTUM, "before"), (80.70, 0.44)),
    ("table7", ("Poisoned trigger", "0.1", OPTIMISED, "change"), (-9.56, 1.14)),
    ("figure1", ("Accumulative poisoning attack", "after"), (27.66, None)),
    ("timing", ("Accumulative poisoning attack", "craft_seconds"), (2.47, None)),
]
"""Typed from the paper by hand, apart from the files."""

MISPRINTED = {
    ("table1", "Poisoned trigger", "8/255", SVAL),
    ("table7", "Poisoned trigger", "8/255", OPTIMISED),
}
"""Rows of the paper whose three numbers do not add up, by 1.00 each."""


def published(name: str) -> list[tuple[Heading, float, float | None]]:
    """The lines of a file: headings and measure, value, standard deviation."""
    text = files("mithridate.reproduce").joinpath(f"published/pang2021-{name}.csv").read_text(encoding="utf-8")
    lines = []
    for line in csv.DictReader(text.splitlines()):
        std = line.pop("std")
        value = float(line.pop("value"))
        lines.append((tuple(line.values()), value, float(std) if std else None))
    return lines


@pytest.mark.parametrize("name", HEADINGS)
def test_every_row_and_column_is_there_once(name: str) -> None:
    found = [heading for heading, _, _ in published(name)]
    assert len(found) == len(set(found))
    assert set(found) == HEADINGS[name]


@pytest.mark.parametrize(("name", "heading", "printed"), SPOTS)
def test_numbers_are_the_papers(name: str, heading: Heading, printed: tuple[float, float | None]) -> None:
    assert {heading: (value, std) for heading, value, std in published(name)}[heading] == printed


@pytest.mark.parametrize("name", HEADINGS)
def test_percentages_and_deviations_are_possible(name: str) -> None:
    for heading, value, std in published(name):
        if heading[-1] in {"before", "after"}:
            assert 10 <= value <= 100
        assert std is None or 0 < std < 2.5


@pytest.mark.parametrize("name", ["table1", "table7"])
def test_rows_with_a_phase_have_deviations_and_add_up(name: str) -> None:
    """A number read from a neighbouring row would not: the change is what was printed around the trigger."""
    numbers = {heading: (value, std) for heading, value, std in published(name)}
    for row in {heading[:-1] for heading in numbers}:
        (before, a), (after, b), (change, c) = (numbers[(*row, measure)] for measure in AROUND)
        assert ("accumulative" in row[-1]) == all((a, b, c))
        off = 1.0 if (name, *row) in MISPRINTED else 0.0
        assert abs(after - before - change) == pytest.approx(off, abs=0.011)  # means that were rounded apart


def test_ratios_add_up() -> None:
    numbers = {heading: value for heading, value, _ in published("table2")}
    for trigger, ratio in {heading[:2] for heading in numbers}:
        before, after, drop = (numbers[trigger, ratio, measure] for measure in ("before", "after", "drop"))
        assert drop == pytest.approx(before - after, abs=0.031)
