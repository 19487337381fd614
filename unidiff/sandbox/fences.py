"""The code in a text: its fenced blocks, and which of them is the answer. Takes time linear in the text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})(.*)")
PYTHON = frozenset(("python", "python3", "python2", "py", "py3", "ipython", "cpython", "sage"))
DEFINES = re.compile(r"^[ \t]*(?:async[ \t]+def|def|class)[ \t]|\binput\(|\bstdin\b|\bopen\(0", re.MULTILINE)
STATEMENT = re.compile(
    r"^[ \t]*(?:import|from|for|while|if|try|with|return|print\(|[A-Za-z_][\w.]*[ \t]*=[^=])", re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """One fenced block. language: the first word of its info string, in small letters. closed: it has an end."""

    language: str
    code: str
    closed: bool = True


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a text, as Markdown has them: any info string, any indentation; one that is not closed
    reaches to the end."""
    fence: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        found = FENCE.fullmatch(line)
        if fence is None:
            if found and not (found[2][0] == "`" and "`" in found[3]):
                fence, lines = found, []
        elif found and found[2].startswith(fence[2]) and not found[3].strip():
            yield _block(fence, lines)
            fence = None
        else:
            lines.append(line)
    if fence is not None:
        yield _block(fence, lines[:-1] if lines[-1:] == [""] else lines, closed=False)


def _block(fence: re.Match[str], lines: list[str], closed: bool = True) -> Block:
    words = re.findall(r"[\w+#-]+", fence[3][:200].lower())
    margin = len(fence[1])
    kept = [line[min(margin, len(line) - len(line.lstrip(" \t"))) :] for line in lines]
    code = "".join(line + "\n" for line in kept)
    first = next((line for line in kept if line.strip()), "")
    return Block(words[0] if words else "", textwrap.dedent(code) if first[:1] in " \t" else code, closed)


def code_of(text: str, language: frozenset[str] = PYTHON, block: str = "best") -> str:
    """The code of an answer (see `block_of`); the whole text without a fenced block."""
    chosen = block_of(text, language, block)
    return text.replace("\r\n", "\n") if chosen is None else chosen.code


def block_of(text: str, language: frozenset[str] = PYTHON, block: str = "best") -> Block | None:
    """The fenced block that is the answer; None without one.

    Blocks in the language asked for come first, then those without an info string, then the others. block: of these the
    "first", the "last", or the "best": the last that defines something or reads input, since an example of use or what
    it prints often follows; else the last that has a statement; else the last.
    """
    found = list(blocks(text))
    asked = [one for one in found if one.language in language]
    chosen = asked or [one for one in found if not one.language] or found
    if block == "first":
        return chosen[0] if chosen else None
    for looks in (DEFINES, STATEMENT) if block == "best" else ():
        fitting = [one for one in chosen if looks.search(one.code)]
        if fitting:
            return fitting[-1]
    return chosen[-1] if chosen else None
