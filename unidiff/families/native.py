"""The native family: the small model that ships with unidiff (recipes/base).

Body: transformers' Llama, run block-causally. The input embedding adds place and previous token to the token's own (see
`NativeEmbedding`); without them a trial needed hours instead of minutes to learn that a picture is mostly a copy of the
previous one. Rotary positions count segments or, with `axes`, rows and columns too (`AxialRotary`).

Layout of a folder: config.json, model.safetensors, the text tokenizer's files, and image/ with the VQ tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from unidiff.canvas import Tokens
from unidiff.families import checkpoint
from unidiff.families.registry import register
from unidiff.files import write_json, write_whole
from unidiff.images.patch_vq import PatchVQ
from unidiff.images.weights import check_finite
from unidiff.model import UnifiedModel
from unidiff.sequence import Modality
from unidiff.spec import ModelSpec


class NativeEmbedding(nn.Module):
    """Input embedding of the native family: a token's place, and the token that was there before.

    image token: embeddings of its row and column, each in two parts (pair of rows, parity), plus a linear map of the
    embedding of the token at the same place of the previous image.
    text token: an embedding of its index in the segment, plus one of the segment's ordinal in the sequence (an index
    beyond the table uses the last entry).
    """

    def __init__(
        self, d_model: int, grid: tuple[int, int], text_length: int, max_segments: int, axes: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(axes, bool):
            raise TypeError(f"axes is {axes!r}; it must be true or false")
        self.grid, self.axes = (grid[0], grid[1]), axes
        self.row = nn.Embedding((grid[0] + 1) // 2 * 2, d_model)
        self.column = nn.Embedding((grid[1] + 1) // 2 * 2, d_model)
        self.parity = nn.Embedding(4, d_model)
        self.offset = nn.Embedding(text_length, d_model)
        self.segment = nn.Embedding(max_segments, d_model)
        self.previous = nn.Linear(d_model, d_model, bias=False)
        for table in (self.row, self.column, self.parity, self.offset, self.segment):
            nn.init.normal_(table.weight, std=0.02)
        nn.init.normal_(self.previous.weight, std=d_model**-0.5)

    def positions(self, tokens: Tokens) -> Tensor:
        """Rotary positions. Without axes: [B, N], the ordinal of the token's segment, so that "the picture before this
        text" has one fixed distance. With axes: [B, N, 3], that ordinal, then an image token's row and column, or 0 and
        a text token's index."""
        segment = tokens.segment.clamp(min=0)
        if not self.axes:
            return segment
        inside = tokens.offset.clamp(min=0)
        image = tokens.modality == Modality.IMAGE
        row, column = inside // self.grid[1] * image, torch.where(image, inside % self.grid[1], inside)
        return torch.stack([segment, row, column], -1)

    def forward(self, tokens: Tokens, table: nn.Embedding) -> Tensor:
        """Embeds `tokens` [B, N] with the body's token table -> [B, N, d_model]."""
        inside = tokens.offset.clamp(min=0)
        row, column = inside // self.grid[1], inside % self.grid[1]
        row, column = row.clamp(max=self.grid[0] - 1), column.clamp(max=self.grid[1] - 1)
        place = self.row(row // 2) + self.column(column // 2) + self.parity(row % 2 * 2 + column % 2)
        place = place + self.previous(table(tokens.previous.clamp(min=0))) * (tokens.previous >= 0)[..., None]
        words = self.offset(inside.clamp(max=self.offset.num_embeddings - 1))
        words = words + self.segment(tokens.segment.clamp(0, self.segment.num_embeddings - 1))
        content = (tokens.offset >= 0)[..., None]
        image = (tokens.modality == Modality.IMAGE)[..., None]
        return table(tokens.ids) + content * torch.where(image, place, words)


class AxialRotary(nn.Module):
    """Rotary embedding with three axes, instead of Llama's. Half of the frequencies encode the segment's ordinal, a
    quarter the row and a quarter the column, so that a head can attend to a token's neighbours at any place. Source:
    M-RoPE of Qwen2-VL (arXiv 2409.12191). The frequencies of rows and columns fall from 1 to about 1/30."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        quarter = head_dim // 8
        self.sections = ((10000.0, head_dim // 2 - 2 * quarter), (100.0, quarter), (100.0, quarter))

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, N, head_dim] of positions [B, N, 3], in the dtype of x."""
        angles = [
            position_ids[..., axis, None] * base ** (-torch.arange(count, device=x.device) / count)
            for axis, (base, count) in enumerate(self.sections)
        ]
        whole = torch.cat([*angles, *angles], -1)
        return whole.cos().to(x.dtype), whole.sin().to(x.dtype)


def _body(config: LlamaConfig, axes: bool) -> LlamaForCausalLM:
    body = LlamaForCausalLM(config)
    if axes:
        body.model.rotary_emb = AxialRotary(config.head_dim)  # type: ignore[assignment]
    return body


_SPECIAL = ("<pad>", "<mask>", "<bos>", "<soi>", "<eoi>", "<eos>", "<eot>")


def build_spec(
    tokenizer: PreTrainedTokenizerBase, codebook_size: int, grid: tuple[int, int], **lengths: int
) -> ModelSpec:
    """The spec of a native text tokenizer: special tokens that are never sampled come first, `<eos>` is the first id
    that a text may draw, image codes follow the words. Raises ValueError if it lacks a special token."""
    word, size = tokenizer.get_vocab(), len(tokenizer)
    if missing := [w for w in _SPECIAL if w not in word]:
        raise ValueError(f"the text tokenizer has no {', '.join(missing)}: it is not a native one")
    return ModelSpec(
        family="native",
        mask=word["<mask>"],
        pad=word["<pad>"],
        bos=word["<bos>"],
        text_end=(word["<eos>"], word["<eot>"]),
        image_next=word["<eot>"],
        image_begin=(word["<soi>"],),
        image_end=(word["<eoi>"],),
        text_range=(word["<eos>"], size),
        image_offset=size,
        codebook_size=codebook_size,
        logit_rows=size + codebook_size,
        image_grid=grid,
        **lengths,  # type: ignore[arg-type]
    )


def build(
    tokenizer: PreTrainedTokenizerBase,
    images: PatchVQ,
    *,
    grid: tuple[int, int] = (8, 8),
    text_length: int = 8,
    max_positions: int = 1024,
    d_model: int = 128,
    layers: int = 6,
    heads: int = 4,
    d_mlp: int = 352,
    max_segments: int = 24,
    axes: bool = False,
    seed: int = 0,
) -> UnifiedModel:
    """A freshly initialised native model. axes: rotary positions by row and column too (`AxialRotary`). The global
    RNG's state does not change."""
    spec = build_spec(tokenizer, images.codebook_size, grid, text_length=text_length, max_positions=max_positions)
    config = LlamaConfig(
        vocab_size=spec.logit_rows,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        pad_token_id=spec.pad,
        bos_token_id=spec.bos,
        eos_token_id=spec.text_end[0],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = _body(config, axes)
        embedding = NativeEmbedding(d_model, grid, text_length, max_segments, axes)
    return UnifiedModel(backbone, spec, tokenizer, images, embedding)


@register
class Native:
    """Loading and saving of native checkpoints."""

    name = "native"

    def detect(self, config: dict[str, Any]) -> bool:
        return config.get("model_type") == "unidiff_native"

    def load(self, folder: Path, config: dict[str, Any], dtype: torch.dtype, **fields: Any) -> UnifiedModel:
        """fields: of `ModelSpec`, override config.json. Raises FileNotFoundError for a missing file, ValueError if
        config, weights and tokenizers disagree."""
        if other := fields.keys() & {"image_tokenizer", "device_map"}:
            raise ValueError(f"family native takes no {' and no '.join(sorted(other))}: {folder} has all of its parts")
        for path in (folder / checkpoint.WEIGHTS, folder / "tokenizer.json", folder / "image" / "model.safetensors"):
            if not path.is_file():
                raise FileNotFoundError(f"native checkpoint {folder} lacks {path.relative_to(folder)}")
        if wrong := [n for n in ("spec", "backbone", "embedding") if not isinstance(config.get(n), dict)]:
            raise ValueError(f"{folder / 'config.json'} lacks {', '.join(wrong)}, or it is not an object")
        spec = ModelSpec.from_dict({**config["spec"], **fields})
        tokenizer = checkpoint.read_tokenizer(folder)
        images = PatchVQ.from_pretrained(folder / "image")
        _check(spec, tokenizer, images, folder)
        found = checkpoint.read_headers(folder)
        with torch.device("meta"):  # allocate nothing before the sizes are checked
            body, embedding = _parts(config, len(found), folder / "config.json")
        _check_shapes(_weights(body, embedding), found, folder)
        if embedding.grid != spec.image_grid:
            raise ValueError(f"ModelSpec.image_grid is {spec.image_grid}, but the weights embed {embedding.grid}")
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then overwritten
            body, embedding = _parts(config, len(found), folder / "config.json")
        weights = load_file(folder / checkpoint.WEIGHTS)
        for name, value in _weights(body, embedding).items():
            value.data.copy_(weights[name])
        model = UnifiedModel(body, spec, tokenizer, images, embedding)
        check_finite(model, folder / checkpoint.WEIGHTS)
        return model.to(dtype)

    def save(self, model: UnifiedModel, folder: Path) -> None:
        embedding = model.embedding
        assert isinstance(embedding, NativeEmbedding)
        body = model.backbone.config
        keys = LlamaConfig().to_diff_dict().keys() | body.to_diff_dict().keys()
        config = {
            "model_type": "unidiff_native",
            "spec": model.spec.to_dict(),
            "backbone": {k: v for k, v in body.to_dict().items() if k in keys and k not in _NOT_SAVED},
            "embedding": {
                "d_model": body.hidden_size,
                "grid": list(embedding.grid),
                "text_length": embedding.offset.num_embeddings,
                "max_segments": embedding.segment.num_embeddings,
                **({"axes": True} if embedding.axes else {}),
            },
        }
        weights = {k: v.detach().cpu().contiguous() for k, v in _weights(model.backbone, embedding).items()}
        write_whole(folder / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
        write_json(folder / "config.json", config)
        model.tokenizer.save_pretrained(folder)
        (folder / "image").mkdir(exist_ok=True)
        model.images.save_pretrained(folder / "image")


# Bookkeeping fields of transformers; a native body is always a `LlamaForCausalLM`.
_NOT_SAVED = {"transformers_version", "architectures", "model_type", "dtype", "_name_or_path"}


def _weights(body: nn.Module, embedding: nn.Module) -> dict[str, Tensor]:
    """Names in the file: transformers' own for the body, `embedding.…` for the rest."""
    return {**body.state_dict(), **{f"embedding.{k}": v for k, v in embedding.state_dict().items()}}


def _parts(config: dict[str, Any], weights: int, path: Path) -> tuple[LlamaForCausalLM, NativeEmbedding]:
    """The modules that config.json describes. weights: their number, an upper bound of the layers. Only fields of the
    architecture are accepted, not e.g. the name of an attention kernel to download. Raises ValueError."""
    given = config["backbone"]
    if other := sorted(given.keys() - LlamaConfig.__annotations__.keys()):
        raise ValueError(f"{path}: backbone.{other[0]} is not a field of the body's architecture; remove it")
    layers = given.get("num_hidden_layers")
    if not isinstance(layers, int) or not 0 < layers <= weights:
        raise ValueError(f"{path}: backbone.num_hidden_layers is {layers!r}, but the file holds {weights} weights")
    for name, value in {**given, **(given.get("rope_parameters") or {})}.items():
        above = type(value) in (int, float) and not name.endswith("_id") and name != "attention_dropout"
        if (above and value <= 0) or (name == "tie_word_embeddings" and value):
            wanted = "must be above 0" if above else "must be false: the file holds a head of its own"
            raise ValueError(f"{path}: backbone.{name} is {value}; it {wanted}")
    try:
        embedding = NativeEmbedding(**config["embedding"])
        return _body(LlamaConfig(**given), embedding.axes), embedding
    except Exception as error:  # torch and transformers raise many error types
        raise ValueError(f"{path}: {error!r}") from error


def _check_shapes(wanted: dict[str, Tensor], found: dict[str, checkpoint.Weight], folder: Path) -> None:
    path = folder / checkpoint.WEIGHTS
    if set(found) != set(wanted):
        missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        raise ValueError(f"{path}: missing weights {missing[:3]}, unexpected weights {extra[:3]}")
    for name, value in wanted.items():
        if value.shape != found[name].shape:
            raise ValueError(f"{path}: {name} is {found[name].shape}, the config says {tuple(value.shape)}")


# Fields of a spec that do not follow from the tokenizers.
_CHOSEN = {"attention", "pad_policy", "additive_to", "text_begin", "special", "sampler"}


def _check(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, images: PatchVQ, folder: Path) -> None:
    fresh = build_spec(
        tokenizer,
        images.codebook_size,
        spec.image_grid,
        text_length=spec.text_length,
        max_positions=spec.max_positions,
    )
    saved = spec.to_dict()
    for name, value in fresh.to_dict().items():
        if name not in _CHOSEN and value != saved[name]:
            raise ValueError(
                f"{folder}: spec.{name} is {saved[name]}, but the tokenizers say {value}; "
                "the tokenizer files do not belong to this checkpoint"
            )
