"""The learner compared with TRL's GRPOTrainer, and the shared-prefix forward with padding: `python -m bench.learner`.

Both learners are given the same recorded completions, rewards and images and the bundled tiny model in float32: 16
completions of 128 tokens per prompt of about 670, a reference pass for the KL term, loss, backward, and one update
from all groups; sampling is left out. Each side runs in a process of its own with the same number of threads, and the
time of a step is the best of several.

learner_ratio_trl: samples per second, ours divided by TRL's.
step_ratio_trl: whole training steps per second, ours divided by TRL's. Ours includes vLLM's sampling, masks, rewards
    and the weight sync, TRL's the sampling by transformers. Completions end by themselves or at 128 tokens; their mean
    length is printed.
memory_ratio_trl: peak memory above what the process held before its first step, ours divided by TRL's.
grad_norm: gradient norm of both sides' first update; that they agree shows that both did the same work.
sweep: seconds of our forward and backward, and of padded batches with one sequence per completion, by shape.
utilisation: the learner's arithmetic rate (6 FLOPs per parameter and token, embeddings included) divided by that of
    large matrix products.
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
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.machine import processor

if TYPE_CHECKING:
    from reasoner.model import Reasoner
    from rewards.scored import ScoredGroup
    from umrg.sample import Sample

MODEL = Path(__file__).parents[1] / "models" / "tiny-reasoner"
KL, LR = 0.04, 1e-6
SHAPES = [
    (590, 128, 16),
    (250, 128, 16),
    (1200, 128, 16),
    (590, 32, 16),
    (590, 256, 16),
    (590, 128, 4),
    (590, 128, 1),
]
"""Of the sweep: words of the query, tokens of a completion, completions per prompt."""


def recorded(groups: int, words: int, n: int, length: int) -> list[dict[str, Any]]:
    """One dataset row, query and n random completions per group; the reward is computed from a completion's tokens."""
    from phantoms import rows

    rng = np.random.default_rng(0)
    found = []
    for i, row in enumerate(rows(groups, seed=3, modalities=["CT"], queries_per_image=1)):
        answers = rng.integers(100, 900, (n, length)).tolist()
        # All queries have one length: TRL pads prompts on the left but their token types, from which m-rope positions
        # are computed, on the right, so that padded prompts would get wrong positions.
        found.append({"row": row, "query": " ".join(["where"] * words + [str(i)]), "answers": answers})
    return found


def reward(token_ids: list[int]) -> float:
    return sum(token_ids) % 97 / 97


def timed(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Seconds of the fastest step, and peak memory in MiB above what was held before the first."""
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
    """Our learner on one rank with ZeRO-2."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from learner.collectives import join
    from learner.config import LearnerConfig, LearnerTask
    from learner.grpo import GrpoRank
    from learner.zero import ZeroRank
    from umrg.prompts import PromptSpec

    join(0, 1, host="127.0.0.1", port=_free_port(), device="cpu", seconds=600)
    config = LearnerConfig.model_validate({"lr": LR, "objective": {"kl": KL}, "eps": 1e-8, "betas": (0.9, 0.999)})
    task = LearnerTask(model=MODEL, spec=PromptSpec.of_model(MODEL), updates=steps, max_tokens=128)
    zero = ZeroRank(config, task)
    grpo = GrpoRank(zero, config)
    groups = scored_groups(zero.reasoner, work)
    norms: list[float] = []
    found = timed(
        lambda: norms.append(grpo.update([config.work(each) for each in groups], groups.__getitem__).grad_norm), steps
    )
    return {**found, "grad_norm": norms[0], "prompt": float(len(groups[0].samples.prompt_ids))}


def our_whole_step(work: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Our whole step on a local Ray cluster: sampling by vLLM, masks and rewards, update, weight sync."""
    from cluster.config import TrainConfig, load_config
    from cluster.evaluation import collect
    from cluster.train import actors
    from cluster.weight_sync import sync_weights
    from cluster.workers import ray_connection, started
    from umrg.group import Group

    n = len(work[0]["answers"])
    overrides = [f"model={MODEL}", f"rollout.n={n}", "rollout.max_tokens=128", "rollout.max_prompt_tokens=1024"]
    overrides += [f"learner.lr={LR}", "learner.freeze=[]", "learner.vector_lr=null", f"learner.objective.kl={KL}"]
    config = load_config(TrainConfig, MODEL.parents[1] / "configs" / "demo.yaml", overrides)
    samples = asked(work)
    lengths: list[int] = []
    taken = iter(range(steps))
    with ray_connection(), started(actors(config), config) as workers:

        def step() -> None:
            number = next(taken)
            groups = [Group(run="bench", step=number, index=i, sample=sample) for i, sample in enumerate(samples)]
            collected = collect(workers, groups, config.rollout.sampling(seed=0), "reward")
            lengths.extend(len(answer.token_ids) for each in collected for answer in each.scored.samples.completions)
            workers.learner.update([each.refs for each in collected], [1] * len(collected))
            sync_weights(workers, version=number + 1)

        found = timed(step, steps)
    return {"seconds": found["seconds"], "tokens": float(np.mean(lengths))}


def asked(work: list[dict[str, Any]]) -> list["Sample"]:
    """The recorded rows as samples, each with its recorded query."""
    from dataclasses import replace

    from umrg.dataset import Dataset
    from umrg.dataset_writer import write_rows

    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.parquet", [each["row"] for each in work])
        samples = list(Dataset.open(Path(folder) / "rows.parquet"))
    return [replace(sample, query=each["query"]) for sample, each in zip(samples, work, strict=True)]


def scored_groups(reasoner: "Reasoner", work: list[dict[str, Any]]) -> list["ScoredGroup"]:
    """The recorded completions as scored groups, which keep their images."""
    from rewards.scored import ScoredAnswer, ScoredGroup
    from rewards.scoring import Reward
    from umrg.answers import parse_answer
    from umrg.group import Completion, Group, GroupSamples

    groups = []
    for i, (each, sample) in enumerate(zip(work, asked(work), strict=True)):
        prompt = reasoner.encode(sample.query, reasoner.encode_image(sample.image()))
        completions = tuple(
            Completion(text="", token_ids=tuple(ids), logprobs=(-5.0,) * len(ids), policy_version=0, finished=True)
            for ids in each["answers"]
        )
        rewards = [Reward(total=reward(ids), parts={}) for ids in each["answers"]]
        groups.append(
            ScoredGroup(
                group=Group(run="bench", step=0, index=i, sample=sample),
                samples=GroupSamples(
                    prompt_ids=tuple(prompt.token_ids.tolist()), frames=prompt.image.frames, completions=completions
                ),
                answers=tuple(
                    ScoredAnswer(reward=each, answer=parse_answer(""), failure=None, metrics={}) for each in rewards
                ),
            )
        )
    return groups


def trl(work: list[dict[str, Any]], steps: int, generate: bool = False) -> dict[str, float]:
    """TRL's GRPOTrainer. generate: it samples with transformers' `generate` instead of taking the recorded
    completions."""
    import torch
    from datasets import Dataset as Rows
    from PIL import Image
    from trl import GRPOTrainer

    from reasoner.model import load_reasoner

    reasoner = load_reasoner(MODEL)
    known = {group.group.sample.query: group for group in scored_groups(reasoner, work)}
    prompts = [
        {"prompt": [{"role": "user", "content": query}], "image": Image.fromarray(group.group.sample.image())}
        for query, group in known.items()
    ]

    def rollout(prompts: list[Any], _trainer: Any) -> dict[str, Any]:
        text = [prompt[-1]["content"][-1]["text"] for prompt in prompts]
        turn = [sum(query == other for other in text[:i]) for i, query in enumerate(text)]
        samples = [known[query].samples for query in text]
        return {
            "prompt_ids": [list(each.prompt_ids) for each in samples],
            "completion_ids": [list(s.completions[i].token_ids) for s, i in zip(samples, turn, strict=True)],
            "logprobs": None,
        }

    lengths: list[int] = []

    def worth(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [reward(ids) for ids in completion_ids]

    clock = _trl_clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=str(MODEL),
            reward_funcs=[worth],
            args=_trl_config(folder, n=len(work[0]["answers"]), groups=len(work), steps=steps),
            train_dataset=Rows.from_list(prompts),
            processing_class=reasoner.processor,
            rollout_func=None if generate else rollout,
            callbacks=[clock],
        )
        assert next(trainer.model.parameters()).dtype == torch.float32
        trainer.train()
    found = {"seconds": min(clock.seconds), "memory_mib": _peak() - clock.before, "grad_norm": clock.norms[0]}
    return {**found, "tokens": float(np.mean(lengths))}


def _trl_config(folder: str, *, n: int, groups: int, steps: int) -> Any:
    """TRL's settings for the work that `ours` does: float32, one group per micro-batch, all groups per update, no
    gradient checkpointing."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=n,
        gradient_accumulation_steps=groups,
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


def _trl_clock() -> Any:
    """A callback of TRL's trainer that keeps the seconds and gradient norm of each step, and the memory held before the
    first. Its class is made here because transformers is imported only in the processes that are measured."""
    from transformers import TrainerCallback

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

    return Clock()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _alone(side: Callable[..., Any], threads: int, *args: Any) -> Any:
    """The result of one side, computed in a fresh process with this number of threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(side, args)


def sweep(shapes: list[tuple[int, int, int]]) -> list[dict[str, float]]:
    """Seconds of forward and backward of one group, with a shared prefix and padded. shapes: words of the query, length
    of a completion, completions per prompt."""
    from learner.attention import use_shared_prefix
    from reasoner.model import load_reasoner

    reasoner, shared = load_reasoner(MODEL), load_reasoner(MODEL).model
    use_shared_prefix(shared)
    return [_compared(reasoner, shared, *shape) for shape in shapes]


def _compared(reasoner: "Reasoner", shared: Any, words: int, length: int, n: int) -> dict[str, float]:
    import torch

    from learner.shared_prefix import Branches, branch_scores, pack

    (group,) = scored_groups(reasoner, recorded(1, words, n, length))
    sample = group.group.sample
    prompt = reasoner.encode(sample.query, reasoner.encode_image(sample.image()))
    branches = [torch.tensor(completion.token_ids) for completion in group.samples.completions]
    together = Branches(prefix=prompt, branches=branches)
    ids = torch.stack([torch.cat([prompt.token_ids, branch]) for branch in branches])

    def forward_shared() -> None:
        branch_scores(shared, pack([together], shared)).logprobs.sum().backward()

    def forward_padded() -> None:
        logits = reasoner.model(
            input_ids=ids,
            mm_token_type_ids=(ids == reasoner.image_token_id).int(),
            pixel_values=prompt.image.pixel_values.repeat(n, 1),
            image_grid_thw=prompt.image.grid_thw.repeat(n, 1),
            logits_to_keep=length + 1,
        ).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -length:].flatten()).backward()

    shared_s, padded_s = (timed(side, 3)["seconds"] for side in (forward_shared, forward_padded))
    return {
        "prompt": len(prompt.token_ids),
        "answer": length,
        "n": n,
        "shared_s": shared_s,
        "ratio": padded_s / shared_s,
        "tflops": 6 * sum(p.numel() for p in shared.parameters()) * len(together) / shared_s / 1e12,
    }


def ceiling() -> dict[str, float]:
    """TFLOPS of large float32 matrix products, as the attainable peak."""
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
    table = _alone(sweep, args.threads, SHAPES)
    peak = _alone(ceiling, args.threads)
    print(f"{'':8}{'s/step':>10}{'peak MiB':>10}{'grad norm':>12}")
    for name, side in (("ours", mine), ("TRL", theirs)):
        print(f"{name:8}{side['seconds']:10.2f}{side['memory_mib']:10.0f}{side['grad_norm']:12.5f}")
    print(f"\n{'whole step':12}{'s':>8}{'tokens/answer':>18}")
    for name, side in zip(("ours", "TRL"), whole, strict=True):
        print(f"{name:12}{side['seconds']:8.2f}{side['tokens']:18.1f}")
    print(f"\n{'prompt':>8}{'answer':>8}{'n':>4}{'shared s':>10}{'padded/shared':>18}{'of peak':>12}")
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
