"""`lalora certs`: what the files hold, who may read them, and that none is ever overwritten."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from typer.testing import CliRunner

from lalora_flwr.cli.certs import CA_DAYS
from lalora_flwr.cli.main import app
from lalora_flwr.ground.errors import ConfigError
from tests.conftest import files_in


def lalora(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["certs", *arguments])
    if isinstance(done.exception, ConfigError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def handshake(folder: Path, host: str, authority: Path) -> None:
    """A TLS connection as a strict client makes it."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "superlink.crt", folder / "superlink.key")
    client = ssl.create_default_context(cafile=str(authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host):
            pass
    finally:
        ours.close()
        thread.join()


def test_a_strict_client_accepts_the_certificate_for_its_names_only(tmp_path: Path) -> None:
    lalora(str(tmp_path / "c"), "--host", "superlink.example.org", "--host", "10.0.0.7", "--host", "::1")
    for host in ("superlink.example.org", "10.0.0.7", "::1", "localhost", "127.0.0.1"):
        handshake(tmp_path / "c", host, tmp_path / "c" / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "c", "other.example.org", tmp_path / "c" / "ca.crt")
    lalora(str(tmp_path / "d"))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "c", "localhost", tmp_path / "d" / "ca.crt")


def test_names_days_and_what_the_certificate_may_do(tmp_path: Path) -> None:
    lalora(str(tmp_path), "--host", "sl", "--host", "sl", "--host", "10.0.0.7", "--days", "3")
    certificate = x509.load_pem_x509_certificate((tmp_path / "superlink.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["sl", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.0.0.7"), ipaddress.ip_address("127.0.0.1")]
    now = datetime.datetime.now(datetime.UTC)
    left = certificate.not_valid_after_utc - now
    assert datetime.timedelta(days=2, hours=23) < left <= datetime.timedelta(days=3)
    assert certificate.not_valid_before_utc < now
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    authority = x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes())
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    certificate.verify_directly_issued_by(authority)


def test_a_site_key_is_what_flower_takes(tmp_path: Path) -> None:
    lalora(str(tmp_path), "--supernode", "north", "--supernode", "south.2")
    assert sorted(files_in(tmp_path)) == ["north", "north.pub", "south.2", "south.2.pub"]
    key = load_ssh_private_key((tmp_path / "north").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1)
    assert try_load_public_key(tmp_path / "north.pub") == public_key_to_bytes(key.public_key())
    assert (tmp_path / "north").read_bytes() != (tmp_path / "south.2").read_bytes()


def test_only_the_owner_reads_keys_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        lalora(str(tmp_path))
        lalora(str(tmp_path), "--supernode", "north")
    finally:
        os.umask(before)
    assert {mode(tmp_path / name) for name in ("ca.key", "superlink.key", "north")} == {0o600}
    assert {mode(tmp_path / name) for name in ("ca.crt", "superlink.crt", "north.pub")} == {0o644}


@pytest.mark.parametrize("present", ["superlink.crt", "superlink.key"])
def test_nothing_is_overwritten(present: str, tmp_path: Path) -> None:
    (tmp_path / present).write_text("mine")
    with pytest.raises(ConfigError, match=f"{present} exists"):
        lalora(str(tmp_path))
    assert files_in(tmp_path) == {present: b"mine"}


@pytest.mark.parametrize("present", ["north", "north.pub"])
def test_no_key_pair_is_overwritten(present: str, tmp_path: Path) -> None:
    (tmp_path / present).symlink_to("nowhere")
    with pytest.raises(ConfigError, match=f"{present} exists"):
        lalora(str(tmp_path), "--supernode", "south", "--supernode", "north")
    assert os.listdir(tmp_path) == [present]


def test_renewal_keeps_the_authority(tmp_path: Path) -> None:
    lalora(str(tmp_path))
    before = files_in(tmp_path)
    for name in ("superlink.crt", "superlink.key"):
        (tmp_path / name).unlink()
    lalora(str(tmp_path), "--host", "new.example.org")
    after = files_in(tmp_path)
    assert after["ca.crt"] == before["ca.crt"] and after["ca.key"] == before["ca.key"]
    assert after["superlink.key"] != before["superlink.key"]
    handshake(tmp_path, "new.example.org", tmp_path / "ca.crt")


def break_authority(folder: Path, how: str) -> None:
    lalora(str(folder))
    (folder / "superlink.crt").unlink()
    (folder / "superlink.key").unlink()
    if how == "half":
        (folder / "ca.key").unlink()
    elif how == "foreign":
        lalora(str(folder / "other"))
        (folder / "ca.key").write_bytes((folder / "other" / "ca.key").read_bytes())
    else:
        (folder / "ca.key").write_text("no key")


@pytest.mark.parametrize(
    ("how", "why"), [("half", "belong together"), ("foreign", "not the key of"), ("garbage", "cannot be read")]
)
def test_half_an_authority_or_a_foreign_one_is_refused(how: str, why: str, tmp_path: Path) -> None:
    break_authority(tmp_path, how)
    before = files_in(tmp_path)
    with pytest.raises(ConfigError, match=why):
        lalora(str(tmp_path))
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--days", "0"], "--days 0: must be"),
        (["--days", str(CA_DAYS + 1)], "must be a whole number"),
        (["--host", "https://superlink"], "without scheme and port"),
        (["--host", "superlink:8000"], "without scheme and port"),
        (["--host", ""], "must be a host name"),
        (["--host", "-x"], "must be a host name"),
        (["--supernode", "../north"], "--supernode '../north': must be"),
        (["--supernode", ""], "must be letters"),
        (["--supernode", "north", "--host", "superlink"], "leave --host out"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(arguments: list[str], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why) as said:
        lalora(str(tmp_path / "c"), *arguments)
    assert "\n" not in str(said.value) and not (tmp_path / "c").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        lalora(str(tmp_path / "file" / "c"))
