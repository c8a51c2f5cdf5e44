"""What the evaluation of an export found, in brief: what a caller must know of it, and what a server tells clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wav.errors import CheckpointError
from wav.io.files import read_json
from wav.io.readers import understood
from wav.planning import VARIANTS

FILE = "metrics.json"
_REMEDY = "export the policy again"


@dataclass(frozen=True)
class Rate:
    """Success of a variant in closed loop, with its 95% Wilson interval."""

    episodes: int
    success_rate: float
    wilson_low: float
    wilson_high: float


@dataclass(frozen=True)
class Results:
    """An evaluation in brief; without one, the actions executed of each chunk are the default of ``eval_libero``."""

    execute_steps: int = 8  #: actions executed of each chunk
    suite: str = ""
    rates: Mapping[str, Rate] = field(default_factory=dict)  #: by variant

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Those of an export's ``metrics.json``, where it has one.

        Raises:
            CheckpointError: the file holds no results.
        """
        path = folder / FILE
        if not path.is_file():
            return cls()
        metrics = read_json(path, _REMEDY, CheckpointError)
        with understood(path, f"holds no results; {_REMEDY}", CheckpointError):
            names = tuple(Rate.__dataclass_fields__)
            rates: dict[str, Rate] = {v: Rate(*(metrics[v][name] for name in names)) for v in VARIANTS if v in metrics}
            return cls(max(1, int(metrics.get("execute_steps", cls.execute_steps))), str(metrics["suite"]), rates)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
