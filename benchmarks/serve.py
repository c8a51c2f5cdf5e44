"""Many clients of one served policy at once: latency, batch fill, memory of the server, by the minute.

Each client sends an observation, waits for its plan and sends the next one, so the server is always as busy as it can
be; ``--pause`` lets each wait between, as a robot does that executes what it got. Prints a line a minute, and
``--json FILE`` writes them. The server is ``wav serve``, a process of its own on the same machine::

    python benchmarks/serve.py --export export --clients 50 --minutes 10 --json benchmarks/results/serve-cpu.json
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from counting import machine, write_result
from websockets.asyncio.client import connect

from wav.serving.wire import pack, unpack


class Load:
    """The clients, and what they met: (seconds since the start, seconds of the request, refusal or empty)."""

    def __init__(self, port: int, pause: float) -> None:
        self.port, self.pause, self.began = port, pause, time.perf_counter()
        self.met: list[tuple[float, float, str]] = []

    async def client(self, number: int, end: float) -> None:
        """One robot."""
        random = np.random.default_rng(number)
        async with connect(f"ws://127.0.0.1:{self.port}", compression=None, max_size=None, proxy=None) as socket:
            metadata = unpack(await socket.recv())  # type: ignore[arg-type]
            size = (*metadata["image_size"], 3)
            seen: dict[str, Any] = {
                names[0]: random.integers(0, 256, size, np.uint8) for names in metadata["views"].values()
            }
            seen["observation/state"] = np.zeros(metadata["state_dim"], np.float32)
            message = pack({**seen, "prompt": "lift the red cube"})
            await asyncio.sleep(number * self.pause / 50)
            while time.perf_counter() - self.began < end:
                sent = time.perf_counter()
                await socket.send(message)
                reply = await socket.recv()
                now = time.perf_counter()
                self.met.append((now - self.began, now - sent, reply if isinstance(reply, str) else ""))
                await asyncio.sleep(self.pause)

    async def run(self, clients: int, seconds: float) -> None:
        """All of them; any that is closed ends the run with its error."""
        self.began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self.client(number, seconds))


def minutes(met: list[tuple[float, float, str]], step: float) -> list[dict[str, float]]:
    """Requests and latencies (ms) of each part of the run."""
    rows = []
    for begin in np.arange(0, max(at for at, _, _ in met), step):
        part = [seconds * 1000 for at, seconds, refusal in met if begin <= at < begin + step and not refusal]
        if part:
            p50, p95, p99 = (round(float(np.percentile(part, q)), 1) for q in (50, 95, 99))
            longest = round(max(part), 1)
            rows.append(
                {"from_s": float(begin), "plans": len(part), "p50": p50, "p95": p95, "p99": p99, "longest": longest}
            )
    return rows


def main() -> None:
    """Serve, load, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, default=Path("export"))
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between a plan and the next observation")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "wav.cli", "serve", str(arguments.export), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline() if server.stdout else ""
        found = re.search(r":(\d+) ", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}")
        load, process = Load(int(found[1]), arguments.pause), psutil.Process(server.pid)
        asyncio.run(load.run(arguments.clients, 5.0))  # the first requests allocate
        memory = [process.memory_info().rss >> 20]
        load.met.clear()
        asyncio.run(load.run(arguments.clients, 60 * arguments.minutes))
        memory.append(process.memory_info().rss >> 20)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        text = opener.open(f"http://127.0.0.1:{load.port}/metrics", timeout=20).read().decode()
    finally:
        server.terminate()
        server.wait(60)
    rows, batches = (float(re.search(rf"^wav_batch_rows_{n} (\S+)", text, re.M)[1]) for n in ("sum", "count"))  # type: ignore[index]
    parts = minutes(load.met, min(60.0, 60 * arguments.minutes))
    for part in parts:
        print(part)
    result = {
        "clients": arguments.clients,
        "pause_s": arguments.pause,
        "minutes": arguments.minutes,
        "rows_per_batch": round(rows / batches, 2),
        "refused": sum(bool(refusal) for _, _, refusal in load.met),
        "server_mib": {"before": memory[0], "after": memory[1]},
        "latency_ms": parts,
        "machine": machine(),
    }
    print({name: value for name, value in result.items() if name not in ("latency_ms", "machine")})
    if arguments.json:
        write_result(arguments.json, result)


if __name__ == "__main__":
    main()
