"""One rank of a DeepSpeed ZeRO engine around a reasoner: forward, backward, step, weights and state.

Every rank makes the same number of forward and backward calls, also when it has nothing left: a rank that stood aside
would leave the others waiting in a collective. DeepSpeed averages gradients over the ranks, so a loss that is summed
over all ranks' tokens is multiplied by the number of ranks.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import distributed
from torch.nn.utils import get_total_norm

from learner.config import LearnerTask, OptimizerConfig, ZeroConfig
from learner.lora import Weight, adapter_weights, add_adapters, starts_without_gradient, weights
from learner.policy import Policy, freeze
from learner.shared_prefix import Branches, PackedSequence, TokenScores, pack
from reasoner.model import Reasoner, load_reasoner


def lr_share(update: int, updates: int, config: OptimizerConfig) -> float:
    """Share of its learning rate that update 0, 1, … of so many has: a linear warm-up, then constant, or down to
    `final_lr` linearly or by half a cosine."""
    if update < config.warmup:
        return (update + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (update - config.warmup) / max(1, updates - config.warmup))
    fallen = progress if config.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1 - (1 - config.final_lr) * fallen


BUCKET_BYTES = 1 << 30
_PART = 1 << 24


class FrozenParameter(RuntimeError):
    """A parameter that should learn had no gradient, or did not change, at the first update."""


class ZeroRank:
    """A rank. torch.distributed must be initialised; every method that says "all ranks" is a collective."""

    def __init__(self, config: ZeroConfig, task: LearnerTask, *, device: str = "cpu") -> None:
        self.config, self.task, self.device = config, task, device
        self.reasoner = load_reasoner(task.model, task.spec, device=device, dtype=self._dtype)
        self.updates_made = 0
        self.checked = False  # that all parameters learn
        freeze(self.reasoner.model, config.freeze)
        if config.lora:
            add_adapters(self.reasoner.model, config.lora)
        if config.gradient_checkpointing:
            # Layers look at `training`; there is no dropout that it would switch on.
            self.reasoner.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.reasoner.model.train()
        self.policy = self._policy(self.reasoner)
        vectors = [parameter for _, parameter in self.trained() if parameter.ndim < 2]
        matrices = [parameter for _, parameter in self.trained() if parameter.ndim >= 2]
        rates = ((matrices, config.lr), (vectors, config.vector_lr or config.lr))
        groups = [{"params": parameters, "lr": lr} for parameters, lr in rates if parameters]
        self._base_lrs = [lr for parameters, lr in rates if parameters]
        self.engine, *_ = deepspeed.initialize(
            model=self.policy, model_parameters=groups, config=deepspeed_config(config)
        )

    def scores(self, groups: Sequence[Branches]) -> TokenScores:
        """Of the scored tokens of some groups, in one row; all ranks."""
        scores: TokenScores = self.engine(self.packed(groups))
        return scores

    def packed(self, groups: Sequence[Branches]) -> PackedSequence:
        """Groups in one row, on this rank's device."""
        return pack(groups, self.reasoner.model).to(self.device)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of a share of the update's loss, which is summed over ranks; all ranks. last: of the
        update's."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * distributed.get_world_size(), scale_wrt_gas=False)

    def step(self) -> float:
        """Clip and update, after all gradients were added; the gradient's norm before clipping; all ranks. Raises
        FrozenParameter where something that should have learnt did not."""
        for group, lr in zip(self.engine.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * lr_share(self.updates_made, self.task.updates, self.config)
        before = None if self.checked else (self._without_gradient(), self._masters())
        # DeepSpeed tells the norm only where ZeRO holds the gradients; elsewhere they lie with the parameters.
        held = get_total_norm([each.grad for _, each in self.trained() if each.grad is not None])
        self.engine.step()
        self.updates_made += 1
        norm = float(self.engine.get_global_grad_norm() or held)
        if before is not None and norm > 0:
            idle, masters = before
            after = self._masters()
            unmoved = [name for name, value in masters.items() if after[name] == value]
            if idle := idle or [name for name in unmoved if not starts_without_gradient(name)]:
                raise FrozenParameter(
                    f"{idle[0]} had no gradient or did not change at the first update ({len(idle)} such parameters); "
                    "freeze it by configuration or mend the model"
                )
            self.checked = True
        return norm

    @property
    def lr(self) -> float:
        """Of the last update."""
        return self._base_lrs[0] * lr_share(max(0, self.updates_made - 1), self.task.updates, self.config)

    @functools.cached_property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        return dtype

    def frozen_copy(self) -> Any:
        """The model that the run began with, which never learns, called like the engine; all ranks."""
        frozen = load_reasoner(self.task.model, self.task.spec, device=self.device, dtype=self._dtype)
        frozen.model.requires_grad_(False)
        policy = self._policy(frozen)
        if self.config.zero_stage < 3:
            return policy.eval()
        engine, *_ = deepspeed.initialize(model=policy, config=deepspeed_config(self.config, optimizer=False))
        return engine.eval()

    def named_weights(self, *, to_all: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Weights under the names of the model's parameters, adapters merged, on the CPU, in buckets of about
        `BUCKET_BYTES`; all ranks, of which the first gets them and the others empty ones, or with `to_all` each. Each
        tensor is a copy, so that it outlives the gathering of partitioned parameters."""
        bucket: list[Weight] = []
        size = 0
        for weight in weights(self.reasoner.model):
            bucket.append(weight)
            size += weight.nbytes
            if size >= BUCKET_BYTES:
                yield self._gathered(bucket, to_all)
                bucket, size = [], 0
        if bucket:
            yield self._gathered(bucket, to_all)

    def adapter(self) -> dict[str, torch.Tensor]:
        """The adapters' weights, on the CPU; all ranks, each of which gets them. None where there are no adapters."""
        return self._gathered(list(adapter_weights(self.reasoner.model)), to_all=True)

    def trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters that learn, under the names that the model has for them."""
        return [(name, each) for name, each in self.reasoner.model.named_parameters() if each.requires_grad]

    def _policy(self, reasoner: Reasoner) -> Policy:
        return Policy(
            reasoner.model,
            temperature=self.task.temperature,
            forbidden=self.reasoner.vision_tokens,
            entropy_learns=self.config.entropy_learns,
        ).to(self.device)

    def _masters(self) -> dict[str, float]:
        """Of each trained parameter's fp32 master, a number that changes when it does."""
        found = {}
        for name, parameter in self.trained():
            master = safe_get_full_fp32_param(parameter)
            values = (parameter if master is None else master).detach().flatten()
            # In parts: one of an embedding's size, in double precision, would be gigabytes.
            found[name] = sum(_fingerprint(part) for part in values.split(_PART))
        return found

    def _without_gradient(self) -> list[str]:
        found = []
        for name, parameter in self.trained():
            gradient = safe_get_full_grad(parameter)
            if (gradient is None or not gradient.any()) and not starts_without_gradient(name):
                found.append(name)
        return found

    def _gathered(self, bucket: Sequence[Weight], to_all: bool) -> dict[str, torch.Tensor]:
        parameters = [parameter for weight in bucket for parameter in weight.parameters]
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.config.zero_stage == 3):
            if distributed.get_rank() != 0 and not to_all:
                return {}
            return {weight.name: weight.tensor() for weight in bucket}


def _fingerprint(values: torch.Tensor) -> float:
    weights = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device).sin()
    return float(values.double() @ weights)


def deepspeed_config(config: ZeroConfig, *, optimizer: bool = True) -> dict[str, Any]:
    """DeepSpeed's own configuration. Micro-batches are ours, so its batch sizes mean nothing here."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload != "none" and optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.num_gpus > 0}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": config.num_gpus > 0}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if optimizer:
        parameters = {
            "lr": config.lr,
            "betas": config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            "torch_adam": True,
        }
        settings["optimizer"] = {"type": "AdamW", "params": parameters}
    return settings
