"""What is learned from: updates as a matrix (client, parameter). Online learning is the case of one client."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mithridate.maths.directions import Parameters
from mithridate.maths.norms import Norm, sample_norms


class Updates:
    """Clients' gradients, a row each: the parameter tensors laid end to end.

    A server that only needs lengths and scaled sums forms no rows: a `bound` that is content with `lengths` and
    `scaled` then costs it a fraction. Rows are formed when they are first looked at.

    Args:
        rows: (clients, parameters); or a function that forms them.
        shapes: Name and shape of each tensor, in that order.
        clients: (clients,) int64, whose rows they are; None where that is not known.
        losses: (clients,), the mean loss behind each row; None where that is not known.
        lengths: (clients,), l2 lengths of the rows, if they are known without the rows.
    """

    def __init__(
        self,
        rows: Tensor | Callable[[], Tensor],
        shapes: Mapping[str, torch.Size],
        *,
        clients: Tensor | None = None,
        losses: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        self._rows = rows
        self.shapes, self.clients, self.losses = shapes, clients, losses
        self._lengths = lengths
        self.factors: Tensor | None = None if lengths is None else torch.ones_like(lengths)
        """(clients,): what `scaled` has multiplied each row by so far; None if lengths were not given, or once the rows
        were replaced."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, loss: Tensor | None = None) -> "Updates":
        """One client's tensors as a one-row matrix (a copy).

        Args:
            tensors: By name.
            loss: The mean loss behind them, a scalar.
        """
        row = torch.cat([t.detach().reshape(-1) for t in tensors.values()]).unsqueeze(0)
        shapes = {name: t.shape for name, t in tensors.items()}
        return cls(row, shapes, losses=None if loss is None else loss.detach().reshape(1))

    @property
    def rows(self) -> Tensor:
        """(clients, parameters); formed when first looked at."""
        if not isinstance(self._rows, Tensor):
            self._rows = self._rows()
        return self._rows

    def lengths(self, norm: Norm = "l2") -> Tensor:
        """(clients,), the length of each row."""
        if norm == "l2" and self._lengths is not None:
            return self._lengths
        return sample_norms(self.rows, norm)

    def scaled(self, factors: Tensor) -> "Updates":
        """Each row times a factor: (clients,)."""
        lengths = None if self._lengths is None else self._lengths * factors
        scaled = Updates(
            lambda: self.rows * factors.unsqueeze(1),
            self.shapes,
            clients=self.clients,
            losses=self.losses,
            lengths=lengths,
        )
        scaled.factors = None if self.factors is None else self.factors * factors
        return scaled

    def with_rows(self, rows: Tensor) -> "Updates":
        """Other rows of the same clients, in the same layout."""
        return Updates(rows, self.shapes, clients=self.clients, losses=self.losses)

    def named(self, row: int = 0) -> Parameters:
        """One row back as tensors by name (views of it)."""
        pieces = torch.split(self.rows[row], [shape.numel() for shape in self.shapes.values()])
        return {name: p.view(shape) for (name, shape), p in zip(self.shapes.items(), pieces, strict=True)}
