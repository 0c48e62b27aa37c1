"""The whole recipe as dataclasses. `recipes/base.yaml` explains each key."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


def num(default: float | int | None, **bounds: float) -> Any:
    """Declare a number with bounds `ge`, `gt`, `le` or `lt`, checked by `config.bounds`."""
    return field(default=default, metadata=bounds)


def one_of(*allowed: Any) -> dict[str, tuple[Any, ...]]:
    """Return metadata for a key with one of these values; `int` is any whole number >= 1."""
    return {"one_of": allowed}


# In the functional form, because "reinforce++" is no Python name.
AdvantageEstimator = Enum(
    "AdvantageEstimator",
    {"grpo": "grpo", "rloo": "rloo", "reinforce++": "reinforce++", "gae": "gae"},
    module=__name__,
)


class KLEstimator(Enum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"
    abs = "abs"


class PolicyLoss(Enum):
    regular = "regular"
    dual_clip = "dual_clip"
    gspo = "gspo"
    cispo = "cispo"
    dr_grpo = "dr_grpo"


class TIS(Enum):
    none = "none"
    token = "token"
    sequence = "sequence"


class Resampling(Enum):
    none = "none"
    filter = "filter"
    replace = "replace"


class LossReduction(Enum):
    token_mean = "token_mean"
    sequence_mean = "sequence_mean"
    seq_mean_token_sum_norm = "seq_mean_token_sum_norm"


class SyncMode(Enum):
    disk = "disk"
    memory = "memory"
    merge = "merge"


class KLReference(Enum):
    base = "base"
    start = "start"


class Strategy(Enum):
    fsdp2 = "fsdp2"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DType(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class LRScheduler(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Logger(Enum):
    console = "console"
    wandb = "wandb"
    tensorboard = "tensorboard"


class Backend(Enum):
    vllm = "vllm"
    transformers = "transformers"


class Sampler(Enum):
    tpe = "tpe"
    random = "random"
    grid = "grid"


@dataclass(kw_only=True, slots=True)
class Data:
    train_data: list[str] = field(default_factory=list)
    val_data: list[str] = field(default_factory=list)
    question_column: str | None = None
    answer_column: str | None = None


@dataclass(kw_only=True, slots=True)
class DynamicSampling:
    type: Resampling = Resampling.none
    max_sample_batches: int = num(30, ge=1)
    min_replace_ratio: float = num(0.3, ge=0, le=1)


@dataclass(kw_only=True, slots=True)
class Algorithm:
    advantage_estimator: AdvantageEstimator = AdvantageEstimator["grpo"]
    grpo_norm_by_std: bool = True
    gamma: float = num(1.0, ge=0, le=1)
    lambd: float = num(1.0, ge=0, le=1)
    policy_loss_type: PolicyLoss = PolicyLoss.regular
    loss_reduction: LossReduction = LossReduction.token_mean
    eps_clip_low: float = num(0.2, gt=0, lt=1)
    eps_clip_high: float = num(0.2, gt=0)
    clip_ratio_c: float = num(3.0, gt=1)
    value_clip: float = num(0.2, gt=0)
    use_kl_loss: bool = False
    use_kl_in_reward: bool = False
    kl_loss_coef: float = num(0.001, ge=0)
    kl_estimator: KLEstimator = KLEstimator.k3
    tis: TIS = TIS.none
    tis_imp_ratio_cap: float = num(2.0, gt=0)
    zero_variance_filter: bool = False
    dynamic_sampling: DynamicSampling = field(default_factory=DynamicSampling)


@dataclass(kw_only=True, slots=True)
class LoRA:
    rank: int = num(32, ge=0, le=512)
    expert_rank: int | None = num(None, ge=1, le=512)
    alpha: float = num(32.0, gt=0)
    dropout: float = num(0.0, ge=0, lt=1)
    target_modules: Any = None
    exclude_modules: Any = None
    init_method: str = "kaiming"


@dataclass(kw_only=True, slots=True)
class PolicyLoRA(LoRA):
    adapter_path: str | None = None
    sync: SyncMode | None = None
    lora_sync_path: str | None = None


@dataclass(kw_only=True, slots=True)
class PolicyModel:
    path: str = "???"
    dtype: DType = DType.auto
    lora: PolicyLoRA = field(default_factory=PolicyLoRA)


@dataclass(kw_only=True, slots=True)
class CriticModel:
    path: str | None = None
    lora: LoRA = field(default_factory=LoRA)


@dataclass(kw_only=True, slots=True)
class Optimizer:
    lr: float = num(3.0e-5, gt=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = num(0.0, ge=0)
    max_grad_norm: float = num(1.0, gt=0)
    scheduler: LRScheduler = LRScheduler.constant
    num_warmup_steps: int = num(0, ge=0)


@dataclass(kw_only=True, slots=True)
class PolicyConfig:
    model: PolicyModel = field(default_factory=PolicyModel)
    optimizer_config: Optimizer = field(default_factory=Optimizer)


@dataclass(kw_only=True, slots=True)
class CriticConfig:
    model: CriticModel = field(default_factory=CriticModel)
    optimizer_config: Optimizer = field(default_factory=Optimizer)


@dataclass(kw_only=True, slots=True)
class Placement:
    device: Device = Device.auto
    colocate_all: bool = True
    policy_num_gpus_per_node: int = num(1, ge=1)
    policy_num_nodes: int = num(1, ge=1)
    ref_num_gpus_per_node: int | None = num(None, ge=1)
    critic_num_gpus_per_node: int | None = num(None, ge=1)


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    algorithm: Algorithm = field(default_factory=Algorithm)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    target_modules: Any = "all-linear"
    exclude_modules: Any = None
    reference: KLReference = KLReference.base
    strategy: Strategy = Strategy.fsdp2
    placement: Placement = field(default_factory=Placement)
    seed: int | None = num(None, ge=0)
    max_prompt_length: int | None = num(None, ge=1)
    num_threads: int | None = num(None, ge=1)
    train_batch_size: int = num(128, ge=1)
    policy_mini_batch_size: int = num(128, ge=1)
    critic_mini_batch_size: int | None = num(None, ge=1)
    micro_forward_batch_size_per_gpu: int | None = num(None, ge=1)
    micro_train_batch_size_per_gpu: int | None = num(None, ge=1)
    max_tokens_per_microbatch: Any = field(default="auto", metadata=one_of("auto", None, int))
    gradient_checkpointing: Any = field(default="auto", metadata=one_of("auto", True, False))
    update_epochs_per_batch: int = num(1, ge=1)
    epochs: int = num(1, ge=1)
    max_steps: int | None = num(None, ge=1)
    max_bad_steps: int = num(3, ge=1)
    sync_tolerance: float | None = num(None, gt=0)
    ckpt_interval: int = num(10, ge=0)
    ckpt_path: str = "runs"
    resume_mode: str | None = "latest"
    max_ckpts_to_keep: int = num(1, ge=1)
    eval_interval: int = num(10, ge=0)
    eval_batch_size: int | None = num(None, ge=1)
    eval_before_train: bool = True
    samples_per_dump: int = num(64, ge=0)
    logger: list[Logger] = field(default_factory=lambda: [Logger.console])
    project_name: str = "noregret"
    run_name: str | None = None


@dataclass(kw_only=True, slots=True)
class Sampling:
    max_generate_length: int = num(1024, ge=1)
    temperature: float = num(1.0, ge=0)
    top_p: float = num(1.0, gt=0, le=1)
    top_k: int = num(-1, ge=-1)


@dataclass(kw_only=True, slots=True)
class Generator:
    backend: Backend = Backend.vllm
    num_inference_engines: int = num(1, ge=1)
    inference_engine_tensor_parallel_size: int = num(1, ge=1)
    gpu_memory_utilization: float = num(0.8, gt=0, le=1)
    cpu_kv_cache_gb: int = num(1, ge=1)
    enforce_eager: bool | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)
    max_num_seqs: int = num(256, ge=1)
    max_lora_rank: int | None = num(None, ge=1, le=512)
    batched: bool = True
    n_samples_per_prompt: int = num(4, ge=1)
    eval_n_samples_per_prompt: int = num(1, ge=1)
    max_input_length: int = num(512, ge=1)
    apply_overlong_filtering: bool = False
    sampling_params: Sampling = field(default_factory=Sampling)
    eval_sampling_params: Sampling = field(default_factory=Sampling)


@dataclass(kw_only=True, slots=True)
class Environment:
    env_class: str = "gsm8k"


@dataclass(kw_only=True, slots=True)
class Ray:
    address: str | None = None


@dataclass(kw_only=True, slots=True)
class Sweep:
    metric: str = "eval/accuracy"
    num_trials: int = num(24, ge=1)
    seeds: list[int] = field(default_factory=lambda: [0])
    sampler: Sampler = Sampler.tpe
    pruner: dict[str, Any] | None = None
    first_trials: list[dict[str, Any]] = field(default_factory=list)
    space: dict[str, Any] = field(default_factory=dict)
    max_concurrent: int | None = num(None, ge=1)
    pack_size: int | None = num(None, ge=1)
    max_failures: int = num(3, ge=1)
    stall_seconds: float = num(3600.0, gt=0)


@dataclass(kw_only=True, slots=True)
class Recipe:
    seed: int = num(0, ge=0)
    deterministic: bool = False
    data: Data = field(default_factory=Data)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    generator: Generator = field(default_factory=Generator)
    environment: Environment = field(default_factory=Environment)
    ray: Ray = field(default_factory=Ray)
    expect: dict[str, Any] = field(default_factory=dict)
    sweep: Sweep | None = None
