"""One step's experience as data: rollouts, rewards, advantages and token masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unidiff.canvas import Canvas
from unidiff.estimators import Draw, Estimator
from unidiff.estimators.checks import check_credit
from unidiff.grpo.batches import MicroBatch, cut
from unidiff.grpo.process import Clock
from unidiff.guidance import Guidance
from unidiff.model import UnifiedModel
from unidiff.rewards.reward import Reward
from unidiff.rewards.routed import Routed
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.rewards.table import Pending, RewardTable
from unidiff.sampling.rollout import Rollout, Stop
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Modality


@dataclass
class Experience:
    """The rollouts of one step on this process, B of them.

    table, routed: rewards and advantages of these rows. canvas: the rows as a batch. draws: token masks, one draw for
    each inner iteration, made once. advantage_BL: float32, a token has the advantage of its segment, as the estimator
    credits it. trained_BL: bool, tokens whose segment has an advantage. guidance: for guided scores, None = plain ones.
    """

    rollouts: list[Rollout]
    rows: list[tuple[SegmentView, ...]]
    examples: list[Any]
    table: RewardTable
    routed: Routed
    canvas: Canvas
    draws: list[Draw]
    advantage_BL: Tensor
    trained_BL: Tensor
    guidance: Guidance | None = None

    def weight_BL(self, iteration: int) -> Tensor:
        """float32 [B, L]: loss weights of tokens scored in this iteration; 0 where the segment has no advantage."""
        return self.draws[iteration].weight * self.trained_BL

    @property
    def useful_B(self) -> Tensor:
        """bool [B]: rows with an advantage that is not 0. The policy gradient of the others is zero."""
        return (self.advantage_BL != 0).any(1)

    @cached_property
    def drawn_BL(self) -> Tensor:
        """float32 [B, L]: the log-probability of each sampled token when it was committed, 0 elsewhere."""
        return self._of_tokens("probability", 1.0).log() * self.canvas.sampled

    @cached_property
    def warmth_BL(self) -> Tensor | None:
        """float32 [B, L]: a schedule's factor on each token's temperature; None = no schedule."""
        if all(s.warmth is None for r in self.rollouts for s in r.segments):
            return None
        return self._of_tokens("warmth", 1.0)

    def _of_tokens(self, name: str, default: float) -> Tensor:
        """float32 [B, L]: a field of the response's segments, `default` where a segment lacks it."""
        out = torch.full(self.canvas.shape, default)
        segment, offset = self.canvas.segment.cpu(), self.canvas.clean.offset.cpu()
        for b, rollout in enumerate(self.rollouts):
            for ordinal, part in enumerate(rollout.sequence):
                if not part.prompt and (value := getattr(part, name)) is not None:
                    out[b, (segment[b] == ordinal) & (offset[b] >= 0)] = value
        return out.to(self.canvas.ids.device)

    def micro_batch(
        self,
        iteration: int = 0,
        rows: Tensor | None = None,
        passes: list[slice] | None = None,
        draw: Draw | None = None,
    ) -> MicroBatch:
        """Some rows in an inner iteration. rows: int64 [R]; None = all. passes: see `MicroBatch`; None = one pass.
        draw: masks of all rows; None = the iteration's."""
        draw = self.draws[iteration] if draw is None else draw
        if rows is None:
            rows = torch.arange(self.canvas.shape[0], device=self.canvas.ids.device)
        return MicroBatch(
            iteration=iteration,
            rows=rows,
            canvas=self.canvas.rows(rows),
            draw=draw.rows(rows),
            advantage_RL=self.advantage_BL[rows],
            weight_RL=(draw.weight * self.trained_BL)[rows],
            guidance=None if self.guidance is None else self.guidance.rows(rows),
            warmth_RL=None if self.warmth_BL is None else self.warmth_BL[rows],
            passes=[slice(0, len(draw.views))] if passes is None else passes,
        )

    def micro_batches(
        self, size: int, attention: str, iteration: int = 0, leave_out: Literal["", "rows", "segments"] = ""
    ) -> list[MicroBatch]:
        """The micro-batches of an inner iteration (see `batches.cut`).

        leave_out: drop rows without advantage ("rows"), or also segments without one ("segments"). If no row has an
        advantage, the first row still runs, because processes synchronise in a backward pass.
        """
        rows, draw = torch.arange(self.canvas.shape[0], device=self.canvas.ids.device), self.draws[iteration]
        if leave_out:
            useful = self.useful_B
            rows = rows[useful] if (some := bool(useful.any())) else rows[:1]
            if some and leave_out == "segments":
                draw = draw.only(self.advantage_BL != 0)
        parts = cut(self.canvas, draw, rows, size, attention)
        return [self.micro_batch(iteration, *part, draw=draw) for part in parts]


def guidance_of(
    model: UnifiedModel, rollouts: Sequence[Rollout], scales: Mapping[str, tuple[float, float]]
) -> Guidance | None:
    """The guidance that the rollouts were sampled with, for scoring. None without scales."""
    without = {name: [r.without[name] for r in rollouts] for name in scales}
    return Guidance.of(without, [r.segments for r in rollouts], scales, model.spec, model.device)


def sample_and_judge(
    sampler: InterleavedSampler,
    prompts: Sequence[Any],
    examples: Sequence[Any],
    keys: Sequence[int],
    rewards: Iterable[Reward],
    parts: int,
    clock: Clock,
    trainer_state: Any = None,
) -> tuple[list[Rollout], list[tuple[SegmentView, ...]], RewardTable]:
    """Samples rollouts of encoded prompts. Returns them, the views that rewards see, and the reward table.

    examples: the task's, one per prompt. keys: noise keys, G of the first prompt's rollouts, then G of the second's, ….
    parts: prompts are sampled in this number of parts; rewards of one part are computed while the next is sampled. A
    reward never works on two parts at once. `parts` does not change the results, unless a reward's value depends on
    the other rows of its call.
    """
    each = len(keys) // len(prompts)
    rollouts: list[Rollout] = []
    rows: list[tuple[SegmentView, ...]] = []
    tables: list[RewardTable] = []
    pending: Pending | None = None
    for part in np.array_split(np.arange(len(prompts)), parts):
        sampled = sampler.sample([prompts[i] for i in part], keys[part[0] * each : (part[-1] + 1) * each])
        clock.lap("rollout")
        views = segment_views(sampler.model, sampled, [examples[i] for i in part for _ in range(each)])
        clock.lap("decode")
        if pending is not None:
            tables.append(pending.table())
            clock.lap("reward")
        pending = Pending(rewards, views, trainer_state)
        rollouts += sampled
        rows += views
    assert pending is not None
    tables.append(pending.table())
    clock.lap("reward")
    return rollouts, rows, RewardTable.concatenate(tables)


def segment_views(
    model: UnifiedModel, rollouts: Sequence[Rollout], examples: Sequence[Any]
) -> list[tuple[SegmentView, ...]]:
    """Decodes rollouts for reward functions: texts by the tokenizer, distinct pictures in one batch per grid."""
    pixels = iter(_decode_images(model, rollouts))
    rows = []
    for rollout, example in zip(rollouts, examples):
        views, last = [], len(rollout.segments) - 1
        for i, segment in enumerate(rollout.segments):
            if segment.modality is Modality.TEXT:
                # The last text must be an answer: a text that announces a picture is not `ended` there.
                ended = int(segment.tokens[-1]) in model.spec.text_end and (i < last or rollout.stop is Stop.ANSWERED)
                text = model.decode_text(segment.tokens)
                views.append(SegmentView(modality=Modality.TEXT, tokens=segment.tokens, text=text, ended=ended))
            else:
                assert segment.grid is not None
                edited = None if segment.edited is None else segment.edited.reshape(segment.grid).numpy()
                views.append(
                    SegmentView(modality=Modality.IMAGE, tokens=segment.tokens, pixels=next(pixels), edited=edited)
                )
        rows.append(link_row(views, prompt=example.prompt, task=example, columns=example.columns))
    return rows


def _decode_images(model: UnifiedModel, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
    """uint8 [H, W, 3] for every image of every response, in order. Grids may differ between rollouts."""
    images = [s for r in rollouts for s in r.segments if s.modality is Modality.IMAGE]
    out: list[np.ndarray] = [np.empty(0)] * len(images)
    for grid in {s.grid for s in images if s.grid is not None}:
        at = [i for i, s in enumerate(images) if s.grid == grid]
        distinct, which = torch.stack([images[i].tokens for i in at]).unique(dim=0, return_inverse=True)
        decoded = model.decode_pixels(distinct, grid).float().clamp(0, 1) * 255
        arrays = decoded.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        for i, j in zip(at, which.tolist()):
            out[i] = arrays[j]
    return out


def spread(values_BS: Tensor, canvas: Canvas, rollouts: Sequence[Rollout]) -> Tensor:
    """Values of response segments [B, S] -> values of tokens [B, L], 0 outside the response."""
    given = torch.tensor([len(r.sequence.prompt) for r in rollouts], device=canvas.ids.device)
    ordinal = canvas.segment - given[:, None]
    inside = (ordinal >= 0) & canvas.clean.valid
    ordinal = ordinal.clamp(0, max(values_BS.shape[1] - 1, 0))
    return values_BS.to(canvas.ids.device).gather(1, ordinal) * inside


def ended(rows: Sequence[tuple[SegmentView, ...]], like_BS: Tensor) -> Tensor:
    """bool [B, S]: segments that were not cut off."""
    out = torch.zeros_like(like_BS)
    for b, row in enumerate(rows):
        out[b, : len(row)] = torch.tensor([view.ended for view in row])
    return out


def credited(routed: Routed, modality_BS: Tensor, text: Estimator, image: Estimator) -> Tensor:
    """Advantages [B, S] as each modality's estimator credits them (see `Estimator.credit`)."""
    credited_BS = routed.advantage_BS.clone()
    segments = modality_BS.shape[1]
    for modality, estimator in ((Modality.TEXT, text), (Modality.IMAGE, image)):
        own_BS = modality_BS == modality
        which_BS = routed.group_B[:, None] * (segments + 1) + own_BS.long().cumsum(1)
        chosen = own_BS & routed.valid_BS
        credit_N = estimator.credit(routed.advantage_BS[chosen], which_BS[chosen])
        check_credit(estimator, credit_N, routed.advantage_BS[chosen])
        credited_BS[chosen] = credit_N
    return credited_BS
