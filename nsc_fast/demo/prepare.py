"""Makes the bundled rows in ``data/`` from a folder of the full data files.

    python -m nsc_fast.demo.prepare --data FOLDER

FOLDER holds ``STEM.train.jsonl.gz`` and ``STEM.test.jsonl.gz`` for the stems named in ``tasks.py``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

from nsc_fast.demo.tasks import DATA, TASKS, Row, Task, read_rows

UNLABELED = 256
TEST = 300
SEED = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the full data files")
    parser.add_argument("--out", type=Path, default=DATA, help="default: the package's own data/")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        unlabeled, test = select(
            task,
            read_rows(options.data / f"{task.stem}.train.jsonl.gz"),
            read_rows(options.data / f"{task.stem}.test.jsonl.gz"),
        )
        for split, rows in (("unlabeled", unlabeled), ("test", test)):
            path = options.out / f"{task.name}.{split}.jsonl.gz"
            write_rows(path, rows)
            print(f"{path.name}: {len(rows)} rows, {path.stat().st_size} bytes")


def select(task: Task, train: Sequence[Row], test: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Unlabeled rows (inputs only, from ``train``) and labeled test rows, drawn with a fixed seed.

    A test row whose input also occurs in ``train`` is left out.
    """
    draw = random.Random(f"{SEED}/{task.name}")

    def key(row: Row) -> str:
        return json.dumps([row[field] for field in task.inputs]).lower()

    seen = {key(row) for row in train}
    fresh = [row for row in test if key(row) not in seen]
    inputs = [{field: row[field] for field in task.inputs} for row in draw.sample(train, UNLABELED)]
    fields = (*task.inputs, *task.targets)
    labeled = [{field: row[field] for field in fields} for row in draw.sample(fresh, TEST)]
    return inputs, labeled


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Gzipped JSON lines; the same rows give the same bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
