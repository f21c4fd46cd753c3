"""A proxy between SuperNodes and SuperLink that ends TLS, records, and passes all on; and what it recorded, taken apart.

The sites' only connection that leaves their machine is the one to the SuperLink: protobuf over HTTP/1.1 over TLS. The proxy
shows the SuperLink's certificate, so the sites take it for the SuperLink (node authentication signs times, not the connection).
Each recorded byte is accounted for: headers by name, bodies by Flower's own protobuf types without unknown fields, objects by
Flower's own decoding, and each must come out the same when it is written again.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections import defaultdict
from contextlib import suppress
from typing import Any

from flwr.app import Message
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from tests.deployment.federation import Federation
from tests.deployment.processes import LOOPBACK

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


class Recorder:
    """The proxy. ``sent`` holds what sites sent, one buffer per connection."""

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
