"""The guard as a callback of Hugging Face's Trainer."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mithridate.core.errors import CheckpointError
from mithridate.guard.loop import Guard
from mithridate.guard.state_file import STATE, read_state, write_state


class TrainerGuard(TrainerCallback):
    """Guards a `Trainer`: `Trainer(..., callbacks=[TrainerGuard(trusted=..., defence="recommended")])`.

    The schedule of the learning rate is taken back with a refused step. The guard's state lies in each checkpoint and
    is taken up when the Trainer resumes: from `last_checkpoint(output_dir)`, after a crash. For a defence that changes
    batches, let `compute_loss` of your Trainer pass `inputs` through `callback.guard.screen` first.

    Args:
        settings: Of the guard, all but model, optimiser and `also`; see `mithridate.guard.Guard`.

    Raises:
        CheckpointError: On resuming from a checkpoint that has no state of the guard.
    """

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401  (those of `Guard`)
        self.settings = settings
        self.guard: Guard | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: object,
        **kwargs: Any,  # noqa: ANN401  (as the Trainer says)
    ) -> None:
        """Attach the guard; go on from the checkpoint that the Trainer goes on from."""
        optimiser = kwargs["optimizer"]
        schedule = kwargs.get("lr_scheduler")
        also = [schedule] if schedule is not None else []
        self.guard = Guard(kwargs["model"], getattr(optimiser, "optimizer", optimiser), also=also, **self.settings)
        if state.global_step:
            self.guard.load_state_dict(read_state(_state_of(args, state.global_step)))

    def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401  (whatever the Trainer hands on)
        """Undo what the schedule did for a refused step."""
        if self.guard is not None:
            self.guard.settle()

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:  # noqa: ANN401  (ditto)
        """Write the guard's state as the last file of a checkpoint."""
        if self.guard is not None:
            write_state(_checkpoint(args, state.global_step) / STATE, self.guard.state_dict())

    def on_train_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401  (whatever the Trainer hands on)
        """Leave the loop."""
        if self.guard is not None:
            self.guard.detach()


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _state_of(args: TrainingArguments, step: int) -> Path:
    places = [Path(args.resume_from_checkpoint)] if isinstance(args.resume_from_checkpoint, str) else []
    for place in [*places, _checkpoint(args, step)]:
        if (place / STATE).is_file():
            return place / STATE
    raise CheckpointError(
        f"no {STATE} in {_checkpoint(args, step)}: that checkpoint was written without the guard, or not to its end; "
        "resume from mithridate.guard.last_checkpoint(output_dir)."
    )
