"""torchtune's sections in ours, but for those of single methods: model, tokenizer, data, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.configs import _layers as layers
from tunesmith.configs._layers import Node, Problem
from tunesmith.configs.torchtune_keys import (
    ATTENTION,
    DATASETS,
    DATASETS_OF_IMAGES,
    HARMLESS,
    INPUT_OUTPUT,
    METRIC_LOGGERS,
    OPTIMIZERS,
    WITHOUT_EFFECT,
)
from tunesmith.configs.torchtune_methods import DATA_SECTIONS, PAIRED_DATASETS, Methods
from tunesmith.configs.torchtune_names import is_download, repository


class Translation(Methods):
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
