"""TSV-Merge (Gargiulo et al., 2025): leading singular vectors of every task, orthogonalised together.

    D_k ~ U_k S_k V_k^T (top q_k triplets),    DW = lambda polar([U_1 ... U_K]) S polar([V_1^T; ...; V_K^T])

The paper gives every task a share ``q = min(d_out, d_in) / K``. A LoRA update of smaller rank has no further
singular vectors, so here ``q_k = min(q, r_k)``: with the full share, arbitrary null-space directions would
change the result. All of it happens in the cores.
"""

from ..parameters import Strict
from ..result import MergeResult
from . import spectral
from .algebra import joint_core, pairs_of
from .base import MergeInputs, Method, modules_of, plain_result, updates_at


class Parameters(Strict):
    """``scaling``: lambda."""

    scaling: float = 1.0


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    updates = {}
    for module in modules_of(inputs):
        core = joint_core(pairs_of(updates_at(inputs, module)))
        quotas = spectral.quotas(core.ranks, core.shape)
        matrix = spectral.task_singular_vectors(list(core.matrices.values()), quotas)
        updates[module] = core.embed(parameters.scaling * matrix)
    return plain_result("tsv", inputs, parameters, updates)


METHOD = Method(
    name="tsv",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025",
    output_rank="sum of ranks at most",
    cost="O(d R^2 + K R^3) per module, R the sum of the ranks",
)
