"""Settings every test, and every process a test starts, runs under."""

import os

# Nothing may reach out of the machine: a test that needs the network would pass here and fail there.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
# Tokenizers warn at each fork when their thread pool is on.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
