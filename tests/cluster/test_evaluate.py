"""The evaluation job on real components: what it writes, that it goes on, and a reasoner behind an endpoint."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import httpx
import pytest

from actors.config import RolloutConfig
from cluster.commands.report import report
from cluster.comparison import compare
from cluster.config import EvaluateConfig, load_config
from cluster.data import open_held_out
from cluster.evaluate import answer, run_evaluation, write_figures
from cluster.evaluation import SEED, evaluation_groups
from cluster.figures import TrainingCoverage, settings
from cluster.records import Results, read_results
from cluster.run_folder import RunFolder
from phantoms import rows
from reasoner.prompter import load_prompter
from tests.actors.test_endpoint import Server
from tests.conftest import ROOT, TINY_REASONER
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows

REAL_IMAGES = ROOT.parent / "shared" / "data" / "umrg_real_sample.parquet"
SMALL = ("rollout.max_prompt_tokens=512", "rollout.max_tokens=128", "rollout.num_cpus=0.5", "segmenter.num_cpus=0.1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows(8, seed=6, modalities=["CT", "X-ray"], queries_per_image=1))
    return path


def configured(data, runs, name, *overrides, model=TINY_REASONER):
    options = {"model": model, "data.eval": [data], "expert": "tiny", "name": name, "runs": runs, "n": 2, "batch": 3}
    return load_config(EvaluateConfig, None, [*SMALL, *overrides], options)


def evaluated(workers, config):
    """As `run_evaluation`, on actors that run already."""
    run = RunFolder.begin(config.runs / config.name, config, resume=True)
    (samples, _), seen = open_held_out(config, run), TrainingCoverage([])
    results = Results(run.path / "results.jsonl", n=config.n)
    answer(workers, samples, config, results)
    results.sort([sample.id for sample in samples])
    write_figures(run, samples, seen, results, config, settings(config, config.spec()))
    return run


@pytest.fixture(scope="module")
def whole(workers, data, tmp_path_factory):
    return evaluated(workers, configured(data, tmp_path_factory.mktemp("runs"), "whole"))


def test_an_evaluation_leaves_results_figures_tables_and_a_page(whole):
    found = read_results(whole.path / "results.jsonl")
    assert len(found) == 8
    for records in found.values():
        assert [record["kind"] for record in records] == ["greedy", "sampled", "sampled"]
        assert {"dice_box", "dice_points", "oracle_dice"} <= records[0]["metrics"].keys()
    metrics = json.loads((whole.path / "metrics.json").read_text())
    assert metrics["settings"]["preprocess"] == "published" and metrics["settings"]["frame"] == "model"
    overall = metrics["overall"]
    assert overall["n"] == 8 and overall["oracle_dice"]["mean"] > 0.75
    assert 0.2 < overall["dice"]["mean"] <= overall["best_dice"]["high"] <= 1
    assert {"supercategory", "category", "modality", "phrasing"} <= metrics["by"].keys()
    assert "| **all** | 8 |" in (whole.path / "table.md").read_text()
    assert "overall,all,8,iou," in (whole.path / "table.csv").read_text()
    page = (whole.report / "index.html").read_text()
    assert page.count("<article") == 8 and page.count("data:image/webp") == 8


def test_an_interrupted_evaluation_goes_on_to_the_same_figures(workers, data, whole, tmp_path):
    config = configured(data, tmp_path, "half")
    run = RunFolder.begin(tmp_path / "half", config, resume=True)
    lines = (whole.path / "results.jsonl").read_text().splitlines(keepends=True)
    # Killed while the fourth row was being written.
    (run.path / "results.jsonl").write_text("".join(lines[:10]) + lines[10][:50])
    evaluated(workers, config)
    for name in ("metrics.json", "results.jsonl", "table.csv"):
        assert (run.path / name).read_text() == (whole.path / name).read_text(), name


def test_a_finished_evaluation_is_not_begun_again(data, whole):
    with pytest.raises(ValueError, match="is finished; give another name"):
        run_evaluation(configured(data, whole.path.parent, "whole"))


def test_two_evaluations_are_compared_with_a_page(whole, tmp_path, capsys):
    page = compare(whole.path, whole.path, tmp_path / "page.html").read_text()
    assert page.count("<article") == 8 and page.count("data:image/webp") == 16
    assert "8 rows, paired" in capsys.readouterr().out


def test_the_page_of_an_evaluation_is_made_again_from_its_folder(whole, tmp_path):
    whole.tell("ended")
    written = report(whole.path, tmp_path / "again.html")
    assert written.path.read_text() == (whole.report / "index.html").read_text() and not written.remarks


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=null"], "give either model or endpoint"),
        (["endpoint={url: 'http://127.0.0.1:1/v1', model: m}"], "give either model or endpoint"),
        (
            ["model=null", "endpoint={url: 'http://127.0.0.1:1/v1', model: m}"],
            "say what the endpoint's coordinates are",
        ),
        (["modle=x"], "did you mean 'model'"),
        (
            ["model=null", "frame=model", "max_pixels=1000", "endpoint={url: 'http://127.0.0.1:1/v1', model: m}"],
            "say in endpoint.min_pixels and endpoint.max_pixels what they are",
        ),
    ],
)
def test_what_is_evaluated_must_be_said(data, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        configured(data, tmp_path, "x", *overrides)


def test_what_was_measured_says_in_which_words_it_was_asked():
    given: dict[str, Any] = {"name": "e", "expert": "tiny", "data": {"eval": "rows.parquet"}, "frame": "model"}
    given["endpoint"] = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    configs = [EvaluateConfig(**given, prompt=prompt) for prompt in (None, "compact", "Wo? {query}")]
    said = [settings(config, config.spec())["prompt"] for config in configs]
    assert said[:2] == ["full", "compact"] and re.fullmatch(r"template [0-9a-f]{12}: Wo\? \{query\}", said[2])


def test_what_was_measured_says_how_large_images_were_seen(data, tmp_path):
    free, bound = configured(data, tmp_path, "x"), configured(data, tmp_path, "x", "max_pixels=12544")
    assert "max_pixels" not in settings(free, free.spec()) and settings(bound, bound.spec())["max_pixels"] == 12544


def test_rows_left_out_of_an_evaluation_are_counted(data, tmp_path, whole):
    """By a limit that the shorter half of the prompts keep, on the answers that are there already."""
    rows = Dataset.open(data)
    prompter = load_prompter(TINY_REASONER)
    most = sorted(prompter.prompt_tokens(row.query, row.size) for row in rows)[3]
    limits = (f"rollout.max_prompt_tokens={most}", "data.overlong=leave_out")
    config = configured(data, tmp_path, "shorter", *limits)
    run = RunFolder.begin(config.runs / config.name, config, resume=True)
    samples, lengths = open_held_out(config, run)
    assert lengths is not None and lengths.rows == len(samples) >= 4 and lengths.left_out == 8 - len(samples) > 0
    shutil.copy(whole.path / "results.jsonl", run.path)
    results = Results(run.path / "results.jsonl", n=config.n)
    told = settings(config, config.spec())
    write_figures(run, samples, TrainingCoverage([]), results, config, told, left_out=lengths.left_out)
    assert run.read_json("metrics.json")["left_out"] == lengths.left_out
    page = (run.path / "report" / "index.html").read_text()
    assert f"{len(samples)} rows, {lengths.left_out} left out as too long" in page


def test_a_run_or_a_checkpoint_stands_for_its_model(data, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    assert configured(data, tmp_path, "x", model=tmp_path / "run").model == tmp_path / "run" / "model"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """vLLM's own OpenAI server, with the tiny model, and a parser that takes its thoughts out of the answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("endpoint") / "log.txt"
    arguments = [
        "--model",
        str(TINY_REASONER),
        "--served-model-name",
        "tiny",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    arguments += ["--dtype", "float32", "--max-model-len", "640", "--max-num-batched-tokens", "4096", "--enforce-eager"]
    arguments += ["--reasoning-parser", "deepseek_r1"]
    arguments += ["--limit-mm-per-prompt", '{"image": 1, "video": 0}', "--no-enable-chunked-prefill"]
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
        env={**os.environ, **RolloutConfig(threads=1).process_environment},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


@pytest.mark.slow
def test_an_endpoint_with_a_reasoning_parser_gives_the_direct_engines_figures(
    endpoint, whole, data, tmp_path, ray_cluster
):
    asked = ("model=null", "frame=model", "prompt=compact", f"endpoint={{url: '{endpoint}', model: tiny}}")
    config = configured(data, tmp_path, "endpoint", *asked, "n=0")
    run = run_evaluation(config)
    direct, found = (read_results(path / "results.jsonl") for path in (whole.path, run.path))
    for row, (record,) in found.items():
        assert record["completion"] == direct[row][0]["completion"]
        assert record["metrics"] == direct[row][0]["metrics"]
    with pytest.raises(ValueError, match="has no model 'small'; it has tiny"):
        run_evaluation(
            configured(data, tmp_path, "missing", *asked[:3], f"endpoint={{url: '{endpoint}', model: small}}")
        )


@pytest.fixture
def replay(whole, data):
    """A server that answers as `whole` was answered, in a form of one's choice for each row's place in the data."""
    samples, _ = open_held_out(configured(data, whole.path.parent, "whole"), whole)
    records = read_results(whole.path / "results.jsonl")
    known = {group.seed(SEED): i for i, group in enumerate(evaluation_groups(samples))}
    completions = [records[sample.id][0]["completion"] for sample in samples]

    def serve(form):
        def reply(request):
            place = known[request["seed"]]
            return form(place, *completions[place].removeprefix("<think>").split("</think>")), "stop"

        servers.append(Server(reply))
        return "model=null", "frame=model", "prompt=compact", f"endpoint={{url: '{servers[-1].url}', model: m}}", "n=0"

    servers: list[Server] = []
    yield serve
    for server in servers:
        server.stop()


def test_thoughts_in_a_field_of_their_own_change_no_figure(replay, whole, data, tmp_path, ray_cluster):
    def form(place, think, answer):
        return [
            {"reasoning": think, "content": answer},
            {"reasoning_content": think, "content": answer},
            {"content": f"{think}</think>{answer}"},
            {"content": f"<think>{think}</think>{answer}"},
        ][place % 4]

    run = run_evaluation(configured(data, tmp_path, "endpoint", *replay(form)))
    direct = read_results(whole.path / "results.jsonl")
    for row, (record,) in read_results(run.path / "results.jsonl").items():
        for field in ("completion", "reasoning", "failure", "metrics"):
            assert record[field] == direct[row][0][field]
    overall, expected = (json.loads((path / "metrics.json").read_text())["overall"] for path in (run.path, whole.path))
    assert overall == {name: expected[name] for name in overall} and overall["dice"]["mean"] > 0.2


def test_answers_read_leniently_are_said_and_counted_apart(replay, whole, data, tmp_path, ray_cluster, capsys):
    def form(place, think, answer):
        if place % 2:
            return {"content": f"<think>{think}</think>{answer}"}
        fields = json.loads(answer.removeprefix("<answer>").removesuffix("</answer>"))
        native = [{"bbox_2d": fields["bbox"], "point_2d": [fields["points_1"], fields["points_2"]], "label": "it"}]
        return {"content": f"<think>{think}</think>\n```json\n{json.dumps(native)}\n```"}

    run = run_evaluation(configured(data, tmp_path, "lenient", "answers=lenient", *replay(form)))
    direct, found = (read_results(path / "results.jsonl") for path in (whole.path, run.path))
    assert [record["read"] for (record,) in found.values()] == ["lenient", "strict"] * 4
    for row, (record,) in found.items():
        assert record["metrics"] == direct[row][0]["metrics"]
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert metrics["settings"]["answers"] == "lenient"
    assert (metrics["lenient"]["greedy"], metrics["lenient"]["sampled"]) == (4, 0)
    strict = metrics["lenient"]["as_malformed"]
    assert metrics["overall"]["well_formed"]["mean"] - strict["overall"]["well_formed"]["mean"] == 0.5
    assert strict["by"].keys() == metrics["by"].keys()
    page = (run.report / "index.html").read_text()
    for text in ((run.path / "table.md").read_text(), page):
        assert "4 of 8 greedy answers were read leniently. Counted as malformed:" in text
    assert page.count("<b>read leniently</b>") == 4
    # The other evaluation as it was before answers could be read in two ways.
    older = tmp_path / "older"
    shutil.copytree(whole.path, older)
    lines = [json.loads(line) for line in (older / "results.jsonl").read_text().splitlines()]
    older_lines = [{name: value for name, value in line.items() if name != "read"} for line in lines]
    (older / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in older_lines))
    noted = compare(older, run.path, tmp_path / "page.html").read_text()
    said = "Answers that were read leniently: 4 of lenient."
    assert said in noted and said in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.chaos
def test_a_template_that_opens_the_thoughts_gives_the_plain_ones_figures(whole, data, tmp_path, ray_cluster):
    folder = shutil.copytree(TINY_REASONER, tmp_path / "opened")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("assistant\n{%", "assistant\n<think>{%"))
    assert load_prompter(folder).opening == "<think>"
    run = run_evaluation(configured(data, tmp_path, "prefilled", "n=0", model=folder))
    direct = read_results(whole.path / "results.jsonl")
    for row, (record,) in read_results(run.path / "results.jsonl").items():
        assert record["tokens"] == direct[row][0]["tokens"] - 1
        for field in ("completion", "reasoning", "failure", "metrics"):
            assert record[field] == direct[row][0][field]


def test_an_endpoint_that_is_not_there_is_named(data, tmp_path, ray_cluster):
    asked = ("model=null", "frame=model", "endpoint={url: 'http://127.0.0.1:9/v1', model: m, retries: 0}")
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/v1 does not answer: .*; check endpoint.url"):
        run_evaluation(configured(data, tmp_path, "nobody", *asked))


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.skipif(not REAL_IMAGES.exists(), reason="the real images are not part of the project")
def test_real_images_give_all_outputs(tmp_path, ray_cluster):
    asked = ("prompt=full", "think=true", "rollout.max_prompt_tokens=4096", "rollout.max_tokens=32", "limit=4", "n=1")
    run = run_evaluation(configured(REAL_IMAGES, tmp_path, "real", *asked))
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert metrics["overall"]["n"] == 4 and 0.3 < metrics["overall"]["oracle_dice"]["mean"] < 1
    # The tiny model cannot read that prompt.
    assert sum(map(len, metrics["failures"].values())) == 4 * (1 - metrics["overall"]["well_formed"]["mean"])
    for name in ("results.jsonl", "table.md", "table.csv", "report/index.html"):
        assert (run.path / name).stat().st_size > 0


@pytest.mark.slow
@pytest.mark.chaos
def test_killed_and_run_again(data, whole, tmp_path):
    command = [sys.executable, "-m", "cluster.evaluate", f"model={TINY_REASONER}", f"data.eval={data}", "expert=tiny"]
    command += ["name=whole", f"runs={tmp_path}", "n=2", "batch=3", *SMALL]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    results = tmp_path / "whole" / "results.jsonl"
    first = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    deadline = time.monotonic() + 240
    while not (results.exists() and results.read_text().count("\n") >= 3):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "whole" / "metrics.json").exists()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=240)
    for name in ("metrics.json", "results.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (whole.path / name).read_text(), name
