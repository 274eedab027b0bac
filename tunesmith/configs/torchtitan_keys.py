"""torchtitan's models and keys (of July 2025) by name: what each is here."""

from __future__ import annotations

from typing import Any

_DEBUG = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 16,
}
MODELS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("llama3", "debugmodel"): ("llama3/8B", _DEBUG),
    ("llama3", "8B"): ("llama3/8B", {}),
    ("llama3", "70B"): ("llama3/70B", {}),
    # Ours is Llama 3.1's, whose rotary positions are stretched; torchtitan's were not.
    ("llama3", "405B"): ("llama3_1/405B", {"rope_scaling": None, "max_position_embeddings": 8192}),
    **{("qwen3", size): (f"qwen3/{size}", {}) for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")},
}
"""(name, flavor) -> our named size, and the keys of config.json in which it differs."""

DEFAULTS: dict[str, Any] = {
    "job.dump_folder": "./outputs",
    "metrics.log_freq": 10,
    "model.name": "llama3",
    "model.flavor": "debugmodel",
    "optimizer.name": "AdamW",
    "optimizer.lr": 8e-4,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.95,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.1,
    "lr_scheduler.warmup_steps": 200,
    "lr_scheduler.decay_type": "linear",
    "lr_scheduler.lr_min": 0.0,
    "training.dataset": "c4_test",
    "training.local_batch_size": 8,
    "training.seq_len": 2048,
    "training.max_norm": 1.0,
    "training.steps": 10_000,
    "training.mixed_precision_param": "bfloat16",
    "training.mixed_precision_reduce": "float32",
    "training.gc_freq": 50,
    "training.seed": None,
    "checkpoint.interval": 500,
    "checkpoint.keep_latest_k": 10,
    "activation_checkpoint.mode": "selective",
    "activation_checkpoint.selective_ac_option": "2",
    "validation.freq": 10,
    "validation.local_batch_size": 8,
}
"""What torchtitan takes where a file says nothing, as far as we would take something else."""

RENAMED = {
    "training.batch_size": "training.local_batch_size",
    "training.global_train_batch_size": "training.global_batch_size",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "model.hf_assets_path": "model.tokenizer_path",
    "lr_scheduler.min_lr_factor": "lr_scheduler.lr_min",
    "compile.enable": "training.compile",
    "compile.enable_async_tensor_parallel": "parallelism.enable_async_tensor_parallel",
    "debug.seed": "training.seed",
    "debug.deterministic": "training.deterministic",
    "checkpoint.enable": "checkpoint.enable_checkpoint",
    "checkpoint.initial_load_model_only": "checkpoint.initial_load_model_weights_only",
    "checkpoint.last_save_model_only": "checkpoint.last_save_model_weights_only",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_weights_only",
    "validation.enable": "validation.enabled",
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
    "experimental.enable_async_tensor_parallel": "parallelism.enable_async_tensor_parallel",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
}
"""Names of the months before and after -> July 2025's."""

PLAIN = {
    "job.dump_folder": "output_dir",
    "metrics.log_freq": "log_every_n_steps",
    "model.tokenizer_path": "tokenizer.path",
    "training.seq_len": "tokenizer.max_seq_len",
    "training.max_norm": "clip_grad_norm",
    "training.steps": "max_steps",
    "training.compile": "compile",
    "training.gc_freq": "gc_every_n_steps",
    "training.seed": "seed",
    "training.deterministic": "deterministic",
    "training.enable_cpu_offload": "fsdp_cpu_offload",
    "lr_scheduler.warmup_steps": "lr_scheduler.num_warmup_steps",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_ratio",
    "parallelism.data_parallel_replicate_degree": "data_parallel_replicate_dim",
    "parallelism.data_parallel_shard_degree": "data_parallel_shard_dim",
    "parallelism.fsdp_reshard_after_forward": "fsdp_reshard_after_forward",
    "parallelism.tensor_parallel_degree": "tensor_parallel_dim",
    "parallelism.context_parallel_degree": "context_parallel_dim",
    "parallelism.pipeline_parallel_degree": "pipeline_parallel_dim",
    "parallelism.expert_parallel_degree": "expert_parallel_dim",
    "comm.train_timeout_seconds": "dist_timeout_seconds",
}
"""Keys that are ours under another name."""

SILENT = set(
    "job.config_file job.description job.print_args job.use_for_integration_test profiling.save_traces_folder "
    "profiling.save_memory_snapshot_folder metrics.disable_color_printing metrics.enable_color_printing metrics.save_tb_folder "
    "model.print_after_conversion model.norm_type optimizer.implementation optimizer.fused training.gc_debug checkpoint.folder "
    "checkpoint.last_save_model_weights_only checkpoint.create_seed_checkpoint comm.init_timeout_seconds comm.trace_buf_size "
    "memory_estimation.disable_fake_mode parallelism.disable_loss_parallel compile.components debug.print_config".split()
)
"""What changes neither numbers nor files that are looked for: where our runs keep such things is not a choice."""

ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "metrics.save_for_all_ranks": ((False,), "metrics are those of all ranks together, written once"),
    "parallelism.enable_compiled_autograd": ((False,), "compiled autograd is not there; layers are compiled forward and backward"),
    "parallelism.context_parallel_rotate_method": (("allgather",), "keys and values are gathered; the numbers are the same"),
    "parallelism.pipeline_parallel_schedule_csv": ((None, ""), "schedules from a file are not there yet"),
    "checkpoint.initial_load_model_weights_only": ((True,), "only weights are read from a foreign checkpoint"),
    "checkpoint.export_dtype": (("float32",), "`tune run export dtype=…` writes a checkpoint in another number type"),
    "checkpoint.load_step": ((-1,), "a run goes on from its newest checkpoint; an earlier one can be named as `model` with `from_scratch: false`"),
    "checkpoint.exclude_from_loading": (([], ""), "a run goes on with everything that its checkpoint holds"),
    "checkpoint.enable_first_step_checkpoint": ((False,), "there is no checkpoint of the first step alone; `save_every_n_steps: 1` saves each"),
    "memory_estimation.enabled": ((False,), "the estimation of memory is not there yet"),
    "fault_tolerance.enable": ((False,), "TorchFT is not there; torchrun restarts a run from its newest checkpoint"),
    "experimental.custom_import": ((None, ""), "code of your own goes into a recipe file: `tune cp pretrain my_recipe.py`"),
    "experimental.custom_args_module": ((None, ""), "options of your own go into a recipe file: `tune cp pretrain my_recipe.py`"),
}  # fmt: skip
"""{key: (values that ask for nothing, what to say of any other)}."""

OPTIONAL_SECTIONS = ("float8", "mx", "memory_estimation", "fault_tolerance")
"""Their keys matter only where the feature is turned on, and what turns it on is told."""
