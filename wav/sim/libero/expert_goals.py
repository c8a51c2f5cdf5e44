"""What LIBERO's problem definitions ask for, as goals in the order in which a robot can reach them. No simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wav.errors import DataError

ORDER = {"open": 0, "turnon": 1, "in": 2, "on": 2, "close": 3, "turnoff": 3}
"""Predicates by the stage at which they are reached: open before putting in, close after it."""
PLACED = ("in", "on")


@dataclass(frozen=True)
class Goal:
    """One conjunct of a task's goal."""

    predicate: str  #: One of :data:`ORDER`.
    subject: str  #: The object to put somewhere, or the part (a drawer's region, a stove) to work.
    place: str = ""  #: The object or region that ``subject`` goes in or on; empty for parts.

    @property
    def state(self) -> list[str]:
        """As LIBERO writes it: [predicate, subject, place]."""
        return [self.predicate, self.subject, *([self.place] if self.place else [])]


def ordered_goals(goal_state: Sequence[Sequence[str]]) -> tuple[Goal, ...]:
    """The conjuncts of a parsed goal (LIBERO's ``parsed_problem["goal_state"]``) in working order.

    Raises:
        DataError: a predicate the expert does not know, or one with another number of names than it takes.
    """
    goals = []
    for state in goal_state:
        predicate = str(state[0]).lower() if state else ""
        if predicate not in ORDER or len(state) != (3 if predicate in PLACED else 2):
            raise DataError(f"goal {list(state)}: the expert knows {list(ORDER)}, with two names for {list(PLACED)}")
        goals.append(Goal(predicate, *(str(name) for name in state[1:])))
    return tuple(sorted(goals, key=lambda goal: ORDER[goal.predicate]))
