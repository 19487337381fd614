"""The interleaved rollout: text, image, text, image, … answer, as the model's own end tokens say.

Every prompt is read once, however many samples it gets. A new image starts as a copy of the one before it; an edit
selector says which tokens are denoised again, and only they are run. Noise is counter-based (`unidiff.noise`): a
row's rollout depends on its key and its prompt, not on the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

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
    None = a fixed number of text_steps. text_order: confidence, margin, entropy or random. text_block: tokens of a
    semi-autoregressive block; None = the whole canvas. image_sampler: maskgit or emerge. image_steps: steps for a
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
        if not 0 < self.edit_share <= 1:
            raise ValueError(f"edit_share is {self.edit_share}; it must lie in (0, 1]")


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
    """Rows that are still being sampled. index: their places in the whole batch."""

    context: Context
    index: Tensor
    keys: Tensor
    image: Tensor | None  # [B, n] ids of the last image
    grid: tuple[int, int]

    def keep(self, rows: Tensor) -> None:
        self.context.rows(rows)
        self.index, self.keys = self.index[rows], self.keys[rows]
        self.image = None if self.image is None else self.image[rows]

    @property
    def ordinal(self) -> Tensor:
        """[B] number of segments so far."""
        assert self.context.tokens is not None
        return self.context.tokens.segment.amax(1) + 1


class InterleavedSampler:
    """Samples responses to prompts. `locate` finds the region that a text names (edit="region")."""

    def __init__(self, model: UnifiedModel, config: SamplerConfig, locate: edits.Locate | None = None) -> None:
        if model.spec.attention != "block_causal":
            raise ValueError(f"InterleavedSampler needs a block_causal model, {model.spec.family} is not one")
        if config.edit == "region" and locate is None:
            raise ValueError("edit='region' needs locate=…, which finds the place that a text names; or another edit")
        self.model, self.spec, self.config, self.locate = model, model.spec, config, locate

    @torch.no_grad()
    def sample(self, prompts: Sequence[Interleaved], keys: Sequence[int]) -> list[Rollout]:
        """Rollouts of each prompt, len(keys) / len(prompts) of them, prompt by prompt.

        keys: one noise key a rollout (`noise.key(seed, step, prompt, sample)`). Raises ValueError if the counts do
        not fit or a prompt's images have different grids.
        """
        if not prompts or len(keys) % len(prompts):
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
            text = [t[goes_on] for t in text]
            with meter.clock("write"):
                self._write_text(batch, text[0], length[goes_on], meter)
            image = self._image(batch, turn, [rows[i][-1] for i in batch.index.tolist()], meter)
            self._collect_image(batch, image, rows)
            with meter.clock("write"):
                self._write_image(batch, image[0], meter)
        return [
            Rollout(Interleaved(row), stop, cost, key, self.config)
            for row, stop, cost, key in zip(rows, stops, meter.rows(), keys)
        ]

    # ---------------------------------------------------------------- context

    def _begin(self, prompts: Sequence[Interleaved], keys: Tensor, meter: ComputeMeter) -> _Batch:
        canvas = self.model.render(prompts)
        images = [p.last_image() for p in prompts]
        grid = next((im.grid for im in images if im is not None and im.grid is not None), self.spec.image_grid)
        if any(im is not None and im.grid != grid for im in images):
            raise ValueError("the prompts' images have different grids; sample them in separate batches")
        n = grid[0] * grid[1]
        around = len(self.spec.image_begin) + len(self.spec.image_end)
        rounds = self.config.max_rounds * (self.spec.text_length + n + around) + self.spec.text_length
        if canvas.shape[1] + rounds > self.spec.max_positions:
            raise ValueError(
                f"prompts of {canvas.shape[1]} tokens and {self.config.max_rounds} rounds need "
                f"{canvas.shape[1] + rounds} positions, the model has {self.spec.max_positions}"
            )
        context = self.model.begin(canvas.shape[1] + rounds, self.config.cache)
        group = len(keys) // len(prompts)
        first = torch.arange(0, len(keys), group, device=keys.device)
        with meter.clock("prompt"):
            if self.config.cache:  # without one, every read runs the prompt
                self._count(meter, "prompt", first, context, canvas.clean, 0, 0)
            self.model.write(context, canvas.clean)
            context.rows(torch.arange(len(prompts), device=keys.device).repeat_interleave(group))
        image = None
        if all(im is not None for im in images):
            image = torch.stack([im.tokens for im in images if im is not None]).to(keys.device)
            image = image.repeat_interleave(group, 0)
        return _Batch(context, torch.arange(len(keys), device=keys.device), keys, image, grid)

    def _count(
        self,
        meter: ComputeMeter,
        phase: str,
        index: Tensor,
        context: Context,
        block: Tokens,
        positions: Any,
        head: int,
    ) -> None:
        """One forward over a block, as the meter counts it: with a cache only the block runs."""
        tokens = block.valid.sum(1)
        keys = tokens + (context.lengths if context.tokens is not None else 0)
        meter.add(phase, index, tokens if context.cache is not None else keys, keys, positions, head)

    def _read(self, batch: _Batch, block: Tokens, modality: Modality, phase: str, meter: ComputeMeter) -> Tensor:
        """Log-probabilities [B, n, rows] at every position of a block."""
        low, high = self.spec.range_of(modality)
        self._count(meter, phase, batch.index, batch.context, block, block.valid.sum(1), high - low)
        temperature = self.config.text_temperature if modality is Modality.TEXT else self.config.image_temperature
        return self.model.log_probs(self.model.read(batch.context, block), modality, temperature)

    def _write(self, batch: _Batch, block: Tokens, meter: ComputeMeter) -> None:
        if batch.context.cache is not None:
            self._count(meter, "write", batch.index, batch.context, block, 0, 0)
        self.model.write(batch.context, block)

    # ---------------------------------------------------------------- text

    def _text(self, batch: _Batch, turn: int, meter: ComputeMeter) -> tuple[list[Tensor], Tensor]:
        """One text segment: [ids, step, probability], each [B, N], and its length [B] (with the end token)."""
        size, low = self.spec.text_length, self.spec.text_range[0]
        rows = len(batch.index)
        end = torch.tensor(self.spec.text_end, device=batch.keys.device)
        ids = torch.full((rows, size), self.spec.mask, device=batch.keys.device)
        step_of = torch.full_like(ids, -1)
        probability = torch.zeros(ids.shape, device=ids.device)
        block = self._text_block(batch, ids)
        total = 0
        for start in range(0, size, self.config.text_block or size):
            inside = torch.zeros_like(ids, dtype=torch.bool)
            inside[:, start : start + (self.config.text_block or size)] = True
            steps = self.config.text_steps if self.config.text_threshold is None else size
            count = None
            for step in range(steps):
                log_probs = self._read(batch, block.with_ids(ids), Modality.TEXT, "text", meter)
                uniform = noise.uniform(batch.keys, (turn, total, _TEXT), size)
                drawn, drawn_log_prob = draw(log_probs, uniform, self.config.greedy)
                masked = (ids == self.spec.mask) & inside
                candidates = torch.where(ids == self.spec.mask, drawn + low, ids)
                free = text_rules.eligible(candidates, masked, end)
                if self.config.text_threshold is not None:
                    commit = text_rules.commit_threshold(drawn_log_prob.exp(), free, self.config.text_threshold)
                else:
                    order = noise.uniform(batch.keys, (turn, total, _ORDER), size)
                    rank = text_rules.confidence(self.config.text_order, log_probs, drawn, order)
                    if count is None:
                        count = masked.sum(1)
                    commit = text_rules.commit_top(rank, free, text_rules.commit_count(count, step, steps))
                ids = torch.where(commit, candidates, ids)
                step_of = step_of.masked_fill(commit, total)
                probability = torch.where(commit, drawn_log_prob.exp(), probability)
                total += 1
                if bool(text_rules.finished(ids, ids == self.spec.mask, end).all()):
                    break
        is_end = torch.isin(ids, end)
        length = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, size)
        return [ids, step_of, probability], length

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
        self, batch: _Batch, text: list[Tensor], length: Tensor, rows: list[list[Segment]], stops: list[Stop]
    ) -> Tensor:
        """Adds the text to its rows; returns the places in the batch of rows that go on with an image."""
        ids, step, probability = (t.cpu() for t in text)
        goes_on = []
        for place, (index, n) in enumerate(zip(batch.index.tolist(), length.tolist())):
            tokens, last = ids[place, :n], int(ids[place, n - 1])
            rows[index].append(
                Segment(Modality.TEXT, tokens, step=step[place, :n].int(), probability=probability[place, :n])  # type: ignore[arg-type]
            )
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

    def _image(self, batch: _Batch, turn: int, texts: list[Segment], meter: ComputeMeter) -> list[Tensor]:
        """One image: [ids, step, probability, edited], each [B, n]."""
        n = batch.grid[0] * batch.grid[1]
        with meter.clock("select"):
            edited = self._select(batch, turn, texts, n, meter)
        with meter.clock("image"):
            return [*self._denoise(batch, turn, edited, meter), edited]

    def _select(self, batch: _Batch, turn: int, texts: list[Segment], n: int, meter: ComputeMeter) -> Tensor:
        everything = torch.ones(len(batch.index), n, dtype=torch.bool, device=batch.keys.device)
        if batch.image is None or self.config.edit == "full":
            return everything
        if self.config.edit == "region":
            assert self.locate is not None
            written = [self.model.decode_text(s.tokens) for s in texts]
            return edits.region(written, batch.grid, self.locate, batch.keys.device)
        if self.config.edit == "random":
            return edits.random(batch.keys, n, self.config.edit_share, (turn, 0, _EDIT))
        block = self._image_block(batch, torch.arange(n, device=batch.keys.device).expand_as(everything), everything)
        log_probs = self._read(batch, block, Modality.IMAGE, "select", meter)
        copied = log_probs.gather(2, self.spec.codes(batch.image)[:, :, None])[:, :, 0].exp()
        return edits.lowest(copied, self.config.edit_share, self.config.edit_threshold)

    def _image_block(self, batch: _Batch, place: Tensor, valid: Tensor) -> Tokens:
        """The image's tokens at the given places [B, E] of its grid, all masked."""
        ids = torch.full_like(place, self.spec.mask)
        return Tokens(
            ids=ids,
            segment=batch.ordinal[:, None].expand_as(ids).masked_fill(~valid, -1),
            modality=torch.full_like(ids, int(Modality.IMAGE)),
            position=batch.context.lengths[:, None] + len(self.spec.image_begin) + place,
            offset=place,
            previous=torch.full_like(ids, -1) if batch.image is None else batch.image.gather(1, place),
            valid=valid,
        )

    def _denoise(self, batch: _Batch, turn: int, edited: Tensor, meter: ComputeMeter) -> list[Tensor]:
        """Runs the image sampler on the edited tokens alone; the others are seen in the image before."""
        n, low = edited.shape[1], self.spec.image_offset
        final = torch.full_like(edited, self.spec.mask, dtype=torch.int64) if batch.image is None else batch.image
        step_of = torch.full_like(final, -1)
        probability = torch.ones(final.shape, device=final.device)
        count = edited.sum(1)
        width, steps_B = int(count.max()), image_rules.edit_steps(count, n, self.config.image_steps)
        if width == 0:
            return [final, step_of, probability]
        place = edited.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        valid = edited.gather(1, place)
        block = self._image_block(batch, place, valid)
        ids, masked = block.ids, valid
        for step in range(int(steps_B.max())):
            log_probs = self._read(batch, block.with_ids(ids), Modality.IMAGE, "image", meter)
            uniform = noise.uniform(batch.keys, (turn, step, _IMAGE), place)
            drawn, log_prob = draw(log_probs, uniform, self.config.greedy)
            commit = self._reveal(batch.keys, turn, step, place, masked, log_prob, steps_B, count)
            ids = torch.where(commit, drawn + low, ids)
            masked = masked & ~commit
            # Pads share place with nothing that is edited, so scattering by place writes each token once.
            at = torch.where(commit, place, n)
            final = _scatter(final, at, drawn + low)
            step_of = _scatter(step_of, at, torch.full_like(at, step))
            probability = _scatter(probability, at, log_prob.exp())
        return [final, step_of, probability]

    def _reveal(
        self,
        keys: Tensor,
        turn: int,
        step: int,
        place: Tensor,
        masked: Tensor,
        log_prob: Tensor,
        steps: Tensor,
        total: Tensor,
    ) -> Tensor:
        schedule = SCHEDULES[self.config.image_schedule]
        stream = (turn, step, _REVEAL)
        if self.config.image_sampler == "emerge":
            return image_rules.emerge_commit(masked, step, steps, schedule, noise.uniform(keys, stream, place))
        temperature = 0.0 if self.config.greedy else self.config.image_noise
        gumbel = noise.gumbel(keys, stream, place)
        return image_rules.maskgit_commit(masked, log_prob, step, steps, total, schedule, temperature, gumbel)

    def _collect_image(self, batch: _Batch, image: list[Tensor], rows: list[list[Segment]]) -> None:
        full = self.config.edit == "full" or batch.image is None
        ids, step, probability, edited = (t.cpu() for t in image)
        for place, index in enumerate(batch.index.tolist()):
            rows[index].append(
                Segment(
                    Modality.IMAGE,
                    ids[place],  # type: ignore[arg-type]
                    grid=batch.grid,
                    edited=None if full else edited[place],  # type: ignore[arg-type]
                    step=step[place].int(),  # type: ignore[arg-type]
                    probability=probability[place],  # type: ignore[arg-type]
                )
            )

    def _write_image(self, batch: _Batch, ids: Tensor, meter: ComputeMeter) -> None:
        begin, end = self.spec.image_begin, self.spec.image_end
        rows, n = ids.shape

        def around(inside: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
            sides = [
                torch.tensor(s, dtype=torch.int64, device=ids.device).expand(rows, len(s)) for s in (before, after)
            ]
            return torch.cat([sides[0], inside, sides[1]], 1)

        whole = around(ids, begin, end)
        nothing = [-1] * len(begin), [-1] * len(end)
        before = torch.full_like(ids, -1) if batch.image is None else batch.image
        self._write(
            batch,
            Tokens(
                ids=whole,
                segment=batch.ordinal[:, None].expand_as(whole),
                modality=torch.full_like(whole, int(Modality.IMAGE)),
                position=batch.context.lengths[:, None] + torch.arange(whole.shape[1], device=ids.device),
                offset=around(torch.arange(n, device=ids.device).expand_as(ids), *nothing),
                previous=around(before, *nothing),
                valid=torch.ones_like(whole, dtype=torch.bool),
            ),
            meter,
        )
        batch.image = ids


def _scatter(target: Tensor, place: Tensor, value: Tensor) -> Tensor:
    """target [B, n] with value [B, E] written at place [B, E]; place n is thrown away."""
    padded = torch.cat([target, target[:, :1]], 1)
    return padded.scatter(1, place, value.to(target.dtype))[:, :-1]
