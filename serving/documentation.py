"""What OpenAPI says of the routes beyond their types, and the page at /docs, which needs no script."""

import base64
import copy
from pathlib import Path
from typing import Any

import jinja2
from pydantic import BaseModel

from serving.api import Problem

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
        "content": {
            "application/json": {
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
                }
            }
        }
    }
}
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
    of_form = _schema(form)
    of_form["properties"] = {"image": {"type": "string", "format": "binary"}, **of_form["properties"]}
    content = {
        "application/json": {
            "schema": _schema(json),
            "examples": {name: {"value": value} for name, value in examples.items()},
        },
        "multipart/form-data": {"schema": of_form},
    }
    return {"requestBody": {"required": True, "content": content}}


def responses(*media: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` of a route that answers JSON, or other media where Accept asks for them."""
    other: dict[str, Any] = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in media}
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": text} for status, text in _PROBLEMS.items()
    }
    return {200: {"content": other}, 204: {"description": "There is no mask to draw a picture of."}, **problems}


UNREADY: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": _PROBLEMS[status]} for status in (429, 500, 503, 504)
}


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
