"""FSDP2 and ZeRO-2 on two processes give what one process gives, and go on from their checkpoints; what is refused."""

import contextlib
import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from unidiff.grpo import distributed
from unidiff.grpo.distributed.fsdp2 import FSDP2
from unidiff.grpo.distributed.zero2 import Zero2
from unidiff.grpo.lora import add_adapters
from unidiff.run_folder import read_metrics

SCRIPT = Path(__file__).with_name("train_tiny.py")
SETTINGS = [
    {"save_steps": 1},
    {"beta": 0.1, "num_iterations": 2, "gradient_checkpointing": True, "scale_rewards": "batch"},
    {"lora_rank": 4, "beta": 0.1, "learning_rate": 1e-2},
    {"dtype": "bfloat16", "learning_rate": 1e-3, "num_iterations": 2, "check_ratio_every": 0},
]
SETTINGS = [{"micro_batch_size": 1, **own} for own in SETTINGS]  # and 2 on the second process


def launch(way: str, start: Path, folder: Path, settings: list[dict]) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    words += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "SHARDED": way}
    environment["DS_ACCELERATOR"] = "cpu"
    words += [str(SCRIPT), str(start), str(folder), json.dumps(settings)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]


def dtype_of(way: str) -> dict:
    """DeepSpeed has no float64: there float noise turns AdamW's steps (see the fixture `exact`)."""
    return {"dtype": "float32"} if way == "DEEPSPEED" else {}


# DeepSpeed compiles its exchange on CPUs when it is first used, which takes minutes.
NO_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason='DeepSpeed is not installed: pip install "unidiff[deepspeed]"'
)


@pytest.fixture(scope="module", params=["FSDP", pytest.param("DEEPSPEED", marks=NO_DEEPSPEED)])
def sharded(request, model, tmp_path_factory):
    """The way to shard, and the folder of the runs of two processes; ZeRO-2's have no adapters."""
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder / "start")
    without = [s for s in SETTINGS if request.param == "FSDP" or "lora_rank" not in s]
    runs = [*without, {**SETTINGS[0], "folder": "resumed", "goes_on": "0"}]
    launch(request.param, folder / "start", folder, [{**dtype_of(request.param), **own} for own in runs])
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("case", range(3))
def test_one_process_and_two_shards(sharded, program, tmp_path, difference, same_metrics, timeless, case):
    way, folder = sharded
    if way == "DEEPSPEED" and "lora_rank" in SETTINGS[case]:
        pytest.skip("ZeRO-2 is refused for adapters")
    program("tests/grpo/train_tiny.py").train(str(folder / "start"), tmp_path, {**SETTINGS[case], **dtype_of(way)})
    one, both = (read_metrics(f / "metrics.jsonl") for f in (tmp_path, folder / str(case)))
    assert len(one) == len(both) == 2
    for first, second in zip(one, both):
        if way == "FSDP":
            same_metrics(first, second)
        else:
            assert timeless(second) == pytest.approx(timeless(first), abs=1e-4, rel=1e-3)
    weights = [load_file(f / "model" / "model.safetensors") for f in (tmp_path, folder / str(case))]
    assert difference(*weights) < (1e-10 if way == "FSDP" else 2e-5)
    held = [json.loads((f / "held_out.json").read_text()) for f in (tmp_path, folder / str(case))]
    for name in held[0]:
        assert held[1][name] == pytest.approx(held[0][name], abs=1e-6)


@pytest.mark.slow
def test_all_weights_of_a_bfloat16_model(sharded):
    """It computes in bfloat16, its ratios are exact, and the weights that add up are float32."""
    way, folder = sharded
    last = folder / ("3" if way == "FSDP" else "2")
    metrics = read_metrics(last / "metrics.jsonl")
    assert all(m["ratio_first_iteration_max_dev"] == 0 for m in metrics)
    before, after = (load_file(f / "model.safetensors") for f in (folder / "start", last / "model"))
    assert all(w.dtype == torch.bfloat16 for w in after.values())
    assert any(not torch.equal(before[n].bfloat16(), w) for n, w in after.items())


@pytest.mark.slow
def test_a_sharded_run_goes_on_where_it_stopped(sharded, difference, timeless):
    """Its second step again, from the checkpoint after the first."""
    _, folder = sharded
    once, again = (read_metrics(folder / name / "metrics.jsonl") for name in ("0", "resumed"))
    assert [timeless(m) for m in again] == [timeless(m) for m in once]
    assert difference(*(load_file(folder / name / "model" / "model.safetensors") for name in ("0", "resumed"))) == 0


# ---------------------------------------------------------------------------------------------- what is refused


def accelerator(kind: DistributedType, **state) -> Accelerator:
    return SimpleNamespace(distributed_type=kind, **{"is_fsdp2": True, "mixed_precision": "no", **state})  # type: ignore[return-value]


def test_ways_that_would_go_wrong_are_refused():
    for kind in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED"):
        distributed.check(accelerator(DistributedType[kind]))
    with pytest.raises(ValueError, match=r"distributed_type is MEGATRON_LM, which is not .*8_gpu_fsdp2\.yaml"):
        distributed.check(accelerator(DistributedType.MEGATRON_LM))
    with pytest.raises(ValueError, match="fsdp_version is 1"):
        distributed.check(accelerator(DistributedType.FSDP, is_fsdp2=False))
    with pytest.raises(ValueError, match="mixed_precision is 'bf16'"):
        distributed.check(accelerator(DistributedType.FSDP, mixed_precision="bf16"))
    with pytest.raises(ValueError, match="mixed_precision is 'fp16'"):
        distributed.check(accelerator(DistributedType.DEEPSPEED, mixed_precision="fp16"))
    distributed.check(accelerator(DistributedType.MULTI_GPU, mixed_precision="bf16"))


@pytest.mark.parametrize("option", ["cpu_ram_efficient_loading", "activation_checkpointing"])
def test_settings_of_fsdp_that_would_go_wrong_are_refused(model, option):
    plugin = SimpleNamespace(cpu_offload=None, cpu_ram_efficient_loading=False, activation_checkpointing=False)
    setattr(plugin, option, True)
    with pytest.raises(ValueError, match=f"fsdp_config: .*fsdp_{option}"):
        FSDP2(model, accelerator(DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin)))


def deepspeed(stage: int = 2, **zero) -> Accelerator:
    config = {"zero_optimization": {"stage": stage, **zero}}
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    return accelerator(DistributedType.DEEPSPEED, state=state)


def test_the_trainer_sets_clipping_and_precision_of_zero2(model):
    """A bfloat16 model is handed over in float32, from which DeepSpeed takes the weights that add up."""
    low, accelerator = copy.deepcopy(model).bfloat16(), deepspeed(offload_optimizer={"device": "none"})
    assert isinstance(distributed.weights_for(low, accelerator, max_norm=0.3), Zero2)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    assert config["gradient_clipping"] == 0.3 and config["bf16"] == {"enabled": True}
    assert config["gradient_accumulation_steps"] == 1
    assert low.dtype == torch.float32
    Zero2(copy.deepcopy(model), accelerator, max_norm=1.0)
    assert config["bf16"] == {"enabled": False}


def test_what_would_go_wrong_under_zero2_is_refused(model):
    with pytest.raises(ValueError, match=r"zero_stage is 3, .*set zero_stage: 2"):
        Zero2(model, deepspeed(3), max_norm=1.0)
    with pytest.raises(ValueError, match="offload devices are cpu and none"):
        Zero2(model, deepspeed(offload_optimizer={"device": "cpu"}), max_norm=1.0)
    with pytest.raises(ValueError, match=r"the model is torch\.float16"):
        Zero2(copy.deepcopy(model).half(), deepspeed(), max_norm=1.0)
    adapted = copy.deepcopy(model)
    add_adapters(adapted, 2, 4.0)
    with pytest.raises(ValueError, match=r"adapters and frozen weights gain nothing .*8_gpu\.yaml"):
        Zero2(adapted, deepspeed(), max_norm=1.0)
    with pytest.raises(ValueError, match="cannot keep gradients back"):
        Zero2(copy.deepcopy(model), deepspeed(), max_norm=1.0).begin(object())


def test_zero2_exchanges_every_gradient_and_only_then_steps(model):
    """A weight that this process did not use counts 0: processes would exchange different buckets, and break off."""
    did, shards = [], Zero2(copy.deepcopy(model), deepspeed(), max_norm=1.0)

    @contextlib.contextmanager
    def coalesced():
        yield
        did.append([None if p.grad is None else float(p.grad.abs().sum()) for p in shards.model.parameters()])

    shards.begin(SimpleNamespace(coalesce_grad_reduction=coalesced, step=lambda: did.append("step")))
    with shards.collected():
        next(shards.model.parameters()).sum().backward()
    assert did == [[next(shards.model.parameters()).numel(), *[0.0] * (len(did[0]) - 1)], "step"]
