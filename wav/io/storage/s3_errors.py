"""What boto3 and S3 servers say when something fails, as one sentence with the place, the cause and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any

from boto3.exceptions import Boto3Error, RetriesExceededError, S3UploadFailedError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from botocore.parsers import ResponseParserError
from s3transfer.exceptions import S3DownloadFailedError

from wav.errors import ServiceError, StorageError, WavError, cut
from wav.io.storage.base import DamagedError, TransferError

MISSING = {"404", "NoSuchKey", "NotFound", "NoSuchVersion"}
TROUBLE = {
    *("SlowDown", "RequestTimeout", "RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequests"),
    "ServiceUnavailable",
}
LOST_RACE = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
NOT_THERE = {"NotImplemented", "501", "MethodNotAllowed", "405"}
WRONG_KEYS = {
    *("401", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"),
    *("InvalidClientTokenId", "UnrecognizedClientException", "Unauthorized", "InvalidSecurity"),
}
REFUSED = {"403", "AccessDenied", "Forbidden", "AllAccessDisabled", "AccountProblem"}
OTHER_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "301", "307", "TemporaryRedirect", "400"}
OTHER_REGION |= {"IllegalLocationConstraintException", "InvalidRegion", "Redirect"}
CREDENTIALS_REMEDY = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or an AWS profile) for this store"
#: what boto3 raises where a server answers 200 with what is no answer of S3
_NO_ANSWER = (AttributeError, HTTPException, LookupError, RecursionError, ResponseParserError, TypeError, ValueError)


@contextmanager
def explained(where: str, object_named: bool) -> Iterator[None]:
    """Turn failures of boto3 into a StorageError that begins with ``where``.

    Raises:
        TransferError: the same call may succeed later. DamagedError: the object is not there.
        StorageError: neither.
    """
    try:
        yield
    except ServiceError as error:
        raise TransferError(str(error)) from None
    except WavError:
        raise
    except (EndpointConnectionError, ConnectTimeoutError):
        raise TransferError(
            f"{where}: no S3 server answers; start the local services with `make up` or set WAV_S3_ENDPOINT"
        ) from None
    except SSLError as error:
        raise StorageError(
            f"{where}: no TLS ({cut(error)}); set AWS_CA_BUNDLE to the file of its certificate authority, "
            "or http:// in WAV_S3_ENDPOINT where the port is a plain one"
        ) from None
    except ProxyConnectionError as error:
        raise TransferError(f"{where}: {cut(error)}; correct HTTPS_PROXY, or add the host to NO_PROXY") from None
    except ReadTimeoutError:
        raise TransferError(
            f"{where}: takes the connection and stays silent; try again, or correct WAV_S3_ENDPOINT"
        ) from None
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise StorageError(
            f"{where}: S3 credentials are missing or incomplete ({error}); {CREDENTIALS_REMEDY}"
        ) from None
    except ProfileNotFound as error:
        raise StorageError(f"{where}: AWS_PROFILE: {cut(error)}; correct or unset AWS_PROFILE") from None
    except (ConfigParseError, ConfigNotFound) as error:
        raise StorageError(f"{where}: AWS configuration: {cut(error)}; correct the file or AWS_CONFIG_FILE") from None
    except ClientError as error:
        raise kind(error, object_named)(f"{where}: {cause(error, object_named)}") from error
    except (HTTPClientError, IncompleteReadError, RetriesExceededError) as error:
        raise TransferError(f"{where}: {cut(error)}; check the network and try again") from error
    except S3UploadFailedError as error:
        inner = error.__context__
        if isinstance(inner, ClientError):
            raise kind(inner, True)(f"{where}: {cause(inner, True)}") from error
        raise TransferError(f"{where}: upload failed ({cut(error)}); try again") from error
    except S3DownloadFailedError:  # s3transfer's own for a part with another ETag; boto3's twin is one of Boto3Error
        raise TransferError(f"{where}: was replaced while it was read; try again") from None
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(
            f"{where}: {cut(error)}; check WAV_S3_ENDPOINT, the AWS_* variables and the AWS configuration"
        ) from error
    except _NO_ANSWER as error:
        raise not_s3(where, cut(repr(error))) from error


def not_s3(where: str, why: str) -> StorageError:
    """The error for a server that answers, and not as S3 does."""
    return StorageError(f"{where}: the answer is not an S3 server's ({why}); correct WAV_S3_ENDPOINT")


def code(error: ClientError) -> str:
    """S3's error code, or the HTTP status where the answer has no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status(error: ClientError) -> int:
    """The HTTP status."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def no_checksums(error: ClientError) -> bool:
    """Whether a write was refused for its checksum, which servers of before 2025 may not know."""
    message = str(error.response.get("Error", {}).get("Message", "")).lower()
    return code(error) in NOT_THERE or (status(error) == 400 and ("checksum" in message or "trailer" in message))


def kind(error: ClientError, object_named: bool) -> type[StorageError]:
    """Whether a refused request may succeed later, or its object is not there, or neither."""
    if code(error) in NOT_THERE:
        return StorageError
    if status(error) >= 500 or status(error) == 429 or code(error) in TROUBLE:
        return TransferError
    return DamagedError if object_named and code(error) in MISSING else StorageError


def cause(error: ClientError, object_named: bool) -> str:
    """Cause and remedy of a refused request."""
    name, action = code(error), f"s3:{error.operation_name}"
    said = f"{name} {cut(error.response.get('Error', {}).get('Message') or '')}".rstrip()
    if name == "NoSuchBucket" or (name in MISSING and not object_named):
        remedy = "create it (`make up` does for the local server), or correct WAV_STORE or WAV_S3_ENDPOINT"
        return f"the bucket does not exist; {remedy}"
    if name in MISSING:
        return "no such object; check the key or upload it first"
    if name in WRONG_KEYS:
        return f"the server refused the credentials ({name}); {CREDENTIALS_REMEDY}"
    if name == "RequestTimeTooSkewed":
        return "this machine's clock differs too much from the server's; set the clock (NTP)"
    if name in REFUSED:
        return f"{action} was refused ({said}); give these keys that right, or {CREDENTIALS_REMEDY}"
    if name in OTHER_REGION or "region" in said.lower():
        return f"{action} was refused ({said}); set WAV_S3_REGION to the server's region"
    if name in NOT_THERE:
        return f"the server does not know {action} ({said}); use a store that does"
    return f"the server answered {said} to {action}; try again, then look at the server's log"


def retry_429(attempts: int, pause_s: float) -> Callable[..., float | None]:
    """A handler of botocore's ``needs-retry``: 429 is other stores' SlowDown, which its standard mode does not know."""

    def delay(response: Any = None, **call: Any) -> float | None:
        again = response is not None and response[0].status_code == 429 and call["attempts"] < attempts
        return min(pause_s * 2.0 ** call["attempts"], 20.0) if again else None

    return delay


def told_whole(http_response: Any, parsed: dict[str, Any], **_: Any) -> None:
    """A handler of botocore's ``after-call``: an object is taken only from an answer that is S3's and says its length.

    A page with status 200 has neither tag nor date. As to the length: boto3 starts a download with the first part and
    reads from that answer how many there are; where it cannot, its threads stop and the download is waited for without
    end. Raised here, such an answer counts as one that broke off.
    """
    if http_response.status_code >= 300:
        return
    if not parsed.get("ETag") and "LastModified" not in parsed:
        raise LookupError("no ETag and no Last-Modified")
    length = str(parsed.get("ContentRange", parsed.get("ContentLength", ""))).rpartition("/")[2]
    if not length.isdigit():
        raise ResponseStreamingError(error="the answer does not say the object's length")
