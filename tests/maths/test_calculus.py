"""Every derivative of calculus.py against the slow, obvious one: double backward in float64."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product as pairs

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from mithridate.core.model import WhiteBox
from mithridate.core.modes import BatchNormMode
from mithridate.maths import calculus, directions
from mithridate.maths.alignment import alignment, approach, nearness, turn_towards
from mithridate.maths.calculus import Objective
from mithridate.maths.directions import Normalise, Parameters

NORMALISATIONS: tuple[Normalise, ...] = ("none", "global", "tensor")
MODES: tuple[BatchNormMode, ...] = ("eval", "train")
CLASSES = 4


class Net(nn.Module):
    """Convolution, BatchNorm, softplus, ReLU, max-pool, linear; and one layer that the loss never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1, bias=False)  # in train mode a bias here has no gradient but rounding
        self.norm: nn.Module = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 9, CLASSES)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.norm(self.first(x)))
        x = F.relu(self.second(x))
        return self.head(F.max_pool2d(x, 2).flatten(1))  # type: ignore[no-any-return]  # a module's call is Any to mypy


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """The same draws for every test; one thread, since the nets are tiny and threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def net(seed: None) -> Net:
    net = Net().double()
    with torch.no_grad():
        assert isinstance(net.norm.running_mean, Tensor)
        assert isinstance(net.norm.running_var, Tensor)
        net.norm.running_mean.uniform_(-0.5, 0.5)
        net.norm.running_var.uniform_(0.5, 2.0)
    return net


def batch(n: int) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 2, 6, 6, dtype=torch.float64), torch.randint(CLASSES, (n,))


def direction(parameters: Parameters) -> Parameters:
    return {name: torch.randn_like(p) for name, p in parameters.items()}


@pytest.fixture(params=MODES)
def objective(net: Net, request: pytest.FixtureRequest) -> Iterator[Objective]:
    with WhiteBox(net, loss_of).objective(request.param) as objective:
        yield objective


@pytest.fixture
def eval_objective(net: Net) -> Iterator[Objective]:
    with WhiteBox(net, loss_of).objective() as objective:
        yield objective


@pytest.fixture
def parameters(net: Net) -> Parameters:
    return WhiteBox(net, loss_of).parameters


# The oracle: ordinary autograd, a graph of every backward pass, no torch.func.


def tracked(parameters: Parameters) -> Parameters:
    return {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}


def backward(value: Tensor, by: Parameters) -> Parameters:
    found = torch.autograd.grad(value, list(by.values()), create_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(by, found, strict=True))


def backward_in_input(value: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, x, create_graph=True)
    return found


def obvious_product(a: Parameters, b: Parameters, normalise: Normalise) -> Tensor:
    """The definition, written without the module's helpers; a tensor of zeros has no direction."""
    if normalise == "none":
        return torch.stack([(a[k] * b[k]).sum() for k in a]).sum()
    if normalise == "global":
        flat_a, flat_b = (torch.cat([t.flatten() for t in p.values()]) for p in (a, b))
        return F.cosine_similarity(flat_a, flat_b, dim=0)
    used = [k for k in a if bool(a[k].any()) and bool(b[k].any())]
    return torch.stack([F.cosine_similarity(a[k].flatten(), b[k].flatten(), dim=0) for k in used]).sum()


def assert_same(found: Parameters, expected: Parameters) -> None:
    assert list(found) == list(expected)
    for name, t in found.items():
        assert not t.requires_grad, f"{name} is not detached"
        assert_close(t, expected[name].detach(), rtol=1e-9, atol=1e-12, msg=f"{name} differs")


# Derivatives of the loss.


def test_gradient(objective: Objective, parameters: Parameters) -> None:
    x, y = batch(5)
    p = tracked(parameters)
    assert_same(calculus.gradient(objective, parameters, x, y), backward(objective(p, x, y), p))


def test_hessian_vector_product(objective: Objective, parameters: Parameters) -> None:
    (x, y), v, p = batch(5), direction(parameters), tracked(parameters)
    expected = backward(directions.inner(backward(objective(p, x, y), p), v), p)
    assert_same(calculus.hessian_vector_product(objective, parameters, x, y, v), expected)


def test_hessian_vector_product_is_a_difference_of_gradients(objective: Objective, parameters: Parameters) -> None:
    (x, y), v, h = batch(5), direction(parameters), 1e-6
    up, down = (calculus.gradient(objective, directions.add(parameters, v, scale=s), x, y, chunk=None) for s in (h, -h))
    for name, t in calculus.hessian_vector_product(objective, parameters, x, y, v).items():
        assert_close(t, (up[name] - down[name]) / (2 * h), rtol=1e-5, atol=1e-7)


def test_input_gradient(objective: Objective, parameters: Parameters) -> None:
    x, y = batch(5)
    x.requires_grad_()
    expected = backward_in_input(objective(parameters, x, y), x)
    found = calculus.input_gradient(objective, parameters, x.detach(), y).gradient
    assert not found.requires_grad
    assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert float(found.abs().max()) > 1e-3


def test_mixed_partial(objective: Objective, parameters: Parameters) -> None:
    (x, y), v, p = batch(5), direction(parameters), tracked(parameters)
    x.requires_grad_()
    expected = backward_in_input(directions.inner(backward(objective(p, x, y), p), v), x)
    found = calculus.mixed_partial(objective, parameters, x.detach(), y, v)
    assert not found.requires_grad
    assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert float(found.abs().max()) > 1e-3


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_ascent_on_a_product_is_a_mixed_partial_along_its_alignment_gradient(
    normalise: Normalise, objective: Objective, parameters: Parameters
) -> None:
    """The identity that crafting rests on: d/dx <unit(grad L(x)), w>."""
    (x, y), w, p = batch(5), direction(parameters), tracked(parameters)
    x.requires_grad_()
    if normalise == "none":
        expected = backward_in_input(obvious_product(backward(objective(p, x, y), p), w, "none"), x)
    else:
        lengths = {k: w[k].norm() for k in w}
        whole = torch.stack(list(lengths.values())).norm()
        # w enters as it is, so the cosine is multiplied by w's own length.
        g = backward(objective(p, x, y), p)
        if normalise == "global":
            value = obvious_product(g, w, "global") * whole
        else:
            terms = [(g[k] * w[k]).sum() / g[k].norm() for k in g if float(g[k].detach().norm()) > 0]
            value = torch.stack(terms).sum()
        expected = backward_in_input(value, x)
    x = x.detach()
    g = calculus.gradient(objective, parameters, x, y)
    found = calculus.mixed_partial(objective, parameters, x, y, directions.alignment_gradient(g, w, normalise))
    assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_mixed_partial_of_curvature(eval_objective: Objective, parameters: Parameters) -> None:
    (x, y), u, v, p = batch(4), direction(parameters), direction(parameters), tracked(parameters)
    x.requires_grad_()
    g = backward(eval_objective(p, x, y), p)
    expected = backward_in_input(directions.inner(backward(directions.inner(g, v), p), u), x)
    x = x.detach()
    found = calculus.mixed_partial_of_curvature(eval_objective, parameters, x, y, u, v)
    assert not found.requires_grad
    assert_close(found, expected, rtol=1e-8, atol=1e-11)
    assert float(found.abs().max()) > 1e-3


def layers() -> dict[str, nn.Module]:
    """What stands after the first convolution, (n, 3, 6, 6); the fused ones among them need help from calculus.py."""
    return {
        "batch": nn.BatchNorm2d(3),
        "batch without affine": nn.BatchNorm2d(3, affine=False),
        "group": nn.GroupNorm(3, 3),
        "group without affine": nn.GroupNorm(1, 3, affine=False),
        "layer": nn.LayerNorm([6, 6]),
        "layer without affine": nn.LayerNorm([3, 6, 6], elementwise_affine=False),
        "instance": nn.InstanceNorm2d(3),
        "instance with affine": nn.InstanceNorm2d(3, affine=True),
        "silu": nn.SiLU(),
        "mish": nn.Mish(),
        "gelu": nn.GELU(),
    }


def net_with(layer: str, net: Net) -> Net:
    net.norm = layers()[layer].double()
    for p in net.norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return net


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", layers())
def test_second_derivatives_of_every_layer(layer: str, mode: BatchNormMode, net: Net) -> None:
    box = WhiteBox(net_with(layer, net), loss_of)
    (x, y), v, p = batch(4), direction(box.parameters), tracked(box.parameters)
    x.requires_grad_()
    with box.objective(mode) as objective:
        along = directions.inner(backward(objective(p, x, y), p), v)
        in_x, in_p = backward_in_input(along, x), backward(along, p)
        x = x.detach()
        found = calculus.mixed_partial(objective, box.parameters, x, y, v)
        assert_close(found, in_x, rtol=1e-8, atol=1e-11)
        assert_same(calculus.hessian_vector_product(objective, box.parameters, x, y, v), in_p)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", layers())
def test_third_derivatives_of_every_layer(layer: str, mode: BatchNormMode, net: Net) -> None:
    """Differences of second ones: torch's own third derivative of a fused normalisation is wrong by per cents."""
    box = WhiteBox(net_with(layer, net), loss_of)
    (x, y), u, v, h = batch(4), direction(box.parameters), direction(box.parameters), 1e-5
    with box.objective(mode) as objective:
        up, down = (
            calculus.mixed_partial(objective, directions.add(box.parameters, u, scale=s), x, y, v) for s in (h, -h)
        )
        found = calculus.mixed_partial_of_curvature(objective, box.parameters, x, y, u, v)
        swapped = calculus.mixed_partial_of_curvature(objective, box.parameters, x, y, v, u)
    assert_close(found, (up - down) / (2 * h), rtol=1e-5, atol=1e-6)
    assert_close(found, swapped, rtol=1e-9, atol=1e-11)


def flattened(found: object) -> Tensor:
    """A derivative of either kind as one vector."""
    tensors = [found] if isinstance(found, Tensor) else list(found.values()) if isinstance(found, dict) else []
    return torch.cat([t.flatten() for t in tensors])


def test_derivatives_come_detached_and_do_not_need_grad_mode(net: Net) -> None:
    """Also where the caller hands in live parameters and pixels, or has switched autograd off."""
    box, (x, y) = WhiteBox(net, loss_of), batch(4)
    v, live = direction(box.parameters), tracked(box.parameters)
    with box.objective() as objective:
        for name in sorted(DERIVATIVES.keys() - {"alignment_gradient"}):
            expected = flattened(DERIVATIVES[name](objective, box.parameters, (x, y), v))
            found = flattened(DERIVATIVES[name](objective, live, (x.clone().requires_grad_(), y), v))
            with torch.no_grad():
                off = flattened(DERIVATIVES[name](objective, box.parameters, (x, y), v))
            assert not found.requires_grad, name
            assert torch.equal(found, expected), name
            assert torch.equal(off, expected), name


@pytest.mark.slow
def test_forward_mode_is_silent() -> None:
    """Torch warns of its own torch.jit at the first dual tensor; callers who make warnings errors must not see it."""
    code = """
import torch
from mithridate.maths import calculus, directions
from mithridate.maths.alignment import alignment, turn_towards
f = lambda p, x, y: (p["w"] * x).sum() ** 2
p = {"w": torch.ones(2)}
print(calculus.mixed_partial(f, p, torch.ones(2), torch.ones(2), p).tolist())
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (a fixed command)
    assert (done.returncode, done.stdout) == (0, "[8.0, 8.0]\n"), done.stderr


def test_second_derivatives_pass_gradcheck(eval_objective: Objective, net: Net, parameters: Parameters) -> None:
    """Finite differences of the derivatives themselves: no autograd on the other side."""
    x, y = batch(2)
    v = direction(parameters)

    def along(x: Tensor) -> Tensor:
        return directions.inner(calculus.gradient(eval_objective, parameters, x, y), v)

    h, probe = 1e-6, torch.randn_like(x)
    slope = (along(x + h * probe) - along(x - h * probe)) / (2 * h)
    assert_close(
        (calculus.mixed_partial(eval_objective, parameters, x, y, v) * probe).sum(), slope, rtol=1e-5, atol=1e-8
    )

    def loss(x: Tensor) -> Tensor:
        return eval_objective(parameters, x, y)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(),))


# Chunks.


@pytest.mark.parametrize("chunk", [1, 3, 7, 8])
def test_chunks_change_nothing(chunk: int, eval_objective: Objective, parameters: Parameters) -> None:
    (x, y), v = batch(7), direction(parameters)
    assert_same(
        calculus.gradient(eval_objective, parameters, x, y, chunk=chunk),
        calculus.gradient(eval_objective, parameters, x, y),
    )
    assert_same(
        calculus.hessian_vector_product(eval_objective, parameters, x, y, v, chunk=chunk),
        calculus.hessian_vector_product(eval_objective, parameters, x, y, v),
    )


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_chunked_product_gradient(normalise: Normalise, eval_objective: Objective, parameters: Parameters) -> None:
    first, second = batch(7), batch(4)
    whole = product_gradient(eval_objective, parameters, first, second, normalise)
    assert_same(product_gradient(eval_objective, parameters, first, second, normalise, chunk=3), whole)


def test_chunks_are_computed_apart(eval_objective: Objective, parameters: Parameters) -> None:
    """The point of a chunk is memory: no call may see more samples than that."""
    sizes: list[int] = []

    def spy(p: Parameters, x: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        return eval_objective(p, x, y)

    x, y = batch(7)
    calculus.gradient(spy, parameters, x, y, chunk=3)
    calculus.hessian_vector_product(spy, parameters, x, y, direction(parameters), chunk=3)
    assert sizes == [3, 3, 1] * 2


# Products.


def product(a: Parameters, b: Parameters, normalise: Normalise) -> Tensor:
    """What attacks climb: an inner product, a cosine, or a sum of one cosine a tensor."""
    return directions.inner(directions.unit(a, normalise), directions.unit(b, normalise))


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_product_is_its_definition(normalise: Normalise, parameters: Parameters) -> None:
    a, b = direction(parameters), direction(parameters)
    assert_close(product(a, b, normalise), obvious_product(a, b, normalise))


def product_gradient(
    objective: Objective,
    parameters: Parameters,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    normalise: Normalise,
    chunk: int | None = None,
) -> Parameters:
    at = (calculus.curved(objective, parameters, *b, chunk=chunk) for b in (first, second))
    return calculus.product_gradient(*at, normalise=normalise)


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_alignment_gradient(normalise: Normalise, parameters: Parameters) -> None:
    a, b = direction(parameters), direction(parameters)
    p = tracked(a)
    expected = backward(obvious_product(p, b, normalise), p)
    assert_same(directions.alignment_gradient(a, directions.unit(b, normalise), normalise), expected)


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_product_gradient(normalise: Normalise, objective: Objective, parameters: Parameters) -> None:
    first, second = batch(5), batch(4)
    p = tracked(parameters)
    g_first, g_second = backward(objective(p, *first), p), backward(objective(p, *second), p)
    expected = backward(obvious_product(g_first, g_second, normalise), p)
    found = product_gradient(objective, parameters, first, second, normalise)
    assert_same(found, expected)


@pytest.mark.parametrize("chunk", [None, 3, 2])
def test_a_curved_loss_has_the_gradient_and_the_curvature_of_the_loss(
    chunk: int | None, eval_objective: Objective, parameters: Parameters
) -> None:
    (x, y), v, u = batch(5), direction(parameters), direction(parameters)
    at = calculus.curved(eval_objective, parameters, x, y, chunk=chunk)
    assert_same(at.gradient, calculus.gradient(eval_objective, parameters, x, y))
    for w in (v, u, v):  # as often as one likes
        assert_same(at.curvature(w), calculus.hessian_vector_product(eval_objective, parameters, x, y, w))


def test_samples_computed_at_once_are_passed_through_the_network_once(
    eval_objective: Objective, parameters: Parameters
) -> None:
    """Gradient and curvature share a graph; and so do a normalised product's value and its slope."""
    calls: list[int] = []

    def spy(p: Parameters, x: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        return eval_objective(p, x, y)

    first, second = batch(3), batch(2)
    product_gradient(spy, parameters, first, second, "tensor")
    assert calls == [3, 2]
    calls.clear()
    turn_towards(spy, parameters, *first, direction(parameters), normalise="tensor")
    assert calls == [3]
    calls.clear()
    turn_towards(spy, parameters, *first, direction(parameters), normalise="none")
    assert calls == [3]


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_turning_towards_a_direction(
    normalise: Normalise, chunk: int | None, eval_objective: Objective, parameters: Parameters
) -> None:
    """Both ways, with the samples at once or in pieces, against a product differentiated as it is written."""
    (x, y), w = batch(5), direction(parameters)
    leaf, p = x.clone().requires_grad_(), tracked(parameters)
    g = backward(eval_objective(p, leaf, y), p)
    expected = directions.inner(directions.unit(g, normalise), w)
    slope = torch.autograd.grad(expected, leaf)[0]
    found = turn_towards(eval_objective, parameters, x, y, w, normalise=normalise, chunk=chunk)
    assert found.value is not None
    assert_close(found.gradient, slope, rtol=1e-9, atol=1e-12)
    assert_close(found.value, expected.detach(), rtol=1e-9, atol=1e-12)
    value = alignment(eval_objective, parameters, x, y, w, normalise=normalise, chunk=chunk)
    assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 2])
def test_coming_near_a_gradient(chunk: int | None, eval_objective: Objective, parameters: Parameters) -> None:
    """Both ways, with the samples at once or in pieces, against a squared distance differentiated as it is written."""
    (x, y), wanted = batch(5), direction(parameters)
    leaf, p = x.clone().requires_grad_(), tracked(parameters)
    g = backward(eval_objective(p, leaf, y), p)
    expected = -torch.stack([(g[name] - wanted[name]).square().sum() for name in g]).sum()
    slope = torch.autograd.grad(expected, leaf)[0]
    found = approach(eval_objective, parameters, x, y, wanted, chunk=chunk)
    assert found.value is not None
    assert_close(found.gradient, slope, rtol=1e-9, atol=1e-12)
    for value in (found.value, nearness(eval_objective, parameters, x, y, wanted, chunk=chunk)):
        assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_a_parameter_without_gradient_gives_zeros(
    normalise: Normalise, eval_objective: Objective, parameters: Parameters
) -> None:
    (x, y), (x2, y2) = batch(5), batch(4)
    g, other = calculus.gradient(eval_objective, parameters, x, y), direction(parameters)
    assert not g["unused.weight"].any()
    assert not directions.unit(g, normalise)["unused.weight"].any()
    align = directions.alignment_gradient(g, directions.unit(other, normalise), normalise)
    results = [
        directions.unit(g, normalise),
        align,
        calculus.hessian_vector_product(eval_objective, parameters, x, y, other),
        product_gradient(eval_objective, parameters, (x, y), (x2, y2), normalise),
    ]
    for found in results:
        assert all(t.isfinite().all() for t in found.values())
    assert not results[2]["unused.weight"].any()
    assert not results[3]["unused.bias"].any()
    if normalise == "tensor":
        assert not align["unused.weight"].any()
    assert calculus.mixed_partial(eval_objective, parameters, x, y, align).isfinite().all()
    assert product(g, other, normalise).isfinite()


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_all_zero_gradients_have_no_direction(normalise: Normalise, parameters: Parameters) -> None:
    zero, w = {name: torch.zeros_like(p) for name, p in parameters.items()}, direction(parameters)
    assert float(product(zero, w, normalise)) == 0
    align = directions.alignment_gradient(zero, w, normalise)
    if normalise == "none":
        assert_same(align, w)
    else:
        assert_same(align, zero)


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_products_can_be_differentiated_beside_a_tensor_of_zeros(normalise: Normalise, parameters: Parameters) -> None:
    """The joint trigger differentiates alignment_gradient itself; a dead tensor must not turn that into NaN."""
    a, w = direction(parameters), direction(parameters)
    a["unused.weight"] = torch.zeros_like(a["unused.weight"])

    def probe(a: Parameters) -> Tensor:
        align = directions.alignment_gradient(a, w, normalise)
        return product(a, w, normalise) + directions.inner(align, w) + directions.inner(align, align)

    p = tracked(a)
    found, h = backward(probe(p), p), 1e-6
    assert all(t.isfinite().all() for t in found.values())
    u = direction(parameters)
    u["unused.weight"] = torch.zeros_like(u["unused.weight"])
    slope = (probe(directions.add(a, u, scale=h)) - probe(directions.add(a, u, scale=-h))) / (2 * h)
    assert_close(directions.inner(found, u), slope, rtol=1e-5, atol=1e-7)


coordinates = st.integers(-1000, 1000).map(lambda i: i / 100)
vectors = st.lists(coordinates, min_size=6, max_size=6)
scales = st.floats(1e-6, 1e6)


def as_parameters(values: list[float]) -> Parameters:
    """Three tensors: a matrix, a vector and a scalar."""
    flat = torch.tensor(values, dtype=torch.float64)
    return {"matrix": flat[:2].view(1, 2), "vector": flat[2:5], "scalar": flat[5]}


@settings(deadline=None)
@given(vectors, vectors, st.tuples(scales, scales, scales))
def test_normalised_products_ignore_scale(left: list[float], right: list[float], factors: tuple[float, ...]) -> None:
    a, b = as_parameters(left), as_parameters(right)
    each = {name: t * s for (name, t), s in zip(a.items(), factors, strict=True)}
    whole = {name: t * factors[0] for name, t in a.items()}
    assert_close(product(each, b, "tensor"), product(a, b, "tensor"), rtol=1e-9, atol=1e-9)
    assert_close(product(whole, b, "global"), product(a, b, "global"), rtol=1e-9, atol=1e-9)
    assert_close(product(whole, b, "none"), factors[0] * product(a, b, "none"), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(vectors, vectors, st.sampled_from(NORMALISATIONS))
def test_products_are_symmetric_and_bounded(left: list[float], right: list[float], normalise: Normalise) -> None:
    a, b = as_parameters(left), as_parameters(right)
    value = product(a, b, normalise)
    assert_close(value, product(b, a, normalise))
    bound = {
        "global": 1.0,
        "tensor": float(len(a)),
        "none": float(directions.inner(a, a) * directions.inner(b, b)) ** 0.5,
    }
    assert abs(float(value)) <= bound[normalise] * (1 + 1e-9)
    with_itself = product(a, a, normalise)
    nonzero = [name for name, t in a.items() if t.any()]
    expected = {"global": float(bool(nonzero)), "tensor": float(len(nonzero)), "none": float(directions.inner(a, a))}
    assert_close(float(with_itself), expected[normalise])


@settings(deadline=None)
@given(vectors, vectors, st.sampled_from(("global", "tensor")))
def test_alignment_gradient_is_orthogonal_to_the_gradient(
    left: list[float], right: list[float], normalise: Normalise
) -> None:
    """A normalised product does not change along the gradient itself."""
    a, w = as_parameters(left), as_parameters(right)
    align = directions.alignment_gradient(a, w, normalise)
    size = float(directions.inner(align, align) * directions.inner(a, a)) ** 0.5
    assert abs(float(directions.inner(a, align))) <= 1e-9 * max(1.0, size)


def test_add_and_inner(parameters: Parameters) -> None:
    a, b = direction(parameters), direction(parameters)
    flat_a, flat_b = (torch.cat([t.flatten() for t in p.values()]) for p in (a, b))
    assert_close(directions.inner(a, b), flat_a @ flat_b)
    assert_close(torch.cat([t.flatten() for t in directions.add(a, b, scale=-0.25).values()]), flat_a - 0.25 * flat_b)
    assert_close(torch.cat([t.flatten() for t in directions.add(a, b).values()]), flat_a + flat_b)


# Nothing is left behind.


Derivative = Callable[[Objective, Parameters, tuple[Tensor, Tensor], Parameters], object]
DERIVATIVES: dict[str, Derivative] = {
    "gradient": lambda f, p, b, v: calculus.gradient(f, p, *b, chunk=2),
    "hessian_vector_product": lambda f, p, b, v: calculus.hessian_vector_product(f, p, *b, v, chunk=2),
    "input_gradient": lambda f, p, b, v: calculus.input_gradient(f, p, *b).gradient,
    "turn_towards": lambda f, p, b, v: turn_towards(f, p, *b, v, normalise="tensor").gradient,
    "approach": lambda f, p, b, v: approach(f, p, *b, v).gradient,
    "curvature": lambda f, p, b, v: calculus.curved(f, p, *b).curvature(v),
    "mixed_partial": lambda f, p, b, v: calculus.mixed_partial(f, p, *b, v),
    "mixed_partial_of_curvature": lambda f, p, b, v: calculus.mixed_partial_of_curvature(f, p, *b, v, v),
    "product_gradient": lambda f, p, b, v: product_gradient(f, p, b, b, "tensor"),
    "alignment_gradient": lambda f, p, b, v: directions.alignment_gradient(p, v, "tensor"),
}


@pytest.mark.parametrize(("name", "mode"), list(pairs(DERIVATIVES, MODES)))
def test_nothing_is_left_behind(name: str, mode: BatchNormMode, net: Net) -> None:
    net.train(mode == "eval")
    net.second.eval()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    flags = {n: m.training for n, m in net.named_modules()}
    state = {k: t.clone() for k, t in net.state_dict().items()}
    given_batch = batch(4)
    v = direction(WhiteBox(net, loss_of).parameters)
    before = [t.clone() for t in (*given_batch, *v.values())]
    with WhiteBox(net, loss_of).objective(mode) as objective:
        DERIVATIVES[name](objective, WhiteBox(net, loss_of).parameters, given_batch, v)
    assert {n: m.training for n, m in net.named_modules()} == flags
    assert all(torch.equal(t, state[k]) for k, t in net.state_dict().items())
    assert all(p.requires_grad and p.grad is not None and bool((p.grad == 1).all()) for p in net.parameters())
    assert all(torch.equal(t, b) for t, b in zip((*given_batch, *v.values()), before, strict=True))


# Rounding: what a signed step takes from float32 must be what double backward would give.


class Residual(nn.Module):
    """Two residual blocks with BatchNorm, as in a ResNet but small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(5))
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norms[0](self.stem(x))), 3, stride=2, padding=1)
        for i in (0, 2):
            inside = F.relu(self.norms[i + 1](self.blocks[i](x)))
            x = F.relu(x + self.norms[i + 2](self.blocks[i + 1](inside)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]  # a module's call is Any to mypy


def test_signs_in_float32_equal_those_of_double_backward() -> None:
    net = Residual()
    x, y = torch.rand(32, 3, 16, 16), torch.randint(10, (32,))
    net(x)  # statistics that are not the initial ones
    box = WhiteBox(net, loss_of)
    with box.objective() as objective:
        w = directions.unit(calculus.gradient(objective, box.parameters, torch.rand_like(x), y), "tensor")
        g = calculus.gradient(objective, box.parameters, x, y)
        v = directions.alignment_gradient(g, w, "tensor")
        found = calculus.mixed_partial(objective, box.parameters, x, y, v)
        p, x = tracked(box.parameters), x.requires_grad_()
        expected = backward_in_input(obvious_product(backward(objective(p, x, y), p), w, "tensor"), x)
    assert float((found.sign() == expected.sign()).double().mean()) > 0.999
