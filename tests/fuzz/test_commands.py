"""The console script with odd arguments in odd environments: a status, and one line where it is not 0."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fuzz.tally import Tally, WrongError, blocks
from wav import cli, doctor
from wav.errors import MESSAGE_CHARACTERS, WavError

WORDS = [
    "",
    " ",
    "x",
    "-1",
    "0",
    "1",
    "99999999999999999999",
    "1e3",
    "nan",
    "inf",
    "../x",
    "/",
    "/dev/null",
    "1" * 5000,
]
WORDS += [
    "file",
    "folder",
    "a" * 300,
    "a/" * 2000,
    "\udcff",
    "é中🙂",
    "a\nb",
    "s3://",
    "s3://b",
    "s3://u:p@b",
    "--",
    "-h",
]
WORDS += ["file:///", "file://x/y", "file:///dev/null/x", "http://x", "--json", "--gpus", "-", "~", "$HOME", "%s", "{}"]
WORDS += ["file", "folder", "tabletop", "planned", "params.yaml", "loop", "latin1", "pickle", "*", "=", "None", "true"]
#: first words of a command, and how many others at most; none of them gets as far as a simulator
COMMANDS: list[tuple[list[str], int]] = [
    (["config", "check"], 2),
    (["config"], 2),
    (["summary"], 3),
    (["inspect"], 3),
    (["inspect", "folder", "--set"], 2),
    (["storage", "ls"], 2),
    (["storage", "get"], 3),
    (["storage", "verify"], 2),
    (["storage", "gc"], 4),
    (["storage", "ls", "--store"], 3),
    (["act"], 4),
    (["eval", "--replay"], 3),
    (["export-hdf5"], 4),
    (["replay"], 3),
    (["libero-table", "--episodes"], 3),
    (["render"], 3),
    (["doctor"], 1),
    ([], 3),
]
ENDPOINTS = [
    "http://127.0.0.1:9",
    "127.0.0.1:9",
    "http://",
    "http://[::1",
    "http://127.0.0.1:99999",
    "ftp://127.0.0.1:9",
]
ENDPOINTS += ["http://127.0.0.1:9/a b", "http://u:p@127.0.0.1:9", "https://127.0.0.1:9", "http://127.0.0.1:9\n", "x"]
NUMBERS = ["", "0", "1", "-1", "many", "1e3", "99999999999999999999", "1.5", " ", "true"]
VARIABLES = {
    "WAV_STORE": [
        "",
        "s3://b",
        "s3://b/p",
        "file:///dev/null/x",
        "x",
        "s3://",
        "s3://UPPER_case",
        "s3://a..b",
        "file:x",
    ],
    "WAV_S3_ENDPOINT": ENDPOINTS,
    "WAV_S3_REGION": ["", "garage", "a b", "x" * 3000, "é"],
    "WAV_THREADS": NUMBERS,
    "WAV_WORKERS": NUMBERS,
    "WAV_DEVICE": ["", "cpu", "cuda:99", "tpu", "x y"],
    "WAV_WORKSPACE": ["", "/none", "/dev/null", "a" * 300],
    "WAV_LAUNCHER": ["", "srun", "'"],
    "WAV_LOCAL_DIR": ["", "/dev/null", "folder", "loop"],
    "AWS_PROFILE": ["", "nope", "default", "é"],
    "AWS_DEFAULT_REGION": ["", "garage"],
    "AWS_ACCESS_KEY_ID": ["", "x", "x y", "é"],
    "AWS_SECRET_ACCESS_KEY": ["", "x", "é"],
    "AWS_CONFIG_FILE": ["", "latin1", "folder", "pickle", "loop"],
    "AWS_SHARED_CREDENTIALS_FILE": ["", "latin1", "folder", "pickle"],
    "AWS_CA_BUNDLE": ["", "/none", "latin1"],
    "AWS_MAX_ATTEMPTS": NUMBERS,
    "AWS_RETRY_MODE": ["", "standard", "none"],
    "AWS_DEFAULTS_MODE": ["", "auto", "none"],
    "AWS_ENDPOINT_URL": ["", "http://127.0.0.1:9", "x"],
    "AWS_USE_FIPS_ENDPOINT": ["", "true", "maybe"],
    "PREFECT_API_URL": ["", *ENDPOINTS],
    "PREFECT_API_AUTH_STRING": ["", "a", "a:b", "é:中", "a:b\nc"],
    "http_proxy": ["", "http://127.0.0.1:9", "x"],
    "no_proxy": ["", "*", ",,"],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with odd files, which is where the commands run."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "latin1").write_bytes(b"data: {suite: caf\xe9}")
    (tmp_path / "pickle").write_bytes(b"\x80\x04N.")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "params.yaml").write_text("data: {suite: tabletop}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    monkeypatch.setattr("wav.probes.time.sleep", lambda seconds: None)
    monkeypatch.setattr(doctor, "check_renderer", lambda: iter(()))
    return tmp_path


def environment(rng: np.random.Generator, place: Path) -> dict[str, str]:
    """A few odd variables over one that leads nowhere but to this folder."""
    found = {
        "WAV_STORE": (place / "store").as_uri(),
        "WAV_S3_ENDPOINT": ENDPOINTS[0],
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    found |= {"WAV_LOCAL_DIR": str(place / "none"), "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    found |= {name: str(place / "none") for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")}
    for name in rng.choice(list(VARIABLES), int(rng.integers(0, 4)), replace=False):
        found[str(name)] = VARIABLES[str(name)][int(rng.integers(len(VARIABLES[str(name)])))]
    return found


def command(rng: np.random.Generator) -> list[str]:
    """Arguments of the console script."""
    first, most = COMMANDS[int(rng.integers(len(COMMANDS)))]
    return [*first, *(WORDS[int(rng.integers(len(WORDS)))] for _ in range(int(rng.integers(most + 1))))]


def run(argv: list[str]) -> None:
    """One command: a WavError where it refused, WrongError where its status and what it said do not agree."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True) for _ in range(2))
    status: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(argv)
    said = err.buffer.getvalue().decode(errors="replace")  # type: ignore[attr-defined]
    printed = out.buffer.getvalue()  # type: ignore[attr-defined]
    lines = [line for line in said.splitlines() if not line.startswith(("WARNING", "usage:", " "))]
    if "Traceback" in said or len(said) > 3 * MESSAGE_CHARACTERS + 6000:
        raise WrongError(f"{len(said)} characters: {said[:300]}")
    told = any(word in printed for word in (b"FAIL", b"BAD", b'"ok": false'))  # in the report that was asked for
    if status not in (0, 1, 2) or (status == 1 and len(lines) != 1 and not told):
        raise WrongError(f"status {status}, {len(lines)} lines: {said[-300:]}")
    if status == 0 and (lines or told):
        raise WrongError(f"status 0, though it said: {said[-300:] or printed[-300:]!r}")
    if status:
        raise WavError(f"status {status}: {' '.join(lines)[:MESSAGE_CHARACTERS]}")


@blocks(60, 2000, 250)
def test_commands(
    numbers: range,
    seed: int,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, Any], None],
) -> None:
    tally = Tally(seed, "commands")
    for name in [name for name in os.environ if name.startswith(("WAV_", "AWS_", "PREFECT_API"))]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    try:
        for number in numbers:
            rng = tally.random(number)
            variables, argv = environment(rng, place), command(rng)
            os.environ.clear()
            os.environ.update(before | variables)
            with tally.case(number, f"{ {k: v for k, v in variables.items() if k in VARIABLES} } {argv}"[:600]):
                run(argv)
    finally:
        os.environ.clear()
        os.environ.update(before)
    tally.finish(record_property)
    assert tally.counts["refused"] > tally.counts["worked"] > 0, "most command lines here are wrong, and some are not"
