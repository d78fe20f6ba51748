"""What the short names on a page mean, in words that stand by themselves."""

from collections.abc import Mapping, Sequence

from mithridate.report.detectors import detectors
from mithridate.report.rows import Row, step_noun
from mithridate.report.wording import listed, noun_of, one_line

ATTACKS: Mapping[str, str] = {
    "accumulative": "poisons batch after batch so that a later trigger batch breaks the model",
    "clean": "no attack: the same stream, untouched",
    "fgsm": "raises the loss of every batch by one step of the gradient's sign",
    "gate_aware": "knows the gate, and weakens its poison until the gate would let it pass",
    "gradient_inversion": "makes poison whose gradient equals the one that the attacker wants",
    "label_flip": "sends every sample with a wrong label",
    "mim": "raises the loss of every batch by gradient steps with momentum",
    "noise": "random changes as large as an attack's: the control that an attack must beat",
    "pgd": "raises the loss of every batch by projected gradient steps",
    "vanilla": "poisons the trigger batch alone, without a phase before it",
    "worst_samples": "sends real, rightly labelled samples whose gradients do the most harm",
}
"""Attacks on batches, by component."""

UPDATE_ATTACKS: Mapping[str, str] = {
    "accumulative": "hostile clients move the model round after round to where the trigger breaks it",
    "alie": "all hostile clients send the honest mean minus a few standard deviations",
    "clean": "no attack: every client is honest",
    "direct": "attacks in the trigger round alone, without a phase before it",
    "ipm": "hostile clients send a multiple of the honest mean, turned round",
    "label_flip": "hostile clients train on their own images with wrong labels",
    "min_max": "hostile clients go as far from the honest mean as the honest ones lie apart",
    "noise": "hostile clients send random updates: the control that an attack must beat",
    "sign_flip": "hostile clients send the opposite of their honest update",
}
"""Attacks by clients of a federation, by component."""

DEFENCES: Mapping[str, str] = {
    "at": "moves every sample towards the class it is labelled with, poisoned or not (adversarial training)",
    "bound_update": "shortens every step of the parameters to a set length",
    "chain": "several defences, one after the other",
    "clip": "shortens long gradients, or the updates of clients (gradient clipping)",
    "dgc": "clips or drops an update whose step would raise the loss elsewhere (dynamic gradient clipping)",
    "dsc": "corrects the samples that today's model and an older one see too differently (discrepancy-aware sample "
    "correction)",
    "ema": "answers with an average of the model's recent states",
    "fat": "corrects each sample only until the model classifies it as labelled",
    "filter": "drops the samples that a detector finds suspicious, or learns less from them",
    "gate": "keeps a step only if the model is still good on a small trusted set",
    "mart": "corrects samples, then trains on hard neighbours, misclassified ones above all",
    "median_bn": "BatchNorm that standardises with medians, which a few samples cannot move",
    "mma": "corrects samples, then trains on each at its distance from the decision boundary",
    "none": "no defence: everything is learned as it comes",
    "promote": "answers with an average that was tested on a trusted set first",
    "skip": "skips batches whose loss or gradient is unusually large",
    "trades": "corrects samples, then trains with a penalty on answers that neighbours change",
    "bucketing": "the server averages updates in small random groups before another rule",
    "bulyan": "the server keeps the updates that krum ranks best, and trims each parameter",
    "centered_clipping": "the server clips what updates differ from its last one",
    "fltrust": "the server trusts an update as far as it agrees with its own on trusted data",
    "geometric_median": "the server takes the point with the least distance to all updates",
    "krum": "the server takes the one update that is nearest to its neighbours",
    "mean": "the server averages all updates",
    "median": "the server takes the median of each parameter",
    "multi_krum": "the server averages the updates that krum ranks best",
    "nnm": "the server replaces each update by the mean of its nearest ones before another rule",
    "norm_bounding": "the server shortens long updates, then averages",
    "trimmed_mean": "the server leaves out each parameter's extremes, then averages",
}
"""Defences, and robust rules of a server, by component."""

DETECTORS: Mapping[str, str] = {
    "discrepancy": "how differently today's model and an older one answer to a sample (Memorization Discrepancy)",
    "gda": "how likely a sample's features are under one normal distribution a class",
    "gmm": "how likely a sample's features are under a mixture of normal distributions a class",
    "kd": "how many of its class's features lie near those of a sample (kernel density)",
    "lid": "how many directions a sample's neighbours lie in (local intrinsic dimensionality)",
    "loss": "the loss of a sample with the label that it came with",
}
"""Detectors, by component."""

MOST_LABELS = 3
"""Labels of one component that are told in full; of more, the component's name."""


def explained(rows: Sequence[Row]) -> dict[str, str]:
    """The names that the rows are told by, and the words around them, each with what it means.

    Labels are told under the component's name that they stand for. Components of others are left out: nothing is known
    of them here.

    Args:
        rows: All rows of a page.
    """
    noun = step_noun(rows)
    names: dict[str, list[str]] = {}
    meanings: dict[str, str] = {}

    def tell(component: str, label: str, meaning: str | None) -> None:
        if meaning is not None:
            meanings[component] = meaning
            names.setdefault(component, [])
            if label not in names[component]:
                names[component].append(label)

    for row in rows:
        tell(
            f"attack {row.attack_name}", row.attack, (UPDATE_ATTACKS if row.federated else ATTACKS).get(row.attack_name)
        )
    for row in rows:
        parts = [
            one_line(part.get("name")) for part in row.defence_settings.get("parts", ()) if isinstance(part, Mapping)
        ]
        component = " ".join(["defence", row.defence_name, *parts])  # two chains of other parts are told one by one
        meaning = DEFENCES.get(row.defence_name)
        tell(component, row.defence, f"{meaning}: {listed(parts)}" if meaning and parts else meaning)
        for part in parts:
            tell(f"defence {part}", part, DEFENCES.get(part))
    for info in detectors(rows):
        tell(f"detector {info.name}", info.label, DETECTORS.get(info.name))
    words = {}
    for component, meaning in meanings.items():
        kind, name, *_ = component.split(" ")
        labels = names[component]
        several = any(label.partition(",")[0] != name for label in labels)
        shown = listed(labels) if several and len(labels) <= MOST_LABELS else name
        words[f"{shown} ({kind})"] = meaning
    steps = any(row.has_phase for row in rows)
    return words | {
        **({"phase": f"the {noun_of(2, noun)} before the trigger"} if steps else {}),
        "trigger": f"the one {noun} in whose step the damage is to show; the drop is what accuracy loses in it",
        "points": "percentage points of accuracy on test data",
        "n": "how many runs, each with its own seed, a mean is taken over; behind ± stands one standard deviation",
    }
