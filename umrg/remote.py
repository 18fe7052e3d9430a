"""Files and folders that a URI names: `s3://`, `gs://` and `file://` by pyarrow, `http(s)://` a single file.

A URI's query has pyarrow's options, such as `s3://bucket/model?region=eu-central-1` or
`s3://bucket/model?endpoint_override=minio:9000&scheme=http`. Credentials are those of the environment, of AWS's own
files or of the machine.
"""

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from umrg.mistake import Mistake

PIECE = 16 << 20
"""Bytes that are read at once."""
PATIENCE_S = 60.0
"""Seconds without a byte after which a web server is given up; pyarrow has bounds of its own."""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file or folder that a URI names."""

    uri: str
    name: str
    """The last part of its path."""
    sizes: Mapping[str, int]
    """Bytes of each file, by its name, which begins with `name`."""
    stamp: str
    """Another one whenever a file was changed."""

    @classmethod
    def of(cls, uri: str) -> "Remote":
        """Raises ValueError if there is nothing, or if it cannot be read."""
        parts = urlsplit(uri)
        if parts.password:
            raise Mistake(
                f"{parts.scheme}://…@{parts.hostname} has a secret in it, which every run would keep; put it into the "
                "environment (AWS_SECRET_ACCESS_KEY)"
            )
        name = PurePosixPath(unquote(parts.path)).name or parts.netloc
        with _readable(uri):
            sizes, times = _of_web(uri, name) if _is_web(uri) else _of_store(uri, name)
        if not sizes:
            raise Mistake(f"there is nothing at {uri}; correct it, or copy the files there")
        stamp = hashlib.sha256(repr((uri, sorted(sizes.items()), times)).encode()).hexdigest()
        return cls(uri=uri, name=name, sizes=sizes, stamp=stamp)

    def read(self, file: str) -> Iterator[memoryview]:
        """The bytes of a file in pieces, by its name. Raises ValueError if it cannot be read."""
        with _readable(self.uri), self._opened(file) as stream:
            while data := stream.read(PIECE):
                yield memoryview(data)

    def _opened(self, file: str) -> Any:
        if _is_web(self.uri):
            return urllib.request.urlopen(self.uri, timeout=PATIENCE_S)
        store, path = _store(self.uri)
        return store.open_input_stream(path + file.removeprefix(self.name))


def _is_web(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _of_web(uri: str, name: str) -> tuple[dict[str, int], list[str]]:
    request = urllib.request.Request(uri, method="HEAD")
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
        length = reply.headers.get("Content-Length")
        changed = [str(reply.headers.get(each)) for each in ("ETag", "Last-Modified")]
    if length is None:
        raise Mistake(f"{uri} is no file: its server does not say how long it is; give the address of one")
    return {name: int(length)}, changed


def _of_store(uri: str, name: str) -> tuple[dict[str, int], list[str]]:
    from pyarrow.fs import FileSelector, FileType

    store, path = _store(uri)
    whole = store.get_file_info(path)
    inside = store.get_file_info(FileSelector(path, recursive=True)) if whole.type == FileType.Directory else [whole]
    files = {f"{name}{each.path.removeprefix(path)}": each for each in inside if each.type == FileType.File}
    kept = {file: files[file] for file in sorted(files) if "/." not in file}
    return {file: each.size for file, each in kept.items()}, [str(each.mtime_ns) for each in kept.values()]


def _store(uri: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    store, path = FileSystem.from_uri(uri)
    return store, path.rstrip("/")


@contextmanager
def _readable(uri: str) -> Iterator[None]:
    try:
        yield
    except Mistake:
        raise
    # pyarrow raises a ValueError for a URI that it does not understand; urllib an HTTPError, which is an OSError, and
    # what is none for an address with spaces or a server of another protocol.
    except (OSError, ValueError, http.client.HTTPException) as error:
        said = " ".join(str(error).split())
        raise Mistake(f"{uri} cannot be read: {said}; correct it, or give this machine the right to it") from error
