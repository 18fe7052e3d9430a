"""Requests to every route, damaged at random as a hostile client would damage them."""

import asyncio
import base64
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.types import ASGIApp, Message

Headers = tuple[tuple[bytes, bytes], ...]
Part = tuple[bytes, bytes]
"""Of a form: its headers and its content."""
BOUNDARY = b"b0undary"


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A request as a client sends it."""

    method: str = "POST"
    path: str
    query_string: bytes = b""
    headers: Headers
    parts: tuple[Part, ...] | None = None
    """Of a form."""
    fields: dict[str, Any] | None = field(default=None, hash=False)
    """Of JSON."""
    raw: bytes | None = None
    """The body, in place of what parts or fields make."""
    whole: bool = True
    """Whether the client stays until its body is sent."""

    @property
    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.parts is not None:
            return form(self.parts)
        return b"" if self.fields is None else json.dumps(self.fields).replace('"1e999"', "1e999").encode()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an application answered; status 0 where it answered nothing."""

    status: int = 0
    headers: Headers = ()
    body: bytes = b""


def form(parts: Sequence[Part], boundary: bytes = BOUNDARY) -> bytes:
    """The body of a form."""
    written = b"".join(b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary, *part) for part in parts)
    return written + b"--%b--\r\n" % boundary


def part(name: str, content: bytes, *, file: str | None = None) -> Part:
    told = f'Content-Disposition: form-data; name="{name}"'
    return (told if file is None else f'{told}; filename="{file}"\r\nContent-Type: image/png').encode(), content


def requests(image: bytes, key: str) -> list[Sent]:
    """Good requests, of every route and kind. image: a file. key: one that is let in."""
    authorization = (b"authorization", f"Bearer {key}".encode())
    as_json = (authorization, (b"content-type", b"application/json"))
    as_form = (authorization, (b"content-type", b"multipart/form-data; boundary=" + BOUNDARY))
    encoded = base64.b64encode(image).decode()
    ground = {"query": "Where is bile stored?", "samples": 2, "seed": 1, "mask": "png", "window": "40,400", "frame": 0}
    segment = {"box": [1, 2, 30, 40], "points": [[5, 6], [7, 8]], "labels": [1, 0], "mask": "rle"}
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture, {"type": "text", "text": "Where is bile stored?"}]},
    ]
    chat = {"model": "tiny", "messages": messages, "n": 1, "temperature": 0, "max_tokens": 20, "seed": 3}
    file = part("image", image, file="a.png")
    texts = tuple(part(name, str(value).encode()) for name, value in ground.items())
    drawn = (part("box", b"1,2,30,40"), part("points", b"5,6;7,8"), part("labels", b"1,0"))
    accepted = tuple((b"accept", kind) for kind in (b"image/png", b"text/event-stream"))
    posted = [
        Sent(path="/v1/ground", headers=as_form, parts=(file, *texts)),
        *(Sent(path="/v1/ground", headers=(*as_form, kind), parts=(file, texts[0])) for kind in accepted),
        Sent(path="/v1/ground", headers=as_json, fields={"image": encoded, **ground}),
        Sent(path="/v1/segment", headers=as_form, parts=(file, *drawn)),
        Sent(path="/v1/segment", headers=as_json, fields={"image": encoded, **segment}),
        Sent(path="/v1/segment", headers=as_json, fields={"image_id": "0" * 32, **segment}),
        Sent(path="/v1/chat/completions", headers=as_json, fields=chat),
        Sent(path="/v1/chat/completions", headers=as_json, fields={**chat, "stream": True}),
    ]
    asked = ("/v1/models", "/metrics", "/healthz", "/readyz", "/docs", "/docs/style.css", "/openapi.json")
    return posted + [Sent(method="GET", path=path, headers=(authorization,)) for path in asked]


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, False, "", " ", 0, -1, 1, 64, 65, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, "1e999", 1e308),
    *(float("nan"), float("inf"), float("-inf"), "\ud800", "\udfff\ud800", "\0", "\r\n", "\u202e", "é", "x" * 70_000),
    *([], {}, [[]], [None], [1] * 5000, {"a": 1}, {str(n): n for n in range(2000)}, deep(50), deep(150), deep(900)),
    *(
        "nan,nan",
        "inf,1",
        "p0,p0",
        "p-1,p101",
        "1,",
        "p1,p99",
        "1e308,1e-320",
        "<|image_pad|>",
        "%00",
        "../../etc/passwd",
    ),
    *("http://127.0.0.1:9/a.png", "file:///etc/passwd", "data:image/png;base64,", "data:text/html;base64,PGI+"),
    *("data:image/png,%89PNG", "data:image/svg+xml;base64,PHN2Zy8+", "DATA:IMAGE/PNG;BASE64,AAAA", "data:,", "=" * 99),
    *("A" * 4097, "AAA=AAAA", "AA\nAA", "____", "f" * 32, "F" * 32, [1, 2], [[1, 2, 3]], [1, 2, 3, 4], [5, 4, 3, 2]),
)
TYPES = (
    *(b"", b"application/json", b"application/json; charset=utf-16", b"Application/JSON;", b"application/x+json"),
    *(b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data", b"multipart/form-data; boundary="),
    *(b"multipart/mixed; boundary=b0undary", b'multipart/form-data; boundary="b0undary"', b"\xff\xfe", b";;;", b"/"),
    *(b"multipart/form-data; boundary=b0undary; charset=" + name for name in (b"utf-7", b"idna", b"undefined", b"hex")),
    *(b"multipart/form-data; boundary=b0undary; charset=unicode_escape", b"multipart/form-data; boundary=b\xe9"),
    *(b"multipart/form-data; boundary*0=b0un; boundary*1=dary", b"multipart/form-data; boundary*=utf-8''b0undary"),
    *(b"multipart/form-data; boundary=" + b"b" * 5000, b"multipart/form-data; boundary=b0undary; boundary=c"),
    *(b"multipart/form-data; boundary=b0undar", b"multipart/form-data; boundary=b0undary--", b"image/png"),
)
ACCEPTS = (
    *(
        b"",
        b"*/*",
        b"image/png",
        b"image/*;q=nan",
        b"application/json;q=1e999",
        b"text/html",
        b"text/event-stream;q=-1",
    ),
    *(b"q=1", b",,,;;;", b"image/vnd.medreasoner.overlay+png", b"*/*;q=0", b"\xff", b"a/b," * 5000, b"image/png;q=0_1"),
)
AUTHORIZATIONS = (b"", b"Bearer", b"Bearer ", b"Basic YTpi", b"Bearer \xff", b"bearer mr-" + b"x" * 9000, b"Bearer a b")
LENGTHS = (b"0", b"-1", b"1", b"99999999999", b"1e3", b"0x10", b"9" * 40, b"", b" 5", b"\xb2", b"10, 10", b"1_0")
OTHERS = (
    *((b"content-encoding", b"gzip"), (b"transfer-encoding", b"chunked"), (b"expect", b"100-continue")),
    *(
        (b"host", b"evil.example"),
        (b"host", b"\xff"),
        (b"x-request-id", b"\xff" * 99),
        (b"x-http-method-override", b"PUT"),
    ),
    *((b"range", b"bytes=0-9999999"), (b"origin", b"null"), (b"cookie", b"=;" * 4000), (b"upgrade", b"websocket")),
)
METHODS = ("GET", "PUT", "HEAD", "OPTIONS", "TRACE", "DELETE", "", "get", "POST\t", "é")


Damage = Callable[[bytes, random.Random], bytes]
Wrong = Callable[[Sent, Sequence[bytes], Damage, random.Random], Sent]


def fuzzed(good: Sequence[Sent], files: Sequence[bytes], damage: Damage, chance: random.Random) -> Sent:
    """A request with one to three things wrong. files: images, whole and broken. damage: of bytes."""
    sent = chance.choice(good)
    for _ in range(chance.choice((1, 1, 2, 3))):
        wrong = chance.choice(_WRONGS)
        sent = wrong(sent, files, damage, chance)
    return sent


def _bytes(sent: Sent, _: Sequence[bytes], damage: Damage, chance: random.Random) -> Sent:
    return replace(sent, raw=damage(sent.body, chance))


def _header(sent: Sent, _: Sequence[bytes], damage: Damage, chance: random.Random) -> Sent:
    name, values = chance.choice(
        [(b"content-type", TYPES)] * 3
        + [(b"accept", ACCEPTS), (b"authorization", AUTHORIZATIONS), (b"content-length", LENGTHS)]
    )
    value = chance.choice(values)
    kept = tuple(each for each in sent.headers if each[0] != name or chance.random() < 0.1)
    return replace(sent, headers=(*kept, chance.choice([(name, value)] * 3 + [(name, damage(value, chance))])))


def _other_header(sent: Sent, _: Sequence[bytes], damage: Damage, chance: random.Random) -> Sent:
    damaged = tuple((name, damage(value, chance)) for name, value in sent.headers)
    return replace(sent, headers=chance.choice([(*sent.headers, chance.choice(OTHERS))] * 3 + [damaged]))


def _address(sent: Sent, _: Sequence[bytes], damage: Damage, chance: random.Random) -> Sent:
    path = damage(sent.path.encode(), chance).decode(errors="replace")
    asked = chance.choice([sent.path, sent.path + "/", "/" + sent.path, path])
    query = chance.choice([b"", b"%", b"image=%ff", b"a=1&" * 9000])
    return replace(sent, method=chance.choice([sent.method, *METHODS]), path=asked, query_string=query)


def _departure(sent: Sent, _: Sequence[bytes], damage: Damage, chance: random.Random) -> Sent:
    return replace(sent, whole=False)


def _content(sent: Sent, files: Sequence[bytes], damage: Damage, chance: random.Random) -> Sent:
    """Another value, another part, another file."""
    if sent.raw is None and sent.fields is not None:
        return _json(sent, files, damage, chance)
    if sent.raw is None and sent.parts is not None:
        return _form(sent, files, damage, chance)
    return _bytes(sent, files, damage, chance)


def _json(sent: Sent, files: Sequence[bytes], damage: Damage, chance: random.Random) -> Sent:
    fields: dict[str, Any] = json.loads(json.dumps(sent.fields))
    match chance.randrange(8):
        case 0 if "image" in fields:
            fields["image"] = base64.b64encode(damage(chance.choice(files), chance)).decode()
        case 1:
            # The same field twice: the text of one object goes on with another's.
            first = json.dumps(fields)[:-1]
            return replace(
                sent, raw=f"{first}, {json.dumps({chance.choice(list(fields)): chance.choice(VALUES)})[1:]}".encode()
            )
        case 2:
            encoding = chance.choice(("utf-8", "utf-16", "utf-32", "utf-8-sig", "latin-1", "utf-7"))
            errors = "surrogatepass" if encoding[:5] in ("utf-8", "utf-1", "utf-3") else "replace"
            text = json.dumps({**fields, "query": chance.choice(("é", "\ud800"))}, ensure_ascii=False)
            return replace(sent, raw=text.encode(encoding, errors))
        case 3:
            return replace(
                sent, raw=chance.choice((b"[" * 50_000, b'{"a":' * 50_000, b"null", b"[]", b'"', b"1" * 9000))
            )
        case 4:
            fields.pop(chance.choice(list(fields)))
        case _:
            _put(fields, chance)
    return replace(sent, fields=fields)


def _put(value: dict[str, Any] | list[Any], chance: random.Random) -> None:
    """Another value somewhere in an object, or one more."""
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    if isinstance(value, dict) and (not places or chance.random() < 0.1):
        value[chance.choice(("extra", "\ud800", "", "x" * 9000, "__class__"))] = chance.choice(VALUES)
    elif places:
        place: Any = chance.choice(places)
        inner = value[place]
        if isinstance(inner, (dict, list)) and chance.random() < 0.7:
            _put(inner, chance)
        else:
            value[place] = chance.choice(VALUES)


def _form(sent: Sent, files: Sequence[bytes], damage: Damage, chance: random.Random) -> Sent:
    parts = list(sent.parts or ())
    at = chance.randrange(len(parts)) if parts else 0
    match chance.randrange(9) if parts else 0:
        case 0:
            parts.append(part(chance.choice(("query", "extra", "image", "box", "é")), b"1"))
        case 1:
            parts[at:at] = [parts[at]] * chance.choice((1, 40, 200))
        case 2:
            del parts[at]
        case 3:
            parts[at] = (damage(parts[at][0], chance), parts[at][1])
        case 4:
            text = str(chance.choice(VALUES)).encode(errors="surrogatepass")
            parts[at] = (parts[at][0], text)
        case 5:
            inner = form(parts, b"inner")
            parts[at] = (parts[at][0] + b"\r\nContent-Type: multipart/mixed; boundary=inner", inner)
        case 6:
            more = chance.choice((b"Content-Transfer-Encoding: base64", b"X: y\r\n" * 9 + b"X: y", b"X:" + b"y" * 9000))
            parts[at] = (parts[at][0] + b"\r\n" + more, parts[at][1])
        case 7:
            body = form(parts)
            changed = (body[:-4], body.replace(b"\r\n", b"\n"), b"preamble\r\n" + body, body + body, body[:-6])
            return replace(sent, raw=chance.choice(changed))
        case _:
            file = chance.choice((b"", damage(chance.choice(files), chance), chance.choice(files)))
            parts[0] = (parts[0][0], file)
    return replace(sent, parts=tuple(parts))


_WRONGS: tuple[Wrong, ...] = (*(_content,) * 6, *(_bytes,) * 2, *(_header,) * 3, _other_header, _address, _departure)


async def replied(app: ASGIApp, sent: Sent, chance: random.Random) -> Reply:
    """What an application answers, of a body that comes in pieces. Raises what escapes the application."""
    body, pieces = sent.body, list[Message]()
    step = chance.choice((1 << 30, 65536, 4096, max(1, len(body) // 3)))
    for start in range(0, max(1, len(body)), step):
        more = start + step < len(body) or not sent.whole
        pieces.append({"type": "http.request", "body": body[start : start + step], "more_body": more})
    answered, complete = list[Message](), asyncio.Event()

    async def receive() -> Message:
        if pieces:
            return pieces.pop(0)
        if sent.whole:
            await complete.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        answered.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            complete.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": sent.method,
        "scheme": "http",
        "path": sent.path,
        "raw_path": sent.path.encode(),
        "query_string": sent.query_string,
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1:8000"), *sent.headers],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    if not answered:
        return Reply()
    started, *rest = answered
    written = b"".join(each.get("body", b"") for each in rest)
    return Reply(status=started["status"], headers=tuple(started["headers"]), body=written)
