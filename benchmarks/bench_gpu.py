"""Training on an accelerator: random models in the shapes of Llama 3.2 1B and Llama 3.1 8B; full weights, LoRA and QLoRA.

Needs nothing but tunesmith's own dependencies. Weights are drawn on the device and nothing is saved, so no disk is needed.
bf16, compiled layers, rows of 2048 tokens packed from documents that do not see each other, fused AdamW.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import material
from measure import Options, Table, be_contender, mark, median, run_contender

LORA = ["weights.type=lora", "weights.rank=16", "weights.alpha=32"]
METHODS = {"full": [], "LoRA": LORA, "QLoRA": [*LORA, "weights.quantize_base=nf4"]}
CHECKPOINTED = ["enable_activation_checkpointing=true"]
CASES: dict[str, tuple[str, str, list[str]]] = {
    "1B full": ("llama3_2/1B", "full", ["batch_size=8"]),
    "1B LoRA": ("llama3_2/1B", "LoRA", ["batch_size=8"]),
    "1B QLoRA": ("llama3_2/1B", "QLoRA", ["batch_size=8"]),
    "8B full": ("llama3_1/8B", "full", ["batch_size=4"]),
    "8B full, activations recomputed": ("llama3_1/8B", "full", ["batch_size=4", *CHECKPOINTED]),
    "8B LoRA": ("llama3_1/8B", "LoRA", ["batch_size=4"]),
    "8B QLoRA": ("llama3_1/8B", "QLoRA", ["batch_size=4"]),
    "8B QLoRA, activations recomputed": ("llama3_1/8B", "QLoRA", ["batch_size=4", *CHECKPOINTED]),
}
TINY = "{num_hidden_layers: 2, hidden_size: 128, intermediate_size: 256, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 32, vocab_size: 8192}"


def measure(folder: Path, options: Options) -> list[Table]:
    """`quick` takes tiny shapes, on whatever device there is: to see that it works."""
    material.write_tokenizer(folder / "model")
    texts = material.write_rows(folder / "texts.jsonl", material.texts(300 if options.quick else 12_000))
    rows: list[list[Any]] = []
    raw: dict[str, Any] = {}
    for case, (model, method, settings) in CASES.items():
        words = [f"model={model}", f"tokenizer.path={folder / 'model'}", f"dataset.source={texts}", *METHODS[method]]
        words += ["compile=true", *settings, "tokenizer.max_seq_len=2048"]
        if options.quick:
            words += [f"model_args={TINY}", "compile=false", "batch_size=1", "tokenizer.max_seq_len=128"]
        try:
            one = run_contender(__file__, "train", folder, options, words=words, steps=3 if options.quick else 20)
        except RuntimeError as error:  # out of memory, say: the other cases still tell something
            print(f"  {case}: {str(error).strip().splitlines()[-1]}", file=sys.stderr, flush=True)
            rows.append([case, *["failed"] * 5])
            continue
        raw[case] = vars(one)
        about, first, steps = (
            one.named("model")[0],
            one.named("step")[0],
            one.named("step")[len(one.named("step")) // 3 :],
        )
        speed = median(step["tokens"] / step["seconds"] for step in steps)
        tflops = median(step["flops"] / step["seconds"] for step in steps) / 1e12
        share = f"{tflops / about['peak_tflops']:.0%}" if about["peak_tflops"] else "?"
        rows.append([case, speed, tflops, share, max(step["gib"] for step in steps), first["seconds"]])
        print(f"  {case}: {speed:,.0f} tokens/s, {tflops:.0f} TFLOP/s, {rows[-1][4]:.1f} GiB", flush=True)
    headers = ["", "tokens/s", "model TFLOP/s", "of peak", "peak GiB", "first step s"]
    return [Table(f"gpu: {next((one['marks'][0]['device'] for one in raw.values()), '?')}", headers, rows, raw)]


def train(words: list[str], steps: int) -> None:
    """The body of the pretrain recipe without its run folder, over weights drawn on the device."""
    import torch

    from tunesmith.config import load_config
    from tunesmith.data.loader import text_batches
    from tunesmith.data.tokenizer import load_tokenizer
    from tunesmith.parallel.device import device_name, peak_memory_gib, pick_device, reset_peak_memory, synchronize
    from tunesmith.parallel.mesh import start_mesh
    from tunesmith.training.flops import peak_tflops, training_flops
    from tunesmith.training.optim import build_optimizer
    from tunesmith.training.source import find_model
    from tunesmith.training.step import train_step

    lora = [word for word in words if word.startswith("weights.")]
    # An adapter needs a trained base, says the config: here the base is drawn at random all the same.
    config = load_config("pretrain", *(word for word in words if word not in lora), "dtype=bf16", f"max_steps={steps}")
    config.weights = load_config("pretrain", "model=x", "dataset.source=x", "from_scratch=false", *lora).weights
    torch.manual_seed(0)
    mesh = start_mesh(pick_device())
    source = find_model(config.model, config.model_args, need_weights=False)
    tokenizer = load_tokenizer(config.tokenizer.path)
    data = text_batches(config, tokenizer, mesh, max_seq_len=config.tokenizer.max_seq_len)
    model = random_model(config, source, mesh)
    optimizer = build_optimizer(model, config, steps, mesh)
    flops = training_flops(model)
    mark("model", device=device_name(mesh.device), peak_tflops=peak_tflops(mesh.device, config.dtype))

    def loss(head, hidden, batch):
        return {"loss": (head.cross_entropy(hidden, batch.labels, config.loss.chunk_size), "tokens")}

    for step in range(1, steps + 1):
        batches = data.step(step)
        reset_peak_memory(mesh.device)
        started = time.perf_counter()
        stats = train_step(model, optimizer, batches, loss, mesh, step)
        synchronize(mesh.device)
        seconds = time.perf_counter() - started
        cost = flops.of_step(stats.num_tokens, stats.num_trained, stats.num_seen)
        mark(
            "step",
            seconds=seconds,
            tokens=stats.num_tokens,
            flops=cost,
            loss=stats.loss,
            gib=peak_memory_gib(mesh.device),
        )


def random_model(config, source, mesh):
    """As training.build.build_model makes it, with numbers from the device's own generator: drawing 8B on the CPU takes minutes."""
    import torch

    from tunesmith.configs.weights import LoRAWeights
    from tunesmith.models.decoder import build
    from tunesmith.nn.lora import apply_lora, freeze_base, reset_adapters
    from tunesmith.nn.quantize import NF4Linear
    from tunesmith.parallel.parallelize import parallelize
    from tunesmith.training.dtypes import DTYPES, default_dtype

    weights = config.weights if isinstance(config.weights, LoRAWeights) else None
    with torch.device("meta"), default_dtype(DTYPES[config.dtype]):
        model = build(source.hf_config, source.family, source.family.read_config(source.hf_config))
    if weights:
        apply_lora(
            model, weights.rank, weights.alpha, weights.dropout, weights.target_modules,
            quantize_base=weights.quantize_base, dtype=torch.float32,
        )  # fmt: skip
    parallelize(model, mesh, source.family.tp_plan, config)
    model.to_empty(device=mesh.device)
    model.init_buffers(mesh.device, config.tokenizer.max_seq_len)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NF4Linear):
                shape = module.weight_shapes()["weight"]
                module.load_weight("weight", torch.randn(shape, device=mesh.device, dtype=torch.bfloat16) * 0.02)
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
    if weights:
        reset_adapters(model, 0)
        freeze_base(model)
    return model.train()


if __name__ == "__main__":
    be_contender({"train": train})
