"""What every shipped launch choice must compile to."""

import re

from compile_report import compiled_by, report
from shipped import Shipped

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}


def compiled(shipped: Shipped) -> dict:
    """The report, and whether any instruction multiplies in tf32."""
    kernel, call = shipped.call()
    (only,) = compiled_by(shipped.target, call, kernel)
    found = report(only, shipped.trips())
    return found | {"tf32": bool(re.search(r"\.tf32\b|kind::tf32", only.asm.get("ptx", "")))}


def check_always(shipped: Shipped, found: dict) -> None:
    assert found["serialized"] == [], "ptxas serialised the asynchronous matrix instructions"
    assert found["lints"] == []
    assert found["atomics"] == 0
    assert found["programs_per_unit"] >= 1
    if shipped.target == "gfx942":
        assert found["shared"] <= 64 << 10
    assert found["tf32"] == (shipped.dtype == "tf32")
    if shipped.kernel.startswith("reduce"):
        return
    if shipped.dtype != "float32":
        kind = "mfma" if shipped.target.startswith("gfx") else MATRIX[shipped.target]
        # The asynchronous instructions take 64 rows.
        few_rows = shipped.choice().block_n < 64
        assert found["matrix"] == ["HMMA" if few_rows and kind != "mfma" else kind]
    elif shipped.target.startswith("sm_"):
        assert found["matrix"] == [], "float32 that nobody asked to round meets the matrix units"


def check_aligned(shipped: Shipped, found: dict, spill_limit: int = 0) -> None:
    """The gates of the sizes that the choices are made for. ``spill_limit``: bytes of stores and loads."""
    check_always(shipped, found)
    assert found["spills"] <= spill_limit, f"{shipped} spills {found['spills']} bytes"
    if shipped.half or shipped.target.startswith("sm_"):
        assert found["wide"] >= 0.9, "less than 90 % of the bytes move in 16-byte accesses"
    if shipped.dtype != "float32" and shipped.rank <= 128:
        assert found["programs_per_unit"] >= 2, "too few programs per multiprocessor to hide memory latency"
