"""The guard as a callback of Lightning."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mithridate.core.errors import ConfigError
from mithridate.guard.loop import Guard


class LightningGuard(Callback):
    """Guards a `LightningModule`: `Trainer(callbacks=[LightningGuard(trusted=..., defence="recommended")])`.

    Schedules that move at every step are taken back with a refused one; those of an epoch go on. The guard's state is
    in Lightning's own checkpoints. For a defence that changes batches, let `training_step` pass its batch through
    `callback.guard.screen` first.

    Args:
        settings: Of the guard, all but model, optimiser and `also`; see `mithridate.guard.Guard`.

    Raises:
        ConfigError: On training with several optimisers.
    """

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401  (those of `Guard`)
        self.settings = settings
        self.guard: Guard | None = None
        self._state: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the guard, with the state of the checkpoint that is gone on from."""
        if len(trainer.optimizers) != 1:
            raise ConfigError(
                f"a guard watches one optimiser, and this module has {len(trainer.optimizers)}; attach "
                "mithridate.guard by hand to each of them."
            )
        also = [c.scheduler for c in trainer.lr_scheduler_configs if c.interval == "step" and c.frequency == 1]
        self.guard = Guard(pl_module, trainer.optimizers[0], also=also, **self.settings)
        if self._state is not None:
            self.guard.load_state_dict(self._state)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # noqa: ANN401  (outputs, batch and its number)
        """Undo what a schedule did for a refused step."""
        if self.guard is not None:
            self.guard.settle()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the loop."""
        if self.guard is not None:
            self.guard.detach()

    def state_dict(self) -> dict[str, Any]:
        """The guard's state, for Lightning's checkpoint."""
        return {} if self.guard is None else self.guard.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the guard is attached."""
        self._state = state_dict or None
