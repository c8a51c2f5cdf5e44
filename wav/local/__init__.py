"""The services of this machine (``make up``): what an unconfigured process needs to find them.

``make up`` leaves addresses in ``.local/env`` and what it generated (S3 keys, Prefect's authentication string) in
``.local/credentials.env`` (mode 600, never committed). Entry points (flows, the console script) call
:func:`adopt_local_services` first, so that plain ``dvc repro`` works after ``make up`` without exporting anything; for
the ``prefect`` command :mod:`wav.prefect_plugin` does. A variable that is set already always wins.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from wav.prefect_api import LOOPBACK, STRING, URL

#: the folder of the package: the repository, or where pip puts packages
PROJECT = Path(__file__).resolve().parents[2]

#: variables that say which object store is meant; where one is set, the local one is not
_STORE_CHOICE = ("WAV_STORE", "WAV_S3_ENDPOINT")


def project_folder() -> Path:
    """The project that the current folder lies in, known by params.yaml and presets/; else the repository."""
    here = Path.cwd()
    held = (folder for folder in (here, *here.parents) if (folder / "params.yaml").is_file())
    return next((folder for folder in held if (folder / "presets").is_dir()), PROJECT)


def local_folder() -> Path:
    """Where the services keep their state: ``WAV_LOCAL_DIR``, else ``.local`` of the project's folder."""
    return Path(os.environ.get("WAV_LOCAL_DIR") or project_folder() / ".local").absolute()


def read_env(path: Path) -> dict[str, str]:
    """``NAME=value`` lines of a file; empty where there is no file."""
    if not path.is_file():
        return {}
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def local_prefect(folder: Path | None = None) -> dict[str, str]:
    """Address and authentication string of the local Prefect server, together; empty where another one is meant."""
    folder = folder or local_folder()
    url = read_env(folder / "env").get(URL, "")
    if not url or os.environ.get(URL, "") not in ("", url):
        return {}
    string = os.environ.get(STRING) or read_env(folder / "credentials.env").get(STRING, "")
    return {URL: url} | ({STRING: string} if string else {})


def bypass_proxies(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let no library ask a proxy for this machine's own addresses, in this process and in those that it starts."""
    known = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    names = [name for name in known.split(",") if name]
    for variable in ("no_proxy", "NO_PROXY"):
        environment[variable] = ",".join(dict.fromkeys([*names, *LOOPBACK]))


def drop_empty_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """A variable of ours, AWS or Prefect that is set and empty, as env files leave them, is one that is not set."""
    for name in [name for name, value in environment.items() if not value.strip()]:
        if name.startswith(("WAV_", "AWS_", "PREFECT_")):
            del environment[name]


def adopt_local_services(folder: Path | None = None) -> bool:
    """Fill unset environment variables from ``.local/env``; true where ``make up`` has left one.

    The local Prefect server's address and authentication string come together, and so do the local S3 server's
    address and keys: these are taken only where neither ``WAV_STORE`` nor ``WAV_S3_ENDPOINT`` names another store, and
    then replace ``AWS_*`` keys of other accounts in this process.
    """
    drop_empty_variables()
    bypass_proxies()
    folder = folder or local_folder()
    values, secrets = read_env(folder / "env"), read_env(folder / "credentials.env")
    os.environ.update(local_prefect(folder))
    endpoint = values.pop("WAV_S3_ENDPOINT", "")
    values.pop(URL, None)
    for name, value in values.items():
        os.environ.setdefault(name, value)
    chosen = [os.environ.get(name, "") for name in _STORE_CHOICE]
    if endpoint and (not any(chosen) or chosen[1] == endpoint):
        os.environ["WAV_S3_ENDPOINT"] = endpoint
        os.environ.update({name: value for name, value in secrets.items() if name.startswith("AWS_")})
        for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE"):  # they go with other keys
            os.environ.pop(name, None)
    return bool(values or endpoint)
