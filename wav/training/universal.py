"""Checkpoints across another number of ranks or ZeRO stage: DeepSpeed's universal layout, one file per tensor.

DeepSpeed loads its own optimiser shards only into as many ranks and the same ZeRO stage as wrote them. Its converter
(``deepspeed.checkpoint.ds_to_universal``) merges them into whole tensors, which any number of ranks can slice again;
what it cannot merge is refused here with the layout that can go on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wav.errors import CheckpointError
from wav.io.storage.base import disk_errors

LOG = logging.getLogger("wav.training")
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch reads it at every load; it wins over the argument


@dataclass(frozen=True)
class Layout:
    """How a run's optimiser state is cut: over how many ranks, by which ZeRO stage, for which precision."""

    ranks: int
    zero_stage: int
    precision: str

    @property
    def sharded(self) -> bool:
        """Whether every rank's file holds a part of the optimiser state (else rank 0's holds it all)."""
        return self.zero_stage > 0 or self.precision != "fp32"

    @property
    def partitioned(self) -> bool:
        """Whether the weights themselves are cut (ZeRO-3)."""
        return self.zero_stage == 3

    @property
    def text(self) -> str:
        """For messages."""
        return f"{self.ranks} rank(s), ZeRO {self.zero_stage}, {self.precision}"

    @staticmethod
    def of(meta: Any) -> Layout:
        """The layout a manifest names."""
        return Layout(int(meta["ranks"]), int(meta["zero_stage"]), str(meta["precision"]))


def needs_conversion(saved: Layout, wanted: Layout, folder: Path) -> bool:
    """Whether a checkpoint must be made universal before ``wanted`` can load it.

    Unsharded state loads into any number of ranks; equal layouts load as they are. CheckpointError: DeepSpeed can
    neither load nor convert it.
    """
    if saved == wanted or not (saved.sharded or wanted.sharded):
        return False
    if saved.sharded and wanted.sharded and saved.partitioned == wanted.partitioned:
        return True
    raise CheckpointError(
        f"{folder}: was written by {saved.text}; DeepSpeed cannot hand that on to {wanted.text}; "
        f"set zero_stage = {saved.zero_stage}, or delete the checkpoint to start anew"
    )


@contextlib.contextmanager
def plain_values_only(folder: Path) -> Iterator[None]:
    """Keep DeepSpeed from running what a checkpoint's files say: they may have come from a store others write to.

    It opens them with ``torch.load(weights_only=False)``, which calls any function that a file names. Within this
    context torch reads tensors, plain values and the three classes of plain values that DeepSpeed puts there; anything
    else in a file is a CheckpointError.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"calls {named[1]}" if named else "cannot be read without running code"
        raise CheckpointError(
            f"{folder}: a file of it {what}, which no checkpoint of a training does; find out who wrote it, here or in "
            "the store, then delete it"
        ) from None
    finally:
        del os.environ[_FORCE]
        if before is not None:
            os.environ[_FORCE] = before


def convert(source: Path, target: Path) -> None:
    """Write the universal form of the engine state in ``source`` to ``target`` (replaced if it is there).

    CheckpointError: the converter fails (holds what it says), or a file holds more than plain values.
    """
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    LOG.info("converting %s to DeepSpeed's universal layout", source)
    shutil.rmtree(target, ignore_errors=True)
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    said = io.StringIO()
    try:
        with (
            plain_values_only(source),
            disk_errors(target),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            ds_to_universal(options)
    except CheckpointError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    except (RuntimeError, AssertionError, ValueError, KeyError, NotImplementedError) as error:
        shutil.rmtree(target, ignore_errors=True)
        raise CheckpointError(
            f"{source}: DeepSpeed's universal conversion failed ({type(error).__name__}: {str(error)[:200]}); "
            "run with the ranks and ZeRO stage that wrote it, or delete it to start anew"
        ) from error
