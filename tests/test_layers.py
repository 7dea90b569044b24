import copy
import gc
import weakref

import pytest
import torch
from compare import assert_same
from tiny import (
    MLP_MODULES,
    Mlp,
    canonical_adapters,
    linear_names,
    random_adapters,
    random_factors,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    token_batch,
)
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from nsc_fast.factors import canonical, stack
from nsc_fast.layers import MergedLinear, features, install, remove, stack_adapters

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Quantised(nn.Module):
    """Anything callable with in and out features: stores integers, computes with what they stand for."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = 0.01
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias
        self.calls = 0

    def dequantised(self) -> torch.Tensor:
        return self.codes.double() * self.scale

    def forward(self, x):
        self.calls += 1
        return nn.functional.linear(x, self.dequantised(), self.bias)


def linear(bias=True):
    return nn.Linear(6, 5, bias=bias).double()


def conv1d():
    layer = Conv1D(5, 6).double()
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "linear": linear,
    "linear without bias": lambda: linear(bias=False),
    "conv1d": conv1d,
    "quantised": lambda: Quantised(linear()),
}


def merged_weight(base, factors, coefficients):
    weight = base.dequantised() if isinstance(base, Quantised) else base.weight.detach()
    weight = weight.t() if isinstance(base, Conv1D) else weight
    for (a, b, s), c in zip(factors, coefficients, strict=True):
        weight = weight + c * s * (b @ a)
    return weight


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_and_its_gradients_are_those_of_the_merged_weight(kind):
    base = LAYERS[kind]()
    factors = [(*random_factors(r, 6, 5), s) for r, s in ((2, 1.0), (4, 0.5), (7, 2.0))]
    stacked = stack([(str(k), canonical(*f)) for k, f in enumerate(factors)])
    coefficients = torch.randn(3, dtype=torch.float64, requires_grad=True)
    # A quantised layer has no float64 weight from which to tell the dtype.
    layer = MergedLinear(base, stacked, lambda: coefficients, dtype=torch.float64)
    z = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    y = layer(z)
    truth = nn.functional.linear(z, merged_weight(base, factors, coefficients), base.bias)
    assert_same("y", y, truth)
    got = torch.autograd.grad(y, (z, coefficients), upstream)
    expected = torch.autograd.grad(truth, (z, coefficients), upstream)
    for name, g, e in zip(("dz", "dcoefficients"), got, expected, strict=True):
        assert_same(name, g, e)


@pytest.mark.parametrize("kind", LAYERS)
def test_coefficient_zero_is_the_base_layer_and_one_is_the_adapter(kind):
    base = LAYERS[kind]()
    a, b = random_factors(3, 6, 5)
    c = torch.zeros(1, dtype=torch.float64)
    layer = MergedLinear(base, stack([("t", canonical(a, b, 2.0))]), lambda: c, dtype=torch.float64)
    z = torch.randn(4, 6, dtype=torch.float64)
    assert_same("base", layer(z), base(z))
    c.fill_(1.0)
    assert_same("adapter", layer(z), base(z) + 2.0 * z @ a.t() @ b.t())


def test_parameters_of_the_base_layer_are_frozen():
    base = linear()
    c = torch.ones(1, dtype=torch.float64, requires_grad=True)
    layer = MergedLinear(base, stack([("t", canonical(*random_factors(2, 6, 5)))]), lambda: c)
    layer(torch.randn(3, 6, dtype=torch.float64)).sum().backward()
    assert base.weight.grad is None and base.bias.grad is None and c.grad is not None
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.weight is base.weight and layer.bias is base.bias


@pytest.mark.parametrize("how", ["pre-hook", "hook", "own forward"])
def test_a_base_layer_that_does_more_than_its_class_is_called(how):
    """Hooks that offload or rescale, for example, must run."""
    base = linear()
    c = torch.zeros(1, dtype=torch.float64)
    layer = MergedLinear(base, stack([("t", canonical(*random_factors(2, 6, 5)))]), lambda: c)
    z = torch.randn(3, 6, dtype=torch.float64)
    plain = base(z)
    if how == "pre-hook":
        base.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        plain = base(z)
    elif how == "hook":
        base.register_forward_hook(lambda module, args, out: out * 3)
        plain = plain * 3
    else:
        base.forward = lambda x: nn.Linear.forward(base, x) * 3
        plain = plain * 3
    assert_same("y", layer(z), plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factors_are_kept_in_float32_at_least(dtype):
    base = linear().to(dtype)
    layer = MergedLinear(base, stack([("t", canonical(*random_factors(2, 6, 5)))]), lambda: torch.ones(1))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.basis.dtype == layer.columns.dtype == expected
    assert layer(torch.randn(3, 6).to(dtype)).dtype == dtype


def test_only_linear_like_layers_have_features():
    assert features(nn.Linear(3, 2)) == (2, 3)
    assert features(Conv1D(2, 3)) == (2, 3)
    assert features(nn.LayerNorm(3)) is None


def test_a_compiled_layer_is_one_graph():
    base = linear().float()
    c = torch.ones(2, requires_grad=True)
    stacked = stack([(t, canonical(*random_factors(2, 6, 5))) for t in "ab"])
    layer = MergedLinear(base, stacked, lambda: c)
    z = torch.randn(4, 6, requires_grad=True)
    expected = torch.autograd.grad(layer(z).square().sum(), (z, c))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(z).square().sum(), (z, c))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.fixture
def mlp():
    return Mlp().double()


def mlp_adapters(mlp, modules=MLP_MODULES):
    raw = random_adapters(mlp, modules, {"one": 2, "two": 4, "three": 1})
    return raw, canonical_adapters(raw)


class TestInstallAndRemove:
    def test_the_very_same_objects_and_bits_come_back(self, mlp):
        before = dict(mlp.named_modules())
        keys = list(mlp.state_dict())
        x = torch.randn(3, 8, dtype=torch.float64)
        y = mlp(x)
        _, adapters = mlp_adapters(mlp)
        installation = install(mlp, adapters)
        assert installation.modules == MLP_MODULES
        assert all(isinstance(mlp.get_submodule(m), MergedLinear) for m in MLP_MODULES)
        assert not torch.equal(mlp(x), y)
        remove(mlp)
        after = dict(mlp.named_modules())
        assert list(after) == list(before) and all(after[n] is m for n, m in before.items())
        assert list(mlp.state_dict()) == keys
        assert torch.equal(mlp(x), y)

    def test_removing_from_a_plain_model_does_nothing(self, mlp):
        keys = list(mlp.state_dict())
        remove(mlp)
        assert list(mlp.state_dict()) == keys

    def test_it_can_be_installed_again(self, mlp):
        _, adapters = mlp_adapters(mlp)
        x = torch.randn(3, 8, dtype=torch.float64)
        install(mlp, adapters)
        first = mlp(x)
        remove(mlp)
        install(mlp, adapters)
        assert torch.equal(mlp(x), first)

    def test_nothing_of_the_installation_stays_alive(self, mlp):
        _, adapters = mlp_adapters(mlp)
        installation = install(mlp, adapters)
        layer = weakref.ref(mlp.get_submodule(MLP_MODULES[0]))
        remove(mlp)
        del installation
        gc.collect()
        assert layer() is None

    def test_the_model_is_frozen_and_only_the_coefficients_train(self, mlp):
        _, adapters = mlp_adapters(mlp)
        installation = install(mlp, adapters)
        mlp(torch.randn(3, 8, dtype=torch.float64)).sum().backward()
        assert not any(p.requires_grad for p in mlp.parameters())
        assert all(p.grad is not None for p in installation.coefficients.parameters())
        assert all(p.dtype == torch.float64 for p in installation.coefficients.parameters())

    def test_a_model_whose_layer_is_the_root_block_s_child(self):
        model = nn.Sequential(nn.Linear(6, 5)).double()
        base = model[0]
        raw = random_adapters(model, ["0"], {"t": 2})
        install(model, canonical_adapters(raw))
        assert isinstance(model[0], MergedLinear)
        remove(model)
        assert model[0] is base

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                lambda a: a["two"].__setitem__("blocks.7.up", a["two"]["blocks.0.up"]),
                ValueError,
                r"module 'blocks.7.up' of adapter 'two' does not exist in Mlp \(1 missing",
            ),
            (
                lambda a: a["three"].__setitem__("head", canonical(*random_factors(2, 9, 3))),
                ValueError,
                "module 'head' is 3 x 8 in the base model, the adapters' updates are 3 x 9",
            ),
            (
                lambda a: a["one"].__setitem__("blocks.0", canonical(*random_factors(2, 8, 8))),
                TypeError,
                r"module 'blocks.0' \(ModuleDict\) has no in/out features",
            ),
            (
                lambda a: a["two"].__setitem__("blocks.0.up", canonical(*random_factors(2, 8, 7))),
                ValueError,
                "differ in shape: {'one': .*, 'two': .*",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused_and_the_model_is_unchanged(self, mlp, change, error, message):
        _, adapters = mlp_adapters(mlp)
        change(adapters)
        before = dict(mlp.named_modules())
        with pytest.raises(error, match=message):
            install(mlp, adapters)
        assert all(m is before[n] for n, m in mlp.named_modules())
        assert all(p.requires_grad for p in mlp.parameters())

    def test_two_installations_at_once_are_refused(self, mlp):
        _, adapters = mlp_adapters(mlp)
        install(mlp, adapters)
        with pytest.raises(ValueError, match=r"already holds merged layers: call remove\(model\) first"):
            install(mlp, adapters)

    def test_a_target_must_be_adapted(self, mlp):
        _, adapters = mlp_adapters(mlp)
        with pytest.raises(ValueError, match="target module 'head' is adapted by no adapter"):
            install(mlp, adapters, targets=["head"])

    @pytest.mark.parametrize("preferences", [{"one": 1.0}, {"one": 1, "two": 1, "three": 1, "thre": 1}])
    def test_preferences_must_name_every_task(self, mlp, preferences):
        _, adapters = mlp_adapters(mlp)
        with pytest.raises(ValueError, match="preferences must name every task once; look at 'th?"):
            install(mlp, adapters, preferences=preferences)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_kernels_that_were_asked_for_and_cannot_run_are_refused_before(self, mlp, dtype, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        if dtype == torch.float32:
            monkeypatch.setattr("nsc_fast.ops.dispatch.MAX_RANK", 4)
        _, adapters = mlp_adapters(mlp.to(dtype))
        why = "a stacked rank of at most 4" if dtype == torch.float32 else "not float64"
        with pytest.raises(ValueError, match=rf"module '.*' \(\d+ ranks of all adapters, {dtype}\): .*{why}"):
            install(mlp, adapters, impl="triton")
        assert not any(isinstance(m, MergedLinear) for m in mlp.modules())

    def test_preferences_are_normalised(self, mlp):
        _, adapters = mlp_adapters(mlp)
        monitor = install(mlp, adapters, preferences={"three": 2.0, "one": 1.0, "two": 5.0}).monitor
        assert monitor.preferences == (0.125, 0.625, 0.25)


def group_value(installation, granularity, module, task):
    """The coefficient of a module and a task, read from the parameters themselves."""
    values = installation.coefficients.values
    tasks = installation.coefficients.tasks
    if granularity == "task":
        return values["all"][tasks.index(task)]
    if granularity == "layer":
        return values["blocks/" + module.split(".")[1]][tasks.index(task)]
    return values[module.replace(".", "/")][tasks.index(task)]


@pytest.mark.parametrize("granularity", ["task", "layer", "module"])
def test_every_granularity_has_the_gradients_of_the_merged_weights(mlp, granularity):
    raw, adapters = mlp_adapters(mlp)
    weights = {n: p.detach().clone() for n, p in mlp.named_parameters()}
    installation = install(mlp, adapters, granularity=granularity)
    parameters = list(installation.coefficients.parameters())
    with torch.no_grad():
        for p in parameters:
            p.uniform_(0.1, 0.9)
    x = torch.randn(5, 8, dtype=torch.float64)
    y = mlp(x)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, parameters, upstream)
    remove(mlp)
    for task, own in raw.items():
        for module, (a, b, s) in own.items():
            c = group_value(installation, granularity, module, task)
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + c * s * (b @ a)
    truth = functional_call(mlp, weights, (x,))
    assert_same("y", y, truth)
    for g, e in zip(got, torch.autograd.grad(truth, parameters, upstream), strict=True):
        assert_same("dcoefficients", g, e)


@pytest.mark.parametrize("granularity", ["rank", "core"])
def test_one_coefficient_a_singular_direction_or_a_core(mlp, granularity):
    raw, adapters = mlp_adapters(mlp)
    weights = {n: p.detach().clone() for n, p in mlp.named_parameters()}
    installation = install(mlp, adapters, granularity=granularity)
    parameters = list(installation.coefficients.parameters())
    with torch.no_grad():
        for p in parameters:
            p.uniform_(0.1, 0.9)
    x = torch.randn(5, 8, dtype=torch.float64)
    y = mlp(x)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, parameters, upstream)
    remove(mlp)
    for module, stacked in stack_adapters(adapters).items():
        c = installation.coefficients.of(module)
        core = c if granularity == "core" else c.diag()
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + stacked.columns @ core @ stacked.basis
    truth = functional_call(mlp, weights, (x,))
    assert_same("y", y, truth)
    for g, e in zip(got, torch.autograd.grad(truth, parameters, upstream), strict=True):
        assert_same("dcoefficients", g, e)


@pytest.mark.parametrize("granularity", ["task", "layer", "module", "rank", "core"])
def test_tasks_that_adapt_different_modules(mlp, granularity):
    modules = {"one": MLP_MODULES[:2], "two": MLP_MODULES[1:], "three": (MLP_MODULES[3],)}
    raw, adapters = mlp_adapters(mlp, modules)
    weights = {n: p.detach().clone() for n, p in mlp.named_parameters()}
    init = {"one": 0.3, "two": -0.7, "three": 1.1}
    installation = install(mlp, adapters, granularity=granularity, init=init)
    assert mlp.get_submodule(MLP_MODULES[3]).tasks == ("two", "three")
    x = torch.randn(5, 8, dtype=torch.float64)
    y = mlp(x)
    y.sum().backward()
    remove(mlp)
    for task, own in raw.items():
        for module, (a, b, s) in own.items():
            weights[f"{module}.weight"] += init[task] * s * (b @ a)
    assert_same("y", y, functional_call(mlp, weights, (x,)))
    table = installation.coefficients.table()
    assert table[MLP_MODULES[0]] == {"one": 0.3} and set(table[MLP_MODULES[1]]) == {"one", "two"}


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (tiny_llama, ("q_proj", "v_proj", "down_proj")),
        (tiny_bert, ("query", "dense")),
        (tiny_gpt2, ("c_attn", "c_proj", "c_fc")),
    ],
)
def test_real_architectures(make, ends):
    model = make(blocks=2)
    names = [n for n in linear_names(model, ends) if "pooler" not in n]
    raw = random_adapters(model, names, {"one": 2, "two": 3})
    batch = token_batch(2, 6, seed=0, padding=2)
    plain = copy.deepcopy(model)
    install(model, canonical_adapters(raw), init={"one": 0.6, "two": -0.3})
    got = model(**batch).logits
    with torch.no_grad():
        for (_, own), c in zip(raw.items(), (0.6, -0.3), strict=True):
            for name, (a, b, s) in own.items():
                module = plain.get_submodule(name)
                delta = c * s * (b @ a)
                module.weight += delta.t() if isinstance(module, Conv1D) else delta
    # Twenty nonlinear layers deep in float64.
    assert_same("logits", got, plain(**batch).logits, roundings=1e6)


def test_a_model_that_asks_a_layer_for_its_weight():
    """T5 reads the dtype of wo.weight."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, vocab_size=20)
    model = T5EncoderModel(config).eval()
    raw = random_adapters(model, linear_names(model, ("wo",)), {"t": 2})
    install(model, canonical_adapters(raw))
    assert model(input_ids=torch.ones(1, 3, dtype=torch.int64)).last_hidden_state.isfinite().all()
