"""Second and third derivatives of whole layers that forward mode does not know, against plain double backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.modes import BatchNormMode
from mithridate.maths import calculus, directions
from mithridate.maths.alignment import turn_towards
from mithridate.maths.calculus import NoDerivativeError
from mithridate.maths.directions import Parameters
from mithridate.maths.elementary import Instead

WIDTH, PLACES, CLASSES = 6, 4, 3


class Attention(nn.Module):
    """Fused attention, called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(x).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).squeeze(1)


class MultiHead(nn.Module):
    """torch's layer, which calls the fused kernel itself unless weights are asked for."""

    def __init__(self, *, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(WIDTH, 2, batch_first=True), weights

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=self.weights)[0]
        return out


class Recurrent(nn.Module):
    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.cell = cls(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cell(x)[0]
        return out


class Squared(torch.autograd.Function):
    """A function of a user's own, without a formula for forward mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * gradients[0]


class Scaled(nn.Module):
    """Divides by a length that is computed without gradients: a constant to reverse mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        with torch.no_grad():
            length = x.square().mean(-1, keepdim=True).sqrt()
        return torch.tanh(x / length)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(WIDTH, width), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def hard_sigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return (x / 6 + 0.5).clamp(0, 1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "multi-head attention": lambda: MultiHead(weights=False),
    "multi-head attention with weights": lambda: MultiHead(weights=True),
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "RNN": lambda: Recurrent(nn.RNN),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()),
    "spectral norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()),
    "GLU": lambda: Function(F.glu, 2 * WIDTH),
    "Hardsigmoid": lambda: Function(lambda x: F.hardsigmoid(x) * x),
    "Hardswish": lambda: Function(F.hardswish),
    "a function of the user's own": lambda: Function(Squared.apply),
    "a constant made without gradients": Scaled,
}


def model_of(layer: str, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(LAYERS[layer](), nn.Flatten(), nn.Linear(PLACES * WIDTH, CLASSES)).to(dtype)


def draws(box: WhiteBox, dtype: torch.dtype) -> tuple[Tensor, Tensor, Parameters, Parameters]:
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(4, PLACES, WIDTH, generator=rng, dtype=dtype)
    u, v = ({n: torch.randn(p.shape, generator=rng, dtype=dtype) for n, p in box.parameters.items()} for _ in range(2))
    return x, torch.arange(4) % CLASSES, u, v


def slope(value: Tensor, by: Parameters) -> Parameters:
    found = torch.autograd.grad(value, list(by.values()), create_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(by, found, strict=True))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("layer", LAYERS)
def test_they_are_those_of_double_backward(layer: str, mode: BatchNormMode) -> None:
    box = WhiteBox(model_of(layer, torch.float64), F.cross_entropy)
    x, y, u, v = draws(box, torch.float64)
    # Hardsigmoid is its formula: of torch's own there is no second derivative at all.
    with box.objective(mode) as objective, sdpa_kernel([SDPBackend.MATH]), Instead({F.hardsigmoid: hard_sigmoid}):
        p = {name: t.clone().requires_grad_() for name, t in box.parameters.items()}
        pixels = x.clone().requires_grad_()
        along = directions.inner(slope(objective(p, pixels, y), p), v)
        in_x, in_p = slope(along, {"x": pixels})["x"], slope(along, p)
        units = directions.unit(slope(objective(p, pixels, y), p), "tensor")
        tensorwise = slope(directions.inner(units, v), {"x": pixels})["x"]
        third = slope(directions.inner(in_p, u), {"x": pixels})["x"]
    with box.objective(mode) as objective:
        assert_close(calculus.mixed_partial(objective, box.parameters, x, y, v), in_x.detach(), rtol=1e-8, atol=1e-11)
        curvature = calculus.curved(objective, box.parameters, x, y).curvature(v)
        for name, t in calculus.hessian_vector_product(objective, box.parameters, x, y, v).items():
            assert_close(t, in_p[name].detach(), rtol=1e-8, atol=1e-11)
            assert_close(curvature[name], in_p[name].detach(), rtol=1e-8, atol=1e-11)
        turned = turn_towards(objective, box.parameters, x, y, v, normalise="tensor")
        assert_close(turned.gradient, tensorwise.detach(), rtol=1e-8, atol=1e-11)
        if layer != "encoder":  # torch's own third derivative of LayerNorm is wrong; the differences below hold it
            found = calculus.mixed_partial_of_curvature(objective, box.parameters, x, y, u, v)
            assert_close(found, third.detach(), rtol=1e-8, atol=1e-11)


def test_third_derivatives_of_an_encoder_are_differences_of_second_ones() -> None:
    box = WhiteBox(model_of("encoder", torch.float64), F.cross_entropy)
    x, y, u, v = draws(box, torch.float64)
    h = 1e-5
    with box.objective() as objective:
        up, down = (
            calculus.mixed_partial(objective, directions.add(box.parameters, u, scale=s), x, y, v) for s in (h, -h)
        )
        found = calculus.mixed_partial_of_curvature(objective, box.parameters, x, y, u, v)
    assert_close(found, (up - down) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_single_precision_kernels_are_found_too(layer: str) -> None:
    """An LSTM of floats runs in another kernel than one of doubles."""
    single, double = (WhiteBox(model_of(layer, dtype), F.cross_entropy) for dtype in (torch.float32, torch.float64))
    found = []
    for box, dtype in ((single, torch.float32), (double, torch.float64)):
        x, y, _, v = draws(double, torch.float64)
        with box.objective() as objective:
            v, p, pixels = {name: t.to(dtype) for name, t in v.items()}, box.parameters, x.to(dtype)
            at = calculus.curved(objective, p, pixels, y)
            found.append(
                [
                    calculus.mixed_partial(objective, p, pixels, y, v),
                    turn_towards(objective, p, pixels, y, v, normalise="global").gradient,
                    *(torch.cat([t.flatten() for t in h.values()]) for h in (at.gradient, at.curvature(v))),
                    torch.cat(
                        [t.flatten() for t in calculus.hessian_vector_product(objective, p, pixels, y, v).values()]
                    ),
                ]
            )
    for a, b in zip(*found, strict=True):
        assert float(torch.linalg.vector_norm(a.double() - b)) < 1e-3 * float(torch.linalg.vector_norm(b))


class Once(torch.autograd.Function):
    """A function that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * gradients[0]


def test_where_there_is_no_way_the_layer_is_named() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Function(Once.apply), nn.Linear(WIDTH, CLASSES))
    box = WhiteBox(model, F.cross_entropy)
    x, y = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)), torch.arange(4) % CLASSES
    v = {name: torch.ones_like(p) for name, p in box.parameters.items()}
    for derivative in (calculus.mixed_partial, calculus.hessian_vector_product):
        with (
            pytest.raises(ConfigError, match=r"the layer 1 \(Function\) has no second derivative"),
            box.objective() as f,
        ):
            derivative(f, box.parameters, x, y, v)


def traced(model: nn.Module) -> Any:
    return torch.jit.trace(model, torch.zeros(2, WIDTH))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (traced, "traced or scripted"),
        (torch.jit.script, "traced or scripted"),
        (nn.DataParallel, "wrapped in DataParallel"),
    ],
    ids=["traced", "scripted", "DataParallel"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_whose_parameters_cannot_be_replaced_is_told_in_a_sentence(wrap: Any, kind: str, inside: bool) -> None:
    model = wrap(nn.Sequential(nn.Linear(WIDTH, CLASSES)))
    box = WhiteBox(nn.Sequential(nn.Identity(), model) if inside else model, F.cross_entropy)
    x, y = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)), torch.arange(4) % CLASSES
    v = {name: torch.ones_like(p) for name, p in box.parameters.items()}
    what = "the layer 1" if inside else "the model"
    with pytest.raises(ConfigError, match=f"{what}, a .* is {kind}"), box.objective() as f:
        calculus.mixed_partial(f, box.parameters, x, y, v)


def test_a_loss_that_is_wrong_in_itself_says_so() -> None:
    box = WhiteBox(nn.Linear(WIDTH, CLASSES), F.cross_entropy)
    v = {name: torch.ones_like(p) for name, p in box.parameters.items()}

    def wrong(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        calculus.mixed_partial(wrong, box.parameters, torch.ones(2, WIDTH), torch.zeros(2).long(), v)
    assert not isinstance(raised.value, NoDerivativeError)
