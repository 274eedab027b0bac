"""Garbage is collected at the same steps everywhere, and never left off."""

import gc

from tunesmith.training.garbage import GarbageCollection


def collections(garbage, steps):
    """The steps during which Python collected anything."""
    found, now = [], 0

    def seen(phase, information):
        if phase == "stop":
            found.append(now)

    gc.callbacks.append(seen)
    try:
        for now in steps:
            [[] for _ in range(100_000)]  # enough for Python to collect by itself
            garbage.step(now)
    finally:
        gc.callbacks.remove(seen)
    return found


def test_collected_every_n_steps_and_not_between():
    garbage = GarbageCollection(3)
    garbage.start()
    try:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        assert collections(garbage, range(1, 10)) == [3, 6, 9]
    finally:
        garbage.stop()
        garbage.stop()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_left_to_python_without_a_number():
    garbage = GarbageCollection(None)
    garbage.start()
    assert gc.isenabled() and collections(garbage, range(1, 4))
    garbage.stop()


def test_what_was_off_before_stays_off():
    gc.disable()
    try:
        garbage = GarbageCollection(1)
        garbage.start()
        garbage.stop()
        assert not gc.isenabled()
    finally:
        gc.enable()
