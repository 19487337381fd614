"""One call of the sampler: the rows that are being written, round by round.

Every prompt is read once, however many samples it gets. A new image starts as a copy of the one before it. An edit
selector chooses the tokens to denoise again, and only those are run. Noise is counter-based (`unidiff.noise`): a row's
rollout depends on its key and its prompt, not on the batch.

A block-causal model runs a segment behind the cache of finished segments, and of an edited image only the edited
tokens. A bidirectional model runs the whole sequence in every step: images with their delimiters, separators and kept
tokens, as `UnifiedModel.score` sees them. Nothing comes after the segment that is being written, in either.

Dimensions: B rows that are being written, P prompts of a row (the whole one and those that guidance compares with),
R = P · B rows of the context: the B rows with their whole prompts, then the same rows with each other prompt.
N tokens of a text's canvas, n of an image, E of an image that are denoised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff.canvas import Tokens
from unidiff.model import UnifiedModel
from unidiff.sampling import edit as edits
from unidiff.sampling.compute import ComputeMeter, ModelFlops
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.denoise import EDIT, Drawn, denoise_image, denoise_text, text_length
from unidiff.sampling.draw import check_drawn
from unidiff.sampling.rollout import Rollout, Stop
from unidiff.sequence import Interleaved, Modality, Prompt, Segment
from unidiff.spec import ModelSpec


class Writing:
    """Rollouts of prompts, len(keys) / len(prompts) of each. See `InterleavedSampler` for the arguments.

    index: int64 [B], places of the rows in the whole batch; rows that have ended leave. keys: int64 [B]. image: int64
    [B, n], the last image's ids, -1 where there is none yet. previous: int64 [R, n], the same as each prompt shows it.
    context: of the R rows. segments, stops: of all rows of the batch.
    """

    def __init__(
        self,
        model: UnifiedModel,
        config: SamplerConfig,
        prompts: Sequence[Prompt],
        keys: Sequence[int],
        locate: edits.Locate | None = None,
        trace: bool = False,
    ) -> None:
        self.model, self.spec, self.config = model, model.spec, config
        self.locate, self.trace = locate, trace
        self.meter = ComputeMeter(ModelFlops.of(model.backbone), len(keys), model.device)
        self.keys = torch.tensor(keys, dtype=torch.int64, device=model.device)
        self.index = torch.arange(len(keys), device=model.device)
        self.row_prompts = [prompts[i * len(prompts) // len(keys)] for i in range(len(keys))]
        self.segments = [list(prompt.whole) for prompt in self.row_prompts]
        self.stops = [Stop.MAX_ROUNDS] * len(keys)
        self._read_prompts([[p.whole for p in prompts], *([p.without[n] for p in prompts] for n in config.guides)])

    def run(self) -> list[Rollout]:
        """Writes the rows to their ends."""
        all_keys = self.keys.tolist()
        for turn in range(self.config.max_rounds + 1):
            with self.meter.clock("text"):
                text = self._denoise_text(turn)
            goes_on, length = self._collect_text(text)
            if turn == self.config.max_rounds or not len(goes_on):
                break
            self._keep(goes_on)
            with self.meter.clock("write_text"):
                self._write_text(text.ids[goes_on], length[goes_on])
            with self.meter.clock("select"):
                edited = self._select(turn)
            with self.meter.clock("image"):
                image = self._denoise_image(turn, edited)
            self._collect_image(image, edited)
            with self.meter.clock("write_image"):
                self._write(self._whole_image(image.ids), "write_image")
                self.image, self.previous = image.ids, self._everywhere(image.ids)
        rows = zip(self.segments, self.stops, self.meter.rows(), all_keys, self.row_prompts)
        return [Rollout(Interleaved(s), stop, c, key, self.config, p.without) for s, stop, c, key, p in rows]

    # ---------------------------------------------------------------- rows

    def _keep(self, rows: Tensor) -> None:
        """Drops all other rows."""
        if len(rows) < len(self.index):  # else all of them, in order: nothing to copy
            everywhere = torch.cat([rows + i * len(self.index) for i in range(self._prompts)])
            self.context.rows(everywhere)
            self.previous = self.previous[everywhere]
            self.index, self.keys, self.image = self.index[rows], self.keys[rows], self.image[rows]

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
        """Begins the context. each: the prompts, whole and without what guidance leaves out."""
        canvas = self.model.render([p for kind in each for p in kind])
        images, grid = self._last_images(each)
        turns = 0 if self.spec.image_next is None else self.config.max_rounds  # a model of text alone writes one text
        rounds = turns * (self.spec.text_length + _image_columns(self.spec, grid)[1]) + self.spec.text_length
        if canvas.shape[1] + rounds > self.spec.max_positions:
            raise ValueError(
                f"prompts of {canvas.shape[1]} tokens and {turns} rounds (a text of up to "
                f"{self.spec.text_length} tokens and an image of {grid[0]} × {grid[1]} in each) need "
                f"{canvas.shape[1] + rounds} positions, the model has {self.spec.max_positions}; lower max_rounds or "
                "the spec's text_length"
            )
        indexed = self.config.approximate_cache != "none"
        context = self.context = self.model.begin(canvas.shape[1] + rounds, self.config.cache, indexed)
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

    def _last_images(self, prompts: Sequence[Sequence[Interleaved]]) -> tuple[Tensor, tuple[int, int]]:
        """Ids [P, n] of the image to edit in each prompt, -1 where it has none, and the grid of them all."""
        images = [p.last_image() for kind in prompts for p in kind]
        whole = images[: len(prompts[0])]
        grids = {self.spec.image_grid if im is None or im.grid is None else im.grid for im in whole}
        if len(grids) > 1:
            raise ValueError(
                f"the prompts' images have different grids {sorted(grids)}; sample them in separate batches"
            )
        grid = grids.pop()
        none = torch.full((grid[0] * grid[1],), -1)
        shown = [none if im is None else im.tokens.masked_fill(im.tokens == self.spec.mask, -1) for im in images]
        return torch.stack(shown), grid

    def _count(
        self,
        block: Tokens,
        phase: str,
        head: int = 0,
        positions: Tensor | None = None,
        active: Tensor | None = None,
        part: slice | None = None,
    ) -> None:
        """One forward over a block with each of the prompts, as the meter counts it: with a cache only the block, or
        the part of it that is run. positions: [B] whose logits are computed."""
        rows = len(self.index)
        active = torch.ones_like(self.index, dtype=torch.bool) if active is None else active
        for start in range(0, block.shape[0], rows):
            tokens = block.valid[start : start + rows].sum(1)
            keys = tokens + self.context.lengths[start : start + rows]
            run = keys if self.context.cache is None else tokens
            if part is not None:
                run = torch.full_like(keys, part.stop - part.start)
            self.meter.add(phase, self.index, run, keys, keys * 0 if positions is None else positions, head, active)

    def _read(
        self,
        block: Tokens,
        modality: Modality,
        phase: str,
        active: Tensor,
        at: Tensor,
        part: slice | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities [B, m, rows] at the places [B, m] of a block [R, n]. active: [B] bool, rows that are not
        done. part: columns of the block that are run, `at` being places among them. counted: [B] places that count."""
        low, high = self.spec.range_of(modality)
        scales = [pair[modality] for pair in self.config.scales.values()]
        temperature = self.config.text_temperature if modality is Modality.TEXT else self.config.image_temperature
        rows = len(self.index) * (self._prompts if any(scales) else 1)
        block = block.rows(slice(rows))  # type: ignore[arg-type]
        positions = torch.full_like(self.index, at.shape[1]) if counted is None else counted
        self._count(block, phase, high - low, positions, active, part)
        hidden = self.model.read(self.context, block, part)
        at = at.repeat(rows // len(self.index), 1)[:, :, None].expand(-1, -1, hidden.shape[2])
        whole, *others = hidden.gather(1, at).split(len(self.index))
        return self.model.log_probs(whole, modality, temperature, list(zip(scales, others)), count_mask=True)

    def _write(self, block: Tokens, phase: str) -> None:
        if self.context.cache is not None:
            self._count(block, phase)
        self.model.write(self.context, block)

    # ---------------------------------------------------------------- text

    def _denoise_text(self, turn: int) -> Drawn:
        """A text's canvas [B, N], filled up to each row's end token."""
        size = self.spec.text_length
        masks = torch.full((len(self.index), size), self.spec.mask, device=self.keys.device)
        block = self._text_block(masks)
        text = Drawn.nothing(masks, self.spec.mask, self.trace)
        kind = self.config.approximate_cache

        def read(ids: Tensor, at: slice, first: bool, active: Tensor) -> Tensor:
            part = None
            if kind != "none" and not first:  # the first step of a block runs everything, and keeps it
                part = at if kind == "dual" else slice(at.start, size)
            place = torch.arange(at.start, at.stop, device=ids.device) - (part.start if part else 0)
            now = block.with_ids(self._everywhere(ids))
            place = place.expand(len(ids), -1)
            return self._read(now, Modality.TEXT, "text", active, place, part)

        for _ in denoise_text(text, read, self.keys, turn, self.config, self.spec):
            pass
        return text

    def _text_block(self, ids: Tensor) -> Tokens:
        ids = self._everywhere(ids)
        offset = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return Tokens(
            ids=ids,
            segment=self._ordinal.expand_as(ids),
            modality=torch.full_like(ids, int(Modality.TEXT)),
            position=self.context.lengths[:, None] + offset,
            offset=offset,
            previous=torch.full_like(ids, -1),
            valid=torch.ones_like(ids, dtype=torch.bool),
        )

    def _collect_text(self, text: Drawn) -> tuple[Tensor, Tensor]:
        """Adds the texts to their rows. Returns which rows go on with an image, and the texts' lengths [B]."""
        length, text = text_length(text.ids, self.spec), text.map(Tensor.cpu)
        check_drawn(text.probability)
        goes_on = []
        for place, (index, n) in enumerate(zip(self.index.tolist(), length.tolist())):
            tokens, step, probability = text.ids[place, :n], text.step[place, :n].int(), text.probability[place, :n]
            kept = {"step": step, "probability": probability, "trace": text.traced(place, n)}
            self.segments[index].append(Segment(Modality.TEXT, tokens, **kept))  # type: ignore[arg-type]
            last = int(tokens[-1])
            if last == self.spec.image_next:
                goes_on.append(place)
            else:
                self.stops[index] = Stop.ANSWERED if last in self.spec.text_end else Stop.NO_END
        return torch.tensor(goes_on, dtype=torch.int64, device=self.keys.device), length

    def _write_text(self, ids: Tensor, length: Tensor) -> None:
        block = self._text_block(ids)
        inside = block.offset < self._everywhere(length)[:, None]
        block = dataclasses.replace(block, valid=inside, segment=block.segment.masked_fill(~inside, -1))
        self._write(block, "write_text")

    # ---------------------------------------------------------------- images

    def _select(self, turn: int) -> Tensor:
        """[B, n] bool: the tokens to denoise again; all of them where there is no image to edit."""
        everything = torch.ones_like(self.image, dtype=torch.bool)
        if self.config.edit == "full" or not bool(self._has_image.any()):
            return everything
        if self.config.edit == "region":
            assert self.locate is not None
            written = [self.model.decode_text(self.segments[i][-1].tokens) for i in self.index.tolist()]
            chosen = edits.region(written, self.grid, self.locate, self.keys.device)
        elif self.config.edit == "random":
            chosen = edits.random(self.keys, self.image.shape[1], self.config.edit_share, (turn, 0, EDIT))
        else:
            copied = self._probability_of_copy(everything)
            chosen = edits.lowest(copied, self.config.edit_share, self.config.edit_threshold)
        return chosen | ~self._has_image[:, None]

    def _probability_of_copy(self, everything: Tensor) -> Tensor:
        """[B, n] of each token of the image before, with all tokens of the new one masked."""
        place = torch.arange(self.image.shape[1], device=self.keys.device).expand_as(self.image)
        block, at = self._image_block(place, everything)
        log_probs = self._read(block, Modality.IMAGE, "select", self._has_image, at)
        return log_probs.gather(2, self.spec.codes(self.image).clamp(min=0)[:, :, None])[:, :, 0].exp()

    def _image_block(self, place: Tensor, valid: Tensor) -> tuple[Tokens, Tensor]:
        """What is run to denoise the tokens at the given places [B, E] of the image's grid, with these masked, and
        where they stand in it [B, E]: these tokens alone, or under bidirectional attention the image as a whole."""
        columns = _image_columns(self.spec, self.grid)[0].to(place.device)[place]
        masks = torch.full_like(place, self.spec.mask)
        if self.spec.attention == "bidirectional":
            return self._whole_image(_put(self.image, place, masks, valid)), columns
        everywhere, inside = self._everywhere(place), self._everywhere(valid)
        block = Tokens(
            ids=self._everywhere(masks),
            segment=self._ordinal.expand_as(everywhere).masked_fill(~inside, -1),
            modality=torch.full_like(everywhere, int(Modality.IMAGE)),
            position=self.context.lengths[:, None] + self._everywhere(columns),
            offset=everywhere,
            previous=self.previous.gather(1, everywhere),
            valid=inside,
        )
        return block, torch.arange(place.shape[1], device=place.device).expand_as(place)

    def _denoise_image(self, turn: int, edited: Tensor) -> Drawn:
        """The new image [B, n]: the edited tokens are denoised, the others are those of the image before."""
        count = edited.sum(1)
        width, n = int(count.max()), edited.shape[1]
        whole = dataclasses.replace(Drawn.nothing(self.image, self.spec.mask, self.trace), ids=self.image)
        if width == 0:
            return whole
        place = edited.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        valid = edited.gather(1, place)
        image = Drawn.nothing(place, self.spec.mask, self.trace)
        block, at = self._image_block(place, valid)

        def read(ids: Tensor, active: Tensor) -> Tensor:
            now = _put(block.ids, self._everywhere(at), self._everywhere(ids), self._everywhere(valid))
            return self._read(block.with_ids(now), Modality.IMAGE, "image", active, at, counted=count)

        for _ in denoise_image(image, read, self.keys, turn, self.config, self.spec, place, valid, n):
            pass
        nothing = torch.full_like(whole.probability, torch.nan)
        return Drawn(
            _put(whole.ids, place, image.ids, valid),
            _put(whole.step, place, image.step, valid),
            _put(whole.probability, place, image.probability, valid),
            None if image.trace is None else [_put(nothing, place, t, valid) for t in image.trace],
        )

    def _collect_image(self, image: Drawn, edited: Tensor) -> None:
        """Adds the images to their rows."""
        image, edited = image.map(Tensor.cpu), edited.cpu()
        check_drawn(image.probability)
        new = torch.ones_like(self._has_image) if self.config.edit == "full" else ~self._has_image
        for place, (index, whole) in enumerate(zip(self.index.tolist(), new.tolist())):
            self.segments[index].append(
                Segment(
                    Modality.IMAGE,
                    image.ids[place],  # type: ignore[arg-type]
                    grid=self.grid,
                    edited=None if whole else edited[place],  # type: ignore[arg-type]
                    step=image.step[place].int(),  # type: ignore[arg-type]
                    probability=image.probability[place],  # type: ignore[arg-type]
                    trace=image.traced(place, image.ids.shape[1]),  # type: ignore[arg-type]
                )
            )

    def _whole_image(self, ids: Tensor) -> Tokens:
        """The image [B, n] as it stands in a sequence, with delimiters and row separators."""
        columns, width = _image_columns(self.spec, self.grid)
        frame = torch.tensor(_frame(self.spec, self.grid), device=ids.device).expand(len(self.previous), -1)
        columns = columns.to(ids.device).expand(len(self.previous), -1)
        nothing = torch.full_like(frame, -1)
        order = torch.arange(ids.shape[1], device=ids.device).expand_as(columns)
        return Tokens(
            ids=frame.scatter(1, columns, self._everywhere(ids)),
            segment=self._ordinal.expand_as(frame),
            modality=torch.full_like(frame, int(Modality.IMAGE)),
            position=self.context.lengths[:, None] + torch.arange(width, device=ids.device),
            offset=nothing.scatter(1, columns, order),
            previous=nothing.scatter(1, columns, self.previous),
            valid=torch.ones_like(frame, dtype=torch.bool),
        )


def _frame(spec: ModelSpec, grid: tuple[int, int]) -> list[int]:
    """An announced image as it stands in a sequence, with the mask in the place of its content."""
    separator = [] if spec.row_separator is None else [spec.row_separator]
    return [*spec.before_image, *([spec.mask] * grid[1] + separator) * grid[0], *spec.image_end]


def _image_columns(spec: ModelSpec, grid: tuple[int, int]) -> tuple[Tensor, int]:
    """Where the tokens of an announced image stand among its delimiters and separators [n]; and how long it is."""
    place = torch.arange(grid[0] * grid[1])
    separators = 0 if spec.row_separator is None else place // max(grid[1], 1)
    return len(spec.before_image) + place + separators, len(_frame(spec, grid))


def _put(old: Tensor, place: Tensor, new: Tensor, valid: Tensor) -> Tensor:
    """Tokens [B, E] put at their places in a row [B, n]. A row's places are distinct; where one is not valid, what
    stands there is put back."""
    return old.scatter(1, place, torch.where(valid, new, old.gather(1, place)))
