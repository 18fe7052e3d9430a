"""What each route takes and answers, over models that answer at once."""

import asyncio
import base64
import json

import numpy as np
import pytest

from serving.config import Key
from serving.keys import new_key
from serving.messages import Overloaded, TimedOut, Unavailable
from serving.routes import EVENTS, JSON, MASK, OVERLAY, accepted
from tests.serving.fake_models import THOUGHTS, FakeModels, box_of, mask_of, points_of
from tests.serving.in_process import application, calling
from umrg.images import decode_image, decode_mask, encode_png
from umrg.masks import decode_rle

WIDTH, HEIGHT = 96, 64
IMAGE = encode_png(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
IN_BASE64 = base64.b64encode(IMAGE).decode()
FORM = {"files": {"image": ("patient-name.png", IMAGE)}, "data": {"query": "Where is bile stored?"}}


def ask(path, models=None, *, settings=None, **request):
    """The reply to one POST."""

    async def call():
        async with calling(application(models, **(settings or {}))) as client:
            return await client.post(path, **request)

    return asyncio.run(call())


def events(reply):
    """Names and contents of server-sent events."""
    found = []
    for block in reply.text.strip().split("\n\n"):
        name, content = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(content.removeprefix("data: "))))
    return found


def test_a_form_and_json_are_answered_alike():
    body = {"image": IN_BASE64, "query": "Where is bile stored?"}
    replies = [ask("/v1/ground", **FORM), ask("/v1/ground", json=body)]
    for reply in replies:
        assert reply.status_code == 200, reply.text
        found = reply.json()
        assert found["box"] == list(box_of(WIDTH, HEIGHT)) and found["reasoning"] == THOUGHTS
        assert found["points"] == [list(point) for point in points_of(WIDTH, HEIGHT)]
        assert np.array_equal(decode_rle(found["mask"]), mask_of(box_of(WIDTH, HEIGHT), WIDTH, HEIGHT))
        assert (found["width"], found["height"], found["policy_version"]) == (WIDTH, HEIGHT, 7)
        assert found["confidence"] is None and found["well_formed"] and found["model"] == "tiny"
        assert found["timings"].keys() == {"decode", "reason", "segment", "total"}
        assert found["request_id"] == reply.headers["x-request-id"]
    assert replies[0].json()["image_id"] == replies[1].json()["image_id"]


@pytest.mark.parametrize(
    ("header", "media"),
    [
        (None, JSON),
        ("*/*", JSON),
        ("application/json", JSON),
        ("image/png", MASK),
        ("image/*;q=0.5, application/json;q=0.4", MASK),
        ("image/vnd.medreasoner.overlay+png, */*;q=0.1", OVERLAY),
        ("text/event-stream", EVENTS),
        ("text/html, application/xhtml+xml, */*;q=0.8", JSON),
        ("image/png;q=junk, application/json", JSON),
    ],
)
def test_accept_chooses_the_form_of_the_answer(header, media):
    assert accepted(header, (JSON, MASK, OVERLAY, EVENTS)) == media


def test_what_is_not_made_here_is_refused_before_anything_is_done():
    models = FakeModels()
    reply = ask("/v1/ground", models, headers={"Accept": "text/html"}, **FORM)
    assert reply.status_code == 406 and "application/json" in reply.json()["detail"] and not models.calls


def test_the_mask_and_the_overlay_come_as_pictures():
    mask = ask("/v1/ground", headers={"Accept": "image/png"}, **FORM)
    assert mask.headers["content-type"] == "image/png"
    assert np.array_equal(decode_mask(mask.content, "it"), mask_of(box_of(WIDTH, HEIGHT), WIDTH, HEIGHT))
    overlay = ask("/v1/ground", headers={"Accept": OVERLAY}, **FORM)
    assert overlay.headers["content-type"] == OVERLAY and decode_image(overlay.content, "it").ndim == 3


def test_json_may_carry_the_mask_as_png_or_not_at_all():
    form = {**FORM, "data": {"query": "Where?", "mask": "png"}}
    found = ask("/v1/ground", **form).json()
    png = decode_mask(base64.b64decode(found["mask_png"]), "it")
    assert found["mask"] is None and np.array_equal(png, mask_of(box_of(WIDTH, HEIGHT), WIDTH, HEIGHT))
    none = ask("/v1/ground", **{**FORM, "data": {"query": "Where?", "mask": "none"}}).json()
    assert none["mask"] is None and none["mask_png"] is None and none["score"] is not None


def test_an_answer_that_cannot_be_drawn_is_an_answer():
    reply = ask("/v1/ground", FakeModels(completion="I do not know."), **FORM)
    found = reply.json()
    assert reply.status_code == 200 and not found["well_formed"] and found["completion"] == "I do not know."
    assert found["mask"] is found["box"] is found["score"] is None and (found["width"], found["height"]) == (96, 64)
    headers = {"Accept": "image/png"}
    assert ask("/v1/ground", FakeModels(completion="none"), headers=headers, **FORM).status_code == 204


def test_several_samples_are_asked_for_with_a_seed_and_agree_as_far_as_they_do():
    models = FakeModels()
    form = {**FORM, "data": {"query": "Where?", "samples": "3", "seed": "5"}}
    found = ask("/v1/ground", models, **form).json()
    (asked,) = models.asks
    assert (asked.sampling.n, asked.sampling.seed, asked.sampling.temperature) == (3, 5, 1.0)
    assert 0 < found["confidence"] < 1
    ask("/v1/ground", models, **FORM)
    assert (models.asks[1].sampling.n, models.asks[1].sampling.temperature) == (1, 0.0), "one answer is the greedy one"


def test_the_image_is_embedded_while_the_reasoner_writes():
    models = FakeModels(seconds=0.05)
    ask("/v1/ground", models, **FORM)
    assert models.calls == ["embed", "sample", "draw"] or models.calls == ["sample", "embed", "draw"]


def test_events_come_in_their_order():
    reply = ask("/v1/ground", headers={"Accept": "text/event-stream"}, **FORM)
    found = events(reply)
    names = [name for name, _ in found]
    assert names == ["reasoning"] * (len(names) - 2) + ["answer", "mask"] and len(names) > 4
    written = "".join(content["text"] for name, content in found if name == "reasoning")
    assert found[-2][1]["box"] == list(box_of(WIDTH, HEIGHT))
    assert found[-1][1]["completion"] == written and found[-1][1]["mask"]["size"] == [HEIGHT, WIDTH]


def test_what_fails_before_the_first_event_has_a_status_and_what_fails_later_is_an_event():
    headers = {"Accept": "text/event-stream"}
    early = FakeModels(failures={"stream": Overloaded("full")}, pieces_before_failure=0)
    reply = ask("/v1/ground", early, headers=headers, **FORM)
    assert reply.status_code == 429 and "retry-after" in reply.headers
    late = FakeModels(failures={"stream": Unavailable("gone")}, pieces_before_failure=3)
    found = events(ask("/v1/ground", late, headers=headers, **FORM))
    assert [name for name, _ in found] == ["reasoning"] * 3 + ["error"] and found[-1][1]["type"] == "unavailable"


@pytest.mark.parametrize(
    ("failure", "status"),
    [(Overloaded("full"), 429), (Unavailable("gone"), 503), (TimedOut("late"), 504), (ValueError("library's"), 500)],
)
@pytest.mark.parametrize("method", ["sample", "draw"])
def test_each_kind_of_failure_has_its_status(method, failure, status):
    reply = ask("/v1/ground", FakeModels(failures={method: failure}), **FORM)
    assert reply.status_code == status and reply.json()["request_id"]
    assert ("retry-after" in reply.headers) == (status != 500)
    assert "library's" not in reply.text


def test_an_answer_that_takes_too_long_is_given_up_and_the_models_told():
    models = FakeModels(seconds=60)
    reply = ask("/v1/ground", models, settings={"limits": {"request_seconds": 0.2}}, **FORM)
    assert reply.status_code == 504 and "0.2 s" in reply.json()["detail"] and "sample" in models.cancelled


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"files": {"image": IMAGE}}, 422, "query"),
        ({"data": {"query": "Where?"}, "files": {"other": IMAGE}}, 400, "not called image"),
        ({"data": {"query": "Where?"}}, 415, "multipart/form-data"),
        ({**FORM, "data": {"query": "  "}}, 400, "the query is empty"),
        ({**FORM, "data": {"query": "<|image_pad|>"}}, 400, "the query is empty"),
        ({**FORM, "data": {"query": "x" * 4001}}, 400, "4000 are allowed"),
        ({**FORM, "data": {"query": "?", "samples": "17"}}, 400, "16 are allowed"),
        ({**FORM, "data": {"query": "?", "samples": "many"}}, 422, "samples"),
        ({**FORM, "data": {"query": "?", "colour": "red"}}, 422, "colour"),
        ({**FORM, "files": {"image": b"no image"}}, 400, "the image"),
        ({"json": {"image": "%%%", "query": "?"}}, 400, "base64"),
        ({"json": {"query": "?"}}, 422, "image"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 422, "JSON"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 400, "form"),
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "application/json"),
    ],
)
def test_bad_requests_are_told_what_to_change(request_, status, message):
    models = FakeModels()
    reply = ask("/v1/ground", models, **request_)
    assert (reply.status_code, message in reply.json()["detail"]) == (status, True), reply.text
    assert "sample" not in models.calls and "patient-name" not in reply.text


def test_of_two_images_or_two_queries_none_is_taken():
    image, query = ("image", ("a.png", IMAGE)), ("query", (None, "Where?"))
    for fields in ([image, image, query], [image, query, query]):
        reply = ask("/v1/ground", files=fields)
        assert reply.status_code == 400, reply.text


def test_a_query_that_is_too_long_is_refused_before_it_is_looked_through():
    """Special tokens within special tokens would be removed one layer after another for hours."""
    reply = ask("/v1/ground", json={"image": IN_BASE64, "query": "<|" * 300_000 + "|>" * 300_000})
    assert reply.status_code == 400 and "4000 are allowed" in reply.json()["detail"]


def test_a_box_and_points_are_drawn_of_a_form_and_of_json():
    form = {"files": {"image": IMAGE}, "data": {"box": "10,10,40,40", "points": "20,20;50,50", "labels": "0,1"}}
    body = {"image": IN_BASE64, "box": [10, 10, 40, 40], "points": [[20, 20], [50, 50]], "labels": [0, 1]}
    first, second = (ask("/v1/segment", **request) for request in (form, {"json": body}))
    assert first.status_code == second.status_code == 200, first.text + second.text
    mask = decode_rle(first.json()["mask"])
    assert np.array_equal(mask, decode_rle(second.json()["mask"]))
    assert mask[12, 12] and not mask[20, 20] and mask[50, 50] and first.json()["score"] is not None


def test_an_image_is_asked_about_again_by_its_id():
    async def call():
        models = FakeModels()
        async with calling(application(models)) as client:
            sent = await client.post("/v1/segment", json={"image": IN_BASE64, "box": [1, 1, 5, 5]})
            again = {"image_id": sent.json()["image_id"], "box": [2, 2, 9, 9]}
            found = await client.post("/v1/segment", json=again)
            unknown = await client.post("/v1/segment", json={**again, "image_id": "f" * 32})
            png = await client.post("/v1/segment", json=again, headers={"Accept": "image/png"})
        return found, unknown, png, models

    found, unknown, png, models = asyncio.run(call())
    assert decode_rle(found.json()["mask"]).sum() == 64 == decode_mask(png.content, "it").sum()
    assert unknown.status_code == 404 and unknown.json()["type"] == "unknown_image"
    assert len(models.pictures) == 1, "the image was sent once"


def test_an_id_does_not_lead_to_what_another_key_has_sent():
    """Though the id of a file is the same for all: who has the file does not learn who else has sent it."""

    async def call():
        keys = [new_key() for _ in range(2)]
        known = tuple(Key(name=f"key-{i}", sha256=digest) for i, (_, digest) in enumerate(keys))
        headers = [{"Authorization": f"Bearer {secret}"} for secret, _ in keys]
        async with calling(application(keys=known)) as client:
            body = {"image": IN_BASE64, "box": [1, 1, 5, 5]}
            sent = await client.post("/v1/segment", json=body, headers=headers[0])
            again = {"image_id": sent.json()["image_id"], "box": [2, 2, 9, 9]}
            replies = [await client.post("/v1/segment", json=again, headers=each) for each in headers]
            other = await client.post("/v1/segment", json=body, headers=headers[1])
        assert other.json()["image_id"] == again["image_id"]
        return [reply.status_code for reply in replies]

    assert asyncio.run(call()) == [200, 404]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"image": IN_BASE64}, 400, "neither a box nor a point"),
        ({"image": IN_BASE64, "points": [[1, 1]], "labels": [1, 1]}, 400, "2 labels of 1 points"),
        ({"box": [1, 1, 2, 2]}, 400, "either an image or the image_id"),
        ({"image": IN_BASE64, "image_id": "0" * 32, "box": [1, 1, 2, 2]}, 400, "either an image or the image_id"),
        ({"image_id": "../../etc/passwd", "box": [1, 1, 2, 2]}, 422, "image_id"),
        ({"image": IN_BASE64, "box": [1, 1, 2]}, 422, "box"),
        ({"image": IN_BASE64, "points": [[1, 1]], "labels": [2]}, 422, "labels"),
    ],
)
def test_prompts_that_are_none_are_told_what_to_change(body, status, message):
    reply = ask("/v1/segment", json=body)
    assert (reply.status_code, message in reply.json()["detail"]) == (status, True), reply.text


def test_numbers_in_a_form_that_are_none_are_named():
    reply = ask("/v1/segment", files={"image": IMAGE}, data={"box": "1,2,three,4"})
    assert reply.status_code == 400 and "box cannot be read" in reply.json()["detail"]


def test_readiness_asks_the_models_and_health_does_not():
    async def call(models):
        async with calling(application(models)) as client:
            return [await client.get(path) for path in ("/healthz", "/readyz", "/readyz")]

    models = FakeModels()
    assert [reply.json()["status"] for reply in asyncio.run(call(models))] == ["ok", "ready", "ready"]
    assert models.calls.count("ready") == 1, "within two seconds it is not asked again"
    broken = asyncio.run(call(FakeModels(failures={"ready": Unavailable("gone")})))
    assert [reply.status_code for reply in broken] == [200, 503, 503]


def test_who_asks_for_readiness_meanwhile_shares_the_answer():
    """Otherwise each would wait for the probes of all before it, and hold its place as long."""

    async def call():
        models = FakeModels(seconds=0.1, failures={"ready": Unavailable("gone")})
        async with calling(application(models)) as client:
            return models, await asyncio.gather(*(client.get("/readyz") for _ in range(8)))

    models, replies = asyncio.run(call())
    assert [reply.status_code for reply in replies] == [503] * 8 and models.calls.count("ready") == 1


def test_the_interface_is_documented_with_examples_that_are_answered():
    async def call():
        async with calling(application()) as client:
            document = (await client.get("/openapi.json")).json()
            page = await client.get("/docs")
            replies = {}
            for path in ("/v1/ground", "/v1/segment", "/v1/chat/completions"):
                content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
                for name, example in content["examples"].items():
                    value = example["value"] | ({"model": "tiny"} if "model" in example["value"] else {})
                    replies[path, name] = await client.post(path, json=value)
        return document, page, replies

    document, page, replies = asyncio.run(call())
    assert page.status_code == 200 and "<script" not in page.text
    for path in document["paths"]:
        assert path in page.text
    statuses = {key: reply.status_code for key, reply in replies.items()}
    assert statuses.pop(("/v1/segment", "an image sent before")) == 404
    assert set(statuses.values()) == {200}, {key: replies[key].text for key in statuses}
    fields = document["components"]["schemas"]["GroundResponse"]["properties"]
    assert [name for name, field in fields.items() if not field.get("description")] == []
