"""Masked-diffusion supervised training on demonstrations of a task.

Every sampled segment of a sequence is masked with its own ratio t ~ U(0, 1) and predicted from the visible tokens; all
segments share one forward pass (clean sequence and noisy copy). Images have two forms, because rollouts use both:
*edits*, which denoise only the tokens of the cells that the text names, and sometimes more; and *full*, which denoise
all tokens.

Most steps train on windows of sequences: one text, with the picture and the text before it (an answer: with all texts).
A window contains all that the next move depends on, with a fifth of the tokens, so a step trains on more decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from unidiff import noise
from unidiff.canvas import Canvas, Window, render
from unidiff.config import check_fields, setting
from unidiff.model import UnifiedModel
from unidiff.muon import Muon
from unidiff.sequence import Interleaved, Locate, Modality, Segment
from unidiff.tasks.encode import encode, ready
from unidiff.tasks.task import Task

_FORM, _EXTRA, _RATIO, _MASK, _PICK, _WINDOW = range(6)  # noise streams
_FEW = 64  # rows that estimate the mean length
_MOST_STEPS = 1 << 40  # more than the steps of any run; separates the noise of corpora
_SEGMENT_STRIDE = 1 << 32  # noise counter of a token = segment · stride + offset; larger than any segment's length


@dataclass
class SupervisedConfig:
    """Settings of supervised training."""

    steps: int = setting("optimizer", 4000, "optimizer steps")
    batch_size: int = setting("optimizer", 16, "whole sequences of a step, if all are of the longest task")
    window_share: float = setting(
        "optimizer", 0.75, "share of the steps that show windows of sequences: one text with what it depends on"
    )
    window_batch: int = setting("optimizer", 80, "windows of such a step")
    lr: float = setting("optimizer", 0.01, "of Muon, for the matrices of the blocks")
    lr_rest: float = setting("optimizer", 1.5e-3, "of AdamW, for everything else")
    warmup: int = setting("optimizer", 50, "steps over which both rates rise linearly")
    decay: float = setting("optimizer", 0.75, "last share of the steps, over which both rates fall linearly to 0")
    weight_decay: float = setting("optimizer", 0.1, "of Muon")
    corpus: int = setting("data", 42_000, "demonstrations")
    edit_extra: float = setting("data", 0.3, "chance that an edit also denoises tokens outside its region")
    changed_weight: float = setting("loss", 4.0, "weight of an image token that differs from the picture before")
    seed: int = setting("data", 0, "of data and masks")

    def __post_init__(self) -> None:
        check_fields(self)


def corpus(model: UnifiedModel, task: Task, indices: Sequence[int], split: str = "train") -> list[Interleaved]:
    """Demonstrations as token sequences. `edited` of each image holds the tokens that an edit denoises: those that the
    text before it names or, if the task cannot tell, those that differ from the previous image; None = a new image.
    Raises ValueError for a task without demonstrations."""
    rows = []
    for index in indices:
        example = ready(model, task, task.example(split, index))
        prompt = encode(model, task, example)
        parts = task.demonstration(example)
        if parts is None:
            raise ValueError(f"{type(task).__name__} has no demonstrations to imitate; it needs `demonstration`")
        response = list(model.encode(parts, prompt=False))
        before = None if prompt.plan[0] == "image" else prompt.whole.last_image()
        for i, segment in enumerate(response):
            if segment.modality is Modality.IMAGE:
                said = parts[i - 1] if i else prompt.words
                response[i] = replace(segment, edited=_region(segment, before, prompt.locate, said))
                before = segment
        rows.append(prompt.whole + prompt.laid_out(response))
    return rows


def _region(image: Segment, before: Segment | None, locate: Locate | None, said: Any) -> Any:
    """[n] bool: the tokens that an edit denoises; None = not an edit."""
    if before is None or before.grid != image.grid:
        return None
    if locate is None:
        return before.tokens != image.tokens
    return torch.as_tensor(locate(said, image.grid)).flatten()  # type: ignore[arg-type]


def draw_forms(row: Interleaved, row_key: int, edit_extra: float) -> Interleaved:
    """Puts one image of the sequence in full form, and the others in edit form, some wider than their region. A single
    image is in full form with probability 1/2."""
    keys = torch.tensor([row_key])
    images = [i for i, s in enumerate(row) if s.modality is Modality.IMAGE and not s.prompt and s.edited is not None]
    pick = int(noise.uniform(keys, (_PICK,), 1) * max(len(images), 2)) if images else -1
    out = list(row)
    for order, i in enumerate(images):
        segment = row[i]
        assert segment.edited is not None
        edited: Tensor | None = None
        if order != pick:
            wide, share = noise.uniform(keys, (_FORM, i), 2)[0].tolist()
            extra = noise.uniform(keys, (_EXTRA, i), len(segment))[0] < share * 0.25
            edited = segment.edited | extra if wide < edit_extra or not segment.edited.any() else segment.edited
        out[i] = replace(segment, edited=edited)
    return Interleaved(out)


def draw_window(row: Interleaved, row_key: int) -> Window:
    """Draws one text of the sequence to predict. It is shown with the question, the picture before it and the text
    before that; the answer is shown with all texts. A response of one segment is used whole."""
    if len(row.response) == 1:
        return Window(frozenset(range(len(row))), frozenset([len(row) - 1]))
    texts = [i for i, s in enumerate(row) if s.modality is Modality.TEXT and not s.prompt]
    picked = texts[int(noise.uniform(torch.tensor([row_key]), (_WINDOW,), 1) * len(texts))]
    pictures = [i for i in range(picked) if row[i].modality is Modality.IMAGE]
    before = [i for i in range(picked) if row[i].modality is Modality.TEXT]
    seen = {*(before if picked == texts[-1] else [before[0], before[-1]]), *pictures[-1:], picked}
    return Window(frozenset(seen), frozenset([picked]))


def draw_mask(canvas: Canvas, keys_B: Tensor, smallest: float = 0.0) -> Tensor:
    """[B, L] bool: masks each token of a sampled segment with the segment's own ratio t ~ U(smallest, 1)."""
    segment = canvas.segment.clamp(min=0)
    ratio = noise.uniform(keys_B, (_RATIO,), int(segment.max()) + 1).gather(1, segment)
    # At least 2 %, so that a segment of 64 tokens rarely has no masked token.
    ratio = (smallest + (1 - smallest) * ratio).clamp(min=0.02)
    counter = segment * _SEGMENT_STRIDE + canvas.clean.offset
    return canvas.sampled & (noise.uniform(keys_B, (_MASK,), counter) < ratio)


def supervised_loss(
    model: torch.nn.Module, canvas: Canvas, mask: Tensor, changed_weight: float, accelerator: Accelerator | None = None
) -> dict[str, Tensor]:
    """Weighted mean cross-entropy of masked tokens for each modality; changed image tokens have a higher weight.

    accelerator: if several processes share a step's rows, each returns its part; the mean is the sum of the parts.
    """
    logp = model(canvas, mask)
    changed = (canvas.clean.previous >= 0) & (canvas.clean.previous != canvas.ids)
    weight = mask * (1 + (changed_weight - 1) * changed)
    losses = {}
    for modality in Modality:
        w = weight * (canvas.modality == modality)
        losses[modality.name.lower()] = -(logp * w).sum() / summed(w.sum(), accelerator).clamp(min=1)
    return losses


def summed(x: Tensor, accelerator: Accelerator | None) -> Tensor:
    """Sums a tensor over all processes, in place."""
    if accelerator is not None and accelerator.num_processes > 1:
        torch.distributed.all_reduce(x)
    return x


def sum_gradients(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Sums gradients over all processes. A parameter without a gradient on every process keeps None."""
    if accelerator.num_processes == 1:
        return
    params = [p for p in model.parameters() if p.requires_grad]
    has = torch.tensor([p.grad is not None for p in params], dtype=params[0].dtype, device=params[0].device)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    sizes = [len(has), *(p.numel() for p in params)]
    has, *sums = summed(torch.cat([has, *(part.flatten() for part in parts)]), accelerator).split(sizes)
    for p, somewhere, total in zip(params, has.tolist(), sums):
        p.grad = total.view_as(p) if somewhere else None


def optimizers(model: UnifiedModel, config: SupervisedConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the body's blocks, AdamW for embeddings, head and norms."""
    blocks = [p for p in model.backbone.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        Muon(blocks, config.lr, weight_decay=config.weight_decay),
        torch.optim.AdamW(rest, config.lr_rest, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def lr_factor(step: int, steps: int, warmup: int, decay: float) -> float:
    """Linear warm-up, plateau, linear decay to 0 over the last share `decay` of the steps."""
    return min((step + 1) / max(warmup, 1), 1.0, (steps - step) / max(decay * steps, 1))


@dataclass(frozen=True)
class Corpus:
    """Demonstrations of one task. weight: its share of a step's loss. scale: its rows in a step, as a share of
    batch_size. number: separates the noise of several corpora."""

    rows: Sequence[Interleaved]
    name: str = ""
    weight: float = 1.0
    scale: float = 1.0
    number: int = 0


def corpora(given: Mapping[str, Sequence[Interleaved]]) -> list[Corpus]:
    """Corpora of tasks by name, weighted by their sizes. Every step has rows of each corpus, with tokens in proportion
    to its weight, so a corpus of short sequences gets more rows."""
    total, longest = sum(map(len, given.values())), max(map(mean_length, given.values()))
    return [
        Corpus(rows, name, len(rows) / total, len(rows) / total * longest / mean_length(rows), number)
        for number, (name, rows) in enumerate(given.items())
    ]


def mean_length(rows: Sequence[Interleaved]) -> float:
    """Mean tokens of a row, estimated from the first rows."""
    few = rows[:_FEW]
    return sum(len(segment) for row in few for segment in row) / len(few)


def batch(
    model: UnifiedModel, corpus: Corpus, config: SupervisedConfig, step: int, part: tuple[int, int] = (0, 1)
) -> tuple[Canvas, Tensor]:
    """The rows of a corpus in one step, and their mask; a function of (seed, step, number) only.

    part: (k, n) = the k-th of n parts of these rows. Each part gets at least one row.
    """
    moment = step + corpus.number * _MOST_STEPS
    kind = noise.keys(config.seed, moment)
    windowed = bool(noise.uniform(kind, (_WINDOW,), 1) < config.window_share)
    whole = config.window_batch if windowed else config.batch_size
    count = max(round(whole * corpus.scale), part[1])
    own = range(part[0], count, part[1])
    picked = (noise.uniform(kind, (_PICK,), count)[0] * len(corpus.rows)).long().tolist()
    chosen = [corpus.rows[picked[i]] for i in own]
    keys = [noise.key(config.seed, moment, i) for i in own]
    keys_B = torch.tensor(keys, device=model.device)
    if windowed:
        windows = [draw_window(row, k) for row, k in zip(chosen, keys)]
        canvas = render(chosen, model.spec, model.device, windows)
        return canvas, draw_mask(canvas, keys_B, smallest=0.6)  # a move is decided while most of its text is masked
    canvas = model.render([draw_forms(row, k, config.edit_extra) for row, k in zip(chosen, keys)])
    return canvas, draw_mask(canvas, keys_B)
