"""Writes table.json: what every shipped launch choice compiles to. Takes a few minutes.

python tests/kernels/compiled/write_table.py
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[3]), str(Path(__file__).resolve().parent)]

from compile_report import TABLE, VERSION, compiled_by, report  # noqa: E402
from shipped import every  # noqa: E402

KEPT = ("registers", "shared", "programs_per_unit", "matrix", "wide", "loop")


def main() -> None:
    rows = {}
    for shipped in every():
        kernel, call = shipped.call()
        (only,) = compiled_by(shipped.target, call, kernel)
        found = report(only, shipped.trips())
        rows[str(shipped)] = {"choice": shipped.choice_text()} | {key: found[key] for key in KEPT}
    text = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    TABLE.write_text(f'{{"triton": "{VERSION}", "rows": {{\n{text}\n}}}}\n')
    print(f"{len(rows)} rows in {TABLE.name}")


if __name__ == "__main__":
    main()
