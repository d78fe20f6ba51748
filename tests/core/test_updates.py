"""Updates are a matrix (client, parameter): by name and back, lengths and factors known without the rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from mithridate.core.updates import Updates


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


shapes = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4
)


@settings(deadline=None)
@given(shapes, st.integers(0, 2**20))
def test_a_gradient_comes_back_by_name(shapes: dict[str, list[int]], seed: int) -> None:
    generator = rng(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    gradient = Updates.of(tensors)
    assert gradient.rows.shape == (1, sum(t.numel() for t in tensors.values()))
    back = gradient.named()
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], t) and back[name].shape == t.shape for name, t in tensors.items())


def test_a_gradient_is_a_detached_copy() -> None:
    tensors = {"w": torch.ones(2, 2, requires_grad=True), "b": torch.zeros(2)}
    gradient = Updates.of(tensors)
    assert not gradient.rows.requires_grad
    gradient.rows.fill_(5)
    assert float(tensors["w"].detach().max()) == 1


def test_a_transposed_tensor_keeps_its_values() -> None:
    t = torch.arange(6.0).view(2, 3).T
    assert torch.equal(Updates.of({"t": t}).named()["t"], t)


def test_rows_are_clients() -> None:
    one = Updates.of({"w": torch.ones(2, 2), "b": torch.zeros(2)})
    many = one.with_rows(torch.arange(18.0).view(3, 6))
    assert torch.equal(many.named(2)["w"], torch.tensor([[12.0, 13.0], [14.0, 15.0]]))
    assert torch.equal(many.named(2)["b"], torch.tensor([16.0, 17.0]))
    assert torch.equal(one.rows, torch.tensor([[1.0, 1, 1, 1, 0, 0]])), "the first is a value and stays"
    many.named(1)["b"].zero_()
    assert float(many.rows[1, 4:].sum()) == 0, "named() gives views"


def test_of_a_loss_that_is_known() -> None:
    loss = torch.tensor(0.75, requires_grad=True)
    updates = Updates.of({"w": torch.ones(2)}, loss=loss)
    assert updates.losses is not None
    assert not updates.losses.requires_grad
    assert updates.losses.tolist() == [0.75]
    assert Updates.of({"w": torch.ones(2)}).losses is None


# Rows that nobody has formed yet.


ROWS = torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])
SHAPES = {"w": torch.Size([2])}


def counted(rows: Tensor, formed: list[int], **known: Tensor) -> Updates:
    def form() -> Tensor:
        formed.append(1)
        return rows

    return Updates(form, SHAPES, **known)


def test_rows_are_formed_when_first_looked_at_and_once() -> None:
    formed: list[int] = []
    updates = counted(ROWS, formed, lengths=ROWS.norm(dim=1))
    assert updates.lengths().tolist() == [5.0, 2.0, 0.0]
    half = updates.scaled(torch.tensor([0.5, 1.0, 2.0]))
    assert half.lengths().tolist() == [2.5, 2.0, 0.0]
    assert formed == []
    assert torch.equal(half.rows, torch.tensor([[1.5, 2.0], [0.0, -2.0], [0.0, 0.0]]))
    assert torch.equal(half.rows, half.rows)
    assert torch.equal(updates.rows, ROWS)
    assert formed == [1]


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("known", [False, True])
def test_lengths_are_those_of_the_rows(norm: str, known: bool) -> None:
    formed: list[int] = []
    updates = counted(ROWS, formed, **({"lengths": ROWS.norm(dim=1)} if known else {}))
    found = updates.lengths(norm)  # type: ignore[arg-type]  # parametrised
    assert found.tolist() == ([5.0, 2.0, 0.0] if norm == "l2" else [4.0, 2.0, 0.0])
    assert formed == ([] if known and norm == "l2" else [1])


def test_factors_tell_what_was_done_to_rows_of_which_only_lengths_were_known() -> None:
    updates = counted(ROWS, [], lengths=ROWS.norm(dim=1))
    assert updates.factors is not None
    assert updates.factors.tolist() == [1.0, 1.0, 1.0]
    twice = updates.scaled(torch.tensor([0.5, 1.0, 4.0])).scaled(torch.tensor([0.5, 3.0, 0.25]))
    assert twice.factors is not None
    assert twice.factors.tolist() == [0.25, 3.0, 1.0]
    assert updates.factors.tolist() == [1.0, 1.0, 1.0]
    assert twice.with_rows(ROWS).factors is None  # no factor makes those
    assert Updates(ROWS, SHAPES).scaled(torch.ones(3)).factors is None  # nobody asked


def test_who_and_how_well_comes_along() -> None:
    clients, losses = torch.tensor([7, 3, 5]), torch.tensor([0.1, 0.2, 0.3])
    updates = Updates(ROWS, SHAPES, clients=clients, losses=losses)
    for other in (updates, updates.scaled(torch.ones(3)), updates.with_rows(ROWS + 1)):
        assert other.clients is clients
        assert other.losses is losses
        assert other.shapes is SHAPES
