"""Windows to train on: pictures and instructions, their latents, and the encoders that made them.

The baseline schedule decodes and encodes pictures, and encodes instructions, within the step, as the reference does;
ours reads what was encoded once. Pictures come from mp4 files where PyAV is installed (:mod:`baseline.recordings`);
without it they are random and nothing is decoded on either side. ``pca``: the default pipeline's codec and small T5
(needs scipy and transformers). ``vae``: LTX-Video's VAE with random weights (needs diffusers alone; the instructions
are taken as encoded already on both sides, because T5 needs transformers). ``none``: no encoder on either side.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sizes import Sizes
from torch import Tensor

from wav.data.windows import WindowBatch

if TYPE_CHECKING:
    from baseline.recordings import Recordings, Samples

INSTRUCTIONS = ("lift the red cube", "lift the green cube", "put the cube into the box", "open the drawer")
ENCODERS = ("pca", "vae", "none")


@dataclass(frozen=True)
class Pictures:
    """What a batch's latents are made of: memory (B, V, Fm, H, W, 3) and clip (B, V, Fr, H, W, 3) uint8, and ids."""

    memory: NDArray[np.uint8]
    clip: NDArray[np.uint8]
    ids: Tensor  #: (B, L) tokens of the instructions
    mask: Tensor  #: (B, L)
    samples: Samples | None = None  #: where the recordings hold them, if there are any


class Encoders:
    """Pictures to latents and tokens to embeddings; also the captions that :func:`wav.training.draws.draw` asks for."""

    patch, temporal = 16, 4
    recordings: Recordings | None = None

    def __init__(self, sizes: Sizes, device: torch.device, seed: int = 0) -> None:
        self.sizes, self.device = sizes, device
        self.generator = np.random.default_rng(seed)
        self.empty_text_mask = torch.arange(sizes.text_tokens) == 0
        self.empty_text = torch.from_numpy(self._normal(sizes.text_tokens, sizes.caption))

    def _normal(self, *shape: int) -> NDArray[np.float32]:
        return self.generator.standard_normal(shape, np.float32)

    def record(self) -> None:
        """Take pictures from mp4 files from now on, where they can be written and read."""
        if find_spec("av") is not None:
            from baseline.recordings import Recordings

            height, width = (cells * self.patch for cells in self.sizes.grid)
            self.recordings = Recordings(self.sizes.views, (height, width), self.sizes.memory, self._clip_frames)

    @property
    def _clip_frames(self) -> int:
        return 1 + self.temporal * (self.sizes.future - 1)

    def decode(self, pictures: Pictures) -> Pictures:
        """The same pictures, decoded again from where they are recorded."""
        if self.recordings is None or pictures.samples is None:
            return pictures
        memory, clip = self.recordings.read(pictures.samples)
        return replace(pictures, memory=memory, clip=clip)

    def pictures(self, size: int) -> Pictures:
        """Recorded pictures of ``size`` samples, or random ones, smooth enough to be encoded."""
        sizes, height, width = self.sizes, *(cells * self.patch for cells in self.sizes.grid)

        def draw(frames: int) -> NDArray[np.uint8]:
            coarse = self.generator.integers(0, 256, (size, sizes.views, frames, height // 8, width // 8, 3), np.uint8)
            return coarse.repeat(8, 3).repeat(8, 4)

        length = self.generator.integers(3, sizes.text_tokens + 1, size)
        mask = torch.from_numpy(np.arange(sizes.text_tokens) < length[:, None])
        ids = torch.from_numpy(self.generator.integers(3, 20, (size, sizes.text_tokens))) * mask
        if self.recordings is None:
            return Pictures(draw(sizes.memory), draw(self._clip_frames), ids, mask)
        samples = self.recordings.draw(size, self.generator)
        return Pictures(*self.recordings.read(samples), ids, mask, samples)

    def text(self, pictures: Pictures) -> Tensor:
        """Embeddings (B, L, Ct); made up here, where no text encoder runs."""
        generator = torch.Generator().manual_seed(int(pictures.ids.sum()))
        return torch.randn(*pictures.ids.shape, self.sizes.caption, generator=generator)

    def latents(self, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Memory (B, V, C, Fm, h, w) and future (B, V, C, Ff, h, w); made up here, where no codec runs."""
        sizes, generator = self.sizes, torch.Generator().manual_seed(int(pictures.ids.sum()))
        lead = (len(pictures.ids), sizes.views, sizes.latent)
        memory, future = (
            torch.randn(*lead, frames, *sizes.grid, generator=generator) for frames in (sizes.memory, sizes.future)
        )
        return memory, future

    def encode(self, batch: WindowBatch, pictures: Pictures) -> WindowBatch:
        """The batch with latents and embeddings computed from its pictures and tokens."""
        memory, future = self.latents(pictures)
        return replace(batch, memory=memory, future=future, text=self.text(pictures), text_mask=pictures.mask)


class PcaEncoders(Encoders):
    """The default pipeline's own: patch PCA, and a small T5."""

    def __init__(self, sizes: Sizes, device: torch.device, seed: int = 0) -> None:
        from wav.codec.pca import PCACodec

        super().__init__(sizes, device, seed)
        self.record()
        many = self.pictures(64)
        frames, clips = (x.reshape(-1, *x.shape[-3:]) for x in (many.memory, many.clip))
        clips = clips.reshape(-1, *many.clip.shape[2:])
        channels = min(sizes.latent, 48)
        self.codec = PCACodec.fit(frames, clips, self.patch, self.temporal, channels, coordinates=channels > 3)
        with tempfile.TemporaryDirectory() as folder:
            self.t5 = _small_t5(Path(folder), sizes.caption)

    @torch.no_grad()
    def text(self, pictures: Pictures) -> Tensor:
        """T5's embeddings, zero where padded."""
        hidden: Tensor = self.t5(input_ids=pictures.ids, attention_mask=pictures.mask).last_hidden_state
        return hidden * pictures.mask.unsqueeze(-1)

    def latents(self, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Memory frames one by one, the future as one clip."""
        shape = pictures.memory.shape
        frames = self.codec.encode_frames(pictures.memory.reshape(-1, *shape[3:]))
        memory = torch.from_numpy(frames).unflatten(0, shape[:3]).transpose(2, 3).contiguous()
        clips = self.codec.encode_clips(pictures.clip.reshape(-1, *pictures.clip.shape[2:]))
        return memory, torch.from_numpy(clips).unflatten(0, shape[:2])


class VaeEncoders(Encoders):
    """LTX-Video's VAE, randomly initialised: 32 pixels and 8 frames a latent."""

    patch, temporal = 32, 8

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        from diffusers import AutoencoderKLLTXVideo

        super().__init__(sizes, device, seed)
        self.record()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae = AutoencoderKLLTXVideo(latent_channels=sizes.latent)
        self.vae = vae.eval().requires_grad_(False).to(device, dtype)

    @torch.no_grad()
    def _encode(self, clips: NDArray[np.uint8]) -> Tensor:
        """Clips (n, F, H, W, 3) to normalised latents (n, C, f, h, w)."""
        pixels = torch.from_numpy(clips).to(self.device).permute(0, 4, 1, 2, 3).to(self.vae.dtype) / 127.5 - 1
        latents: Tensor = self.vae.encode(pixels).latent_dist.mode().float()
        return latents / latents.std().clamp_min(1e-6)

    def latents(self, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Memory frames one by one, the future as one clip, on the device."""
        shape = pictures.memory.shape
        frames = self._encode(pictures.memory.reshape(-1, 1, *shape[3:]))
        memory = frames.squeeze(2).unflatten(0, shape[:3]).transpose(2, 3).contiguous()
        clips = self._encode(pictures.clip.reshape(-1, *pictures.clip.shape[2:]))
        return memory, clips.unflatten(0, shape[:2])


def make_encoders(kind: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Encoders:
    """Encoders of a kind of :data:`ENCODERS`."""
    if kind == "vae":
        return VaeEncoders(sizes, device, dtype)
    return PcaEncoders(sizes, device) if kind == "pca" else Encoders(sizes, device)


def windows(sizes: Sizes, encoders: Encoders, size: int, seed: int) -> tuple[WindowBatch, Pictures]:
    """A batch as training reads it, and the pictures and tokens that its latents and embeddings come from."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    blank = torch.zeros(0)
    batch = WindowBatch(
        memory=blank,
        future=blank,
        text=blank,
        text_mask=blank,
        state=normal(size, sizes.state_dim),
        actions=normal(size, sizes.chunk, sizes.action_channels),
        values=normal(size, sizes.chunk, sizes.value_channels),
        episode=torch.zeros(size, dtype=torch.int64),
        step=torch.arange(size),
    )
    pictures = encoders.pictures(size)
    return encoders.encode(batch, pictures).to("cpu"), pictures


def _small_t5(folder: Path, width: int) -> Any:
    """The pipeline's small T5 encoder."""
    from transformers import T5EncoderModel

    from wav.text import build_small

    return T5EncoderModel.from_pretrained(str(build_small(folder, INSTRUCTIONS, width))).eval()
