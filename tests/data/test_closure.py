"""What training imports to open its inputs: stores alone, so that an edit of a reader or a reward retrains nothing."""

import subprocess
import sys

import pytest

OPENED = ("windows", "latents", "store", "reward_store")
FOREIGN = ("wav.rewards", "wav.codec", "wav.text", "wav.sim", "wav.data.sources", "wav.data.encode", "wav.data.writer")


@pytest.mark.integration
def test_stores_open_without_readers_codecs_and_rewards() -> None:
    imports = "; ".join(f"import wav.data.{name}" for name in OPENED)
    code = f"import sys; {imports}; print([name for name in sys.modules if name.startswith({FOREIGN!r})])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
