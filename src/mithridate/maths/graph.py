"""The graph that torch keeps for a backward pass."""

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node


def nodes(t: Tensor) -> Iterator[Node]:
    """All that a tensor was computed by, each once, from the last on."""
    waiting, seen = [t.grad_fn], set[Node]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [before for before, _ in node.next_functions]
