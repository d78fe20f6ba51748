"""Rows of numbers: what a poisoned trigger batch does to a tumour classifier, and to the same behind a gate.

    python examples/tabular.py

scikit-learn's breast cancer data, standardised. An attacker may move each feature by one standard deviation, inside
the range that was observed; labels stay as they are.
"""

import copy

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer

import mithridate as mi


def main() -> None:
    """Burn in, then one stream a defence."""
    torch.set_num_threads(1)
    table = load_breast_cancer()
    order = np.random.default_rng(0).permutation(len(table.target))
    x = table.data[order]
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    stream = mi.Stream.from_arrays(x, table.target[order], domain="observed", classes=["malignant", "benign"])

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    mi.burn_in(model, stream, mi.BurnIn(epochs=20, batch_size=20, lr=0.05), seed=0)

    run = mi.OnlineRun(steps=5, lr=0.5)
    attack = mi.attacks.Vanilla(eps=1.0)
    for name, defence in (("without a guard", None), ("with a guard", mi.defences.Gate())):
        copied = copy.deepcopy(model)
        learner = mi.Learner(
            copied,
            mi.victim_optimiser(copied, run),
            defence=defence,
            trusted=stream.trusted.all(),
            domain=stream.domain,
        )
        outcome = mi.run_online(learner, stream, attack, run, seed=0)
        before, after = outcome.accuracy_before_trigger, outcome.accuracy_after_trigger
        print(f"{name}: {after:.1%} after the trigger, {before:.1%} before")


if __name__ == "__main__":
    main()
