"""Merges of random adapters for the report, and the page read back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from nsc_fast import methods
from nsc_fast.adapters import LoraFactors
from nsc_fast.driver import StepRecord
from nsc_fast.factors import canonical
from nsc_fast.merge import Prepared
from nsc_fast.methods import MergeInputs
from nsc_fast.result import MergeResult

MODULES = ("enc.layer.0.q", "enc.layer.0.v", "enc.layer.1.q", "enc.layer.1.v", "pooler")
TASKS = ("one", "two", "three")


def merged(
    method: str = "task_arithmetic",
    tasks: Sequence[str] = TASKS,
    modules: Sequence[str] = MODULES,
    notices: Sequence[str] = (),
    **parameters: Any,
) -> MergeResult:
    """A merge of rank-3 adapters; the second task leaves out the last module."""
    factors = {
        task: {
            module: LoraFactors(
                torch.randn(3, 16, dtype=torch.float64), 0.1 * torch.randn(12, 3, dtype=torch.float64), 1.0
            )
            for module in (modules[:-1] if number == 1 else modules)
        }
        for number, task in enumerate(tasks)
    }
    updates = {
        t: {m: canonical(f.down, f.up, f.scaling) for m, f in own.items()} for t, own in factors.items()
    }
    common = {
        "notices": tuple(notices),
        "base_model": "org/base",
        "sources": {t: {"source": f"/home/somebody/{t}", "digest": "0123456789abcdef" * 4} for t in tasks},
    }
    recipe = {"adapters": [{"name": t, "path": f"/home/somebody/{t}"} for t in tasks], "seed": 3}
    chosen = methods.get(method)
    prepared = Prepared(MergeInputs(updates=updates, factors=factors), common, recipe)
    return prepared.run(chosen, chosen.parameters(**parameters))


def optimised(result: MergeResult, steps: int = 7, signal: Mapping[str, Any] | None = None) -> MergeResult:
    """As if ``nsc`` had made it: coefficients that differ from module to module, a history."""
    coefficients = {m: 0.3 + 0.3 * torch.rand(len(own)) for m, own in result.stack_tasks.items()}
    history = [
        StepRecord(
            s + 1, 0.9 - 0.01 * s, {t: 0.9 - 0.01 * s - 0.1 * k for k, t in enumerate(result.tasks)}, 1e-3
        )
        for s in range(steps)
    ]
    return replace(result, method="nsc", coefficients=coefficients, history=history, signal=signal)


def signal_of(tasks: Sequence[str] = TASKS, modules: Sequence[str] = MODULES) -> dict[str, Any]:
    """Made-up ratios in the shape that a measurement has; different for every task, module and kind."""
    kinds = {"random": 0.95, "base": 0.94, "alone": 0.71, "initial": 0.83, "final": 0.77}
    signal: dict[str, Any] = {
        kind: {task: value + 0.0101 * k for k, task in enumerate(tasks)} for kind, value in kinds.items()
    }
    signal["strength"] = {task: 5.25 - k for k, task in enumerate(tasks)}
    signal["modules"] = {
        module: {
            task: {kind: value + 0.001 * k - 0.002 * n for kind, value in kinds.items()}
            for k, task in enumerate(tasks)
        }
        for n, module in enumerate(modules)
    }
    signal["sees"] = {j: {k: 0.4 if j == k else 0.01 * (n + 1) for k in tasks} for n, j in enumerate(tasks)}
    signal["tokens"] = {task: 1000 + k for k, task in enumerate(tasks)}
    return signal


class Page:
    """A report read back: parsed as XML, so that a tag or a quote out of place is an error."""

    def __init__(self, html: str) -> None:
        self.html = html
        self.style = re.search(r"<style>(.*?)</style>", html, re.S)[1]
        body = html.replace("<!DOCTYPE html>\n", "").replace(self.style, "")
        self.root = ElementTree.fromstring(body)

    @staticmethod
    def of(out: Path) -> Page:
        return Page((out / "nsc_fast" / "report.html").read_text(encoding="utf-8"))

    def section(self, key: str) -> ElementTree.Element:
        (found,) = [s for s in self.root.iter("section") if s.get("id") == key]
        return found

    def text(self, key: str | None = None) -> str:
        return " ".join("".join((self.root if key is None else self.section(key)).itertext()).split())

    def tables(self, key: str) -> list[list[list[str]]]:
        """Of a section, its tables as rows of cells."""
        return [
            [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
            for table in self.section(key).iter("table")
        ]


class Resources(HTMLParser):
    """Everything that a browser would fetch or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image"):
            self.found.append(tag)
        for name, value in attributes:
            inside = name == "href" and tag == "a" and (value or "").startswith("#")
            if name.startswith("on") or (
                name in ("src", "href", "xlink:href", "style", "srcset") and not inside
            ):
                self.found.append(f"{tag} {name}={value}")
