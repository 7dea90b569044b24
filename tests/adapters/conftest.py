"""Small adapter folders, written by hand where a test breaks them and by PEFT where it must agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_files import Mlp, plain_config, plain_tensors
from safetensors.torch import save_file
from torch import nn


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(0)
    return Mlp().eval()


@pytest.fixture
def make_adapter(tmp_path):
    """Writes an adapter folder; ``config`` and ``tensors`` change the plain one, ``None`` removes."""

    def make(
        name: str = "vqa",
        config: dict | None = None,
        tensors: dict[str, torch.Tensor | None] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(plain_config(**(config or {}))))
        content = plain_tensors() | (tensors or {})
        content = {key: tensor for key, tensor in content.items() if tensor is not None}
        save_file(content, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture
def assert_says():
    """Asserts that a message holds all parts: who, what, and a way out."""

    def check(error: BaseException, *parts: str) -> None:
        message = str(error)
        for part in (*parts, "Way out: "):
            assert part in message, f"{part!r} is not in: {message}"

    return check
