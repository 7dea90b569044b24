"""``python -m bench.draw FILE``: a table with all rows, a plot, and the short table in README.md.

Results are made with ``pytest bench/ --size cpu --save-results bench/results/NAME.json``. The table and the
plot (matplotlib) stand beside the file, as Markdown and SVG; the text between the markers in README.md is
replaced.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
TIMES = "time of peer / ours"
TITLES = {
    "ratio_forward": "ratio, forward",
    "ratio_forward_backward": "ratio, forward + backward",
    "ratio_siblings": "ratio of q, k and v together",
    "layer_forward_backward": "merged layer, forward + backward",
    "layer_with_ratio": "target layer with its ratio",
    "step": "one optimisation step",
    "step_recomputed": "one optimisation step that keeps everything",
    "memory_kept": "kept for the backward",
}


def main(file: str) -> int:
    results = Path(file)
    content = json.loads(results.read_text(encoding="utf-8"))
    results.with_suffix(".md").write_text(full_table(content), encoding="utf-8")
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{short_table(content)}{END}{after}", encoding="utf-8")
    plot(content, results.with_suffix(".svg"))
    return 0


def full_table(content: dict) -> str:
    """One line per measurement: how many times as long the others take, with the quartiles."""
    lines = [
        _provenance(content) + " The number is the other's median time over ours, with quartiles.",
        "",
        "| what | shape | compared with | times ours | quartiles |",
        "|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        value = f"{row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f}"
        if row.get("milliseconds") is not None:
            value += f", ours {row['milliseconds']:.3g} ms"
        if row["unit"] != TIMES:
            value = f"{row['ratio']:.4g} {row['unit']} |"
        lines.append(f"| {_title(row)} | {row['case']} | {row['peer']} | {value} |")
    return "\n".join(lines) + "\n"


def short_table(content: dict) -> str:
    """One line per operation and shape with all that it was compared with; times only."""
    lines = [_provenance(content), "", "| what | shape | times of others / ours |", "|---|---|---|"]
    times = [row for row in content["rows"] if row["unit"] == TIMES]
    for (title, case), rows in groupby(times, key=lambda row: (_title(row), row["case"])):
        peers = ", ".join(f"{row['peer']} **{row['ratio']:.2f}**" for row in rows)
        lines.append(f"| {title} | {case.replace(' float32', '').rstrip(',')} | {peers} |")
    return "\n".join(lines) + "\n"


def _title(row: dict) -> str:
    return TITLES.get(row["group"], row["group"].replace("_", " "))


def _provenance(content: dict) -> str:
    p = content["provenance"]
    return (
        f"Measured {p['date']} on {p['device']} ({p['threads']} threads, torch {p['torch']}, "
        f"Python {p['python']}, seed {p['seed']}), each in turns with ours in one run."
    )


def plot(content: dict, target: Path) -> None:
    """Bars of the time ratios, on a logarithmic axis, with the quartiles as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in content["rows"] if r["unit"] == TIMES]
    figure, axis = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.2))
    y = range(len(rows))
    values = [r["ratio"] for r in rows]
    errors = [
        [max(r["ratio"] - r["low"], 0) for r in rows],
        [max(r["high"] - r["ratio"], 0) for r in rows],
    ]
    axis.barh(y, values, xerr=errors, color="#4878a8", ecolor="#333333", height=0.7)
    labels = [f"{_title(r)}: {r['peer']}\n{r['case']}" for r in rows]
    axis.set_yticks(y, labels, fontsize=6)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xlabel("time of the other / ours (right of 1: ours is faster)")
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
