"""Whether a pinned package has a known vulnerability: pip-audit over the constraints.

`python requirements/audit.py [--where-reachable]` exits with 1 on a finding that is not in `ACCEPTED`. pip-audit takes
a package that it cannot ask about for a safe one, so one that is known to be vulnerable is asked about first: where
even that one seems safe, nothing was checked, which is said, and is an error without `--where-reachable`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parent / "constraints.txt"
VULNERABLE = "urllib3==1.24.1"
"""CVE-2019-11324 and others."""
ACCEPTED: dict[str, str] = {}
"""Identifier of an advisory -> why it does not touch this project."""


def findings(requirements: str) -> list[str]:
    """One line per known vulnerability of the pinned packages."""
    command = [sys.executable, "-m", "pip_audit", "-r", "/dev/stdin", "--no-deps", "--disable-pip", "-f", "json"]
    done = subprocess.run(command, input=requirements, capture_output=True, text=True, timeout=900, check=False)
    packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"] if done.stdout.strip() else []
    return [
        f"{package['name']} {package['version']}: {found['id']} {' '.join(found['aliases'])}, mended in "
        f"{', '.join(found['fix_versions']) or 'no release'}"
        for package in packages
        for found in package.get("vulns", [])
        if not {found["id"], *found["aliases"]} & ACCEPTED.keys()
    ]


def main() -> int:
    """Ask, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--where-reachable", action="store_true", help="no error where advisories cannot be had")
    arguments = parser.parse_args()
    if not findings(VULNERABLE):
        print("audit: the advisories cannot be reached from here; nothing was checked")
        return 0 if arguments.where_reachable else 2
    found = findings(CONSTRAINTS.read_text(encoding="utf-8"))
    print("\n".join(found) or f"audit: no known vulnerability in {CONSTRAINTS.name}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
