"""The shared-prefix forward and backward on a GPU, compared with padding: `python -m bench.gpu_learner [--layers N]`.

A randomly initialised model of Qwen2.5-VL-3B's shape (`--layers` for fewer layers where memory is short), bfloat16,
gradient checkpointing on both sides; one 840x840 image and a prompt as long as the full one (900 image tokens, some 700
text tokens), 16 completions of 256 tokens. The padded side has one sequence per completion, in micro-batches of
`--padded-batch`.

samples_per_s: completions per second, by side, and their ratio. memory_gib: peak memory above that of the model.
utilisation: 6 FLOPs per parameter and token that the side processes, divided by the rate of large bfloat16 matrix
products on the same device. `--shape tiny` tries it on a CPU.
"""

import argparse
import json
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.machine import processor
from bench.published_shapes import SHAPES, Work, scored_groups, write_reasoner
from learner.attention import use_shared_prefix
from learner.shared_prefix import Branches, branch_scores, pack
from reasoner.model import Reasoner, load_reasoner
from rewards.scored import ScoredGroup

WORK = Work(groups=1, n=16, side=840, words=690, length=256)
TRIAL = Work(groups=1, n=4, side=112, words=20, length=12)


def learning(folder: Path, device: str, dtype: torch.dtype) -> Reasoner:
    """The model of a folder, to be learnt with gradient checkpointing."""
    reasoner = load_reasoner(folder, device=device, dtype=dtype)
    reasoner.model.gradient_checkpointing_enable({"use_reentrant": False})
    reasoner.model.train()
    return reasoner


def prefix_tree(reasoner: Reasoner, group: ScoredGroup) -> Branches:
    """A group's prompt and its completions."""
    sample = group.group.sample
    return Branches(
        prefix=reasoner.encode(sample.query, reasoner.encode_image(sample.image())),
        branches=[torch.tensor(each.token_ids) for each in group.samples.completions],
    )


def shared(model: Any, branches: Branches, device: str) -> None:
    branch_scores(model, pack([branches], model).to(device)).logprobs.sum().backward()


def padded(model: Any, branches: Branches, device: str, batch: int) -> None:
    """Forward and backward by transformers' own attention, a sequence for each completion, all of which have the same
    length."""
    prompt, length = branches.prefix, len(branches.branches[0])
    for start in range(0, len(branches.branches), batch):
        answers = branches.branches[start : start + batch]
        ids = torch.stack([torch.cat([prompt.token_ids, answer]) for answer in answers]).to(device)
        logits = model(
            input_ids=ids,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=prompt.image.pixel_values.repeat(len(ids), 1).to(device),
            image_grid_thw=prompt.image.grid_thw.repeat(len(ids), 1).to(device),
            logits_to_keep=length + 1,
        ).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, -length:].flatten()).backward()


def measured(model: Any, step: Callable[[], None], device: str, rounds: int) -> tuple[float, float]:
    """Seconds of the fastest round after a warm-up, and peak GiB above what was held before, gradients included: both
    sides begin each round without any."""
    model.zero_grad(set_to_none=True)
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds + 1):
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    model.zero_grad(set_to_none=True)
    return min(seconds[1:]), (peak - held) / 2**30


def free_port() -> int:
    """A port of this host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def product(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.mm(a, b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Qwen2.5-VL-3B")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--padded-batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = TRIAL if args.shape == "tiny" else WORK
    with tempfile.TemporaryDirectory() as name:
        folder = write_reasoner(Path(name), args.shape, layers=args.layers, device=device)
        reasoner = learning(folder, device, torch.bfloat16)
    model, tree = reasoner.model, prefix_tree(reasoner, scored_groups(reasoner, work)[0])
    plain_s, plain_gib = measured(model, lambda: padded(model, tree, device, args.padded_batch), device, args.rounds)
    use_shared_prefix(model)
    shared_s, shared_gib = measured(model, lambda: shared(model, tree, device), device, args.rounds)
    square = torch.randn(2, 8192 if device == "cuda" else 1024, 8192 if device == "cuda" else 1024, device=device)
    a, b = square.to(torch.bfloat16)
    product_s, _ = measured(model, lambda: product(a, b), device, 10)
    ceiling = 2 * a.shape[0] ** 3 / product_s
    flops = 6 * sum(parameter.numel() for parameter in model.parameters())
    tokens = {"shared": len(tree), "padded": work.n * (len(tree.prefix.token_ids) + work.length)}
    figures = {
        "shape": args.shape,
        "layers": model.config.text_config.num_hidden_layers,
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "samples_per_s": {"shared": work.n / shared_s, "padded": work.n / plain_s},
        "ratio": plain_s / shared_s,
        "memory_gib": {"shared": shared_gib, "padded": plain_gib},
        "utilisation": {
            "shared": flops * tokens["shared"] / shared_s / ceiling,
            "padded": flops * tokens["padded"] / plain_s / ceiling,
        },
    }
    for name, value in figures.items():
        print(f"{name:16}{value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
