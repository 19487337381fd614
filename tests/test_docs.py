"""The documents say what is so: examples run, commands and links lead somewhere, settings are those of the code."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.tables import each
from unidiff import reward
from unidiff.command_line import parse, ungrouped
from unidiff.config import build
from unidiff.estimators import ESTIMATORS
from unidiff.families import FAMILIES
from unidiff.grpo import distributed
from unidiff.model import UnifiedModel
from unidiff.rewards.names import REWARDS
from unidiff.settings_file import from_yaml
from unidiff.settings_text import help_text

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
CARDS = [*sorted(ROOT.glob("tokenizers/**/*.md")), *sorted(ROOT.glob("recipes/**/*.md"))]
CODE = [p for folder in ("unidiff", "recipes", "tools") for p in sorted((ROOT / folder).rglob("*.py"))]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _files() -> list[Path]:
    """What is, or would be, under version control."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [p for word in listed.stdout.split(b"\0") if word and (p := ROOT / os.fsdecode(word)).is_file()]


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(model: UnifiedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipes/base; a small random model in its place where it is not there."""
    shipped = ROOT / "recipes" / "base"
    if (shipped / "config.json").is_file():
        return shipped
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def elsewhere(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory that looks like the repository root to an example; what it registers is forgotten."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "base").symlink_to(base, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    importlib.import_module("unidiff.scorers")  # the rewards that ship are registered at the first look-up
    known = [(registry, dict(registry)) for registry in (ESTIMATORS, FAMILIES, REWARDS)]
    yield tmp_path
    for registry, before in known:
        registry.clear()
        registry.update(before)


def examples(page: Path) -> list[Any]:
    """The python blocks of a page, compiled so that a traceback names the page's own lines."""
    text = page.read_text()
    blocks = []
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
        lines = text.count("\n", 0, found.start(1))
        blocks.append(compile("\n" * lines + found[1], str(page), "exec"))
    return blocks


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=_name)
def test_examples_run(page: Path, elsewhere: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in examples(page):
        exec(block, namespace)


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(path: Path) -> list[list[str]]:
    """Commands as words: from bash blocks and inline code of a page, and from comments and docstrings of a program."""
    text = path.read_text()
    if path.suffix == ".md":
        lines = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)).replace("\\\n", " ").splitlines()
        lines += re.findall(r"`((?:python|accelerate|pip|pytest) [^`\n]+)`", text)
    else:
        text = re.sub(r" \\\n#? *", " ", text)
        lines = re.findall(r"^[#\s]+((?:python|accelerate launch)(?: --\w+ \S+)* \S+[./]\S+.*)$", text, re.M)
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [w for w in words if w]


Program = Callable[[str], ModuleType]


def check_command(words: list[str], program: Program) -> None:
    """Raises AssertionError, or SystemExit with the program's own words, for what does not exist."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "pip":
        extras = re.search(r"\[(.+)\]", words[-1])
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert not extras or set(extras[1].split(",")) <= set(known)
        return
    if words[0] == "pytest":
        assert all((ROOT / w).exists() for w in words[1:] if not w.startswith("-"))
        return
    words = words[2:] if words[:2] == ["accelerate", "launch"] else words[1:]
    if not words:  # the launcher itself, named in a sentence
        return
    if words[0] == "--config_file":
        assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"
        words = words[2:]
        while words[0] in ("--machine_rank", "--main_process_ip"):
            words = words[2:]
    script, given = ROOT / words[0], words[1:]
    assert script.is_file(), f"{words[0]} does not exist"
    if re.search(r"unidiff\.config|unidiff\.run |run_command", script.read_text()):
        check_settings(program(words[0]), given, program)
    else:
        assert all(f'"{w.partition("=")[0]}"' in script.read_text() for w in given if w.startswith("--"))


def check_settings(module: Any, given: list[str], program: Program) -> None:
    if hasattr(module, "COMMANDS"):
        assert given[0] in module.COMMANDS, f"{given[0]} is not a command of {module.__file__}"
        given = given[1:]
    if "--help" in given:
        return
    if hasattr(module, "planned"):  # compare.py hands on what it does not know
        try:
            module.planned(parse(module.Config, module.own_words(given)), given)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    else:
        parse(module.Config, given)


SPEAKING = [*PAGES, *CARDS, *CODE, *sorted(ROOT.glob("recipes/**/*.yaml"))]


@each("path", [p for p in SPEAKING if commands(p)])
def test_commands_name_what_exists(program: Program, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    mine = ModuleType("my_rewards")  # the file of a reader of docs/rewards.md
    mine.__dict__["polite"] = reward(name="polite")(lambda segments, **columns: [0.0] * len(segments))
    monkeypatch.setitem(sys.modules, "my_rewards", mine)
    for words in commands(path):
        try:
            check_command(words, program)
        except (AssertionError, SystemExit) as error:
            pytest.fail(f"{' '.join(words)}\n{error}")


def test_a_wrong_command_is_found(program: Program) -> None:
    recipe = "recipes/interleaved_reasoning.py"
    for wrong in (
        "python recipes/nothing.py",
        f"accelerate launch {recipe} --max_step 3",
        f"accelerate launch {recipe} --assignment facorized",
        f"accelerate launch --config_file recipes/accelerate/9_gpu.yaml {recipe}",
        "python recipes/compare.py --arms edit --max_step 0",
        "python tools/bench.py edit",
        'pip install -e ".[everything]"',
    ):
        with pytest.raises((AssertionError, SystemExit)):
            check_command(shlex.split(wrong), program)


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@each("page", [*PAGES, *CARDS])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{_name(page)} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(linked), f"{_name(page)} links to {target}: no such heading"


def test_documents_named_in_the_code_exist() -> None:
    named = {(path, name) for path in CODE for name in re.findall(r"\bdocs/\w+\.md", path.read_text())}
    assert not [f"{_name(path)}: {name}" for path, name in sorted(named) if not (ROOT / name).is_file()]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_default_yaml_holds_every_default(program: Program) -> None:
    config = program("recipes/interleaved_reasoning.py").Config
    path = ROOT / "recipes" / "configs" / "frozen_lake.yaml"
    assert path.read_text().endswith("\n\n" + help_text(config, topic="yaml"))
    assert parse(config, ["--config", str(path)]) == config()


def test_every_setting_is_read(program: Program) -> None:
    """An option that is read by nothing is a promise that is not kept."""
    config = program("recipes/interleaved_reasoning.py").Config
    own = [ROOT / "unidiff" / part / "config.py" for part in ("grpo", "sampling")]
    text = "".join(p.read_text() for p in CODE if p not in own)
    read = set(re.findall(r"onfig\.(\w+)", text))
    own.append(ROOT / "recipes" / "interleaved_reasoning.py")
    nodes = [node for path in own for node in ast.walk(ast.parse(path.read_text()))]
    for function in nodes:  # what they offer under another name; their checks do not count
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
            read |= {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    assert not {f.name for f in fields(config)} - read


@each("path", sorted(ROOT.glob("recipes/accelerate/*.yaml")))
def test_accelerate_takes_its_configs(path: Path) -> None:
    config = load_config_from_file(str(path))  # raises ValueError for a key that it does not know
    expected = {"cpu": (1, 1, "NO"), "1_gpu": (1, 1, "NO"), "8_gpu": (8, 1, "MULTI_GPU")}
    expected |= {"8_gpu_fsdp2": (8, 1, "FSDP"), "8_gpu_zero2": (8, 1, "DEEPSPEED"), "nodes": (16, 2, "MULTI_GPU")}
    assert (config.num_processes, config.num_machines, config.distributed_type) == expected[path.stem]
    assert config.use_cpu == (path.stem == "cpu") and config.mixed_precision == "no"


def test_the_fsdp_config_is_what_the_trainer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch` hands it on: through environment variables, to accelerate's own plugin."""
    parser = launch_command_parser()
    path = str(ROOT / "recipes" / "accelerate" / "8_gpu_fsdp2.yaml")
    arguments, _, _ = _validate_launch_command(parser.parse_args(["--config_file", path, "script.py"]))
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"] and plugin.reshard_after_forward
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    model: Any = SimpleNamespace(images=None, tokenizer=None, parameters=list, dtype=torch.bfloat16)
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True, mixed_precision="no")
    accelerator.state = SimpleNamespace(fsdp_plugin=plugin)
    distributed.check(accelerator)
    distributed.weights_for(model, accelerator, max_norm=1.0)
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16


def test_the_zero2_config_is_what_the_trainer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch` hands it on, likewise."""
    launched: list[Any] = []
    monkeypatch.setattr("accelerate.commands.launch.deepspeed_launcher", launched.append)
    path = str(ROOT / "recipes" / "accelerate" / "8_gpu_zero2.yaml")
    launch_command(launch_command_parser().parse_args(["--config_file", path, "script.py"]))
    _, environment = prepare_deepspeed_cmd_env(launched[0])
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    for name, value in environment.items():
        if name.startswith("ACCELERATE_") and name != "ACCELERATE_USE_DEEPSPEED":
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    model: Any = SimpleNamespace(parameters=list, dtype=torch.bfloat16)
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, mixed_precision="no")
    accelerator.state = SimpleNamespace(deepspeed_plugin=plugin)
    distributed.check(accelerator)
    distributed.weights_for(model, accelerator, max_norm=0.5)
    assert plugin.deepspeed_config["gradient_clipping"] == 0.5 and plugin.deepspeed_config["bf16"]["enabled"]


@each("path", sorted(ROOT.glob("recipes/configs/*.yaml")))
def test_the_recipe_takes_its_configs(program: Program, path: Path) -> None:
    config = program("recipes/interleaved_reasoning.py").Config
    parse(config, ["--config", str(path)])
    with pytest.raises(ValueError, match="unknown setting 'lora_rnk'; did you mean 'lora_rank'"):
        build(config, {**ungrouped(config, from_yaml(path)), "lora_rnk": 1})


@each("name", ["llada", "mmada", "mmada_parallel", "dimoo"])
def test_published_hyper_parameters(program: Program, name: str) -> None:
    """Those of MaskGRPO's scripts, which the families' configs name as their source."""
    file = from_yaml(ROOT / "recipes" / "configs" / f"{name}.yaml")
    written = build(program("recipes/interleaved_reasoning.py").Config, file).to_dict()
    common = {"lora_rank": 128, "lora_alpha": 64.0, "learning_rate": 3e-6, "lr_schedule": "constant", "beta": 0.01}
    common |= {"adam_beta2": 0.99, "weight_decay": 0.1, "epsilon": 0.2, "max_steps": 8000, "text_temperature": 0.9}
    own = {
        "llada": {"num_generations": 6, "num_iterations": 12, "text_steps": 128, "text_block": 16, "text_length": 256},
        "mmada": {"num_generations": 9, "num_iterations": 6, "image_sampler": "emerge", "image_steps": 12},
        "mmada_parallel": {"image_steps": 30, "family": "mmada_parallel"},
        "dimoo": {"num_generations": 6, "num_prompts": 8, "image_steps": 64},
    }
    expected = common | own[name] | {"dtype": "bfloat16", "gradient_checkpointing": True, "text_threshold": None}
    assert {key: written[key] for key in expected if key in file} == expected


@each("name", ["mmada", "mmada_parallel", "dimoo"])
def test_rounds_of_the_published_configs_fit_the_positions(program: Program, name: str) -> None:
    """With pictures of the given tiles, row separators and 128 tokens of a question."""
    config = build(
        program("recipes/interleaved_reasoning.py").Config,
        from_yaml(ROOT / "recipes" / "configs" / f"{name}.yaml"),
    )
    side = config.board_size * config.tile // 16
    picture = side * (side + 1) + 2
    needed = 128 + picture + config.max_rounds * (picture + config.text_length) + config.text_length
    assert needed <= 4096


# --- what must not stand in the repository ----------------------------------------------------------------------------


def test_no_path_of_a_developers_machine() -> None:
    private = re.compile(rb"(?<![\w.])/(?:home|Users|root|work)/|index[-]url|find[-]links")
    assert not [_name(p) for p in _files() if private.search(p.read_bytes())]


def test_no_source_file_is_long() -> None:
    long = {_name(p): n for p in _files() if p.suffix == ".py" and (n := p.read_text().count("\n")) > 500}
    assert not long


def test_ids_of_model_families_stand_in_their_files_only() -> None:
    ids = re.compile(r"\b126_?(?:336|349|356|084)\b")
    families = ROOT / "unidiff" / "families"
    assert not [_name(p) for p in CODE if families not in p.parents and ids.search(p.read_text())]
