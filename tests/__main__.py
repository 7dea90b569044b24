"""``python -m tests``: the whole test suite, in processes of its own where it must be.

Interpreting kernels and compiling them exclude each other within a process (Triton reads TRITON_INTERPRET
when it is first imported), and compiling for an absent GPU replaces Triton's driver, so each has a run to
itself, as has the device that stands in for a GPU. The benchmarks run in their smallest size, as a test of
their mechanics.
"""

import os
import subprocess
import sys

TWO = ["-n", "2"]
RUNS = (
    ("kernels, interpreted", ["tests/kernels/interp", *TWO], {"TRITON_INTERPRET": "1"}),
    ("kernels, compiled", ["tests/kernels/compiled", "tests/kernels/ptx", *TWO], {}),
    ("another device", ["tests/device", *TWO], {"TRITON_INTERPRET": "1"}),
    ("everything else", ["tests", "--ignore=tests/kernels", "--ignore=tests/device", *TWO], {}),
    ("benchmarks, smoke", ["bench", "--benchmark-disable"], {}),
)


def main() -> int:
    failed = []
    for name, arguments, variables in RUNS:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", *arguments, *sys.argv[1:]]
        code = subprocess.run(command, env={**os.environ, **variables}, check=False).returncode
        # 5: nothing to run, as for the kernels on a machine without triton; the reason is printed.
        if code not in (0, 5):
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
