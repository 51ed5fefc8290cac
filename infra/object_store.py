"""Objects by URI: ``s3://BUCKET/KEY``, or a path of this machine.

One client per process, made on first use. Credentials come by the usual AWS chain, an endpoint from AWS_ENDPOINT_URL.
botocore retries a request with back-off and jitter; a body that is cut short is fetched anew here. Nothing writes half
an object: a local file gets its name when it is whole, an S3 object is there when its upload is complete.
"""

from __future__ import annotations

import io
import math
import os
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from infra.errors import ServiceError

S3 = "s3://"
ATTEMPTS = 8
CONNECTIONS = 32
LISTING_THREADS = 16
CHUNK_BYTES = 2**20
LONGEST_NAME = 255  # bytes, of a file
PARTIAL = ".partial"  # ends the name of a local file that is still being written

_MISSING = frozenset({"404", "NoSuchKey", "NotFound"})
_FORBIDDEN = frozenset({"403", "AccessDenied", "AllAccessDisabled", "InvalidObjectState"})
# Wrong for every object alike: the job has to stop, not to call each object bad.
_WRONG_FOR_ALL = frozenset(
    {"NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
    | {"NoCredentialsError", "PartialCredentialsError"}
)


@dataclass(frozen=True)
class StoredObject:
    """What a listing knows of an object.

    Attributes:
        uri: of the object.
        size: bytes.
        etag: changes with the content: S3's ETag, or size and time of a local file.
        modified: seconds since 1970, by the clock of the store.
        problem: reason of an ``ObjectError`` if the listing shows already that it, or the folder it is, cannot be read.
    """

    uri: str
    size: int
    etag: str
    modified: float
    problem: str = ""


class ObjectError(Exception):
    """One object cannot be read.

    Attributes:
        reason: ``missing_object``, ``forbidden``, ``unavailable`` (the store does not answer), ``too_large`` (more
            than the caller takes) or ``unreadable``.
        detail: what the store said.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def join(prefix: str, name: str) -> str:
    """URI of ``name`` below ``prefix``."""
    return f"{prefix.rstrip('/')}/{name}"


def list_objects(prefix: str) -> Iterator[StoredObject]:
    """Every object below a prefix, once and in any order, with memory that does not grow with their number.

    S3 prefixes that have sub-prefixes are listed in parallel. Local files: hidden ones count, links are followed; what
    cannot be looked at comes with its ``problem``.

    Raises:
        ServiceError: the bucket or folder is not there, or not readable.
    """
    return _list_s3(prefix) if prefix.startswith(S3) else _list_local(Path(prefix))


def list_folders(prefix: str) -> list[str]:
    """URIs of the folders directly below a prefix, sorted; none if there is no such prefix.

    Raises:
        ServiceError: the store does not answer, or refuses.
    """
    if not prefix.startswith(S3):
        folder = Path(prefix)
        return sorted(str(path) for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    bucket, key = _split(prefix)
    try:
        pages = (
            _client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=bucket, Prefix=f"{key.rstrip('/')}/" if key else "", Delimiter="/")
        )
        names = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
    except _s3_errors() as error:
        raise ServiceError(f"cannot list {prefix}: {_code(error)}") from error
    return sorted(f"{S3}{bucket}/{name.rstrip('/')}" for name in names)


def find_object(uri: str) -> StoredObject | None:
    """What is known of one object; None if there is none of that name.

    Raises:
        ServiceError: the store does not answer, or refuses.
    """
    if not uri.startswith(S3):
        return _find_local(uri)
    bucket, key = _split(uri)
    if not key:
        return None
    try:
        facts = _client().head_object(Bucket=bucket, Key=key)
    except _s3_errors() as error:
        if _code(error) in _MISSING:
            return None
        raise ServiceError(f"cannot read {uri}: {_code(error)}") from error
    return _s3_object(uri, facts, facts["ContentLength"])


def read_object(uri: str, max_bytes: float = math.inf) -> tuple[bytes, str]:
    """The bytes of an object, if they are no more than ``max_bytes``, and its etag.

    Raises:
        ObjectError: it cannot be read.
        ServiceError: nothing can be read from this store.
    """
    stream = io.BytesIO()
    etag = _copy(uri, stream, max_bytes)
    return stream.getvalue(), etag


def fetch_file(uri: str, scratch: Path) -> tuple[Path, str]:
    """An object as a file, and its etag: the file itself where it is local, else a copy in ``scratch``.

    Raises:
        ObjectError: it cannot be read.
        ServiceError: nothing can be read from this store.
    """
    if not uri.startswith(S3):
        with _open_local(uri) as source:
            return Path(uri), _stored_file(uri, os.fstat(source.fileno())).etag
    name = uri.rsplit("/", 1)[1]
    path = scratch / (name if len(name.encode()) <= LONGEST_NAME else "object")
    try:
        with path.open("wb") as stream:
            return path, _copy(uri, stream)
    except OSError as error:
        raise ServiceError(f"cannot keep a copy of {uri} in {scratch}: {error.strerror}") from error


def _copy(uri: str, stream: BinaryIO, max_bytes: float = math.inf) -> str:
    """Append an object to a stream; the part behind a cut is asked for by its range, if it is still the same object."""
    if not uri.startswith(S3):
        return _copy_local(uri, stream, max_bytes)
    bucket, key = _split(uri)
    words: dict[str, str] = {}
    for attempt in range(ATTEMPTS):
        try:
            answer = _client().get_object(Bucket=bucket, Key=key, **words)
            if "ETag" in answer:
                words["IfMatch"] = answer["ETag"]
            whole = int(answer.get("ContentRange", "").rpartition("/")[2] or answer["ContentLength"])
            _check_size(uri, whole, max_bytes)
            for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                stream.write(chunk)
                _check_size(uri, stream.tell(), max_bytes)
            return _s3_object(uri, answer, whole).etag
        except _cut_short():
            words["Range"] = f"bytes={stream.tell()}-"
            time.sleep(random.uniform(0, min(10.0, 0.1 * 2**attempt)))
        except _s3_errors() as error:
            raise _read_error(uri, error) from error
    raise ObjectError("unavailable", f"{uri}: the connection was cut {ATTEMPTS} times")


def write_object(uri: str, data: bytes) -> None:
    """Put an object in place of what was there.

    Raises:
        ServiceError: the store does not take it.
    """
    try:
        if not uri.startswith(S3):
            _write_local(Path(uri), io.BytesIO(data))
            return
        bucket, key = _split(uri)
        _client().put_object(Bucket=bucket, Key=key, Body=data)
    except _write_errors() as error:
        raise ServiceError(f"cannot write {uri}: {_code(error)}") from error


def write_file(uri: str, path: Path) -> None:
    """Put a file of any size in place of what was there.

    Raises:
        ServiceError: the store does not take it.
    """
    try:
        if uri.startswith(S3):
            bucket, key = _split(uri)
            _client().upload_file(str(path), bucket, key)
            return
        with path.open("rb") as source:
            _write_local(Path(uri), source)
    except _write_errors() as error:
        raise ServiceError(f"cannot write {uri}: {_code(error)}") from error


def delete_object(uri: str) -> None:
    """Delete an object; one that is not there is no error.

    Raises:
        ServiceError: the store refuses.
    """
    try:
        if not uri.startswith(S3):
            Path(uri).unlink(missing_ok=True)
            return
        bucket, key = _split(uri)
        _client().delete_object(Bucket=bucket, Key=key)
    except _write_errors() as error:
        raise ServiceError(f"cannot delete {uri}: {_code(error)}") from error


def remove_folder(prefix: str) -> None:
    """Delete every object below a prefix, if there is any.

    Raises:
        ServiceError: the store refuses.
    """
    if prefix.startswith(S3):
        for found in list(list_objects(prefix)):
            delete_object(found.uri)
        return
    try:
        if Path(prefix).is_dir():
            shutil.rmtree(prefix)
    except OSError as error:
        raise ServiceError(f"cannot delete {prefix}: {_code(error)}") from error


def _check_size(uri: str, size: int, max_bytes: float) -> None:
    if size > max_bytes:
        raise ObjectError("too_large", f"{uri}: {size} bytes, allowed {max_bytes:.0f}")


def _find_local(uri: str) -> StoredObject | None:
    try:
        facts = os.stat(uri)  # noqa: PTH116  # pathlib's answers say nothing of most errors
    except OSError as error:
        if _reason(error) == "missing_object":
            return None
        raise ServiceError(f"cannot read {uri}: {error.strerror}") from error
    return _stored_file(uri, facts) if stat.S_ISREG(facts.st_mode) else None


@contextmanager
def _open_local(uri: str) -> Iterator[BinaryIO]:
    """A file to read from; whatever goes wrong with it is an ``ObjectError``."""
    try:
        # A pipe would be waited for without an end, if it were not opened like this.
        with open(os.open(uri, os.O_RDONLY | os.O_NONBLOCK), "rb") as source:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                raise ObjectError("unreadable", f"{uri}: no regular file")
            yield source
    except OSError as error:
        raise ObjectError(_reason(error), f"{uri}: {error.strerror}") from error


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "missing_object"
    return "forbidden" if isinstance(error, PermissionError) else "unreadable"


def _copy_local(uri: str, stream: BinaryIO, max_bytes: float) -> str:
    with _open_local(uri) as source:
        while chunk := source.read(CHUNK_BYTES):
            _check_size(uri, max(os.fstat(source.fileno()).st_size, source.tell()), max_bytes)
            stream.write(chunk)
        return _stored_file(uri, os.fstat(source.fileno())).etag


def _write_local(path: Path, source: BinaryIO) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=PARTIAL, delete=False) as stream:
        partial_path = Path(stream.name)
        try:
            shutil.copyfileobj(source, stream)
            stream.flush()
            os.fsync(stream.fileno())
        except BaseException:
            partial_path.unlink(missing_ok=True)
            raise
    partial_path.chmod(0o644)  # temporary files are private
    partial_path.replace(path)


def _list_local(folder: Path) -> Iterator[StoredObject]:
    try:
        yield from _list_folder(str(folder), ())
    except FileNotFoundError as error:
        raise ServiceError(f"cannot list {folder}: no such folder") from error
    except OSError as error:
        raise ServiceError(f"cannot list {folder}: {error.strerror}") from error


def _list_folder(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[StoredObject]:
    """Files below a folder, an error of one of them no error of the others.

    A link to a folder that it lies in itself is passed over: what is behind it is listed by its own path.
    """
    facts = os.stat(folder)  # noqa: PTH116
    identity = (facts.st_dev, facts.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir():
                    yield from _list_folder(entry.path, (*above, identity))
                elif entry.is_file():
                    yield _stored_file(entry.path, entry.stat())
                elif entry.is_symlink():  # leads nowhere: whoever reads it will say so
                    yield StoredObject(entry.path, 0, "", entry.stat(follow_symlinks=False).st_mtime)
            except OSError as error:
                yield StoredObject(entry.path, 0, "", 0.0, _reason(error))


def _stored_file(uri: str, facts: os.stat_result) -> StoredObject:
    return StoredObject(uri, facts.st_size, f"{facts.st_size:x}-{facts.st_mtime_ns:x}", facts.st_mtime)


def _list_s3(prefix: str) -> Iterator[StoredObject]:
    """Pages of several prefixes at a time; at most ``LISTING_THREADS`` pages are held."""
    bucket, key = _split(prefix)
    _client()  # made before the threads would race for it
    waiting: list[Callable[[], _Page]] = [partial(_page, bucket, f"{key.rstrip('/')}/" if key else "", "/")]
    running: set[Future[_Page]] = set()
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < LISTING_THREADS:
                    running.add(pool.submit(waiting.pop()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    page = future.result()
                    waiting += page.further
                    yield from page.objects
        except _s3_errors() as error:
            raise ServiceError(f"cannot list {prefix}: {_code(error)}") from error
        finally:
            for future in running:
                future.cancel()


@dataclass(frozen=True)
class _Page:
    """Up to 1,000 objects, and the calls that give what lies behind and below them."""

    objects: list[StoredObject]
    further: list[Callable[[], _Page]]


def _page(bucket: str, prefix: str, delimiter: str, token: str | None = None) -> _Page:
    """One page of a prefix.

    With a delimiter its sub-prefixes come as calls of their own. A prefix whose first page is full of sub-prefixes
    is listed as one stream instead: it has so many that a call for each would be slower.
    """
    words = {"ContinuationToken": token} if token else {}
    answer = _client().list_objects_v2(Bucket=bucket, Prefix=prefix, Delimiter=delimiter, **words)
    below = [item["Prefix"] for item in answer.get("CommonPrefixes", ())]
    next_token = answer.get("NextContinuationToken")
    if below and next_token and not token:
        return _page(bucket, prefix, "")
    objects = [
        _s3_object(f"{S3}{bucket}/{item['Key']}", item, item["Size"])
        for item in answer.get("Contents", ())
        if not item["Key"].endswith("/")  # what consoles make to show a folder
    ]
    further: list[Callable[[], _Page]] = [partial(_page, bucket, name, delimiter) for name in below]
    if next_token:
        further.append(partial(_page, bucket, prefix, delimiter, next_token))
    return _Page(objects, further)


def _s3_object(uri: str, facts: dict[str, Any], size: int) -> StoredObject:
    """Some servers keep no ETag: then size and time stand in, to the second, as answers to GET tell no more."""
    modified = facts["LastModified"].timestamp()
    etag = facts.get("ETag", "").strip('"') or f"{size:x}-{int(modified):x}"
    return StoredObject(uri, size, etag, modified)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3).partition("/")
    if not bucket:
        raise ServiceError(f"{uri!r} names no bucket: write s3://BUCKET/PREFIX")
    return bucket, key


@lru_cache(maxsize=1)
def _client() -> Any:
    # Imported on first use: who works on local paths does not wait for it.
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        max_pool_connections=CONNECTIONS,
        connect_timeout=10,
        read_timeout=30,
        # Servers other than Amazon's often know no checksum trailers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", config=config)


# Sockets are not for two processes: one that forks makes a client of its own.
os.register_at_fork(after_in_child=_client.cache_clear)


def _s3_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError

    return ClientError, BotoCoreError


def _write_errors() -> tuple[type[Exception], ...]:
    from boto3.exceptions import S3UploadFailedError

    return OSError, S3UploadFailedError, *_s3_errors()


def _cut_short() -> tuple[type[Exception], ...]:
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    return IncompleteReadError, ReadTimeoutError, ResponseStreamingError


def _read_error(uri: str, error: Exception) -> Exception:
    code = _code(error)
    if code in _WRONG_FOR_ALL:
        return ServiceError(f"cannot read {uri}: {code}")
    reason = "missing_object" if code in _MISSING else "forbidden" if code in _FORBIDDEN else "unavailable"
    return ObjectError(reason, f"{uri}: {code}")


def _code(error: Exception) -> str:
    """S3's error code, or what else is known; no URL of the request, which may be signed."""
    response = getattr(error, "response", None)
    if response:
        return str(response.get("Error", {}).get("Code", "error"))
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else type(error).__name__
