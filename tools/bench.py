"""Measures cost: rollouts with and without edits and cache, an autoregressive decoder, and the seconds of a step.

    python tools/bench.py edits      # localized edits against regenerating whole images, and an autoregressive decoder
    python tools/bench.py cache      # the exact cache against no cache: same tokens, less time
    python tools/bench.py step       # seconds of rollout and update, and the share of the matrix peak in scoring
    python tools/bench.py estimators --prompts 16      # what an update costs with each estimator, and how that grows
    python tools/bench.py rewards    # what calling rewards, their table and the router cost, as a share of a step

Ratios are taken within one run, arms interleaved and repeated, the fastest repeat of each counting: these machines are
noisy. --model (default recipes/base), --prompts, --repeats.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unidiff import GRPOConfig, GRPOTrainer, InterleavedSampler, SamplerConfig, UnifiedModel, noise
from unidiff.canvas import Canvas, Tokens
from unidiff.config import FilePath, setting
from unidiff.estimators import ESTIMATORS, draw_views
from unidiff.families import native
from unidiff.grpo.batches import MicroBatch, view_tokens
from unidiff.grpo.experience import Experience, segment_views
from unidiff.memory import PeakMemory
from unidiff.program import run_command, run_program
from unidiff.rewards.table import RewardTable, reward_table
from unidiff.sampling.compute import Compute, ComputeMeter, Cost, ModelFlops
from unidiff.sampling.rollout import Rollout
from unidiff.sequence import Interleaved, Modality, Segment
from unidiff.tasks import FrozenLake
from unidiff.timing import matrix_rate, seconds_of

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    """Settings of all measurements."""

    model: FilePath = setting("", str(ROOT / "recipes" / "base"), "checkpoint")
    prompts: int = setting("", 64, "held-out prompts, one rollout each")
    repeats: int = setting("", 3, "of every measurement")
    seed: int = setting("", 0, "of the noise")


class Bench:
    """A model, its task, and prompts of the test split."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model = UnifiedModel.from_pretrained(config.model)
        self.task = FrozenLake()
        self.examples = [self.task.example("test", i) for i in range(config.prompts)]
        self.prompts = [self.model.encode(list(e.prompt)) for e in self.examples]
        self.keys = [noise.key(config.seed, i) for i in range(config.prompts)]

    def rollouts(self, settings: SamplerConfig) -> list[Rollout]:
        return InterleavedSampler(self.model, settings, self.task.region).sample(self.prompts, self.keys)

    def success(self, rollouts: list[Rollout]) -> tuple[float, float]:
        figures = self.task.measure(segment_views(self.model, rollouts, self.examples), self.examples)
        return float(figures["success"].mean()), float(figures["image_exact"].mean())


def fastest(arms: dict[str, Callable[[], Compute]], repeats: int) -> dict[str, Compute]:
    """The fastest repeat of each arm, by seconds; arms take turns."""
    best: dict[str, Compute] = {}
    for _ in range(repeats):
        for name, run in arms.items():
            cost = run()
            if name not in best or cost.total.seconds < best[name].total.seconds:
                best[name] = cost
    return best


def total(rollouts: list[Rollout]) -> Compute:
    return sum((r.compute for r in rollouts), Compute())


def edits(config: Config) -> None:
    """Localized edits against full regeneration and against an autoregressive decoder of the same size."""
    bench = Bench(config)
    greedy = SamplerConfig(greedy=True)
    names = ("full", "region", "confidence", "random")
    last: dict[str, list[Rollout]] = {}

    def arm(name: str) -> Compute:
        last[name] = bench.rollouts(replace(greedy, edit=name))  # type: ignore[arg-type]
        return total(last[name])

    arms: dict[str, Callable[[], Compute]] = {name: (lambda name=name: arm(name)) for name in names}
    arms["autoregressive"] = lambda: autoregressive(bench, greedy.max_rounds)
    best = fastest(arms, config.repeats)
    n = config.prompts
    heads = "arm | forwards | picture token-forwards | of them writing | picture s | token-forwards | GFLOPs | seconds"
    print(f"| {heads} | success | pictures exact |\n|---" + "|---" * 9 + "|")
    for name, cost in best.items():
        image, written = cost.pictures, cost.get("write_image", Cost()).token_forwards
        right = "{:.3f} | {:.3f}".format(*bench.success(last[name])) if name in last else "– | –"
        t = cost.total
        print(
            f"| {name} | {t.forwards / n:.1f} | {image.token_forwards / n:.1f} | {written / n:.1f} | "
            f"{image.seconds / n:.4f} | {t.token_forwards / n:.0f} | {t.flops / n / 1e9:.3f} | {t.seconds / n:.4f} | "
            f"{right} |"
        )
    full, ours = best["full"], best["region"]
    for kind in ("token_forwards", "seconds", "flops"):
        saved = [
            1 - getattr(a, kind) / getattr(b, kind)
            for a, b in ((ours.pictures, full.pictures), (ours.total, full.total))
        ]
        print(f"saved by region edits, {kind}: pictures {saved[0]:.1%}, whole rollout {saved[1]:.1%}")


@torch.no_grad()
def autoregressive(bench: Bench, rounds: int) -> Compute:
    """The cost of a causal decoder with this body that writes every text and picture token by token, with a cache.

    Only the cost is meaningful, as the weights were not trained for it. Each token takes one forward pass over one
    token per row.
    """
    model, spec = bench.model, bench.model.spec
    text = len(model.encode_text("from a1 go right to a2")) + 1
    image = spec.image_grid[0] * spec.image_grid[1] + len(spec.image_begin) + len(spec.image_end)
    canvas = model.render([Interleaved(p) for p in bench.prompts])
    rows = torch.arange(len(bench.prompts))
    meter = ComputeMeter(ModelFlops.of(model.backbone), len(rows), model.device)
    context = model.begin(canvas.shape[1] + rounds * (text + image) + text)
    with meter.clock("prompt"):
        length = canvas.clean.valid.sum(1)
        meter.add("prompt", rows, length, length, length * 0, 0, length > 0)
        model.write(context, canvas.clean)
    for turn in range(rounds + 1):
        for phase, modality, count in (("text", Modality.TEXT, text), ("image", Modality.IMAGE, image)):
            if turn == rounds and phase == "image":
                break
            with meter.clock(phase):
                for offset in range(count):
                    _one_token(bench, context, meter, rows, phase, modality, 2 + 2 * turn + modality, offset)
    return sum(meter.rows(), Compute())


def _one_token(bench, context, meter, rows: Tensor, phase: str, modality: Modality, segment: int, offset: int) -> None:
    model = bench.model
    low, high = model.spec.range_of(modality)

    def column(value: int) -> Tensor:
        return torch.full((len(rows), 1), value)

    ids = column(low)
    block = Tokens(
        ids, column(segment), column(modality), context.lengths[:, None], column(offset), column(-1), ids >= 0
    )
    length = context.lengths + 1
    one = torch.ones_like(length)
    meter.add(phase, rows, one, length, one, high - low, one > 0)
    model.log_probs(model.read(context, block), modality).argmax(-1)
    context.append(block)


def cache(config: Config) -> None:
    """The exact cache against running the whole sequence at every step."""
    bench = Bench(config)
    tokens: dict[bool, list[Rollout]] = {}

    def arm(cached: bool, edit: str) -> Compute:
        tokens[cached] = bench.rollouts(SamplerConfig(cache=cached, edit=edit))  # type: ignore[arg-type]
        return total(tokens[cached])

    print("| edit | seconds without | with cache | ratio | token-forwards ratio | same tokens |")
    print("|---|---|---|---|---|---|")
    for edit in ("region", "full"):
        best = fastest({str(c): (lambda c=c, edit=edit: arm(c, edit)) for c in (False, True)}, config.repeats)
        same = all(
            len(a.segments) == len(b.segments)
            and all(torch.equal(x.tokens, y.tokens) for x, y in zip(a.segments, b.segments))
            for a, b in zip(tokens[False], tokens[True])
        )
        slow, quick = best["False"].total, best["True"].total
        print(
            f"| {edit} | {slow.seconds:.2f} | {quick.seconds:.2f} | {slow.seconds / quick.seconds:.2f} | "
            f"{slow.token_forwards / quick.token_forwards:.2f} | {'yes' if same else 'NO'} |"
        )


def same_step(bench: Bench) -> tuple[dict[str, float], Experience, GRPOTrainer]:
    """The metrics of a default GRPO step (the fastest repeat), its experience, and the trainer. The weights hardly
    change, so every repeat samples and trains the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, save_steps=0, quiet=True, check_ratio_every=0, learning_rate=1e-30, warmup_steps=0
        )
        trainer = GRPOTrainer(bench.model, bench.task, settings)
        repeats = [trainer.step(0) for _ in range(bench.config.repeats + 1)]
    metrics, experience = min(repeats[1:], key=lambda each: each[0]["seconds"])
    return metrics, experience, trainer


def step(config: Config) -> None:
    """Seconds of a GRPO step of 64 rollouts by phase, and the share of the machine's matrix peak in scoring."""
    bench = Bench(config)
    best, experience, _ = same_step(bench)
    phases = {k.removeprefix("seconds/"): v for k, v in best.items() if k.startswith("seconds/")}
    print("| " + " | ".join(phases) + " | step |\n" + "|---" * (len(phases) + 1) + "|")
    print("| " + " | ".join(f"{v:.2f} s" for v in phases.values()) + f" | {best['seconds']:.2f} s |")

    canvas, _ = experience.canvas.rows(experience.micro_batches(16, bench.model.spec.attention)[-1].rows).trimmed()
    mask = canvas.sampled
    tokens = canvas.clean.shape[1] + canvas.noisy.shape[1]
    count = torch.full((len(mask),), tokens)
    flops = float(ModelFlops.of(bench.model.backbone).forward(count, count, count * 0, 0).sum())
    with torch.no_grad():
        score = seconds_of(lambda: bench.model.score(canvas, mask), config.repeats)
    peak = max(matrix_rate(n) for n in (512, 1024, 2048))
    print(
        f"scoring {len(mask)} rows × {tokens} tokens: {score:.3f} s, {flops / score / 1e9:.1f} GFLOP/s, "
        f"{flops / score / peak:.1%} of the matrix peak of {peak / 1e9:.1f} GFLOP/s, "
        f"{torch.get_num_threads()} threads"
    )


def rewards(config: Config) -> None:
    """Seconds of a default GRPO step, and its overhead for rewards: copies of views, calls, checks, table and router.
    The overhead is measured with the same number of rewards that return immediately."""
    bench = Bench(config)
    best, experience, trainer = same_step(bench)
    whole, rows = best["seconds"], experience.rows
    group_B = torch.arange(len(rows)) // trainer.config.num_generations
    idle = [replace(r, function=lambda segments, **columns: [1.0] * len(segments)) for r in trainer.rewards]
    table = reward_table(trainer.rewards, rows)

    def routed() -> None:
        RewardTable.concatenate([table]).rows(slice(None))
        trainer.router.route(table, group_B)

    seconds = {
        "the rewards themselves": seconds_of(lambda: reward_table(trainer.rewards, rows), 3 * config.repeats),
        "calls, copies and table": seconds_of(lambda: reward_table(idle, rows), 3 * config.repeats),
        "router": seconds_of(routed, 3 * config.repeats),
    }
    seconds["the rewards themselves"] -= seconds["calls, copies and table"]
    print(f"{len(rows)} rollouts, {len(idle)} rewards, a step of {whole:.2f} s, {torch.get_num_threads()} threads")
    print("| | seconds | share of the step |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.4f} | {value / whole:.2%} |")


@dataclass
class Update:
    """The cost of one update. views: maximum of a draw. forwards, tokens: forward passes of micro-batches, and their
    tokens. seconds: CPU time of all threads. peak: bytes of tensors."""

    views: int = 0
    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak: int = 0


class OneByOne(Experience):
    """The plain reference: a separate forward pass for each view."""

    def micro_batches(self, size: int, attention: str, iteration: int = 0, everything: bool = True) -> list[MicroBatch]:
        found = []
        for rows in torch.arange(self.canvas.shape[0]).split(size):
            views = self.draws[iteration].rows(rows).views
            cuts = [0, *(k for k, view in enumerate(views) if k and bool(view.scored.any())), len(views)]
            found.append(self.micro_batch(iteration, rows, [slice(a, b) for a, b in itertools.pairwise(cuts)]))
        return found


def updater(
    model: UnifiedModel, canvas: Canvas, name: str, iterations: int, kind: type[Experience] = Experience
) -> tuple[GRPOTrainer, Experience]:
    """A trainer, and experience of given rollouts with alternating signs of the advantage."""
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, num_iterations=iterations, text_estimator=name, image_estimator=name, quiet=True,
            check_ratio_every=0, learning_rate=1e-9,
        )  # fmt: skip
        trainer = GRPOTrainer(model, FrozenLake(), settings)
    rows = len(canvas.ids)
    draws = draw_views(
        canvas, *trainer.update.estimators, iterations, torch.tensor([noise.key(i) for i in range(rows)])
    )
    advantage = torch.tensor([1.0, -1.0]).repeat(rows)[:rows, None] * canvas.sampled
    none: list = []
    experience = kind(none, none, none, None, None, canvas, draws, advantage, canvas.sampled)  # type: ignore[arg-type]
    return trainer, experience


def counted(
    model: UnifiedModel, canvas: Canvas, name: str, iterations: int, kind: type[Experience] = Experience
) -> Update:
    """Counts what the trainer's update would run, without running it."""
    trainer, experience = updater(model, canvas, name, iterations, kind)
    cost = Update(views=max(len(draw.views) for draw in experience.draws))

    def count(policy: object, batch: MicroBatch, passes: Sequence[slice]) -> Tensor:
        for views in (batch.draw.views[part] for part in passes):
            shared, own = view_tokens(batch.canvas, views, model.spec.attention)
            hidden = sum(view.hide is not None for view in views)  # each has a pass of its own (`run_views`)
            forwards = hidden + (hidden < len(views))
            cost.forwards += forwards
            cost.tokens += int(shared.sum() * forwards + own.sum())
        count = sum(len(batch.draw.views[part]) for part in passes)
        return torch.zeros(count, *batch.canvas.shape, requires_grad=torch.is_grad_enabled())

    trainer.update.log_probs = count  # type: ignore[method-assign]
    trainer.update.run(0, experience)
    return cost


def measured(model: UnifiedModel, canvas: Canvas, name: str, repeats: int, kind: type[Experience]) -> Update:
    """As `counted` with one inner iteration, plus seconds and memory."""
    cost = counted(model, canvas, name, 1, kind)
    trainer, experience = updater(model, canvas, name, 1, kind)
    with PeakMemory() as memory:
        trainer.update.run(0, experience)
    cost.peak, times = memory.peak, []
    for _ in range(repeats):
        start = time.process_time()
        trainer.update.run(0, experience)
        times.append(time.process_time() - start)
    cost.seconds = min(times)
    return cost


def solutions(length: int, rows: int, seed: int) -> tuple[UnifiedModel, Canvas]:
    """A fresh model of the base's size, and texts of one length, with two tokens per step in random order."""
    base = Bench(Config(prompts=1)).model
    model = native.build(base.tokenizer, base.images, text_length=length, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    low, high = model.spec.text_range
    words = [i for i in range(low, high) if i not in model.spec.text_end]
    prompt, sequences = Segment(Modality.TEXT, torch.tensor(words[:8]), prompt=True), []  # type: ignore[arg-type]
    for _ in range(rows):
        tokens = torch.tensor(words)[torch.randint(len(words), (length,), generator=generator)]
        steps = (torch.randperm(length, generator=generator) // 2).int()
        sequences.append(Interleaved([prompt, Segment(Modality.TEXT, tokens, step=steps)]))  # type: ignore[arg-type]
    return model, model.render(sequences)


def estimators(config: Config) -> None:
    """The cost of an update with each estimator (for texts and images) on the same rollouts, and its growth."""
    bench = Bench(config)
    canvas = bench.model.render([r.sequence for r in bench.rollouts(SamplerConfig())])
    n, iterations, lengths = config.prompts, (1, 2, 4, 12), (8, 16, 32, 64)
    texts = {length: solutions(length, n, config.seed) for length in lengths}
    sizes = [*(f"μ = {i}" for i in iterations), *(f"L = {length}" for length in lengths)]
    print("| token-forwards | " + " | ".join(sizes) + " |\n|---" + "|---" * len(sizes) + "|")
    for name in ESTIMATORS:
        costs = [counted(bench.model, canvas, name, i) for i in iterations]
        costs += [counted(*texts[length], name, 1) for length in lengths]
        print(f"| `{name}` | " + " | ".join(f"{c.tokens / n:.0f}" for c in costs) + " |", flush=True)
    print("\nForward passes are those of all rollouts together. One by one: each view in a pass of its own.\n")
    one = "one by one: forwards | token-forwards | CPU s"
    print(f"| estimator | views | forwards | token-forwards | peak MiB | CPU s | {one} |\n|---" + "|---" * 8 + "|")
    for name in ESTIMATORS:
        cost, plain = (measured(bench.model, canvas, name, config.repeats, k) for k in (Experience, OneByOne))
        cells = [cost.views, cost.forwards, f"{cost.tokens / n:.0f}", f"{cost.peak / 2**20:.0f}"]
        cells += [f"{cost.seconds / n:.3f}", plain.forwards, f"{plain.tokens / n:.0f}", f"{plain.seconds / n:.3f}"]
        print(f"| `{name}` | " + " | ".join(map(str, cells)) + " |", flush=True)


COMMANDS = {"edits": edits, "cache": cache, "step": step, "rewards": rewards, "estimators": estimators}


def main() -> None:
    run_command(COMMANDS, Config, __doc__ or "")


if __name__ == "__main__":
    run_program(main)
