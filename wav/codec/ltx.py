"""The LTX video VAE (diffusers ``AutoencoderKLLTXVideo``) behind the codec protocol, for full-scale runs.

32 pixels and 8 frames per latent, 128 channels; the latent is the posterior's mean, normalised with the checkpoint's
``latents_mean`` and ``latents_std`` as LTX-Video's own pipeline does.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wav.codec.base import CODEC_FILE, Codec, Images, Latents
from wav.errors import DataError
from wav.hub import content_digest, is_hub_id, load_whole, resolve
from wav.io.files import read_json, write_json

FIELD = "encode.path"
FORMAT = 1


class LTXCodec(Codec):
    """A frozen LTX VAE. Make one with :meth:`from_pretrained` or ``wav.codec.load_codec``."""

    kind = "ltx"

    def __init__(self, vae: Any, source: str, files: list[Path], batch: int = 1) -> None:
        """Wrap a loaded VAE.

        ``files`` are its weight and configuration files, for the digest; ``batch`` clips go through it at once.
        """
        self.vae, self.source, self.batch, self._files = vae.eval().requires_grad_(False), source, batch, files
        self.channels = int(vae.config.latent_channels)
        self.spatial = int(vae.spatial_compression_ratio)
        self.temporal = int(vae.temporal_compression_ratio)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str = "cpu", dtype: str = "float32", batch: int = 1
    ) -> LTXCodec:
        """Load the VAE from a folder (of the VAE, or of a pipeline with vae/) or a hub id in the local cache.

        ServiceError for a hub id that was not fetched, DataError for a folder that holds no LTX VAE, or not all of it.
        """
        from diffusers import AutoencoderKLLTXVideo  # slow import

        source = str(source)
        folder = resolve(source, FIELD, ("vae/*",))
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        config = read_json(folder / "config.json", f"set {FIELD} to a folder or hub id that holds the LTX VAE")
        if config.get("_class_name") != "AutoencoderKLLTXVideo":
            raise DataError(f"{folder}: holds {config.get('_class_name')!r}, not the LTX VAE; correct {FIELD}")
        vae = load_whole(
            AutoencoderKLLTXVideo, folder, FIELD, torch_dtype=getattr(torch, dtype), low_cpu_mem_usage=False
        )
        patterns = ("*.safetensors", "*.bin", "*.index*.json", "config.json")
        files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
        return cls(vae.to(device), source, files, batch)

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", dtype: str = "float32") -> LTXCodec:
        """Read what :meth:`save` wrote; raises DataError where the weights are not the recorded ones."""
        folder = Path(folder)
        header = read_json(folder / CODEC_FILE, "run the encode stage again")
        if header.get("format") != FORMAT:
            raise DataError(f"{folder}: codec format {header.get('format')} is unknown; run the encode stage again")
        codec = cls.from_pretrained(header["source"] or folder, device, dtype)
        if codec.digest != header["digest"]:
            raise DataError(f"{folder}: the LTX VAE is not the one recorded; fetch the same revision or encode again")
        return codec

    @cached_property
    def digest(self) -> str:
        """SHA-256 of weights and configuration."""
        return content_digest(self._files)

    def save(self, folder: str | Path, reference: bool = False) -> None:
        """Write the VAE and ``codec.json``; with ``reference``, weights of a hub id are named instead of copied."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        source = self.source if reference and is_hub_id(self.source) else ""
        if not source:
            for file in self._files:  # the very files, so that the copy has the same digest
                (folder / file.name).write_bytes(file.read_bytes())
        write_json(folder / CODEC_FILE, {"format": FORMAT, "kind": self.kind, "source": source, "digest": self.digest})

    def _scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (1, C, 1, 1, 1) of the latents, over the checkpoint's scaling factor."""
        shape = (1, -1, 1, 1, 1)
        factor = float(getattr(self.vae.config, "scaling_factor", 1.0))
        return self.vae.latents_mean.view(shape).float(), self.vae.latents_std.view(shape).float() / factor

    @torch.no_grad()
    def _encode(self, clips: Images) -> Latents:
        mean, std = self._scale()
        out = []
        for start in range(0, len(clips), self.batch):
            pixels = torch.from_numpy(np.ascontiguousarray(clips[start : start + self.batch])).to(self.vae.device)
            pixels = (pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(self.vae.dtype)
            z = self.vae.encode(pixels).latent_dist.mode().float()
            out.append(((z - mean.to(z)) / std.to(z)).cpu().numpy())
        return np.concatenate(out).astype(np.float32, copy=False)

    @torch.no_grad()
    def _decode(self, latents: Latents) -> Images:
        mean, std = self._scale()
        out = []
        for start in range(0, len(latents), self.batch):
            z = torch.from_numpy(np.ascontiguousarray(latents[start : start + self.batch], np.float32))
            z = (z.to(self.vae.device) * std.to(self.vae.device) + mean.to(self.vae.device)).to(self.vae.dtype)
            level = None
            if self.vae.config.timestep_conditioning:  # later LTX decoders take a noise level; 0: decode as it is
                level = torch.zeros(len(z), dtype=z.dtype, device=z.device)
            pixels = self.vae.decode(z, temb=level).sample.float()
            pixels = ((pixels.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().clamp(0, 255)
            out.append(pixels.to(torch.uint8).cpu().numpy())
        return np.concatenate(out)
