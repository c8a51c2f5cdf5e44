"""Which policy is the champion: identities, the paired comparison, the rule, and the pointer in the object store.

The champion is one JSON object, ``champions/NAME.json``. It names the policy's files with their versions and holds the
outcome of every evaluated episode, and it changes only by conditional write: of two retrains that both compared
themselves with the same champion, one wins and the other is told so.

``python -m wav.promotion`` prints the evaluation identity of the current folder's code and parameters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wav.config import Settings, load_settings
from wav.errors import CheckpointError, DataError, StorageError, WavError
from wav.evaluation.intervals import Difference, paired_difference
from wav.evaluation.records import read_record
from wav.io.files import canonical_digest, read_json
from wav.io.storage import ObjectInfo, ObjectStore

FORMAT = 1
#: success of one episode by ``task/initial state``
Outcomes = dict[str, bool]


@dataclass(frozen=True)
class StoredFile:
    """One file of a promoted policy: its path in the export, its object, and how to know that it is whole."""

    path: str
    key: str
    version: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Champion:
    """The pointer's content.

    ``policy`` and ``evaluation`` are identities (:func:`policy_identity`, :func:`evaluation_identity`); ``outcomes``
    are those of that evaluation; ``commit`` and ``run`` say which code and which flow run made it.
    """

    policy: str
    checkpoint: str
    evaluation: str
    outcomes: Outcomes
    files: tuple[StoredFile, ...]
    commit: str
    run: str
    promoted: str
    previous: str = ""
    lock: str = ""
    """Key of the ``dvc.lock`` it was made with."""

    @property
    def rate(self) -> float:
        """Share of its episodes that succeeded."""
        return sum(self.outcomes.values()) / max(len(self.outcomes), 1)

    def to_json(self) -> bytes:
        """The pointer's bytes."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes, where: str) -> Champion:
        """Parse a pointer.

        Raises:
            StorageError: it is damaged or of another format.
        """
        try:
            raw = json.loads(data)
            if raw.pop("format") != FORMAT:
                raise ValueError(f"format is not {FORMAT}")
            return Champion(**{**raw, "files": tuple(StoredFile(**entry) for entry in raw["files"])})
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{where}: not a champion pointer ({error}); restore an older version of it") from None


@dataclass(frozen=True)
class Verdict:
    """What becomes of a candidate, and why in one sentence; ``difference`` is candidate minus champion."""

    promote: bool
    reason: str
    difference: Difference | None = None


def policy_identity(export: Path) -> str:
    """Digest of what an exported policy does: weights, statistics, conventions and settings, not what it scored.

    Raises:
        CheckpointError: the export lacks its manifest or a part of it.
    """
    remedy = "export the policy again (`dvc repro export`)"
    manifest, settings = read_json(export / "manifest.json", remedy), read_json(export / "settings.json", remedy)
    try:
        parts = {name: settings[name] for name in ("data", "model", "planner")}
        found = {"checkpoint": manifest["checkpoint"], "dtype": manifest["dtype"], "settings": parts}
        if settings.get("export", {}).get("compile"):  # rounds otherwise
            found["compile"] = True
    except (KeyError, TypeError):
        raise CheckpointError(f"{export}: its manifest or settings are incomplete; {remedy}") from None
    return canonical_digest(found)


def judged_variant(settings: Settings) -> str:
    """The variant whose outcomes are compared: with planning, or the first where that is not evaluated."""
    variants = settings.eval_libero.variants
    return "planned" if "planned" in variants else variants[0]


def evaluation_identity(settings: Settings, code: str, versions: Mapping[str, str]) -> str:
    """Digest of all that decides an episode's outcome besides the policy: code, simulator versions, protocol.

    Args:
        settings: parameters; the planner's belong to the policy and stay out.
        code: :func:`wav.evaluation.protocol.code_digest`.
        versions: :func:`wav.evaluation.protocol.versions`.
    """
    data, protocol = settings.data, settings.eval_libero
    scene = {"suite": data.suite, "tasks": sorted(data.tasks), "render": data.render, "control_hz": data.control_hz}
    names = ("episodes_per_task", "execute_steps", "batch_size", "budget", "seed")
    chosen = {name: getattr(protocol, name) for name in names} | {"variant": judged_variant(settings)}
    return canonical_digest({"code": code, "versions": dict(versions), "scene": scene, "protocol": chosen})


def read_outcomes(folder: Path, variant: str = "planned") -> Outcomes:
    """Success by episode from the records of an evaluation folder (``reports/eval``).

    Raises:
        DataError: no records of that variant, or a damaged one.
    """
    records = [read_record(path) for path in sorted((folder / "episodes" / variant).glob("*.json"))]
    if not records:
        raise DataError(f"{folder}: no {variant} episodes; add the variant to eval_libero.variants and evaluate")
    return {f"{record.task}/{record.init_index:03d}": record.success for record in records}


def compare(candidate: Outcomes, champion: Outcomes) -> Difference:
    """Candidate minus champion over the same episodes, with the paired bootstrap interval.

    Raises:
        DataError: they were not evaluated on the same episodes.
    """
    if candidate.keys() != champion.keys():
        odd = sorted(candidate.keys() ^ champion.keys())[0]
        raise DataError(f"episode {odd}: only one of candidate and champion ran it; evaluate the champion again")
    names = sorted(candidate)
    return paired_difference([candidate[name] for name in names], [champion[name] for name in names])


def judge(candidate: Outcomes, champion: Outcomes | None, margin: float) -> Verdict:
    """Promote unless the interval of the difference reaches below ``-margin`` (non-inferiority).

    Args:
        candidate: outcomes of the new policy.
        champion: those of the current one under the same evaluation; None: there is none.
        margin: success rate, in [0, 1], that a new policy may lose; with few episodes the interval alone is wider.
    """
    if champion is None:
        return Verdict(True, "there was no champion")
    difference = compare(candidate, champion)
    told = f"difference {difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    told += f" over {difference.episodes} episodes, margin {margin:g}"
    promote = difference.low >= -margin
    return Verdict(promote, f"{'not worse' if promote else 'may be worse'} than the champion: {told}", difference)


def pointer_key(name: str) -> str:
    """Object of the champion called ``name``."""
    return f"champions/{name}.json"


def read_champion(store: ObjectStore, name: str) -> tuple[Champion, ObjectInfo] | None:
    """The champion and the version of the pointer that was read; None where there is none.

    Raises:
        StorageError: the store refused, or the pointer is damaged.
    """
    info = store.head(pointer_key(name))
    if info is None:
        return None
    data = store.get_bytes(info.key, info.version)
    return Champion.from_json(data, store.uri(info.key)), info


def promote(store: ObjectStore, name: str, champion: Champion, over: ObjectInfo | None) -> ObjectInfo | None:
    """Make ``champion`` the champion if the pointer still is what was read; None when another was first.

    Args:
        store: where the pointer lies.
        name: of the pointer.
        champion: the new one.
        over: the pointer as :func:`read_champion` gave it; None: there was none.
    """
    key, data = pointer_key(name), champion.to_json()
    written = store.put_if_absent(key, data) if over is None else store.put_if_match(key, data, over.etag)
    if written is None and (found := store.head(key)) and store.get_bytes(key, found.version) == data:
        return found  # it was ours: the answer to the write got lost, and its repetition met what it had written
    return written


def upload_policy(store: ObjectStore, export: Path, prefix: str) -> tuple[StoredFile, ...]:
    """Upload an export below ``prefix``; nobody sees it before a pointer names these versions."""
    stored = []
    for path in sorted(path for path in export.rglob("*") if path.is_file()):
        relative = path.relative_to(export).as_posix()
        info = store.put_file(path, f"{prefix}/{relative}")
        stored.append(StoredFile(relative, info.key, info.version, info.size, info.sha256))
    return tuple(stored)


def download_policy(store: ObjectStore, champion: Champion, folder: Path) -> Path:
    """The champion's export in ``folder``; files that are there and whole by size are kept.

    Raises:
        StorageError: a file is missing in the store or damaged.
    """
    for entry in champion.files:
        path = folder / entry.path
        if not path.is_file() or path.stat().st_size != entry.size:
            store.get_file(entry.key, path, entry.sha256, entry.version)
    return folder


def main() -> int:
    """Print the evaluation identity of this folder."""
    from wav.evaluation.protocol import code_digest, versions

    try:
        identity: dict[str, Any] = {"evaluation": evaluation_identity(load_settings(), code_digest(), versions())}
    except WavError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(identity) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
