"""Arrays to bytes: what goes over the wire, written straight from the computed rows."""

from __future__ import annotations

import io
from binascii import b2a_base64
from collections.abc import Sequence

import numpy as np
import orjson

JSON = "application/json"
RAW = "application/octet-stream"
NPY = "application/x-npy"

_NUMPY = orjson.OPT_SERIALIZE_NUMPY


def dump(value: object) -> bytes:
    """JSON; float32 arrays in it with the shortest digits that read back to the same bits."""
    return orjson.dumps(value, option=_NUMPY)


def base64_of(row: np.ndarray) -> bytes:
    """Base64 of an array's little-endian bytes."""
    return b2a_base64(_little(row).data, newline=False)


def raw(matrix: np.ndarray) -> bytes:
    """The little-endian bytes of a matrix, row after row."""
    return _little(matrix).tobytes()


def npy(matrix: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    out = io.BytesIO()
    np.lib.format.write_array(out, _little(matrix), allow_pickle=False)
    return out.getvalue()


def embeddings_json(matrix: np.ndarray, encoding_format: str) -> bytes:
    """`[[...], ...]`, or a list of base64 strings."""
    if encoding_format == "float":
        return dump(matrix)
    return b"[" + b",".join(b'"' + base64_of(row) + b'"' for row in matrix) + b"]"


def openai_json(matrix: np.ndarray, encoding_format: str, model: str, tokens: int) -> bytes:
    """The body of OpenAI's `/v1/embeddings`."""
    rows: Sequence[bytes]
    if encoding_format == "float":
        rows = [dump(row) for row in matrix]
    else:
        rows = [b'"' + base64_of(row) + b'"' for row in matrix]
    data = b",".join(
        b'{"object":"embedding","embedding":' + row + b',"index":%d}' % index for index, row in enumerate(rows)
    )
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
    return b'{"object":"list","data":[' + data + b'],"model":' + dump(model) + b',"usage":' + usage + b"}"


def _little(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))


def accepted(accept: str | None, offered: Sequence[str]) -> str | None:
    """The media type of `offered` that an Accept header prefers, the first one on a tie; None = none is acceptable."""
    if accept is None or accept in ("*/*", JSON):
        return offered[0]
    best, best_quality = None, 0.0
    ranges = [_media_range(part) for part in accept.split(",")]
    for media in offered:
        kind = media.split("/")[0] + "/*"
        matching = [(name == media, name == kind, quality) for name, quality in ranges if name in (media, kind, "*/*")]
        quality = max(matching)[2] if matching else 0.0  # the most specific range decides
        if quality > best_quality:
            best, best_quality = media, quality
    return best


def _media_range(text: str) -> tuple[str, float]:
    name, *parameters = (piece.strip() for piece in text.lower().split(";"))
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                return name, float(value)
            except ValueError:
                return name, 0.0
    return name, 1.0
