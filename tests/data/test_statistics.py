"""Normalisation and its inverse."""

import json
import logging

import numpy as np
import pytest
import torch

from wav.data.statistics import Statistics, compute_statistics, symexp, symlog
from wav.errors import DataError


@pytest.fixture
def statistics() -> Statistics:
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(500, 7)) * np.arange(1, 8)
    actions[:, 3] = 0.25
    return Statistics(
        {
            "action": compute_statistics(actions, "quantile"),
            "state": compute_statistics(rng.normal(3, 2, (500, 8)), "quantile"),
            "value": compute_statistics(rng.normal(5, [0.1] * 9 + [0], (500, 10)), "zscore_symlog"),
        }
    )


def test_quantiles_become_unit_interval(statistics):
    key = statistics.key("action")
    varying = [0, 1, 2, 4, 5, 6]
    np.testing.assert_allclose(statistics.normalize_actions(np.array(key.q01))[varying], -1, atol=1e-12)
    np.testing.assert_allclose(statistics.normalize_actions(np.array(key.q99))[varying], 1, atol=1e-12)


def test_constant_dimension_has_scale_one(statistics):
    x = np.zeros((2, 7))
    x[:, 3] = 0.25, 0.75
    np.testing.assert_allclose(statistics.normalize_actions(x)[:, 3], [0, 0.5])
    values = np.full((1, 10), 5.0)
    assert statistics.normalize_values(values)[0, 9] == 0
    assert np.isfinite(statistics.normalize_values(values + 1)).all()


def test_values_are_symlog_of_the_z_score(statistics):
    key = statistics.key("value")
    x = np.array(key.mean) + 3 * np.array(key.std)
    np.testing.assert_allclose(statistics.normalize_values(x)[:9], np.log(4), atol=1e-12)


@pytest.mark.parametrize("kind", ["action", "state", "value"])
def test_inverse_is_exact(statistics, kind):
    key = statistics.key(kind)
    x = np.random.default_rng(1).normal(4, 5, (4, 6, key.dimension))
    y = key.normalize(x)
    assert not np.allclose(x, y)
    np.testing.assert_allclose(key.denormalize(y), x, atol=1e-10)
    single = x.astype(np.float32)
    assert key.normalize(single).dtype == np.float32
    tensor = torch.from_numpy(single)
    assert key.normalize(tensor).dtype == torch.float32
    np.testing.assert_allclose(key.normalize(tensor).numpy(), key.normalize(single), atol=1e-5)
    np.testing.assert_allclose(key.denormalize(key.normalize(tensor)).numpy(), single, atol=1e-4)


def test_symlog_signs():
    x = np.array([-10.0, -0.1, 0.0, 0.1, 10.0])
    np.testing.assert_allclose(symexp(symlog(x)), x)
    np.testing.assert_allclose(symlog(x), -symlog(-x))


def test_digest_follows_content(statistics, tmp_path):
    statistics.save(tmp_path / "s.json")
    again = Statistics.load(tmp_path / "s.json")
    assert again == statistics
    assert again.digest == statistics.digest
    other = Statistics({"action": compute_statistics(np.zeros((3, 7)), "quantile")})
    assert other.digest != statistics.digest


def test_never_identity(statistics):
    with pytest.raises(DataError, match="no key 'value' among action; action and state come from ingest"):
        Statistics({"action": statistics.key("action")}).normalize_values(np.zeros((1, 10)))
    with pytest.raises(DataError, match="6 dimensions where they hold 7"):
        statistics.normalize_actions(np.zeros((1, 6)))


def test_merging(statistics):
    action = Statistics({"action": statistics.key("action")})
    value = Statistics({"value": statistics.key("value")})
    assert set(action.merged(value).keys) == {"action", "value"}
    with pytest.raises(DataError, match="two different sets for key 'value'"):
        value.merged(Statistics({"value": compute_statistics(np.zeros((3, 10)), "zscore_symlog")}))


def test_bad_input(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        compute_statistics(np.zeros((0, 3)), "quantile")
    with pytest.raises(DataError, match="1 values are NaN"):
        compute_statistics(np.array([[0.0], [np.nan]]), "quantile")
    with pytest.raises(DataError, match=r"s\.json: missing; make it"):
        Statistics.load(tmp_path / "s.json", "make it")
    (tmp_path / "s.json").write_text('{"action": {"mode": "identity"}}')
    with pytest.raises(DataError, match=r"s\.json: action: .*missing"):
        Statistics.load(tmp_path / "s.json")


@pytest.mark.parametrize("row", [[float("nan"), 1.0], [1.0], ["1", "2"], [True, 1.0], [float("inf"), 1.0], 1.0])
def test_statistics_that_would_make_nan_are_refused(tmp_path, row):
    whole = {"action": compute_statistics(np.array([[0.0, 1.0], [1.0, 2.0]]), "quantile")}
    raw = Statistics(whole).to_json()
    for name in ("q01", "max"):
        (tmp_path / "s.json").write_text(json.dumps({"action": raw["action"] | {name: row}}))
        with pytest.raises(DataError, match=r"s\.json: action: "):
            Statistics.load(tmp_path / "s.json")
    (tmp_path / "s.json").write_text(json.dumps(raw))
    assert Statistics.load(tmp_path / "s.json").keys == whole


def test_rare_large_values_are_announced(caplog):
    rows = np.zeros((1000, 2))
    rows[:, 0] = np.linspace(-0.01, 0.01, 1000)
    rows[0, 0] = 5.0
    with caplog.at_level(logging.WARNING):
        compute_statistics(rows, "quantile", "action statistics")
    assert "action statistics: dimension 0" in caplog.text


def test_blocks_of_rows_change_nothing(monkeypatch):
    rows = np.random.default_rng(3).normal(1, 3, (1000, 7)).astype(np.float32)
    whole = compute_statistics(rows, "zscore_symlog")
    monkeypatch.setattr("wav.data.statistics._BLOCK", 96)
    assert compute_statistics(rows, "zscore_symlog") == whole
