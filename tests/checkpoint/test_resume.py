"""The order in which a checkpoint comes to the disk, and how ranks look at it again before it is resumed."""

import os
import stat

from tests.recipes.test_layouts import COMMON, run_recipe


def test_the_files_of_a_checkpoint_are_on_the_disk_before_it_has_its_name(tmp_path, tiny_model, chat_file, monkeypatch):
    """Also their names: a power cut after the renaming must not leave a folder without some of its files."""
    done, fsync, rename = [], os.fsync, os.rename

    def synced(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            done.append(("synced", path, sorted(os.listdir(path))))
        fsync(descriptor)

    def renamed(source, target, **options):
        done.append(("renamed", str(source)))
        rename(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "rename", renamed)
        words = ["sft", *COMMON, f"model={tiny_model}", f"dataset.source={chat_file}", "max_steps=1", "batch_size=8"]
        assert run_recipe(words, tmp_path / "run") == 0
    folder = tmp_path / "run" / "checkpoints"
    partial, whole = str(folder / ".step-00000001.partial"), folder / "step-00000001"
    before = done[: done.index(("renamed", partial))]
    assert ("synced", partial, sorted(os.listdir(whole))) in before
    assert ("synced", partial + "/resume", sorted(os.listdir(whole / "resume"))) in before
