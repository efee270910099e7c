"""How long the test suite takes: runs make targets, and writes seconds per file and test.

python benchmarks/suite.py [test-unit test test-rest]
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import HERE, commit

RESULTS = HERE / "results" / "suite.json"
TARGETS = ("test-unit", "test", "test-rest")
COUNTS = ("tests", "failures", "errors", "skipped")
LONGEST = 30


def run(target: str) -> dict[str, Any]:
    """Seconds of a target, its tests' outcomes, and where the time goes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = f"-o junit_family=xunit1 --junitxml={report}"
        began, before = time.monotonic(), os.times()
        code = subprocess.run(
            ["make", target],
            cwd=HERE.parent,
            env={**os.environ, "PYTEST_ADDOPTS": options},
            check=False,
        ).returncode
        seconds, after = time.monotonic() - began, os.times()
        suite = next(xml.parse(report).getroot().iter("testsuite"))
    tests = {
        f"{case.attrib['file']}::{case.attrib['name']}": float(case.attrib["time"])
        for case in suite.iter("testcase")
    }
    files: defaultdict[str, float] = defaultdict(float)
    for name, each in tests.items():
        files[name.partition("::")[0]] += each
    cpu = after.children_user + after.children_system
    return {
        "exit_code": code,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu - before.children_user - before.children_system, 1),
        "tests": {key: int(suite.attrib[key]) for key in COUNTS},
        "files": _longest_first(files),
        "longest": dict(list(_longest_first(tests).items())[:LONGEST]),
    }


def _longest_first(seconds: Mapping[str, float]) -> dict[str, float]:
    order = sorted(seconds, key=lambda name: -seconds[name])
    return {name: round(seconds[name], 1) for name in order}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS))
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for target in parser.parse_args().targets:
        results[target] = {"commit": commit(), "cores": os.cpu_count(), **run(target)}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"make {target}: {results[target]['seconds']} s")


if __name__ == "__main__":
    main()
