"""Tokens as bytes and as text, for the kinds of tokenizers that language models have."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from saetools.latents.vocabulary import spell, token_bytes
from saetools.models import LanguageModel

TEXTS = ("Hello, the café.", "你好 👩‍🚀 ﷽", " two  spaces\n\tand tabs ", "\u00a0\u00ad\x7f", "<|im_start|>user")


def spelt(tokenizer: Any, text: str) -> tuple[str, ...]:
    pieces = token_bytes(tokenizer)
    return spell(pieces[token] for token in tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level(tokenizer: Any, smollm: LanguageModel, text: str):
    for each in (tokenizer, smollm.tokenizer):
        words = spelt(each, text)
        assert "".join(words) == text
        assert len(words) == len(each(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", TEXTS)
def test_sentence_piece_with_bytes(text: str):
    from transformers import PreTrainedTokenizerFast

    letters = [*"▁abcdefghijklmnopqrstuvwxyz.,", "▁t", "he", "▁the", "é"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    inner = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert "".join(spelt(tokenizer, text)) == text


def test_other_tokenizers_spell_tokens_as_they_decode_them():
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"car": 0, "oil": 1}, unk_token="car"))
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=inner)) == [b"car", b"oil"]


def test_characters_in_several_tokens_stand_at_the_last():
    assert spell([b"a", b"\xf0\x9f", b"\x91", b"\xa9b"]) == ("a", "", "", "👩b")
    assert spell([b"\xa9", b"b", b"\xf0\x9f"]) == ("\ufffd", "b", "\ufffd")
    assert spell([]) == ()
