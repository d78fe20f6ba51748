"""Published tables and figures, each with a recipe at three scales, the paper's numbers and its claims as checks."""

from mithridate.reproduce.item import Item, Scale, item_names, read_item
from mithridate.reproduce.run import Reproduction, reproduce

__all__ = ["Item", "Reproduction", "Scale", "item_names", "read_item", "reproduce"]
