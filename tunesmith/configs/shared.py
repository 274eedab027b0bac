"""Sections that every training method shares. The sentence under a field is its help text, its comment in a copied YAML, and its schema description."""

import re
from collections.abc import Iterator
from dataclasses import field
from typing import Any, ClassVar, Literal

from tunesmith.configs._section import section
from tunesmith.configs.layout import async_problems
from tunesmith.configs.stages import pipeline_problems


class Checked:
    """A section with rules of its own: `problems` yields one sentence per broken rule, the options named in backticks."""

    def problems(self) -> Iterator[str]:
        yield from ()

    def __post_init__(self):
        if found := list(self.problems()):
            raise ValueError("\n".join(found))


def below(least: float, section: Any, *names: str) -> Iterator[str]:
    """One sentence for each of the options `names` that is set and smaller than `least`."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value < least:
            yield f"`{name}` must be at least {least:g}, got {value}"


def no_size(section: Any, name: str) -> Iterator[str]:
    """One sentence where the option `name` is set and is no size of files."""
    value = getattr(section, name)
    if value is not None and not re.fullmatch(r"(?=[\d.]*[1-9])\d+(\.\d+)?\s*[KMGT]?i?B", value, re.IGNORECASE):
        yield f"`{name}` must be a size such as 500MB or 5GB, got {value!r}"


def outside(least: float, most: float, section: Any, *names: str) -> Iterator[str]:
    """One sentence for each of the options `names` that is set and not between `least` and `most`."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not least <= value <= most:
            yield f"`{name}` must be between {least:g} and {most:g}, got {value}"


# --- which weights are trained -------------------------------------------------------------------


@section
class FullWeights:
    """Every parameter is trained."""

    type: ClassVar[str] = "full"


@section
class LoRAWeights(Checked):
    """Small adapters are trained beside the frozen weights (LoRA, arXiv 2106.09685)."""

    type: ClassVar[str] = "lora"
    rank: int = 8
    """Rank of the update; the adapter's size grows with it."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)."""
    dropout: float = 0.0
    """Probability of dropping an adapter input during training."""
    target_modules: str | list[str] = "all-linear"
    """Names of the linear layers that get adapters, such as [q_proj, v_proj], or all-linear (all but the output layer)."""
    use_dora: bool = False
    """Learn magnitude and direction apart (DoRA, arXiv 2402.09353)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), so that large ranks keep learning (rsLoRA, arXiv 2312.03732)."""
    quantize_base: Literal["nf4"] | None = None
    """Hold the frozen matrices in 4-bit NormalFloat: QLoRA (arXiv 2305.14314)."""
    adapter: str | None = None
    """Folder or Hub id of a PEFT adapter to go on training from."""

    def problems(self):
        yield from below(1, self, "rank")
        if not 0 <= self.dropout < 1:
            yield f"`dropout` must be at least 0 and below 1, got {self.dropout}"
        if self.alpha <= 0:
            yield f"`alpha` must be above 0, got {self.alpha}"
        if self.target_modules == []:
            yield "`target_modules` names no layer; all-linear chooses every linear layer but the output layer"


@section
class QAT(Checked):
    """Quantization-aware training: the model computes with rounded numbers, so that it learns to do without the digits that quantization takes."""

    type: Literal["int8_dynamic_int4", "int4_weight_only", "float8", "float8_weight_only"] = "int8_dynamic_int4"
    """What is rounded: int8_dynamic_int4 (8da4w), weights to 4 bits in groups and each token's inputs to 8; int4_weight_only, the weights alone; float8, both to 8-bit floating point (any device but mps); float8_weight_only, the weights alone."""
    group_size: int = 32
    """Neighbouring weights that share a scale; of no effect on float8, where all weights of an output do."""
    fake_quant_after_n_steps: int = 0
    """Steps that compute with plain numbers first."""
    skip_indivisible: bool = False
    """Leave layers as they are whose inputs are no whole groups, instead of refusing the model."""

    def problems(self):
        yield from below(2, self, "group_size")
        yield from below(0, self, "fake_quant_after_n_steps")


# --- optimizer and schedule ----------------------------------------------------------------------


class _HasRate(Checked):
    def problems(self):
        yield from below(0, self, *(name for name in ("lr", "weight_decay", "eps") if hasattr(self, name)))
        for name in ("betas", "momentum"):
            values = getattr(self, name, ())
            for value in values if isinstance(values, tuple) else (values,):
                if not 0 <= value < 1:
                    yield f"`{name}` must be at least 0 and below 1, got {value}"


@section
class AdamW(_HasRate):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    type: ClassVar[str] = "adamw"
    lr: float = 2e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator for stability."""
    fused: bool = True
    """One kernel for all parameters; the fastest choice on CPU and GPU."""
    state_dtype: Literal["bf16", "fp32"] | None = None
    """Number type in which the running averages are kept, null: the parameter's; bf16 halves their memory over fp32 weights (with betas up to 0.99, smaller changes round away)."""


@section
class AdamW8bit(_HasRate):
    """AdamW with its states in 8 bits (through torchao)."""

    type: ClassVar[str] = "adamw_8bit"
    lr: float = 2e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator for stability."""


@section
class Muon(_HasRate):
    """Orthogonalised momentum for matrices; embeddings, head, norms and biases are trained by AdamW at the same rate."""

    type: ClassVar[str] = "muon"
    lr: float = 1e-3
    """Peak learning rate; the update of a matrix is scaled to the size AdamW's would have."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    momentum: float = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Look ahead along the momentum."""


@section
class SGD(_HasRate):
    """Stochastic gradient descent."""

    type: ClassVar[str] = "sgd"
    lr: float = 1e-2
    """Peak learning rate."""
    weight_decay: float = 0.0
    """L2 penalty."""
    momentum: float = 0.0
    """Decay rate of the momentum; 0 keeps no state at all."""


@section
class Adafactor(_HasRate):
    """Adam with factored second moments: almost no state (arXiv 1804.04235)."""

    type: ClassVar[str] = "adafactor"
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""


@section
class ThirdPartyOptimizer(_HasRate):
    """Any optimizer class by its dotted path; keys it alone knows are passed to it."""

    type: str
    """Dotted path of the class, such as bitsandbytes.optim.AdamW8bit."""
    lr: float = 2e-5
    """Peak learning rate."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the class."""


Optimizer = AdamW | AdamW8bit | Muon | SGD | Adafactor | ThirdPartyOptimizer


@section
class _Warmup(Checked):
    gives_way: ClassVar[dict[str, str]] = {"warmup_ratio": "num_warmup_steps"}
    """{option: the option it gives way to}: a recipe's own default steps back where the user writes the other."""
    num_warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    warmup_ratio: float | None = None
    """The same as a share of all steps; give one of the two."""

    def problems(self):
        yield from below(0, self, "num_warmup_steps")
        if self.warmup_ratio is not None and self.num_warmup_steps:
            yield "give `num_warmup_steps` or `warmup_ratio`, not both (null turns one off)"
        names = ("warmup_ratio", "min_lr_ratio", "decay_ratio")
        yield from outside(0, 1, self, *(name for name in names if hasattr(self, name)))


@section
class Constant(_Warmup):
    """The peak rate throughout, after the warm-up."""

    type: ClassVar[str] = "constant"


@section
class Cosine(_Warmup):
    """Half a cosine wave from the peak down."""

    type: ClassVar[str] = "cosine"
    min_lr_ratio: float = 0.0
    """The rate at the end, as a share of the peak."""


@section
class Linear(_Warmup):
    """A straight line from the peak down."""

    type: ClassVar[str] = "linear"
    min_lr_ratio: float = 0.0
    """The rate at the end, as a share of the peak."""


@section
class WarmupStableDecay(_Warmup):
    """Warm-up, a long constant stretch, and a decay at the end (WSD, arXiv 2404.06395)."""

    type: ClassVar[str] = "wsd"
    decay_ratio: float = 0.1
    """Share of all steps, at the end, over which the rate falls."""
    decay_type: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the fall; sqrt is 1 - sqrt(progress)."""
    min_lr_ratio: float = 0.0
    """The rate at the end, as a share of the peak."""


LRScheduler = Constant | Cosine | Linear | WarmupStableDecay


@section
class Loss(Checked):
    """The loss of a token and how it is computed."""

    type: Literal["cross_entropy"] = "cross_entropy"
    """Cross-entropy of the next token."""
    chunk_size: int = 1024
    """Tokens whose logits exist at one time; 0 computes all at once (more memory, the same numbers)."""

    def problems(self):
        yield from below(0, self, "chunk_size")


# --- logging and profiling -----------------------------------------------------------------------


@section
class Disk:
    """metrics.jsonl in the run folder, and nothing else."""

    type: ClassVar[str] = "disk"


@section
class TensorBoard:
    """TensorBoard event files beside metrics.jsonl."""

    type: ClassVar[str] = "tensorboard"
    log_dir: str | None = None
    """Where the event files go; default: tensorboard/ in the run folder."""


@section
class WandB:
    """Weights & Biases beside metrics.jsonl."""

    type: ClassVar[str] = "wandb"
    project: str = "tunesmith"
    """Project that the run appears in."""
    entity: str | None = None
    """User or team; default: your own."""
    group: str | None = None
    """Groups runs in the interface."""
    name: str | None = None
    """Name of the run; default: the output folder's."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Default: what WANDB_MODE says, else online."""


@section
class Comet:
    """Comet beside metrics.jsonl."""

    type: ClassVar[str] = "comet"
    project: str = "tunesmith"
    """Project that the experiment appears in."""
    workspace: str | None = None
    """Workspace; default: your own."""
    experiment_name: str | None = None
    """Name of the experiment; default: the output folder's."""
    offline: bool = False
    """Write an archive to upload later instead of sending."""


@section
class MLflow:
    """MLflow beside metrics.jsonl."""

    type: ClassVar[str] = "mlflow"
    experiment_name: str = "tunesmith"
    """Experiment that the run appears in."""
    tracking_uri: str | None = None
    """Server, database or folder; default: what MLFLOW_TRACKING_URI says, else mlflow.db in the run folder."""
    run_name: str | None = None
    """Name of the run; default: the output folder's."""


@section
class ThirdPartyLogger:
    """Any class by its dotted path, called with (run_folder, config, **options); needs log(step, metrics) and close()."""

    type: str
    """Dotted path of the class."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class."""


MetricLogger = Disk | TensorBoard | WandB | Comet | MLflow | ThirdPartyLogger


@section
class Profiler(Checked):
    """torch.profiler traces of a few steps, and snapshots of an accelerator's memory, into profile/ in the run folder."""

    enabled: bool = False
    """Record traces (slows the recorded steps)."""
    wait_steps: int = 5
    """Steps left alone before each recording."""
    warmup_steps: int = 2
    """Steps traced and thrown away."""
    active_steps: int = 2
    """Steps recorded."""
    num_cycles: int = 1
    """How often wait, warm-up and recording repeat."""
    profile_memory: bool = False
    """Record allocations too."""
    with_stack: bool = False
    """Record the Python stack of every operator."""
    record_shapes: bool = True
    """Record the shapes of every operator's inputs."""
    memory_snapshot_every_n_steps: int | None = None
    """Snapshots of what an accelerator's memory holds and who asked for it (for pytorch.org/memory_viz) this often, and when it runs out; null: none."""
    ranks: list[int] | None = None
    """Ranks that record, such as [0]; null: all, each under its own name."""

    def problems(self):
        counts = ("active_steps", "num_cycles", "memory_snapshot_every_n_steps")
        yield from below(1, self, *counts)
        yield from below(0, self, "wait_steps", "warmup_steps")
        if any(rank < 0 for rank in self.ranks or []):
            yield f"`ranks` are counted from 0, got {self.ranks}"


# --- what every training method has --------------------------------------------------------------


@section
class TokenizerConfig(Checked):
    """The tokenizer and how a conversation becomes text."""

    path: str | None = None
    """Folder, file or Hub id; default: the model's."""
    max_seq_len: int | None = None
    """Longest row in tokens, longer ones are truncated (and counted); default: 2048 or the model's limit, whichever is smaller."""
    chat_template: str | None = None
    """A jinja file, or the name of a built-in template; default: the model's own, else its family's."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Variables for the template, such as {enable_thinking: false}."""
    add_tokens: list[str] = field(default_factory=list)
    """New special tokens; the embedding grows where it must, new rows start at the mean of the old."""

    def problems(self):
        yield from below(2, self, "max_seq_len")


DEVICES = ("auto", "cuda", "xpu", "mps", "npu", "cpu")


@section(kw_only=True)
class RunSettings(Checked):
    """Where and how a recipe runs."""

    takes_classifiers: ClassVar[bool] = False
    """Whether its `model` may be one whose head gives scores instead of words."""

    device: str = "auto"
    """cuda, xpu, mps, npu or cpu; auto takes the accelerator if there is one."""
    dtype: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Number type of weights and computation; fp16 keeps trained weights in fp32 and scales the loss."""
    seed: int | None = 1234
    """Seeds initialisation, shuffling, dropout and sampling; null draws one and records it."""
    deterministic: bool = False
    """Use only deterministic kernels on an accelerator (slower); the CPU always is."""

    def problems(self):
        kind, _, number = self.device.partition(":")
        if kind not in DEVICES or (":" in self.device and not number.isdecimal()):
            yield f"`device` can be {', '.join(DEVICES)}, or one of them with a number such as cuda:1, not {self.device}"


TOO_EARLY = "the update happens before the whole gradient is known"
"""Why `optimizer_in_bwd` refuses what it refuses."""


@section(kw_only=True)
class TrainSettings(RunSettings):
    """What pretrain, sft and every later training method have in common."""

    gives_way: ClassVar[dict[str, str]] = {"clip_grad_norm": "optimizer_in_bwd"}

    output_dir: str = "run"
    """The run folder: config, metrics, checkpoints, report; must be empty unless resume_from_checkpoint is set. Also a URL such as s3://bucket/run."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer and how a conversation becomes text."""
    weights: FullWeights | LoRAWeights = field(default_factory=FullWeights)
    """Which weights are trained: full, or lora."""
    qat: QAT | None = None
    """Train for a quantized model, which the end of the run writes to quantized/ in the run folder; null: no."""
    batch_size: int = 2
    """Rows per micro-batch and data-parallel rank."""
    batch_size_val: int | None = None
    """The same for validation; default: batch_size."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches per optimizer step; default 1, or what global_batch_size needs."""
    global_batch_size: int | None = None
    """Rows per optimizer step over all ranks; give this or gradient_accumulation_steps."""
    epochs: int = 1
    """Passes over the data; the run ends here or at max_steps, whichever is first."""
    max_steps: int | None = None
    """Optimizer steps in all."""
    max_steps_per_epoch: int | None = None
    """Optimizer steps after which an epoch ends early."""
    shuffle: bool = True
    """Another order in every epoch, given by the seed."""
    optimizer: Optimizer = field(default_factory=AdamW)
    """How gradients become updates."""
    optimizer_in_bwd: bool = False
    """Update each parameter as soon as its gradient is there: saves the memory of all gradients."""
    lr_scheduler: LRScheduler = field(default_factory=Constant)
    """How the learning rate changes over the run."""
    loss: Loss = field(default_factory=Loss)
    """The loss of a token and how it is computed."""
    clip_grad_norm: float | None = None
    """Scale gradients down to this norm where theirs is larger."""
    skip_grad_norm_above: float | None = None
    """Skip the update of a step whose gradient norm exceeds this."""
    skip_nonfinite_steps: bool = False
    """Skip an update whose loss or gradient is not finite, instead of ending the run."""
    compile: bool = False
    """torch.compile each layer; the first step takes longer."""
    enable_activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    ac_mode: Literal["full", "selective"] = "full"
    """full recomputes layers whole; selective follows ac_option."""
    ac_option: int | Literal["op"] = 2
    """For ac_mode selective: every n-th layer (a number), or op: keep the costly operators' results, recompute the rest."""
    enable_activation_offloading: bool = False
    """Move kept activations to host memory until the backward pass."""
    resume_from_checkpoint: bool = False
    """Go on from the newest complete checkpoint in output_dir, or start afresh where there is none."""
    save_every_n_steps: int | None = None
    """Save a checkpoint this often; the end of the run always saves."""
    keep_last_n_checkpoints: int | None = None
    """Delete older checkpoints after a save; null keeps all."""
    enable_async_checkpointing: bool = False
    """Write checkpoints in the background while training goes on."""
    log_every_n_steps: int = 1
    """Write metrics this often."""
    gc_every_n_steps: int | None = None
    """Collect Python's garbage only after every n-th step, on all ranks at once, so that none waits for another's collection; null: when Python likes."""
    log_peak_memory_stats: bool = True
    """Log the peak memory of each logged step."""
    metric_logger: MetricLogger = field(default_factory=Disk)
    """Where metrics go besides metrics.jsonl."""
    profiler: Profiler = field(default_factory=Profiler)
    """torch.profiler traces of a few steps, and snapshots of memory."""
    run_val_every_n_steps: int | None = None
    """Compute the validation loss this often, and at the end; null: only at the end, if there is validation data."""
    max_val_steps: int | None = None
    """Micro-batches per validation, counted as if one rank read them all, so the loss is the same on any layout; null: all."""
    param_dtype: Literal["bf16", "fp32"] | None = None
    """Number type in which trained weights are kept, if not dtype: fp32 with dtype bf16 computes in bf16 over fp32 master weights."""
    reduce_dtype: Literal["bf16", "fp32"] = "fp32"
    """Number type in which gradients are summed over ranks."""
    data_parallel_shard_dim: int = -1
    """Ranks that share one copy of the weights (FSDP); -1: all that are left."""
    data_parallel_replicate_dim: int = 1
    """Copies of the weights (HSDP; DDP with data_parallel_shard_dim 1)."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether a layer's weights are let go between forward and backward: always saves memory, never saves messages; default: always but with a pipeline."""
    fsdp_cpu_offload: bool = False
    """Keep weights, gradients and optimizer states in host memory; weights visit the device layer by layer."""
    tensor_parallel_dim: int = 1
    """Ranks that split each matrix."""
    sequence_parallel: bool = True
    """With tensor parallelism: between the halves of a layer each rank holds its part of the tokens instead of all."""
    enable_async_tensor_parallel: bool = False
    """With tensor parallelism of compiled layers on linked GPUs: matrices are multiplied in pieces while the next pieces travel between ranks."""
    context_parallel_dim: int = 1
    """Ranks that split each sequence."""
    pipeline_parallel_dim: int = 1
    """Ranks that split the layers; a step's micro-batches (gradient_accumulation_steps or global_batch_size) go through them one after another."""
    pipeline_parallel_schedule: Literal[
        "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
    ] = "1F1B"
    """The order in which a pipeline's ranks work on micro-batches; all but the first two give a rank several stages."""
    pipeline_parallel_layers_per_stage: int | None = None
    """Layers of each stage, of which the last may have fewer; default: even, with the embedding and the head weighing one layer each."""
    pipeline_parallel_split_points: list[int] | None = None
    """Numbers of the layers with which a stage begins, but for layer 0, in place of even stages."""
    expert_parallel_dim: int = 1
    """Ranks that split the experts."""
    dist_timeout_seconds: float = 1800.0
    """A message between ranks that takes longer than this ends the run: a rank died or hangs."""

    def problems(self):
        yield from super().problems()
        counts = "batch_size batch_size_val gradient_accumulation_steps global_batch_size epochs max_steps max_steps_per_epoch log_every_n_steps"
        more = "save_every_n_steps keep_last_n_checkpoints run_val_every_n_steps max_val_steps data_parallel_replicate_dim tensor_parallel_dim gc_every_n_steps"
        dims = "context_parallel_dim pipeline_parallel_dim expert_parallel_dim"
        yield from below(1, self, *counts.split(), *more.split(), *dims.split())
        yield from below(0, self, "seed")
        for name in ("clip_grad_norm", "skip_grad_norm_above"):
            if (value := getattr(self, name)) is not None and value <= 0:
                yield f"`{name}` must be above 0, got {value}; null turns it off"
        if self.data_parallel_shard_dim < 1 and self.data_parallel_shard_dim != -1:
            yield f"`data_parallel_shard_dim` must be at least 1, or -1 for all that are left, got {self.data_parallel_shard_dim}"
        if isinstance(self.ac_option, int) and self.ac_option < 1:
            yield f"`ac_option` must be op or at least 1, got {self.ac_option}"
        if self.ac_mode == "selective" and not self.enable_activation_checkpointing:
            yield "`ac_mode: selective` has an effect only with `enable_activation_checkpointing: true`"
        if self.gradient_accumulation_steps and self.global_batch_size:
            yield "give `gradient_accumulation_steps` or `global_batch_size`, not both"
        if self.optimizer_in_bwd:
            yield from self._in_backward()
        yield from pipeline_problems(self)
        if self.enable_async_tensor_parallel:
            yield from async_problems(self)
        if self.qat is not None:
            yield from self._quantizing(self.qat)
        if self.enable_activation_offloading and not self.enable_activation_checkpointing and self.compile:
            yield "`enable_activation_offloading` with `compile` needs `enable_activation_checkpointing`: only layer boundaries can be moved then"

    def _quantizing(self, qat: QAT):
        """What goes neither with rounding nor with merging."""
        if isinstance(self.weights, LoRAWeights) and self.weights.quantize_base:
            yield (
                "`qat` can't be combined with `weights.quantize_base`: adapters are trained for the merged model, which NF4 weights "
                "can't be merged into; set one of the two to null"
            )
        if isinstance(self.weights, LoRAWeights) and self.weights.dropout:
            yield (
                "`qat` can't be combined with `weights.dropout`: the merged weight is what is rounded, and has no adapter's input that "
                "could be dropped; set `weights.dropout` to 0"
            )
        if self.max_steps is not None and qat.fake_quant_after_n_steps >= self.max_steps:
            yield (
                f"`qat.fake_quant_after_n_steps` = {qat.fake_quant_after_n_steps} leaves none of the `max_steps` = {self.max_steps} "
                "to be trained with rounding: take fewer"
            )

    def _in_backward(self):
        """What needs the whole gradient before the update; whether `global_batch_size` does is known with the number of ranks."""
        conflicts = {
            "gradient_accumulation_steps": (self.gradient_accumulation_steps or 1) > 1,
            "clip_grad_norm": self.clip_grad_norm is not None,
            "skip_grad_norm_above": self.skip_grad_norm_above is not None,
            "skip_nonfinite_steps": self.skip_nonfinite_steps,
            "dtype: fp16": self.dtype == "fp16",
            "pipeline_parallel_dim": self.pipeline_parallel_dim > 1,
        }
        for other, is_set in conflicts.items():
            if is_set:
                off = (
                    "null"
                    if other in ("clip_grad_norm", "skip_grad_norm_above")
                    else "bf16"
                    if "dtype" in other
                    else None
                )
                cure = f"set `{other.partition(':')[0]}` to {off}" if off else "turn one of them off"
                yield f"`optimizer_in_bwd` can't be combined with `{other}`: {TOO_EARLY}; {cure}"
