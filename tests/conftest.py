"""What all tests share: no network, repeatable random examples, few threads, no GPU where there is none."""

import os

# Before transformers or huggingface_hub is imported anywhere: no test needs the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    # The tensors are tiny: threads only get into each other's way.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def large(monkeypatch):
    """What plain torch does with large inputs, in small: products by tiles, results in used memory of NaN."""
    from nsc_fast.ops import buffers, torch_steps

    monkeypatch.setattr(torch_steps, "_TILE_WORK", 0)
    monkeypatch.setattr(torch_steps, "_LAYOUT_ROWS", 0)
    monkeypatch.setattr(torch_steps, "_TILE_TERMS", range(1000))
    monkeypatch.setattr(torch_steps, "_TILE_LEAST_ROWS", 0)
    monkeypatch.setattr(buffers, "_SMALLEST_BYTES", 1)
    aligned = buffers._aligned
    monkeypatch.setattr(buffers, "_aligned", lambda size: _filled(aligned(size)))
    kept = buffers._take_back
    monkeypatch.setattr(buffers, "_take_back", lambda memory: kept(_filled(memory)))
    buffers.release()
    yield
    buffers.release()


def _filled(memory):
    # All ones: NaN in every floating dtype.
    memory[...] = 255
    return memory


@pytest.fixture
def poisoned_memory():
    """Fresh memory holds NaN: a value that nobody writes shows at once."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all() and torch.ones(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
