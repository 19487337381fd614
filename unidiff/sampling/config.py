"""SamplerConfig: how rollouts are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unidiff.config import check_fields, setting
from unidiff.kept_keys import Kind


@dataclass(frozen=True)
class SamplerConfig:
    """How rollouts are sampled. Every rollout carries it, because scoring needs the same temperatures and guidance.

    Raises ValueError, with the field's name, for a value of another type or out of range.
    """

    text_steps: int = setting("rollout", 8, "denoising steps of a text's canvas, where text_threshold is none")
    text_threshold: float | None = setting(
        "rollout",
        0.9,
        "commit every token drawn with at least this probability, and always the best one; none = use text_steps",
    )
    text_entropy_bound: float | None = setting(
        "rollout",
        None,
        "commit the tokens of least entropy while the sum of their entropies, in nats and without the largest, is at "
        "most this; takes the place of text_threshold",
    )
    text_order: Literal["confidence", "margin", "entropy", "random", "dilated"] = setting(
        "rollout",
        "confidence",
        "which tokens text_steps commits first; dilated = every s-th of a block, s halved in each step, whatever "
        "text_steps and text_threshold say",
    )
    text_gap: int = setting(
        "rollout",
        1,
        "tokens of one step are at least this many places apart, fewer as a block fills (never under 2); 1 = any",
    )
    text_block: int | None = setting(
        "rollout",
        None,
        "tokens of a semi-autoregressive block, which takes its share of the steps; none = the whole canvas",
    )
    text_temperature: float = setting("rollout", 1.0, "of text tokens; 0 = the most probable ones")
    text_ahead: int = setting(
        "rollout",
        1,
        "states a pass reads of a greedy text: the next one and drafts; the tokens are the same",
    )
    image_sampler: Literal["maskgit", "emerge"] = setting(
        "rollout", "maskgit", "how the tokens of a picture are revealed"
    )
    image_steps: int = setting("rollout", 8, "denoising steps of a whole picture; an edit takes its share")
    image_schedule: Literal["cosine", "linear"] = setting(
        "rollout", "cosine", "how the share of masked tokens falls with the steps"
    )
    image_temperature: float = setting("rollout", 1.0, "of image tokens")
    image_noise: float = setting("rollout", 1.0, "temperature of MaskGIT's choice of the tokens to commit")
    image_annealing: Literal["linear", "cumulative", "constant"] = setting(
        "rollout", "linear", "how image_noise falls with the steps"
    )
    text_guidance: float = setting(
        "rollout", 0.0, "scale s of guidance for texts, (1 + s) c - s u; u = the prompt without its words; 0 = off"
    )
    image_guidance: float = setting("rollout", 0.0, "scale of guidance for pictures; u = the prompt without its words")
    picture_guidance: float = setting(
        "rollout", 0.0, "scale of a second term for pictures; u = the prompt without its pictures"
    )
    edit: Literal["region", "confidence", "random", "full"] = setting(
        "rollout", "region", "which tokens of a copied picture are denoised again"
    )
    edit_share: float = setting("rollout", 0.125, "share of the tokens that confidence and random take")
    edit_threshold: float | None = setting(
        "rollout", None, "confidence takes the tokens below this probability instead; none = edit_share"
    )
    picture_source: Literal["own", "none", "oracle", "shuffled"] = setting(
        "rollout",
        "own",
        "of interleaved rounds; controls: none = texts alone, oracle = the task's right picture after each text, "
        "shuffled = one of another example",
    )
    greedy: bool = setting("rollout", False, "the most probable values, without noise")
    max_rounds: int = setting("rollout", 4, "pictures of a response, at most")
    cache: bool = setting("rollout", True, "keep keys and values of finished segments; exact, for block-causal models")
    approximate_cache: Kind = setting(
        "rollout",
        "none",
        "bidirectional models keep keys and values of what is before a block or picture (prefix), all but it (dual), "
        "also its drawn tokens (delayed)",
    )
    cache_refresh: int | None = setting(
        "rollout", None, "steps between two full passes with approximate_cache; none = only the first is one"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("text_steps", "text_gap", "text_ahead", "image_steps", "max_rounds"):
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
        if self.text_entropy_bound is not None and self.text_entropy_bound < 0:
            raise ValueError(f"text_entropy_bound is {self.text_entropy_bound}; it must not be negative, or None")
        if self.text_entropy_bound is not None and self.text_order == "dilated":
            raise ValueError("text_order is dilated, which plans its steps; it does not go with text_entropy_bound")
        if self.cache_refresh is not None and self.cache_refresh < 1:
            raise ValueError(f"cache_refresh is {self.cache_refresh}; it must be at least 1, or None")
        if self.cache_refresh is not None and self.approximate_cache == "none":
            raise ValueError(f"cache_refresh is {self.cache_refresh}, but approximate_cache is none: nothing is kept")
        if self.text_ahead > 1 and (self.text_order == "random" or self.approximate_cache != "none"):
            raise ValueError(
                f"text_ahead is {self.text_ahead}: it needs an order that is not random, and no approximate_cache"
            )
        if not 0 < self.edit_share <= 1:
            raise ValueError(f"edit_share is {self.edit_share}; it must be in (0, 1]")
        for name in ("text_threshold", "edit_threshold"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; a probability is in [0, 1]")

    @property
    def scales(self) -> dict[str, tuple[float, float]]:
        """Guidance scales (text, image) that are not 0, keyed by what the compared prompt leaves out."""
        scales = {"text": (self.text_guidance, self.image_guidance), "image": (0.0, self.picture_guidance)}
        return {name: pair for name, pair in scales.items() if any(pair)}

    @property
    def guides(self) -> tuple[str, ...]:
        """`left_out` of `UnifiedModel.encode_prompt`: the prompts that guidance needs."""
        return tuple(self.scales)
