"""Text from outside as ids. What spells a special token there is characters like any others."""

from __future__ import annotations

import functools
import reprlib
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
        """Raises TypeError for what is not a text, ValueError if it cannot be written without a special token, or not
        in UTF-8."""
        if not isinstance(text, str):
            raise TypeError(f"the text is a {type(text).__name__} ({reprlib.repr(text)}); it must be a str")
        text.encode()  # half of a surrogate pair is named here, by no tokenizer
        # Added tokens that are not "special", or words of the vocabulary: cut behind their first character. What the
        # tokenizer's normalizer makes of other characters (`<｜mask｜>`): cut behind every one.
        for cut in (lambda text: [text], self._cut, list):
            ids = [id for part in cut(text) for id in self._ids(part)]
            if self.special.isdisjoint(ids):
                return ids
        spelled = ", ".join(repr(self._text(id)) for id in sorted(self.special.intersection(ids)))
        raise ValueError(f"the text {text[:60]!r} reads as the special token {spelled}, which only templates write")

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _text(self, id: int) -> str:
        return str(self.tokenizer.decode([id])).strip()

    def _cut(self, text: str) -> list[str]:
        """The text in pieces: behind the first character of whatever spells a special token."""
        spelled = self._spelled
        lengths = {len(word) for word in spelled}
        at = [i + 1 for i in range(len(text)) if any(text[i : i + n].lower() in spelled for n in lengths)]
        return [text[begin:end] for begin, end in zip([0, *at], [*at, None])]

    @functools.cached_property
    def _spelled(self) -> set[str]:
        return {word.lower() for id in self.special if len(word := self._text(id)) > 1}
