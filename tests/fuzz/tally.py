"""What generated cases did."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from wav.errors import MESSAGE_CHARACTERS, WavError

SHOWN = 12


def blocks(always: int, whole: int, size: int) -> pytest.MarkDecorator:
    """Parameter ``numbers``: the first cases, which always run, and all of them in blocks with the mark ``long``."""
    long = [range(first, min(first + size, whole)) for first in range(0, whole, size)]
    marked = [pytest.param(numbers, id=f"{numbers.start}-{numbers.stop}", marks=pytest.mark.long) for numbers in long]
    return pytest.mark.parametrize("numbers", [pytest.param(range(always), id="slice"), *marked])


class Tally:
    """Counts of one test: ``tally.case(number)`` around each case, ``tally.finish()`` at the end."""

    def __init__(self, seed: int, purpose: str) -> None:
        self.seed, self.purpose = seed, purpose
        self.counts: Counter[str] = Counter(cases=0, worked=0, refused=0, tracebacks=0, silent_wrongs=0)
        self.bad: dict[str, str] = {}
        self.classes: Counter[str] = Counter()

    def random(self, number: int) -> np.random.Generator:
        """Generator of one case, the same whatever ran before."""
        return np.random.default_rng([self.seed, *self.purpose.encode(), number])

    @contextmanager
    def case(self, number: int, text: object = "") -> Iterator[None]:
        """One case: ``WrongError`` raised inside is a silent wrong, a WavError a refusal, anything else a traceback."""
        self.counts["cases"] += 1
        try:
            yield
        except WrongError as problem:
            self._bad("silent_wrongs", number, f"{problem} {text}", str(problem)[:60])
        except WavError as problem:
            self.sentence(number, str(problem), text)
        except (Exception, SystemExit):
            said = traceback.format_exc(limit=-3)
            self._bad("tracebacks", number, f"{said}{text}", said.strip().splitlines()[-1][:100])
        else:
            self.counts["worked"] += 1

    def sentence(self, number: int, message: str, text: object = "") -> None:
        """A refusal: one line that is not too long and says something."""
        if "\n" in message.strip() or not 10 <= len(message) <= 2 * MESSAGE_CHARACTERS:
            self._bad("tracebacks", number, f"not one sentence: {message[:300]!r} ({len(message)}) {text}", "sentence")
        else:
            self.counts["refused"] += 1

    def _bad(self, kind: str, number: int, text: str, name: str) -> None:
        self.counts[kind] += 1
        self.classes[name] += 1
        if self.classes[name] == 1:
            self.bad[f"case {number} (--seed {self.seed})"] = text

    def finish(self, record: Callable[[str, Any], None]) -> None:
        """Record the counts; AssertionError with the first cases of each class that went wrong."""
        record("seed", self.seed)
        for name, count in self.counts.items():
            record(name, count)
        shown = "\n".join(f"{case}: {text[:1500]}" for case, text in list(self.bad.items())[:SHOWN])
        assert not self.bad, f"{dict(self.counts)}\n{dict(self.classes)}\n{shown}"


class WrongError(AssertionError):
    """A wrong value was accepted."""
