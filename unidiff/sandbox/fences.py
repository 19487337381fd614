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
    """One fenced block. language: the first word of its info string, in small letters."""

    language: str
    code: str


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
        yield _block(fence, lines[:-1] if lines[-1:] == [""] else lines)


def _block(fence: re.Match[str], lines: list[str]) -> Block:
    words = re.findall(r"[\w+#-]+", fence[3][:200].lower())
    margin = len(fence[1])
    kept = [line[min(margin, len(line) - len(line.lstrip(" \t"))) :] for line in lines]
    code = "".join(line + "\n" for line in kept)
    first = next((line for line in kept if line.strip()), "")
    return Block(words[0] if words else "", textwrap.dedent(code) if first[:1] in " \t" else code)


def code_of(text: str, language: frozenset[str] = PYTHON) -> str:
    """The code of an answer; the whole text without a fenced block.

    Blocks in the language asked for come first, then those without an info string, then the others. Of these the last
    that defines something or reads input, since an example of use or what it prints often follows; else the last that
    has a statement; else the last.
    """
    found = list(blocks(text))
    if not found:
        return text.replace("\r\n", "\n")
    asked = [block for block in found if block.language in language]
    chosen = asked or [block for block in found if not block.language] or found
    for looks in (DEFINES, STATEMENT):
        fitting = [block for block in chosen if looks.search(block.code)]
        if fitting:
            return fitting[-1].code
    return chosen[-1].code
