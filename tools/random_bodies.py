"""Random bodies of the published families' shapes, with canvases and prompts of random ids, for bench_gpu.py."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from unidiff import UnifiedModel
from unidiff.canvas import Canvas
from unidiff.families.backbone import Backbone
from unidiff.grpo import activations
from unidiff.sampling.compute import ModelFlops
from unidiff.sequence import Interleaved, Modality, Prompt, Segment
from unidiff.spec import ModelSpec


@dataclass(frozen=True)
class Shape:
    """A body, and the lengths of its prompts and responses. block, steps: of a text. side: of a picture's grid in
    text-to-image and editing; small: in interleaved rounds. rank: of adapters."""

    body: dict[str, int]
    codes: int
    prompt: int
    text: int
    block: int
    steps: int
    side: int
    image_steps: int
    small: int
    round_text: int
    rounds: int
    rank: int

    @property
    def positions(self) -> int:
        rounds = self.prompt + (self.rounds + 1) * self.round_text + self.rounds * (self.small**2 + 2)
        return max(rounds, self.prompt + self.text, self.prompt + 2 * self.side**2 + 4)


def body_of(vocab: int, d: int, mlp: int, layers: int, heads: int) -> dict[str, int]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (vocab, d, mlp, layers, heads)))


SHAPES = {
    "8b": Shape(body_of(126464 + 8192, 4096, 12288, 32, 32), 8192, 128, 256, 64, 128, 32, 16, 16, 64, 4, 128),
    "small": Shape(body_of(1536 + 512, 256, 768, 8, 8), 512, 128, 256, 64, 128, 32, 64, 16, 64, 4, 8),
    "tiny": Shape(body_of(512 + 64, 64, 128, 2, 2), 64, 8, 16, 8, 8, 4, 4, 2, 6, 2, 4),
}
# For comparisons in float32: the 8B models' proportions at an eighth of the width.
CHECK = {
    "8b": dataclasses.replace(SHAPES["8b"], body=body_of(16384 + 8192, 1024, 3072, 4, 8)),
    "small": SHAPES["small"],
    "tiny": SHAPES["tiny"],
}


class Bench:
    """A random model of a shape on the device, and canvases and prompts of random ids."""

    def __init__(self, rows: int, seed: int, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.rows, self.seed, self.shape, self.device = rows, seed, shape, device
        self.chance = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        body = LlamaConfig(**shape.body, max_position_embeddings=shape.positions, attn_implementation="sdpa")  # type: ignore[arg-type]
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                backbone = Backbone(body)
        finally:
            torch.set_default_dtype(default)
        self.spec = _spec(shape)
        self.model = UnifiedModel(backbone, self.spec, None, None).eval()
        activations.enable(self.model)

    def text(self, length: int, prompt: bool = False, end: int = 0) -> Segment:
        """A text of random ids. end: index of a sampled text's end token in the spec; 1 announces a picture."""
        ids = torch.randint(16, self.spec.text_range[1], (length,), generator=self.chance)
        if not prompt:
            ids[-1] = self.spec.text_end[end]
        return Segment(Modality.TEXT, ids, prompt, room=None if prompt else length)  # type: ignore[arg-type]

    def picture(self, side: int, prompt: bool = False) -> Segment:
        codes = torch.randint(self.spec.codebook_size, (side * side,), generator=self.chance)
        return Segment(Modality.IMAGE, codes + self.spec.image_offset, prompt, (side, side))  # type: ignore[arg-type]

    def texts(self, rows: int) -> Canvas:
        """[rows, prompt + text]: responses of one text."""
        found = []
        for _ in range(rows):
            found.append(Interleaved([self.text(self.shape.prompt, True), self.text(self.shape.text)]))
        return self.model.render(found)

    def rounds(self, rows: int) -> Canvas:
        """Interleaved responses: alternating texts and pictures, and a last text."""
        s = self.shape
        found = []
        for _ in range(rows):
            parts = [self.text(s.prompt, True)]
            for _ in range(s.rounds):
                words = self.text(s.round_text, end=1)
                parts += [words, self.picture(s.small)]
            found.append(Interleaved([*parts, self.text(s.round_text)]))
        return self.model.render(found)

    def prompts(self, writes: str) -> list[Prompt]:
        found = []
        for _ in range(self.rows):
            parts = [self.text(self.shape.prompt, True)]
            if writes == "edit":
                parts.append(self.picture(self.shape.side, True))
            room = self.shape.text if writes == "text" else None
            found.append(Prompt(Interleaved(parts), writes=writes, room=room))  # type: ignore[arg-type]
        return found

    def canvases(self) -> dict[str, Canvas]:
        """Canvases to score: a batch of texts, and three interleaved responses."""
        return {"texts": self.texts(self.rows), "rounds": self.rounds(3)}

    def flops(self, canvas: Canvas) -> tuple[list[int], float]:
        """The tokens of each body pass that scores a canvas, and the FLOPs of all passes."""
        passes: list[int] = []
        total, count = 0.0, ModelFlops.of(self.model.backbone)

        def counted(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal total
            rows, length = kwargs["inputs_embeds"].shape[:2]
            each = torch.full((rows,), length)
            passes.append(rows * length)
            total += float(count.forward(each, each, each * 0, 0).sum())

        handle = self.model.body.register_forward_pre_hook(counted, with_kwargs=True)
        self.model.score(canvas, canvas.sampled)
        handle.remove()
        return passes, total


def _spec(shape: Shape) -> ModelSpec:
    """Ids in the order of MMaDA: words, then codes."""
    words = shape.body["vocab_size"] - shape.codes
    return ModelSpec(
        family="mmada", mask=2, pad=3, bos=4, text_end=(5, 6), image_next=6, image_begin=(6,), image_end=(7,),
        text_range=(0, words), image_offset=words, codebook_size=shape.codes, logit_rows=words + shape.codes,
        image_grid=(shape.side, shape.side), text_length=shape.text, max_positions=shape.positions,
        text_begin=(), attention="bidirectional",
    )  # fmt: skip
