"""The order in which a checkpoint comes to the disk, and how ranks look at it again before it is resumed."""

import json
import os
import shutil
import stat

import pytest

from tests.distributed import run_distributed
from tests.runs import COMMON, run_recipe
from tunesmith.checkpoint.resume import check_digests, find_newest
from tunesmith.errors import UserError


def test_the_files_of_a_checkpoint_are_on_the_disk_before_it_has_its_name(tmp_path, tiny_model, chat_file, monkeypatch):
    """Also their names: a power cut after the renaming must not leave a folder without some of its files."""
    done, fsync, rename = [], os.fsync, os.rename

    def synced(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            done.append(("synced", os.fstat(descriptor).st_ino, sorted(os.listdir(descriptor))))
        fsync(descriptor)

    def renamed(source, target, **options):
        done.append(("renamed", str(source)))
        rename(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "rename", renamed)
        words = ["sft", *COMMON, f"model={tiny_model}", f"dataset.source={chat_file}", "max_steps=1", "batch_size=8"]
        assert run_recipe(words, tmp_path / "run") == 0
    whole = tmp_path / "run" / "checkpoints" / "step-00000001"
    before = done[: done.index(("renamed", str(whole.with_name(f".{whole.name}.partial"))))]
    for folder in (whole, whole / "resume"):
        assert ("synced", folder.stat().st_ino, sorted(os.listdir(folder))) in before


def resume_and_record(words, folder):
    """On a rank: go on with a run; the files that this rank read back before it went on, and what was said if it was refused."""
    from tunesmith.checkpoint import check, resume
    from tunesmith.config import load_config
    from tunesmith.errors import UserError
    from tunesmith.training.start import start_run

    read, verify = [], check.verify
    resume.verify = lambda folder, digests: (read.extend(digests), verify(folder, digests))  # in this process alone
    try:
        with start_run(load_config(*words, f"output_dir={folder}", "resume_from_checkpoint=true"), "sft"):
            return read, None
    except UserError as error:
        return read, str(error)


def test_each_rank_reads_a_share_of_the_checkpoint_that_is_resumed(tmp_path, tiny_model, chat_file):
    words = ["sft", *COMMON, f"model={tiny_model}", f"dataset.source={chat_file}", "max_steps=1", "batch_size=4"]
    folder = tmp_path / "run"
    assert run_distributed(run_recipe, 2, words, folder) == [0, 0]
    newest = folder / "checkpoints" / "step-00000001"
    (folder / "checkpoints" / "latest").unlink()
    (first, nothing), (second, nor_there) = run_distributed(resume_and_record, 2, words, folder)
    assert nothing is nor_there is None and find_newest(folder) == newest
    digests = json.loads((newest / "resume" / "state.json").read_text())["digests"]
    assert first and second and sorted(first + second) == sorted(digests)
    assert (folder / "checkpoints" / "latest").read_text().strip() == newest.name
    for damaged in (first[0], second[0]):
        whole = (newest / damaged).read_bytes()
        (newest / damaged).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        (_, said), (_, other) = run_distributed(resume_and_record, 2, words, folder)
        assert said == other and f"{damaged} is not what was written" in said and f"remove {newest}, and" in said
        with pytest.raises(UserError, match="is not what was written.*takes the one before"):
            check_digests(newest)
        (newest / damaged).write_bytes(whole)


def test_the_newest_checkpoint_is_refused_where_only_a_part_is_there(tmp_path, tiny_model, chat_file):
    """By every rank, instead of going on from an older one unasked; once it is removed, as is said, that one is taken."""
    words = ["sft", *COMMON, f"model={tiny_model}", f"dataset.source={chat_file}", "max_steps=2", "batch_size=4"]
    folder = tmp_path / "run"
    assert run_distributed(run_recipe, 2, [*words, "save_every_n_steps=1"], folder) == [0, 0]
    older, newest = (folder / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    (newest / "resume" / "state.json").unlink()
    (_, said), (_, other) = run_distributed(resume_and_record, 2, words, folder)
    assert said == other and said.startswith(f"{newest} is not complete, resume/state.json is absent: copy it whole")
    shutil.rmtree(newest)
    (read, nothing), _ = run_distributed(resume_and_record, 2, words, folder)
    assert read and nothing is None and find_newest(folder) == older
