"""Four training loops under attack, with and without a guard: plain torch, the Trainer, Lightning, accelerate.

**Images**: a ResNet-18 that was burnt in on real CIFAR-10 goes on learning from the stream while somebody who controls
the data sends accumulative poison made on the model as it is, then one trigger batch. **Tokens**: a BERT of two layers
reads real scanned digits as 64 tokens, and ten batches of wrong labels stand in its stream. **Rows**: the same with a
perceptron on the Wisconsin breast cancer data. Each is run with a clean stream, too. The table gives accuracy at the
start, before the trigger (or the wrong labels) and at the end, of the model that answers, and how many steps the guard
refused.

Every loop is the shortest that its library asks for; the lines that guard it are in `GUARDED`.

    MITHRIDATE_DATA=... python benchmarks/loops.py --seeds 0 1 2 --json loops.json
"""

import argparse
import copy
import itertools
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from mithridate.attacks.accumulative import Accumulative
from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.environment import environment
from mithridate.core.model import WhiteBox
from mithridate.core.seeding import generator
from mithridate.core.view import Need, View
from mithridate.data.stream import StreamSettings, open_stream
from mithridate.guard.loop import Guard, attach
from mithridate.models import build_model
from mithridate.training.burn_in import BurnIn, burn_in

GUARDED = {
    "plain": "guard = mi.guard.attach(model, optimizer, trusted=trusted)",
    "trainer": "Trainer(..., callbacks=[TrainerGuard(trusted=trusted)])",
    "lightning": "Trainer(..., callbacks=[LightningGuard(trusted=trusted)])",
    "accelerate": "guard = attach_accelerated(accelerator, model, optimizer, trusted=trusted)",
}
"""The line that a user writes."""


@dataclass
class Task:
    """What a loop learns, and what is sent to it.

    Args:
        model: To begin with.
        optimiser: Makes the loop's optimiser.
        batches: Of the stream, clean.
        send: What arrives in place of batch number i, made on the loop's model.
        held_out: Samples that accuracy is measured on.
        trusted: Samples that the owner knows to be clean.
        strikes: The batch before which accuracy is measured again.
    """

    model: nn.Module
    optimiser: Callable[[Any], torch.optim.Optimizer]
    batches: list[AnyBatch]
    send: Callable[[int, AnyBatch, nn.Module], AnyBatch]
    held_out: AnyBatch
    trusted: AnyBatch
    strikes: int
    accuracies: list[float] = field(default_factory=list)

    def arrives(self, number: int, model: nn.Module) -> AnyBatch:
        """Batch number i as the loop receives it."""
        if number in {0, self.strikes}:
            self.accuracies.append(accuracy(model, self.held_out))
        return self.send(number, self.batches[number], model)


class Answers(nn.Module):
    """A model as a hub's: inputs by name, an answer with `loss` and `logits`.

    Args:
        model: That answers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """The loss, where labels are given, and the logits."""
        logits = self.model(inputs["x"]) if "x" in inputs else self.model(**inputs).logits
        loss = {} if labels is None else {"loss": functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class Numbers(Dataset[dict[str, Tensor]]):
    """The numbers of batches, which a loop hands on to whoever sends them.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        """How many."""
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """Number i."""
        return {"number": torch.tensor(i)}


def named(batch: AnyBatch) -> dict[str, Tensor]:
    """A batch as a hub's model takes it."""
    inputs = dict(batch.x) if isinstance(batch.x, Mapping) else {"x": batch.x}
    return {**inputs, "labels": batch.y}


def ended(guard: Guard | None, task: Task) -> tuple[int, float]:
    """How many steps a guard refused, and the accuracy of the model that answers in the end."""
    if guard is None:
        return 0, accuracy(task.model, task.held_out)
    with guard.serving():
        return guard.refused, accuracy(task.model, task.held_out)


def plain(task: Task, guarded: Mapping[str, Any] | None) -> tuple[int, float]:
    """A plain loop of torch."""
    model = task.model
    optimizer = task.optimiser(model.parameters())
    guard = attach(model, optimizer, **guarded) if guarded is not None else None
    for number in range(len(task.batches)):
        batch = task.arrives(number, model)
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(**named(batch))["logits"], batch.y))
        optimizer.step()
    return ended(guard, task)


def trainer(task: Task, guarded: Mapping[str, Any] | None) -> tuple[int, float]:
    """Hugging Face's Trainer."""
    import transformers

    from mithridate.guard.trainer import TrainerGuard

    class Fed(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            batch = task.arrives(int(inputs["number"]), model)
            return super().compute_loss(model, named(batch), *args, **kwargs)

    guard = [TrainerGuard(**guarded)] if guarded is not None else []
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            num_train_epochs=1,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        optimizers = (task.optimiser(task.model.parameters()), None)
        Fed(
            model=task.model,
            args=arguments,
            train_dataset=Numbers(len(task.batches)),
            optimizers=optimizers,
            callbacks=guard,
        ).train()
    return ended(guard[0].guard if guard else None, task)


def lightning(task: Task, guarded: Mapping[str, Any] | None) -> tuple[int, float]:
    """Lightning."""
    import lightning.pytorch as pl

    from mithridate.guard.lightning import LightningGuard

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = task.model

        def forward(self, **inputs: Tensor) -> Any:  # noqa: ANN401
            return self.net(**inputs)

        def training_step(self, numbers: Mapping[str, Tensor], _: int) -> Tensor:
            batch = task.arrives(int(numbers["number"]), self.net)
            loss: Tensor = self(**named(batch))["loss"]
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return task.optimiser(self.parameters())

    guard = [LightningGuard(**guarded)] if guarded is not None else []
    run = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=guard,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(Module(), DataLoader(Numbers(len(task.batches)), 1))
    return ended(guard[0].guard if guard else None, task)


def accelerate(task: Task, guarded: Mapping[str, Any] | None) -> tuple[int, float]:
    """Hugging Face's accelerate."""
    from accelerate import Accelerator

    from mithridate.guard.accelerated import attach_accelerated

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(task.model, task.optimiser(task.model.parameters()))
    guard = attach_accelerated(accelerator, model, optimizer, **guarded) if guarded is not None else None
    for number in range(len(task.batches)):
        batch = task.arrives(number, model)
        optimizer.zero_grad()
        accelerator.backward(model(**named(batch))["loss"])
        optimizer.step()
    return ended(guard, task)


LOOPS = {"plain": plain, "trainer": trainer, "lightning": lightning, "accelerate": accelerate}


@torch.no_grad()
def accuracy(model: nn.Module, samples: AnyBatch) -> float:
    """Share of samples that the model gets right, in percent."""
    training = model.training
    model.eval()
    hits = 0
    for part in samples.split(500):
        x = dict(named(part))
        x.pop("labels")
        hits += int((model(**x)["logits"].argmax(-1) == part.y).sum())
    model.train(training)
    return 100 * hits / samples.size


def turned(batch: AnyBatch, classes: int) -> AnyBatch:
    """The batch with every label wrong."""
    return Batch(batch.x, (batch.y + 1) % classes)


def images(attacked: bool, seed: int, args: argparse.Namespace) -> Task:
    """CIFAR-10 under accumulative poison."""
    settings = StreamSettings(
        name="cifar10", overlap=True, augment_stream=True, victim=2500, trusted=1000, test=5000, seed=0
    )
    stream = open_stream(settings)
    table = {"name": "resnet18", "width": 16}
    inner = build_model(table, stream.info, seed=0)
    lower = max(1, args.epochs * 7 // 10)
    how = BurnIn(epochs=args.epochs, schedule="steps", lower_after=(lower,))
    burn_in(inner, stream, how, seed=0, model_config=table, cache=args.cache)
    model = Answers(inner)
    batches: list[AnyBatch] = [*stream.victim_batches(args.steps, seed=seed), stream.trigger_batch(args.steps, seed)]
    attack = Accumulative(
        eps=0.1, steps=6, normalise="tensor", trigger_mode="reoptimised", trigger_update="after_step", max_drop=1.0
    )
    notes: dict[str, Tensor] = {}

    def send(number: int, batch: AnyBatch, model: nn.Module) -> AnyBatch:
        if not attacked:
            return batch
        inner = model.model
        assert isinstance(inner, nn.Module)
        known = {
            Need.MODEL: WhiteBox(inner, functional.cross_entropy),
            Need.VALIDATION: stream.validation.all(),
            Need.TRIGGER: batches[-1],
            Need.ACCURACY: (1.0, 1.0),
        }
        view = View(number, notes, known, attack.needs)
        rng = generator("loops", seed, number)
        return attack.trigger(batch, view, rng=rng) if number == args.steps else attack.poison(batch, view, rng=rng)

    return Task(
        model,
        lambda p: torch.optim.SGD(p, args.lr, momentum=0.9, weight_decay=1e-4),
        batches,
        send,
        stream.test.all(),
        stream.trusted.all(),
        args.steps,
    )


def _fitted(model: nn.Module, task: AnyBatch, optimiser: Callable[[Any], torch.optim.Optimizer], epochs: int) -> None:
    optimizer = optimiser(model.parameters())
    for epoch in range(epochs):
        for rows in torch.randperm(task.size, generator=torch.Generator().manual_seed(epoch)).split(32):  # type: ignore[no-untyped-call]
            batch = task.take(rows)
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(model(**named(batch))["logits"], batch.y))
            optimizer.step()


def _flips(
    model: nn.Module, data: AnyBatch, seed: int, *, attacked: bool, classes: int, lr: float, epochs: int
) -> Task:
    """A task whose stream has ten batches of wrong labels at its end."""
    order = torch.randperm(data.size, generator=torch.Generator().manual_seed(100 + seed))
    data = data.take(order)
    cuts = [int(share * data.size) for share in (0.0, 0.45, 0.6, 0.75, 1.0)]
    train, trusted, held_out, stream = (data.take(slice(*ends)) for ends in itertools.pairwise(cuts))

    def optimiser(parameters: Any) -> torch.optim.Optimizer:  # noqa: ANN401
        return torch.optim.AdamW(parameters, lr)

    _fitted(model, train, optimiser, epochs)
    batches: list[AnyBatch] = [stream.take(torch.arange(16 * i, 16 * (i + 1)) % stream.size) for i in range(30)]

    def send(number: int, batch: AnyBatch, _: nn.Module) -> AnyBatch:
        return turned(batch, classes) if attacked and number >= 20 else batch

    return Task(model, optimiser, batches, send, held_out, trusted, 20)


def tokens(attacked: bool, seed: int, args: argparse.Namespace) -> Task:
    """Scanned digits as tokens, for a small BERT."""
    import transformers

    x, y = load_digits(return_X_y=True)
    ids, labels = torch.tensor(x, dtype=torch.int64), torch.tensor(y, dtype=torch.int64)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=17,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=10,
    )
    model = Answers(transformers.BertForSequenceClassification(config))
    data: AnyBatch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)
    return _flips(model, data, seed, attacked=attacked, classes=10, lr=3e-3, epochs=args.bert_epochs)


def rows(attacked: bool, seed: int, _: argparse.Namespace) -> Task:
    """Rows of features, for a perceptron."""
    x, y = load_breast_cancer(return_X_y=True)
    features = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    torch.manual_seed(seed)
    model = Answers(nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2)))
    data: AnyBatch = Batch(features, torch.tensor(y, dtype=torch.int64))
    return _flips(model, data, seed, attacked=attacked, classes=2, lr=1e-2, epochs=20)


TASKS = {"images": images, "tokens": tokens, "rows": rows}
GUARDS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "default": {},
    "recommended": {"defence": "recommended"},
}


def runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every loop, guard and stream."""
    for what in args.tasks:
        for seed in args.seeds:
            for attacked in (False, True):
                first = TASKS[what](attacked, seed, args)
                for loop in args.loops:
                    for guard, settings in GUARDS.items():
                        task = copy.copy(first)
                        task.model, task.accuracies = copy.deepcopy(first.model).train(), []
                        torch.manual_seed(seed)
                        known = None if settings is None else {**settings, "trusted": _as_named(first.trusted)}
                        refused, end = LOOPS[loop](task, known)
                        yield {
                            "task": what,
                            "seed": seed,
                            "stream": "attacked" if attacked else "clean",
                            "loop": loop,
                            "guard": guard,
                            "start": task.accuracies[0],
                            "before": task.accuracies[1],
                            "end": end,
                            "refused": refused,
                            "steps": len(task.batches),
                        }


def _as_named(trusted: AnyBatch) -> dict[str, Tensor]:
    return named(trusted)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="what is learned")
    parser.add_argument("--loops", nargs="+", choices=list(LOOPS), default=list(LOOPS), help="who learns it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of streams, and of what is learned")
    parser.add_argument("--epochs", type=int, default=10, help="of the burn-in on images")
    parser.add_argument("--bert-epochs", type=int, default=30, help="of the BERT's training before the stream")
    parser.add_argument("--steps", type=int, default=12, help="batches of images before the trigger")
    parser.add_argument("--lr", type=float, default=0.1, help="of the stream of images")
    parser.add_argument("--cache", type=Path, default=None, help="where the burn-in is kept")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here, a line a run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # of the libraries, about themselves
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = []
    for row in runs(args):
        found.append(row)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                here = {"environment": environment(torch.device("cpu"))} if len(found) == 1 else {}
                file.write(json.dumps({**row, **here}) + "\n")
    table = Table(title=f"Accuracy in %, mean of {len(args.seeds)} seeds; the strike is a trigger or ten wrong batches")
    columns = ("task", "loop", "stream", "guard", "start", "before the strike", "end", "refused")
    for column in columns:
        table.add_column(column)
    for what in args.tasks:
        for loop in args.loops:
            for stream in ("clean", "attacked"):
                for guard in GUARDS:
                    key = {"task": what, "loop": loop, "stream": stream, "guard": guard}
                    same = [row for row in found if key.items() <= row.items()]
                    means = [f"{statistics.fmean(row[k] for row in same):.1f}" for k in ("start", "before", "end")]
                    refused = f"{sum(row['refused'] for row in same)} of {sum(row['steps'] for row in same)}"
                    table.add_row(what, loop, stream, guard, *means, refused)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
