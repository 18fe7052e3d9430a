"""The OpenAPI document tells the truth: what schemathesis makes of it is answered as the document says."""

import base64

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from schemathesis import checks
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks as openapi_checks

from serving.config import Key
from serving.keys import new_key
from serving.routes import EVENTS, JSON, MASK, OVERLAY
from tests.serving.in_process import application
from tests.serving.test_routes import IMAGE

SECRET, DIGEST = new_key()
AUTHORIZATION = {"Authorization": f"Bearer {SECRET}"}
ACCEPT = (JSON, MASK, OVERLAY, EVENTS, "*/*", "text/html")
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.ignored_auth,
    openapi_checks.allow_header_conformance,
]


def document(models=None):
    """The document, of an application that has one key, which may be used without end."""
    key = Key(name="anna", sha256=DIGEST, per_minute=10**9)
    config = schemathesis.Config.from_dict({"generation": {"mode": "all"}})
    return schemathesis.openapi.from_asgi("/openapi.json", application(models, keys=(key,)), config=config)


schema = document()


@schema.given(accept=st.sampled_from(ACCEPT), pictured=st.booleans(), named=st.booleans())
@schema.parametrize()
@settings(max_examples=60, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_requests_are_answered_as_the_document_says(case, accept, pictured, named):
    if case.meta.generation.mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
        # Text at random is neither an image nor the model's name, and would not get far.
        case.body |= _picture(case) if pictured else {}
        case.body |= {"model": "tiny"} if named and "model" in case.body else {}
    accepted = {"Accept": accept} if case.operation.path in ("/v1/ground", "/v1/segment") else {}
    case.call_and_validate(headers={**AUTHORIZATION, **accepted}, checks=CHECKS)


@schema.parametrize()
@settings(phases=[Phase.explicit], suppress_health_check=list(HealthCheck))
def test_examples_and_what_lies_at_the_bounds_of_fields_are_answered_as_the_document_says(case):
    checked = [*CHECKS, openapi_checks.negative_data_rejection]
    case.call_and_validate(headers=AUTHORIZATION, checks=checked)


def _picture(case):
    encoded = base64.b64encode(IMAGE).decode()
    if case.operation.path == "/v1/chat/completions":
        url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
        return {"messages": [{"role": "user", "content": [url, {"type": "text", "text": "Where is bile stored?"}]}]}
    return {"image": encoded if case.media_type == JSON else IMAGE}
