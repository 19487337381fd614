"""Templates that begin with a task token: MMaDA and MMaDA-Parallel-M.

Notation: [x] one id, text = bos text eos unless stated otherwise, M = mask. All pictures are between image_begin and
image_end, without row separators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unidiff.sequence import Interleaved, Kind
from unidiff.templates.chat import ChatTemplates
from unidiff.templates.layout import Guided, Ids, Layout, Part, Picture, Text, filled, ids_of, without


@dataclass(frozen=True, kw_only=True)
class TaskTokenIds(Ids):
    """pad: left pad of text-to-image. header_end: ends a chat header; in training the prompt ends with the last one.
    text_to_image, understand, reason, parallel: task tokens (None = not trained). interleaved: the task token of
    `interleaved`. image_next, text_end: end ids of a text before a picture, and of the last text."""

    pad: int
    header_end: int
    text_to_image: int
    understand: int
    reason: int
    interleaved: int
    image_next: int
    text_end: int
    parallel: int | None = None


@dataclass(frozen=True)
class TaskTokenTemplates(ChatTemplates):
    """The tasks with pictures. Text and chat are inherited, and have no task token.

    prefix: number of tokens before the picture of text-to-image. Prompts are padded at the left or truncated to it,
    because the family was trained with this length.
    """

    ids: TaskTokenIds
    prefix: int

    # ---------------------------------------------------------------- sampling

    def text_to_image(self, text: Text, picture: Picture) -> Guided:
        """[pad].. [text_to_image] bos text eos, `prefix` ids in all, then the picture. Guidance "text": no words.

        A picture with known cells is edited: known cells are kept, the others are sampled.
        """
        layouts = []
        for words in (text, ()):
            ids = (self.ids.text_to_image, *self._closed(words))
            if len(ids) > self.prefix:
                ids = filled(ids, self.prefix, self.ids.eos, cut=self.ids.eos)
            prefix = self.ids.pads(self.prefix - len(ids), self.ids.pad) + self.ids.marks(ids[0])
            layouts.append(prefix + self.ids.text(ids[1:]) + self.ids.image(picture))
        return Guided(layouts[0], {"text": layouts[1]})

    def understand(self, user: Text, pictures: Sequence[Picture], length: int) -> Guided:
        """[understand] pictures, chat, M x length. user: the user's text, or the ids of a whole chat with headers.
        Guidance "prompt" masks the prompt."""
        layout = self.ids.marks(self.ids.understand) + self.ids.images(pictures) + self.ids.text(self._chat(user))
        layout += self.ids.hole(length)
        return Guided(layout, {"prompt": self.ids.hidden(layout)})

    def reason_then_image(self, user: Text, picture: Picture, area: int) -> Guided:
        """[reason] chat M.., `area` ids of text in all (512 in training), then the picture; both are sampled.

        Raises ValueError if the chat leaves no room for the reasoning. Guidance "text": an empty user turn.
        """
        chat = self._chat(user)
        if len(chat) >= area:
            raise ValueError(f"area: the prompt's {len(chat)} tokens leave no room for reasoning in {area}")
        length = area - len(chat)
        layouts = [
            self.ids.marks(self.ids.reason) + self.ids.text(said) + self.ids.hole(length) + self.ids.image(picture)
            for said in (chat, self._chat(""))
        ]
        return Guided(layouts[0], {"text": layouts[1]})

    def parallel(self, text: Text, given: Picture, picture: Picture, length: int) -> Guided:
        """Text and picture at once: [parallel] given bos text eos, picture bos M x (length - 1).

        Guidance "prompt": the given picture's tokens become id 0, and the text becomes bos eos.. of the same length, as
        in the family's training and sampling. (For text, the reference's guidance has a sign error and moves away from
        the prompt; use the formula of pictures.) Raises ValueError if the family has no such task.
        """
        if self.ids.parallel is None:
            raise ValueError("this family was not trained on text and picture in parallel")
        words = self._closed(text)
        image = self.ids.image(given)
        nothing = tuple(0 if place >= 0 else i for i, place in zip(image.ids, image.segment))
        output = self.ids.image(picture) + self.ids.marks(self.ids.bos) + self.ids.hole(length - 1)
        task = self.ids.marks(self.ids.parallel)
        empty = (words[0], *[self.ids.eos] * (len(words) - 1))
        return Guided(
            task + image + self.ids.text(words) + output,
            {"prompt": task + replace(image, ids=nothing) + self.ids.text(empty) + output},
        )

    def interleaved(self, prompt: Sequence[Text | Picture], response: Sequence[Part]) -> Guided:
        """Rounds of text and picture (our own task, with the family's delimiters): [interleaved], the prompt as a chat,
        the response part by part.

        Leading pictures of the prompt come before the chat, as in `understand`; others stay in place. A string of the
        response gets its end id (see `Ids.response`). Guidance leaves out the prompt's words ("text") and, if there are
        any, its pictures ("image"); the response so far stays.
        """
        answer = self.ids.response(response, self.tokenize, self.ids.image_next, self.ids.text_end)
        names = ("text", "image") if any(isinstance(part, Picture) for part in prompt) else ("text",)
        task = self.ids.marks(self.ids.interleaved)

        def layout(left_out: str | None) -> Layout:
            return task + self.ids.mixed(self._rounds(without(prompt, left_out)), self.tokenize) + answer

        return Guided(layout(None), {name: layout(name) for name in names})

    def prompt(
        self,
        parts: Sequence[Text | Picture],
        left_out: str | None = None,
        writes: Kind = "interleaved",
        system: str | None = None,
    ) -> Interleaved:
        """The prompt of a response, as in the layouts above, but without pads, which are never attended. left_out:
        "text", "image" or None.

        A text response has a chat without a task token. An edit has a task token, the pictures, then bos words eos. The
        task token is that of `parallel` if the family has it, else that of text-to-image. Raises ValueError for a
        system prompt if a picture is drawn: the family has none there.
        """
        kept = without(parts, left_out)
        if writes in ("image", "edit"):
            if system is not None:
                raise ValueError(
                    f"system: this family knows no system prompt for writes={writes!r}; add it to the prompt"
                )
            pictures = [part for part in kept if isinstance(part, Picture)]
            closed = self._closed(self._written([part for part in kept if not isinstance(part, Picture)]))
            if writes == "image" and len(closed) >= self.prefix:
                closed = filled(closed, self.prefix - 1, self.ids.eos, cut=self.ids.eos)
            task = self.ids.text_to_image if writes == "image" or self.ids.parallel is None else self.ids.parallel
            return self.ids.prompt([(task,), *pictures, closed], self.tokenize)
        if writes == "understand":
            kept.sort(key=lambda part: not isinstance(part, Picture))
        task = {"text": (), "understand": (self.ids.understand,)}.get(writes, (self.ids.interleaved,))
        return self.ids.prompt([task, *self._rounds(kept, system)], self.tokenize)

    def _rounds(self, parts: Sequence[Text | Picture], system: str | None = None) -> list[Text | Picture]:
        leading = next((i for i, part in enumerate(parts) if not isinstance(part, Picture)), len(parts))
        return [*parts[:leading], *self._one_turn(parts[leading:], system)]

    # ---------------------------------------------------------------- training

    def turns(self, *turns: tuple[str, str]) -> tuple[int, ...]:
        """The ids of a whole chat, turns (role, text), for training."""
        assert self.markup is not None
        return self._written(self.markup.turns(turns))

    def train_text(self, text: Text, length: int) -> Layout:
        """bos text eos eos.., every id is a target; a too long text is truncated without an eos."""
        return self.ids.text(filled(self._closed(text), length, self.ids.eos), learn_from=0)

    def train_chat(self, text: Text, length: int) -> Layout:
        """As `train_text`, but targets begin after the last header (without a header there are none). text: the ids of
        a chat, from `turns`; a string cannot contain headers."""
        ids = filled(self._closed(text), length, self.ids.eos)
        return self.ids.text(ids, self._behind_header(ids))

    def train_understand(self, text: Text, picture: Picture, length: int) -> Layout:
        """[understand] picture bos text eos eos.., `length` ids of text; the answer and all eos are targets."""
        ids = filled(self._closed(text), length, self.ids.eos, cut=self.ids.eos)
        return (
            self.ids.marks(self.ids.understand) + self.ids.image(picture) + self.ids.text(ids, self._behind_header(ids))
        )

    def train_reason(self, text: Text, picture: Picture, length: int) -> Layout:
        """[reason] bos text eos eos.., picture; the text after the last header and the picture are targets."""
        ids = filled(self._closed(text), length, self.ids.eos, cut=self.ids.eos)
        words = self.ids.text(ids, self._behind_header(ids))
        return self.ids.marks(self.ids.reason) + words + self.ids.image(picture, learn=True)

    def _closed(self, text: Text) -> tuple[int, ...]:
        """bos text eos; an existing bos is not repeated."""
        ids = ids_of(text, self.tokenize)
        begin = () if ids[:1] == (self.ids.bos,) else (self.ids.bos,)
        return (*begin, *ids, self.ids.eos)

    def _chat(self, user: Text) -> tuple[int, ...]:
        assert self.markup is not None
        return ids_of(
            self._written(self.markup.prompt(("user", user))) if isinstance(user, str) else user, self.tokenize
        )

    def _behind_header(self, ids: Sequence[int]) -> int:
        last = max((i for i, token in enumerate(ids) if token == self.ids.header_end), default=len(ids) - 1)
        return last + 1
