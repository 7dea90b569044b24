"""The recipe: read, validated, and refused by name."""

import pytest

from nsc_fast.errors import RecipeError
from nsc_fast.recipe import load_recipe, make_recipe

MINIMAL = {"adapters": [{"name": "one", "path": "a0"}]}


def test_the_example_is_read_with_paths_from_its_own_folder(workshop):
    recipe = load_recipe(workshop / "recipe.yaml")
    assert [a.name for a in recipe.adapters] == ["one", "two", "three"]
    assert recipe.adapters[0].path == str(workshop / "a0")
    assert recipe.base_model.path == str(workshop / "base")
    assert recipe.adapters[2].data.path == str(workshop / "d2.jsonl")


def test_a_float_that_yaml_reads_as_text_is_a_number(workshop):
    parameters = load_recipe(workshop / "recipe.yaml").method_parameters()
    assert parameters.learning_rate == 0.01 and parameters.steps == 6


def test_hub_ids_stay_as_they_are():
    content = {"base_model": "org/base", "adapters": [{"name": "one", "path": "org/one-lora"}]}
    recipe = make_recipe(content, where="here")
    assert (recipe.base_model.path, recipe.adapters[0].path) == ("org/base", "org/one-lora")


def test_environment_variables_are_expanded_in_paths(monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("ADAPTERS", str(tmp_path))
    recipe = make_recipe({"adapters": [{"name": "one", "path": "$ADAPTERS/mine"}]}, where="here")
    assert recipe.adapters[0].path == str(tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_metod": "nsc"}, "merge_metod: unknown key"),
        ({"adapters": []}, "adapters: give at least 1"),
        ({"adapters": [{"name": "one"}]}, "adapters.0.path"),
        ({"adapters": [{"name": "", "path": "a"}]}, "adapters.0.name"),
        (
            {"adapters": [{"name": "x", "path": "a"}, {"name": "x", "path": "b"}]},
            "two adapters are named 'x'",
        ),
        ({"merge_method": "ncs"}, "did you mean 'nsc'"),
        ({"parameters": {"stepz": 3}}, "stepz: unknown key"),
        ({"parameters": {"steps": 0}}, "steps"),
        ({"parameters": {"preferences": {"one": -1}}}, "preferences"),
        ({"output": {"dtype": "int8"}}, "output.dtype"),
        ({"output": {"max_rank": 0}}, "output.max_rank"),
        ({"output": {"kind": "gguf"}}, "output.kind"),
        ({"output": {"dtype": "auto"}}, "output: dtype auto is that of the base's files: for kind full"),
        ({"output": {"shard_size": "1GB"}}, "output: shard_size is for kind full"),
        (
            {"base_model": {"path": "b", "shard": True, "device_map": "auto"}},
            "base_model: shard and device_map",
        ),
        ({"adapters": [{"name": "one", "path": "a", "data": {"path": "d", "labels": "y"}}]}, "data.labels"),
    ],
)
def test_a_mistake_is_named(change, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe({**MINIMAL, **change}, where="here")


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("adapters: [")
    with pytest.raises(RecipeError, match="broken.yaml: not a readable YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- one\n")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(tmp_path / "list.yaml")


def test_a_recipe_is_frozen(workshop):
    recipe = load_recipe(workshop / "recipe.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
