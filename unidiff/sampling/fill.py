"""Sampling a template's layout: text, text-to-image, understanding, editing, a picture after or beside a text.

    guided = model.template.text_to_image("a red cube on a blue ball", Picture.blank(32, 32))
    (done,) = fill(model, [guided], [noise.key(0)], SamplerConfig(**model.spec.sampler))
    done.picture(model).save("cube.png")

For bidirectional models: the whole layout is visible in every step, including tokens that are still masked. Targets are
filled one text or picture after another, by the same loops as interleaved rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unidiff.attention import additive, pad_bias
from unidiff.canvas import Tokens
from unidiff.images import to_pil
from unidiff.kept_keys import KeptKeys
from unidiff.model import UnifiedModel
from unidiff.sampling.ahead import text_loop
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.denoise import Drawn, Step, denoise_image
from unidiff.sampling.draw import check_drawn
from unidiff.schedules.steering import Steering
from unidiff.sequence import Modality, check_parts
from unidiff.templates import Guided, Layout, Role

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Filled:
    """A layout with sampled targets. ids: [L] int64. step: [L] int64, the denoising step that committed each target,
    -1 elsewhere. probability: [L] float32 of each target then, 1 elsewhere."""

    layout: Layout
    ids: Tensor
    step: Tensor
    probability: Tensor

    def tokens(self, segment: int) -> Tensor:
        """[n] ids of a text or picture of the layout, by its ordinal; without row separators."""
        return self.ids[self.layout.places(segment)]

    def text(self, model: UnifiedModel) -> str:
        """The first sampled text, up to its end token. Raises ValueError if there is none."""
        segment = next((s for s, kind in _targets(self.layout) if kind is Modality.TEXT), None)
        if segment is None:
            raise ValueError("no text was sampled in this layout")
        ids = self.ids[[i for i in self.layout.places(segment) if self.layout.target[i]]]
        end = torch.isin(ids, torch.tensor(model.spec.text_end, dtype=torch.int64))
        return model.decode_text(ids[: int(end.int().argmax())] if bool(end.any()) else ids)

    def picture(self, model: UnifiedModel, grid: tuple[int, int] | None = None) -> Image:
        """The first sampled picture. grid: (rows, columns), if not square. Raises ValueError if there is none."""
        segment = next((s for s, kind in _targets(self.layout) if kind is Modality.IMAGE), None)
        if segment is None:
            raise ValueError("no picture was sampled in this layout")
        tokens = self.tokens(segment)
        side = round(len(tokens) ** 0.5)
        return to_pil(model.decode_pixels(tokens[None], grid or (side, side)))[0]


def fill(
    model: UnifiedModel,
    layouts: Sequence[Guided],
    keys: Sequence[int],
    config: SamplerConfig,
    side_by_side: bool = False,
) -> list[Filled]:
    """Samples the targets of each layout.

    layouts: of one task, with targets of the same kinds and numbers. keys: one noise key per layout. config: a guidance
    scale is used if the layout has the matching unconditional prompt ("prompt", without the whole prompt, counts as
    "text"). side_by_side: a text and a picture take turns, as in MMaDA-Parallel; the picture starts after a quarter of
    the text's steps. With `approximate_cache` each loop keeps its own keys and values, so neither sees the other's new
    tokens until `cache_refresh`. Raises ValueError for a block-causal model, or for layouts that do not match;
    TypeError if an item is not a layout.
    """
    check_parts(layouts, "layouts", Guided)
    if model.spec.attention != "bidirectional":
        raise ValueError(f"family {model.spec.family!r} is block_causal: it writes interleaved rollouts only")
    if len(keys) != len(layouts) or not layouts:
        raise ValueError(f"{len(keys)} keys do not fit {len(layouts)} layouts")
    with torch.no_grad():
        return _Filling(model, layouts, keys, config).run(side_by_side)


def _targets(layout: Layout) -> list[tuple[int, Modality]]:
    """(ordinal, modality) of the texts and pictures to sample, in order."""
    kinds = {layout.segment[i]: layout.role[i] for i in layout.targets()}
    return [(s, Modality.IMAGE if role is Role.IMAGE else Modality.TEXT) for s, role in sorted(kinds.items())]


class _Filling:
    """B layouts on R rows: the layouts, then the same layouts with each unconditional prompt."""

    def __init__(self, model: UnifiedModel, layouts: Sequence[Guided], keys: Sequence[int], config: SamplerConfig):
        self.model, self.config, self.layouts = model, config, [g.conditional for g in layouts]
        self.keys = torch.tensor(keys, dtype=torch.int64, device=model.device)
        scales = {("text" if n == "prompt" else n): n for n in layouts[0].unconditional}
        names = {scales[n]: pair for n, pair in config.scales.items() if n in scales}
        self.scales = list(names.values())
        rows = self.layouts + [g.unconditional[n] for n in names for g in layouts]
        self.targets = _targets(rows[0])
        self.places = [self._places(rows, k) for k in range(len(self.targets))]
        self.tokens, self.mask = self._laid_out(rows)
        count = len(self.layouts)
        self.step = torch.full(self.tokens.shape, -1, device=model.device)[:count]
        self.probability = torch.ones(self.tokens.shape, device=model.device)[:count]

    def _places(self, rows: Sequence[Layout], k: int) -> Tensor:
        """[R, n] columns of the k-th text or picture's targets in every row."""
        columns = []
        for row in rows:
            own = _targets(row)
            if [kind for _, kind in own] != [kind for _, kind in self.targets]:
                raise ValueError("the layouts have targets of different kinds; fill them in separate batches")
            columns.append([i for i in row.places(own[k][0]) if row.target[i]])
        if len({len(c) for c in columns}) > 1:
            raise ValueError(f"the layouts have {sorted({len(c) for c in columns})} targets; fill them one by one")
        return torch.tensor(columns, device=self.model.device)

    def _laid_out(self, rows: Sequence[Layout]) -> tuple[Tokens, Tensor]:
        width = max(map(len, rows))
        if width > self.model.spec.max_positions:
            raise ValueError(f"a layout of {width} ids exceeds the {self.model.spec.max_positions} positions")

        def padded(values: Sequence[Sequence[int]]) -> Tensor:
            return torch.tensor([[*v, *[0] * (width - len(v))] for v in values], device=self.model.device)

        ids, valid = padded([r.ids for r in rows]), padded([r.valid for r in rows]).bool()
        rows_of_head = self.model.spec.logit_rows
        if wrong := ids[(ids < 0) | (ids >= rows_of_head)].tolist():
            raise ValueError(f"a layout has the id {wrong[0]}; the model's are 0 to {rows_of_head - 1}")
        nothing = torch.full_like(ids, -1)
        position = torch.arange(width, device=ids.device).expand_as(ids)
        spec = self.model.spec
        # A template's own pads follow the family's policy; the batch's padding is never attended.
        inside = position < torch.tensor([len(r) for r in rows], device=ids.device)[:, None]
        mask = additive(inside[:, None], self.model.dtype)
        bias = pad_bias(valid, spec.pad_policy, spec.additive_to, self.model.dtype)
        mask = mask if bias is None else torch.maximum(mask + bias, torch.full_like(mask, torch.finfo(mask.dtype).min))
        return Tokens(ids, torch.zeros_like(ids), nothing, position, nothing, nothing, valid), mask

    def run(self, side_by_side: bool) -> list[Filled]:
        loops = [self._loop(k) for k in range(len(self.targets))]
        if side_by_side:
            self._in_turns(loops)
        for loop in loops:
            for _ in loop:
                pass
        check_drawn(self.probability)
        ids = self.tokens.ids[: len(self.layouts)].cpu()
        parts = zip(self.layouts, ids, self.step.cpu(), self.probability.cpu())
        return [Filled(row, *(x[: len(row)] for x in values)) for row, *values in parts]

    def _in_turns(self, loops: list[Iterator[None]]) -> None:
        texts = [loop for loop, (_, kind) in zip(loops, self.targets) if kind is Modality.TEXT]
        images = [loop for loop, (_, kind) in zip(loops, self.targets) if kind is Modality.IMAGE]
        steps = self.config.text_steps
        at = torch.linspace(steps // 4, steps - 1, self.config.image_steps).round().long().tolist()
        for step in range(steps):
            for loop in texts:
                next(loop, None)
            for loop in images * at.count(step):
                next(loop, None)

    def _loop(self, k: int) -> Iterator[None]:
        """Fills the k-th text or picture; yields after each step."""
        (segment, kind), at = self.targets[k], self.places[k]
        drawn = Drawn.nothing(at[: len(self.layouts)], self.model.spec.mask)
        args = self.keys, k, self.config, self.model.spec
        kept = KeptKeys.of(self.config)

        def read(ids: Tensor, step: Step) -> Tensor:
            return self._read(at, ids, kind, step, kept)

        steering = Steering.of(self.model.schedule, kind, self.keys, k, self.config.greedy)
        if kind is Modality.TEXT:
            steps = text_loop(drawn, read, *args, steering)
        else:
            cells = self.layouts[0].places(segment)
            place = torch.tensor([cells.index(i) for i in at[0].tolist()], device=at.device)
            place = place.expand(len(self.layouts), -1)
            valid = torch.ones_like(place, dtype=torch.bool)
            steps = denoise_image(drawn, read, *args, place, valid, len(cells), steering)
        for _ in steps:
            self._show(at, drawn)
            yield
        self._show(at, drawn)

    def _show(self, at: Tensor, drawn: Drawn) -> None:
        """Writes drawn tokens into the shared layout, where all loops see them."""
        rows = len(self.layouts)
        everywhere = drawn.ids.repeat(len(at) // rows, 1)
        self.tokens = self.tokens.with_ids(self.tokens.ids.scatter(1, at, everywhere))
        self.step = self.step.scatter(1, at[:rows], drawn.step)
        self.probability = self.probability.scatter(1, at[:rows], drawn.probability)

    def _read(self, at: Tensor, ids: Tensor, kind: Modality, step: Step, kept: KeptKeys | None) -> Tensor:
        """Log-probabilities at the targets' columns `at` [R, n], for the step's rows with ids [b, n]."""
        scales, count = [pair[kind] for pair in self.scales], len(self.layouts)
        prompts = len(at) // count if any(scales) else 1
        rows = torch.cat([step.rows + i * count for i in range(prompts)])
        tokens, mask, at = self.tokens.rows(rows), self.mask[rows], at[rows]
        tokens, at = tokens.with_ids(tokens.ids.scatter(1, at, ids.repeat(prompts, 1))), at[:, step.at]
        if kept is not None:
            at = kept.choose(step.number, rows, tokens.ids, self.model.spec.mask, at)
            if (columns := kept.run()) is not None:
                tokens = tokens.map(lambda t: t.gather(1, columns))
                if mask.shape[2] > 1:
                    mask = mask.gather(2, columns[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))
        hidden = self.model.hidden(tokens, mask, kept)
        whole, *others = hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[2])).split(len(ids))
        temperature = self.config.text_temperature if kind is Modality.TEXT else self.config.image_temperature
        return self.model.log_probs(whole, kind, temperature, list(zip(scales, others)), count_mask=True)
