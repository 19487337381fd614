"""Text from outside as ids. What spells a special token there is characters like any others."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unidiff.spec import ModelSpec


class PlainText:
    """The tokenizer of prompts, answers and training data: a function of a text that gives its ids.

    It never gives a token that the tokenizer or the spec sets apart: special and other added tokens, the mask,
    delimiters, end tokens, marks of templates. Added white space is ordinary text, and so is the token of unknown
    words. Any tokenizer of transformers will do, fast or slow.
    """

    def __init__(self, tokenizer: Any, spec: ModelSpec) -> None:
        self.tokenizer = tokenizer
        unknown = getattr(tokenizer, "unk_token_id", None)
        added = {id for text, id in tokenizer.get_added_vocab().items() if text.strip() and id != unknown}
        self.special = frozenset(added | {id for id in spec.special_ids if self._text(id)})

    def __call__(self, text: str) -> list[int]:
        """Raises ValueError if the text cannot be written without a special token."""
        ids = self._ids(text)
        if not self.special.isdisjoint(ids):
            # Added tokens that are not "special", or words of the vocabulary: cut behind their first character.
            ids = [id for part in self._spelled.split(text) for id in self._ids(part)]
        if found := self.special.intersection(ids):
            spelled = ", ".join(repr(self._text(id)) for id in sorted(found))
            raise ValueError(f"the text {text[:60]!r} reads as the special token {spelled}, which only templates write")
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _text(self, id: int) -> str:
        return str(self.tokenizer.decode([id])).strip()

    @functools.cached_property
    def _spelled(self) -> re.Pattern[str]:
        """Matches, without a character, behind the first one of whatever spells a special token."""
        texts = sorted({self._text(id) for id in self.special} - {""})
        first = "|".join(f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in texts if len(text) > 1)
        return re.compile(first, re.IGNORECASE)
