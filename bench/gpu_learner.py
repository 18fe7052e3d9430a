"""The shared-prefix forward and backward on a GPU, compared with padding: `python -m bench.gpu_learner [--layers N]`.

A randomly initialised model of Qwen2.5-VL-3B's shape (`--layers` for fewer layers where memory is short), bfloat16,
gradient checkpointing on both sides; one 840x840 image and the full prompt (900 image tokens, 700 text tokens), 16
completions of 256 tokens. The padded side has one sequence per completion, in micro-batches of `--padded-batch`.

samples_per_s: completions per second, by side, and their ratio. memory_gib: peak memory above that of the model.
utilisation: 6 FLOPs per parameter and token that the side processes, divided by the rate of large bfloat16 matrix
products on the same device. `--shape tiny` tries it on a CPU.
"""

import argparse
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bench.machine import processor
from learner.attention import use_shared_prefix
from learner.shared_prefix import Branches, branch_scores, pack
from reasoner.prompter import EncodedImage, EncodedPrompt
from umrg.frames import Frames, Size

SIDE, TEXT, N, LENGTH = 840, 700, 16, 256
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "3b": {
        "text": {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2},
        "vision": {"hidden_size": 1280, "out_hidden_size": 2048, "intermediate_size": 3420, "depth": 32},
    },
    "tiny": {
        "text": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1},
        "vision": {"hidden_size": 64, "out_hidden_size": 256, "intermediate_size": 128, "depth": 2, "num_heads": 4},
    },
}


def build(shape: str, layers: int, device: str) -> Any:
    """The model in bfloat16, randomly initialised."""
    sizes = SHAPES[shape]
    text = {
        **sizes["text"],
        "num_hidden_layers": layers,
        "vocab_size": 151936,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**sizes["vision"], "window_size": 112})
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def prefix_tree(model: Any) -> Branches:
    """A prompt and its completions, of random tokens."""
    grid, factor = SIDE // 14, 2
    tokens = (grid // factor) ** 2
    size = Size(SIDE, SIDE)
    config = model.config
    ids = torch.randint(1000, 100_000, (TEXT,))
    image = torch.full((tokens,), config.image_token_id)
    start, end = torch.tensor([config.vision_start_token_id]), torch.tensor([config.vision_end_token_id])
    prefix = EncodedPrompt(
        token_ids=torch.cat([ids[:20], start, image, end, ids[20:]]),
        image=EncodedImage(
            pixel_values=torch.randn(grid * grid, 3 * 2 * 14 * 14),
            grid_thw=torch.tensor([[1, grid, grid]]),
            tokens=tokens,
            frames=Frames(original=size, model=size),
        ),
    )
    return Branches(prefix=prefix, branches=list(torch.randint(1000, 100_000, (N, LENGTH))))


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
    parser.add_argument("--shape", choices=sorted(SHAPES), default="3b")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--padded-batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args.shape, args.layers, device)
    work = prefix_tree(model)
    plain_s, plain_gib = measured(model, lambda: padded(model, work, device, args.padded_batch), device, args.rounds)
    use_shared_prefix(model)
    shared_s, shared_gib = measured(model, lambda: shared(model, work, device), device, args.rounds)
    square = torch.randn(2, 8192 if device == "cuda" else 1024, 8192 if device == "cuda" else 1024, device=device)
    a, b = square.to(torch.bfloat16)
    product_s, _ = measured(model, lambda: product(a, b), device, 10)
    ceiling = 2 * a.shape[0] ** 3 / product_s
    flops = 6 * sum(parameter.numel() for parameter in model.parameters())
    tokens = {"shared": len(work), "padded": N * (len(work.prefix.token_ids) + LENGTH)}
    figures = {
        "shape": args.shape,
        "layers": args.layers,
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "samples_per_s": {"shared": N / shared_s, "padded": N / plain_s},
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
