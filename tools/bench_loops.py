"""Measures rollouts and updates of bidirectional models against plain loops, the same work in its simplest form.

    python tools/bench_loops.py rollout              # LLaDA's and MaskGIT's loops: every token, all logits, every step
    python tools/bench_loops.py update               # MaskGRPO's: a padded row a segment, all logits, one backward pass
    python tools/bench_loops.py growth               # seconds as rounds, picture tokens and rollouts grow

Two random bodies (and `tiny`, for tests): `head` spends 70 % of its FLOPs in the vocabulary's head, `body` 7 %, as the
8B models do. Arms are interleaved and repeated, the fastest repeat of each counts: compare within a table. What is
exact must give the same tokens, or the same gradients, as the plain loop; the tables say so.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from random_bodies import Bench, Shape, body_of

from unidiff import InterleavedSampler, SamplerConfig, UnifiedModel, noise
from unidiff.canvas import Canvas
from unidiff.config import setting
from unidiff.kept_keys import Kind
from unidiff.memory import PeakMemory
from unidiff.program import run_command, run_program
from unidiff.sampling.completion import complete
from unidiff.sequence import Modality
from unidiff.timing import interleaved_seconds, seconds_of

CACHES = get_args(Kind)
_LENGTHS = {"prompt": 64, "text": 128, "block": 32, "steps": 64, "side": 16, "image_steps": 16, "small": 8}
_LENGTHS |= {"round_text": 32, "rounds": 4, "rank": 8}
_TINY = {"prompt": 8, "text": 16, "block": 8, "steps": 8, "side": 4, "image_steps": 4, "small": 2}
_TINY |= {"round_text": 6, "rounds": 2, "rank": 4}
SHAPES = {
    "tiny": Shape(body_of(512 + 64, 64, 128, 2, 2), 64, **_TINY),
    "head": Shape(body_of(14848 + 1024, 128, 384, 4, 4), 1024, **_LENGTHS),
    "body": Shape(body_of(1536 + 512, 256, 768, 8, 8), 512, **_LENGTHS),
}


@dataclass
class Config:
    """Settings of all measurements."""

    shapes: str = setting("", "head,body", "random bodies, with commas between")
    rows: int = setting("", 4, "rollouts of a batch")
    repeats: int = setting("", 2, "of every measurement")
    seed: int = setting("", 0, "of weights and ids")

    def benches(self) -> list[tuple[str, Bench]]:
        if unknown := set(self.shapes.split(",")) - set(SHAPES):
            raise ValueError(f"shapes has {sorted(unknown)}; choose from {', '.join(SHAPES)}")
        return [(name, self.bench(SHAPES[name])) for name in self.shapes.split(",")]

    def bench(self, shape: Shape) -> Bench:
        return Bench(self.rows, self.seed, shape, torch.device("cpu"), torch.float32)


# ---------------------------------------------------------------- plain loops


def logits_of(bench: Bench, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, L, all rows of the head] float32."""
    backbone = bench.model.backbone
    return backbone(inputs_embeds=backbone.model.embed_tokens(ids), attention_mask=mask).logits.float()


@torch.no_grad()
def plain_text(bench: Bench, prompts: Tensor) -> Tensor:
    """[B, text] ids, greedy, most confident first (LLaDA, arXiv 2502.09992). prompts: [B, P]."""
    s, mask = bench.shape, bench.spec.mask
    ids = torch.cat([prompts, prompts.new_full((len(prompts), s.text), mask)], 1)
    steps = s.steps * s.block // s.text
    for start in range(prompts.shape[1], ids.shape[1], s.block):
        for step in range(steps):
            logits = logits_of(bench, ids)
            probability = logits.softmax(2)
            logits[..., mask] = -torch.inf
            drawn = logits.argmax(2)
            sure = probability.gather(2, drawn[..., None])[..., 0]
            masked = (ids == mask)[:, start : start + s.block]
            count = math.ceil(int(masked[0].sum()) / (steps - step))
            sure = sure[:, start : start + s.block].masked_fill(~masked, -1.0)
            chosen = sure.topk(count, 1).indices + start
            ids = ids.scatter(1, chosen, drawn.gather(1, chosen))
    return ids[:, prompts.shape[1] :]


@torch.no_grad()
def plain_picture(bench: Bench, prompts: Tensor) -> Tensor:
    """[B, n] ids, greedy, MaskGIT's cosine schedule (arXiv 2202.04200). prompts: [B, P]."""
    s, spec = bench.shape, bench.spec
    n, low = s.side**2, spec.image_offset
    frame = torch.tensor([*spec.image_begin, *[spec.mask] * n, *spec.image_end]).expand(len(prompts), -1)
    ids, start = torch.cat([prompts, frame], 1), prompts.shape[1] + len(spec.image_begin)
    for step in range(s.image_steps):
        logits = logits_of(bench, ids)
        log_p, drawn = logits[..., low : low + spec.codebook_size].log_softmax(2).max(2)
        masked = (ids == spec.mask)[:, start : start + n]
        left = int(masked[0].sum())
        keep = min(max(int(n * math.cos((step + 1) / s.image_steps * math.pi / 2) + 1e-9), 1), left - 1)
        count = left - (keep if step < s.image_steps - 1 else 0)
        score = log_p[:, start : start + n].masked_fill(~masked, -torch.inf)
        chosen = score.sort(dim=1, descending=True, stable=True).indices[:, :count] + start
        ids = ids.scatter(1, chosen, drawn.gather(1, chosen) + low)
    return ids[:, start : start + n]


def plain_loss(bench: Bench, canvas: Canvas, hidden: Tensor) -> Tensor:
    """Minus the mean log-probability of the hidden tokens [B, L]. One row per segment, cut after it and padded to the
    longest, with logits of all tokens (MaskGRPO, arXiv 2510.02880)."""
    rows, targets = [], []
    touched = hidden.nonzero()[:, 0], canvas.segment[hidden]
    for row, ordinal in sorted(set(zip(*(x.tolist() for x in touched)))):
        end = int((canvas.segment[row] == ordinal).nonzero()[-1]) + 1
        own = hidden[row, :end] & (canvas.segment[row, :end] == ordinal)
        ids = canvas.clean.ids[row, :end]
        rows.append(ids.masked_fill(own, bench.spec.mask))
        targets.append(torch.where(own, ids, -100))
    width = max(map(len, rows))
    ids, wanted = (
        torch.stack([torch.nn.functional.pad(x, (0, width - len(x)), value=v) for x in each])
        for each, v in ((rows, bench.spec.pad), (targets, -100))
    )
    inside = torch.arange(width) < torch.tensor([len(r) for r in rows])[:, None]
    mask = torch.zeros(inside.shape).masked_fill(~inside, torch.finfo(torch.float32).min / 2)[:, None, None]
    logits = logits_of(bench, ids, mask)
    total = logits.new_zeros(())
    for modality in Modality:
        low, high = bench.spec.range_of(modality)
        own = (wanted >= low) & (wanted < high)
        kept = logits[..., low:high].clone()
        if low <= bench.spec.mask < high:
            kept[..., bench.spec.mask - low] = -torch.inf
        log_p = kept.log_softmax(2).gather(2, (wanted - low).clamp(0, high - low - 1)[..., None])[..., 0]
        total = total - torch.where(own, log_p, 0.0).sum()
    return total / hidden.sum()


# ---------------------------------------------------------------- measurements


def compared(
    arms: dict[str, Callable[[], Tensor]], repeats: int, agree: Callable[[Tensor, Tensor], str], name: str, what: str
) -> None:
    """Prints a line for each arm except the first, which is the plain loop."""
    seconds, results, peaks = interleaved_seconds(arms, repeats), {}, {}
    for arm, run in arms.items():
        with PeakMemory() as memory:
            results[arm] = run()
        peaks[arm] = memory.peak / 2**20
    plain, *ours = arms
    for arm in ours:
        ratio = f"{seconds[arm]:.2f} | {seconds[plain]:.2f} | {seconds[plain] / seconds[arm]:.2f}"
        sizes = f"{peaks[arm]:.0f} | {peaks[plain]:.0f}"
        print(f"| `{name}` | {what}{arm} | {ratio} | {sizes} | {agree(results[arm], results[plain])} |", flush=True)


def _same(ours: Tensor, plain: Tensor) -> str:
    return f"{float((ours == plain).double().mean()):.1%}"


def rollout(config: Config) -> None:
    """Seconds of a batch of texts and of a batch of pictures, with each approximate cache."""
    print("| body | what, cache | s | plain s | ratio | peak MiB | plain MiB | same tokens |\n" + "|---" * 8 + "|")
    for name, bench in config.benches():
        s, model = bench.shape, bench.model
        model.backbone.ids = {"mask": bench.spec.mask, "pad": bench.spec.pad}
        prompts = bench.prompts("image")
        ids = torch.stack([p.whole[0].tokens for p in prompts])
        keys = [noise.key(bench.seed, i) for i in range(bench.rows)]

        def text(cache: Kind, ids: Tensor = ids, bench: Bench = bench) -> Tensor:
            s = bench.shape
            return complete(bench.model.backbone, ids, s.text, s.steps, s.block, cache=cache).ids

        def picture(cache: Kind, model: UnifiedModel = model, prompts: Any = prompts, keys: Any = keys) -> Tensor:
            settings = SamplerConfig(image_steps=s.image_steps, greedy=True, approximate_cache=cache)  # noqa: B023
            rollouts = InterleavedSampler(model, settings).sample(prompts, keys)
            return torch.stack([r.segments[0].tokens for r in rollouts])

        for what, plain, ours in (("text, ", plain_text, text), ("picture, ", plain_picture, picture)):
            arms: dict[str, Callable[[], Tensor]] = {"plain": functools.partial(plain, bench, ids)}
            arms |= {cache: functools.partial(ours, cache) for cache in CACHES}
            compared(arms, config.repeats, _same, name, what)


def update(config: Config) -> None:
    """Seconds of a forward and a backward pass over a batch of texts, and of interleaved responses."""
    print("| body | what | s | plain s | ratio | peak MiB | plain MiB | gradients differ by |\n" + "|---" * 8 + "|")
    for name, bench in config.benches():
        for what, canvas in (("texts", bench.texts(bench.rows)), ("rounds", bench.rounds(bench.rows))):
            chance = torch.rand(canvas.shape, generator=torch.Generator().manual_seed(bench.seed))
            hidden = canvas.sampled & (chance < 0.5)
            arms = {
                "plain": functools.partial(_gradient, bench, functools.partial(plain_loss, bench, canvas, hidden)),
                "": functools.partial(_gradient, bench, functools.partial(our_loss, bench, canvas, hidden)),
            }
            compared(arms, config.repeats, _gap, name, what)


def our_loss(bench: Bench, canvas: Canvas, hidden: Tensor) -> Tensor:
    return -bench.model.score(canvas, hidden)[hidden].mean()


def _gradient(bench: Bench, loss: Callable[[], Tensor]) -> Tensor:
    """All gradients, flat."""
    bench.model.zero_grad(set_to_none=True)
    loss().backward()
    weights = [p for p in bench.model.parameters() if p.grad is not None]
    return torch.cat([p.grad.flatten() for p in weights if p.grad is not None])


def _gap(ours: Tensor, plain: Tensor) -> str:
    return f"{float((ours - plain).norm() / plain.norm()):.1e}"


def growth(config: Config) -> None:
    """Seconds as one length grows and the others stay fixed: linear in tokens, except attention."""
    print("| body | what | seconds | tokens | µs a token |\n" + "|---" * 5 + "|")
    for name in config.shapes.split(","):
        shape = SHAPES[name]
        for rounds in (1, 2, 4, 8):
            bench = config.bench(dataclasses.replace(shape, rounds=rounds))
            canvas = bench.rounds(bench.rows)
            score = functools.partial(bench.model.score, canvas, canvas.sampled)
            _grown(name, f"scored, {rounds} rounds", score, int(canvas.clean.valid.sum()))
        for side in (shape.side, 2 * shape.side, 3 * shape.side):
            bench = config.bench(dataclasses.replace(shape, side=side))
            _grown(name, f"picture of {side} × {side}", _drawing(bench), bench.rows * side**2)
        for rows in (1, 2, 4, 8):
            bench = dataclasses.replace(config, rows=rows).bench(shape)
            _grown(name, f"{rows} pictures of {shape.side} × {shape.side}", _drawing(bench), rows * shape.side**2)


def _drawing(bench: Bench) -> Callable[[], object]:
    settings = SamplerConfig(image_steps=bench.shape.image_steps)
    keys = [noise.key(bench.seed, i) for i in range(bench.rows)]
    return functools.partial(InterleavedSampler(bench.model, settings).sample, bench.prompts("image"), keys)


def _grown(name: str, what: str, run: Callable[[], object], tokens: int) -> None:
    seconds = seconds_of(run, 1)
    print(f"| `{name}` | {what} | {seconds:.2f} | {tokens} | {1e6 * seconds / tokens:.0f} |", flush=True)


COMMANDS = {"rollout": rollout, "update": update, "growth": growth}


def main() -> None:
    run_command(COMMANDS, Config, __doc__ or "")


if __name__ == "__main__":
    run_program(main)
