"""LoRA adapters on a model's body: few weights to train, and the reference policy needs no copy.

peft injects them into the body's linear layers in place, so all other names and attributes stay. Adapters are float32
whatever the weights' dtype is: at the learning rates of RL, updates are smaller than bfloat16's resolution and would
be lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unidiff.config import checked
from unidiff.model import UnifiedModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of Llama's layers


def add_adapters(model: UnifiedModel, rank: int, alpha: float, seed: int = 0) -> None:
    """Freezes the model and adds trainable adapters that start as zero updates. Raises ImportError without peft,
    ValueError if the model has adapters already, or for a rank or alpha that is not a finite number above 0.

    There is no dropout, because an unchanged policy must have ratio 1. The global RNG's state does not change.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError('lora_rank needs peft: pip install "unidiff[lora]"') from error
    given = checked({"rank": rank, "alpha": alpha}, add_adapters, "lora_")
    for name, value in given.items():
        if value <= 0:
            raise ValueError(f"lora_{name} is {value}; it must be above 0")
    if adapters(model):
        raise ValueError("the model has adapters already; merge them, or leave lora_rank at 0 to train them")
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(TARGETS))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model.backbone)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
    model.eval()


def adapters(model: UnifiedModel) -> dict[str, Any]:
    """The layers with an adapter, by name in the backbone."""
    return {name: module for name, module in model.backbone.named_modules() if hasattr(module, "lora_A")}


@contextlib.contextmanager
def switched_off(model: UnifiedModel) -> Iterator[UnifiedModel]:
    """While open, the model is bit-identical to the one without adapters."""
    layers = adapters(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def trained(model: UnifiedModel) -> list[nn.Parameter]:
    """The trainable weights. Raises ValueError if there are none, or if their dtype would lose small updates."""
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise ValueError("every weight of the model is frozen: there is nothing to train")
    if wrong := {str(p.dtype).removeprefix("torch.") for p in weights if p.dtype.itemsize < 4}:
        raise ValueError(
            f"the weights to train are {', '.join(sorted(wrong))}, which rounds small updates away: train adapters "
            "(lora_rank 128, say), load the model in float32, or shard it (recipes/accelerate/8_gpu_fsdp2.yaml)"
        )
    return weights


@contextlib.contextmanager
def merged(model: UnifiedModel) -> Iterator[UnifiedModel]:
    """While open, the model has plain layers with the adapters merged into their weights, to be saved under published
    names. Afterwards the model is bit-identical to before: the original weights are kept in CPU memory meanwhile."""
    before: list[tuple[nn.Module, str, Any, Tensor]] = []
    try:
        for name, layer in adapters(model).items():
            parent, _, attribute = name.rpartition(".")
            owner, base = model.backbone.get_submodule(parent), layer.get_base_layer()
            before.append((owner, attribute, layer, base.weight.data.cpu().clone()))
            added = sum(layer.get_delta_weight(active) for active in layer.active_adapters)
            base.weight.data = (base.weight.data + added).to(base.weight.dtype)
            setattr(owner, attribute, base)
        yield model
    finally:
        for owner, attribute, layer, weight in before:
            base = layer.get_base_layer()
            base.weight.data = weight.to(base.weight.device)
            setattr(owner, attribute, layer)


def save_adapter(model: UnifiedModel, folder: Path) -> None:
    """Writes only the adapter, in peft's format: `PeftModel.from_pretrained(model.backbone, folder)` reads it."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model.backbone)
    named = {f"base_model.model.{name}": w.detach().cpu().contiguous() for name, w in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.backbone.peft_config["default"]
    config.inference_mode = True
    config.save_pretrained(str(folder))
