"""``lalora certs``: the files that TLS and node authentication of a real federation need, in the forms that Flower takes.

    ca.crt          whom sites and operators trust         given to all (--root-certificates, --ssl-ca-certfile)
    ca.key          signs the SuperLink's certificate      stays with the operator, needed for renewal only
    superlink.crt   the SuperLink's name                   on the SuperLink (--ssl-certfile)
    superlink.key   its key                                on the SuperLink (--ssl-keyfile)
    NAME            a SuperNode's key                      stays on the site (--auth-supernode-private-key)
    NAME.pub        its public half                        given to the operator (flwr supernode register)

No file is ever overwritten, and keys are readable by their owner only.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lalora_flwr.ground.errors import ConfigError

CA_DAYS = 3650  # sites keep the authority's certificate while the SuperLink's is renewed
ALWAYS = ("localhost", "127.0.0.1")  # the SuperLink's own ServerApp calls it there
SKEW = datetime.timedelta(minutes=5)  # clocks of sites may be late
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def certs(
    out: Annotated[Path, typer.Argument(help="Folder for the files; made if it is missing.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or IP address by which sites reach the SuperLink; repeatable. localhost is always added."),
    ] = None,
    days: Annotated[int, typer.Option(help=f"How long the SuperLink's certificate holds; at most {CA_DAYS}.")] = 365,
    supernode: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Make only the key pair NAME, NAME.pub of a SuperNode; repeatable.")
    ] = None,
) -> None:
    """Make TLS certificates for a SuperLink, or with --supernode the key pair of a site. Never overwrites a file.

    With an authority (ca.crt, ca.key) in the folder and no SuperLink certificate, the authority signs a new one: to
    renew, move the old superlink.crt and superlink.key away and call the command again.
    """
    if supernode and host:
        raise ConfigError("--supernode makes a site's key pair, which holds no host name; leave --host out")
    made = supernode_keys(out, supernode) if supernode else superlink_files(out, host or [], days)
    for path in made:
        print(path)


def supernode_keys(out: Path, names: list[str]) -> list[Path]:
    """A key pair for each name, on the curve P-384 in OpenSSH's format.

    Raises:
        ConfigError: a name that is no file name, a file that exists, or a folder that cannot be written.
    """
    files: dict[str, bytes] = {}
    for name in names:
        if not _SITE.fullmatch(name):
            raise ConfigError(f"--supernode {name!r}: must be letters, digits, dots, dashes and underscores")
        key = ec.generate_private_key(ec.SECP384R1())
        files[name] = _pem(key, PrivateFormat.OpenSSH)
        files[f"{name}.pub"] = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"
    return write_new(out, files, secret=set(names))


def superlink_files(out: Path, hosts: list[str], days: int) -> list[Path]:
    """An authority, unless the folder holds one, and a certificate that it signs for the SuperLink's names.

    Raises:
        ConfigError: a host that is no name, impossible days, a file that exists, half an authority or a foreign one.
    """
    if not 1 <= days <= CA_DAYS:
        raise ConfigError(f"--days {days}: must be a whole number from 1 to {CA_DAYS}")
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *ALWAYS])]
    now = datetime.datetime.now(datetime.UTC)
    files: dict[str, bytes] = {}
    if (out / "ca.crt").exists() or (out / "ca.key").exists():
        authority, authority_key = _read_authority(out)
    else:
        authority, authority_key = make_authority(now)
        files = {"ca.crt": authority.public_bytes(Encoding.PEM), "ca.key": _pem(authority_key)}
    end = now + datetime.timedelta(days=days)
    if end > authority.not_valid_after_utc:
        raise ConfigError(f"--days {days}: {out / 'ca.crt'} itself holds only until {authority.not_valid_after_utc:%Y-%m-%d}")
    certificate, key = make_certificate(authority, authority_key, names, now, end)
    files |= {"superlink.crt": certificate.public_bytes(Encoding.PEM), "superlink.key": _pem(key)}
    return write_new(out, files, secret={"ca.key", "superlink.key"})


def make_authority(now: datetime.datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A self-signed authority that may only sign certificates of servers."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"lalora CA {now:%Y-%m-%d}")])
    certificate = (
        _builder(name, name, key, now, now + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def make_certificate(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    names: list[x509.GeneralName],
    begin: datetime.datetime,
    end: datetime.datetime,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A server's certificate: clients compare its alternative names with the address they call."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SuperLink")])
    issuer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(name, authority.subject, key, begin, end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return certificate, key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begin: datetime.datetime, end: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - SKEW)
        .not_valid_after(end)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature, False, False, False, False, key_cert_sign, crl_sign, False, False)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST.fullmatch(host):
        raise ConfigError(f"--host {host!r}: must be a host name or an IP address, without scheme and port")
    return x509.DNSName(host)


def _read_authority(out: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate((out / "ca.crt").read_bytes())
        key = load_pem_private_key((out / "ca.key").read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; ca.crt and ca.key belong together") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # no PEM; or a key behind a password, or of a kind that is not known
        raise ConfigError(
            f"{out}: ca.crt or ca.key cannot be read; this command uses only its own, EC and without password"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{out}: ca.key is not the key of ca.crt")
    return certificate, key


def _pem(key: ec.EllipticCurvePrivateKey, form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def write_new(out: Path, files: dict[str, bytes], *, secret: set[str]) -> list[Path]:
    """Write new files; all or, if one exists, none.

    Args:
        out: their folder, made if it is missing.
        files: content by name.
        secret: those that their owner alone may read.

    Raises:
        ConfigError: one exists, or cannot be written.
    """
    for name in files:
        if os.path.lexists(out / name):
            raise ConfigError(f"{out / name} exists; it is never overwritten: move it away or choose another folder")
    made: list[Path] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(out / name, flags, 0o600 if name in secret else 0o644), "wb") as file:
                made.append(out / name)
                file.write(data)
    except OSError as error:
        for path in made:
            path.unlink(missing_ok=True)
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    return made
