"""Plans what waits: requests of several sessions in one call of the policy, on one thread beside the event loop.

A session has at most one request waiting; a newer one takes its place. While a batch is planned the next one gathers,
and those who have waited longest go first. A session is a row of the policy: what is decided for it depends on its own
observations alone, whatever rides along.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from wav.errors import WavError
from wav.planning import Variant
from wav.policy.policy import Policy, PolicyOutput
from wav.serving.requests import Request

log = logging.getLogger(__name__)

GATHER_SECONDS = 0.005  #: How long a batch that is not full waits: sessions answered together ask again together.


@dataclass(frozen=True)
class Refusal:
    """What a client is told instead of a plan."""

    reason: str  #: label in the metrics
    text: str


Reply = asyncio.Future[dict[str, Any] | Refusal]


class Metrics:
    """What a server counts; each server has its own, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        seconds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
        with_seconds: dict[str, Any] = {"registry": self.registry, "buckets": seconds}
        self.latency = Histogram("wav_request_seconds", "From a request's arrival to its reply", **with_seconds)
        self.planning = Histogram("wav_plan_seconds", "One batch", **with_seconds)
        self.rows = Histogram(
            "wav_batch_rows", "Requests planned together", registry=self.registry, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.sessions = Gauge("wav_sessions", "Open connections", registry=self.registry)
        self.waiting = Gauge("wav_waiting", "Requests that wait for a batch", registry=self.registry)
        self.refused = Counter("wav_refused", "Requests and connections refused", ["reason"], registry=self.registry)

    def text(self) -> str:
        """All of them in Prometheus' text form."""
        return generate_latest(self.registry).decode()


@dataclass
class Session:
    """One connection; it gets another row of the policy for each episode."""

    number: int
    keep_memory: bool  #: a new prompt does not begin an episode
    episodes: int = 0
    prompt: str | None = None
    begin: Request | None = None  #: an episode begins with the next plan, and this says how
    row: Hashable = None

    def take(self, request: Request) -> None:
        """Note what a request says about its episode, also of one that is superseded later."""
        changed = self.prompt != request.observation.instruction
        if request.reset or self.prompt is None or (changed and not self.keep_memory):
            self.begin = request
        self.prompt = request.observation.instruction


@dataclass(frozen=True)
class _Waiting:
    session: Session
    request: Request
    reply: Reply
    since: float


class Batches:
    """The one policy behind all sessions.

    The policy's ``batch_size`` bounds a batch; ``seed`` is of the noise of episodes that name none.
    """

    def __init__(self, policy: Policy, variant: Variant, seed: int, metrics: Metrics) -> None:
        self.policy, self.variant, self.seed, self.metrics = policy, variant, seed, metrics
        self.sessions = 0  #: open ones
        self._waiting: dict[int, _Waiting] = {}  # by session, the longest waiting first
        self._work = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "wav-plan")

    def submit(self, session: Session, request: Request | Refusal) -> Reply:
        """Queue a request; one of the same session that still waits is refused. A refusal is its own reply."""
        reply: Reply = asyncio.get_running_loop().create_future()
        if isinstance(request, Refusal):
            reply.set_result(request)
            return reply
        session.take(request)
        older = self._waiting.get(session.number)
        if older is not None and not older.reply.done():
            older.reply.set_result(Refusal("superseded", "a newer observation of this connection took its place"))
        self._waiting[session.number] = _Waiting(
            session, request, reply, time.monotonic()
        )  # keeps the older one's turn
        self._work.set()
        return reply

    def open(self, session: Session) -> None:
        """Count a session."""
        self.sessions += 1
        self.metrics.sessions.set(self.sessions)

    def close(self, session: Session) -> None:
        """Forget a session whose connection has ended."""
        self.sessions -= 1
        self.metrics.sessions.set(self.sessions)
        self._waiting.pop(session.number, None)
        self._thread.submit(lambda: self.policy.forget(session.row))  # after the batch that may hold it

    async def run(self) -> None:
        """Plan until cancelled; a batch that has begun is finished."""
        try:
            while True:
                await self._work.wait()
                if len(self._waiting) < min(self.policy.batch_size, self.sessions):
                    await asyncio.sleep(GATHER_SECONDS)
                await self._plan_batch()
        finally:
            self._thread.shutdown()

    async def _plan_batch(self) -> None:
        """Plan the requests that have waited longest; those whose deadline has passed are dropped."""
        numbers = list(self._waiting)[: self.policy.batch_size]
        batch = [w for w in map(self._waiting.pop, numbers) if not w.reply.done()]
        if not self._waiting:
            self._work.clear()
        self.metrics.waiting.set(len(self._waiting))
        if not batch:
            return
        began = time.monotonic()
        begins = [waiting.session.begin for waiting in batch]
        for waiting in batch:
            waiting.session.begin = None
        replies = await asyncio.get_running_loop().run_in_executor(self._thread, self._begin_and_plan, begins, batch)
        seconds = time.monotonic() - began
        self.metrics.planning.observe(seconds)
        self.metrics.rows.observe(len(batch))
        for waiting, reply in zip(batch, replies, strict=True):
            if isinstance(reply, dict):
                waited = began - waiting.since
                reply["server_timing"] = {"infer_ms": 1000 * seconds, "wait_ms": 1000 * waited, "rows": len(batch)}
            if not waiting.reply.done():
                waiting.reply.set_result(reply)

    def _begin_and_plan(self, begins: Sequence[Request | None], batch: Sequence[_Waiting]) -> list[Any]:
        """Replies of a batch, on the policy's thread; an episode that begins gets a fresh row."""
        for begin, session in zip(begins, [waiting.session for waiting in batch], strict=True):
            if begin is not None:
                self.policy.forget(session.row)
                session.row = (session.number, session.episodes)
                episode = session.episodes if begin.episode is None else begin.episode
                self.policy.reset(session.row, episode, self.seed if begin.seed is None else begin.seed)
                session.episodes += 1
        return self._plan(batch)

    def _plan(self, batch: Sequence[_Waiting]) -> list[dict[str, Any] | Refusal]:
        """Replies of a batch. Where it fails each request is planned alone: the others are not to blame."""
        try:
            output = self.policy.act(
                [waiting.request.observation for waiting in batch],
                [waiting.session.row for waiting in batch],
                variant=self.variant,
                with_value=self.policy.has_values,
            )
        except Exception as error:
            if len(batch) > 1:
                return [reply for waiting in batch for reply in self._plan([waiting])]
            if isinstance(error, WavError):
                return [Refusal("plan", str(error))]
            log.exception("a plan failed")
            return [Refusal("plan", "the plan failed; see the server's log")]
        planner = self.policy.planner
        winner = self.variant == "planned" and planner.act_on == "winner" and not planner.gate
        return [_reply(output, i, winner) for i in range(len(batch))]


def _reply(output: PolicyOutput, i: int, winner: bool) -> dict[str, Any]:
    """A row's plan. ``actions`` is the only array, because openpi's broker takes a row of every array of a reply."""
    scores = [float(score) for score in output.plan.candidates[i]]
    return {
        "actions": np.ascontiguousarray(output.actions[i]),
        "value": None if output.value is None else float(output.value[i]),
        "scores": scores,
        "chosen": int(np.argmax(scores)) if scores and winner else None,
        "spread": float(np.std(scores)) if scores else None,
    }
