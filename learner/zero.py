"""One rank of the learner: a DeepSpeed ZeRO engine around the policy, its GRPO update and its weights.

    groups of this rank ──encode──► micro-batches ──forward, grpo_loss, backward──► step

Every rank makes the same number of forward and backward calls, also when it has nothing left: a rank that stood aside
would leave the others waiting in a collective. DeepSpeed averages gradients over the ranks, so a loss that is a mean
over all tokens of the step is multiplied by the number of ranks.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import distributed

from learner.config import LearnerConfig
from learner.grpo import TokenLoss, grpo_loss
from learner.policy import Policy
from learner.reasoner import load_reasoner
from learner.scored_group import LearnerGroup, ScoredGroup, encode_group
from learner.shared_prefix import Branches, micro_batches, pack_groups
from learner.update_report import UpdateReport
from umrg.prompts import PromptSpec

BUCKET_BYTES = 1 << 30
_STATE = "deepspeed"


class FrozenParameter(RuntimeError):
    """A parameter that should learn had no gradient, or did not change, at the first update."""


class ZeroLearner:
    """A rank. torch.distributed must be initialised; every method that says "all ranks" is a collective."""

    def __init__(
        self, model: Path, config: LearnerConfig, spec: PromptSpec, *, temperature: float, device: str = "cpu"
    ) -> None:
        self.config = config
        dtype = getattr(torch, config.dtype)
        self.reasoner = load_reasoner(model, spec, device=device, dtype=dtype)
        self.reasoner.model.model.visual.requires_grad_(not config.freeze_vision)
        self.policy = Policy(self.reasoner.model, temperature=temperature, forbidden=self.reasoner.vision_tokens).to(
            device
        )
        vectors = [parameter for _, parameter in self._trained() if parameter.ndim < 2]
        matrices = [parameter for _, parameter in self._trained() if parameter.ndim >= 2]
        self._base_lrs = (config.lr, config.vector_lr or config.lr)
        trained = [{"params": matrices, "lr": self._base_lrs[0]}, {"params": vectors, "lr": self._base_lrs[1]}]
        self.engine, *_ = deepspeed.initialize(
            model=self.policy, model_parameters=trained, config=deepspeed_config(config)
        )
        self._reference = self._load_reference(model, temperature, dtype, device) if config.kl > 0 else None
        self._device = device
        self._updates = 0
        self._checked = False

    def update(self, groups: Sequence[ScoredGroup]) -> UpdateReport:
        """Learn from a step's groups, in mini-batches; all ranks, each given all groups and taking its own."""
        size = self.config.mini_batch or len(groups)
        totals = torch.zeros(5, dtype=torch.float64)
        gap = 0.0
        norm = 0.0
        for start in range(0, len(groups), size):
            batch = groups[start : start + size]
            tokens = sum(group.tokens for group in batch)
            sums = self._accumulate(batch, tokens)
            if start == 0:
                gap = float(sums[3] / sums[4].clamp(min=1))
            norm = self._step()
            totals += sums
        tokens = sum(group.tokens for group in groups)
        loss, kl, clipped, *_ = (totals / tokens).tolist()
        return UpdateReport(
            loss=loss,
            kl=kl,
            clipped=clipped,
            engine_gap=gap,
            grad_norm=norm,
            lr=self.config.lr * self._warmth(self._updates - 1),
            tokens=tokens,
            updates=math.ceil(len(groups) / size),
        )

    @torch.no_grad()
    def logprobs(self, branches: Branches) -> list[float]:
        """Log-probs of a prompt's answers, one after another; all ranks."""
        packed = pack_groups([branches], self.reasoner.model).to(self._device)
        values: list[float] = self.engine(packed).logprobs.tolist()
        return values

    def named_weights(self) -> Iterator[dict[str, torch.Tensor]]:
        """Weights under their Hugging Face names, on the CPU, in buckets of about `BUCKET_BYTES`; all ranks. Each is
        a copy, so that it outlives the gathering of partitioned parameters."""
        bucket: list[tuple[str, torch.nn.Parameter]] = []
        size = 0
        for name, parameter in self.policy.named_weights():
            bucket.append((name, parameter))
            size += int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()
            if size >= BUCKET_BYTES:
                yield self._gathered(bucket)
                bucket, size = [], 0
        if bucket:
            yield self._gathered(bucket)

    def save_model(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder; all ranks, of which the first writes."""
        state = {name: tensor for bucket in self.named_weights() for name, tensor in bucket.items()}
        if distributed.get_rank() == 0:
            self.reasoner.save(folder, state)

    def save_state(self, folder: Path) -> None:
        """Write all that the next step depends on; all ranks, each its own part."""
        state = {"updates": self._updates, "checked": self._checked, "rng": torch.get_rng_state()}
        self.engine.save_checkpoint(str(folder), tag=_STATE, client_state=state, save_latest=False)

    def load_state(self, folder: Path) -> None:
        """Go on from what `save_state` wrote, with as many ranks; all ranks."""
        loaded, state = self.engine.load_checkpoint(str(folder), tag=_STATE)
        if loaded is None:
            raise ValueError(f"{folder} holds no state of a learner; give a checkpoint of this project")
        self._updates, self._checked = state["updates"], state["checked"]
        torch.set_rng_state(state["rng"])

    def _load_reference(self, model: Path, temperature: float, dtype: torch.dtype, device: str) -> Any:
        frozen = load_reasoner(model, device=device, dtype=dtype).model.requires_grad_(False)
        reference = Policy(frozen, temperature=temperature, forbidden=self.reasoner.vision_tokens).to(device)
        if self.config.zero_stage < 3:
            return reference.eval()
        engine, *_ = deepspeed.initialize(model=reference, config=deepspeed_config(self.config, optimizer=False))
        return engine.eval()

    def _accumulate(self, groups: Sequence[ScoredGroup], tokens: int) -> torch.Tensor:
        """Gradients of a mini-batch; sums [5] over all ranks' tokens of loss, kl, clipped, |engine gap| and 1. A group
        without spread teaches nothing unless a divergence counts, and is left out."""
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        own = [encode_group(self.reasoner, group) for group in groups[rank::ranks]]
        telling = [group for group in own if self._reference is not None or group.advantages.any()]
        batches = micro_batches(telling, self.config.micro_batch_tokens)
        count = torch.tensor(len(batches))
        distributed.all_reduce(count, op=distributed.ReduceOp.MAX)
        sums = torch.zeros(5, dtype=torch.float64)
        rounds = max(1, int(count))
        for i in range(rounds):
            self.engine.set_gradient_accumulation_boundary(i == rounds - 1)
            idle = i >= len(batches)
            batch = [encode_group(self.reasoner, groups[0])] if idle else batches[i]
            losses, gap = self._forward(batch)
            self.engine.backward(losses.loss.sum() * (0.0 if idle else ranks / tokens), scale_wrt_gas=False)
            if not idle:
                values = (losses.loss.detach(), losses.kl, losses.clipped, gap, torch.ones_like(gap))
                sums += torch.stack([value.double().sum().cpu() for value in values])
        distributed.all_reduce(sums)
        if not torch.isfinite(sums).all():
            raise FloatingPointError("the loss is no longer finite; lower learner.lr")
        return sums

    def _forward(self, groups: Sequence[LearnerGroup]) -> tuple[TokenLoss, torch.Tensor]:
        packed = pack_groups([group.branches for group in groups], self.reasoner.model).to(self._device)
        old = torch.cat([group.old_logprobs for group in groups]).to(self._device)
        logprobs = self.engine(packed).logprobs
        reference = None
        if self._reference is not None:
            with torch.no_grad():
                reference = self._reference(packed).logprobs
        losses = grpo_loss(
            logprobs,
            old,
            torch.cat([group.advantages for group in groups]).to(self._device),
            clip=self.config.clip,
            reference_logprobs=reference,
            kl_weight=self.config.kl,
        )
        return losses, (logprobs.detach() - old).abs()

    def _step(self) -> float:
        """Clip, step and count; the gradient's norm before clipping."""
        for group, lr in zip(self.engine.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * self._warmth(self._updates)
        before = None if self._checked else (self._without_gradient(), self._masters())
        self.engine.step()
        self._updates += 1
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if before is not None and norm > 0:
            idle, masters = before
            after = self._masters()
            if idle or (idle := [name for name, value in masters.items() if after[name] == value]):
                raise FrozenParameter(
                    f"{idle[0]} had no gradient or did not change at the first update ({len(idle)} such parameters); "
                    "freeze it by configuration or mend the model"
                )
            self._checked = True
        return norm

    def _warmth(self, update: int) -> float:
        """Share of the learning rate that an update has."""
        return min(1.0, (update + 1) / (self.config.warmup + 1))

    def _masters(self) -> dict[str, float]:
        """Of each trained parameter's fp32 master, a number that changes when it does."""
        found = {}
        for name, parameter in self._trained():
            master = safe_get_full_fp32_param(parameter)
            values = (parameter if master is None else master).detach().double().flatten()
            weights = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device).sin()
            found[name] = float(values @ weights)
        return found

    def _without_gradient(self) -> list[str]:
        found = []
        for name, parameter in self._trained():
            gradient = safe_get_full_grad(parameter)
            if gradient is None or not gradient.any():
                found.append(name)
        return found

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.policy.named_weights() if parameter.requires_grad]

    def _gathered(self, bucket: Sequence[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket], enabled=self._partitioned):
            return {name: parameter.detach().cpu().clone().contiguous() for name, parameter in bucket}

    @property
    def _partitioned(self) -> bool:
        return self.config.zero_stage == 3


def deepspeed_config(config: LearnerConfig, *, optimizer: bool = True) -> dict[str, Any]:
    """DeepSpeed's own configuration. Micro-batches are ours, so its batch sizes mean nothing here."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": {"stage": config.zero_stage},
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
