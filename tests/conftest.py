"""Fixtures: the task, and a tiny native model with random weights whose distributions are far from uniform.

Random weights make strict tests: every token, position and mask counts, and nothing is likely a priori.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import random
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest runs a process a core
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: tests never ask the network

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from unidiff import noise
from unidiff.families import native
from unidiff.images.patch_vq import PatchVQ
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.edit import Locate
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sandbox import namespaces_refused
from unidiff.sequence import Interleaved, Modality, Segment
from unidiff.spec import ModelSpec
from unidiff.tasks import FrozenLake

# A shell's background job ignores SIGINT, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ("find a safe way to the goal", "find the goal", "go", "find a safe way")


@pytest.fixture(scope="session")
def program() -> Callable[[str], ModuleType]:
    """program("tools/bench.py") -> a file of the repository as a module, always the same one."""

    def load(place: str) -> ModuleType:
        path = ROOT / place
        spec = importlib.util.spec_from_file_location(f"_program_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for the types of their fields
        spec.loader.exec_module(module)
        return module

    return functools.cache(load)


@pytest.fixture(scope="session")
def checkpoints(program: Callable[[str], ModuleType]) -> ModuleType:
    """tests/families/checkpoints.py: `checkpoints.make_checkpoint(family, folder)` and more."""
    return program("tests/families/checkpoints.py")


@pytest.fixture(scope="session")
def published(checkpoints: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """published(family) -> a tiny checkpoint in published layout. Tests do not change it."""
    return functools.cache(lambda family: checkpoints.make_checkpoint(family, tmp_path_factory.mktemp(family)))


@pytest.fixture
def namespaces() -> None:
    """Skips the test where the system refuses namespaces."""
    if refused := namespaces_refused():
        pytest.skip(f"the system refuses namespaces: {refused}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(bytes) -> the folder of a disk of that size, which another call resizes. Skips where this user may not
    mount."""
    place = tmp_path / "disk"

    def sized(size: int) -> Path:
        how = ["-o", f"remount,size={size}"] if place.exists() else ["-t", "tmpfs", "-o", f"size={size}"]
        place.mkdir(exist_ok=True)
        if os.geteuid() or subprocess.run(["mount", *how, "tmpfs", place], capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        return place

    yield sized
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / "tokenizers/native/text")


@pytest.fixture(scope="session")
def images() -> PatchVQ:
    return PatchVQ.from_pretrained(ROOT / "tokenizers/native/image")


@pytest.fixture(scope="session")
def task() -> FrozenLake:
    return FrozenLake()


@pytest.fixture(scope="session")
def build_model(tokenizer: PreTrainedTokenizerBase, images: PatchVQ) -> Callable[..., UnifiedModel]:
    """build_model(seed) -> a fresh sharp model in float32."""

    def build(seed: int = 0, axes: bool = False) -> UnifiedModel:
        model = native.build(tokenizer, images, d_model=32, layers=2, heads=2, d_mlp=48, axes=axes, seed=seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 2:
                    spread = {"lm_head": 2.0, "embed_tokens": 5.0, "previous": 1.0, "embedding": 2.0}
                    gain = next((g for part, g in spread.items() if part in name), 1.0)
                    weight.mul_(gain * weight.shape[1] ** -0.5 / weight.std())
        return model.eval()

    return build


@pytest.fixture(scope="session")
def raw_prompts(build_model: Callable[..., UnifiedModel], task: FrozenLake) -> list[Interleaved]:
    encode = build_model().encode
    return [encode([question, task.example("train", i).prompt[1]]) for i, question in enumerate(QUESTIONS)]


@pytest.fixture(scope="session")
def lean(raw_prompts: list[Interleaved]) -> Callable[[UnifiedModel, dict[int, float]], UnifiedModel]:
    """lean(model, {id: bonus}) -> a copy that gives these text tokens about so much more (or less) logit."""

    def leaning(model: UnifiedModel, bonus: dict[int, float]) -> UnifiedModel:
        model = copy.deepcopy(model)
        canvas = model.render(
            [Interleaved((*p, Segment(Modality.TEXT, torch.tensor([model.spec.image_next])))) for p in raw_prompts]
        )
        noisy = canvas.noisy.with_ids(torch.full_like(canvas.noisy.ids, model.spec.mask))
        context = model.begin(0, cache=False)
        context.append(canvas.clean.columns(slice(-1)))
        mean = model.read(context, noisy).mean((0, 1))  # the part that all hidden states share serves as a bias
        with torch.no_grad():
            for token, value in bonus.items():
                model.backbone.lm_head.weight[token] += value * mean / mean.square().sum()
        return model

    return leaning


@pytest.fixture(scope="session")
def model(build_model: Callable[..., UnifiedModel], lean: Callable[..., UnifiedModel]) -> UnifiedModel:
    """The model of most tests: its rollouts differ in length and in why they stop. Tests do not change it."""
    fresh = build_model()
    return lean(fresh, {fresh.spec.image_next: 5.0, fresh.spec.text_end[0]: 2.5})


@pytest.fixture(scope="session")
def exact_model(model: UnifiedModel) -> UnifiedModel:
    """`model` in float64, to compare two ways to compute one thing. In float32 they differ by what their sums round:
    a few 1e-6 of a log-probability of 10, more or less with another processor or number of threads. In float64 hidden
    states differ by 1e-15; log-probabilities are float32 of any model, and then alike but for a last digit."""
    return copy.deepcopy(model).double()


@pytest.fixture(scope="session")
def plain_model(model: UnifiedModel) -> UnifiedModel:
    """The same body without the family's own embedding: places are told by rotary positions alone."""
    return UnifiedModel(model.backbone, model.spec, model.tokenizer, model.images).eval()


@pytest.fixture(scope="session")
def prompts(raw_prompts: list[Interleaved]) -> list[Interleaved]:
    """Prompts whose texts have different lengths."""
    return raw_prompts


@pytest.fixture(scope="session")
def locate() -> Locate:
    """A stand-in for what a text names: places strewn by the text's hash, from none to all of them."""

    def strewn(text: str, grid: tuple[int, int]) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(text.encode()))
        return rng.random(grid) < rng.choice([0.0, 0.05, 0.3, 1.0])

    return strewn


@pytest.fixture(scope="session")
def sample(model: UnifiedModel, prompts: list[Interleaved], locate: Locate) -> Callable[..., list[Rollout]]:
    """sample(**settings) -> rollouts of `prompts`; other `rows`, `keys` or `of` (the model) on demand."""

    def run(
        rows: Sequence[Interleaved] = (), keys: Sequence[int] = (), of: UnifiedModel = model, **settings: Any
    ) -> list[Rollout]:
        rows = rows or prompts
        sampler = InterleavedSampler(of, SamplerConfig(**{"max_rounds": 2, "image_steps": 3, **settings}), locate)
        return sampler.sample(rows, keys or [noise.key(0, 0, i, 0) for i in range(len(rows))])

    return run


@pytest.fixture
def rng_untouched() -> Iterator[None]:
    """Fails the test if it moves a global random state (random, numpy, torch)."""

    def states() -> tuple[object, bytes, bytes]:
        return random.getstate(), repr(np.random.get_state()[1:]).encode(), torch.get_rng_state().numpy().tobytes()  # noqa: NPY002

    before = states()
    yield
    assert states() == before, "a global random state was moved"


@pytest.fixture(scope="session")
def toy_spec() -> Callable[..., ModelSpec]:
    """toy_spec(**fields) -> a small spec, with other values for some fields."""
    fields = {"family": "toy", "mask": 0, "pad": 1, "bos": 2, "text_end": (3, 4), "image_next": 4, "image_begin": (5,)}
    fields |= {"image_end": (6, 7), "text_range": (3, 20), "image_offset": 20, "codebook_size": 8, "logit_rows": 30}
    fields |= {"image_grid": (2, 3), "text_length": 6, "max_positions": 256}
    return lambda **others: ModelSpec(**{**fields, **others})


@pytest.fixture(scope="session")
def random_rows() -> Callable[[ModelSpec, int, int], list[Interleaved]]:
    """random_rows(spec, count, seed) -> sequences of random segments: prompts and responses, whole images and edits,
    texts with and without an end token, rows without prompt or without response."""

    def draw_row(spec: ModelSpec, rng: np.random.Generator, grids: Sequence[tuple[int, int]]) -> Interleaved:
        words = [i for i in range(*spec.text_range) if i not in spec.text_end and i != spec.mask]
        given, total = rng.integers(0, 4), rng.integers(1, 7)
        segments = []
        for i in range(total):
            prompt = bool(i < given)
            if rng.random() < 0.5:
                n = int(rng.integers(1, spec.text_length + 1))
                tokens = rng.choice(words, n)
                if not prompt and rng.random() < 0.7:
                    tokens[-1] = rng.choice(spec.text_end)
                segments.append(Segment(Modality.TEXT, torch.from_numpy(tokens), prompt))
            else:
                grid = grids[rng.integers(len(grids))]
                tokens = torch.from_numpy(rng.integers(*spec.image_range, grid[0] * grid[1]))
                edited = torch.from_numpy(rng.random(len(tokens)) < rng.choice([0.0, 0.2, 0.7]))
                segments.append(Segment(Modality.IMAGE, tokens, prompt, grid, edited if rng.random() < 0.6 else None))
        return Interleaved(segments)

    def draw_rows(
        spec: ModelSpec, count: int, seed: int, grids: Sequence[tuple[int, int]] | None = None
    ) -> list[Interleaved]:
        rng = np.random.default_rng([seed, count])
        return [draw_row(spec, rng, grids or [spec.image_grid]) for _ in range(count)]

    return draw_rows
