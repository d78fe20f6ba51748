"""A guard's steps in MLflow, TensorBoard and Prometheus, by the libraries themselves; skipped where they are not."""

import socket
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mithridate as mi
from mithridate.core.errors import ConfigError, UserError, WriteError
from mithridate.guard import StepRecord, Trackers
from mithridate.guard.readings import Readings
from mithridate.guard.record import WORDS

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, which are not ours to mend

STEPS = [
    StepRecord(attempt=1, step=0, verdict="admitted", seconds=0.01, trusted_loss=0.5, trusted_worst=0.8),
    StepRecord(attempt=2, step=1, verdict="refused", reason="worst class fell", seconds=0.02, refusals_in_a_row=1),
    StepRecord(attempt=3, step=1, verdict="refused", reason="again", seconds=0.04, refusals_in_a_row=2, flagged=3),
    StepRecord(attempt=4, step=1, verdict="shortened", seconds=0.02, quarantined=2, trusted_loss=0.25),
]


def test_readings_count_verdicts_and_leave_out_what_is_not_measured() -> None:
    readings = Readings()
    first, second, *_, last = [readings.of(record) for record in STEPS]
    assert first == {
        "guard/admitted": 1,
        "guard/shortened": 0,
        "guard/refused": 0,
        "guard/seconds": 0.01,
        "guard/refusals_in_a_row": 0,
        "guard/quarantined": 0,
        "guard/flagged": 0,
        "guard/trusted_loss": 0.5,
        "guard/trusted_worst": 0.8,
    }
    assert first.keys() - second.keys() == {"guard/trusted_loss", "guard/trusted_worst"}
    assert (last["guard/admitted"], last["guard/refused"], last["guard/shortened"]) == (1, 2, 1)
    assert readings.of(replace(STEPS[1], attempt=14, steps=10))["guard/refused"] == 12


@pytest.mark.parametrize(
    ("name", "module"), [("MLflow", "mlflow"), ("TensorBoard", "tensorboard"), ("Prometheus", "prometheus_client")]
)
def test_what_is_not_installed_is_named_with_its_extra(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in {loaded for loaded in sys.modules if loaded.partition(".")[0] == module} | {module}:
        monkeypatch.setitem(sys.modules, loaded, None)
    for loaded in ("torch.utils.tensorboard", f"mithridate.guard.{name.lower()}_tracker"):
        monkeypatch.delitem(sys.modules, loaded, raising=False)
    with pytest.raises(mi.UserError, match=rf"{name} needs .* pip install 'mithridate\[tracking\]'"):
        getattr(mi.guard, name)


class TestPrometheus:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("prometheus_client", reason="the extra tracking is not installed")

    @staticmethod
    def fetched(port: int | None) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def test_a_port_serves_what_happened_so_far_and_is_free_afterwards(self) -> None:
        tracker = mi.guard.Prometheus(port=0)
        before = self.fetched(tracker.port)
        assert before['mithridate_steps_total{verdict="refused"}'] == 0
        assert before["mithridate_trusted_loss"] != before["mithridate_trusted_loss"]  # NaN: not measured
        for record in STEPS:
            tracker.note(record)
        after = self.fetched(tracker.port)
        counts = {word: after[f'mithridate_steps_total{{verdict="{word}"}}'] for word in WORDS}
        assert counts == {"admitted": 1, "refused": 2, "shortened": 1}
        assert after["mithridate_guard_seconds_count"] == 4
        assert after["mithridate_guard_seconds_sum"] == pytest.approx(0.09)
        assert after['mithridate_guard_seconds_bucket{le="0.03"}'] == 3
        assert after["mithridate_trusted_loss"] == 0.25
        assert after["mithridate_trusted_worst_accuracy"] == 0.8
        assert after["mithridate_refusals_in_a_row"] == 0
        assert (after["mithridate_samples_quarantined_total"], after["mithridate_samples_flagged_total"]) == (2, 3)
        tracker.note(replace(STEPS[1], attempt=14, steps=10))
        assert self.fetched(tracker.port)['mithridate_steps_total{verdict="refused"}'] == 12
        port = tracker.port
        tracker.close()
        tracker.close()
        again = mi.guard.Prometheus(port=port)
        assert self.fetched(port)["mithridate_guard_seconds_count"] == 0  # a registry of its own
        again.close()

    def test_a_port_that_is_taken_is_named_with_what_to_do(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(UserError, match=rf"port {port} of 127\.0\.0\.1 cannot be opened .* give another port"):
                mi.guard.Prometheus(port=port)

    def test_a_textfile_is_written_at_once_now_and_then_and_at_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "node" / "guard.prom"
        tracker = mi.guard.Prometheus(textfile=path, every=3600)
        assert 'mithridate_steps_total{verdict="refused"} 0.0' in path.read_text()
        for record in STEPS:
            tracker.note(record)
        assert 'mithridate_steps_total{verdict="refused"} 0.0' in path.read_text()
        tracker.close()
        assert 'mithridate_steps_total{verdict="refused"} 2.0' in path.read_text()
        often = mi.guard.Prometheus(textfile=path, every=0)
        often.note(STEPS[0])
        assert 'mithridate_steps_total{verdict="admitted"} 1.0' in path.read_text()
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_a_wrong_setting_says_what_is_wrong(self, tmp_path: Path) -> None:
        for settings, message in (
            ({}, "give a port to be fetched from, or a textfile"),
            ({"port": 0, "textfile": tmp_path / "x.prom"}, "give a port"),
            ({"port": 70_000}, "from 0 to 65535"),
            ({"textfile": tmp_path / "x.txt"}, "end with .prom"),
        ):
            given: dict[str, Any] = settings
            with pytest.raises(ConfigError, match=message):
                mi.guard.Prometheus(**given)
        (tmp_path / "file").touch()
        with pytest.raises(WriteError, match="cannot be written"):
            mi.guard.Prometheus(textfile=tmp_path / "file" / "x.prom")


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("tensorboard", reason="the extra tracking is not installed")

    def test_every_reading_is_a_curve_and_every_refusal_has_its_reason(self, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        tracker = mi.guard.TensorBoard(tmp_path / "board")
        for record in STEPS:
            tracker.note(record)
        tracker.close()
        tracker.close()
        events = EventAccumulator(str(tmp_path / "board")).Reload()
        curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert curves["guard/refused"] == [(1, 0), (2, 1), (3, 2), (4, 2)]
        assert curves["guard/trusted_loss"] == [(1, 0.5), (4, 0.25)]
        texts = events.Tensors("guard/verdict/text_summary")
        assert [t.tensor_proto.string_val[0] for t in texts] == [
            b"refused: worst class fell",
            b"refused: again",
            b"shortened: ",
        ]

    def test_a_folder_that_cannot_be_written_is_the_users_mistake(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(WriteError, match="cannot be written"):
            mi.guard.TensorBoard(tmp_path / "file" / "board")


class TestMLflow:
    @pytest.fixture
    def uri(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        mlflow = pytest.importorskip("mlflow", reason="the extra tracking is not installed")
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.chdir(tmp_path)
        before = mlflow.get_tracking_uri()
        yield (tmp_path / "mlruns").as_uri()
        mlflow.set_tracking_uri(before)

    @staticmethod
    def curve(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
        import mlflow

        history = mlflow.MlflowClient(uri).get_metric_history(run_id, f"guard/{name}")
        return sorted((metric.step, metric.value) for metric in history)

    def test_a_run_is_begun_filled_and_ended(self, uri: str) -> None:
        import mlflow

        tracker = mi.guard.MLflow(tracking_uri=uri, every=3600)
        for record in STEPS:
            tracker.note(record)
        tracker.close()
        tracker.close()
        run = mlflow.MlflowClient(uri).get_run(tracker.run_id)
        assert run.info.status == "FINISHED"
        assert mlflow.active_run() is None
        assert self.curve(uri, tracker.run_id, "refused") == [(1, 0), (2, 1), (3, 2), (4, 2)]
        assert self.curve(uri, tracker.run_id, "trusted_loss") == [(1, 0.5), (4, 0.25)]
        again = mi.guard.MLflow(tracking_uri=uri, run_id=tracker.run_id)
        again.note(replace(STEPS[0], attempt=5))
        again.close()
        assert self.curve(uri, tracker.run_id, "seconds")[-1] == (5, 0.01)

    def test_a_run_of_the_users_own_is_filled_and_left_open(self, uri: str) -> None:
        import mlflow

        mlflow.set_tracking_uri(uri)
        with mlflow.start_run() as run:
            tracker = mi.guard.MLflow()
            tracker.note(STEPS[0])
            tracker.close()
            assert tracker.run_id == run.info.run_id
            assert mlflow.MlflowClient(uri).get_run(run.info.run_id).info.status == "RUNNING"
        assert self.curve(uri, run.info.run_id, "admitted") == [(1, 1)]

    def test_a_run_that_is_not_there_is_the_users_mistake(self, uri: str) -> None:
        with pytest.raises(UserError, match="MLflow cannot be used"):
            mi.guard.MLflow(tracking_uri=uri, run_id="0" * 32)

    def test_a_server_that_fails_later_is_told_once_and_stops_nothing(
        self, uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        tracker = mi.guard.MLflow(tracking_uri=uri, every=0)

        def down(*_: object, **__: object) -> None:
            raise ConnectionError("no route to host")

        monkeypatch.setattr(tracker._client, "log_batch", down)
        trackers = Trackers([tracker])
        for _ in range(20):
            for record in STEPS:
                trackers.note(record)
        trackers.close()
        messages = [message for message in caplog.messages if "no route to host" in message]
        assert len(messages) == 1
        assert "the tracker MLflow raised ConnectionError" in messages[0]
