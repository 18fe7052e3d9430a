"""Requests as they come: a form with a file, or JSON with base64."""

import asyncio
import base64
import binascii
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from umrg.mistake import Mistake

M = TypeVar("M", bound=BaseModel)
_FIELDS, _FIELD_BYTES = 32, 1 << 20
_LARGE = 1 << 20


class _InMemory(MultiPartParser):
    """Keeps files out of the temporary folder: they are patients', and the guard bounds their size."""

    spool_max_size = 1 << 40


async def read(request: Request, model: type[M], *, parts: frozenset[str] = frozenset()) -> tuple[bytes | None, M]:
    """The image file and the fields of a request. parts: the fields that a form writes as numbers between commas, or
    as several of them between semicolons. Raises RequestValidationError, Mistake, or HTTPException for another type of
    content."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        parsed = _validated(model, await request.body())
        text = getattr(parsed, "image", None)
        return (None if text is None else await from_base64(text)), parsed
    if kind != "multipart/form-data":
        raise HTTPException(415, "send a form (multipart/form-data) or JSON (application/json)")
    data, fields = await _form(request)
    values = {name: _numbers(name, text) if name in parts else text for name, text in fields.items()}
    return data, _validated(model, values)


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
    parser = _InMemory(request.headers, request.stream(), max_files=1, max_fields=_FIELDS, max_part_size=_FIELD_BYTES)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Mistake(f"the form cannot be read ({error.message.rstrip('.')}); send one image file and text") from None
    except KeyError:
        raise Mistake("the form has no boundary; let the client make the Content-Type header") from None
    data, fields = None, {}
    for name, value in form.multi_items():
        if name in fields or (name == "image" and data is not None):
            raise Mistake(f"the form has more than one {name}; send one of each")
        if isinstance(value, UploadFile):
            if name != "image":
                raise Mistake("the form has a file that is not called image; send the image file by that name")
            data = await value.read()
        else:
            fields[name] = value
    return data, fields


def _numbers(name: str, text: str) -> list[Any]:
    """`1,2,3,4` as numbers, and `1,2;3,4` as pairs."""
    try:
        groups = [[float(number) for number in group.split(",")] for group in text.split(";") if group.strip()]
    except ValueError:
        raise Mistake(f"{name} cannot be read; write numbers with commas, and points apart by semicolons") from None
    return groups if name == "points" else [number for group in groups for number in group]


def _validated(model: type[M], given: bytes | Mapping[str, Any]) -> M:
    try:
        if isinstance(given, bytes):
            return model.model_validate_json(given)
        return model.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_input=False)) from None
