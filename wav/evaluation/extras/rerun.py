"""One recorded episode run again, and whether it came out the same: what ``wav eval --replay EPISODE.json`` does.

An episode is a pure function of what its record holds (suite, task, initial state, seed, variant, place in the batch,
planner, checkpoint), so on the machine and versions that recorded it, it must come out the same to the last bit of
every action. Where it does not, the first policy call whose actions differ says where to look.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from wav.config import PlannerSettings
from wav.data.conventions import Conventions
from wav.data.statistics import check_statistics
from wav.errors import CheckpointError, DataError
from wav.evaluation.act import exported_data, policy_for_suite
from wav.evaluation.evaluate import applicable, check_start
from wav.evaluation.protocol import COMPILED, EpisodeSpec, check_conventions, code_digest, versions
from wav.evaluation.records import ASKED, EpisodeRecord, read_record
from wav.evaluation.rollout import Rollout, Scheduler
from wav.io.files import read_json
from wav.planning import VARIANTS
from wav.policy.export import verify_export
from wav.policy.policy import Policy
from wav.sim.workers import SimPool


@dataclasses.dataclass(frozen=True)
class Rerun:
    """A recorded episode beside the same episode run again."""

    record: EpisodeRecord
    again: Rollout
    notes: tuple[str, ...]
    """What differs from the recording without forbidding the comparison: versions, code, the export's planner."""

    @property
    def same(self) -> bool:
        """Success, number of steps and every executed action are equal."""
        return not self.differences

    @property
    def differences(self) -> tuple[str, ...]:
        """One phrase per recorded quantity that came out otherwise; empty where it is the same episode."""
        record, again = self.record, self.again
        pairs: dict[str, tuple[Any, Any]] = {
            "success": (record.success, again.success),
            "steps": (record.steps, again.steps),
            "policy calls": (record.policy_calls, again.calls),
            "actions": (record.actions_digest[:16], again.actions_digest[:16]),
        }
        return tuple(f"{name} {was} recorded, {now} now" for name, (was, now) in pairs.items() if was != now)

    @property
    def first_call(self) -> int | None:
        """Number (from 0) of the first policy call whose actions or predicted value differ; None if none does."""
        kinds = ((self.record.call_digests, self.again.call_digests), (self.record.values, self.again.values))
        calls = [call for pair in kinds for call, (was, now) in enumerate(zip_longest(*pair)) if was != now]
        return min(calls, default=None)

    @property
    def lines(self) -> Iterator[str]:
        """What came of it, for people."""
        record, again = self.record, self.again
        told = f", instructed {record.instruction!r}" if record.swapped else ""
        where = f"{record.suite}: {record.variant}: {record.task}, initial state {record.init_index}"
        yield f"{where}, seed {record.seed}{told}"
        for name, success, steps, calls, actions in (
            ("recorded", record.success, record.steps, record.policy_calls, record.actions_digest),
            ("now", again.success, again.steps, again.calls, again.actions_digest),
        ):
            verdict = "success" if success else "failure"
            yield f"{name}: {verdict} after {steps} steps, {calls} policy calls, actions {actions[:16]}"
        yield from (f"note: {note}" for note in self.notes)
        call = self.first_call
        at = "" if call is None else f"; first at policy call {call} (step {call * record.execute_steps})"
        yield "the same" if self.same else f"NOT the same: {'; '.join(self.differences)}{at}"


def rerun_episode(
    path: Path, export: Path, *, device: str = "auto", pool_factory: Callable[..., SimPool] = SimPool
) -> Rerun:
    """Run a recorded episode again with the policy that it names.

    Another ``device`` than the recording's rounds differently.

    Raises:
        DataError: the record is missing, damaged or of another version.
        CheckpointError: the export is damaged, or its weights or statistics are not the recorded ones.
        ConfigError: conventions, suite or simulator are not the recorded ones.
    """
    record = read_record(path)
    manifest = verify_export(export)
    weights = str(manifest["checkpoint"]["digest"])
    if weights != record.checkpoint:
        raise CheckpointError(
            f"{path}: recorded with checkpoint {record.checkpoint[:12]}, {export} holds {weights[:12]}; "
            "give the export of that training run (--export)"
        )
    spec, planner = _asked(record, path)
    suite = str(record.conventions.get("suite", record.suite))  # several, where the episode was one of theirs
    data = exported_data(export, suite, (record.task,)).model_copy(update={"render": record.render})
    compile = record.versions.get("kernels", "").endswith(COMPILED)
    policy = Policy.load(export, batch_size=record.batch[0], device=device, planner=planner, compile=compile)
    policy = policy_for_suite(policy, data)
    check_statistics(record.statistics, policy.statistics.digest, str(export))
    check_conventions(policy.conventions, Conventions.from_json(record.conventions, str(path)), "record")
    check_start(policy, data)
    applicable((spec.variant,), policy.has_values, f"{path}: variant")
    finished: list[Rollout] = []
    with pool_factory(suite, data, 1, 1) as pool:
        sizes = {"execute_steps": record.execute_steps, "batch_size": record.batch[0]}
        Scheduler(pool, policy, on_finish=finished.append, **sizes).run([spec])
    return Rerun(record, finished[0], _notes(record, export, manifest, policy.compiled))


def _asked(record: EpisodeRecord, path: Path) -> tuple[EpisodeSpec, PlannerSettings]:
    """The recorded episode, alone in its place of the batch, and the recorded planner; DataError if not sound."""
    try:
        planner = PlannerSettings.model_validate(record.planner)
        size, place = (int(number) for number in record.batch)
        if record.variant not in VARIANTS or not 0 <= place < size or record.execute_steps < 1:
            raise ValueError(f"variant {record.variant!r}, batch {record.batch}, {record.execute_steps} steps")
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not an episode that can be run ({reason}); evaluate it again") from None
    return EpisodeSpec(**{name: getattr(record, name) for name in ASKED}, row=place), planner


def _notes(record: EpisodeRecord, export: Path, manifest: Mapping[str, Any], compiled: bool) -> tuple[str, ...]:
    """What else is not as it was; each may explain a difference in the last bits."""
    now = versions(compiled)
    pairs = {name: (record.versions.get(name), now.get(name)) for name in sorted({*record.versions, *now})}
    notes = [
        f"{name} was {old or 'unknown'}, is {new or 'unknown'}" for name, (old, new) in pairs.items() if old != new
    ]
    if record.code != code_digest():
        notes.append(f"the code that decides a result was {record.code[:12]}, is {code_digest()[:12]}")
    own = read_json(export / "settings.json", "export the policy again (`dvc repro export`)")["planner"]
    other = sorted(name for name in {*own, *record.planner} if own.get(name) != record.planner.get(name))
    if other and record.variant != "unplanned":
        notes.append(
            "planner settings as recorded, which differ from the export's: "
            + ", ".join(f"{name} {record.planner.get(name)} against {own.get(name)}" for name in other)
        )
    if manifest.get("dtype") != "float32":
        notes.append(f"the export holds {manifest.get('dtype')}; weights evaluated before the export were float32")
    return tuple(notes)
