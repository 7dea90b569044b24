"""``nsc-fast merge``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .cli_run import INTERRUPTED, check_impl, check_out, checkpoints_of, device_of, tell_resume, together
from .cli_tables import console, print_checks, progress, ratio_table
from .errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from .adapters import Adapter
    from .recipe import BaseSpec, Recipe
    from .result import MergeResult
    from .verify import Check

__all__ = ["add_merge"]


def add_merge(app: typer.Typer, errors: Callable[[], AbstractContextManager[None]], unverified: int) -> None:
    """Adds the command.

    Args:
        app: the program.
        errors: turns errors into messages and exit codes.
        unverified: exit code of a failed check.
    """

    @app.command()
    def merge(
        recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; or use the flags")] = None,
        out: Annotated[Path | None, typer.Argument(help="output folder; must not exist")] = None,
        base_model: Annotated[str | None, typer.Option(help="hub id or folder of the base model")] = None,
        load_in_4bit: Annotated[
            bool, typer.Option("--load-in-4bit", help="quantise the base while it is loaded")
        ] = False,
        load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="the same, to 8 bits")] = False,
        device_map: Annotated[
            str | None, typer.Option(help="of the base: auto, balanced, ..., a device, or {module: device}")
        ] = None,
        shard_base: Annotated[
            bool,
            typer.Option("--shard-base", help="divide the base among the processes of a launcher (FSDP2)"),
        ] = False,
        trust_remote_code: Annotated[
            bool, typer.Option("--trust-remote-code", help="run code that comes with the base model")
        ] = False,
        adapter: Annotated[
            list[str] | None, typer.Option(help="NAME=PATH or PATH of an adapter; repeat", show_default=False)
        ] = None,
        data: Annotated[
            list[str] | None, typer.Option(help="NAME=PATH of unlabeled data; repeat", show_default=False)
        ] = None,
        text: Annotated[str | None, typer.Option(help="text column, or two separated by a comma")] = None,
        out_option: Annotated[Path | None, typer.Option("--out", help="output folder")] = None,
        method: Annotated[str | None, typer.Option(help="merge method")] = None,
        set_: Annotated[
            list[str] | None, typer.Option("--set", help="KEY=VALUE of the method's parameters; repeat")
        ] = None,
        modules_to_save: Annotated[
            Literal["error", "drop", "keep-separate", "merge-dense"] | None,
            typer.Option(help="what to do about modules that an adapter trained whole"),
        ] = None,
        max_rank: Annotated[int | None, typer.Option(help="truncate the merged LoRA to this rank")] = None,
        out_kind: Annotated[
            Literal["lora", "full"] | None,
            typer.Option("--out-kind", "--output-kind", help="full: the base with the merge in its weights"),
        ] = None,
        out_dtype: Annotated[
            str | None, typer.Option(help="float32, bfloat16 or float16; of a full model also auto")
        ] = None,
        out_shard_size: Annotated[
            str | None, typer.Option(help="largest weight file of a full model, 5GB or 4GiB")
        ] = None,
        seed: Annotated[int | None, typer.Option("--seed", "--random-seed")] = None,
        device: Annotated[str, typer.Option(help="cpu, cuda, xpu, mps, or auto")] = "auto",
        impl: Annotated[str, typer.Option(help="auto, triton or torch")] = "auto",
        overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output folder")] = False,
        verify: Annotated[bool, typer.Option("--verify/--no-verify", help="check the output")] = True,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="only check the inputs")] = False,
        max_memory: Annotated[
            str | None,
            typer.Option(help="budget of the device, 24GB say: choose checkpointing and micro-batches"),
        ] = None,
        resume: Annotated[
            bool, typer.Option("--resume/--no-resume", help="go on from the last checkpoint, if there is one")
        ] = False,
        checkpoint_every: Annotated[int, typer.Option(help="steps between checkpoints; 0 for none")] = 25,
        checkpoints: Annotated[
            Path | None, typer.Option(help="their folder; default OUT.partial, deleted when OUT is written")
        ] = None,
    ) -> None:
        """Merges adapters into one LoRA, or a full model: ``merge RECIPE OUT``, or with flags instead."""
        from .checks import check_processes
        from .cli_recipe import recipe_of
        from .merge import check_inputs, run_recipe

        with errors(), together() as processes:
            if adapter and recipe is not None and out is None and out_option is None:
                recipe, out = None, recipe
            out = out or out_option
            loaded = recipe_of(
                recipe,
                adapter,
                data,
                text,
                method=method,
                settings=set_,
                seed=seed,
                modules_to_save=modules_to_save,
                base={
                    "path": base_model,
                    "load_in_4bit": load_in_4bit,
                    "load_in_8bit": load_in_8bit,
                    "device_map": device_map,
                    "shard": shard_base,
                    "trust_remote_code": trust_remote_code,
                },
                output={
                    "kind": out_kind,
                    "max_rank": max_rank,
                    "dtype": out_dtype,
                    "shard_size": out_shard_size,
                },
            )
            sharded = loaded.base_model is not None and loaded.base_model.shard
            if processes is not None and sharded:
                # The others may wait for a part of a weight: not for an error.
                processes.tells = False
            if out is None and not dry_run:
                raise RecipeError("no output folder: give OUT or --out")
            first = processes is None or processes.rank == 0
            kept = None
            if not dry_run:
                kept = checkpoints_of(out, checkpoint_every, checkpoints, resume, overwrite, first)
            if first and out is not None:
                overwrite = check_out(out, loaded.output.kind, overwrite, kept, recipe=loaded)
            own = device_of(device, there=not dry_run)
            check_impl(impl, own)
            _check_place(loaded.base_model, device, max_memory)
            if not dry_run and loaded.base_model is not None:
                check_processes(loaded.base_model, processes)
            if max_memory is not None:
                from .cli_plan import planned

                loaded = planned(loaded, max_memory, own)
            full = loaded.output.kind == "full"
            if dry_run or (first and full):
                adapters, base = check_inputs(loaded)
                # Also what only the files of the base tell, before anything long; not fetched to look.
                if full and (not dry_run or Path(base.path).expanduser().is_dir()):
                    _check_full(loaded, base, adapters, out or Path.cwd() / "full", overwrite)
            if dry_run:
                console.print("ok: recipe, adapters and data can be read")
                return
            steps = int(loaded.method_parameters().model_dump().get("steps", 0))
            with progress(steps) as (on_stage, on_step):
                result, model = run_recipe(
                    loaded,
                    device=own if processes is None else processes.device(own),
                    impl=impl,
                    checkpoints=kept,
                    processes=processes,
                    on_stage=on_stage,
                    on_step=on_step,
                )
            if first:
                lora = _write(loaded, result, out, overwrite)
                if kept is not None and not result.interrupted:
                    kept.clear()
            if first and verify:
                checks = _verify(loaded, result, model, lora)
                del model
                if full:
                    checks += _verify_full(result, out, own)
                if not print_checks(checks):
                    raise typer.Exit(unverified)
            elif verify and sharded:
                # A forward pass takes all processes: the others check a copy of their own.
                with tempfile.TemporaryDirectory() as scratch:
                    copy = result.save_lora(Path(scratch, "merged"), max_rank=loaded.output.max_rank)
                    _verify(loaded, result, model, copy.path)
            if first and result.interrupted:
                tell_resume(kept, alone=processes is None)
        if result.interrupted:
            raise typer.Exit(INTERRUPTED)


def _check_place(base: BaseSpec | None, device: str, max_memory: str | None) -> None:
    """Options of the command line that the base model's place leaves no room for."""
    if base is None:
        return
    if base.device_map is not None and device != "auto":
        raise RecipeError("--device and device_map both say where the base model is: leave one out")
    for key in ("device_map", "shard"):
        if getattr(base, key) and max_memory is not None:
            raise RecipeError(f"--max-memory plans for a base model on one device: leave it or {key} out")


def _check_full(
    recipe: Recipe, base: BaseSpec, adapters: dict[str, Adapter], out: Path, overwrite: bool
) -> None:
    from .apply import check_full

    check_full(base, adapters, out, overwrite=overwrite, **_weights(recipe))


def _weights(recipe: Recipe) -> dict[str, object]:
    """How the recipe wants the weights of a full model."""
    import torch

    dtype = None if recipe.output.dtype == "auto" else getattr(torch, recipe.output.dtype)
    return {"dtype": dtype, "shard_size": recipe.output.shard_size or "5GB"}


def _base(result: MergeResult) -> BaseSpec:
    from .recipe import BaseSpec

    return BaseSpec(**result.recipe["base_model"])


def _write(recipe: Recipe, result: MergeResult, out: Path, overwrite: bool) -> Path:
    """Writes the output, tells about it, and returns the folder of the merged LoRA."""
    import torch

    from .apply import LORA, save_full
    from .cli_apply import tell_full
    from .signal import signal_lines

    if result.history:
        ratio_table(result.history, result.measure)
    if result.interrupted:
        console.print(f"interrupted: writing the coefficients after {len(result.history)} steps")
    options = {"max_rank": recipe.output.max_rank, "overwrite": overwrite}
    full = recipe.output.kind == "full"
    if full:
        with progress(0) as (on_stage, _):
            report = save_full(
                result, out, base=_base(result), on_stage=on_stage, **options, **_weights(recipe)
            )
    else:
        report = result.save_pretrained(out, dtype=getattr(torch, recipe.output.dtype), **options)
    if result.signal is not None:
        console.print("null-space ratios on a sample of the unlabeled rows")
        for line in signal_lines(result.signal):
            console.print(f"  {line}", highlight=False)
    for notice in result.notices if full else (*result.notices, *report.notices):
        console.print(f"note: {notice}", markup=False, highlight=False)
    if full:
        tell_full(report)
    else:
        console.print(
            f"wrote {report.path}: {len(result.updates)} modules, rank {report.rank}, "
            f"{report.total_kept_energy:.2%} of the update's energy"
        )
    console.print(f"report: {report.path / 'nsc_fast' / 'report.html'}", highlight=False, soft_wrap=True)
    return out / LORA if full else out


def _verify(recipe: Recipe, result: MergeResult, model: nn.Module, lora: Path) -> list[Check]:
    from .merge import read_adapters
    from .verify import verify_output

    whole = None if result.dense is None else result.dense.tensors
    return verify_output(lora, result.updates, model, adapters=read_adapters(recipe), whole=whole)


def _verify_full(result: MergeResult, out: Path, device: str) -> list[Check]:
    """Of the files, and of the model in them unless it is larger than what is there for it."""
    from .apply import LORA
    from .verify import verify_full_model, verify_stored

    base = _base(result)
    checks = [verify_stored(out, base)]
    if base.quantised or base.shard:
        console.print(
            "note: the full model was not loaded, since the base was quantised or sharded to fit; its files "
            f"were compared. `nsc-fast verify {out}` loads it",
            highlight=False,
        )
        return checks
    return [*checks, verify_full_model(out, out / LORA, base, device=device)]
