"""Requests as they come: a form with a file, or JSON with base64."""

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from umrg.mistake import Mistake

M = TypeVar("M", bound=BaseModel)
_FIELDS, _FIELD_BYTES = 32, 1 << 20
_LARGE = 1 << 20
_NUMBERS = 10_000
"""Characters of numbers in a form's field: more than the most points need."""
_CHARSETS = frozenset({b"utf-8", b"utf8"})
_SEPARATORS, _VALUES = b",[{", 20_000
"""What stands before each value of JSON but the first of an object, and how many of them, or of such characters in
texts, a request has at most: a value costs a hundred times its bytes, and a fault in it a thousand times."""
_BOUNDARIES = 100
"""How often a form's boundary occurs at most. There are fewer parts; what looks like one slows the parser down."""


class _InMemory(MultiPartParser):
    """Keeps files out of the temporary folder: they are patients', and the guard bounds their size."""

    spool_max_size = 1 << 40


async def read(request: Request, model: type[M], *, parts: frozenset[str] = frozenset()) -> tuple[bytes | None, M]:
    """The image file and the fields of a request. parts: the fields that a form writes as numbers between commas, or
    as several of them between spaces or semicolons. Raises RequestValidationError, Mistake, or HTTPException for
    another type of content."""
    kind = media_type(request)
    if kind == "application/json":
        parsed = await read_json(request, model)
        text = getattr(parsed, "image", None)
        return (None if text is None else await from_base64(text)), parsed
    if kind != "multipart/form-data":
        raise HTTPException(415, "send a form (multipart/form-data) or JSON (application/json)")
    data, fields = await _form(request)
    values = {name: _numbers(name, text) if name in parts else text for name, text in fields.items()}
    return data, _validated(model, values)


async def read_json(request: Request, model: type[M]) -> M:
    """The fields of a request in JSON. Raises as `read` does."""
    if media_type(request) != "application/json":
        raise HTTPException(415, "send JSON (application/json)")
    body = await request.body()
    if sum(body.count(each) for each in _SEPARATORS) > _VALUES:
        raise Mistake(f"the JSON has more than {_VALUES} values or commas; send no more than the fields need")
    return _validated(model, body)


def media_type(request: Request) -> str:
    """Of a request's body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def from_base64(text: str) -> bytes:
    """Bytes written in base64. Raises ValueError for anything else."""
    try:
        # Off the event loop, where it would hold up others.
        if len(text) > _LARGE:
            return await asyncio.to_thread(base64.b64decode, text, validate=True)
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Mistake("the image is not in base64; encode the file's bytes, without line breaks") from None


async def _form(request: Request) -> tuple[bytes | None, dict[str, str]]:
    stream = _bounded(request.stream(), _boundary(request.headers["content-type"]))
    parser = _InMemory(request.headers, stream, max_files=1, max_fields=_FIELDS, max_part_size=_FIELD_BYTES)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Mistake(f"the form cannot be read ({error.message.rstrip('.')}); send one image file and text") from None
    data, fields = None, {}
    for name, value in form.multi_items():
        if name in fields or (name == "image" and data is not None):
            raise Mistake("the form has a field more than once; send one of each")
        if isinstance(value, UploadFile):
            if name != "image":
                raise Mistake("the form has a file that is not called image; send the image file by that name")
            data = await value.read()
        else:
            fields[name] = value
    return data, fields


def _boundary(content_type: str) -> bytes:
    """What stands between a form's parts."""
    _, options = parse_options_header(content_type)
    # Python has codecs that never end, and such that give no text.
    if options.get(b"charset", b"utf-8").lower() not in _CHARSETS:
        raise HTTPException(415, "send the form's text in UTF-8, without a charset in the Content-Type header")
    if not options.get(b"boundary"):
        raise Mistake("the form has no boundary; let the client make the Content-Type header")
    return b"--" + options[b"boundary"]


async def _bounded(stream: AsyncIterator[bytes], boundary: bytes) -> AsyncGenerator[bytes, None]:
    """A form's bytes, as long as they have no more boundaries than a form has."""
    found = 0
    async for chunk in stream:
        found += chunk.count(boundary)
        if found > _BOUNDARIES:
            raise Mistake("the form has too many parts; send one image file and the fields")
        yield chunk


def _numbers(name: str, text: str) -> list[Any]:
    """`1,2,3,4` as numbers, and `1,2 3,4` or `1,2;3,4` as pairs."""
    if len(text) > _NUMBERS:
        raise Mistake(f"{name} is too long; write at most 64 points, with commas, and apart by spaces")
    try:
        groups = [[float(number) for number in group.split(",")] for group in re.split(r"[;\s]+", text) if group]
    except ValueError:
        raise Mistake(f"{name} cannot be read; write numbers with commas, and points apart by spaces") from None
    return groups if name == "points" else [number for group in groups for number in group]


def _validated(model: type[M], given: bytes | Mapping[str, Any]) -> M:
    try:
        if isinstance(given, bytes):
            # Unlike a form's texts, JSON has types.
            return model.model_validate_json(given, strict=True)
        return model.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_input=False)) from None
