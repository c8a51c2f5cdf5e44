"""Weights by the hub: what the named command fetches is found again, and known by its bytes alone."""

from __future__ import annotations

import hashlib
import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from wav.errors import DataError, ServiceError
from wav.hub import content_digest, fetch_command, resolve
from wav.io.files import file_digest

NAME, COMMIT = "owner/name", "0" * 40
FILES = {"vae/config.json": b"{}", "vae/w.safetensors": b"1" * 99, "other/big.safetensors": b"2" * 99}
URL = f"/api/models/{NAME}"


class Hub(BaseHTTPRequestHandler):
    """One repository, as huggingface_hub asks for it."""

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        path, status, body, headers = self.path.split("?")[0], 200, b"{}", {}
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if path == f"{URL}/revision/main":
            body = json.dumps({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}).encode()
        elif path == f"{URL}/tree/{COMMIT}":
            rows = [{"type": "file", "path": n, "size": len(b), "oid": self.tag(b)} for n, b in FILES.items()]
            body = json.dumps(rows).encode()
        elif name in FILES:
            body, headers = FILES[name], {"ETag": f'"{self.tag(FILES[name])}"', "X-Repo-Commit": COMMIT}
        else:
            status = 404
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    @staticmethod
    def tag(content: bytes) -> str:
        """Name of the blob in the cache: 64 hexadecimal digits that are no digest of the content, as xet's are."""
        return hashlib.sha256(b"by another way " + content).hexdigest()


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_the_named_command_fetches_is_found_and_known_by_its_bytes(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="not in the local hub cache") as caught:
        resolve(NAME, "encode.path", ["vae/*"])
    words = shlex.split(str(caught.value).split("`")[1])
    assert words[:3] == ["hf", "download", NAME]
    patterns = [words[i + 1] for i, word in enumerate(words) if word == "--include"]
    snapshot_download(NAME, allow_patterns=patterns, endpoint=endpoint, etag_timeout=5)
    folder = resolve(NAME, "encode.path", ["vae/*"])
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.*")} == {"vae/config.json", "vae/w.safetensors"}
    weights = folder / "vae" / "w.safetensors"
    copy = tmp_path / "w.safetensors"
    copy.write_bytes(FILES["vae/w.safetensors"])
    assert weights.resolve().name != file_digest(copy)
    assert content_digest([weights]) == content_digest([copy])
    with pytest.raises(ServiceError, match=r"`hf download owner/name`"):  # a part is not the whole
        resolve(NAME, "encode.path")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "ltx-video.safetensors").touch()
    with pytest.raises(DataError, match=r"encode\.path = .*is a file; name the folder"):
        resolve(str(tmp_path / "ltx-video.safetensors"), "encode.path")
    assert fetch_command("a/b", ("x/*", "y/*")) == 'hf download a/b --include "x/*" --include "y/*"'
