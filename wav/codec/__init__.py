"""Frames <-> latents: a closed-form PCA codec (the default) and the LTX video VAE behind one protocol."""

from __future__ import annotations

from pathlib import Path

from wav.codec.base import CODEC_FILE, Codec, psnr
from wav.codec.pca import PCACodec
from wav.errors import DataError, shown
from wav.io.readers import read_json, understood

__all__ = ["Codec", "PCACodec", "load_codec", "psnr"]


def load_codec(source: str | Path, device: str = "cpu") -> Codec:
    """Codec from a folder that :meth:`Codec.save` wrote, or an LTX VAE from a folder or hub id on ``device``.

    DataError where the folder holds none that can be read, ServiceError for a hub id that was not fetched.
    """
    folder = Path(source)
    file = folder / CODEC_FILE
    if not file.is_file():
        from wav.codec.ltx import LTXCodec  # imports torch and diffusers: only where needed

        return LTXCodec.from_pretrained(str(source), device)
    remedy = "run the encode stage again"
    with understood(file, remedy):
        kind = read_json(file, remedy)["kind"]
        if kind == PCACodec.kind:
            return PCACodec.load(folder)
        if kind == "ltx":
            from wav.codec.ltx import LTXCodec

            return LTXCodec.load(folder, device)
    raise DataError(f"{file}: codec kind {shown(kind)} is unknown; known are pca and ltx")
