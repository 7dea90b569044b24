"""``python -m bench.draw FILE...``: the tables in README.md and a plot, from saved results.

Results are made with ``pytest bench/ --size cpu --save-results bench/results/NAME.json``. The text between
the markers in README.md is replaced; the plot (matplotlib) stands beside the first file, as SVG.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
TITLES = {
    "ratio_forward": "ratio, forward",
    "ratio_forward_backward": "ratio, forward + backward",
    "ratio_siblings": "ratio of q, k and v together",
    "layer_forward_backward": "merged layer, forward + backward",
    "layer_with_ratio": "target layer with its ratio",
    "step": "one optimisation step",
    "memory_kept": "kept for the backward",
}


def main(files: list[str]) -> int:
    contents = [json.loads(Path(name).read_text(encoding="utf-8")) for name in files]
    text = "\n".join(markdown(content) for content in contents)
    readme = README.read_text(encoding="utf-8")
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")
    plot(contents[0], Path(files[0]).with_suffix(".svg"))
    return 0


def markdown(content: dict) -> str:
    """One table: how many times as long the others take, with the quartiles."""
    p = content["provenance"]
    lines = [
        f"Measured {p['date']} on {p['device']} ({p['threads']} threads, torch {p['torch']}, "
        f"Python {p['python']}, seed {p['seed']}), everything in a row timed alternately in one run; "
        "the number is the other's median time over ours, with quartiles.",
        "",
        "| what | shape | compared with | times ours | quartiles |",
        "|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        title = TITLES.get(row["group"], row["group"].replace("_", " "))
        if row["unit"] == "time of peer / ours":
            value = f"{row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f}"
        else:
            value = f"{row['ratio']:.4g} {row['unit']} |"
        lines.append(f"| {title} | {row['case']} | {row['peer']} | {value} |")
    return "\n".join(lines) + "\n"


def plot(content: dict, target: Path) -> None:
    """Bars of the time ratios, on a logarithmic axis, with the quartiles as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in content["rows"] if r["unit"] == "time of peer / ours"]
    figure, axis = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.2))
    y = range(len(rows))
    values = [r["ratio"] for r in rows]
    errors = [
        [max(r["ratio"] - r["low"], 0) for r in rows],
        [max(r["high"] - r["ratio"], 0) for r in rows],
    ]
    axis.barh(y, values, xerr=errors, color="#4878a8", ecolor="#333333", height=0.7)
    labels = [f"{TITLES.get(r['group'], r['group'])}: {r['peer']}\n{r['case']}" for r in rows]
    axis.set_yticks(y, labels, fontsize=6)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xlabel("time of the other / ours (right of 1: ours is faster)")
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
