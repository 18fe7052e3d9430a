"""A user's own term: found by import path, validated at the start, and never a 0 where it fails."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.case import Reference
from rewards.config import RewardConfig
from rewards.scoring import Reward, Scorer
from rewards.user_terms import RewardTermError
from tests.conftest import ROOT
from umrg.answers import parse_answer
from umrg.frames import Size

TERMS = '''
from __future__ import annotations

import numpy as np

from rewards.case import Case


def brevity(case: Case, *, words: float = 10.0, strict: bool = False) -> float:
    """1 for so few words, then falling."""
    return min(1.0, words / max(1, len(case.answer.text.split())))


def single(case: Case) -> float:
    return np.float32(0.5)


def fragile(case: Case) -> float:
    return 0.0 if case.answer.box is None else 1.0 / (case.answer.box[0] - 3)


def unbounded(case: Case) -> float:
    return 0.0 if case.answer.box is None else case.answer.box[0] / 50


def careless(case: Case) -> float:
    return case.answer.box[0] / 1e9


def undefined(case: Case) -> float:
    return float("nan")


def hidden(case: Elsewhere) -> float:
    return 1.0


listed = [1.0]
'''
REFERENCE = Reference(
    box=(0, 0, 100, 100), points=((20, 20), (80, 80)), size=Size(840, 840), name="sample 'a' of x.parquet"
)
WELL_FORMED = '<answer>{"bbox": [%d, 0, 100, 100], "points_1": [20, 20], "points_2": [80, 80]}</answer>'


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch) -> Iterator[Path]:
    """A working directory with the user's package, such as a run starts in."""
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "__init__.py").touch()
    (tmp_path / "my_pkg" / "terms.py").write_text(TERMS)
    (tmp_path / "my_pkg" / "broken.py").write_text("import no_such_library")
    (tmp_path / "my_pkg" / "unfinished.py").write_text("def term(case")
    monkeypatch.chdir(tmp_path)
    # Without "", the directory counts only because the term's path is looked up in it.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]


def score(term: str, text: str) -> Reward:
    return Scorer({f"my_pkg.terms:{term}": 1.0}).score(parse_answer(text), REFERENCE)


def test_a_configuration_names_it_with_its_options() -> None:
    schedule = {"start": 8, "end": 4, "steps": 100}
    config = RewardConfig.model_validate({"terms": [{"name": "my_pkg.terms:brevity", "weight": 2, "words": schedule}]})
    scorer = config.scorer(think=True)
    answer = parse_answer(" ".join(["word"] * 16))
    assert [scorer.score(answer, REFERENCE, step=step).total for step in (0, 100)] == [1.0, 0.5]
    assert scorer.score(answer, REFERENCE).parts == {"my_pkg.terms:brevity": 0.5}
    assert scorer.uses_mask  # it may look at the masks, so they are wanted


def test_numpys_numbers_are_numbers() -> None:
    value = score("single", "").total
    assert (value, type(value)) == (0.5, float)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_pkg.terms:brevity", "cannot be imported .*no_such_pkg.* start where my_pkg lies"),
        ("my_pkg.broken:term", "cannot be imported .*no_such_library"),
        ("my_pkg.unfinished:term", "cannot be imported"),
        (":brevity", "cannot be imported"),
        (".terms:brevity", "cannot be imported"),
        ("my_pkg.terms:brevty", "my_pkg.terms must have a function 'brevty'"),
        ("my_pkg.terms:", "must have a function ''"),
        ("my_pkg.terms:listed", "cannot be called"),
        ("my_pkg.terms:hidden", "signature of .* cannot be read .*Elsewhere"),
        ("my_pkg.terms:careless", "TypeError.*a term must score any answer whatever"),
        ("my_pkg.terms:undefined", "it gave nan, not a finite number"),
    ],
)
def test_what_is_wrong_is_said_at_the_start(path: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RewardConfig.model_validate({"terms": [{"name": path}]})


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match="no option 'word'; did you mean 'words'"):
        Scorer({"my_pkg.terms:brevity": 1.0}, {"my_pkg.terms:brevity": {"word": 3}})


def test_an_exception_in_a_run_names_the_term_and_the_sample() -> None:
    assert score("fragile", WELL_FORMED % 4).total == 1
    with pytest.raises(RewardTermError) as caught:
        score("fragile", WELL_FORMED % 3)
    for part in ("'my_pkg.terms:fragile'", "sample 'a' of x.parquet", "[3, 0, 100, 100]", "ZeroDivisionError"):
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_value_out_of_range_in_a_run_is_an_error() -> None:
    assert score("unbounded", WELL_FORMED % 50).total == 1
    with pytest.raises(RewardTermError, match=r"'my_pkg.terms:unbounded' failed on sample 'a' .* it gave 1.02"):
        score("unbounded", WELL_FORMED % 51)


def test_a_process_in_the_same_working_directory_takes_the_pickled_scorer(package: Path) -> None:
    """What Ray does with a job's working directory: an actor starts in a copy of it and unpickles the scorer there."""
    scorer = Scorer({"my_pkg.terms:brevity": 1.0, "bbox_iou": 1.0}, {"my_pkg.terms:brevity": {"words": 2.0}})
    (package / "scorer.pickle").write_bytes(pickle.dumps(scorer))
    code = (
        "import pickle, sys; sys.path = [p for p in sys.path if p]; "
        "from tests.rewards.test_user_terms import REFERENCE; from umrg.answers import parse_answer; "
        "scorer = pickle.load(open('scorer.pickle', 'rb')); "
        "print(scorer.score(parse_answer('one two three four'), REFERENCE).total)"
    )
    copy = package.rename(package.with_name("elsewhere"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    copy.rename(package)
    assert done.stdout.strip() == "0.5"
