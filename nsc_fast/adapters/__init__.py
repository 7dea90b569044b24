"""PEFT adapters in (folders, live models) and out (a folder), as plain data in between."""

from nsc_fast.adapters.check import (
    check_against_model,
    common_base,
    common_task_type,
    folder_shapes,
    module_shapes,
)
from nsc_fast.adapters.dense import dense_updates
from nsc_fast.adapters.live import from_peft_model
from nsc_fast.adapters.model import Adapter, AdapterError, LoraFactors, Problem
from nsc_fast.adapters.read import Inspection, inspect_adapter, read_adapter
from nsc_fast.adapters.vera import fit_to_model
from nsc_fast.adapters.write import WriteReport, write_lora

__all__ = [
    "Adapter",
    "AdapterError",
    "Inspection",
    "LoraFactors",
    "Problem",
    "WriteReport",
    "check_against_model",
    "common_base",
    "common_task_type",
    "dense_updates",
    "fit_to_model",
    "folder_shapes",
    "from_peft_model",
    "inspect_adapter",
    "module_shapes",
    "read_adapter",
    "write_lora",
]
