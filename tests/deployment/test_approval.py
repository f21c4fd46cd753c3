"""Flower's own functions, fed with bundles: it runs an approved one and no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _pull_and_store_message, _verify_fab
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lalora_flwr.engines.supernode import Approval
from lalora_flwr.ground.errors import LaloraError
from lalora_flwr.site.bundle import Bundle
from tests.deployment.bundles import bundle

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


@pytest.fixture(autouse=True)
def _stamps() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1  # Flower stamps messages with them


def run_of(made: Bundle, **changed: Any) -> Run:
    run = Run.create_empty(7)
    run.fab_id, run.fab_version, run.fab_hash, run.series_id = made.app, made.version, made.digest, 3
    for name, value in changed.items():
        setattr(run, name, value)
    return run


def fab_of(made: Bundle) -> Fab:
    return Fab(made.digest, made.content, {})


def approval(home: Path, *approved: Bundle) -> Approval:
    folder = {(made.app, made.version, made.digest): home / made.digest[:8] for made in approved}
    return Approval(frozenset(made.digest for made in approved), lambda *named: folder[named])


def trusted(fab: Fab, by: Approval) -> bool:
    """Flower's own word on a bundle."""
    return bool(fab.verifications["valid_license"]) and _verify_fab(fab, by.trusted_entities())


def test_flower_trusts_an_approved_bundle_and_no_other(tmp_path: Path) -> None:
    good, bad = bundle(), bundle("app = 2\n")
    by = approval(tmp_path, good)
    passed = by.judged(fab_of(good), run_of(good))
    assert trusted(passed, by) and passed.content == good.content and passed.hash_str == good.digest
    assert not trusted(passed, approval(tmp_path, good))  # another process's key
    refused = by.judged(fab_of(bad), run_of(bad))
    assert not trusted(refused, by) and refused.content == b""
    stolen = Fab(bad.digest, bad.content, passed.verifications)  # the SuperLink got hold of a signature
    assert not trusted(stolen, by) and not trusted(by.judged(stolen, run_of(bad)), by)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_single_bit_makes_another_bundle(tmp_path: Path, at: int, bit: int) -> None:
    good = bundle()
    by = approval(tmp_path, good)
    content = bytearray(good.content)
    content[at % len(content)] ^= 1 << bit
    refused = by.judged(Fab(good.digest, bytes(content), {}), run_of(good))
    assert refused.content == b"" and not trusted(refused, by)


@pytest.mark.parametrize(
    "lie",
    [
        {"fab_hash": "0" * 64},
        {"fab_id": "lalora/other"},
        {"fab_version": "../../1.2.3"},
        {"primary_task_type": "flwr-agentapp"},
        {"primary_task_type": "flwr-connector"},
    ],
    ids=str,
)
def test_an_approved_bundle_under_another_name_is_refused(tmp_path: Path, lie: dict[str, Any]) -> None:
    """Flower loads the folder that run's app, version and digest name, whatever bundle was unpacked."""
    good = bundle()
    by = approval(tmp_path, good)
    assert by.judged(fab_of(good), run_of(good, **lie)).content == b""
    assert by.judged(fab_of(good), None).content == b""
    assert trusted(by.judged(fab_of(good), run_of(good)), by)


def test_what_was_unpacked_before_under_the_same_name_is_removed_once(tmp_path: Path) -> None:
    good = bundle()
    by = approval(tmp_path, good)
    folder = tmp_path / good.digest[:8]
    (folder / "little").mkdir(parents=True)
    (folder / "little" / "client.py").write_text("open('ran', 'w')")
    assert by.judged(fab_of(good), run_of(good)).content == good.content
    assert not folder.exists()
    folder.mkdir()  # this process's own: a later run's
    assert by.judged(fab_of(good), run_of(good)).content == good.content
    assert folder.exists()


def test_what_cannot_be_removed_is_not_run(tmp_path: Path) -> None:
    good = bundle()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / good.digest[:8]).symlink_to(elsewhere)
    assert approval(tmp_path, good).judged(fab_of(good), run_of(good)).content == b""


class SuperLink:
    """One message of a run whose bundle is ``made``, as the functions by which a SuperNode calls the SuperLink."""

    def __init__(self, made: Bundle) -> None:
        self._made = made
        self.objects = 0  # fetched of the message

    @contextmanager
    def connect(self) -> Iterator[tuple[Any, ...]]:
        message = Message(RecordDict(), dst_node_id=5, message_type="train")
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)

        def get_run(run_id: int) -> Run:
            return run_of(self._made)

        def get_fab(fab_hash: str, run_id: int) -> Fab:
            return fab_of(self._made)

        def pull_object(run_id: int, object_id: str) -> bytes:
            self.objects += 1
            return objects[object_id].deflate()

        def unused(*_: Any) -> None: ...

        yield (5, lambda: (message, get_object_tree(message)), unused, get_run, get_fab, pull_object, unused, unused)


def pulled(superlink: SuperLink, by: Approval) -> Any:
    """Flower's state after its own loop's body has run once."""
    stores = ObjectStoreFactory()
    state = NodeStateFactory(objectstore_factory=stores).state()
    state.set_node_id(5)
    with by.guard(superlink.connect)() as functions:
        names = ("receive", "", "get_run", "get_fab", "pull_object", "", "confirm_message_received")
        calls = {name: function for name, function in zip(names, functions[1:], strict=True) if name}
        number = _pull_and_store_message(
            state=state, object_store=stores.store(), node_config={}, trusted_entities=by.trusted_entities(), **calls
        )
    assert number == 7
    return state


def test_flowers_loop_answers_with_an_error_and_makes_no_task_of_a_bundle_that_is_not_approved(tmp_path: Path) -> None:
    superlink = SuperLink(bundle("app = 2\n"))
    state = pulled(superlink, approval(tmp_path, bundle()))
    (reply,) = state.get_messages_legacy(is_reply=True)
    assert reply.error.reason == "The FAB could not be verified."
    assert not state.get_tasks() and not state.fab_store and state.get_run(7) is None and not superlink.objects


def test_flowers_loop_makes_a_task_of_an_approved_bundle(tmp_path: Path) -> None:
    superlink = SuperLink(bundle())
    state = pulled(superlink, approval(tmp_path, bundle()))
    assert list(state.fab_store) == [bundle().digest] and state.get_run(7) is not None and superlink.objects
    assert [task.fab_hash for task in state.get_tasks()] == [bundle().digest]
    assert not state.get_messages_legacy(is_reply=True)


def test_a_flower_that_fetches_bundles_by_another_way_does_not_start(tmp_path: Path) -> None:
    @contextmanager
    def connect() -> Iterator[tuple[Any, ...]]:
        yield 5, len, len, len, len

    with pytest.raises(LaloraError, match="this version of Flower"), approval(tmp_path, bundle()).guard(connect)():
        pass
