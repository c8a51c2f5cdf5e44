"""LIBERO's assets: what an interrupted download leaves, and the identity of a folder."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from wav import doctor
from wav.errors import ServiceError
from wav.sim.libero import assets as libero_assets


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """Where a download goes; nothing else has assets."""
    monkeypatch.delenv("WAV_LIBERO_ASSETS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(libero_assets, "package_folder", lambda: tmp_path / "package")
    monkeypatch.setattr(libero_assets, "check_versions", lambda: dict(libero_assets.REQUIRED))

    class Hub:
        def repo_info(self, *_, **__):
            return type("Info", (), {"siblings": (), "sha": "abc"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    libero_assets.find_assets.cache_clear()
    yield tmp_path / ".cache" / "libero" / "assets"
    libero_assets.find_assets.cache_clear()


def make(folder: Path, names=libero_assets.FOLDERS) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "mesh.obj").write_text("v 0 0 0")
    return folder


def test_an_interrupted_download_is_gone_on_with_not_taken_for_whole(monkeypatch, cache):
    def broken(*_, local_dir, **__):
        make(local_dir)
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(ServiceError, match="reset by peer"):
        libero_assets.find_assets()
    assert not libero_assets.missing_folders(cache)  # all folders are there, some of their files are not
    assert libero_assets.assets_here() is None
    went_on = []

    def whole(*_, local_dir, **__):
        went_on.append(make(local_dir))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", whole)
    assert libero_assets.find_assets() == cache
    assert went_on == [cache]
    assert libero_assets.assets_here() == cache


def test_a_hub_that_says_nothing_is_not_waited_for_without_end(monkeypatch, cache):
    limits = []

    def fetch(*_, local_dir, **__):
        limits.append(huggingface_hub.get_session().timeout.read)
        make(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    before = huggingface_hub.get_session().timeout
    libero_assets.find_assets()
    assert limits == [60]
    assert huggingface_hub.get_session().timeout == before


def test_the_digest_leaves_out_what_a_download_notes_for_itself(tmp_path):
    digests = set()
    for number, note in enumerate(("1760000000.1", "1760000000.123456")):
        folder = make(tmp_path / str(number))
        notes = folder / ".cache" / "huggingface" / "mesh.obj.metadata"
        notes.parent.mkdir(parents=True)
        notes.write_text(note)
        digests.add(libero_assets.assets_digest(folder))
    (folder / "scenes" / "mesh.obj").write_text("v 0 0 0 1")
    libero_assets.assets_digest.cache_clear()
    assert len(digests) == 1
    assert libero_assets.assets_digest(folder) not in digests


def test_doctor_says_what_an_evaluation_would(monkeypatch, cache, tmp_path):
    (finding,) = doctor.check_libero()
    assert (finding.ok, "is downloaded" in finding.text) == (False, True)
    make(cache)
    (finding,) = doctor.check_libero()
    assert (finding.ok, str(cache) in finding.text) == (True, True)
    monkeypatch.setenv("WAV_LIBERO_ASSETS", str(make(tmp_path / "half", libero_assets.FOLDERS[:2])))
    (finding,) = doctor.check_libero()  # a wrong folder is refused, whatever lies elsewhere
    assert not finding.ok
    assert f"{tmp_path / 'half'}: has no folder 'stable_hope_objects'" in finding.text
