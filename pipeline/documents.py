"""JSON and text that carry a checksum of themselves: any byte that changes in storage is noticed when they are read.

A JSON object has one more field, ``seal``, the sha256 of the same object without it. A text ends with a comment that
holds the sha256 of all before it.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

SEAL = "seal"
_COMMENT = re.compile(rb"(?:# |<!-- )fiberwalk\.sha256: ([0-9a-f]{64})(?: -->)?\n\Z")


class Damaged(Exception):
    """A document is not as it was written. The message says what is wrong with it."""


def encode(value: Any) -> bytes:
    """JSON text; the same text for the same value."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def sealed(value: Any) -> bytes:
    """JSON text of an object with its seal; other values have none."""
    value = json.loads(encode(value))  # keys that are numbers become text, and sort as such
    return encode(value | {SEAL: _sha256(encode(value))}) if isinstance(value, dict) else encode(value)


def decode(data: bytes, *, strict: bool = True) -> Any:
    """Return the value without its seal.

    Args:
        data: JSON text.
        strict: Also refuse what is JSON but not byte for byte what `sealed` gave.

    Raises:
        Damaged: It is not JSON, or was changed after it was written.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise Damaged(f"it is not JSON ({error})") from None
    content = {name: part for name, part in value.items() if name != SEAL} if isinstance(value, dict) else value
    if strict:
        try:
            fits = sealed(content) == data
        except ValueError:  # a number that JSON does not know, such as NaN
            fits = False
        if not fits:
            raise Damaged("it was changed after it was written: its seal does not fit its content")
    return content


def sealed_text(text: bytes, comment: str = "# {}") -> bytes:
    """A text, ended by a comment with its checksum."""
    return text + comment.format(f"fiberwalk.sha256: {_sha256(text)}").encode() + b"\n"


def text_is_sealed(data: bytes) -> bool:
    """Whether a text is as `sealed_text` made it."""
    found = _COMMENT.search(data)
    return found is not None and found[1].decode() == _sha256(data[: found.start()])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
