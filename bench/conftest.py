"""Options, timing and the closing table of ``pytest bench/``.

Speeds are ratios of things timed alternately in one run: on a shared machine nothing else can be trusted.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from nsc_fast.result import environment

RESULTS = pytest.StashKey[list["Row"]]()
SEED = 0
_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Row:
    """One comparison: ``ratio`` is the peer's median time over ours, ``low`` and ``high`` its quartiles.

    ``milliseconds``: our median, of an accelerator; a CPU is shared, its times mean nothing by themselves.
    """

    group: str
    case: str
    peer: str
    ratio: float
    low: float
    high: float
    goal: str
    rounds: int
    unit: str = "time of peer / ours"
    milliseconds: float | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nsc_fast")
    group.addoption(
        "--size", default="smoke", choices=("smoke", "cpu", "full"), help="shapes: seconds, minutes, a GPU"
    )
    group.addoption("--bench-device", default="auto", help="cpu, cuda, ...; auto takes the accelerator")
    group.addoption("--save-results", default=None, metavar="FILE", help="write the rows with provenance")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``name`` runs once for every shape that its module has for the chosen size."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", list(metafunc.module.SHAPES[metafunc.config.getoption("--size")]))


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--size")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return _chosen(request.config)


def _chosen(config: pytest.Config) -> torch.device:
    name = config.getoption("--bench-device")
    if name == "auto":
        name = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return torch.device(name)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(SEED)


@pytest.fixture
def rounds(size: str) -> int:
    return {"smoke": 3, "cpu": 15, "full": 50}[size]


Compare = Callable[..., dict[str, float]]


@pytest.fixture
def compare(benchmark, request, device, rounds, size) -> Compare:
    """``compare(ours, peers, case=, goals=)``: times ours and each peer in turns, records peer/ours."""

    def run(
        ours: Callable[[], object],
        peers: Mapping[str, Callable[[], object]],
        *,
        case: str,
        goals: Mapping[str, str] | None = None,
    ) -> dict[str, float]:
        group = request.node.originalname.removeprefix("test_")
        order = random.Random(SEED)
        ratios = {}
        for peer, call in peers.items():
            # Two at a time: what a third leaves behind (memory to be mapped anew) would slow both.
            pair = {"ours": ours, peer: call}
            samples = {name: [] for name in pair}
            for name in pair:
                _timed(pair[name], device)
            for _ in range(rounds):
                for name in order.sample(list(pair), 2):
                    samples[name].append(_timed(pair[name], device))
            each = [p / o for p, o in zip(samples[peer], samples["ours"], strict=True)]
            low, _, high = statistics.quantiles(each, n=4)
            own = statistics.median(samples["ours"])
            ratios[peer] = statistics.median(samples[peer]) / own
            goal = (goals or {}).get(peer, "") if size == "cpu" else ""
            measured = None if device.type == "cpu" else 1e3 * own
            row = Row(group, case, peer, ratios[peer], low, high, goal, rounds, milliseconds=measured)
            request.config.stash[RESULTS].append(row)
        benchmark.group = group
        benchmark.extra_info.update(case=case, **{f"{p} / ours": round(r, 3) for p, r in ratios.items()})
        benchmark.pedantic(_finished, (ours, device), rounds=max(rounds // 3, 1), warmup_rounds=0)
        return ratios

    return run


@pytest.fixture
def record(request: pytest.FixtureRequest, size: str) -> Callable[..., None]:
    """Records a number that is not a time, bytes for example."""

    def run(case: str, peer: str, value: float, unit: str, goal: str = "") -> None:
        group = request.node.originalname.removeprefix("test_")
        goal = goal if size == "cpu" else ""
        row = Row(group, case, peer, value, value, value, goal, 1, unit)
        request.config.stash[RESULTS].append(row)

    return run


def _finished(call: Callable[[], object], device: torch.device) -> None:
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    # Every call starts with a cold cache, as in a model, where other layers have run in between.
    torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=device).zero_()
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[RESULTS]
    if not rows:
        return
    terminalreporter.section("nsc_fast: comparisons in this run")
    terminalreporter.write_line(table(rows))
    target = config.getoption("--save-results")
    if target is not None:
        content = {
            "provenance": provenance(config.getoption("--size"), _chosen(config)),
            "rows": [asdict(r) for r in rows],
        }
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(path.suffix + ".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
        terminalreporter.write_line(f"written to {target}")


def table(rows: list[Row]) -> str:
    lines = [
        "| group | case | compared with | value | quartiles | what | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.group} | {r.case} | {r.peer} | {r.ratio:.2f} | {r.low:.2f} to {r.high:.2f} "
        f"| {r.unit} | {r.goal} |"
        for r in rows
    ]
    return "\n".join(lines)


def provenance(size: str, device: torch.device) -> dict[str, object]:
    return {
        **environment(),
        "size": size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "seed": SEED,
        "date": time.strftime("%Y-%m-%d"),
    }
