"""The Grafana dashboard asks for the metrics that the tracker for Prometheus has, all of them, and for no others."""

import ast
import json
import re
from importlib.resources import files
from typing import Any

import pytest

PACKAGE = files("mithridate.guard")
DASHBOARD: dict[str, Any] = json.loads(PACKAGE.joinpath("grafana.json").read_text(encoding="utf-8"))
ENDINGS = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}
"""What Prometheus calls the series of each kind of metric."""


def exported() -> dict[str, str]:
    """Series of the tracker by name, each with its metric; read from the source, for the library may not be here."""
    tree = ast.parse(PACKAGE.joinpath("prometheus_tracker.py").read_text(encoding="utf-8"))
    series: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ENDINGS:
            metric = ast.literal_eval(node.args[0])
            series |= {f"{metric}{ending}": metric for ending in ENDINGS[node.func.id]}
    return series


def asked() -> set[str]:
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    queries = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    return {name for text in [*expressions, *queries] for name in re.findall(r"\bmithridate_\w+", text)}


def test_it_asks_for_what_is_there_and_leaves_nothing_out() -> None:
    series = exported()
    assert len(series) >= 8
    assert asked() <= series.keys()
    assert {series[name] for name in asked()} == set(series.values())


def test_the_names_are_those_that_the_library_serves() -> None:
    prometheus_client = pytest.importorskip("prometheus_client", reason="the extra tracking is not installed")
    from mithridate.guard import Prometheus

    tracker = Prometheus(port=0)
    text = prometheus_client.generate_latest(tracker.registry).decode()
    tracker.close()
    served = {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}
    assert {name for name in served if not name.endswith("_created")} == exported().keys()


def test_panels_do_not_overlap_and_each_explains_itself() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        area = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & area
        assert place["x"] + place["w"] <= 24
        cells |= area
        assert panel["description"].endswith(".")
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
