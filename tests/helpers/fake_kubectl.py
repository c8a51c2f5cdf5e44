"""``fake_kubectl.py FOLDER RACK COMMAND...``: as much of kubectl as infra.kubernetes uses.

A Job's pods run in the network namespaces RACK-1 and RACK-2, and FOLDER holds what is known of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FOLDER, RACK = Path(sys.argv[1]), sys.argv[2]
JOB, ENDED = FOLDER / "job.json", FOLDER / "ended.json"


def run_pods(job: dict[str, Any]) -> None:
    """What the Job's controller and the nodes do: all pods, each with its index and the first one's address."""
    container = job["spec"]["template"]["spec"]["containers"][0]
    first = f"{job['metadata']['name']}-0.{job['spec']['template']['spec']['subdomain']}"
    pods = []
    for index in range(job["spec"]["completions"]):
        known = {first: "10.97.0.1", "$(JOB_COMPLETION_INDEX)": str(index)}
        words = [known.get(word, word) for word in container["args"]]
        command = ["ip", "netns", "exec", f"{RACK}-{index + 1}", sys.executable, "-m", "torch.distributed.run", *words]
        log = (FOLDER / f"pod-{index}").open("w")
        pods.append(subprocess.Popen(command, stdout=log, stderr=log))
    ENDED.write_text(json.dumps([pod.wait() for pod in pods]))


def main() -> None:
    """One command."""
    match sys.argv[3]:
        case "create":
            JOB.write_text(sys.stdin.read())
            subprocess.Popen([sys.executable, *sys.argv[:3], "pods"], start_new_session=True, stdout=subprocess.DEVNULL)
        case "pods":
            run_pods(json.loads(JOB.read_text()))
        case "get":
            ended = json.loads(ENDED.read_text()) if ENDED.exists() else None
            conditions = [] if ended is None else [{"type": "Failed" if any(ended) else "Complete", "status": "True"}]
            sys.stdout.write(json.dumps({"status": {"ready": 2 if ended is None else 0, "conditions": conditions}}))
        case "logs":
            while not ENDED.exists():
                time.sleep(0.2)
            sys.stdout.write((FOLDER / "pod-0").read_text())


if __name__ == "__main__":
    main()
