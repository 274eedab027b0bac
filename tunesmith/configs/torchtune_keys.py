"""torchtune's keys, data sets and classes by name: what each is here."""

from __future__ import annotations

from typing import Any

HARMLESS: dict[str, tuple] = {
    "log_level": ("DEBUG", "INFO", "WARN", "WARNING", "ERROR", None),
    "enable_fp8_training": (False, None),
    "fp8_recipe_name": (None, "tensorwise"),
    "tensor_parallel_plan": (None,),
    "context_parallel_rotate_method": ("allgather", None),
    "enable_kv_cache": (True, None),
    "collate_fn": (
        "torchtune.data.padded_collate_sft",
        "torchtune.data.padded_collate",
        "torchtune.data.padded_collate_dpo",
        None,
    ),
}
"""{key: values that ask for nothing we do otherwise}; any other value is a problem."""

WITHOUT_EFFECT = (
    "custom_sharded_layers",  # how memory is cut, not what is computed
    "save_adapter_weights_only",  # checkpoints of an adapter hold the adapter; `tune run export` merges it
    "low_cpu_ram",  # weights are streamed, always
    "resize_token_embeddings",  # grows where the tokenizer needs it, always
    "activation_offloading_use_streams",
)

DATASETS: dict[str, dict[str, Any]] = {
    "alpaca_dataset": {"source": "alpaca", "train_on_input": True},
    "alpaca_cleaned_dataset": {"source": "alpaca_cleaned", "train_on_input": True},
    "grammar_dataset": {"source": "grammar"},
    "samsum_dataset": {"source": "samsum"},
    "slimorca_dataset": {"source": "slimorca"},
    "cnn_dailymail_articles_dataset": {
        "source": "abisee/cnn_dailymail",
        "subset": "3.0.0",
        "format": "text",
        "column_map": {"text": "article"},
    },
    "wikitext_dataset": {
        "source": "EleutherAI/wikitext_document_level",
        "subset": "wikitext-103-raw-v1",
        "format": "text",
        "column_map": {"text": "page"},
    },
    "instruct_dataset": {
        "format": "prompt_completion",
        "column_map": {"prompt": "input", "completion": "output"},
    },
    "chat_dataset": {},
    "text_completion_dataset": {"format": "text"},
}
INPUT_OUTPUT = ("instruct_dataset", "grammar_dataset", "samsum_dataset")
"""Data sets whose columns torchtune calls input and output, and we prompt and completion."""

DATASETS_OF_IMAGES = ("the_cauldron_dataset", "llava_instruct_dataset", "vqa_dataset", "multimodal_chat_dataset")

OPTIMIZERS = {
    "torch.optim.AdamW": "adamw",
    "torch.optim.adamw.AdamW": "adamw",
    "torch.optim.SGD": "sgd",
    "torch.optim.Adafactor": "adafactor",
    "torchao.optim.AdamW8bit": "adamw_8bit",
    "torchao.prototype.low_bit_optim.AdamW8bit": "adamw_8bit",
}

METRIC_LOGGERS = {
    "DiskLogger": "disk",
    "StdoutLogger": "disk",
    "TensorBoardLogger": "tensorboard",
    "WandBLogger": "wandb",
    "CometLogger": "comet",
    "MLFlowLogger": "mlflow",
}

ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
