"""Writes table.json: what every shipped launch choice compiles to, all gates passed. Takes several minutes.

python tests/kernels/compiled/write_table.py              every row
python tests/kernels/compiled/write_table.py sm_90 tf32   rows whose names hold all of these; others stay
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[3]), str(Path(__file__).resolve().parent)]

from compile_report import TABLE, VERSION  # noqa: E402
from gates import check_aligned, compiled  # noqa: E402
from shipped import every  # noqa: E402

KEPT = ("registers", "shared", "programs_per_unit", "matrix", "wide", "loop")


def main(parts: list[str]) -> None:
    before = json.loads(TABLE.read_text()) if parts else {"rows": {}}
    if parts and before["triton"] != VERSION:
        raise SystemExit(f"the table was written with Triton {before['triton']}: write all of it anew")
    rows = {}
    for shipped in every():
        if not all(part in str(shipped) for part in parts):
            if str(shipped) in before["rows"]:
                rows[str(shipped)] = before["rows"][str(shipped)]
            continue
        found = compiled(shipped)
        check_aligned(shipped, found)
        rows[str(shipped)] = {"choice": shipped.choice_text()} | {key: found[key] for key in KEPT}
    text = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    TABLE.write_text(f'{{"triton": "{VERSION}", "rows": {{\n{text}\n}}}}\n')
    print(f"{len(rows)} rows in {TABLE.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
