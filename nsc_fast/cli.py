"""The command line: ``nsc-fast inspect | validate | methods | merge | sweep | verify | report | ...``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from . import __version__
from .cli_apply import add_apply
from .cli_merge import add_merge
from .cli_run import INTERRUPTED, check_impl, check_out, device_of
from .cli_tables import (
    console,
    describe_method,
    inspection_table,
    method_details,
    methods_table,
    print_checks,
    progress,
    sweep_table,
)
from .errors import MergeError, RecipeError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Several LoRA adapters in, one merged LoRA out, by null-space compression.",
)

USAGE, REFUSED, UNVERIFIED = 2, 3, 4

Out = Annotated[Path, typer.Argument(help="output folder; must not exist")]
Device = Annotated[str, typer.Option(help="cpu, cuda, xpu, mps, or auto")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]


@contextmanager
def _errors() -> Iterator[None]:
    """Turns errors that a user can act on into a message and an exit code."""
    try:
        yield
    except RecipeError as error:
        _fail(str(error), USAGE)
    except (MergeError, ValueError, OSError) as error:
        # AdapterError is a ValueError. OSError: no space, no right to write, a file in place of a folder.
        _fail(str(error), REFUSED)


def _fail(message: str, code: int) -> None:
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, markup=True)
    raise typer.Exit(code)


@app.command()
def inspect(
    adapters: Annotated[list[str], typer.Argument(help="adapter folders or hub ids")], as_json: Json = False
) -> None:
    """Tells what each adapter is, and everything that would stop a merge. Reads headers only."""
    from .adapters import inspect_adapter

    with _errors():
        found = [inspect_adapter(adapter) for adapter in adapters]
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2, default=str))
    else:
        inspection_table(found)
    if any(one.problems for one in found):
        raise typer.Exit(REFUSED)


@app.command()
def validate(recipe: Annotated[Path, typer.Argument(help="YAML recipe")]) -> None:
    """Checks a recipe, its adapters and its data without loading the base model."""
    from .merge import check_inputs
    from .recipe import load_recipe

    with _errors():
        loaded = load_recipe(recipe)
        adapters, base = check_inputs(loaded)
    modules = {m for adapter in adapters.values() for m in adapter.modules}
    console.print(
        f"ok: {len(adapters)} adapters of {base.path}, {len(modules)} modules, {loaded.merge_method}"
    )


add_merge(app, _errors, UNVERIFIED)
add_apply(app, _errors, UNVERIFIED)


@app.command("verify")
def verify_command(
    out: Annotated[Path, typer.Argument(help="folder that merge wrote")],
    base_model: Annotated[str | None, typer.Option(help="base model, if it has moved")] = None,
    device: Device = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that comes with the base model")
    ] = False,
    as_json: Json = False,
) -> None:
    """Checks an existing output, LoRA or full model, and says what it has checked."""
    from .verify import verify_folder

    with _errors():
        checks = verify_folder(
            out, base_model=base_model, device=device_of(device), trust_remote_code=trust_remote_code
        )
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    if not print_checks(checks):
        raise typer.Exit(UNVERIFIED)


@app.command("report")
def report_command(out: Annotated[Path, typer.Argument(help="folder that merge wrote")]) -> None:
    """Makes the report (HTML) and the model card of an existing output again, from its folder alone."""
    from .report import write_report

    with _errors():
        for path in write_report(out):
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)


@app.command("methods")
def methods_command(
    name: Annotated[str | None, typer.Argument(help="one method, with its parameters")] = None,
    as_json: Json = False,
) -> None:
    """Lists the merging methods: what each needs, gives and costs; of one, its parameters and defaults."""
    from . import methods

    with _errors():
        chosen = [methods.get(n) for n in (methods.names() if name is None else (name,))]
    if as_json:
        described = [describe_method(method) for method in chosen]
        print(json.dumps(described if name is None else described[0], indent=2))
    elif name is None:
        methods_table(chosen)
    else:
        method_details(chosen[0])


@app.command("sweep")
def sweep_command(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe of a data-free method")],
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="KEY=VALUE,VALUE,... of a parameter; repeat")
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="shell command: gets the candidate's folder, prints a number, higher is better"),
    ] = None,
    label_free: Annotated[
        bool,
        typer.Option("--label-free", help="score by the null-space ratio on the recipe's data; the default"),
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="write the best adapter here")] = None,
    method: Annotated[str | None, typer.Option(help="merge method")] = None,
    device: Device = "auto",
    impl: Annotated[str, typer.Option(help="auto, triton or torch")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output folder")] = False,
    as_json: Json = False,
) -> None:
    """Merges and scores every point of a grid, and keeps the best. Without --grid: the method's own."""
    from .cli_recipe import recipe_of
    from .sweep import parse_grid, sweep

    with _errors():
        if score is not None and label_free:
            raise RecipeError("give --score or --label-free, not both")
        loaded = recipe_of(recipe, method=method)
        if loaded.output.kind != "lora":
            raise RecipeError(
                "sweep writes a LoRA: leave output.kind out, and use `nsc-fast apply` on the best"
            )
        if out is not None:
            overwrite = check_out(out, "lora", overwrite, recipe=loaded)
        own = device_of(device)
        check_impl(impl, own)
        with progress(0) as (on_stage, _):
            found = sweep(
                loaded,
                parse_grid(grid) if grid else None,
                command=score,
                device=own,
                impl=impl,
                on_stage=on_stage,
                on_point=lambda p: console.print(f"{dict(p.values)}: {p.score:.6g}", highlight=False),
            )
        if out is not None:
            found.save(out, loaded, overwrite=overwrite)
    if as_json:
        print(json.dumps(found.table(), indent=2))
    else:
        sweep_table(found)
    if out is not None:
        console.print(f"wrote the best to {out}", highlight=False)


@app.command()
def doctor(device: Device = "auto") -> None:
    """Tests every kernel on this machine against float64, and says which implementation will be used."""
    import torch

    from .ops import dispatch, selftest
    from .result import environment

    chosen = device_of(device)
    console.print(", ".join(f"{name} {version}" for name, version in environment().items()), highlight=False)
    impl = "triton" if dispatch.obstacle(torch.device(chosen), torch.float32) is None else "torch"
    if impl == "torch":
        reason = dispatch.obstacle(torch.device(chosen), torch.float32)
        console.print(f"device {chosen}: the kernels cannot run: {reason}", highlight=False)
    findings = selftest.run(chosen, None, impl)
    table = Table(title=f"self-test of impl={impl!r} on {chosen} against float64")
    for column in ("operation", "dtype", "relative error", "limit", "result"):
        table.add_column(column)
    for one in findings:
        error = one.reason if one.error is None else f"{one.error:.1e} {one.reason}"
        result = Text("ok", "green") if one.passed else Text("FAILED", "bold red")
        table.add_row(one.operation, str(one.dtype), error, f"{one.limit:.0e}", result)
    console.print(table)
    if impl == "triton" and chosen == "cpu":
        console.print(
            "note: Triton's interpreter computes with the bit patterns of bfloat16 as if they were numbers. "
            "What fails in bfloat16 here is the interpreter, and says nothing about compiled kernels",
            highlight=False,
        )
    sound = all(one.passed for one in findings)
    used = impl if sound else "torch"
    why = "the self-test passed" if sound else "the self-test failed"
    if impl == "torch":
        why = "the kernels cannot run here"
    console.print(f'impl="auto" uses {used!r} on {chosen}: {why}')
    if not sound:
        raise typer.Exit(UNVERIFIED)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="write the merged LoRA here")] = None,
) -> None:
    """Merges real adapters of a real encoder on real data, and prints how well each way does."""
    from .demo.run import run

    with _errors():
        if out is not None and out.exists():
            raise RecipeError(f"the output {out} exists; choose another folder")
        run(out)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


def main() -> None:
    """Entry point of the ``nsc-fast`` program."""
    try:
        app()
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
