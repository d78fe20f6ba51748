"""A stream that is made, not loaded, and a model that learns it in a second."""

from functools import lru_cache

import numpy as np
import torch
from torch.optim import SGD

from mithridate.core.batch import Batch
from mithridate.core.defence import Defence
from mithridate.core.past import Weights
from mithridate.core.seeding import derived_seed
from mithridate.data.catalogue import DatasetInfo, PartSizes
from mithridate.data.stream import Part, Stream, StreamSettings
from mithridate.models import build_model
from mithridate.training.burn_in import BurnIn, burn_in
from mithridate.training.history import History
from mithridate.training.learner import Learner

CLASSES = 4
SIZES = PartSizes(burn_in=240, victim=100, validation=60, trusted=40, batch_size=20)
TEST = 200

TOY = DatasetInfo(
    name="toy",
    shape=(1, 8, 8),
    classes=tuple("abcd"),
    mean=(0.4,),
    std=(0.3,),
    crop_padding=1,
)
"""What the toy images are: a bright bar in one of four places, in noise."""


def toy_stream(seed: int = 0) -> Stream:
    """8x8 grey images of four classes (where a bar stands), with enough noise that some are hard.

    Args:
        seed: Of all images.
    """
    rng = np.random.default_rng(derived_seed("toy", seed))

    def part(name: str, n: int) -> Part:
        y = rng.integers(0, CLASSES, n)
        x = rng.normal(0.35, 0.22, (n, 1, 8, 8))
        for i, label in enumerate(y):
            x[i, 0, :, 2 * label : 2 * label + 2] += 0.2
        return Part(name, (255 * x.clip(0, 1)).astype(np.uint8), y.astype(np.int64))

    settings = StreamSettings(
        name="arrays",
        burn_in=SIZES.burn_in,
        victim=SIZES.victim,
        validation=SIZES.validation,
        trusted=SIZES.trusted,
        test=TEST,
        batch_size=SIZES.batch_size,
        augment=False,
        seed=seed,
    )
    return Stream(
        settings=settings,
        info=TOY,
        burn_in=part("burn_in", 240),
        victim=part("victim", SIZES.victim),
        validation=part("validation", SIZES.validation),
        trusted=part("trusted", SIZES.trusted),
        test=part("test", TEST),
        fingerprint=f"toy-{seed}",
    )


@lru_cache(maxsize=64)
def _burned_in(stream_seed: int, seed: int, epochs: int) -> dict[str, torch.Tensor]:
    """The state of the toy model after its burn-in."""
    stream = toy_stream(stream_seed)
    model = build_model({"name": "small_cnn", "width": 8}, stream.info, seed=seed)
    burn_in(model, stream, BurnIn(epochs=epochs, batch_size=20, lr=0.05), seed=seed)
    return model.state_dict()


def toy_learner(
    stream: Stream,
    *,
    seed: int = 0,
    defence: Defence | None = None,
    dtype: torch.dtype = torch.float32,
    lr: float = 0.05,
    epochs: int = 4,
) -> Learner:
    """A small convolutional net after a short burn-in on a toy stream, with a fresh SGD and all a defence may ask for.

    Args:
        stream: From `toy_stream`.
        seed: Of the model and its burn-in.
        defence: What stands before it.
        dtype: Of the parameters.
        lr: Learning rate of the online phase.
        epochs: Of the burn-in; after 4 it is right 19 times in 20, after 1 it has only begun to learn.
    """
    model = build_model({"name": "small_cnn", "width": 8}, stream.info, seed=seed)
    model.load_state_dict(_burned_in(stream.settings.seed, seed, epochs))
    model.to(dtype)
    optimiser = SGD(model.parameters(), lr=lr, momentum=0.9)
    fresh = build_model({"name": "small_cnn", "width": 8}, stream.info, seed=seed).to(dtype)
    untrained = Weights.of(fresh, "burn-in epoch 0").copied()
    history = History(keep=8, checkpoints={0: untrained}, length=1)  # who looks at half of it sees the untrained one
    training = [Batch(x.to(dtype), y) for x, y in stream.burn_in.batches(60)]
    trusted = stream.trusted.all()
    return Learner(
        model,
        optimiser,
        defence=defence,
        trusted=trusted,
        history=history,
        training=training,
        domain=stream.domain,
    )
