"""Two processes give what one gives: every metric, weights, held-out figures. Runs train_tiny.py under torchrun."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.covering import couples
from unidiff.estimators import ESTIMATORS
from unidiff.grpo.losses import LOSSES
from unidiff.images.patch_vq import PatchVQ, PatchVQConfig
from unidiff.model import UnifiedModel
from unidiff.run_folder import read_metrics

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_tiny.py")
SETTINGS = [
    {"eval_steps": 1},
    {"lora_rank": 4, "beta": 0.1, "num_iterations": 2, "gradient_checkpointing": True, "max_steps": 1},
]
# Every estimator, for texts or for images; every loss and assignment.
KINDS = [
    {"scale_rewards": "batch", "assignment": "segment", "num_iterations": 2, "loss_type": "dapo", "max_steps": 2},
    {"beta": 0.1, "assignment": "normalize_then_sum", "loss_type": "dr_grpo", "micro_batch_size": 1, "max_steps": 2},
    {"loss_type": "gspo", "assignment": "joint", "num_iterations": 2},
    *[{"loss_type": name, "num_iterations": 2} for name in ("grpo", "bnpo", "gmpo", "dapo")],
]
assert {one["loss_type"] for one in KINDS} == LOSSES.keys() - {"rtb"} and len(KINDS) == len(couples(ESTIMATORS))
SETTINGS += [
    {"text_estimator": text, "image_estimator": image, "max_steps": 1, **own}
    for (text, image), own in zip(couples(ESTIMATORS), KINDS)
]
SETTINGS += [
    {
        "loss_type": "rtb",
        "scale_rewards": "none",
        "assignment": "joint",
        "beta": 0.1,
        "text_estimator": "trace",
        "image_estimator": "elbo",
    },
    {"schedule": "planner", "schedule_turns": "together", "text_steps": 8},
]
# A bidirectional model, guided in sampling and scoring.
GUIDED = {"start": "dimoo", "text_guidance": 0.5, "image_guidance": 1.0, "max_rounds": 1, "max_steps": 1}
GUIDED |= {"num_prompts": 2, "text_steps": 2, "num_iterations": 2, "eval_size": 3}
GUIDED |= {"text_estimator": "trace", "image_estimator": "coupled"}
SETTINGS += [GUIDED]
UNGUIDED = {"text_guidance": 0.5, "image_guidance": 1.0, "score_guidance": False}
SETTINGS += [{**UNGUIDED, "micro_batch_size": 1, "max_steps": 1}]
# Nothing to learn from on the second process, or on both.
SETTINGS += [{"rewards": rewards, "num_iterations": 2, "max_steps": 1} for rewards in ("first prompt", "none")]
SETTINGS += [{"rewards": "first prompt", "max_steps": 1}, {"rewards": "first prompt", "beta": 0.1}]


@pytest.fixture(scope="module")
def two(model, published, tmp_path_factory):
    """The folder of the runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    model.save_pretrained(folder / "native")
    other = UnifiedModel.from_pretrained(published("dimoo"))
    other.images = PatchVQ(PatchVQConfig(codebook_size=other.spec.codebook_size, dim=4, widths=(4, 4, 4)))
    announce = other.spec.image_next  # of a text range of two words random weights announce pictures now and then
    sizes = {"text_range": (announce, announce + 2), "text_end": (announce,), "max_positions": 1024}
    other.spec = replace(other.spec, image_grid=(8, 8), **sizes)
    other.save_pretrained(folder / "dimoo")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    words = [str(SCRIPT), str(folder / "native"), str(folder), json.dumps(SETTINGS)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def script(program):
    return program("tests/grpo/train_tiny.py")


@pytest.mark.parametrize("case", range(len(SETTINGS)))
def test_one_process_and_two(two, script, tmp_path, difference, same_metrics, case):
    script.train(str(two / "native"), tmp_path, SETTINGS[case])
    one, both = (read_metrics(f / "metrics.jsonl") for f in (tmp_path, two / str(case)))
    assert len(one) == len(both) == {**script.COMMON, **SETTINGS[case]}["max_steps"]
    for first, second in zip(one, both):
        same_metrics(first, second)
        assert (first["grad_norm"] > 1e-4) is (SETTINGS[case].get("rewards") != "none")
        assert (first["tokens/text"] + first["tokens/image"] > 0) is (first["grad_norm"] > 0)
    weights = [load_file(f / "model" / "model.safetensors") for f in (tmp_path, two / str(case))]
    assert difference(*weights) < 1e-10  # a millionth of the learning rate
    held = [json.loads((f / "held_out.json").read_text()) for f in (tmp_path, two / str(case))]
    for name in held[0]:
        assert held[1][name] == pytest.approx(held[0][name], abs=1e-6)


def test_a_folder_in_use_is_refused_by_every_process(two):
    for process in range(2):
        assert "holds another run" in (two / f"refused-{process}.txt").read_text()
