"""MMaDA (8B-Base, 8B-MixCoT): LLaDA's body and words, then 8,192 codes of a MAGVIT-v2 tokenizer.

Image codes begin where the text tokenizer ends, so an additional token in it would shift every picture; loading checks
this. The image tokenizer is a separate repository (showlab/magvitv2); its folder here is `magvitv2`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from unidiff.families.llada import LLADA_TOKENS, Llada, Token
from unidiff.families.registry import register
from unidiff.families.templates import chat_markup, picture_ids, special_ids
from unidiff.images.preprocess import Preprocess
from unidiff.spec import ModelSpec
from unidiff.templates.layout import Tokenize
from unidiff.templates.task_token import TaskTokenIds, TaskTokenTemplates

# Reserved ids of LLaDA; published tokenizers may still call them <|reserved_token_…|>.
MMADA_TOKENS = LLADA_TOKENS | {
    "soi": Token("<|soi|>", 126084),
    "eoi": Token("<|eoi|>", 126085),
    "t2i": Token("<|t2i|>", 126088),
    "mmu": Token("<|mmu|>", 126089),
    "ipad": Token("[iPAD]", 126093),
    "r2i": Token("<|r2i|>", 126094),
}


@register
class Mmada(Llada):
    name: ClassVar[str] = "mmada"
    rows: ClassVar[int] = 134656  # 126464 of LLaDA and 8192; the last 115 are not used
    tokens: ClassVar[dict[str, Token]] = MMADA_TOKENS
    image_offset: ClassVar[int | None] = 126349
    codebook_size: ClassVar[int] = 8192
    vq: ClassVar[tuple[str, str] | None] = ("magvit2", "magvitv2")
    # "document": diagrams and scans.
    preprocessing: ClassVar[dict[str, Preprocess]] = {
        "default": Preprocess("crop", 512),
        "document": Preprocess("squash", 512),
    }
    prefix: ClassVar[int] = 513  # ids of a text-to-image prompt, as trained: a task token and 512 of text
    parallel: ClassVar[str | None] = None  # task token for text and picture in parallel

    def detect(self, config: dict[str, Any]) -> bool:
        return config.get("model_type") == "mmada"

    def layout(self, ids: dict[str, int], offset: int, rows: int, positions: int) -> dict[str, Any]:
        sampler = {"text_steps": 256, "text_block": 128, "text_threshold": None, "text_temperature": 0.0}
        sampler |= {"image_steps": 15, "image_guidance": 3.5, "image_annealing": "cumulative"}
        return {
            "text_end": tuple(ids[name] for name in ("eot", "eos", "soi") if name in ids),
            "image_next": ids["soi"],
            "image_begin": (ids["soi"],),
            "image_end": (ids["eoi"],),
            "text_range": (0, offset),
            "image_grid": (32, 32),
            "text_length": 512,
            "max_positions": positions,
            "sampler": {**sampler, "image_sampler": "maskgit", "image_schedule": "cosine"},
        }

    def templates(self, spec: ModelSpec, tokenize: Tokenize) -> TaskTokenTemplates:
        names = {"pad": "ipad", "header_end": "end_header", "text_end": "eot", "text_to_image": "t2i"}
        names |= {"understand": "mmu", "reason": "r2i"}
        # MMaDA has no interleaved task. Reasoning before a picture is the nearest trained task.
        names |= {"interleaved": self.parallel or "r2i"} | ({"parallel": self.parallel} if self.parallel else {})
        ids = TaskTokenIds(**picture_ids(spec), **special_ids(spec, names))
        markup = chat_markup(spec, gap="\n")  # LLaDA has two line breaks
        return TaskTokenTemplates(ids, tokenize, markup, self.prefix)

    def check_size(self, spec: ModelSpec, size: int) -> None:
        if off := size - spec.image_offset:
            raise ValueError(
                f"ModelSpec.image_offset is {spec.image_offset}, but the tokenizer ends at id {size - 1}, so codes "
                f"would begin at {size}: {abs(off)} token{'s' * (abs(off) > 1)} too {'many' if off > 0 else 'few'}"
            )
