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


_FIELDS = {
    "run.json": {"run_id"},
    "plan.json": {"walks", "steps"},
    "radius.json": {"blocks", "noise_factor"},
    "evaluation.json": {"blocks", "methods"},
    "map.json": {"files", "lambda_max"},
    "fit.json": {"weights_sha256"},
    "deformation.json": {"trained_on", "kind"},
}
"""Fields that tell a document by its name from the others."""


class Damaged(Exception):
    """A document is not as it was written. The message says what is wrong with it."""


def encode(value: Any) -> bytes:
    """JSON text; the same text for the same value."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def sealed(value: Any) -> bytes:
    """JSON text of an object with its seal; other values have none."""
    value = json.loads(encode(value))  # keys that are numbers become text, and sort as such
    return encode(value | {SEAL: _sha256(encode(value))}) if isinstance(value, dict) else encode(value)


def decode(data: bytes, *, path: str = "", strict: bool = True) -> Any:
    """Return the value without its seal.

    Args:
        data: JSON text.
        path: Where it lies; with `strict` the document of another name is refused.
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
        missing = _FIELDS.get(path.rsplit("/", 1)[-1], set()) - (content.keys() if isinstance(content, dict) else set())
        if missing:
            raise Damaged(f"it is another document: {', '.join(sorted(missing))} are not in it")
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
