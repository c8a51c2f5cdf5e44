"""Training reads encoded data alone: neither the text encoder nor the codec is loaded, and labels are never assumed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wav.codec import PCACodec
from wav.data.encode import codec_of, text_encoder_of
from wav.data.windows import BatchSampler
from wav.errors import DataError
from wav.text import TextEncoder
from wav.training.inputs import initial_model, open_inputs


def test_no_encoder_is_loaded(spec_of, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("training loaded an encoder")

    monkeypatch.setattr(TextEncoder, "__init__", refuse)
    monkeypatch.setattr(TextEncoder, "from_pretrained", refuse)
    monkeypatch.setattr(PCACodec, "__init__", refuse)
    spec = spec_of("pretrain_video")
    inputs = open_inputs(spec)
    batch = inputs.train.at(BatchSampler(len(inputs.train), 4, seed=0), 0)
    assert initial_model(spec, inputs).config.caption_channels == batch.text.shape[-1]
    with pytest.raises(AssertionError, match="loaded an encoder"):
        text_encoder_of(inputs.latents)
    with pytest.raises(DataError, match="loaded an encoder"):
        codec_of(inputs.latents)


def test_missing_value_labels_are_an_error_not_zeros(spec_of, tmp_path) -> None:
    spec = spec_of("pretrain_video")
    spec = replace(spec, stage="train_value", paths=replace(spec.paths, rewards=None))
    with pytest.raises(DataError, match=r"train_value: no rewards given; .*dvc repro label_rewards"):
        open_inputs(spec)
    spec = replace(spec, paths=replace(spec.paths, rewards=tmp_path / "rewards"))
    with pytest.raises(DataError, match=r"rewards"):
        open_inputs(spec)
