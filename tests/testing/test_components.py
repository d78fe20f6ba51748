"""Every registered component passes every check of its kind, and none has vanished."""

import pytest

from mithridate.core.registry import KINDS, Kind, entries
from mithridate.testing import check_component

EXPECTED: dict[Kind, set[str]] = {
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
    "attack": {
        "accumulative",
        "clean",
        "fgsm",
        "gate_aware",
        "gradient_inversion",
        "label_flip",
        "mim",
        "noise",
        "pgd",
        "vanilla",
        "worst_samples",
    },
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
        "promote",
        "skip",
        "trades",
    },
    "detector": {"discrepancy", "gda", "gmm", "kd", "lid", "loss"},
    "model": {"resnet18", "small_cnn", "vgg11"},
    "monitor": {"accuracy_floor", "loss_amplification"},
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
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_has_vanished(kind: Kind) -> None:
    assert set(entries(kind)) == EXPECTED[kind]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in sorted(EXPECTED[kind])])
def test_component(kind: Kind, name: str) -> None:
    """One test a component, not one a check: what the checks share is tried once, wherever the test runs."""
    check_component(name, kind=kind)
