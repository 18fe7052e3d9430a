"""The sizes of published reasoners, as transformers configurations: for benchmarks, tests and estimates that need a
real shape and no weights."""

from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen3VLConfig


def qwen2_5_vl(text: dict[str, int], *, vocabulary: int, tied: bool) -> Any:
    """A Qwen2.5-VL. text: sizes of its language model; those of the vision tower are the same in all."""
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
    }
    return Qwen2_5_VLConfig(
        text_config={
            **text,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        vision_config=vision,
        tie_word_embeddings=tied,
    )


def qwen2_5_vl_3b() -> Any:
    """Qwen2.5-VL-3B-Instruct: 3,754,622,976 parameters."""
    text = {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    }
    return qwen2_5_vl(text, vocabulary=151936, tied=True)


def qwen2_5_vl_7b() -> Any:
    """Qwen2.5-VL-7B-Instruct, and Lingshu-7B that was trained from it: 8,292,166,656 parameters."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    return qwen2_5_vl(text, vocabulary=152064, tied=False)


def qwen3_vl_8b() -> Any:
    """Qwen3-VL-8B-Instruct: 8,767,123,696 parameters."""
    text = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "deepstack_visual_indexes": [8, 16, 24],
        "num_position_embeddings": 2304,
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


ARCHITECTURES = {
    "Qwen2.5-VL-3B": qwen2_5_vl_3b,
    "Qwen2.5-VL-7B": qwen2_5_vl_7b,
    "Qwen3-VL-8B": qwen3_vl_8b,
}
