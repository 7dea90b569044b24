"""TIES-Merging (Yadav et al., 2023): trim small entries, elect a sign per entry, merge what agrees.

    tau_k = trim(D_k),    sigma = sign(sum_k tau_k),    DW = lambda mean_{k: sign tau_k = sigma} tau_k

Entries of the update are judged one by one, so the result has full rank: it is formed module by module, and
truncated where ``max_rank`` says so.
"""

from collections.abc import Iterable

from pydantic import Field
from torch import Tensor

from ..parameters import Strict
from ..result import MergeResult
from .algebra import compress, energy_notice
from .base import MergeInputs, Method, modules_of, plain_result, updates_at
from .elementwise import Election, Entries, Matrices, merged


class Parameters(Election):
    """The election, then:

    Attributes:
        scaling: lambda.
        max_rank: of the merged updates. Default: full rank.
    """

    scaling: float = 1.0
    max_rank: int | None = Field(None, ge=1)


def run(inputs: MergeInputs, parameters: Parameters) -> MergeResult:
    return dense_result("ties", inputs, parameters, merged(matrices_of(inputs), parameters))


def matrices_of(inputs: MergeInputs) -> Matrices:
    """The updates themselves, weights inside, to be read entry by entry."""
    return {
        module: {task: Entries.of(update) for task, update in updates_at(inputs, module).items()}
        for module in modules_of(inputs)
    }


def dense_result(
    name: str, inputs: MergeInputs, parameters: Strict, dense: Iterable[tuple[str, Tensor]]
) -> MergeResult:
    """Result from dense merged updates that come module by module; needs ``scaling`` and ``max_rank``."""
    updates, kept = {}, {}
    for module, matrix in dense:
        updates[module], kept[module] = compress(parameters.scaling * matrix, parameters.max_rank)
    return plain_result(name, inputs, parameters, updates, energy_notice(kept, parameters.max_rank))


METHOD = Method(
    name="ties",
    parameters=Parameters,
    run=run,
    needs_data=False,
    paper="TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023",
    output_rank="full, or max_rank",
    cost="dense updates of one module at a time and one decomposition of each merged update",
)
