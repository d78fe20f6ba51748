"""What is looked at: a model, its loss as a pure function, and what it was earlier."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mithridate.core.batch import Inputs, each_tensor
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.folding import folded
from mithridate.core.seeding import no_draws
from mithridate.core.soft_targets import improbable
from mithridate.maths.calculus import NoDerivativeError, Parameters, refuse_once_differentiable

BatchNormMode = Literal["eval", "train"]
"""`eval`: running statistics; `train`: the statistics of the batch."""

Precision = Literal["float32", "tf32", "bfloat16"]
"""Of the passes through a model: `tf32` lets a GPU multiply with 10 bits of fraction, which elsewhere is `float32`;
`bfloat16` is autocast's, which leaves the sums that need it in float32."""

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets) -> mean loss, a scalar."""

IGNORED = -100
"""The label that torch's cross-entropy leaves out (`ignore_index`)."""


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
    written = {name: state.get(name, b).detach().clone() for name, b in _other_buffers(module).items()}
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
        written = set(_other_buffers(module))

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


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Layers whose buffers are known to stay as they are in eval mode, and without `track_running_stats`."""


def _other_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a forward pass may write to although BatchNorm does not record: those of all other layers."""
    return {
        f"{prefix}.{name}" if prefix else name: b
        for prefix, m in module.named_modules()
        if m._buffers and type(m) not in _NORMS
        for name, b in m._buffers.items()
        if b is not None
    }


def loss_of(criterion: Criterion, logits: Tensor, y: Tensor, *, where: str) -> Tensor:
    """The mean loss, a scalar.

    Args:
        criterion: (logits, targets) -> mean loss.
        logits: What a model said.
        y: Targets.
        where: Names the samples in messages.

    Raises:
        DataError: The targets do not fit the model, or the criterion.
        ConfigError: The criterion gives no scalar.
    """
    check_labels(logits, y, where=where)
    _check_probabilities(criterion, y, where=where)
    return _compared(criterion, logits, y, where=where)


def _compared(criterion: Criterion, logits: Tensor, y: Tensor, *, where: str) -> Tensor:
    """The mean loss of targets that have been looked at before."""
    try:
        # Of outputs (n, 1) and targets (n,) torch makes n * n pairs, and only warns.
        spread = y.is_floating_point() and logits.shape != y.shape
        with _as_error("Using a target size") if spread else nullcontext():
            loss = criterion(logits, y)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, UserWarning) as error:
        if isinstance(error, NotImplementedError):  # of forward mode, which is none of the targets' faults
            raise
        raise DataError(
            f"{where}: the criterion cannot compare outputs {logits.dtype} {tuple(logits.shape)} with targets "
            f"{y.dtype} {tuple(y.shape)}: {error}; give targets, or a model, of the shape and type that the criterion "
            "takes (class numbers are int64: `y.long()`)."
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(
            f"the criterion gives {shape}, and a loss is one number: give one that averages over samples "
            '(reduction="mean").'
        )
    return loss.reshape(())


@contextmanager
def _as_error(message: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=message)
        yield


def unknown_labels(outputs: float, y: Tensor) -> Tensor:
    """Which class numbers a model has no output for: (n, ...) int64 -> (n,) bool; `IGNORED` ones are known.

    Args:
        outputs: How many the model has; infinite if targets are no class numbers.
        y: Class numbers.
    """
    unknown = ((y < 0) & (y != IGNORED)) | (y >= outputs)
    return unknown.flatten(1).any(1) if y.ndim > 1 else unknown


def names_classes(logits: Tensor, y: Tensor) -> bool:
    """Whether targets are class numbers of a model that gives such logits.

    Args:
        logits: (n, classes) or (n, positions, classes).
        y: (n,) or (n, positions) int64.
    """
    return (
        y.dtype == torch.int64 and logits.ndim == y.ndim + 1 and logits.shape[:-1] == y.shape and logits.shape[-1] > 1
    )


def check_labels(logits: Tensor, y: Tensor, *, where: str) -> None:
    """Refuse class numbers that a model has no output for.

    Args:
        logits: (n, classes) or (n, positions, classes).
        y: (n,) or (n, positions) int64, `IGNORED` ones left out; targets that are no class numbers of such a model
            (`names_classes`) are not looked at.
        where: Named in the message.

    Raises:
        DataError: There are some.
    """
    if not names_classes(logits, y):
        return
    outputs = logits.shape[-1]
    if bool(unknown_labels(outputs, y).any()):
        labels = y[y != IGNORED]
        raise DataError(
            f"{where}: labels span [{int(labels.min())}, {int(labels.max())}], but the model has {outputs} outputs; "
            "give labels of the model's own classes, or build it with as many outputs as there are classes."
        )


def _check_probabilities(criterion: Criterion, y: Tensor, *, where: str) -> None:
    bad = improbable(criterion, y)
    if bad is not None and bool(bad.any()):
        raise DataError(
            f"{where}: {int(bad.sum())} of {len(y)} targets hold numbers outside [0, 1], and the criterion reads them "
            "as probabilities; give such, or a criterion that takes any number (F.mse_loss)."
        )


def right_answers(logits: Tensor, y: Tensor) -> Tensor | None:
    """Which targets are hit; None where that has no meaning, as in regression.

    Args:
        logits: (n, classes) or (n, positions, classes) for class numbers, shaped like `y` for many labels.
        y: Class numbers int64, (n,) or (n, positions), `IGNORED` ones left out; or many labels, floats of 0 and 1.

    Returns:
        (targets,) bool.
    """
    if y.dtype == torch.int64 and logits.shape[:-1] == y.shape:
        counted = y != IGNORED
        return (logits.argmax(-1) == y)[counted]
    if y.is_floating_point() and logits.shape == y.shape and bool(((y == 0) | (y == 1)).all()):
        return ((logits > 0) == (y > 0.5)).flatten()
    return None


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
        with frozen_statistics(self.module, mode), eager(), _rounding(precision, device):
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
            _check_probabilities(self.box.criterion, y, where=_ASKED)
            self._looked_at[_place(y)] = y
        self.inputs = x
        return _compared(self.box.criterion, logits, y, where=_ASKED)

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


def passes_in(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Passes through a model in the given precision, inside the block.

    Args:
        precision: `tf32` changes nothing on a CPU.
        device: Where the model lies.
    """
    if precision != "bfloat16":
        return _rounding(precision, device)
    # Without a cache: what a parameter was cast to in one pass carries that pass's graph, or its dual part.
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


@contextmanager
def _rounding(precision: Precision, device: torch.device) -> Iterator[None]:
    """Whether matrix products and convolutions of a GPU may round to TF32; torch lets convolutions, by default."""
    if device.type != "cuda":
        yield
        return
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = precision == "tf32"
        yield
    finally:
        for backend, flag in zip(backends, before, strict=True):
            backend.allow_tf32 = flag


def eager() -> AbstractContextManager[None]:
    """Compiled models as they were before: what the compiler makes can be differentiated only once."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]  # torch gives it no types


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


_OWN_FLAGS: ContextVar[Mapping[nn.Module, bool]] = ContextVar("own train flags", default=MappingProxyType({}))
"""What the train flags were before the outermost `in_mode`."""


@contextmanager
def in_mode(module: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """Put a model in eval or train mode; every module's own flag comes back as it was.

    A part that is in eval mode while the model as a whole is in train mode is frozen, and stays in eval mode.

    Args:
        module: The model.
        mode: `eval` or `train`.
    """
    now = [(m, m.training) for m in module.modules()]
    before = _OWN_FLAGS.get()
    own = {m: before.get(m, flag) for m, flag in now}
    token = _OWN_FLAGS.set({**before, **own})
    try:
        module.train(mode == "train")
        if mode == "train" and own[module]:
            for m, flag in own.items():
                if not flag:
                    m.training = False
        yield
    finally:
        for m, flag in now:
            m.training = flag
        _OWN_FLAGS.reset(token)


@contextmanager
def frozen_statistics(module: nn.Module, mode: BatchNormMode, *, once: bool = False) -> Iterator[None]:
    """Put a model in eval or train mode without letting it record; every flag and buffer comes back as it was.

    In eval mode BatchNorm is computed with the layer before it where it can be (`folding`), which rounds differently.

    Args:
        module: The model.
        mode: `eval` or `train`.
        once: Compute BatchNorm into those layers once for each set of weights, as `folding.folded` says.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [m.track_running_stats for m in norms]
    with in_mode(module, mode), _kept_buffers(module):
        try:
            if mode == "eval":
                with folded(module, once=once):
                    yield
                return
            for m in norms:
                m.track_running_stats = False
            yield
        finally:
            for m, flag in zip(norms, tracking, strict=True):
                m.track_running_stats = flag


@contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Bring back whatever a layer other than BatchNorm writes to its buffers inside the block."""
    held = [
        (m, {name: (b, None if b is None else b.detach().clone()) for name, b in m._buffers.items()})
        for m in module.modules()
        if m._buffers and type(m) not in _NORMS
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for m, buffers in held:
                for name in m._buffers.keys() - buffers.keys():
                    del m._buffers[name]
                for name, (b, kept) in buffers.items():
                    m._buffers[name] = b
                    if b is not None and kept is not None and not torch.equal(b, kept):
                        b.copy_(kept)
