"""Flower's SuperNode in this process, which runs approved code only: `python -m lalora_flwr.engines.supernode ARGUMENTS`.

A SuperNode runs the app bundle that the SuperLink hands it. Flower has one test that a bundle must pass first: with
`--trusted-entities` it has to carry a signature. That test is used here with a key that is made at the start and never
leaves the process: the process itself signs a bundle when its digest is one that the site's owner approved.

Guarantee: with `approved-code` in the node-config, no file of a bundle with another digest is unpacked, read by a
ClientApp or imported on this site; the server gets Flower's own error ("The FAB could not be verified") in reply to the
message. Two things hold independently: a bundle that is not approved gets no signature, and its content is dropped where
this process receives it, before Flower sees it. So if a later Flower fetches bundles by another way, it finds no signature.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import os
import shutil
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from lalora_flwr.engines import with_parent
from lalora_flwr.engines.receiving import Calls, Connect, eager
from lalora_flwr.ground.errors import ConfigError, LaloraError
from lalora_flwr.ground.logs import JSON, VARIABLE, json_logs
from lalora_flwr.site.bundle import APPROVED_CODE, ENFORCED, digest, digests, parse
from lalora_flwr.wire.pulling import pull_soon

if TYPE_CHECKING:
    from flwr.supercore.fab import Fab
    from flwr.supercore.run import Run

FLOWER = "1.41."  # the versions whose SuperNode was read for this
OWNER = "lalora-site"  # the name under which Flower knows the process's own key
TASK_POLL, SOON = (
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL",
    "0.2",
)  # Flower's variable: seconds between two looks for a message that came
GET_RUN, GET_FAB = 3, 4  # places in the tuple of functions by which a SuperNode calls the SuperLink
log = logging.getLogger("flwr")


class Approval:
    """Signs approved bundles, and withholds all others from the SuperNode.

    Args:
        approved: the digests that the owner approved.
        unpacked: where Flower unpacks a bundle, given app, version and digest.
    """

    def __init__(self, approved: frozenset[str], unpacked: Callable[[str, str, str], Path]) -> None:
        self._approved = approved
        self._unpacked = unpacked
        self._key = Ed25519PrivateKey.generate()
        self._cleared: set[Path] = set()

    def trusted_entities(self) -> dict[str, str]:
        """What Flower has to trust: this process's key alone."""
        key = self._key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        return {OWNER: key.decode()}

    def guard(self, connect: Connect) -> Connect:
        """Flower's connection to the SuperLink, with runs and bundles looked at on their way in.

        Raises:
            LaloraError: on entry, if the connection is not of the form that Flower 1.41 gives it.
        """

        @contextmanager
        def connected(*args: object, **kwargs: object) -> Iterator[Calls]:
            with connect(*args, **kwargs) as functions:
                names = [getattr(function, "__name__", "") for function in functions]
                if names[GET_RUN : GET_FAB + 1] != ["get_run", "get_fab"]:
                    raise LaloraError(_UNKNOWN_FLOWER)
                runs: dict[int, Run] = {}

                def get_run(run_id: int) -> Run:
                    runs.clear()  # the SuperNode asks for a run, then at once for its bundle
                    runs[run_id] = functions[GET_RUN](run_id)
                    return runs[run_id]

                def get_fab(fab_hash: str, run_id: int) -> Fab:
                    return self.judged(functions[GET_FAB](fab_hash, run_id), runs.get(run_id))

                yield (*functions[:GET_RUN], get_run, get_fab, *functions[GET_FAB + 1 :])

        return connected

    def judged(self, fab: Fab, run: Run | None) -> Fab:
        """The bundle with this process's signature if it is approved; an empty one without any signature if not."""
        found = digest(fab.content)
        if reason := self._objection(found, fab, run):
            log.error("approved-code: refused the app bundle %s: %s", found, reason)
            return dataclasses.replace(fab, hash_str=digest(b""), content=b"", verifications=_signed())
        log.info("approved-code: the app bundle %s is approved", found)
        return dataclasses.replace(fab, hash_str=found, verifications=_signed(self._signature(fab.content)))

    def _objection(self, found: str, fab: Fab, run: Run | None) -> str:
        """Why it must not run; nothing if it may. All but the content is what the SuperLink says of it."""
        if found not in self._approved:
            return "its digest is not in the site's approved-code"
        try:
            bundle = parse(fab.content)
        except ConfigError as error:
            return str(error)
        if run is None or (run.fab_hash, run.fab_id, run.fab_version) != (found, bundle.app, bundle.version):
            return "the SuperLink gives the run another app, version or digest than the bundle has"
        if run.primary_task_type not in ("", "flwr-serverapp"):
            return "the run is not one of a ServerApp; sites serve ClientApps only"
        folder = self._unpacked(bundle.app, bundle.version, found)
        if folder not in self._cleared:
            # Flower does not unpack a bundle whose folder is there, and names the folder by 8 digits of the digest only.
            try:
                shutil.rmtree(folder)
            except FileNotFoundError:
                pass
            except OSError as error:
                return f"what lies under its name from before cannot be removed: {error}"
            self._cleared.add(folder)
        return ""

    def _signature(self, content: bytes) -> dict[str, int | str]:
        from flwr.supercore.primitives.asymmetric_ed25519 import create_message_to_sign

        now = int(time.time())
        signature = self._key.sign(create_message_to_sign(bytes.fromhex(digest(content)), now))
        return {"signed_at": now, "signature": base64.urlsafe_b64encode(signature).decode()}


_UNKNOWN_FLOWER = (
    f"approved-code: this version of Flower fetches app bundles by another way than {FLOWER}x, so that they cannot be "
    "checked; install the version that lalora-flwr names, or leave out approved-code and trust the operator's code"
)


def _signed(signature: dict[str, int | str] | None = None) -> dict[str, str]:
    """In the form in which a SuperLink that is connected to Flower's hub hands them out."""
    return {"valid_license": "none is needed", **({OWNER: json.dumps(signature)} if signature else {})}


def parse_arguments(arguments: list[str]) -> Namespace:
    """What `flower-supernode` makes of its arguments; it ends this process if it does not know one of them."""
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    return _parse_args_run_supernode().parse_args(arguments)


def approved_digests(flags: Namespace) -> frozenset[str]:
    """The digests in the node-config; none if it has no `approved-code`: then every bundle runs.

    Raises:
        ConfigError: if they are no digests, or another flag would let in code that nobody approved.
    """
    from flwr.common.config import parse_config_args

    node_config = parse_config_args([flags.node_config] if flags.node_config else None)
    if APPROVED_CODE not in node_config:
        return frozenset()
    for given, flag in (
        (flags.trusted_entities, "--trusted-entities"),
        (flags.runtime_dependency_install, "--allow-runtime-dependency-installation"),
        (flags.isolation != "subprocess", "--isolation process"),
        (flags.host not in ("127.0.0.1", "localhost", "::1"), "--host of others than this machine"),
    ):
        if given:
            raise ConfigError(f"{flag} and {APPROVED_CODE} in the node-config exclude each other")
    return digests(node_config[APPROVED_CODE])


def main(arguments: list[str]) -> None:
    """Be a SuperNode until it ends, with its signals and its exit codes.

    Raises:
        LaloraError: if approval is asked for and this version of Flower is not known to allow it, or FLWR_HOME cannot be
            written.
    """
    from flwr import __version__
    from flwr.common.config import get_project_dir
    from flwr.supercore.utils import get_flwr_home
    from flwr.supernode import start_client_internal as supernode
    from flwr.supernode.cli.flower_supernode import flower_supernode

    try:
        json_logs()
    except ValueError as wrong:
        raise LaloraError(str(wrong)) from None
    own = get_flwr_home().absolute() / "lalora"
    try:
        with_parent.make_scripts(own / "bin")
    except OSError as error:
        raise LaloraError(f"the site's helper commands cannot be made under {own}: {error}") from None
    os.environ["PATH"] = os.pathsep.join([str(own / "bin"), *os.get_exec_path()])
    os.environ.pop(ENFORCED, None)
    os.environ.setdefault(TASK_POLL, SOON)
    pull_soon()
    if hasattr(supernode, "http_request_response"):
        supernode.http_request_response = eager(supernode.http_request_response)
    if approved := approved_digests(parse_arguments(arguments)):
        if not __version__.startswith(FLOWER) or not hasattr(supernode, "http_request_response"):
            raise LaloraError(_UNKNOWN_FLOWER)
        approval = Approval(approved, get_project_dir)
        supernode.http_request_response = approval.guard(supernode.http_request_response)
        trusted = own / "trusted.yaml"  # JSON is YAML
        trusted.write_text(json.dumps(approval.trusted_entities()))
        arguments = [*arguments, "--trusted-entities", str(trusted)]
        os.environ[ENFORCED] = ",".join(sorted(approved))
    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()


def _end(text: str) -> None:
    """End this process at once: Flower's threads would keep it alive, deaf, where no supervisor sees that it failed."""
    if os.environ.get(VARIABLE) == JSON:
        log.critical("%s", text)
    else:
        print(text, file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LaloraError as error:
        _end(f"lalora: {error}")
    except Exception:
        _end(traceback.format_exc())
