"""Instructions to embeddings: a frozen T5 encoder, the same code for T5-XXL and for the small one built here.

:func:`build_small` writes a seeded two-layer T5 whose tokenizer knows the corpus' words as whole pieces (characters
otherwise) and whose word embeddings are orthogonal, so that "red" and "green" stay apart without any pre-training.
It is loaded through ``from_pretrained`` like any other.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import shutil
import string
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wav.errors import ConfigError, DataError, ServiceError, cut, shown
from wav.hub import content_digest, is_hub_id, load_whole, read_reference, resolve, write_reference
from wav.io.readers import read_json, understood
from wav.seeding import torch_generator

FIELD = "encode.text"
UNKNOWN_SHARE = 0.2
"""Share of an instruction's tokens that may be unknown: an odd sign in a sentence, not a sentence's object."""
_LOG = logging.getLogger(__name__)
_SPECIAL = ("<pad>", "</s>", "<unk>")
# Words of tabletop instructions, known to the small tokenizer whatever the corpus.
_LEXICON = """
a and at back basket black blue bottom bowl bottle box can cabinet close cream cube drawer drop front from grasp green
in into left lid lift middle move mug near next of on open orange pan pick place plate pot push put rack red right
side slide stack stove table take that the then to top tray turn under up white wine yellow
"""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")


def _words(corpus: Sequence[str]) -> list[str]:
    """Distinct words, the corpus' first (sorted, so that the order of tasks does not matter)."""
    known = sorted({word for line in corpus for word in re.findall(r"[^\W_]+", line.lower())})
    return known + [word for word in _LEXICON.split() if word not in known]


def _orthogonal_rows(count: int, dim: int, seed: int) -> torch.Tensor:
    """(count, dim) rows of norm sqrt(dim), orthogonal within each block of ``dim`` rows."""
    generator = torch_generator(seed, "text.embedding")
    blocks = [torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0] for _ in range(-(-count // dim))]
    rows: torch.Tensor = torch.cat(blocks)[:count] * dim**0.5
    return rows


def build_small(folder: str | Path, corpus: Sequence[str], dim: int = 64, seed: int = 0) -> Path:
    """Write a small T5 encoder and its tokenizer into ``folder``.

    Words of ``corpus`` become single tokens; ``dim``, the width of the embeddings Ct, is a multiple of 4
    (else ConfigError).
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer  # slow import
    from transformers.utils.logging import disable_progress_bar

    if dim % 4:
        raise ConfigError(
            f"encode.text_dim = {dim}: must be a multiple of 4, the small encoder's heads; use {dim // 4 * 4 + 4}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = [("\u2581" + word, -1.0) for word in _words(corpus)]
    usual = (*string.ascii_letters, *string.digits, *string.punctuation)
    others = sorted({c for line in corpus for c in line if not c.isspace()} - set(usual))
    characters = [(c, -20.0) for c in ("\u2581", *usual, *others)]
    vocabulary = [(piece, 0.0) for piece in _SPECIAL] + words + characters
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=dim,
        d_kv=dim // 4,
        d_ff=2 * dim,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        model = T5EncoderModel(config)
    generator = torch_generator(seed, "text.weights")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "shared" not in name and "embed_tokens" not in name:
                scale = 0.5 / parameter.shape[1] ** 0.5  # layers add context; the word itself stays the larger part
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.shared.weight.copy_(_orthogonal_rows(len(vocabulary), dim, seed))
    disable_progress_bar()  # they flicker for models that load at once
    model.save_pretrained(folder)
    return folder


class TextEncoder:
    """Frozen T5: instructions to (n, tokens, dim) embeddings. The model is loaded at the first prompt."""

    def __init__(self, folder: Path, source: str, tokens: int, device: str, dtype: str) -> None:
        self.source, self.tokens, self.device, self.dtype = source, tokens, device, dtype
        self._model_folder = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
        self._tokenizer_folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        path, remedy = self._model_folder / "config.json", f"set {FIELD} to a T5 encoder"
        config = read_json(path, remedy)
        with understood(path, remedy):
            if config.get("model_type") != "t5" or "d_model" not in config:
                raise DataError(f"{folder}: model type {shown(config.get('model_type'))} is no T5; {remedy}")
            self.dim = int(config["d_model"])
            self._vocabulary = int(config["vocab_size"])
        self._memory: dict[str, tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}

    @classmethod
    def from_pretrained(
        cls, source: str | Path, tokens: int, device: str = "cpu", dtype: str = "float32"
    ) -> TextEncoder:
        """Open a T5 encoder.

        Args:
            source: folder (of T5, of a pipeline with text_encoder/ and tokenizer/, or of :meth:`save`) or hub id.
            tokens: length every instruction is padded to (data.text_tokens).
            device: where the model runs.
            dtype: float32, or bfloat16 for the large encoders.

        Raises:
            ServiceError: a hub id that was not fetched. DataError: no T5 in there, or not the recorded one.
        """
        source = str(source)
        reference = read_reference(Path(source)) if Path(source).is_dir() else None
        if reference:
            source = reference[0]
        folder = resolve(source, FIELD, ("text_encoder/*", "tokenizer/*") if "LTX" in source else ())
        encoder = cls(folder, source, tokens, device, dtype)
        if reference and encoder.digest != reference[1]:
            raise DataError(f"{source}: the weights in the hub cache are not those recorded; fetch the same revision")
        return encoder

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights, the configuration and the tokenizer."""
        return content_digest(self._files())

    def encode(self, instructions: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Embeddings (n, tokens, dim), zero where padded, and mask (n, tokens), true on real tokens.

        Each instruction is encoded alone, so its embedding does not depend on the others; DataError for one that is
        longer than ``tokens``: nothing is ever cut off silently.
        """
        if not instructions:
            raise DataError("instructions: none given; pass at least one")
        for instruction in instructions:
            if instruction not in self._memory:
                self._memory[instruction] = self._compute(instruction)
        rows = [self._memory[instruction] for instruction in instructions]
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])

    def save(self, folder: str | Path, reference: bool = False) -> None:
        """Write the encoder into ``folder``; with ``reference``, weights of a hub id are named instead of copied."""
        folder = Path(folder)
        if reference and is_hub_id(self.source):
            write_reference(folder, self.source, self.digest)
            return
        folder.mkdir(parents=True, exist_ok=True)
        for file in self._files():
            shutil.copyfile(file, folder / file.name)

    def _files(self) -> list[Path]:
        """Files that decide the embeddings."""
        weights = sorted(self._model_folder.glob("*.safetensors")) or sorted(
            self._model_folder.glob("pytorch_model*.bin")
        )
        if not weights:
            raise DataError(f"{self._model_folder}: holds no weights; fetch the encoder named by {FIELD} again")
        indices = sorted(self._model_folder.glob(f"*{weights[0].suffix}.index*.json"))
        tokenizer = [self._tokenizer_folder / name for name in _TOKENIZER_FILES]
        return [*weights, *indices, self._model_folder / "config.json", *(f for f in tokenizer if f.is_file())]

    @cached_property
    def _tokenizer(self) -> Any:
        """Tokenizer of tokenizer.json as it stands, else of spiece.model.

        transformers' ``T5Tokenizer`` takes only the vocabulary from tokenizer.json: a T5 that lower-cases would be
        fed other ids than it was trained on.
        """
        folder = self._tokenizer_folder
        file = folder / "tokenizer.json"
        tokenizer = _of_file(file) if file.is_file() else _of_sentencepiece(folder)
        # transformers 5 may build a vocabulary of four tokens from a file it did not understand, without a word.
        if not 16 < len(tokenizer) <= self._vocabulary:
            raise DataError(
                f"{folder}: the tokenizer has {len(tokenizer)} tokens, the T5 {self._vocabulary}; fetch {FIELD} again"
            )
        return tokenizer

    @cached_property
    def _model(self) -> Any:
        from transformers import T5EncoderModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        unused = ("decoder.", "lm_head.")  # where the folder holds a whole T5
        model = load_whole(T5EncoderModel, self._model_folder, FIELD, unused, dtype=getattr(torch, self.dtype))
        return model.eval().requires_grad_(False).to(self.device)

    def _check_known(self, instruction: str, ids: Sequence[int]) -> None:
        """Refuse an instruction of which the tokenizer knows too little: others would have its embedding too."""
        unknown = sum(token == self._tokenizer.unk_token_id for token in ids)
        told = f"instruction {instruction!r}: the tokenizer of {self.source} does not know {unknown} of its parts"
        if unknown > UNKNOWN_SHARE * (len(ids) - 1):  # the end is no part of it
            raise DataError(
                f"{told}, so the model could not read it; write it in the tokenizer's language or set {FIELD} to an "
                "encoder that knows it"
            )
        if unknown:
            _LOG.warning(told)

    @torch.no_grad()
    def _compute(self, instruction: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        ids = self._tokenizer(instruction).input_ids
        if len(ids) > self.tokens:
            raise DataError(
                f"instruction {instruction!r}: {len(ids)} tokens exceed data.text_tokens = {self.tokens}; "
                "raise data.text_tokens or shorten the instruction"
            )
        self._check_known(instruction, ids)
        mask = np.arange(self.tokens) < len(ids)
        padded = torch.zeros((1, self.tokens), dtype=torch.long)  # any token does, as the mask hides it
        padded[0, : len(ids)] = torch.tensor(ids)
        hidden = self._model(
            input_ids=padded.to(self.device), attention_mask=torch.from_numpy(mask)[None].to(self.device)
        ).last_hidden_state[0]
        return hidden.float().cpu().numpy() * mask[:, None].astype(np.float32), mask


def _of_file(file: Path) -> Any:
    """Tokenizer of a tokenizer.json, which is called as transformers' own are; it neither pads nor cuts."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"{file}: is no tokenizer ({cut(error)}); fetch {FIELD} again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    unknown = "<unk>" if tokenizer.token_to_id("<unk>") is not None else None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown)


def _of_sentencepiece(folder: Path) -> Any:
    """Tokenizer of a folder that holds spiece.model alone, as the older T5s on the hub do."""
    if not (folder / "spiece.model").is_file():
        raise DataError(f"{folder}: holds neither tokenizer.json nor spiece.model; fetch {FIELD} again")
    if importlib.util.find_spec("google.protobuf") is None:
        raise ServiceError(f"{folder / 'spiece.model'}: reading it needs protobuf; run `pip install protobuf`")
    from transformers import T5Tokenizer

    try:
        return T5Tokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of transformers, sentencepiece and protobuf
        raise DataError(f"{folder}: is no tokenizer ({cut(error)}); fetch {FIELD} again") from error
