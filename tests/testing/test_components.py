"""Every registered component passes every check, and none has vanished."""

import pytest

from mithridate.core.registry import KINDS, Kind, entries
from mithridate.testing import (
    attack_checks,
    component_checks,
    defence_checks,
    detector_checks,
    update_attack_checks,
)
from mithridate.testing.conformance import Check
from mithridate.testing.for_aggregators import aggregator_checks

EXPECTED: dict[Kind, set[str]] = {
    "attack": {"accumulative", "clean", "fgsm", "gate_aware", "mim", "noise", "pgd", "vanilla"},
    "update_attack": {
        "accumulative",
        "alie",
        "clean",
        "direct",
        "ipm",
        "label_flip",
        "min_max",
        "noise",
        "sign_flip",
    },
    "aggregator": {
        "bucketing",
        "bulyan",
        "centered_clipping",
        "fltrust",
        "geometric_median",
        "krum",
        "mean",
        "median",
        "multi_krum",
        "nnm",
        "norm_bounding",
        "trimmed_mean",
    },
    "detector": {"discrepancy", "gda", "gmm", "kd", "lid", "loss"},
    "defence": {
        "at",
        "bound_update",
        "chain",
        "clip",
        "dgc",
        "dsc",
        "ema",
        "fat",
        "filter",
        "gate",
        "mart",
        "median_bn",
        "mma",
        "none",
        "robust",
        "skip",
        "trades",
    },
    "model": {"resnet18", "small_cnn", "vgg11"},
    "monitor": {"accuracy_floor", "loss_amplification"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_has_vanished(kind: Kind) -> None:
    assert set(entries(kind)) == EXPECTED[kind]


@pytest.mark.parametrize("check", component_checks(), ids=lambda c: c.__name__)
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in KINDS for n in sorted(EXPECTED[k])])
def test_component(check: Check, kind: Kind, name: str) -> None:
    check(entries(kind)[name].cls)


@pytest.mark.parametrize("check", attack_checks(), ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", sorted(EXPECTED["attack"]))
def test_attack(check: Check, name: str) -> None:
    check(entries("attack")[name].cls)


@pytest.mark.parametrize("check", defence_checks(), ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", sorted(EXPECTED["defence"]))
def test_defence(check: Check, name: str) -> None:
    check(entries("defence")[name].cls)


@pytest.mark.parametrize("check", detector_checks(), ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", sorted(EXPECTED["detector"]))
def test_detector(check: Check, name: str) -> None:
    check(entries("detector")[name].cls)


@pytest.mark.parametrize("check", update_attack_checks(), ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", sorted(EXPECTED["update_attack"]))
def test_update_attack(check: Check, name: str) -> None:
    check(entries("update_attack")[name].cls)


@pytest.mark.parametrize("check", aggregator_checks(), ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", sorted(EXPECTED["aggregator"]))
def test_aggregator(check: Check, name: str) -> None:
    check(entries("aggregator")[name].cls)
