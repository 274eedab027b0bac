"""Two processes against one on the same machine: training on each layout, checkpoints written and read, a sharded model loaded."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import material
from measure import Options, Outcome, Table, be_contender, mark, median, run_process

LAYOUTS = {
    "one process": (1, []),
    "dp2: data (FSDP)": (2, []),
    "hsdp: data (copies)": (2, ["data_parallel_replicate_dim=2"]),
    "tp2: matrices": (2, ["tensor_parallel_dim=2"]),
    "cp2: sequences": (2, ["context_parallel_dim=2"]),
    "pp2: layers": (2, ["pipeline_parallel_dim=2"]),
}


def measure(folder: Path, options: Options) -> list[Table]:
    material.write_model(folder / "model", material.SMALL)
    material.write_tokenizer(folder / "model")
    material.write_rows(folder / "texts.jsonl", material.texts(200 if options.quick else 600))
    return [_training(folder, options), _checkpoints(folder, options), _loading(folder, options)]


# --- training ----------------------------------------------------------------------------------------


def _train(folder: Path, options: Options, processes: int, more: list[str], steps: int) -> tuple[Outcome, list[dict]]:
    run = folder / f"run-{time.time_ns()}"
    launch = ["--nproc_per_node", str(processes)] if processes > 1 else []
    words = f"""pretrain model={folder}/model from_scratch=false dataset.source={folder}/texts.jsonl tokenizer.max_seq_len=512
        global_batch_size=4 batch_size=1 max_steps={steps} dtype=fp32 device=cpu optimizer.lr=1e-4 output_dir={run}""".split()
    command = [sys.executable, "-m", "tunesmith", "run", *launch, *words, *more]
    # One thread a process: what a second process adds is then what the layout makes of a second core.
    outcome = run_process(command, folder, Options(options.quick, 1, 1, options.clock))
    return outcome, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _training(folder: Path, options: Options) -> Table:
    steps = 4 if options.quick else 10
    speeds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    memory: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    losses: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, (processes, more) in LAYOUTS.items():
            _, rows = _train(folder, options, processes, more, steps)
            speeds[name].append(median(row["tokens_per_second"] for row in rows[2:] if "loss" in row))
            memory[name].append(max(row["peak_memory_gib"] for row in rows if "loss" in row))
            losses[name] = rows[steps - 1]["loss"]
    one = speeds["one process"]
    rows = [
        [
            name,
            median(speeds[name]),
            median(a / b for a, b in zip(speeds[name], one)),
            median(memory[name]),
            losses[name],
        ]
        for name in LAYOUTS
    ]
    headers = ["one thread a process", "tokens/s", "× one process", "peak GiB a rank", f"loss of step {steps}"]
    title = "parallel: 26M parameters, fp32, packed to 512, global batch of 4 rows, micro-batches of 1"
    return Table(title, headers, rows, {"speeds": speeds, "memory": memory})


# --- checkpoints -------------------------------------------------------------------------------------


def _checkpoints(folder: Path, options: Options) -> Table:
    files = [_files(folder, options, processes) for processes in (1, 2)]
    speed = [[f"{n} process{'es' * (n > 1)}", *one[:4]] for n, one in zip((1, 2), files)]
    return Table(
        "checkpoints: 26M parameters in fp32 with AdamW's states (0.31 GB), on the local disk, every byte forced to it and read back",
        ["", "save GB/s", "blocked by a save s", "by one in the background s", "load GB/s"],
        speed,
        files,
    )


def _files(folder: Path, options: Options, processes: int) -> list[float]:
    """(GB/s saved, seconds blocked, seconds blocked in the background, GB/s loaded) on so many processes."""
    launch = (
        ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"] if processes > 1 else []
    )
    arguments = json.dumps({"model": str(folder / "model"), "folder": str(folder / f"saves{processes}")})
    outcome = run_process([sys.executable, *launch, __file__, "save_and_load", arguments], folder, options)
    found = outcome.value("measured", "values")
    return [found["gigabytes"] / found["saved"], found["saved"], found["staged"], found["gigabytes"] / found["loaded"]]


class NoData:
    """Where a run without data stands."""

    def state(self) -> dict:
        return {}

    def merged(self, states: list[dict]) -> dict:
        return states[0]

    def load_state(self, state: dict) -> None:
        pass


def save_and_load(model: str, folder: str) -> None:
    import torch

    from tunesmith.checkpoint.hf import stage_repository
    from tunesmith.checkpoint.load import load_weights
    from tunesmith.checkpoint.resume import Checkpoints
    from tunesmith.configs.layout import Layout
    from tunesmith.configs.shared import TrainSettings
    from tunesmith.data.tokenizer import find_tokenizer
    from tunesmith.parallel.mesh import start_mesh
    from tunesmith.training.build import build_model
    from tunesmith.training.optim import build_optimizer
    from tunesmith.training.source import find_model

    config = TrainSettings(dtype="fp32", device="cpu")
    mesh = start_mesh(torch.device("cpu"), Layout.of(config))
    source = find_model(model)
    tokenizer = find_tokenizer(config.tokenizer, source.tokenizer, ())
    network = build_model(config, source, tokenizer, mesh)
    optimizer = build_optimizer(network, config, 10, mesh)
    _take_a_step(network, optimizer)

    def checkpoints(background: bool) -> Any:
        def stage(ranks: Any) -> Any:
            return stage_repository(network, tokenizer, source.folder, copy=background, ranks=ranks)

        return Checkpoints(Path(folder), stage, optimizer, NoData(), {}, mesh, keep_last=1, background=background)

    saves = checkpoints(False)
    saves.save(1)
    saved, where = _timed(lambda: saves.save(2))
    size = sum(path.stat().st_size for path in where.rglob("*") if path.is_file()) / 1e9
    loaded, _ = _timed(lambda: (load_weights(network, where, source.family), saves.restore(where)))
    background = checkpoints(True)
    background.save(3)
    background.wait()
    staged, _ = _timed(lambda: background.save(4))
    background.close()
    if mesh.is_main:
        mark("measured", values={"gigabytes": size, "saved": saved, "staged": staged, "loaded": loaded})
    os._exit(0)


def _take_a_step(network: Any, optimizer: Any) -> None:
    """So that the optimizer has states to be saved."""
    import torch

    optimizer.set_step(1)
    ids = torch.arange(1, 65)[None]
    network.lm_head.cross_entropy(network(ids), ids).backward()
    optimizer.step(finite_loss=True)


def _timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds on the wall, and what `act` returned."""
    started = time.perf_counter()
    result = act()
    return time.perf_counter() - started, result


# --- loading -----------------------------------------------------------------------------------------


def _loading(folder: Path, options: Options) -> Table:
    material.write_model(folder / "half", material.SMALL if options.quick else material.HALF_BILLION, "bfloat16")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    rows, raw = [], {}
    for name in (
        "ours: FSDP, each rank its half",
        "ours: tensor parallel, each rank its half",
        "transformers, each rank all of it",
    ):
        arguments = json.dumps({"model": str(folder / "half"), "kind": name.split(",")[0].removeprefix("ours: ")})
        seconds, memory, shards = [], [], []
        for _ in range(options.rounds):
            outcome = run_process([sys.executable, *launch, __file__, "load", arguments], folder, options)
            found = outcome.value("measured", "values")
            seconds.append(found["seconds"])
            memory.append(found["grown"])
            shards.append(found["shard"])
        raw[name] = [seconds, memory]
        rows.append([name, median(seconds), median(memory), shards[0], found["largest"]])
    headers = ["2 processes, bf16", "s", "memory grew by GB a rank", "its parameters GB", "largest tensor GB"]
    return Table("loading a model on two ranks: highest resident memory above what it was before", headers, rows, raw)


def load(model: str, kind: str) -> None:
    import torch
    import torch.distributed as dist

    if kind == "transformers":
        from transformers import AutoModelForCausalLM
        from transformers.models.llama.modeling_llama import LlamaForCausalLM  # noqa: F401  otherwise imported while loading

        dist.init_process_group("gloo")
        before, started = _resident(), time.perf_counter()
        network = AutoModelForCausalLM.from_pretrained(model)
        for parameter in network.parameters():  # mapped files count once they are touched
            parameter.detach().view(-1).view(torch.uint8)[::4096].sum()
        shard = sum(parameter.nbytes for parameter in network.parameters())
        largest = max(parameter.nbytes for parameter in network.parameters())
    else:
        import torch.distributed.fsdp  # noqa: F401  otherwise imported while loading

        from tunesmith.checkpoint.load import load_weights, read_model_config
        from tunesmith.configs.layout import Layout
        from tunesmith.configs.shared import TrainSettings
        from tunesmith.models.decoder import build
        from tunesmith.nn.part import local_tensor
        from tunesmith.parallel.mesh import start_mesh
        from tunesmith.parallel.parallelize import parallelize
        from tunesmith.training.dtypes import default_dtype

        config = TrainSettings(tensor_parallel_dim=2 if kind == "tensor parallel" else 1)
        mesh = start_mesh(torch.device("cpu"), Layout.of(config))
        hf_config, family, shape = read_model_config(Path(model))
        before, started = _resident(), time.perf_counter()
        with torch.device("meta"), default_dtype(torch.bfloat16):
            network = build(hf_config, family, shape)
        largest = max(parameter.nbytes for parameter in network.parameters())
        parallelize(network, mesh, family.tp_plan, config)
        network.to_empty(device="cpu")
        load_weights(network, model, family)
        shard = sum(local_tensor(parameter.detach()).nbytes for parameter in network.parameters())
    seconds = time.perf_counter() - started
    grown = _resident() - before
    dist.barrier()
    if dist.get_rank() == 0:
        values = {"seconds": seconds, "grown": grown / 1e9, "shard": shard / 1e9, "largest": largest / 1e9}
        mark("measured", values=values)
    os._exit(0)


def _resident() -> int:
    """Highest resident memory so far, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    be_contender({"save_and_load": save_and_load, "load": load})
