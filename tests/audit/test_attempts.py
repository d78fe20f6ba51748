"""What an attacker knows of a target's defence."""

import pytest

from mithridate.audit.attempts import gates_of
from mithridate.core.defence import Defence
from mithridate.defences.chain import chain
from mithridate.defences.clip import Clip
from mithridate.defences.filter import Filter
from mithridate.defences.gate import Gate
from mithridate.defences.promote import Promote

GATE, PROMOTE = Gate(), Promote()


@pytest.mark.parametrize(
    ("defence", "gates"),
    [(None, []), (Filter(), []), (Clip(), []), (GATE, [GATE]), (chain(Clip(), GATE, PROMOTE), [GATE, PROMOTE])],
    ids=str,
)
def test_the_gates_of_a_defence_are_found_in_a_chain_and_nowhere_else(
    defence: Defence | None, gates: list[object]
) -> None:
    found: list[object] = [*gates_of(defence)]
    assert found == gates
