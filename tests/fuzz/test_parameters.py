"""Parameter files: odd values, broken structure and broken text, as ``wav config check`` and every stage read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.tally import Tally, WrongError, blocks
from wav.config import load_settings, parameter_text, parse_settings
from wav.io.readers import read_yaml

TEXT = (Path(__file__).resolve().parents[2] / "params.yaml").read_text()
ODD = r"""
010 0o10 0x10 1_0 1e1 1e3 .inf -.inf .nan 1e400 -1 0 1 2 3 0.5 1.0 20.0 -0 true false yes on null ~ 0b11 1:30 12:30:45
99999999999999999999 9223372036854775808 2147483648 1e-400 '8' "8" '' [] {} [1] [1,2] 2024-01-02 2024-99-99 !x *a &a ?
2024-01-02T03:04:05Z !!python/name:os.x [[[]]] [true,1,1] 180 none camera = << @x `x % | > >- - # 'é' "\0" "\ud800"
"a\nb" 中文 🙂 ../x /etc/passwd [a,a] [planned,planned] [.inf] {a:1} x:y 'un
"""
VALUES = [
    *ODD.split(),
    "9" * 5000,
    "x" * 70000,
    "[" * 3000,
    "[" * 15 + "]" * 15,
    "{a: " * 30 + "1" + "}" * 30,
    "{a: 1}",
    *(f"!!{tag} x" for tag in ("bool", "timestamp", "float", "int", "binary", "set", "str")),
]


def broken_text(rng: np.random.Generator, lines: list[str]) -> bytes:
    """The file after an accident: bytes lost, doubled or turned, another encoding, something before or after."""
    data = bytearray("".join(lines).encode())
    at, more = int(rng.integers(len(data))), int(rng.integers(1, 30))
    match int(rng.integers(12)):
        case 0:
            del data[at : at + more]
        case 1:
            data[at:at] = data[at : at + more]
        case 2:
            data[at] ^= 1 << int(rng.integers(8))
        case 3:
            del data[at:]
        case 4:
            data[at:at] = bytes(rng.integers(0, 256, more, dtype=np.uint8))
        case 5:
            return "".join(lines).encode(str(rng.choice(["utf-16", "utf-8-sig", "utf-32", "utf-16-le"])))
        case 6:
            data[at:at] = b"\t" * more
        case 7:
            data += rng.choice([b"\n---\na: 1\n", b"\n...\n", b"\x00", b"\r", b"\n%YAML 1.1\n", b"]", b"data:\n"])
        case 8:
            data[:0] = rng.choice(
                [b"%YAML 1.1\n---\n", b"%YAML 3.0\n---\n", b"\xff\xfe", b"# -*- \xe9\n", b"- a\n", b"1"]
            )
        case 9:
            anchors = "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9) if n else 1}]\n" for n in range(more))
            data[:0] = anchors.encode()
        case 10:
            data = bytearray(data.replace(b"\n", bytes(rng.choice([b"\r\n", b"\r", b"\n\n", b" "]))))
        case _:
            data[at:at] = "".join(rng.choice([":", "- ", "{", "}", "'", '"', "&a ", "*a", "!!x ", "? "], 3)).encode()
    return bytes(data)


def broken_structure(rng: np.random.Generator, lines: list[str]) -> bytes:
    """Lines lost, doubled, moved, renamed or indented otherwise."""
    at, other = (int(n) for n in rng.integers(len(lines), size=2))
    match int(rng.integers(6)):
        case 0:
            del lines[at : at + int(rng.integers(1, 6))]
        case 1:
            lines.insert(other, lines[at])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            lines[at] = lines[at].replace(":", str(rng.choice(["x:", ":", " :", "", ": :", ":x", "::"])), 1)
        case 4:
            lines[at] = " " * int(rng.integers(1, 5)) + lines[at]
        case _:
            lines[at] = lines[at].lstrip()
    return "".join(lines).encode()


def parameter_file(rng: np.random.Generator) -> bytes:
    """One odd params.yaml."""
    lines = TEXT.splitlines(keepends=True)
    kind = rng.random()
    if kind < 0.2:
        return broken_structure(rng, lines)
    if kind < 0.4:
        return broken_text(rng, lines)
    for _ in range(int(rng.integers(1, 3))):
        at = int(rng.choice([n for n, line in enumerate(lines) if ":" in line and not line.startswith("#")]))
        lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice(np.array(VALUES, dtype=object))}\n"
    return "".join(lines).encode(errors="surrogatepass")


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in leaves(inner, f"{name}.{key}").items()}
    return {name: value}


def as_recorded(path: Path) -> None:
    """WrongError where a stage would use another value than DVC records, or a written copy says something else."""
    from dvc.utils.serialize import load_yaml  # slow, and imported by every process that collects this file

    settings = load_settings(path)
    used, recorded = leaves(settings.model_dump(mode="json")), leaves(load_yaml(str(path)))
    for name, value in recorded.items():
        mine = used.get(name)
        value = [value] if name == ".data.suites" and isinstance(value, str) else value  # one name alone is taken, too
        same = mine == (float(value) if isinstance(mine, float) else value)
        if value != {} and not (same and isinstance(mine, bool) == isinstance(value, bool)):
            raise WrongError(f"{name}: DVC records {value!r}, the run uses {mine!r}")
    copy = path.with_name("copy.yaml")
    copy.write_text(parameter_text(settings))
    if parse_settings(read_yaml(copy, "")) != settings:
        raise WrongError("a written copy says something else")


@blocks(60, 5000, 500)
def test_generated_parameter_files(
    numbers: range, seed: int, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    tally = Tally(seed, "parameters")
    path = tmp_path / "params.yaml"
    for number in numbers:
        data = parameter_file(tally.random(number))
        path.write_bytes(data)
        with tally.case(number):
            as_recorded(path)
    tally.finish(record_property)
