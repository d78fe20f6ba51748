"""What a run sees of a target."""

import torch

from mithridate.audit.target import guard_of, samples_of
from mithridate.audit.victim import Victim
from mithridate.core.seeding import generator
from tests.audit.targets import rows, table_target


def test_a_filter_is_fitted_to_what_the_model_was_trained_on_and_not_to_trusted_samples() -> None:
    known = rows(60, generator("trained on"))
    target = table_target(
        0, defence={"name": "filter", "fpr": 0.1}, training=[known.take(slice(40)), known.take(slice(40, 60))]
    )
    victim = Victim(target, samples_of(target, 3, 0), guard_of(target), 0)
    learner = victim.learner(guarded=True)
    assert learner.training is not None
    assert torch.equal(torch.cat([batch.x for batch in learner.training]), known.x)
    assert learner.trusted is not None
    assert learner.trusted.size == 40
    assert learner.update(victim.samples.batches[0]).flagged is not None
    other = table_target(0, defence=target.defence, training=known.take(slice(10)))
    assert Victim(other, samples_of(other, 3, 0), guard_of(other), 0).fingerprint != victim.fingerprint
