"""The reasoner: the model of a Qwen-VL folder together with its prompter."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion

from reasoner.prompter import EncodedPrompt, Prompter, loading, prompter_of_folder
from umrg.mistake import Mistake
from umrg.prompts import PromptSpec


@dataclass(frozen=True, kw_only=True)
class Reasoner(Prompter):
    """A prompter and its model."""

    model: Any
    """A transformers model of one of the supported Qwen-VL architectures."""

    @torch.inference_mode()
    def generate(self, prompts: list[EncodedPrompt], *, max_tokens: int = 512) -> list[str]:
        """Greedy completions, one per prompt, as text by `completion_text`."""
        width = max(len(prompt.token_ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.processor.tokenizer.pad_token_id)
        # Padded on the left, because generation continues at the right end of each sequence.
        for sequence, prompt in zip(ids, prompts, strict=True):
            sequence[width - len(prompt.token_ids) :] = prompt.token_ids
        attention = torch.stack([torch.arange(width) >= width - len(prompt.token_ids) for prompt in prompts]).long()
        output = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=attention.to(self.model.device),
            mm_token_type_ids=(ids == self.image_token_id).int().to(self.model.device),
            pixel_values=torch.cat([p.image.pixel_values for p in prompts]).to(self.model.device, self.model.dtype),
            image_grid_thw=torch.cat([p.image.grid_thw for p in prompts]).to(self.model.device),
            max_new_tokens=max_tokens,
            do_sample=False,
            suppress_tokens=list(self.vision_tokens),  # the engine excludes them by a logit bias
            repetition_penalty=1.0,  # overrides that of Qwen's folders, which neither rollout nor service applies
        )
        return [self.completion_text(ids) for ids in output[:, width:].tolist()]

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder, with the prompt spec beside it."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.prompt.save(folder)

    def other_files(self) -> dict[str, bytes]:
        """All files that `save` writes except the weights, as bytes by file name."""
        with TemporaryDirectory() as name:
            folder = Path(name)
            self.model.config.save_pretrained(folder)
            if self.model.can_generate():
                self.model.generation_config.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            self.prompt.save(folder)
            return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def as_saved(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights renamed from the model's parameter names to those in a saved folder."""
        return dict(revert_weight_conversion(self.model, dict(weights)))

    def shard_index(self, shards: Mapping[str, Sequence[str]], size: int) -> bytes:
        """The content of `model.safetensors.index.json`. shards: the model's parameter names by the file that holds
        them. size: the size of all weights in bytes."""
        places = {
            name: file
            for file, names in shards.items()
            for name in self.as_saved({name: torch.empty(0) for name in names})
        }
        return json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2).encode()


def load_reasoner(
    folder: Path, spec: PromptSpec | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Reasoner:
    """Load a Qwen-VL folder. Raises ValueError as `load_prompter` does, and if weights are missing."""
    with loading(folder):
        prompter = prompter_of_folder(folder, spec)
        model, found = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        if missing := sorted(found["missing_keys"]):
            raise Mistake(f"its weights lack {missing[0]}")
        return with_model(prompter, model.to(device).eval())


def with_model(prompter: Prompter, model: Any) -> Reasoner:
    """A prompter combined with its model."""
    return Reasoner(model=model, **{field.name: getattr(prompter, field.name) for field in fields(prompter)})
