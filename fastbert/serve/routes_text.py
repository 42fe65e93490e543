"""The tokeniser over HTTP: TEI's /tokenize and /decode."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import tokenizers
from fastapi import APIRouter, Response

from fastbert.serve import answers, wire
from fastbert.serve.call import Call
from fastbert.serve.errors import EmptyInput, Invalid
from fastbert.serve.gate import DirectRoute
from fastbert.serve.infer import check_count, check_texts, tokenizing
from fastbert.serve.schemas import DecodeRequest, TokenizeRequest

router = APIRouter(route_class=DirectRoute)

_CHARACTERS_A_TOKEN = 250  # TEI reads no text of more characters than this times the model's length


@router.post("/tokenize", **answers.tokenize)
async def tokenize(call: Call, body: TokenizeRequest) -> Response:
    """The tokens of texts, not cut; `start` and `stop` count bytes of the prompt and text in UTF-8."""
    model = call.model()
    texts = check_texts(call, body.inputs)
    limit = _CHARACTERS_A_TOKEN * model.served.max_length
    longest = max(map(len, texts))
    with tokenizing():
        if longest > limit:
            message = f"`inputs` must have less than {limit} characters. Given: {longest}"
            raise Invalid(f"Input validation error: {message}", "inputs")
        prompt = model.prompt(body.prompt_name)
    prompted = [prompt + text for text in texts]
    encodings = await model.encodings.whole(prompted, body.add_special_tokens)
    content = [_tokens(text, encoding) for text, encoding in zip(prompted, encodings, strict=True)]
    return call.answer(wire.dump(content))


def _tokens(text: str, encoding: tokenizers.Encoding) -> list[dict[str, Any]]:
    byte = range(len(text) + 1) if text.isascii() else list(accumulate((len(c.encode()) for c in text), initial=0))
    rows: list[dict[str, Any]] = []
    for token, word, (start, end), special in zip(
        encoding.ids, encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True
    ):
        if special:
            rows.append({"id": token, "text": word, "special": True, "start": None, "stop": None})
        else:
            place = {"start": byte[start], "stop": byte[end]}
            rows.append({"id": token, "text": text[start:end], "special": False, **place})
    return rows


@router.post("/decode", **answers.decode)
async def decode(call: Call, body: DecodeRequest) -> Response:
    """The texts of token ids."""
    model = call.model()
    rows: list[Any] = body.ids if body.ids and isinstance(body.ids[0], list) else [body.ids]
    check_count(call, len(rows), "ids")
    with tokenizing():
        if not all(rows):
            raise EmptyInput("Input validation error: `input_ids` cannot be empty", "ids")
    return call.answer(wire.dump([model.encodings.decode(ids, body.skip_special_tokens) for ids in rows]))
