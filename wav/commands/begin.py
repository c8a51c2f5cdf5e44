"""Begin: is this machine ready?"""

from __future__ import annotations

from wav.commands import Json, command, say

GROUP = "Begin"


@command(GROUP, "wav doctor", "wav doctor --json")
def doctor(as_json: Json = False) -> int:
    """Check renderer, versions, services and disk; each failure says what to do."""
    from wav.config import Runtime
    from wav.doctor import Check, run_checks
    from wav.doctor import as_json as text

    found: list[Check] = []

    def report(check: Check) -> None:
        found.append(check)
        if not as_json:
            say(check.line)

    good = run_checks(Runtime(), report)
    if as_json:
        say(text(found))
    return 0 if good else 1
