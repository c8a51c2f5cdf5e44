"""Checkpoints of a run: written atomically to a local folder, uploaded in the background, found again on restart.

A checkpoint is a folder ``step-00000500`` with DeepSpeed's model and optimiser state, every rank's average and random
states, and a manifest written last (:mod:`wav.storage.commit`). Without a manifest it does not exist.
"""

from __future__ import annotations

import logging
import random
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from wav.data.files import require_free_space
from wav.errors import CheckpointError, StorageError
from wav.seeding import derive_seed
from wav.storage.base import ObjectStore, disk_errors
from wav.storage.commit import MANIFEST, commits, fetch, publish, read_manifest, retain, seal, verify
from wav.training.ema import Ema
from wav.training.engine import World

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

LOG = logging.getLogger("wav.training")
TAG = "engine"
#: Bytes of a checkpoint per trained parameter: weights, two moments, average and (bf16) master weights, rounded up.
BYTES_PER_PARAMETER = 24


@dataclass(frozen=True)
class RunState:
    """What a rank must know, besides weights, to go on as if it had never stopped.

    ``step``: optimiser steps done, which is the sampler's position; ``rows``: recorded metrics; ``window``: losses
    since the last row; ``seconds``: time trained so far; ``waited``: of it, waiting for data.
    """

    step: int
    rows: list[tuple[int, dict[str, float]]]
    window: list[dict[str, float]]
    seconds: float
    waited: float


class Uploader:
    """Uploads sealed checkpoint folders in a thread; while one is on its way only the newest other one waits."""

    def __init__(self, store: ObjectStore, prefix: str, keep_last: int) -> None:
        self.store, self.prefix, self.keep_last = store, prefix, keep_last
        self.busy: Path | None = None
        self.error: StorageError | None = None
        self._next: Path | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, folder: Path) -> None:
        """Queue a folder."""
        with self._lock:
            self._next = folder
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="upload")
                self._thread.start()

    def wait(self) -> None:
        """Wait until everything queued is up; raises the StorageError of the newest checkpoint's upload."""
        while (thread := self._thread) is not None:
            thread.join()
        if self.error is not None:
            raise self.error

    def holds(self, folder: Path) -> bool:
        """Whether ``folder`` is being uploaded or waits for it."""
        return folder in (self.busy, self._next)

    def _work(self) -> None:
        while True:
            with self._lock:
                self.busy, self._next = self._next, None
                if self.busy is None:
                    self._thread = None
                    return
            try:
                publish(self.store, self.busy, f"{self.prefix}/{self.busy.name}")
                retain(self.store, self.prefix, self.keep_last)
                self.error = None
            except StorageError as error:  # training goes on; the next checkpoint tries again, the last one counts
                self.error = error
                LOG.warning("checkpoint %s stays local for now: %s", self.busy.name, error)


class Checkpoints:
    """The checkpoints of one run (one key)."""

    def __init__(self, folder: Path, store: ObjectStore, prefix: str, keep_last: int, world: World) -> None:
        self.folder, self.store, self.prefix = folder, store, f"{prefix}/checkpoints"
        self.keep_last, self.world = keep_last, world
        self.uploader = Uploader(store, self.prefix, keep_last)

    def save(self, engine: DeepSpeedEngine, ema: Ema, state: RunState) -> Path:
        """Write a checkpoint (every rank calls it) and queue its upload; returns its folder.

        Raises:
            StorageError: the disk is full or refuses; no incomplete checkpoint stays.
        """
        final = self.folder / f"step-{state.step:08d}"
        part = self.folder / f".{final.name}.part"
        if self.world.is_main:
            with disk_errors(self.folder):
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            trained = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
            require_free_space(self.folder, trained * BYTES_PER_PARAMETER // self.world.ranks)
        self._barrier()
        try:
            with disk_errors(part):
                engine.save_checkpoint(str(part), tag=TAG, save_latest=False)
                torch.save(
                    {"ema": ema.state_dict(), "random": random_states(), "run": vars(state)},
                    part / f"rank-{self.world.rank:05d}.pt",
                )
        except RuntimeError as error:  # torch reports a full disk from its zip writer like this
            raise StorageError(
                f"{part}: could not be written ({_first_line(error)}); check the disk's space"
            ) from error
        self._barrier()
        if self.world.is_main:
            seal(part, {"step": state.step, "ranks": self.world.ranks})
            with disk_errors(final):
                shutil.rmtree(final, ignore_errors=True)
                part.rename(final)
            self._prune()
            self.uploader.submit(final)
        self._barrier()
        return final

    def resume(self, engine: DeepSpeedEngine, ema: Ema) -> RunState | None:
        """Load the newest complete checkpoint, local ones first, then the store's; None when there is none."""
        found = self.world.broadcast(str(self._find() or "") if self.world.is_main else "")
        if not found:
            return None
        folder = Path(found)
        ranks = read_manifest(folder).meta["ranks"]
        if ranks != self.world.ranks:
            raise CheckpointError(
                f"{folder}: was written by {ranks} ranks, this run has {self.world.ranks}; "
                "run with as many, or delete the folder to start anew"
            )
        engine.load_checkpoint(str(folder), tag=TAG)
        # our own file, verified against its manifest; it holds plain containers, numbers and tensors only
        saved: dict[str, Any] = torch.load(
            folder / f"rank-{self.world.rank:05d}.pt", map_location="cpu", weights_only=True
        )
        ema.load_state_dict(saved["ema"])
        restore_random_states(saved["random"])
        return RunState(**saved["run"])

    def newest(self) -> Path | None:
        """The newest complete local checkpoint, by name."""
        complete = self._local()
        return complete[-1] if complete else None

    def _local(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if (p / MANIFEST).is_file())

    def _find(self) -> Path | None:
        """Newest local checkpoint that verifies, else the newest of the store (downloaded)."""
        for folder in reversed(self._local()):
            try:
                verify(folder)
                return folder
            except StorageError as error:
                LOG.warning("checkpoint ignored: %s", error)
                shutil.rmtree(folder)
        for prefix in reversed(commits(self.store, self.prefix)):
            folder = self.folder / prefix.rpartition("/")[2]
            LOG.info("downloading checkpoint %s", self.store.uri(prefix))
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                fetch(self.store, prefix, folder)
                return folder
            except StorageError as error:
                LOG.warning("checkpoint ignored: %s", error)
        return None

    def _prune(self) -> None:
        for folder in self._local()[: -self.keep_last]:
            if not self.uploader.holds(folder):
                shutil.rmtree(folder)

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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
