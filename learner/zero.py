"""One rank of a DeepSpeed ZeRO engine around a reasoner: forward, backward, optimizer step, weights.

Forward and backward passes are collectives, so every rank makes the same number of them (`learner.collectives`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch.nn.utils import get_total_norm
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from learner.collectives import Ranks
from learner.config import REDUCE_BUCKET, LearnerTask, ZeroConfig
from learner.lora import Weight, adapter_weights, add_adapters, starts_without_gradient, weights
from learner.optimizer import adamw, lr_factor, set_lr
from learner.optimizer_state import gradient_buffers, state_tensors
from learner.parking import Parking
from learner.policy import Policy, freeze
from learner.shared_prefix import Branches, PackedSequence, TokenScores, pack
from reasoner.model import Reasoner, load_reasoner

BUCKET_BYTES = 1 << 30
"""Size of the buckets in which weights and optimizer state are copied to the CPU."""
_CHUNK = 1 << 24


class FrozenParameter(RuntimeError):
    """A parameter that should learn had no gradient, or did not change, at the first update."""


class ZeroRank:
    """One rank. The process group must have been joined (`learner.collectives`); every method marked "all ranks" is a
    collective."""

    def __init__(self, config: ZeroConfig, task: LearnerTask, *, device: str = "cpu") -> None:
        self.config, self.task, self.device = config, task, device
        self.ranks = Ranks(device)
        self.parking = Parking(device)
        self.reasoner = self.loaded(device, partitioned=config.zero_stage == 3)
        self.updates_made = 0
        self.checked = False  # whether an update has shown that every parameter learns
        freeze(self.reasoner.model, config.freeze)
        if config.lora:
            add_adapters(self.reasoner.model, config.lora)
        if config.checkpoints_layers:
            # transformers checkpoints layers only while `training` is set; there is no dropout that this would enable.
            self.reasoner.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.reasoner.model.train()
        self.policy = self.around(self.reasoner)
        optimizer = adamw((each for _, each in self.trained()), config, fused=self.device != "cpu")
        self.engine, *_ = deepspeed.initialize(model=self.policy, optimizer=optimizer, config=deepspeed_config(config))

    def loaded(self, device: str, *, partitioned: bool = False) -> Reasoner:
        """The model that the run begins with. partitioned: over the ranks from the first, so that no rank ever holds
        all of it; all ranks."""
        dtype = getattr(torch, self.config.dtype)
        with partitioned_at_birth(self.config) if partitioned else nullcontext():
            return load_reasoner(self.task.model, self.task.spec, device=device, dtype=dtype)

    def around(self, reasoner: Reasoner, device: str | None = None) -> Policy:
        """A model as a policy with this task's sampling distribution, on a device; None for this rank's."""
        return Policy(
            reasoner.model,
            temperature=self.task.temperature,
            forbidden=reasoner.vision_tokens,
            entropy_learns=self.config.entropy_learns,
        ).to(device or self.device)

    def scores(self, trees: Sequence[Branches]) -> TokenScores:
        """Scores of some prefix trees, packed into one sequence; all ranks."""
        scores: TokenScores = self.engine(self.packed(trees))
        return scores

    def packed(self, trees: Sequence[Branches]) -> PackedSequence:
        """Prefix trees packed into one sequence, on this rank's device."""
        return pack(trees, self.reasoner.model).to(self.device)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradients of one micro-batch; all ranks. loss: this rank's summand of the update's loss. last:
        it is the last micro-batch of the update."""
        # Otherwise DeepSpeed counts by `gradient_accumulation_steps`, and takes every micro-batch for the last.
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks, while this loss is a sum over ranks: its denominators already are
        # those of all ranks' tokens.
        self.engine.backward(loss * self.ranks.count, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip the accumulated gradients and update; returns their norm before clipping; all ranks. Raises
        FrozenParameter if, at the first update, something that should learn does not."""
        set_lr(self.engine.optimizer, lr_factor(self.updates_made, self.task.updates, self.config))
        before = None if self.checked else (self._without_gradient(), self._fingerprints())
        # DeepSpeed reports the norm only where it has taken over the gradients. At stage 0 in float32 they stay with
        # the parameters, and are gone after the step.
        held = get_total_norm([each.grad for _, each in self.trained() if each.grad is not None])
        self.engine.step()
        self.updates_made += 1
        norm = float(self.engine.get_global_grad_norm() or held)
        # A norm of 0, such as of zero-variance groups alone, proves nothing: the next update is looked at.
        if before is not None and norm > 0:
            frozen, fingerprints = before
            after = self._fingerprints()
            unmoved = [name for name, value in fingerprints.items() if after[name] == value]
            if frozen := frozen or [name for name in unmoved if not starts_without_gradient(name)]:
                raise FrozenParameter(
                    f"{frozen[0]} had no gradient or did not change at the first update "
                    f"({len(frozen)} such parameters); freeze it by configuration or mend the model"
                )
            self.checked = True
        return norm

    @property
    def lr(self) -> float:
        """Learning rate of matrices at the last update."""
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def named_weights(
        self, kept: Callable[[int], bool] | None = None, *, everything: bool = True
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Weights by the model's parameter names, adapters merged, in buckets of about `BUCKET_BYTES`; all ranks. They
        are where the model is, and valid until the next bucket is asked for.

        kept: which buckets this rank gets, by number, where the others are empty; None for all on the first rank and
        none on the others. everything: those of modules of which nothing learns too."""
        kept = kept or (lambda _: self.ranks.rank == 0)
        for i, bucket in enumerate(_buckets(self._weights(everything))):
            with self._gathered(bucket):
                yield {weight.name: weight.tensor() for weight in bucket} if kept(i) else {}

    def bucket_contents(self) -> list[dict[str, int]]:
        """Of each bucket of `named_weights`, the size of each weight in bytes, by name."""
        return [{weight.name: weight.nbytes for weight in bucket} for bucket in _buckets(self._weights(True))]

    def weight_shapes(self, *, everything: bool = True) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, precision and shape of each tensor of `named_weights`, in its order, with nothing gathered."""
        found = []
        for weight in self._weights(everything):
            base = weight.parameters[0]
            # A partitioned parameter is empty; DeepSpeed keeps its shape in `ds_shape`.
            found.append((weight.name, base.dtype, tuple(getattr(base, "ds_shape", base.shape))))
        return found

    def adapter(self) -> dict[str, torch.Tensor]:
        """The adapters' weights as copies on the CPU, on the first rank; empty on the others, and without adapters; all
        ranks."""
        bucket = list(adapter_weights(self.reasoner.model))
        with self._gathered(bucket):
            return {weight.name: on_cpu(weight.tensor()) for weight in bucket} if self.ranks.rank == 0 else {}

    def _weights(self, everything: bool) -> Iterator[Weight]:
        """Weights by whole modules of an engine, of which a part cannot be replaced: the vision tower with its merger,
        and the language model with its head."""
        learning = {in_tower(name) for name, _ in self.trained()}
        return (each for each in weights(self.reasoner.model) if everything or in_tower(each.name) in learning)

    def trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters that learn, by the model's names for them."""
        return [(name, each) for name, each in self.reasoner.model.named_parameters() if each.requires_grad]

    def _fingerprints(self) -> dict[str, float]:
        """Of each trained parameter's fp32 master weights, a number that changes when they do. In bfloat16 the
        parameter itself may round a small update away."""
        found = {}
        for name, parameter in self.trained():
            master = safe_get_full_fp32_param(parameter)
            values = (parameter if master is None else master).detach().flatten()
            # In chunks: a whole embedding in double precision would take gigabytes.
            found[name] = sum(_fingerprint(chunk) for chunk in values.split(_CHUNK))
        return found

    def _without_gradient(self) -> list[str]:
        """Names of the trained parameters whose accumulated gradient is missing or 0."""
        found = []
        for name, parameter in self.trained():
            gradient = safe_get_full_grad(parameter)
            if (gradient is None or not gradient.any()) and not starts_without_gradient(name):
                found.append(name)
        return found

    def _gathered(self, bucket: Sequence[Weight]) -> AbstractContextManager[Any]:
        """Within it the parameters of some weights are whole, where stage 3 has partitioned them; all ranks."""
        parameters = [parameter for weight in bucket for parameter in weight.parameters]
        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            parameters, enabled=self.config.zero_stage == 3
        )
        return gathered

    def park(self, *, state: bool) -> None:
        """Give the GPU's memory away that is not needed to score or to export weights. state: that of the optimizer
        too, which then waits in host memory."""
        if state and not self.parking.parked:
            optimizer = self.engine.optimizer
            self.parking.park(state_tensors(optimizer, self.trained(), self.ranks), gradient_buffers(optimizer))
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what an update's activations took

    def unpark(self) -> None:
        """Take back what was given away, before anything is learnt or loaded."""
        self.parking.unpark()


def in_tower(name: str) -> bool:
    """Whether a parameter of a Qwen-VL model belongs to its vision tower or the merger."""
    return name.startswith("model.visual.")


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory."""
    return tensor.to("cpu", copy=True).contiguous()


def _buckets(found: Iterable[Weight]) -> Iterator[list[Weight]]:
    bucket: list[Weight] = []
    size = 0
    for weight in found:
        bucket.append(weight)
        size += weight.nbytes
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _fingerprint(values: torch.Tensor) -> float:
    # Weighted by position: in a plain sum, changes of opposite sign could cancel.
    weights = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device).sin()
    return float(values.double() @ weights)


@contextmanager
def partitioned_at_birth(config: ZeroConfig) -> Iterator[None]:
    """Within it transformers loads a model under DeepSpeed's `zero.Init`: each parameter is partitioned over the ranks
    as soon as it is made. transformers finds the configuration by a weak reference, so it is held here."""
    held = HfDeepSpeedConfig(deepspeed_config(config.model_copy(update={"zero_stage": 3}), optimizer=False))
    try:
        yield
    finally:
        del held
        unset_hf_deepspeed_config()


def load_partitioned(zero: ZeroRank) -> Any:
    """The model that the run begins with, frozen and partitioned over the ranks, and called like a rank's engine; all
    ranks."""
    frozen = zero.loaded(zero.device, partitioned=True)
    frozen.model.requires_grad_(False)
    config = zero.config.model_copy(update={"zero_stage": 3})
    engine, *_ = deepspeed.initialize(model=zero.around(frozen), config=deepspeed_config(config, optimizer=False))
    engine.eval()
    return engine


def deepspeed_config(config: ZeroConfig, *, optimizer: bool = True) -> dict[str, Any]:
    """DeepSpeed's own configuration. optimizer: False for a model that only runs forward."""
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": REDUCE_BUCKET}
    if config.offload != "none" and optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.num_gpus > 0}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": config.num_gpus > 0}
    settings: dict[str, Any] = {
        # Required by DeepSpeed and without effect: updates have any number of micro-batches (`ZeroRank.backward`).
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        # With offload DeepSpeed would insist on its own CPUAdam, which is compiled at the first start.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if config.dtype == "bfloat16":
        settings |= {
            "bf16": {"enabled": True},
            # A sum of dozens of micro-batches in bfloat16 loses the small ones. The first key is the precision in which
            # gradients are accumulated, the second that in which they are reduced over the ranks.
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return settings
