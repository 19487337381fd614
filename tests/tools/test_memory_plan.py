"""tools/memory_plan.py: its arithmetic is compared with what PyTorch keeps, its page with its output."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from unidiff import UnifiedModel, noise
from unidiff.grpo import lora
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Modality

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def tool(program: Callable[[str], ModuleType]) -> ModuleType:
    return program("tools/memory_plan.py")


class Kept:
    """Inside, counts what autograd keeps: bytes of storages that hold no parameter, and shapes."""

    def __init__(self, model: UnifiedModel) -> None:
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.tensors: dict[int, torch.Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in self.known:
            self.tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_layer_keeps(tool, checkpoints, tmp_path, dtype, rank):
    """The difference between four layers and two, on grouped keys too."""
    n = 96
    for kv_heads in (4, 2):
        kept = []
        for layers in (2, 4):
            sizes = {"d_model": 64, "n_kv_heads": kv_heads, "mlp_hidden_size": 192, "n_layers": layers}
            folder = checkpoints.make_checkpoint("mmada", tmp_path / f"{kv_heads}-{layers}", **sizes)
            model = UnifiedModel.from_pretrained(folder, dtype=dtype)
            if rank:
                lora.add_adapters(model, rank, 8.0)
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                assert trained == tool.adapters(model.backbone.config, rank)
            inputs = model.backbone.get_input_embeddings()(torch.arange(n)[None] % 30)
            inputs = inputs.detach().requires_grad_()
            mask, places = torch.zeros(1, 1, n, n, dtype=dtype), torch.arange(n)[None]
            counted = Kept(model)
            with counted.hooks:
                model.backbone.model(inputs_embeds=inputs, attention_mask=mask, position_ids=places, use_cache=False)
            kept.append(counted.bytes)
        expected = tool.kept_in_a_layer(model.backbone.config, dtype.itemsize, rank)
        assert (kept[1] - kept[0]) / 2 / n == expected


def test_numbers_of_weights(tool, published):
    for family in ("mmada", "llada"):
        model = UnifiedModel.from_pretrained(published(family))
        assert tool.weights(model.backbone.config) == sum(p.numel() for p in model.backbone.parameters())


def test_logits_that_stay(tool, model, prompts):
    """4 bytes for each scored token and row of its modality, and no larger table."""
    sampler = InterleavedSampler(model, SamplerConfig(max_rounds=2, image_steps=2, edit="full"))
    rollouts = sampler.sample(prompts, [noise.key(i) for i in range(len(prompts))])
    canvas = model.render([r.sequence for r in rollouts])
    counted = Kept(model)
    with counted.hooks:
        model.score(canvas, canvas.sampled)
    for modality in Modality:
        low, high = model.spec.range_of(modality)
        tables = [t for t in counted.tensors.values() if t.ndim == 2 and t.shape[1] == high - low]
        scored = int((canvas.sampled & (canvas.modality == modality)).sum())
        assert scored and sum(t.untyped_storage().nbytes() for t in tables) == 4 * scored * (high - low)
    assert not any(t.shape[-1] == model.spec.logit_rows for t in counted.tensors.values())


def test_lines_add_up(tool):
    """The sum of a table is that of its lines; adapters of an 8B model fit 80 GB, all of its weights do not."""
    said = tool.plan(tool.Config())
    sizes = [float(x) for x in re.findall(r"\| ([\d.]+) \|$", said, re.M)]
    (total,) = (float(x) for x in re.findall(r"\*\*sum\*\* \| \| \*\*([\d.]+)\*\*", said))
    assert math.isclose(sum(sizes), total, abs_tol=0.05) and total < 80
    said = tool.plan(tool.Config(lora_rank=0, beta=0.0, micro_batch_size=1))
    whole, share = (float(x) for x in re.findall(r"\*\*sum\*\* \| \| \*\*([\d.]+)\*\*", said))
    assert share < 80 < 160 < whole


@pytest.mark.parametrize("words", re.findall(r"^python tools/memory_plan\.py.*$", PAGE.read_text(), re.M))
def test_the_page_says_what_the_tool_says(tool, words):
    said = tool.plan(tool.parsed(shlex.split(words)[2:]))
    assert said in PAGE.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_s_settings_are_a_plan(tool, path):
    file = yaml.safe_load(path.read_text())
    settings = {**file, **file.get("optimizer", {}), **file.get("data", {})}
    planned = tool.parsed(["--config", str(path)])
    assert (planned.micro_batch_size, planned.pictures) == (
        settings["micro_batch_size"],
        settings.get("pictures", True),
    )
    assert ("no pictures" in tool.plan(planned)) == (not planned.pictures)


def test_a_model_of_text_alone_has_no_pictures(tool, published):
    """With its own settings, without them, and by a folder: one text of 256 tokens behind the prompt."""
    for given in ({"pictures": False}, {"model": str(published("llada"))}):
        said = tool.plan(tool.Config(text_length=256, **given))
        assert "no pictures" in said and "T = 3 rows of 556 tokens" in said
    assert "N = 8,015,581,184" in tool.plan(tool.Config(pictures=False))  # LLaDA-8B's


def test_what_is_not_a_setting_of_the_recipe_is_refused(tool, tmp_path):
    (tmp_path / "a.yaml").write_text("lora_rnk: 8")
    with pytest.raises(SystemExit, match="unknown setting 'lora_rnk'; did you mean 'lora_rank'"):
        tool.parsed(["--config", str(tmp_path / "a.yaml")])
    with pytest.raises(SystemExit, match="unknown setting 'num_generations'"):
        tool.parsed(["--num_generations", "8"])


def test_the_native_model(tool):
    said = tool.plan(tool.Config(model=str(ROOT / "recipes" / "base"), dtype="float32", lora_rank=0))
    assert "N = 1,2" in said and "T = 3 rows" in said
