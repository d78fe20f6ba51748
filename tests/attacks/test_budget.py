"""Which model crafting may look at: with a surrogate the victim's is out of sight, and only the surrogate counts."""

from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from mithridate.core.attack import Attack
from mithridate.core.errors import ConfigError, ThreatModelError
from mithridate.core.model import WhiteBox
from mithridate.core.registry import build, config_of
from mithridate.core.view import Need, View
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner

STREAM = toy_stream(0)
BATCH = STREAM.victim_batch(0, 0)
CLEAN_TRIGGER = STREAM.trigger_batch(3, 0)
SIGHTED: dict[str, dict[str, Any]] = {
    "fgsm": {},
    "pgd": {"steps": 2},
    "mim": {"steps": 2},
    "vanilla": {"steps": 2},
    "accumulative": {"steps": 1},
    "accumulative, after_step": {"steps": 2, "trigger_update": "after_step"},
    "accumulative, hiding": {"steps": 2, "trigger_update": "after_step", "beta": 0.5, "hide": "pixels"},
}


def attack_of(case: str, **values: Any) -> Attack:
    attack: Attack = build("attack", {"name": case.partition(",")[0], "eps": 0.1, **SIGHTED[case], **values})
    return attack


@pytest.fixture(scope="module")
def victim() -> Learner:
    return toy_learner(STREAM)


@pytest.fixture(scope="module")
def surrogate() -> WhiteBox:
    return toy_learner(STREAM, seed=1).white_box


class OutOfSight(WhiteBox):
    """A victim that must not be looked at, and says so."""

    def __init__(self) -> None:
        pass

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the victim's {name} was looked at")


def everything(victim: Learner, **things: Any) -> dict[Need, Any]:
    named = {need.name.lower(): need for need in Need}
    return {
        Need.MODEL: victim.white_box,
        Need.VALIDATION: STREAM.validation.all(),
        Need.TRIGGER: CLEAN_TRIGGER,
        Need.ACCURACY: (0.9, 0.9),
        Need.HISTORY: victim.history,
        **{named[key]: value for key, value in things.items()},
    }


def crafted(attack: Attack, view: View) -> list[Tensor]:
    """All that an attack makes: two batches and the trigger."""
    made = []
    for i in range(2):
        made.append(attack.poison(STREAM.victim_batch(i, 0), view, rng=torch.Generator().manual_seed(i)).x)
        attack.after_step(view, torch.Generator().manual_seed(10 + i))
    return [*made, attack.trigger(CLEAN_TRIGGER, view, rng=torch.Generator().manual_seed(2)).x]


@pytest.mark.parametrize("case", SIGHTED)
def test_needs_name_the_model_that_is_looked_at(case: str) -> None:
    victims, surrogates = attack_of(case), attack_of(case, model_access="surrogate")
    assert Need.MODEL in victims.needs
    assert Need.SURROGATE not in victims.needs
    assert surrogates.needs == victims.needs - {Need.MODEL} | {Need.SURROGATE}
    assert Need.MODEL in type(surrogates).needs  # the class is not touched
    assert build("attack", config_of(surrogates)).needs == surrogates.needs


def test_hiding_takes_the_models_past() -> None:
    assert Need.HISTORY not in attack_of("accumulative").needs
    both = attack_of("accumulative", beta=0.1, model_access="surrogate").needs
    assert both == {Need.SURROGATE, Need.HISTORY, Need.VALIDATION, Need.TRIGGER, Need.ACCURACY}


@pytest.mark.parametrize("loss", ["ce", "kl", "cw"])
@pytest.mark.parametrize("case", SIGHTED)
def test_on_a_surrogate_it_makes_what_it_makes_of_that_model_as_victim(
    victim: Learner, surrogate: WhiteBox, case: str, loss: str
) -> None:
    """Bit for bit, with a victim in the view that cannot be looked at even by an attack that is granted it."""
    blind = attack_of(case, model_access="surrogate", loss=loss)
    hidden = everything(victim, model=OutOfSight(), surrogate=surrogate)
    # After the first step, at which the library itself compares the victim with its old checkpoints.
    found = crafted(blind, View(1, {}, hidden, frozenset(Need)))
    wanted = crafted(attack_of(case, loss=loss), View(1, {}, everything(victim, model=surrogate)))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    usual = crafted(attack_of(case, loss=loss), View(1, {}, everything(victim)))
    assert not any(torch.equal(a, b) for a, b in zip(found, usual, strict=True))


@pytest.mark.parametrize("case", SIGHTED)
def test_without_a_surrogate_it_says_what_is_missing(victim: Learner, case: str) -> None:
    blind = attack_of(case, model_access="surrogate")
    with pytest.raises(ThreatModelError, match="needs the surrogate model"):
        blind.poison(BATCH, View(0, {}, everything(victim), blind.needs), rng=torch.Generator())


def test_poison_of_another_model_still_hurts() -> None:
    """Adversarial examples transfer: less than white-box ones, far more than noise."""
    attacks = {access: attack_of("pgd", model_access=access) for access in ("victim", "surrogate")}
    attacks["noise"] = build("attack", {"name": "noise", "eps": 0.1})
    rises: dict[str, list[float]] = {name: [] for name in attacks}
    for seed in range(5):
        stream = toy_stream(seed)
        learner, batch = toy_learner(stream, seed=seed), stream.victim_batch(0, 0)
        view = View(0, {}, everything(learner, surrogate=toy_learner(stream, seed=seed + 1).white_box))
        clean = learner.evaluate([batch]).loss
        for name, attack in attacks.items():
            sent = attack.poison(batch, view, rng=torch.Generator().manual_seed(0))
            rises[name].append(learner.evaluate([sent]).loss - clean)
    white_box, transferred, by_chance = (median(values) for values in rises.values())
    assert white_box > transferred > 2 * abs(by_chance)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_access": "oracle"}, "model_access = 'oracle'"),
        ({"loss": "mse"}, "loss = 'mse'"),
        ({"name": "accumulative", "beta": -0.1}, "beta = -0.1"),
        ({"name": "accumulative", "hide_from": -1}, "hide_from = -1"),
        ({"name": "accumulative", "hide": "both"}, "hide = 'both'"),
        ({"name": "accumulative", "hide_trigger": True}, 'set hide = "pixels"'),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("attack", {"name": "pgd", **values})
