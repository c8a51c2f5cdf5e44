"""Where a checkpoint's tensors are and how they are read: folders, shards, single files, hub ids; nothing filled in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wav.errors import CheckpointError, DataError, ServiceError, WavError, shown
from wav.hub import content_digest, fetch_command, is_hub_id, resolve, weight_index
from wav.io.readers import read_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
FIELD = "model.init_from"
#: where a pipeline, an export or a training stage keeps the transformer
INSIDE = ("transformer", "model")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors\Z")
_ORIGINAL_LAYOUT = "model.diffusion_model."


def locate(source: str | Path) -> Path:
    """Folder or safetensors file that holds the weights of ``source``, which ``model.init_from`` names.

    That is a file; a folder of a model, a pipeline (``transformer/``), an export or a training stage (``model/``); or a
    hub id ``owner/name``, with a file or folder of it behind (``owner/name/GE_base.safetensors``), that was fetched
    into the local hub cache.

    Raises:
        ServiceError: a hub id that is not in the local cache; the message holds the command that fetches it.
        CheckpointError: nothing there, or a folder that holds no weights or several.
    """
    path = Path(source)
    if path.exists():
        found = _inside(path)
        if found is None:
            raise CheckpointError(f"{path / 'config.json'}: no such file, nor weights beside it; give a model's folder")
        return found
    parts = str(source).split("/")
    owner, rest = "/".join(parts[:2]), "/".join(parts[2:])
    if not is_hub_id(owner):
        raise CheckpointError(
            f"{FIELD} = {str(source)!r}: no such file or folder, and not a hub id (owner/name); correct the path"
        )
    include = _wanted(owner, rest)
    root = resolve(owner, FIELD, include)
    found = _inside(root / rest)
    if found is None:
        raise ServiceError(
            f"{FIELD} = {str(source)!r}: the local hub cache holds {owner} without it; fetch it with "
            f"`{fetch_command(owner, include)}` on a machine with internet access"
        )
    return found


def _wanted(owner: str, rest: str) -> tuple[str, ...]:
    """File patterns a fetch may be limited to."""
    if rest:
        return (rest if Path(rest).suffix else f"{rest}/*",)
    return ("transformer/*",) if "LTX" in owner else ()


def _inside(path: Path) -> Path | None:
    """The model's folder within ``path``, or its one safetensors file; None where there is neither."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: must be a .safetensors file; convert the weights with safetensors")
        return path
    for folder in (path, *(path / name for name in INSIDE)):
        if (folder / "config.json").is_file():
            return folder
    files = sorted(path.glob("*.safetensors"))
    if not files:
        return None
    return files[0] if len(files) == 1 and not _SHARD.match(files[0].name) else path


def read_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a diffusers model folder.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    path = Path(folder) / "config.json"
    config = read_json(path, "give a local model folder with config.json", CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no configuration; fetch the folder again")
    for name, value in config.items():  # an edited number must not make a model that takes hours to build
        if isinstance(value, (int, float)) and not abs(value) <= (1000 if name == "num_layers" else 1e7):
            raise CheckpointError(f"{path}: {name} = {shown(value)}: no model has that; fetch the folder again")
    return config


def config_beside(path: Path) -> dict[str, Any] | None:
    """``config.json`` of a folder or beside a file; None where there is none (GE-Base)."""
    folder = path if path.is_dir() else path.parent
    return read_config(folder) if (folder / "config.json").is_file() else None


def _weight_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name, of a sharded checkpoint with an index."""
    found = sorted(folder.glob("*.safetensors.index.json"))
    if not found:
        return None
    try:
        return weight_index(found[0])
    except DataError as error:
        raise CheckpointError(str(error)) from None


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: of its index, else the one file, else a complete set of shards.

    Raises:
        CheckpointError: there is none, or a shard is missing.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    index = _weight_index(path)
    if index is not None:
        files = [path / name for name in sorted(set(index.values()))]
    elif (path / WEIGHTS).is_file():
        files = [path / WEIGHTS]
    else:
        files = sorted(path.glob("*.safetensors")) or [path / WEIGHTS]
        shards = [found for file in files if (found := _SHARD.match(file.name))]
        if shards:
            stem, _, count = shards[0].groups()
            files = [path / f"{stem}-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
        elif len(files) > 1:
            raise CheckpointError(f"{path}: holds {', '.join(file.name for file in files)}; name one of these files")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such weights; give the folder that save_pretrained wrote, whole")
    return files


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a folder as diffusers writes it, on the CPU in their stored type.

    Raises:
        CheckpointError: a file is missing or unreadable, a tensor is twice there or missing from its shard, or the
            tensors are named as LTX-Video's original release names them.
    """
    path = Path(path)
    state: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not readable as safetensors ({error}); fetch it again") from None
        twice = sorted(set(tensors) & set(state))
        if twice:
            raise CheckpointError(f"{file}: {twice[0]} is in another shard too; fetch the folder again")
        state.update(tensors)
    index = _weight_index(path) if path.is_dir() else None
    absent = sorted(set(index or ()) - set(state))
    if index and absent:
        raise CheckpointError(f"{path / index[absent[0]]}: lacks {absent[0]}, which the index promises; fetch it again")
    if any(name.startswith(_ORIGINAL_LAYOUT) for name in state):
        raise CheckpointError(
            f"{path}: names its tensors as LTX-Video's original release does ({_ORIGINAL_LAYOUT}...); "
            "give the diffusers folder (transformer/ of the hub id Lightricks/LTX-Video)"
        )
    return state


def weights_digest(source: str | Path) -> str:
    """Digest of what :func:`locate` finds, weights and configuration; raises as it does, and CheckpointError."""
    path = locate(source)
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    try:
        return content_digest([*weight_files(path), *([config] if config.is_file() else [])])
    except WavError as error:
        raise CheckpointError(f"{path}: not readable ({error}); fetch it again") from error
