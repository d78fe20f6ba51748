"""A model's past: snapshots of its weights every few updates, in bounded memory or on disk."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from mithridate.core.errors import ConfigError
from mithridate.core.files import path_of, write_atomically
from mithridate.core.past import Epoch, Weights, older_epoch
from mithridate.training.checkpoint import load_snapshot


class History:
    """Past states of one model.

    Args:
        every: Updates between two kept states, >= 1.
        keep: States kept at most, >= 0, the current one included; the oldest goes first. 0 keeps only the checkpoints.
        folder: Where states are kept instead of in memory; None keeps them in memory.
        checkpoints: Burn-in models by epoch, older than the one that the stream starts with, which components refuse as
            one: weights, or snapshot files (`BurnInResult.epochs`), read when asked for.
        length: Epochs of the burn-in, for those who look back at half of it.

    Raises:
        ConfigError: `every` is below 1 or `keep` below 0.
    """

    def __init__(
        self,
        *,
        every: int = 1,
        keep: int = 0,
        folder: str | Path | None = None,
        checkpoints: Mapping[int, str | Path | Weights] | None = None,
        length: int | None = None,
    ) -> None:
        if every < 1 or keep < 0:
            raise ConfigError(f"a history needs every >= 1 and keep >= 0, not {every} and {keep}.")
        self.every, self.keep, self.length = every, keep, length
        self.folder = path_of(folder) if folder is not None else None
        self.checkpoints = {k: path_of(v) if isinstance(v, str) else v for k, v in (checkpoints or {}).items()}
        self._states: dict[int, Weights | Path] = {}

    def empty(self) -> "History":
        """A history in memory with the same checkpoints and settings, and no recorded state."""
        return History(every=self.every, keep=self.keep, checkpoints=self.checkpoints, length=self.length)

    def record(self, step: int, model: nn.Module) -> None:
        """Keep the model as it is before update number `step`, if its turn has come; called by the learner.

        Args:
            step: Updates made so far, from 0.
            model: Whose weights to copy.
        """
        with self.recording(step, model):
            pass

    @contextmanager
    def recording(self, step: int, model: nn.Module) -> Iterator[None]:
        """Keep the model as `record` does; if the block raises, the history is as it was before.

        Args:
            step: Updates made so far, from 0.
            model: Whose weights to copy.
        """
        if step % self.every or self.keep == 0:
            yield
            return
        before = dict(self._states)
        weights = Weights.of(model, f"before update {step}").copied()
        self._states[step] = new = self._kept(step, weights)
        gone = [before[step]] if step in before else []
        gone += [self._states.pop(old) for old in sorted(self._states)[: -self.keep]]
        try:
            yield
        except BaseException:
            self._states = before
            _delete(new)
            raise
        for state in gone:
            _delete(state)

    def back(self, k: int) -> Weights | None:
        """The model as it was `k` updates before the newest recorded one, or the nearest kept state older than that.

        Args:
            k: Updates, >= 0.
        """
        if not self._states:
            return None
        old = [step for step in self._states if step <= max(self._states) - k]
        return self._load(self._states[max(old)], f"before update {max(old)}") if old else None

    def checkpoint(self, epoch: Epoch | None = None, *, who: str = "a component") -> Weights:
        """The model at the end of a burn-in epoch before the last.

        Args:
            epoch: Which; unset: the earliest kept one.
            who: Who looks back, for the message.

        Raises:
            ConfigError: It was not kept.
        """
        at = older_epoch(epoch, self.checkpoints.keys(), self.length, who=who)
        state = self.checkpoints[at]
        if isinstance(state, Path):
            snapshot, _, _ = load_snapshot(state)
            state = self.checkpoints[at] = Weights(snapshot.parameters, snapshot.buffers, f"burn-in epoch {at}")
        return state

    def tensors(self) -> dict[str, Tensor]:
        """The recorded states as named tensors, so that a resumed run remembers; `load` takes them back."""
        out: dict[str, Tensor] = {}
        for step, state in self._states.items():
            out |= {f"{step}.{name}": t for name, t in self._load(state, "").named().items()}
        return out

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        by_step: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            step, _, name = key.partition(".")
            by_step.setdefault(int(step), {})[name] = tensor
        for when, named in sorted(by_step.items()):
            weights = Weights.from_named(named, f"before update {when}")
            self._states[when] = self._kept(when, weights)

    def _kept(self, step: int, weights: Weights) -> Weights | Path:
        """The weights, or the file that they are in where states go to a folder."""
        if self.folder is None:
            return weights
        path = self.folder / f"update-{step:08d}.safetensors"
        if self._states.get(step) == path:  # what is there stays until it is known that this update is made
            path = path.with_stem(f"{path.stem}-again")
        tensors = {name: t.cpu().contiguous() for name, t in weights.named().items()}
        write_atomically(path, lambda part: part.write_bytes(safetensors.torch.save(tensors)))
        return path

    def _load(self, state: Weights | Path, label: str) -> Weights:
        return state if isinstance(state, Weights) else Weights.from_named(safetensors.torch.load_file(state), label)


def _delete(state: Weights | Path) -> None:
    if isinstance(state, Path):
        state.unlink(missing_ok=True)
