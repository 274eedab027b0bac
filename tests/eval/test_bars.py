"""Bars stay away, and nothing else does."""

import io

from tqdm import tqdm

from tunesmith.eval.bars import WithoutBars


def test_bars_are_dropped_and_lines_kept():
    kept = io.StringIO()
    stream = WithoutBars(kept)
    print("before", file=stream)
    for number in tqdm(range(3), file=stream, mininterval=0):
        print(f"\nat {number}", file=stream)
    print("behind\n", file=stream)
    assert (
        kept.getvalue().split() == ["before", "at", "0", "at", "1", "at", "2", "behind"] and "\r" not in kept.getvalue()
    )
    assert kept.getvalue().endswith("behind\n\n") and not stream.isatty()
