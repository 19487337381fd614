"""Two processes give what one gives: metrics, weights, held-out figures. Runs train_tiny.py under torchrun."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from unidiff.grpo.checkpoint import read_metrics

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_tiny.py")
COMMON = {
    "num_prompts": 4,
    "num_generations": 2,
    "max_rounds": 2,
    "text_steps": 3,
    "text_threshold": None,
    "image_steps": 2,
    "edit": "random",
    "edit_share": 0.2,
    "micro_batch_size": 3,
    "learning_rate": 1e-4,
    "warmup_steps": 0,
    "max_steps": 2,
    "eval_size": 5,
    "check_ratio_every": 1,
}
SETTINGS = [
    {},
    {"scale_rewards": "batch", "assignment": "segment", "num_iterations": 2, "loss_type": "dapo"},
    {"beta": 0.1, "assignment": "normalize_then_sum", "loss_type": "dr_grpo", "micro_batch_size": 1},
    {"loss_type": "gspo", "assignment": "joint", "num_iterations": 2},
    {"text_estimator": "trace", "image_estimator": "elbo", "num_iterations": 2, "loss_type": "gmpo"},
    {"text_estimator": "wd1", "image_estimator": "spg", "beta": 0.1},
    {"lora_rank": 4, "beta": 0.1, "num_iterations": 2, "gradient_checkpointing": True},
]
SETTINGS = [{**COMMON, **own} for own in SETTINGS]


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """The folder of the runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    model.save_pretrained(folder / "start")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    words = [str(SCRIPT), str(folder / "start"), str(folder), json.dumps(SETTINGS)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", range(len(SETTINGS)))
def test_one_process_and_two(two, script, tmp_path, difference, timeless, case):
    script.train(str(two / "start"), tmp_path, SETTINGS[case])
    one, both = (read_metrics(f / "metrics.jsonl") for f in (tmp_path, two / str(case)))
    assert len(one) == len(both) == 2
    for first, second in zip(one, both):
        assert timeless(second) == pytest.approx(timeless(first), abs=1e-4, rel=1e-3)
    weights = [load_file(f / "model" / "model.safetensors") for f in (tmp_path, two / str(case))]
    assert difference(*weights) < 2e-5
    held = [json.loads((f / "held_out.json").read_text()) for f in (tmp_path, two / str(case))]
    for name in held[0]:
        assert held[1][name] == pytest.approx(held[0][name], abs=1e-6)


def test_a_folder_in_use_is_refused_by_every_process(two):
    for process in range(2):
        assert "holds another run" in (two / f"refused-{process}.txt").read_text()
