"""Every byte that real sites send: known calls, known headers, known replies, and nothing else."""

from __future__ import annotations

import io
import re
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.proto import fleet_pb2, message_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from safetensors.numpy import load, save

from lalora_flwr.wire.orders import ARRAYS
from lalora_flwr.wire.packed import WHOLE
from lalora_flwr.wire.replies import COUNTERS, IDENTITY
from tests.conftest import strict_json
from tests.deployment.recorder import Recorded, Recorder, Sent
from tests.deployment.texts import text_run

pytestmark = pytest.mark.slow

COUNT = 30011  # usable records of each site; the site declares 30000
WORDS = (b"zqxtext", b"zqxlabel", b"zqxfile", b"zqxcolumn")  # planted in texts, labels, paths and columns
HTTP_HEADERS = {"host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length"}


def test_the_decoding_notices_bytes_that_do_not_belong() -> None:
    def stream(path: str, body: bytes) -> bytearray:
        return bytearray(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    def pushed(*extra: tuple[str, bytes]) -> list[bytearray]:
        metadata = Metadata(1, "", 7, 1, "", "", created_at=1.0, ttl=1.0, message_type="train")
        reply = Message(RecordDict({COUNTERS: MetricRecord({"steps": 1})}), metadata=metadata)
        objects = {number: part.deflate() for number, part in get_all_nested_objects(reply).items()}
        call = fleet_pb2.PushMessagesRequest(
            messages_list=[message_pb2.Message()], message_object_trees=[get_object_tree(reply)], clientapp_runtime_list=[1.0]
        )
        parts = [
            message_pb2.PushObjectRequest(object_id=number, object_content=content)
            for number, content in [*objects.items(), *extra]
        ]
        bodies = [("/v1/fleet/push-object", part) for part in parts] + [("/v1/fleet/push-messages", call)]
        return [stream(path, body.SerializeToString(deterministic=True)) for path, body in bodies]

    (good,) = Sent(pushed()).replies()
    assert dict(good.content) == {COUNTERS: {"steps": 1}}
    (good,) = Sent([*pushed(), bytearray(pushed()[-1][:-9]), pushed()[-1]]).replies()  # cut off, then repeated
    assert dict(good.content) == {COUNTERS: {"steps": 1}}
    with pytest.raises(AssertionError):  # cut off, and not repeated
        Sent([*pushed(), bytearray(pushed(("0" * 64, b"more"))[-2][:-1])])
    with pytest.raises(AssertionError):
        Sent(pushed(("0" * 64, b"more"))).replies()
    with pytest.raises(AssertionError):  # a field that Flower's type does not have
        Sent([stream("/v1/fleet/pull-messages", b"\xfa\x07\x04more")])
    with pytest.raises(KeyError):
        Sent([stream("/v1/fleet/other", b"")])
    with pytest.raises(AssertionError):
        Sent([stream("/v1/fleet/pull-messages", b"") + b"more"])


def write_records(path: Path, count: int) -> Path:
    """Records with marks in each text, and some whose label is a mark and which nobody can use."""
    lines = ["text,label", *(f"the film is zqxtext {n},{'good' if n % 2 else 'bad'}" for n in range(count))]
    lines += [f"unusable zqxtext {n},zqxlabel" for n in range(7)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_nothing_but_the_declared_records_leaves_a_site(tmp_path: Path) -> None:
    """A run that works, one that asks for more than the sites allow, and one in which reading the records fails."""
    data = {name: write_records(tmp_path / "zqxfile" / f"zqxfile-{name}.csv", COUNT) for name in ("north", "south")}
    runs = tmp_path / "runs"
    ends, ids = {}, {}
    with Recorded(tmp_path) as federation, Recorder(federation) as recorder:
        federation.proxy = recorder.port
        federation.start_superlink()
        federation.add_sites(data, {"device": "cpu", "num-records": 30000, "delta": 1e-5})
        first = federation.submit(text_run(tmp_path, train__batch_size=30, privacy__delta=1e-5))
        assert federation.wait(first) == "finished:completed", federation.logs(first)
        for name, overrides in {"greedy": {"privacy__epsilon": 50.0}, "broken": {}}.items():
            if name == "broken":
                for path in data.values():
                    path.write_text('zqxcolumn,label\n"zqxtext,bad\nzqxtext,"zqxlabel\n')
            run = federation.submit(text_run(tmp_path, run_name=name, train__batch_size=30, privacy__delta=1e-5, **overrides))
            federation.wait(run)
            ends[name], ids[run] = federation.logs(run), name
        for name in data:
            federation.process(name).terminate()
        said = "".join(federation.process(name).said() for name in data)
    assert (runs / "run" / "summary.json").exists()
    summary = strict_json((runs / "run" / "summary.json").read_text())
    for name, said_at_end in ends.items():
        assert (runs / name / "failure.json").exists(), said_at_end
        failure = (runs / name / "failure.json").read_text()
        assert "2 of 2 sites failed" in failure and not any(word.decode() in failure for word in WORDS)
    streams = recorder.sent
    sent = Sent(streams)

    # the transport: known calls, known headers
    assert all(name in HTTP_HEADERS or re.fullmatch(r"(flwr|flower|x-flwr)-[a-z-]+", name) for name in sent.headers), sent.headers
    assert {"/v1/fleet/push-messages", "/v1/fleet/push-object", "/v1/fleet/deactivate-node"} <= set(sent.calls)

    # replies: identity, training, refusals; nothing else
    replies = sent.replies()
    good = [reply for reply in replies if not reply.has_error()]
    errors = [reply.error for reply in replies if reply.has_error()]
    train = [reply for reply in good if reply.metadata.message_type == "train"]
    other = [reply for reply in good if reply.metadata.message_type != "train"]
    assert len(train) == 4 and len(other) == 6  # two rounds of one run; three runs; two sites
    for reply in other:
        assert reply.metadata.message_type == "query.identity"
        assert {name: dict(record) for name, record in reply.content.items()} == {IDENTITY: {"site": -1, "sites": -1}}  # type: ignore[call-overload]
    names = _names_of_adapter(runs / "run")
    for reply in train:
        assert set(reply.content) == {ARRAYS, COUNTERS}
        arrays, counters = reply.content[ARRAYS], reply.content[COUNTERS]
        assert isinstance(arrays, ArrayRecord) and isinstance(counters, MetricRecord)
        ((whole, array),) = arrays.items()
        assert (whole, array.dtype, array.stype) == (WHOLE, "uint8", "numpy.ndarray")
        values = load(array.numpy().tobytes())
        assert set(values) <= set(names) and values
        assert all((value.shape, value.dtype) == (names[name], np.float32) for name, value in values.items())
        written = io.BytesIO()
        np.save(written, np.frombuffer(save(values), dtype=np.uint8))
        assert written.getvalue() == array.data  # no byte beside the values
        assert set(counters) == {"steps", "epsilon", "noise-multiplier", "sample-rate", "seeded"}
        assert counters["steps"] in (2, 4) and counters["seeded"] == 0
        assert counters["sample-rate"] == 30 / 30000  # from what the site declares, not from what it has
        assert counters["noise-multiplier"] == summary["noise_multiplier"]
    assert len({reply.content[COUNTERS]["epsilon"] for reply in train}) == 2  # type: ignore[call-overload, index]  # by round
    assert {error.code for error in errors} == {2}
    assert Counter((ids[str(reply.metadata.run_id)], reply.error.reason) for reply in replies if reply.has_error()) == {
        ("greedy", "cap: the run's privacy.epsilon is above the site's max-epsilon"): 2,
        ("broken", "data: the site cannot open what its node-config names; its own log says why"): 2,
    }
    assert any(word.decode() in said for word in WORDS)  # the owner is told more than the server

    # no planted word, and no true count in any usual form, in any byte
    bodies = b"\0".join(bytes(stream) for stream in streams)
    assert len(bodies) > 10_000
    assert not [word for word in WORDS if word in bodies.lower()]
    times = re.compile(rb"(?im)^flwr-[a-z-]*(timestamp|signature)[a-z-]*: .*$")
    for number in (COUNT, COUNT + 7):
        assert str(number).encode() not in times.sub(b"", bodies)
        for form in ("<i", ">i", "<q", ">q", "<f", ">f", "<d", ">d"):
            assert struct.pack(form, number) not in bodies


def _names_of_adapter(run: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's tensors, from the server's checkpoint."""
    from safetensors.torch import load_file

    return {name: tuple(value.shape) for name, value in load_file(run / "checkpoint" / "adapter.safetensors").items()}
