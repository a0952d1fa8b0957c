"""Safe by default: names stay under the root, and no secret reaches the disk or a message."""

from pathlib import Path

import pytest

from configs.errors import BadInput
from configs.load import load

TINY = Path(__file__).parents[1] / "recipes" / "tiny.toml"


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "/etc", "", "a\\nb", "-x", "_tmp", ".x", "a" * 101, "a\x00", "~"])
def test_names_cannot_leave_the_root(name):
    with pytest.raises(BadInput, match="name"):
        load(TINY, [f"name={name!r}"])


@pytest.mark.parametrize("root", ["s3://AKIA:s3cr3t@bucket/runs", "https://user:s3cr3t@host/runs", "ftp://s3cr3t@host/x"])
def test_secrets_in_a_uri_are_refused_and_not_repeated(root):
    with pytest.raises(BadInput, match="root: a user or key in the URI") as caught:
        load(TINY, [f"root={root!r}"])
    assert "s3cr3t" not in str(caught.value)
    assert load(TINY, ["root=s3://bucket/runs"]).root == "s3://bucket/runs"
