"""A retrain without servers: a champion in a folder store, and a checkout whose commands are functions of the test."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from flows.challenge import Retrain, meet
from flows.checkout import Checkout, Finished
from wav import promotion
from wav.config import Runtime, load_preset, parameter_text
from wav.evaluation.records import EpisodeRecord
from wav.io.storage import open_store
from wav.promotion import Champion, Outcomes, Rules

SETTINGS = load_preset("smoke")


class Elsewhere(Checkout):
    """A checkout whose commands are answered by the test."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder, dict(os.environ), lambda line: None)
        self.asked: list[tuple[str, ...]] = []
        self.answer: Callable[[tuple[str, ...]], Finished] = lambda arguments: Finished(0, ())

    def python(self, name: str, *arguments: str) -> Finished:
        self.asked.append(arguments)
        return self.answer(arguments)


def policy(
    name: str, outcomes: Outcomes, evaluation: str = "e1", promoted: str = "2026-01-01T00:00:00+00:00"
) -> Champion:
    """A candidate."""
    return Champion(name, f"weights of {name}", evaluation, outcomes, (), "abc", "run", promoted)


def retrain_of(root: Path, rules: Rules | None = None, champion: Champion | None = None) -> Retrain:
    """A retrain in ``root`` that has met the champion, which is uploaded and promoted first where one is given."""
    store, checkout = open_store((root / "store").as_uri()), Elsewhere(root)
    export = root / "export"
    export.mkdir(parents=True, exist_ok=True)
    (export / "weights").write_bytes(b"champion's weights")
    (export / "manifest.json").write_text("{}")
    (root / "params.yaml").write_text(parameter_text(SETTINGS))
    (root / "runs").mkdir(exist_ok=True)
    if champion is not None:
        files = promotion.upload_policy(store, export, f"policies/{champion.policy}/export")
        whole = promotion.champion_after(Champion(**{**vars(champion), "files": files}), None)
        assert promotion.promote(store, "tabletop", whole, None)
    runtime = Runtime(store=store.url)
    run = Retrain(checkout, store, runtime, root / "runs", "7", "tabletop", rules or Rules())
    meet(run)
    return run


def record(**given: Any) -> EpisodeRecord:
    """An episode's record with these values and empty ones elsewhere."""
    hints = get_type_hints(EpisodeRecord)
    empty = {field.name: (get_origin(hints[field.name]) or hints[field.name])() for field in fields(EpisodeRecord)}
    return EpisodeRecord(**{**empty, **given})
