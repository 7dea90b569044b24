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
from .errors import MergeError
from .layers import features
from .loading import base_skeleton
from .packing import positions
from .parameters import Memory, NSCParameters
from .quantised import quantised_by
from .recipe import BaseSpec, Recipe
from .targets import select_targets

__all__ = ["Workload", "workload"]

_DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Workload:
    """A merge, as far as memory and time go.

    Attributes:
        skeleton: base model on the meta device, in its dtype.
        ranks: task -> module -> rank.
        targets: modules whose ratio enters the loss; none where the distance of the last states is the loss.
        weight_bytes: of the base model.
        adapter_bytes: of the adapters' files.
        rows: sequences of a task's batch.
        length: tokens of the longest sequence.
        granularity: of the coefficients.
        anchors: rows of every task whose last states stay in the host's memory.
        merges: finished merges that are there at once, to be compared.
    """

    skeleton: nn.Module
    ranks: Mapping[str, Mapping[str, int]]
    targets: Sequence[str]
    weight_bytes: int
    adapter_bytes: int
    rows: int = 16
    length: int = _DEFAULT_LENGTH
    granularity: Granularity = "layer"
    anchors: int = 0
    merges: int = 0

    @cached_property
    def limit(self) -> int | None:
        """Positions of the model."""
        return positions(self.skeleton)

    @cached_property
    def factor_numbers(self) -> int:
        """Entries of all canonical factors, bases and columns."""
        modules = dict(self.skeleton.named_modules())
        total = 0
        for own in self.ranks.values():
            total += sum(rank * sum(features(modules[m])) for m, rank in own.items())
        return total

    @property
    def core_numbers(self) -> int:
        """Entries of all cores."""
        if self.granularity != "core":
            return 0
        stacked = Counter({m: 0 for own in self.ranks.values() for m in own})
        for own in self.ranks.values():
            stacked.update(own)
        return sum(rank**2 for rank in stacked.values())

    @cached_property
    def state_numbers(self) -> tuple[int, int]:
        """Of the last states: width, and entries of those that are kept of all tasks."""
        width = self.skeleton.config.get_text_config().hidden_size
        return width, len(self.ranks) * self.anchors * self.length * width


def workload(recipe: Recipe) -> Workload:
    """What a recipe asks for, from the configs and headers of base model and adapters."""
    parameters = recipe.method_parameters()
    if not isinstance(parameters, Memory):
        raise MergeError(
            f"memory is planned for methods 'nsc', 'anchored' and 'auto', not {recipe.merge_method!r}; leave "
            "--max-memory out"
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
    skeleton = base_skeleton(base, modules, task_type=types.pop() if len(types) == 1 else None).model
    if getattr(skeleton.config, "is_encoder_decoder", False):
        raise MergeError(
            f"memory cannot be planned for {type(skeleton).__name__}, which has an encoder and a decoder; "
            "leave --max-memory out, and set micro_batch and checkpointing yourself"
        )
    dtype = _dtype(base, skeleton)
    skeleton.to(dtype)
    order = [name for name, _ in skeleton.named_modules()]
    targets, more = (), {}
    if isinstance(parameters, NSCParameters):
        scope, own = parameters.scope, [m for m in order if m in set(modules)]
        targets = select_targets(own, layers=scope.layers, names=scope.filter, all_modules=order)
        more["granularity"] = parameters.granularity
    else:
        # 'auto' fits cores, and compares two merges at a time.
        more["granularity"] = getattr(parameters, "granularity", "core")
        more |= {"anchors": parameters.rows, "merges": 0 if hasattr(parameters, "granularity") else 3}
    limit = positions(skeleton)
    rows, length = 1, 1
    for spec in recipe.adapters:
        if spec.data is not None:
            wanted = spec.data.max_length or min(_DEFAULT_LENGTH, limit or _DEFAULT_LENGTH)
            if limit is not None and wanted > limit:
                raise MergeError(
                    f"task {spec.name!r}: sequences of up to {wanted} tokens are longer than the {limit} "
                    f"positions of the model; set data.max_length to {limit}"
                )
            rows, length = max(rows, spec.data.batch_size), max(length, wanted)
    weights = _weight_bytes(base, skeleton, dtype)
    return Workload(skeleton, ranks, targets, weights, sizes, rows, length, **more)


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
