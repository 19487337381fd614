"""Write the text tokenizer of the native model: one token a word, for words that the tasks use.

    python tokenizers/native/train_text.py             # a second; nothing is learnt, the vocabulary is a list

The folder loads with transformers' AutoTokenizer, offline. Order of the ids: special tokens, then words; new
words belong at the end, since trained models know words by id.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unidiff.program import run_program
from unidiff.tasks.frozen_lake.board import DIRECTIONS, MAX_SIZE, cell_name
from unidiff.tasks.frozen_lake.task import QUESTION

# A sampled text may hold tokens from <eos> on, and none before: the text range is one run of ids.
# <eot> ends a text after which a picture follows, <eos> the last one; <soi> and <eoi> stand around a picture.
SPECIAL = ("<pad>", "<mask>", "<bos>", "<soi>", "<eoi>", "<unk>", "<eos>", "<eot>")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "text")
    build().save_pretrained(parser.parse_args().out)


def build() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that splits at white space and joins with single spaces."""
    ids = {token: index for index, token in enumerate((*SPECIAL, *words()))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
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


if __name__ == "__main__":
    run_program(main)
