"""nsc_fast: several LoRA adapters in, one merged LoRA out, by null-space compression."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it. Loaded on first use, so that `import nsc_fast` stays fast and
# pulls in neither triton nor transformers nor peft.
_HOME = {
    "Adapter": "adapters",
    "AdapterError": "adapters",
    "LowRankUpdate": "factors",
    "MergedLinear": "layers",
    "MergeResult": "result",
    "NSCLoss": "loss",
    "Recipe": "recipe",
    "install": "layers",
    "merge_adapters": "merge",
    "null_space_ratio": "ops",
    "read_adapter": "adapters",
    "remove": "layers",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
