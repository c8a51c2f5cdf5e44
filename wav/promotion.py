"""Which policy is the champion: identities, the paired comparison, the rule, and the pointer in the object store.

The champion is one JSON object, ``champions/NAME.json``. It names the policy's files with their versions and holds the
outcome of every evaluated episode, and it changes only by conditional write: of two retrains that both compared
themselves with the same champion, one wins and the other is told so. What became of every candidate stays below
``verdicts/NAME/``: a pointer that was put back or removed by hand is known by what these say was promoted.

``python -m wav.promotion`` prints the evaluation identity of the current folder's code and parameters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from wav.config import Settings, load_settings
from wav.errors import CheckpointError, ConfigError, DataError, StorageError, TrainingError, cut, exit_status
from wav.evaluation.intervals import Difference, paired_difference, wilson
from wav.evaluation.records import read_record
from wav.io.files import canonical_digest, file_digest, inside, read_json
from wav.io.storage import ObjectInfo, ObjectStore

FORMAT = 2
#: success of one episode by ``task/initial state``; of several suites the task's name begins with its own
Outcomes = dict[str, bool]
ROUNDING = 1e-9  #: of rates that are compared


@dataclass(frozen=True)
class StoredFile:
    """One file of a promoted policy: its path in the export, its object, and how to know that it is whole."""

    path: str
    key: str
    version: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        inside(".", self.path)


@dataclass(frozen=True)
class Champion:
    """The pointer's content.

    ``policy`` and ``evaluation`` are identities (:func:`policy_identity`, :func:`evaluation_identity`); ``outcomes``
    are those of that evaluation; ``commit`` and ``run`` say which code and which flow run made it. ``reached`` is the
    highest success rate of this policy under the evaluations that were accepted, ``best`` that of all champions so far
    (``best_policy`` was it); ``refused`` are policies that somebody took back.
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
    lock: str = ""  #: key of the ``dvc.lock`` it was made with
    reached: float = 0.0
    best: float = 0.0
    best_policy: str = ""
    refused: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """Share of its episodes that succeeded."""
        return sum(self.outcomes.values()) / max(len(self.outcomes), 1)

    def to_json(self) -> bytes:
        """The pointer's bytes."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes, where: str) -> Champion:
        """Parse a pointer, else StorageError; one of format 1, whose outcomes are unchecked, is to be evaluated."""
        try:
            raw = json.loads(data)
            version = raw.pop("format")
            if version not in (1, FORMAT):
                raise ValueError(f"format is not {FORMAT}")
            raw |= {"files": tuple(StoredFile(**entry) for entry in raw["files"])}
            raw |= {"refused": tuple(raw.get("refused", ()))}
            found = Champion(**raw)
            _check_types(found)
            _stamp(found.promoted)
            if version == 1:
                rate, policy = found.rate, found.policy
                found = replace(found, evaluation="", reached=rate, best=rate, best_policy=policy)
            return found
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StorageError(
                f"{where}: not a champion pointer ({cut(error)}); restore an older version of it"
            ) from None


def _check_types(champion: Champion) -> None:
    """TypeError where a value is of another type than a pointer's, or a rate is none."""
    parts: list[Champion | StoredFile] = [champion, *champion.files]
    texts = [getattr(part, entry.name) for part in parts for entry in fields(part) if entry.type == "str"]
    if not all(isinstance(text, str) for text in (*texts, *champion.refused, *champion.outcomes)):
        raise TypeError("a name is no text")
    if not all(type(solved) is bool for solved in champion.outcomes.values()):
        raise TypeError("an outcome is neither true nor false")
    if not all(type(rate) in (int, float) and 0 <= rate <= 1 for rate in (champion.reached, champion.best)):
        raise TypeError("a rate is no number from 0 to 1")


@dataclass(frozen=True)
class Verdict:
    """What becomes of a candidate (unchanged: it is the champion itself), and why in one sentence.

    ``difference`` is candidate minus champion, ``suites`` the same on each of several suites.
    """

    kind: Literal["promoted", "refused", "unchanged"]
    reason: str
    difference: Difference | None = None
    suites: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def promote(self) -> bool:
        """Whether the candidate becomes champion."""
        return self.kind == "promoted"


@dataclass(frozen=True)
class Rules:
    """What a candidate may lose and must reach; success rates in [0, 1].

    ``margin``: against the champion, the interval of the difference included; of several suites none may certainly
    lose more. ``total``: against the best champion so far, so that many small losses cannot add up; the champion's own
    weights may lose no more by a change of the code. ``floor``: the lower end of the candidate's Wilson interval; 0
    lets a policy without a success pass.
    """

    margin: float = 0.1
    total: float = 0.1
    floor: float = 0.05

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} = {value}: must lie in [0, 1]")


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
        if settings.get("export", {}).get("compile") in (True, "on"):  # rounds otherwise; auto: as the machine does
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

    The planner's parameters belong to the policy and stay out.
    """
    data, protocol = settings.data, settings.eval_libero
    scene = {"suite": data.suite, "tasks": sorted(data.tasks), "render": data.render, "control_hz": data.control_hz}
    names = ("episodes_per_task", "first_state", "execute_steps", "batch_size", "budget", "seed")
    chosen = {name: getattr(protocol, name) for name in names} | {"variant": judged_variant(settings)}
    return canonical_digest({"code": code, "versions": dict(versions), "scene": scene, "protocol": chosen})


def read_outcomes(folder: Path, variant: str, checkpoint: str) -> Outcomes:
    """Success, within the protocol's limit, by episode from the records of an evaluation folder (``reports/eval``).

    Raises:
        DataError: no records of that variant, a damaged one, or one of other weights.
    """
    outcomes: Outcomes = {}
    for path in sorted((folder / "episodes" / variant).rglob("*.json")):
        record = read_record(path)
        if record.checkpoint != checkpoint:
            raise DataError(
                f"{path}: of checkpoint {record.checkpoint[:12]}, not {checkpoint[:12]}; remove the file and evaluate "
                "again"
            )
        outcomes[f"{record.task}/{record.init_index:03d}"] = record.solved
    if not outcomes:
        raise DataError(f"{folder}: no {variant} episodes; add the variant to eval_libero.variants and evaluate")
    return outcomes


def compare(candidate: Outcomes, champion: Outcomes) -> Difference:
    """Candidate minus champion over the same episodes, with the paired bootstrap interval; DataError: of others."""
    if candidate.keys() != champion.keys():
        odd = sorted(candidate.keys() ^ champion.keys())[0]
        raise DataError(f"episode {odd}: only one of candidate and champion ran it; evaluate the champion again")
    names = sorted(candidate)
    return paired_difference([candidate[name] for name in names], [champion[name] for name in names])


def suite_outcomes(outcomes: Outcomes) -> dict[str, Outcomes]:
    """Suite -> its outcomes, where they are of several."""
    found: dict[str, Outcomes] = {}
    for name, solved in outcomes.items():
        if name.count("/") == 2:
            found.setdefault(name.partition("/")[0], {})[name] = solved
    return found


def judge(candidate: Outcomes, champion: Champion | None, rules: Rules) -> Verdict:
    """What becomes of a candidate: above the floor, not worse than the champion, not far below the best one so far.

    Not worse: the interval of the paired difference does not reach below ``-rules.margin`` (non-inferiority; with few
    episodes the interval alone is wider).
    """
    rate = wilson(sum(candidate.values()), len(candidate))
    if rate.wilson_low < rules.floor:
        return Verdict(
            "refused",
            f"too little skill: {sum(candidate.values())} of {rate.episodes} episodes solved, at least "
            f"{rate.wilson_low:.3f} for certain, below the floor {rules.floor:g}",
        )
    if champion is None:
        return Verdict("promoted", "there was no champion")
    difference = compare(candidate, champion.outcomes)
    before = suite_outcomes(champion.outcomes)
    suites = {suite: compare(own, before[suite]) for suite, own in suite_outcomes(candidate).items()}
    told = f"difference {difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    told += f" over {difference.episodes} episodes, margin {rules.margin:g}"
    if difference.low < -rules.margin:
        return Verdict("refused", f"may be worse than the champion: {told}", difference, suites)
    for suite, own in suites.items():
        if own.high < -rules.margin:
            lost = f"{suite}: difference {own.difference:+.3f} [{own.low:+.3f}, {own.high:+.3f}]"
            return Verdict("refused", f"worse than the champion on {lost}, margin {rules.margin:g}", difference, suites)
    if champion.best - rate.success_rate > rules.total + ROUNDING:
        told = f"{rate.success_rate:.3f} where {champion.best_policy[:12]} reached {champion.best:.3f}"
        reason = f"too far below the best champion so far: {told}, total {rules.total:g}"
        return Verdict("refused", reason, difference, suites)
    return Verdict("promoted", f"not worse than the champion: {told}", difference, suites)


def champion_after(candidate: Champion, over: Champion | None, took_back: Iterable[str] = ()) -> Champion:
    """The candidate as the champion after ``over``: with the best rate so far and what was taken back."""
    found = replace(candidate, reached=candidate.rate, best=candidate.rate, best_policy=candidate.policy)
    if over is None:
        return found
    refused = tuple(sorted({*over.refused, *took_back}))
    found = replace(found, previous=over.policy, refused=refused)
    return found if found.rate >= over.best else replace(found, best=over.best, best_policy=over.best_policy)


def renewed(champion: Champion, evaluation: str, outcomes: Outcomes, rules: Rules, harder: bool) -> Champion:
    """The champion with its outcomes under another evaluation.

    ``harder``: the evaluation was made harder on purpose, so that the best rate so far is what the champion has now.

    Raises:
        TrainingError: the same weights reach much less than they did.
    """
    found = replace(champion, evaluation=evaluation, outcomes=outcomes)
    rate, reached = found.rate, champion.reached
    if harder:
        return replace(found, reached=rate, best=rate, best_policy=champion.policy)
    if reached - rate > rules.total + ROUNDING:
        raise TrainingError(
            f"the code or the evaluation made the champion worse: the same weights ({champion.policy[:12]}) reach "
            f"{rate:.3f} where they reached {reached:.3f}; mend it, or start retrain with harder_evaluation=true "
            "where the evaluation was made harder on purpose"
        )
    found = replace(found, reached=max(reached, rate))
    return found if rate < champion.best else replace(found, best=rate, best_policy=champion.policy)


def pointer_key(name: str) -> str:
    """Object of the champion called ``name``."""
    return f"champions/{name}.json"


def verdicts_prefix(name: str) -> str:
    """Where the verdicts on all candidates of the champion called ``name`` are kept."""
    return f"verdicts/{name}"


def keep_verdict(store: ObjectStore, name: str, candidate: Champion, verdict: Verdict) -> None:
    """Write down what became of a candidate."""
    key = f"{verdicts_prefix(name)}/{_stamp(candidate.promoted)}-{verdict.kind}-{candidate.policy}.json"
    facts = {name: getattr(candidate, name) for name in ("policy", "checkpoint", "evaluation", "commit", "run", "rate")}
    content = {**facts, "verdict": verdict.kind, "reason": verdict.reason, "episodes": len(candidate.outcomes)}
    if verdict.difference is not None:
        content["difference"] = verdict.difference.as_dict()
    if verdict.suites:
        content["suites"] = {suite: own.as_dict() for suite, own in verdict.suites.items()}
    store.put_if_absent(key, json.dumps(content, indent=1, sort_keys=True).encode())


def promotions(store: ObjectStore, name: str, after: str = "") -> dict[str, str]:
    """Policy -> time of promotion, of those that the verdicts say were promoted later than ``after`` (ISO 8601)."""
    names = (info.key.rpartition("/")[2] for info in store.list(f"{verdicts_prefix(name)}/"))
    found = {}
    for stamp, kind, policy in (entry.removesuffix(".json").split("-", 2) for entry in names if entry.count("-") >= 2):
        if kind == "promoted" and (not after or stamp > _stamp(after)):
            found[policy] = stamp
    return found


def _stamp(time: str) -> str:
    """A time of ISO 8601 as it stands in a key."""
    return datetime.fromisoformat(time).strftime("%Y%m%dT%H%M%S")


def read_champion(store: ObjectStore, name: str) -> tuple[Champion, ObjectInfo] | None:
    """The champion and the version of the pointer that was read, which may be damaged (StorageError); None: none."""
    info = store.head(pointer_key(name))
    if info is None:
        return None
    data = store.get_bytes(info.key, info.version)
    return Champion.from_json(data, store.uri(info.key)), info


def promote(store: ObjectStore, name: str, champion: Champion, over: ObjectInfo | None) -> ObjectInfo | None:
    """Make ``champion`` the champion if the pointer still is what was read; None when another was first.

    ``over`` is the pointer as :func:`read_champion` gave it; None: there was none.
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
    """The champion's export in ``folder``; files that are there and whole are kept."""
    for entry in champion.files:
        path = folder / entry.path
        if not path.is_file() or file_digest(path) != entry.sha256:
            store.get_file(entry.key, path, entry.sha256, entry.version)
    return folder


def main() -> int:
    """Print the evaluation identity of this folder."""
    from wav.evaluation.protocol import code_digest, versions

    def show() -> None:
        found = evaluation_identity(load_settings(), code_digest(), versions())
        sys.stdout.write(json.dumps({"evaluation": found}) + "\n")

    return exit_status(show)


if __name__ == "__main__":
    raise SystemExit(main())
