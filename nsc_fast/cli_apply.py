"""``nsc-fast apply``: the full model from a LoRA and its base."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .cli_tables import console, print_checks, progress

if TYPE_CHECKING:
    from .apply import FullModelReport

__all__ = ["add_apply", "tell_full"]

# From this share of the update lost, the user is told what to do about it.
_WORTH_A_WORD = 0.05


def add_apply(app: typer.Typer, errors: Callable[[], AbstractContextManager[None]], unverified: int) -> None:
    """Adds the command.

    Args:
        app: the program.
        errors: turns errors into messages and exit codes.
        unverified: exit code of a failed check.
    """

    @app.command("apply")
    def apply_command(
        lora: Annotated[str, typer.Argument(help="LoRA: a folder that merge wrote, or any other")],
        out: Annotated[Path, typer.Option("--out", help="folder of the full model")],
        base_model: Annotated[
            str | None, typer.Option(help="base model, not quantised; default: the adapter's")
        ] = None,
        revision: Annotated[str | None, typer.Option(help="of a base model on the hub")] = None,
        dtype: Annotated[
            Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as in the base")
        ] = "auto",
        shard_size: Annotated[
            str, typer.Option("--shard-size", "--out-shard-size", help="largest weight file, 5GB or 4GiB")
        ] = "5GB",
        trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output folder")] = False,
        verify: Annotated[
            bool, typer.Option("--verify", help="load the result and compare it with PEFT's merge")
        ] = False,
    ) -> None:
        """Writes the base model with a LoRA in its weights, file by file, without loading it."""
        with errors():
            import torch

            from .adapters import common_base, read_adapter
            from .apply import apply_lora
            from .recipe import BaseSpec
            from .verify import verify_full_model

            if base_model is None:
                base_model = common_base([read_adapter(lora, modules_to_save="keep-separate")])
            base = BaseSpec(path=base_model, revision=revision, trust_remote_code=trust_remote_code)
            target = None if dtype == "auto" else getattr(torch, dtype)
            with progress(0) as (on_stage, _):
                report = apply_lora(
                    lora,
                    out,
                    base=base,
                    dtype=target,
                    shard_size=shard_size,
                    overwrite=overwrite,
                    on_stage=on_stage,
                )
            tell_full(report)
            if verify:
                check = verify_full_model(out, lora, base)
                if not print_checks([check]):
                    raise typer.Exit(unverified)


def tell_full(report: FullModelReport) -> None:
    """What was written, and what rounding took away."""
    from .memory import readable_bytes

    for notice in report.notices:
        console.print(f"note: {notice}", markup=False, highlight=False)
    console.print(
        f"wrote {report.path}: {len(report.rounding)} modules updated, {len(report.replaced)} tensors "
        f"replaced, {readable_bytes(report.size)} in {len(report.files)} files",
        highlight=False,
    )
    module, worst = max(report.rounding.items(), key=lambda item: item[1])
    console.print(
        f"rounding of the stored weights: the update in them is off by {report.total_rounding:.2%} "
        f"({report.total_rounding**2:.2%} of its energy), at worst {worst:.2%} in {module}",
        highlight=False,
    )
    if report.total_rounding > _WORTH_A_WORD:
        console.print(
            "note: the update is small beside the weights. Serve the LoRA beside the base, or write float32 "
            "weights, to keep all of it",
            highlight=False,
        )
