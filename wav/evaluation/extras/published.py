"""Published success rates on LIBERO, with their sources: what ``wav libero-table`` stands beside.

Rates are percentages as printed; nothing here was measured by this project. Sources seldom state the number of
episodes: intervals assume the field's protocol, 10 tasks x 50 initial states for each suite. Protocols differ
otherwise (the published WAV code allows 1000 environment steps, not the suites' limits), so a difference is a reason
to look, not a ranking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wav.evaluation.intervals import Rate, wilson
from wav.planning import Variant

#: The suites of the paper's Table 1, in its order, and the names of their columns.
SUITES = {"libero_spatial": "Spatial", "libero_object": "Object", "libero_goal": "Goal", "libero_10": "Long"}
#: Tasks of each suite, and episodes of each task under the protocol.
TASKS, EPISODES = 10, 50
AVERAGE = "average"


@dataclass(frozen=True)
class Published:
    """One row of somebody's table."""

    name: str
    variant: Variant  #: Which of our variants it is compared with.
    date: str  #: YYYY-MM of the source.
    source: str
    percent: Mapping[str, float]  #: Suite, or "average", -> success in percent; without what the source does not give.

    def rate(self, column: str) -> Rate | None:
        """The figure with Wilson's interval under the protocol's number of episodes; None where none is given."""
        if column not in self.percent:
            return None
        episodes = TASKS * EPISODES * (len(SUITES) if column == AVERAGE else 1)
        return wilson(round(self.percent[column] / 100 * episodes), episodes)


def _row(spatial: float, thing: float, goal: float, long: float, average: float) -> dict[str, float]:
    return dict(zip((*SUITES, AVERAGE), (spatial, thing, goal, long, average), strict=True))


WAV = "arXiv 2604.14732v2, Table 1"
PAPER = (
    Published("WAV, paper", "planned", "2026-04", WAV, _row(99.6, 100.0, 98.6, 94.4, 98.1)),
    Published("WAV, paper, without planning", "unplanned", "2026-04", WAV, _row(99.0, 99.6, 95.0, 91.8, 96.4)),
)
#: World models whose average is above the paper's, then the highest average found of any kind.
OTHERS = (
    Published("Cosmos Policy", "planned", "2026-01", "arXiv 2601.16163", _row(98.1, 100.0, 98.2, 97.6, 98.5)),
    Published("LingBot-VA", "planned", "2026-01", "arXiv 2601.21998", _row(98.5, 99.6, 97.2, 98.5, 98.5)),
    Published("LaWAM", "planned", "2026-06", "arXiv 2606.15768, abstract", {AVERAGE: 98.6}),
    Published("dVLA-RL, no world model", "planned", "2026-06", "arXiv 2606.23623", _row(99.8, 100.0, 99.6, 99.2, 99.7)),
)
PUBLISHED = (*PAPER, *OTHERS)
