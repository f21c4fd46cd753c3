"""A ClientApp that says what it was handed."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("identity")
def identity(message: Message, context: Context) -> Message:
    numbers = {"site": int(context.node_config["partition-id"]), "sites": int(context.node_config["num-partitions"])}
    return Message(RecordDict({"identity": MetricRecord(numbers)}), reply_to=message)


@app.train()
def see(message: Message, context: Context) -> Message:
    if "fail" in message.content.config_records:
        raise RuntimeError("patient 17")
    rounds = int(context.state.get("kept", {"rounds": 0})["rounds"]) + 1
    context.state = RecordDict({"kept": MetricRecord({"rounds": rounds})})
    seen = {**context.run_config, "rounds": rounds, "sites": context.node_config["num-partitions"]}
    return Message(RecordDict({"seen": ConfigRecord(seen)}), reply_to=message)
