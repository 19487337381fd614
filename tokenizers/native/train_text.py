"""Write the text tokenizer of a native model: one token a word, for words that its tasks use.

    python tokenizers/native/train_text.py             # FrozenLake; a second, since the vocabulary is a list
    python tokenizers/native/train_text.py --unified   # pictures, edits, sums, code too, to tokenizers/unified/text
    python tokenizers/native/train_text.py --puzzles   # the puzzles too, to tokenizers/puzzles/text

The folder loads with transformers' AutoTokenizer, offline. Order of the ids: special tokens, then words; new
words belong at the end, since trained models know words by id.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unidiff.program import run_program
from unidiff.tasks import functions
from unidiff.tasks.cells import DIRECTIONS, cell_name
from unidiff.tasks.frozen_lake.board import MAX_SIZE
from unidiff.tasks.frozen_lake.task import QUESTION
from unidiff.tasks.jigsaw import Jigsaw
from unidiff.tasks.maze import Maze
from unidiff.tasks.shapes.prompts import TAGS, all_rows
from unidiff.tasks.shapes.scene import COLOURS, KINDS
from unidiff.tasks.sliding_puzzle import SlidingPuzzle
from unidiff.tasks.sokoban import Sokoban

# A sampled text may hold tokens from <eos> on, and none before: the text range is one run of ids.
# <eot> ends a text after which a picture follows, <eos> the last one; <soi> and <eoi> stand around a picture.
SPECIAL = ("<pad>", "<mask>", "<bos>", "<soi>", "<eoi>", "<unk>", "<eos>", "<eot>")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--unified", action="store_true", help="words of shapes, countdown and functions too")
    kinds.add_argument("--puzzles", action="store_true", help="words of the puzzles too")
    settings = parser.parse_args()
    name = "unified" if settings.unified else "puzzles" if settings.puzzles else "native"
    more = more_words() if settings.unified else puzzle_words() if settings.puzzles else []
    folder = Path(__file__).parent.parent / name / "text"
    build(more, lines=settings.unified).save_pretrained(settings.out or folder)


def build(more: Sequence[str] = (), lines: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that splits at white space and joins with single spaces. more: words besides FrozenLake's.
    lines: a line break is a word too."""
    chosen = [*words(), *more]
    ids = {token: index for index, token in enumerate(dict.fromkeys((*SPECIAL, *chosen)))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lines:
        line = Regex("[ \t]*\n[ \t]*")
        tokenizer.normalizer = normalizers.Replace(line, " \n ")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[ \t]+"), "removed")
        joined = decoders.WordPiece(prefix="##", cleanup=False)
        tokenizer.decoder = decoders.Sequence([joined, decoders.Fuse(), decoders.Replace(" \n ", "\n")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        mask_token="<mask>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<eot>", "<soi>", "<eoi>"],
        clean_up_tokenization_spaces=False,
    )


def words() -> list[str]:
    """The words of questions, moves and answers, the digits, and the names of all cells; each once."""
    cells = [cell_name((row, column)) for row in range(MAX_SIZE) for column in range(MAX_SIZE)]
    numbers = [str(digit) for digit in range(10)]
    return list(dict.fromkeys([*QUESTION.split(), "from", "go", "answer", *DIRECTIONS, *cells, *numbers]))


def puzzle_words() -> list[str]:
    """The words of mazes, Sokoban, sliding puzzles and jigsaws."""
    tasks = [Maze(), Sokoban(), Sokoban(boxes=2), SlidingPuzzle(), Jigsaw()]
    questions = " ".join(str(task.example("train", 0).prompt[0]) for task in tasks)
    return [*questions.split(), *["from", "go", "push", "to", "slide", "swap", "and", "answer"]]


def more_words() -> list[str]:
    """The words of the other tasks: numbers, signs, code, shapes and colours."""
    numbers = [str(number) for number in range(-9, 100)]
    signs = ["make", "so", "+", "-", "*", "=", ",", "(", ")"]
    bodies = [functions.written(family, 1) for family in functions.FAMILIES]
    code = " ".join(["write f so that == and ``` True False [ ] x y xs", *bodies]).replace("\n", " ").split()
    prompts = " ".join(row["prompt"] for tag in TAGS for row in all_rows(tag)).split()
    edits = ["make", "remove", "turn", "move", "the", "into", "a", "left", "right", "up", "down"]
    return ["\n", *numbers, *signs, *code, *prompts, *edits, *KINDS, *COLOURS]


if __name__ == "__main__":
    run_program(main)
