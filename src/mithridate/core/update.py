"""What clients send: updates as a matrix (client, parameter)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mithridate.maths.calculus import Parameters


@dataclass(frozen=True)
class Gradient:
    """Updates as a matrix (client, parameter). Online learning is the case of one client.

    Args:
        rows: (clients, parameters), each row the parameter tensors laid end to end.
        shapes: Name and shape of each tensor, in that order.
        clients: (clients,) int64, whose rows they are; None where that is not known.
    """

    rows: Tensor
    shapes: Mapping[str, torch.Size]
    clients: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Gradient":
        """One client's tensors as a one-row matrix (a copy)."""
        flat = torch.cat([t.detach().reshape(-1) for t in tensors.values()])
        return cls(flat.unsqueeze(0), {name: t.shape for name, t in tensors.items()})

    def named(self, row: int = 0) -> Parameters:
        """One row back as tensors by name (views of it)."""
        pieces = torch.split(self.rows[row], [shape.numel() for shape in self.shapes.values()])
        return {name: p.view(shape) for (name, shape), p in zip(self.shapes.items(), pieces, strict=True)}

    def with_rows(self, rows: Tensor) -> "Gradient":
        """The same layout with other values."""
        return replace(self, rows=rows)
