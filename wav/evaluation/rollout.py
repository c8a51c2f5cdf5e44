"""Receding-horizon rollouts: many simulators, one batched policy.

Every slot of the pool hosts one live episode. Slots that wait for actions are gathered into a batch of one variant;
the policy is called when a whole batch is ready, when every live episode of the variant is, or when one has waited
long enough. Which episodes share a batch depends on timing, an episode's result does not, to the last bit: the batch
has one fixed shape, an episode always takes the same place in it, and noise comes from (seed, episode, call) alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wav.errors import SimulationError
from wav.evaluation.protocol import EpisodeSpec
from wav.sim.env import Observation, SimReply

if TYPE_CHECKING:
    from wav.policy.policy import Policy, PolicyOutput
    from wav.sim.workers import SimPool

log = logging.getLogger(__name__)

#: Crashes of one episode's simulator that stop the evaluation; a crash is never counted as the policy's failure.
MAX_ATTEMPTS = 3
#: A ready episode waits for others at most this many times a mean policy call (a partial batch costs a whole call).
PATIENCE_CALLS = 2.0
#: The same in seconds, before the first call has shown what one takes.
FIRST_PATIENCE = 10.0
_FILLER = "filler"

Frame = Mapping[str, NDArray[np.uint8]]


@dataclass
class Rollout:
    """One live or finished episode; arrays as in ``SimReply`` and ``PolicyOutput``."""

    spec: EpisodeSpec
    slot: int
    attempts: int = 1
    started: float = field(default_factory=time.perf_counter)
    finished: float = 0.0
    ready_since: float = 0.0
    observation: Observation | None = None
    success: bool = False
    successes: dict[str, bool] = field(default_factory=dict)
    steps: int = 0
    calls: int = 0
    values: list[float] = field(default_factory=list)
    plan: dict[str, list[float]] = field(default_factory=dict)
    pending: NDArray[np.float32] | None = None
    executed: list[NDArray[np.float32]] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    predictions: list[tuple[int, Any]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Solved, out of steps, or (swapped probes) some task of the scene solved."""
        return self.success or self.steps >= self.spec.max_steps or (self.spec.swapped and any(self.successes.values()))

    @property
    def seen(self) -> Observation:
        """The newest observation; SimulationError if there is none yet."""
        if self.observation is None:
            raise SimulationError(f"{self.spec.name}: was not reset; submit its reset first")
        return self.observation

    @property
    def actions_digest(self) -> str:
        """SHA-256 of the executed actions (steps, 7) float32."""
        return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in self.executed)).hexdigest()

    @property
    def call_digests(self) -> list[str]:
        """SHA-256 (16 digits) of the actions executed after each policy call."""
        return [hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16] for a in self.executed]

    def again(self, lost: bool) -> Rollout:
        """The same episode from its start, after a crash (``lost``: not one of its own)."""
        return Rollout(self.spec, self.slot, self.attempts + (not lost))


@dataclass
class Clock:
    """Where the time went, in seconds, and how often the policy was called.

    ``simulation_seconds`` and ``rendering_seconds`` are summed over simulator processes that run at once;
    ``simulation_wait_seconds`` is what the policy's process waited for them. ``overdue_calls`` went out with fewer rows
    than could have come, because one had waited long enough.
    """

    policy_seconds: float = 0.0
    simulation_wait_seconds: float = 0.0
    simulation_seconds: float = 0.0
    rendering_seconds: float = 0.0
    policy_calls: int = 0
    overdue_calls: int = 0
    policy_rows: int = 0
    environment_steps: int = 0


class Scheduler:
    """Runs a list of episodes over the slots of a pool.

    Rows of the policy are named by slot; ``on_finish`` is called in this thread. ``patience`` is how many seconds a
    ready episode waits for its batch to fill, by default :data:`PATIENCE_CALLS` mean policy calls.
    """

    def __init__(
        self,
        pool: SimPool,
        policy: Policy,
        *,
        execute_steps: int,
        batch_size: int,
        on_finish: Callable[[Rollout], None],
        patience: float | None = None,
    ) -> None:
        self.pool, self.policy, self.on_finish = pool, policy, on_finish
        self.execute_steps, self.batch_size = execute_steps, batch_size
        self.clock, self._patience = Clock(), patience
        self._live: dict[int, Rollout] = {}
        self._ready: dict[int, Rollout] = {}  # in the order in which they became ready
        self._waiting: list[EpisodeSpec] = []

    def run(self, episodes: Sequence[EpisodeSpec]) -> None:
        """Run every episode once; SimulationError where a simulator crashed :data:`MAX_ATTEMPTS` times on one."""
        self._waiting = list(episodes)
        for slot in range(min(self.pool.slots, len(episodes))):
            self._start(Rollout(self._next(), slot))
        while self._live:
            if batch := self._batch():
                self._act(batch)
                continue
            began = time.perf_counter()
            oldest = min((rollout.ready_since for rollout in self._ready.values()), default=None)
            limit = () if oldest is None else (max(0.0, oldest + self.patience - began),)
            replies = self.pool.wait(*limit)
            self.clock.simulation_wait_seconds += time.perf_counter() - began
            for slot, reply in replies:
                rollout = self._live[slot]
                if not self._receive(rollout, reply):
                    continue
                del self._live[slot]
                self.on_finish(rollout)
                if self._waiting:
                    self._start(Rollout(self._next(), slot))

    @property
    def patience(self) -> float:
        """Seconds a ready episode waits for its batch to fill."""
        if self._patience is not None:
            return self._patience
        calls = self.clock.policy_calls
        return PATIENCE_CALLS * self.clock.policy_seconds / calls if calls else FIRST_PATIENCE

    def _place(self, rollout: Rollout) -> int:
        """Place in the batch: a property of the episode, not of the slot it happens to be on."""
        return rollout.spec.row % self.batch_size

    def _next(self) -> EpisodeSpec:
        """The next episode of the variant in turn, if possible one whose place in the batch nobody live holds."""
        taken = {self._place(rollout) for rollout in self._live.values()}
        variant = self._waiting[0].variant
        for i, spec in enumerate(self._waiting):
            if spec.variant == variant and spec.row % self.batch_size not in taken:
                return self._waiting.pop(i)
        return self._waiting.pop(0)

    def _start(self, rollout: Rollout) -> None:
        """Put an episode on its slot."""
        spec = rollout.spec
        self._live[rollout.slot] = rollout
        self.policy.reset(rollout.slot, spec.noise_name, spec.seed)
        self.pool.submit_reset(rollout.slot, spec.task, spec.init_index, spec.record)

    def _receive(self, rollout: Rollout, reply: SimReply) -> bool:
        """Take in one reply; True if it ended the episode."""
        self.clock.simulation_seconds += reply.busy_seconds - reply.render_seconds
        self.clock.rendering_seconds += reply.render_seconds
        if reply.error is not None or reply.observation is None:
            self._crashed(rollout, reply.error or "no observation", reply.lost)
            return False
        if rollout.pending is not None:
            rollout.executed.append(rollout.pending[: reply.steps_done])
            rollout.pending = None
        rollout.steps += reply.steps_done
        self.clock.environment_steps += reply.steps_done
        rollout.successes = {t: bool(v) or rollout.successes.get(t, False) for t, v in reply.successes.items()}
        rollout.success = rollout.successes.get(rollout.spec.instructed, bool(reply.success))
        rollout.observation = dataclasses.replace(reply.observation, instruction=rollout.spec.instruction)
        rollout.frames.extend(reply.frames)
        if rollout.done:
            rollout.finished = time.perf_counter()
            return True
        self._ready[rollout.slot], rollout.ready_since = rollout, time.perf_counter()
        return False

    def _crashed(self, rollout: Rollout, error: str, lost: bool) -> None:
        """Run the episode again, or give up after :data:`MAX_ATTEMPTS` crashes of its own."""
        spec = rollout.spec
        where = f"{spec.suite}: {spec.group}: {spec.task}, initial state {spec.init_index}"
        if rollout.attempts >= MAX_ATTEMPTS and not lost:
            raise SimulationError(
                f"{where}: its simulator failed {MAX_ATTEMPTS} times at step {rollout.steps}, last with {error!r}; "
                "run `wav doctor`, then the evaluation again: finished episodes are kept"
            )
        log.warning("%s: simulator failed (%s); the episode is run again", where, error)
        self._start(rollout.again(lost))

    def _batch(self) -> list[Rollout]:
        """Ready episodes of one variant, one per place, those waiting longest first; empty if waiting may fill it."""
        now = time.perf_counter()
        for variant in dict.fromkeys(rollout.spec.variant for rollout in self._ready.values()):
            ready = [r for r in self._ready.values() if r.spec.variant == variant]
            live = sum(r.spec.variant == variant for r in self._live.values())
            places: dict[int, Rollout] = {}
            for rollout in ready:
                places.setdefault(self._place(rollout), rollout)
            if len(places) == self.batch_size or len(ready) == live:
                return list(places.values())
            if now - min(rollout.ready_since for rollout in ready) >= self.patience:
                self.clock.overdue_calls += 1
                return list(places.values())
        return []

    def _act(self, batch: list[Rollout]) -> None:
        """One policy call; its actions go to the simulators. Places that nobody holds are filled with copies."""
        began = time.perf_counter()
        places = {self._place(rollout): rollout for rollout in batch}
        seen: list[Observation] = []
        rows: list[Hashable] = []
        for place in range(max(places) + 1):
            if place not in places:
                self.policy.reset((_FILLER, place), _FILLER, 0)
            seen.append(places.get(place, batch[0]).seen)
            rows.append(places[place].slot if place in places else (_FILLER, place))
        output = self.policy.act(
            seen,
            rows,
            variant=batch[0].spec.variant,
            with_value=self.policy.has_values,
            with_future=any(rollout.spec.record for rollout in batch),
        )
        self.clock.policy_seconds += time.perf_counter() - began
        self.clock.policy_calls += 1
        self.clock.policy_rows += len(batch)
        for place, rollout in places.items():
            steps = min(self.execute_steps, rollout.spec.max_steps - rollout.steps)
            rollout.pending = np.asarray(output.actions[place], dtype=np.float32)[:steps]
            self._note(rollout, output, place)
            rollout.calls += 1
            del self._ready[rollout.slot]
            self.pool.submit_steps(rollout.slot, rollout.pending)

    @staticmethod
    def _note(rollout: Rollout, output: PolicyOutput, i: int) -> None:
        """Keep what the records and pictures show of row ``i``."""
        if output.returns is not None:
            rollout.values.append(float(output.returns[i][0]))
        if rollout.spec.record and output.future is not None:
            rollout.predictions.append((rollout.steps, output.future[i]))
        for name in ("sigma_video", "sigma_value", "shift_video", "shift_value"):
            reached = getattr(output.plan, name, None)
            if reached is not None and len(reached[i]):
                rollout.plan.setdefault(name, []).append(float(reached[i][-1]))
