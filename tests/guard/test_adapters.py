"""The guard in Hugging Face's Trainer, in Lightning and in accelerate: the real libraries, small real models."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from mithridate.core.defence import Defence, Verdict
from mithridate.core.errors import CheckpointError, ConfigError
from mithridate.core.past import Weights
from mithridate.core.view import View
from mithridate.guard.record import StepRecord

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the libraries, about themselves
]

WORDS, LENGTH, CLASSES = 30, 8, 2


@dataclass(frozen=True)
class RefusesSome(Defence):
    """Refuses the steps whose numbers it is given, by how often it was asked."""

    which: frozenset[int] = frozenset()
    asked: list[int] = field(default_factory=list)

    def admit(self, before: Weights, view: View) -> Verdict:
        self.asked.append(view.step)
        return Verdict(len(self.asked) not in self.which, "as it was told")


@dataclass
class Keeps:
    records: list[StepRecord] = field(default_factory=list)

    def note(self, record: StepRecord) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


def texts(n: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Token ids whose class is whether word 1 stands among them."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, WORDS, (n, LENGTH), generator=rng)
    labels = torch.arange(n) % CLASSES
    ids[labels == 1, torch.randint(0, LENGTH, (int(labels.sum()),), generator=rng)] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: column[i] for name, column in self.columns.items()}


def bert() -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def trainer(folder: Path, callback: Any, steps: int = 8, accumulate: int = 1) -> Any:
    transformers: Any = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.01,
        save_steps=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    return transformers.Trainer(model=bert(), args=arguments, train_dataset=Rows(texts()), callbacks=[callback])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_refused_step_of_the_trainer_moves_neither_model_nor_schedule(tmp_path: Path, accumulate: int) -> None:
    transformers: Any = pytest.importorskip("transformers")
    from mithridate.guard.trainer import TrainerGuard

    states: list[Any] = []

    class Watches(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimiser = kwargs["optimizer"].optimizer
            parts = [kwargs["model"].state_dict(), optimiser.state_dict(), kwargs["lr_scheduler"].state_dict()]
            states.append(copy.deepcopy(parts))

    keeps = Keeps()
    guard = TrainerGuard(defence=RefusesSome(frozenset({1, 3})), trackers=[keeps])
    run = trainer(tmp_path, guard, accumulate=accumulate)
    run.add_callback(Watches())
    before = copy.deepcopy(run.model.state_dict())
    run.train()
    assert [r.verdict for r in keeps.records] == ["refused", "admitted", "refused", *["admitted"] * 5]
    assert _same(before, states[0][0])
    assert not states[0][1]["state"]
    assert _same(states[1], states[2])
    assert not _same(states[2][0], states[3][0])
    assert states[-1][2]["last_epoch"] == 6


def test_a_trainer_that_resumes_ends_where_the_one_does_that_was_not_stopped(tmp_path: Path) -> None:
    from mithridate.guard.state_file import last_checkpoint

    pytest.importorskip("transformers")
    from mithridate.guard.trainer import TrainerGuard

    def train(folder: Path, **more: Any) -> tuple[Any, Any]:
        callback = TrainerGuard(defence={"name": "gate", "reference": "best"}, trusted=texts(40, 9))
        run = trainer(folder, callback)
        run.train(**more)
        return run, callback.guard

    whole, guard = train(tmp_path)
    newest = last_checkpoint(tmp_path)
    assert newest is not None
    assert newest.endswith("checkpoint-8")
    resumed, again = train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert _same(whole.model.state_dict(), resumed.model.state_dict())
    assert (guard.attempts, guard.steps, guard.refused) == (again.attempts, again.steps, again.refused)
    (tmp_path / "checkpoint-8" / "mithridate-guard.safetensors").unlink()
    assert str(last_checkpoint(tmp_path)).endswith("checkpoint-4")
    with pytest.raises(CheckpointError, match="last_checkpoint"):
        train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_refused_step_in_lightning_moves_neither_model_nor_schedule(
    tmp_path: Path, precision: Any, accumulate: int
) -> None:
    lightning: Any = pytest.importorskip("lightning.pytorch")
    from mithridate.guard.lightning import LightningGuard

    states: list[Any] = []

    class Watches(lightning.Callback):
        def on_train_batch_end(self, run: Any, module: Any, *_: Any) -> None:
            parts = [module.state_dict(), run.optimizers[0].state_dict()]
            states.append(copy.deepcopy([*parts, run.lr_scheduler_configs[0].scheduler.state_dict()]))

    keeps = Keeps()
    guard = LightningGuard(defence=RefusesSome(frozenset({2})), trackers=[keeps])
    module = lightning_module()
    run = _lightning(tmp_path, [guard, Watches()], precision, accumulate, epochs=1 if accumulate == 1 else 2)
    run.fit(module, DataLoader(Rows(texts()), 8))
    words = [r.verdict for r in keeps.records]
    assert words[:3] == ["admitted", "refused", "admitted"]
    first, second = accumulate - 1, 2 * accumulate - 1
    assert _same(_without_statistics(states[first][0]), _without_statistics(states[second][0]))
    assert _same(states[first][1:], states[second][1:])
    assert _same(states[first], states[second])


def test_a_lightning_run_that_resumes_goes_on_with_the_guards_account(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    from mithridate.guard.lightning import LightningGuard

    def train(epochs: int, path: str | None = None) -> tuple[Any, Any, Any]:
        guard = LightningGuard(defence={"name": "gate", "reference": "best"}, trusted=_trusted())
        module = lightning_module()
        lightning: Any = pytest.importorskip("lightning.pytorch")

        class Seeds(lightning.Callback):
            def on_train_batch_start(self, run: Any, *_: Any) -> None:
                torch.manual_seed(run.global_step)  # Lightning does not keep the generators

        run = _lightning(tmp_path, [guard, Seeds()], "32-true", 1, epochs=epochs)
        run.fit(module, DataLoader(Rows(texts()), 8), ckpt_path=path, weights_only=True)
        return run, module, guard.guard

    _, whole, guard = train(2)
    run, _, _ = train(1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, again = train(2, str(tmp_path / "half.ckpt"))
    assert _same(whole.state_dict(), resumed.state_dict())
    assert (guard.attempts, guard.steps, guard.refused) == (again.attempts, again.steps, again.refused)


def test_two_optimisers_in_lightning_are_refused(tmp_path: Path) -> None:
    lightning: Any = pytest.importorskip("lightning.pytorch")
    from mithridate.guard.lightning import LightningGuard

    class Two(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.layer = nn.Linear(LENGTH, CLASSES)

        def training_step(self, batch: Any, i: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    run = _lightning(tmp_path, [LightningGuard(defence=RefusesSome())], "32-true", 1, epochs=1)
    with pytest.raises(ConfigError, match="2"):
        run.fit(Two(), DataLoader(Rows(texts()), 8))


def test_accelerate_takes_a_step_back_and_the_guard_along(tmp_path: Path) -> None:
    accelerate: Any = pytest.importorskip("accelerate")
    from mithridate.guard.accelerated import attach_accelerated

    def start(which: frozenset[int]) -> tuple[Any, ...]:
        accelerator = accelerate.Accelerator(cpu=True)
        model = bert()
        optimiser = torch.optim.AdamW(model.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.9)
        model, optimiser, schedule = accelerator.prepare(model, optimiser, schedule)
        defence = RefusesSome(which)
        return (
            accelerator,
            model,
            optimiser,
            schedule,
            attach_accelerated(accelerator, model, optimiser, also=[schedule], defence=defence),
        )

    def step(seed: int, accelerator: Any, model: Any, optimiser: Any, schedule: Any) -> None:
        batch = texts(8, seed)
        accelerator.backward(model(**batch).loss)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()

    *parts, guard = start(frozenset({2}))
    step(0, *parts)
    before = copy.deepcopy([p.state_dict() for p in (parts[1], parts[2].optimizer, parts[3])])
    step(1, *parts)
    guard.settle()
    assert guard.refused == 1
    assert _same(before, [p.state_dict() for p in (parts[1], parts[2].optimizer, parts[3])])
    parts[0].save_state(str(tmp_path))
    step(2, *parts)
    *others, again = start(frozenset())
    others[0].load_state(str(tmp_path))
    assert (again.attempts, again.refused, again.steps) == (2, 1, 1)
    step(2, *others)
    assert _same(parts[3].state_dict(), others[3].state_dict())
    assert _same(parts[1].state_dict(), others[1].state_dict())
    assert guard.attempts == again.attempts == 3


def lightning_module() -> Any:
    """A classifier with BatchNorm and dropout, and a schedule that moves at every step."""
    lightning: Any = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(WORDS, 8)
            self.norm = nn.BatchNorm1d(8)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            answer: Tensor = self.head(self.norm(functional.dropout(self.embed(input_ids), 0.1, self.training).mean(1)))
            return answer

        def training_step(self, batch: Any, i: int) -> Tensor:
            return functional.cross_entropy(self(batch["input_ids"]), batch["labels"])

        def configure_optimizers(self) -> Any:
            optimiser = torch.optim.AdamW(self.parameters(), 0.05)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.9)
            return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    torch.manual_seed(0)
    return Module()


def _lightning(folder: Path, callbacks: list[Any], precision: Any, accumulate: int, *, epochs: int) -> Any:
    lightning: Any = pytest.importorskip("lightning.pytorch")
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        precision=precision,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def _trusted() -> dict[str, Tensor]:
    return {k: v for k, v in texts(40, 9).items() if k != "attention_mask"}


def _without_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith("norm.running") and "batches" not in k}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


@pytest.fixture(autouse=True)
def _generator_as_before() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
