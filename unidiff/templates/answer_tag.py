"""Templates with the output between answer tags: Lumina-DiMOO and MMaDA-Parallel-A.

A prompt is <system>S</system><user>U</user>; its pictures come before </user>. Every row of a picture ends with a row
separator, including the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from unidiff.sequence import Interleaved, Kind, check_parts
from unidiff.templates.layout import Guided, Ids, Layout, Part, Picture, Text, Tokenize, filled, ids_of, without

# The system prompt of a kind of response, if it does not have the kind's own name.
_SYSTEMS = {"image": "text_to_image", "text": "understand"}


@dataclass(frozen=True, kw_only=True)
class AnswerTagIds(Ids):
    """system_begin, system_end, user_begin, user_end, answer_begin, answer_end: delimiters of the system's text, the
    user's text and the output. uncondition: replaces the user's words in guidance. filler: pads an answer in training.
    image_next: end id of a text before a picture."""

    system_begin: int
    system_end: int
    user_begin: int
    user_end: int
    answer_begin: int
    answer_end: int
    uncondition: int
    filler: int
    image_next: int


@dataclass(frozen=True)
class AnswerTagTemplates:
    """systems: the system prompts by task ("text_to_image", "edit", ...: the method's name)."""

    ids: AnswerTagIds
    tokenize: Tokenize
    systems: dict[str, str] = field(default_factory=dict)

    # ---------------------------------------------------------------- sampling

    def text_to_image(self, user: str, picture: Picture, system: str | None = None) -> Guided:
        """prompt <answer> picture </answer>. Guidance "text": <uncondition> replaces the user's words.

        A picture with known cells is edited in place (inpainting, outpainting).
        """
        system = self._system("text_to_image", system)
        output = self._output(self.ids.image(picture))
        return Guided(self._prompt(system, user) + output, {"text": self._prompt(system, self._nothing) + output})

    def edit(self, user: str, given: Sequence[Picture], picture: Picture, system: str | None = None) -> Guided:
        """prompt with pictures <answer> picture </answer>. Guidance leaves out the words ("text": <uncondition>, the
        pictures stay) and the pictures ("image": the words stay)."""
        return self._guided(self._system("edit", system), user, given, self._output(self.ids.image(picture)))

    def understand(self, user: str, given: Sequence[Picture], length: int, system: str | None = None) -> Guided:
        """prompt with pictures <answer> M x length </answer>. (The reference's script inserts delimiters and row
        separators twice; we use the layout of its evaluation.)"""
        system = self._system("understand", system)
        return Guided(self._prompt(system, user, given) + self._output(self.ids.hole(length)))

    def parallel(
        self, user: str, given: Sequence[Picture], picture: Picture, length: int, system: str | None = None
    ) -> Guided:
        """Text and picture at once: prompt with pictures <answer> picture M x length </answer>. Guidance as in `edit`.

        (The reference overwrites the start of the conditional sequence with the unconditional prompts. These are
        shorter, so picture and text are then misplaced. Here the output directly follows the replaced prompt.)
        """
        output = self._output(self.ids.image(picture) + self.ids.hole(length))
        return self._guided(self._system("parallel", system), user, given, output)

    def interleaved(
        self, prompt: Sequence[Text | Picture], response: Sequence[Part], system: str | None = None
    ) -> Guided:
        """Rounds of text and picture (our own task, with the family's delimiters): the prompt's parts in order as the
        user's turn, <answer> the response part by part </answer>.

        A string of the response gets its end id (see `Ids.response`). Guidance leaves out the prompt's words ("text":
        <uncondition>, before the pictures) and, if there are any, its pictures ("image"); the response so far stays.
        """
        system = self._system("interleaved", system)
        answer = self.ids.response(response, self.tokenize, self.ids.image_next, self.ids.answer_end)
        begin, end = self.ids.marks(self.ids.answer_begin), self.ids.marks(self.ids.answer_end)
        output = begin + answer + (Layout() if answer.ids[-1] == self.ids.answer_end else end)
        names = ("text", "image") if any(isinstance(part, Picture) for part in prompt) else ("text",)
        return Guided(
            self._mixed(system, prompt) + output,
            {name: self._mixed(system, self._left_out(prompt, name)) + output for name in names},
        )

    def prompt(
        self,
        parts: Sequence[Text | Picture],
        left_out: str | None = None,
        writes: Kind = "interleaved",
        system: str | None = None,
    ) -> Interleaved:
        """The prompt of a response, including <answer>. For an interleaved response the parts keep their order;
        otherwise the words come first, then the pictures, as in the layouts above. left_out: "text", "image" or
        None."""
        kept = self._left_out(parts, left_out)
        if writes != "interleaved":
            kept = sorted(kept, key=lambda part: isinstance(part, Picture))
        tagged = self._tagged(self._system(_SYSTEMS.get(writes, writes), system), kept)
        return self.ids.prompt([*tagged, (self.ids.answer_begin,)], self.tokenize)

    def behind(self, writes: Kind) -> tuple[int, ...]:
        """</answer>, after a response of one part."""
        return () if writes == "interleaved" else (self.ids.answer_end,)

    # ---------------------------------------------------------------- training

    def train_understand(
        self, user: str, given: Sequence[Picture], answer: Text, length: int, system: str | None = None
    ) -> Layout:
        """prompt with pictures <answer> answer </answer> filler..; the `length` ids after <answer> are targets."""
        system = self._system("understand", system)
        ids = (*ids_of(answer, self.tokenize), self.ids.answer_end)
        target = self.ids.text(filled(ids, length, self.ids.filler, cut=self.ids.answer_end), learn_from=0)
        return self._prompt(system, user, given) + self.ids.marks(self.ids.answer_begin) + target

    # ---------------------------------------------------------------- parts

    @property
    def _nothing(self) -> Text:
        return (self.ids.uncondition,)

    def _left_out(self, parts: Sequence[Text | Picture], left_out: str | None) -> list[Text | Picture]:
        """If the words are left out, <uncondition> replaces them, before the pictures."""
        return [*([self._nothing] if left_out == "text" else []), *without(parts, left_out)]

    def _prompt(self, system: str, user: Text, given: Sequence[Picture] = ()) -> Layout:
        check_parts(given, "given", Picture)
        return self._mixed(system, [user, *given])

    def _mixed(self, system: str, parts: Sequence[Text | Picture]) -> Layout:
        return self.ids.mixed(self._tagged(system, parts), self.tokenize)

    def _tagged(self, system: str, parts: Sequence[Text | Picture]) -> list[Text | Picture]:
        begin, user = (self.ids.system_begin,), (self.ids.system_end, self.ids.user_begin)
        return [begin, system, user, *parts, (self.ids.user_end,)]

    def _output(self, content: Layout) -> Layout:
        return self.ids.marks(self.ids.answer_begin) + content + self.ids.marks(self.ids.answer_end)

    def _guided(self, system: str, user: str, given: Sequence[Picture], output: Layout) -> Guided:
        if not given:
            raise ValueError("given: expected at least one picture; without one the task is text_to_image")
        return Guided(
            self._prompt(system, user, given) + output,
            {
                "text": self._prompt(system, self._nothing, given) + output,
                "image": self._prompt(system, user) + output,
            },
        )

    def _system(self, task: str, given: str | None) -> str:
        if given is None and task not in self.systems:
            raise ValueError(f"system: this family has no system prompt for {task}; give one")
        return self.systems[task] if given is None else given
