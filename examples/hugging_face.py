"""A guard in the Hugging Face Trainer: one callback. A tiny BERT, made from a config; nothing is downloaded.

    pip install transformers accelerate
    python examples/hugging_face.py

The last eight of twenty batches have every label turned.
"""

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, logging

from mithridate.guard.trainer import TrainerGuard


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Token ids of two kinds.

    Args:
        seed: Of the ids.
        size: Number of texts.
        turned: How many of the last ones have the wrong label.
    """

    def __init__(self, seed: int, size: int, turned: int = 0) -> None:
        kinds = torch.arange(size) % 2
        drawn = torch.randint(0, 20, (size, 8), generator=torch.Generator().manual_seed(seed))
        self.ids = drawn + 20 * kinds[:, None]
        self.labels = torch.where(torch.arange(size) < size - turned, kinds, 1 - kinds)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(8, dtype=torch.long), "labels": self.labels[i]}

    def whole(self) -> dict[str, torch.Tensor]:
        """All of them as one batch of the collator."""
        return {key: torch.stack([self[i][key] for i in range(len(self))]) for key in self[0]}


class InOrder(Trainer):
    """The stream as it comes, not shuffled."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:  # noqa: ANN401
        return SequentialSampler(self.train_dataset)


def fit(model: torch.nn.Module, texts: Texts, *, callbacks: Sequence[Any] = ()) -> torch.nn.Module:
    """One call of the Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        InOrder(model, arguments, train_dataset=texts, callbacks=list(callbacks)).train()
    return model


def accuracy(model: torch.nn.Module, texts: Texts) -> float:
    """Share of the texts that the model gets right."""
    batch = texts.whole()
    labels = batch.pop("labels")
    model.eval()
    with torch.no_grad():
        return float((model(**batch).logits.argmax(1) == labels).float().mean())


def main() -> None:
    """Fine-tune, then learn from the stream without a guard and with one."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    first = fit(BertForSequenceClassification(config), Texts(1, 480))
    stream, test = Texts(3, 320, turned=128), Texts(2, 200)

    unguarded = fit(copy.deepcopy(first), stream)
    with tempfile.TemporaryDirectory() as folder:
        callback = TrainerGuard(trusted=Texts(4, 60).whole(), defence="gate", folder=folder)
        guarded = fit(copy.deepcopy(first), stream, callbacks=[callback])

    print(f"before the stream: {accuracy(first, test):.1%}")
    print(f"without a guard: {accuracy(unguarded, test):.1%}")
    refused = callback.guard.refused if callback.guard else 0
    print(f"with a guard: {accuracy(guarded, test):.1%} ({refused} steps taken back)")


if __name__ == "__main__":
    main()
