"""The training loop, in the order in which data flows: wait for clips, encode, head and loss, backward, update; then
log, save, evaluate.

Nothing in a step waits for the device on our account; numbers are read when they are logged.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from flperf.config.validate import parse_interval
from flperf.data.prefetch import prefetch_to_device
from flperf.data.samplers import ClipBatch
from flperf.engine.checkpoint import Checkpoints
from flperf.engine.compile_cache import compile_cache_state
from flperf.engine.devices import memory_gb, peak_flops
from flperf.engine.engine import head_weights, load_weights
from flperf.engine.optimizer import set_schedule
from flperf.engine.preemption import Preempted, PreemptionVote
from flperf.errors import UserError
from flperf.evaluation.evaluate import evaluate_run
from flperf.evaluation.report import summary, table
from flperf.models.baselines import LatentSample, load_statistics, save_statistics
from flperf.run import Run, flops_per_clip
from flperf.training.profiler import PROFILED_STEPS, StepProfile
from flperf.training.run_folder import RunFolder
from flperf.training.timing import StageTimer, process_seconds
from flperf.training.tracking import Tracker


class Schedule:
    """When a run ends, and what is due after a step. An epoch is `train_size` clips, which need not be a whole number
    of steps."""

    def __init__(self, run: Run, first_step: int):
        trainer = run.config.trainer
        self.steps_per_epoch = run.dataset.train_size / trainer.batch_size
        self.total_steps = trainer.max_steps or math.ceil(trainer.max_epochs * self.steps_per_epoch)
        stop = first_step + trainer.stop_after if trainer.stop_after else self.total_steps
        self.steps = range(first_step, min(stop, self.total_steps))

    def epoch(self, step: int) -> int:
        return math.floor(step / self.steps_per_epoch)

    def dump_name(self, done: int) -> str:
        """`epoch_EE` where an epoch ends with the step that makes `done` steps; elsewhere with the step: an epoch may
        hold several."""
        epoch = self.epoch(done)
        return f"epoch_{epoch:02d}" if self.epoch(done - 1) < epoch else f"epoch_{epoch:02d}_step_{done:06d}"

    def due(self, interval: str, done: int) -> bool:
        """Whether an interval ("500", "2 epochs") ends with the step that makes `done` steps, or the run does."""
        count, unit = parse_interval(interval, "interval")
        period = count if unit == "step" else count * self.steps_per_epoch
        return int(done / period) > int((done - 1) / period) or done == self.steps.stop


class StepMeter:
    """What happened since the last logged line: losses stay on the device until then."""

    def __init__(self, run: Run, profile: StepProfile | None = None):
        self.run, self.profile = run, profile
        self.timer = StageTimer(run.process.device)
        flops = sum(flops_per_clip(run).values())
        self.flops_per_step = flops * run.share.batch_size / run.process.world_size
        self.peak = peak_flops(run.process.device, run.dtype)
        self.skipped_clips = 0
        self.restart()

    def restart(self) -> None:
        self.steps, self.losses, self.started = 0, [], time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; "data" by the host's clock even on CUDA, where the device is idle then."""
        with self.timer.stage(name, host=name == "data"), self.profile.stage(name) if self.profile else nullcontext():
            yield

    def read(self, step: int, epoch: int, rate: float) -> dict:
        """One line of metrics; loss and skipped clips over all processes, times of this one."""
        totals = torch.stack(
            [torch.stack(self.losses).mean().double().cpu(), torch.tensor(float(self.skipped_clips)).double()]
        )
        totals = totals.to(self.run.process.device)
        dist.all_reduce(totals)
        loss, skipped = totals.tolist()
        seconds = (time.perf_counter() - self.started) / self.steps
        geometry, engine, stages = self.run.geometry, self.run.engine, self.timer.read(self.steps)
        norm = engine.get_global_grad_norm()
        metrics = {
            "step": step,
            "epoch": epoch,
            "loss": loss / self.run.process.world_size,
            "lr": rate,
            "grad_norm": None if norm is None else float(norm),
            "clips_per_s": self.run.share.batch_size / seconds,
            "tokens_per_s": self.run.share.batch_size * (geometry.context_tokens + geometry.target_tokens) / seconds,
            "step_ms": seconds * 1e3,
            **stages,
            "head_ms": stages["forward_ms"] + stages["backward_ms"],
            "mfu": self.flops_per_step / seconds / self.peak,
            "memory_gb": memory_gb(self.run.process.device),
            "skipped_clips": int(skipped),  # since this start
            "skipped_updates": engine.skipped_steps,
        }
        self.restart()
        return metrics


def train(run: Run, folder: RunFolder, *, profiled: bool = False) -> None:
    """Train from the folder's last checkpoint, or from the start, to the end of the budget."""
    checkpoints = Checkpoints(run.engine, folder.checkpoints, run.config.checkpoint.keep)
    first_step = checkpoints.resume()
    schedule = Schedule(run, first_step)
    tracker = Tracker(run.config, folder, run.process.is_main, first_step, schedule.total_steps)
    tracker.say(
        f"resumed at step {first_step}" if first_step else f"training {schedule.total_steps} steps; the first compiles"
    )
    use_latent_statistics(run, folder)
    batches = prefetch_to_device(
        run.dataset.train_batches(first_step, run.share, run.process.device), run.process.device
    )
    try:
        if run.dataset.validation_size and run.config.evaluation.eval_first and first_step == 0:
            validate(run, tracker, schedule, 0)
        if profiled and len(schedule.steps) < PROFILED_STEPS:
            raise UserError(
                f"--profile: watches the first {PROFILED_STEPS} steps, but only {len(schedule.steps)} are left to do"
            )
        with StepProfile(folder.path / "profile", run.process) if profiled else nullcontext() as profile:
            train_steps(run, schedule, batches, tracker, checkpoints, profile)
        checkpoints.close()
    finally:
        batches.close()
        tracker.close()
    if run.process.is_main:
        print(f"step {schedule.steps.stop} of {schedule.total_steps}. Everything is in {folder.path}:")
        print("  config.yaml, run.json   what ran")
        print("  metrics.jsonl           one line a logged step")
        print("  checkpoints/            resumed by the same command")
        if run.config.evaluation.dump_examples:
            print("  dump/                   forecasts to look at: overview.png, videos, tensors")


def train_steps(
    run: Run,
    schedule: Schedule,
    batches: Iterator[ClipBatch],
    tracker: Tracker,
    checkpoints: Checkpoints,
    profile: StepProfile | None,
) -> None:
    config, engine, meter, vote = run.config, run.engine, StepMeter(run, profile), PreemptionVote(run.process.device)
    in_a_row = 0
    for step in schedule.steps:
        rate = set_schedule(engine, step, config.trainer, schedule.total_steps)
        skipped_before = engine.skipped_steps
        meter.losses.append(train_step(run, batches, meter))
        in_a_row = in_a_row + 1 if engine.skipped_steps > skipped_before else 0
        if in_a_row >= config.trainer.max_skipped_updates:
            raise UserError(
                f"step {step}: {in_a_row} updates in a row had a non-finite loss or gradient and were skipped; lower "
                "trainer.learning_rate or look at the data (trainer.max_skipped_updates sets this limit)"
            )
        meter.steps += 1
        done = step + 1
        tracker.step()
        if profile and profile.step():
            tracker.say(f"{profile.table}\nthe trace is in {profile.folder}; open it at https://ui.perfetto.dev")
        interrupted = vote.passed()
        if (
            done % config.tracking.log_every == 0
            or done in (schedule.steps.start + 1, schedule.steps.stop)
            or interrupted
        ):
            tracker.log(meter.read(done, schedule.epoch(done), rate))
        if done == schedule.steps.start + 1:
            say_first_step(tracker)
        paused = time.perf_counter()
        if schedule.due(config.checkpoint.save_every, done) or interrupted:
            checkpoints.save(done)
        checkpoints.check()
        if interrupted:
            checkpoints.wait()
            tracker.say(f"stopped by a signal and saved at step {done}; the same command goes on from there")
            raise Preempted
        if run.dataset.validation_size and schedule.due(config.evaluation.eval_every, done):
            checkpoints.wait()  # a validation that fails, or is killed, takes no step along
            validate(run, tracker, schedule, done)
        meter.started += time.perf_counter() - paused  # throughput is that of training alone


def say_first_step(tracker: Tracker) -> None:
    """How long the start took, from the start of this process to the end of its first step, which was just waited
    for."""
    seconds, state = process_seconds(), compile_cache_state()
    tracker.say(f"first step after {seconds:.1f} s (compile cache: {state})")
    tracker.describe(first_step_s=round(seconds, 2), compile_cache=state)


def train_step(run: Run, batches: Iterator[ClipBatch], meter: StepMeter) -> Tensor:
    """One update; returns the loss (a scalar on the device), the mean over this process's micro-batches."""
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
        meter.skipped_clips += len(batch.skipped)
    return torch.stack(losses).mean()


def validate(run: Run, tracker: Tracker, schedule: Schedule, step: int) -> None:
    """Evaluate the averaged weights on the validation clips, log and print the comparison with the baselines."""
    load_weights(run.forecaster, head_weights(run.engine, average=run.config.trainer.ema_decay is not None), run.dtype)
    scores = evaluate_run(run)
    tracker.log({"step": step, "epoch": schedule.epoch(step), "split": "val", **scores.as_dict()})
    tracker.table("val/errors", *table(scores), step)
    tracker.say(f"step {step}: validation loss {scores.loss:.4f}; errors of normalised latents:\n{summary(scores)}")
    if run.config.evaluation.dump_examples and run.process.is_main:
        from flperf.evaluation.visualise import dump_examples  # matplotlib takes a second to load

        for picture in dump_examples(run, tracker.folder.path / "dump" / schedule.dump_name(step)):
            tracker.picture(f"forecast/{picture.parent.name}", picture, step)


def use_latent_statistics(run: Run, folder: RunFolder) -> None:
    """Statistics and baselines: read from the run's folder, or fitted on the first training clips and written there."""
    device = run.process.device
    if not folder.statistics.exists():
        latents = LatentSample(run.config.latents.embedding_norm, run.geometry, device)
        batches = run.dataset.train_batches(0, run.share, device)
        clips = min(run.config.latents.statistics_clips, run.dataset.train_size)
        rounds = math.ceil(clips / (run.share.micro_batch_size * run.share.world_size))
        for _ in tqdm(
            range(rounds), desc="latent statistics", leave=False, disable=None if run.process.is_main else True
        ):
            batch = next(batches)
            latents.add(*run.raw_latents(batch), batch.sample)
        batches.close()
        measured = latents.result(run.dataset.channel_statistics)
        if run.process.is_main:
            save_statistics(folder.statistics, *measured)
    dist.barrier()
    run.use_statistics(*load_statistics(folder.statistics, device))
