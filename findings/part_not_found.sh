#!/usr/bin/env bash
# huggingface_hub 2.4.0: what `hf download NAME --include PATTERN` fetched is not found without the pattern.
#
# Guess: snapshot_download(NAME, local_files_only=True) gives the folder of what is in the cache, as it did in 0.36.0.
# Seen: the cache now remembers the repository's whole list of files (1.32.0 does, too), and a snapshot that lacks some
#   of them raises IncompleteSnapshotError, although every file that is wanted is there. With the patterns of the fetch as
#   allow_patterns it is found.
# Met by: every program that names a limited download in its message and looks for the result by the name alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface_hub==2.4.0
HF_HOME="$folder/home" HF_HUB_DISABLE_XET=1 "$folder/venv/bin/python" - <<'PYTHON'
import hashlib
import http.server
import json
import threading

from huggingface_hub import snapshot_download

FILES, COMMIT = {"vae/config.json": b"{}", "other/big.bin": b"2" * 99}, "0" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub of one repository, on this machine alone."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        path, status, body, headers = self.path.split("?")[0], 200, b"{}", {}
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        tag = hashlib.sha1(FILES.get(name, b"")).hexdigest()
        if path == "/api/models/owner/name/revision/main":
            body = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": f} for f in FILES]}).encode()
        elif path == f"/api/models/owner/name/tree/{COMMIT}":
            rows = [{"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for f, b in FILES.items()]
            body = json.dumps(rows).encode()
        elif name in FILES:
            body, headers = FILES[name], {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
        else:
            status = 404
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
fetched = snapshot_download("owner/name", allow_patterns=["vae/*"], endpoint=f"http://127.0.0.1:{server.server_port}")
server.shutdown()
try:
    found = snapshot_download("owner/name", local_files_only=True)
except Exception as error:
    found = type(error).__name__
print("by the name alone:", found)
print("with the pattern: ", snapshot_download("owner/name", local_files_only=True, allow_patterns=["vae/*"]))
assert found == "IncompleteSnapshotError"
assert snapshot_download("owner/name", local_files_only=True, allow_patterns=["vae/*"]) == fetched
PYTHON
