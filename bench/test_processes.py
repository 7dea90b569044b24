"""Two processes on two cores against one process on one core: how many more steps a second.

Every process is pinned to a core of its own and has one thread. What is timed is the whole optimisation, the
installation of the merged layers included.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch

from nsc_fast.driver import optimise
from nsc_fast.factors import canonical
from nsc_fast.parameters import NSCParameters, Scope
from nsc_fast.processes import launched

SHAPES = {  # width, blocks, tasks, rows and tokens of a batch, steps
    "smoke": {"tiny": (32, 2, 3, 2, 8, 2)},
    "cpu": {"even": (256, 6, 4, 8, 64, 12), "odd": (256, 6, 3, 8, 64, 12), "one": (256, 6, 1, 16, 64, 12)},
    "full": {"even": (256, 6, 4, 8, 64, 12), "odd": (256, 6, 3, 8, 64, 12), "one": (256, 6, 1, 16, 64, 12)},
}


def test_two_processes(compare, name, size, device) -> None:
    if device.type != "cpu":
        pytest.skip("the cores of a CPU are compared")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        pytest.skip("there are no two cores to pin processes to")
    shape = SHAPES[size][name]
    width, blocks, tasks, rows, tokens, steps = shape
    with Workers(shape, cores[:1]) as one, Workers(shape, cores[:2]) as two:
        ratios = compare(
            two,
            {"one process on one core": one},
            case=f"{blocks} blocks of {width}, K={tasks}, {rows} x {tokens} tokens a task, {steps} steps",
            goals={"one process on one core": ">= 1.6"},
        )
    assert ratios["one process on one core"] > 0


class Workers:
    """As many processes as cores, connected if there are several; a call makes them run once, together."""

    def __init__(self, shape: tuple[int, ...], cores: list[int]) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes: list[Connection] = []
        for rank, core in enumerate(cores):
            here, there = context.Pipe()
            arguments = (shape, core, rank, len(cores), port, there)
            context.Process(target=_work, args=arguments, daemon=True).start()
            self._pipes.append(here)
        for pipe in self._pipes:
            assert pipe.recv() == "ready"

    def __call__(self) -> None:
        for pipe in self._pipes:
            pipe.send("run")
        for pipe in self._pipes:
            assert pipe.recv() == "done"

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send("end")


def _work(shape: tuple[int, ...], core: int, rank: int, size: int, port: int, pipe: Connection) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    run = _job(*shape)
    processes = launched()
    pipe.send("ready")
    while pipe.recv() == "run":
        run(processes)
        pipe.send("done")


def _job(width: int, blocks: int, tasks: int, rows: int, tokens: int, steps: int) -> Callable[..., object]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=100,
    )
    model = LlamaForCausalLM(config).eval()
    ends = ("q_proj", "v_proj", "up_proj", "down_proj")
    layers = {n: m for n, m in model.named_modules() if n.endswith(ends)}
    adapters, data = {}, {}
    for k in range(tasks):
        adapters[f"task{k}"] = {
            name: canonical(
                torch.randn(8, layer.in_features) / layer.in_features**0.5,
                torch.randn(layer.out_features, 8) * 0.05,
            )
            for name, layer in layers.items()
        }
        data[f"task{k}"] = [{"input_ids": torch.randint(0, 100, (rows, tokens))} for _ in range(3)]
    parameters = NSCParameters(steps=steps, scope=Scope(layers="all"))
    return lambda processes: optimise(model, adapters, data, parameters, processes=processes)
