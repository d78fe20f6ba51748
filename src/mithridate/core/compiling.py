"""What `torch.compile` is given: the passes of a training step, and a whole inner step as one graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from mithridate.core.errors import ConfigError, UserError
from mithridate.core.model import PureLoss
from mithridate.maths.alignment import turn_towards
from mithridate.maths.calculus import NoDerivativeError, Slope
from mithridate.maths.directions import Normalise, Parameters

BACKEND: str | Callable[..., Any] = "inductor"
"""What compiles."""

MODELS = 256
"""How often torch may compile the same layer, each time for another model or size of a batch; it gives up at 8."""

Step = Callable[..., tuple[Tensor, Tensor]]
"""(inputs, targets, parameters, wanted direction, all else of the model's state) -> (gradient, value)."""

_STEPS: WeakKeyDictionary[nn.Module, tuple[object, dict[object, Step]]] = WeakKeyDictionary()


def asked_of_compiler(device: torch.device) -> dict[str, Any]:
    """Arguments of `torch.compile`: one graph a size of batch, and on a GPU recorded once and played (CUDA graphs).

    Args:
        device: Where the model lies.
    """
    mode = "reduce-overhead" if device.type == "cuda" else None
    return {"backend": BACKEND, "mode": mode, "fullgraph": True, "dynamic": False}


@contextmanager
def compiling(where: str) -> Iterator[None]:
    """Say in a sentence what the compiler cannot do, or that there is none.

    Args:
        where: Names the setting in messages.

    Raises:
        ConfigError: In place of the compiler's own errors.
    """
    from torch._dynamo import config, exc  # takes seconds

    try:
        with config.patch(recompile_limit=MODELS):
            yield
    except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
        reason = " ".join(str(error).strip().partition("\n\n")[0].split())
        raise ConfigError(
            f"{where} compile = true: torch cannot compile here ({reason}); it needs a C++ compiler, on a GPU Triton, "
            "and a model without branches on its data: mend that, or set compile = false."
        ) from error


def turn_towards_compiled(
    loss: PureLoss,
    parameters: Parameters,
    x: Tensor,
    y: Tensor,
    w: Parameters,
    *,
    normalise: Normalise,
    chunk: int | None = None,
) -> Slope:
    """What `turn_towards` computes, to rounding, by a graph of all its operations that has been compiled.

    It is traced and compiled when it is first asked for: once for a model, its mode, kinds and sizes of the arguments.
    Inputs, targets, parameters, buffers and `w` are inputs of the graph, so that later batches and an updated model get
    slopes of their own. A layer that has changed in a number or text since is traced again.

    Args:
        loss: Of a model, from `WhiteBox.objective`, inside its block.
        parameters: Where to differentiate: those of the model that are trained.
        x: Inputs (n, ...).
        y: Targets (n, ...).
        w: The wanted direction, shaped like the parameters.
        normalise: How `unit` divides the gradient.
        chunk: Samples computed at a time; None for all at once.

    Raises:
        ConfigError: The model cannot be traced (it branches on its data, draws numbers, or keeps tensors or counts
            apart from parameters and buffers), or not compiled.
        DataError: Targets do not fit the model or the criterion.
    """
    for piece in zip(torch.split(x, chunk or len(x)), torch.split(y, chunk or len(x)), strict=True):
        loss.look_at(parameters, *piece)  # a graph cannot raise
    module = loss.box.module
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    rest = [name for name in state if name not in parameters]
    tensors = [x, y, *parameters.values(), *(w[name] for name in parameters), *(state[name] for name in rest)]
    inputs = [t.detach() for t in tensors]
    layers = _layers(module)
    known = _STEPS.get(module)
    if known is None or known[0] != layers:
        known = _STEPS[module] = (layers, {})
    kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    how = (normalise, chunk, loss.precision, loss.box.criterion, tuple(parameters), kinds)
    if how not in known[1]:
        graph = _traced(loss, list(parameters), rest, inputs, normalise=normalise, chunk=chunk)
        if _layers(module) != layers:
            raise ConfigError(_untraceable(module, "its passes write numbers to its layers, and a graph would not"))
        known[1][how] = _compiled(graph, x.device)
    with torch.no_grad():
        gradient, value = known[1][how](*inputs)
    return Slope(gradient.clone(), value.clone())  # the next call of a CUDA graph writes to the same memory


def _layers(module: nn.Module) -> object:
    """What a trace of a model takes for constant: its layers, their settings and flags, and who listens to them."""
    return tuple(
        (
            name,
            type(m),
            tuple((key, value) for key, value in vars(m).items() if isinstance(value, bool | int | float | str)),
            (*m._forward_pre_hooks, *m._forward_hooks),
        )
        for name, m in module.named_modules()
    )


def _traced(
    loss: PureLoss,
    names: Sequence[str],
    rest: Sequence[str],
    inputs: Sequence[Tensor],
    *,
    normalise: Normalise,
    chunk: int | None,
) -> fx.GraphModule:
    """All operations of an inner step.

    Args:
        loss: Of a model.
        names: Of the parameters that are trained.
        rest: Of what else is the model's state.
        inputs: As of a `Step`.
        normalise: As in `turn_towards`.
        chunk: As in `turn_towards`.
    """

    def step(x: Tensor, y: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        parameters, w = (dict(zip(names, tensors[i * len(names) :], strict=False)) for i in (0, 1))
        others = dict(zip(rest, tensors[2 * len(names) :], strict=True))

        def objective(p: Parameters, x: Tensor, y: Tensor) -> Tensor:
            return loss({**others, **p}, x, y, look=False)

        return turn_towards(objective, parameters, x, y, w, normalise=normalise, chunk=chunk)

    module = loss.box.module
    try:
        traced: fx.GraphModule = make_fx(step)(*inputs)
    except (UserError, NoDerivativeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model says that is given no values
        said = str(error).strip().partition("\n")[0]
        why = "it looks at its data to decide what it computes" if "tracing tensor" in said else said
        raise ConfigError(_untraceable(module, why)) from error
    traced.graph.eliminate_dead_code()
    for node in traced.graph.nodes:
        if why := _unlike_elsewhere(node):
            raise ConfigError(_untraceable(module, why))
    traced.recompile()
    return traced


def _unlike_elsewhere(node: fx.Node) -> str:
    """Why an operation would give another result in the graph than outside; empty if it would not."""
    aten, tags = torch.ops.aten, getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return "it draws random numbers (dropout), in a graph others than outside"
    if node.op == "get_attr" and any(user.target is not aten.lift_fresh_copy.default for user in node.users):
        return "it, or its loss, uses a tensor that is neither a parameter nor a buffer"
    if torch.Tag.dynamic_output_shape in tags:
        masks = [i for i in node.all_input_nodes if i.meta["val"].dtype in {torch.bool, torch.uint8}]
        if masks or node.target is not aten.index.Tensor:  # which may pick by position, too
            return "how many numbers it computes with depends on its data"
    return ""


def _untraceable(module: nn.Module, why: str) -> str:
    return (
        f"[attack] compile = true: an inner step through {type(module).__name__} cannot be traced into one graph: "
        f"{why}; set compile = false."
    )


_next_call: Callable[[], None] = torch.compiler.cudagraph_mark_step_begin
"""Tells CUDA graphs that nobody looks any more at what earlier calls gave."""


def _compiled(graph: fx.GraphModule, device: torch.device) -> Step:
    """The graph, compiled; it is at its first call, even where a model that was compiled is taken as it was before."""
    fast: Step = torch.compile(graph, **asked_of_compiler(device))

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        if device.type == "cuda":
            _next_call()
        with compiling("[attack]"), torch.compiler.set_stance("default"):
            return fast(*inputs)

    return run
