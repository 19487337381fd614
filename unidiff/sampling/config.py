"""SamplerConfig: how rollouts are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unidiff.config import check_fields


@dataclass(frozen=True)
class SamplerConfig:
    """How rollouts are sampled; every rollout carries it, since scoring must use the same temperatures.

    text_threshold: commit every text token drawn with at least this probability, and at least the best one;
    None = text_steps of them for the whole canvas, in the text_order: confidence, margin, entropy or random.
    text_block: tokens of a semi-autoregressive block, which takes its share of the steps; None = the whole canvas.
    text_temperature: 0 = the most probable tokens. image_sampler: maskgit or emerge. image_steps: steps for a whole
    image, edits take their share. image_noise: temperature of MaskGIT's choice of tokens, which falls with the steps as
    image_annealing says: linear, cumulative or constant. edit: region, confidence, random, full. edit_share: share of
    tokens that confidence and random take. edit_threshold: confidence takes tokens below this probability instead.
    text_guidance, image_guidance: scale s of classifier-free guidance for texts and for images, (1 + s) c - s u with a
    prompt without its words; picture_guidance: of a second term for images, with a prompt without its pictures.
    greedy: most probable values, no noise. max_rounds: images at most. cache: keep keys and values of finished segments
    (exact; block-causal models only); False runs the whole sequence at each step. approximate_cache: of bidirectional
    models, while a block of a text is written: prefix = keep what stands before the block, dual = keep all but it.
    """

    text_steps: int = 8
    text_threshold: float | None = 0.9
    text_order: Literal["confidence", "margin", "entropy", "random"] = "confidence"
    text_block: int | None = None
    text_temperature: float = 1.0
    image_sampler: Literal["maskgit", "emerge"] = "maskgit"
    image_steps: int = 8
    image_schedule: Literal["cosine", "linear"] = "cosine"
    image_temperature: float = 1.0
    image_noise: float = 1.0
    image_annealing: Literal["linear", "cumulative", "constant"] = "linear"
    text_guidance: float = 0.0
    image_guidance: float = 0.0
    picture_guidance: float = 0.0
    edit: Literal["region", "confidence", "random", "full"] = "region"
    edit_share: float = 0.125
    edit_threshold: float | None = None
    greedy: bool = False
    max_rounds: int = 4
    cache: bool = True
    approximate_cache: Literal["none", "prefix", "dual"] = "none"

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("text_steps", "image_steps", "max_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.image_temperature <= 0:
            raise ValueError(
                f"image_temperature is {self.image_temperature}; it must be above 0 (use greedy for no noise)"
            )
        for name in ("text_temperature", "image_noise", "text_guidance", "image_guidance", "picture_guidance"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number that is not negative")
        if self.text_block is not None and self.text_block < 1:
            raise ValueError(f"text_block is {self.text_block}; it must be at least 1, or None for the whole canvas")
        if not 0 < self.edit_share <= 1:
            raise ValueError(f"edit_share is {self.edit_share}; it must lie in (0, 1]")
        for name in ("text_threshold", "edit_threshold"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; a probability lies in [0, 1]")

    @property
    def scales(self) -> dict[str, tuple[float, float]]:
        """Scales of guidance for texts and for images, by what the compared prompt leaves out; those that are not 0."""
        scales = {"text": (self.text_guidance, self.image_guidance), "image": (0.0, self.picture_guidance)}
        return {name: pair for name, pair in scales.items() if any(pair)}

    @property
    def guides(self) -> tuple[str, ...]:
        """What the prompts leave out that guidance needs; see `UnifiedModel.encode_prompt`."""
        return tuple(self.scales)
