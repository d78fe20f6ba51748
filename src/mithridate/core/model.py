"""What is looked at: a model, and its answers and loss as pure functions."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mithridate.core.batch import Inputs, each_tensor
from mithridate.core.errors import ConfigError
from mithridate.core.modes import BatchNormMode, Precision, eager, frozen_statistics, other_buffers, passes_in, rounding
from mithridate.core.seeding import no_draws
from mithridate.core.targets import Criterion, check_labels, check_probabilities, mean_loss
from mithridate.maths.calculus import NoDerivativeError, refuse_once_differentiable
from mithridate.maths.directions import Parameters


def answer(module: nn.Module, x: Inputs, state: Mapping[str, Tensor] | None = None) -> Tensor:
    """What a model says of inputs: its logits, or whatever else its criterion takes.

    The model gets copies: one that writes to its inputs, or to the buffers in `state`, changes nothing of the caller's.

    Args:
        module: A model that gives a tensor, or an object or mapping with a tensor under `logits`.
        x: A tensor, a mapping (keyword arguments) or a sequence (positional ones).
        state: Parameters and buffers to use in place of the module's, by name; the others stay the module's.

    Raises:
        ConfigError: The model gives something else, or no floats; or it is of a kind whose parameters cannot be
            replaced.
    """
    x = each_tensor(x, Tensor.clone)
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = {}
    if isinstance(x, Tensor):
        args = (x,)
    elif isinstance(x, Mapping):
        kwargs = dict(x)
    else:
        args = tuple(x)
    output = module(*args, **kwargs) if state is None else call_with(module, _apart(module, state), args, kwargs)
    logits: Any = output
    if not isinstance(output, Tensor):
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"{type(module).__name__} gives a {type(output).__name__}; a model must give a tensor, or an object with a "
            "tensor under `.logits`. Wrap it in a module that does."
        )
    if not logits.is_floating_point() or logits.ndim == 0:
        raise ConfigError(
            f"{type(module).__name__} gives {logits.dtype} of shape {tuple(logits.shape)}; a model must give floats, a "
            "row a sample (logits, not the class)."
        )
    return logits


def call_with(
    module: nn.Module, state: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Any:  # noqa: ANN401  (whatever the module gives)
    """What a module gives with other parameters and buffers than its own, which it has again afterwards.

    Tied ones are replaced wherever they stand. torch's own way to tie them (2.13) leaves a layer that stands at two
    places of a model with plain tensors in place of its parameters, which are never trained again.

    Args:
        module: The module.
        state: Parameters and buffers, by the first of their names.
        args: Positional inputs.
        kwargs: Inputs by name.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wanted = {id(t): state[name] for name, t in own.items() if name in state}
    everywhere = {
        f"{prefix}.{name}" if prefix else name: wanted[id(t)]
        for prefix, m in module.named_modules()
        for name, t in (*m._parameters.items(), *m._buffers.items())
        if id(t) in wanted
    }
    return functional_call(module, {**state, **everywhere}, args, dict(kwargs or {}), tie_weights=False)


def _apart(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with copies of all buffers that a forward pass may write to."""
    for name, m in module.named_modules():
        if isinstance(m, torch.jit.ScriptModule | nn.DataParallel):
            kind = "traced or scripted" if isinstance(m, torch.jit.ScriptModule) else "wrapped in DataParallel"
            what = f"the layer {name}" if name else "the model"
            raise ConfigError(
                f"{what}, a {type(m).__name__}, is {kind}, so that it cannot be computed with other parameters than "
                "its own; give the module that is inside, as it was before."
            )
    written = {name: state.get(name, b).detach().clone() for name, b in other_buffers(module).items()}
    return {**state, **written}


Answering = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""(parameters and buffers by the first of their names, inputs) -> logits."""


@contextmanager
def answering(module: nn.Module, precision: Precision = "float32") -> Iterator[Answering]:
    """What a model says in eval mode with one set of weights after another, for loops of many small passes.

    What each pass of `WhiteBox.logits` looks up is looked up once, which of a few samples is half of the time.

    Args:
        module: The model; it is as it was after the block.
        precision: Of the passes; logits come in float32.

    Raises:
        ConfigError: The model is of a kind whose parameters cannot be replaced.
    """
    _apart(module, {})  # of a kind whose parameters cannot be replaced, it says so
    with frozen_statistics(module, "eval", once=True), no_draws(module):
        names = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
        places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for m in module.modules():
            for table in (m._parameters, m._buffers):
                for key, t in table.items():
                    if t is not None:
                        places.setdefault(names[id(t)], []).append((table, key))
        written = set(other_buffers(module))

        def run(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
            held = []
            try:
                for name, tensor in state.items():
                    apart = tensor.detach().clone() if name in written else tensor
                    for table, key in places[name]:
                        held.append((table, key, table[key]))
                        table[key] = apart
                with passes_in(precision, x.device):
                    logits = answer(module, x)
                return logits.float() if precision == "bfloat16" else logits
            finally:
                for table, key, before in reversed(held):
                    table[key] = before

        yield run


@dataclass(frozen=True)
class WhiteBox:
    """Read access to a model: its parameters, and its answers and loss as pure functions.

    Args:
        module: The model; never changed through this object.
        criterion: (logits, targets) -> mean loss.
    """

    module: nn.Module
    criterion: Criterion

    @property
    def parameters(self) -> Parameters:
        """The trainable parameters, detached (they share memory with the model: do not write)."""
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    def logits(
        self,
        x: Inputs,
        mode: BatchNormMode = "eval",
        *,
        parameters: Parameters | None = None,
        precision: Precision = "float32",
    ) -> Tensor:
        """What the model says of inputs, differentiable in them; nothing is recorded, no global generator drawn from.

        Args:
            x: Inputs.
            mode: `eval` uses BatchNorm's running statistics, `train` those of the batch.
            parameters: Trainable ones to use in place of the model's.
            precision: Of the pass; the logits come in float32.

        Raises:
            ConfigError: The model gives no logits (see `answer`).
        """
        device = next(self.module.parameters(), torch.empty(0)).device
        with frozen_statistics(self.module, mode), no_draws(self.module), passes_in(precision, device):
            own = None if parameters is None and not torch.is_grad_enabled() else self.parameters
            logits = answer(self.module, x, own if parameters is None else parameters)
        return logits.float() if precision == "bfloat16" else logits

    @contextmanager
    def objective(self, mode: BatchNormMode = "eval", precision: Precision = "float32") -> Iterator["PureLoss"]:
        """The loss as a pure function, with BatchNorm in the given mode; flags and statistics come back untouched.

        Equal arguments give equal values inside the block: dropout draws the same numbers, and what a layer would
        remember of a pass is forgotten.

        Args:
            mode: `eval` uses the running statistics. `train` uses those of the batch and records nothing.
            precision: Of the passes, and of the backward passes made inside the block; the loss is computed in float32.

        Raises:
            DataError: (from the function) targets do not fit the model or the criterion.
            ConfigError: (from the block) a layer has no second derivative, and one was asked for.
        """
        loss = PureLoss(self, precision)
        device = next(self.module.parameters(), torch.empty(0)).device
        with frozen_statistics(self.module, mode), eager(), rounding(precision, device):
            try:
                yield loss
            except NoDerivativeError as error:
                raise ConfigError(
                    f"{_without_second_derivative(self.module, loss.inputs.detach())} has no second derivative, which "
                    f"this needs ({error}); put another layer in its place, or take an attack that follows gradients "
                    "of the loss alone (pgd)."
                ) from error


class PureLoss:
    """The loss of a model as a pure function: an `Objective`, that of `WhiteBox.objective`.

    Args:
        box: The model, and the criterion.
        precision: Of the passes; the loss is computed in float32.
    """

    inputs: Tensor
    """Those of the last pass."""

    def __init__(self, box: WhiteBox, precision: Precision) -> None:
        self.box = box
        self.precision = precision
        self._looked_at: dict[tuple[int, torch.Size, int], Tensor] = {}  # by place; kept, so that no other can take it

    def __call__(self, parameters: Parameters, x: Tensor, y: Tensor, *, look: bool = True) -> Tensor:
        """The mean loss.

        Args:
            parameters: By name; buffers may stand among them.
            x: Inputs (n, ...).
            y: Targets (n, ...).
            look: Refuse targets that do not fit, if they have not been looked at yet; a GPU is waited for then.

        Raises:
            DataError: Targets do not fit the model or the criterion.
            ConfigError: The model gives no logits, or the criterion no scalar.
        """
        with no_draws(self.box.module), passes_in(self.precision, x.device):
            logits = answer(self.box.module, x, parameters)
        logits = logits.float() if self.precision == "bfloat16" else logits
        if look and not self._has_seen(y):  # once: an ascent asks again and again, and each look waits for the device
            check_labels(logits, y, where=_ASKED)
            check_probabilities(self.box.criterion, y, where=_ASKED)
            self._looked_at[_place(y)] = y
        self.inputs = x
        return mean_loss(self.box.criterion, logits, y, where=_ASKED)

    @torch.no_grad()
    def look_at(self, parameters: Parameters, x: Tensor, y: Tensor) -> None:
        """Refuse targets that do not fit the model or the criterion, if they have not been looked at yet.

        Args:
            parameters: By name.
            x: Inputs (n, ...).
            y: Targets (n, ...).

        Raises:
            DataError: They do not fit.
        """
        if not self._has_seen(y):
            self(parameters, x, y)

    def _has_seen(self, y: Tensor) -> bool:
        return _place(y) in self._looked_at


_ASKED = "targets that a gradient was asked of"


def _place(t: Tensor) -> tuple[int, torch.Size, int]:
    return t.data_ptr(), t.shape, t._version


def _without_second_derivative(module: nn.Module, x: Tensor) -> str:
    """The first layer of a model whose gradient cannot be differentiated, by name; the model itself if it is none."""
    culprits: list[str] = []

    def ask(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def differentiate(layer: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
            entries = [a.detach().requires_grad_() for a in args if isinstance(a, Tensor) and a.is_floating_point()]
            if culprits or not entries:
                return
            rest = iter(entries)
            try:
                output = layer.forward(
                    *(next(rest) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
                )
                value = (output if isinstance(output, Tensor) else output[0]).sin().sum()
                (slope,) = torch.autograd.grad(value, entries[:1], create_graph=True, materialize_grads=True)
                again = slope.sin().sum()
                refuse_once_differentiable(again)
                torch.autograd.grad(again, entries[:1], allow_unused=True)
            except RuntimeError:
                culprits.append(f"the layer {name} ({type(layer).__name__})")

        return differentiate

    handles = [
        layer.register_forward_hook(ask(name))
        for name, layer in module.named_modules()
        if name and not isinstance(layer, nn.Sequential)
    ]
    try:
        with torch.enable_grad():
            answer(module, x)
    finally:
        for handle in handles:
            handle.remove()
    return culprits[0] if culprits else f"the model, a {type(module).__name__},"
