"""LoRA in the trainer: few weights that train, a reference without a copy, small checkpoints, merged models."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from unidiff import UnifiedModel
from unidiff.grpo import lora
from unidiff.grpo.reference import Reference

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "learning_rate": 1e-2}


@pytest.fixture
def adapted(model):
    """The tiny model with adapters that do something."""
    policy = copy.deepcopy(model)
    lora.add_adapters(policy, rank=4, alpha=8.0)
    shake(policy)
    return policy


def shake(policy) -> None:
    generator = torch.Generator().manual_seed(0)
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)


def ids_of(model) -> torch.Tensor:
    return torch.randint(model.spec.logit_rows, (2, 12), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------- the adapters


def test_fresh_adapters_change_nothing(model, rng_untouched):
    policy = copy.deepcopy(model)
    lora.add_adapters(policy, rank=4, alpha=8.0)
    assert torch.equal(policy.logits(ids_of(model)), model.logits(ids_of(model)))
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all("lora_" in n for n in trained)  # A and B of seven layers in two blocks
    assert not any(m.training for m in policy.modules())


def test_adapters_are_a_function_of_the_seed(model):
    def first(seed):
        policy = copy.deepcopy(model)
        lora.add_adapters(policy, 4, 8.0, seed)
        return next(p for p in policy.parameters() if p.requires_grad)

    assert torch.equal(first(3), first(3)) and not torch.equal(first(3), first(4))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switched_off_and_merged(published, tmp_path, dtype):
    model = UnifiedModel.from_pretrained(published("mmada"), dtype=dtype)
    ids = ids_of(model)
    plain = model.logits(ids)
    lora.add_adapters(model, rank=4, alpha=8.0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    shake(model)
    with_adapters = model.logits(ids)
    assert (with_adapters - plain).abs().max() > 0.1
    with lora.switched_off(model):
        assert torch.equal(model.logits(ids), plain)
    assert torch.equal(model.logits(ids), with_adapters)
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    near = 1e-4 if dtype is torch.float32 else 0.03 * float(with_adapters.abs().max())
    with lora.merged(model):
        assert (model.logits(ids) - with_adapters).abs().max() < near
        model.save_pretrained(tmp_path)
    assert torch.equal(model.logits(ids), with_adapters)
    again = UnifiedModel.from_pretrained(tmp_path, dtype=dtype)
    assert (again.logits(ids) - with_adapters).abs().max() < near


@torch.no_grad()
def test_peft_reads_the_adapter(adapted, model, tmp_path):
    from peft import PeftModel

    lora.save_adapter(adapted, tmp_path)
    other = copy.deepcopy(model)
    PeftModel.from_pretrained(other.backbone, tmp_path)
    assert torch.equal(other.logits(ids_of(model)), adapted.logits(ids_of(model)))


def test_what_cannot_be_trained(make_trainer, model, adapted, monkeypatch):
    with pytest.raises(ValueError, match="the model has adapters already"):
        make_trainer(policy=adapted, **LORA)
    with pytest.raises(ValueError, match=r"the weights to train are bfloat16, which rounds .*\(lora_rank"):
        make_trainer(policy=copy.deepcopy(model).to(torch.bfloat16))
    with pytest.raises(ValueError, match="every weight of the model is frozen"):
        make_trainer(policy=copy.deepcopy(model).requires_grad_(False))
    with pytest.raises(ValueError, match="lora_rank is -1"):
        make_trainer(lora_rank=-1)
    with pytest.raises(ValueError, match="lora_alpha is 0"):
        make_trainer(lora_alpha=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'lora_rank needs peft: pip install "unidiff\[lora\]"'):
        make_trainer(**LORA)


def test_why_weights_in_bfloat16_are_refused():
    """At the published learning rate AdamW moves a typical weight by less than half of bfloat16's step."""
    weights = torch.full((64,), 0.02, dtype=torch.bfloat16).requires_grad_()
    before = weights.detach().clone()
    optimizer = torch.optim.AdamW([weights], lr=3e-6)
    for _ in range(100):
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    assert torch.equal(weights, before)


# ---------------------------------------------------------------------------------------------- training them


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "gradient_checkpointing": True}], ids=["one", "two"])
def test_only_adapters_change(make_trainer, weights, settings):
    trainer = make_trainer(**LORA, **settings)
    before = weights(trainer)
    metrics = trainer.train()
    after = weights(trainer)
    for name in before:
        assert torch.equal(before[name], after[name]) == ("lora_" not in name), name
    assert all(m["ratio_first_iteration_max_dev"] < 1e-5 for m in metrics)
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for n, p in trainer.model.named_parameters() if "lora_" in n}


def test_the_model_without_adapters_is_the_reference(make_trainer, model):
    """The KL is that to a copy of the model as it was."""
    trainer = make_trainer(beta=0.5, **LORA)
    assert trainer.reference.copy is None
    first, _ = trainer.step(0)
    assert first["kl/text"] == 0 and first["kl/image"] == 0
    _, experience = trainer.step(1)
    rows = experience.micro_batch()
    with torch.no_grad():
        expected = trainer.update.values(model, rows)
        new = trainer.update.values(trainer.model, rows)
    assert torch.equal(trainer.update.reference_values(rows), expected)
    assert (new - expected).abs().max() > 1e-3
    second, _ = trainer.step(2)
    assert second["kl/text"] > 1e-5


def test_adapters_of_the_user_are_part_of_the_reference(make_trainer, adapted):
    """Without lora_rank, adapters that a model came with are trained, and the reference is the model as it came."""
    trainer = make_trainer(beta=0.5, policy=copy.deepcopy(adapted))
    _, experience = trainer.step(0)
    rows = experience.micro_batch()
    with torch.no_grad():
        expected = trainer.update.values(adapted, rows)
    assert torch.equal(trainer.update.reference_values(rows), expected)


def test_the_penalty_is_as_with_a_copy(make_trainer, model, weights, difference, tmp_path):
    """The same run with a reference that is a copy of the model: the same weights."""
    runs = []
    for name in ("own", "copy"):
        trainer = make_trainer(beta=0.5, output_dir=str(tmp_path / name), **LORA)
        if name == "copy":
            trainer.update.reference = Reference(copy.deepcopy(model), fresh_adapters=False)
        trainer.step(0), trainer.step(1)
        runs.append(weights(trainer))
    assert difference(*runs) == 0


# ---------------------------------------------------------------------------------------------- what is written


def test_a_checkpoint_holds_adapters_only_and_resuming_is_exact(make_trainer, weights, difference, timeless):
    whole = make_trainer(max_steps=4, **LORA)
    history = whole.train()
    trainer = make_trainer(max_steps=4, save_steps=2, output_dir=str(whole.folder.path.parent / "stopped"), **LORA)
    steps = trainer.step
    trainer.step = lambda step: steps(step) if step < 3 else (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (saved,) = trainer.folder.checkpoints()
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118
    again = make_trainer(max_steps=4, save_steps=2, output_dir=str(trainer.folder.path), resume=True, **LORA)
    assert [timeless(m) for m in again.train()] == [timeless(m) for m in history]
    assert difference(weights(again), weights(whole)) == 0


def test_a_checkpoint_without_the_adapters_is_refused(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    monkeypatch.setattr("unidiff.run_folder.RunFolder.open", lambda *_: None)
    with pytest.raises(ValueError, match=r"lacks 28 of the weights that are trained, such as backbone\..*lora_A"):
        make_trainer(max_steps=2, resume=True, **LORA).train()


def test_the_model_is_saved_merged_and_the_adapter_beside_it(make_trainer, model, tmp_path):
    trainer = make_trainer(**LORA)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    saved = UnifiedModel.from_pretrained(tmp_path / "model")
    assert saved.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        old, new, trained = (m.logits(ids_of(model)) for m in (model, saved, trainer.model))
    assert (new - trained).abs().max() < 1e-4 < (old - trained).abs().max()
    assert {p.name for p in (tmp_path / "model" / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert len(load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")) == 28


# ---------------------------------------------------------------------------------------------- checkpointing


SLOW = [pytest.param(own, marks=pytest.mark.slow) for own in ({"num_iterations": 2, "beta": 0.1}, LORA)]


@pytest.mark.parametrize("settings", [{}, {"text_estimator": "spg"}, *SLOW])
def test_gradient_checkpointing_changes_nothing_but_memory(make_trainer, weights, difference, settings, tmp_path):
    runs, forwards = [], []
    for on in (False, True):
        trainer = make_trainer(gradient_checkpointing=on, output_dir=str(tmp_path / str(on)), **settings)
        forwards.append(0)

        def counted(*_):
            forwards[-1] += 1

        trainer.model.backbone.model.layers[0].mlp.register_forward_pre_hook(counted)
        trainer.train()
        assert not any(m.training for m in trainer.model.modules())
        runs.append(weights(trainer))
    assert difference(*runs) == 0 and forwards[1] > forwards[0]  # a layer is run again for its gradient


def test_the_setting_compile_reaches_the_body(make_trainer, tmp_path):
    """What compiled layers give is compared in tests/tools/test_bench_gpu.py."""
    torch.compiler.reset()
    for on in (False, True):
        trainer = make_trainer(compile=on, max_steps=1, output_dir=str(tmp_path / str(on)))
        with torch.compiler.set_stance("fail_on_recompile"):
            if on:
                with pytest.raises(RuntimeError, match="recompile"):
                    trainer.train()
            else:
                trainer.train()
