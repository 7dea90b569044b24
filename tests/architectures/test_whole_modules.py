"""Modules that were trained whole beside the LoRA: merged as dense updates, or refused."""

import json

import pytest
import torch
from architecture_checks import (
    RANKS,
    check_reload,
    eager,
    leaves,
    merged_weights,
    outputs,
    second_step,
    train,
    with_weights,
)
from architecture_rows import ROWS

from nsc_fast import merge_adapters
from nsc_fast.adapters import AdapterError, dense_updates, read_adapter
from nsc_fast.dense import dense_applied
from nsc_fast.driver import target_modules
from nsc_fast.errors import MergeError
from nsc_fast.parameters import NSCParameters
from nsc_fast.verify import verify_output

pytest.importorskip("peft")

ROW = ROWS["llava"]
PROJECTOR = "model.multi_modal_projector"


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The model, the folders of two adapters with a projector of their own, and these read to be merged."""
    model = ROW.build()
    folder = tmp_path_factory.mktemp("llava")
    paths = train(model, ROW.adapted, folder, modules_to_save=["multi_modal_projector"])
    return model, paths, {t: read_adapter(p, name=t, modules_to_save="merge-dense") for t, p in paths.items()}


def with_projector(model, adapters, weights, coefficient) -> dict:
    """``W0 + sum_k c_k (W_k - W0)`` of every tensor of the projector, added to ``weights``."""
    out = dict(weights)
    for name, base in model.named_parameters():
        if name.startswith(PROJECTOR):
            deltas = (coefficient(t) * (a.dense[name].double() - base.detach()) for t, a in adapters.items())
            out[name] = base.detach() + sum(deltas)
    return out


def batches():
    return {task: ROW.inputs(i) for i, task in enumerate(RANKS)}


def test_the_gradient_flows_through_the_whole_modules(llava):
    model, _, adapters = llava
    updates = {task: adapter.canonical() for task, adapter in adapters.items()}
    targets = target_modules(model, updates, NSCParameters())
    expected = leaves(adapters["a"].modules)
    weights = merged_weights(model, adapters, expected)
    mean = {t: torch.stack([own[t] for own in expected.values()]).mean() for t in RANKS}
    weights = with_projector(model, adapters, weights, mean.get)
    loss = eager(model, weights, adapters, batches(), targets, ROW.masks)
    loss.backward()
    with dense_applied(model, dense_updates(adapters.values(), model), dict.fromkeys(RANKS, 0.4)):
        value, coefficients = second_step(model, updates, batches(), targets)
    assert value == pytest.approx(loss.item(), rel=1e-9)
    # The projector is the only thing behind the vision tower's last modules that depends on coefficients.
    for module, own in coefficients.values.items():
        wanted = torch.stack([expected[module.replace("/", ".")][t].grad for t in RANKS])
        torch.testing.assert_close(own.grad, wanted, rtol=1e-6, atol=1e-10)
    assert min(own.grad.abs().max() for own in coefficients.values.values()) > 1e-7


def test_a_merge_is_written_and_reloaded(llava, tmp_path):
    model, _, adapters = llava
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = {task: [batch] for task, batch in batches().items()}
    how = {"steps": 2, "learning_rate": 0.1}
    result = merge_adapters(model, adapters, data, parameters=how, base_name="llava")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    table = {m: dict(zip(result.stack_tasks[m], c, strict=True)) for m, c in result.coefficients.items()}
    mean = {t: torch.stack([own[t] for own in table.values()]).mean().item() for t in RANKS}
    assert result.dense.coefficients == pytest.approx(mean) and mean["a"] != mean["b"] != 0.4
    assert any("trained whole" in notice and "modules_to_save" in notice for notice in result.notices)
    result.save_pretrained(tmp_path / "out", dtype=torch.float64)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [f"{PROJECTOR}.linear_1", f"{PROJECTOR}.linear_2"]
    weights = with_projector(model, adapters, merged_weights(model, adapters, table), mean.get)
    merged = with_weights(model, weights)
    check_reload(ROW.build(), tmp_path / "out", merged, model, batches()["a"])
    single = tmp_path / "single"
    result.save_pretrained(single)
    for whole in (None, result.dense.tensors):
        checks = verify_output(
            single, result.updates, model, adapters=adapters, inputs=batches()["b"], whole=whole
        )
        assert [c for c in checks if not c.passed] == []
    other = {path: tensor + 0.1 for path, tensor in result.dense.tensors.items()}
    failed = verify_output(single, result.updates, model, inputs=batches()["b"], whole=other)
    assert [c.name for c in failed if not c.passed] == ["weights", "reload"]


def test_one_adapter_with_coefficient_one_gives_itself_back(llava, tmp_path):
    from peft import PeftModel

    model, paths, adapters = llava
    result = merge_adapters(
        model,
        {"a": adapters["a"]},
        method="task_arithmetic",
        weights={"a": 1.0},
        base_name="llava",
    )
    result.save_pretrained(tmp_path / "out", dtype=torch.float64)
    alone = PeftModel.from_pretrained(ROW.build(), str(paths["a"])).eval()
    check_reload(ROW.build(), tmp_path / "out", alone, model, batches()["a"])


def test_a_task_without_the_module_adds_nothing_to_it(llava):
    model, paths, adapters = llava
    mixed = {"a": adapters["a"], "b": read_adapter(paths["b"], name="b", modules_to_save="drop")}
    result = merge_adapters(model, mixed, method="task_arithmetic", weights={"a": 0.3}, base_name="llava")
    assert result.dense.coefficients == pytest.approx({"a": 0.3})
    weights = with_projector(model, {"a": adapters["a"]}, {}, lambda task: 0.3)
    assert set(result.dense.tensors) == set(weights)
    for name, tensor in result.dense.tensors.items():
        torch.testing.assert_close(tensor, weights[name])


def test_without_a_choice_they_are_refused_with_all_of_them(llava):
    _, paths, _ = llava
    with pytest.raises(AdapterError) as error:
        read_adapter(paths["a"])
    for text in ("modules_to_save = multi_modal_projector", "keep-separate", "drop", "merge-dense"):
        assert text in str(error.value)


@pytest.mark.parametrize("method", ["ties", "tsv"])
def test_a_method_without_coefficients_is_refused(llava, method):
    model, _, adapters = llava
    with pytest.raises(MergeError, match=f"method '{method}' has no coefficients.*multi_modal_projector"):
        merge_adapters(model, adapters, method=method, base_name="llava")


@pytest.mark.parametrize("method", ["auto", "anchored"])
def test_cores_are_refused_before_the_long_part(llava, method, monkeypatch):
    model, _, adapters = llava
    data = {task: [ROW.inputs(i)] for i, task in enumerate(adapters)}
    told = f"method '{method}'.* has no coefficients.*multi_modal_projector"
    with monkeypatch.context() as patch, pytest.raises(MergeError, match=told):
        patch.setattr("nsc_fast.objectives.anchors.StatesRunner.run", lambda *_: pytest.fail("it ran"))
        merge_adapters(model, adapters, data, method=method, base_name="llava")
    how = {"granularity": "module", "steps": 1}
    result = merge_adapters(model, adapters, data, method="anchored", parameters=how, base_name="llava")
    assert result.dense is not None


def test_without_the_base_there_is_no_difference(llava):
    with pytest.raises(AdapterError, match="adapter 'a': modules_to_save = merge-dense.*give the base model"):
        merge_adapters(None, llava[2], method="task_arithmetic", base_name="llava")


@pytest.mark.parametrize(
    ("row", "saved", "module"),
    [
        ("bert", "classifier", "'classifier' of modules_to_save: is a head"),
        ("llama", "lm_head", "'lm_head' of modules_to_save: is a head"),
        ("vit", "classifier", "'classifier' of modules_to_save: is a head"),
    ],
)
def test_heads_are_refused_by_name(row, saved, module, tmp_path):
    model = ROWS[row].build()
    paths = train(model, ROWS[row].adapted, tmp_path, modules_to_save=[saved])
    adapters = {t: read_adapter(p, name=t, modules_to_save="merge-dense") for t, p in paths.items()}
    with pytest.raises(AdapterError, match=f"adapter 'a': .*{module}.*keep-separate"):
        merge_adapters(model, adapters, method="task_arithmetic", base_name=row)


class Net(torch.nn.Module):
    """Two linear layers, a norm, a bridge that may be of any width, and an embedding tied to the output."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = torch.nn.Embedding(9, 6)
        self.up = torch.nn.Linear(6, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.bridge = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Linear(width, 6))
        self.out = torch.nn.Linear(6, 9, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids):
        return self.out(self.bridge(self.norm(self.up(self.words(ids)))))


def test_any_parameter_can_be_merged(tmp_path):
    """A norm, which is no linear layer, and a container."""
    model = Net().double()
    paths = train(model, ["up"], tmp_path, modules_to_save=["norm", "bridge"])
    adapters = {t: read_adapter(p, name=t, modules_to_save="merge-dense") for t, p in paths.items()}
    result = merge_adapters(
        model, adapters, method="task_arithmetic", weights={"a": 0.7, "b": 0.2}, base_name="net"
    )
    result.save_pretrained(tmp_path / "out", dtype=torch.float64)
    weights = merged_weights(model, adapters, {"up": {"a": 0.7, "b": 0.2}})
    for name, base in model.named_parameters():
        if name.startswith(("norm", "bridge")):
            base = base.detach()
            weights[name] = base + 0.7 * (adapters["a"].dense[name] - base)
            weights[name] += 0.2 * (adapters["b"].dense[name] - base)
    batch = {"ids": torch.arange(9)[None]}
    merged = with_weights(model, {k: v for k, v in weights.items() if k != "out.weight"})
    check_reload(Net().double(), tmp_path / "out", merged, model, batch)
    assert outputs(merged, batch)[0].shape == (1, 9, 9)


@pytest.mark.parametrize(
    ("saved", "base", "message"),
    [
        (
            "bridge",
            Net(5),
            r"'bridge.0' of modules_to_save: has another shape: 'bridge.0.bias' is \(4,\), in",
        ),
        ("words", Net(), "'words' of modules_to_save: shares 'words.weight' with 'out.weight'"),
        ("norm", torch.nn.Sequential(), "tensor 'norm.bias'.*: is no parameter of the base"),
    ],
)
def test_what_has_no_difference_to_the_base_is_refused(saved, base, message, tmp_path):
    paths = train(Net(), ["up"], tmp_path, modules_to_save=[saved])
    adapters = [read_adapter(p, name=t, modules_to_save="merge-dense") for t, p in paths.items()]
    with pytest.raises(AdapterError, match=message):
        dense_updates(adapters, base)


def test_a_module_is_either_trained_whole_or_adapted(tmp_path):
    whole = train(Net(), ["up"], tmp_path / "whole", modules_to_save=["bridge"])["a"]
    lora = train(Net(), ["up", "bridge.0"], tmp_path / "lora")["b"]
    adapters = [read_adapter(whole, name="a", modules_to_save="merge-dense"), read_adapter(lora, name="b")]
    with pytest.raises(AdapterError, match="'bridge.0' of modules_to_save: is adapted by LoRA as well"):
        dense_updates(adapters, Net())
