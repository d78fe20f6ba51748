"""What a model makes of samples: the input of its last linear layer, whatever its attributes are called."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.features import observe
from mithridate.testing import toy_learner, toy_stream


class TorchvisionLike(nn.Module):
    """As torchvision's VGG: `features` is a module of feature maps, and the classifier ends with a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


class PerPixel(nn.Module):
    """A linear layer that is fed more than one vector a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(x.squeeze(1)).mean(1)
        return logits


class Twice(nn.Module):
    """A last linear layer that is asked twice a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(x.flatten(1)) + self.last(x.flatten(1))
        return logits


STREAM = toy_stream(0)


def test_features_are_what_goes_into_the_last_linear_layer() -> None:
    model = toy_learner(STREAM).model
    batches = [STREAM.victim_batch(i, 0) for i in range(3)]
    seen = observe(model, batches)
    model.eval()
    x = torch.cat([b.x for b in batches])
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        assert torch.allclose(seen.logits, model(x), atol=1e-5)
        assert torch.allclose(last(seen.features), model(x), atol=1e-5)
    assert torch.equal(seen.y, torch.cat([b.y for b in batches]))
    assert seen.features.shape == (60, 32)
    assert not seen.features.requires_grad
    right = seen.right()
    assert 0 < len(right.y) < 60
    assert torch.equal(right.predicted, right.y)


def test_the_model_is_as_before_and_the_hook_is_gone() -> None:
    model = toy_learner(STREAM).model
    batch = STREAM.victim_batch(0, 0)
    quiet = observe(model.eval(), [batch])
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    before = {name: t.clone() for name, t in model.state_dict().items()}
    again = observe(model, [batch])
    assert torch.equal(again.features, quiet.features)
    assert torch.equal(again.logits, quiet.logits)
    assert [m.training for m in model.modules()] == [i % 2 == 0 for i in range(len(list(model.modules())))]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_hook_is_gone_after_an_error_too() -> None:
    model = toy_learner(STREAM).model
    with pytest.raises(RuntimeError):
        observe(model, [Batch(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_any_classifier_will_do() -> None:
    torch.manual_seed(0)
    model = TorchvisionLike()
    model.train()
    batch = STREAM.victim_batch(0, 0)
    seen = observe(model, [batch])
    assert seen.features.shape == (20, 8)
    assert model.training
    last = model.classifier[3]
    assert isinstance(last, nn.Linear)
    assert torch.allclose(last(seen.features), seen.logits, atol=1e-6)
    alone = observe(model, [Batch(batch.x[:1], batch.y[:1])])
    assert torch.allclose(alone.features, seen.features[:1], atol=1e-6)  # dropout and batch statistics are off


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(OrderedDict(only=nn.Conv2d(1, 4, 8), flat=nn.Flatten())), "has no nn.Linear"),
        (PerPixel(), "PerPixel is not fed one vector a sample"),
        (Twice(), "Twice is not fed one vector a sample"),
    ],
)
def test_models_without_pooled_features_are_told_what_else_works(model: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        observe(model, [STREAM.victim_batch(0, 0)])
    assert "`discrepancy` and `loss`" in str(caught.value)
