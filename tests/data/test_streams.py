"""Shuffling by shards: a function of (seed, step), every window in its turn, each rank its own shards."""

from __future__ import annotations

import numpy as np
import pytest

from wav.data import streams
from wav.data.streams import StreamSampler
from wav.errors import ConfigError

SHARDS = np.array([9, 30, 0, 12, 17, 8, 26, 21, 5, 11])
OF = np.repeat(np.arange(len(SHARDS)), SHARDS)


def test_the_number_of_ranks_changes_no_batch_and_ranks_share_no_shard() -> None:
    seen = {}
    for ranks in (1, 2, 4):
        samplers = [StreamSampler(SHARDS, 8, 3, rank, ranks, streams=4) for rank in range(ranks)]
        own = [[sampler.indices(step) for step in range(40)] for sampler in samplers]
        seen[ranks] = np.concatenate([np.concatenate(parts) for parts in zip(*own, strict=True)])
        read = [set(OF[np.concatenate(parts)].tolist()) for parts in own]
        assert sum(map(len, read)) == len(set.union(*read)) == 9
    assert all((found == seen[1]).all() for found in seen.values())


def test_an_epoch_of_a_stream_has_every_window_once_in_a_new_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MIXED", 3)
    sampler = StreamSampler(SHARDS, 6, 0, streams=1)
    drawn = np.concatenate([sampler.indices(step) for step in range(60)])[: 2 * len(OF)].reshape(2, -1)
    assert (np.sort(drawn, axis=1) == np.arange(len(OF))).all()
    assert (drawn[0] != drawn[1]).any()
    first = drawn[0, : len(OF) // 3]
    assert len(set(OF[first].tolist())) <= 6  # shards come a few at a time
    assert (np.diff(first) != 1).any()
    again = StreamSampler(SHARDS, 6, 0, streams=1)
    assert (again.indices(37) == drawn.reshape(-1)[37 * 6 : 38 * 6]).all()


@pytest.mark.parametrize(("batch", "ranks", "number"), [(8, 2, 3), (8, 1, 3), (16, 1, 16)])
def test_streams_that_do_not_fit_are_refused(batch: int, ranks: int, number: int) -> None:
    with pytest.raises(ConfigError, match=f"streams = {number}: must be a multiple of the {ranks} ranks"):
        StreamSampler(SHARDS, batch, 0, 0, ranks, number)
