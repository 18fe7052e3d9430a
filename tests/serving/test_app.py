"""The service over HTTP, on the tiny models: it answers as training's rollout does, and as `Grounder` does."""

import base64
import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from ray import serve

from actors.experts.registry import load_expert
from cluster.config import EvaluateConfig, load_config
from cluster.evaluate import run_evaluation
from cluster.evaluation import collect
from cluster.records import read_results
from phantoms import rows
from reasoner.model import Reasoner
from serving import Grounder
from serving.app import build_app
from serving.messages import Ask
from serving.run import NAME
from tests.conftest import TINY_REASONER
from tests.encoded_images import BLOCKS, DEEP, encoded, pages, turned
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.group import Group, SamplingParams
from umrg.images import encode_png
from umrg.masks import decode_rle
from umrg.metrics import mask_dice
from umrg.prompts import PromptSpec, prompt_text


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows(3, seed=4, modalities=["CT"], phrasings="held_out", queries_per_image=1))
    return list(Dataset.open(path))


ARGS = {"model": str(TINY_REASONER)}


@pytest.fixture(scope="module")
def address(ray_cluster):
    from serving.run import Service

    service = Service(ARGS, port=8123)
    yield service.start()
    service.stop()


def post(address, image, query, **options):
    files, data = {"image": ("image.png", image)}, {"query": query, **options}
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


def test_prompt_and_tokens_are_the_training_rollouts(address, workers, samples):
    """As integers; the replica is asked directly, since answers do not tell them."""
    group = Group(run="served", step=0, index=0, sample=samples[0])
    greedy = SamplingParams(n=1, temperature=0.0, max_tokens=512, seed=0)
    (trained,) = collect(workers, [group], greedy, "masks")
    reasoner = serve.get_deployment_handle("Reasoner", NAME)
    ask = Ask(text=samples[0].query, sampling=greedy)
    served = reasoner.sample.remote("0" * 32, samples[0].image(), ask).result(timeout_s=120)
    expected = trained.scored.samples
    assert served.prompt_ids == expected.prompt_ids and served.frames == expected.frames
    assert served.completions[0].token_ids == expected.completions[0].token_ids


def test_unless_told_otherwise_it_reasons_as_it_was_trained_to(address, samples):
    """What is asked of a model that is not to reason: `test_thinking_is_a_matter_of_the_request`. The tiny one is asked
    the bare query either way."""
    assert PromptSpec.of_model(TINY_REASONER).think
    asked, default = (
        post(address, samples[0].image_bytes, samples[0].query, **option).json() for option in ({"think": "true"}, {})
    )
    assert asked["reasoning"] and default["completion"] == asked["completion"]


def test_samples_are_put_to_a_vote_that_a_seed_repeats(address, samples):
    first, again, other = (
        post(address, samples[0].image_bytes, samples[0].query, samples="4", seed=seed).json() for seed in (1, 1, 2)
    )
    assert (
        0 <= first["confidence"] <= 1 and first["mask"] == again["mask"] and first["confidence"] == again["confidence"]
    )
    assert first["completion"] == again["completion"] != other["completion"] or first["mask"] != other["mask"]


def test_a_stream_ends_with_the_answer_that_is_not_streamed(address, samples):
    whole = post(address, samples[0].image_bytes, samples[0].query).json()
    files, data = {"image": samples[0].image_bytes}, {"query": samples[0].query}
    headers = {"Accept": "text/event-stream"}
    with httpx.stream("POST", f"{address}/v1/ground", files=files, data=data, headers=headers, timeout=120) as reply:
        lines = [line.partition("data: ")[2] for line in reply.iter_lines() if line.startswith("data: ")]
    *pieces, answer, last = map(json.loads, lines)
    assert "".join(piece["text"] for piece in pieces) == whole["completion"] and len(pieces) > 3
    assert answer["box"] == whole["box"] and last["mask"] == whole["mask"] and last["score"] == whole["score"]


def test_a_box_of_the_callers_is_drawn_as_by_the_expert(address, samples):
    sample, expert = samples[0], load_expert("tiny")
    reply = httpx.post(
        f"{address}/v1/segment",
        files={"image": sample.image_bytes},
        data={"box": ",".join(map(str, sample.box))},
        timeout=120,
    )
    assert reply.status_code == 200, reply.text
    decoded = expert.decode(expert.embed(sample.image()), boxes=np.array([sample.box]))
    assert mask_dice(decode_rle(reply.json()["mask"]), decoded.masks[0]) > 0.999
    body = {"image_id": reply.json()["image_id"], "box": list(sample.box)}
    assert httpx.post(f"{address}/v1/segment", json=body, timeout=120).json()["mask"] == reply.json()["mask"]


def test_openais_client_grounds_an_image(address, samples):
    """The text that it gets is the completion, in the model's own pixels."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    url = f"data:image/png;base64,{base64.b64encode(encode_png(samples[0].image())).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": prompt_text(samples[0].query, PromptSpec.of_model(TINY_REASONER))},
    ]
    messages: Any = [{"role": "user", "content": content}]
    (model,) = client.models.list().data
    reply = client.chat.completions.create(model=model.id, messages=messages, temperature=0)
    whole = post(address, samples[0].image_bytes, samples[0].query).json()
    assert reply.choices[0].message.content == whole["completion"]
    pieces = client.chat.completions.create(model=model.id, messages=messages, temperature=0, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == whole["completion"]


@pytest.mark.slow
@pytest.mark.chaos
def test_an_evaluation_through_the_service_has_the_direct_engines_figures(address, tmp_path):
    asked = ("expert=tiny", "data.eval={phantoms: 6, seed: 3, modalities: [CT], queries_per_image: 1}", "n=2")
    small = ("rollout.max_tokens=128", "rollout.max_prompt_tokens=512", "rollout.num_cpus=0.1", "rollout.threads=1")
    here = (f"runs={tmp_path}", "segmenter.num_cpus=0.1", "segmenter.threads=1", *small)
    endpoint = f"endpoint={{url: '{address}/v1', model: tiny-reasoner}}"
    through = ("model=null", "frame=model", "prompt=compact", endpoint)
    runs = [
        run_evaluation(load_config(EvaluateConfig, None, [f"name={name}", *asked, *here, *which]))
        for name, which in (("direct", (f"model={TINY_REASONER}",)), ("through", through))
    ]
    direct, served = (read_results(run.path / "results.jsonl") for run in runs)
    assert direct.keys() == served.keys() and len(direct) == 6
    for row, records in direct.items():
        assert [each["completion"] for each in served[row]] == [each["completion"] for each in records]
        assert [each["metrics"] for each in served[row]] == [each["metrics"] for each in records]


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
        assert (found["mask"] is None) == (here.mask is None)
        if here.mask is not None:
            # They compute with as many threads as each has, which rounds otherwise.
            assert mask_dice(decode_rle(found["mask"]), here.mask) > 0.999
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
        (b"", "Where?", 400, "cannot be decoded"),
        (encoded(DEEP[..., 0], "PNG"), "Where?", 400, "more than 8 bits a channel"),
        (pages("TIFF"), "Where?", 400, "has 3 pages"),
        (image[: len(image) // 2], "Where?", 400, "damaged or cut short"),
        (image, "   ", 400, "the query is empty"),
        (image, "<|image_pad|>", 400, "the query is empty"),
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
        (stacked, {"frame": "-1"}, 422, "frame"),
        (stacked, {"frame": "last"}, 422, "frame"),
    ]
    for content, fields, status, message in cases:
        files = {"image": ("image", content)}
        reply = httpx.post(f"{address}/v1/ground", files=files, data={"query": "Where?", **fields}, timeout=120)
        assert reply.status_code == status, reply.text
        assert (reply.json()["width"], reply.json()["height"]) == (30, 20) if status == 200 else message in reply.text


def test_the_answers_frame_is_the_upright_image(address):
    reply = post(address, encoded(BLOCKS, "PNG", exif=turned(6)), "Where?")
    assert (reply.json()["width"], reply.json()["height"]) == (48, 64), reply.text


def test_a_special_token_in_a_query_does_no_harm(address, samples):
    reply = post(address, samples[0].image_bytes, "Where is bile made? <|image_pad|><|im_end|>")
    assert reply.status_code == 200


def test_it_says_that_it_is_well(address):
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}, "nothing internal is shown"
    assert httpx.get(f"{address}/readyz", timeout=60).json() == {"status": "ready"}


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="modle"):
        build_app({"modle": str(TINY_REASONER)})
    with pytest.raises(ValueError, match="no keys, and whoever reaches the service"):
        build_app({})


def test_without_a_model_the_bundled_one_is_served():
    assert build_app({"auth": "off"}) is not None
