"""What a merge asks for, from the configs and headers of base model and adapters alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from .adapters.check import common_base
from .adapters.source import locate, read_config, read_headers, safetensors_headers
from .adapters.tensors import examine
from .coefficients import Granularity
from .data.encode import DEFAULT_LENGTH
from .data.processors import limits_of
from .errors import MergeError
from .footprint import Objective
from .layers import features
from .loading import base_skeleton
from .objectives.waypoints import candidates
from .quantised import quantised_by
from .recipe import BaseSpec, Recipe
from .row_inputs import RowInputs, row_inputs
from .targets import select_targets

__all__ = ["PLANNED", "Use", "Workload", "workload"]


@dataclass(frozen=True)
class Use:
    """What a method does with the model and keeps, as far as memory goes.

    Attributes:
        objective: of its passes.
        granularity: of what is optimised. Default: as its parameters say.
        merges: finished merges that are there at once.
        waypoints: the parameter that says whether states between the blocks are compared.
    """

    objective: Objective
    granularity: Granularity | None = None
    merges: int = 0
    waypoints: str = ""


PLANNED: dict[str, Use] = {
    "nsc": Use("ratio"),
    "anchored": Use("states", waypoints="waypoints"),
    # It fits cores. Of those with data and of those without the nearest is kept, beside the next candidate.
    "auto": Use("states", "core", merges=3, waypoints="anchored_waypoints"),
    "closed_form": Use("moments", merges=1),
}
"""Methods whose memory is planned."""


@dataclass(frozen=True)
class Workload:
    """A merge, as far as memory and time go.

    Attributes:
        skeleton: base model on the meta device, in its dtype.
        ranks: task -> module -> rank.
        targets: modules whose ratio enters the loss; none for other objectives.
        weight_bytes: of the base model.
        adapter_bytes: of the adapters' files.
        rows: rows of a task's batch.
        length: tokens of the longest row; 0 where rows are images alone.
        granularity: of the coefficients.
        objective: of the passes.
        inputs: of a row; where tasks differ, of the largest.
        alike: whether the rows of all tasks hold the same, so that their batches can go through together.
        anchors: rows of every task whose last states stay in the host's memory.
        waypoints: blocks whose states are compared, too.
        merges: finished merges that are there at once.
        data_bytes: of all batches, in the host's memory.
    """

    skeleton: nn.Module
    ranks: Mapping[str, Mapping[str, int]]
    targets: Sequence[str]
    weight_bytes: int
    adapter_bytes: int
    rows: int = 16
    length: int = DEFAULT_LENGTH
    granularity: Granularity = "layer"
    objective: Objective = "ratio"
    inputs: RowInputs = RowInputs()
    alike: bool = True
    anchors: int = 0
    waypoints: int = 0
    merges: int = 0
    data_bytes: int = 0

    @cached_property
    def limit(self) -> int | None:
        """Positions of the model."""
        return limits_of(self.skeleton.config).positions

    @cached_property
    def factor_numbers(self) -> int:
        """Entries of all canonical factors, bases and columns."""
        modules = dict(self.skeleton.named_modules())
        total = 0
        for own in self.ranks.values():
            total += sum(rank * sum(features(modules[m])) for m, rank in own.items())
        return total

    @cached_property
    def stacked_ranks(self) -> dict[str, int]:
        """Module -> ranks of all adapters."""
        total: Counter[str] = Counter()
        for own in self.ranks.values():
            total.update(own)
        return dict(total)

    @property
    def core_numbers(self) -> int:
        """Entries of all cores that are optimised."""
        if self.granularity != "core" or self.objective == "moments":
            return 0
        return sum(rank**2 for rank in self.stacked_ranks.values())

    @cached_property
    def moments(self) -> tuple[int, int]:
        """Of the second moments of projections: bytes on the device, for a task at most, and on the host.

        On the device are all down projections and the task's own up projections, in float32, and its sums, in
        float64.
        """
        modules = dict(self.skeleton.named_modules())
        device, host = [0], 0
        for own in self.ranks.values():
            sums = 8 * sum(self.stacked_ranks[m] ** 2 for m in own)
            factors = 0
            for m, rank in own.items():
                d_out, d_in = features(modules[m])
                factors += 4 * (d_in * self.stacked_ranks[m] + d_out * rank)
            device.append(factors + sums)
            host += sums
        return max(device), host


def workload(recipe: Recipe) -> Workload:
    """What a recipe asks for, from the configs and headers of base model and adapters.

    Data are looked at where the base model takes images, see :func:`nsc_fast.row_inputs.row_inputs`.

    Raises:
        MergeError: a method, a base model or data whose memory cannot be planned.
        AdapterError: an adapter that cannot be read.
    """
    parameters, use = recipe.method_parameters(), PLANNED.get(recipe.merge_method)
    if use is None:
        raise MergeError(
            f"memory is planned for methods {', '.join(map(repr, PLANNED))}, not {recipe.merge_method!r}; "
            "leave --max-memory out"
        )
    ranks, sizes, names, types = {}, 0, set(), set()
    for spec in recipe.adapters:
        files = locate(spec.path, name=spec.name, revision=spec.revision, subfolder=spec.subfolder)
        config, headers = read_config(files), read_headers(files)
        pairs = examine(config, headers, recipe.modules_to_save).pairs
        ranks[spec.name] = {module: headers[down].shape[0] for module, (down, _) in pairs.items()}
        sizes += files.weights.stat().st_size
        names.add(config.get("base_model_name_or_path"))
        types.add(config.get("task_type"))
    base = recipe.base_model
    if base is None:
        name = common_base([], names.pop() if len(names) == 1 else None)
        base = BaseSpec(path=name)
    modules = list(dict.fromkeys(m for own in ranks.values() for m in own))
    task_type = types.pop() if len(types) == 1 else None
    skeleton = base_skeleton(base, modules, task_type=task_type).model
    dtype = _dtype(base, skeleton)
    skeleton.to(dtype)
    rows, length, found, data_bytes = 1, 0, [], 0
    for spec in recipe.adapters:
        if spec.data is not None:
            inputs, own = row_inputs(spec, base, skeleton, task_type, recipe.seed)
            found.append(inputs)
            rows, length = max(rows, spec.data.batch_size), max(length, own)
            each = 8 * own * len(inputs.tokens) + inputs.bytes_of_images
            data_bytes += each * spec.data.num_samples
    if not found:
        raise MergeError(f"memory cannot be planned without data, which {recipe.merge_method!r} needs")
    targets = ()
    if use.objective == "ratio":
        order = [name for name, _ in skeleton.named_modules()]
        scope, adapted = parameters.scope, [m for m in order if m in set(modules)]
        targets = select_targets(adapted, layers=scope.layers, names=scope.filter, all_modules=order)
    return Workload(
        skeleton,
        ranks,
        targets,
        _weight_bytes(base, skeleton, dtype),
        sizes,
        rows,
        length,
        granularity=use.granularity or parameters.granularity,
        objective=use.objective,
        inputs=max(found, key=lambda one: (one.bytes_of_images, len(one.tokens))),
        alike=all(one == found[0] for one in found),
        anchors=parameters.rows if use.objective == "states" else 0,
        waypoints=_waypoints(skeleton, modules) if getattr(parameters, use.waypoints, False) else 0,
        merges=use.merges,
        data_bytes=data_bytes,
    )


def _waypoints(skeleton: nn.Module, modules: Sequence[str]) -> int:
    """Blocks below the last one; of several stacks, in the deepest."""
    stacks = Counter(name.rpartition(".")[0] for name in candidates(skeleton, modules))
    return max(stacks.values(), default=1) - 1


def _weight_bytes(base: BaseSpec, skeleton: nn.Module, dtype: torch.dtype) -> int:
    """Of the weights as they are loaded; quantised, with the copy of the largest one that a product makes."""
    packed = quantised_by(skeleton.config.to_dict())
    if packed is not None:
        raise MergeError(
            f"memory cannot be planned for {base.path!r}, whose files are quantised by {packed}; name the "
            "base that is not, with load_in_4bit or load_in_8bit if you want"
        )
    total = sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
    if not base.quantised:
        return total
    head = skeleton.get_output_embeddings()
    linear = [m.weight.numel() for m in skeleton.modules() if isinstance(m, nn.Linear) and m is not head]
    # NF4 has a scale in float32 for every 64 weights; 8 bits have one a row.
    each = 0.5 + 4 / 64 if base.load_in_4bit else 1.0
    return int(total - sum(linear) * (dtype.itemsize - each) + max(linear, default=0) * dtype.itemsize)


def _dtype(base: BaseSpec, skeleton: nn.Module) -> torch.dtype:
    """As transformers chooses it: what the spec says, the config, or the first weight in the files."""
    if base.dtype != "auto":
        return getattr(torch, base.dtype)
    config = getattr(skeleton.config, "dtype", None)
    if isinstance(config, torch.dtype):
        return config
    for file in sorted(Path(base.path).expanduser().glob("*.safetensors")):
        try:
            headers = safetensors_headers(file)
        except (SafetensorError, OSError) as error:
            raise MergeError(f"base model {base.path!r}: {file.name} cannot be read: {error}") from error
        for header in headers.values():
            if header.dtype in ("float64", "float32", "bfloat16", "float16"):
                return getattr(torch, header.dtype)
    return torch.float32
