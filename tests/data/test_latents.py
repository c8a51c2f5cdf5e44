"""The latent store: rows, future clips, text, quality, bounded memory, checks at open."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from wav.codec import PCACodec, psnr
from wav.config import EncodeSettings
from wav.data.encode import build_text_encoder, codec_of, encode_store, fit_codec, text_encoder_of
from wav.data.latents import LatentStore
from wav.data.windows import WindowDataset
from wav.errors import ConfigError, DataError

SETTINGS = EncodeSettings(patch=8, temporal=4, channels=12, fit_frames=60, text_dim=16)


@pytest.fixture
def store(make_store):
    return make_store()


@pytest.fixture
def parts(store, data, tmp_path: Path):
    codec = fit_codec(store, data, SETTINGS)
    return codec, build_text_encoder(SETTINGS, data, store.instructions, tmp_path / "t5")


def test_rows_are_frames_and_clips_are_their_futures(store, data, parts, tmp_path: Path) -> None:
    codec, text = parts
    seen: list[tuple[int, int]] = []
    out = tmp_path / "latents"
    latents = encode_store(store, codec, text, data, out, lambda *now: seen.append(now), ["close the drawer"])
    assert seen[-1] == (store.frames, store.frames)
    assert latents.image.shape == (44, 2, 12, 2, 4)
    assert latents.clip.shape == (44, 2, 12, 2, 2, 4)
    episode, offset = store[1], store.episodes[1].offset  # 9 frames
    for t in (0, 3, 8):
        for v, view in enumerate(data.views):
            frames = episode.images[view]
            np.testing.assert_allclose(
                latents.image[offset + t][v], codec.encode_frames(frames[t : t + 1])[0], atol=1e-5
            )
            future = frames[[min(t + 2 * i, 8) for i in range(1, 6)]]
            np.testing.assert_allclose(latents.clip[offset + t][v], codec.encode_clips(future[None])[0], atol=1e-5)
    assert set(latents.psnr["image"]) == set(latents.psnr["clip"]) == set(data.views)
    originals = store.images("wrist", np.arange(store.frames))
    expected = psnr(codec.decode_frames(codec.encode_frames(originals)), originals)
    assert latents.psnr["image"]["wrist"] == pytest.approx(expected, abs=0.01)
    assert 5 < latents.psnr["clip"]["wrist"] < 40
    latents.verify()


def test_text_rows(store, data, parts, tmp_path: Path) -> None:
    latents = encode_store(store, *parts, data, tmp_path / "latents", instructions=["close the drawer"])
    assert latents.instructions == ("", "close the drawer", "lift green cube", "lift red cube")
    assert latents.empty_text == 0
    assert latents.text_mask[0].sum() == 1
    embedding, mask = parts[1].encode(["lift red cube"])
    np.testing.assert_array_equal(latents.text[latents.row("lift red cube")], embedding[0])
    np.testing.assert_array_equal(latents.text_mask[latents.row("lift red cube")], mask[0])
    with pytest.raises(DataError, match="was not encoded"):
        latents.row("dance")


def test_chunks_do_not_change_the_latents(store, data, parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_store(store, *parts, data, tmp_path / "whole")
    monkeypatch.setattr("wav.data.encode._CHUNK_BYTES", 1)
    single = encode_store(store, *parts, data, tmp_path / "single")
    np.testing.assert_allclose(single.clip[:], whole.clip[:], atol=1e-5)
    np.testing.assert_allclose(single.image[:], whole.image[:], atol=1e-5)


def test_codec_and_text_encoder_come_back(store, data, parts, tmp_path: Path) -> None:
    latents = encode_store(store, *parts, data, tmp_path / "latents")
    assert codec_of(latents).digest == parts[0].digest
    assert text_encoder_of(latents).digest == parts[1].digest
    np.testing.assert_array_equal(text_encoder_of(latents).encode([""])[0][0], latents.text[0])


def test_windows_accept_the_store(store, data, parts, tmp_path: Path) -> None:
    latents = encode_store(store, *parts, data, tmp_path / "latents")
    windows = WindowDataset(store, latents, None, data, split="train", validation_share=0.0)
    batch = windows.batch(np.array([0, 5]), np.random.default_rng(0))
    np.testing.assert_array_equal(batch.future.numpy()[1], latents.clip[5])


def test_open_names_what_does_not_match(store, data, parts, make_episode, conventions, tmp_path: Path) -> None:
    codec, text = parts
    out = tmp_path / "latents"
    encode_store(store, codec, text, data, out)
    LatentStore.open(out, store, data, codec, text)
    frames = np.concatenate(list(store[0].images.values()))
    other = PCACodec.fit(frames, np.stack([frames[:5], frames[5:10]] * 4), 8, 4, 12)
    with pytest.raises(DataError, match="made with codec"):
        LatentStore.open(out, codec=other)
    with pytest.raises(DataError, match=r"data\.frame_stride 2, not 3"):
        LatentStore.open(out, data=data.model_copy(update={"frame_stride": 3}))
    seeded = SETTINGS.model_copy(update={"seed": 4})
    reseeded = build_text_encoder(seeded, data, store.instructions, tmp_path / "t5b")
    with pytest.raises(DataError, match="made with text encoder"):
        LatentStore.open(out, text_encoder=reseeded)
    shutil.rmtree(out / "codec")
    other.save(out / "codec")
    with pytest.raises(DataError):
        LatentStore.open(out)
    with pytest.raises(DataError, match="dvc repro encode"):
        LatentStore.open(tmp_path / "nothing")


def test_other_episodes_are_refused(store, data, parts, make_store, tmp_path: Path) -> None:
    encode_store(store, *parts, data, tmp_path / "latents")
    other = make_store((12, 9))
    with pytest.raises(DataError, match="made with episodes"):
        LatentStore.open(tmp_path / "latents", other)


def test_truncation_is_found_at_open_and_corruption_by_verify(store, data, parts, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    encode_store(store, *parts, data, out)
    raw = bytearray((out / "shard-00000" / "clip.npy").read_bytes())
    raw[-1] ^= 1
    (out / "shard-00000" / "clip.npy").write_bytes(raw)
    with pytest.raises(DataError, match=r"clip\.npy"):
        LatentStore.open(out).verify()
    (out / "shard-00000" / "clip.npy").write_bytes(raw[:-4])
    with pytest.raises(DataError, match=r"clip\.npy.*truncated"):
        LatentStore.open(out)


def test_settings_that_do_not_fit_are_refused_and_leave_nothing(store, data, parts, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    with pytest.raises(DataError, match="ingest"):
        encode_store(store, *parts, data.model_copy(update={"views": ("wrist",)}), out)
    with pytest.raises(ConfigError, match="text_tokens"):
        encode_store(store, *parts, data.model_copy(update={"text_tokens": 8}), out)
    with pytest.raises(DataError, match="tokens exceed"):
        encode_store(store, *parts, data, out, instructions=["lift " * 20])
    assert not out.exists()
    small = build_text_encoder(SETTINGS, data, store.instructions, tmp_path / "t5c")
    assert small.dim == 16
    named = SETTINGS.model_copy(update={"text": str(tmp_path / "t5c"), "text_dim": 64})
    with pytest.raises(ConfigError, match=r"encode\.text_dim"):
        build_text_encoder(named, data, (), tmp_path / "unused")


def test_fitting_is_reproducible(store, data) -> None:
    assert fit_codec(store, data, SETTINGS).digest == fit_codec(store, data, SETTINGS).digest
