"""`make quickstart`: fine-tune the tiny model that ships in the package, and show what it learned.

    python -m tunesmith.recipes.quickstart

Four steps, each of which is a command or a call that works the same on a real model: generate answers, `tune run sft +lora`,
`tune run export`, generate again with what was exported. Everything lands in quickstart/ of the current directory.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import tunesmith
from tunesmith.errors import UserError

ASSETS = Path(__file__).resolve().parents[1] / "assets"
BASE = ASSETS / "tiny"
TRAIN, TEST = ASSETS / "quickstart" / "train.jsonl", ASSETS / "quickstart" / "test.jsonl"
SETTINGS = (
    "dtype=fp32",
    "device=cpu",
    "seed=1",
    "weights.rank=16",
    "optimizer.lr=4e-3",
    "batch_size=32",
    "epochs=6",
    "run_val_every_n_steps=50",
)
"""What the tiny model needs other than `sft +lora` starts from: small models want large learning rates."""
SHOWN_TASKS = ("backwards", "nth word", "list", "sum", "opposite", "capital")
"""Tasks of which one prompt each is shown with its answers."""
MAX_NEW_TOKENS = 48

T = TypeVar("T")


class Question(NamedTuple):
    """A row of the instruction set."""

    task: str
    prompt: str
    answer: str


def main() -> None:
    started = time.monotonic()
    folder = fresh_folder(Path("quickstart"))
    train, test = read_questions(TRAIN), read_questions(TEST)
    shown = [next(question for question in test if question.task == task) for task in SHOWN_TASKS]
    print(
        f"tunesmith quickstart: a tiny language model learns to follow {len(train)} instructions, on the CPU.\n",
        flush=True,
    )
    use_one_thread()

    before = timed(f"1/4  The base model answers {len(test)} held-out prompts", lambda: answers(BASE, test))
    adapter = fine_tune(folder, [question.prompt for question in shown])
    merged = merge(adapter, folder / "model")
    after = timed("4/4  The exported model answers the same prompts", lambda: answers(merged, test))

    seconds = round(time.monotonic() - started, 1)
    results = {"before": score(test, before), "after": score(test, after), "of": len(test), "seconds": seconds}
    (folder / "quickstart.json").write_text(json.dumps(results, indent=1) + "\n")
    print_scores(test, before, after)
    print_answers(test, before, after, shown)
    print_files(adapter, merged, folder / "report.html")
    print(f"\nAll of it took {seconds:.0f} s.", flush=True)


def fine_tune(folder: Path, sample_prompts: list[str]) -> Path:
    """`tune run sft +lora …` on the training rows; returns the folder of the adapter."""
    words = [
        "sft",
        "+lora",
        f"model={BASE}",
        f"dataset.source={TRAIN}",
        f"dataset_val.source={TEST}",
        f"output_dir={folder}",
        *SETTINGS,
    ]
    print(f"2/4  LoRA fine-tuning, which is\n       {command('run', *words)}", flush=True)
    tunesmith.run(tunesmith.load_config(*words, f"sample_prompts={json.dumps(sample_prompts)}"))
    checkpoints = folder / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text().strip()


def merge(adapter: Path, output: Path) -> Path:
    """`tune run export …` of the adapter; returns the folder of the merged model."""
    words = ["export", f"model={adapter}", f"output_dir={output}"]
    print(f"3/4  The adapter is merged into its base, which is\n       {command('run', *words)}", flush=True)
    tunesmith.run(tunesmith.load_config(*words))
    return output


# --- the parts -----------------------------------------------------------------------------------


def fresh_folder(wanted: Path) -> Path:
    """`wanted`, emptied if an earlier quickstart made it; else the first of wanted-2, wanted-3, … that is free or an earlier quickstart's."""
    number, folder = 1, wanted
    while folder.is_symlink() or (folder.exists() and not is_left_over(folder)):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    if folder.exists():
        shutil.rmtree(folder)
    return folder


def is_left_over(folder: Path) -> bool:
    """Whether a quickstart that has ended made this folder: it is empty, or its config.yaml trains on the quickstart's data."""
    if not folder.is_dir() or is_in_use(folder):
        return False
    config = folder / "config.yaml"
    if config.is_file():
        return TRAIN.relative_to(ASSETS.parent).as_posix() in config.read_text(encoding="utf-8")
    return all(path.name == ".lock" for path in folder.iterdir())


def is_in_use(folder: Path) -> bool:
    """Whether a run that goes on now holds the folder's lock."""
    if not (folder / ".lock").exists():
        return False
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def use_one_thread() -> None:
    """Matrices this small gain little from a second thread, and wait for it long where another program runs on its core."""
    import torch

    torch.set_num_threads(1)


def read_questions(path: Path) -> list[Question]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Question(row["task"], *(message["content"] for message in row["messages"])) for row in rows]


def answers(model: Path, questions: list[Question]) -> list[str]:
    """What the model in a folder answers, greedily, in the chat format."""
    tokenizer = tunesmith.load_tokenizer(model)
    module = tunesmith.load_model(model, dtype="float32")
    prompts = [question.prompt for question in questions]
    texts = tunesmith.generate(
        module, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, batch_size=64, chat=True
    )
    return [text.strip() for text in texts]


def score(questions: list[Question], given: list[str]) -> int:
    """How many answers are right to the letter."""
    return sum(question.answer == answer for question, answer in zip(questions, given))


def timed(what: str, work: Callable[[], T]) -> T:
    print(f"{what} ...", end=" ", flush=True)
    started = time.monotonic()
    result = work()
    print(f"{time.monotonic() - started:.1f} s", flush=True)
    return result


# --- what is printed -----------------------------------------------------------------------------


def print_scores(questions: list[Question], before: list[str], after: list[str]) -> None:
    print("\nHeld-out prompts answered exactly right (none of them was trained on)")
    print(f"  {'task':<18}{'before':>10}{'after':>12}")
    for task in dict.fromkeys(question.task for question in questions):
        of_task = [index for index, question in enumerate(questions) if question.task == task]
        print_score(task, [questions[i] for i in of_task], [before[i] for i in of_task], [after[i] for i in of_task])
    print_score("all", questions, before, after)


def print_score(name: str, questions: list[Question], before: list[str], after: list[str]) -> None:
    was, now = (f"{score(questions, given)} of {len(questions)}" for given in (before, after))
    print(f"  {name:<18}{was:>10}{now:>12}")


def print_answers(questions: list[Question], before: list[str], after: list[str], shown: list[Question]) -> None:
    print("\nA few answers")
    for question in shown:
        index = questions.index(question)
        verdict = "right" if after[index] == question.answer else f"wrong: it is {question.answer}"
        print(
            f"  {question.prompt}\n    before  {one_line(before[index])}\n    after   {one_line(after[index])}   ({verdict})"
        )


def one_line(text: str, width: int = 60) -> str:
    text = " / ".join(text.split("\n")) or "(nothing)"
    return text if len(text) <= width else text[: width - 3] + "..."


def print_files(adapter: Path, merged: Path, report: Path) -> None:
    print("\nWhat is there now")
    print(f"  adapter (PEFT)              {adapter}")
    print(f"  merged model (transformers) {merged}")
    print(f"  report for your browser     {report}")
    print("\nNext")
    print(
        f"  {command('run', 'generate', f'model={merged}', 'temperature=0', 'prompt=Write these words backwards: moon sun star')}"
    )
    print(f"  {command('run', 'sft', '+lora', f'model={merged}', 'dataset.source=your.jsonl')}")
    print(f"  {command('ls')}", flush=True)


def command(*words: str) -> str:
    """`tune WORDS…` as it can be typed in this shell: paths below the current directory are shortened."""
    here = os.getcwd() + os.sep
    return " ".join([tune(), *(shlex.quote(word.replace(here, "")) for word in words)])


def tune() -> str:
    """How this environment's `tune` is called from here."""
    ours = Path(sys.executable).with_name("tune")
    found = shutil.which("tune")
    if found is not None and Path(found).absolute() == ours.absolute():
        return "tune"
    return shlex.quote(min(os.path.relpath(ours), str(ours), key=len)) if ours.exists() else "tune"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
