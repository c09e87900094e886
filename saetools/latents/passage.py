"""A stretch of a document around one token, with what a latent did on every token of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    """Some tokens of a document and one latent's activation on each of them, in every model that read it.

    Args:
        dataset: which dataset the document is from.
        document: its index in the corpus.
        document_id: its id.
        start: place of the first token in the document, from 0.
        token_ids: the tokens.
        tokens: their text; joined, it is the text of the passage. A character whose bytes lie in several tokens stands
            at the last of them.
        roles: `Role` flags of each token.
        peak: index in `tokens` of the token that the passage was chosen by.
        acts: the latent's activation on each token, by model; 0 on a first position if these were left out.
    """

    dataset: str
    document: int
    document_id: str
    start: int
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    roles: tuple[int, ...]
    peak: int
    acts: dict[str, tuple[float, ...]]

    @property
    def text(self) -> str:
        """All tokens joined."""
        return "".join(self.tokens)
