"""Weights into a WAVTransformer and out of it: every name and shape that does not match is named, and refused.

diffusers' own ``from_pretrained`` fills missing weights with random numbers after a warning; loading here does not.
:func:`load_model` opens a model of this project whole, :func:`init_from` starts one from what the field publishes:
stock LTX-Video (diffusers folders; one file, or shards with or without their index), GE-Base's single safetensors file,
the WAV reference's ``step_N`` folders, or an export. All carry the same parameter names, which are the names on disk
here too: ``transformer_blocks.0...`` for ``video.transformer_blocks.0...``, ``value_blocks.0...`` for
``value.blocks.0...``. Error messages, reports and patterns speak of parameters by those.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from wav.errors import CheckpointError
from wav.hub import listing, refuse_partial
from wav.io.readers import understood
from wav.model.transformer import WAVTransformer
from wav.model.weights import FIELD, WEIGHTS, config_beside, locate, read_config, read_weights

logger = logging.getLogger(__name__)

VIEW_PARAMETERS = (r"view_embed$", r"view_ada\.")
EXPERTS = ("value", "action")
ATTN3 = r"action_blocks\.\d+\.attn3\."


#: options that came after the first checkpoints; where one is absent its default is meant
LATER = {"action_kind"}


def published_name(name: str) -> str:
    """Name on disk of a parameter: ``video.X`` is X, ``value.X`` value_X, ``action.X`` action_X."""
    expert, rest = name.split(".", 1)
    return rest if expert == "video" else f"{expert}_{rest}"


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a WAVTransformer under its names on disk."""
    return {published_name(name): tensor for name, tensor in state.items()}


def module_name(name: str) -> str:
    """Name in a WAVTransformer of a parameter on disk; undoes :func:`published_name`."""
    expert, _, rest = name.partition("_")
    return f"{expert}.{rest}" if expert in EXPERTS else f"video.{name}"


@dataclass(frozen=True)
class LoadReport:
    """What a load did: names of parameters loaded, kept at their initialisation, and present but unused."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def load_state(
    model: WAVTransformer,
    state: Mapping[str, Tensor],
    expected_missing: Sequence[str] = (),
    expected_extra: Sequence[str] = (),
    assign: bool = False,
    where: str = "state dict",
) -> LoadReport:
    """Copy weights of ``state``, which the error calls ``where``, into ``model`` by name.

    ``expected_missing``: regular expressions (from the name's start) of parameters that may keep their initialisation;
    ``expected_extra``: of tensors that may go unused. ``assign`` takes the tensors as they are (for a model on the meta
    device) instead of copying.

    Raises:
        CheckpointError: any other name is missing or extra, or a shape differs; nothing was changed then.
    """
    own = published_state(model.state_dict())
    missing = sorted(set(own) - set(state))
    extra = sorted(set(state) - set(own))
    common = sorted(set(own) & set(state))
    wrong = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in common if state[n].shape != own[n].shape]
    refuse_partial(
        where,
        [name for name in missing if not _matches(name, expected_missing)],
        [name for name in extra if not _matches(name, expected_extra)],
        wrong,
        "use weights of this model's sizes or correct section model",
        CheckpointError,
    )
    model.load_state_dict({module_name(name): state[name] for name in common}, strict=False, assign=assign)
    return LoadReport(tuple(common), tuple(missing), tuple(extra))


def save_model(
    model: WAVTransformer,
    folder: str | Path,
    state: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Write config.json and safetensors as diffusers does, under published names.

    ``state``: other weights of the same model, by its own names. ``max_shard_size``: of one file.
    """
    model.save_config(folder)
    tensors = published_state(model.state_dict() if state is None else state)
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    save_torch_state_dict(
        {n: t.contiguous() for n, t in tensors.items()}, folder, filename_pattern=pattern, max_shard_size=max_shard_size
    )


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
    given = {name for name in config if not name.startswith("_")} | LATER
    for kind, names in (("unknown", given - known), ("missing", known - given)):
        if names:
            raise CheckpointError(
                f"{folder}/config.json: {min(names)}: {kind} option; read it with the version of wav that wrote it"
            )
    with understood(f"{folder}/config.json", "make or fetch the folder again", CheckpointError), torch.device("meta"):
        model: WAVTransformer = WAVTransformer.from_config(config)
    load_state(model, read_weights(folder), assign=True, where=str(folder))
    if dtype is not None:
        model.to(dtype=dtype)
    model.eval()
    return model


def _known_class(config: Mapping[str, Any], where: Path) -> None:
    """Refuse another architecture. The WAV and GE-Act references call theirs by the stock class's name."""
    if config.get("_class_name") not in ("LTXVideoTransformer3DModel", WAVTransformer.__name__):
        raise CheckpointError(
            f"{where}: its config.json says _class_name = {config.get('_class_name')!r}: must be "
            f"LTXVideoTransformer3DModel or WAVTransformer; give such weights in {FIELD}"
        )


def _compare_configs(model: WAVTransformer, config: Mapping[str, Any], unused: Sequence[str], where: Path) -> None:
    """Refuse options that change what weights mean without changing their shapes, such as the number of heads.

    ``unused``: prefixes of the experts' options that say nothing, because one side has no such expert.
    """
    for name, value in config.items():
        if name.startswith(("_", *unused)) or name.endswith("_expert"):
            continue
        if name not in model.config:
            raise CheckpointError(
                f"{where}: config {name} = {value!r}: this model has no such option; choose other weights"
            )
        mine = model.config[name]
        plain = [list(v) if isinstance(v, (list, tuple)) else v for v in (value, mine)]
        if plain[0] != plain[1]:
            raise CheckpointError(
                f"{where}: config {name} = {value!r}, this model has {mine!r}; "
                "set the same size in section model or choose other weights"
            )


def init_from(
    model: WAVTransformer, source: str | Path, expected_missing: Sequence[str] = (), expected_extra: Sequence[str] = ()
) -> LoadReport:
    """Start ``model`` from published weights, by parameter name.

    The source may be a stock diffusers LTX-Video transformer (sharded or not), a single safetensors file such as
    GE-Base's, a checkpoint of the reference after any of its stages (video; + value; + action), or this project's own
    model. An expert or view embedding is either whole in the source or absent; absent experts keep their
    initialisation. Absent view parameters (a stock source) become zero, so that every view is computed exactly as the
    stock model computes it. Experts that ``model`` lacks go unused, with a warning. Heads are compared where the
    source has a config.json; a single file has none, and its shapes decide alone.

    Args:
        model: the model to fill, unchanged if the source is refused.
        source: file, folder or hub id (:func:`wav.model.weights.locate`).
        expected_missing: regular expressions (from the name's start) of further parameters that may keep their
            initialisation.
        expected_extra: the same for further tensors of the source that may go unused.

    Raises:
        CheckpointError: the source is missing, of another class, or does not fit.
        ServiceError: a hub id that was not fetched; the message holds the command.
    """
    path = locate(source)
    config, state = config_beside(path), read_weights(path)
    options = config or {}
    theirs = {
        name: any(key.startswith(f"{name}_") for key in state) or bool(options.get(f"{name}_expert"))
        for name in EXPERTS
    }
    ours = {name: bool(model.config[f"{name}_expert"]) for name in EXPERTS}
    if config is not None:
        _known_class(config, path)
        _compare_configs(model, config, [f"{n}_" for n in EXPERTS if not (theirs[n] and ours[n])], path)
    stock = not (any(_matches(name, VIEW_PARAMETERS) for name in state) or options.get("use_view_embed"))
    absent = [f"{name}_" for name in EXPERTS if not theirs[name]]
    absent += [] if all(theirs.values()) else [ATTN3]
    absent += VIEW_PARAMETERS if stock else ()
    unused = [f"{name}_" for name in EXPERTS if not ours[name]]
    unused += [] if all(ours.values()) else [ATTN3]
    report = load_state(model, state, (*absent, *expected_missing), (*unused, *expected_extra), where=str(path))
    if stock:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if _matches(published_name(name), VIEW_PARAMETERS):
                    parameter.zero_()
    logger.info("%s: %d parameters loaded, %d are new", path, len(report.loaded), len(report.missing))
    if report.extra:
        logger.warning("%s: %s, which this model has no place for", path, listing("unused", report.extra))
    return report
