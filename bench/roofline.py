"""Which resource binds each kernel on an H100 and an A100, worked out without either.

    python bench/roofline.py            prints a Markdown table

This is not a measurement and says nothing about speed. For the shipped launch choices it compares lower
bounds: the time that each resource alone would need,

    dram      bytes that must move / measured copy bandwidth (3.0 and 1.75 TB/s)
    l2        sectors that the programs ask for, by executing their compiled code, * 32 / 5.5 and 4.0 TB/s
    smem      shared-memory wavefronts, executed, / one per clock and multiprocessor
    issue     instructions of the main loop * rounds * warps / four per clock and multiprocessor
    matrix    operations of the matrix units, executed, / the peak of the instruction kind in the code
    latency   bytes asked for / (bytes kept in flight / memory latency, 0.7 and 0.6 us)

The largest binds. "roof" is dram over the largest: 1.0 where memory binds. "fill" is the share of
multiprocessors that get a program at all; where it is far below 1 the rest of the row is moot. The
bandwidths of L2, the latencies and the rate of HMMA on an H100 (0.63 of HGMMA) are literature numbers.
Needs the PTX executor of gpu_lab (NSC_FAST_GPU_LAB, by default ../shared/tools/gpu_lab beside the checkout).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GPU_LAB = Path(os.environ.get("NSC_FAST_GPU_LAB", ROOT / "../shared/tools/gpu_lab")).resolve()
_FOLDERS = (ROOT, ROOT / "tests/kernels/compiled", ROOT / "tests/kernels/ptx", GPU_LAB)
sys.path[:0] = [str(folder) for folder in _FOLDERS if str(folder) not in sys.path]

KERNELS = ("project", "coefficient_grads", "input_gradient", "low_rank_output", "ratio_backward")


@dataclass(frozen=True)
class Gpu:
    target: str
    units: int
    clock: float
    dram: float
    l2: float
    matrix: dict[str, float]
    latency: float


GPUS = {
    "H100": Gpu("sm_90", 132, 1.755e9, 3.0e12, 5.5e12, {"HGMMA": 989e12, "HMMA": 623e12}, 0.7e-6),
    "A100": Gpu("sm_80", 108, 1.41e9, 1.75e12, 4.0e12, {"HMMA": 312e12}, 0.6e-6),
}


@dataclass(frozen=True)
class Bound:
    times: dict[str, float]  # microseconds
    fill: float

    @property
    def binds(self) -> str:
        return max(self.times, key=self.times.get)

    @property
    def roof(self) -> float:
        return self.times["dram"] / max(self.times.values())


def _walks_all_of_d(kernel: str) -> bool:
    return kernel in ("project", "coefficient_grads")


@cache
def _executed(kernel: str, target: str, rank: int, dim: int) -> dict[str, float]:
    """Sectors, wavefronts and matrix operations of one program over ``dim`` features."""
    from ptx_device import PtxDevice
    from shipped import Shipped

    shipped = Shipped(kernel, target, "bfloat16", rank, dim)
    device = PtxDevice(target)
    with device.on():
        shipped.call(tokens=shipped.choice().block_n)[1]()
    counts = device.counts
    return {
        "l2": 32.0 * sum(n for name, n in counts.items() if name.endswith(".sectors")),
        "smem": float(sum(n for name, n in counts.items() if name.endswith(".wavefronts"))),
        "matrix": float(device.flops),
    }


@cache
def _compiled(kernel: str, target: str, rank: int) -> dict:
    from compile_report import compiled_by, report
    from shipped import Shipped

    shipped = Shipped(kernel, target, "bfloat16", rank)
    jitted, call = shipped.call()
    (only,) = compiled_by(target, call, jitted)
    return report(only, shipped.trips())


def bound(kernel: str, gpu_name: str, n: int, d: int, rank: int) -> Bound:
    """Lower bounds for one launch over n tokens and d features, bfloat16."""
    from shipped import Shipped

    gpu = GPUS[gpu_name]
    shipped = Shipped(kernel, gpu.target, "bfloat16", rank, d)
    choice, compiled = shipped.choice(), _compiled(kernel, gpu.target, rank)
    blocks = -(-n // choice.block_n)
    if _walks_all_of_d(kernel):
        short, long = 4 * choice.block_d, 8 * choice.block_d
        one, two = (_executed(kernel, gpu.target, rank, dim) for dim in (short, long))
        rounds, grid = d / choice.block_d, blocks
        work = {k: one[k] + (two[k] - one[k]) * (rounds - 4) / 4 for k in one}
    else:
        span = choice.block_d * choice.tiles
        rounds, grid = choice.tiles, blocks * -(-d // span)
        work = _executed(kernel, gpu.target, rank, span)
    outside = compiled["instructions"] - compiled["loop"]
    instructions = (compiled["loop"] * rounds + outside) * choice.num_warps
    if not compiled["loop"]:
        instructions = compiled["instructions"] * choice.num_warps
    streams = {"low_rank_output": 1, "input_gradient": 2, "ratio_backward": 2}.get(kernel, 1)
    moved = 2 * n * d * streams + 2 * rank * d + 2 * n * rank * (2 if kernel == "coefficient_grads" else 1)

    tile_x, tile_y = choice.block_n * choice.block_d, choice.block_r * choice.parts * choice.block_d
    ahead = max(choice.num_stages - 1, 1)
    wide = tile_x * (1 if choice.prefetch else ahead)
    in_flight = 2 * ((0 if kernel == "low_rank_output" else wide) + tile_y * ahead)
    resident = min(compiled["programs_per_unit"], grid / gpu.units) * gpu.units
    kind = compiled["matrix"][0]
    per_clock = 1 / (gpu.units * gpu.clock)
    times = {
        "dram": moved / gpu.dram,
        "l2": work["l2"] * grid / gpu.l2,
        "smem": work["smem"] * grid * per_clock,
        "issue": instructions * grid * per_clock / 4,
        "matrix": work["matrix"] * grid / gpu.matrix[kind],
    }
    if kernel != "low_rank_output":  # whose stores wait for nobody
        times["latency"] = work["l2"] * grid / (in_flight * resident / gpu.latency)
    return Bound({k: t * 1e6 for k, t in times.items()}, min(1.0, grid / gpu.units))


def main() -> None:
    if not (GPU_LAB / "ptxsim.py").exists():
        raise SystemExit(f"{GPU_LAB} is absent; set NSC_FAST_GPU_LAB to the folder with ptxsim.py")
    print("Which resource binds (bfloat16; lower bounds, not speeds)\n")
    print("| GPU | kernel | d | R | N | binds | roof | fill | second |")
    print("|---|---|---|---|---|---|---|---|---|")
    for gpu in GPUS:
        for kernel in KERNELS:
            for d in (1024, 4096, 8192):
                for rank in (16, 96, 256):
                    if kernel == "ratio_backward" and rank > 128:
                        continue  # two launches: coefficient_grads without G, then input_gradient
                    for n in (1024, 16384):
                        b = bound(kernel, gpu, n, d, rank)
                        order = sorted(b.times, key=b.times.get, reverse=True)
                        second = f"{order[1]} {b.times[order[1]] / b.times[order[0]]:.2f}"
                        row = (gpu, kernel, d, rank, n, b.binds, f"{b.roof:.2f}", f"{b.fill:.2f}", second)
                        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
