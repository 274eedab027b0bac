"""Loss curves of one real run under every technique and on every layout, against the plain one: docs/convergence.md and its picture.

    python benchmarks/convergence.py TEXT_FILE [--only NAME …] [--work FOLDER]

A model of 11 million parameters is trained on TEXT_FILE (tinyshakespeare, wikitext, …) with `tune run pretrain`, from scratch and
then further; what differs between runs is only what their names say. Results that are there are kept: remove
benchmarks/results/convergence.json to start anew. --work keeps the model that the plain run ends with, so that a later call
need not train it again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from convergence_page import draw, write_page
from measure import machine, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "convergence.json"
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024,
    "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "initializer_range": 0.02, "eos_token_id": 0, "bos_token_id": None, "torch_dtype": "float32",
}  # fmt: skip
Losses = dict[str, list[float]]


class Run(NamedTuple):
    """One line of the table."""

    processes: int = 1
    words: str = ""
    against: str | None = None
    """Name of the run that it is compared with; None: the group's plain one, or nothing where it is that itself."""
    rounded: bool = False
    """Whether more than the order of sums may differ from that."""


@dataclass(frozen=True)
class Group:
    title: str
    about: str
    words: str
    """What all of its runs are given."""
    steps: int
    runs: dict[str, Run]
    continues: bool = False
    """Whether runs start from the model that the first plain run ends with, instead of from scratch."""

    def against(self, name: str) -> str:
        """The run that `name` is compared with; itself where it is a plain one."""
        return self.runs[name].against or next(iter(self.runs))

    def apart(self, name: str, losses: Losses) -> list[float]:
        """|loss / plain loss - 1| of every step."""
        return [abs(a - b) / b for a, b in zip(losses[name], losses[self.against(name)])]

    def is_exact(self, name: str) -> bool:
        """Whether nothing but the order of sums may differ from another run."""
        return not self.runs[name].rounded and self.against(name) != name


PLAIN = "plain: one process, fp32"
FROM_SCRATCH = Group(
    "From scratch",
    "AdamW at 1e-3, cosine schedule after 10 steps of warm-up, gradient norm clipped to 1.",
    "optimizer.lr=1e-3 lr_scheduler.type=cosine lr_scheduler.num_warmup_steps=10 clip_grad_norm=1.0",
    60,
    {
        PLAIN: Run(),
        "micro-batches of 1": Run(1, "batch_size=1"),
        "activation checkpointing": Run(1, "enable_activation_checkpointing=true"),
        "selective checkpointing by operator": Run(
            1, "enable_activation_checkpointing=true ac_mode=selective ac_option=op"
        ),
        "compile": Run(1, "compile=true"),
        "bf16 over fp32 weights": Run(1, "dtype=bf16 param_dtype=fp32", rounded=True),
        "bf16": Run(1, "dtype=bf16", rounded=True),
        "8-bit AdamW": Run(1, "optimizer.type=adamw_8bit", rounded=True),
        "QAT, 8-bit inputs and 4-bit weights": Run(1, "+qat", rounded=True),
        "dp2 (FSDP)": Run(2),
        "dp2 as copies (HSDP)": Run(2, "data_parallel_replicate_dim=2"),
        "dp2, parameters on the host": Run(2, "fsdp_cpu_offload=true"),
        "dp2, bf16 over fp32 weights": Run(2, "dtype=bf16 param_dtype=fp32", rounded=True),
        "tp2": Run(2, "tensor_parallel_dim=2"),
        "tp2 without sequence parallelism": Run(2, "tensor_parallel_dim=2 sequence_parallel=false"),
        "cp2": Run(2, "context_parallel_dim=2"),
        "pp2": Run(2, "pipeline_parallel_dim=2 batch_size=2"),
        "pp2, interleaved 1F1B": Run(
            2, "pipeline_parallel_dim=2 pipeline_parallel_schedule=Interleaved1F1B batch_size=2"
        ),
        "pp2, ZBV zero bubble": Run(2, "pipeline_parallel_dim=2 pipeline_parallel_schedule=ZBVZeroBubble batch_size=2"),
        "pp2, DualPipeV": Run(2, "pipeline_parallel_dim=2 pipeline_parallel_schedule=DualPipeV batch_size=1"),
        "dp2 x tp2": Run(4, "tensor_parallel_dim=2"),
        "dp2 x cp2": Run(4, "context_parallel_dim=2"),
        "dp2 x pp2": Run(4, "pipeline_parallel_dim=2 batch_size=2"),
        "tp2 x pp2": Run(4, "tensor_parallel_dim=2 pipeline_parallel_dim=2 batch_size=2"),
    },
)
UNCLIPPED = "plain without clipping"
IN_BACKWARD = Group(
    "Without clipping: the optimizer step in the backward pass",
    "The same from scratch, but gradients are not clipped, as `optimizer_in_bwd` asks; nor are there micro-batches then.",
    "optimizer.lr=1e-3 lr_scheduler.type=cosine lr_scheduler.num_warmup_steps=10 clip_grad_norm=null",
    40,
    {
        UNCLIPPED: Run(),
        "optimizer step in the backward pass": Run(1, "optimizer_in_bwd=true batch_size=8"),
        "the same on dp2": Run(2, "optimizer_in_bwd=true"),
    },
)
ADAPTERS = Group(
    "Adapters, on the model that the plain run from scratch ends with",
    "Training goes on from there with another seed, hence other rows of the text; AdamW at 2e-3 (full weights: 1e-3), adapters of "
    "rank 16 on every linear layer. LoRA, DoRA and QLoRA are methods of their own, each compared with itself on one process; rows differ "
    "more from each other than the methods do, so the model's loss on them without training is shown too. (The runs of this group, and "
    "the model that they start from, were made before the norm that gradients are clipped by was taken row by row: it was 2e-5 too small.)",
    "from_scratch=false seed=4321 optimizer.lr=2e-3 lr_scheduler.type=cosine lr_scheduler.num_warmup_steps=10 clip_grad_norm=1.0",
    40,
    {
        "LoRA": Run(1, "+lora"),
        "LoRA, micro-batches of 1": Run(1, "+lora batch_size=1", "LoRA"),
        "LoRA on dp2": Run(2, "+lora", "LoRA"),
        "LoRA on tp2": Run(2, "+lora tensor_parallel_dim=2", "LoRA"),
        "LoRA on cp2": Run(2, "+lora context_parallel_dim=2", "LoRA"),
        "LoRA on pp2": Run(2, "+lora pipeline_parallel_dim=2 batch_size=2", "LoRA"),
        "DoRA": Run(1, "+dora", "DoRA"),
        "DoRA on tp2": Run(2, "+dora tensor_parallel_dim=2", "DoRA"),
        "QLoRA": Run(1, "+qlora", "QLoRA"),
        "QLoRA on dp2": Run(2, "+qlora", "QLoRA"),
        "QLoRA on tp2": Run(2, "+qlora tensor_parallel_dim=2", "QLoRA"),
        "full weights": Run(1, "optimizer.lr=1e-3", "full weights"),
        "untrained: rate 0": Run(1, "optimizer.lr=0", "untrained: rate 0"),
    },
    continues=True,
)
GROUPS = (FROM_SCRATCH, IN_BACKWARD, ADAPTERS)
NAMES = [name for group in GROUPS for name in group.runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--only", nargs="*", default=NAMES)
    parser.add_argument("--work", type=Path)
    words = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    with tempfile.TemporaryDirectory(prefix="tunesmith-convergence-") as name:
        work = Work(words.work or Path(name), words.text.resolve())
        for group in GROUPS:
            for run in group.runs:
                if run in words.only and run not in found["runs"]:
                    print(run, "…", flush=True)
                    found["runs"][run] = work.losses(group, run, found["runs"])
                    save(found, words.text)
    draw(found, GROUPS, ROOT / "docs" / "convergence.svg")
    write_page(found, GROUPS, ROOT / "docs" / "convergence.md")


def save(found: dict[str, Any], text: Path) -> None:
    found["runs"] = {name: found["runs"][name] for name in NAMES if name in found["runs"]}
    found |= {"machine": machine(), "versions": versions(), "text": "/".join(text.resolve().parts[-2:])}
    found["date"] = datetime.date.today().isoformat()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


class Work:
    """A folder with the tokenizer, the model that the plain run ends with, and the runs."""

    def __init__(self, folder: Path, text: Path):
        self.folder, self.text = folder, text
        self.start, self.base = folder / "model", folder / "base"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.start.exists():
            write_model(self.start, text)

    def losses(self, group: Group, name: str, known: Losses) -> list[float]:
        """The loss of every step of a run; the plain run leaves the base, and is made again where one that continues lacks it."""
        if group.continues and not self.base.exists():
            self.losses(FROM_SCRATCH, PLAIN, known)
        output = Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        losses = self._train(group, name, output)
        if name == PLAIN:
            if known.get(PLAIN, losses) != losses:
                raise SystemExit(
                    f"the plain run ends with the loss {losses[-1]}, and with {known[PLAIN][-1]} in {RESULTS.name}: that is of "
                    "another machine or version; remove it to start anew"
                )
            if not self.base.exists():
                output.rename(self.base)
        return losses

    def _train(self, group: Group, name: str, output: Path) -> list[float]:
        run = group.runs[name]
        model = self.base / "checkpoints" / f"step-{FROM_SCRATCH.steps:08}" if group.continues else self.start
        words = f"""pretrain model={model} dataset.source={self.text} tokenizer.max_seq_len=256 global_batch_size=8 batch_size=4
            max_steps={group.steps} epochs=100 dtype=fp32 device=cpu output_dir={output} {group.words} {run.words}""".split()
        launch = ["--nproc_per_node", str(run.processes)] if run.processes > 1 else []
        command = [sys.executable, "-m", "tunesmith", "run", *launch, *words]
        threads = max(1, (os.cpu_count() or 1) // run.processes)
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]


def write_model(folder: Path, text: Path) -> None:
    """config.json and a byte-level BPE tokenizer of 4096 tokens, trained on the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train([str(text)], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "config.json").write_text(json.dumps(MODEL))


if __name__ == "__main__":
    main()
