"""How an error is quoted in one line."""

import errno
import os

import pytest

from finray.training.common.errors import FinrayError, InputError, RunError, in_one_line, writing

TRACE = """ray::work() (pid=7, ip=10.0.0.1)
  File "/x/tasks.py", line 3, in work
    raise ValueError(text)
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no room", "no room"),
        ("", "RuntimeError"),
        (" \n\n", "RuntimeError"),
        (
            "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`.\n",
            "CUDA error: device-side assert triggered",
        ),
        (f"{TRACE}ValueError: bad row", "ValueError: bad row"),
        (f"{TRACE}ValueError: bad row\nin three\nlines", "ValueError: bad row"),
        (
            f"Traceback (most recent call last):\n{TRACE}KeyError: 1\n\nDuring it, another:\n\n"
            f"Traceback (most recent call last):\n{TRACE}TypeError: the last one",
            "TypeError: the last one",
        ),
        (
            "Error(s) in loading state_dict for Model:\n\tsize mismatch for a.weight",
            "Error(s) in loading state_dict for Model: size mismatch for a.weight",
        ),
        ("cannot read the data\nOSError: [Errno 5]", "cannot read the data OSError: [Errno 5]"),
        (TRACE, "raise ValueError(text)"),
    ],
)
def test_first_line_and_the_last_where_it_says_more(text: str, line: str) -> None:
    assert in_one_line(RuntimeError(text)) == line


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.EROFS, InputError, "page.html: cannot be written: Read-only file system; move it"),
        (errno.ENOSPC, RunError, "No space left on device; free space there"),
    ],
)
def test_a_file_that_cannot_be_written(number: int, kind: type[FinrayError], text: str) -> None:
    with pytest.raises(kind, match=text), writing("page.html", "move it"):
        raise OSError(number, os.strerror(number))
