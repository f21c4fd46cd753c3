"""A ClientApp that says what it was handed."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def see(message: Message, context: Context) -> Message:
    context.state = RecordDict({"kept": MetricRecord({"rounds": 1})})
    return Message(RecordDict({"seen": ConfigRecord(dict(context.run_config))}), reply_to=message)
