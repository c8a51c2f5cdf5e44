"""A file of a checkpoint that calls something when it is read: nothing is called, and it is refused by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.training.test_loop import finish
from tests.training.test_resume import run_of
from wav.errors import CheckpointError
from wav.io.storage import open_store
from wav.io.storage.commit import commits, discard, fetch, publish, read_manifest, seal
from wav.training.spec import TrainSpec
from wav.training.universal import convert, plain_values_only


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a planted file under DeepSpeed's names, and the folder that it makes: it does where it may."""
    mark, folder = tmp_path / "mark", tmp_path / "engine"
    folder.mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"module": Planted(mark)}, folder / name)
    torch.load(folder / name, weights_only=False)
    assert mark.is_dir()
    mark.rmdir()
    return folder, mark


def test_deepspeed_s_own_loader_and_converter_call_nothing(planted: tuple[Path, Path], tmp_path: Path) -> None:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    folder, mark = planted
    path = str(folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="calls posix"), plain_values_only(folder):
        TorchCheckpointEngine().load(path, map_location="cpu")
    with pytest.raises(CheckpointError, match="calls posix"):
        convert(folder, tmp_path / "universal")
    assert not mark.exists()
    TorchCheckpointEngine().load(path, map_location="cpu")  # outside the context nothing has changed
    assert mark.is_dir()


@pytest.mark.long
@pytest.mark.parametrize("name", ["engine/mp_rank_00_model_states.pt", "rank-00000.pt"])
def test_a_machine_that_resumes_from_the_store_calls_nothing(name: str, spec_of, start, tmp_path: Path) -> None:
    """Who may write to the store replaces a file and makes the manifest right."""
    spec: TrainSpec = run_of(spec_of, "a", 1, 0)
    finish(start(spec))
    store, mark = open_store(spec.store), tmp_path / "mark"
    prefix = commits(store, f"{spec.prefix}/checkpoints")[-1]
    fetch(store, prefix, tmp_path / "commit")
    meta = read_manifest(tmp_path / "commit").meta
    torch.save({"module": Planted(mark), "ema": Planted(mark)}, tmp_path / "commit" / name)
    seal(tmp_path / "commit", meta)
    discard(store, prefix)
    publish(store, tmp_path / "commit", prefix)
    for folder in (spec.work, spec.paths.output):
        shutil.rmtree(folder)
    log = finish(start(spec))
    assert "which no checkpoint of a training does" in log, log
    assert not mark.exists()
    assert not spec.paths.output.exists()
