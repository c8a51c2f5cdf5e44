#!/usr/bin/env bash
# transformers 5.23.0 with tokenizers 0.23.3: T5Tokenizer takes only the vocabulary from a folder's tokenizer.json.
#
# Guess: T5Tokenizer.from_pretrained(folder), and AutoTokenizer where tokenizer_config.json names that class, give the
#   ids of the folder's tokenizer.json, as Tokenizer.from_file does.
# Seen: its normalizer, pre-tokenizer and post-processor are dropped without a warning. Here the file lower-cases and
#   ends no sentence; its ids of "Pick RED" are [3, 4], both classes give other ones, </s> among them.
#   PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(file)) gives the file's.
# Met by: whoever trains on a T5 with a tokenizer of its own; the encoder is fed ids that it was not trained on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Tokenizer

folder = Path(sys.argv[1], "tokenizer")
folder.mkdir()
pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581pick", -1.0), ("\u2581red", -1.0)]
pieces += [(c, -20.0) for c in "\u2581abcdefghijklmnopqrstuvwxyzDERP"]
tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
tokenizer.normalizer = normalizers.Lowercase()
tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
tokenizer.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
text, own = "Pick RED", Tokenizer.from_file(str(folder / "tokenizer.json"))
seen = {
    "the file": own.encode(text).ids,
    "T5Tokenizer": T5Tokenizer.from_pretrained(folder).encode(text),
    "AutoTokenizer": AutoTokenizer.from_pretrained(folder).encode(text),
    "of the object": PreTrainedTokenizerFast(tokenizer_object=own).encode(text),
}
for name, ids in seen.items():
    print(f"{name}: {ids}")
assert seen["the file"] == seen["of the object"] == [3, 4]
assert seen["T5Tokenizer"] == seen["AutoTokenizer"] != [3, 4]
assert seen["T5Tokenizer"][-1] == 1
PYTHON
