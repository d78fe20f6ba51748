"""Two processes that train one model: a step that one of them objects to moves neither."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from mithridate.core.defence import Defence, Verdict
from mithridate.core.past import Weights
from mithridate.core.view import Need, View
from mithridate.guard.loop import Guard
from mithridate.guard.ranks import agreed

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Says(Defence):
    """Objects at one step, or shortens every step to a multiple of its own."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})

    objects_at: int = -1
    shortens: float = 1.0

    def admit(self, before: Weights, view: View) -> Verdict:
        if view.step == self.objects_at + 1:  # the step being judged counts already
            return Verdict(False, "this rank objects")
        if self.shortens == 1.0:
            return Verdict(True)
        now = view.model.module.named_parameters()
        shorter = {n: before.parameters[n] + self.shortens * (p.detach() - before.parameters[n]) for n, p in now}
        return Verdict(True, parameters=shorter)


DEFENCES: dict[str, Callable[[int], Defence | str]] = {
    "objects": lambda rank: Says(objects_at=1 if rank == 1 else -1),
    "shortens": lambda rank: Says(shortens=0.5 if rank == 1 else 0.25),
    "parts": lambda rank: Says(shortens=0.5 if rank == 1 else 1.0),
    "gate": lambda _: "gate",
}


def _trained(rank: int, defence: Defence | str) -> tuple[int, int, list[list[Tensor]]]:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model = DistributedDataParallel(inner)
    optimiser = torch.optim.AdamW(model.parameters(), 0.1)
    trusted = (torch.eye(6).repeat(5, 1), torch.arange(30) % 3)
    guard = Guard(model, optimiser, defence=defence, trusted=trusted)
    states = []
    for i in range(3):
        rng = torch.Generator().manual_seed(10 * i + rank)
        with guard.step((torch.randn(8, 6, generator=rng), torch.arange(8) % 3)) as (x, y):
            optimiser.zero_grad()
            torch.autograd.backward(functional.cross_entropy(model(x), y))
            optimiser.step()
        states.append([p.detach().clone() for p in inner.parameters()])
    return guard.steps, guard.refused, states


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({case: _trained(rank, make(rank)) for case, make in DEFENCES.items()}, Path(folder) / f"{rank}.pt")
    dist.barrier()  # who leaves first would tear the connection from the other
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes came to, in every case."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_process, (str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", list(DEFENCES))
def test_ranks_stay_one_model(ranks: list[dict[str, Any]], case: str) -> None:
    first, second = (each[case] for each in ranks)
    assert first[:2] == second[:2]
    for one, two in zip(first[2], second[2], strict=True):
        assert all(map(torch.equal, one, two))


def test_one_rank_that_objects_speaks_for_both(ranks: list[dict[str, Any]]) -> None:
    for each in ranks:
        steps, refused, states = each["objects"]
        assert (steps, refused) == (1, 2)  # the second step is tried, and objected to, twice
        assert all(map(torch.equal, states[0], states[2]))


def test_a_shortened_step_is_the_first_ranks_and_ranks_that_part_are_refused(ranks: list[dict[str, Any]]) -> None:
    for each in ranks:
        assert each["shortens"][:2] == (3, 0)
        assert each["parts"][:2] == (0, 3)


def test_one_process_keeps_its_own_word() -> None:
    verdict = Verdict(False, "no")
    assert agreed(verdict, nn.Linear(1, 1)) is verdict
