"""One image, from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.cli import TINY_REASONER, main
from learner.reasoner import Reasoner, load_prompter
from umrg.phantoms import draw
from umrg.sample import decode_image, decode_mask, encode_png


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "chest.png"
    phantom = draw("X-ray", np.random.default_rng(3))
    path.write_bytes(encode_png(phantom.image))
    return path


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["medreasoner", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_an_answer_is_printed_and_its_pictures_are_saved(monkeypatch, capsys, tmp_path, image):
    code = run(monkeypatch, "ground", str(image), "Which organ pumps the blood?", "--out", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert code == 0
    assert "reasoning" in printed and "box" in printed and "points" in printed
    record = json.loads((tmp_path / "out" / "chest.json").read_text())
    x1, y1, x2, y2 = record["bbox"]
    assert x1 <= x2 and y1 <= y2 and len(record["points"]) == 2 and record["reasoning"]
    mask = decode_mask((tmp_path / "out" / "chest.mask.png").read_bytes(), "mask")
    overlay = decode_image((tmp_path / "out" / "chest.overlay.png").read_bytes(), "overlay")
    assert mask.shape == (224, 224) and mask.any()
    assert (overlay != np.asarray(Image.open(image))).any()


def test_a_question_is_asked_in_the_words_of_a_template(monkeypatch, tmp_path, image):
    asked = []
    monkeypatch.setattr(Reasoner, "generate", lambda reasoner, prompts, **_: asked.extend(prompts) or ["no answer"])
    (tmp_path / "own.txt").write_text("Bitte: {query}")
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "ground", str(image), "Which organ?", "--prompt", "own.txt", "--out", "out")
    (prompt,) = asked
    assert "Bitte: Which organ?" in load_prompter(TINY_REASONER).processor.tokenizer.decode(prompt.token_ids)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.png", "What?"], "none.png is not a file"),
        (["text.png", "What?"], "cannot be decoded"),
        (["IMAGE", "<|image_pad|>"], "the query is empty"),
        (["IMAGE", "What?", "--model", "."], "is not a model folder"),
        (["IMAGE", "What?", "--prompt", "fulll"], "prompt: there is no file 'fulll'; did you mean 'full'?"),
        (
            ["IMAGE", "What?", "--prompt", "text.png"],
            "text.png: a template has {query} exactly once, and this has it no",
        ),
        (["IMAGE", "What?", "--expert", "tinny"], "the nearest expert is 'tiny'"),
        (["IMAGE", "What?", "--expert", "sam_vit_b"], "needs its weights"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, image, arguments, said):
    (tmp_path / "text.png").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    given = [str(image) if argument == "IMAGE" else argument for argument in arguments]
    assert run(monkeypatch, "ground", *given, "--out", "out") == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1
    assert not Path("out").exists()
