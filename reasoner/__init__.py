"""A Qwen-VL folder as a prompter (processor and prompt) and as a model. Needs transformers, but no DeepSpeed or Ray."""
