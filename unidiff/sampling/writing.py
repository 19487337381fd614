"""One call of the sampler: it samples a batch of responses, part by part.

A plan lists the parts of a response: texts, new pictures, edits of the previous picture. In interleaved rounds the text
itself announces whether a picture follows. Every prompt is read once, for all of its samples. An edit starts as a copy
of the previous image; an edit selector chooses the tokens to denoise again.
Noise is counter-based (`unidiff.noise`): a row's rollout depends on its key and its prompt, not on the batch.

A block-causal model runs only the current segment, after the cache of finished segments; of an edited image it runs
only the edited tokens. A bidirectional model runs the whole sequence in every step, or a part of it
(`unidiff.kept_keys`), with the image's delimiters, separators and copied tokens, as in `UnifiedModel.score`. In both,
nothing follows the current segment.

Dimensions: B active rows, P prompts per row (the whole one and those for guidance), R = P · B rows of the context: the
B rows with their whole prompts, then the same rows with each other prompt. N tokens of a text's canvas, n of an image,
E of an image that are denoised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff.attention import Context
from unidiff.canvas import Tokens
from unidiff.kept_keys import KeptKeys
from unidiff.model import UnifiedModel
from unidiff.sampling import controls
from unidiff.sampling import edit as edits
from unidiff.sampling.ahead import text_loop
from unidiff.sampling.compute import ComputeMeter, ModelFlops
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.denoise import EDIT, Drawn, Step, denoise_image, text_length
from unidiff.sampling.draw import check_drawn
from unidiff.sampling.plan import Part, frame_of, last_images, parts_of
from unidiff.sampling.rollout import Rollout, Stop
from unidiff.schedules.schedule import Choices
from unidiff.schedules.steering import Steering
from unidiff.sequence import Interleaved, Locate, Modality, Prompt, Segment


class Writing:
    """Samples len(keys) / len(prompts) rollouts per prompt. All responses must have the same plan, room and grid. See
    `InterleavedSampler` for the arguments.

    index: int64 [B], indices of the active rows in the batch; finished rows are dropped. keys: int64 [B]. image: int64
    [B, n], the last image's ids, -1 = none yet. previous: int64 [R, n], the last image in each prompt's version.
    announced: bool [B], rows whose last text already contains the first delimiter of the next picture. context: of the
    R rows. segments, stops: of all rows of the batch.
    """

    def __init__(
        self,
        model: UnifiedModel,
        config: SamplerConfig,
        prompts: Sequence[Prompt],
        keys: Sequence[int],
        locate: Locate | None = None,
        trace: bool = False,
    ) -> None:
        self.model, self.spec, self.config = model, model.spec, config
        self.locate, self.trace = locate, trace
        self.meter = ComputeMeter(ModelFlops.of(model.backbone), len(keys), model.device)
        self.keys = torch.tensor(keys, dtype=torch.int64, device=model.device)
        self.index = torch.arange(len(keys), device=model.device)
        self.row_prompts = [prompts[i * len(prompts) // len(keys)] for i in range(len(keys))]
        self.segments = [list(prompt.whole) for prompt in self.row_prompts]
        self.stops = [Stop.DRAWN] * len(keys)
        self.announced = torch.zeros_like(self.index, dtype=torch.bool)
        # A text-only model writes one text.
        rounds = 0 if self.spec.image_next is None else config.max_rounds
        self.parts = controls.parts(parts_of(prompts[0].plan, rounds), config.picture_source, prompts)
        self.choices: list[Choices | None] = []  # of the current segment
        self.room, self.behind = self.spec.room(prompts[0].room), prompts[0].behind
        self._read_prompts([[p.whole for p in prompts], *([p.without[n] for p in prompts] for n in config.guides)])

    def run(self) -> list[Rollout]:
        """Samples all parts."""
        all_keys, done = self.keys.tolist(), {"text": 0, "picture": 0}
        for part, last in zip(self.parts, [False] * (len(self.parts) - 1) + [True]):
            if part.kind == "text":
                self._write_text(done["text"], part, last)
            else:
                self._draw_image(done["picture"], part, last)
            done["text" if part.kind == "text" else "picture"] += 1
            if not len(self.index):
                break
        rows = zip(self.segments, self.stops, self.meter.rows(), all_keys, self.row_prompts)
        return [Rollout(Interleaved(s), stop, c, key, self.config, p.without, p.writes) for s, stop, c, key, p in rows]

    def _write_text(self, number: int, part: Part, last: bool) -> None:
        with self.meter.clock("text"):
            text = self._denoise_text(number)
        announced, length = self._collect_text(text)
        goes_on = announced if part.open else torch.ones_like(announced)
        rows = (goes_on & (not last)).nonzero()[:, 0]
        self._keep(rows)
        self.announced = announced[rows]
        if len(rows):
            with self.meter.clock("write_text"):
                self._append_text(text.ids[rows], length[rows])

    def _draw_image(self, number: int, part: Part, last: bool) -> None:
        if self.config.picture_source == "own":
            with self.meter.clock("select"):
                edited, new = self._select(number, part)
            with self.meter.clock("image"):
                image = self._denoise_image(number, edited)
        else:
            image, edited, new = self._given()
        self._collect_image(image, edited, new)
        if not last:
            with self.meter.clock("write_image"):
                self._append(self._whole_image(image.ids), "write_image")
                self.image, self.previous = image.ids, self._everywhere(image.ids)
                self.announced = torch.zeros_like(self.announced)

    # ---------------------------------------------------------------- rows

    def _keep(self, rows: Tensor) -> None:
        """Drops all other rows."""
        if len(rows) < len(self.index):  # otherwise rows are all rows, in order
            everywhere = torch.cat([rows + i * len(self.index) for i in range(self._prompts)])
            self.context.rows(everywhere)
            self.previous = self.previous[everywhere]
            self.index, self.keys, self.image = self.index[rows], self.keys[rows], self.image[rows]
            self.announced = self.announced[rows]

    @property
    def _prompts(self) -> int:
        """P."""
        return len(self.previous) // len(self.index)

    def _everywhere(self, values: Tensor) -> Tensor:
        """[B, …] -> [R, …]."""
        return values.repeat(self._prompts, *(1 for _ in values.shape[1:]))

    @property
    def _has_image(self) -> Tensor:
        return self.image[:, 0] >= 0

    @property
    def _ordinal(self) -> Tensor:
        """int64 [R, 1]: number of segments so far."""
        assert self.context.tokens is not None
        return self.context.tokens.segment.amax(1, keepdim=True) + 1

    # ---------------------------------------------------------------- context

    def _read_prompts(self, each: Sequence[Sequence[Interleaved]]) -> None:
        """Begins the context. each: the whole prompts, then those for guidance."""
        canvas = self.model.render([p for kind in each for p in kind])
        images, grid = last_images([p for kind in each for p in kind], self.parts, self.spec)
        widths = {"text": self.room, "picture": len(frame_of(self.spec, grid, announced=False))}
        rounds = len(self.behind) + sum(widths["text" if part.kind == "text" else "picture"] for part in self.parts)
        if canvas.shape[1] + rounds > self.spec.max_positions:
            pictures = sum(part.kind != "text" for part in self.parts)
            raise ValueError(
                f"prompts of {canvas.shape[1]} tokens, {len(self.parts) - pictures} texts of up to {self.room} tokens "
                f"and {pictures} images of {grid[0]} × {grid[1]} need {canvas.shape[1] + rounds} positions, the model "
                f"has {self.spec.max_positions}; lower max_rounds or the spec's text_length"
            )
        context = self.context = self.model.begin(canvas.shape[1] + rounds, self.config.cache)
        count, group = len(each[0]), len(self.index) // len(each[0])
        everywhere = torch.cat([self.index // group + i * count for i in range(len(each))])
        with self.meter.clock("prompt"):
            if context.cache is not None:  # without one, every read runs the prompt
                for lengths in canvas.clean.valid.sum(1).split(count):
                    self.meter.add("prompt", self.index[::group], lengths, lengths, lengths * 0, 0, lengths > 0)
                self.meter.share("prompt", group)
            self.model.write(context, canvas.clean)
            if len(everywhere) > len(canvas.ids):
                context.rows(everywhere)
        self.grid, self.previous = grid, images.to(self.keys.device)[everywhere]
        self.image = self.previous[: len(self.keys)]

    def _count(
        self,
        context: Context,
        block: Tokens,
        phase: str,
        rows: Tensor,
        head: int = 0,
        positions: Tensor | None = None,
        ran: Tensor | None = None,
    ) -> None:
        """Counts a forward pass of rows [b] over a block, for each of their prompts; with a cache only the block runs.
        positions: [b], number of logits. ran: [R of these rows], tokens that run, None = as the cache says."""
        index = self.index[rows]
        for start in range(0, block.shape[0], len(rows)):
            tokens = block.valid[start : start + len(rows)].sum(1)
            keys = tokens + context.lengths[start : start + len(rows)]
            run = keys if context.cache is None else tokens
            run = run if ran is None else ran[start : start + len(rows)]
            positions = keys * 0 if positions is None else positions
            self.meter.add(phase, index, run, keys, positions, head, torch.ones_like(index, dtype=torch.bool))

    def _read(
        self,
        block: Tokens,
        ids: Tensor,
        modality: Modality,
        phase: str,
        step: Step,
        at: Tensor,
        kept: KeptKeys | None = None,
        work: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities [b, m, head rows] of the step's rows, at the columns `at` [B, m] of a block [R, n]. ids:
        [b, n]. kept: the loop's keys and values. work: bool [B, m], False = padding of `at`; None = all are used."""
        low, high = self.spec.range_of(modality)
        scales = [pair[modality] for pair in self.config.scales.values()]
        temperature = self.config.text_temperature if modality is Modality.TEXT else self.config.image_temperature
        batch, prompts = len(self.index), self._prompts if any(scales) else 1
        rows = torch.cat([step.rows + i * batch for i in range(prompts)])
        context = self.context.only(rows, prompts * batch, step.number == 0, step.again)
        block = block.rows(rows).with_ids(ids.repeat(prompts, 1))
        positions = torch.full_like(step.rows, at.shape[1]) if work is None else work[step.rows].sum(1)
        at, ran = at[step.rows].repeat(prompts, 1), None
        if kept is not None:
            work = None if work is None else work[step.rows].repeat(prompts, 1)
            at = kept.choose(step.number, rows, block.ids, self.spec.mask, at, work)
            ran = kept.count
        self._count(context, block, phase, step.rows, high - low, positions, ran)
        hidden = self.model.read(context, block, kept)
        at = at[:, :, None].expand(-1, -1, hidden.shape[2])
        whole, *others = hidden.gather(1, at).split(len(step.rows))
        return self.model.log_probs(whole, modality, temperature, list(zip(scales, others)), count_mask=True)

    def _append(self, block: Tokens, phase: str) -> None:
        if self.context.cache is not None:
            self._count(self.context, block, phase, torch.arange(len(self.index), device=self.keys.device))
        self.model.write(self.context, block)

    # ---------------------------------------------------------------- text

    def _denoise_text(self, turn: int) -> Drawn:
        """Denoises a text's canvas [B, N], up to each row's end token."""
        size = self.room
        masks = torch.full((len(self.index), size), self.spec.mask, device=self.keys.device)
        behind = torch.tensor(self.behind, dtype=torch.int64, device=masks.device).expand(len(masks), -1)
        block = self._text_block(torch.cat([masks, behind], 1))
        text = Drawn.nothing(masks, self.spec.mask, self.trace)
        kept = KeptKeys.of(self.config)

        def read(ids: Tensor, step: Step) -> Tensor:
            place = torch.arange(step.at.start, step.at.stop, device=ids.device).expand(len(masks), -1)
            ids = torch.cat([ids, behind[step.rows]], 1)
            return self._read(block, ids, Modality.TEXT, "text", step, place, kept)

        steering = Steering.of(self.model.schedule, Modality.TEXT, self.keys, turn, self.config.greedy)
        list(text_loop(text, read, self.keys, turn, self.config, self.spec, steering))
        self.choices = [None] * len(masks) if steering is None else steering.choices()
        return text

    def _text_block(self, ids: Tensor) -> Tokens:
        """A text's canvas [B, N] and the ids after it, as tokens."""
        ids = self._everywhere(ids)
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return Tokens(
            ids=ids,
            segment=self._ordinal.expand_as(ids),
            modality=torch.full_like(ids, int(Modality.TEXT)),
            position=self.context.lengths[:, None] + place,
            offset=torch.where(place < self.room, place, -1),
            previous=torch.full_like(ids, -1),
            valid=torch.ones_like(ids, dtype=torch.bool),
        )

    def _collect_text(self, text: Drawn) -> tuple[Tensor, Tensor]:
        """Appends the texts to their rows. Returns whether each announces an image, bool [B], and the lengths [B]."""
        length, text = text_length(text.ids, self.spec), text.map(Tensor.cpu)
        check_drawn(text.probability)
        announced = []
        for place, (index, n) in enumerate(zip(self.index.tolist(), length.tolist())):
            tokens, step, probability = text.ids[place, :n], text.step[place, :n].int(), text.probability[place, :n]
            kept = {"step": step, "probability": probability, "trace": text.traced(place, n)}
            kept |= {"warmth": None if text.warmth is None else text.warmth[place, :n], "choices": self.choices[place]}
            segment = Segment(Modality.TEXT, tokens, **kept)  # type: ignore[arg-type]
            self.segments[index] += self.row_prompts[index].laid_out([segment])
            final = int(tokens[-1])
            announced.append(final == self.spec.image_next)
            ended = Stop.ANSWERED if final in self.spec.text_end else Stop.NO_END
            self.stops[index] = Stop.MAX_ROUNDS if announced[-1] else ended
        return torch.tensor(announced, device=self.keys.device), length

    def _append_text(self, ids: Tensor, length: Tensor) -> None:
        block = self._text_block(ids)
        inside = block.offset < self._everywhere(length)[:, None]
        block = dataclasses.replace(block, valid=inside, segment=block.segment.masked_fill(~inside, -1))
        self._append(block, "write_text")

    # ---------------------------------------------------------------- images

    def _given(self) -> tuple[Drawn, Tensor, Tensor]:
        """Pictures drawn by the task; none of their tokens counts as sampled."""
        rows = [(self.row_prompts[i], self.segments[i]) for i in self.index.tolist()]
        ids = controls.pictures(self.model, rows, self.config.picture_source, self.grid).to(self.keys.device)
        edited = torch.zeros_like(ids, dtype=torch.bool)
        self.choices = [None] * len(ids)
        return dataclasses.replace(Drawn.nothing(ids, self.spec.mask, self.trace), ids=ids), edited, edited[:, 0]

    def _select(self, number: int, part: Part) -> tuple[Tensor, Tensor]:
        """[B, n] bool: the tokens to denoise (all tokens of a new image); and [B] bool: rows that get a new image."""
        has = self._has_image
        new = torch.ones_like(has) if part.kind == "image" or self.config.edit == "full" else ~has
        if bool(new.all()):
            return torch.ones_like(self.image, dtype=torch.bool), new
        if self.config.edit == "region":
            chosen = self._named(has)
        elif self.config.edit == "random":
            chosen = edits.random(self.keys, self.image.shape[1], self.config.edit_share, (number, 0, EDIT))
        else:
            chosen = self._unlikely(has)
        return chosen | new[:, None], new

    def _named(self, active: Tensor) -> Tensor:
        """[B, n] bool: the tokens that each row's text names; in rows without a `locate` function, unlikely tokens."""
        rows = self.index.tolist()
        found = [self.row_prompts[i].locate or self.locate for i in rows]
        texts = [self._said(i) for i in rows]
        chosen = edits.region(texts, self.grid, [f or (lambda *_: None) for f in found], self.keys.device)
        unread = torch.tensor([f is None for f in found], device=chosen.device) & active
        return torch.where(unread[:, None], self._unlikely(unread), chosen) if bool(unread.any()) else chosen

    def _said(self, index: int) -> str:
        """The text that a row's picture follows: the last text, or the prompt's words."""
        last = self.segments[index][-1]
        if last.prompt or last.modality is not Modality.TEXT:
            return self.row_prompts[index].words
        return self.model.decode_text(last.tokens)

    def _unlikely(self, active: Tensor) -> Tensor:
        """[B, n] bool: the tokens of the previous image that the model finds least likely when all of the new image is
        masked. active: [B] bool, the rows to compute."""
        everything = torch.ones_like(self.image, dtype=torch.bool)
        place = torch.arange(self.image.shape[1], device=self.keys.device).expand_as(self.image)
        block, at = self._image_block(place, everything)
        rows = active.nonzero()[:, 0]
        log_probs = self._read(block, block.ids[rows], Modality.IMAGE, "select", Step(rows, 0, slice(None)), at)
        own = self.spec.codes(self.image[rows]).clamp(min=0)[:, :, None]
        copied = torch.ones_like(everything, dtype=torch.float32)
        copied[rows] = log_probs.gather(2, own)[:, :, 0].exp()
        return edits.lowest(copied, self.config.edit_share, self.config.edit_threshold)

    def _image_block(self, place: Tensor, valid: Tensor) -> tuple[Tokens, Tensor]:
        """The block to run when the tokens at `place` [B, E] of the image are denoised, with these masked, and their
        columns in it [B, E]. The block is these tokens, or for a bidirectional model the whole image."""
        columns = self._frame[1][place]
        masks = torch.full_like(place, self.spec.mask)
        if self.spec.attention == "bidirectional":
            return self._whole_image(_put(self.image, place, masks, valid)), columns
        everywhere, inside = self._everywhere(place), self._everywhere(valid)
        block = Tokens(
            ids=self._everywhere(masks),
            segment=self._ordinal.expand_as(everywhere).masked_fill(~inside, -1),
            modality=torch.full_like(everywhere, int(Modality.IMAGE)),
            position=self.context.lengths[:, None] + self._everywhere(columns) - self._skipped,
            offset=everywhere,
            previous=self.previous.gather(1, everywhere),
            valid=inside,
        )
        return block, torch.arange(place.shape[1], device=place.device).expand_as(place)

    def _denoise_image(self, turn: int, edited: Tensor) -> Drawn:
        """The new image [B, n]: edited tokens are denoised, the others are copied from the previous image."""
        width, n = int(edited.sum(1).max()), edited.shape[1]
        whole = dataclasses.replace(Drawn.nothing(self.image, self.spec.mask, self.trace), ids=self.image)
        self.choices = [None] * len(edited)
        if width == 0:
            return whole
        place = edited.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        valid = edited.gather(1, place)
        image = Drawn.nothing(place, self.spec.mask, self.trace)
        block, at = self._image_block(place, valid)
        kept = KeptKeys.of(self.config)

        def read(ids: Tensor, step: Step) -> Tensor:
            ids = _put(block.ids[step.rows], at[step.rows], ids, valid[step.rows])
            return self._read(block, ids, Modality.IMAGE, "image", step, at, kept, valid)

        steering = Steering.of(self.model.schedule, Modality.IMAGE, self.keys, turn, self.config.greedy)
        list(denoise_image(image, read, self.keys, turn, self.config, self.spec, place, valid, n, steering))
        self.choices = [None] * len(place) if steering is None else steering.choices()
        nothing = torch.full_like(whole.probability, torch.nan)
        return Drawn(
            _put(whole.ids, place, image.ids, valid),
            _put(whole.step, place, image.step, valid),
            _put(whole.probability, place, image.probability, valid),
            None if image.warmth is None else _put(torch.ones_like(whole.probability), place, image.warmth, valid),
            None if image.trace is None else [_put(nothing, place, t, valid) for t in image.trace],
        )

    def _collect_image(self, image: Drawn, edited: Tensor, new: Tensor) -> None:
        """Appends the images to their rows."""
        image, edited = image.map(Tensor.cpu), edited.cpu()
        check_drawn(image.probability)
        for place, (index, whole) in enumerate(zip(self.index.tolist(), new.tolist())):
            segment = Segment(
                Modality.IMAGE,
                image.ids[place],  # type: ignore[arg-type]
                grid=self.grid,
                edited=None if whole else edited[place],  # type: ignore[arg-type]
                step=image.step[place].int(),  # type: ignore[arg-type]
                probability=image.probability[place],  # type: ignore[arg-type]
                trace=image.traced(place, image.ids.shape[1]),  # type: ignore[arg-type]
                warmth=None if image.warmth is None else image.warmth[place],  # type: ignore[arg-type]
                choices=self.choices[place],
            )
            self.segments[index] += self.row_prompts[index].laid_out([segment])
            self.stops[index] = Stop.DRAWN

    @property
    def _frame(self) -> tuple[Tensor, Tensor]:
        """A masked image with its delimiters, ids [w], and the columns of its content [n]. Without the first delimiter
        if all rows have announced it."""
        frame = frame_of(self.spec, self.grid, bool(self.announced.all()), self.behind)
        ids = torch.tensor(frame, device=self.keys.device)
        return ids, (ids == self.spec.mask).nonzero()[:, 0]

    @property
    def _skipped(self) -> Tensor:
        """int64 [R, 1]: 1 where a row omits the frame's first delimiter, because its text already contains it."""
        some = self.spec.before_image != self.spec.image_begin and not bool(self.announced.all())
        return self._everywhere((self.announced & some).long())[:, None]

    def _whole_image(self, ids: Tensor) -> Tokens:
        """The image [B, n] as tokens, with delimiters and row separators."""
        frame, columns = (x.expand(len(self.previous), -1) for x in self._frame)
        nothing = torch.full_like(frame, -1)
        order = torch.arange(ids.shape[1], device=ids.device).expand_as(columns)
        place, skipped = torch.arange(frame.shape[1], device=ids.device), self._skipped
        valid = place >= skipped
        return Tokens(
            ids=frame.scatter(1, columns, self._everywhere(ids)),
            segment=self._ordinal.expand_as(frame).masked_fill(~valid, -1),
            modality=torch.full_like(frame, int(Modality.IMAGE)),
            position=self.context.lengths[:, None] + place - skipped,
            offset=nothing.scatter(1, columns, order),
            previous=nothing.scatter(1, columns, self.previous),
            valid=valid,
        )


def _put(old: Tensor, place: Tensor, new: Tensor, valid: Tensor) -> Tensor:
    """Scatters `new` [B, E] into `old` [B, n] where `valid`. A row's places must be distinct."""
    return old.scatter(1, place, torch.where(valid, new, old.gather(1, place)))
