"""One model repository behind the part of the hub's HTTP API that uploads and downloads use, on 127.0.0.1."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch

import yaml
from huggingface_hub import constants

NAME, TOKEN = "user/policy", "hf_secret"
_API = f"/api/models/{NAME}"


@dataclass
class FakeHub:
    """What the repository holds, and how it misbehaves."""

    files: dict[str, bytes] | None = None  #: None: there is no such repository
    commits: list[dict[str, Any]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  #: large files by SHA-256
    requests: list[str] = field(default_factory=list)
    visibility: str = ""
    status: int = 0  #: answers everything with this
    silent: bool = False  #: answers nothing
    url: str = ""

    @property
    def sha(self) -> str:
        """The newest commit's name."""
        return f"{len(self.commits):040d}"

    def commit(self, lines: list[dict[str, Any]]) -> None:
        """Apply a commit's lines."""
        assert self.files is not None
        self.commits.append(lines[0]["value"])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
            else:
                raise AssertionError(line["key"])


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, hub = self.path.partition("?")[0], self.hub
        hub.requests.append(f"{self.command} {path}")
        if hub.silent:
            time.sleep(1)
            return None
        if hub.status:
            return self.send(hub.status, {"error": "refused"})
        found = self.write_api(path, body) if self.command in ("POST", "PUT") else self.read_api(path)
        return self.send(*found)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read_api(self, path: str) -> tuple[Any, ...]:
        files, sha = self.hub.files, self.hub.sha
        if path == "/api/agent-harnesses":
            return 404, {}
        if files is None:
            return self.missing("RepoNotFound")
        if path in (_API, f"{_API}/revision/main", f"{_API}/revision/{sha}"):
            return 200, {"id": NAME, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
        if path in (f"{_API}/tree/main", f"{_API}/tree/{sha}"):
            rows = [{"type": "file", "path": n, "size": len(b), "oid": _tag(b)} for n, b in files.items()]
            return 200, rows
        parts = path.removeprefix(f"/{NAME}/resolve/").partition("/")
        if parts[0] not in ("main", sha):
            return self.missing("RevisionNotFound")
        if parts[2] not in files:
            return self.missing("EntryNotFound")
        content = files[parts[2]]
        return 200, content, {"ETag": f'"{_tag(content)}"', "X-Repo-Commit": sha}

    def missing(self, code: str) -> tuple[Any, ...]:
        return 404, {}, {"X-Error-Code": code}

    def write_api(self, path: str, body: bytes) -> tuple[Any, ...]:
        hub = self.hub
        if path.startswith("/objects/"):
            hub.objects[path.removeprefix("/objects/")] = body
            return 200, b""
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return 200, {"errors": [], "warnings": []}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            assert f"{wanted['organization']}/{wanted['name']}" == NAME
            if hub.files is not None:
                return 409, {"error": "exists", "url": f"{hub.url}/{NAME}"}
            hub.files, hub.visibility = {".gitattributes": b""}, wanted.get("visibility", "")
            return 200, {"url": f"{hub.url}/{NAME}"}
        if path == f"{_API}/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            kinds = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
            rows = [{"path": p, "uploadMode": k, "shouldIgnore": False} for p, k in zip(paths, kinds, strict=True)]
            return 200, {"files": rows}
        if path == f"/{NAME}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            rows = [o | {"actions": {"upload": {"href": f"{hub.url}/objects/{o['oid']}"}}} for o in objects]
            return 200, {"transfer": "basic", "objects": rows}
        if path == f"{_API}/commit/main":
            hub.commit([json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{hub.url}/{NAME}/commit/{hub.sha}", "commitOid": hub.sha}
        raise AssertionError(path)


def _tag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def fake_hub(folder: Any) -> Iterator[FakeHub]:
    """A hub, huggingface_hub pointed at it, and an empty cache and login under ``folder``."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    changed = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_TOKEN_PATH": str(folder / "token"),
        "HF_HUB_ETAG_TIMEOUT": 1,
        "HF_HUB_DISABLE_XET": True,  # else large files go to another service
    }
    try:
        with patch.multiple(constants, **changed):
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
