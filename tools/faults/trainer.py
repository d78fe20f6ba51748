"""A guarded run of Hugging Face's Trainer that is killed at random moments, and goes on from its checkpoints."""

import hashlib
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from mithridate.guard.state_file import last_checkpoint
from mithridate.guard.trainer import TrainerGuard
from tools.faults.case import Result, UnpreparedError, drawn
from tools.faults.processes import forked, import_what, killed_after

LIMIT = 200
"""Seconds of one run, on a busy machine, too."""

STEPS, SAVE_EVERY, BATCH = 24, 3, 8
WORDS, LENGTH = 30, 8


@dataclass
class Kills:
    """Kills, by number: each run is killed up to three times, at a random moment of what it has left."""

    seed: int
    shared: Path
    full: int = 200
    seconds: float = 0.0
    right: Any = None

    def prepare(self) -> None:
        """Train once, undisturbed."""
        import_what(partial(_train, self.shared / "imports"), limit=LIMIT)
        began = time.monotonic()
        self.right, died = forked(partial(_train, self.shared / "undisturbed"), limit=LIMIT)
        self.seconds = time.monotonic() - began
        if died:
            raise UnpreparedError(f"an undisturbed run: {died}")
        if not 0 < self.right["refused"] < STEPS:
            raise UnpreparedError("the guard must refuse some steps and admit others, or resuming it shows nothing")

    def case(self, number: int, folder: Path) -> Result:
        """Kill a run, go on, up to three times, and to the end."""
        rng = drawn("trainer", self.seed, number)
        kills = []
        for _ in range(rng.randint(1, 3)):
            kills.append(_killed_after(rng.random() * self.seconds, folder))
        what = f"killed: {', '.join(kills)}"
        told, died = forked(partial(_train, folder), limit=LIMIT)
        if died:
            return Result("exception", what, f"resuming: {died}")
        if told != self.right:
            differing = [key for key in told if told[key] != self.right[key]]
            return Result("silent", what, f"the resumed run ends otherwise: {', '.join(differing)}")
        return Result("redone", what)


def _killed_after(seconds: float, folder: Path) -> str:
    died = killed_after(partial(_train, folder, linger=seconds), seconds, limit=LIMIT)
    return f"after {seconds:.1f} s ({died or 'it had ended'})"


def _train(folder: Path, linger: float = 0.0) -> dict[str, Any]:
    """Train from the last whole checkpoint, and say how it ended.

    Args:
        folder: Of the checkpoints.
        linger: Seconds that the process stays afterwards at least, so that a kill finds it.
    """
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )
    callback = TrainerGuard(
        defence={"name": "gate", "reference": "best", "max_loss_rise": 0.0, "max_accuracy_drop": 1.0},
        trusted=_texts(40, 9),
        folder=folder / "guard",
    )
    trainer = transformers.Trainer(
        model=transformers.BertForSequenceClassification(config),
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=0.01,
            save_steps=SAVE_EVERY,
            save_total_limit=3,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1000,
            seed=3,
        ),
        train_dataset=_Rows(_texts(64, 0)),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    guard = callback.guard
    if guard is None:
        raise AssertionError("the guard was never attached")
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    time.sleep(linger)
    return {
        "weights": digest.hexdigest(),
        "attempts": guard.attempts,
        "steps": guard.steps,
        "refused": guard.refused,
    }


class _Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, columns: dict[str, torch.Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {name: column[i] for name, column in self.columns.items()}


def _texts(n: int, seed: int) -> dict[str, torch.Tensor]:
    """Token ids whose class is whether word 1 stands among them."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, WORDS, (n, LENGTH), generator=rng)
    labels = torch.arange(n) % 2
    ids[labels == 1, torch.randint(0, LENGTH, (int(labels.sum()),), generator=rng)] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def make(seed: int, shared: Path) -> Kills:
    """The kind, for a seed, with what its cases share in a folder."""
    return Kills(seed, shared)
