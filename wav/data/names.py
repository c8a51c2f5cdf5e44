"""Names of tasks, which become names of files, keys in reports and addresses in a store."""

from __future__ import annotations

import hashlib
import re
import unicodedata

LONGEST = 120
"""Characters of a task's name: file systems take 255 bytes, and reports add to it."""
_PLAIN = re.compile(rf"[A-Za-z0-9_.+-]{{1,{LONGEST}}}")
#: a name keeps these of an instruction, or loses nothing with them: punctuation, unless it belongs to a number
_TOLD = re.compile(r"[a-z0-9_\s]|[.,;:!?'\"()-](?![0-9])")


def is_plain(name: str) -> bool:
    """Whether a task's name can be a file's everywhere."""
    return _PLAIN.fullmatch(name) is not None and not name.startswith(".")


def task_name(instruction: str) -> str:
    """An instruction as its task's name: lower case, with underscores; empty for an empty one.

    Instructions that differ in more than case, spaces and the punctuation of sentences have different names: where
    letters and digits of ASCII do not tell them, or there are too many, a digest does. A name is its own name.
    """
    text = unicodedata.normalize("NFC", " ".join(instruction.lower().split()))
    words = re.sub(r"[^a-z0-9]+", "_", text).strip("_")
    if len(words) <= LONGEST and not _TOLD.sub("", text) and (words or not text):
        return words
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{words[: LONGEST - 9].rstrip('_') or 'task'}_{digest}"
