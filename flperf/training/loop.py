"""The training loop, in the order in which data flows: load clips, encode, forward, backward, update; then log, save
and validate.

No step waits for the device: values are read only when they are logged.
"""

import gc
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from flperf.data.prefetch import prefetch_to_device
from flperf.data.samplers import ClipBatch
from flperf.engine.checkpoint import Checkpoints
from flperf.engine.compile_cache import compile_cache_state
from flperf.engine.engine import head_weights, load_weights
from flperf.engine.optimizer import set_schedule
from flperf.engine.preemption import Preempted, PreemptionVote
from flperf.errors import UserError
from flperf.evaluation.evaluate import evaluate_run
from flperf.evaluation.report import summary, table
from flperf.run import Components, TrainingRun
from flperf.training.profiler import PROFILED_STEPS, StepProfile
from flperf.training.run_folder import RunFolder
from flperf.training.schedule import Schedule
from flperf.training.statistics import latent_statistics
from flperf.training.step_meter import StepMeter
from flperf.training.timing import process_seconds
from flperf.training.tracking import Tracker

WARM_UP_STEPS = 2  # in which everything that can be compiled is


def train(components: Components, engine: DeepSpeedEngine, folder: RunFolder, *, profiled: bool = False) -> None:
    """Train from the last checkpoint in the folder, or from the start, to the end of the budget."""
    config, process = components.config, components.process
    checkpoints = Checkpoints(engine, folder.checkpoints, config.checkpoint.keep)
    first_step = checkpoints.resume()
    schedule = Schedule(config.trainer, components.dataset.train_size, first_step)
    tracker = Tracker(config, folder, process.is_main, first_step, schedule.total_steps)
    tracker.message(
        f"resumed at step {first_step}" if first_step else f"training {schedule.total_steps} steps; the first compiles"
    )
    statistics = latent_statistics(components, folder.statistics)
    run = TrainingRun(**vars(components.with_statistics(*statistics)), engine=engine)
    batches = prefetch_to_device(run.dataset.train_batches(first_step, run.share, process.device), process.device)
    try:
        if run.dataset.validation_size and config.evaluation.eval_first and first_step == 0:
            validate(run, tracker, schedule, 0)
        if profiled and len(schedule.steps) < PROFILED_STEPS:
            raise UserError(f"--profile: needs {PROFILED_STEPS} steps, but only {len(schedule.steps)} are left")
        with StepProfile(folder.path / "profile", process) if profiled else nullcontext() as profile:
            train_steps(run, schedule, batches, tracker, checkpoints, profile)
        checkpoints.close()
    finally:
        batches.close()
        tracker.close()
    if process.is_main:
        print_summary(folder, schedule, dumped=bool(config.evaluation.dump_examples))


def train_steps(
    run: TrainingRun,
    schedule: Schedule,
    batches: Iterator[ClipBatch],
    tracker: Tracker,
    checkpoints: Checkpoints,
    profile: StepProfile | None,
) -> None:
    meter = StepMeter(run, profile)
    after_step = AfterStep(run, schedule, tracker, checkpoints, meter, profile)
    with FrozenGarbage() as garbage:
        for step in schedule.steps:
            rate = set_schedule(run.engine, step, run.config.trainer, schedule.total_steps)
            meter.add(train_step(run, batches, meter))
            after_step(step + 1, rate)
            garbage.step()


class FrozenGarbage:
    """Keeps Python's garbage collector away from what lives as long as the run. After the steps that compile there are
    half a million such objects, and going through them takes a tenth of a second, in the middle of a step."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps == WARM_UP_STEPS:
            gc.collect()
            gc.freeze()

    def __enter__(self) -> "FrozenGarbage":
        return self

    def __exit__(self, *_) -> None:
        gc.unfreeze()


def train_step(run: TrainingRun, batches: Iterator[ClipBatch], meter: StepMeter) -> Tensor:
    """One update. Returns the mean loss over this process's micro-batches, a scalar on the device."""
    stage, losses = meter.stage, []
    for _ in range(run.share.accumulation_steps):
        with stage("data"):
            batch = next(batches)
        with stage("encode"):
            context, target = run.training_latents(batch)
            sample = batch.sample.to(run.process.device, non_blocking=True)
        with stage("forward"):
            loss = run.objective.loss(run.engine, context, target, sample, normaliser=run.normaliser)
        with stage("backward"):
            run.engine.backward(loss)
        with stage("optim"):
            run.engine.step()
        losses.append(loss.detach())
        meter.count_clips(batch)
    return torch.stack(losses).mean()


class AfterStep:
    """What follows each step: metrics, checkpoint and validation when they are due, and the end of the run after a stop
    signal or too many skipped updates."""

    def __init__(
        self,
        run: TrainingRun,
        schedule: Schedule,
        tracker: Tracker,
        checkpoints: Checkpoints,
        meter: StepMeter,
        profile: StepProfile | None,
    ):
        self.run, self.schedule, self.tracker, self.checkpoints = run, schedule, tracker, checkpoints
        self.meter, self.profile = meter, profile
        self.vote = PreemptionVote(run.process.device)
        self.skipped_updates, self.skipped_in_a_row = run.engine.skipped_steps, 0

    def __call__(self, done: int, rate: float) -> None:
        """done: steps of the run so far; rate: the learning rate of the last one. A collective."""
        self._limit_skipped_updates(done)
        self.tracker.step()
        if self.profile and self.profile.step():
            trace = f"the trace is in {self.profile.folder}; open it at https://ui.perfetto.dev"
            self.tracker.message(f"{self.profile.table}\n{trace}")
        preempted = self.vote.passed()
        self._log(done, rate, preempted)
        with self.meter.paused():
            self._save(done, preempted)
            self._validate(done)

    def _limit_skipped_updates(self, done: int) -> None:
        before, self.skipped_updates = self.skipped_updates, self.run.engine.skipped_steps
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.skipped_updates > before else 0
        if self.skipped_in_a_row >= self.run.config.trainer.max_skipped_updates:
            raise UserError(
                f"step {done - 1}: {self.skipped_in_a_row} updates in a row had a non-finite loss or gradient and were "
                "skipped; lower trainer.learning_rate or check the data (trainer.max_skipped_updates sets this limit)"
            )

    def _log(self, done: int, rate: float, preempted: bool) -> None:
        first, last = self.schedule.steps.start + 1, self.schedule.steps.stop
        if preempted or done in (first, last) or done % self.run.config.tracking.log_every == 0:
            self.tracker.log(self.meter.read(done, self.schedule.epoch(done), rate))
        if done == first:  # reading the metrics has just waited for the step
            seconds, state = process_seconds(), compile_cache_state()
            self.tracker.message(f"first step after {seconds:.1f} s (compile cache: {state})")
            self.tracker.describe(first_step_s=round(seconds, 2), compile_cache=state)

    def _save(self, done: int, preempted: bool) -> None:
        if preempted or self.schedule.due(self.run.config.checkpoint.save_every, done):
            self.checkpoints.save(done)
        self.checkpoints.check()
        if preempted:
            self.checkpoints.wait()
            self.tracker.message(f"stopped by a signal and saved at step {done}; the same command resumes")
            raise Preempted

    def _validate(self, done: int) -> None:
        if self.run.dataset.validation_size and self.schedule.due(self.run.config.evaluation.eval_every, done):
            self.checkpoints.wait()  # so that no step is lost if the validation fails or is killed
            validate(self.run, self.tracker, self.schedule, done)


def validate(run: TrainingRun, tracker: Tracker, schedule: Schedule, step: int) -> None:
    """Evaluate the averaged weights on the validation clips; log and print the comparison with the baselines."""
    load_weights(run.forecaster, head_weights(run.engine, average=run.config.trainer.ema_decay is not None), run.dtype)
    scores = evaluate_run(run)
    tracker.log({"step": step, "epoch": schedule.epoch(step), "split": "val", **scores.as_dict()})
    tracker.table("val/errors", *table(scores), step)
    errors = f"errors of normalised latents:\n{summary(scores)}"
    tracker.message(f"step {step}: validation loss {scores.loss:.4f}; {errors}")
    if run.config.evaluation.dump_examples and run.process.is_main:
        from flperf.evaluation.visualise import dump_examples  # matplotlib takes a second to load

        for picture in dump_examples(run, tracker.folder.path / "dump" / schedule.dump_name(step)):
            tracker.picture(f"forecast/{picture.parent.name}", picture, step)


def print_summary(folder: RunFolder, schedule: Schedule, *, dumped: bool) -> None:
    """Print what the run's folder contains."""
    print(f"step {schedule.steps.stop} of {schedule.total_steps}. Everything is in {folder.path}:")
    print("  config.yaml, run.json   configuration, versions and devices")
    print("  metrics.jsonl           one line for each logged step")
    print("  checkpoints/            the same command resumes from the last one")
    if dumped:
        print("  dump/                   example forecasts: overview.png, videos, tensors")
