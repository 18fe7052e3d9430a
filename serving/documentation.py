"""What OpenAPI says of the routes beyond their types, and the page at /docs, which needs no script."""

import base64
import copy
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import jinja2
from fastapi import FastAPI
from pydantic import BaseModel

from serving.api import Problem
from serving.chat import ChatRequest

_FOLDER = Path(__file__).parent
STYLE = (_FOLDER / "documentation.css").read_text()
_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
"""A gray PNG of one pixel, for the examples."""
_IMAGE = base64.b64encode(_PIXEL).decode()

GROUND = {
    "a query": {"image": _IMAGE, "query": "Which organ would be enlarged in long-standing alcohol use?"},
    "a vote of five samples": {"image": _IMAGE, "query": "Where is bile stored?", "samples": 5, "seed": 1},
    "a CT of 16 bits": {"image": _IMAGE, "query": "Which organ pumps the blood?", "window": "40,400"},
}
SEGMENT = {
    "a box": {"image": _IMAGE, "box": [0, 0, 1, 1]},
    "points, one of them outside": {"image": _IMAGE, "points": [[0, 0], [1, 1]], "labels": [1, 0]},
    "an image sent before": {"image_id": "0" * 32, "box": [0, 0, 1, 1]},
}
CHAT: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": f"#/components/schemas/{ChatRequest.__name__}"},
                "examples": {
                    "a query": {
                        "value": {
                            "model": "tiny-reasoner",
                            "messages": [
                                {
                                    "role": "user",
                                    "content": [
                                        {
                                            "type": "image_url",
                                            "image_url": {"url": f"data:image/png;base64,{_IMAGE}"},
                                        },
                                        {"type": "text", "text": "Which organ pumps the blood?"},
                                    ],
                                }
                            ],
                            "temperature": 0,
                        }
                    }
                },
            }
        },
    }
}
OPEN: dict[str, Any] = {"security": []}
"""Of a route that needs no key."""
PICTURE: dict[str, Any] = {"type": "string", "format": "binary"}
EVENT: dict[str, Any] = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
"""A server-sent event."""
_KEY = "key"
_NUMBER = r"-?[0-9]{1,6}(\.[0-9]{1,3})?"
_TEXTS = {
    "box": {"pattern": f"^{_NUMBER}(,{_NUMBER}){{3}}$", "examples": ["10,20,110,90"]},
    "points": {"pattern": f"^{_NUMBER},{_NUMBER}([; ]{_NUMBER},{_NUMBER}){{0,63}}$", "examples": ["30,40 50,60"]},
    "labels": {"pattern": "^[01](,[01]){0,63}$", "examples": ["1,0"]},
}
"""What a form writes of numbers: with commas, and points apart by spaces or semicolons."""
_PROBLEMS = {
    400: "What was sent cannot be used; the detail says what to change.",
    401: "There is no key, or it is unknown.",
    403: "The request comes from another site's page.",
    404: "The image is not kept any more; send it again.",
    406: "None of the media types in Accept is made here.",
    408: "The request took too long to arrive.",
    413: "The request is too large.",
    415: "The request is neither a form nor JSON.",
    422: "A field is missing or has a value that it cannot have.",
    429: "Too many requests; Retry-After says when to try again.",
    500: "A fault of the service; its log names it by the request's id.",
    503: "A replica ended; Retry-After says when to try again.",
    504: "There was no answer in time.",
}


def body(json: type[BaseModel], form: type[BaseModel], examples: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's `requestBody` of a route that takes JSON or a form with the file `image`."""
    content = {
        "application/json": {
            "schema": _schema(json),
            "examples": {name: {"value": value} for name, value in examples.items()},
        },
        "multipart/form-data": {"schema": _as_form(_schema(form))},
    }
    return {"requestBody": {"required": True, "content": content}}


def _as_form(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a form: it has a file and texts, and no null."""
    fields: dict[str, dict[str, Any]] = {"image": {"type": "string", "format": "binary"}}
    for name, field in schema["properties"].items():
        if name in _TEXTS:
            fields[name] = {"type": "string", "description": field["description"], **_TEXTS[name]}
        elif name not in fields:
            some = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
            kept = {key: value for key, value in field.items() if not (some and key in ("anyOf", "default"))}
            fields[name] = {**kept, **(some[0] if some else {})}
    return {**schema, "properties": fields}


def responses(media: Mapping[str, dict[str, Any]], *, missing: Set[int]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` of a route that answers JSON, or other media, with their schemas, where a request asks for
    them. missing: statuses that it never has."""
    other = {kind: {"schema": schema} for kind, schema in media.items()}
    answers: dict[int | str, dict[str, Any]] = {
        200: {"content": other},
        204: {"description": "There is no mask to draw a picture of."},
    }
    return {status: told for status, told in {**answers, **problems(*_PROBLEMS)}.items() if status not in missing}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` of statuses that come with a Problem."""
    return {status: {"model": Problem, "description": _PROBLEMS[status]} for status in statuses}


def document(api: FastAPI) -> dict[str, Any]:
    """The whole OpenAPI document: that of the routes, and what FastAPI does not learn from them."""
    found = copy.deepcopy(api.openapi())
    components = found["components"]
    chat = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    components["schemas"] |= {**chat.pop("$defs"), ChatRequest.__name__: chat}
    components["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
    found["security"] = [{_KEY: []}]
    return found


def page(openapi: dict[str, Any]) -> str:
    """The page of the interface: routes, fields, examples, in HTML alone."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("documentation.html").render(openapi=openapi)


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema in one piece: no model here refers to another."""
    schema = copy.deepcopy(model.model_json_schema())
    assert "$defs" not in schema, f"{model.__name__} refers to other models"
    return schema
