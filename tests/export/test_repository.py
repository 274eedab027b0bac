"""Options of a repository that is written."""

import pytest

from tunesmith.errors import UserError
from tunesmith.export.repository import parse_size


@pytest.mark.parametrize(
    "text, expected",
    [("5GB", 5e9), ("500MB", 5e8), ("1.5 gb", 1.5e9), ("20KB", 2e4), ("100", 100), ("2GiB", 2 * 2**30)],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "0GB", "five", "-1GB"])
def test_no_sizes(text):
    with pytest.raises(UserError, match="max_shard_size"):
        parse_size(text)
