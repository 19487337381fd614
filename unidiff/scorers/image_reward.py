"""ImageReward (arXiv 2304.05977) on transformers' BLIP classes.

The published package pins versions that conflict with every training environment. Its weights are BLIP's picture
encoder, BLIP's text encoder that attends to the picture, and a head of linear layers. Sizes are read from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from unidiff.config import typed
from unidiff.images.weights import read_weights
from unidiff.rewards.guard import Value
from unidiff.rewards.reward import Reward, reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.scorers.vision import VisionModel, head_of, text_of

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the authors' validation pictures
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
LONGEST = 35  # maximum tokens of a prompt
HEAD_WIDTH = 64  # width of an attention head, in both encoders


class ImageRewardModel(nn.Module):
    """state: the published weights by name, "blip.visual_encoder.…", "blip.text_encoder.…", "mlp.…". Raises ValueError
    if they do not fit."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        seen, read = _part(state, "blip.visual_encoder."), _part(state, "blip.text_encoder.")
        if not seen or not read:
            raise ValueError("it is not an ImageReward: the checkpoint lacks blip.visual_encoder or blip.text_encoder")
        self.vision = BlipVisionModel(vision_config(seen))
        self.text = BlipTextModel(text_config(read), add_pooling_layer=False)
        read.pop("embeddings.position_ids", None)  # 0, 1, 2, …
        for half, weights in ((self.vision, _vision_names(seen)), (self.text, read)):
            loaded = half.load_state_dict(weights, strict=False)
            missing = [name for name in loaded.missing_keys if not name.endswith("position_ids")]
            if missing or loaded.unexpected_keys:
                raise ValueError(f"the checkpoint lacks {missing[:3]} and has unknown {loaded.unexpected_keys[:3]}")
        self.head = head_of(_part(state, "mlp."))

    def forward(self, pixels: Tensor, ids: Tensor, attended: Tensor) -> Tensor:
        """[n]: pixels [n, 3, H, W], ids and attended [n, L]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=attended, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0]).squeeze(-1) - MEAN) / STD


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _layers(weights: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in weights if (found := re.match(pattern, name)))


def vision_config(weights: dict[str, Tensor]) -> BlipVisionConfig:
    """The picture encoder's configuration, read from its weights."""
    _, places, width = weights["pos_embed"].shape
    patch = weights["patch_embed.proj.weight"].shape[-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(weights, r"blocks\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round((places - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def text_config(weights: dict[str, Tensor]) -> BlipTextConfig:
    """The text encoder's configuration, read from its weights."""
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(weights, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        is_decoder=True,  # BLIP's name for a text encoder that attends to pictures
    )


_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


def _vision_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The picture encoder's weights under the names of transformers' class."""
    renamed = {}
    for name, value in weights.items():
        if found := re.match(r"blocks\.(\d+)\.(.+)\.(\w+)$", name):
            index, part, kind = found.groups()
            renamed[f"encoder.layers.{index}.{_BLOCK.get(part, part)}.{kind}"] = value
        else:
            start = next((old for old in _VISION if name.startswith(old)), "")
            renamed[_VISION.get(start, "") + name.removeprefix(start)] = value
    return renamed


class _Scorer(VisionModel):
    def __init__(self, checkpoint: str, tokenizer: str, **options: Any) -> None:
        super().__init__(**options)
        self.checkpoint, self.tokenizer = checkpoint, tokenizer

    def build(self) -> nn.Module:
        self._words = AutoTokenizer.from_pretrained(self.tokenizer)
        model = ImageRewardModel(read_weights(Path(self.checkpoint)))
        size = model.vision.config.image_size
        steps = [v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()]
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(PIXEL_MEAN, PIXEL_STD)]
        self._prepare = v2.Compose(steps)
        return model

    def pixels(self, image: Image.Image) -> Tensor:
        return self._prepare(image)

    def scores(self, model: Any, pixels: Tensor, texts: list[str]) -> Tensor:
        """float32 [n]."""
        options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
        words = self._words(texts, split_special_tokens=True, **options)
        return model(pixels, words["input_ids"].to(self.device), words["attention_mask"].to(self.device))


@typed
def image_reward(
    checkpoint: str,
    *,
    column: str | None = None,
    tokenizer: str = "bert-base-uncased",
    loading: dict[str, Any] | None = None,
    **options: Any,
) -> Reward:
    """ImageReward of picture and text; over generated pictures it has about mean 0 and std 1.

    checkpoint: the published file, ImageReward.pt of THUDM/ImageReward. column: the text; None = the prompt's texts.
    loading: device, dtype, batch of `VisionModel`. Further options are those of `reward`.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"checkpoint={checkpoint!r} is not a file; download ImageReward.pt of THUDM/ImageReward"
        )
    scorer = _Scorer(checkpoint, tokenizer, **(loading or {}))

    def image_reward(segments: Sequence[SegmentView]) -> list[Value]:
        return scorer.values(segments, scorer.scores, text_of(column), column)

    return reward(image_reward, on="image", **options)
