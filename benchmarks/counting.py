"""FLOPs and bytes of what torch really ran, the machine it ran on, its measured matrix peak, and the result's file."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = ("view", "expand", "slice", "select", "permute", "transpose", "squeeze", "split", "unbind", "alias", "detach")
COPIES = ("clone", "cat", "copy_", "repeat", "stack", "index")


class Counted(TorchDispatchMode):
    """Counts, while active, FLOPs of products and attention, bytes read and written, and bytes of pure copies.

    ``products`` counts rows by (in, out) width of each linear, so that repeated projections show; ``calls`` counts
    operations by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.moved, self.copied = 0, 0, 0
        self.products: Counter[tuple[int, int]] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.calls[name] += 1
        self._products(name, args, outputs)
        if not any(word in name for word in VIEWS):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)] + outputs
            size = sum(x.numel() * x.element_size() for x in tensors)
            self.moved += size
            if any(name.startswith(word) or name.startswith("_" + word) for word in COPIES):
                self.copied += sum(x.numel() * x.element_size() for x in outputs)
        return result

    def _products(self, name: str, args: Any, outputs: list[Tensor]) -> None:
        """Count the multiplications of one operation."""
        if name in ("mm", "addmm", "linear", "_linear_pointwise"):
            self._product(args[1 if name == "addmm" else 0], outputs[0].shape[-1])
        elif name == "convolution":
            self.flops += 2 * outputs[0].numel() * args[1][0].numel()
        elif name in ("bmm", "baddbmm"):
            self.flops += 2 * outputs[0].numel() * args[1 if name == "baddbmm" else 0].shape[-1]
        elif "scaled_dot_product" in name:
            backward = "backward" in name  # whose first argument is the gradient; logits computed again do not count
            query, key = args[1:3] if backward else args[:2]
            self.flops += (8 if backward else 4) * math.prod(query.shape[:-1]) * key.shape[-2] * query.shape[-1]

    def _product(self, rows: Tensor, wide: int) -> None:
        """Count a linear on ``rows`` (..., D) to ``wide`` columns."""
        dim = rows.shape[-1]
        count = rows.numel() // dim
        self.products[dim, wide] += count
        self.flops += 2 * count * dim * wide


def matrix_peak(size: int = 1024, seconds: float = 1.0) -> float:
    """Best measured FLOP/s of a float32 matrix product on this many threads."""
    from wav.inference.cpu.kernels import CpuOperations, available
    from wav.inference.operations import Operations

    linear, x = torch.nn.Linear(size, size), torch.randn(size, size)
    ways = [Operations(), *([CpuOperations()] if available() else [])]
    best, end = math.inf, time.perf_counter() + seconds
    with torch.inference_mode():
        products = [way.product(linear) for way in ways]
        while time.perf_counter() < end:
            for way, product in zip(ways, products, strict=True):
                start = time.perf_counter()
                way.linear(x, product)
                best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def watched(work: Callable[[], Any]) -> dict[str, float]:
    """Processor seconds of the work, and the most memory (MiB) that was the process's own meanwhile."""
    held, stop = [0.0], threading.Event()

    def look() -> None:
        while not stop.wait(0.05):
            status = Path("/proc/self/status").read_text()
            held.append(float(status.partition("RssAnon:")[2].split()[0]) / 2**10)

    thread, began = threading.Thread(target=look, daemon=True), time.process_time()
    thread.start()
    work()
    seconds = time.process_time() - began
    stop.set()
    thread.join()
    return {"seconds": round(seconds, 3), "mib": round(max(held), 1)}


def machine() -> dict[str, Any]:
    """Processor, cores, memory, load and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {"cpu": name, "cores": os.cpu_count(), "load": [round(x, 2) for x in os.getloadavg()], "versions": versions}


def measured_alone(script: str, argument: str) -> dict[str, Any]:
    """What ``script --one argument`` prints as its last line, JSON: its memory is its own."""
    command = [sys.executable, script, "--one", argument]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write a benchmark's result as JSON, making the folder; nothing without a path (``--json`` was not given)."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
