"""Numbers to verdicts: pure functions, one case a rule."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from mithridate.audit.result import Measure
from mithridate.audit.verdict import Cost, Judged, judged, reach

ALLOWED: Mapping[Measure, float] = {"step": 5.0, "phase": 10.0}
CONTROLS = frozenset({"clean", "clean_trigger", "noise", "noise_trigger"})


def by_seed(values: Sequence[float]) -> dict[int, float]:
    return dict(enumerate(values))


def cost(
    attack: str, values: Sequence[float], frozen: Sequence[float] | None = None, **control: Sequence[float]
) -> Cost:
    beside = {name: by_seed(several) for name, several in control.items()}
    return Cost(attack, "step", by_seed(values), beside, None if frozen is None else by_seed(frozen))


def judge(*costs: Cost, **others: Any) -> Judged:
    tried = sorted({c.attack for c in costs} - CONTROLS)
    return judged(costs, ALLOWED, controls=CONTROLS, tried=tried, **{"skipped": {}, **others})


QUIET = cost("clean", [0.1, 0.2, 0.0])
DEAR = cost("vanilla", [20.0, 21.0, 19.5], clean=[0.1, 0.2, 0.0], noise=[1.0, 1.5, 0.5])
CHEAP = cost("vanilla", [1.0, 1.2, 0.9], clean=[0.1, 0.2, 0.0])


def test_an_interval_above_what_is_allowed_and_above_the_controls_fails() -> None:
    verdict = judge(QUIET, DEAR)
    assert verdict.verdict == "fail"
    (reason,) = verdict.reasons
    assert reason.startswith("vanilla cost 20.2 points [18.3, 22.1] in one step, ")
    assert reason.endswith(" (5 allowed)")
    assert "more than clean" in reason
    assert "more than noise" in reason


def test_all_intervals_below_pass() -> None:
    assert judge(QUIET, CHEAP).verdict == "pass"


def test_two_seeds_are_too_few_for_either() -> None:
    for values in ([20.0, 20.0], [0.0, 0.0]):
        verdict = judge(cost("clean", [0.0, 0.0]), cost("vanilla", values, clean=[0.0, 0.0]))
        assert verdict.verdict == "inconclusive"
        assert verdict.reasons[0] == "too few seeds: 2, and an interval needs 3 or more"


def test_an_attack_no_better_than_noise_shows_nothing() -> None:
    loud = [20.0, 22.0, 19.0]
    verdict = judge(QUIET, cost("noise", loud, clean=[0.1, 0.2, 0.0]), cost("vanilla", [20.0, 21.0, 19.5], noise=loud))
    assert verdict.verdict == "inconclusive"
    assert verdict.reasons[0].startswith("no attack better than noise: vanilla cost ")


def test_batch_norm_alone_explains_it() -> None:
    values, controls = [20.0, 21.0, 19.5], {"clean": [0.0, 0.0, 0.0]}
    verdict = judge(QUIET, cost("vanilla", values, frozen=[0.5, 0.1, 0.2], **controls))
    assert verdict.verdict == "inconclusive"
    assert verdict.reasons[0].startswith("BatchNorm alone explains it: vanilla cost 20.2 points")
    assert judge(QUIET, cost("vanilla", values, frozen=[18.0, 19.0, 20.0], **controls)).verdict == "fail"


def test_another_attack_still_fails_where_batch_norm_explains_one() -> None:
    explained = cost("accumulative", [20.0, 21.0, 19.5], frozen=[0.0, 0.0, 0.0])
    assert judge(QUIET, explained, DEAR).verdict == "fail"


def test_a_clean_stream_that_ruins_the_model_fails_without_an_attacker() -> None:
    verdict = judge(cost("clean", [40.0, 41.0, 39.0]), cost("vanilla", [30.0, 31.0, 29.0], clean=[40.0, 41.0, 39.0]))
    assert verdict.verdict == "fail"
    assert verdict.reasons[0].startswith("without any attack, the clean stream cost 40.0 points")


def test_an_interval_over_the_limit_is_open() -> None:
    verdict = judge(QUIET, cost("vanilla", [1.0, 9.0, 5.0], clean=[0.0, 0.0, 0.0]))
    assert verdict.verdict == "inconclusive"
    assert verdict.reasons == [
        "not shown either way: vanilla cost 5.0 points [-4.9, 14.9] in one step (5 allowed); give more seeds"
    ]


def test_a_spent_budget_hides_no_failure_and_makes_no_pass() -> None:
    assert judge(QUIET, DEAR, budget_spent="5 s were over").verdict == "fail"
    verdict = judge(QUIET, CHEAP, budget_spent="5 s were over")
    assert (verdict.verdict, verdict.reasons) == ("inconclusive", ["budget spent: 5 s were over"])


def test_nothing_tried_is_no_pass() -> None:
    verdict = judge(QUIET, skipped={"vanilla": "the model is not differentiable in its inputs"})
    assert verdict.verdict == "inconclusive"
    assert "(vanilla: the model is not differentiable in its inputs)" in verdict.reasons[0]


@settings(max_examples=30)
@given(st.lists(st.floats(-50, 100), min_size=3, max_size=8), st.floats(0, 60))
def test_a_verdict_is_what_a_t_test_says(values: list[float], allowed: float) -> None:
    """`above` and `below` are the two one-sided t-tests at 2.5 %."""
    verdict = judged(
        [cost("vanilla", values)], {"step": allowed, "phase": 0}, controls=CONTROLS, tried=["vanilla"], skipped={}
    )
    whole = reach(values)
    if whole.high - whole.low < 1e-6:
        return
    greater = ttest_1samp(values, allowed, alternative="greater").pvalue < 0.025
    less = ttest_1samp(values, allowed, alternative="less").pvalue < 0.025
    if min(abs(whole.low - allowed), abs(whole.high - allowed)) > 1e-6:
        assert verdict.verdict == ("fail" if greater else "pass" if less else "inconclusive")


def test_the_reasons_of_a_failure_begin_with_the_worst() -> None:
    milder = cost("accumulative", [10.0, 10.5, 9.5])
    assert [reason.split()[0] for reason in judge(milder, DEAR).reasons] == ["vanilla", "accumulative"]


def test_no_value_has_no_mean() -> None:
    assert reach([]).mean != pytest.approx(reach([]).mean, nan_ok=False)
