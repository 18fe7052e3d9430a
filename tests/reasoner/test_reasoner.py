"""The reasoner's folder, its prompt, and what is said of folders that are none."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from learner.sft import reference_branches
from phantoms import rows
from reasoner.model import Reasoner, load_reasoner
from reasoner.prompter import load_prompter
from umrg.answers import TAGS, parse_answer
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.frames import Size
from umrg.prompts import PromptSpec, PromptStyle, prompt_messages

TINY = Path(__file__).parents[2] / "models" / "tiny-reasoner"


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return load_reasoner(TINY)


@pytest.mark.parametrize("style", PromptStyle)
@pytest.mark.parametrize("shape", [(224, 224), (101, 333), (840, 840)])
def test_a_prompt_is_what_the_whole_processor_makes_of_it(reasoner, style, shape):
    asked = replace(reasoner, prompt=reasoner.prompt.but(style=style))
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    encoded = asked.encode("Which <|image_pad|> organ makes {bile}?", asked.encode_image(image))
    messages = prompt_messages("Which organ makes {bile}?", asked.prompt)
    text = asked.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    whole = asked.processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt")
    assert encoded.token_ids.tolist() == whole["input_ids"][0].tolist()
    assert torch.equal(encoded.image.pixel_values, whole["pixel_values"])
    assert encoded.image.grid_thw.tolist() == whole["image_grid_thw"].tolist()


def test_frames_are_those_of_the_processor(reasoner):
    frames = reasoner.encode_image(np.zeros((101, 333, 3), dtype=np.uint8)).frames
    assert frames.original == Size(333, 101)
    assert frames.model == Size(336, 112)


def test_digits_stand_alone(reasoner):
    tokens = reasoner.processor.tokenizer.tokenize("[123,45]")
    assert [token for token in tokens if token.isdigit()] == list("12345")


def test_a_saved_reasoner_is_loaded_again(reasoner, tmp_path):
    reasoner.save(tmp_path)
    again = load_reasoner(tmp_path)
    assert again.prompt == reasoner.prompt
    image = np.zeros((112, 112, 3), dtype=np.uint8)
    prompts = [r.encode("What?", r.encode_image(image)) for r in (reasoner, again)]
    assert reasoner.generate(prompts[:1], max_tokens=8) == again.generate(prompts[1:], max_tokens=8)


def test_batched_generation_equals_single(reasoner):
    rng = np.random.default_rng(1)
    prompts = [
        reasoner.encode(query, reasoner.encode_image(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)))
        for query in ("What?", "Which organ makes the bile that helps to digest fat?")
    ]
    single = [reasoner.generate([prompt], max_tokens=60)[0] for prompt in prompts]
    assert reasoner.generate(prompts, max_tokens=60) == single


def _with_opening(tmp_path: Path, opening: str) -> Path:
    """The tiny reasoner, with a chat template that begins each answer itself."""
    folder = _copy(tmp_path)
    path = folder / "chat_template.jinja"
    template = path.read_text()
    header = "<|im_start|>assistant\n{% endif %}"
    assert header in template
    path.write_text(template.replace(header, f"<|im_start|>assistant\n{opening}{{% endif %}}"))
    return folder


@pytest.mark.parametrize("opening", ["", "<think>", "<think>\n", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("style", PromptStyle)
def test_what_the_template_writes_of_an_answer_is_its_opening(tmp_path, opening, style):
    prompter = load_prompter(_with_opening(tmp_path, opening), PromptSpec(style=style))
    assert prompter.opening == opening
    assert prompter.chat_text("Does <think> count?").endswith("assistant\n" + opening)
    assert prompter.completion_text([*prompter.processor.tokenizer("so")["input_ids"]]) == f"{opening}so"


@pytest.fixture
def sample(tmp_path):
    write_rows(tmp_path / "phantom.parquet", rows(1, seed=6, modalities=["CT"]))
    return Dataset.open(tmp_path / "phantom.parquet")[0]


def test_a_folder_whose_template_opens_the_thoughts_answers_as_the_plain_one(reasoner, sample, tmp_path):
    opened = load_reasoner(_with_opening(tmp_path, "<think>"))
    texts = [
        each.generate([each.encode(sample.query, each.encode_image(sample.image()))], max_tokens=160)[0]
        for each in (reasoner, opened)
    ]
    assert texts[0] == texts[1] and parse_answer(texts[0]).well_formed()


def test_a_folder_whose_template_opens_the_thoughts_learns_as_the_plain_one(reasoner, sample, tmp_path):
    opened = load_reasoner(_with_opening(tmp_path, "<think>"))
    plain, found = (reference_branches(each, [sample]) for each in (reasoner, opened))
    assert torch.equal(
        torch.cat([plain.prefix.token_ids, *plain.branches]), torch.cat([found.prefix.token_ids, *found.branches])
    )
    assert len(found.scored[0]) == len(plain.scored[0]) - 1, "the tag stands in the prompt, and is not learnt"


def test_what_is_left_to_write_does_not_repeat_the_opening(reasoner, tmp_path):
    thinking, silent = "<think>so</think><answer>{}</answer>", "<answer>{}</answer>"
    opened = load_prompter(_with_opening(tmp_path / "opened", "<think>\n"))
    closed = load_prompter(_with_opening(tmp_path / "closed", "<think></think>"))

    def written(prompter, text):
        return prompter.processor.tokenizer.decode(prompter.completion_ids(text))

    assert written(reasoner, thinking) == f"{thinking}<|im_end|>"
    assert written(opened, thinking) == "so</think><answer>{}</answer><|im_end|>"
    assert written(closed, silent) == f"{silent}<|im_end|>"
    with pytest.raises(ValueError, match="opens <think> itself; set think=true"):
        opened.completion_ids(silent)
    with pytest.raises(ValueError, match="closes an empty <think> itself; set think=false"):
        closed.completion_ids(thinking)


def test_tags_that_a_tokenizer_calls_special_are_kept(tmp_path):
    folder = _copy(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tags = [token for token in tokenizer["added_tokens"] if token["content"] in TAGS]
    assert len(tags) == 4
    for tag in tags:
        tag["special"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    prompter = load_prompter(folder)
    text = "<think>so</think><answer>{}</answer>"
    ids = prompter.completion_ids(text).tolist()
    assert prompter.processor.tokenizer.decode(ids, skip_special_tokens=True) == "so{}"
    assert prompter.completion_text(ids) == text


def _copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a model folder"):
        load_reasoner(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="cannot be loaded as a reasoner"):
        load_reasoner(tmp_path)


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer's"):
        load_prompter(tmp_path / "model")


def test_a_processor_that_does_not_fit_is_refused(tmp_path):
    folder = _copy(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    _edit(folder / "config.json", vision_config={**config["vision_config"], "patch_size": 16})
    with pytest.raises(ValueError, match="the model expects"):
        load_reasoner(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}, r"lack .*layers\.4"),
        ({"num_hidden_layers": 5}, "num_hidden_layers"),
        ({"intermediate_size": 512}, "mismatch"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, said):
    folder = _copy(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    _edit(folder / "config.json", text_config={**config["text_config"], **change})
    with pytest.raises(ValueError, match=said):
        load_reasoner(folder)
