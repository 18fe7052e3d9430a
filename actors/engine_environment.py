"""The environment of a rollout's process; apart from `actors.engine`, which imports vLLM."""

from actors.config import RolloutConfig


def engine_environment(config: RolloutConfig) -> dict[str, str]:
    """Environment variables that a process must have before it imports vLLM."""
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_KVCACHE_SPACE": str(config.cpu_cache_gib),
        # Left alone, vLLM pins its threads to core ids and keeps one core for itself.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
