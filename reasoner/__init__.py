"""A Qwen-VL folder as a prompter (processor and prompt) and as a model. transformers; no DeepSpeed, no Ray."""
