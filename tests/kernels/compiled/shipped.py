"""Every launch choice that ships, as calls of the real launchers on CPU tensors."""

from dataclasses import dataclass

import torch
from nsc_fast.kernels.launch import RANK_BINS, TARGETS, has_tf32

from nsc_fast.kernels import coefficient_grads as cg
from nsc_fast.kernels import expand as ex
from nsc_fast.kernels import project as pj
from nsc_fast.kernels import ratio_backward as rb
from nsc_fast.kernels import reduce as rd
from nsc_fast.kernels import tuned

DIM, TOKENS, TASKS = 4096, 300, 6


@dataclass(frozen=True)
class Shipped:
    """One kernel at one choice. ``dim`` and ``rank`` of the call; aligned unless they are odd. dtype "tf32":
    float32 with products in tf32."""

    kernel: str
    target: str
    dtype: str
    rank: int
    dim: int = DIM

    def __str__(self) -> str:
        ragged = "" if self.dim == DIM else f"-d{self.dim}"
        return f"{self.kernel}-{self.target}-{self.dtype}-R{self.rank}{ragged}"

    @property
    def half(self) -> bool:
        return self.dtype not in ("float32", "tf32")

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    @property
    def precision(self) -> str:
        return "tf32" if self.dtype == "tf32" else "ieee"

    @property
    def sampled(self) -> bool:
        """Is it compiled in every run of the tests? Of tf32, one rank's kernels are; write_table.py applies
        the same gates to the others."""
        if self.dtype != "tf32":
            return True
        others = ("coefficient_grads", "input_gradient", "ratio_backward")
        return self.rank == 64 and (
            self.kernel == "project" or (self.target == "sm_90" and self.kernel in others)
        )

    def choice(self):
        if self.kernel.startswith("reduce"):
            return None
        how = {"aligned": self.dim % 16 == 0, "precision": self.precision}
        return tuned.choose(self.kernel, self.rank, self.torch_dtype, self.target, **how)

    def choice_text(self) -> str:
        """The choice in one line, as table.json shows it."""
        c = self.choice()
        if c is None:
            return ""
        text = f"{c.block_n}x{c.block_d}x{c.parts}*{c.block_r} warps {c.num_warps} stages {c.num_stages}"
        text += " prefetch" if c.prefetch else ""
        text += f" tiles {c.tiles}" if c.tiles > 1 else ""
        return text + (f" maxnreg {c.maxnreg}" if c.maxnreg else "")

    def trips(self) -> int:
        choice = self.choice()
        if choice is None:
            return 1
        if self.kernel in ("project", "low_rank_input", "coefficient_grads"):
            return -(-self.dim // choice.block_d)
        return choice.tiles

    def call(self, tokens: int = TOKENS):
        """(jitted kernel, call): the launcher with the arguments of a merge over TASKS tasks."""
        dtype, precision = self.torch_dtype, self.precision
        n, d, r = tokens, self.dim, self.rank
        z, q = torch.zeros(n, d, dtype=dtype), torch.zeros(r, d, dtype=dtype)
        p, c_mat = torch.zeros(n, r, dtype=dtype), torch.zeros(d, r, dtype=dtype)
        segment, coef = torch.zeros(r, dtype=torch.int32), torch.zeros(r)
        task, column = torch.zeros(n, dtype=torch.int32), torch.zeros(n)
        own = {"task": task, "clamp": 1e-6, "precision": precision}
        calls = {
            "project": (pj.project_kernel, lambda: pj.project(z, q, segment, TASKS, weight=column, **own)),
            "low_rank_input": (pj.project_kernel, lambda: pj.low_rank_input(z, q, precision=precision)),
            "coefficient_grads": (
                cg.coefficient_grads_kernel,
                lambda: cg.coefficient_grads(
                    z, c_mat, p, coef, a=column, omega=column, norm2=column, num_segments=TASKS, **own
                ),
            ),
            "input_gradient": (
                ex.expand_kernel,
                lambda: ex.input_gradient(p, q, row_scale=column, z=z, out=z, precision=precision),
            ),
            "low_rank_output": (
                ex.expand_kernel,
                lambda: ex.low_rank_output(p, c_mat, coef, precision=precision),
            ),
            "ratio_backward": (
                rb.ratio_backward_kernel,
                lambda: rb.ratio_backward(z, q, p, column, column, column, segment, TASKS, **own),
            ),
            "reduce_columns": (rd.column_sums_kernel, lambda: rd.reduce_partials(torch.zeros(n, r))),
            "reduce_segments": (
                rd.segment_sums_kernel,
                lambda: rd.reduce_partials(torch.zeros(n, r), segment, TASKS),
            ),
        }
        return calls[self.kernel]


def every() -> list[Shipped]:
    found = []
    for target in TARGETS:
        for dtype in ("bfloat16", "float32", *(["tf32"] if has_tf32(target) else [])):
            for rank in RANK_BINS:
                for kernel in ("project", "low_rank_input", "coefficient_grads"):
                    found.append(Shipped(kernel, target, dtype, rank))
                if rank <= 256:  # 256 stands for every rank above the columns that a program keeps
                    found.append(Shipped("input_gradient", target, dtype, rank))
                    found.append(Shipped("low_rank_output", target, dtype, rank))
                alone = Shipped("ratio_backward", target, dtype, rank)
                if rank <= alone.choice().block_r:
                    found.append(alone)
        found.append(Shipped("reduce_columns", target, "float32", 128))
        found.append(Shipped("reduce_segments", target, "float32", 128))
    return found
