"""Compiles the kernels through their own launchers for devices that are not there, and reads the result.

``compiled_by(target, call)`` runs a launcher on CPU tensors under a stand-in driver: Triton's own
specialisation decides what the kernel is compiled for, and the launch itself does nothing. ``report(kernel)``
says what came out: registers, spills, shared memory, programs per multiprocessor, matrix instructions, widths
of the accesses to global memory, and two layout lints. Needs the triton wheel only, which holds every tool.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}

# Per multiprocessor: shared bytes, shared bytes of one program, warps, programs. 65536 registers on all.
_NVIDIA = {
    80: (164 << 10, 163 << 10, 64, 32),
    90: (228 << 10, 227 << 10, 64, 32),
    100: (228 << 10, 227 << 10, 64, 32),
    120: (100 << 10, 99 << 10, 48, 24),
}
# Per compute unit: LDS bytes; 4 SIMDs with 512 vector registers a lane and at most 8 waves each.
_AMD = {"gfx942": 64 << 10, "gfx950": 160 << 10}


class _Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name, binary, shared, device):
        return None, None, 0, 0, 1 << 20

    def unload_module(self, module):
        pass


class StandInDriver:
    """As much of a driver as a launch asks for. Each target is a device of its own, so that Triton keeps
    their compiled kernels apart."""

    utils = _Utils()

    def __init__(self, target: str, on_launch=None):
        self.target = target
        self.on_launch = on_launch

    def get_current_target(self):
        return TARGETS[self.target]

    def get_current_device(self):
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device=None):
        return 0

    def launcher_cls(self, source, metadata):
        def launch(*args):
            if self.on_launch is not None:
                self.on_launch(source, metadata, args)

        return launch

    @staticmethod
    def is_active():
        return True


def compiled_by(target: str, call, kernel, on_launch=None) -> list:
    """The specialisations of ``kernel`` that ``call()`` compiles for ``target``."""
    stand_in = StandInDriver(target, on_launch)
    device = stand_in.get_current_device()
    kernel.device_caches.pop(device, None)
    before = driver._active
    driver.set_active(stand_in)
    try:
        call()
    finally:
        driver._active = before
    return list(kernel.device_caches[device][0].values())


def report(kernel, trips: int) -> dict:
    """What a compiled kernel is made of. ``trips``: rounds of its main loop, to weigh the accesses in it."""
    target = kernel.metadata.target
    if target.backend == "cuda":
        return _nvidia(kernel, target.arch, trips)
    return _amd(kernel, target.arch, trips)


def _wide(loop: Counter, rest: Counter, trips: int, patterns: tuple, widths: dict[str, int]) -> float:
    """Share of the bytes to and from global memory that move in wide accesses. (Counting the accesses
    instead would let a handful of per-token scalars outweigh the matrices.) ``patterns``: loads and stores,
    each with the bytes that count as wide."""
    moved = Counter()
    for ops, times in ((loop, trips), (rest, 1)):
        for op, n in ops.items():
            for pattern, wide in patterns:
                if pattern.match(op):
                    width = next((w for mark, w in widths.items() if mark in op), 4)
                    moved[width >= wide] += n * times * width
    return round(moved[True] / max(sum(moved.values()), 1), 3)


# ------------------------------------------------------------------------------------------------ NVIDIA

_MATRIX = re.compile(r"^(HGMMA|QGMMA|HMMA|QMMA|UTC\w*MMA)")
_GLOBAL = ((re.compile(r"^(LDGSTS|LDG|STG)\b"), 16),)
_WIDTHS = {"128": 16, ".64": 8, "U16": 2, "U8": 1}


def _ptxas(ptx: str, arch: int) -> str:
    tool = knobs.nvidia.ptxas if arch < 90 else knobs.nvidia.ptxas_blackwell
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        run = subprocess.run(
            [tool.path, "-v", name, str(source), "-o", str(Path(folder) / "kernel.cubin")],
            capture_output=True,
            text=True,
        )
    return run.stdout + run.stderr


def _sass(cubin: bytes) -> list[tuple[int, str, str]]:
    """(address, opcode, operands) of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
    return [(int(m[1], 16), m[2], m[3]) for m in line.finditer(text)]


def _main_loop(sass: list[tuple[int, str, str]]) -> tuple[int, int] | None:
    """Addresses of the shortest loop that holds matrix instructions; if none does, of the longest."""
    loops = []
    for address, op, operands in sass:
        to = re.search(r"0x([0-9a-f]+)", operands)
        if op.split(".")[0] in ("BRA", "UBRA") and to and int(to[1], 16) < address:
            loops.append((int(to[1], 16), address))
    with_matrix = [(a, b) for a, b in loops if any(a <= x <= b and _MATRIX.match(op) for x, op, _ in sass)]
    if with_matrix:
        return min(with_matrix, key=lambda ab: ab[1] - ab[0])
    return max(loops, key=lambda ab: ab[1] - ab[0], default=None)


def _nvidia(kernel, arch: int, trips: int) -> dict:
    log = _ptxas(kernel.asm["ptx"], arch)
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    sass = _sass(kernel.asm["cubin"])
    span = _main_loop(sass) or (1, 0)
    loop = Counter(op for address, op, _ in sass if span[0] <= address <= span[1])
    rest = Counter(op for address, op, _ in sass if not span[0] <= address <= span[1])
    shared_sm, shared_one, warps_sm, programs_sm = _NVIDIA[arch]
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    per_quarter = 16384 // (math.ceil(registers / 8) * 8 * 32)
    programs = min(4 * per_quarter // warps, shared_sm // (shared + 1024), warps_sm // warps, programs_sm)
    return {
        "registers": registers,
        "spills": int(spills[1]) + int(spills[2]),
        "loop_spills": sum(n for op, n in loop.items() if op.startswith(("LDL", "STL"))),
        "shared": shared,
        "programs_per_unit": programs if shared <= shared_one else 0,
        "matrix": sorted({op.split(".")[0] for op in loop + rest if _MATRIX.match(op)}),
        "wide": _wide(loop, rest, trips, _GLOBAL, _WIDTHS),
        "loop": sum(loop.values()),
        "instructions": sum((loop + rest).values()),
        "atomics": sum(n for op, n in (loop + rest).items() if re.match(r"(RED|ATOMG?)\b", op)),
        "serialized": sorted(set(re.findall(r"C751[01]", log))),
        "lints": layout_lints(kernel.asm["ttgir"]),
    }


# --------------------------------------------------------------------------------------------------- AMD

_AMD_GLOBAL = (re.compile(r"^(buffer|global)_load"), 16), (re.compile(r"^(buffer|global)_store"), 16)
# On gfx942 Triton stores 16-bit matrix fragments as they are, four numbers at a time.
_GFX942_GLOBAL = _AMD_GLOBAL[0], (_AMD_GLOBAL[1][0], 8)
_AMD_WIDTHS = {"x4": 16, "b128": 16, "x3": 12, "x2": 8, "b64": 8, "short": 2, "b16": 2, "byte": 1}


def _amd(kernel, arch: str, trips: int) -> dict:
    text = kernel.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"^(\.?\w+):", line))}
    loops = []
    for i, line in enumerate(lines):
        branch = re.match(r"\s+s_c?branch\w*\s+(\.?\w+)", line)
        if branch and labels.get(branch[1], i) < i:
            loops.append((labels[branch[1]], i))
    ops = [m[1] if (m := re.match(r"\s+([a-z]\w+)", line)) else "" for line in lines]
    with_matrix = [ab for ab in loops if any(o.startswith("v_mfma") for o in ops[ab[0] : ab[1]])]
    if with_matrix:
        span = min(with_matrix, key=lambda ab: ab[1] - ab[0])
    else:
        span = max(loops, key=lambda ab: ab[1] - ab[0], default=(1, 0))
    loop = Counter(o for i, o in enumerate(ops) if o and span[0] <= i <= span[1])
    rest = Counter(o for i, o in enumerate(ops) if o and not span[0] <= i <= span[1])
    registers = number("vgpr_count")
    shared = kernel.metadata.shared
    waves = min(8, 512 // max(8, math.ceil(registers / 8) * 8))
    return {
        "registers": registers,
        "spills": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "loop_spills": sum(n for op, n in loop.items() if op.startswith("scratch_")),
        "shared": shared,
        "programs_per_unit": min(4 * waves // kernel.metadata.num_warps, _AMD[arch] // max(shared, 1)),
        "matrix": sorted({op.split("_")[1] for op in loop + rest if op.startswith("v_mfma")}),
        "wide": _wide(loop, rest, trips, _GFX942_GLOBAL if arch == "gfx942" else _AMD_GLOBAL, _AMD_WIDTHS),
        "loop": sum(loop.values()),
        "instructions": sum((loop + rest).values()),
        "atomics": sum(n for op, n in (loop + rest).items() if "_atomic" in op),
        "serialized": [],
        "lints": [],
    }


# -------------------------------------------------------------------------------------------------- lints


def layout_lints(ttgir: str) -> list[str]:
    """Two faults that no error message names.

    Buffer counts: the shared-memory operands of asynchronous matrix instructions in one kernel must be
    multi-buffered equally often. If one has fewer buffers than another, it is refilled while a pending
    instruction may still read it.
    Swizzle: a shared tile of 16-bit numbers that is loaded into matrix fragments must be swizzled;
    maxPhase = 1 means eight-way bank conflicts.
    """
    found = []
    depth = {}
    source = {}
    for line in ttgir.splitlines():
        alloc = re.search(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<((?:\d+x)+)", line)
        if alloc:
            sizes = alloc[2].rstrip("x").split("x")
            depth[alloc[1]] = int(sizes[0]) if len(sizes) >= 3 else 1
        view = re.search(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", line)
        if view:
            source[view[1]] = view[2]
    counts = {}
    for line in ttgir.splitlines():
        dot = re.search(r"ttng\.warp_group_dot (%\w+), (%\w+),.*isAsync = true", line)
        for operand in dot.groups() if dot else ():
            while operand in source:
                operand = source[operand]
            if depth.get(operand, 1) > 1:
                counts[operand] = depth[operand]
    if len(set(counts.values())) > 1:
        found.append(f"operands of asynchronous products are buffered unequally: {counts}")

    flat = set(re.findall(r"(#\w+) = #ttg\.swizzled_shared<\{[^}]*maxPhase = 1,", ttgir))
    matrix = set(re.findall(r"(#\w+) = #ttg\.nvidia_mma", ttgir))
    pattern = r"ttg\.local_load .*memdesc<[\dx]+x(?:b?f16), (#\w+),.*dot_op<\{opIdx = \d, parent = (#\w+)"
    for shared, parent in re.findall(pattern, ttgir):
        if shared in flat and parent in matrix:
            found.append(f"{shared} is not swizzled and feeds matrix fragments")
    return sorted(set(found))


VERSION = ".".join(triton.__version__.split(".")[:2])
TABLE = Path(__file__).with_name("table.json")
