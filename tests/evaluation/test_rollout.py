"""Rollouts with a fake pool: results do not depend on slots or order; crashes, limits, batching, swapped probes."""

import collections
import time

import pytest

from tests.evaluation.fakes import DATA, EVALUATION, FakePolicy, FakePool, FakeReply
from wav.errors import SimulationError
from wav.evaluation.protocol import build_episodes
from wav.evaluation.rollout import PATIENCE_CALLS, Scheduler


def run(slots=4, order=0, crashes=None, pool=None, patience=60.0, **changes):
    """Run all fake episodes; ``patience`` above what any machine takes, so that batches do not depend on its load."""
    settings = EVALUATION.model_copy(update=changes)
    pool, policy, finished = pool or FakePool(slots, order, crashes), FakePolicy(), []
    scheduler = Scheduler(
        pool,
        policy,
        execute_steps=settings.execute_steps,
        batch_size=settings.batch_size,
        on_finish=finished.append,
        patience=patience,
    )
    episodes = build_episodes(DATA, settings)
    scheduler.run(episodes)
    return {r.spec: r for r in finished}, scheduler, pool, policy, episodes


def outcome(rollouts):
    return {
        spec: (r.success, r.successes, r.steps, r.calls, r.actions_digest, tuple(r.values))
        for spec, r in rollouts.items()
    }


def test_result_does_not_depend_on_slots_or_order():
    one = run(slots=1)[0]
    assert len({r.actions_digest for r in one.values()}) > 5
    for slots, order in ((4, 0), (4, 1), (7, 2)):
        assert outcome(run(slots, order)[0]) == outcome(one)


def test_every_episode_runs_once_and_batches_hold_one_variant():
    rollouts, scheduler, pool, policy, episodes = run(slots=4)
    assert set(rollouts) == set(episodes)
    assert len(episodes) == 3 * 2 * 3 + 2 * 2 * 2
    assert pool.most_live == 4
    assert max(size for _, size, _ in policy.calls) == 3
    sizes = collections.Counter(size for _, size, _ in policy.calls)
    assert sizes[3] > sizes[1]
    assert scheduler.clock.policy_rows == sum(size for _, size, _ in policy.calls)
    assert scheduler.clock.environment_steps == sum(r.steps for r in rollouts.values())


def test_noise_is_shared_by_the_variants():
    policy = run(slots=3)[3]
    first = {(c, e, call): noise for c, e, call, noise in policy.noise}
    planned = {key[1:]: noise for key, noise in first.items() if key[0] == "planned"}
    unplanned = {key[1:]: noise for key, noise in first.items() if key[0] == "unplanned"}
    common = planned.keys() & unplanned.keys()
    assert len(common) > 10
    assert all(planned[key] == unplanned[key] for key in common)
    assert len({planned[key] for key in common}) == len(common)


def test_steps_stop_at_the_limit_and_at_success():
    rollouts = run()[0]
    for spec, rollout in rollouts.items():
        assert sum(len(a) for a in rollout.executed) == rollout.steps <= spec.max_steps
        assert rollout.success or spec.swapped or rollout.steps == spec.max_steps
    assert any(r.success for r in rollouts.values())
    short = run(execute_steps=5)[0]
    assert all(r.calls <= -(-r.steps // 5) for r in short.values())


def test_swapped_probe_counts_the_instructed_task():
    rollouts = run()[0]
    probes = [r for r in rollouts.values() if r.spec.swapped and r.spec.variant == "planned"]
    assert len(probes) == 4
    for probe in probes:
        assert probe.successes[probe.spec.instructed] == probe.success
        assert probe.spec.instruction != ""
    assert all(probe.success and not probe.successes[probe.spec.task] for probe in probes)


def test_recording_keeps_every_frame_and_the_predictions():
    rollouts = run()[0]
    recorded = [r for r in rollouts.values() if r.spec.record]
    assert len(recorded) == 3
    assert all(len(r.frames) == r.steps + 1 and len(r.predictions) == r.calls for r in recorded)
    assert all(not r.frames and not r.predictions for r in rollouts.values() if not r.spec.record)


def test_a_crash_is_run_again_and_never_counted():
    clean = run(slots=2)[0]
    crashed, _, pool, _, _ = run(slots=2, crashes={("lift_red_cube", 1): 2})
    assert outcome(crashed) == outcome(clean)
    assert sorted(r.attempts for r in crashed.values())[-1] == 3
    assert pool.resets.count(("lift_red_cube", 1)) == 2 + clean_resets(clean)


def clean_resets(rollouts):
    return sum(spec.task == "lift_red_cube" and spec.init_index == 1 for spec in rollouts)


def test_three_crashes_stop_the_run_and_name_the_episode():
    with pytest.raises(SimulationError, match=r"planned: lift_green_cube, initial state 2: .*failed 3 times"):
        run(crashes={("lift_green_cube", 2): 3})


class SlowPool(FakePool):
    """The resets of some episodes are answered only after ``patience`` ran out a few times."""

    def __init__(self, slots, slow, times):
        super().__init__(slots)
        self.slow, self.left, self.held, self.limits = slow, times, [], []

    def submit_reset(self, slot, task, init_index, record=False):
        super().submit_reset(slot, task, init_index, record)
        if (task, init_index) in self.slow and self.left > 0:
            self.held.append(self.outbox.pop())

    def wait(self, timeout=None):
        if timeout is not None:
            self.limits.append(timeout)
        if not self.outbox and self.held:
            self.left -= 1
            if self.left > 0 and timeout is not None:
                time.sleep(timeout)
                return []
            self.outbox, self.held = self.held, []
        return super().wait(timeout)


def test_a_batch_waits_for_stragglers_only_so_long():
    """Dynamic batching: those that are ready go on without a straggler, and nothing in the results changes."""
    clean = run(slots=3)[0]
    slow = SlowPool(3, {("lift_green_cube", 0)}, times=6)
    rollouts, scheduler, pool, policy, _ = run(pool=slow, patience=0.02)
    assert outcome(rollouts) == outcome(clean)
    assert scheduler.clock.overdue_calls >= 5
    assert policy.calls[0][1] == 2  # two of three rows: the third was still being reset
    assert 0 <= max(pool.limits) <= 0.02


def test_patience_follows_what_a_policy_call_takes():
    _, scheduler, _, _, _ = run(slots=3, patience=None)
    clock = scheduler.clock
    assert scheduler.patience == pytest.approx(PATIENCE_CALLS * clock.policy_seconds / clock.policy_calls)
    assert clock.rendering_seconds == pytest.approx(clock.simulation_seconds)
    assert clock.simulation_seconds > 0


def test_a_lost_episode_is_run_again_and_no_crash_of_its_own():
    class Losing(FakePool):
        def submit_reset(self, slot, task, init_index, record=False):
            super().submit_reset(slot, task, init_index, record)
            if self.resets.count((task, init_index)) <= 7 and (task, init_index) == ("lift_red_cube", 2):
                self.outbox[-1] = (slot, FakeReply(None, error="another episode's process died", lost=True))

    rollouts = run(slots=2)[0]
    pool, finished = Losing(2), []
    settings = EVALUATION.model_copy(update={})
    Scheduler(pool, FakePolicy(), execute_steps=4, batch_size=3, on_finish=finished.append).run(
        build_episodes(DATA, settings)
    )
    assert outcome({r.spec: r for r in finished}) == outcome(rollouts)
    assert {r.attempts for r in finished} == {1}
    assert pool.resets.count(("lift_red_cube", 2)) == 7 + sum(
        spec.task == "lift_red_cube" and spec.init_index == 2 for spec in rollouts
    )
