"""Lumina-DiMOO: LLaDA's body and words, eight more tokens, then the 8,192 codes of an aMUSEd-type VQ tokenizer.

Images have any size in multiples of 16 pixels, with a separator after every row of tokens, including the last.
"""

from __future__ import annotations

from typing import Any, ClassVar

from unidiff.families.llada import LLADA_TOKENS, Llada, Token, is_dimoo
from unidiff.families.registry import register
from unidiff.families.templates import picture_ids, special_ids
from unidiff.images.preprocess import Preprocess
from unidiff.spec import ModelSpec
from unidiff.templates.answer_tag import AnswerTagIds, AnswerTagTemplates
from unidiff.templates.layout import Tokenize

# The prompt's four tags must each be one token; their ids were never published.
DIMOO_TOKENS = LLADA_TOKENS | {
    "row_separator": Token("<end-of-line>", 126084),
    "filler": Token("<|filler|>", 126339, "optional"),  # after </answer> in training; its name is unknown
    "soi": Token("<IMAGE>", 126349),
    "eoi": Token("</IMAGE>", 126350),
    "uncondition": Token("<uncondition>", 126351, "named"),
    "answer_start": Token("<answer>", 126354),
    "answer_end": Token("</answer>", 126355),
    "system_start": Token("<system>", None, "named"),
    "system_end": Token("</system>", None, "named"),
    "user_start": Token("<user>", None, "named"),
    "user_end": Token("</user>", None, "named"),
}

EDIT = "Generate an image applying the following editing instruction based on the original image."
_ANSWER = (
    "You are a multimodal model that can process both text and images. Answer the following question based on the "
    "provided images. Analyze each image and combine relevant details to answer."
)


@register
class Dimoo(Llada):
    name: ClassVar[str] = "dimoo"
    rows: ClassVar[int] = 134548  # 126356 and 8192
    tokens: ClassVar[dict[str, Token]] = DIMOO_TOKENS
    image_offset: ClassVar[int | None] = 126356
    codebook_size: ClassVar[int] = 8192
    vq: ClassVar[tuple[str, str] | None] = ("diffusers_vq", "vqvae")
    preprocessing: ClassVar[dict[str, Preprocess]] = {
        "default": Preprocess("buckets", 512, 32),
        "understand": Preprocess("buckets", 1024, 32),
    }
    systems: ClassVar[dict[str, str]] = {  # the system's prompt, by task
        "text_to_image": "Generate an image according to the text prompt.",
        "edit": EDIT,
        "understand": _ANSWER,
        "interleaved": _ANSWER,
    }

    def detect(self, config: dict[str, Any]) -> bool:
        return config.get("model_type") == "llada" and is_dimoo(config)

    def other_offset(self, config: dict[str, Any], rows: int, size: int) -> int:
        """Image codes are the last rows of the head, so the offset follows from their number."""
        return config.get("text_vocab_size") or rows - config.get("codebook_size", self.codebook_size)

    def layout(self, ids: dict[str, int], offset: int, rows: int, positions: int) -> dict[str, Any]:
        sampler = {"text_steps": 128, "text_block": 256, "text_threshold": None, "text_temperature": 0.0}
        # Settings of editing. For text-to-image: image_guidance 4, no picture_guidance.
        sampler |= {"image_steps": 64, "image_guidance": 2.5, "picture_guidance": 4.0, "image_annealing": "constant"}
        return {
            "text_end": (ids["answer_end"], ids["eos"], ids["soi"]),
            "image_next": ids["soi"],
            "image_begin": (ids["soi"],),
            "image_end": (ids["eoi"],),
            "row_separator": ids["row_separator"],
            "text_range": (0, offset),
            "image_grid": (64, 64),
            "text_length": 1024,
            # Trained on 5,120 positions, despite the config: a picture of 1024 x 1024 takes 4,160.
            "max_positions": max(positions, 5120) if rows == self.rows else positions,
            "sampler": {**sampler, "image_sampler": "maskgit", "image_schedule": "cosine"},
        }

    def templates(self, spec: ModelSpec, tokenize: Tokenize) -> AnswerTagTemplates:
        names = {"answer_begin": "answer_start", "answer_end": "answer_end", "uncondition": "uncondition"}
        names |= {"system_begin": "system_start", "system_end": "system_end"}
        names |= {"user_begin": "user_start", "user_end": "user_end"}
        ids = picture_ids(spec) | special_ids(spec, names)
        filler = spec.special.get("filler", ids["eos"])  # of training only; not every tokenizer has it
        return AnswerTagTemplates(
            AnswerTagIds(**ids, filler=filler, row_separator=spec.row_separator), tokenize, self.systems
        )

    def check_size(self, spec: ModelSpec, size: int) -> None:
        """Raises ValueError if the tokenizer has ids among the codes. (It may lack ids below them: the published one is
        not known.)"""
        if size > spec.image_offset:
            raise ValueError(
                f"ModelSpec.image_offset is {spec.image_offset}, but the tokenizer goes on to id {size - 1}, among the "
                f"image codes: {size - spec.image_offset} token{'s' if size - spec.image_offset > 1 else ''} too many"
            )
