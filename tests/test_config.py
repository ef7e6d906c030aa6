"""Recipes: unknown keys, wrong types and contradictions are errors that name the key and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatloss.config import FREE, Recipe, differences
from chatloss.errors import RecipeError

FULL = """
objective = "sft"
model = "models/tiny"
init = "pretrained"
tokenizer = "models/tiny"
output = "runs/a"
seed = 4
[data]
train = ["a.jsonl", "b.jsonl"]
eval = "c.jsonl"
row_format = "per_turn"
max_length = 2048
turns = "last"
template_kwargs = {enable_thinking = false}
[loss]
reduction = "turn"
weight_norm = "weights"
[batch]
tokens = 4000
micro_rows = 2
packing = "none"
[optim]
name = "sgd"
lr = 1e-3
schedule = "wsd"
warmup = 10
weight_decay = 0.1
max_grad_norm = 0
betas = [0.9, 0.95]
[run]
epochs = 2
dtype = "bfloat16"
save_every = 10
eval_every = 5
log = ["tensorboard"]
[lora]
rank = 8
"""


def test_every_key_of_the_contract_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(FULL)
    recipe = Recipe.load(path, ["optim.lr=0.5", "run.log=wandb", "data.train=x.jsonl", "loss.reduction=dr-grpo:10"])
    assert recipe.data.train == ("x.jsonl",)
    assert recipe.data.eval == ("c.jsonl",)
    assert recipe.data.policy == {"row_format": "per_turn", "max_length": 2048, "turns": "last"}
    assert recipe.data.template_kwargs == {"enable_thinking": False}
    assert (recipe.optim.lr, recipe.optim.max_grad_norm, recipe.optim.betas) == (0.5, 0.0, (0.9, 0.95))
    assert recipe.run.log == ("wandb",)
    assert recipe.loss.reduction == "dr-grpo:10"
    assert recipe.lora is not None
    assert recipe.lora.rank == 8
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()


@pytest.mark.parametrize(
    ("values", "settings", "where", "hint"),
    [({"modle": "x"}, [], "modle", "did you mean 'model'?"),
     ({"optim": {"learning_rte": 1}}, [], "optim.learning_rte", "one of name, lr"),
     ({"optim": {"schedul": "cosine"}}, [], "optim.schedul", "did you mean 'schedule'?"),
     ({"data": {"max_lenght": 5}}, [], "data.max_lenght", "did you mean 'max_length'?"),
     ({}, ["batch.exampels=3"], "batch.exampels", "did you mean 'examples'?"),
     ({}, ["seed"], "", "section.key=value"),
     ({"seed": 1}, ["seed.x=1"], "seed.x", "section.key=value"),
     ({"batch": {"examples": 2, "tokens": 3}}, [], "batch.examples", "set one of them"),
     ({"batch": {"micro_rows": 2, "micro_tokens": 3}}, [], "batch.micro_tokens", "set one of them"),
     ({"run": {"steps": 2, "epochs": 3}}, [], "run.steps", "set one of them")],
)
def test_a_mistake_is_named_with_its_key_and_a_remedy(
    values: dict[str, Any], settings: list[str], where: str, hint: str
) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict(values, settings)
    assert error.value.where == where
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("setting", "what"),
    [("run.parallel=tp", "'tp' is not known"), ("seed=1.5", "1.5 is not a whole number"), ("seed=true", "True is not a whole number"),
     ("optim.lr=fast", "'fast' is not a number"), ("optim.lr=nan", "nan is not a number"),
     ("init=zero", "'zero' is not one of 'pretrained', 'random'"), ("optim=3", "3 is not a table"),
     ("run.gradient_checkpointing=1", "1 is not true or false"), ("batch.examples=0", "0 is not positive"),
     ("optim.lr=-1", "-1.0 is negative"), ("optim.betas=[0.9]", "betas are two numbers"),
     ("run.keep=0", "at least one checkpoint"), ("lora.rank=0", "at least 1"), ("data.train=[1]", "1 is not a string"),
     ("batch.packing=bfd", "'bfd' is not one of 'best_fit', 'none'")],
)
def test_a_wrong_value_is_named(setting: str, what: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict({}, [setting])
    assert what in error.value.what
    assert error.value.where == setting.split("=")[0]


def test_an_unreadable_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        Recipe.load(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("seed = = 3")
    with pytest.raises(RecipeError, match="not valid TOML"):
        Recipe.load(tmp_path / "bad.toml")
    (tmp_path / "key.toml").write_text("sed = 3")
    with pytest.raises(RecipeError) as error:
        Recipe.load(tmp_path / "key.toml")
    assert error.value.where == f"{tmp_path / 'key.toml'} sed"


def test_differences_are_those_that_change_what_is_trained() -> None:
    old = Recipe.from_dict({"model": "m", "output": "a"}).to_dict()
    same = Recipe.from_dict({"model": "m", "output": "b", "run": {"save_every": 3, "log": ["wandb"]}}).to_dict()
    assert differences(old, same) == []
    other = Recipe.from_dict({"model": "m", "optim": {"lr": 1.0}, "data": {"turns": "last"}}).to_dict()
    assert differences(old, other) == ["data.policy.turns: None -> 'last'", "optim.lr: 1e-05 -> 1.0"]


def test_what_may_change_exists() -> None:
    plain = Recipe().to_dict()
    for key in FREE:
        section, _, name = key.rpartition(".")
        assert name in (plain[section] if section else plain)
