"""What stages and retrains left and somebody or something damaged: folders, a checkpoint's manifest, a pointer."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fuzz.tally import Tally, WrongError, blocks
from tests.helpers.stage_folders import DATA, PLANNER, SETTINGS, Stages, make_stages
from wav.codec import load_codec
from wav.data.latents import LatentStore
from wav.data.reward_store import RewardStore
from wav.data.statistics import Statistics
from wav.data.store import EpisodeStore
from wav.errors import WavError
from wav.io.files import MANIFEST
from wav.io.storage import open_store
from wav.io.storage.commit import Manifest, publish, seal, verify
from wav.policy.export import CARD, export_policy, load_export, policy_from_stages
from wav.policy.policy import Policy
from wav.promotion import Champion, StoredFile
from wav.text import TextEncoder
from wav.training.resume import newest_checkpoint
from wav.training.universal import Layout

ODD: list[Any] = [None, True, -1, 0, 1e308, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", [], {}, [[1]]]
ODD += [2**70, 2**31, "9" * 5000, {"a": 1}, "1", 1.5, ["x"], "\ud800"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stages, Path]:
    root = tmp_path_factory.mktemp("folders")
    stages = make_stages(root)
    policy, checkpoint = policy_from_stages(stages.joint, stages.latents, DATA, PLANNER, batch_size=1, device="cpu")
    settings = SETTINGS.for_stage("export")
    return stages, export_policy(policy, checkpoint, root / "export", settings=settings, metrics=None)


def edited(rng: np.random.Generator, text: str) -> bytes:
    """JSON with one value replaced, removed, added or nested."""
    data = json.loads(text)
    where = data
    while isinstance(where, (dict, list)) and where and rng.random() < 0.85:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = keys[int(rng.integers(len(keys)))]
        if isinstance(where[key], (dict, list)) and where[key] and rng.random() < 0.7:
            where = where[key]
            continue
        if rng.random() < 0.2:
            del where[key]
        else:
            where[key] = ODD[int(rng.integers(len(ODD)))]
        break
    else:
        data = ODD[int(rng.integers(len(ODD)))] if rng.random() < 0.5 else [data]
    return json.dumps(data).encode()


def damaged(rng: np.random.Generator, path: Path) -> bytes | None:
    """Other content for a file; None: it goes away."""
    data = bytearray(path.read_bytes())
    if not data:
        return b"x"
    at = int(rng.integers(len(data)))
    if path.suffix == ".json" and rng.random() < 0.75:
        return edited(rng, data.decode())
    match int(rng.integers(13)):
        case 0:
            return None
        case 1:
            del data[at:]
        case 2:
            data[at] ^= 1 << int(rng.integers(8))
        case 3:
            data[min(at, 120) % len(data)] ^= 1 << int(rng.integers(8))
        case 4:
            data += b"\0" * 100
        case 5:
            data = bytearray(len(data))
        case 6:
            return b""
        case 7:
            with io.BytesIO() as box:
                zipfile.ZipFile(box, "w").writestr("a.npy", b"x")
                return box.getvalue()
        case 8:
            return pickle.dumps({"a": [1, 2]})
        case 9:
            with io.BytesIO() as box:
                np.save(box, np.full((3, 2), np.nan))
                return box.getvalue()
        case 10:
            return ("[" * 5000).encode()
        case 11:
            data[:0] = b"\xef\xbb\xbf"
        case _:
            data[:8] = rng.bytes(8)
    return bytes(data)


def finite(statistics: Statistics) -> None:
    """WrongError where normalisation would give something that is no number."""
    for name, key in statistics.keys.items():
        if not np.isfinite(key.denormalize(key.normalize(np.zeros(key.dimension)))).all():
            raise WrongError(f"statistics of {name} make NaN")


def open_all(stages: Stages, export: Path, part: str) -> None:
    """What stages and a server do with the folder ``part``."""
    match part:
        case "episodes":
            store = EpisodeStore.open(stages.episodes)
            finite(store.statistics)
            store.verify()
            list(map(store.__getitem__, range(len(store))))
        case "rewards":
            rewards = RewardStore.open(stages.rewards, EpisodeStore.open(stages.episodes))
            finite(rewards.statistics)
            rewards.verify()
        case "latents":
            latents = LatentStore.open(stages.latents, EpisodeStore.open(stages.episodes), DATA)
            latents.verify()
            load_codec(stages.latents / "codec")
            TextEncoder.from_pretrained(stages.latents / "text_encoder", DATA.text_tokens)
        case "joint":
            policy, _ = policy_from_stages(stages.joint, stages.latents, DATA, PLANNER, batch_size=1, device="cpu")
            finite(policy.statistics)
        case "export":
            load_export(export, batch_size=1, device="cpu")
        case _:  # what is beneath the manifest's protection
            finite(Policy.load(export, batch_size=1, device="cpu").statistics)


@blocks(60, 2000, 250)
def test_damaged_folders(
    numbers: range,
    seed: int,
    folders: tuple[Stages, Path],
    record_property: Callable[[str, Any], None],
) -> None:
    stages, export = folders
    roots = {name: getattr(stages, name) for name in ("episodes", "rewards", "latents", "joint")}
    roots |= {"export": export, "policy": export}
    files = {
        name: sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size) for name, root in roots.items()
    }
    tally = Tally(seed, "folders")
    for number in numbers:
        rng = tally.random(number)
        part = str(rng.choice(list(roots)))
        path = files[part][int(rng.integers(len(files[part])))]
        before, after = path.read_bytes(), damaged(rng, path)
        try:
            if after is None:
                path.unlink()
                if rng.random() < 0.3:
                    path.mkdir()
            else:
                path.write_bytes(after)
            with tally.case(number, path.relative_to(roots[part].parent)):
                open_all(stages, export, part)
                free = path.name in ("manifest.json", CARD)  # the model card is its owner's to edit
                if after != before and part not in ("joint", "policy") and not free:
                    raise WrongError("other content passes every check")
        finally:
            if path.is_dir():
                shutil.rmtree(path)
            path.write_bytes(before)
    tally.finish(record_property)


@blocks(60, 2000, 500)
def test_damaged_commits_and_pointers(
    numbers: range, seed: int, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """Of a checkpoint in the store, and of a champion."""
    store, folder, manifest = open_store((tmp_path / "store").as_uri()), tmp_path / "made", tmp_path / MANIFEST
    folder.mkdir()
    (folder / "a").write_text("x")
    seal(folder, {"step": 4, **asdict(Layout(1, 0, "fp32"))})
    publish(store, folder, "c/step-00000004")
    file = StoredFile("a", "k", "", 1, "")
    champion = Champion("p", "c", "e", {"a/000": True}, (file,), "", "", "2026-01-01T00:00:00", refused=("q",))
    manifest.write_bytes(store.get_bytes(f"c/step-00000004/{MANIFEST}"))
    pointer = tmp_path / "pointer.json"
    pointer.write_bytes(champion.to_json())
    tally = Tally(seed, "commits")
    for number in numbers:
        rng = tally.random(number)
        path = manifest if number % 2 else pointer
        after = damaged(rng, path) or b""
        with tally.case(number, after[:300]):
            if path == pointer:
                found = Champion.from_json(after, "x")
                Champion.from_json(found.to_json(), "x")
            else:
                store.put_bytes(f"c/step-00000004/{MANIFEST}", after)
                newest = newest_checkpoint(tmp_path / "work", store, "c")
                if newest is not None:
                    verify(newest)
                    shutil.rmtree(newest)
                Manifest.from_json(after, "x")
    tally.finish(record_property)


def test_undamaged_folders_open(folders: tuple[Stages, Path]) -> None:
    for part in ("episodes", "rewards", "latents", "joint", "export", "policy"):
        open_all(*folders, part)


def test_a_manifest_that_was_edited_is_another_one(folders: tuple[Stages, Path]) -> None:
    """Whatever follows from a folder names its manifest's digest, so an edited one fits nothing."""
    stages, _ = folders
    path, text = stages.episodes / "manifest.json", (stages.episodes / "manifest.json").read_text()
    raw = json.loads(text)
    raw["texts"]["source"][0] += "x"
    path.write_text(json.dumps(raw))
    try:
        with pytest.raises(WavError, match="made from episodes"):
            RewardStore.open(stages.rewards, EpisodeStore.open(stages.episodes))
    finally:
        path.write_text(text)
