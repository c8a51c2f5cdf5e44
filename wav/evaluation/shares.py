"""Shares of an evaluation's episodes on the workers of a cluster (:mod:`wav.cluster`).

A worker loads the policy once and runs a share beside simulators of its own. An episode's record is its completion
marker, and the same wherever it was made, so whoever asked takes the records over as after an interruption.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from wav.config import Runtime
from wav.errors import CheckpointError, ConfigError
from wav.evaluation.evaluate import Sections, Session
from wav.evaluation.protocol import EpisodeSpec
from wav.policy.export import policy_from_stages
from wav.policy.policy import Policy
from wav.shards import Mapper
from wav.sim.workers import SimPool

#: Batches of the policy in a share: long enough for its simulators' start, short enough to lose.
SHARE_BATCHES = 4


def policy_of_stages(*arguments: Any, **options: Any) -> Policy:
    """:func:`wav.policy.export.policy_from_stages` without its checkpoint."""
    return policy_from_stages(*arguments, **options)[0]


@lru_cache(maxsize=1)
def loaded(load: bytes, digest: str) -> Policy:
    """What the pickled function loads, kept for further shares: of the digest, since a worker outlives trainings.

    Raises:
        CheckpointError: another policy lies there.
    """
    policy: Policy = pickle.loads(load)()
    if policy.digest != digest:
        raise CheckpointError(
            f"policy: digest {policy.digest[:12]} on the worker, {digest[:12]} where it was asked for; let all workers "
            "see the same models"
        )
    return policy


def run_share(
    load: Callable[[], Policy],
    digest: str,
    sections: Sections,
    out: str,
    checkpoint: str,
    share: Sequence[tuple[EpisodeSpec, str]],
) -> dict[str, float]:
    """Run the episodes of a share that have no record yet; where the time went.

    Raises:
        CheckpointError: the policy is not the one of this digest.
        ConfigError: an episode would not be the one that was asked for; names both keys.
    """
    policy, specs = loaded(pickle.dumps(load), digest), tuple(spec for spec, _ in share)
    session = Session(sections, policy, Path(out), checkpoint, None, specs)
    for spec, key in share:
        if session.key(spec) != key:
            raise ConfigError(
                f"{spec.group}/{spec.name}: key {session.key(spec)[:12]} here, {key[:12]} where it was asked for; give "
                "all workers the same device (WAV_DEVICE), code and versions"
            )
    data, slots = sections.data, sections.eval_libero.batch_size
    with SimPool(data.suite, data, workers=Runtime().workers, slots=slots) as pool:
        return session.roll_out(session.left(specs), pool)


@dataclass(frozen=True)
class Elsewhere:
    """Where an evaluation's episodes run if not here.

    ``run`` runs shares; ``load`` loads the policy there and can be pickled (a partial of :func:`policy_of_stages` or
    :func:`wav.policy.export.load_export` with absolute paths).
    """

    run: Mapper
    load: Callable[[], Policy]

    def roll_out(
        self, session: Session, specs: Sequence[EpisodeSpec]
    ) -> Iterator[tuple[Sequence[EpisodeSpec], dict[str, float]]]:
        """(share, where its time went) as shares are done."""
        settings = session.settings
        sections = Sections(settings.data, settings.planner, settings.eval_libero)
        size = SHARE_BATCHES * settings.eval_libero.batch_size
        shares = [specs[start : start + size] for start in range(0, len(specs), size)]
        where = (self.load, session.policy.digest, sections, str(session.out.absolute()), session.checkpoint)
        jobs = [(*where, [(spec, session.key(spec)) for spec in share]) for share in shares]
        for number, outcome in self.run(run_share, jobs, 0):
            if isinstance(outcome, Exception):
                raise outcome
            yield shares[number], outcome
