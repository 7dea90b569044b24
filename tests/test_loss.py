import copy
import math

import pytest
import torch
from compare import assert_same, error
from tiny import (
    Mlp,
    eager_loss,
    linear_names,
    module_inputs,
    random_adapters,
    random_factors,
    tiny_llama,
    token_batch,
)
from torch import nn
from torch.func import functional_call

from nsc_fast import reference
from nsc_fast.loss import NSCLoss

# The row bases are kept in float32.
FLOAT32 = 1e-6


def downs(**tasks):
    """Task -> module -> A, from task=(("module", rank), ...)."""
    return {t: {m: random_factors(r, 10, 1)[0] for m, r in modules} for t, modules in tasks.items()}


@pytest.fixture
def a():
    """Two tasks; "one" adapts three modules, "two" a single one, with other ranks."""
    return downs(one=(("b.0.q", 2), ("b.0.v", 5), ("b.1.q", 3)), two=(("b.0.q", 4),))


@pytest.fixture
def nsc(a):
    return NSCLoss(a).double()


def tokens(*shape):
    return torch.randn(*shape, 10, dtype=torch.float64, requires_grad=True)


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


class TestTensors:
    def test_one_module(self, a, nsc):
        z = tokens(2, 4)
        loss = nsc(z, task="two")
        truth = reference.ratio_loss(z, a["two"]["b.0.q"])
        assert loss.shape == () and error(loss, truth) < FLOAT32
        assert error(gradient(loss, z)[0], gradient(truth, z)[0]) < FLOAT32

    def test_one_module_of_several_by_name(self, a, nsc):
        z = tokens(2, 4)
        assert error(nsc(z, task="one", module="b.0.v"), reference.ratio_loss(z, a["one"]["b.0.v"])) < FLOAT32
        with pytest.raises(ValueError, match="task 'one' adapts 3 modules: say which one with module="):
            nsc(z, task="one")

    def test_the_mean_over_modules(self, a, nsc):
        z = {m: tokens(2, 4) for m in a["one"]}
        loss = nsc(z, task="one")
        truth = sum(reference.ratio_loss(z[m], a["one"][m]) for m in z) / 3
        assert error(loss, truth) < FLOAT32
        for got, expected in zip(gradient(loss, *z.values()), gradient(truth, *z.values()), strict=True):
            assert error(got, expected) < FLOAT32

    def test_siblings_share_one_read_of_their_tensor(self, a, nsc, monkeypatch):
        shared, other = tokens(2, 4), tokens(2, 4)
        reads = []
        import nsc_fast.loss as module

        original = module.null_space_ratio
        monkeypatch.setattr(
            module, "null_space_ratio", lambda z, *args, **kw: reads.append(z) or original(z, *args, **kw)
        )
        z = {"b.0.q": shared, "b.1.q": other, "b.0.v": shared}
        loss = nsc(z, task="one")
        assert len(reads) == 2 and reads[0] is shared
        truth = sum(reference.ratio_loss(z[m], a["one"][m]) for m in z) / 3
        assert error(loss, truth) < FLOAT32
        for got, expected in zip(gradient(loss, shared, other), gradient(truth, shared, other), strict=True):
            assert error(got, expected) < FLOAT32

    def test_modules_of_other_tasks_are_left_out(self, a, nsc):
        z = {m: tokens(2, 4) for m in a["one"]}
        assert error(nsc(z, task="two"), reference.ratio_loss(z["b.0.q"], a["two"]["b.0.q"])) < FLOAT32

    def test_fewer_modules_than_adapted(self, a, nsc):
        z = tokens(2, 4)
        assert torch.equal(nsc({"b.0.v": z}, task="one"), nsc(z, task="one", module="b.0.v"))

    def test_names_as_peft_writes_them(self, a):
        renamed = {t: {f"base_model.model.{m}": x for m, x in own.items()} for t, own in a.items()}
        z = tokens(2, 4)
        expected = NSCLoss(a)(z, task="one", module="b.0.v")
        assert torch.equal(NSCLoss(renamed)(z, task="one", module="b.0.v"), expected)
        assert torch.equal(NSCLoss(a)({"base_model.model.b.0.v": z}, task="one"), expected)

    @pytest.mark.parametrize("shape", [(2, 4), (8,), (1, 8)])
    def test_a_mask_of_the_same_size(self, a, nsc, shape):
        z = tokens(*shape)
        mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])
        loss = nsc(z, task="two", mask=mask)
        truth = reference.ratio_loss(z.reshape(2, 4, 10), a["two"]["b.0.q"], mask)
        assert error(loss, truth) < FLOAT32
        assert error(gradient(loss, z)[0], gradient(truth, z)[0]) < FLOAT32

    def test_weights_of_tokens(self, a, nsc):
        z, weight = tokens(2, 4), torch.rand(2, 4)
        truth = reference.ratio_loss(z, a["two"]["b.0.q"], weight.double())
        assert error(nsc(z, task="two", mask=weight), truth) < FLOAT32

    def test_the_breakdown_adds_up(self, a, nsc):
        shared = tokens(2, 4)
        z = {"b.0.q": shared, "b.1.q": tokens(2, 4), "b.0.v": shared}
        loss = nsc(z, task="one")
        assert set(nsc.breakdown) == set(z)
        assert not any(v.requires_grad for v in nsc.breakdown.values())
        for m, value in nsc.breakdown.items():
            assert error(value, reference.ratio_loss(z[m], a["one"][m]).detach()) < FLOAT32
        assert_same("loss", torch.stack(list(nsc.breakdown.values())).mean(), loss)

    def test_the_scale_of_an_adapter_does_not_matter(self, a):
        z = tokens(2, 4)
        scaled = {t: {m: 300 * x for m, x in own.items()} for t, own in a.items()}
        assert NSCLoss(scaled)(z, task="two").item() == pytest.approx(
            NSCLoss(a)(z, task="two").item(), rel=1e-6
        )

    def test_a_zero_adapter_counts_with_one(self):
        nsc = NSCLoss({"t": {"q": torch.zeros(2, 10), "v": random_factors(3, 10, 1)[0]}})
        z = tokens(600)
        nsc({"q": z, "v": z}, task="t").backward()
        assert nsc.breakdown["q"] == 1 and nsc.breakdown["v"] < 1
        assert z.grad.isfinite().all()


class TestAsAModule:
    def test_state_dict_round_trip(self, a, nsc):
        other = NSCLoss(downs(one=(("b.0.q", 2), ("b.0.v", 5), ("b.1.q", 3)), two=(("b.0.q", 4),))).double()
        z = tokens(2, 4)
        assert not torch.equal(other(z, task="two"), nsc(z, task="two"))
        other.load_state_dict(nsc.state_dict())
        assert torch.equal(other(z, task="two"), nsc(z, task="two"))
        assert len(nsc.state_dict()) == 4 and not list(nsc.parameters())

    def test_deepcopy(self, nsc):
        z = tokens(2, 4)
        expected = nsc(z, task="two")
        twin = copy.deepcopy(nsc)
        for buffer in nsc.buffers():
            buffer.zero_()
        assert torch.equal(twin(z, task="two"), expected)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
    )
    def test_to_another_dtype(self, a, dtype, tolerance):
        nsc = NSCLoss(a).to(dtype)
        assert {b.dtype for b in nsc.buffers()} == {dtype}
        z = tokens(5)
        half = z.detach().to(dtype).requires_grad_()
        loss = nsc(half, task="two")
        loss.backward()
        truth = reference.ratio_loss(z, a["two"]["b.0.q"])
        assert error(loss, truth) < tolerance
        assert half.grad.dtype == dtype and error(half.grad, gradient(truth, z)[0]) < 3 * tolerance

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_activations_of_another_dtype_than_the_bases(self, a, dtype):
        nsc = NSCLoss(a)
        z = tokens(5).detach().to(dtype).requires_grad_()
        loss = nsc(z, task="two")
        truth = reference.ratio_loss(z.detach().double(), a["two"]["b.0.q"])
        assert error(loss.detach(), truth) < FLOAT32
        loss.backward()
        assert z.grad.dtype == dtype

    def test_autocast_keeps_the_loss_in_float32(self, a):
        nsc = NSCLoss(a)
        z = tokens(5).detach().float()
        expected = nsc(z, task="two")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nsc(z, task="two")
        assert loss.dtype == torch.float32 and torch.equal(loss, expected)

    def test_it_says_what_it_holds(self, nsc):
        assert "one: 3 modules, two: 1 modules" in repr(nsc)


class TestErrors:
    @pytest.mark.parametrize("empty", [{}, {"one": {}}])
    def test_nothing_to_do(self, empty):
        with pytest.raises(ValueError, match="at least one task with one down projection"):
            NSCLoss(empty)

    def test_a_projection_that_is_not_finite_is_named(self, a):
        a["two"]["b.0.q"][0, 0] = math.nan
        with pytest.raises(ValueError, match="task 'two', module 'b.0.q': the down projection holds NaN"):
            NSCLoss(a)

    def test_an_unknown_task(self, nsc):
        with pytest.raises(KeyError, match="unknown task 'three'; this NSCLoss knows one, two"):
            nsc(tokens(3), task="three")
        with pytest.raises(KeyError, match="unknown task 'three'"), nsc.watch(Mlp(), "three"):
            pass

    def test_an_unknown_module(self, nsc):
        with pytest.raises(KeyError, match="unknown module 'b.9.q'; the tasks adapt b.0.q, b.0.v, b.1.q"):
            nsc({"b.9.q": tokens(3)}, task="one")

    def test_no_module_of_the_task(self, nsc):
        with pytest.raises(
            ValueError, match="none of the activations belongs to a module of task 'two': b.0.q"
        ):
            nsc({"b.0.v": tokens(3)}, task="two")

    @pytest.mark.parametrize(
        ("z", "mask", "message"),
        [
            (torch.ones(2, 3, 9), None, r"z has shape \(2, 3, 9\) and the basis \(4, 10\)"),
            (torch.ones(2, 3, 10), torch.zeros(2, 3), ".*empty or fully masked"),
            (torch.ones(0, 10), None, ".*empty or fully masked"),
            (
                torch.ones(2, 3, 10),
                torch.ones(2, 4),
                r"the mask has shape \(2, 4\) and the activations \(2, 3, 10\)",
            ),
        ],
    )
    def test_bad_activations_name_task_and_module(self, nsc, z, mask, message):
        with pytest.raises(ValueError, match=f"task 'two', module 'b.0.q': {message}"):
            nsc(z, task="two", mask=mask)


MODULES = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
]


def eager_watch(model, batch, a):
    """Loss of what pre-hooks see, by the textbook; differentiable in the model's parameters."""
    seen = module_inputs(model, a, batch)
    parts = {m: reference.ratio_loss(seen[m], x, batch["attention_mask"]) for m, x in a.items()}
    return sum(parts.values()) / len(parts), parts


class TestWatch:
    @pytest.fixture
    def model(self):
        return tiny_llama(blocks=2)

    @pytest.fixture
    def a(self, model):
        return {m: f[0] for m, f in random_adapters(model, MODULES, {"vqa": 3})["vqa"].items()}

    @pytest.fixture
    def batch(self):
        return token_batch(2, 6, seed=0, padding=2)

    def hooks(self, model):
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_loss_breakdown_and_gradients_of_a_plain_model(self, model, a, batch, checkpointing):
        truth, parts = eager_watch(model, batch, a)
        weight = model.get_input_embeddings().weight
        expected = gradient(truth, weight)[0]
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            model.train()
        hooks = self.hooks(model)
        nsc = NSCLoss({"vqa": a}).double()
        with nsc.watch(model, "vqa", mask=batch["attention_mask"]) as seen:
            model(**batch)
        assert self.hooks(model) == hooks
        assert error(seen.loss, truth) < FLOAT32
        assert set(seen.breakdown) == set(a)
        assert all(error(seen.breakdown[m], parts[m].detach()) < FLOAT32 for m in a)
        assert error(gradient(seen.loss, weight)[0], expected) < 10 * FLOAT32

    def test_it_is_the_loss_of_the_collected_activations(self, model, a, batch):
        collected = {}
        for m in a:
            model.get_submodule(m).register_forward_pre_hook(
                lambda _, args, m=m: collected.__setitem__(m, args[0])
            )
        nsc = NSCLoss({"vqa": a})
        with nsc.watch(model, "vqa", mask=batch["attention_mask"]) as seen:
            model(**batch)
        assert torch.equal(seen.loss, nsc(collected, task="vqa", mask=batch["attention_mask"]))
        # q and v receive one tensor.
        assert collected[MODULES[0]] is collected[MODULES[1]]

    def test_a_module_called_with_keywords(self):
        class Keywords(Mlp):
            def forward(self, x):
                return self.head(input=x)

        model = Keywords(10)
        nsc = NSCLoss({"t": {"head": random_factors(2, 10, 1)[0]}})
        x = torch.randn(3, 10)
        with nsc.watch(model, "t") as seen:
            model(x)
        assert torch.equal(seen.loss, nsc(x, task="t"))

    def test_a_module_that_runs_several_times_counts_with_the_mean_of_its_calls(self):
        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.shared, self.last = nn.Linear(10, 10).double(), nn.Linear(10, 4).double()

            def forward(self, x):
                for _ in range(3):
                    x = torch.tanh(self.shared(x))
                return self.last(x)

        model = Shared()
        a = {m: random_factors(2, 10, 1)[0] for m in ("shared", "last")}
        inputs = {"shared": [], "last": []}
        for m in inputs:
            model.get_submodule(m).register_forward_pre_hook(lambda _, args, m=m: inputs[m].append(args[0]))
        nsc = NSCLoss({"t": a}).double()
        with nsc.watch(model, "t") as seen:
            model(torch.randn(5, 10, dtype=torch.float64))
        per_module = [sum(reference.ratio_loss(z, a[m]) for z in zs) / len(zs) for m, zs in inputs.items()]
        truth = sum(per_module) / 2
        assert len(inputs["shared"]) == 3 and error(seen.loss, truth) < FLOAT32
        assert error(seen.breakdown["shared"], per_module[0].detach()) < FLOAT32
        weight = model.shared.weight
        assert error(gradient(seen.loss, weight)[0], gradient(truth, weight)[0]) < 10 * FLOAT32

    def test_two_forward_passes_of_one_task(self, model, a, batch):
        nsc = NSCLoss({"vqa": a})
        other = {**batch, "input_ids": batch["input_ids"].flip(0)}
        losses = []
        for b in (batch, other):
            with nsc.watch(model, "vqa", mask=batch["attention_mask"]) as seen:
                model(**b)
            losses.append(seen.loss)
        with nsc.watch(model, "vqa", mask=batch["attention_mask"]) as seen:
            model(**batch)
            model(**other)
        torch.testing.assert_close(seen.loss, (losses[0] + losses[1]) / 2)

    def test_a_module_that_does_not_run(self, a, batch, model):
        nsc = NSCLoss({"vqa": a})
        with pytest.raises(
            ValueError, match="'model.layers.1.self_attn.q_proj' of task 'vqa' did not run inside"
        ):
            with nsc.watch(model, "vqa"):
                pass
        assert self.hooks(model) == 0

    def test_a_module_that_the_model_does_not_have(self, a):
        model = tiny_llama(blocks=1)
        with pytest.raises(
            KeyError, match="LlamaForCausalLM has no module 'model.layers.1.self_attn.q_proj' of task"
        ):
            with NSCLoss({"vqa": a}).watch(model, "vqa"):
                pass
        assert self.hooks(model) == 0

    def test_a_wrapped_model_is_told_apart(self, a):
        wrapped = torch.compile(tiny_llama(blocks=2))
        with pytest.raises(KeyError, match="OptimizedModule has no module .*, but its _orig_mod may"):
            with NSCLoss({"vqa": a}).watch(wrapped, "vqa"):
                pass

    def test_an_error_inside_is_passed_on_and_no_hook_stays(self, model, a):
        with pytest.raises(RuntimeError, match="out of memory"):
            with NSCLoss({"vqa": a}).watch(model, "vqa"):
                raise RuntimeError("out of memory")
        assert self.hooks(model) == 0


class TestPeft:
    """From folders, Adapter objects and live models; the same loss each time."""

    @pytest.fixture
    def peft_model(self):
        from peft import LoraConfig, get_peft_model

        base = tiny_llama(torch.float32, blocks=2)
        config = dict(target_modules=["q_proj", "v_proj"], lora_alpha=32, init_lora_weights=False)
        model = get_peft_model(base, LoraConfig(r=4, **config), adapter_name="vqa")
        model.add_adapter("ocr", LoraConfig(r=2, **config))
        return model.eval()

    @pytest.fixture
    def folders(self, peft_model, tmp_path):
        peft_model.save_pretrained(tmp_path)
        return {task: tmp_path / task for task in ("vqa", "ocr")}

    def activations(self, nsc, task):
        torch.manual_seed(5)
        return {m: torch.randn(2, 3, 32) for m in nsc.modules_of[task]}

    def test_a_live_model_has_the_weights_of_its_layers(self, peft_model):
        nsc = NSCLoss.from_peft_model(peft_model)
        assert nsc.tasks == ("vqa", "ocr")
        for task in nsc.tasks:
            z = self.activations(nsc, task)
            assert len(z) == 4
            loss = nsc(z, task=task)
            layers = {m: peft_model.base_model.model.get_submodule(m) for m in z}
            truth = sum(
                reference.ratio_loss(z[m].double(), x.lora_A[task].weight.detach().double())
                for m, x in layers.items()
            )
            assert error(loss, truth / 4) < FLOAT32

    @pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
    def test_folders(self, peft_model, folders, kind):
        nsc = NSCLoss.from_adapters({task: kind(path) for task, path in folders.items()})
        live = NSCLoss.from_peft_model(peft_model)
        for task in ("vqa", "ocr"):
            z = self.activations(nsc, task)
            assert torch.equal(nsc(z, task=task), live(z, task=task))

    def test_adapter_objects_and_a_choice_of_modules(self, peft_model, folders):
        from nsc_fast.adapters import read_adapter

        read = {task: read_adapter(path) for task, path in folders.items()}
        nsc = NSCLoss.from_adapters(read, modules="v_proj")
        assert nsc.modules_of["vqa"] == tuple(f"model.layers.{i}.self_attn.v_proj" for i in range(2))
        with pytest.raises(
            ValueError, match=r"task 'vqa' adapts no module named 'w_proj'; it adapts q_proj, v_proj"
        ):
            NSCLoss.from_peft_model(peft_model, modules="w_proj")
        with pytest.raises(ValueError, match="no task adapts a module named 'w_proj'"):
            NSCLoss.from_adapters(read, modules=["v_proj", "w_proj"])

    @pytest.mark.parametrize("inner", [False, True], ids=["PeftModel", "its base model"])
    def test_watching_a_live_model(self, peft_model, inner):
        """A loop over the tasks with the adapters merged by hand, for example."""
        batch = token_batch(2, 5, seed=0, padding=1)
        nsc = NSCLoss.from_peft_model(peft_model)
        watched = peft_model.base_model.model if inner else peft_model
        seen_by_hand = {}
        for m in nsc.modules_of["ocr"]:
            layer = peft_model.base_model.model.get_submodule(m)
            layer.register_forward_pre_hook(lambda _, args, m=m: seen_by_hand.__setitem__(m, args[0]))
        with nsc.watch(watched, "ocr", mask=batch["attention_mask"]) as seen:
            peft_model(**batch)
        assert torch.equal(seen.loss, nsc(seen_by_hand, task="ocr", mask=batch["attention_mask"]))
        peft_model.train()
        seen.loss.backward()
        assert any(
            p.grad is not None and p.grad.any() for n, p in peft_model.named_parameters() if "lora_B" in n
        )


def test_the_gradients_of_an_eager_merge_loop():
    """The drop-in use: a loop that forms W_merge itself under autograd, with this loss in it."""
    model = tiny_llama(blocks=2)
    names = linear_names(model, ("q_proj", "v_proj"))
    raw = random_adapters(model, names, {"one": 2, "two": 3})
    nsc = NSCLoss({t: {m: f[0] for m, f in own.items()} for t, own in raw.items()}).double()
    batch = token_batch(2, 5, seed=0, padding=1)
    lam = torch.full((2,), 0.4, dtype=torch.float64, requires_grad=True)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    for k, own in enumerate(raw.values()):
        for m, (a, b, s) in own.items():
            weights[f"{m}.weight"] = weights[f"{m}.weight"] + lam[k] * s * (b @ a)

    total = 0.0
    for task in raw:
        with nsc.watch(model, task, mask=batch["attention_mask"]) as seen:
            functional_call(model, weights, args=(), kwargs=batch)
        total = total + seen.loss / 2
    truth, _ = eager_loss(model, raw, {t: batch for t in raw}, names, lambda m, t: lam[list(raw).index(t)])
    assert error(total, truth) < FLOAT32
    assert error(gradient(total, lam)[0], gradient(truth, lam)[0]) < 10 * FLOAT32
