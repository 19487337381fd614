"""Checks and measures unidiff on one GPU, at the shape of the 8B models, with random weights and without a network.

    python tools/bench_gpu.py --output gpu.json                   # one card of 80 GB, under 10 minutes
    python tools/bench_gpu.py --size tiny                         # the same program in seconds, on any machine
    python tools/bench_gpu.py --sections check,score              # a part of it

First what must agree: attention kernels, bfloat16 and float32, torch.compile, the float32 head, adapters and their
merge, gradient checkpointing. Then seconds, tokens a second, share of the matrix peak and memory of rollouts, scoring
and updates. Prints tables, and writes them as JSON. A part that fails is reported with its error, and the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent))
import memory_plan
from random_bodies import CHECK, SHAPES, Bench, Shape

from unidiff import InterleavedSampler, SamplerConfig, UnifiedModel, noise
from unidiff.canvas import Canvas
from unidiff.command_line import parse
from unidiff.config import setting
from unidiff.grpo import activations, lora
from unidiff.head import float32_logits
from unidiff.program import run_program
from unidiff.timing import matrix_rate, seconds_of

SECTIONS = ("check", "rollout", "score", "update")


@dataclass
class Config:
    """The measurements, and the output file."""

    size: Literal["8b", "small", "tiny"] = setting(
        "", "8b", "8b: the body of LLaDA-8B and MMaDA-8B; small: its proportions on a CPU; tiny: for any machine"
    )
    sections: str = setting("", ",".join(SECTIONS), "what to run, with commas between")
    output: str | None = setting("", None, "JSON file; none = print only")
    rows: int = setting("", 8, "rollouts of a batch")
    seed: int = setting("", 0, "of weights and ids")


def bench_of(config: Config, shape: Shape, device: torch.device, dtype: torch.dtype) -> Bench:
    return Bench(config.rows, config.seed, shape, device, dtype)


def gigabytes(device: torch.device) -> float | None:
    """The peak of allocated memory since the last reset, in 10^9 bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def reset_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


Rows = list[dict[str, Any]]


@torch.no_grad()
def _scores(model: UnifiedModel, canvas: Canvas, *kernels: SDPBackend) -> Tensor:
    if not kernels:
        return model.score(canvas, canvas.sampled)
    with sdpa_kernel(list(kernels)):
        return model.score(canvas, canvas.sampled)


def _gap(a: Tensor, b: Tensor) -> dict[str, float]:
    gap = (a.double() - b.double()).abs()
    return {"mean": float(gap.mean()), "largest": float(gap.max())}


def gradients(bench: Bench, canvas: Canvas, again: bool = False) -> Tensor:
    model = bench.model
    model.zero_grad(set_to_none=True)
    with activations.recomputed(model, again):
        (model.score(canvas, canvas.sampled).sum() / canvas.sampled.sum()).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def check(config: Config, device: torch.device) -> Rows:
    """Differences of log-probabilities (nats) or gradients (relative to their norm) between two equivalent
    computations."""
    rows: Rows = []

    def add(what: str, compare: Callable[[], dict[str, float]]) -> None:
        try:
            rows.append({"what": what, **compare()})
        except Exception as error:
            rows.append({"what": what, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})

    whole = bench_of(config, CHECK[config.size], device, torch.float32)
    half = bench_of(config, CHECK[config.size], device, torch.bfloat16)
    half.model.load_state_dict(whole.model.state_dict())
    whole.model.load_state_dict(half.model.state_dict())  # the same weights, rounded, in both
    texts, rounds = whole.texts(config.rows), whole.rounds(2)
    exact = {id(c): _scores(whole.model, c, SDPBackend.MATH) for c in (texts, rounds)}
    kinds = {"flash": SDPBackend.FLASH_ATTENTION}
    if device.type == "cuda":
        kinds["memory-efficient"] = SDPBackend.EFFICIENT_ATTENTION
    for name, canvas in (("texts", texts), ("rounds", rounds)):
        right = exact[id(canvas)]
        add(f"bfloat16 − float32, {name}", lambda c=canvas, r=right: _gap(_scores(half.model, c), r))
        for kind, kernel in kinds.items():
            if not (name == "rounds" and kind == "flash"):  # several lengths need a mask, which flash refuses
                add(
                    f"bfloat16, {kind} − math, {name}",
                    lambda c=canvas, k=kernel: _gap(_scores(half.model, c, k), _scores(half.model, c, SDPBackend.MATH)),
                )
        add(f"float32, default kernel − math, {name}", lambda c=canvas, r=right: _gap(_scores(whole.model, c), r))
    add("bfloat16, a row alone − in its batch", lambda: _gap(
        torch.cat([_scores(half.model, rounds.rows(torch.tensor([i], device=device))) for i in range(2)]),
        _scores(half.model, rounds)))  # fmt: skip
    add("float32 head of bfloat16 states − float64", functools.partial(_head, half, device))
    plain = gradients(whole, rounds)
    add("gradients, checkpointing − plain", lambda: _relative(gradients(whole, rounds, again=True), plain))
    add("float32, adapters − merged", functools.partial(_merge, config, device, rounds))
    whole.model.compile_layers()
    add("float32, compiled − eager, rounds", lambda: _gap(_scores(whole.model, rounds), exact[id(rounds)]))
    add("gradients, compiled − eager", lambda: _relative(gradients(whole, rounds), plain))
    return rows


def _relative(a: Tensor, b: Tensor) -> dict[str, float]:
    return {"largest": float((a - b).norm() / b.norm())}


def _head(bench: Bench, device: torch.device) -> dict[str, float]:
    hidden = torch.randn(256, bench.shape.body["hidden_size"], device=device).bfloat16()
    rows = bench.model.backbone.lm_head.weight[: min(4096, len(bench.model.backbone.lm_head.weight))]
    return _gap(float32_logits(hidden, rows), hidden.double() @ rows.double().T)


def _merge(config: Config, device: torch.device, canvas: Canvas) -> dict[str, float]:
    bench = bench_of(config, CHECK[config.size], device, torch.float32)
    lora.add_adapters(bench.model, 8, 16.0)
    for layer in lora.adapters(bench.model).values():
        layer.lora_B["default"].weight.data.normal_(0, 0.02)
    apart = _scores(bench.model, canvas)
    for layer in lora.adapters(bench.model).values():
        layer.merge()
    return _gap(_scores(bench.model, canvas), apart)


CACHES = ("none", "prefix", "dual", "delayed")


def rollout(bench: Bench, peak: float) -> Rows:
    """Seconds and FLOPs of a batch of rollouts, with each approximate cache. passes: forward passes of a rollout. times
    cheaper: FLOPs of the kind's first arm (for edits: the whole picture) divided by the arm's. same tokens: share of
    tokens equal to those without a cache; low for random weights, whose distributions are nearly flat."""
    s, found = bench.shape, []
    image = SamplerConfig(image_steps=s.image_steps, edit="random", edit_share=0.125)
    text = SamplerConfig(text_steps=s.steps, text_block=s.block, text_threshold=None)
    for kind, what, settings, caches in (
        ("text", "text", text, CACHES),
        ("image", "picture", image, CACHES),
        ("edit", "edit, whole", dataclasses.replace(image, edit="full"), ("none",)),
        ("edit", "edit, an eighth", image, CACHES),
    ):
        exact = None
        for cache in caches:
            drawn, row = _sampled(bench, kind, dataclasses.replace(settings, approximate_cache=cache), peak)
            exact = drawn if exact is None else exact
            first = next((r for r in found if r["what"].startswith(what.split(",")[0])), row)
            row["times cheaper"] = first["TFLOP"] / row["TFLOP"]
            row["same tokens"] = float((drawn == exact).double().mean()) if len(drawn) == len(exact) else None
            found.append({"what": f"{what}, {cache}", **row})
    return found


def _sampled(bench: Bench, kind: str, settings: SamplerConfig, peak: float) -> tuple[Tensor, dict[str, Any]]:
    """The tokens of a batch of rollouts, and their cost."""
    prompts, sampler = bench.prompts(kind), InterleavedSampler(bench.model, settings)
    keys = [noise.key(bench.seed, i) for i in range(bench.rows)]
    reset_memory(bench.device)
    batches = []
    took = seconds_of(lambda: batches.append(sampler.sample(prompts, keys)), 1, bench.device)
    cost = [r.compute.total for r in batches[-1]]
    flops, tokens = sum(c.flops for c in cost), sum(c.token_forwards for c in cost)
    return torch.cat([r.segments[0].tokens for r in batches[-1]]), {
        "seconds": took, "rollouts/s": len(keys) / took, "passes": cost[0].forwards, "TFLOP": flops / 1e12,
        "token-forwards/s": tokens / took, "TFLOP/s": flops / took / 1e12, "share of peak": flops / took / peak,
        "GB": gigabytes(bench.device),
    }  # fmt: skip


eager = functools.partial(torch.compiler.set_stance, "force_eager")  # ignores compiled layers
WAYS = {"eager": eager, "compiled": contextlib.nullcontext}


def score(bench: Bench, peak: float) -> Rows:
    """Seconds to score all sampled tokens. Compilation happens in the warm-up."""
    found: Rows = []
    bench.model.compile_layers()
    for name, canvas in bench.canvases().items():
        with eager():
            tokens, flops = bench.flops(canvas)
        for way, context in WAYS.items():
            reset_memory(bench.device)
            with context():
                took = seconds_of(lambda: _scores(bench.model, canvas), 2, bench.device)  # noqa: B023
            found.append(_speed(f"{name}, {way}", took, sum(tokens), flops, peak, bench.device))
    return found


def update(bench: Bench, peak: float) -> Rows:
    """Seconds of forward, backward and optimizer step over a micro-batch, with adapters and gradient checkpointing;
    memory, next to the prediction of tools/memory_plan.py. FLOPs are three forward passes: checkpointing runs two, and
    the backward pass through frozen weights costs one, for the inputs' gradients."""
    model, device, body = bench.model, bench.device, bench.model.backbone.config
    rank = bench.shape.rank
    lora.add_adapters(model, rank, float(rank))
    model.compile_layers()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    bytes_ = model.dtype.itemsize
    state = bytes_ * memory_plan.weights(body) + 16 * memory_plan.adapters(body, rank)
    found: Rows = []
    for name, canvas in bench.canvases().items():

        def one(canvas: Canvas = canvas) -> None:
            with activations.recomputed(model, True):
                (-model.score(canvas, canvas.sampled).mean()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        with eager():
            tokens, flops = bench.flops(canvas)
        inputs = bytes_ * body.hidden_size * body.num_hidden_layers * sum(tokens)
        planned = state + inputs + memory_plan.kept_in_a_layer(body, bytes_, rank) * max(tokens)
        for way, context in WAYS.items():
            reset_memory(device)
            with context():
                took = seconds_of(one, 2, device)
            speed = _speed(f"{name}, {way}", took, sum(tokens), 3 * flops, peak, device)
            found.append({**speed, "planned GB": planned / 1e9})
    return found


def _speed(what: str, took: float, tokens: int, flops: float, peak: float, device: torch.device) -> dict[str, Any]:
    rate = flops / took
    return {
        "what": what, "seconds": took, "tokens": tokens, "tokens/s": tokens / took, "TFLOP/s": rate / 1e12,
        "share of peak": rate / peak, "GB": gigabytes(device),
    }  # fmt: skip


# -------------------------------------------------------------------- the program


def table(rows: Rows) -> str:
    heads = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}" if value < 1e9 else f"{value:.3g}"
        return "" if value is None else str(value)

    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cell(row.get(h)) for h in heads) + " |" for row in rows)])


PARTS = {"rollout": rollout, "score": score, "update": update}


def machine(device: torch.device) -> dict[str, Any]:
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def run(config: Config) -> dict[str, Any]:
    """Runs all requested sections, and prints each as soon as it is done."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peak = matrix_rate(8192 if device.type == "cuda" else 512, device, dtype)
    result: dict[str, Any] = {"size": config.size, **machine(device), "matrix TFLOP/s": peak / 1e12}
    print(json.dumps(result), flush=True)
    bench = None
    for name in config.sections.split(","):
        start = time.perf_counter()
        try:
            if name == "check":
                rows = check(config, device)
            else:
                bench = bench or bench_of(config, SHAPES[config.size], device, dtype)
                rows = PARTS[name](bench, peak)
        except Exception as error:
            traceback.print_exc()
            rows = [{"what": name, "error": f"{type(error).__name__}: {error}"}]
        result[name] = rows
        print(f"\n## {name} ({time.perf_counter() - start:.0f} s)\n\n{table(rows)}", flush=True)
        reset_memory(device)
        if config.output:
            Path(config.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def main() -> None:
    config = parse(Config, description=__doc__ or "")
    if unknown := set(config.sections.split(",")) - set(SECTIONS):
        raise SystemExit(f"error: sections has {sorted(unknown)}; choose from {', '.join(SECTIONS)}")
    result = run(config)
    if any("error" in row for name in SECTIONS for row in result.get(name, [])):
        raise SystemExit("error: a part failed; see the rows with an error above")


if __name__ == "__main__":
    run_program(main)
