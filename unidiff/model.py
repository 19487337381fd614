"""UnifiedModel: one wrapper for text and image tokens in one masked sequence.

The backbone is a transformers decoder without a causal mask. `score` gives all log-probabilities of training: of the
old, the reference and the new policy. Sampling uses the same hidden states and the same rows of the head, so the
distribution that is scored is the one that was sampled from.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL.Image import Image, Resampling
from torch import LongTensor, Tensor, nn

from unidiff import prompts
from unidiff.attention import (
    Context,
    additive,
    before_last_sampled,
    cut_after_segments,
    like_lengths,
    noisy_copies,
    pad_bias,
    seen_clean_and_noisy,
)
from unidiff.canvas import Canvas, Tokens, render
from unidiff.guidance import Guidance
from unidiff.head import float32_logits, target_log_probs
from unidiff.images.picture import rgb
from unidiff.images.pixels import to_pil, to_pixels
from unidiff.images.preprocess import Preprocess
from unidiff.plain_text import PlainText
from unidiff.schedules import saved
from unidiff.sequence import Interleaved, Locate, Modality, Prompt, Segment, Writes, check_parts, check_writes
from unidiff.spec import ModelSpec
from unidiff.templates import PromptTemplate

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from unidiff.images.tokenizer import ImageTokenizer
    from unidiff.kept_keys import KeptKeys
    from unidiff.schedules import Schedule

# Hidden states [P, d] of the scored tokens, and the index of each: mask, row and column, all [P].
_States = tuple[Tensor, tuple[Tensor, ...]]


class UnifiedModel(nn.Module):
    """A masked-diffusion model of interleaved text and images.

    backbone: a transformers causal-LM module with `.model` (body) and `.lm_head`.
    tokenizer: None = ids only. images: None = a text-only model.
    embedding: the family's own input embedding `(tokens, table) -> [B, N, d]`; None = the plain token table. If it has
    a `grid`, it embeds images of that grid only.
    template: how the family writes prompts (see `PromptTemplate`); None = texts and images as they are.
    preprocess: how the family prepares pictures, by task; "default" is used for a task that is not listed.
    schedule: a trained sampling schedule (see `unidiff.schedules`); None = the sampler's settings. It may be set at
    any time. Its parameters are not part of the policy's.
    """

    def __init__(
        self,
        backbone: Any,
        spec: ModelSpec,
        tokenizer: PreTrainedTokenizerBase | None,
        images: ImageTokenizer | None,
        embedding: nn.Module | None = None,
        template: PromptTemplate | None = None,
        preprocess: Mapping[str, Preprocess] | None = None,
    ) -> None:
        super().__init__()
        rows = backbone.lm_head.weight.shape[0]
        if rows != spec.logit_rows:
            raise ValueError(f"ModelSpec.logit_rows is {spec.logit_rows}, but the head has {rows} rows")
        self.backbone = backbone
        self.embedding = embedding
        self.spec = spec
        self.tokenizer: Any = tokenizer
        self._plain = None if tokenizer is None else PlainText(tokenizer, spec)
        self.template = template
        self.preprocess = preprocess or {}
        # Lists hide them from nn.Module: the VQ tokenizer and the schedule are not part of the policy's parameters.
        self._images, self._schedule = [images], [cast("Schedule | None", None)]

    @property
    def images(self) -> Any:
        return self._images[0]

    @property
    def schedule(self) -> Schedule | None:
        return self._schedule[0]

    @schedule.setter
    def schedule(self, schedule: Schedule | None) -> None:
        self._schedule[0] = None if schedule is None else schedule.to(self.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "schedule":  # nn.Module would register it as a submodule
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def body(self) -> Any:
        """The backbone without its head."""
        return self.backbone.get_decoder() if hasattr(self.backbone, "get_decoder") else self.backbone.model

    @property
    def device(self) -> torch.device:
        return self.backbone.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.lm_head.weight.dtype

    # ---------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        family: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> UnifiedModel:
        """Loads a checkpoint folder, or a repository of the Hugging Face hub by name.

        options: fields of `ModelSpec` that replace the checkpoint's. Published families also take device_map (instead
        of device) and image_tokenizer (its folder, if it is elsewhere). Raises FileNotFoundError if files are missing,
        ValueError if no family recognises the checkpoint or its parts disagree.
        """
        from unidiff.families import registry

        model = registry.load(path, family, dtype, options)
        model.schedule = saved.load(registry.folder_of(path))
        return (model if options.get("device_map") else model.to(device)).eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a folder in the family's published layout."""
        from unidiff.families import registry

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        registry.FAMILIES[self.spec.family].save(self, folder)
        saved.save(self.schedule, folder)

    def to(self, *args: Any, **kwargs: Any) -> UnifiedModel:
        super().to(*args, **kwargs)
        if self.images is not None:
            self._images[0] = self.images.to(self.device)  # device only: it stays in float32
        self.schedule = self.schedule
        return self

    # ---------------------------------------------------------------- encoding and decoding

    def encode_text(self, text: str) -> LongTensor:
        """int64 ids [n] of a text, without special tokens. Raises ValueError if the text is empty."""
        if self._plain is None or not (ids := self._plain(text)):
            raise ValueError(f"the text {text!r} has no tokens" if self._plain else "the model has no tokenizer")
        return torch.tensor(ids, dtype=torch.int64)  # type: ignore[return-value]

    def encode_images(self, images: Sequence[Image]) -> list[tuple[LongTensor, tuple[int, int]]]:
        """Tokens [n] in the model's vocabulary, and the grid, of each image. All images must have one size."""
        check_parts(images, "images")
        self._needs_images()
        with torch.no_grad():
            codes = self.images.encode(to_pixels(list(images)).to(self.device)).cpu()
        grid = (codes.shape[1], codes.shape[2])
        return [(c.flatten() + self.spec.image_offset, grid) for c in codes]  # type: ignore[misc]

    def encode(self, parts: Sequence[str | Image | Segment], prompt: bool = True) -> Interleaved:
        """Texts and PIL images -> a sequence. A prompt is written with the family's template. A response
        (`prompt=False`) may also contain segments; see `prompts.encode_response`."""
        if prompt:
            return self.encode_prompt(parts).whole  # type: ignore[arg-type]
        return prompts.encode_response(self, parts)

    def encode_prompt(
        self,
        parts: Sequence[str | Image],
        left_out: Sequence[str] = (),
        writes: Writes = "interleaved",
        *,
        system: str | None = None,
        room: int | None = None,
        prepare: str | None = None,
        locate: Locate | None = None,
    ) -> Prompt:
        """Encodes texts and PIL images as a prompt for a kind of response.

        left_out: "text", "image" or both. For each, guidance gets a second prompt without that modality, made by the
        family's template or by putting the mask token in place of every such token. writes, room, locate: see `Prompt`.
        system: the system message; None = the family's own. prepare: the family's rule for pictures of any size and
        mode (see `prepare`); None = they already fit the model. Raises TypeError if `parts` is not a list of parts,
        ValueError for a response that the family cannot write, an edit without a picture, or a prompt that is too long.
        """
        check_parts(parts)
        given = [self.prepare(p, prepare) if prepare and not isinstance(p, str) else p for p in parts]
        asked = prompts.Asked(check_writes(writes), system, room, locate)
        return prompts.encode(self, given, left_out, asked)

    def prepare(self, picture: str | Path | bytes | Image, task: str = "default") -> Image:
        """Prepares a picture of any size and mode, or its file (see `images.picture.rgb`), by the family's rule for a
        task ("default", "understand", "document"). Without a rule the whole picture is resized to the size that the
        family draws. Raises ValueError for a text-only family, and for a picture that is unreadable or too small."""
        self._needs_images()
        if self.preprocess:
            return self.preprocess.get(task, self.preprocess["default"]).image(picture)
        rows, columns = self.spec.image_grid
        size = (columns * self.images.factor, rows * self.images.factor)
        return rgb(picture).resize(size, Resampling.LANCZOS)

    def _needs_images(self) -> None:
        if self.images is None:
            raise ValueError(f"family {self.spec.family} is one of text alone: it takes no images")

    def decode_text(self, tokens: Tensor) -> str:
        """Text of ids [n], without its end token."""
        end = torch.tensor(self.spec.text_end, device=tokens.device)
        return str(self.tokenizer.decode(tokens[~torch.isin(tokens, end)].tolist()))

    def decode_pixels(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image ids [..., n] of one grid -> pixels [..., 3, H, W] in [0, 1]."""
        codes = self.spec.codes(tokens).reshape(-1, *grid).to(self.device)
        with torch.no_grad():
            pixels = self.images.decode(codes)
        return pixels.reshape(*tokens.shape[:-1], *pixels.shape[1:])

    def decode(self, sequence: Interleaved) -> list[str | Image]:
        """A sequence as texts and PIL images."""
        parts: list[str | Image] = []
        for segment in sequence:
            if segment.modality is Modality.TEXT:
                parts.append(self.decode_text(segment.tokens))
            else:
                assert segment.grid is not None
                parts.extend(to_pil(self.decode_pixels(segment.tokens[None], segment.grid)))
        return parts

    def render(self, rows: Sequence[Interleaved]) -> Canvas:
        """Lays sequences out as a batch on the model's device."""
        canvas = render(rows, self.spec, self.device)
        if canvas.shape[1] > self.spec.max_positions:
            raise ValueError(f"a sequence of {canvas.shape[1]} tokens exceeds the {self.spec.max_positions} positions")
        grid = getattr(self.embedding, "grid", None)
        grids = {s.grid for row in rows for s in row if s.grid is not None}
        if grid is not None and (others := grids - {tuple(grid)}):
            raise ValueError(f"the model embeds images of {tuple(grid)} tokens, not of {sorted(others)}; resize them")
        return canvas

    # ---------------------------------------------------------------- forward passes

    def compile_layers(self) -> None:
        """Compiles each layer of the body with torch.compile, once for all batch sizes and lengths. The first pass
        takes a minute; results differ by rounding. Weight names and saved files do not change."""
        for layer in self.body.layers:
            layer.compile(dynamic=True)

    def embed(self, tokens: Tokens) -> Tensor:
        table = self.backbone.get_input_embeddings()
        return table(tokens.ids) if self.embedding is None else self.embedding(tokens, table)

    def positions(self, tokens: Tokens) -> Tensor:
        """Positions for the rotary embedding: the index in the sequence [B, N], or the family embedding's own."""
        own = getattr(self.embedding, "positions", None)
        return tokens.position if own is None else own(tokens)

    def hidden(self, tokens: Tokens, mask: Tensor | None, cache: Any = None) -> Tensor:
        """Final hidden states [B, Q, d] of tokens [B, Q] under an additive mask [B, 1, Q, K]; None = every token sees
        every other."""
        body = self.body
        return body(
            inputs_embeds=self.embed(tokens),
            attention_mask=mask,
            position_ids=self.positions(tokens),
            use_cache=False,
            **({} if cache is None else {_cache_name(type(body)): cache}),
        ).last_hidden_state

    def begin(self, capacity: int, cache: bool = True) -> Context:
        """An empty context for sampling, with room for `capacity` tokens per row."""
        layers = self.backbone.config.num_hidden_layers
        return Context(layers, capacity, cache, self.spec.attention == "bidirectional")

    @torch.no_grad()
    def read(self, context: Context, block: Tokens, kept: KeptKeys | None = None) -> Tensor:
        """Hidden states [B, n, d] of a block that follows the context, which does not change. With `kept`, only those
        of the block's columns that are recomputed."""
        query, mask = context.inputs(block, self.dtype, kept)
        hidden = self.hidden(query, mask, kept or context.cache)
        return hidden if kept is not None and kept.columns is not None else hidden[:, -block.shape[1] :]

    def write(self, context: Context, block: Tokens) -> None:
        """Appends a finished block to the context."""
        if context.cache is not None:
            self.read(context, block)
        context.append(block)

    def log_probs(
        self,
        hidden: Tensor,
        modality: Modality,
        temperature: float | Tensor = 1.0,
        guidance: Sequence[tuple[float, Tensor]] = (),
        count_mask: bool = False,
    ) -> Tensor:
        """float32 log-probabilities [..., rows] over a modality's own range of ids.

        A token is never the mask, so a mask id in the range gets probability 0. temperature: a number, or [..., 1];
        0 is taken as 1, as greedy choice does not depend on it.
        guidance: scale s and hidden states [..., d] for each prompt that leaves something out; see `unidiff.guidance`.
        count_mask: the mask id keeps its probability.
        """
        low, high = self.spec.range_of(modality)
        rows = self.backbone.lm_head.weight[low:high]
        logits = float32_logits(hidden, rows)
        if guidance:
            logits = logits * (1 + sum(scale for scale, _ in guidance))
            for scale, other in guidance:
                logits = logits - scale * float32_logits(other, rows)
        if low <= self.spec.mask < high and not count_mask:
            logits[..., self.spec.mask - low] = -torch.inf
        if not isinstance(temperature, Tensor):
            temperature = temperature or 1.0
        return (logits / temperature).log_softmax(-1)

    def logits(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Full logits [B, L, V] of plain ids [B, L] under full attention: for tests and parity only.

        valid: [B, L], False or 0 = pad; the spec's `pad_policy` says what a pad does.
        """
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.bool()
        nothing = torch.full_like(ids, -1)
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        tokens = Tokens(ids, torch.zeros_like(ids), nothing, position, nothing, nothing, valid)
        mask = pad_bias(valid, self.spec.pad_policy, self.spec.additive_to, self.dtype)
        if mask is None:
            mask = additive(torch.ones_like(valid)[:, None], self.dtype)
        return self.backbone.lm_head(self.hidden(tokens, mask))

    def score(
        self,
        canvas: Canvas,
        mask: Tensor,
        hide: Tensor | None = None,
        temperature: tuple[float, float] | Tensor = (1.0, 1.0),
        guidance: Guidance | None = None,
        scored: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities of sampled tokens, each masked in its segment's noisy copy.

        canvas: [B, L]. mask: [B, L] bool, a subset of `canvas.sampled`: the tokens to mask; or [K, B, L], K masks of
        the same sequences. hide: [B, L] bool, clean tokens that are also replaced by the mask token (a perturbed
        prompt), or None. temperature: (text, image), or float32 [B, L] per token. guidance: the prompts that the logits
        are compared with; `hide` does not apply to them. scored: bool, like `mask`: the masked tokens to score;
        None = all. Returns float32 like `mask`, 0 where nothing is scored.

        One forward pass, and one for each canvas of the guidance. Block-causal: a row is the clean sequence, once for
        all masks, followed by noisy copies of the segments that have scored tokens. Bidirectional: one row for each
        such segment and mask, cut after that segment. Logits are computed only at scored positions, over the rows of
        their modality, in chunks.
        """
        if mask.shape[-2:] != canvas.shape or mask.dim() not in (2, 3):
            raise ValueError(f"score: mask has shape {tuple(mask.shape)}, the canvas {tuple(canvas.shape)}")
        if bool((mask & ~canvas.sampled).any()):
            raise ValueError("score: mask holds tokens that were not sampled; mask & canvas.sampled is what you want")
        scored = mask if scored is None else scored
        if scored.shape != mask.shape or bool((scored & ~mask).any()):
            raise ValueError("score: scored must be like mask, and hold masked tokens only")
        mask_KBL, scored_KBL = mask.reshape(-1, *canvas.shape), scored.reshape(-1, *canvas.shape)
        hidden, place = self._states(canvas, mask_KBL, scored_KBL, hide)
        compared = []
        if guidance is not None:
            masks = zip(guidance.canvases, guidance.masks(canvas, mask_KBL), guidance.masks(canvas, scored_KBL))
            compared = [(self._states(other, *there), other.modality) for other, *there in masks]
        out = hidden.new_zeros(mask_KBL.shape, dtype=torch.float32)
        modalities = canvas.modality[place[1:]]
        for modality in Modality if self.spec.codebook_size else (Modality.TEXT,):
            own = modalities == modality
            where = tuple(index[own] for index in place)
            guides = [] if guidance is None else guidance.of_modality(modality)
            # A guidance canvas differs only in its prompts, so it has the same scored tokens in the same order.
            terms = []
            for k, scale in guides:
                (others, there), kind = compared[k]
                terms.append((scale, others[kind[there[1:]] == modality]))
            target = canvas.ids[where[1:]]
            warmth = temperature[where[1:]] if isinstance(temperature, Tensor) else temperature[modality]
            log_probs = functools.partial(self.log_probs, modality=modality)
            values = target_log_probs(log_probs, hidden[own], target, self.spec.range_of(modality), warmth, terms)
            out = out.index_put(where, values)
        return out.reshape(mask.shape)

    def _states(self, canvas: Canvas, mask_KBL: Tensor, scored_KBL: Tensor, hide: Tensor | None = None) -> _States:
        canvas, width = canvas.trimmed()
        mask_KBL, scored_KBL = mask_KBL[..., :width], scored_KBL[..., :width]
        if hide is not None:
            clean = canvas.clean.with_ids(canvas.clean.ids.masked_fill(hide[:, :width], self.spec.mask))
            canvas = dataclasses.replace(canvas, clean=clean)
        bidirectional = self.spec.attention == "bidirectional"
        return (self._cut_states if bidirectional else self._copy_states)(canvas, mask_KBL, scored_KBL)

    def _copy_states(self, canvas: Canvas, mask_KBL: Tensor, scored_KBL: Tensor) -> _States:
        """Block-causal: one row per sequence: the clean sequence, then noisy copies of the scored segments."""
        noisy, source, copy, scored = noisy_copies(canvas, mask_KBL, scored_KBL, self.spec.mask)
        clean = before_last_sampled(canvas)
        seen = additive(seen_clean_and_noisy(clean, noisy, copy), self.dtype)
        hidden = self.hidden(Tokens.cat([clean, noisy]), seen)[:, clean.shape[1] :]
        row, column = scored.nonzero(as_tuple=True)
        return hidden[row, column], (copy[row, column], row, source[row, column])

    def _cut_states(self, canvas: Canvas, mask_KBL: Tensor, scored_KBL: Tensor) -> _States:
        """Bidirectional: one row per segment and mask, cut after the segment; rows of similar length run together."""
        tokens, source, scored, owner = cut_after_segments(canvas, mask_KBL, scored_KBL, self.spec.mask)
        parts, places = [], []
        lengths = tokens.valid.sum(1).tolist()
        for rows in like_lengths(lengths):  # so that little padding is computed
            index = torch.tensor(rows, device=tokens.ids.device)
            own = tokens.rows(index)
            width = max(1, *(lengths[row] for row in rows))
            own = own.columns(slice(width))
            alike = all(lengths[row] == width for row in rows)  # no mask is needed, so faster kernels can run
            mask = None if alike else additive(own.valid[:, None], self.dtype)
            row, column = scored[index, : own.shape[1]].nonzero(as_tuple=True)
            parts.append(self.hidden(own, mask)[row, column])
            places.append(index[row] * tokens.shape[1] + column)
        hidden = torch.cat(parts)[torch.cat(places).argsort()]
        row, column = scored.nonzero(as_tuple=True)
        return hidden, (*(index[row] for index in owner), source[row, column])

    forward = score  # so that wrappers (DDP, FSDP) see the pass whose gradients they reduce


@functools.cache
def _cache_name(body: type) -> str:
    """The body's argument for a cache: `cache`, or `past_key_values` up to transformers 5.23."""
    names = inspect.signature(body.forward).parameters
    return "cache" if "cache" in names else "past_key_values"
