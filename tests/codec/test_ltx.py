"""LTX codec on a tiny randomly initialised VAE: shapes, normalisation, save and load, errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wav.codec import Codec, load_codec
from wav.codec.ltx import LTXCodec
from wav.errors import DataError, ServiceError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKLLTXVideo

    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(8, 16, 16, 16),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    vae.latents_mean.copy_(torch.linspace(-1, 1, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 2, 8))
    path = tmp_path_factory.mktemp("ltx")
    vae.save_pretrained(path / "vae")
    return path


@pytest.fixture(scope="module")
def codec(folder: Path) -> LTXCodec:
    return LTXCodec.from_pretrained(folder, batch=2)


def clips(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 9, 32, 64, 3), dtype=np.uint8)


def test_shapes(codec: LTXCodec) -> None:
    assert isinstance(codec, Codec)
    assert (codec.channels, codec.spatial, codec.temporal) == (8, 32, 8)
    z = codec.encode_clips(clips())
    assert z.shape == (3, 8, 2, 1, 2)
    assert z.dtype == np.float32
    assert codec.decode_clips(z).shape == (3, 9, 32, 64, 3)
    frames = codec.encode_frames(clips()[:, 0])
    assert frames.shape == (3, 8, 1, 2)
    assert codec.decode_frames(frames).dtype == np.uint8


def test_latents_are_normalised_with_the_checkpoints_statistics(codec: LTXCodec) -> None:
    pixels = torch.from_numpy(clips(1)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        raw = codec.vae.encode(pixels).latent_dist.mode()
    mean, std = (x.view(1, -1, 1, 1, 1) for x in (codec.vae.latents_mean, codec.vae.latents_std))
    np.testing.assert_allclose(codec.encode_clips(clips(1)), ((raw - mean) / std).numpy(), atol=1e-5)
    with torch.no_grad():
        expected = codec.vae.decode(raw).sample.permute(0, 2, 3, 4, 1)
    expected = ((expected + 1) * 127.5).round().clamp(0, 255).numpy()
    decoded = codec.decode_clips(codec.encode_clips(clips(1)))
    assert np.abs(decoded.astype(int) - expected).max() <= 1


def test_save_and_load(tmp_path: Path, codec: LTXCodec) -> None:
    codec.save(tmp_path / "copy")
    loaded = load_codec(tmp_path / "copy")
    assert loaded.digest == codec.digest
    np.testing.assert_allclose(loaded.encode_frames(clips()[:, 0]), codec.encode_frames(clips()[:, 0]), atol=1e-5)
    file = next((tmp_path / "copy").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match="not the one recorded"):
        load_codec(tmp_path / "copy")


def test_a_hub_id_that_was_not_fetched_names_the_command() -> None:
    with pytest.raises(ServiceError, match=r'hf download nobody/ltx-missing --include "vae/\*"'):
        load_codec("nobody/ltx-missing")


def test_errors(tmp_path: Path, codec: LTXCodec) -> None:
    with pytest.raises(DataError, match=r"config\.json"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(DataError, match="not the LTX VAE"):
        load_codec(tmp_path)
    with pytest.raises(DataError, match="future_frames"):
        codec.encode_clips(clips()[:, :8])
    with pytest.raises(DataError, match="32 pixels"):
        codec.encode_frames(np.zeros((1, 40, 64, 3), np.uint8))


CONVOLUTION = "encoder.conv_in.conv.weight"
PARTIAL = {
    r"1 missing \(encoder.conv_in.conv.weight\)": lambda t: {n: t[n] for n in t if n != CONVOLUTION},
    r"2 missing \(latents_mean, latents_std\)": lambda t: {n: t[n] for n in t if not n.startswith("latents_")},
    r"\d+ missing .* more\); \d+ unexpected \(vae\.": lambda t: {f"vae.{name}": t[name] for name in t},
    r"1 of another shape \(latents_std \(3,\) for \(8,\)\)": lambda t: {**t, "latents_std": torch.ones(3)},
}


@pytest.mark.parametrize("message", PARTIAL)
def test_a_vae_is_loaded_whole_or_not_at_all(message: str, folder: Path, tmp_path: Path) -> None:
    """Diffusers fills missing tensors with whatever the memory held, and missing statistics with 0 and 1."""
    shutil.copytree(folder, tmp_path / "ltx")
    file = next((tmp_path / "ltx").rglob("*.safetensors"))
    save_file(PARTIAL[message](load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"vae: parameters {message}.*encode\.path"):
        load_codec(tmp_path / "ltx")


@pytest.mark.filterwarnings("ignore:.*no-op")
def test_nothing_stays_on_the_meta_device(folder: Path) -> None:
    """Diffusers leaves a whole model there without an error where a caller builds under it."""
    with torch.device("meta"), pytest.raises(DataError, match=r"vae: parameters \d+ missing .*encode\.path"):
        load_codec(folder)


def test_a_decoder_that_knows_noise_levels_is_not_run_as_one_that_does_not(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLLTXVideo

    config = AutoencoderKLLTXVideo.load_config(folder / "vae")
    AutoencoderKLLTXVideo.from_config({**config, "timestep_conditioning": True}).save_pretrained(tmp_path)
    shutil.copy(folder / "vae" / "config.json", tmp_path)
    with pytest.raises(DataError, match=r"unexpected \(decoder.*timestep|unexpected \(decoder.*scale_shift"):
        load_codec(tmp_path)


def test_a_folder_of_one_variant_in_shards_is_read_and_copied(codec: LTXCodec, tmp_path: Path) -> None:
    codec.vae.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="150KB")
    loaded = load_codec(tmp_path / "half")
    loaded.save(tmp_path / "copy")
    for found in (loaded, load_codec(tmp_path / "copy")):
        np.testing.assert_allclose(found.encode_frames(clips()[:, 0]), codec.encode_frames(clips()[:, 0]), atol=1e-5)
