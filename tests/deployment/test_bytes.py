"""Every byte that real sites send: a proxy between SuperNodes and SuperLink ends TLS, records, and passes all on.

The sites' only connection that leaves their machine is the one to the SuperLink: protobuf over HTTP/1.1 over TLS. The proxy
shows the SuperLink's certificate, so the sites cannot tell it from the SuperLink (node authentication signs times, not
the connection). Each recorded byte is accounted for: headers by name, bodies by Flower's own protobuf types without unknown
fields, objects by Flower's own decoding, and each must come out the same when it is written again.
"""

from __future__ import annotations

import io
import re
import select
import socket
import ssl
import struct
import threading
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from lalora_flwr.wire.orders import ARRAYS
from lalora_flwr.wire.replies import COUNTERS, IDENTITY
from tests.conftest import strict_json
from tests.deployment.federation import LOOPBACK, Federation, text_run

pytestmark = pytest.mark.slow

COUNT = 30011  # usable records of each site; the site declares 30000
WORDS = (b"zqxtext", b"zqxlabel", b"zqxfile", b"zqxcolumn")  # planted in texts, labels, paths and columns
CALLS = {
    "/v1/fleet/activate-node": fleet_pb2.ActivateNodeRequest,
    "/v1/fleet/deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "/v1/fleet/send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "/v1/fleet/pull-messages": fleet_pb2.PullMessagesRequest,
    "/v1/fleet/push-messages": fleet_pb2.PushMessagesRequest,
    "/v1/fleet/get-run": run_pb2.GetRunRequest,
    "/v1/fleet/get-fab": fab_pb2.GetFabRequest,
    "/v1/fleet/pull-object": message_pb2.PullObjectRequest,
    "/v1/fleet/push-object": message_pb2.PushObjectRequest,
    "/v1/fleet/confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
}
HTTP_HEADERS = {"host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length"}


class Recorder:
    """The proxy. ``sent`` holds what sites sent, one buffer a connection."""

    def __init__(self, federation: Federation) -> None:
        self.sent: list[bytearray] = []
        self._upstream = (LOOPBACK, federation.port)
        place = federation.certificates
        self._server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.load_cert_chain(place / "superlink.crt", place / "superlink.key")
        self._client = ssl.create_default_context(cafile=str(place / "ca.crt"))
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                raw, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with suppress(OSError):
            near = self._server.wrap_socket(raw, server_side=True)
            far = self._client.wrap_socket(socket.create_connection(self._upstream), server_hostname=LOOPBACK)
            buffer = bytearray()
            self.sent.append(buffer)
            _pass_on(near, far, buffer)


def _pass_on(near: ssl.SSLSocket, far: ssl.SSLSocket, record: bytearray) -> None:
    """Both directions in one thread, as OpenSSL's connections are not for two at a time; ``record`` gets what ``near`` sends."""
    with near, far, suppress(OSError):
        while True:
            ready = [end for end in (near, far) if end.pending()] or select.select([near, far], [], [])[0]
            for end in ready:
                end.settimeout(0)
                try:
                    data = end.recv(1 << 16)
                except ssl.SSLWantReadError:  # TLS's own records, such as session tickets
                    continue
                finally:
                    end.settimeout(None)
                if not data:
                    return
                if end is near:
                    record += data
                (far if end is near else near).sendall(data)


class Recorded(Federation):
    """A federation whose sites call the proxy."""

    proxy = 0

    def supernode_command(self, name: str, **options: Any) -> list[str]:
        direct = f"{LOOPBACK}:{self.port}"
        return [f"{LOOPBACK}:{self.proxy}" if part == direct else part for part in super().supernode_command(name, **options)]


def requests_in(stream: bytes) -> list[tuple[str, dict[str, str], bytes]]:
    """Path, headers and body of each HTTP/1.1 request; the stream holds nothing else.

    The last body is shorter than its header says if the connection broke.
    """
    found = []
    while stream:
        head, end, rest = stream.partition(b"\r\n\r\n")
        assert end, head[:200]
        line, *lines = head.decode("ascii").split("\r\n")
        method, path, version = line.split(" ")
        assert (method, version) == ("POST", "HTTP/1.1"), line
        headers = {name.lower(): value for name, _, value in (text.partition(": ") for text in lines)}
        length = int(headers["content-length"])
        found.append((path, headers, rest[:length]))
        stream = rest[length:]
    return found


def decoded(path: str, body: bytes) -> Any:
    """The body as Flower's protobuf type, which accounts for all of its bytes."""
    call = CALLS[path]()
    call.ParseFromString(body)
    known = type(call)()
    known.CopyFrom(call)
    known.DiscardUnknownFields()
    assert known.SerializeToString(deterministic=True) == body, path
    return call


class Sent:
    """What sites sent, taken apart."""

    def __init__(self, streams: list[bytearray]) -> None:
        self.headers: set[str] = set()
        self.calls: dict[str, list[Any]] = defaultdict(list)
        requests = [request for stream in streams for request in requests_in(bytes(stream))]
        whole = [request for request in requests if len(request[2]) == int(request[1]["content-length"])]
        for path, headers, body in requests:
            self.headers |= set(headers)
            # Flower repeats a call whose connection broke, as one does that the SuperLink closes after some idle seconds
            assert any(path == other and repeated.startswith(body) for other, _, repeated in whole), path
        for path, _, body in whole:
            self.calls[path].append(decoded(path, body))

    def replies(self) -> list[Message]:
        """All reply messages, repeated ones once; every pushed object is part of one of them and as Flower would write it."""
        contents = {call.object_id: call.object_content for call in self.calls["/v1/fleet/push-object"]}
        used: set[str] = set()
        messages: dict[str, Message] = {}
        for call in self.calls["/v1/fleet/push-messages"]:
            assert len(call.messages_list) == len(call.message_object_trees) == len(call.clientapp_runtime_list) == 1
            outer, tree = call.messages_list[0], call.message_object_trees[0]
            assert not outer.HasField("content") or not outer.content.ByteSize()
            parts = {part.object_id for part in _walk(tree)}
            # objects that the SuperLink holds already are not sent again
            message = inflate_object_from_contents(tree.object_id, {part: contents[part] for part in parts})
            assert isinstance(message, Message) and message.object_id == tree.object_id  # SHA-256 of what it would write
            if outer.HasField("error"):
                assert (outer.error.code, outer.error.reason) == (message.error.code, message.error.reason)
            used |= parts
            messages[message.object_id] = message
        assert set(contents) == used
        return list(messages.values())


def _walk(tree: message_pb2.ObjectTree) -> list[message_pb2.ObjectTree]:
    return [tree, *(part for child in tree.children for part in _walk(child))]


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
    ends = {}
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
            ends[name] = federation.logs(run)
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
        assert set(arrays) <= set(names) and arrays
        for name, array in arrays.items():
            assert (tuple(array.shape), array.dtype, array.stype) == (names[name], "float32", "numpy.ndarray")
            written = io.BytesIO()
            np.save(written, array.numpy())
            assert written.getvalue() == array.data  # no byte beside the values
        assert set(counters) == {"steps", "epsilon", "noise-multiplier", "sample-rate", "seeded"}
        assert counters["steps"] in (2, 4) and counters["seeded"] == 0
        assert counters["sample-rate"] == 30 / 30000  # from what the site declares, not from what it has
        assert counters["noise-multiplier"] == summary["noise_multiplier"]
    assert len({reply.content[COUNTERS]["epsilon"] for reply in train}) == 2  # type: ignore[call-overload, index]  # by round
    assert {error.code for error in errors} == {2} and len(errors) == 4
    assert {error.reason for error in errors[:2]} == {"cap: the run's privacy.epsilon is above the site's max-epsilon"}
    assert {error.reason for error in errors[2:]} == {
        "data: the site cannot open what its node-config names; its own log says why"
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
