"""One training run: ``python -m wav.training.loop SPEC.json`` (flows start it through :mod:`wav.training.launch`).

The run resumes the newest complete checkpoint of its key, saves one every ``checkpoint_every`` steps and at the end,
and may be killed at any moment. On SIGTERM it saves and exits with status 143.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from wav.code_cache import prepare_compiler
from wav.data.streams import StreamSampler
from wav.data.windows import BatchSampler
from wav.errors import ConfigError, TrainingError, WavError
from wav.io.storage import ObjectStore, open_store
from wav.io.storage.base import patiently
from wav.io.storage.commit import Retention
from wav.processes import die_with_parent
from wav.training.checkpoint import BYTES_PER_PARAMETER, Checkpoints, Found, NotSavedError, RunState, seed_globals
from wav.training.draws import StepInputs
from wav.training.ema import Ema
from wav.training.engine import World, adopt_launcher, init_engine, init_world, plan_batch
from wav.training.graphs import RECOMPUTE, PassGraphs, can_capture
from wav.training.inputs import Inputs, initial_model, open_inputs, passes_through, prune_work
from wav.training.launch import ERROR_MARK
from wav.training.objectives import build_objective
from wav.training.output import Metrics, collect_state, publish_model, save_model, write_output
from wav.training.prefetch import Prefetcher, Source, validation_inputs
from wav.training.preflight import count_parameters, layers_to_recompute, preflight, verify_inputs
from wav.training.record import Progress, Recorder, spec_tracker
from wav.training.spec import TrainSpec, code_digest
from wav.training.step import Done, Row, evaluate, learning_rate, mean_row, update
from wav.training.throughput import operations_per_sample, peak_memory, peak_operations, tokens_per_sample
from wav.training.universal import Layout

LOG = logging.getLogger("wav.training")
INTERRUPTED = 128 + signal.SIGTERM


class Trainer:
    """State of one run on one rank."""

    def __init__(self, spec: TrainSpec, world: World, inputs: Inputs, store: ObjectStore) -> None:
        self.spec, self.settings, self.world, self.inputs, self.store = spec, spec.train, world, inputs, store
        self.plan = plan_batch(self.settings, world.ranks)
        self.model = initial_model(spec, inputs)
        sizes = (spec.data.memory_frames, spec.data.action_dim)
        self.objective = build_objective(self.settings, self.model, *sizes, spec.coupling)
        self.parameters, self.trained = count_parameters(self.objective)
        if self.settings.compile == "on" or (self.settings.compile == "auto" and world.device.type == "cuda"):
            prepare_compiler()
            self.model.compile_blocks()
            if can_capture(self.settings, world.device, world.ranks, self.plan.accumulation):
                setting = f"{spec.stage}.compile = {self.settings.compile}"
                self.objective.graphs = PassGraphs(self.objective.compute, self.objective, setting)
        self._save_memory()
        layout = Layout(world.ranks, self.settings.zero_stage, self.settings.precision)
        if world.is_main:
            preflight(spec, self.objective, layout, world.device, BYTES_PER_PARAMETER)
        self.tokens = tokens_per_sample(spec, inputs)
        self.operations = operations_per_sample(spec, inputs, self.objective)
        keep = Retention(self.settings.keep_last, self.settings.keep_best, self.settings.keep_every)
        self.checkpoints = Checkpoints(spec.work / "checkpoints", store, spec.prefix, keep, world, layout)
        found = self.checkpoints.find()
        universal = found is not None and bool(found.universal)
        self.engine = init_engine(self.objective, self.settings, self.plan, world, universal)
        self.ema = Ema(self.engine.module, self.settings.ema_decay, world.rank, world.ranks)
        places = (self.settings.batch_size, self.settings.seed, world.rank, world.ranks)
        sampler = BatchSampler(len(inputs.train), *places)
        if self.settings.streams:
            sampler = StreamSampler(inputs.train.shards, *places, self.settings.streams)
        self.source = Source(inputs.train, sampler, self.objective, self.plan, world)
        held = inputs.validation
        self.held_out = validation_inputs(held, self.objective, self.plan, world.device) if held else []
        self.recorder = Recorder(spec.work / "live", world.is_main, spec_tracker(spec) if world.is_main else None)
        self.losses: list[Row] = []  #: since the last recorded row, as floats: a checkpoint holds them exactly
        self.interrupted = False
        self._asked = world.ask_most(False)
        self._resume(found)
        self._begin = time.monotonic()

    def _save_memory(self) -> None:
        """Let blocks be computed again backwards, as ``gradient_checkpointing`` says."""
        if self.settings.gradient_checkpointing == "off":
            return
        self.model.enable_gradient_checkpointing(RECOMPUTE)
        if self.settings.gradient_checkpointing == "auto":
            layers, why = layers_to_recompute(self.spec, self.inputs, self.objective, self.plan.micro, self.world)
            self.model.recompute(layers)
            self._say(f"{self.spec.stage}: {why}")

    def _resume(self, found: Found | None) -> None:
        state = self.checkpoints.resume(found, self.engine, self.ema) if found else None
        self.start = state.step if state else 0
        self._seconds, self._waited = (state.seconds, state.waited) if state else (0.0, 0.0)
        if state:
            self.recorder.restore(state.rows)
            self.losses = state.losses
            self._say(f"{self.spec.stage}: resumed from the checkpoint of step {state.step}")

    def run(self) -> None:
        """Train to the last step and write the output folder."""
        self._say(
            f"{self.spec.stage}: {self.trained / 1e6:.2f} of {self.parameters / 1e6:.2f} million parameters train on "
            f"{len(self.inputs.train)} windows, {self.settings.steps} steps of {self.settings.batch_size}, "
            f"{self.world.ranks} rank(s) on {self.world.device}, run {self.spec.key}"
        )
        signal.signal(signal.SIGTERM, self._on_signal)
        batches = Prefetcher(self.source, self.start, self.settings.steps)
        progress = Progress(
            self.spec.stage, self.settings.steps, self.settings.batch_size, self.start, self.world.is_main
        )
        for step, inputs in enumerate(batches, self.start + 1):
            self._step(step, inputs, batches.waited, progress)
        self._finish(batches.waited)

    def _step(self, step: int, inputs: list[StepInputs], waited: float, progress: Progress) -> None:
        """Optimiser step ``step`` (from 1), and what falls due after it: a row, validation, a checkpoint."""
        last = step == self.settings.steps
        record = last or step % self.settings.log_every == 0
        stop = self._stops()
        save = last or stop or step % self.settings.checkpoint_every == 0
        done = update(self.engine, self.ema, self.settings, step, inputs)
        self._check(step, done)
        if not done.dropped:
            self.losses.append(done.losses)
        progress.step(step, done.losses["loss"], waited)
        if record and self.losses:
            row, self.losses = mean_row(self.losses), []
            row = dict(zip(row, self.world.mean(list(row.values())), strict=True))
            if self.recorder.is_spike(row["loss"], self.settings.spike_factor):
                self._spiked(step, row["loss"])
            row |= {"learning_rate": learning_rate(self.settings, step - 1)}
            if done.norm is not None and not done.dropped:
                row["grad_norm"] = float(done.norm)
            if self.engine.skipped_steps:
                row["skipped_steps"] = float(self.engine.skipped_steps)
            row["time/samples_per_second"] = progress.rate(step)
            row["time/data_wait_share"] = waited / max(1e-9, self._elapsed() - self._seconds)
            self.recorder.add(step, row)
        every = self.settings.validate_every or max(1, self.settings.steps // 10)
        if self.held_out and (last or step % every == 0):
            losses = evaluate(self.engine, self.ema, self.held_out)
            self.recorder.add(step, {f"validation/{name}": value for name, value in losses.items()})
        if save:
            self._save(step, waited, needed=last or stop)
        if stop and not last:
            self._say(f"{self.spec.stage}: interrupted at step {step}, which is saved; run again to go on")
            raise SystemExit(INTERRUPTED)

    def _stops(self) -> bool:
        """Whether some rank is interrupted; of the others each knows what they were a step ago, and waits for none."""
        if self.world.ranks == 1:
            return self.interrupted
        asked, self._asked = self._asked, self.world.ask_most(self.interrupted)
        return bool(asked.numbers()[0])

    def _save(self, step: int, waited: float, needed: bool) -> None:
        """Write a checkpoint; one that is not ``needed`` may fail (a full disk), the next one tries again."""
        state = RunState(step, self.recorder.rows, self.losses, self._elapsed(), self._waited + waited)
        loss = self.recorder.latest("validation/loss")
        facts = {} if loss is None else {"validation_loss": loss}
        try:
            folder = self.checkpoints.save(self.engine, self.ema, state, facts)
        except NotSavedError as error:
            if needed:
                raise
            self._say(f"WARNING: {self.spec.stage}: no checkpoint of step {step}, training goes on: {error}")
            return
        self._say(f"{self.spec.stage}: checkpoint of step {step} in {folder}")

    def _check(self, step: int, done: Done) -> None:
        """End a run that diverged: its loss is not finite, or more steps were dropped than it may lose."""
        loss, count, most = done.losses["loss"], self.engine.skipped_steps, self.settings.max_skipped_steps
        if done.dropped and count <= most:
            self._say(f"WARNING: {self.spec.stage}: step {step} is dropped, its gradients are not finite ({count})")
        elif done.dropped or not math.isfinite(loss):
            good, norm = self.checkpoints.newest(), None if done.norm is None else float(done.norm)
            raise TrainingError(
                f"{self.spec.stage}.learning_rate = {self.settings.learning_rate}: loss {loss}, gradient norm "
                f"{norm} at step {step}, training diverged; lower it, or set max_skipped_steps (now {most}) to go "
                f"on without such steps (the last good checkpoint is {good or 'none yet'})"
            )

    def _spiked(self, step: int, loss: float) -> None:
        steps = [recorded for recorded, row in self.recorder.rows if "loss" in row]
        good = self.checkpoints.newest(steps[-1])
        raise TrainingError(
            f"{self.spec.stage}.spike_factor = {self.settings.spike_factor}: loss {loss:.4g} at step {step} is more "
            f"than that many times the recent {self.recorder.usual_loss():.4g}; lower learning_rate, or raise "
            f"spike_factor to go on (the last good checkpoint is {good or 'none yet'}; newer ones are suspect)"
        )

    def _finish(self, waited: float) -> None:
        """Average, upload and write the output folder."""
        state = collect_state(self.model, self.ema, "model.")
        memory = peak_memory(self.world)
        if not self.world.is_main:
            return
        seconds, every = max(1e-3, self._elapsed()), self.settings.steps * self.settings.batch_size
        metrics: Metrics = {
            "stage": self.spec.stage,
            "steps": self.settings.steps,
            "resumed_from_step": self.start,
            "seconds": round(seconds, 3),
            "samples_per_second": round(every / seconds, 3),
            "tokens_per_second": round(every * self.tokens / seconds, 1),
            "data_wait_share": round((self._waited + waited) / seconds, 5),
            "parameters": self.parameters,
            "trainable_parameters": self.trained,
            **memory,
        }
        peak = peak_operations(self.world.device, self.settings)
        if peak is not None:
            metrics["mfu"] = round(every * self.operations / seconds / (peak * self.world.ranks), 5)
        losses = ("loss", "loss_video", "loss_value", "loss_action", "validation/loss")
        for name in (*losses, "grad_norm", "skipped_steps"):
            value = self.recorder.latest(name)
            if value is not None:
                metrics[name.replace("/", "_")] = value
        self.recorder.close()
        self.checkpoints.uploader.wait()
        model_folder = fresh_folder(self.spec.work / "model")
        save_model(self.model, state, model_folder)
        uploaded = patiently(lambda: publish_model(self.spec, self.store, model_folder), LOG.warning)
        write_output(self.spec, self.inputs, model_folder, self.spec.work / "live" / "plots", metrics, uploaded)
        self._say(f"{self.spec.stage}: done in {seconds:.0f} s, weights at {self.store.uri(self.spec.prefix)}/model")

    def _elapsed(self) -> float:
        """Seconds trained, over every process that worked on this run."""
        return self._seconds + time.monotonic() - self._begin

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True

    def _say(self, text: str) -> None:
        if self.world.is_main:
            LOG.info("%s", text)


def fresh_folder(folder: Path) -> Path:
    """An empty folder at this path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def pass_through(spec: TrainSpec, inputs: Inputs, store: ObjectStore) -> None:
    """Hand the previous stage's weights on: a model without a value expert has nothing to train in this stage."""
    LOG.info("%s: model.value_expert = false, so there is nothing to train; the weights pass unchanged", spec.stage)
    model = initial_model(spec, inputs)
    folder = fresh_folder(spec.work / "model")
    save_model(model, collect_state(model, None, ""), folder)
    parameters, _ = count_parameters(model)
    metrics: Metrics = {"stage": spec.stage, "steps": 0, "trainable_parameters": 0, "parameters": parameters}
    write_output(spec, inputs, folder, None, metrics, publish_model(spec, store, folder))


def run(spec: TrainSpec) -> None:
    """Run a spec on this rank; errors are those of what it reads, of the store and of training itself."""
    if spec.threads:
        torch.set_num_threads(spec.threads)
    seed_globals(spec.train.seed)
    store = open_store(spec.store, spec.endpoint, spec.region)
    if int(os.environ["RANK"]) == 0:
        store.check()
        spec.work.mkdir(parents=True, exist_ok=True)
        for folder in prune_work(spec):
            LOG.info("%s: removing the work of an older run, %s", spec.stage, folder)
            shutil.rmtree(folder)
    world = init_world(spec.device)
    inputs = open_inputs(spec)
    if world.is_main:
        verify_inputs(spec, inputs)
    if passes_through(spec):
        if world.is_main:
            pass_through(spec, inputs, store)
    else:
        Trainer(spec, world, inputs, store).run()
    if world.ranks > 1:
        dist.barrier()
    dist.destroy_process_group()


def check_node(spec: TrainSpec) -> None:
    """ConfigError where a rank of several nodes has other code than its run, or is one of too many or too few."""
    wanted, ranks = spec.train.nodes * spec.train.ranks, int(os.environ["WORLD_SIZE"])
    if ranks != wanted:
        raise ConfigError(
            f"WORLD_SIZE = {ranks}: {spec.stage} has {spec.train.nodes} nodes of {spec.train.ranks} ranks; "
            f"start {wanted}"
        )
    if spec.code != code_digest(spec.stage):
        raise ConfigError(f"{socket.gethostname()}: its code is not that of the run; update it")


def main() -> int:
    """Entry point of every rank, whatever launcher started it: the spec file is the last argument; else ConfigError."""
    die_with_parent()
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING, force=True)
    LOG.setLevel(logging.INFO)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        path = Path(sys.argv[-1])
        if len(sys.argv) < 2 or not path.is_file():
            raise ConfigError(
                f"training spec {sys.argv[-1]!r}: no such file; give the JSON that make_spec describes (on several "
                "nodes the run's folders must lie on a file system that all of them share)"
            )
        spec = TrainSpec.from_json(path.read_bytes())
        adopt_launcher()
        if spec.train.nodes > 1:
            check_node(spec)
        run(spec)
    except WavError as error:
        LOG.error("%s%s", ERROR_MARK, error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
