"""``python -m tests``: the whole test suite.

Interpreting kernels and compiling them exclude each other within a process (Triton reads TRITON_INTERPRET
when it is first imported), so the suite runs as two: the interpreted kernels, and everything else with the
smoke benchmarks.
"""

import os
import subprocess
import sys

RUNS = (
    ("interpreted kernels", ["tests/kernels/interp"], {"TRITON_INTERPRET": "1"}),
    ("everything else", ["tests", "bench", "--ignore=tests/kernels/interp", "--benchmark-disable"], {}),
)


def main() -> int:
    failed = []
    for name, arguments, variables in RUNS:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", *arguments, *sys.argv[1:]]
        if subprocess.run(command, env={**os.environ, **variables}, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
