"""GRPO on interleaved rollouts: sample, reward, route, then μ passes of score, loss, step.

Deviations from the papers, and simplifications:
- A token has the advantage of its segment (`RewardRouter`). Losses of text and image tokens are averaged separately
  and then weighted, so that many image tokens do not drown few text tokens.
- The learning rate and all noise are functions of the step. A checkpoint is weights, optimizer state and step.
- `update.py` cuts a step into forward and backward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerState

from unidiff import estimators, noise
from unidiff.files import whole_folder
from unidiff.grpo import activations, checkpoint, distributed, lora
from unidiff.grpo.config import GRPOConfig
from unidiff.grpo.evaluation import Evaluation, evaluate, step_figures
from unidiff.grpo.experience import Experience, credited, ended, guidance_of, sample_and_judge, spread
from unidiff.grpo.process import Clock, check_tracker, everybody, flat, largest, stop_signals
from unidiff.grpo.reference import Reference
from unidiff.grpo.refill import Judged, replaced, without_spread
from unidiff.grpo.rollout_file import RolloutBatch, fingerprint, router_settings, save_rollouts
from unidiff.grpo.schedule_update import ScheduleUpdate
from unidiff.grpo.update import PolicyUpdate
from unidiff.model import UnifiedModel
from unidiff.report.tracked import log_rollouts
from unidiff.rewards.idle import IdleWatch
from unidiff.rewards.names import as_rewards
from unidiff.rewards.reward import Reward, RewardError
from unidiff.rewards.routed import Routed
from unidiff.rewards.router import RewardRouter
from unidiff.rewards.table import RewardTable, check_required
from unidiff.run_folder import RunFolder, step_of
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.schedules import make_schedule
from unidiff.schedules.speed import with_speed
from unidiff.tasks.encode import encode, ready
from unidiff.tasks.task import Place, Task, check_task

_FURTHER = 1 << 32  # offset of replacement prompts; larger than the number of prompts of any run


class GRPOTrainer:
    """Trains `model` on `task`.

    rewards: what `as_rewards` takes: marked functions, TRL-style functions, or names (also of the task's own rewards);
    None = the task's own. Prompts are the task's train examples, of any index below 2**30. on_step(step, metrics,
    experience): called after each step on the main process, with that process's rollouts. router: replaces the one of
    the config. Raises ValueError for settings that do not fit.
    """

    def __init__(
        self,
        model: UnifiedModel,
        task: Task,
        config: GRPOConfig,
        rewards: Sequence[Reward | str | Callable[..., Any]] | None = None,
        *,
        router: RewardRouter | None = None,
        accelerator: Accelerator | None = None,
        on_step: Callable[[int, dict[str, float], Experience], None] | None = None,
    ) -> None:
        self.config, self.task, self.on_step = config, task, on_step
        self.accelerator = accelerator or Accelerator(log_with=config.tracker, project_dir=config.output_dir)
        check_tracker(config.tracker, self.accelerator)
        processes = self.accelerator.num_processes
        if config.num_prompts % processes:
            raise ValueError(f"num_prompts is {config.num_prompts}; it must be a multiple of the {processes} processes")
        if config.rollout_parts > (share := config.num_prompts // processes):
            raise ValueError(f"rollout_parts is {config.rollout_parts}; a process has {share} prompts to part")
        check_task(task).check()
        if config.max_steps:
            task.length("train")  # raises if the task is for evaluation only
        own = as_rewards(task.rewards())
        self.rewards = own if rewards is None else as_rewards(rewards, own)
        if not self.rewards:
            raise ValueError("rewards is empty; give at least one reward function, or None for the task's own")
        self.router = router or RewardRouter(
            assignment=config.assignment, scale=config.scale_rewards, leave_one_out=config.leave_one_out
        )
        for module in (r.function for r in self.rewards if isinstance(r.function, nn.Module)):
            module.to(self.accelerator.device)
        distributed.check(self.accelerator)
        self.model = model.to(self.accelerator.device).eval()  # no dropout, so that old and new policy agree
        if config.lora_rank:
            lora.add_adapters(self.model, config.lora_rank, config.lora_alpha, config.seed)
        if config.gradient_checkpointing:
            activations.enable(self.model)
        if config.compile:
            self.model.compile_layers()
        self.reference = Reference(self.model, fresh_adapters=config.lora_rank > 0) if config.beta else None
        if config.schedule is not None:
            wanted, own = make_schedule(config.schedule, config.seed), self.model.schedule
            if own is None or (own.name, own.options) != (wanted.name, wanted.options):
                self.model.schedule = wanted
        self.weights = distributed.weights_for(self.model, self.accelerator, config.max_grad_norm)
        self.sampler = InterleavedSampler(self.model, config.sampler())
        self.optimizer = torch.optim.AdamW(
            lora.trained(self.model),
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            weight_decay=config.weight_decay,
        )
        self.policy, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.weights.begin(self.policy)
        self.update = PolicyUpdate(
            self.model, self.policy, self.optimizer, self.reference, config, self.accelerator, self.weights
        )
        if self.reference is not None and config.sync_ref_every:
            self.accelerator.register_for_checkpointing(self.reference)
        self.scheduled: ScheduleUpdate | None = None
        if config.schedule is not None:
            assert self.model.schedule is not None
            self.scheduled = ScheduleUpdate(self.model.schedule, config, self.accelerator)
            self.accelerator.register_for_checkpointing(self.scheduled)
        self.folder = RunFolder(config.output_dir)
        self.stopped = False
        self.idle = IdleWatch()
        self._claimed = False
        self._last: Path | None = None  # the checkpoint to resume from

    # ---------------------------------------------------------------- the loop

    @property
    def start(self) -> int:
        """Steps done before this run began; known after `claim`."""
        return step_of(self._last)

    def claim(self) -> None:
        """Claims the output directory and finds the checkpoint to resume from. `train` calls it if nobody did. Raises
        ValueError if the directory cannot be claimed."""
        if not self._claimed:
            self._last = checkpoint.claim(self.folder, self.accelerator, self.config)
            self._claimed = True

    def train(self) -> list[dict[str, float]]:
        """Trains up to max_steps and returns the metrics of all steps so far (on the main process).

        SIGINT or SIGTERM ends the run after the current step, with a checkpoint, and sets `stopped`.
        """
        config = self.config
        self.claim()
        if self._last is not None:
            with self.weights.apart():
                checkpoint.load(self.accelerator, self._last)
        history = self.folder.rewind(self.start) if self.accelerator.is_main_process else []
        if config.tracker:
            self.accelerator.init_trackers("unidiff", config=flat(config.to_dict()))
        with stop_signals() as asked:
            for step in range(self.start, config.max_steps):
                try:
                    metrics, experience = self.step(step)
                except RewardError:  # before the update, so this checkpoint is of the step before
                    self._checkpoint(step)
                    raise
                done, last = step + 1, step + 1 == config.max_steps
                if config.eval_steps and done % config.eval_steps == 0 and not last:
                    metrics |= {f"eval/{k}": v for k, v in self.held_out(("greedy",))["greedy"].figures.items()}
                if self.accelerator.is_main_process:
                    history.append(metrics)
                    self.folder.append(metrics)
                    if self.config.saves_rollouts(step):
                        save_rollouts(self.folder.rollouts(done), self.batch(step, experience))
                    if self.on_step is not None:
                        self.on_step(step, metrics, experience)
                if config.tracker:
                    if config.saves_rollouts(step):
                        log_rollouts(self.accelerator.trackers, experience.rows, experience.table, step)
                    self.accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=step)
                self.stopped = largest(self.accelerator, float(bool(asked))) > 0
                if self.stopped or last or (config.save_steps and done % config.save_steps == 0):
                    self._checkpoint(done)
                if self.stopped:
                    break
        return history

    def step(self, step: int) -> tuple[dict[str, float], Experience]:
        """One step: collects experience, then updates. Returns the metrics (equal on every process) and experience."""
        clock = Clock()
        own, refilled = self._rollouts(step, clock)
        everything, routed = self._route(own.table)
        if self.accelerator.is_main_process:
            self.idle.look(step, everything)
        first = self.accelerator.process_index * len(own.rows)
        mine = slice(first, first + len(own.rows))
        experience = self._experience(step, own, everything.rows(mine), routed.rows(mine))
        clock.lap("route")
        metrics: dict[str, float] = {"step": step, **self._trained(step, experience)}
        if self.reference is not None and self.config.sync_ref_every and (step + 1) % self.config.sync_ref_every == 0:
            self.reference.follow()
        clock.lap("update")
        if self.config.refill_groups:
            metrics["refilled"] = sum(everybody(refilled, self.accelerator)) / self.config.num_prompts
        metrics |= routed.metrics | step_figures(self.task, experience, self.accelerator)
        clock.lap("measure")
        metrics |= {f"seconds/{name}": value for name, value in clock.seconds.items()}
        metrics["seconds"] = sum(clock.seconds.values())
        metrics |= {k if k not in metrics else f"log/{k}": v for k, v in everything.metrics.items()}
        return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}, experience

    def _trained(self, step: int, experience: Experience) -> dict[str, float]:
        """Trains the model, the schedule, or both, according to `schedule_turns`. Returns the metrics."""
        turns, scheduled = self.config.schedule_turns, self.scheduled
        if scheduled is None:
            return self.update.run(step, experience)
        of_model = turns == "together" or (turns == "alternate" and step % 2 == 0)
        of_schedule = turns != "alternate" or step % 2 == 1
        metrics = self.update.run(step, experience) if of_model else {}
        return metrics | (scheduled.run(step, experience) if of_schedule else {})

    def _checkpoint(self, step: int) -> None:
        with self.weights.apart():
            checkpoint.save(self.folder, self.accelerator, step)

    def save_model(self, folder: str | Path) -> None:
        """Writes the trained model in its family's layout. Adapters are merged into it, and also saved separately in
        the folder's `adapter`. Called by every process. Raises WriteError."""
        model = self.weights.whole()
        if self.accelerator.is_main_process:
            with whole_folder(Path(folder)) as draft:
                with lora.merged(model):
                    model.save_pretrained(draft)
                if self.config.lora_rank:
                    lora.save_adapter(model, draft / "adapter")
        self.accelerator.wait_for_everyone()

    def batch(self, step: int, experience: Experience) -> RolloutBatch:
        """This process's rollouts of a step with their rewards, to save or display."""
        groups = experience.routed.group_B
        figures = self.task.measure(experience.rows, experience.examples)
        return RolloutBatch(
            rollouts=experience.rollouts,
            titles=[e.title or f"train prompt {int(g)}" for g, e in zip(groups, experience.examples)],
            groups_B=groups,
            fits=fingerprint(self.model),
            figures={name: values.tolist() for name, values in figures.items()},
            table=experience.table,
            routed=experience.routed,
            router=router_settings(self.router),
            config=self.config.to_dict(),
            step=step + 1,
        )

    def held_out(self, ways: Sequence[str] = ("greedy", "sampled")) -> dict[str, Evaluation]:
        """Evaluates on eval_size prompts of eval_split. ways: "greedy" takes the most probable tokens, "sampled" uses
        the sampler's temperatures."""
        config = self.config
        return {
            way: evaluate(
                self.model,
                self.task,
                config.sampler(greedy=way == "greedy"),
                range(min(config.eval_size, self.task.length(config.eval_split) or config.eval_size)),
                split=config.eval_split,
                seed=config.seed,
                accelerator=self.accelerator,
                trace=way == "sampled",  # the report shows these
                rewards=self.rewards if any(f.split("/")[0] == "reward" for f in self.task.headline) else (),
            )
            for way in ways
        }

    # ---------------------------------------------------------------- experience

    def _rollouts(self, step: int, clock: Clock) -> tuple[Judged, int]:
        """This process's rollouts with their rewards, and the number of groups that `refill_groups` replaced."""
        config = self.config
        share = config.num_prompts // self.accelerator.num_processes
        mine = range(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)
        judged, count = self._judged(step, [(p, 0) for p in mine], clock), 0
        for attempt in range(1, config.refill_groups + 1):
            flat = without_spread(self.router, judged.table, config.num_generations)
            if not flat:
                break
            further = self._judged(step, [(mine[i], attempt) for i in flat], clock)
            judged, count = replaced(judged, flat, further, config.num_generations), count + len(flat)
        return judged, count

    def _judged(self, step: int, chosen: Sequence[tuple[int, int]], clock: Clock) -> Judged:
        """Samples and scores the p-th prompts of a step. chosen: (p, attempt); each attempt is another prompt."""
        config = self.config
        numbers = [p + attempt * config.num_prompts for p, attempt in chosen]  # different for all attempts of a step
        places = [
            Place(config.seed, step, n, step * config.num_prompts + p + attempt * _FURTHER)
            for n, (p, attempt) in zip(numbers, chosen)
        ]
        prompts = [ready(self.model, self.task, self.task.training_example(place)) for place in places]
        keys = [noise.key(config.seed, step, n, g) for n in numbers for g in range(config.num_generations)]
        self.sampler.trace = config.saves_rollouts(step)  # for display; tokens do not depend on it
        encoded = [encode(self.model, self.task, e, config.guides) for e in prompts]
        state = TrainerState(global_step=step, max_steps=config.max_steps, epoch=0.0)
        parts = min(config.rollout_parts, len(prompts))
        rollouts, rows, table = sample_and_judge(
            self.sampler, encoded, prompts, keys, self.rewards, parts, clock, state
        )
        if config.schedule_speed:
            table = with_speed(table, rollouts, config.schedule_speed, config.schedule_speed_adds)
        return Judged(rollouts, rows, [e for e in prompts for _ in range(config.num_generations)], table)

    def _route(self, own: RewardTable) -> tuple[RewardTable, Routed]:
        """Routes the rewards of all processes together, because a batch may share statistics. Raises RewardError on
        every process if a required reward lost a value on one."""
        table = RewardTable.concatenate(everybody(own, self.accelerator))
        check_required(self.rewards, table)
        return table, self.router.route(table, torch.arange(len(table.values_BSF)) // self.config.num_generations)

    def _experience(self, step: int, own: Judged, table: RewardTable, routed: Routed) -> Experience:
        rollouts = own.rollouts
        canvas = self.model.render([r.sequence for r in rollouts])
        keys = torch.tensor([noise.key(r.key, step) for r in rollouts], device=canvas.ids.device)
        key = noise.key(self.config.seed, step)
        draws = estimators.draw_views(canvas, *self.update.estimators, self.config.num_iterations, keys, key)
        if self.config.mask_truncated_completions:
            routed = routed.only(ended(own.rows, routed.valid_BS))
        advantage_BS = credited(routed, table.modality_BS, *self.update.estimators)
        advantage = spread(advantage_BS, canvas, rollouts)
        trained = spread(routed.valid_BS.float(), canvas, rollouts) > 0
        guidance = guidance_of(self.model, rollouts, self.config.scales if self.config.score_guidance else {})
        return Experience(rollouts, own.rows, own.examples, table, routed, canvas, draws, advantage, trained, guidance)
