"""A guard's steps as metrics for Prometheus: to be fetched from a port, or in a file for jobs that end."""

import time
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server, write_to_textfile

from mithridate.core.errors import ConfigError, UserError
from mithridate.core.files import path_of, writing
from mithridate.guard.record import WORDS, StepRecord

BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Upper ends of the histogram's bars, in seconds."""

HIGHEST_PORT = 65_535


class Prometheus:
    """Counts steps by verdict, and shows the latest readings. Has a registry of its own: several do not meet.

    Args:
        port: Served over HTTP under `/metrics`; 0 takes any free one, which `port` then names.
        address: Of this machine, where the port is opened; `0.0.0.0` lets other machines fetch.
        textfile: Written instead, for the textfile collector of the node exporter; its name ends with `.prom`.
        every: Seconds between two writes of the textfile, at least.

    Raises:
        ConfigError: Both or neither of `port` and `textfile` are given, or they can be none.
        UserError: The port is taken, or may not be opened.
        WriteError: The textfile cannot be written.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        address: str = "127.0.0.1",
        textfile: str | Path | None = None,
        every: float = 15.0,
    ) -> None:
        if (port is None) == (textfile is None):
            raise ConfigError("Prometheus: give a port to be fetched from, or a textfile for a job that ends.")
        registry = self.registry = CollectorRegistry()
        self._steps = Counter("mithridate_steps", "Steps that a loop tried", ["verdict"], registry=registry)
        for verdict in WORDS:  # 0, and not absent, before the first one
            self._steps.labels(verdict)
        self._seconds = Histogram(
            "mithridate_guard_seconds",
            "What the guard took of a step, or of all that it judged at once",
            buckets=BUCKETS,
            registry=registry,
        )
        samples = "Samples taken out of batches", "Samples that the defence corrected, dropped or gives less weight"
        self._quarantined = Counter("mithridate_samples_quarantined", samples[0], registry=registry)
        self._flagged = Counter("mithridate_samples_flagged", samples[1], registry=registry)
        self._in_a_row = Gauge(
            "mithridate_refusals_in_a_row", "Refusals since the last step that stayed", registry=registry
        )
        self._loss = Gauge("mithridate_trusted_loss", "Mean loss on the trusted set", registry=registry)
        self._worst = Gauge(
            "mithridate_trusted_worst_accuracy", "Accuracy of the worst class of the trusted set", registry=registry
        )
        for gauge in (self._loss, self._worst):
            gauge.set(float("nan"))  # not measured is not 0
        self._textfile = None if textfile is None else path_of(textfile)
        self._every, self._next = every, 0.0
        self._server: WSGIServer | None = None
        if self._textfile is not None:
            if self._textfile.suffix != ".prom":
                raise ConfigError(f"textfile = {self._textfile}: the node exporter reads files that end with .prom.")
            with writing(self._textfile):
                self._textfile.parent.mkdir(parents=True, exist_ok=True)
                self._write()
        elif port is not None:
            self._server = _served(port, address, registry)
        self.port: int | None = None if self._server is None else self._server.server_port

    def note(self, record: StepRecord) -> None:
        """Count the steps of one record; the textfile is written if it is time."""
        self._steps.labels(record.verdict).inc(record.steps)
        self._seconds.observe(record.seconds)
        self._quarantined.inc(record.quarantined)
        self._flagged.inc(record.flagged)
        self._in_a_row.set(record.refusals_in_a_row)
        for gauge, value in ((self._loss, record.trusted_loss), (self._worst, record.trusted_worst)):
            if value is not None:
                gauge.set(value)
        if self._textfile is not None and time.monotonic() >= self._next:
            self._write()

    def close(self) -> None:
        """Write the textfile, or give the port free."""
        if self._textfile is not None:
            self._write()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._server = None

    def _write(self) -> None:
        self._next = time.monotonic() + self._every
        write_to_textfile(str(self._textfile), self.registry)


def _served(port: int, address: str, registry: CollectorRegistry) -> WSGIServer:
    if not 0 <= port <= HIGHEST_PORT:
        raise ConfigError(f"port = {port}: give a number from 0 to {HIGHEST_PORT}.")
    try:
        server: WSGIServer = start_http_server(port, address, registry)[0]
    except OSError as error:
        raise UserError(
            f"port {port} of {address} cannot be opened for Prometheus ({error.strerror}); another program, or another "
            "rank, may have it: give another port, 0 for any free one, or a textfile."
        ) from error
    return server
