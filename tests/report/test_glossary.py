"""Every component that comes with the library is explained on a page that names it."""

from collections.abc import Callable, Mapping

import pytest

from mithridate.bench.store import Run
from mithridate.core.kind import Kind
from mithridate.core.registry import entries
from mithridate.report.glossary import ATTACKS, DEFENCES, DETECTORS, UPDATE_ATTACKS, explained
from mithridate.report.rows import rows

Make = Callable[..., Run]


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        (("attack",), ATTACKS),
        (("update_attack",), UPDATE_ATTACKS),
        (("defence", "aggregator"), DEFENCES),
        (("detector",), DETECTORS),
    ],
)
def test_every_component_is_explained(kinds: tuple[Kind, ...], told: Mapping[str, str]) -> None:
    library = {name for kind in kinds for name, entry in entries(kind).items() if entry.built_in}
    assert set(told) == library


def test_names_are_told_with_their_labels_and_the_words_around_them(make_run: Make) -> None:
    labels = [make_run(label=f"strong {i}", defence=d) for i in range(2) for d in ("none", "clip")]
    words = explained(rows([*labels, make_run(attack="clean"), make_run(attack="mine_alone")]))
    assert words["strong 0 and strong 1 (attack)"] == ATTACKS["accumulative"]
    assert words["clip (defence)"] == DEFENCES["clip"]
    assert words["clean (attack)"] == ATTACKS["clean"]
    assert not [name for name in words if "mine_alone" in name]  # of a plug-in nothing is known
    assert words["phase"] == "the batches before the trigger"
    many = explained(rows([make_run(label=f"a{i}") for i in range(9)]))
    assert many["accumulative (attack)"] == ATTACKS["accumulative"]


def test_a_federation_has_its_own_words(federated: Make) -> None:
    words = explained(rows([federated("accumulative"), federated("clean")]))
    assert words["accumulative (attack)"] == UPDATE_ATTACKS["accumulative"]
    assert words["phase"] == "the rounds before the trigger"


def test_the_parts_of_a_chain_are_named_and_explained(make_run: Make) -> None:
    parts = [{"name": "gate"}, {"name": "ema"}]
    run = make_run(config={"defence": {"name": "chain", "label": "both", "parts": parts}}, defence_label="both")
    words = explained(rows([run]))
    assert words["both (defence)"] == "several defences, one after the other: gate and ema"
    assert (words["gate (defence)"], words["ema (defence)"]) == (DEFENCES["gate"], DEFENCES["ema"])
