"""Edits as picture files: strips (before, mask, after) and animations of the denoising."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw

from unidiff.files import write_whole
from unidiff.report.filters import Edit, edits_of
from unidiff.report.record import RolloutRecord, SegmentRecord

SIDE = 256  # minimum pixels of the longer side of one picture
_GAP, _PAPER = 8, (255, 255, 255)
_MASKED, _STRIPE, _OUTLINE = (57, 65, 77), (107, 118, 134), (255, 214, 10)
_HOLD, _STEP = 1200, 400  # milliseconds


def strip(edit: Edit) -> Image.Image:
    """Before, the mask over it, and after, side by side; for a new picture only mask and after."""
    after = _picture(edit.segment)
    before = after if edit.before is None else _picture(edit.before)
    grid, everything = _grid(edit.segment), [True] * len(edit.segment.tokens)
    masked = edit.segment.edited or everything
    shown = [_veiled(before, masked, grid, outlined=masked), _veiled(after, [], grid, outlined=masked)]
    if edit.before is not None:
        shown.insert(0, before)
    width = sum(p.width for p in shown) + _GAP * (len(shown) - 1)
    out = Image.new("RGB", (width, after.height), _PAPER)
    at = 0
    for picture in shown:
        out.paste(picture, (at, 0))
        at += picture.width + _GAP
    return out


def frames(edit: Edit) -> list[Image.Image]:
    """The picture before (if any), the masked one, and the picture after each denoising step."""
    segment, grid = edit.segment, _grid(edit.segment)
    after, step = _picture(segment), segment.step or [-1] * len(segment.tokens)
    shown = [] if edit.before is None else [_picture(edit.before)]
    for done in range(segment.steps + 1):
        shown.append(_veiled(after, [s >= done for s in step], grid, outlined=segment.edited or []))
    return shown


def write_strips(folder: str | os.PathLike[str], name: str, record: RolloutRecord) -> list[Path]:
    """Writes one PNG per edit, NAME-edit-1.png and so on; returns the paths."""
    paths = []
    for i, edit in enumerate(edits_of(record), 1):
        paths.append(_made(Path(folder) / f"{name}-edit-{i}.png"))
        content = strip(edit)
        write_whole(paths[-1], lambda draft, content=content: content.save(draft, "PNG"))
    return paths


def write_animation(path: str | os.PathLike[str], record: RolloutRecord) -> Path | None:
    """Writes all edits of a rollout, one after another, as a looping GIF; returns None if it drew nothing."""
    shown, times = [], []
    for edit in edits_of(record):
        own = frames(edit)
        shown += own
        times += [_STEP] * (len(own) - 1) + [_HOLD]
    if not shown:
        return None
    path = _made(Path(path))
    shown = [_fitted(frame, shown[0].size).quantize(128) for frame in shown]
    options = {"save_all": True, "append_images": shown[1:], "duration": times, "loop": 0, "disposal": 1}
    write_whole(path, lambda draft: shown[0].save(draft, "GIF", **options))
    return path


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _grid(segment: SegmentRecord) -> tuple[int, int]:
    assert segment.grid is not None  # a picture has one
    return segment.grid


def _picture(segment: SegmentRecord) -> Image.Image:
    """The picture, enlarged by a whole factor, so that token edges stay sharp."""
    picture = Image.open(io.BytesIO(segment.picture or b"")).convert("RGB")
    factor = max(1, -(-SIDE // max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _fitted(frame: Image.Image, size: tuple[int, int]) -> Image.Image:
    return frame if frame.size == size else frame.resize(size, Image.Resampling.NEAREST)


def _veiled(picture: Image.Image, masked: list[bool], grid: tuple[int, int], outlined: Iterable[bool]) -> Image.Image:
    """The picture with masked tokens hatched, and a yellow outline around the tokens of `outlined`."""
    out = picture.copy()
    draw = ImageDraw.Draw(out)
    boxes = _boxes(picture.size, grid)
    for box, is_masked in zip(boxes, masked):
        if is_masked:
            draw.rectangle(box, fill=_MASKED)
            left, top, right, bottom = box
            for at in range(0, right - left, 6):
                draw.line((left + at, bottom, min(left + at + bottom - top, right), top + max(0, at)), fill=_STRIPE)
    inside = list(outlined)
    rows, columns = grid
    for i, (left, top, right, bottom) in enumerate(boxes if any(inside) else []):
        if not inside[i]:
            continue
        row, column = divmod(i, columns)
        if row == 0 or not inside[i - columns]:
            draw.line((left, top, right, top), fill=_OUTLINE, width=3)
        if row == rows - 1 or not inside[i + columns]:
            draw.line((left, bottom, right, bottom), fill=_OUTLINE, width=3)
        if column == 0 or not inside[i - 1]:
            draw.line((left, top, left, bottom), fill=_OUTLINE, width=3)
        if column == columns - 1 or not inside[i + 1]:
            draw.line((right, top, right, bottom), fill=_OUTLINE, width=3)
    return out


def _boxes(size: tuple[int, int], grid: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Pixels (left, top, right, bottom, both ends inside) of each token."""
    rows, columns = grid
    across = [round(i * size[0] / columns) for i in range(columns + 1)]
    down = [round(i * size[1] / rows) for i in range(rows + 1)]
    return [(across[c], down[r], across[c + 1] - 1, down[r + 1] - 1) for r in range(rows) for c in range(columns)]
