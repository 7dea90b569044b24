"""Which suites there are, and where the tasks and base models of each are defined.

The modules of base models are imported when used: what they need beyond the package (a model, images) is
needed by nobody else.
"""

from __future__ import annotations

from importlib import import_module

from nsc_fast.errors import MergeError

from .base import Base, Suite, Task

__all__ = ["SUITES", "base", "suite", "task", "tasks"]

_MODULES = {"minilm": "text", "vit": "vision", "smollm2": "decoder"}

SUITES = (
    Suite(
        "text",
        "minilm",
        ("sick_e", "sick_r", "trec", "emobank", "ewt_pos", "snips"),
        "unlike text tasks: two kinds of classification, two of regression, tagging, generation",
    ),
    Suite(
        "nli",
        "minilm",
        # The sixth of the paper, rte, stays at chance with this base model: it is trained on request only.
        ("snli", "mnli", "qnli", "scitail", "sick_e"),
        "five entailment tasks",
    ),
    Suite(
        "ten",
        "minilm",
        ("sick_e", "sick_r", "trec", "emobank", "ewt_pos", "snips", "snli", "mnli", "qnli", "scitail"),
        "all tasks of text and nli in one merge",
    ),
    Suite("vision", "vit", ("cifar10", "camvid_seg", "camvid_edge"), "image tasks"),
    Suite("decoder", "smollm2", ("sick_e", "sick_r", "e2e"), "tasks of a decoder"),
)


def suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        MergeError: there is none.
    """
    for one in SUITES:
        if one.name == name:
            return one
    raise MergeError(f"no suite {name!r}; there are {', '.join(s.name for s in SUITES)}")


def base(name: str) -> Base:
    """The base model of that name; imports its module."""
    return _module(name).BASE


def task(base_name: str, name: str) -> Task:
    """A task of a base model.

    Raises:
        MergeError: it has none of that name.
    """
    there = _module(base_name).TASKS
    for one in there:
        if one.name == name:
            return one
    raise MergeError(f"no task {name!r} for {base_name}; there are {', '.join(t.name for t in there)}")


def tasks(chosen: Suite) -> tuple[Task, ...]:
    """All tasks of a suite."""
    return tuple(task(chosen.base, name) for name in chosen.tasks)


def _module(base_name: str):
    if base_name not in _MODULES:
        raise MergeError(f"no base model {base_name!r}; there are {', '.join(_MODULES)}")
    return import_module(f"{__package__}.{_MODULES[base_name]}")
