"""The command line: ``nsc-fast inspect | validate | merge | verify | doctor | demo``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__
from .adapters import AdapterError, inspect_adapter
from .errors import MergeError, RecipeError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Several LoRA adapters in, one merged LoRA out, by null-space compression.",
)
console = Console(stderr=True)

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
    except (AdapterError, MergeError, ValueError) as error:
        _fail(str(error), REFUSED)


def _fail(message: str, code: int) -> None:
    console.print(f"[bold red]error:[/] {message}", markup=True, highlight=False)
    raise typer.Exit(code)


@app.command()
def inspect(
    adapters: Annotated[list[str], typer.Argument(help="adapter folders or hub ids")], as_json: Json = False
) -> None:
    """Tells what each adapter is, and everything that would stop a merge. Reads headers only."""
    with _errors():
        found = [inspect_adapter(adapter) for adapter in adapters]
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2, default=str))
    else:
        _inspection_table(found)
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


@app.command()
def merge(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; or use the flags")] = None,
    out: Annotated[Path | None, typer.Argument(help="output folder; must not exist")] = None,
    base_model: Annotated[str | None, typer.Option(help="hub id or folder of the base model")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH or PATH of an adapter; repeat", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE.jsonl, unlabeled text; repeat", show_default=False)
    ] = None,
    text: Annotated[str, typer.Option(help="text column, or two separated by a comma")] = "text",
    out_option: Annotated[Path | None, typer.Option("--out", help="output folder")] = None,
    method: Annotated[str | None, typer.Option(help="merge method")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the method's parameters; repeat")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="truncate the merged LoRA to this rank")] = None,
    out_dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    seed: Annotated[int | None, typer.Option("--seed", "--random-seed")] = None,
    device: Device = "auto",
    impl: Annotated[str, typer.Option(help="auto, triton or torch")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the output folder")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="check the output")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only check the inputs")] = False,
) -> None:
    """Merges adapters into one LoRA: ``merge RECIPE OUT``, or with flags instead of a recipe."""
    import torch

    from .merge import check_inputs, run_recipe
    from .verify import verify_output

    with _errors():
        if adapter and recipe is not None and out is None and out_option is None:
            recipe, out = None, recipe
        out = out or out_option
        loaded = _recipe(recipe, base_model, adapter, data, text, method, set_, max_rank, out_dtype, seed)
        if out is None and not dry_run:
            raise RecipeError("no output folder: give OUT or --out")
        if out is not None and out.exists() and not overwrite:
            raise RecipeError(f"the output {out} exists; choose another folder or add --overwrite")
        if dry_run:
            check_inputs(loaded)
            console.print("ok: recipe, adapters and data can be read")
            return
        steps = int(loaded.method_parameters().model_dump().get("steps", 0))
        with _progress(steps) as (on_stage, on_step):
            result, model = run_recipe(
                loaded, device=_device(device), impl=impl, on_stage=on_stage, on_step=on_step
            )
        if result.history:
            _ratio_table(result.history)
        if result.interrupted:
            console.print(f"interrupted: writing the coefficients after {len(result.history)} steps")
        report = result.save_pretrained(
            out,
            max_rank=loaded.output.max_rank,
            dtype=getattr(torch, loaded.output.dtype),
            overwrite=overwrite,
        )
        for notice in (*result.notices, *report.notices):
            console.print(f"note: {notice}", highlight=False)
        console.print(
            f"wrote {report.path}: {len(result.updates)} modules, rank {report.rank}, "
            f"{report.total_kept_energy:.2%} of the update's energy"
        )
        if verify:
            from .merge import read_adapters

            checks = verify_output(out, result.updates, model, adapters=read_adapters(loaded))
            _print_checks(checks)


@app.command("verify")
def verify_command(
    out: Annotated[Path, typer.Argument(help="folder that merge wrote")],
    base_model: Annotated[str | None, typer.Option(help="base model, if it has moved")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Checks an existing output: weights, reload through PEFT, identity, difference from the base."""
    from .verify import verify_folder

    with _errors():
        checks = verify_folder(out, base_model=base_model, device=_device(device))
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    _print_checks(checks)


@app.command()
def doctor(device: Device = "auto") -> None:
    """Tests every kernel on this machine against float64, and says which implementation will be used."""
    import torch

    from .ops import dispatch, selftest
    from .result import environment

    chosen = _device(device)
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
        result = "[green]ok[/]" if one.passed else "[bold red]FAILED[/]"
        table.add_row(one.operation, str(one.dtype), error, f"{one.limit:.0e}", result)
    console.print(table)
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


def _recipe(
    file: Path | None,
    base_model: str | None,
    adapters: list[str] | None,
    data: list[str] | None,
    text: str,
    method: str | None,
    settings: list[str] | None,
    max_rank: int | None,
    out_dtype: str | None,
    seed: int | None,
) -> Any:
    """The recipe from a file with flags over it, or from flags alone."""
    import yaml

    from .recipe import make_recipe

    if file is not None:
        if adapters or data:
            raise RecipeError("give a recipe or --adapter/--data flags, not both")
        if not file.is_file():
            raise RecipeError(f"there is no recipe {str(file)!r}")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file}: not a readable YAML file: {error}") from error
        if not isinstance(content, dict):
            raise RecipeError(f"{file}: a recipe is a mapping with 'adapters' in it")
    else:
        content = {"adapters": _flag_adapters(adapters or [], data or [], text)}
    if base_model is not None:
        content["base_model"] = base_model
    if method is not None:
        content["merge_method"] = method
    if seed is not None:
        content["seed"] = seed
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise RecipeError(f"--set {setting!r}: write KEY=VALUE")
        target = content.setdefault("parameters", {})
        *outer, last = key.split(".")
        for part in outer:
            target = target.setdefault(part, {})
        target[last] = yaml.safe_load(value)
    for key, value in (("max_rank", max_rank), ("dtype", out_dtype)):
        if value is not None:
            content.setdefault("output", {})[key] = value
    return make_recipe(content, where=str(file or "flags"), folder=file.parent if file else None)


def _flag_adapters(adapters: list[str], data: list[str], text: str) -> list[dict[str, Any]]:
    if not adapters:
        raise RecipeError("nothing to merge: give a recipe, or --adapter NAME=PATH for every adapter")
    columns: str | list[str] = text.split(",") if "," in text else text
    files = {}
    for item in data:
        name, equals, path = item.partition("=")
        if not equals:
            raise RecipeError(f"--data {item!r}: write NAME=FILE.jsonl")
        files[name] = path
    out = []
    for item in adapters:
        name, equals, path = item.partition("=")
        if not equals:
            name, path = Path(item).name, item
        spec: dict[str, Any] = {"name": name, "path": path}
        if name in files:
            spec["data"] = {"path": files.pop(name), "text": columns}
        out.append(spec)
    if files:
        raise RecipeError(f"--data names {next(iter(files))!r}, which is no adapter")
    return out


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


@contextmanager
def _progress(steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[Any], None]]]:
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}")]
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=steps or None, loss="")

        def on_stage(stage: str) -> None:
            progress.update(bar, description=stage)

        def on_step(record: Any) -> None:
            progress.update(bar, advance=1, loss=f"loss {record.loss:.4f}")

        yield on_stage, on_step


def _ratio_table(history: Any) -> None:
    table = Table(title=f"null-space ratio over the target modules, {len(history)} steps")
    for column in ("task", "first step", "last step"):
        table.add_column(column)
    for task, before in history[0].ratios.items():
        table.add_row(task, f"{before:.4f}", f"{history[-1].ratios[task]:.4f}")
    console.print(table)


def _print_checks(checks: list[Any]) -> None:
    for check in checks:
        state = "[green]ok[/]" if check.passed else "[bold red]FAILED[/]"
        relation = ">" if check.name == "difference" else "<="
        console.print(
            f"{state} {check.name}: {check.value:.1e} (must be {relation} {check.limit:.0e}) {check.detail}",
            highlight=False,
        )
    if not all(check.passed for check in checks):
        raise typer.Exit(UNVERIFIED)


def _inspection_table(found: list[Any]) -> None:
    table = Table(title="adapters")
    for column in ("name", "base model", "rank", "scale", "modules", "dtype", "sha256"):
        table.add_column(column)
    for one in found:
        table.add_row(
            one.name,
            str(one.base_model),
            ", ".join(map(str, one.ranks)),
            ", ".join(f"{s:g}" for s in one.scales),
            str(one.modules),
            one.dtype,
            one.digest[:12],
        )
    Console().print(table)
    for one in found:
        for problem in one.problems:
            console.print(f"[bold red]{one.name}:[/] {problem}", highlight=False)


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
        sys.exit(130)


if __name__ == "__main__":
    main()
