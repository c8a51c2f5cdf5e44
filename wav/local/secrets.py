"""What protects the local services: the S3 keys, Prefect's authentication string, SeaweedFS' certificate.

All are generated once, lie in ``.local/`` and are readable by its owner alone.
"""

from __future__ import annotations

import datetime
import os
import secrets
from pathlib import Path

from wav.errors import ServiceError
from wav.local import read_env
from wav.prefect_api import STRING

_CENTURY = datetime.timedelta(days=36500)
#: SeaweedFS' parts that serve or dial each other by gRPC, and by HTTP
_GRPC = ("MASTER", "VOLUME", "FILER", "S3", "ADMIN", "WORKER", "CLIENT")
_HTTPS = ("MASTER", "VOLUME", "FILER", "CLIENT")


def private_folder(folder: Path) -> None:
    """Make ``folder`` where it is missing, for its owner alone; ServiceError where it is somebody else's."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.geteuid():
        raise ServiceError(f"{folder}: belongs to another user; remove it or set WAV_LOCAL_DIR to a folder of your own")
    folder.chmod(0o700)


def write_private(path: Path, text: str) -> None:
    """Write atomically, readable by the owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # its mode would stay
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(text)
    temporary.replace(path)


def credentials(folder: Path) -> dict[str, str]:
    """Access keys of the local S3 server and the authentication string of the local Prefect server."""
    path = folder / "credentials.env"
    known = read_env(path)
    fresh = {
        "AWS_ACCESS_KEY_ID": "WAV" + secrets.token_hex(8).upper(),
        "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30),
        STRING: "wav:" + secrets.token_urlsafe(30),
    }
    values = {name: known.get(name) or value for name, value in fresh.items()}
    if values != known:
        write_private(path, "".join(f"{name}={value}\n" for name, value in values.items()))
    return values


def weed_tls(folder: Path) -> dict[str, str]:
    """Environment in which SeaweedFS' ports other than S3's ask every client for the one certificate made here.

    Without it the master, the volume server and the filer do, for whoever reaches their ports, what the S3 keys guard.
    """
    certificate, key = folder / "weed.crt", folder / "weed.key"
    if not (certificate.is_file() and key.is_file()):
        _make_certificate(certificate, key)
    found = {"WEED_GRPC_CA": str(certificate), "WEED_HTTPS_CLIENT_ENABLED": "true"}
    for name in [*(f"WEED_GRPC_{part}" for part in _GRPC), *(f"WEED_HTTPS_{part}" for part in _HTTPS)]:
        found |= {f"{name}_CERT": str(certificate), f"{name}_KEY": str(key)}
    return found | {f"WEED_HTTPS_{part}_CA": str(certificate) for part in _HTTPS}


def _make_certificate(certificate: Path, key: Path) -> None:
    """A certificate that vouches for itself alone, for 127.0.0.1."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "wav")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + _CENTURY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(private, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    write_private(key, private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain).decode())
    write_private(certificate, made.public_bytes(pem).decode())
