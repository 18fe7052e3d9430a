"""One image, from the command line and from Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.cli import main
from phantoms import draw
from reasoner.model import Reasoner
from reasoner.prompter import load_prompter
from serving import Grounder
from serving.grounder import check_savable
from tests.conftest import ROOT, TINY_REASONER
from tests.encoded_images import BLOCKS, DEEP, encoded, pages, stack, turned
from umrg.images import decode_image, decode_mask, encode_png
from umrg.windowing import Percentiles, Window

QUERY = "Which organ pumps the blood?"


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
    code = run(monkeypatch, "ground", str(image), QUERY, "--out", str(tmp_path / "out"))
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

    def generate(reasoner, prompts, **_):
        asked.extend(prompts)
        return ["no answer"]

    monkeypatch.setattr(Reasoner, "generate", generate)
    (tmp_path / "own.txt").write_text("Bitte: {query}")
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "ground", str(image), "Which organ?", "--prompt", "own.txt", "--out", "out")
    (prompt,) = asked
    assert "Bitte: Which organ?" in load_prompter(TINY_REASONER).processor.tokenizer.decode(prompt.token_ids)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.png", "What?"], "none.png is not a file"),
        (["text.png", "What?"], "text.png cannot be decoded (unknown format)"),
        (["empty.png", "What?"], "empty.png cannot be decoded (the file is empty)"),
        (["deep.png", "What?"], "deep.png has more than 8 bits a channel (16); window it"),
        (["deep.png", "What?", "--window", "40"], "the window '40' cannot be read; it must be CENTRE,WIDTH"),
        (["deep.png", "What?", "--window", "40,0"], "WIDTH one above 0"),
        (["stack.tif", "What?"], "stack.tif has 3 pages"),
        (["stack.tif", "What?", "--frame", "3"], "stack.tif has 3 pages and no frame 3"),
        (["stack.tif", "What?", "--frame", "-1"], "frames are counted from 0 to 2"),
        ([".", "What?"], ". is not a file"),
        (["/dev/null", "What?"], "/dev/null is not a file"),
        (["/dev/zero", "What?"], "/dev/zero is not a file"),
        (["n" * 300, "What?"], "cannot be read (File name too long)"),
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
    (tmp_path / "empty.png").touch()
    (tmp_path / "deep.png").write_bytes(encoded(DEEP[..., 0], "PNG"))
    (tmp_path / "stack.tif").write_bytes(pages("TIFF"))
    monkeypatch.chdir(tmp_path)
    given = [str(image) if argument == "IMAGE" else argument for argument in arguments]
    assert run(monkeypatch, "ground", *given, "--out", "out") == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1
    assert not Path("out").exists()


def test_a_file_that_may_not_be_read_is_one_line(monkeypatch, capsys, image):
    def refused(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert run(monkeypatch, "ground", str(image), "What?") == 2
    assert capsys.readouterr().err == f"error: {image} cannot be read (Permission denied); give the path of an image\n"


def test_a_folder_that_cannot_be_written_to_is_one_line(monkeypatch, capsys, image):
    assert run(monkeypatch, "ground", str(image), "What?", "--out", "/proc/nowhere") == 2
    error = capsys.readouterr().err.strip()
    assert "error: /proc/nowhere: No such file or directory; give a path" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chest", "chest.json: Is a directory; a folder is in the way"),
        ("n" * 245, "File name too long; give a shorter name"),
    ],
)
def test_what_cannot_be_saved_is_said_before_a_model_is_loaded(monkeypatch, capsys, tmp_path, name, said):
    (tmp_path / f"{name}.png").write_bytes(encode_png(BLOCKS))
    (tmp_path / "out" / "chest.json").mkdir(parents=True)
    monkeypatch.setattr(Grounder, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert run(monkeypatch, "ground", str(tmp_path / f"{name}.png"), "What?", "--out", str(tmp_path / "out")) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.part"))


def test_seeing_whether_files_can_be_saved_leaves_no_trace(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.json").write_text("{}")
    for folder in (tmp_path / "there", tmp_path / "new" / "deep"):
        check_savable(folder, "a")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["there", "a.json"]
    assert (tmp_path / "there" / "a.json").read_text() == "{}"


WHOLE = Percentiles(0, 100).fitted(DEEP[..., 0])


@pytest.mark.parametrize(
    ("file", "options", "picture"),
    [
        (encoded(DEEP[..., 0], "PNG"), ("--window", "-600,140000"), Window(-600, 140000).apply(DEEP[..., 0])),
        (encoded(DEEP[..., 0], "PNG"), ("--window", "p0,p100"), WHOLE.apply(DEEP[..., 0])),
        (pages("TIFF"), ("--frame", "2"), np.asarray(stack()[2])),
        (encoded(BLOCKS, "PNG", exif=turned(6)), (), np.rot90(BLOCKS, -1)),
    ],
    ids=["window", "percentiles", "frame", "orientation"],
)
def test_the_picture_that_is_asked_about_is_the_one_that_is_shown(monkeypatch, tmp_path, file, options, picture):
    (tmp_path / "image").write_bytes(file)
    monkeypatch.setattr(Reasoner, "generate", lambda self, prompts, max_tokens: ["no answer"])
    assert run(monkeypatch, "ground", str(tmp_path / "image"), "What?", *options, "--out", str(tmp_path)) == 1
    shown = decode_image((tmp_path / "image.overlay.png").read_bytes(), "overlay")
    assert np.array_equal(shown, picture if picture.ndim == 3 else np.stack([picture] * 3, axis=-1))


def test_of_an_answer_that_loops_the_beginning_is_shown(monkeypatch, capsys, tmp_path, image):
    looping = "<think>" + "again " * 2000
    monkeypatch.setattr(Reasoner, "generate", lambda self, prompts, max_tokens: [looping])
    assert run(monkeypatch, "ground", str(image), "What?", "--out", str(tmp_path)) == 1
    printed = capsys.readouterr().out
    assert "no usable box and points" in printed and "12007 characters; all of them are in the JSON file" in printed
    assert len(printed) < 600
    assert json.loads((tmp_path / "chest.json").read_text())["completion"] == looping


@pytest.fixture(scope="module")
def grounder():
    return Grounder.load(TINY_REASONER, "tiny")


def test_a_path_a_picture_and_an_array_are_answered_alike(grounder, tmp_path, image):
    with Image.open(image) as picture:
        answers = [grounder.ground(each, QUERY) for each in (image, str(image), picture, np.asarray(picture))]
    first = answers[0]
    assert first.box is not None and first.mask is not None and first.mask.any()
    assert all(other.completion == first.completion for other in answers)
    assert all(np.array_equal(other.mask, first.mask) for other in answers)
    assert first.overlay().shape == first.image.shape and len(first.save(tmp_path, "chest")) == 3


def test_a_picture_is_seen_as_its_file_would_be(monkeypatch, grounder):
    monkeypatch.setattr(Reasoner, "generate", lambda self, prompts, max_tokens: ["no answer"])
    picture = Image.fromarray(BLOCKS)
    picture.getexif().update(turned(6))
    assert np.array_equal(grounder.ground(picture, "What?").image, np.rot90(BLOCKS, -1))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"):
        assert grounder.ground(Image.fromarray(BLOCKS).convert(mode), "What?").image.shape == BLOCKS.shape


def test_a_large_picture_can_be_seen_smaller(monkeypatch, grounder):
    """The answer, in the pixels that the model sees, is scaled back."""
    answer = '<answer>{"bbox": [0, 0, 20, 20], "points_1": [5, 5], "points_2": [15, 15]}</answer>'
    monkeypatch.setattr(Reasoner, "generate", lambda self, prompts, max_tokens: [answer])
    picture = np.zeros((224, 224, 3), dtype=np.uint8)
    small = Grounder.load(TINY_REASONER, "tiny", max_pixels=112 * 112)
    assert grounder.ground(picture, "What?").box == (0, 0, 20, 20)
    assert small.ground(picture, "What?").box == (0, 0, 40, 40)


@pytest.mark.parametrize(
    ("image", "error", "said"),
    [
        (DEEP[..., :3], ValueError, r"uint8 \[H, W, 3\], this one is uint16 \[20, 30, 3\]"),
        (BLOCKS[..., 0], ValueError, r"this one is uint8 \[48, 64\]"),
        (BLOCKS[:0], ValueError, r"this one is uint8 \[0, 64, 3\]"),
        (Image.new("I;16", (30, 20)), ValueError, "more than 8 bits a channel"),
        (Image.new("F", (30, 20)), ValueError, "more than 8 bits a channel"),
        (b"bytes", TypeError, "a path, a PIL image or an array, not bytes"),
        ("none.png", ValueError, "none.png is not a file"),
    ],
    ids=["uint16", "gray", "empty", "I;16", "F", "bytes", "path"],
)
def test_what_is_no_image_is_refused(grounder, image, error, said):
    with pytest.raises(error, match=said):
        grounder.ground(image, "What?")


def test_a_question_longer_than_the_model_reads_is_refused(grounder):
    with pytest.raises(ValueError, match="and the model has 32768 positions; shorten the question"):
        grounder.ground(BLOCKS, "lung " * 40_000)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "nope"}, "the device 'nope' cannot be used"),
        ({"dtype": "float16"}, "a reasoner's dtype is one of float32, bfloat16"),
        ({"expert": "tinny"}, "the nearest expert is 'tiny'"),
        ({"prompt": "fulll"}, "did you mean 'full'"),
        ({"model": "none"}, "none is not a model folder"),
        ({"max_pixels": 100}, "max_pixels is 100, less than one image token's 28x28 px"),
    ],
)
def test_what_cannot_be_loaded_is_named(settings, said):
    with pytest.raises(ValueError, match=said):
        Grounder.load(**{"model": TINY_REASONER, **settings})


def test_the_interface_is_imported_without_torch():
    seen = "import sys, serving; print({'torch', 'transformers', 'ray', 'vllm'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", seen], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert found.stdout == "set()\n", found.stderr
