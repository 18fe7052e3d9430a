"""Objectives, the shared-prefix forward, the ZeRO engine and checkpoints of one rank; torch and DeepSpeed, no Ray."""
