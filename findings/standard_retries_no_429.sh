#!/usr/bin/env bash
# botocore 1.43.117: retry mode "standard" gives up at HTTP 429, which "legacy", the default, tries again.
#
# Guess: standard is legacy with more: "Too Many Requests", the status for asking too fast, is tried again in both.
# Seen: a server that answers 429 once, then 200, gets one request in standard and in adaptive mode (ClientError), two in
#   legacy. The status is in no list of standard; of the codes in the body only TooManyRequestsException, AWS's own, is
#   tried again, not TooManyRequests.
# Met by: who switches to standard mode with a store that slows its clients down by 429, as several S3-compatible ones
#   and proxies before them do: an upload of hours ends at the first one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q botocore==1.43.117
AWS_CONFIG_FILE=/dev/null AWS_EC2_METADATA_DISABLED=true "$folder/venv/bin/python" - <<'PYTHON'
import http.server
import threading

import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError

BODY = "<Error><Code>{}</Code><Message>slow down</Message></Error>"
asked = []


class Busy(http.server.BaseHTTPRequestHandler):
    """Answers 429 to the first request for an object and 200 to the second; the object's name is the code."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        asked.append(self.path)
        status, body = (429, BODY.format(self.path.rpartition("/")[2]).encode()) if len(asked) == 1 else (200, b"1")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy)
threading.Thread(target=server.serve_forever, daemon=True).start()
seen = {}
for mode in ("legacy", "standard", "adaptive"):
    for code in ("TooManyRequests", "TooManyRequestsException"):
        asked.clear()
        client = botocore.session.get_session().create_client(
            "s3", "us-east-1", endpoint_url=f"http://127.0.0.1:{server.server_port}", aws_access_key_id="x",
            aws_secret_access_key="x", config=Config(retries={"mode": mode}, s3={"addressing_style": "path"}),
        )
        try:
            client.get_object(Bucket="bucket", Key=code)["Body"].read()
            ended = "200"
        except ClientError as error:
            ended = type(error).__name__
        seen[mode, code] = ended, len(asked)
        print(f"{mode}, 429 with {code}: {ended} after {len(asked)} requests")
server.shutdown()
assert seen["legacy", "TooManyRequests"] == ("200", 2)
assert seen["standard", "TooManyRequests"] == seen["adaptive", "TooManyRequests"] == ("ClientError", 1)
assert seen["standard", "TooManyRequestsException"] == ("200", 2)
PYTHON
