"""A guard's steps as metrics of an MLflow run."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from mithridate.core.errors import UserError, said
from mithridate.guard.readings import Readings
from mithridate.guard.record import StepRecord

AT_ONCE = 1000
"""Metrics that a server of MLflow takes in one request."""

MOST_WAITING = 100_000
"""Metrics that are kept for a server that does not answer; then the oldest are lost."""


class MLflow:
    """Sends every reading of every record, from a thread of its own, so that no step waits for a server.

    Args:
        experiment: In which a run is begun, if none is going on in this process and no `run_id` is given.
        run_id: A run to be gone on with, such as that of a training which is resumed.
        tracking_uri: Of the server; by default what MLflow itself takes.
        every: Seconds between two requests, at least.

    Raises:
        UserError: The run or the server cannot be reached.
    """

    def __init__(
        self,
        *,
        experiment: str = "mithridate",
        run_id: str | None = None,
        tracking_uri: str | None = None,
        every: float = 10.0,
    ) -> None:
        active = mlflow.active_run() if run_id is None and tracking_uri is None else None
        try:
            self._client = mlflow.MlflowClient(tracking_uri)
            self._began = run_id is None and active is None
            if run_id is not None:
                self.run_id = self._client.get_run(run_id).info.run_id
            else:
                self.run_id = active.info.run_id if active else self._begun(experiment)
        except MlflowException as error:
            raise UserError(
                f"MLflow cannot be used ({said(error)}); give the run_id of a run that is there, or the tracking_uri "
                "of a server that answers."
            ) from error
        self._readings = Readings()
        self._waiting: deque[Metric] = deque(maxlen=MOST_WAITING)
        self._every, self._next = every, 0.0
        self._thread = ThreadPoolExecutor(1, "mithridate-mlflow")
        self._sending: Future[None] | None = None

    def note(self, record: StepRecord) -> None:
        """Keep one record, and send what has come since the last request, if that has been answered."""
        now = int(1000 * time.time())
        self._waiting.extend(Metric(k, v, now, record.attempt) for k, v in self._readings.of(record).items())
        if time.monotonic() < self._next or (self._sending is not None and not self._sending.done()):
            return
        self._next = time.monotonic() + self._every
        before, self._sending = self._sending, self._thread.submit(self._send, self._taken())
        if before is not None:
            before.result()  # raises what went wrong

    def close(self) -> None:
        """Send what is left; a run that was begun here ends."""
        try:
            if self._sending is not None:
                self._sending.result()
            self._send(self._taken())
            if self._began:
                self._client.set_terminated(self.run_id)
        finally:
            self._sending, self._began = None, False
            self._thread.shutdown(wait=False)

    def _begun(self, experiment: str) -> str:
        there = self._client.get_experiment_by_name(experiment)
        number = there.experiment_id if there else self._client.create_experiment(experiment)
        return str(self._client.create_run(number, run_name="guard").info.run_id)

    def _taken(self) -> list[Metric]:
        metrics = list(self._waiting)
        self._waiting.clear()
        return metrics

    def _send(self, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), AT_ONCE):
            self._client.log_batch(self.run_id, metrics[start : start + AT_ONCE], synchronous=True)
