"""What tells a ledger that two names mean the same records. It stays in the site's own ledger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from lalora_flwr.ground.files import file_digest, files_below


def fingerprint_of_files(pattern: str) -> str:
    """SHA-256 over the contents of all files that a ``data-path`` names (file, glob, or folder with all below it).

    Guarantee: the same contents give the same fingerprint, whatever the files are called and wherever they lie. A
    single changed byte gives another: this finds a mistake in a name, not records that were copied and edited.
    """
    total = hashlib.sha256(b"files")
    for digest in sorted(file_digest(file) for file in files_below(pattern) if file.is_file()):
        total.update(bytes.fromhex(digest))
    return total.hexdigest()


def fingerprint_of_share(values: Mapping[str, object]) -> str:
    """SHA-256 over what defines a share of a common data set, for sites that hold one by number (demonstrations)."""
    return hashlib.sha256(b"share" + json.dumps(values, sort_keys=True).encode()).hexdigest()
