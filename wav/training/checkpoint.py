"""Checkpoints of a run: written atomically to a local folder, uploaded in the background, found again on restart.

A checkpoint is a folder ``step-00000500`` with DeepSpeed's model and optimiser state, every rank's average and random
states, and a manifest written last (:mod:`wav.io.storage.commit`). Without a manifest it does not exist.
"""

from __future__ import annotations

import functools
import logging
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from wav.errors import CheckpointError, StorageError, cut
from wav.io.files import MANIFEST, replace_folder, require_free_space
from wav.io.readers import understood
from wav.io.storage.base import ObjectStore, disk_errors, patiently
from wav.io.storage.commit import Retention, facts_of, publish, read_manifest, retain, seal
from wav.seeding import derive_seed
from wav.training.ema import Ema
from wav.training.engine import World
from wav.training.resume import announce, local_checkpoints, newest_checkpoint, remove
from wav.training.step import Row, mean_row
from wav.training.universal import Layout, convert, needs_conversion, plain_values_only

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

LOG = logging.getLogger("wav.training")
TAG = "engine"
#: Bytes of a checkpoint per trained parameter: weights, two moments, average and (bf16) master weights, rounded up.
BYTES_PER_PARAMETER = 24


@dataclass(frozen=True)
class RunState:
    """What a rank must know, besides weights, to go on as if it had never stopped."""

    step: int  #: optimiser steps done, which is where the sampler is
    rows: list[tuple[int, Row]]  #: recorded metrics
    losses: list[Row]  #: of the steps since the last row
    seconds: float  #: trained so far
    waited: float  #: of them, for data


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from: its folder, how it is cut, and its universal form where this run needs that."""

    folder: Path
    layout: Layout
    universal: Path | None


class NotSavedError(StorageError):
    """No checkpoint was written, for a reason that every rank knows: the run can go on without it."""


class Uploader:
    """Uploads sealed checkpoint folders in a thread: always the newest first, older ones while it has nothing to do.

    A run does not wait for a slow store, so checkpoints may queue up. Of those only the one on its way and the newest
    are held; the others go up if they are still there, which is to say if retention keeps them, when their turn comes.
    """

    def __init__(self, store: ObjectStore, prefix: str, keep: Retention) -> None:
        self.store, self.prefix, self.keep = store, prefix, keep
        self.busy: Path | None = None
        self.error: StorageError | None = None
        self._queue: list[Path] = []
        self._newest: Path | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, folder: Path) -> None:
        """Queue a folder."""
        with self._lock:
            self._newest = folder
            self._queue.append(folder)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="upload")
                self._thread.start()

    def wait(self) -> None:
        """Wait until everything queued is up; raises the StorageError of the newest checkpoint's upload."""

        def finish() -> None:
            if self.error is not None and self._newest is not None:
                self.submit(self._newest)
            while (thread := self._thread) is not None:
                thread.join()
            if self.error is not None:
                raise self.error

        patiently(finish, LOG.warning)

    def holds(self, folder: Path) -> bool:
        """Whether ``folder`` is being uploaded or is next."""
        with self._lock:
            return folder in (self.busy, *self._queue[-1:])

    def _next(self) -> Path | None:
        """Take the newest folder of the queue that is still complete; None ends the thread."""
        with self._lock:
            self._queue = [folder for folder in self._queue if (folder / MANIFEST).is_file()]
            self.busy = self._queue.pop() if self._queue else None
            if self.busy is None:
                self._thread = None
            return self.busy

    def _work(self) -> None:
        while (folder := self._next()) is not None:
            error: StorageError | None = None
            try:
                publish(self.store, folder, f"{self.prefix}/{folder.name}")
                if folder == self._newest:
                    announce(self.store, self.prefix, folder.name)
                retain(self.store, self.prefix, self.keep)
            except StorageError as refused:  # training goes on; the next checkpoint tries again, the last one counts
                error = refused
                LOG.warning("checkpoint %s stays local for now: %s", folder.name, error)
            except Exception as bug:  # an upload must not end unseen, nor the thread with the queue still full
                error = StorageError(f"{folder}: upload failed ({bug!r}); this is a bug, please report it")
                LOG.exception("checkpoint %s stays local for now", folder.name)
            if folder == self._newest:
                self.error = error


class Checkpoints:
    """The checkpoints of one run (one key)."""

    def __init__(
        self, folder: Path, store: ObjectStore, prefix: str, keep: Retention, world: World, layout: Layout
    ) -> None:
        self.folder, self.store, self.prefix = folder, store, f"{prefix}/checkpoints"
        self.keep, self.world, self.layout = keep, world, layout
        self.uploader = Uploader(store, self.prefix, keep)

    def save(self, engine: DeepSpeedEngine, ema: Ema, state: RunState, facts: dict[str, float] | None = None) -> Path:
        """Write a checkpoint (every rank calls it) and queue its upload; returns its folder.

        ``facts`` are numbers for the manifest (``validation_loss`` decides which checkpoint is the best).

        Raises:
            NotSavedError: the disk is full, and every rank knows.
            StorageError: the disk refused one of several ranks. No incomplete checkpoint stays in either case.
        """
        final = self.folder / f"step-{state.step:08d}"
        part = self.folder / f".{final.name}.part"
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())

        def prepare() -> None:
            with disk_errors(self.folder):
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            require_free_space(self.folder, trained * BYTES_PER_PARAMETER // self.world.ranks)

        def complete() -> None:
            seal(part, {"step": state.step, **asdict(self.layout), **(facts or {})})
            with disk_errors(final):
                replace_folder(part, final)
                shutil.rmtree(part, ignore_errors=True)
            self._prune()
            self.uploader.submit(final)

        self._on_main(prepare, part)
        try:
            with disk_errors(part):
                engine.save_checkpoint(str(part), tag=TAG, save_latest=False)
                torch.save(
                    {"ema": ema.state_dict(), "random": random_states(), "run": vars(state)},
                    part / f"rank-{self.world.rank:05d}.pt",
                )
        except (StorageError, RuntimeError) as error:  # torch reports a full disk from its zip writer as RuntimeError
            known = isinstance(error, StorageError)
            text = str(error) if known else f"{part}: could not be written ({cut(error)}); free disk space"
            if self.world.ranks > 1:
                raise StorageError(text) from error  # the others wait for this rank: the group has to end
            shutil.rmtree(part, ignore_errors=True)
            raise NotSavedError(text) from error
        self._barrier()
        self._on_main(complete, part)
        return final

    def _on_main(self, action: Callable[[], None], part: Path) -> None:
        """Rank 0 does it; where it fails every rank raises NotSavedError, and ``part`` goes."""
        problem = ""
        if self.world.is_main:
            try:
                action()
            except StorageError as error:
                problem = str(error)
                shutil.rmtree(part, ignore_errors=True)
        if problem := self.world.broadcast(problem):
            raise NotSavedError(problem)

    def find(self) -> Found | None:
        """The newest complete checkpoint, of this machine or the store (:mod:`.resume`); None when there is none.

        A collective. Where it was written by another layout, its universal form is made beside it, and where it can
        neither be loaded nor converted, it is a CheckpointError.
        """
        found = None
        if self.world.is_main and (folder := newest_checkpoint(self.folder, self.store, self.prefix)) is not None:
            with understood(folder / MANIFEST, "delete the folder and run again", CheckpointError):
                saved, universal = Layout.of(read_manifest(folder).meta), None
            if needs_conversion(saved, self.layout, folder):
                universal = self.folder / f".{folder.name}.universal"
                convert(folder / TAG, universal / TAG)
            found = Found(folder, saved, universal)
        return self.world.broadcast(found)

    def resume(self, found: Found, engine: DeepSpeedEngine, ema: Ema) -> RunState:
        """Load what :meth:`find` found (every rank calls it); CheckpointError: files lack, or hold more than values."""
        with plain_values_only(found.folder):
            loaded, _ = engine.load_checkpoint(str(found.universal or found.folder), tag=TAG)
            paths = [found.folder / f"rank-{rank:05d}.pt" for rank in range(found.layout.ranks)]
            files = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in paths]
        if loaded is None:
            raise CheckpointError(f"{found.folder}: holds no engine state; delete the folder and run again")
        ema.load([file["ema"] for file in files])
        saved = files[self.world.rank % len(files)]
        state = RunState(**saved["run"])
        if len(files) != self.world.ranks:
            steps = zip(*(file["run"]["losses"] for file in files), strict=True)
            state = replace(state, losses=[mean_row(list(rows)) for rows in steps])
        restore_random_states(saved["random"])
        self._barrier()
        if self.world.is_main:
            if found.universal is not None:
                shutil.rmtree(found.universal, ignore_errors=True)
            self.uploader.submit(found.folder)  # it may never have left this machine; costs one request if it has
        return state

    def newest(self, step: int | None = None) -> Path | None:
        """The newest complete local checkpoint (of ``step`` or before), by name."""
        names = local_checkpoints(self.folder)
        complete = [p for p in names if step is None or p.name <= f"step-{step:08d}"]
        return complete[-1] if complete else None

    def _prune(self) -> None:
        found = local_checkpoints(self.folder)
        facts = {folder.name: facts_of(functools.partial(read_manifest, folder)) for folder in found}
        for name in self.keep.old(facts):
            if not self.uploader.holds(self.folder / name):
                remove(self.folder / name)

    def _barrier(self) -> None:
        if self.world.ranks > 1:
            dist.barrier()


def seed_globals(seed: int) -> None:
    """Seed the global generators, which nothing of ours uses, so that what other libraries draw repeats too."""
    random.seed(derive_seed(seed, "python"))
    np.random.seed(derive_seed(seed, "numpy") % 2**32)
    torch.manual_seed(derive_seed(seed, "torch"))


def random_states() -> dict[str, Any]:
    """States of the global generators (ours are derived per step and need none), as plain values and tensors."""
    kind, words, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(words).astype(np.int64)), *rest),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Inverse of :func:`random_states`."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, words, *rest = states["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
