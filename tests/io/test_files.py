"""Atomic folders, manifests and array files."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from wav.errors import DataError, StorageError
from wav.io import arrays, files

REMEDY = "run it again"


def write(folder: Path, value: float) -> None:
    np.save(folder / "a.npy", np.full((3, 2), value, np.float32))
    files.write_manifest(folder, "thing", 1, {"value": value})


def write_array(path: Path, array: np.ndarray) -> None:
    with arrays.ArrayWriter(path, array.shape[1:], array.dtype) as writer:
        writer.append(array)


def test_folder_appears_whole_and_is_replaced(tmp_path):
    out = tmp_path / "deep" / "out"
    for value in (1.0, 2.0):
        with files.atomic_folder(out) as folder:
            assert folder.parent == out.parent
            write(folder, value)
        assert files.read_manifest(out, "thing", 1, remedy=REMEDY)["value"] == value
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_existing_empty_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with files.atomic_folder(tmp_path / "out") as folder:
        write(folder, 1.0)
    assert (tmp_path / "out" / "a.npy").is_file()


def test_error_leaves_the_old_content(tmp_path):
    out = tmp_path / "out"
    with files.atomic_folder(out) as folder:
        write(folder, 1.0)

    def interrupted() -> None:
        with files.atomic_folder(out) as folder:
            write(folder, 2.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files.read_manifest(out, "thing", 1, remedy=REMEDY)["value"] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_exchange_two_renames(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    test_folder_appears_whole_and_is_replaced(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), OSError("64 requested and 0 written")])
def test_full_disk_is_one_clear_error(tmp_path, error):
    with (
        pytest.raises(StorageError, match=r"out: the disk is full .* free some space"),
        files.atomic_folder(tmp_path / "out"),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_array_writer_on_a_full_device():
    with pytest.raises(StorageError, match="disk is full"), files.disk_errors("/dev/full"):
        write_array(Path("/dev/full"), np.zeros((100_000,), np.float32))


def test_leftovers_of_dead_writers_are_removed(tmp_path):
    dead, alive = tmp_path / ".out.tmp-99999999", tmp_path / f".out.tmp-{os.getppid()}"
    foreign = tmp_path / ".out.tmp-another.machine-99999999"
    for left in (dead, alive, foreign):
        left.mkdir()
    with files.atomic_folder(tmp_path / "out") as folder:
        write(folder, 1.0)
    assert not dead.exists()
    assert alive.exists()
    assert foreign.exists()


def test_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(DataError, match="is a file"), files.atomic_folder(tmp_path / "out"):
        pass


def test_no_free_space(tmp_path):
    with pytest.raises(StorageError, match=r"needs .* MiB"):
        files.require_free_space(tmp_path / "not" / "there", 1 << 60)


def test_manifest_names_what_is_wrong(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no such folder; run it again"):
        files.read_manifest(out, "thing", 1, remedy=REMEDY)
    with files.atomic_folder(out) as folder:
        write(folder, 1.0)
    with pytest.raises(DataError, match="format 'thing' where 'other'"):
        files.read_manifest(out, "other", 1, remedy=REMEDY)
    with pytest.raises(DataError, match="version 1 of thing where this code reads 2"):
        files.read_manifest(out, "thing", 2, remedy=REMEDY)
    manifest = files.read_manifest(out, "thing", 1, remedy=REMEDY)
    array = out / "a.npy"
    content = array.read_bytes()
    array.write_bytes(content[:-1] + b"\x01")
    files.check_files(files.manifest_files(manifest), out, remedy=REMEDY)
    with pytest.raises(DataError, match=r"a\.npy: content does not match"):
        files.check_files(files.manifest_files(manifest), out, remedy=REMEDY, digests=True)
    array.write_bytes(content[:-4])
    with pytest.raises(DataError, match=r"a\.npy: truncated, 148 bytes where the manifest says 152; run it again"):
        files.read_manifest(out, "thing", 1, remedy=REMEDY)
    array.unlink()
    with pytest.raises(DataError, match=r"a\.npy: missing"):
        files.read_manifest(out, "thing", 1, remedy=REMEDY)
    (out / files.MANIFEST).write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        files.read_manifest(out, "thing", 1, remedy=REMEDY)


def test_manifest_digest_survives_the_file(tmp_path):
    write(tmp_path, 0.1)
    written = json.loads((tmp_path / files.MANIFEST).read_text())
    assert files.manifest_digest(written) == files.manifest_digest(
        files.write_manifest(tmp_path, "thing", 1, {"value": 0.1})
    )
    assert files.manifest_digest({**written, "value": 0.2}) != files.manifest_digest(written)


@pytest.mark.parametrize("shape", [(5,), (5, 2, 3), (0, 4)])
def test_arrays_round_trip(tmp_path, shape):
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    write_array(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
    if array.size:
        mapped = arrays.open_array(tmp_path / "a.npy", (None, *shape[1:]), np.int16, remedy=REMEDY)
        np.testing.assert_array_equal(mapped, array)
        assert not mapped.flags.writeable


def test_arrays_refuse_other_rows_and_shapes(tmp_path):
    with arrays.ArrayWriter(tmp_path / "a.npy", (2,), np.float32) as writer:
        writer.append(np.zeros((3, 2), np.float32))
        with pytest.raises(DataError, match=r"a\.npy: rows of float64"):
            writer.append(np.zeros((3, 2)))
    with pytest.raises(DataError, match=r"float32 \(3, 2\) where float32 \(None, 3\)"):
        arrays.open_array(tmp_path / "a.npy", (None, 3), np.float32, remedy=REMEDY)
    (tmp_path / "b.npy").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"b\.npy: not a readable"):
        arrays.open_array(tmp_path / "b.npy", (None,), np.float32, remedy=REMEDY)
