"""The service over HTTP, on the tiny models: it answers as training's rollout does, and as `Grounder` does."""

import httpx
import numpy as np
import pytest
import torch

from cluster.evaluation import collect
from phantoms import rows
from reasoner.model import Reasoner
from serving import Grounder
from serving.app import build_app
from tests.conftest import TINY_REASONER
from tests.encoded_images import BLOCKS, DEEP, encoded, pages, turned
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.group import Group, SamplingParams
from umrg.images import encode_png
from umrg.masks import decode_rle, encode_rle


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows(3, seed=4, modalities=["CT"], phrasings="held_out", queries_per_image=1))
    return list(Dataset.open(path))


@pytest.fixture(scope="module")
def address(ray_cluster):
    from serving.run import Service

    service = Service({"model": str(TINY_REASONER)}, port=8123)
    yield service.start()
    service.stop()


def post(address, image, query):
    files = {"image": ("image.png", image)} if image is not None else None
    data = {"query": query} if query is not None else None
    return httpx.post(f"{address}/v1/ground", files=files, data=data, timeout=120)


def test_a_served_answer_is_the_training_rollouts(address, workers, samples):
    groups = [Group(run="served", step=0, index=i, sample=sample) for i, sample in enumerate(samples)]
    greedy = SamplingParams(n=1, temperature=0.0, max_tokens=512, seed=0)
    for sample, each in zip(samples, collect(workers, groups, greedy, "masks"), strict=True):
        reply = post(address, sample.image_bytes, sample.query)
        assert reply.status_code == 200, reply.text
        found, scored = reply.json(), each.scored.answers[0]
        assert found["completion"] == each.scored.samples.completions[0].text
        assert found["reasoning"] == scored.answer.think
        assert found["box"] == (list(scored.answer.box) if scored.answer.box else None)
        assert found["mask"] == (dict(scored.mask) if scored.mask else None)
        assert (found["width"], found["height"]) == (sample.size.width, sample.size.height)
        if found["mask"]:
            assert decode_rle(found["mask"]).shape == (found["height"], found["width"])


def test_a_served_answer_is_the_grounders(address, samples):
    """vLLM there, transformers here, both in float32; wherever rounding cannot decide between two tokens."""
    grounder = Grounder.load(TINY_REASONER)
    masks = 0
    for sample in samples:
        here = grounder.ground(sample.image(), sample.query)
        logits, _ = answer_logits(grounder.reasoner, sample, here.completion)
        best, second = logits.topk(2, dim=1).values.T
        if (best - second).min() < 1e-3:
            continue
        found = post(address, sample.image_bytes, sample.query).json()
        assert found["completion"] == here.completion and found["reasoning"] == here.reasoning
        assert found["box"] == (list(here.box) if here.box else None)
        assert found["points"] == ([list(point) for point in here.points] if here.points else None)
        assert found["mask"] == (encode_rle(here.mask) if here.mask is not None else None)
        assert found["score"] == pytest.approx(here.score, abs=1e-5)
        masks += here.mask is not None
    assert masks


def answer_logits(reasoner: Reasoner, sample, text):
    """Of each token of a completion the logits, float32 [L, V], and its id, [L]."""
    prompt = reasoner.encode(sample.query, reasoner.encode_image(sample.image()))
    answer = reasoner.completion_ids(text)
    ids = torch.cat([prompt.token_ids, answer])[None]
    with torch.inference_mode():
        logits = reasoner.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == reasoner.image_token_id).int(),
            pixel_values=prompt.image.pixel_values.to(reasoner.model.dtype),
            image_grid_thw=prompt.image.grid_thw,
        ).logits[0, len(prompt.token_ids) - 1 : -1]
    return logits.float(), answer


def log_probs(reasoner: Reasoner, sample, text):
    """Of each token of a completion, float32 [L]."""
    logits, answer = answer_logits(reasoner, sample, text)
    return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


def test_in_bfloat16_the_grounder_finds_the_float32_answer_as_likely(samples):
    """In nats a token, where rounding leaves 0.003. Greedy digits may differ: rounding decides between close ones, on
    each machine otherwise."""
    exact, rounded = (Grounder.load(TINY_REASONER, dtype=dtype) for dtype in ("float32", "bfloat16"))
    for sample in samples:
        answer = exact.ground(sample.image(), sample.query)
        expected, found = (log_probs(each.reasoner, sample, answer.completion) for each in (exact, rounded))
        assert 0 < (found - expected).abs().mean() < 0.05
        written = rounded.ground(sample.image(), sample.query).completion
        logits, tokens = answer_logits(exact.reasoner, sample, written)
        behind = logits.max(dim=1).values - logits.gather(1, tokens[:, None])[:, 0]
        assert behind.max() < 0.25, "no token that bfloat16 chose is far behind the likeliest in float32"


def test_bad_requests_are_told_what_to_change(address, samples):
    image = samples[0].image_bytes
    cases = [
        (b"not an image", "Where?", 400, "cannot be decoded"),
        (b"", "Where?", 400, "cannot be decoded (the file is empty)"),
        (encoded(DEEP[..., 0], "PNG"), "Where?", 400, "more than 8 bits a channel"),
        (pages("TIFF"), "Where?", 400, "has 3 pages"),
        (image[: len(image) // 2], "Where?", 400, "damaged or cut short"),
        (image, "   ", 400, "the query is empty"),
        (image, "<|image_pad|>", 400, "the query is empty"),
        (image, None, 422, "query"),
        (None, "Where?", 422, "image"),
        (encode_png(np.zeros((4, 2000), dtype=np.uint8)), "Where?", 400, "aspect ratio over 200"),
    ]
    for content, query, status, message in cases:
        reply = post(address, content, query)
        assert (reply.status_code, message in reply.json()["detail"]) == (status, True), reply.text


def test_a_window_and_a_frame_may_be_given(address):
    deep, stacked = encoded(DEEP[..., 0], "PNG"), pages("TIFF")
    cases: list[tuple[bytes, dict[str, str], int, str]] = [
        (deep, {"window": "32768,65536"}, 200, ""),
        (deep, {"window": "wide"}, 400, "the window 'wide' cannot be read; it must be CENTRE,WIDTH"),
        (stacked, {"frame": "2"}, 200, ""),
        (stacked, {"frame": "3"}, 400, "has 3 pages and no frame 3"),
        (stacked, {"frame": "-1"}, 400, "frames are counted from 0 to 2"),
        (stacked, {"frame": "last"}, 422, "frame: "),
    ]
    for content, fields, status, message in cases:
        files = {"image": ("image", content)}
        reply = httpx.post(f"{address}/v1/ground", files=files, data={"query": "Where?", **fields}, timeout=120)
        assert reply.status_code == status, reply.text
        assert (reply.json()["width"], reply.json()["height"]) == (30, 20) if status == 200 else message in reply.text


def test_the_answers_frame_is_the_upright_image(address):
    reply = post(address, encoded(BLOCKS, "PNG", exif=turned(6)), "Where?")
    assert (reply.json()["width"], reply.json()["height"]) == (48, 64), reply.text


def test_of_two_images_or_two_queries_none_is_taken(address, samples):
    image, query = ("image", ("a.png", samples[0].image_bytes)), ("query", (None, "Where?"))
    for fields, repeated in (([image, image, query], "image"), ([image, query, query], "query")):
        reply = httpx.post(f"{address}/v1/ground", files=fields, timeout=120)
        assert reply.status_code == 400 and f"more than one {repeated}" in reply.json()["detail"], reply.text


def test_a_special_token_in_a_query_does_no_harm(address, samples):
    reply = post(address, samples[0].image_bytes, "Where is bile made? <|image_pad|><|im_end|>")
    assert reply.status_code == 200


def test_it_says_that_it_is_well(address):
    assert httpx.get(f"{address}/healthz").json()["status"] == "ok"


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="modle"):
        build_app({"modle": str(TINY_REASONER)})
