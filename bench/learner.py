"""The learner beside TRL's GRPOTrainer, and beside its own forward without sharing: `python -m bench.learner`.

Both learn from the same recorded answers, rewards and images with the bundled tiny model in float32: 16 answers of 128
tokens to a prompt of about 670, a reference pass for the divergence, loss, backward, one update of all groups; sampling
is left out. Each side runs in a process of its own with as many threads; a step's time is the best of several.

learner_ratio_trl: samples a second, ours by TRL's.
step_ratio_trl: whole steps a second, ours by TRL's: ours with vLLM's sampling, masks, rewards and weights handed on,
    TRL's with transformers' sampling. Answers end by themselves or at 128 tokens; their mean length is printed.
memory_ratio_trl: peak memory over what the process held before its first step, ours by TRL's.
grad_norm: of both sides' first update, which says that they did the same work.
sweep: seconds of our forward and backward beside one sequence for each answer in padded batches, by shape.
utilisation: the learner's arithmetic (6 FLOPs a parameter and token, embeddings too) by that of large matrix
    products.
"""

import argparse
import json
import multiprocessing
import os
import resource
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import processor

MODEL = Path(__file__).parents[1] / "models" / "tiny-reasoner"
KL, LR = 0.04, 1e-6


def recorded(groups: int, words: int, n: int, length: int) -> list[dict[str, Any]]:
    """Groups with images, questions and random answers; what an answer is worth hangs on its tokens."""
    from phantoms import rows

    rng = np.random.default_rng(0)
    found = []
    for i, row in enumerate(rows(groups, seed=3, modalities=["CT"], queries_per_image=1)):
        answers = rng.integers(100, 900, (n, length)).tolist()
        # Of one length: TRL pads prompts on the left, and their token types, which give positions, on the right.
        found.append({"row": row, "query": " ".join(["where"] * words + [str(i)]), "answers": answers})
    return found


def reward(token_ids: list[int]) -> float:
    return sum(token_ids) % 97 / 97


def timed(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Seconds of the best step, and peak memory in MiB over what was held before the first."""
    before = _resident()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "memory_mib": _peak() - before}


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def ours(work: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Our learner, one rank of ZeRO-2."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from learner.config import LearnerConfig
    from learner.grpo import GrpoRank
    from learner.zero import ZeroRank
    from umrg.prompts import PromptSpec

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    config = LearnerConfig.model_validate({"lr": LR, "objective": {"kl": KL}, "eps": 1e-8, "betas": (0.9, 0.999)})
    zero = ZeroRank(MODEL, config, PromptSpec.of_model(MODEL), updates=steps)
    grpo = GrpoRank(zero, config, MODEL, longest=128)
    groups = scored_groups(zero.reasoner, work)
    norms: list[float] = []
    found = timed(lambda: norms.append(grpo.update(groups).grad_norm), steps)
    return {**found, "grad_norm": norms[0], "prompt": float(len(groups[0].prompt_ids))}


def our_whole_step(work: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Our whole step on a cluster of our own: sampling by vLLM, masks and rewards, update, weights to the engine."""
    from dataclasses import replace

    from actors.connection import connect
    from cluster.config import TrainConfig, load_config
    from cluster.evaluation import Draw, gain
    from cluster.journal import Clock
    from cluster.weight_sync import broadcast
    from cluster.workers import started
    from umrg.dataset import Dataset
    from umrg.dataset_writer import write_rows
    from umrg.group import Group

    n = len(work[0]["answers"])
    overrides = [f"model={MODEL}", f"rollout.n={n}", "rollout.max_prompt_tokens=1024", f"learner.lr={LR}"]
    overrides += ["learner.freeze=[]", "learner.vector_lr=null", f"learner.objective.kl={KL}"]
    config = load_config(TrainConfig, MODEL.parents[1] / "configs" / "demo.yaml", overrides)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.parquet", [each["row"] for each in work])
        samples = list(Dataset.open(Path(folder) / "rows.parquet"))
    samples = [replace(sample, query=each["query"]) for sample, each in zip(samples, work, strict=True)]
    lengths: list[int] = []
    taken = iter(range(steps))
    connect()
    with started(config) as workers:

        def step() -> None:
            number = next(taken)
            groups = [Group(run="bench", step=number, index=i, sample=sample) for i, sample in enumerate(samples)]
            draw = Draw(n=n, temperature=1.0, max_tokens=128, run_seed=0)
            experience = gain(workers, groups, draw, Clock())
            lengths.extend(len(answer.token_ids) for each in experience for answer in each.samples.completions)
            workers.learner.update(
                [each.ref for each in experience],
                [each.samples for each in experience],
                [each.rewards for each in experience],
            )
            broadcast(workers, version=number + 1)

        found = timed(step, steps)
    return {"seconds": found["seconds"], "tokens": float(np.mean(lengths))}


def scored_groups(reasoner: Any, work: list[dict[str, Any]]) -> list[Any]:
    """The recorded groups as the learner takes them."""
    from learner.encoding import ScoredGroup
    from umrg.dataset import Dataset
    from umrg.dataset_writer import write_rows
    from umrg.group import Completion

    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.parquet", [each["row"] for each in work])
        samples = list(Dataset.open(Path(folder) / "rows.parquet"))
    groups = []
    for each, sample in zip(work, samples, strict=True):
        object.__setattr__(sample, "query", each["query"])
        prompt = reasoner.encode(sample.query, reasoner.encode_image(sample.image()))
        answers = [
            Completion(text="", token_ids=tuple(ids), logprobs=(-5.0,) * len(ids), policy_version=0, finished=True)
            for ids in each["answers"]
        ]
        groups.append(
            ScoredGroup(
                id=sample.id,
                sample=sample,
                prompt_ids=tuple(prompt.token_ids.tolist()),
                completions=answers,
                rewards=[reward(ids) for ids in each["answers"]],
            )
        )
    return groups


def trl(work: list[dict[str, Any]], steps: int, generate: bool = False) -> dict[str, float]:
    """TRL's GRPOTrainer: a group a micro-batch, all groups an update, no gradient checkpointing, float32. generate:
    sample by itself, through transformers, in the place of the recorded answers."""
    import torch
    from datasets import Dataset as Rows
    from PIL import Image
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from reasoner.model import load_reasoner

    reasoner = load_reasoner(MODEL)
    groups = scored_groups(reasoner, work)
    n = len(work[0]["answers"])
    known = {group.sample.query: group for group in groups}
    rows = Rows.from_list(
        [
            {"prompt": [{"role": "user", "content": query}], "image": Image.fromarray(group.sample.image())}
            for query, group in known.items()
        ]
    )

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.norms: list[float] = []
            self.before = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.before = self.before or _resident()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **__: Any) -> None:
            if "grad_norm" in logs:
                self.norms.append(float(logs["grad_norm"]))

    def rollout(prompts: list[Any], _trainer: Any) -> dict[str, Any]:
        text = [prompt[-1]["content"][-1]["text"] for prompt in prompts]
        turn = [sum(query == other for other in text[:i]) for i, query in enumerate(text)]
        return {
            "prompt_ids": [list(known[query].prompt_ids) for query in text],
            "completion_ids": [list(known[q].completions[i].token_ids) for q, i in zip(text, turn, strict=True)],
            "logprobs": None,
        }

    lengths: list[int] = []

    def worth(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [reward(ids) for ids in completion_ids]

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=n,
            gradient_accumulation_steps=len(work),
            num_generations=n,
            max_steps=steps,
            max_completion_length=128,
            beta=KL,
            learning_rate=LR,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            shuffle_dataset=False,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=str(MODEL),
            reward_funcs=[worth],
            args=settings,
            train_dataset=rows,
            processing_class=reasoner.processor,
            rollout_func=None if generate else rollout,
            callbacks=[clock],
        )
        assert next(trainer.model.parameters()).dtype == torch.float32
        trainer.train()
    found = {"seconds": min(clock.seconds), "memory_mib": _peak() - clock.before, "grad_norm": clock.norms[0]}
    return {**found, "tokens": float(np.mean(lengths))}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _alone(side: Callable[..., Any], threads: int, *args: Any) -> Any:
    """What a side says, in a fresh process with so many threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(side, args)


def sweep(shapes: list[tuple[int, int, int]]) -> list[dict[str, float]]:
    """Seconds of forward and backward of one group, shared and padded, by words of the question, answer length, n."""
    import torch

    from learner.attention import use_shared_prefix
    from learner.shared_prefix import Branches, branch_scores, pack
    from reasoner.model import load_reasoner

    reasoner = load_reasoner(MODEL)
    shared = load_reasoner(MODEL).model
    use_shared_prefix(shared)
    found = []
    for words, length, n in shapes:
        (group,) = scored_groups(reasoner, recorded(1, words, n, length))
        prompt = reasoner.encode(group.sample.query, reasoner.encode_image(group.sample.image()))
        branches = [torch.tensor(answer.token_ids) for answer in group.completions]
        together = Branches(prefix=prompt, branches=branches)
        ids = torch.stack([torch.cat([prompt.token_ids, branch]) for branch in branches])

        def forward_shared(together: Branches = together) -> None:
            branch_scores(shared, pack([together], shared)).logprobs.sum().backward()

        def forward_padded(ids: torch.Tensor = ids, prompt: Any = prompt, length: int = length, n: int = n) -> None:
            logits = reasoner.model(
                input_ids=ids,
                mm_token_type_ids=(ids == reasoner.image_token_id).int(),
                pixel_values=prompt.image.pixel_values.repeat(n, 1),
                image_grid_thw=prompt.image.grid_thw.repeat(n, 1),
                logits_to_keep=length + 1,
            ).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -length:].flatten()).backward()

        best = [timed(side, 3)["seconds"] for side in (forward_shared, forward_padded)]
        tokens = len(together)
        found.append(
            {
                "prompt": len(prompt.token_ids),
                "answer": length,
                "n": n,
                "shared_s": best[0],
                "ratio": best[1] / best[0],
                "tflops": 6 * sum(p.numel() for p in shared.parameters()) * tokens / best[0] / 1e12,
            }
        )
    return found


def ceiling() -> dict[str, float]:
    """TFLOPS of large float32 matrix products."""
    import torch

    a, b = torch.randn(2, 1024, 1024)
    return {"tflops": 2 * 1024**3 / timed(lambda: torch.mm(a, b), 20)["seconds"] / 1e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    work = recorded(args.groups, 590, 16, 128)
    mine, theirs = (_alone(side, args.threads, work, args.steps) for side in (ours, trl))
    whole = [
        _alone(our_whole_step, args.threads, work, args.steps),
        _alone(trl, args.threads, work, args.steps, True),
    ]
    shapes = [
        (590, 128, 16),
        (250, 128, 16),
        (1200, 128, 16),
        (590, 32, 16),
        (590, 256, 16),
        (590, 128, 4),
        (590, 128, 1),
    ]
    table = _alone(sweep, args.threads, shapes)
    peak = _alone(ceiling, args.threads)
    print(f"{'':8}{'s a step':>10}{'peak MiB':>10}{'grad norm':>12}")
    for name, side in (("ours", mine), ("TRL", theirs)):
        print(f"{name:8}{side['seconds']:10.2f}{side['memory_mib']:10.0f}{side['grad_norm']:12.5f}")
    print(f"\n{'whole step':12}{'s':>8}{'tokens an answer':>18}")
    for name, side in zip(("ours", "TRL"), whole, strict=True):
        print(f"{name:12}{side['seconds']:8.2f}{side['tokens']:18.1f}")
    print(f"\n{'prompt':>8}{'answer':>8}{'n':>4}{'shared s':>10}{'padded by shared':>18}{'of ceiling':>12}")
    for row in table:
        share = row["tflops"] / peak["tflops"]
        print(f"{row['prompt']:8}{row['answer']:8}{row['n']:4}{row['shared_s']:10.2f}{row['ratio']:18.2f}{share:12.0%}")
    figures = {
        "processor": processor(),
        "learner_ratio_trl": theirs["seconds"] / mine["seconds"],
        "step_ratio_trl": whole[1]["seconds"] / whole[0]["seconds"],
        "memory_ratio_trl": mine["memory_mib"] / theirs["memory_mib"],
        "grad_norm_ratio": mine["grad_norm"] / theirs["grad_norm"],
        "prompt": mine["prompt"],
        "utilisation": table[0]["tflops"] / peak["tflops"],
        "sweep": table,
    }
    print(f"\n{figures['processor']}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
