"""Rewards from vision models: CLIP score, PickScore, HPSv2, an aesthetic head. All run on transformers' CLIP classes.

A model is loaded with the first batch, onto the run's device, and scores slices of `batch` pictures in one forward pass
each. Further options (`weight`, `name`, …) are those of `reward`. ImageReward is in image_reward.py. Others (HPSv3, …)
pin packages that conflict with training environments: serve them with tools/reward_server.py.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

from unidiff.config import typed
from unidiff.images.weights import read_weights
from unidiff.rewards.guard import Value, column_of, each, fill
from unidiff.rewards.reward import Reward, reward
from unidiff.rewards.segment_view import SegmentView, prompt_text

CLIP = "openai/clip-vit-large-patch14"
PICK = "yuvalkirstain/PickScore_v1"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the base model of PickScore and HPSv2


class VisionModel:
    """A model that is loaded on first use, and scores slices of a batch in one forward pass each.

    device: default cuda if available, else cpu. batch: pictures per slice.
    """

    def __init__(
        self, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32, batch: int = 64
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch!r}; it must be 1 or more")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype, self.batch = dtype, batch
        self._lock = threading.Lock()
        self._model: Any = None

    def build(self) -> nn.Module:
        """Builds the model, on any device and in any mode."""
        raise NotImplementedError

    def pixels(self, image: Image.Image) -> Tensor:
        """A picture prepared for the model, [3, H, W]. Called after `build`."""
        raise NotImplementedError

    def _load(self) -> Any:
        with self._lock:  # rewards may run in threads
            if self._model is None:
                with torch.random.fork_rng(devices=()):  # constructors draw random weights
                    model = self.build()
                self._model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        return self._model

    @torch.no_grad()
    def values(
        self,
        views: Sequence[SegmentView],
        run: Callable[[Any, Tensor, list[str]], Tensor],
        text_of: Callable[[SegmentView], str | None] = lambda view: "",
        column: str | None = None,
    ) -> list[Value]:
        """Calls run(model, pixels, texts) -> [n] on slices of n views, and returns a value per view.

        text_of: gives a view's text; None = not applicable. column: the column that it reads. If a view's picture or
        text cannot be read, only its own value is missing.
        """
        model = self._load()

        def prepared(view: SegmentView) -> tuple[Tensor, str] | None:
            text = text_of(view)
            return None if text is None else (self.pixels(cast(Image.Image, view.image)), text)

        def score(ready: list[tuple[Tensor, str]]) -> list[float]:
            pixels = torch.stack([pixels for pixels, _ in ready]).to(self.device, self.dtype)
            return run(model, pixels, [text for _, text in ready]).float().tolist()

        slices = [views[i : i + self.batch] for i in range(0, len(views), self.batch)]
        return [value for part in slices for value in fill(each(part, prepared, column), score)]


class Clip(VisionModel):
    """A CLIP model.

    model: folder or repository. checkpoint: a file with other weights, in open_clip's names. processor: folder or
    repository of the tokenizer and the image processor; None = the model's. vision_only: without the text encoder.
    Further options are those of `VisionModel`.
    """

    def __init__(
        self,
        model: str,
        *,
        checkpoint: str | None = None,
        processor: str | None = None,
        vision_only: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.name, self.checkpoint, self.processor = model, checkpoint, processor or model
        self.vision_only = vision_only

    def build(self) -> nn.Module:
        self._images = AutoImageProcessor.from_pretrained(self.processor)
        if self.vision_only:
            return CLIPVisionModelWithProjection.from_pretrained(self.name)
        self._tokenizer = AutoTokenizer.from_pretrained(self.processor)
        return self._with_text()

    def pixels(self, image: Image.Image) -> Tensor:
        return self._images(images=[image], return_tensors="pt")["pixel_values"][0]

    def _with_text(self) -> CLIPModel:
        if self.checkpoint is None:
            return CLIPModel.from_pretrained(self.name)
        model = CLIPModel(CLIPConfig.from_pretrained(self.name))
        model.load_state_dict(from_open_clip(read_weights(Path(self.checkpoint))))
        return model

    def embedded(self, model: Any, pixels: Tensor) -> Tensor:
        """float32 [n, d], the pictures' normalised embeddings."""
        return normalize(model(pixel_values=pixels).image_embeds, dim=-1).float()

    def agreement(self, model: Any, pixels: Tensor, texts: list[str], logits: bool) -> Tensor:
        """float32 [n], the cosine of each picture and its text. logits: multiplied by the model's logit scale."""
        words = self._tokenizer(
            texts,
            padding=True,
            split_special_tokens=True,  # texts must not produce special tokens
            truncation=True,  # CLIP reads 77 tokens
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        out = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=pixels)
        cosine = (out.image_embeds.float() * out.text_embeds.float()).sum(-1)
        return cosine * model.logit_scale.exp() if logits else cosine


def text_of(column: str | None) -> Callable[[SegmentView], str | None]:
    """A function that returns a view's text: the column's, or the prompt's. It raises TypeError if that is not text,
    ValueError if UTF-8 cannot encode it."""

    def text(view: SegmentView) -> str | None:
        found = prompt_text(view) if column is None else column_of(view, column)
        if found is not None and not isinstance(found, str):
            raise TypeError(f"a picture is scored with a text, not with {type(found).__name__}")
        return found and found.encode().decode()

    return text


def _agreement(clip: Clip, column: str | None, logits: bool, name: str, options: dict[str, Any]) -> Reward:
    def agreement(segments: Sequence[SegmentView]) -> list[Value]:
        def run(model: Any, pixels: Tensor, texts: list[str]) -> Tensor:
            return clip.agreement(model, pixels, texts, logits)

        return clip.values(segments, run, text_of(column), column)

    return reward(agreement, on="image", **{"name": name, **options})


@typed
def clip_score(
    model: str = CLIP, *, column: str | None = None, loading: dict[str, Any] | None = None, **options: Any
) -> Reward:
    """Cosine of picture and text in CLIP (arXiv 2103.00020).

    column: the text; None = the prompt's texts. loading: device, dtype, batch, … of `Clip`.
    """
    return _agreement(Clip(model, **(loading or {})), column, False, "clip_score", options)


@typed
def pick_score(
    model: str = PICK, *, column: str | None = None, loading: dict[str, Any] | None = None, **options: Any
) -> Reward:
    """PickScore (arXiv 2305.01569): the logit of picture and text, about 20. Options as in `clip_score`."""
    loading = {"processor": CLIP_H if model == PICK else None, **(loading or {})}
    return _agreement(Clip(model, **loading), column, True, "pick_score", options)


@typed
def hps_score(
    checkpoint: str,
    model: str = CLIP_H,
    *,
    column: str | None = None,
    loading: dict[str, Any] | None = None,
    **options: Any,
) -> Reward:
    """HPSv2 (arXiv 2306.09341): the cosine of picture and text in a CLIP trained on preferences.

    checkpoint: the published file, such as HPS_v2.1_compressed.pt of xswu/HPSv2. model: source of the configuration and
    the processors; its weights are not used. Options as in `clip_score`.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"checkpoint={checkpoint!r} is not a file; download HPS_v2.1_compressed.pt of xswu/HPSv2"
        )
    return _agreement(Clip(model, checkpoint=checkpoint, **(loading or {})), column, False, "hps_score", options)


# --- names of open_clip -----------------------------------------------------------------------------------------------

_WHOLE = {
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # their spelling
    "visual.ln_post": "vision_model.post_layernorm",
}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(\w+)$")
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames open_clip's weights to those of transformers' CLIPModel. Raises ValueError for an unknown name."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        if name in _WHOLE:
            renamed[_WHOLE[name]] = (
                value.T.contiguous() if name.endswith("proj") or name == "text_projection" else value
            )
        elif (norm := name.rpartition("."))[0] in _NORMS:
            renamed[f"{_NORMS[norm[0]]}.{norm[2]}"] = value
        elif found := _LAYER.match(name):
            renamed |= _layer(found, value)
        elif name != "attn_mask":
            raise ValueError(f"the checkpoint has {name!r}, which is not a weight of a CLIP of open_clip")
    return renamed


def _layer(found: re.Match[str], value: Tensor) -> dict[str, Tensor]:
    visual, index, part, kind = found.groups()
    layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{index}"
    if part == "attn":  # in_proj_weight, in_proj_bias: queries, keys and values in one tensor
        kind = kind.removeprefix("in_proj_")
        return {f"{layer}.self_attn.{n}_proj.{kind}": v for n, v in zip("qkv", value.chunk(3))}
    if part not in _PARTS:
        raise ValueError(f"the checkpoint has {found[0]!r}, which is not a weight of a CLIP of open_clip")
    return {f"{layer}.{_PARTS[part]}.{kind}": value}


# --- aesthetics -------------------------------------------------------------------------------------------------------


@typed
def aesthetic_score(head: str, model: str = CLIP, *, loading: dict[str, Any] | None = None, **options: Any) -> Reward:
    """A head of linear layers on CLIP's picture embedding, such as LAION's aesthetic predictor (about 1 to 10).

    head: a .pth or .safetensors file with weights "layers.<n>.weight" and ".bias". Layers are applied in the order of n
    without activations, as in the published head. Options as in `clip_score`.
    """
    if not Path(head).is_file():
        raise FileNotFoundError(f"head={head!r} is not a file")
    clip = Clip(model, vision_only=True, **(loading or {}))
    layers = head_of(read_weights(Path(head)))

    def aesthetic_score(segments: Sequence[SegmentView]) -> list[Value]:
        def run(model: Any, pixels: Tensor, texts: list[str]) -> Tensor:
            return layers(clip.embedded(model, pixels).cpu()).squeeze(-1)

        return clip.values(segments, run)

    return reward(aesthetic_score, on="image", **options)


def head_of(weights: dict[str, Tensor]) -> nn.Sequential:
    """The linear layers of a head. Raises ValueError unless the last layer has one output."""
    numbers = sorted({int(found[1]) for name in weights if (found := re.match(r"layers\.(\d+)\.weight$", name))})
    if not numbers or weights[f"layers.{numbers[-1]}.weight"].shape[0] != 1:
        raise ValueError(f"the head needs layers.<n>.weight, the last of them [1, d]; it has {', '.join(weights)}")
    layers = []
    for n in numbers:
        weight, bias = weights[f"layers.{n}.weight"].float(), weights[f"layers.{n}.bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers).requires_grad_(False)
