"""KnOTS-TIES (Stoica et al., 2025): TIES on aligned task representations.

    [D_1 ... D_K] = U S [V_1^T ... V_K^T],    P_k = S V_k^T,    DW = lambda U TIES(P_1, ..., P_K)

With canonical factors D_k = C_k Q_k the decomposition is that of ``[C_1 ... C_K]`` alone, and V_k^T the
product of its block with Q_k: a matrix as small as the ranks instead of one as large as K updates. The merged
update is ``U P`` as it stands, of rank at most ``sum r_k``.
"""

from torch import Tensor

from ..factors import LowRankUpdate, embedded, gathered, row_basis
from ..result import MergeResult
from .algebra import RTOL
from .base import MergeInputs, Method, modules_of, plain_result, updates_at
from .elementwise import Drop, Election, Entries, merged


class Parameters(Election):
    """The election, then:

    Attributes:
        scaling: lambda.
    """

    scaling: float = 0.6


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    return merge("knots_ties", inputs, parameters, None)


def merge(name: str, inputs: MergeInputs, parameters: Parameters, drop: Drop | None) -> MergeResult:
    """KnOTS with TIES, after ``drop`` where there is one."""
    left, aligned = {}, {}
    for module in modules_of(inputs):
        left[module], aligned[module] = align(updates_at(inputs, module))
        if parameters.majority_sign == "frequency":
            # Counting signs depends on the arbitrary signs of the singular vectors; summing values does not.
            signs = orientation(module, left[module])
            left[module] *= signs
            aligned[module] = {
                task: Entries(signs[:, None] * entries.left, entries.right)
                for task, entries in aligned[module].items()
            }
    # The factors of the update take the memory of U and of the merged P.
    updates = {
        module: embedded(left.pop(module), matrix.mul_(parameters.scaling))
        for module, matrix in merged(aligned, parameters, drop)
    }
    return plain_result(name, inputs, parameters, updates)


def align(updates: dict[str, LowRankUpdate]) -> tuple[Tensor, dict[str, Entries]]:
    """U, ``(d_out, rank)``, and every task's ``P_k = S V_k^T``, ``(rank, d_in)``, as a product.

    Singular values below a fixed part of the largest are dropped, so that the rule does not depend on the
    scale of the updates.
    """
    columns = gathered([update.columns.T for update in updates.values()])
    left, right = row_basis(columns, rtol=RTOL, overwrite=True)
    parts = right.split([update.rank for update in updates.values()])
    named = zip(updates.items(), parts, strict=True)
    return left.T, {task: Entries(part.T, update.basis) for (task, update), part in named}


def orientation(module: str, left: Tensor) -> Tensor:
    """Signs that make the largest entry of each left singular vector positive."""
    # Column by column: the magnitudes of all are as large as U.
    largest = [column[column.abs().argmax()] for column in left.T]
    return left.new_tensor([1.0 if entry >= 0 else -1.0 for entry in largest])


METHOD = Method(
    name="knots_ties",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="Model Merging with SVD to Tie the Knots, ICLR 2025",
    output_rank="sum of ranks at most",
    cost="O(d R^2 + K R r d) per module, R the sum of the ranks",
)
