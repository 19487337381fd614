"""Which templates a family has, and how it prepares pictures (see `unidiff.templates` and `Preprocess`).

Ids come from the model's spec and the family's table of special tokens, by name. Interleaved rounds are ours: a text
opens the picture that follows it itself, its end id being the begin-of-image id (`ModelSpec.image_next`), which the
families were trained to have between text and picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unidiff.images.preprocess import Preprocess
from unidiff.spec import ModelSpec
from unidiff.templates.answer_tag import AnswerTagIds, AnswerTagTemplates
from unidiff.templates.chat import ChatMarkup, ChatTemplates
from unidiff.templates.layout import Ids, Tokenize
from unidiff.templates.task_token import TaskTokenIds, TaskTokenTemplates

_EDIT = "Generate an image applying the following editing instruction based on the original image."
_ANSWER = (
    "You are a multimodal model that can process both text and images. Answer the following question based on the "
    "provided images. Analyze each image and combine relevant details to answer."
)
# Lumina-DiMOO's system prompts, by task.
SYSTEMS = {
    "text_to_image": "Generate an image according to the text prompt.",
    "edit": _EDIT,
    "understand": _ANSWER,
    "interleaved": _ANSWER,
}

TEMPLATED = ("llada", "mmada", "mmada_parallel", "dimoo")

# How pictures are prepared, by variant and task; "default" holds for all others. "document": diagrams and scans.
PREPROCESSING: dict[str, dict[str, Preprocess]] = {
    "mmada": {"default": Preprocess("crop", 512), "document": Preprocess("squash", 512)},
    "parallel_m": {"default": Preprocess("squash", 512)},
    "dimoo": {"default": Preprocess("buckets", 512, 32), "understand": Preprocess("buckets", 1024, 32)},
    "parallel_a": {"default": Preprocess("buckets", 512, 32)},
}

# MMaDA's text-to-image prompts were trained at one length: a task token and 512 ids of text.
_PREFIX = 513


def variant(spec: ModelSpec, special: Mapping[str, int]) -> str:
    """ "llada", "mmada", "parallel_m", "dimoo" or "parallel_a": the last two pairs differ in their special tokens.

    Raises ValueError for a family without templates.
    """
    if spec.family == "mmada_parallel":
        return "parallel_a" if "answer_start" in special else "parallel_m"
    if spec.family not in TEMPLATED:
        raise ValueError(f"family {spec.family!r} has no templates; llada, mmada, mmada_parallel and dimoo have")
    return spec.family


def templates(spec: ModelSpec, special: Mapping[str, int], tokenize: Tokenize, prefix: int = _PREFIX) -> Any:
    """The templates of a published family: `ChatTemplates`, `TaskTokenTemplates` or `AnswerTagTemplates`.

    special: ids of the family's other tokens, by name. tokenize: words to ids, no special token among them. prefix: see
    `TaskTokenTemplates`. Raises ValueError if a token is missing.
    """
    kind = variant(spec, special)
    assert spec.bos is not None
    common = {"mask": spec.mask, "bos": spec.bos, "eos": _id(special, kind, "eos")}
    if kind == "llada":
        return ChatTemplates(Ids(**common), tokenize, _markup(spec, special) if "start_header" in special else None)
    for name in ("image_next", "image_begin", "image_end"):
        if getattr(spec, name) in (None, ()):
            raise ValueError(f"ModelSpec.{name} is {getattr(spec, name)}; the templates of {kind} need it")
    assert spec.image_next is not None
    common |= {"image_begin": spec.image_begin[0], "image_end": spec.image_end[0], "image_next": spec.image_next}
    common |= {"image_offset": spec.image_offset, "codebook_size": spec.codebook_size}
    if kind in ("dimoo", "parallel_a"):
        names = {"answer_begin": "answer_start", "answer_end": "answer_end", "uncondition": "uncondition"}
        names |= {"system_begin": "system_start", "system_end": "system_end"}
        names |= {"user_begin": "user_start", "user_end": "user_end"}
        ids = {field: _id(special, kind, name) for field, name in names.items()}
        ids["filler"] = special.get("filler", common["eos"])  # of training only; not every tokenizer has it
        systems = SYSTEMS | ({"parallel": _EDIT} if kind == "parallel_a" else {})
        return AnswerTagTemplates(AnswerTagIds(**common, **ids, row_separator=spec.row_separator), tokenize, systems)
    names = {"pad": "ipad", "header_end": "end_header", "text_end": "eot", "text_to_image": "t2i", "understand": "mmu"}
    ids = {field: _id(special, kind, name) for field, name in (names | {"reason": "r2i"}).items()}
    # MMaDA has no task of rounds: reasoning before a picture is the nearest that was trained
    parallel = _id(special, kind, "interleave") if kind == "parallel_m" else None
    ids["interleaved"] = ids["reason"] if parallel is None else parallel
    # one line break behind a chat header, where LLaDA has two
    markup = _markup(spec, special, gap="\n")
    return TaskTokenTemplates(TaskTokenIds(**common, **ids, parallel=parallel), tokenize, markup, prefix)


def _markup(spec: ModelSpec, special: Mapping[str, int], gap: str = "\n\n") -> ChatMarkup:
    assert spec.bos is not None
    header_begin, header_end, turn_end = (_id(special, "chat", name) for name in ("start_header", "end_header", "eot"))
    return ChatMarkup(spec.bos, header_begin, header_end, turn_end, gap)


def _id(special: Mapping[str, int], kind: str, name: str) -> int:
    if name not in special:
        raise ValueError(f"the templates of {kind} need the special token {name!r}; it has {', '.join(special)}")
    return special[name]
