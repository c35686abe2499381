"""Texts and arrays of the wire format as the content of a Flower message.

All arrays travel as one of Flower's: every array of its own would be two objects more that each hop fetches one by one.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sfl.types import Parameters

_TEXT, _ARRAYS, _FORM = "sfl", "sfl.arrays", "sfl.safetensors"


def pack(text: str, arrays: Parameters) -> RecordDict:
    """A message's content: the text, and the arrays in the form of a safetensors file."""
    data = save(arrays)
    whole = Array(dtype="|u1", shape=(len(data),), stype=_FORM, data=data)
    return RecordDict({_TEXT: ConfigRecord({"text": text}), _ARRAYS: ArrayRecord({_FORM: whole})})


def unpack(content: RecordDict) -> tuple[str, Parameters]:
    """The text and the arrays, read-only views into the message.

    Raises:
        ValueError: If the content is none of ours.
    """
    try:
        text, whole = content[_TEXT]["text"], content[_ARRAYS][_FORM]
        if not isinstance(whole, Array) or whole.stype != _FORM:
            raise TypeError
        return str(text), load(whole.data)
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"a message must hold {_TEXT!r} and {_ARRAYS!r}, got {sorted(content)}.") from error
