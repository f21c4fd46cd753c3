"""A real site's own records: what its node-config names, read so that the site can answer whatever state they are in.

There are two kinds of faults. The layout is the owner's: that the files are there and may be opened, their kinds, splits and
columns. If it is wrong the site refuses, and `lalora site check` says why beforehand. A row or an image that is of no use
is left out by itself, counted, and changes nothing about the others; a file that cannot be read holds no records.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lalora_flwr.data.class_names import declared_labels
from lalora_flwr.data.limits import LONGEST_ROW
from lalora_flwr.data.records import Encode, RecordSet, no_records
from lalora_flwr.data.texts import TextRecords
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import Settings
from lalora_flwr.tasks import problem_of

if TYPE_CHECKING:
    from lalora_flwr.data.cleaning import Rows
    from lalora_flwr.data.columns import Columns

log = logging.getLogger("lalora_flwr.site")


@dataclass
class OwnRecords:
    """A site's records, and for its owner's eyes what was found.

    Attributes:
        records: ready for the model.
        found: rows and images, usable or not.
        left_out: how many of them are of no use, by reason.
        per_class: usable records of each class, in order; empty where there are none.
        broken_files: names of files that could not be read at all.
        columns: which column is what; None if no file could be read.
        unknown_labels: labels that are no class, or no number within the range, with how many records have them.
    """

    records: RecordSet = field(default_factory=no_records)
    found: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    per_class: tuple[int, ...] = ()
    broken_files: list[str] = field(default_factory=list)
    columns: Columns | None = None
    unknown_labels: Counter[str] = field(default_factory=Counter)

    def say(self) -> None:
        """Say what was left out, in the site's own log."""
        for name in self.broken_files:
            log.error("data-path: %s cannot be read: none of its records are used", name)
        for reason, count in self.left_out.items():
            log.warning("data-path: %d of %d records left out: %s", count, self.found, reason)


def own_records(
    settings: Settings,
    path: str,
    encode: Encode,
    vocabulary: int = 0,
    segments: int = 0,
    longest: int = LONGEST_ROW,
) -> OwnRecords:
    """A real site's records, from the files under its own ``data-path``; no copy of them is left on disk.

    Guarantee: every row or image is judged by itself alone, so one more or less changes nothing about the others; whether this
    raises depends on the layout of the files only.

    Args:
        settings: with the owner's data settings (`lalora_flwr.data.pins.pinned`).
        path: the owner's ``data-path``.
        encode: the model's.
        vocabulary: how many token ids the model knows; 0: it takes no tokens.
        segments: how many types of tokens it knows; 0: it has none.
        longest: bytes; a line or a value of as many or more is no record.

    Raises:
        ConfigError: the files do not exist, may not be opened, or lack the split or a column; one line for the owner.
    """
    from lalora_flwr.data.cleaning import usable_rows
    from lalora_flwr.data.labels import indicated, label_texts
    from lalora_flwr.data.own_tables import own_table
    from lalora_flwr.data.tables import folder_of
    from lalora_flwr.tasks.label_text import as_text

    labels = declared_labels(settings.data)
    problem = problem_of(settings.data)
    has_classes = settings.task != "language" and problem.named
    if not labels and has_classes:
        raise ConfigError("labels: must name the classes, in the same order for every site")
    own = OwnRecords(per_class=(0,) * len(labels))
    read = own_table(settings, path, own.left_out, own.broken_files, longest)
    if read is None:
        own.say()
        return own
    table, columns = read
    own.found, own.columns = len(table) + own.left_out.total(), columns
    if has_classes:
        classes = {as_text(name) or "": number for number, name in enumerate(labels)}
        texts = label_texts(table, columns.label) if columns.label else indicated(table, columns.indicators)
        parts = (name for text in texts if text is not None for name in problem.parts(text, classes))
        own.unknown_labels.update(name for name in parts if name not in classes)
    elif columns.label:
        numbers = (text for text in label_texts(table, columns.label) if text is not None)
        own.unknown_labels.update(text for text in numbers if problem.target(text, {}) is None)
    rows = usable_rows(table, columns, labels, problem, folder=folder_of(path), left_out=own.left_out)
    own.records, rows = _encoded(rows, encode, vocabulary, segments, own.left_out)
    if has_classes:
        own.per_class = problem.counts(rows.labels, len(labels))
    own.say()
    return own


def _encoded(rows: Rows, encode: Encode, vocabulary: int, segments: int, left_out: Counter[str]) -> tuple[RecordSet, Rows]:
    """The rows as the model's records, without those that it cannot take, and the rows that are left."""
    try:
        records = encode(rows)
    except ConfigError:
        raise
    except Exception:
        log.exception("a record cannot be encoded; trying one by one")
        alone = [_alone(rows.take([i]), encode) for i in range(len(rows))]
        good = [i for i, record in enumerate(alone) if record is not None]
        left_out["the model's tokenizer fails on it"] += len(rows) - len(good)
        rows = rows.take(good)
        texts = [record for record in alone if isinstance(record, TextRecords)]
        records = TextRecords.joined(texts) if texts else encode(rows)  # together they may fail though each passes alone
    if isinstance(records, TextRecords):
        good = list(_known_tokens(records, vocabulary, segments))
        if len(good) < len(records):
            left_out["it holds no token, or one that the model has no embedding for"] += len(rows) - len(good)
            records, rows = records.take(good), rows.take(good)
    return records, rows


def _alone(row: Rows, encode: Encode) -> RecordSet | None:
    try:
        return encode(row)
    except Exception:  # whatever a tokenizer makes of a text
        return None


def _known_tokens(records: TextRecords, vocabulary: int, segments: int) -> Iterator[int]:
    for i, tokens in enumerate(records.tokens):
        known = len(tokens) and (not vocabulary or int(tokens.max()) < vocabulary)
        if known and (records.types is None or not segments or int(records.types[i].max()) < segments):
            yield i
