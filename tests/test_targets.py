import pytest

from nsc_fast.targets import matches, select_targets

LLAMA = [
    f"model.layers.{i}.{name}"
    for i in range(8)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]


def blocks(modules):
    return sorted({int(m.split(".")[2]) for m in modules})


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last_quarter", [6, 7]),
        ("last_1", [7]),
        ("last_3", [5, 6, 7]),
        ("last_99", list(range(8))),
        ("all", list(range(8))),
        ("2-4", [2, 3, 4]),
        ("5", [5]),
        ("6-31", [6, 7]),
    ],
)
def test_blocks_are_counted_in_the_stack(layers, expected):
    assert blocks(select_targets(LLAMA, layers=layers)) == expected


@pytest.mark.parametrize(
    ("count", "quarter"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (12, 3), (32, 8)]
)
def test_the_last_quarter_is_rounded_up(count, quarter):
    modules = [f"h.{i}.attn" for i in range(count)]
    assert select_targets(modules) == tuple(modules[-quarter:])


def test_the_default_is_all_adapted_modules_of_the_last_quarter_in_their_order():
    assert select_targets(LLAMA) == tuple(LLAMA[-6:])


@pytest.mark.parametrize("names", ["v_proj", ["v_proj"], ("v_proj", "absent"), "self_attn.v_proj"])
def test_the_papers_choice_is_one_name(names):
    expected = ("model.layers.6.self_attn.v_proj", "model.layers.7.self_attn.v_proj")
    assert select_targets(LLAMA, names=names) == expected


def test_names_are_compared_at_dots():
    assert matches("a.b.v_proj", "v_proj") and matches("v_proj", "v_proj") and matches("a.b.c", ["x", "b.c"])
    assert not matches("a.kv_proj", "v_proj") and not matches("a.v_proj.b", "v_proj")


def test_the_quarter_is_that_of_the_model_not_of_the_adapted_blocks():
    """Adapters in blocks 0 to 3 of 8: the last quarter of the model, 6 and 7, holds none of them."""
    adapted = [m for m in LLAMA if int(m.split(".")[2]) < 4]
    with pytest.raises(ValueError, match="selects blocks 6 to 7 of 'model.layers', where no chosen module"):
        select_targets(adapted, all_modules=LLAMA)
    assert blocks(select_targets(adapted)) == [3]


def test_a_range_counts_in_every_list_of_blocks():
    vision = [f"vision.blocks.{i}.qkv" for i in range(12)]
    both = vision + LLAMA
    assert select_targets(both, all_modules=both) == (*vision[-3:], *LLAMA[-6:])
    assert select_targets(both, names="qkv") == tuple(vision[-3:])
    assert select_targets(both, layers="last_1") == (vision[-1], *LLAMA[-3:])
    assert select_targets(both, layers="8-31") == tuple(vision[-4:])
    with pytest.raises(
        ValueError, match="'vision.blocks' has blocks 0 to 11, 'model.layers' has blocks 0 to 7"
    ):
        select_targets(both, layers="12-13")


def test_experts_of_a_mixture_are_no_targets():
    experts = [f"model.layers.{i}.mlp.experts.{j}.w1" for i in range(2) for j in range(3)]
    attention = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert select_targets(attention + experts) == (attention[1],)
    with pytest.raises(ValueError, match="the only modules to look at are experts"):
        select_targets(attention + experts, names="w1")


def test_modules_outside_blocks_count_with_all_only():
    modules = [*LLAMA, "score"]
    assert "score" in select_targets(modules, layers="all")
    assert "score" not in select_targets(modules)
    with pytest.raises(ValueError, match="stand in no numbered blocks; use layers='all'"):
        select_targets(["score"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"names": "w_proj"},
            "no adapted module ends in 'w_proj'; the adapters adapt down_proj, q_proj, v_proj",
        ),
        ({"layers": "40-50"}, "selects blocks 40 to 50 .* has blocks 0 to 7"),
        ({"layers": "5-3"}, "selects blocks 5 to 3"),
        ({"layers": "last_0"}, "where no chosen module is adapted"),
        ({"layers": "the end"}, "layers='the end': use 'last_quarter', 'last_N', 'all', or a range"),
        ({"layers": "1-2-3"}, "layers='1-2-3': use"),
    ],
)
def test_a_choice_that_matches_nothing_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        select_targets(LLAMA, **options)
