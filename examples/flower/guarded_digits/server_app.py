"""The server: FedAvg as it is, or behind a clip and a gate."""

import json
import random
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from rich.console import Console

from guarded_digits import task
from mithridate.defences.chain import chain
from mithridate.defences.clip import Clip
from mithridate.defences.gate import Gate
from mithridate.guard.flower import GuardedStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation, then print and save what happened."""
    run = context.run_config
    seed = int(run["seed"])
    random.seed(seed)  # Flower draws the clients of a round with it
    out = Path(str(run["output"])).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    model, test = task.burned_in_model(int(run["burn-in-epochs"]), seed), task.digits().test
    clients = int(run["clients"])
    strategy: Strategy = FedAvg(
        min_train_nodes=clients, min_available_nodes=clients, fraction_evaluate=0.0, weighted_by_key="num-examples"
    )
    for name in ("rounds.json", "guard.jsonl", "guard.txt"):  # of an earlier run into the same folder
        (out / name).unlink(missing_ok=True)
    if run["guarded"]:
        limits = {key: float(run[key.replace("_", "-")]) for key in ("max_loss_rise", "max_accuracy_drop")}
        strategy = GuardedStrategy(
            strategy,
            chain(Clip(clip_norm=float(run["clip-norm"])), Gate(**limits, reference="best")),
            module=task.fresh_model(),
            trusted=task.digits().trusted,
            report_path=out / "guard.jsonl",
        )

    def on_test(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = task.evaluate(model, test)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=int(run["num-server-rounds"]),
        evaluate_fn=on_test,
    )
    rounds = [{"round": n, **dict(metrics)} for n, metrics in sorted(result.evaluate_metrics_serverapp.items())]
    (out / "rounds.json").write_text(json.dumps(rounds, indent=1) + "\n", encoding="utf-8")
    for row in rounds:
        print(f"round {row['round']:3d}  test accuracy {row['accuracy']:6.1%}  loss {row['loss']:.3f}")
    if isinstance(strategy, GuardedStrategy):
        with (out / "guard.txt").open("w", encoding="utf-8") as report:
            for file in (None, report):  # None: where the prints go
                Console(file=file, width=120).print(strategy.table())
