"""Ask a Prefect server whether it is one and lets us in, without importing Prefect.

Its health address answers whoever asks; only the version, asked with the authentication string, tells that this is a
Prefect server, that it answers, and that it takes the string (``PREFECT_API_AUTH_STRING``) this process would send.
"""

from __future__ import annotations

import base64
import json
import os
import re
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from wav.errors import ServiceError

URL, STRING = "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"
#: names of this machine, for which no proxy is asked
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def without_user(api: str) -> str:
    """``api`` without what stands before its host, which may be a password: for messages."""
    return api.rpartition("@")[2]


def server_version(api: str, string: str | None = None, timeout_s: float = 5.0) -> str:
    """Version of the Prefect server at ``api``.

    ``api`` is such as ``http://127.0.0.1:4200/api``; ``string`` the authentication string, None: this process's.

    Raises:
        ServiceError: it answers, but refuses the string or is no Prefect server; ``api`` holds a password itself.
        OSError: it does not answer (a status of 500 and more counts as that).
    """
    if "@" in api:
        raise ServiceError(f"its address holds a password or token, which belongs in {STRING}")
    string = os.environ.get(STRING, "") if string is None else string
    headers = {"Authorization": f"Basic {base64.b64encode(string.encode()).decode()}"} if string else {}
    try:
        request = urllib.request.Request(f"{api.rstrip('/')}/admin/version", headers=headers)
        local = urlsplit(api).hostname in LOOPBACK  # a local address is never asked through a proxy
        opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] if local else [])
        with opener.open(request, timeout=timeout_s) as reply:
            found = json.loads(reply.read(100))
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise OSError(f"HTTP {error.code}") from None
        if error.code in (401, 403):
            fault = f"refuses {STRING}; unset it for the server of make up" if string else f"asks for {STRING}: not set"
            raise ServiceError(f"{fault} (HTTP {error.code})") from None
        raise ServiceError(f"is no Prefect server (HTTP {error.code} to a question for its version)") from None
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason)) from None
    except OSError:
        raise
    except Exception as error:  # http.client and urllib have many ways to say that this is no HTTP, or no JSON
        raise ServiceError(f"is no Prefect server ({type(error).__name__})") from None
    if not isinstance(found, str) or not re.match(r"\d+\.\d+", found):
        raise ServiceError("is no Prefect server (it gives no version)")
    return found
