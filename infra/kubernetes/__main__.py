"""Train on several nodes of Kubernetes: a ``WAV_LAUNCHER``, which shows the first node's log and waits for all.

::

    WAV_LAUNCHER='python -m infra.kubernetes --nodes 2 --gpus 8'

``kubectl`` creates the Job of ``train.yaml``, one pod per node, each of which starts ``--gpus`` ranks by torchrun. The
Job goes with this process, however a signal or an error ends it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

PORT = 29500
LOOK_S = 2.0


def job(name: str, nodes: int, gpus: int, module: list[str]) -> dict[str, Any]:
    """The Job that runs ``module`` (its name and arguments) on ``nodes`` pods of ``gpus`` ranks; 0: one, on the CPU."""
    raw: dict[str, Any] = list(yaml.safe_load_all((Path(__file__).parent / "train.yaml").read_text()))[-1]
    raw["metadata"]["name"] = name
    raw["spec"] |= {"completions": nodes, "parallelism": nodes}
    pod = raw["spec"]["template"]["spec"]
    container = pod["containers"][0]
    container["resources"] = {"limits": {"nvidia.com/gpu": gpus}} if gpus else {}
    ranks = ["--nnodes", str(nodes), "--node-rank", "$(JOB_COMPLETION_INDEX)", "--nproc-per-node", str(gpus or 1)]
    meet = ["--master-addr", f"{name}-0.{pod['subdomain']}", "--master-port", str(PORT)]
    container["args"] = [*ranks, *meet, "-m", *module]
    return raw


def kubectl(*arguments: str, text: str | None = None) -> str:
    """What a kubectl command says; CalledProcessError where it fails."""
    return subprocess.run(["kubectl", *arguments], input=text, check=True, stdout=subprocess.PIPE, text=True).stdout


def follow(name: str, nodes: int) -> bool:
    """Show the first node's log until the Job ends; whether all pods completed."""
    first = f"job-name={name},batch.kubernetes.io/job-completion-index=0"
    log: subprocess.Popen[bytes] | None = None
    try:
        while True:
            status = json.loads(kubectl("get", "job", name, "-o", "json")).get("status", {})
            ended = {one["type"] for one in status.get("conditions", []) if one["status"] == "True"}
            began = status.get("ready", 0) == nodes or ended & {"Complete", "Failed"}
            if log is None and began:
                log = subprocess.Popen(["kubectl", "logs", "--follow", "--tail", "-1", "--selector", first])
            if ended & {"Complete", "Failed"}:
                if log is not None:
                    log.wait(60)
                return "Complete" in ended
            time.sleep(LOOK_S)
    finally:
        if log is not None:
            log.kill()
            log.wait()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 where every node ended well."""
    parser = argparse.ArgumentParser(prog="infra.kubernetes", description="train on several nodes of Kubernetes")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="of a node, a rank each; 0: one rank on the CPU")
    parser.add_argument("module", nargs=argparse.REMAINDER, help="what every rank runs: a module and its arguments")
    chosen = parser.parse_args(arguments)
    name = f"wav-train-{hashlib.sha256(' '.join(chosen.module).encode()).hexdigest()[:12]}"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        kubectl("delete", "job", name, "--ignore-not-found")  # of a stage that was killed
        kubectl("create", "-f", "-", text=json.dumps(job(name, chosen.nodes, chosen.gpus, chosen.module)))
        return 0 if follow(name, chosen.nodes) else 1
    except (OSError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"kubectl: {error}; see that it reaches the cluster\n")
        return 1
    finally:
        subprocess.run(["kubectl", "delete", "job", name, "--ignore-not-found", "--wait=false"], check=False)


if __name__ == "__main__":
    raise SystemExit(main())
