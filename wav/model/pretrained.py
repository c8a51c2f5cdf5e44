"""Weights into a WAVTransformer: every name and shape that does not match is named, and refused unless expected.

diffusers' own ``from_pretrained`` fills missing weights with random numbers after a warning; loading here does not.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wav.errors import CheckpointError
from wav.model.transformer import WAVTransformer

logger = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model.safetensors"
VIEW_PARAMETERS = (r"view_embed$", r"view_ada\.")
EXPERTS = (r"value_", r"action_")
ATTN3 = r"action_blocks\.\d+\.attn3\."


@dataclass(frozen=True)
class LoadReport:
    """What a load did: names of parameters loaded, kept at their initialisation, and present but unused."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a diffusers model folder, sharded or not.

    Raises:
        CheckpointError: a file is missing or unreadable.
    """
    folder = Path(folder)
    index = folder / f"{WEIGHTS}.index.json"
    names = [WEIGHTS]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    state: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: no such weights; give the folder that save_pretrained wrote, whole")
        try:
            state.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not readable as safetensors ({error}); fetch it again") from None
    return state


def read_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a diffusers model folder.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    path = Path(folder) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give a local model folder with config.json") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch it again") from None
    return config


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def _listing(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{len(names)} {kind} ({', '.join(names[:4])}{more})"


def load_state(
    model: WAVTransformer,
    source: Mapping[str, Tensor] | str | Path,
    expected_missing: Sequence[str] = (),
    expected_extra: Sequence[str] = (),
    assign: bool = False,
) -> LoadReport:
    """Copy weights into ``model`` by name.

    Args:
        model: the model to fill.
        source: a state dict, or a diffusers model folder.
        expected_missing: regular expressions (from the name's start) of parameters that may keep their initialisation.
        expected_extra: the same for tensors of the source that may go unused.
        assign: take the source's tensors as they are (for a model on the meta device) instead of copying.

    Raises:
        CheckpointError: any other name is missing or extra, or a shape differs; nothing was changed then.
    """
    where = str(source) if isinstance(source, (str, Path)) else "state dict"
    state = read_weights(source) if isinstance(source, (str, Path)) else dict(source)
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    extra = sorted(set(state) - set(own))
    common = sorted(set(own) & set(state))
    wrong = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in common if state[n].shape != own[n].shape]
    refused = {
        "missing": [name for name in missing if not _matches(name, expected_missing)],
        "unexpected": [name for name in extra if not _matches(name, expected_extra)],
        "of another shape": wrong,
    }
    problems = [_listing(kind, names) for kind, names in refused.items() if names]
    if problems:
        raise CheckpointError(
            f"{where}: parameters {'; '.join(problems)}; use weights of this model's sizes or correct section model"
        )
    model.load_state_dict({name: state[name] for name in common}, strict=False, assign=assign)
    return LoadReport(tuple(common), tuple(missing), tuple(extra))


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> WAVTransformer:
    """The model in ``folder`` as ``save_pretrained`` wrote it, in evaluation mode; every parameter comes from the file.

    Raises:
        CheckpointError: the folder is not a WAVTransformer's, or weights and configuration disagree.
    """
    config = read_config(folder)
    if config.get("_class_name") != WAVTransformer.__name__:
        raise CheckpointError(
            f"{folder}/config.json: _class_name = {config.get('_class_name')!r}: must be 'WAVTransformer'; "
            "give a folder that a training stage or export wrote"
        )
    known = set(inspect.signature(WAVTransformer.__init__).parameters) - {"self"}
    given = {name for name in config if not name.startswith("_")}
    for kind, names in (("unknown", given - known), ("missing", known - given)):
        if names:
            raise CheckpointError(
                f"{folder}/config.json: {min(names)}: {kind} option; read it with the version of wav that wrote it"
            )
    with torch.device("meta"):
        model: WAVTransformer = WAVTransformer.from_config(config)
    load_state(model, folder, assign=True)
    if dtype is not None:
        model.to(dtype=dtype)
    model.eval()
    return model


def _compare_configs(model: WAVTransformer, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse options that change what weights mean without changing their shapes, such as the number of heads."""
    for name, value in config.items():
        if name.startswith("_") or name not in model.config or name.endswith("_expert"):
            continue
        mine = model.config[name]
        plain = [list(v) if isinstance(v, (list, tuple)) else v for v in (value, mine)]
        if plain[0] != plain[1]:
            raise CheckpointError(
                f"{folder}/config.json: {name} = {value!r}, this model has {mine!r}; "
                "set the same size in section model or choose other weights"
            )


def init_from(model: WAVTransformer, folder: str | Path) -> LoadReport:
    """Start ``model`` from another model's weights: a WAV folder or a stock diffusers LTX-Video transformer.

    Experts that the source lacks keep their initialisation. With a stock source the view parameters become zero, so
    that the video part computes exactly what the stock model does.

    Raises:
        CheckpointError: the folder is missing, is of another class, or does not fit.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() and (folder / "transformer" / "config.json").is_file():
        folder = folder / "transformer"
    config = read_config(folder)
    kind = config.get("_class_name")
    if kind == "LTXVideoTransformer3DModel":
        _compare_configs(model, config, folder)
        report = load_state(model, folder, expected_missing=(*VIEW_PARAMETERS, *EXPERTS))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if _matches(name, VIEW_PARAMETERS):
                    parameter.zero_()
    elif kind == WAVTransformer.__name__:
        _compare_configs(model, config, folder)
        absent = [f"{name}_" for name in ("value", "action") if not config[f"{name}_expert"]]
        absent += [] if config["value_expert"] else [ATTN3]
        unused = [f"{name}_" for name in ("value", "action") if not model.config[f"{name}_expert"]]
        unused += [] if model.config.value_expert else [ATTN3]
        report = load_state(model, folder, expected_missing=absent, expected_extra=unused)
    else:
        raise CheckpointError(
            f"{folder}/config.json: _class_name = {kind!r}: must be LTXVideoTransformer3DModel or WAVTransformer; "
            "give such a folder in model.init_from"
        )
    logger.info(
        "%s: %d parameters loaded, %d kept their initialisation", folder, len(report.loaded), len(report.missing)
    )
    return report
