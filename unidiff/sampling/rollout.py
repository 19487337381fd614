"""The interleaved rollout: text, image, text, image, … answer, as the model's own end tokens say.

Every prompt is read once, however many samples it gets. A new image starts as a copy of the one before it; an edit
selector says which tokens are denoised again, and only they are run. Noise is counter-based (`unidiff.noise`): a
row's rollout depends on its key and its prompt, not on the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from unidiff import noise
from unidiff.attention import Context
from unidiff.model import UnifiedModel
from unidiff.sampling import edit as edits
from unidiff.sampling import image as image_rules
from unidiff.sampling import text as text_rules
from unidiff.sampling.compute import Compute, ComputeMeter, ModelFlops
from unidiff.sampling.draw import draw
from unidiff.sampling.schedules import SCHEDULES
from unidiff.sequence import Interleaved, Modality, Segment, Tokens

_TEXT, _ORDER, _IMAGE, _REVEAL, _EDIT = range(5)  # what noise is for: the last number of a stream


class Stop(Enum):
    """Why a rollout ended."""

    ANSWERED = "a text ended with the end token of a response"
    NO_END = "a text filled its canvas without an end token"
    MAX_ROUNDS = "another image was announced after the last round"


@dataclass(frozen=True)
class SamplerConfig:
    """How rollouts are sampled; every rollout carries it, since scoring must use the same temperatures.

    text_threshold: commit every text token drawn with at least this probability, and at least the best one;
    None = text_steps of them for the whole canvas, in the text_order: confidence, margin, entropy or random.
    text_block: tokens of a semi-autoregressive block, which takes its share of the steps; None = the whole canvas.
    image_sampler: maskgit or emerge. image_steps: steps for a
    whole image, edits take their share. image_noise: temperature of MaskGIT's choice of tokens. edit: region,
    confidence, random, full. edit_share: share of tokens that confidence and random take. edit_threshold: confidence
    takes tokens below this probability instead. greedy: most probable values, no noise. max_rounds: images at most.
    cache: keep keys and values of finished segments (exact); False runs the whole sequence at each step.
    """

    text_steps: int = 8
    text_threshold: float | None = 0.9
    text_order: Literal["confidence", "margin", "entropy", "random"] = "confidence"
    text_block: int | None = None
    text_temperature: float = 1.0
    image_sampler: Literal["maskgit", "emerge"] = "maskgit"
    image_steps: int = 8
    image_schedule: Literal["cosine", "linear"] = "cosine"
    image_temperature: float = 1.0
    image_noise: float = 1.0
    edit: Literal["region", "confidence", "random", "full"] = "region"
    edit_share: float = 0.125
    edit_threshold: float | None = None
    greedy: bool = False
    max_rounds: int = 4
    cache: bool = True

    def __post_init__(self) -> None:
        choices = {"text_order": ("confidence", "margin", "entropy", "random"), "edit": edits.EDITS}
        choices |= {"image_sampler": ("maskgit", "emerge"), "image_schedule": tuple(SCHEDULES)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        for name in ("text_steps", "image_steps", "max_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("text_temperature", "image_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 (use greedy for no noise)")
        if self.text_block is not None and self.text_block < 1:
            raise ValueError(f"text_block is {self.text_block}; it must be at least 1, or None for the whole canvas")
        if self.image_noise < 0:
            raise ValueError(f"image_noise is {self.image_noise}; it must not be negative")
        if not 0 < self.edit_share <= 1:
            raise ValueError(f"edit_share is {self.edit_share}; it must lie in (0, 1]")
        for name in ("text_threshold", "edit_threshold"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; a probability lies in [0, 1]")


@dataclass
class Rollout:
    """One sampled response: prompt and response segments, why it stopped, what it cost, its noise key and settings."""

    sequence: Interleaved
    stop: Stop
    compute: Compute
    key: int
    settings: SamplerConfig

    @property
    def segments(self) -> Interleaved:
        return self.sequence.response


@dataclass
class _Batch:
    """Rows that are still being sampled. index: their places in the whole batch. image: [B, n] ids of the last image,
    -1 where there is none yet."""

    context: Context
    index: Tensor
    keys: Tensor
    image: Tensor
    grid: tuple[int, int]

    def keep(self, rows: Tensor) -> None:
        if len(rows) < len(self.index):  # else all of them, in order: nothing to copy
            self.context.rows(rows)
            self.index, self.keys, self.image = self.index[rows], self.keys[rows], self.image[rows]

    @property
    def has_image(self) -> Tensor:
        return self.image[:, 0] >= 0

    @property
    def ordinal(self) -> Tensor:
        """[B] number of segments so far."""
        assert self.context.tokens is not None
        return self.context.tokens.segment.amax(1) + 1


@dataclass
class _Drawn:
    """Tokens in the making, all [B, N]: ids, the step that committed each (-1 = none), its probability then. trace: for
    each step taken the probability of what was drawn, NaN where nothing was masked; None = it is not kept."""

    ids: Tensor
    step: Tensor
    probability: Tensor
    trace: list[Tensor] | None = None

    @classmethod
    def nothing(cls, like: Tensor, mask: int, trace: bool = False) -> _Drawn:
        """All masked."""
        ones = torch.ones(like.shape, device=like.device)
        return cls(torch.full_like(like, mask), torch.full_like(like, -1), ones, [] if trace else None)

    def note(self, masked: Tensor, log_prob: Tensor) -> None:
        """Keeps what was drawn in a step, if a trace is wanted. masked: [B, N] bool, before the step."""
        if self.trace is not None:
            self.trace.append(torch.where(masked, log_prob.exp(), torch.nan))

    def traced(self, row: int, n: int) -> Tensor | None:
        """[T, n]: the trace of a row's first n tokens, without the steps in which it only waited for other rows."""
        if self.trace is None:
            return None
        steps = torch.stack(self.trace)[:, row] if self.trace else self.probability.new_zeros(0, self.ids.shape[1])
        return steps[~steps.isnan().all(1)][:, :n]

    def commit(self, where: Tensor, ids: Tensor, step: Tensor | int, log_prob: Tensor) -> None:
        self.ids = torch.where(where, ids, self.ids)
        self.step = torch.where(where, step, self.step)
        self.probability = torch.where(where, log_prob.exp(), self.probability)

    def map(self, f: Callable[[Tensor], Tensor]) -> _Drawn:
        trace = None if self.trace is None else [f(t) for t in self.trace]
        return _Drawn(f(self.ids), f(self.step), f(self.probability), trace)


class InterleavedSampler:
    """Samples responses to prompts. `locate` finds the region that a text names (edit="region"). trace: segments keep
    the probabilities of every step, to look at (`Segment.trace`); tokens do not depend on it."""

    def __init__(
        self, model: UnifiedModel, config: SamplerConfig, locate: edits.Locate | None = None, trace: bool = False
    ) -> None:
        if model.spec.attention != "block_causal":
            raise ValueError(f"InterleavedSampler needs a block_causal model, {model.spec.family} is not one")
        if model.spec.row_separator is not None:
            raise ValueError("InterleavedSampler writes images without row separators; the spec has row_separator")
        if config.edit == "region" and locate is None:
            raise ValueError("edit='region' needs locate=…, which finds the place that a text names; or another edit")
        self.model, self.spec, self.config, self.locate, self.trace = model, model.spec, config, locate, trace

    @torch.no_grad()
    def sample(self, prompts: Sequence[Interleaved], keys: Sequence[int]) -> list[Rollout]:
        """Rollouts of each prompt, len(keys) / len(prompts) of them, prompt by prompt.

        keys: one noise key a rollout (`noise.key(seed, step, prompt, sample)`). Raises ValueError if the counts do
        not fit, the prompts' images have different grids, or a rollout may outgrow the model's positions.
        """
        if not prompts or not keys or len(keys) % len(prompts):
            raise ValueError(f"{len(keys)} keys do not fit {len(prompts)} prompts")
        training = self.model.training
        self.model.eval()
        try:
            return self._sample(prompts, keys)
        finally:
            self.model.train(training)

    def _sample(self, prompts: Sequence[Interleaved], keys: Sequence[int]) -> list[Rollout]:
        device = self.model.device
        meter = ComputeMeter(ModelFlops.of(self.model.backbone), len(keys), device)
        batch = self._begin(prompts, torch.tensor(keys, dtype=torch.int64, device=device), meter)
        group = len(keys) // len(prompts)
        rows = [list(prompts[i // group]) for i in range(len(keys))]
        stops = [Stop.MAX_ROUNDS] * len(keys)
        for turn in range(self.config.max_rounds + 1):
            with meter.clock("text"):
                text, length = self._text(batch, turn, meter)
            goes_on = self._collect_text(batch, text, length, rows, stops)
            if turn == self.config.max_rounds or not len(goes_on):
                break
            batch.keep(goes_on)
            with meter.clock("write"):
                self._write_text(batch, text.ids[goes_on], length[goes_on], meter)
            with meter.clock("select"):
                edited = self._select(batch, turn, [rows[i][-1] for i in batch.index.tolist()], meter)
            with meter.clock("image"):
                image = self._denoise(batch, turn, edited, meter)
            self._collect_image(batch, image, edited, rows)
            with meter.clock("write"):
                self._write_image(batch, image.ids, meter)
        return [
            Rollout(Interleaved(row), stop, cost, key, self.config)
            for row, stop, cost, key in zip(rows, stops, meter.rows(), keys)
        ]

    # ---------------------------------------------------------------- context

    def _begin(self, prompts: Sequence[Interleaved], keys: Tensor, meter: ComputeMeter) -> _Batch:
        canvas = self.model.render(prompts)
        image, grid = self._last_images(prompts)
        n = grid[0] * grid[1]
        around = len(self.spec.image_begin) + len(self.spec.image_end)
        rounds = self.config.max_rounds * (self.spec.text_length + n + around) + self.spec.text_length
        if canvas.shape[1] + rounds > self.spec.max_positions:
            raise ValueError(
                f"prompts of {canvas.shape[1]} tokens and {self.config.max_rounds} rounds need "
                f"{canvas.shape[1] + rounds} positions, the model has {self.spec.max_positions}"
            )
        context = self.model.begin(canvas.shape[1] + rounds, self.config.cache)
        index, group = torch.arange(len(keys), device=keys.device), len(keys) // len(prompts)
        with meter.clock("prompt"):
            if self.config.cache:  # without one, every read runs the prompt
                length = canvas.clean.valid.sum(1)
                meter.add("prompt", index[::group], length, length, length * 0, 0, length > 0)
                meter.share("prompt", group)
            self.model.write(context, canvas.clean)
            if group > 1:
                context.rows(index // group)
        return _Batch(context, index, keys, image.to(keys.device)[index // group], grid)

    def _last_images(self, prompts: Sequence[Interleaved]) -> tuple[Tensor, tuple[int, int]]:
        """Ids [P, n] of the image to edit in each prompt, -1 where it has none, and the grid of them all."""
        images = [p.last_image() for p in prompts]
        grids = {self.spec.image_grid if im is None or im.grid is None else im.grid for im in images}
        if len(grids) > 1:
            raise ValueError(
                f"the prompts' images have different grids {sorted(grids)}; sample them in separate batches"
            )
        grid = grids.pop()
        none = torch.full((grid[0] * grid[1],), -1)
        return torch.stack([none if im is None else im.tokens for im in images]), grid

    def _count(
        self, batch: _Batch, block: Tokens, phase: str, meter: ComputeMeter, head: int = 0, active: Tensor | None = None
    ) -> None:
        """One forward over a block, as the meter counts it: with a cache only the block runs."""
        tokens = block.valid.sum(1)
        keys = tokens + batch.context.lengths
        run = keys if batch.context.cache is None else tokens
        active = torch.ones_like(tokens, dtype=torch.bool) if active is None else active
        meter.add(phase, batch.index, run, keys, tokens if head else tokens * 0, head, active)

    def _read(
        self, batch: _Batch, block: Tokens, modality: Modality, phase: str, meter: ComputeMeter, active: Tensor
    ) -> Tensor:
        """Log-probabilities [B, n, rows] at every position of a block. active: [B] bool, rows that are not done."""
        low, high = self.spec.range_of(modality)
        self._count(batch, block, phase, meter, high - low, active)
        temperature = self.config.text_temperature if modality is Modality.TEXT else self.config.image_temperature
        return self.model.log_probs(self.model.read(batch.context, block), modality, temperature)

    def _write(self, batch: _Batch, block: Tokens, meter: ComputeMeter) -> None:
        if batch.context.cache is not None:
            self._count(batch, block, "write", meter)
        self.model.write(batch.context, block)

    # ---------------------------------------------------------------- text

    def _text(self, batch: _Batch, turn: int, meter: ComputeMeter) -> tuple[_Drawn, Tensor]:
        """One text segment [B, N], and its length [B] (with the end token)."""
        size, low, mask = self.spec.text_length, self.spec.text_range[0], self.spec.mask
        end = torch.tensor(self.spec.text_end, device=batch.keys.device)
        block = self._text_block(batch, torch.full((len(batch.index), size), mask, device=batch.keys.device))
        text = _Drawn.nothing(block.ids, mask, self.trace)
        taken = torch.zeros_like(batch.index)  # steps of each row
        for inside, steps, first in self._text_blocks(block.offset):
            for step in range(steps):
                masked = (text.ids == mask) & inside
                active = ~text_rules.finished(text.ids, masked, end)
                if not bool(active.any()):  # the one host sync of a step: it saves every forward after the last token
                    break
                log_probs = self._read(batch, block.with_ids(text.ids), Modality.TEXT, "text", meter, active)
                # A stream is numbered by the plan, not by the steps taken: those depend on the rows beside.
                uniform = noise.uniform(batch.keys, (turn, first + step, _TEXT), size)
                drawn, log_prob = draw(log_probs, uniform, self.config.greedy)
                free = text_rules.eligible(torch.where(text.ids == mask, drawn + low, text.ids), masked, end)
                if self.config.text_threshold is not None:
                    commit = text_rules.commit_threshold(log_prob.exp(), free, self.config.text_threshold)
                else:
                    order = noise.uniform(batch.keys, (turn, first + step, _ORDER), size)
                    score = text_rules.confidence(self.config.text_order, log_probs, drawn, order)
                    commit = text_rules.commit_top(score, free, text_rules.commit_count(masked, step, steps))
                text.note(masked & active[:, None], log_prob)
                text.commit(commit, drawn + low, taken[:, None], log_prob)
                taken = taken + active
        is_end = torch.isin(text.ids, end)
        return text, torch.where(is_end.any(1), is_end.int().argmax(1) + 1, size)

    def _text_blocks(self, offset: Tensor) -> Iterator[tuple[Tensor, int, int]]:
        """Each block of the canvas: which offsets lie in it, its steps, and those planned before it."""
        size, first = offset.shape[1], 0
        width = min(self.config.text_block or size, size)
        for start in range(0, size, width):
            n = min(width, size - start)
            steps = n if self.config.text_threshold is not None else math.ceil(self.config.text_steps * n / size)
            yield (offset >= start) & (offset < start + n), steps, first
            first += steps

    def _text_block(self, batch: _Batch, ids: Tensor) -> Tokens:
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
        self, batch: _Batch, text: _Drawn, length: Tensor, rows: list[list[Segment]], stops: list[Stop]
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
        inside = block.offset < length[:, None]
        block = dataclasses.replace(block, valid=inside, segment=block.segment.masked_fill(~inside, -1))
        self._write(batch, block, meter)

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
            chosen = edits.random(batch.keys, batch.image.shape[1], self.config.edit_share, (turn, 0, _EDIT))
        else:
            copied = self._probability_of_copy(batch, everything, meter)
            chosen = edits.lowest(copied, self.config.edit_share, self.config.edit_threshold)
        return chosen | ~batch.has_image[:, None]

    def _probability_of_copy(self, batch: _Batch, everything: Tensor, meter: ComputeMeter) -> Tensor:
        """[B, n] of each token of the image before, with all tokens of the new one masked."""
        place = torch.arange(batch.image.shape[1], device=batch.keys.device).expand_as(batch.image)
        block = self._image_block(batch, place, everything)
        log_probs = self._read(batch, block, Modality.IMAGE, "select", meter, batch.has_image)
        return log_probs.gather(2, self.spec.codes(batch.image).clamp(min=0)[:, :, None])[:, :, 0].exp()

    def _image_block(self, batch: _Batch, place: Tensor, valid: Tensor) -> Tokens:
        """The image's tokens at the given places [B, E] of its grid, all masked."""
        ids = torch.full_like(place, self.spec.mask)
        return Tokens(
            ids=ids,
            segment=batch.ordinal[:, None].expand_as(ids).masked_fill(~valid, -1),
            modality=torch.full_like(ids, int(Modality.IMAGE)),
            position=batch.context.lengths[:, None] + len(self.spec.image_begin) + place,
            offset=place,
            previous=batch.image.gather(1, place),
            valid=valid,
        )

    def _denoise(self, batch: _Batch, turn: int, edited: Tensor, meter: ComputeMeter) -> _Drawn:
        """The new image [B, n]. Only the edited tokens are run; the others are seen in the image before."""
        count = edited.sum(1)
        width, steps_B = int(count.max()), image_rules.edit_steps(count, edited.shape[1], self.config.image_steps)
        whole = dataclasses.replace(_Drawn.nothing(batch.image, self.spec.mask, self.trace), ids=batch.image)
        if width == 0:
            return whole
        place = edited.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        valid = edited.gather(1, place)
        block = self._image_block(batch, place, valid)
        image = _Drawn.nothing(block.ids, self.spec.mask, self.trace)
        for step in range(int(steps_B.max())):
            active = (count > 0) & (step < steps_B)
            log_probs = self._read(batch, block.with_ids(image.ids), Modality.IMAGE, "image", meter, active)
            uniform = noise.uniform(batch.keys, (turn, step, _IMAGE), place)
            drawn, log_prob = draw(log_probs, uniform, self.config.greedy)
            masked = valid & (image.step < 0)
            commit = self._reveal(batch, (turn, step, _REVEAL), place, masked, log_prob, steps_B, count)
            image.note(masked, log_prob)
            image.commit(commit, drawn + self.spec.image_offset, step, log_prob)

        def put(old: Tensor, new: Tensor) -> Tensor:
            # A row's places are distinct; a pad of the block puts back what stands at its place.
            return old.scatter(1, place, torch.where(valid, new, old.gather(1, place)))

        nothing = torch.full_like(whole.probability, torch.nan)
        trace = None if image.trace is None else [put(nothing, t) for t in image.trace]
        drawn = (put(whole.ids, image.ids), put(whole.step, image.step), put(whole.probability, image.probability))
        return _Drawn(*drawn, trace)

    def _reveal(
        self,
        batch: _Batch,
        stream: tuple[int, int, int],
        place: Tensor,
        masked: Tensor,
        log_prob: Tensor,
        steps: Tensor,
        total: Tensor,
    ) -> Tensor:
        """[B, E] bool: the tokens that are committed in a step (the second number of the noise stream)."""
        schedule, step = SCHEDULES[self.config.image_schedule], stream[1]
        if self.config.image_sampler == "emerge":
            return image_rules.emerge_commit(masked, step, steps, schedule, noise.uniform(batch.keys, stream, place))
        temperature = 0.0 if self.config.greedy else self.config.image_noise
        gumbel = noise.gumbel(batch.keys, stream, place)
        return image_rules.maskgit_commit(masked, log_prob, step, steps, total, schedule, temperature, gumbel)

    def _collect_image(self, batch: _Batch, image: _Drawn, edited: Tensor, rows: list[list[Segment]]) -> None:
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

    def _write_image(self, batch: _Batch, ids: Tensor, meter: ComputeMeter) -> None:
        begin, end = self.spec.image_begin, self.spec.image_end
        nothing = [-1] * len(begin), [-1] * len(end)
        offset = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        whole = _between(begin, ids, end)
        block = Tokens(
            ids=whole,
            segment=batch.ordinal[:, None].expand_as(whole),
            modality=torch.full_like(whole, int(Modality.IMAGE)),
            position=batch.context.lengths[:, None] + torch.arange(whole.shape[1], device=ids.device),
            offset=_between(nothing[0], offset, nothing[1]),
            previous=_between(nothing[0], batch.image, nothing[1]),
            valid=torch.ones_like(whole, dtype=torch.bool),
        )
        self._write(batch, block, meter)
        batch.image = ids


def _between(before: Sequence[int], inside: Tensor, after: Sequence[int]) -> Tensor:
    """[B, n] with the same numbers put before and behind every row."""
    sides = [torch.tensor(side, dtype=torch.int64, device=inside.device) for side in (before, after)]
    return torch.cat([sides[0].expand(len(inside), -1), inside, sides[1].expand(len(inside), -1)], 1)
