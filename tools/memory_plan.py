"""How much memory a GPU needs to train a checkpoint, by arithmetic: nothing is loaded but its config.json.

python tools/memory_plan.py
python tools/memory_plan.py --model recipes/base --dtype float32 --lora_rank 0 --prompt 75 --text_length 8 --picture 64
python tools/memory_plan.py --config recipes/configs/llada.yaml --prompt 200
python tools/memory_plan.py --lora_rank 0 --micro_batch_size 1

Prints a table for each way of training on several GPUs; docs/scaling.md explains the lines. Sizes are in 10^9 bytes.
--config takes a file of recipes/interleaved_reasoning.py, whose settings that need no memory are left out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from transformers import LlamaConfig

from unidiff import families
from unidiff.command_line import parse
from unidiff.config import FilePath, setting
from unidiff.families import folder_of, read_config
from unidiff.families.architecture import published_shapes, read_architecture
from unidiff.program import run_program


@dataclass(frozen=True)
class Config:
    """The settings of a recipe that affect memory."""

    model: FilePath | None = setting(
        "", None, "checkpoint folder; none = the published sizes of MMaDA-8B, or of LLaDA-8B without pictures"
    )
    dtype: Literal["float32", "bfloat16"] = setting("", "bfloat16", "of the weights")
    lora_rank: int = setting("", 128, "0 = the weights are trained")
    gradient_checkpointing: bool = setting("", True, "compute activations twice")
    beta: float = setting("", 0.01, "above 0: a reference policy")
    processes: int = setting("", 8, "GPUs that share the work")
    micro_batch_size: int = setting("", 3, "rows of one backward pass")
    accumulate: bool = setting("", True, "an update has several micro-batches")
    prompt: int = setting("", 300, "tokens of a prompt")
    pictures: bool = True
    text_length: int | None = setting("", None, "tokens of a text's canvas; none = the model's, or 64")
    picture: int | None = setting("", None, "tokens of a picture with its delimiters; none = the model's, or 258")
    max_rounds: int = setting("", 4, "pictures of a rollout")


CHUNK = 1 << 28  # bytes of log-probabilities that `score` keeps at once, per modality
BYTES = {"float32": 4, "bfloat16": 2}
Lines = list[tuple[str, str, float]]  # what, formula, bytes


@dataclass(frozen=True)
class Shape:
    """The properties of a checkpoint that affect memory: its body, the size of its codebook (0 = text-only), its
    attention, and the default tokens of a text and of a picture."""

    body: LlamaConfig
    codebook: int
    bidirectional: bool
    text_length: int = 64
    picture: int = 258


def shape(config: Config) -> Shape:
    """Reads config.json. Raises ValueError or FileNotFoundError."""
    if config.model is None:
        mlp, codes = 12288, 8192 if config.pictures else 0
        rows = 126464 + codes
        body = LlamaConfig(
            vocab_size=rows,
            hidden_size=4096,
            intermediate_size=mlp,
            num_hidden_layers=32,
            num_attention_heads=32,
        )
        return Shape(body, codes, True)
    content = read_config(folder_of(config.model))
    if "backbone" in content:
        spec = content["spec"]
        picture = math.prod(spec["image_grid"]) + 2
        return Shape(LlamaConfig(**content["backbone"]), spec["codebook_size"], False, spec["text_length"], picture)
    stated = {**content, **content.get("unidiff", {}).get("spec", {})}
    codes = getattr(families.find(content), "codebook_size", 8192)  # of the family; 0 = text-only
    return Shape(read_architecture(content), stated.get("codebook_size", codes) if codes else 0, True)


def segments(config: Config, model: Shape) -> tuple[int, int, int]:
    """The number of pictures in a rollout, and the tokens of a text and of a picture."""
    rounds = config.max_rounds if config.pictures and model.codebook else 0
    return rounds, config.text_length or model.text_length, config.picture or model.picture


def laid_out(config: Config, model: Shape) -> tuple[int, int]:
    """Rows, and tokens per row, of one micro-batch in the body. Bidirectional: one row per sampled segment, cut after
    it. Block-causal: the sequence and its noisy copy."""
    rounds, text, picture = segments(config, model)
    response = rounds * (text + picture) + text
    if model.bidirectional:
        return config.micro_batch_size * (2 * rounds + 1), config.prompt + response
    return config.micro_batch_size, config.prompt + 2 * response


def kv_width(body: LlamaConfig) -> int:
    return body.hidden_size // body.num_attention_heads * (body.num_key_value_heads or body.num_attention_heads)


def weights(body: LlamaConfig) -> int:
    """N: parameters of the body and its head."""
    return sum(math.prod(sides) for sides in published_shapes(body).values())


def adapters(body: LlamaConfig, rank: int) -> int:
    """A: r · (inputs + outputs) of the seven linear layers of each block."""
    d, m, kv = body.hidden_size, body.intermediate_size, kv_width(body)
    block = 2 * (d + d) + 2 * (d + kv) + 3 * (d + m)
    return body.num_hidden_layers * rank * block


def kept_in_a_layer(body: LlamaConfig, bytes_: int, lora_rank: int) -> int:
    """k: bytes per token that autograd keeps in one layer. A number takes b bytes, or 4 if it is computed in float32.

    Norms: the input in float32, its scale, and the factor of a trained norm's weight. Attention: queries, keys, values
    (for every head, shared or not), the output, and one number per head. MLP: the gate before and after SiLU, and the
    other factor. Projections: their inputs. Frozen projections in bfloat16: each adapter's own float32 input, and the
    output of its A.
    """
    d, m, b = body.hidden_size, body.intermediate_size, bytes_
    kept = 2 * (4 * d + 4) + b * 4 * d + 4 * body.num_attention_heads + 3 * b * m
    if not lora_rank:
        return kept + b * 2 * d + b * (2 * d + m)
    kept += 7 * 4 * lora_rank
    return kept + (4 * (6 * d + m) if b != 4 else b * (2 * d + m))


def state(config: Config, body: LlamaConfig, sharded: bool) -> Lines:
    """Weights, gradients and optimizer on one GPU."""
    n, a, b, p = weights(body), adapters(body, config.lora_rank), BYTES[config.dtype], config.processes
    if config.lora_rank:
        lines: Lines = [("weights, frozen", f"{b} N", b * n), ("adapters", "4 A", 4 * a)]
        return [*lines, ("their gradients, and buffers that exchange them", "8 A", 8 * a), ("AdamW", "8 A", 8 * a)]
    if not sharded:
        lines = [("weights", "4 N", 4 * n), ("gradients, and buffers that exchange them", "8 N", 8 * n)]
        lines += [("AdamW", "8 N", 8 * n)]
    else:
        lines = [("weights, whole", f"{b} N", b * n), ("weights in float32, a share", "4 N / P", 4 * n / p)]
        lines += [("gradients, a share", "4 N / P", 4 * n / p), ("AdamW, a share", "8 N / P", 8 * n / p)]
        if config.accumulate:
            lines += [("gradients while micro-batches add up, whole", "4 N", 4 * n)]
    return lines + ([("reference", f"{b} N", b * n)] if config.beta else [])


def work(config: Config, model: Shape) -> Lines:
    """Activations of one micro-batch on one GPU."""
    body, b = model.body, BYTES[config.dtype]
    (rows, tokens), (rounds, text, picture) = laid_out(config, model), segments(config, model)
    layers, width, t = body.num_hidden_layers, body.hidden_size, rows * tokens
    layer = t * kept_in_a_layer(body, b, config.lora_rank)
    if config.gradient_checkpointing:
        lines = [("inputs of the layers", f"{b} d · layers · T", b * width * layers * t)]
        lines += [("activations of one layer", "k T", layer)]
    else:
        lines = [("activations of the layers", "k · layers · T", layer * layers)]
    scored = [(text * (rounds + 1), body.vocab_size - model.codebook), (picture * rounds, model.codebook)]
    logits = sum(min(4 * config.micro_batch_size * count * rows_, CHUNK) for count, rows_ in scored)
    lines += [("attention mask", f"{b} · rows · tokens²", b * rows * tokens**2)]
    return [*lines, ("log-probabilities of scored tokens", "4 · tokens · their rows, at most 2^28", logits)]


def table(title: str, lines: Lines) -> list[str]:
    total = sum(size for _, _, size in lines)
    rows = [f"| {what} | {formula} | {size / 1e9:.2f} |" for what, formula, size in lines]
    return [f"| {title} | formula | GB |", "|---|---|---|", *rows, f"| **sum** | | **{total / 1e9:.2f}** |", ""]


def plan(config: Config) -> str:
    """The whole report."""
    ways = [("each GPU (1_gpu, 8_gpu, nodes)", config, False)]
    if not config.lora_rank:  # without sharding, trained weights must be float32
        ways = [(ways[0][0] + ", float32", replace(config, dtype="float32"), False)]
        ways += [(f"each of {config.processes} GPUs, FSDP2 (8_gpu_fsdp2)", config, True)]
    model = shape(config)
    body, b = model.body, BYTES[config.dtype]
    rows, tokens = laid_out(config, model)
    what = f"adapters of rank {config.lora_rank}" if config.lora_rank else "all weights"
    facts = [f"{what} train, {config.dtype}", f"N = {weights(body):,}", f"A = {adapters(body, config.lora_rank):,}"]
    facts += [] if segments(config, model)[0] else ["no pictures"]
    facts += [f"k = {kept_in_a_layer(body, b, config.lora_rank):,} bytes", f"T = {rows} rows of {tokens} tokens"]
    out = ["; ".join(facts), ""]
    for title, settings, sharded in ways:
        out += table(title, state(settings, body, sharded) + work(settings, model))
    logits = 4 * rows * tokens * body.vocab_size
    out += [f"Not there: float32 logits of every token over the whole head, 4 T V = {logits / 1e9:.2f} GB."]
    cache = 2 * b * body.num_hidden_layers * kv_width(body)
    return "\n".join([*out, f"Keys and values of a token, where rollouts keep a cache: {cache / 1e6:.3f} MB."])


def parsed(argv: Sequence[str] | None = None) -> Config:
    """The settings of the command line and of a file, which may contain all settings of the recipe."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))
    from interleaved_reasoning import Config as Recipe  # type: ignore[import-not-found]

    own = {f.name for f in fields(Config)}
    return parse(Config, argv, __doc__ or "", others={f.name for f in fields(Recipe)} - own)


def main() -> None:
    try:
        print(plan(parsed()))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    run_program(main)
