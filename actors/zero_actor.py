"""One ZeRO rank in an actor of its own: what GRPO's learner and the supervised one have in common."""

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from learner.config import ZeroConfig
from umrg.prompts import PromptSpec

if TYPE_CHECKING:
    from learner.background import Records
    from learner.zero import ZeroRank


class ZeroActor:
    """Rank `rank` of `config.ranks`. `start` must have returned on every rank before anything else is called, and what
    is a collective must be called on every rank. updates: that the whole run makes. temperature: of the distribution
    whose log-probs are learnt from. run: where all ranks write their parts of checkpoints."""

    def __init__(
        self,
        model: Path,
        config: ZeroConfig,
        *,
        rank: int,
        updates: int,
        seed: int,
        spec: PromptSpec,
        temperature: float = 1.0,
        entropy_learns: bool = False,
        run: Path | None = None,
    ) -> None:
        self._model, self._zero_config, self._rank, self._seed, self._spec = model, config, rank, seed, spec
        self._updates, self._temperature, self._entropy_learns, self._run = updates, temperature, entropy_learns, run
        self._zero: ZeroRank | None = None

    def address(self) -> tuple[str, int]:
        """Where the ranks may meet: this host and a free port of it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def start(self, host: str, port: int, seconds: float) -> None:
        """Meet the other ranks and load the model; each collective may last `seconds`. Raises ValueError where the
        run's folder is not to be seen from here, or the model cannot be loaded."""
        if self._run is not None and not self._run.is_dir():
            raise ValueError(
                f"the run's folder {self._run} is not on this node ({ray.util.get_node_ip_address()}); give runs=… on "
                "storage that all nodes share"
            )
        config = self._zero_config
        on_gpu = config.num_gpus > 0
        os.environ.update(
            RANK=str(self._rank),
            WORLD_SIZE=str(config.ranks),
            LOCAL_RANK="0",  # Ray shows each actor its own GPUs only
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
        )
        import deepspeed
        import torch

        from actors.threads import share_cores
        from learner.checkpoint import RankCheckpoints
        from learner.zero import ZeroRank

        share_cores(config.threads, config.ranks)
        torch.manual_seed(self._seed)
        # DeepSpeed would compile a reduction of its own at each machine's first start, for that very processor. gloo
        # reduces as well, and needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo", timeout=timedelta(seconds=seconds), verbose=False
        )
        self._zero = ZeroRank(
            self._model,
            config,
            self._spec,
            updates=self._updates,
            temperature=self._temperature,
            entropy_learns=self._entropy_learns,
            device="cuda" if on_gpu else "cpu",
        )
        self._checkpoints = RankCheckpoints(self._zero)

    def save(self, folder: Path) -> None:
        """Copy optimizer, model and random state, and begin to write them; all ranks."""
        self._checkpoints.begin(folder)

    def saved(self, seconds: float) -> "Records | None":
        """Once, the files that `save` wrote; None where this rank still writes after so many seconds."""
        return self._checkpoints.written(seconds)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; all ranks."""
        self._checkpoints.load(folder)

    def running(self) -> "ZeroRank":
        """The rank, once it is started."""
        assert self._zero is not None, "the learner was not started"
        return self._zero
