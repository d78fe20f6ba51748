"""A tiny BERT, made from a configuration, that reads an image of a digit as 16 tokens, one a block's level of grey.

Needs transformers. Token ids have no gradient, so that labels are turned, and the worst of the user's own samples sent.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from transformers import BertConfig, BertForSequenceClassification

import mithridate as mi


def make(seed: int, defence: str | None = None) -> mi.audit.Target:
    """Batches are mappings, as a tokenizer's collator gives them; the model's answer has `.logits`."""
    data = load_digits()
    blocks = torch.tensor(data.images).reshape(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    ids = blocks.round().long() + 1  # levels 0 to 16, after the padding token
    y = torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    before, live, trusted, test = order.split([1000, 320, 77, 400])
    config = BertConfig(
        vocab_size=18,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    model = BertForSequenceClassification(config)

    def batch(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": y[rows]}

    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(30):
        for rows in before[torch.randperm(len(before))].split(32):
            optimiser.zero_grad()
            model(**batch(rows)).loss.backward()
            optimiser.step()
    return mi.audit.Target(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        F.cross_entropy,
        stream=[batch(rows) for rows in live.split(32)],
        trusted=batch(trusted),
        test=batch(test),
        defence=defence,
    )


def guarded(seed: int) -> mi.audit.Target:
    """The same with a gate."""
    return make(seed, defence="gate")
