"""A path that somebody wrote down (a manifest, a pointer, an index, a key) names a file below its folder or nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import save_file

from flows.eval_run import find_checkpoint
from tests.test_promotion import CHAMPION
from wav import promotion
from wav.data.sources import lerobot_entries
from wav.data.sources.lerobot_meta import Dataset
from wav.errors import CheckpointError, DataError, StorageError
from wav.io.files import MANIFEST, FileRecord, inside
from wav.io.storage import open_store
from wav.io.storage.commit import fetch, publish, seal
from wav.model.weights import read_weights

ELSEWHERE = ["/abs/file", "../out", "a/../../out", "a//out", "//abs", "./a", "a/.", "", "a\0b"]
elsewhere = pytest.mark.parametrize("name", ELSEWHERE)


@elsewhere
def test_names_of_files_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no path of a file below"):
        inside(tmp_path, name)
    with pytest.raises(DataError, match="no path of a file below"):
        FileRecord(name, 1, "x")
    store = open_store((tmp_path / "store").as_uri())
    with pytest.raises(StorageError, match="relative path"):
        store.put_bytes(name, b"x")


def test_plain_names_are_taken(tmp_path: Path) -> None:
    for name in ("a", "a/b.c", ".hidden", "a..b/...", "ü/ß"):
        assert inside(tmp_path, name) == tmp_path / name


@elsewhere
def test_a_commit_is_not_written_elsewhere(name: str, tmp_path: Path) -> None:
    store, folder = open_store((tmp_path / "store").as_uri()), tmp_path / "made"
    folder.mkdir()
    (folder / "a").write_text("x")
    seal(folder, {})
    publish(store, folder, "c")
    key = f"c/{MANIFEST}"
    raw = json.loads(store.get_bytes(key))
    raw["files"][0]["path"] = name
    store.put_bytes(key, json.dumps(raw).encode())
    with pytest.raises(StorageError, match="damaged manifest"):
        fetch(store, "c", tmp_path / "got")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "store"]


@elsewhere
def test_a_champion_is_not_written_elsewhere(name: str) -> None:
    file = {"path": name, "key": "k", "version": "", "size": 1, "sha256": ""}
    raw = {"format": promotion.FORMAT, **asdict(CHAMPION), "files": [file]}
    with pytest.raises(StorageError, match="not a champion pointer"):
        promotion.Champion.from_json(json.dumps(raw).encode(), "x")


def test_a_key_of_the_store_is_not_written_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 has keys such as ``runs/1//tmp/file``."""
    store = open_store((tmp_path / "store").as_uri())
    info = store.put_bytes("runs/1/settings.json", b"{}")
    monkeypatch.setattr(store, "list", lambda prefix: [type(info)(**asdict(info) | {"key": "runs/1//tmp/file"})])
    monkeypatch.setattr(store, "get_file", lambda *_: pytest.fail("was fetched"))
    with pytest.raises(DataError, match="'/tmp/file': is no path of a file below"):
        find_checkpoint(f"{store.url}/runs/1", tmp_path, store)


@pytest.mark.parametrize("name", [*ELSEWHERE, "other/weights.safetensors", "weights.json"])
def test_an_index_names_weights_beside_it(name: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    index = {"weight_map": {"x": name}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"no weight file beside it|no path of a file below"):
        read_weights(tmp_path)


@pytest.mark.parametrize("pattern", ["/abs/{chunk_index}", "../{chunk_index}.parquet", "data//{chunk_index}"])
def test_a_dataset_s_files_lie_in_its_folder(pattern: str, tmp_path: Path) -> None:
    dataset = cast(
        Dataset, SimpleNamespace(root=tmp_path, info=SimpleNamespace(data_path=pattern), where=tmp_path / "info.json")
    )
    with pytest.raises(DataError, match=r"data_path = .* is no path of a file below"):
        lerobot_entries._placed(dataset, "data_path", chunk_index=0)
