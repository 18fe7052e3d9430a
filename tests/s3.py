"""An S3 server that holds the files of a folder, as much of one as pyarrow needs to read them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_CHANGED = "2026-01-01T00:00:00.000Z"


class Bucket(ThreadingHTTPServer):
    """Serves `folder` as the bucket `bucket`, and as plain files of the web. It knows one key, `reader`."""

    daemon_threads = True

    def __init__(self, folder: Path, ip: str) -> None:
        super().__init__((ip, 0), _Handler)
        self.folder, self._at = folder, f"{ip}:{self.server_port}"
        self.read: list[str] = []
        """The files that were read, in order."""

    def uri(self, name: str) -> str:
        """Of a file or folder."""
        return f"s3://bucket/{name}?endpoint_override={self._at}&scheme=http&region=us-east-1"

    def url(self, name: str) -> str:
        """Of a file, as a web server's."""
        return f"http://{self._at}/bucket/{name}"


@contextmanager
def serving(folder: Path, ip: str = "127.0.0.1") -> Iterator[Bucket]:
    """The server, in a thread of this process."""
    with Bucket(folder, ip) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Bucket
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        parts = urlsplit(self.path)
        _, bucket, *rest = unquote(parts.path).split("/", 2)
        name, query = "".join(rest), parse_qs(parts.query)
        file = self.server.folder / name
        signed = self.headers.get("Authorization")
        if signed is not None and "Credential=reader/" not in signed:
            self._send(403, b"<Error><Code>AccessDenied</Code><Message>not yours</Message></Error>", body)
        elif bucket != "bucket" or (name and not file.is_file()):
            self._send(404, b"<Error><Code>NoSuchKey</Code><Message>not there</Message></Error>", body)
        elif name:
            self._file(file, body)
        else:
            self._send(200, self._listing(query["prefix"][0] if "prefix" in query else ""), body)

    def _file(self, file: Path, body: bool) -> None:
        data, span = file.read_bytes(), self.headers.get("Range")
        status = 200
        if body and span:
            first, last = span.removeprefix("bytes=").split("-")
            data, status = data[int(first) : int(last) + 1 if last else None], 206
        if body:
            self.server.read.append(file.relative_to(self.server.folder).as_posix())
        self._send(status, data, body)

    def _listing(self, prefix: str) -> bytes:
        files = sorted(path for path in self.server.folder.rglob("*") if path.is_file())
        keys = {path.relative_to(self.server.folder).as_posix(): path.stat().st_size for path in files}
        found = [
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_CHANGED}</LastModified><Size>{size}</Size></Contents>"
            for key, size in keys.items()
            if key.startswith(prefix)
        ]
        told = f"<IsTruncated>false</IsTruncated><KeyCount>{len(found)}</KeyCount>{''.join(found)}"
        return f"<ListBucketResult>{told}</ListBucketResult>".encode()

    def _send(self, status: int, data: bytes, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", '"1"')
        self.end_headers()
        if body:
            self.wfile.write(data)
