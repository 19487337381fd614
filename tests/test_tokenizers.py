"""The tokenizers that ship: what stands in tokenizers/native does what its card says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.tables import each
from unidiff.images import to_pil, to_pixels
from unidiff.images.patch_vq import PatchVQ
from unidiff.tasks import FrozenLake
from unidiff.tasks.frozen_lake.board import Board, board_classes
from unidiff.tasks.frozen_lake.render import draw

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "tokenizers" / "native"


@pytest.fixture(scope="module")
def image_tokenizer() -> PatchVQ:
    return PatchVQ.from_pretrained(NATIVE / "image")


@pytest.fixture(scope="module")
def text_tokenizer():
    return AutoTokenizer.from_pretrained(NATIVE / "text", local_files_only=True)


def _pixels(classes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(draw(classes)).permute(0, 3, 1, 2).float() / 255


# --- pictures -------------------------------------------------------------------------------------


def test_held_out_boards_survive_encode_and_decode(image_tokenizer):
    task, rng = FrozenLake(), np.random.default_rng(0)
    boards = [task.example("test", index).board for index in range(128)]
    classes = np.stack([board_classes(board, tuple(rng.integers(4, size=2))) for board in boards])
    pixels = _pixels(classes)
    decoded = image_tokenizer.decode(image_tokenizer.encode(pixels))
    parsed = task.parse(np.stack([np.asarray(image) for image in to_pil(decoded)]))
    assert (parsed == classes).all((1, 2)).mean() >= 0.99
    assert -10 * torch.log10((decoded - pixels).square().mean()) > 30


def test_moving_the_agent_changes_no_token_elsewhere(image_tokenizer):
    board = FrozenLake().example("test", 0).board
    cells = [(row, column) for row in range(4) for column in range(4)]
    classes = np.stack([board_classes(board, cell) for cell in cells])
    empty = image_tokenizer.encode(_pixels(board_classes(board, None)[None]))
    changed = (image_tokenizer.encode(_pixels(classes)) != empty).numpy().reshape(16, 4, 2, 4, 2).any((2, 4))
    expected = np.zeros((16, 4, 4), bool)
    for index, cell in enumerate(cells):
        expected[index][cell] = True
    assert (changed == expected).all()


def test_every_patch_has_a_code_of_its_own(image_tokenizer):
    """So a token says exactly which patch it stands for, and a board's tokens are a function of its cells."""
    classes = np.arange(8).repeat(16).reshape(8, 4, 4)
    pixels = draw(classes)
    patches = pixels.reshape(8, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(-1, 192)
    _, patch = np.unique(patches, axis=0, return_inverse=True)
    codes = image_tokenizer.encode(_pixels(classes)).flatten().tolist()
    assert len(set(zip(patch.tolist(), codes))) == len(set(patch.tolist())) == len(set(codes))


def test_metrics_meet_the_card():
    metrics = json.loads((NATIVE / "image" / "metrics.json").read_text())
    assert metrics["boards_read_back"] >= 0.99 and metrics["tokens_leaked_by_a_move"] == 0
    assert metrics["test_boards"] >= 1000


def test_larger_boards_are_encoded_too(image_tokenizer):
    task = FrozenLake(size=8)
    example = task.example("test", 0)
    decoded = image_tokenizer.decode(image_tokenizer.encode(to_pixels([task.render(example.board, (0, 0))])))
    parsed = task.parse(np.asarray(to_pil(decoded)[0])[None])[0]
    assert (parsed == board_classes(example.board, (0, 0))).all()


# --- text -----------------------------------------------------------------------------------------


@each(
    "text",
    [
        "from b2 go right to b3",
        "answer right right down",
        "find a safe way to the goal",
        "from h8 go up to g8",
    ],
)
def test_text_round_trip(text_tokenizer, text):
    ids = text_tokenizer(text)["input_ids"]
    assert len(ids) == len(text.split())
    assert text_tokenizer.decode(ids) == text
    assert text_tokenizer.unk_token_id not in ids


def test_every_text_of_the_task_is_covered(text_tokenizer):
    task = FrozenLake(size=8, max_distance=10)
    example = task.example("train", 0)
    texts = [part for part in (*example.prompt, *task.demonstration(example)) if isinstance(part, str)]
    ids = text_tokenizer(texts)["input_ids"]
    assert text_tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert [text_tokenizer.decode(row) for row in ids] == texts


def test_special_tokens(text_tokenizer):
    ids = text_tokenizer.get_vocab()
    special = {"<pad>", "<mask>", "<bos>", "<eos>", "<eot>", "<soi>", "<eoi>", "<unk>"}
    assert {ids[token] for token in special} == set(range(8))  # they stand first
    assert special == set(text_tokenizer.all_special_tokens)
    assert sorted(ids.values()) == list(range(len(text_tokenizer)))
    assert text_tokenizer.mask_token == "<mask>" and text_tokenizer.pad_token == "<pad>"
    assert text_tokenizer.bos_token == "<bos>" and text_tokenizer.eos_token == "<eos>"
    assert text_tokenizer("answer zebra<eos>")["input_ids"][1:] == [ids["<unk>"], ids["<eos>"]]
    assert text_tokenizer.decode([ids["answer"], ids["up"], ids["<eos>"]], skip_special_tokens=True) == "answer up"


@pytest.mark.slow
def test_shipped_text_tokenizer_is_what_its_script_writes(tmp_path):
    subprocess.run([sys.executable, NATIVE / "train_text.py", "--out", tmp_path], check=True, cwd=ROOT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((NATIVE / "text" / name).read_text())


# --- the folder -----------------------------------------------------------------------------------


def test_folder_does_not_hide_the_tokenizers_library():
    assert not list((ROOT / "tokenizers").rglob("__init__.py"))
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import tokenizers, transformers\n"
        "assert tokenizers.Tokenizer and 'site-packages' in tokenizers.__file__, tokenizers.__file__\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.slow
def test_training_writes_a_loadable_tokenizer(tmp_path):
    command = [NATIVE / "train_image.py", "--out", tmp_path, "--steps", "2", "--batch", "2"]
    sizes = ["--train-boards", "4", "--test-boards", "4"]
    subprocess.run([sys.executable, *command, *sizes], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 2
    assert PatchVQ.from_pretrained(tmp_path).codebook_size == 128


def test_board_of_the_card_has_distinct_tiles(image_tokenizer):
    """The agent on ice, start, goal or hole gives four different groups of tokens."""
    board = Board(("SFFF", "FHFF", "FFFF", "FFFG"))
    groups = set()
    for cell in ((0, 0), (0, 2), (1, 1), (3, 3)):  # all on the same shade of ice
        row, column = 2 * cell[0], 2 * cell[1]
        ids = image_tokenizer.encode(_pixels(board_classes(board, cell)[None]))[0]
        groups.add(tuple(ids[row : row + 2, column : column + 2].flatten().tolist()))
    assert len(groups) == 4
