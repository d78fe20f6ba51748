"""What an attacker sees of a round, and what an update attack is by default."""

import dataclasses

import torch
from torch import Generator, Tensor

from mithridate.core.update_attack import Honest, UpdateAttack
from mithridate.core.view import View

ROWS = torch.tensor([[1.0, 2.0], [3.0, -2.0], [5.0, 0.0]])
OWN = torch.tensor([[10.0, 0.0], [0.0, 10.0]])


def honest_of(asked: list[int]) -> Honest:
    def gradients(x: Tensor, y: Tensor) -> Tensor:
        asked.append(len(x))
        return OWN + y.float()

    x, y = torch.rand(2, 4, 1, 8, 8), torch.zeros(2, 1, dtype=torch.int64)
    return Honest(ROWS.sum(0), 0.5 * ROWS.sum(0), 3, x, y, None, gradients)


def test_the_hostile_clients_own_updates_are_made_when_they_are_looked_at_and_once() -> None:
    asked: list[int] = []
    honest = honest_of(asked)
    assert (honest.hostile, honest.clients) == (2, 5)
    assert asked == []
    assert torch.equal(honest.own, OWN)
    assert torch.equal(honest.mean, (ROWS.sum(0) + OWN.sum(0)) / 5)  # of rows that nobody has bounded
    assert asked == [2]


def test_a_sum_forms_no_row_that_nobody_has_looked_at() -> None:
    asked: list[int] = []
    honest = dataclasses.replace(honest_of(asked), summed=lambda x, y: OWN.sum(0))
    assert torch.equal(honest.mean, (ROWS.sum(0) + OWN.sum(0)) / 5)
    assert asked == []
    assert torch.equal(honest.own, OWN)

    def never(x: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("the rows are there")

    seen = dataclasses.replace(honest_of([]), summed=never)
    assert torch.equal(seen.own.sum(0), seen.own_total)


def test_the_trigger_is_sent_as_any_round_by_default() -> None:
    class Echo(UpdateAttack):
        @property
        def ratio(self) -> float:
            return 0.4

        def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
            return honest.own

    attack, honest = Echo(), honest_of([])
    assert torch.equal(attack.craft_trigger(honest, View(), Generator()), OWN)
    assert attack.ready(View()) is False
    attack.after_step(View(), Generator())
    assert (attack.needs, attack.lookback, attack.control, attack.every_row) == (frozenset(), 0, False, False)
    assert UpdateAttack.__abstractmethods__ == {"ratio", "craft"}
