"""vLLM reads a folder's image processor as we do: it counts as many tokens for an image."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reasoner.prompter import Prompter, load_prompter
from umrg.frames import Size
from umrg.prompts import PromptSpec

TINY = Path(__file__).parents[2] / "models" / "tiny-reasoner"
AREAS = [
    {"size": {"shortest_edge": 6272, "longest_edge": 50176}},
    {"min_pixels": 6272, "max_pixels": 50176, "size": {"min_pixels": 1, "max_pixels": 2}},
    {"max_pixels": 50176, "image_processor_type": "Qwen2VLImageProcessorFast"},
]


@pytest.mark.slow
@pytest.mark.parametrize("images", AREAS)
def test_vllm_counts_as_many_tokens_for_an_image(tmp_path: Path, images: dict[str, object]) -> None:
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": 14, "merge_size": 2, **images}))
    config = ModelConfig(model=str(folder), max_model_len=1024, dtype="float32")
    info = MULTIMODAL_REGISTRY.create_processor(config).info
    prompter = load_prompter(folder)
    for width, height in [(1, 1), (1, 200), (28, 28), (447, 449), (700, 500), (3000, 2000), (5000, 300)]:
        counted = info.get_num_image_tokens(
            image_width=width, image_height=height, image_processor=info.get_image_processor(), mm_kwargs={}
        )
        assert counted == prompter.image_tokens(Size(width, height)), (width, height)


def assert_vllm_sees_alike(folder: Path, prompter: Prompter) -> None:
    """vLLM's own processor of a folder, with the arguments that the engine gives it, makes a prompter's prompts, and
    plans for the largest image that the prompter lets through."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs
    from vllm.multimodal.processing.context import TimingContext

    config = ModelConfig(
        model=str(folder),
        max_model_len=1024,
        dtype="float32",
        mm_processor_kwargs=prompter.vllm_arguments,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    tokens = processor.info.get_mm_max_tokens_per_item(1024, {"image": 1})
    most = prompter.resize.max_pixels // prompter.resize.factor**2
    assert tokens["image"] == most
    text = prompter.processor.tokenizer(prompter.chat_text("Where?"), add_special_tokens=False)["input_ids"]
    for width, height in [(1, 1), (1, 200), (28, 28), (447, 449), (700, 500), (1200, 900)]:
        image = np.zeros((height, width, 3), dtype=np.uint8)
        items = processor.info.parse_mm_data({"image": [Image.fromarray(image)]})
        made = processor.apply(ProcessorInputs(prompt=text, mm_data_items=items), TimingContext())
        encoded = prompter.encode("Where?", prompter.encode_image(image))
        assert made["prompt_token_ids"] == encoded.token_ids.tolist(), (width, height)
        grid = made["mm_kwargs"]["image"][0].get_data()["image_grid_thw"]
        assert grid.tolist() == encoded.image.grid_thw[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("least", "most"), [(6272, 50176), (None, 784), (200_704, None), (None, None)])
def test_vllm_keeps_the_bounds_of_a_configuration(least: int | None, most: int | None) -> None:
    spec = PromptSpec.of_model(TINY).but(min_pixels=least, max_pixels=most)
    assert_vllm_sees_alike(TINY, load_prompter(TINY, spec))
