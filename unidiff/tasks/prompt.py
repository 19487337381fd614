"""A row's prompt: from a format string, a list with pictures, a function, or the row's own columns.

    "{question}"                                  a text; {meta.level} reads a nested column
    ["{instruction}", "{image}"]                  texts and pictures; a part "{column}" is that column's own value
    lambda row: ["Solve it.", row["picture"]]     anything
    None                                          the columns `prompt` and `image` or `images`, as in TRL

A picture is a PIL image, a file (relative to the data file), bytes, an array, or an object with "image", "path" or
"bytes". A conversation is a list of {"role", "content"}; its system messages become the system prompt.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unidiff.images.picture import rgb
from unidiff.tasks.sources import column

Template = str | Sequence[str] | Callable[[Mapping[str, Any]], Any] | None
Part = str | Image.Image

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif"}


def build(row: Mapping[str, Any], template: Template, folder: Path) -> tuple[list[Part], str | None]:
    """The parts of a row's prompt, and its system message (None = none). Raises KeyError, TypeError, ValueError or
    FileNotFoundError if the row does not give a prompt."""
    if template is None:
        return _own(row, folder)
    if callable(template):
        made = template(row)
        return _parts([made] if isinstance(made, str) else made, folder), None
    if isinstance(template, str):
        return [_formatted(template, row)], None
    return _parts([_listed(part, row) for part in template], folder), None


def check_template(template: Any) -> None:
    """Raises TypeError or ValueError for an invalid template."""
    if template is None or callable(template):
        return
    parts = [template] if isinstance(template, str) else template
    if not isinstance(parts, list | tuple) or not parts or not all(isinstance(p, str) for p in parts):
        raise TypeError(f"prompt is {template!r}; it must be a format string, a list of them, or a function of a row")
    for part in parts:
        try:
            list(string.Formatter().parse(part))
        except ValueError as error:
            raise ValueError(
                f"prompt {part!r} is not a format string ({error}); write {{{{ and }}}} for braces"
            ) from error


def _formatted(template: str, row: Mapping[str, Any]) -> str:
    out = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        out.append(literal)
        if name is not None:
            value = column(row, name)
            if value is None or _is_picture(value):
                what = "empty" if value is None else "a picture: put it into a list, as in ['…', '{image}']"
                raise ValueError(f"column {name!r} is {what}")
            value = str(value) if conversion == "s" else repr(value) if conversion == "r" else value
            out.append(format(value, spec or ""))
    return "".join(out)


def _listed(part: str, row: Mapping[str, Any]) -> Any:
    """A part of a list: a column's value if the part is only "{column}", otherwise a formatted text."""
    fields = list(string.Formatter().parse(part))
    if len(fields) == 1 and not fields[0][0] and fields[0][1]:
        return column(row, fields[0][1])
    return _formatted(part, row)


def _own(row: Mapping[str, Any], folder: Path) -> tuple[list[Part], str | None]:
    given = column(row, "messages" if "prompt" not in row and "messages" in row else "prompt")
    pictures = row.get("images")
    if pictures is None:
        pictures = row.get("image")
    pictures = [] if pictures is None else pictures if isinstance(pictures, list | tuple) else [pictures]
    shown: list[Part] = [_picture(one, folder) for one in pictures]
    if isinstance(given, list | tuple) and given and all(_is_message(one) for one in given):
        return _conversation(given, shown, folder)
    if isinstance(given, str):
        return [*shown, given], None
    if not isinstance(given, list | tuple):
        raise TypeError(f"column 'prompt' is a {type(given).__name__}; expected a text, a list or messages")
    return [*shown, *_parts(given, folder)], None


def _is_message(one: Any) -> bool:
    return isinstance(one, Mapping) and {"role", "content"} <= one.keys()


def _conversation(messages: Sequence[Any], shown: list[Part], folder: Path) -> tuple[list[Part], str | None]:
    """The user's turn. Conversations of several turns raise ValueError, because no template here supports them."""
    said = [m for m in messages if m["role"] != "system"]
    system = "\n".join(_words(m["content"]) for m in messages if m["role"] == "system") or None
    if [m["role"] for m in said] != ["user"]:
        roles = ", ".join(str(m["role"]) for m in messages)
        raise ValueError(f"messages of {roles}: a prompt is one turn of the user, with a system prompt or without")
    content = said[0]["content"]
    if isinstance(content, str):
        return [*shown, content], system
    waiting = iter(shown)
    parts: list[Part] = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "image" and not {"image", "path", "bytes"} & part.keys():
            found = next(waiting, None)  # TRL's placeholder for a picture of `images`
            if found is None:
                raise ValueError("the message shows more pictures than the column 'images' has")
            parts.append(found)
        else:
            parts += _parts([part], folder)
    return [*waiting, *parts], system


def _words(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if isinstance(part, Mapping) and "text" in part)


def _parts(given: Any, folder: Path) -> list[Part]:
    if not isinstance(given, list | tuple) or not given:
        raise TypeError(f"a prompt is a text, or a list of texts and pictures; got {type(given).__name__}")
    parts: list[Part] = []
    for one in given:
        if isinstance(one, Mapping) and isinstance(one.get("text"), str):
            parts.append(one["text"])
        elif isinstance(one, str) and Path(one).suffix.lower() not in _SUFFIXES:
            parts.append(one)
        elif isinstance(one, list | tuple):
            parts += _parts(one, folder)
        else:
            parts.append(_picture(one, folder))
    return parts


def _is_picture(value: Any) -> bool:
    held = isinstance(value, Mapping) and bool({"image", "path", "bytes"} & value.keys())
    return held or isinstance(value, Image.Image | bytes | np.ndarray)


def _picture(given: Any, folder: Path) -> Image.Image:
    """Opens a picture. Raises TypeError, ValueError or FileNotFoundError if it is not a readable picture."""
    if isinstance(given, Mapping):
        held = next((given[name] for name in ("bytes", "image", "path", "url") if given.get(name) is not None), None)
        if held is None:
            keys = ", ".join(map(str, given)) or "nothing"
            raise TypeError(f"an object with {keys} is not a picture; it needs 'image'")
        return _picture(held, folder)
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim not in (2, 3):
            raise ValueError(
                f"an array of {given.dtype} {list(given.shape)} is not a picture; expected uint8 [H, W, 3]"
            )
        return Image.fromarray(given)
    if isinstance(given, str | Path):
        if str(given).startswith(("http://", "https://", "data:")):
            raise ValueError(f"{str(given)[:60]!r} is an address; download pictures first")
        return rgb(folder / Path(given).expanduser())
    if isinstance(given, bytes | Image.Image):
        return rgb(given)
    raise TypeError(f"a {type(given).__name__} is neither a text nor a picture")


picture = _picture
