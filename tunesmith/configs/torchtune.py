"""torchtune's components and keys in ours. This file and its neighbours torchtune_*.py alone know that torchtune existed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.configs import _layers as layers
from tunesmith.configs._interpolate import Interpolation
from tunesmith.configs._layers import Node, Place, Problem
from tunesmith.configs.recipes import RECIPES, overlay_path
from tunesmith.configs.torchtune_methods import DATA_SECTIONS, PAIRED_DATASETS, Methods, method_of_file
from tunesmith.configs.torchtune_names import (
    TRAINING_RECIPES,
    bare,
    is_download,
    is_recipe,
    method_not_there,
    recipe_for,
    repository,
)
from tunesmith.configs.torchtune_shipped import defaults_of


class Translated(NamedTuple):
    """What torchtune's words say in ours: what its configs set, and what the user wrote."""

    recipe: str | None
    shipped: Node
    written: Node


Change = tuple[list[str], Node | None, Place]


def translate(
    recipe: str | None,
    configs: list[tuple[Place, str]],
    files: list[Node],
    changes: list[Change],
    problems: list[Problem],
) -> Translated:
    """torchtune's recipe, config names, files and settings as layers of ours; what has no counterpart is a problem."""
    nothing = Translated(None, Node({}, Place(0, "")), Node({}, Place(0, "")))
    for place, name in [(Place(0, "command line"), recipe or ""), *configs]:
        if method := method_not_there(name):
            problems.append(Problem(place, f"`{name}` is {method}, a method that is not there yet"))
            return nothing
    tree, own_model = _tree(recipe, configs, files, changes, problems)
    if tree is None:
        return nothing
    ours = _our_recipe(recipe, configs, tree, problems)
    if ours is None:
        return nothing
    tree = Interpolation(tree, _no_default, problems, strict=False).run()
    from_config = bool(configs) or bool(tree.value.get("checkpointer"))
    out = _Translation(tree, problems, from_config, ours, own_model).run()
    for name in reversed(_overlays_of(recipe, tree, is_alone=not configs and not files)):
        overlay = layers.read_file(overlay_path(name), 0, problems, shipped=True)
        out = layers.merge(overlay, out, problems) if overlay else out
    return Translated(ours, _part(out, shipped=True), _part(out, shipped=False))


def _tree(
    recipe: str | None,
    configs: list[tuple[Place, str]],
    files: list[Node],
    changes: list[Change],
    problems: list[Problem],
) -> tuple[Node | None, Node | None]:
    """(all layers as one tree in torchtune's keys, None where a config is missing; a model named by folder or Hub id in place of a builder)."""
    tree, own_model = Node({}, Place(0, "", 0, True)), None
    for place, name in configs:
        defaults = defaults_of(name, recipe, place, problems)
        if defaults is None:
            return None, None
        tree = layers.merge(tree, defaults, problems)
    for file in files:
        tree = layers.merge(tree, file, problems)
    for keys, node, _ in changes:
        component = node and _component(keys, node)
        if component is None:
            tree = layers.delete(tree, keys)
        elif keys == ["model"] and isinstance(component.value, str) and isinstance(_value(tree, "model"), dict):
            own_model = component  # what the builder says of adapters stays
        else:
            tree = layers.merge(tree, layers.nest(keys, component), problems)
    return tree, own_model


def _value(tree: Node, key: str) -> Any:
    return tree.value[key].value if key in tree.value else None


def _overlays_of(recipe: str | None, tree: Node, is_alone: bool) -> list[str]:
    """Our overlays that the name of a recipe stands for, where no config says more of it."""
    training = TRAINING_RECIPES.get(bare(recipe or ""))
    if training is None:
        return []
    lora = ["lora"] if is_alone and training.update == "lora" else []
    return lora + (["qat"] if training.qat and not tree.value.keys() & {"quantizer", "qat"} else [])


def _no_default(keys: list[str]) -> Any:
    raise KeyError(".".join(keys))


def _our_recipe(
    recipe: str | None, configs: list[tuple[Place, str]], tree: Node, problems: list[Problem]
) -> str | None:
    """Our recipe for the recipe, configs and keys; None, with a problem, where these are for several methods."""
    if recipe and not is_recipe(recipe) and recipe not in RECIPES:
        return recipe
    named = [(Place(0, "command line"), recipe)] if recipe else []
    found = [
        (place, name, ours)
        for place, name in [*named, *configs]
        if (ours := RECIPES.get(name) and name or recipe_for(name))
    ]
    method, what, place = method_of_file(tree)
    if method and method not in RECIPES:
        problems.append(Problem(place, f"this config is for {method}, a method that is not there yet"))
        return None
    if method:
        found.append((place, what, method))
    for place, name, ours in found[1:]:
        if ours != found[0][2]:
            _, first, theirs = found[0]
            other = "another" if first == theirs else f"the recipe {theirs}"
            text = f"`{name}` belongs to the recipe {ours}, and `{first}` is {other}; take both from one recipe"
            problems.append(Problem(place, text))
            return None
    return found[0][2] if found else "sft"


def _part(node: Node, shipped: bool) -> Node:
    """The tree with only what torchtune's own configs set, or only what the user wrote."""
    entries = {}
    for key, child in node.value.items():
        if isinstance(child.value, dict) and child.value:
            part = _part(child, shipped)
            if part.value:
                entries[key] = part
        elif child.place.shipped == shipped:
            entries[key] = child
    return Node(entries, node.place)


def _component(keys: list[str], node: Node) -> Node:
    """`optimizer=torch.optim.AdamW` as `optimizer._component_=…`."""
    value = node.value
    sections = (
        "optimizer loss lr_scheduler dataset dataset_val model tokenizer checkpointer metric_logger profiler "
        "teacher_model teacher_checkpointer kd_loss ref_checkpointer quantizer"
    ).split()
    if len(keys) == 1 and keys[0] in sections and isinstance(value, str) and "/" not in value:
        if value.startswith("torchtune.") or keys[0] == "optimizer" and "." in value:
            return Node({"_component_": node}, node.place)
    return node


# --- torchtune's keys in ours --------------------------------------------------------------------

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


class _Translation(Methods):
    """Walks a tree in torchtune's keys and writes one in ours."""

    def __init__(self, tree: Node, problems: list[Problem], from_config: bool, recipe: str, own_model: Node | None):
        super().__init__(tree, problems, recipe, own_model)
        self.from_config = from_config

    def run(self) -> Node:
        if self.from_config and self.recipe in DATA_SECTIONS:
            self.put("lr_scheduler.warmup_ratio", Node(None, self.base))
            self.put("clip_grad_norm", Node(None, self.base))
            if "lr_scheduler" not in self.tree.value:
                self.put("lr_scheduler.type", Node("constant", self.base))
        order = {"model": -1, "teacher_model": -1, "ref_checkpointer": 1}  # builders before folders, the reference last
        for key, node in sorted(self.tree.value.items(), key=lambda entry: order.get(entry[0], 0)):
            handle = getattr(self, f"_{key}", None)
            if handle is not None:
                handle(node)
            elif key in HARMLESS:
                self.harmless(key, node, HARMLESS[key])
            elif key not in WITHOUT_EFFECT:
                self.put(key, node)
        if self.own_model is not None:
            self.put("model", self.own_model)
        return self.out

    def _fsdp_reshard_after_forward(self, node: Node) -> None:
        ours = {True: "always", False: "never"}.get(node.value, node.value)
        self.put("fsdp_reshard_after_forward", Node(ours, node.place))

    # --- model, tokenizer, checkpointer ---

    def _model(self, node: Node) -> None:
        if not isinstance(node.value, dict):
            self.put("model", node)
            return
        named, dotted, entries = self.component(node)
        found = self.built(named, dotted) if named is not None else None
        if found is None and named is not None:
            return
        if found is not None and named is not None:
            self.put("model", Node(self.location(repository(found.size, found.kind)), named.place))
        if found is not None and found.prefix and named is not None:
            self.put("weights.type", Node("lora", named.place))
            self.lora(entries, found.size, found.prefix)
        else:
            for key, child in entries.items():
                self.report(
                    child,
                    f"`model.{key}` needs one of torchtune's lora_ models; here it is a key of `weights`, with `weights.type=lora`",
                )

    def lora(self, entries: dict[str, Node], size: str, prefix: str) -> None:
        """torchtune's LoRA arguments of a model, as our section `weights`."""
        names = {"lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_dora": "use_dora"}
        where = ("lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output")
        for key, child in entries.items():
            if key in names:
                self.put(f"weights.{names[key]}", child)
            elif key == "quantize_base":
                self.put("weights.quantize_base", Node("nf4" if child.value else None, child.place))
            elif key not in where:
                self.report(child, f"torchtune's `model.{key}` has no counterpart here; leave it out")
        if prefix == "qlora_" and "quantize_base" not in entries:
            self.put("weights.quantize_base", Node("nf4", self.component(self.tree.value["model"])[0].place))  # pyright: ignore
        given = [entries[key] for key in where if key in entries]
        if given:
            targets = _target_modules({key: entries[key].plain() for key in where if key in entries}, size)
            place = max((child.place for child in given), key=lambda place: (not place.shipped, place))
            unknown = [name for name in targets if name.startswith("?")]
            for name in unknown:
                self.report(
                    Node(None, place),
                    f"`model.lora_attn_modules` can't name `{name[1:]}`; it takes {', '.join(ATTENTION)}",
                )
            self.put("weights.target_modules", layers.to_node(targets, place))

    def _tokenizer(self, node: Node) -> None:
        if not isinstance(node.value, dict):
            self.put("tokenizer", node)
            return
        for key, child in self.component(node)[2].items():
            if key == "path" and isinstance(child.value, str):
                self.tokenizer_path(child)
            elif key == "prompt_template" and child.value is not None:
                self.report(
                    child,
                    "`tokenizer.prompt_template` is `tokenizer.chat_template` here: a jinja file, or the name of a built-in template",
                )
            elif key in ("merges_file", "special_tokens_path", "prompt_template", "truncation_type", "qwen_version"):
                continue
            else:
                self.put(f"tokenizer.{key}", child)

    def tokenizer_path(self, node: Node) -> None:
        """The model's own folder needs no mention; the folder around a file is better than the file, where it holds the whole tokenizer."""
        path = Path(node.value).expanduser()
        folder = path.parent.parent if path.parent.name == "original" else path.parent
        checkpointer = self.tree.value.get("checkpointer")
        model = layers.find(checkpointer, ["checkpoint_dir"]) if checkpointer else None
        if path.suffix and (
            model is not None and folder == Path(str(model.value)) or not path.exists() and is_download(folder)
        ):
            return
        whole = path.suffix and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        self.put("tokenizer.path", Node(str(folder), node.place, str(folder)) if whole else node)

    def _checkpointer(self, node: Node) -> None:
        entries = self.weights_of("checkpointer", node)
        for key, child in entries.items():
            if key == "checkpoint_dir" and isinstance(child.value, str):
                self.checkpoint_dir(child)
            elif key == "keep_last_n_checkpoints":
                self.put(key, child)
            elif key == "safe_serialization" and child.value is False:
                self.report(
                    child,
                    "`checkpointer.safe_serialization: false` has no counterpart; weights are always written as safetensors",
                )
            elif key == "output_dir" and "output_dir" not in self.tree.value and self.recipe != "evaluate":
                self.put("output_dir", child)

    def checkpoint_dir(self, node: Node) -> None:
        """The folder of the weights is the model; torchtune's default folder, where it is absent, stands for the Hub repository."""
        folder = Path(node.value).expanduser()
        if folder.exists() or not is_download(folder):
            self.put("model", node)

    # --- data ---

    def _dataset(self, node: Node) -> None:
        self.dataset("dataset", node)

    def _dataset_val(self, node: Node) -> None:
        self.dataset("dataset_val", node)

    def dataset(self, name: str, node: Node) -> None:
        if isinstance(node.value, list):
            made = [self.source(child) for child in node.value]
            self.put(name, Node(made, node.place))
        elif isinstance(node.value, dict):
            self.put(name, self.source(node))
        else:
            self.put(name, node)

    def source(self, node: Node) -> Node:
        named, dotted, entries = self.component(node)
        builder = dotted.rpartition(".")[2]
        out: dict[str, Node] = {}
        if named is not None and builder in DATASETS:
            out = {key: layers.to_node(value, named.place) for key, value in DATASETS[builder].items()}
        elif named is not None and builder in PAIRED_DATASETS:
            out = {key: layers.to_node(value, named.place) for key, value in PAIRED_DATASETS[builder].items()}
        elif named is not None:
            text = (
                f"`{dotted}` is for training on images, which is not there yet"
                if builder in DATASETS_OF_IMAGES
                else f"torchtune's data set `{dotted}` has no counterpart here; name a file, folder or Hub id: dataset.source=…"
            )
            self.report(named, text)
            return Node(layers.UNRESOLVED, node.place)
        if named is not None and (self.recipe == "preference") != (builder in PAIRED_DATASETS):
            self.report_wrong_data(named, dotted)
            return Node(layers.UNRESOLVED, node.place)
        for key, child in entries.items():
            self.data_key(key, child, entries, out, builder)
        return Node(out, node.place)

    def data_key(self, key: str, node: Node, entries: dict[str, Node], out: dict[str, Node], builder: str) -> None:
        names = {"new_system_prompt": "system_prompt", "name": "subset", "data_files": "source"}
        style = {"sharegpt": "sharegpt", "openai": "messages"}
        if key == "source" and "data_files" in entries and node.value in ("json", "csv", "text", "parquet"):
            return
        if key == "conversation_style" and node.value in style:
            out["format"] = Node(style[node.value], node.place, style[node.value])
        elif key == "conversation_column":
            style_name = entries["conversation_style"].value if "conversation_style" in entries else "openai"
            column = "conversations" if style_name == "sharegpt" else "messages"
            out["column_map"] = Node({column: node}, node.place)
        elif key == "column_map" and builder in INPUT_OUTPUT and isinstance(node.value, dict):
            ours = {"input": "prompt", "output": "completion"}
            given = {ours.get(name, name): child for name, child in node.value.items()}
            out["column_map"] = Node({**getattr(out.get("column_map"), "value", {}), **given}, node.place)
        elif key == "train_on_input" and self.recipe == "preference":
            self.harmless(f"dataset.{key}", node, (False, None))
        elif key == "column":
            out["column_map"] = Node({"text": node}, node.place)
        elif key == "max_seq_len":
            self.put("tokenizer.max_seq_len", node)
        elif key in ("add_eos", "split_across_pack", "max_packs", "filter_fn", "filter_kwargs", "template"):
            self.harmless(f"dataset.{key}", node, (None, True) if key == "add_eos" else (None, False))
        else:
            out[names.get(key, key)] = node

    # --- training ---

    def _optimizer(self, node: Node) -> None:
        named, dotted, entries = self.component(node)
        if not isinstance(node.value, dict):
            self.put("optimizer", node)
            return
        if named is not None:
            kind = OPTIMIZERS.get(dotted, dotted)
            self.put("optimizer.type", Node(kind, named.place, kind))
            if kind in ("adamw", "adamw_8bit"):  # the default of the classes themselves, which ours is not
                self.put("optimizer.weight_decay", Node(0.01, self.base))
        for key, child in entries.items():
            self.put(f"optimizer.{key}", child)

    def _lr_scheduler(self, node: Node) -> None:
        named, dotted, entries = self.component(node)
        if node.value is None:
            self.put("lr_scheduler.type", Node("constant", node.place))
            return
        if named is None:
            self.put("lr_scheduler", node)
            return
        if dotted.endswith("get_cosine_schedule_with_warmup"):
            self.put("lr_scheduler.type", Node("cosine", named.place))
        else:
            self.report(
                named,
                f"torchtune's `{dotted}` has no counterpart here; lr_scheduler.type is constant, cosine, linear or wsd",
            )
        for key, child in entries.items():
            if key == "num_cycles":
                self.harmless("lr_scheduler.num_cycles", child, (0.5,))
            else:
                self.put(f"lr_scheduler.{key}", child)

    def _compile(self, node: Node) -> None:
        if isinstance(node.value, dict):  # {model, loss, optimizer_step, …}
            node = node.value.get("model", Node(True, node.place))
        self.put("compile", node)

    def _cudnn_deterministic_mode(self, node: Node) -> None:
        self.put("deterministic", Node(bool(node.value), node.place))

    def _metric_logger(self, node: Node) -> None:
        named, dotted, entries = self.component(node)
        if named is None:
            self.put("metric_logger", node)
            return
        kind = METRIC_LOGGERS.get(dotted.rpartition(".")[2]) if dotted.startswith("torchtune.") else dotted
        if kind is None:
            self.report(
                named,
                f"torchtune's metric logger `{dotted}` has no counterpart here; there are {', '.join(METRIC_LOGGERS.values())}",
            )
            return
        self.put("metric_logger.type", Node(kind, named.place, kind))
        for key, child in entries.items():
            if key in ("log_dir", "filename") and kind != "tensorboard" or key in ("organize_logs", "log_strategy"):
                continue  # metrics.jsonl stands in the run folder, always
            self.put(f"metric_logger.{key}", child)

    def _profiler(self, node: Node) -> None:
        named, _, entries = self.component(node)
        if not isinstance(node.value, dict):
            self.put("profiler", node)
            return
        for key, child in entries.items():
            if named is None or key not in ("output_dir", "cpu", "cuda", "xpu", "with_flops"):
                if key in ("output_dir", "cpu", "cuda", "xpu", "with_flops") and child.place.name == "command line":
                    self.report(
                        child,
                        f"torchtune's `profiler.{key}` has no counterpart here; traces go into profile/ in the run folder",
                    )
                else:
                    self.put(f"profiler.{key}", child)
            elif key == "with_flops":
                self.harmless("profiler.with_flops", child, (False, None))


def _target_modules(arguments: dict[str, Any], size: str) -> list[str]:
    """The names of the linear layers that torchtune's three LoRA arguments choose; a name it can't be begins with ?."""
    fused = size.startswith(("phi3/", "phi4/"))  # one matrix for q, k, v and one for gate, up
    attention = arguments.get("lora_attn_modules") or []
    chosen = [ATTENTION.get(name, f"?{name}") for name in attention]
    if fused:
        chosen = ["qkv_proj" if name in ("q_proj", "k_proj", "v_proj") else name for name in chosen]
    if arguments.get("apply_lora_to_mlp"):
        chosen += ["gate_up_proj", "down_proj"] if fused else ["gate_proj", "up_proj", "down_proj"]
    if arguments.get("apply_lora_to_output"):
        chosen.append("lm_head")
    return list(dict.fromkeys(chosen))
