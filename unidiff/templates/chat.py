"""Text tasks: LLaDA's plain and chat prompts. MMaDA uses the same chat markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unidiff.sequence import Interleaved, Kind, Modality, hidden
from unidiff.templates.layout import Guided, Ids, Layout, Picture, Text, Tokenize, ids_of, tokenized, without


@dataclass(frozen=True)
class ChatMarkup:
    """The special tokens around the turns of a chat. gap: the text between a header and its turn."""

    bos: int
    header_begin: int
    header_end: int
    turn_end: int
    gap: str = "\n\n"

    def opening(self, role: str) -> list[Text]:
        return [(self.header_begin,), role, (self.header_end,), self.gap]

    def turns(self, turns: Sequence[tuple[str, str]]) -> list[Text]:
        """The parts of turns (role, text). Raises TypeError for an invalid turn."""
        for i, turn in enumerate(turns):
            if not isinstance(turn, tuple | list) or [isinstance(part, str) for part in turn] != [True, True]:
                raise TypeError(f"turns[{i}] is {turn!r}; a turn is (role, text)")
        return [part for role, text in turns for part in (*self.opening(role), text, (self.turn_end,))]

    def prompt(self, *turns: tuple[str, str]) -> list[Text]:
        """Turns (role, text), then the assistant's header; the answer follows it."""
        return [(self.bos,), *self.turns(turns), *self.opening("assistant")]


@dataclass(frozen=True)
class ChatTemplates:
    """Text-only tasks. markup: None = a base model without chat turns."""

    ids: Ids
    tokenize: Tokenize
    markup: ChatMarkup | None

    def text(self, prompt: Text, length: int, prompt_length: int | None = None) -> Guided:
        """lm: the unchanged prompt, then `length` tokens to sample.

        prompt_length: pad with eos at the left to this number of tokens, for a batch. Raises ValueError if the prompt
        is longer. Guidance "prompt" masks the prompt.
        """
        ids = ids_of(prompt, self.tokenize)
        if prompt_length is not None and len(ids) > prompt_length:
            raise ValueError(f"prompt_length is {prompt_length}, the prompt has {len(ids)} tokens")
        pads = 0 if prompt_length is None else prompt_length - len(ids)
        return self._answered(self.ids.pads(pads, self.ids.eos) + self.ids.text(ids), length)

    def chat(self, user: str | Sequence[tuple[str, str]], length: int) -> Guided:
        """lm_chat: the user's text, or turns (role, text), then the answer to sample."""
        turns = [("user", user)] if isinstance(user, str) else user
        if self.markup is None:
            raise ValueError("a base model knows no chat: its tokenizer has no headers; use text")
        return self.text(self._written(self.markup.prompt(*turns)), length)

    def prompt(
        self,
        parts: Sequence[Text | Picture],
        left_out: str | None = None,
        writes: Kind = "text",
        system: str | None = None,
    ) -> Interleaved:
        """The prompt of a response: the parts as one turn of a chat, or unchanged for a base model. left_out: "text"
        masks the whole prompt (as in LLaDA); "image" changes nothing. Raises ValueError for pictures, in the prompt or
        in the response."""
        kept = without(parts, left_out)
        if any(isinstance(part, Picture) for part in parts):
            raise ValueError("a model of text alone takes no pictures")
        if writes in ("image", "edit"):
            raise ValueError(f"a model of text alone draws no pictures: writes={writes!r} is not for it")
        whole = self.ids.prompt(self._one_turn(parts, system), self.tokenize)
        return whole if kept == list(parts) else hidden(whole, Modality.TEXT, self.ids.mask)

    def behind(self, writes: Kind) -> tuple[int, ...]:
        """No ids follow a response."""
        return ()

    def _one_turn(self, parts: Sequence[Text | Picture], system: str | None = None) -> list[Text | Picture]:
        """The system's turn, if any, then the user's turn and the assistant's header."""
        if self.markup is None:
            return [*([] if system is None else [system + "\n"]), *parts]
        turns = [] if system is None else self.markup.turns([("system", system)])
        before, behind = ((self.markup.bos,), *turns, *self.markup.opening("user")), self.markup.opening("assistant")
        return [*before, *parts, (self.markup.turn_end,), *behind]

    def _written(self, parts: Sequence[Text]) -> tuple[int, ...]:
        return tuple(i for part in tokenized(parts, self.tokenize) for i in part)  # type: ignore[union-attr]

    def _answered(self, prompt: Layout, length: int) -> Guided:
        layout = prompt + self.ids.hole(length)
        return Guided(layout, {"prompt": self.ids.hidden(layout)})
