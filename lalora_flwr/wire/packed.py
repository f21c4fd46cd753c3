"""All arrays of a message as one, for real sites.

Flower uploads and fetches every array of a message by itself, in requests that are signed, answered from a database and made
three times on the way of a message: of an adapter with a hundred slots that is most of a round. So between real processes an
`ArrayRecord` travels as one array of bytes, in the safetensors format.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from safetensors.numpy import load, save

WHOLE = "safetensors"  # name of the only array of a packed record
MOST_HEADER = 2**23  # bytes of names, shapes and places, which are read before anything is known of them; 100 of a slot are usual


class BadPack(ValueError):
    """Bytes that are no packed record."""


def packed(content: RecordDict, made: MutableMapping[int, ArrayRecord] | None = None) -> RecordDict:
    """The same content with each record of arrays as one array.

    Args:
        content: of a message; not changed.
        made: what was packed already, by the identity of the record, for messages that share records.
    """
    made = {} if made is None else made
    for record in content.array_records.values():
        if id(record) not in made:
            made[id(record)] = _packed(record)
    return RecordDict({name: made[id(r)] if isinstance(r, ArrayRecord) else r for name, r in content.items()})


def is_packed(content: RecordDict) -> bool:
    """Whether some record of it is packed."""
    return any(_is_packed(record) for record in content.array_records.values())


def unpacked(content: RecordDict) -> RecordDict:
    """The content as it was before `packed`; other content as it is.

    Raises:
        BadPack: a record says that it is packed, and is not.
    """
    return RecordDict({n: _unpacked(r) if isinstance(r, ArrayRecord) and _is_packed(r) else r for n, r in content.items()})


def _is_packed(record: ArrayRecord) -> bool:
    return set(record) == {WHOLE}


def _packed(record: ArrayRecord) -> ArrayRecord:
    values = {name: np.asarray(array.numpy(), order="C") for name, array in record.items()}
    return ArrayRecord({WHOLE: Array(np.frombuffer(save(values), dtype=np.uint8))})


def _unpacked(record: ArrayRecord) -> ArrayRecord:
    try:
        whole = record[WHOLE].numpy()
        if whole.dtype != np.uint8 or whole.ndim != 1:
            raise ValueError("not bytes")
        if int.from_bytes(whole[:8].tobytes(), "little") > MOST_HEADER:
            raise ValueError("a header that no adapter needs")
        values = load(whole.tobytes())
        return ArrayRecord({name: Array(values[name]) for name in sorted(values)})
    except Exception:  # whatever numpy and safetensors make of bytes that are no arrays
        raise BadPack("its tensors cannot be read") from None
