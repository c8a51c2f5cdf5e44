"""Text: separation of instructions, padding, caches, digests, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from wav.errors import ConfigError, DataError, ServiceError
from wav.text import TextEncoder, build_small

RED, GREEN = "lift the red cube", "lift the green cube"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small(tmp_path_factory.mktemp("t5"), [RED, GREEN], dim=64, seed=0)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.from_pretrained(folder, tokens=16)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_two_instructions_are_clearly_different(encoder: TextEncoder) -> None:
    embedding, mask = encoder.encode([RED, GREEN])
    assert mask.sum(1).tolist() == [5, 5]  # four words and the end
    means = (embedding * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    assert cosine(means[0], means[1]) < 0.9
    assert cosine(embedding[0, 2], embedding[1, 2]) < 0.4  # red against green
    assert cosine(embedding[0, 3], embedding[1, 3]) > 0.5  # cube stays cube
    assert 0.5 < embedding[mask].std() < 2


def test_instructions_of_any_script_have_their_own_embedding(tmp_path: Path) -> None:
    one, other = "把红色方块放进盒子", "把绿色方块放进盒子"
    encoder = TextEncoder.from_pretrained(build_small(tmp_path / "t5", [one, other], dim=64), tokens=16)
    embedding, _ = encoder.encode([one, other])
    assert np.abs(embedding[0] - embedding[1]).max() > 0.1


def test_what_the_tokenizer_does_not_know_is_counted(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    encoder.encode(["lift the red cube and the green cube \u2603"])
    assert "does not know 1 of its parts" in caplog.text
    with pytest.raises(DataError, match=r"instruction '把红色.*does not know .*, so the model could not read it"):
        encoder.encode([RED, "把红色方块放进盒子"])


def test_shapes_padding_and_the_empty_instruction(encoder: TextEncoder) -> None:
    embedding, mask = encoder.encode(["", RED])
    assert embedding.shape == (2, 16, 64)
    assert embedding.dtype == np.float32
    assert mask.dtype == np.bool_
    assert mask[0].sum() == 1
    assert (embedding[~mask] == 0).all()
    assert np.isfinite(embedding).all()


def test_an_embedding_does_not_depend_on_its_neighbours_or_the_padding(folder: Path, encoder: TextEncoder) -> None:
    wide = TextEncoder.from_pretrained(folder, tokens=24)
    np.testing.assert_allclose(wide.encode([RED])[0][0, :5], encoder.encode([GREEN, RED])[0][1, :5], atol=1e-5)


def test_unknown_words_are_spelled_not_lost(encoder: TextEncoder) -> None:
    embedding, mask = encoder.encode(["zap it", "zip it"])
    assert mask[0].sum() > 3
    assert np.abs(embedding[0] - embedding[1]).max() > 0.5
    unknown = encoder._tokenizer.unk_token_id
    assert unknown not in encoder._tokenizer("zap the qux, 42 Times!").input_ids


def test_too_long_is_an_error(encoder: TextEncoder) -> None:
    with pytest.raises(DataError, match=r"text_tokens = 16"):
        encoder.encode([RED + " and then the green one and then the red one again and again"])
    with pytest.raises(DataError, match="none given"):
        encoder.encode([])


def test_building_is_reproducible_and_seeded(tmp_path: Path, encoder: TextEncoder) -> None:
    again = TextEncoder.from_pretrained(build_small(tmp_path / "a", [GREEN, RED], 64, 0), 16)
    other = TextEncoder.from_pretrained(build_small(tmp_path / "b", [GREEN, RED], 64, 1), 16)
    assert again.digest == encoder.digest != other.digest
    np.testing.assert_array_equal(again.encode([RED])[0], encoder.encode([RED])[0])


def test_save_keeps_the_digest(tmp_path: Path, encoder: TextEncoder) -> None:
    encoder.save(tmp_path / "copy")
    assert TextEncoder.from_pretrained(tmp_path / "copy", 16).digest == encoder.digest


def test_the_model_is_loaded_at_the_first_prompt(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(folder, 16)
    assert "_model" not in encoder.__dict__
    encoder.encode([""])
    assert "_model" in encoder.__dict__


def test_a_hub_id_that_was_not_fetched_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServiceError, match=r"hf download nobody/t5-missing"):
        TextEncoder.from_pretrained("nobody/t5-missing", 16)


def test_broken_folders(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        TextEncoder.from_pretrained(tmp_path / "nothing", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"config\.json"):
        TextEncoder.from_pretrained(tmp_path / "empty", 16)
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="tokenizer"):
        TextEncoder.from_pretrained(tmp_path / "cut", 16).encode([RED])
    with pytest.raises(ConfigError, match="text_dim"):
        build_small(tmp_path / "odd", [RED], dim=30)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


LOST = "encoder.block.0.layer.0.SelfAttention.q.weight"
PARTIAL = {
    r"1 missing \(encoder.block.0.layer.0.SelfAttention.q.weight\)": lambda t: {n: t[n] for n in t if n != LOST},
    r"\d+ missing .* more\); 21 unexpected \(model\.": lambda t: {f"model.{name}": t[name] for name in t},
    r"1 unexpected \(scale_weight\)": lambda t: {**t, "scale_weight": torch.ones(1)},
    r"1 of another shape \(encoder.final_layer_norm.weight \(3,\) for \(64,\)\)": lambda t: {
        **t, "encoder.final_layer_norm.weight": torch.ones(3)
    },
}  # fmt: skip


@pytest.mark.parametrize("message", PARTIAL)
def test_an_encoder_is_loaded_whole_or_not_at_all(message: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t5")
    edit_weights(tmp_path / "t5", PARTIAL[message])
    with pytest.raises(DataError, match=rf"t5: parameters {message}.*encode\.text"):
        TextEncoder.from_pretrained(tmp_path / "t5", 16).encode([RED])


def test_the_decoder_of_a_whole_t5_goes_unused(folder: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t5")
    more = {"decoder.final_layer_norm.weight": torch.ones(64), "lm_head.weight": torch.ones(9, 64)}
    edit_weights(tmp_path / "t5", lambda tensors: {**tensors, **more})
    np.testing.assert_array_equal(
        TextEncoder.from_pretrained(tmp_path / "t5", 16).encode([RED])[0], encoder.encode([RED])[0]
    )


def test_a_folder_of_one_variant_is_read_and_copied(folder: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").unlink()
    encoder._model.save_pretrained(tmp_path / "t5", variant="fp16", max_shard_size="60KB")
    TextEncoder.from_pretrained(tmp_path / "t5", 16).save(tmp_path / "copy")
    for name in ("t5", "copy"):
        found = TextEncoder.from_pretrained(tmp_path / name, 16).encode([RED])[0]
        np.testing.assert_array_equal(found, encoder.encode([RED])[0])


PIPELINES = {
    "lower case": {"normalizer": {"type": "Lowercase"}},
    "spaces kept": {
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    },
    "no end of sentence": {"post_processor": None},
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_tokenizers_own_pipeline_is_used(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t5")
    file = tmp_path / "t5" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **PIPELINES[name]}))
    wanted, text = Tokenizer.from_file(str(file)), "Lift the  RED cube, then hold it"
    encoder = TextEncoder.from_pretrained(tmp_path / "t5", 64)
    assert encoder._tokenizer(text).input_ids == wanted.encode(text).ids
    assert wanted.encode(text).ids != Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert int(encoder.encode([text])[1].sum()) == len(wanted.encode(text).ids)


def test_what_a_tokenizer_would_cut_off_is_an_error_all_the_same(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t5")
    file = tmp_path / "t5" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(file))
    assert len(Tokenizer.from_file(str(file)).encode(RED).ids) == 9
    encoder = TextEncoder.from_pretrained(tmp_path / "t5", 5)
    assert int(encoder.encode([RED])[1].sum()) == 5
    with pytest.raises(DataError, match="6 tokens exceed"):
        encoder.encode([RED + " up"])
