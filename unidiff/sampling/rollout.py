"""The interleaved rollout: text, image, text, image, … answer, as the model's own end tokens say.

Every prompt is read once, however many samples it gets. A new image starts as a copy of the one before it; an edit
selector says which tokens are denoised again, and only they are run. Noise is counter-based (`unidiff.noise`): a
row's rollout depends on its key and its prompt, not on the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from unidiff.attention import Context
from unidiff.guidance import Prompt
from unidiff.model import UnifiedModel
from unidiff.sampling import edit as edits
from unidiff.sampling.compute import Compute, ComputeMeter, ModelFlops
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.denoise import EDIT, Drawn, denoise_image, denoise_text, text_length
from unidiff.sequence import Interleaved, Modality, Segment, Tokens
from unidiff.spec import ModelSpec


class Stop(Enum):
    """Why a rollout ended."""

    ANSWERED = "a text ended with the end token of a response"
    NO_END = "a text filled its canvas without an end token"
    MAX_ROUNDS = "another image was announced after the last round"


@dataclass
class Rollout:
    """One sampled response: prompt and response segments, why it stopped, what it cost, its noise key and settings.
    without: the prompts that guidance compared it with, by what they leave out."""

    sequence: Interleaved
    stop: Stop
    compute: Compute
    key: int
    settings: SamplerConfig
    without: Mapping[str, Interleaved] = field(default_factory=dict)

    @property
    def segments(self) -> Interleaved:
        return self.sequence.response


@dataclass
class _Batch:
    """B rows that are still being sampled. context: of these rows, and behind them of the same rows with each of the
    prompts that guidance compares with: R rows in all. index: places of the B rows in the whole batch. image: [B, n]
    ids of the last image, -1 where there is none yet. previous: [R, n] the same, as each prompt shows it."""

    context: Context
    index: Tensor
    keys: Tensor
    image: Tensor
    previous: Tensor
    grid: tuple[int, int]

    def keep(self, rows: Tensor) -> None:
        if len(rows) < len(self.index):  # else all of them, in order: nothing to copy
            everywhere = torch.cat([rows + i * len(self.index) for i in range(self.prompts)])
            self.context.rows(everywhere)
            self.previous = self.previous[everywhere]
            self.index, self.keys, self.image = self.index[rows], self.keys[rows], self.image[rows]

    @property
    def prompts(self) -> int:
        """Of a row: the whole one, and those that leave something out."""
        return len(self.previous) // len(self.index)

    def everywhere(self, values: Tensor) -> Tensor:
        """[B, …] -> [R, …]."""
        return values.repeat(self.prompts, *(1 for _ in values.shape[1:]))

    @property
    def has_image(self) -> Tensor:
        return self.image[:, 0] >= 0

    @property
    def ordinal(self) -> Tensor:
        """[R] number of segments so far."""
        assert self.context.tokens is not None
        return self.context.tokens.segment.amax(1) + 1


class InterleavedSampler:
    """Samples responses to prompts. `locate` finds the region that a text names (edit="region"). trace: segments keep
    the probabilities of every step, to look at (`Segment.trace`); tokens do not depend on it.

    A block-causal model runs a segment behind the cache of what is finished, and of an edited image the edited tokens
    alone. A bidirectional one runs the whole sequence in every step, images with their delimiters, separators and
    kept tokens: what `UnifiedModel.score` sees too. Nothing stands behind the segment at work, in either.
    """

    def __init__(
        self, model: UnifiedModel, config: SamplerConfig, locate: edits.Locate | None = None, trace: bool = False
    ) -> None:
        self.bidirectional = model.spec.attention == "bidirectional"
        if config.approximate_cache != "none" and not self.bidirectional:
            raise ValueError(
                f"approximate_cache is {config.approximate_cache!r}, but the model is block_causal: its cache is exact"
            )
        if config.edit == "region" and locate is None and model.spec.image_next is not None:
            raise ValueError("edit='region' needs locate=…, which finds the place that a text names; or another edit")
        self.model, self.spec, self.config, self.locate, self.trace = model, model.spec, config, locate, trace

    @torch.no_grad()
    def sample(self, prompts: Sequence[Interleaved | Prompt], keys: Sequence[int]) -> list[Rollout]:
        """Rollouts of each prompt, len(keys) / len(prompts) of them, prompt by prompt.

        prompts: with guidance those of `UnifiedModel.encode_prompt`. keys: one noise key a rollout
        (`noise.key(seed, step, prompt, sample)`). Raises ValueError if the counts do not fit, the prompts' images have
        different grids, guidance lacks a prompt, or a rollout may outgrow the model's positions.
        """
        if not prompts or not keys or len(keys) % len(prompts):
            raise ValueError(f"{len(keys)} keys do not fit {len(prompts)} prompts")
        given = [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]
        for name in self.config.guides:
            if any(name not in p.without for p in given):
                raise ValueError(
                    f"guidance needs each prompt without its {name} too: encode it by "
                    f"model.encode_prompt(parts, {self.config.guides})"
                )
        training = self.model.training
        self.model.eval()
        try:
            return self._sample(given, keys)
        finally:
            self.model.train(training)

    def _sample(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Rollout]:
        device = self.model.device
        meter = ComputeMeter(ModelFlops.of(self.model.backbone), len(keys), device)
        batch = self._begin(prompts, torch.tensor(keys, dtype=torch.int64, device=device), meter)
        group = len(keys) // len(prompts)
        rows = [list(prompts[i // group].whole) for i in range(len(keys))]
        stops = [Stop.MAX_ROUNDS] * len(keys)
        for turn in range(self.config.max_rounds + 1):
            with meter.clock("text"):
                text, length = self._text(batch, turn, meter)
            goes_on = self._collect_text(batch, text, length, rows, stops)
            if turn == self.config.max_rounds or not len(goes_on):
                break
            batch.keep(goes_on)
            with meter.clock("write_text"):
                self._write_text(batch, text.ids[goes_on], length[goes_on], meter)
            with meter.clock("select"):
                edited = self._select(batch, turn, [rows[i][-1] for i in batch.index.tolist()], meter)
            with meter.clock("image"):
                image = self._denoise(batch, turn, edited, meter)
            self._collect_image(batch, image, edited, rows)
            with meter.clock("write_image"):
                self._write_image(batch, image.ids, meter)
        return [
            Rollout(Interleaved(row), stop, cost, key, self.config, prompts[i // group].without)
            for i, (row, stop, cost, key) in enumerate(zip(rows, stops, meter.rows(), keys))
        ]

    # ---------------------------------------------------------------- context

    def _begin(self, prompts: Sequence[Prompt], keys: Tensor, meter: ComputeMeter) -> _Batch:
        each = [[p.whole for p in prompts], *([p.without[n] for p in prompts] for n in self.config.guides)]
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
        context = self.model.begin(canvas.shape[1] + rounds, self.config.cache, self.config.approximate_cache != "none")
        index, group = torch.arange(len(keys), device=keys.device), len(keys) // len(prompts)
        everywhere = torch.cat([index // group + i * len(prompts) for i in range(len(each))])
        with meter.clock("prompt"):
            if context.cache is not None:  # without one, every read runs the prompt
                for lengths in canvas.clean.valid.sum(1).split(len(prompts)):
                    meter.add("prompt", index[::group], lengths, lengths, lengths * 0, 0, lengths > 0)
                meter.share("prompt", group)
            self.model.write(context, canvas.clean)
            if len(everywhere) > len(canvas.ids):
                context.rows(everywhere)
        previous = images.to(keys.device)[everywhere]
        return _Batch(context, index, keys, previous[: len(keys)], previous, grid)

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
        batch: _Batch,
        block: Tokens,
        phase: str,
        meter: ComputeMeter,
        head: int = 0,
        positions: Tensor | None = None,
        active: Tensor | None = None,
        part: slice | None = None,
    ) -> None:
        """One forward over a block with each of the prompts, as the meter counts it: with a cache only the block, or
        the part of it that is run. positions: [B] whose logits are computed."""
        rows = len(batch.index)
        active = torch.ones_like(batch.index, dtype=torch.bool) if active is None else active
        for start in range(0, block.shape[0], rows):
            tokens = block.valid[start : start + rows].sum(1)
            keys = tokens + batch.context.lengths[start : start + rows]
            run = keys if batch.context.cache is None else tokens
            if part is not None:
                run = torch.full_like(keys, part.stop - part.start)
            meter.add(phase, batch.index, run, keys, keys * 0 if positions is None else positions, head, active)

    def _read(
        self,
        batch: _Batch,
        block: Tokens,
        modality: Modality,
        phase: str,
        meter: ComputeMeter,
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
        rows = len(batch.index) * (batch.prompts if any(scales) else 1)
        block = block.rows(slice(rows))  # type: ignore[arg-type]
        positions = torch.full_like(batch.index, at.shape[1]) if counted is None else counted
        self._count(batch, block, phase, meter, high - low, positions, active, part)
        hidden = self.model.read(batch.context, block, part)
        at = at.repeat(rows // len(batch.index), 1)[:, :, None].expand(-1, -1, hidden.shape[2])
        whole, *others = hidden.gather(1, at).split(len(batch.index))
        return self.model.log_probs(whole, modality, temperature, list(zip(scales, others)), count_mask=True)

    def _write(self, batch: _Batch, block: Tokens, phase: str, meter: ComputeMeter) -> None:
        if batch.context.cache is not None:
            self._count(batch, block, phase, meter)
        self.model.write(batch.context, block)

    # ---------------------------------------------------------------- text

    def _text(self, batch: _Batch, turn: int, meter: ComputeMeter) -> tuple[Drawn, Tensor]:
        """One text segment [B, N], and its length [B] (with the end token)."""
        size = self.spec.text_length
        masks = torch.full((len(batch.index), size), self.spec.mask, device=batch.keys.device)
        block = self._text_block(batch, masks)
        text = Drawn.nothing(masks, self.spec.mask, self.trace)
        kind = self.config.approximate_cache

        def read(ids: Tensor, at: slice, first: bool, active: Tensor) -> Tensor:
            part = None
            if kind != "none" and not first:  # the first step of a block runs everything, and keeps it
                part = at if kind == "dual" else slice(at.start, size)
            place = torch.arange(at.start, at.stop, device=ids.device) - (part.start if part else 0)
            now = block.with_ids(batch.everywhere(ids))
            place = place.expand(len(ids), -1)
            return self._read(batch, now, Modality.TEXT, "text", meter, active, place, part)

        for _ in denoise_text(text, read, batch.keys, turn, self.config, self.spec):
            pass
        return text, text_length(text.ids, self.spec)

    def _text_block(self, batch: _Batch, ids: Tensor) -> Tokens:
        ids = batch.everywhere(ids)
        offset = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return Tokens(
            ids=ids,
            segment=batch.ordinal[:, None].expand_as(ids),
            modality=torch.full_like(ids, int(Modality.TEXT)),
            position=batch.context.lengths[:, None] + offset,
            offset=offset,
            previous=torch.full_like(ids, -1),
            valid=torch.ones_like(ids, dtype=torch.bool),
        )

    def _collect_text(
        self, batch: _Batch, text: Drawn, length: Tensor, rows: list[list[Segment]], stops: list[Stop]
    ) -> Tensor:
        """Adds the text to its rows; returns the places in the batch of rows that go on with an image."""
        text = text.map(Tensor.cpu)
        goes_on = []
        for place, (index, n) in enumerate(zip(batch.index.tolist(), length.tolist())):
            tokens, step, probability = text.ids[place, :n], text.step[place, :n].int(), text.probability[place, :n]
            kept = {"step": step, "probability": probability, "trace": text.traced(place, n)}
            rows[index].append(Segment(Modality.TEXT, tokens, **kept))  # type: ignore[arg-type]
            last = int(tokens[-1])
            if last == self.spec.image_next:
                goes_on.append(place)
            else:
                stops[index] = Stop.ANSWERED if last in self.spec.text_end else Stop.NO_END
        return torch.tensor(goes_on, dtype=torch.int64, device=batch.keys.device)

    def _write_text(self, batch: _Batch, ids: Tensor, length: Tensor, meter: ComputeMeter) -> None:
        block = self._text_block(batch, ids)
        inside = block.offset < batch.everywhere(length)[:, None]
        block = dataclasses.replace(block, valid=inside, segment=block.segment.masked_fill(~inside, -1))
        self._write(batch, block, "write_text", meter)

    # ---------------------------------------------------------------- images

    def _select(self, batch: _Batch, turn: int, texts: list[Segment], meter: ComputeMeter) -> Tensor:
        """[B, n] bool: the tokens to denoise again; all of them where there is no image to edit."""
        everything = torch.ones_like(batch.image, dtype=torch.bool)
        if self.config.edit == "full" or not bool(batch.has_image.any()):
            return everything
        if self.config.edit == "region":
            assert self.locate is not None
            written = [self.model.decode_text(s.tokens) for s in texts]
            chosen = edits.region(written, batch.grid, self.locate, batch.keys.device)
        elif self.config.edit == "random":
            chosen = edits.random(batch.keys, batch.image.shape[1], self.config.edit_share, (turn, 0, EDIT))
        else:
            copied = self._probability_of_copy(batch, everything, meter)
            chosen = edits.lowest(copied, self.config.edit_share, self.config.edit_threshold)
        return chosen | ~batch.has_image[:, None]

    def _probability_of_copy(self, batch: _Batch, everything: Tensor, meter: ComputeMeter) -> Tensor:
        """[B, n] of each token of the image before, with all tokens of the new one masked."""
        place = torch.arange(batch.image.shape[1], device=batch.keys.device).expand_as(batch.image)
        block, at = self._image_block(batch, place, everything)
        log_probs = self._read(batch, block, Modality.IMAGE, "select", meter, batch.has_image, at)
        return log_probs.gather(2, self.spec.codes(batch.image).clamp(min=0)[:, :, None])[:, :, 0].exp()

    def _image_block(self, batch: _Batch, place: Tensor, valid: Tensor) -> tuple[Tokens, Tensor]:
        """What is run to denoise the tokens at the given places [B, E] of the image's grid, with these masked, and
        where they stand in it [B, E]: these tokens alone, or under bidirectional attention the image as a whole."""
        columns = _image_columns(self.spec, batch.grid)[0].to(place.device)[place]
        masks = torch.full_like(place, self.spec.mask)
        if self.bidirectional:
            return self._whole_image(batch, _put(batch.image, place, masks, valid)), columns
        everywhere, inside = batch.everywhere(place), batch.everywhere(valid)
        block = Tokens(
            ids=batch.everywhere(masks),
            segment=batch.ordinal[:, None].expand_as(everywhere).masked_fill(~inside, -1),
            modality=torch.full_like(everywhere, int(Modality.IMAGE)),
            position=batch.context.lengths[:, None] + batch.everywhere(columns),
            offset=everywhere,
            previous=batch.previous.gather(1, everywhere),
            valid=inside,
        )
        return block, torch.arange(place.shape[1], device=place.device).expand_as(place)

    def _denoise(self, batch: _Batch, turn: int, edited: Tensor, meter: ComputeMeter) -> Drawn:
        """The new image [B, n]: the edited tokens are denoised, the others are those of the image before."""
        count = edited.sum(1)
        width, n = int(count.max()), edited.shape[1]
        whole = dataclasses.replace(Drawn.nothing(batch.image, self.spec.mask, self.trace), ids=batch.image)
        if width == 0:
            return whole
        place = edited.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        valid = edited.gather(1, place)
        image = Drawn.nothing(place, self.spec.mask, self.trace)
        block, at = self._image_block(batch, place, valid)

        def read(ids: Tensor, active: Tensor) -> Tensor:
            now = _put(block.ids, batch.everywhere(at), batch.everywhere(ids), batch.everywhere(valid))
            return self._read(batch, block.with_ids(now), Modality.IMAGE, "image", meter, active, at, counted=count)

        for _ in denoise_image(image, read, batch.keys, turn, self.config, self.spec, place, valid, n):
            pass
        nothing = torch.full_like(whole.probability, torch.nan)
        return Drawn(
            _put(whole.ids, place, image.ids, valid),
            _put(whole.step, place, image.step, valid),
            _put(whole.probability, place, image.probability, valid),
            None if image.trace is None else [_put(nothing, place, t, valid) for t in image.trace],
        )

    def _collect_image(self, batch: _Batch, image: Drawn, edited: Tensor, rows: list[list[Segment]]) -> None:
        image, edited = image.map(Tensor.cpu), edited.cpu()
        new = torch.ones_like(batch.has_image) if self.config.edit == "full" else ~batch.has_image
        for place, (index, whole) in enumerate(zip(batch.index.tolist(), new.tolist())):
            rows[index].append(
                Segment(
                    Modality.IMAGE,
                    image.ids[place],  # type: ignore[arg-type]
                    grid=batch.grid,
                    edited=None if whole else edited[place],  # type: ignore[arg-type]
                    step=image.step[place].int(),  # type: ignore[arg-type]
                    probability=image.probability[place],  # type: ignore[arg-type]
                    trace=image.traced(place, image.ids.shape[1]),  # type: ignore[arg-type]
                )
            )

    def _whole_image(self, batch: _Batch, ids: Tensor) -> Tokens:
        """The image [B, n] as it stands in a sequence, with delimiters and row separators."""
        columns, width = _image_columns(self.spec, batch.grid)
        frame = torch.tensor(_frame(self.spec, batch.grid), device=ids.device).expand(len(batch.previous), -1)
        columns = columns.to(ids.device).expand(len(batch.previous), -1)
        nothing = torch.full_like(frame, -1)
        order = torch.arange(ids.shape[1], device=ids.device).expand_as(columns)
        return Tokens(
            ids=frame.scatter(1, columns, batch.everywhere(ids)),
            segment=batch.ordinal[:, None].expand_as(frame),
            modality=torch.full_like(frame, int(Modality.IMAGE)),
            position=batch.context.lengths[:, None] + torch.arange(width, device=ids.device),
            offset=nothing.scatter(1, columns, order),
            previous=nothing.scatter(1, columns, batch.previous),
            valid=torch.ones_like(frame, dtype=torch.bool),
        )

    def _write_image(self, batch: _Batch, ids: Tensor, meter: ComputeMeter) -> None:
        self._write(batch, self._whole_image(batch, ids), "write_image", meter)
        batch.image, batch.previous = ids, batch.everywhere(ids)


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
