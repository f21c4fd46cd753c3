"""The checks of a real site, each one line for its owner's eyes: they tell more than any server may know."""

from __future__ import annotations

import datetime
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from datasets import Dataset

from lalora_flwr.cli.site import FAULT, OK, WARNING, Finding
from lalora_flwr.cli.site_profile import profile_line
from lalora_flwr.data.cleaning import Rows
from lalora_flwr.data.columns import Columns
from lalora_flwr.data.images import ImageRecords
from lalora_flwr.data.own_lines import OPEN_QUOTE
from lalora_flwr.data.own_records import OwnRecords, own_records
from lalora_flwr.data.pins import pinned
from lalora_flwr.data.records import Records, RecordSet
from lalora_flwr.gradients.self_check import rounding
from lalora_flwr.ground.errors import ConfigError, LaloraError
from lalora_flwr.ground.files import expanded
from lalora_flwr.ground.hardware import choose_device
from lalora_flwr.ground.lists import joined
from lalora_flwr.ledger.book import Book
from lalora_flwr.ledger.caps import DEMONSTRATION, LANGUAGE, READERS, USUAL_EPSILON, Caps, caps_from
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.fingerprint import fingerprint_of_files
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian
from lalora_flwr.settings import Settings, settings_from
from lalora_flwr.site.admission import ledger_for, request_for
from lalora_flwr.site.model import NO_FOLDER, is_model_folder
from lalora_flwr.site.records import NodeConfig
from lalora_flwr.site.sharing import read_secrets
from lalora_flwr.tasks import problem_of
from lalora_flwr.training.learner import ModelStore
from lalora_flwr.wire.profile import Words

LEAST_FREE, ROOM = 10, 200  # MiB on the ledger's disk: none for an entry, and for a year of them


def checks(
    node_config: NodeConfig, superlink_key: Path | None = None, root_certificates: Path | None = None
) -> Iterator[Finding]:
    """All checks in order; a fault in the keys ends them. Nothing is counted in the ledger."""
    own_log = logging.getLogger("lalora_flwr.site")
    own_log.addHandler(logging.NullHandler())  # what it would say stands in the lines
    try:
        caps = caps_from(node_config, needed=True)
        assert caps is not None
    except LaloraError as error:
        unknown = sorted(set(node_config) - {*READERS, *DEMONSTRATION})
        yield Finding(FAULT, "keys", str(error).removeprefix("node-config: ") + (f" ({', '.join(unknown)})" if unknown else ""))
        return
    yield Finding(OK, "keys", f"{len(node_config)} are known and can be used")
    yield from _caps(caps)
    yield from _ledger(caps)
    if caps.sharing_key:
        yield from _sharing(caps)
    yield from _disk(Path(caps.ledger_path))
    if caps.metrics_path:
        yield _metrics(caps.metrics_path)
    try:
        yield Finding(OK, "device", str(choose_device(caps.device or "auto")))
    except LaloraError as error:
        yield Finding(FAULT, "device", str(error))
    settings = _settings(caps)
    model, line = _model(settings, caps)
    yield line
    if not caps.data_path and set(DEMONSTRATION) <= set(node_config):
        yield Finding(OK, "records", "a share of the embedded digits, which are public")
    else:
        yield from _records(settings, caps, model)
    if superlink_key:
        yield _key(superlink_key)
    if root_certificates:
        yield _certificate(root_certificates)


def _caps(caps: Caps) -> Iterator[Finding]:
    weak = caps.max_epsilon > USUAL_EPSILON
    promise = f"epsilon {caps.max_epsilon:g} at delta {caps.delta:g}" + (", a weak promise" if weak else "")
    yield Finding(WARNING if weak else OK, "budget", promise)
    if caps.allow_evaluation:
        cost = epsilon_spent([SampledGaussian(caps.evaluation_noise, 1.0, 1)], caps.delta)
        dear = cost > caps.max_epsilon / 10
        yield Finding(WARNING if dear else OK, "evaluation", f"allowed; the first answer spends epsilon {cost:.3g}")
    if caps.profile:
        yield profile_line(caps)
    if not caps.answer_seconds:
        yield Finding(WARNING, "answer-seconds", "0: how long an answer takes reveals something about the records")


def _ledger(caps: Caps) -> Iterator[Finding]:
    try:
        content = LedgerFile(caps.ledger_path, witness=caps.witness_path).read()
        ledger = ledger_for(caps, request_for(caps, Settings(), 0, 0, "check", clip_norm=1.0))
        LedgerFile(caps.ledger_path, witness=caps.witness_path).check_writable()
        spent, queries = ledger.spent(), ledger.queries_today()
    except LaloraError as error:
        yield Finding(FAULT, "ledger", str(error))
        return
    left = caps.max_epsilon - spent
    budget = f"dataset {caps.dataset}: epsilon {spent:.4g} spent, {max(0.0, left):.4g} left"
    text = f"{len(content.entries)} entries, all hashes right; {budget}, {queries} queries in the last day"
    yield Finding(OK if left > 0 else FAULT, "ledger", text)
    if spent >= caps.alert_epsilon:
        yield Finding(WARNING, "alert-epsilon", f"epsilon has reached {caps.alert_epsilon:g}")
    if not caps.witness_path:
        yield Finding(WARNING, "witness", "no witness-path: a ledger put back to an older copy would not be noticed")
    else:
        yield Finding(OK, "witness", "the ledger goes on from all that it saw")
    if caps.data_path:
        yield from _name(caps, content.book)


def _sharing(caps: Caps) -> Iterator[Finding]:
    try:
        secrets = read_secrets(caps.sharing_key, caps.sharing_roster)
    except LaloraError as error:
        yield Finding(FAULT, "sharing", str(error))
        return
    if Path(caps.sharing_key).stat().st_mode & 0o077:
        yield Finding(WARNING, "sharing-key", f"{caps.sharing_key}: others may read it; chmod 600")
    names = ", ".join(sorted(secrets.roster.names))
    sites, least = len(secrets.roster.members), max(caps.min_sharing_sites, caps.sharing_colluders + 1)
    text = (
        f"{secrets.name} of {sites} sites ({names}), at least {least} in a sum, {caps.sharing_colluders} may collude; "
        f"roster {secrets.roster.digest[:16]}"
    )
    yield Finding(OK if sites >= least else FAULT, "sharing", text)
    if not caps.witness_path:
        yield Finding(WARNING, "sharing", "no witness-path: with an older copy of the ledger a mask could be used twice")


def _name(caps: Caps, book: Book) -> Iterator[Finding]:
    try:
        named = book.dataset_of(fingerprint_of_files(caps.data_path))
    except OSError:
        return  # the records' own check says it
    if named not in (None, caps.dataset):
        yield Finding(FAULT, "dataset", f"these records are in the ledger as {named!r}, not as {caps.dataset!r}")


def _disk(ledger: Path) -> Iterator[Finding]:
    place = next(folder for folder in expanded(ledger).absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free // 2**20
    state = FAULT if free < LEAST_FREE else WARNING if free < ROOM else OK
    yield Finding(state, "disk", f"{free} MiB free for the ledger")


def _metrics(metrics_path: str) -> Finding:
    """A site answers without its file, so that none of this is a fault."""
    try:
        path = expanded(metrics_path)
    except ConfigError as error:
        return Finding(WARNING, "metrics-path", str(error))
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        return Finding(WARNING, "metrics-path", f"{path}: its folder is not there, or cannot be written")
    if path.suffix != ".prom":
        return Finding(WARNING, "metrics-path", f"{path}: node_exporter reads only names that end in .prom")
    return Finding(OK, "metrics-path", str(path))


def _settings(caps: Caps) -> Settings:
    """Settings of a run that fits the site."""
    family = "timm" if caps.task == "image" else "hf"
    flat = {"model.name": f"{family}/{caps.model_path or '-'}", "data.name": "sites", "data.test": "file:-"}
    about = {"data.labels": joined(caps.labels), "data.problem-type": caps.problem_type, "data.label-range": caps.label_range}
    if caps.task == LANGUAGE:
        about = {"data.response": caps.response_column}
    if precision := Words.of(caps.profile).precision:
        about["model.dtype"] = precision
    longest = {"data.max-tokens": int(caps.max_tokens)} if caps.max_tokens < 2**20 else {}
    return pinned(caps, settings_from({**flat, **about, **longest}))


def _model(settings: Settings, caps: Caps) -> tuple[BaseModel | None, Finding]:
    if not caps.model_path:
        return None, Finding(
            WARNING,
            "model",
            "no model-path: a run names the model, and its tokenizer can ask the records questions; trust who sends runs",
        )
    if not is_model_folder(caps.model_path):
        return None, Finding(FAULT, "model", f"model-path = {caps.model_path!r}: {NO_FOLDER}")
    try:
        learner = ModelStore().learner(settings, caps.device)
        off = rounding(learner.base, learner.adapter, learner.engine)
    except Exception as error:  # whatever a library makes of a folder
        return None, Finding(FAULT, "model", str(error) or type(error).__name__)
    base = learner.base
    found = f"loads, and a record's gradient is its own; in its precision it is off by {off:.1%}"
    found += " (that of its four bits)" if base.whole is not None else ""
    return base, Finding(OK, "model", f"{found}; digest {base.provenance.digest[:16]}")


def _records(settings: Settings, caps: Caps, model: BaseModel | None) -> Iterator[Finding]:
    if not caps.data_path:
        yield Finding(FAULT, "records", "no data-path: the site has no records of its own")
        return
    try:
        known = (model.encode, model.vocabulary, model.segments) if model else (_as_they_are, 0, 0)
        own = own_records(settings, caps.data_path, *known)
    except Exception as error:
        yield Finding(FAULT, "records", str(error) or type(error).__name__)
        return
    for name in own.broken_files:
        yield Finding(FAULT, "records", f"{name} cannot be read: none of its records are used")
    if own.columns:
        yield _columns(own.columns)
    unreadable = _unreadable(own.records)
    if unreadable:
        own.left_out["the image cannot be read"] = len(unreadable)
    usable = len(own.records) - len(unreadable)
    yield Finding(OK if usable else FAULT, "records", f"{usable} of {own.found} can be used")
    for reason, count in own.left_out.items():
        several = reason == OPEN_QUOTE  # a text of several lines would be rows of its own, several for one person
        advice = "; a row is one line: write texts with line breaks as JSON lines or Parquet" if several else ""
        yield Finding(FAULT if several else WARNING, "left out", f"{count}: {reason}{advice}")
    if own.unknown_labels:
        commonest = ", ".join(f"{label[:40]!r} {count}" for label, count in own.unknown_labels.most_common(3))
        why = f"not among {', '.join(caps.labels)}" if caps.labels else f"no number within {caps.label_range}"
        yield Finding(WARNING, "labels", f"{own.unknown_labels.total()} {why}: {commonest}")
    yield from _classes(own, settings, caps, unreadable)
    close = 0.5 <= usable / caps.num_records <= 2
    declared = f"{caps.num_records} declared" + ("" if close else f", but there are {usable}")
    yield Finding(OK if close else WARNING, "num-records", declared)


def _columns(columns: Columns) -> Finding:
    """Which columns were taken: found by their names, they may be others than the owner thinks."""
    taken = {name: column for name, column in vars(columns).items() if column}
    twice = len(set(taken.values())) < len(taken)
    text = ", ".join(f"{name.replace('_', '-')} {column!r}" for name, column in taken.items())
    return Finding(FAULT if twice else OK, "columns", text + ("; one column cannot be two things" if twice else ""))


def _classes(own: OwnRecords, settings: Settings, caps: Caps, unreadable: list[int]) -> Iterator[Finding]:
    if not caps.labels:
        return
    lost: tuple[int, ...] = ()
    if unreadable and isinstance(own.records, ImageRecords):
        lost = problem_of(settings.data).counts(own.records.labels[unreadable], len(caps.labels))
    usable = [found - less for found, less in itertools.zip_longest(own.per_class, lost, fillvalue=0)]
    counts = ", ".join(f"{label} {count}" for label, count in zip(caps.labels, usable, strict=True))
    there = all(usable)
    yield Finding(OK if there else WARNING, "classes", counts + ("" if there else "; a class has no record"))


def _as_they_are(rows: Rows) -> RecordSet:
    """Rows without a model: images can still be opened."""
    if rows.columns.image:
        table: Dataset = rows.table
        return ImageRecords(table, rows.columns.image, rows.labels, lambda image: torch.zeros(1), "RGB")
    return Records(torch.empty(len(rows), 0), rows.labels)


def _unreadable(records: RecordSet) -> list[int]:
    """The places of the images that cannot be read."""
    if not isinstance(records, ImageRecords):
        return []
    return [i for i in range(len(records)) if not len(records.batch(torch.tensor([i]))[1])]


def _key(file: Path) -> Finding:
    try:
        content, mode = file.read_bytes(), file.stat().st_mode
    except OSError as error:
        return Finding(FAULT, "superlink-key", f"{file}: {error.strerror}")
    if b"PRIVATE KEY" not in content:
        return Finding(FAULT, "superlink-key", f"{file}: no private key")
    if mode & 0o077:
        return Finding(WARNING, "superlink-key", f"{file}: others may read it; chmod 600")
    return Finding(OK, "superlink-key", str(file))


def _certificate(file: Path) -> Finding:
    try:
        until = x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc
    except OSError as error:
        return Finding(FAULT, "root-certificates", f"{file}: {error.strerror}")
    except (ValueError, UnsupportedAlgorithm):
        return Finding(FAULT, "root-certificates", f"{file}: no certificate in PEM form")
    state = FAULT if until < datetime.datetime.now(datetime.UTC) else OK
    return Finding(state, "root-certificates", f"{file}: valid until {until:%Y-%m-%d}")
