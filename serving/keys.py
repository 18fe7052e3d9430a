"""Who may ask, and how much: the clients' keys. A key is a random secret that its client sends as a bearer token; the
service knows its digest alone."""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from serving.config import Key
from umrg.mistake import Mistake

PREFIX = "mr-"
"""Of every key, so that one that was published by accident is recognised as what it is."""

EVERYBODY = "*"
"""The owner of all requests where nobody needs a key; the name of no key."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BEARER = re.compile(r"bearer +([!-~]+) *", re.IGNORECASE | re.ASCII)


class Refused(Exception):
    """A request that is not let in."""

    def __init__(self, status: int, type: str, detail: str, retry_after: float | None = None) -> None:
        """status: of the response. type: kind of the problem, for programs. detail: a sentence. retry_after: seconds
        after which to try again."""
        super().__init__(detail)
        self.status, self.type, self.detail, self.retry_after = status, type, detail, retry_after


def new_key() -> tuple[str, str]:
    """A new secret, of 256 random bits, and its SHA-256 digest in hexadecimal."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return secret, hashlib.sha256(secret.encode()).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a YAML file, a list with the fields of `Key`. Raises Mistake where it is none."""
    return parse_keys(_read(path), str(path))


def parse_keys(text: str, name: str) -> tuple[Key, ...]:
    """The keys of a YAML text, as `read_keys` returns them. name: of its file, for messages. Raises Mistake."""
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" at line {mark.line + 1}"
        raise Mistake(f"{name} is not YAML{place}; `medreasoner key` writes a key as it should be") from None
    if not isinstance(entries, list) or not entries:
        raise Mistake(f"{name} holds no list of keys; `medreasoner key NAME --file {name}` writes the first")
    keys = tuple(_key(entry, f"{name}, key {number}") for number, entry in enumerate(entries, start=1))
    check_distinct(keys, name)
    return keys


def entry(name: str, sha256: str) -> str:
    """A key as a line of YAML, for the list in a file. Raises Mistake for what is no name."""
    if _NAME.fullmatch(name) is None:
        raise Mistake("a key's name has up to 64 letters, digits, dots, underscores and hyphens; give another")
    fields = yaml.safe_dump({"name": name, "sha256": sha256}, default_flow_style=True, sort_keys=False, width=1000)
    return f"- {fields}"


def add_key(path: Path, line: str) -> None:
    """Add a line of `entry` to a file of keys, of which the rest stays as it is. Raises Mistake, and leaves the file
    alone, where it would not be one of `read_keys` then."""
    before = _read(path) if path.exists() else ""
    added = line if not before or before.endswith("\n") else f"\n{line}"
    try:
        parse_keys(before + added, str(path))
    except Mistake as error:
        raise Mistake(f"{error} (nothing was added)") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    # Appended, so that the file keeps its owner, rights and links.
    with path.open("a", encoding="utf-8") as opened:
        opened.write(added)


def check_distinct(keys: Sequence[Key], where: str) -> None:
    """Raise Mistake where two keys have one name or one digest. where: what holds them, for the message."""
    names, digests = [key.name for key in keys], [key.sha256 for key in keys]
    for key in keys:
        if names.count(key.name) > 1:
            raise Mistake(f"{where}: two keys are named {key.name}; rename or remove one of them")
        if digests.count(key.sha256) > 1:
            raise Mistake(f"{where}: {key.name} and another are the same key; make one for each client")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise Mistake(f"{path} cannot be read ({reason}); give a file with the keys of clients") from None


def _key(entry: Any, where: str) -> Key:
    if not isinstance(entry, dict):
        raise Mistake(f"{where} has no fields; give it a name and the sha256 of its secret")
    if str(entry.get("sha256")).startswith(PREFIX):
        raise Mistake(f"{where}: sha256 is the key itself, which belongs to its client alone; make a new key")
    try:
        return Key.model_validate(entry)
    except ValidationError as error:
        # The values are left out: they may be what should be kept secret.
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise Mistake(f"{where}: {faults}") from None


@dataclass
class _Account:
    """What a key has used. Its bucket fills with a token each time that another request may be sent."""

    per_minute: int
    concurrent: int
    tokens: float
    filled: float
    """The clock's time at which `tokens` was right."""
    ongoing: int = 0

    def fill(self, now: float) -> None:
        self.tokens = min(float(self.per_minute), self.tokens + (now - self.filled) * self.per_minute / 60)
        self.filled = now

    def take(self) -> None:
        """Count a request in. Raises Refused where a limit is reached."""
        if self.ongoing >= self.concurrent:
            raise Refused(429, "rate_limited", "this key has as many requests under way as it may; wait for one", 1.0)
        if self.tokens < 1:
            wait = (1 - self.tokens) * 60 / self.per_minute
            raise Refused(429, "rate_limited", "this key has sent as many requests as it may; try again later", wait)
        self.tokens -= 1
        self.ongoing += 1


class Doorkeeper:
    """Lets requests in by their keys, as many of each key as it may send: `per_minute` at once and then as fast as they
    come back over the minute, `concurrent` at a time. For one event loop."""

    def __init__(
        self, keys: Sequence[Key] | None, *, sharers: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """keys: None where nobody needs one. sharers: how many doorkeepers there are; each grants its share of a key's
        limits, rounded up. clock: seconds. Raises Mistake for two keys of one name."""
        self._sharers, self._clock = sharers, clock
        self._keys: tuple[Key, ...] = ()
        self._accounts: dict[str, _Account] = {}
        self.needs_key = True
        """Whether a request needs a key; where none does, a browser's requests need another protection."""
        self.replace(keys)

    def replace(self, keys: Sequence[Key] | None) -> None:
        """Exchange the keys; what those have used whose names stay remains counted. Requests under way go on. Raises
        Mistake for two keys of one name, and keeps the old ones."""
        check_distinct(keys or (), "the service's keys")
        self._accounts = {key.name: self._account(key) for key in keys or ()}
        self._keys = tuple(keys or ())
        self.needs_key = keys is not None

    @contextmanager
    def admit(self, authorization: str | None) -> Iterator[str]:
        """Let a request in until the context ends, and yield whose it is: the key's name, or EVERYBODY.

        authorization: the header of that name. Raises Refused, with 401 for no key or an unknown one, and with 429 and
        the seconds to wait where the key has reached a limit."""
        if not self.needs_key:
            yield EVERYBODY
            return
        key = self._identified(authorization)
        account = self._accounts[key.name]
        account.fill(self._clock())
        account.take()
        try:
            yield key.name
        finally:
            account.ongoing -= 1

    def _identified(self, authorization: str | None) -> Key:
        token = bearer_token(authorization)
        if token is None:
            raise Refused(401, "unauthorized", "send a key in the header `Authorization: Bearer KEY`")
        digest = hashlib.sha256(token.encode()).hexdigest()
        # All are compared, so that the time tells neither whether nor where one was found.
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        if not found:
            raise Refused(401, "unauthorized", "this key is not known here; ask for one that is")
        return found[0]

    def _account(self, key: Key) -> _Account:
        per_minute, concurrent = -(-key.per_minute // self._sharers), -(-key.concurrent // self._sharers)
        account = self._accounts.get(key.name)
        if account is None:
            return _Account(per_minute, concurrent, tokens=float(per_minute), filled=self._clock())
        account.fill(self._clock())
        account.per_minute, account.concurrent = per_minute, concurrent
        account.tokens = min(account.tokens, float(per_minute))
        return account


def bearer_token(authorization: str | None) -> str | None:
    """The token of an Authorization header with the scheme Bearer, in any case; None for all else."""
    found = _BEARER.fullmatch(authorization or "")
    return None if found is None else found[1]
