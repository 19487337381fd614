"""Tokenizes external text. The spelling of a special token is treated as ordinary characters."""

from __future__ import annotations

import functools
import reprlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unidiff.spec import ModelSpec


class PlainText:
    """The tokenizer of prompts, answers and training data: text -> ids.

    It never returns a reserved token of the tokenizer or the spec: special and other added tokens, the mask,
    delimiters, end tokens, marks of templates. Added white space and the unknown-word token count as ordinary text. It
    works with every tokenizer of transformers, fast or slow.
    """

    def __init__(self, tokenizer: Any, spec: ModelSpec) -> None:
        self.tokenizer = tokenizer
        unknown = getattr(tokenizer, "unk_token_id", None)
        added = {id for text, id in tokenizer.get_added_vocab().items() if text.strip() and id != unknown}
        self.special = frozenset(added | {id for id in spec.special_ids if self._text(id)})

    def __call__(self, text: str) -> list[int]:
        """The ids of a text. Raises TypeError if it is not a str, ValueError if it cannot be encoded without a special
        token, or not in UTF-8."""
        if not isinstance(text, str):
            raise TypeError(f"the text is a {type(text).__name__} ({reprlib.repr(text)}); it must be a str")
        text.encode()  # raises for half of a surrogate pair; tokenizers do not
        # Try in order: the whole text; cut after the first character of every spelled reserved token; cut after every
        # character (the tokenizer's normalizer may turn others into a reserved token: `<｜mask｜>`).
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
        """Cuts the text after the first character of each spelled special token."""
        spelled = self._spelled
        lengths = {len(word) for word in spelled}
        at = [i + 1 for i in range(len(text)) if any(text[i : i + n].lower() in spelled for n in lengths)]
        return [text[begin:end] for begin, end in zip([0, *at], [*at, None])]

    @functools.cached_property
    def _spelled(self) -> set[str]:
        return {word.lower() for id in self.special if len(word := self._text(id)) > 1}
