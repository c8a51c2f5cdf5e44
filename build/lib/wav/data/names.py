"""Names of suites and tasks, which become names of files, keys in reports and addresses in a store.

One model may be trained on several of LIBERO's suites. Together they are a suite of their own, whose name joins theirs
(``libero_spatial+libero_goal``); as names of tasks may repeat from suite to suite, its tasks carry theirs before them
(``libero_goal/open_the_middle_drawer_of_the_cabinet``). A task of one suite alone has its bare name.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
LONGEST = 120
"""Characters of a task's name: file systems take 255 bytes, and reports add to it."""
_PLAIN = re.compile(rf"[A-Za-z0-9_.+-]{{1,{LONGEST}}}")
#: a name keeps these of an instruction, or loses nothing with them: punctuation, unless it belongs to a number
_TOLD = re.compile(r"[a-z0-9_\s]|[.,;:!?'\"()-](?![0-9])")


def joined(suites: Sequence[str]) -> str:
    """Name of the suite that ``suites`` are together."""
    return "+".join(suites)


def suites_of(suite: str) -> tuple[str, ...]:
    """Inverse of :func:`joined`."""
    return tuple(suite.split("+"))


def in_libero(suite: str) -> bool:
    """Whether it is one of LIBERO's suites, or several."""
    return set(suites_of(suite)) <= set(LIBERO_SUITES)


def task_in(suite: str, own: str, task: str) -> str:
    """Name in ``suite`` of the task that its suite ``own`` calls ``task``."""
    return task if suite == own else f"{own}/{task}"


def own_task(suite: str, task: str) -> tuple[str, str]:
    """Inverse of :func:`task_in`: the one suite that a task of ``suite`` is of, and its bare name."""
    own, _, name = task.rpartition("/")
    return own or suite, name


def full_name(suite: str, task: str) -> str:
    """``SUITE/TASK`` of a task of ``suite``, whether that is several or one."""
    return "/".join(own_task(suite, task))


def is_plain(name: str) -> bool:
    """Whether a task's name can be a file's everywhere; one of LIBERO's suites may stand before it, as its folder."""
    suite, _, bare = name.rpartition("/")
    return _PLAIN.fullmatch(bare) is not None and not bare.startswith(".") and suite in ("", *LIBERO_SUITES)


def task_name(instruction: str) -> str:
    """An instruction as its task's name: lower case, with underscores; empty for an empty one.

    Instructions that differ in more than case, spaces and the punctuation of sentences have different names: where
    letters and digits of ASCII do not tell them, or there are too many, a digest does. A name is its own name.

    >>> task_name("Lift the red cube."), task_name("lift_the_red_cube")
    ('lift_the_red_cube', 'lift_the_red_cube')
    """
    text = unicodedata.normalize("NFC", " ".join(instruction.lower().split()))
    words = re.sub(r"[^a-z0-9]+", "_", text).strip("_")
    if len(words) <= LONGEST and not _TOLD.sub("", text) and (words or not text):
        return words
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{words[: LONGEST - 9].rstrip('_') or 'task'}_{digest}"
