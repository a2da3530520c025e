"""Hold the installed libraries to their public behaviour with and without genfuse, and compare the outcomes.

    python tests/adoption/run.py

Runs normflows' own tests, which come inside of it, and `behaviour.py` for the others, each once as installed and once
patched, in processes of their own. Fails unless every test comes out the same both times, and passes where it should,
and genfuse has served calls of each library.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def run(tests: list[str], patched: list[str]) -> dict[str, Any]:
    """What came out of these tests."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "genfuse_outcomes", "-p", "no:cacheprovider"]
        command += ["-o", "addopts=", "-o", "python_files=*_test.py", "--tb=line", f"--outcomes={outcomes}"]
        command += [f"--patch={name}" for name in patched]
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        result = subprocess.run(
            [*command, *tests],
            cwd=HERE,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if not outcomes.exists():
            raise SystemExit(f"pytest did not finish:\n{result.stdout}")
        found: dict[str, Any] = json.loads(outcomes.read_text(encoding="utf-8"))
        found["output"] = result.stdout
        return found


def compare(title: str, tests: list[str], libraries: list[str], may_fail: bool) -> bool:
    """Run twice and say what came out; whether all is well."""
    without, patched = run(tests, []), run(tests, libraries)
    before, after = without["outcomes"], patched["outcomes"]
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    failing = sorted(name for name, outcome in before.items() if outcome == "failed")
    print(
        f"\n{title}: {len(before)} tests, {len(failing)} failing as installed, {len(differing)} different when patched"
    )
    for name, count in patched["served"].items():
        print(f"  {name}: {count} calls served by genfuse")
    for what, count in sorted(patched["handed_back"].items()):
        print(f"  {count} calls handed back by {what}")
    for name in differing:
        print(f"  {name}: {before.get(name, 'missing')} as installed, {after.get(name, 'missing')} patched")
    unserved = [name for name, count in patched["served"].items() if count == 0]
    for name in unserved:
        print(f"  {name}: no call was served by genfuse")
    well = bool(before) and not differing and not unserved and (may_fail or not failing)
    if not well:
        print("as installed:", without["output"], "patched:", patched["output"], sep="\n")
    return well


def main() -> int:
    """0 if all is well."""
    installed = [
        name for name in ("nflows", "normflows", "zuko", "pyro", "transformers") if importlib.util.find_spec(name)
    ]
    well = bool(installed)
    if not installed:
        print("none of the libraries is installed: pip install genfuse[adoption]")
    if "normflows" in installed:
        folder = Path(str(importlib.util.find_spec("normflows").origin)).parent  # type: ignore[union-attr]
        tests = [str(folder / one) for one in ("core_test.py", "flows", "utils", "nets")]
        # Some of its tests fail by themselves with some versions of torch and some seeds.
        well &= compare("normflows' own tests", tests, ["normflows"], may_fail=True)
    others = [name for name in installed if name != "normflows"]
    if others:
        well &= compare("behaviour of " + ", ".join(others), [str(HERE / "behaviour.py")], others, may_fail=False)
    print("\nthe same with and without genfuse" if well else "\nFAILED")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
