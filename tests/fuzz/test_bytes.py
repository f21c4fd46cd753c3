"""Files and messages with damaged bytes: one clear line or what was meant, never a crash, and nothing damaged taken for good.

LALORA_FUZZ=50 pytest tests/fuzz        fifty times as many inputs
"""

from __future__ import annotations

import ast
import base64
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from pyarrow import parquet
from typer.testing import CliRunner

import lalora_flwr
from lalora_flwr import api
from lalora_flwr.audit.record import read, write
from lalora_flwr.audit.verify import verify
from lalora_flwr.cli.main import app
from lalora_flwr.cli.site import parse_node_config
from lalora_flwr.data.own_records import own_records
from lalora_flwr.ground.errors import ConfigError, LaloraError, LedgerError
from lalora_flwr.ledger.caps import caps_from
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.server.certificate import CERTIFICATE, READABLE
from lalora_flwr.server.folder import read_checkpoint
from lalora_flwr.settings import read_toml, settings_from
from lalora_flwr.site.sharing import read_secrets
from lalora_flwr.wire.packed import WHOLE, BadPack, packed, unpacked
from lalora_flwr.wire.sharing import read_key
from tests.audit.test_audit import RECORD
from tests.conftest import Finished
from tests.data.files import keep, settings, write_csv
from tests.fuzz.mutator import TIMES, damaged
from tests.ledger.site_ledgers import new_ledger, serve

ROWS = [("the film is good", "good"), ("the film is bad", "bad"), ('a "quoted", text', "good")] * 5
Use = Callable[[], object]


def survive(path: Path, use: Use, times: int, *, accepts_only: object = None) -> int:
    """Use a file in so many damaged states. Returns how many were refused.

    Args:
        path: the file; as before afterwards.
        use: reads it.
        times: inputs.
        accepts_only: what reading a state that is not refused must give; None: anything.
    """
    good, refused, draw = path.read_bytes(), 0, random.Random(path.name)
    for _ in range(times * TIMES):
        state = damaged(good, draw)
        path.write_bytes(state)
        try:
            found = use()
        except LaloraError as fault:
            assert str(fault).strip()
            refused += 1
            continue
        if accepts_only is not None:
            assert found == accepts_only, state
    path.write_bytes(good)
    use()
    return refused


def test_settings(finished: Callable[..., Finished], tmp_path: Path) -> None:
    path = Path(shutil.copy(finished().path / "config.toml", tmp_path))
    assert survive(path, lambda: settings_from(read_toml(path)), 1200)


def test_node_configs(tmp_path: Path) -> None:
    text = (
        'task="text" labels="good,bad" data-path="own.csv" ledger-path="ledger.db" max-epsilon=3.0 delta=0.00001 '
        'num-records=1000 clip-norm-range="0.01,100" allow-run-model=true max-queries-per-day=10 profile="rank=2"'
    )
    path = tmp_path / "node"
    path.write_text(text)
    assert survive(path, lambda: caps_from(parse_node_config(path.read_text(errors="replace")), needed=True), 1500)


def test_ledgers(tmp_path: Path) -> None:
    """A state that is taken has exactly the entries that were written."""
    path = new_ledger(tmp_path)
    for server_round in (1, 2, 3):
        serve(path, server_round=server_round)

    def entries() -> list[object]:
        return list(LedgerFile(path).read(thorough=True).entries)

    assert survive(path, entries, 1500, accepts_only=entries())


def test_rosters(tmp_path: Path) -> None:
    lines = [
        CliRunner().invoke(app, ["site", "keys", name, "--out", str(tmp_path)]).stdout.splitlines()[0] for name in ("a", "b")
    ]
    roster, key = tmp_path / "roster", tmp_path / "a.sharing.key"
    roster.write_text("\n".join(lines))
    assert survive(roster, lambda: read_secrets(str(key), str(roster)), 800)
    assert survive(key, lambda: read_secrets(str(key), str(roster)), 400)


def test_checkpoints_and_metrics(finished: Callable[..., Finished], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished().path, tmp_path / "run"))
    assert survive(folder / "checkpoint" / "adapter.safetensors", lambda: read_checkpoint(folder), 800)
    for name in ("metrics.jsonl", "summary.json", "config.toml"):
        assert survive(folder / name, lambda: api.opened(folder), 400)


def test_certificates_take_nothing_that_was_damaged(finished: Callable[..., Finished], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished().path, tmp_path / "run"))
    draw = random.Random(0)
    for name in (CERTIFICATE, READABLE, "summary.json", "adapter/adapter_model.safetensors"):
        good = (folder / name).read_bytes()
        for _ in range(250 * TIMES):
            state = damaged(good, draw)
            (folder / name).write_bytes(state)
            if state == good:
                continue
            with pytest.raises(LaloraError):
                list(verify(folder))
        (folder / name).write_bytes(good)
    list(verify(folder))


def test_audits(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    write(RECORD, path)
    assert survive(path, lambda: read(path).sentence, 600)


def test_packed_messages() -> None:
    content = RecordDict({"arrays": ArrayRecord({n: Array(np.ones((3, 2), np.float32)) for n in ("a", "b")})})
    good = bytes(packed(content)["arrays"][WHOLE].numpy())
    draw, refused = random.Random(1), 0
    for _ in range(1500 * TIMES):
        state = np.frombuffer(damaged(good, draw), dtype=np.uint8)
        try:
            unpacked(RecordDict({"arrays": ArrayRecord({WHOLE: Array(state)})}))
        except BadPack:
            refused += 1
    assert refused


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_records(kind: str, tmp_path: Path) -> None:
    """Records or a line; a damaged row is left out or is other text, which no reader can tell."""
    path = tmp_path / f"own.{kind}"
    if kind == "csv":
        write_csv(path, ROWS)
    elif kind == "jsonl":
        path.write_text("\n".join(f'{{"text": {text!r}, "label": "{label}"}}'.replace("'", '"') for text, label in ROWS[:2] * 5))
    else:
        parquet.write_table(pa.table({"text": [r[0] for r in ROWS], "label": [r[1] for r in ROWS]}), path)
    asked = settings("text", name="sites", test="file:public.csv", labels="good,bad", text="text", label="label")

    def use() -> Any:
        return len(own_records(asked, str(path), keep, 0).records)

    survive(path, use, 500)


def test_no_file_is_unpickled() -> None:
    """Pickle runs whatever a file says: no module of this package imports it, or loads with torch's, which may use it."""
    for path in Path(lalora_flwr.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve"} & {name.partition(".")[0] for name in names}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                assert not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"), path


def test_a_ledger_whose_words_sqlite_quotes_is_damaged(tmp_path: Path) -> None:
    """Found by `test_ledgers`: SQLite quotes a damaged schema in its message, which is then no UTF-8."""
    path = new_ledger(tmp_path)
    content = bytearray(path.read_bytes())
    words = content.index(b"CREATE TABLE")
    content[words] = ord("X")
    content[content.rindex(b"table", 0, words) + len("table")] = 0xB0  # the first letter of the table's name
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="ledger"):
        LedgerFile(path).read(thorough=True)


def test_a_key_of_no_known_kind_is_one_line() -> None:
    """Found by `test_rosters`: cryptography has an exception of its own for a kind of key that it does not know."""
    key = bytes.fromhex("302e020100300506032bb56e04220420") + bytes(32)
    text = base64.b64encode(key).decode()
    with pytest.raises(ConfigError, match="lalora site keys"):
        read_key(f"-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n".encode())
