"""Short runs of a recipe on any layout, and what they left behind, for tests that compare them."""

import json
import math

from safetensors.torch import load_file

from tests.distributed import run_distributed

LAYOUTS = {
    "dp2": (2, []),
    "hsdp": (2, ["data_parallel_replicate_dim=2"]),
    "tp2": (2, ["tensor_parallel_dim=2"]),
    "cp2": (2, ["context_parallel_dim=2"]),
    "pp2": (2, ["pipeline_parallel_dim=2"]),
    "dp2 x pp2": (4, ["pipeline_parallel_dim=2"]),
    "tp2 x pp2": (4, ["pipeline_parallel_dim=2", "tensor_parallel_dim=2"]),
    "dp2 x tp2": (4, ["tensor_parallel_dim=2"]),
    "dp2 x cp2": (4, ["context_parallel_dim=2"]),
    "tp2 x cp2": (4, ["tensor_parallel_dim=2", "context_parallel_dim=2"]),
}
# Plain SGD: AdamW divides by the size of gradients, which turns rounding in those that are next to nothing into whole steps.
COMMON = """dtype=fp32 device=cpu max_steps=4 optimizer.type=sgd optimizer.lr=0.05 lr_scheduler.type=constant clip_grad_norm=1.0
global_batch_size=8 tokenizer.max_seq_len=64""".split()


def run_recipe(words, folder):
    """On a rank: `tune run` of the words; its exit code."""
    from tunesmith.config import load_config, run

    try:
        run(load_config(*words, f"output_dir={folder}"))
    except SystemExit as error:
        return error.code
    return 0


def train(words, folder, layout="one"):
    processes, more = LAYOUTS[layout] if layout != "one" else (1, [])
    assert run_distributed(run_recipe, processes, [*words, *more], folder) == [0] * processes
    return result(folder)


def result(folder):
    """(loss and norm of each step, final weights)."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    [file] = [*newest.glob("model*.safetensors"), *newest.glob("adapter*.safetensors")]
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row], load_file(file)


def assert_same(found, expected, tolerance=1e-5):
    for step, (ours, theirs) in enumerate(zip(found[0], expected[0], strict=True), 1):
        assert all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(ours, theirs)), (step, ours, theirs)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        error = ((found[1][name] - tensor).norm() / tensor.norm()).item()
        assert error < tolerance, (name, error)
