"""Every rule by which a report doubts itself, in the order in which it names doubts of equal severity."""

from mithridate.report.doubts.clean_stream import clean_falls_as_far, costs_on_clean, false_alarms, false_vetoes
from mithridate.report.doubts.crafting import objective_fell
from mithridate.report.doubts.environment import made_in_two_places, versions_mixed
from mithridate.report.doubts.learning import buffers_explain, diverged, quarantined, starts_differ
from mithridate.report.doubts.noise import includes_zero, no_better_than_noise, no_noise_baseline
from mithridate.report.doubts.phase import (
    alarms_before_trigger,
    early_loss,
    floor_above_start,
    halted,
    no_phase,
    nothing_read,
)
from mithridate.report.doubts.power import budgets_differ, left_its_ball, power_over_optimiser
from mithridate.report.doubts.rule import Rule
from mithridate.report.doubts.seeds import class_unread, duplicate_seeds, few_seeds, few_test_samples, settings_apart
from mithridate.report.doubts.threshold import calibration_missed, chooses_nothing

RULES: tuple[Rule, ...] = (
    no_better_than_noise,
    clean_falls_as_far,
    no_phase,
    floor_above_start,
    nothing_read,
    class_unread,
    early_loss,
    objective_fell,
    buffers_explain,
    diverged,
    halted,
    settings_apart,
    duplicate_seeds,
    few_seeds,
    few_test_samples,
    includes_zero,
    alarms_before_trigger,
    chooses_nothing,
    calibration_missed,
    false_alarms,
    false_vetoes,
    costs_on_clean,
    quarantined,
    no_noise_baseline,
    starts_differ,
    budgets_differ,
    left_its_ball,
    versions_mixed,
    made_in_two_places,
    power_over_optimiser,
)
