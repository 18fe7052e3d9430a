"""GRPO arithmetic, the shared-prefix forward, the ZeRO engine and checkpoints; torch without Ray."""
