"""`medreasoner report`: of runs that ended, go on, were killed or were moved, from hand-made folders."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from cluster.commands.report import report
from cluster.comparison import compare
from cluster.config import EvaluateConfig, SftConfig, load_config
from cluster.lease import SILENCE, Holder, Process, lease_path, leased
from cluster.run_folder import RunFolder, begins_anew
from cluster.standing import clock, standing
from tests.conftest import ROOT, TINY_REASONER
from tests.run_folders import drawn_rows, evaluated, trained, tuned
from umrg.mistake import Mistake

PICTURE = "data:image/webp"


@pytest.fixture
def training(tmp_path, demo_config):
    """The configuration of a run whose data lie in a file."""
    drawn_rows(tmp_path / "rows.parquet", 4)
    rows = tmp_path / "rows.parquet"
    return demo_config(f"data.train={rows}", f"data.eval={rows}", f"runs={tmp_path / 'runs'}", "name=trial", "steps=9")


def evaluation(folder, *overrides, name="trial"):
    options = {"model": TINY_REASONER, "data.eval": [folder / "rows.parquet"], "expert": "tiny", "name": name}
    return load_config(EvaluateConfig, None, overrides, {**options, "runs": folder / "runs"})


def moved(run: RunFolder) -> Path:
    """The run's folder copied elsewhere, and all else gone."""
    elsewhere = run.path.parents[1] / "elsewhere" / "copy"
    shutil.copytree(run.path, elsewhere)
    shutil.rmtree(run.path.parent)
    (run.path.parents[1] / "rows.parquet").unlink()
    return elsewhere


def samples(folder):
    return drawn_rows(folder / "rows.parquet", 4)


def test_a_run_that_goes_on_says_so_and_is_not_disturbed(training, tmp_path):
    run = trained(training, samples(tmp_path), steps=5, after=4)
    with leased(run.path) as lease:
        before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
        written = report(run.path)
        assert lease.ours()
        assert all(file.read_bytes() == content for file, content in before.items())
    page = written.path.read_text()
    assert re.search(r"Running, after step 5 of 9, recorded at [\d-]+ [\d:]+ \w+ \(process \d+ on ", page)
    assert "<th>before</th><th>after step 4</th>" in page and "+0.500" in page
    assert page.count(PICTURE) == 8 and written.remarks == []
    assert not list(run.path.rglob(".*.part"))


def test_a_run_of_another_machine_without_a_heartbeat_is_probably_dead(training, tmp_path):
    run = trained(training, samples(tmp_path), steps=2)
    lease = lease_path(run.path)
    process = Process(host="elsewhere", machine="another boot", pid=7, started=7)
    lease.write_text(Holder(id="a", process=process, since="then").model_dump_json())
    assert str(standing(run)).startswith("running, after step 2 of 9")
    long_ago = time.time() - 10 * SILENCE
    os.utime(lease, (long_ago, long_ago))
    before = sorted(run.path.parent.iterdir())
    silent = f"no heartbeat since {clock(long_ago)}, the run is probably dead"
    assert str(standing(run)).startswith(f"{silent}, after step 2 of 9")
    assert sorted(run.path.parent.iterdir()) == before
    assert "No heartbeat since " in report(run.path).path.read_text()


def test_a_damaged_configuration_is_told_in_a_line(training, tmp_path):
    run = trained(training, samples(tmp_path), steps=2)
    (run.path / "config.yaml").write_text("name: [trial")
    for read in (report, lambda path: begins_anew(path, training, resume=True)):
        with pytest.raises(Mistake, match=r"config.yaml is damaged, it is not YAML: .*; mend it"):
            read(run.path)


def test_how_a_run_ended_is_told(training, tmp_path):
    run = trained(training, samples(tmp_path), steps=2)
    assert "No longer running, or copied while it was, after step 2 of 9" in report(run.path).path.read_text()
    run.tell("failed", error="WeightsDiffer: stale")
    page = report(run.path).path.read_text()
    assert "Failed after step 2 of 9" in page and "WeightsDiffer: stale" in page
    assert "<th>before</th><th>difference</th>" in page, "there is one evaluation"
    run.tell("ended")
    assert '<p class="remark">' not in report(run.path).path.read_text()


def test_a_moved_training_run_has_its_page_without_images(training, tmp_path):
    folder = moved(trained(training, samples(tmp_path), steps=5, after=4))
    written = report(folder)
    page = written.path.read_text()
    assert PICTURE not in page and page.count("<article") == 4 and 'class="mask"' in page
    (remark,) = written.remarks
    assert remark.startswith("Without the images, which cannot be read here: ") and "rows.parquet" in remark
    assert "Without the images" in page


def test_a_reward_of_ones_own_need_not_be_where_the_page_is_written(training, tmp_path):
    run = trained(training, samples(tmp_path), steps=1)
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("preset: mask", "terms: [{name: 'my_pkg.mine:term'}]"))
    assert report(run.path).path.is_file()


def test_rows_that_took_the_names_of_others_lend_them_no_images(training, tmp_path):
    run = trained(training, samples(tmp_path), steps=2)
    drawn_rows(tmp_path / "rows.parquet", 4, seed=99)
    written = report(run.path)
    assert PICTURE not in written.path.read_text()
    assert written.remarks == ["Without 4 of 4 images, which are not in the files that lie here now."]


@pytest.mark.parametrize("n", [0, 2])
def test_an_interrupted_evaluation_is_told_from_the_results_so_far(tmp_path, n):
    rows = samples(tmp_path)
    run = evaluated(evaluation(tmp_path, f"n={n}"), rows[:3])
    run.tell("interrupted", prompts={"rows": 4, "left_out": 0})
    with (run.path / "results.jsonl").open("a") as file:
        file.write('{"kind": "gree')
    written = report(run.path)
    page = written.path.read_text()
    assert "Interrupted after 3 of 4 rows" in page and page.count(PICTURE) == 3
    assert ("consensus Dice" in page) == (n > 0)
    assert not (run.path / "metrics.json").exists(), "it marks an evaluation as finished"
    page = report(moved(run)).path.read_text()
    assert PICTURE not in page and page.count("<article") == 3 and "consensus Dice" not in page


def test_two_moved_evaluations_are_compared(tmp_path, capsys):
    rows = samples(tmp_path)
    first = evaluated(evaluation(tmp_path, name="first"), rows)
    second = evaluated(evaluation(tmp_path, name="second"), rows[1:], dice=0.75)
    assert compare(first.path, second.path).read_text().count(PICTURE) == 6
    folder = moved(second)
    evaluated(evaluation(tmp_path, name="first"), rows)
    page = compare(first.path, folder).read_text()
    assert PICTURE not in page and page.count("<article") == 3 and "+0.250" in page
    assert "Without the images" in page and "Without the images" in capsys.readouterr().out


def test_a_supervised_run_has_its_losses(tmp_path):
    options = {"model": TINY_REASONER, "data.train": [tmp_path / "rows.parquet"], "runs": tmp_path / "runs"}
    config = load_config(SftConfig, ROOT / "configs" / "tiny_reasoner_sft.yaml", ["validation=0.1"], options)
    run = tuned(config, steps=3)
    page = report(run.path).path.read_text()
    assert page.count("<svg") == 4 and "after step 3 of 1,600" in page and "0.5000" in page


def test_a_page_goes_where_it_is_asked_for(training, tmp_path):
    run = trained(training, samples(tmp_path), steps=2)
    files = sorted(run.path.rglob("*"))
    written = report(run.path, tmp_path / "pages" / "page.html")
    assert written.path == tmp_path / "pages" / "page.html" and written.path.is_file()
    assert sorted(run.path.rglob("*")) == files


def test_what_has_no_page_is_refused(training, tmp_path):
    with pytest.raises(ValueError, match="is not a run's folder"):
        report(tmp_path)
    run = RunFolder.create(training.runs / "trial", training)
    with pytest.raises(ValueError, match="has recorded nothing yet"):
        report(run.path)
    assert not run.report.exists(), "a blank folder stays blank, its name free"
