"""The bytes of every token of a vocabulary, and text from them token by token."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes a space


def token_bytes(tokenizer: Any) -> list[bytes]:
    """What each token id stands for, in UTF-8; a token may hold part of a character only.

    Args:
        tokenizer: a fast Hugging Face tokenizer: byte-level, or SentencePiece with or without bytes as tokens. Tokens
            of another kind are what the tokenizer decodes them to, one by one.

    Example:
        >>> spellings = token_bytes(lm.tokenizer)
        >>> [spellings[token] for token in lm.tokenizer("a car \U0001f697")["input_ids"]]
        [b'a', b' car', b' \\xf0\\x9f', b'\\x9a', b'\\x97']
    """
    decoder = tokenizer.backend_tokenizer.decoder
    words = "" if decoder is None else decoder.__getstate__().decode()
    kinds = set(_types(json.loads(words))) if words else set()
    letters = _byte_letters()
    found = [b""] * (1 + max(tokenizer.get_vocab().values()))
    for piece, token in tokenizer.get_vocab().items():
        if token in tokenizer.added_tokens_decoder:
            found[token] = tokenizer.added_tokens_decoder[token].content.encode()
        elif "ByteLevel" in kinds and all(letter in letters for letter in piece):
            found[token] = bytes(letters[letter] for letter in piece)
        elif "ByteFallback" in kinds and (byte := _BYTE.fullmatch(piece)):
            found[token] = bytes([int(byte[1], 16)])
        elif "ByteFallback" in kinds or "Metaspace" in kinds:
            found[token] = piece.replace(_SPACE, " ").encode()
        else:
            found[token] = tokenizer.decode([token]).encode()
    return found


def spell(pieces: Iterable[bytes]) -> tuple[str, ...]:
    """The text of each token; joined, it is the text of all.

    A character whose bytes lie in several tokens stands at the last of them; bytes of no character become U+FFFD.

    Example:
        >>> spell([b"caf", b"\\xc3", b"\\xa9", b"!"])
        ('caf', '', '\u00e9', '!')
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(piece) for piece in pieces]
    if rest := decoder.decode(b"", final=True):
        texts[-1] += rest
    return tuple(texts)


def _types(value: Any) -> Iterable[str]:
    """The `type` of a decoder and of those it is made of."""
    if isinstance(value, dict):
        if "type" in value:
            yield value["type"]
        for each in value.values():
            yield from _types(each)
    elif isinstance(value, list):
        for each in value:
            yield from _types(each)


def _byte_letters() -> dict[str, int]:
    """Byte-level vocabularies write printable Latin-1 bytes as themselves and the others as letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
