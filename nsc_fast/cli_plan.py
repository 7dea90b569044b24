"""The plan of a merge within a budget of memory, as the command line prints it."""

from __future__ import annotations

from rich.table import Table

from .cli_tables import console
from .memory import parse_bytes, readable_bytes
from .planner import RESERVE, Plan, make_plan
from .recipe import Recipe

__all__ = ["planned", "print_plan"]


def print_plan(plan: Plan) -> None:
    """What the choices need, and the one that is taken."""
    work = plan.work
    title = f"within {readable_bytes(plan.budget)}, {len(work.ranks)} tasks"
    table = Table(title=title + (f", {work.length} tokens" if work.length else ", images"))
    columns = (
        "checkpointing",
        "offload",
        "micro_batch",
        "batching",
        "device",
        "host",
        "time of a step",
        "longest",
    )
    for column in columns:
        table.add_column(column)
    for choice, need, longest in plan.table():
        table.add_row(
            choice.recompute,
            "yes" if choice.offload else "no",
            str(choice.micro_batch),
            "joined" if choice.together else "one task after another",
            readable_bytes(need.device) + ("" if need.device <= plan.budget else " (too much)"),
            readable_bytes(need.host),
            f"{need.time:.2f}",
            "" if longest is None else f"{longest} tokens",
        )
    console.print(table)
    console.print(
        f"computed, not measured: {readable_bytes(work.weight_bytes)} of weights and "
        f"{readable_bytes(RESERVE)} left for the device's context are in it; time in forward passes of "
        "the base model, by operations; "
        "longest: one sequence at a time",
        highlight=False,
    )
    for name, (count, size) in plan.blocks("never").items():
        like = f" and {count - 1} more like it keep" if count > 1 else " keeps"
        console.print(f"  {name}{like} {size:.0f} bytes a {plan.unit}", highlight=False)


def planned(recipe: Recipe, budget: str, device: str) -> Recipe:
    """Prints the plan, and returns the recipe with the choice in its parameters.

    Raises:
        MergeError: nothing fits, or the method cannot be planned.
    """
    plan = make_plan(recipe, parse_bytes(budget), device)
    print_plan(plan)
    console.print(f"plan: {plan.chosen}", highlight=False)
    return recipe.model_copy(
        update={"parameters": {**recipe.parameters, **plan.chosen.settings(plan.work.objective)}}
    )
