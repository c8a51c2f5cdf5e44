"""PCA codec: exactness, whitening, alignment, shapes, digests, errors."""

from __future__ import annotations

import numpy as np
import pytest

from wav.codec import Codec, PCACodec, load_codec, psnr
from wav.errors import ConfigError, DataError

H, W, P, T = 32, 48, 8, 2


def scene(n: int, frames: int, seed: int = 0, height: int = H, width: int = W) -> np.ndarray:
    """Clips (n, frames, H, W, 3) of a coloured blob that moves over a fixed gradient."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    start = rng.uniform(0, 1, (n, 2)) * (height, width)
    speed = rng.normal(0, 2, (n, 2))
    colour = rng.uniform(0, 255, (n, 3))
    time = np.arange(frames)
    cy = start[:, None, 0] + speed[:, None, 0] * time
    cx = start[:, None, 1] + speed[:, None, 1] * time
    blob = np.exp(-((y - cy[..., None, None]) ** 2 + (x - cx[..., None, None]) ** 2) / 60)
    base = np.stack([y * 255 / height, x * 255 / width, 0 * x + 90], -1)
    images = base * (1 - blob[..., None]) + colour[:, None, None, None] * blob[..., None]
    return np.clip(images + rng.normal(0, 2, images.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    return scene(150, 1 + 2 * T)


@pytest.fixture(scope="module")
def codec(clips: np.ndarray) -> PCACodec:
    return PCACodec.fit(clips[:, 0], clips, patch=P, temporal=T, channels=40, coordinates=True, seed=1)


def test_shapes_on_images_that_are_not_square(codec: PCACodec, clips: np.ndarray) -> None:
    assert isinstance(codec, Codec)
    z = codec.encode_frames(clips[:5, 0])
    assert z.shape == (5, 40, H // P, W // P)
    assert z.dtype == np.float32
    zc = codec.encode_clips(clips[:5])
    assert zc.shape == (5, 40, 3, H // P, W // P)
    np.testing.assert_allclose(zc[:, :, 0], z, atol=1e-5)
    assert codec.decode_frames(z).shape == (5, H, W, 3)
    assert codec.decode_clips(zc).shape == clips[:5].shape
    assert codec.encode_clips(clips[:5, :1]).shape == (5, 40, 1, H // P, W // P)


def test_all_components_reconstruct_exactly() -> None:
    clips = scene(80, 3, height=8, width=8)
    codec = PCACodec.fit(clips[:, 0], clips, patch=2, temporal=2, channels=12, coordinates=False, floor=0.01)
    assert np.abs(codec.decode_frames(codec.encode_frames(clips[:, 0])).astype(int) - clips[:, 0]).max() <= 1
    full = PCACodec.fit(clips[:, 0], clips, patch=2, temporal=1, channels=12, coordinates=False)
    assert np.abs(full.decode_clips(full.encode_clips(clips)).astype(int) - clips).max() <= 1


def test_reconstruction_is_good_on_unseen_clips(codec: PCACodec) -> None:
    new = scene(30, 1 + 2 * T, seed=9)
    decoded = codec.decode_clips(codec.encode_clips(new))
    assert psnr(decoded, new) > 28
    assert psnr(decoded[:, 1:], new[:, 1:]) > 27  # the clip basis alone
    assert psnr(np.roll(decoded, 1, axis=0), new) < 20


def test_matches_a_direct_eigendecomposition(clips: np.ndarray) -> None:
    codec = PCACodec.fit(clips[:, 0], clips, patch=P, temporal=T, channels=10, coordinates=False, floor=0.0)
    rows = (clips[:, 0] / 127.5 - 1).reshape(len(clips), H // P, P, W // P, P, 3)
    rows = rows.transpose(0, 1, 3, 2, 4, 5).reshape(-1, P * P * 3)
    values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    expected = (rows - rows.mean(0)) @ vectors[:, ::-1][:, :10] / np.sqrt(values[::-1][:10])
    z = codec.encode_frames(clips[:, 0]).transpose(0, 2, 3, 1).reshape(-1, 10)
    np.testing.assert_allclose(np.abs(z), np.abs(expected), atol=2e-3)
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(10), atol=1e-3)
    assert codec.image.explained == pytest.approx(values[::-1][:10].sum() / values.sum(), abs=1e-6)


def test_lanczos_agrees_with_the_dense_solver(monkeypatch: pytest.MonkeyPatch, clips: np.ndarray) -> None:
    dense = PCACodec.fit(clips[:, 0], clips, patch=P, temporal=T, channels=20, coordinates=False)
    monkeypatch.setattr("wav.codec.pca._DENSE_LIMIT", 10)
    lanczos = PCACodec.fit(clips[:, 0], clips, patch=P, temporal=T, channels=20, coordinates=False)
    np.testing.assert_allclose(dense.encode_clips(clips[:4]), lanczos.encode_clips(clips[:4]), atol=1e-3)


def test_floor_damps_the_tail_and_keeps_the_reconstruction(clips: np.ndarray) -> None:
    fits = [PCACodec.fit(clips[:, 0], clips, P, T, 30, False, floor=f) for f in (0.0, 0.05)]
    z = [c.encode_frames(clips[:, 0]) for c in fits]
    assert z[0][:, -1].std() == pytest.approx(1, abs=0.01)
    assert z[1][:, -1].std() < 0.5
    assert z[1][:, 0].std() == pytest.approx(1, abs=0.05)
    one, two = (c.decode_frames(x) for c, x in zip(fits, z, strict=True))
    assert np.abs(one.astype(int) - two).max() <= 1


def test_alignment_gives_clip_channels_the_image_channels_meaning(clips: np.ndarray) -> None:
    still = np.repeat(clips[:, :1], 1 + T, axis=1)
    codec = PCACodec.fit(clips[:, 0], clips, P, T, 20, False)
    z = codec.encode_clips(still)
    assert float(np.mean((z[:, :, 1] - z[:, :, 0]) ** 2)) < 0.2  # without the rotation it is above


def test_coordinates_are_the_last_two_channels_and_decoding_ignores_them(codec: PCACodec, clips: np.ndarray) -> None:
    z = codec.encode_clips(clips[:2])
    np.testing.assert_allclose(z[0, -2, 1, :, 0], [-0.75, -0.25, 0.25, 0.75])
    assert (z[:, -1, 0, 0] == z[:, -1, 2, -1]).all()
    changed = z.copy()
    changed[:, -2:] = 5
    np.testing.assert_array_equal(codec.decode_clips(z), codec.decode_clips(changed))


def test_fit_is_reproducible_and_the_digest_follows_the_weights(codec: PCACodec, clips: np.ndarray) -> None:
    again = PCACodec.fit(clips[:, 0], clips, patch=P, temporal=T, channels=40, coordinates=True, seed=1)
    other = PCACodec.fit(clips[:100, 0], clips, patch=P, temporal=T, channels=40, coordinates=True, seed=1)
    assert again.digest == codec.digest != other.digest


def test_chunking_does_not_change_the_latents(
    monkeypatch: pytest.MonkeyPatch, codec: PCACodec, clips: np.ndarray
) -> None:
    whole = codec.encode_clips(clips[:20])
    monkeypatch.setattr("wav.codec.pca._CHUNK_VALUES", 20_000)
    np.testing.assert_allclose(codec.encode_clips(clips[:20]), whole, atol=1e-5)


def test_save_and_load(tmp_path, codec: PCACodec, clips: np.ndarray) -> None:
    codec.save(tmp_path / "codec")
    loaded = load_codec(tmp_path / "codec")
    assert loaded.digest == codec.digest
    np.testing.assert_array_equal(loaded.encode_clips(clips[:3]), codec.encode_clips(clips[:3]))
    basis = tmp_path / "codec" / "basis.safetensors"
    raw = bytearray(basis.read_bytes())
    raw[-3] ^= 1
    basis.write_bytes(raw)
    with pytest.raises(DataError, match="digest"):
        load_codec(tmp_path / "codec")
    basis.unlink()
    with pytest.raises(DataError, match="encode stage"):
        load_codec(tmp_path / "codec")


def test_errors_name_the_field(codec: PCACodec, clips: np.ndarray) -> None:
    with pytest.raises(DataError, match="image_height"):
        codec.encode_frames(np.zeros((1, 30, 48, 3), np.uint8))
    with pytest.raises(DataError, match="uint8"):
        codec.encode_frames(np.zeros((1, 32, 48, 3), np.float32))
    with pytest.raises(DataError, match="future_frames"):
        codec.encode_clips(clips[:, :4])
    with pytest.raises(DataError, match="codec that encoded them"):
        codec.decode_frames(np.zeros((1, 7, 4, 6), np.float32))
    with pytest.raises(ConfigError, match="channels"):
        PCACodec.fit(clips[:, 0], clips, P, T, channels=400)
    with pytest.raises(DataError, match="constant"):
        PCACodec.fit(np.zeros_like(clips[:, 0]), clips, P, T, 8)
    with pytest.raises(DataError, match="fit_frames"):
        PCACodec.fit(clips[:1, 0], clips, P, T, 40)
