"""placeholder"""

from typing import Any


def write_report(folder: Any, study: Any, record: Any) -> None:
    pass
