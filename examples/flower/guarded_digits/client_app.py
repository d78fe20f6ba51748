"""The client: honest training, and a mod that makes some clients hostile."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from guarded_digits import task
from mithridate.core.registry import make
from mithridate.guard.flower_attack import attack_mod
from mithridate.guard.garbage_clients import GarbageClients
from mithridate.guard.hostile_clients import Accomplice, HostileClients, NamedClients


def hostile_of(context: Context) -> NamedClients | None:
    """Who is hostile, and how, from the run's configuration; the mod is there for experiments only."""
    run, where = context.run_config, "the run's configuration"
    mine = int(context.node_config["partition-id"])
    named = [int(p) for p in str(run["hostile-ids"]).split(",")]
    if run["attack"] == "none" or mine not in named:
        return None
    if run["attack"] == "garbage":
        kinds = str(run["garbage"]).split(",")
        return make(GarbageClients, {"kind": kinds[named.index(mine) % len(kinds)], "partitions": named}, where=where)
    attack = {"name": run["attack"]}
    if run["attack"] == "accumulative":
        attack |= {key: run[key.replace("_", "-")] for key in ("lam", "momentum", "trigger", "trigger_scale")}
        attack["clean_weight"] = 1.0
    values = {
        "attack": attack,
        "partitions": named,
        "clients": context.node_config["num-partitions"],
        "trigger_round": run["trigger-round"],
    }
    return make(HostileClients, values, where=where)


def accomplice_of(context: Context) -> Accomplice:
    """What a hostile client holds: images of its own to validate on, and its local images as the trigger."""
    mine = task.local_part(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))
    return Accomplice(task.fresh_model(), task.digits().validation, mine)


app = ClientApp(mods=[attack_mod(hostile_of, accomplice_of)])


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of honest local training."""
    torch.set_num_threads(1)
    partition = int(context.node_config["partition-id"])
    part = task.local_part(partition, int(context.node_config["num-partitions"]))
    model = task.fresh_model()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    server_round = int(str(message.content.config_records["config"]["server-round"]))
    key = (int(context.run_config["seed"]), server_round, partition)
    run = context.run_config
    loss = task.train(model, part, epochs=int(run["local-epochs"]), lr=float(run["local-lr"]), key=key)
    metrics = MetricRecord({"train_loss": loss, "num-examples": part.size})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Loss and accuracy on the client's own images."""
    partition = int(context.node_config["partition-id"])
    part = task.local_part(partition, int(context.node_config["num-partitions"]))
    model = task.fresh_model()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    loss, accuracy = task.evaluate(model, part)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": part.size})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
