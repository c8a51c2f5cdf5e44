"""From the stages' folders to a policy, and from a policy to a self-contained folder that a server loads.

An export holds what ``Policy.load`` reads (``model/``, ``codec/``, ``text_encoder/``, ``statistics.json``,
``conventions.json``, ``settings.json``) and ``metrics.json``, a model card (``README.md``) and ``manifest.json`` with
the size and SHA-256 of every file but the card, which nothing reads and people edit. :func:`load_export` checks the
manifest first.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import wav
from wav.config import CouplingSettings, DataSettings, ExportSettings, PlannerSettings, Settings
from wav.data.conventions import Conventions
from wav.data.encode import codec_of, text_encoder_of
from wav.data.latents import LatentStore
from wav.data.statistics import Statistics, check_statistics
from wav.errors import CheckpointError, DataError
from wav.hub import is_hub_id
from wav.io.files import (
    atomic_folder,
    canonical_digest,
    check_files,
    file_records,
    manifest_files,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from wav.io.readers import understood
from wav.model.loading import load_model
from wav.policy.policy import Policy
from wav.section import Switch

FORMAT, VERSION = "wav-policy", 1
CARD = "README.md"


@dataclass(frozen=True)
class Checkpoint:
    """What identifies a trained model: digests of its weights and of the statistics it was trained with."""

    digest: str
    statistics: str
    stage: str
    steps: int
    key: str


def _read_checkpoint(folder: Path) -> tuple[dict[str, Any], Statistics]:
    """``checkpoint.json`` of a stage's output and the merged statistics beside it, digests compared."""
    remedy = "run `dvc repro train_joint`"
    meta = read_json(folder / "checkpoint.json", remedy)
    found = canonical_digest({record.path: record.sha256 for record in file_records(folder / "model")})
    if found != meta["model_digest"]:
        raise CheckpointError(
            f"{folder / 'model'}: digest {found[:12]} is not the {meta['model_digest'][:12]} of its checkpoint.json; "
            f"{remedy}"
        )
    parts = []
    for name in ("episodes", "rewards"):
        expected = meta["statistics"].get(name)
        if expected is not None:
            path = folder / f"{name}_statistics.json"
            parts.append(Statistics.load(path, remedy))
            check_statistics(expected, parts[-1].digest, str(path))
    return meta, parts[0].merged(*parts[1:])


def policy_from_stages(
    joint: Path,
    latents: Path,
    data: DataSettings,
    planner: PlannerSettings,
    *,
    batch_size: int = 8,
    device: str = "auto",
) -> tuple[Policy, Checkpoint]:
    """The policy that the joint stage trained, with the encoders that made its latents.

    Args:
        joint: output of ``train_joint``.
        latents: output of ``encode``; holds ``codec/`` and ``text_encoder/``.
        data: section ``data``.
        planner: section ``planner``.
        batch_size: the one padded batch shape.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``auto``.

    Raises:
        CheckpointError: weights, statistics or latents are not the ones the checkpoint names.
        DataError: a file is missing or damaged.
    """
    joint = Path(joint)
    with understood(joint, "run `dvc repro train_joint`", CheckpointError):
        meta, statistics = _read_checkpoint(joint)
        store = LatentStore.open(latents)
        if meta["latents"] != store.digest:
            raise CheckpointError(
                f"{latents}: digest {store.digest[:12]} is not the {meta['latents'][:12]} that {joint} was trained on; "
                "run `dvc repro train_joint`"
            )
        parts = (load_model(joint / "model"), codec_of(store), text_encoder_of(store), statistics)
        conventions = Conventions.from_json(read_json(joint / "conventions.json", "run `dvc repro`"), str(joint))
        coupling = CouplingSettings.model_validate(meta.get("coupling", {}))
        found = Checkpoint(meta["model_digest"], statistics.digest, meta["stage"], int(meta["steps"]), meta["key"])
    policy = Policy(
        *parts, conventions, data, planner, batch_size=batch_size, device=device, digest=found.digest, coupling=coupling
    )
    return policy, found


def export_policy(
    policy: Policy,
    checkpoint: Checkpoint,
    out: Path,
    *,
    settings: Settings,
    metrics: Mapping[str, Any] | None,
    table: str = "",
) -> Path:
    """Write the self-contained folder; it appears whole under ``out`` or not at all.

    Args:
        policy: what to export.
        checkpoint: where its weights came from; written to the card and the manifest.
        out: folder to write, replaced if it exists.
        settings: sections ``data``, ``model``, ``planner``, ``export``.
        metrics: content of ``reports/eval/metrics.json``, or None: the card then says that nothing was evaluated.
        table: the metrics as the card shows them (:func:`wav.evaluation.tables.metrics_table`).

    Raises:
        CheckpointError: the metrics are another checkpoint's.
        StorageError: the disk is full.
    """
    if metrics is not None and metrics.get("checkpoint") != checkpoint.digest:
        raise CheckpointError(
            f"metrics.checkpoint = {str(metrics.get('checkpoint'))[:12]}: the exported weights are "
            f"{checkpoint.digest[:12]}; evaluate them first (`dvc repro eval_libero`)"
        )
    sections = {
        name: getattr(settings, name).model_dump(mode="json") for name in ("data", "model", "planner", "export")
    }
    sections["coupling"] = policy.coupling.model_dump(mode="json")
    with atomic_folder(out) as folder:
        _write_parts(policy, folder, settings.export)
        write_json(folder / "settings.json", sections)
        if metrics is not None:
            write_json(folder / "metrics.json", metrics)
        (folder / CARD).write_text(model_card(policy, checkpoint, settings, metrics, table))
        content = {
            "name": settings.export.name,
            "suite": settings.data.suite,
            "wav": wav.__version__,
            "checkpoint": asdict(checkpoint),
            "dtype": settings.export.dtype,
        }
        write_manifest(folder, FORMAT, VERSION, content, exclude=(CARD,))
    return Path(out)


def _write_parts(policy: Policy, folder: Path, settings: ExportSettings) -> None:
    """Everything but the settings that ``Policy.load`` reads."""
    if policy.text_encoder is None:
        raise CheckpointError("policy.text_encoder = None: an export must understand any instruction; give it one")
    model, dtype, named = policy.model.model, getattr(torch, settings.dtype), settings.encoders == "named"
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(folder / "model")
    policy.codec.save(folder / "codec", reference=named)
    policy.text_encoder.save(folder / "text_encoder", reference=named)
    policy.statistics.save(folder / "statistics.json")
    write_json(folder / "conventions.json", policy.conventions.to_json())


def model_card(
    policy: Policy, checkpoint: Checkpoint, settings: Settings, metrics: Mapping[str, Any] | None, table: str
) -> str:
    """The export's README.md: what it is, how to run it, what it scored, what it must not be fed."""
    import jinja2  # what loads an export does not need it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wav.policy"), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("model_card.md.j2").render(
        name=settings.export.name,
        export=settings.export,
        base_model=base_model(settings.model.init_from),
        encoders=_named_encoders(policy) if settings.export.encoders == "named" else [],
        suite=settings.data.suite,
        tasks=settings.data.tasks,
        checkpoint=checkpoint,
        conventions=policy.conventions.to_json(),
        parameters=sum(p.numel() for p in policy.model.model.parameters()),
        dtype=settings.export.dtype,
        planner=settings.planner.model_dump(mode="json"),
        value_expert=policy.has_values,
        table=table,
        metrics=metrics,
        version=wav.__version__,
    )


def base_model(init_from: str) -> str:
    """Hub id (owner/name) of the weights that training started from; empty for random ones and for local files."""
    owner_and_name = "/".join(init_from.split("/")[:2])
    return owner_and_name if is_hub_id(owner_and_name) and not Path(init_from).exists() else ""


def _named_encoders(policy: Policy) -> list[str]:
    """Hub ids of the frozen encoders that an export names."""
    sources = [str(getattr(part, "source", "")) for part in (policy.codec, policy.text_encoder)]
    return list(dict.fromkeys(source for source in sources if is_hub_id(source)))


def verify_export(folder: str | Path) -> dict[str, Any]:
    """Check an export's manifest and every file's digest, and that it holds nothing else; returns the manifest.

    Raises:
        CheckpointError: names the missing, truncated, altered or foreign file.
    """
    remedy = "export the policy again (`dvc repro export`)"
    try:
        manifest = read_manifest(folder, FORMAT, VERSION, remedy=remedy)
        check_files(manifest_files(manifest), folder, remedy=remedy, digests=True, closed=(CARD,))
    except DataError as error:
        raise CheckpointError(str(error)) from None
    return manifest


def load_export(
    folder: str | Path,
    *,
    batch_size: int = 8,
    device: str = "auto",
    planner: PlannerSettings | None = None,
    compile: Switch | bool | None = None,
) -> Policy:
    """Load a verified export, or one on the hub by its name; ``planner`` and ``compile`` override its settings.

    Raises:
        CheckpointError: a file is missing or altered. ServiceError: the hub cannot be reached, or refuses.
    """
    from wav.policy.sharing import local_export

    folder = local_export(folder)
    verify_export(folder)
    return Policy.load(folder, batch_size=batch_size, device=device, planner=planner, compile=compile)
