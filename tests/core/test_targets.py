"""What targets mean to a model: which are hit."""

import torch

from mithridate.core.targets import IGNORED, right_answers


def test_targets_are_hit_by_class_by_position_or_by_label() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0]])
    classes = right_answers(logits, torch.tensor([0, 1, 1]))
    assert classes is not None
    assert classes.tolist() == [True, False, True]
    some = right_answers(logits, torch.tensor([0, IGNORED, 2]))
    assert some is not None
    assert some.tolist() == [True, False]
    positions = right_answers(logits.expand(2, 3, 3), torch.tensor([[0, 2, 1], [1, 2, IGNORED]]))
    assert positions is not None
    assert positions.tolist() == [True, True, True, False, True]
    labels = right_answers(torch.tensor([[1.0, -1.0], [-2.0, -1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert labels is not None
    assert labels.tolist() == [True, False, True, True]


def test_regression_has_no_hits() -> None:
    assert right_answers(torch.randn(4, 1), torch.randn(4, 1)) is None
    assert right_answers(torch.randn(4), torch.tensor([0.0, 1.0, 0.5, 1.0])) is None
