"""Loss curves of one real run under every technique and on every layout, against the plain one: docs/convergence.md and its picture.

    python benchmarks/convergence.py TEXT_FILE [--steps N] [--only NAME …]

A model of 11 million parameters is trained from scratch on TEXT_FILE (tinyshakespeare, wikitext, …) with `tune run pretrain`;
what differs between runs is only what their names say. Results that are there are kept: remove benchmarks/results/convergence.json to start anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import machine, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "convergence.json"
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024,
    "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "initializer_range": 0.02, "eos_token_id": 0, "bos_token_id": None, "torch_dtype": "float32",
}  # fmt: skip

PLAIN = "plain: one process, fp32"


def pipeline(schedule: str) -> list[str]:
    return ["pipeline_parallel_dim=2", f"pipeline_parallel_schedule={schedule}"]


RUNS: dict[str, tuple[int, list[str]]] = {
    PLAIN: (1, []),
    "micro-batches of 1": (1, ["batch_size=1"]),
    "activation checkpointing": (1, ["enable_activation_checkpointing=true"]),
    "selective checkpointing by operator": (
        1,
        ["enable_activation_checkpointing=true", "ac_mode=selective", "ac_option=op"],
    ),
    "compile": (1, ["compile=true"]),
    "bf16 over fp32 weights": (1, ["dtype=bf16", "param_dtype=fp32"]),
    "bf16": (1, ["dtype=bf16"]),
    "8-bit AdamW": (1, ["optimizer.type=adamw_8bit"]),
    "dp2 (FSDP)": (2, []),
    "dp2 as copies (HSDP)": (2, ["data_parallel_replicate_dim=2"]),
    "tp2": (2, ["tensor_parallel_dim=2"]),
    "tp2 without sequence parallelism": (2, ["tensor_parallel_dim=2", "sequence_parallel=false"]),
    "cp2": (2, ["context_parallel_dim=2"]),
    "pp2": (2, ["pipeline_parallel_dim=2", "batch_size=2"]),
    "dp2, bf16 over fp32 weights": (2, ["dtype=bf16", "param_dtype=fp32"]),
    "dp2 x tp2": (4, ["tensor_parallel_dim=2"]),
    "dp2, parameters on the host": (2, ["fsdp_cpu_offload=true"]),
    "dp2 x cp2": (4, ["context_parallel_dim=2"]),
    "dp2 x pp2": (4, ["pipeline_parallel_dim=2", "batch_size=2"]),
    "tp2 x pp2": (4, ["tensor_parallel_dim=2", "pipeline_parallel_dim=2", "batch_size=2"]),
    "pp2, interleaved 1F1B": (2, [*pipeline("Interleaved1F1B"), "batch_size=2"]),
    "pp2, ZBV zero bubble": (2, [*pipeline("ZBVZeroBubble"), "batch_size=2"]),
    "pp2, DualPipeV": (2, [*pipeline("DualPipeV"), "batch_size=1"]),
    "QAT, 8-bit inputs and 4-bit weights": (1, ["+qat"]),
}
# What may differ from the plain run by more than the order of sums.
ROUNDED = {
    "bf16 over fp32 weights",
    "bf16",
    "8-bit AdamW",
    "dp2, bf16 over fp32 weights",
    "QAT, 8-bit inputs and 4-bit weights",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    words = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    with tempfile.TemporaryDirectory(prefix="tunesmith-convergence-") as name:
        folder = Path(name)
        write_model(folder / "model", words.text)
        for run in words.only:
            if run in found["runs"]:
                continue
            print(run, "…", flush=True)
            found["runs"][run] = train(folder, words.text, words.steps, *RUNS[run])
            found |= {"machine": machine(), "versions": versions(), "steps": words.steps}
            found["text"] = "/".join(words.text.resolve().parts[-2:])
            found["date"] = datetime.date.today().isoformat()
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, ROOT / "docs" / "convergence.svg")
    write_page(found, ROOT / "docs" / "convergence.md")


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


def train(folder: Path, text: Path, steps: int, processes: int, more: list[str]) -> list[float]:
    """The loss of every step."""
    output = Path(tempfile.mkdtemp(dir=folder)) / "run"
    words = f"""pretrain model={folder}/model dataset.source={text.resolve()} tokenizer.max_seq_len=256 global_batch_size=8 batch_size=4
        max_steps={steps} epochs=100 dtype=fp32 device=cpu optimizer.lr=1e-3 lr_scheduler.type=cosine lr_scheduler.num_warmup_steps=10
        clip_grad_norm=1.0 output_dir={output}""".split()
    launch = ["--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, "-m", "tunesmith", "run", *launch, *words, *more]
    threads = max(1, (os.cpu_count() or 1) // processes)
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def draw(found: dict, path: Path) -> None:
    """All curves above, their distance from the plain one below."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tunesmith"
    from matplotlib import pyplot

    plain = found["runs"][PLAIN]
    steps = range(1, len(plain) + 1)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 9), sharex=True, height_ratios=[3, 2])
    colors = pyplot.colormaps["tab20"]
    for number, (name, losses) in enumerate(found["runs"].items()):
        style = (
            {"color": "black", "linewidth": 2.5} if name == PLAIN else {"color": colors(number % 20), "linewidth": 1}
        )
        above.plot(steps, losses, label=name, **style)
        if name != PLAIN:
            below.plot(steps, [max(abs(a - b) / b, 1e-9) for a, b in zip(losses, plain)], label=name, **style)
    above.set_ylabel("loss")
    above.legend(fontsize=8, ncols=2)
    above.set_title(f"11M parameters from scratch on {found['text']}, 2048 tokens a step")
    below.set_yscale("log")
    below.set_ylabel("|loss / plain loss - 1|")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def write_page(found: dict, path: Path) -> None:
    plain, runs = found["runs"][PLAIN], found["runs"]
    rows = []
    for name, losses in runs.items():
        apart = [abs(a - b) / b for a, b in zip(losses, plain)]
        rows.append(f"| {name} | {losses[-1]:.5f} | {max(apart[:10]):.1e} | {max(apart):.1e} |")
    exact = [name for name in runs if name not in ROUNDED and name != PLAIN]
    worst = max(max(abs(a - b) / b for a, b in zip(runs[name], plain)) for name in exact)
    versions_ = ", ".join(
        f"{name} {found['versions'][name]}" for name in ("torch", "tunesmith") if name in found["versions"]
    )
    path.write_text(f"""# Convergence

One run, every technique and layout: a Llama of 11 million parameters from scratch on {found["text"]}, {found["steps"]} steps of 2048 tokens
(AdamW, cosine schedule after 10 steps of warm-up, gradient norm clipped to 1). Only what the name of a run says differs from the plain one;
the data of a step depend on the seed and the step alone, so curves can be laid over each other.

![loss curves, and their distance from the plain run](convergence.svg)

| run | last loss | furthest from plain in the first 10 steps | in all {found["steps"]} |
|---|---|---|---|
{chr(10).join(rows)}

Layouts, micro-batches and checkpointing change nothing but the order of sums: the largest distance among them is {worst:.1e} of the loss.
Where numbers are rounded otherwise (bf16, 8-bit states, QAT) curves part by that rounding and stay together.

`python benchmarks/convergence.py PATH/TO/{found["text"]} --steps {found["steps"]}` makes this page again, on {found["machine"]["cores"]} cores in about three quarters of an hour.
{found["date"]}; {found["machine"]["processor"]}; {versions_}. Every loss is in `benchmarks/results/convergence.json`.
""")


if __name__ == "__main__":
    main()
