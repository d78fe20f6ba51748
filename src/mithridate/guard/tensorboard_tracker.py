"""A guard's steps as curves in TensorBoard."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from mithridate.core.files import path_of, writing
from mithridate.guard.readings import Readings
from mithridate.guard.record import StepRecord


class TensorBoard:
    """Writes every reading of every record to a folder that `tensorboard --logdir` shows, and the reason of a refusal.

    Args:
        log_dir: The folder; give each rank one of its own.

    Raises:
        WriteError: It cannot be written.
    """

    def __init__(self, log_dir: str | Path) -> None:
        folder = path_of(log_dir)
        with writing(folder):
            self._writer = SummaryWriter(str(folder))
        self._readings = Readings()

    def note(self, record: StepRecord) -> None:
        """Write one record."""
        for name, value in self._readings.of(record).items():
            self._writer.add_scalar(name, value, record.attempt)
        if record.verdict != "admitted":
            words = f"{record.verdict}: {record.reason}"
            self._writer.add_text("guard/verdict", words, record.attempt)

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()
