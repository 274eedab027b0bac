"""Sections that every training method shares. The sentence under a field is its help text, its comment in a copied YAML, and its schema description."""

from dataclasses import field
from typing import Any, ClassVar, Literal

from tunesmith.configs._rules import Checked, below
from tunesmith.configs._section import section
from tunesmith.configs.layout import async_problems
from tunesmith.configs.loggers import Disk, MetricLogger
from tunesmith.configs.optimizers import AdamW, Optimizer
from tunesmith.configs.profile import Profiler
from tunesmith.configs.schedule import Constant, LRScheduler
from tunesmith.configs.stages import pipeline_problems
from tunesmith.configs.weights import QAT, FullWeights, LoRAWeights


@section
class Loss(Checked):
    """The loss of a token and how it is computed."""

    type: Literal["cross_entropy"] = "cross_entropy"
    """Cross-entropy of the next token."""
    chunk_size: int = 1024
    """Tokens whose logits exist at one time; 0 computes all at once (more memory, the same numbers)."""

    def problems(self):
        yield from below(0, self, "chunk_size")


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
