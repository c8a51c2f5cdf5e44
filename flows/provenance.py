"""Where a run's inputs came from and what it made, by DVC's hashes; which flow run started it.

DVC hashes a stage's outputs after the stage has ended. The same hashes are computed here, so that the flow run shows
them: MD5 of a file, and of a folder the MD5 of its listing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from flows.isolation import source_workspace
from wav.io.readers import read_yaml, understood
from wav.stages import STAGES

#: set by retrain, to the id of its own flow run, for the flows that ``dvc repro`` starts
PARENT_VARIABLE = "WAV_PARENT_RUN"
_BLOCK = 4 << 20


def retrain_tag(run_id: str) -> str:
    """The tag of the runs of its stages, by the id of a retrain's own run."""
    return f"retrain:{run_id}"


def _file_md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def dvc_hash(path: Path) -> str:
    """The hash that DVC 3 gives a file or a folder (``....dir``); empty where there is nothing."""
    if path.is_file():
        return _file_md5(path)
    if not path.is_dir():
        return ""
    files = [file for file in path.rglob("*") if file.is_file()]
    listing = [{"md5": _file_md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    listing.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def locked_hashes(workspace: Path) -> dict[str, str]:
    """Path -> hash of everything that ``dvc.lock`` says a stage made."""
    path = workspace / "dvc.lock"
    if not path.is_file():
        return {}
    remedy = "restore it (`git checkout dvc.lock`)"
    with understood(path, remedy):
        stages = (read_yaml(path, remedy) or {}).get("stages", {})
        return {out["path"]: str(out.get("md5", "")) for stage in stages.values() for out in stage.get("outs", [])}


def hash_table(stage: str, folder: Path) -> list[dict[str, Any]]:
    """One row per input that is there (from ``dvc.lock``) and output (computed) of a stage that ran in ``folder``."""
    source = source_workspace(folder)
    locked = locked_hashes(source)
    rows: list[dict[str, Any]] = []
    for path in STAGES[stage].inputs:
        if (folder / path).exists():
            rows.append({"role": "input", "path": path, "dvc": locked.get(path, "not tracked by DVC")})
    for path in STAGES[stage].made:
        rows.append({"role": "output", "path": path, "dvc": dvc_hash(folder / path) or "not made"})
    return rows


def object_url(uri: str, version: str, endpoint: str, region: str) -> str:
    """Where a browser that is allowed to finds one version of an object: AWS's console, or the store's own address.

    An empty ``endpoint`` is AWS.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        return uri
    key = quote(parts.path.lstrip("/"))
    if endpoint:
        return f"{endpoint.rstrip('/')}/{parts.netloc}/{key}" + (f"?versionId={quote(version)}" if version else "")
    where = f"https://{region}.console.aws.amazon.com/s3/object/{parts.netloc}?region={region}&prefix={key}"
    return where + (f"&versionId={quote(version)}" if version else "")


def run_url(flow_run: str, api: str | None) -> str:
    """Address of a flow run in the UI of the server at ``api``."""
    return f"{(api or '').rstrip('/').removesuffix('/api')}/runs/flow-run/{flow_run}"
