"""The recipe: read, checked whole, changed by `--set`, written and read back equal."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import RecipeError
from shoal.recipe import (
    METRICS,
    SIGNATURES,
    Component,
    DataSpec,
    Recipe,
    SourceSpec,
    StopSpec,
    Transform,
    load_recipe,
)
from shoal.units import Duration

RECIPES = Path(__file__).parents[3] / "recipes"

MINIMAL: dict[str, Any] = {
    "name": "small",
    "batch_size": 8,
    "steps": 5,
    "model": "resnet",
    "data": {"train": "digits:train"},
    "objective": "cross_entropy",
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def minimal(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(MINIMAL), **changes}


def wrong(**changes: Any) -> dict[str, str]:
    """The problems of a recipe with these changes: path → message."""
    with pytest.raises(RecipeError) as caught:
        Recipe(**minimal(**changes))
    return {problem.path: problem.message for problem in caught.value.problems}


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


CONTRACT = """\
name: digits
seed: 0
batch_size: 128                     # global, whatever the strategy
epochs: 20
precision: auto
normalize_over: batch
model: {name: resnet, depth: 18, conv: depthwise_separable, input_downscale: 1, classes: 10}
data: {train: "digits:train", evaluate: "digits:test", on_bad_example: raise, ledger: false}
objective: {name: cross_entropy, label_smoothing: 0.1}
optimizer: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 5e-4, no_decay: [bias, norm]}
schedule: {name: cosine, warmup: 0.05}
evaluate: {every: 1 epoch, metrics: [accuracy]}
checkpoint: {every: 10min, keep: 3}
stop: {metric: loss, patience: 5 epochs}
strategy: dp2
"""


def test_the_contracts_example_reads_as_it_says(tmp_path: Path) -> None:
    file = load_recipe(written(tmp_path, CONTRACT))
    recipe = file.recipe
    assert file.strategy_default == "dp2"
    assert (recipe.batch_size, recipe.epochs, recipe.steps) == (128, 20, None)
    assert recipe.model.name == "resnet"
    assert recipe.model.builtin
    assert recipe.model.options["width"] == 64
    assert recipe.data.train == SourceSpec(source="digits", split="train")
    assert isinstance(recipe.data.evaluate, SourceSpec)
    assert recipe.data.evaluate.split == "test"
    assert recipe.optimizer.options["weight_decay"] == 5e-4
    assert recipe.optimizer.options["no_decay"] == ("bias", "norm")
    assert recipe.checkpoint.every == Duration(600, "seconds")
    assert recipe.stop == StopSpec(metric="loss", patience=Duration(5, "epochs"))


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "resnet101"])
def test_shipped_recipes_are_valid_and_fit_their_name(name: str) -> None:
    file = load_recipe(RECIPES / f"{name}.yaml")
    assert file.recipe.name == name
    assert file.strategy_default == "auto"
    # So that `--set data.train=…` changes the evaluation with it.
    assert file.recipe.data.evaluate == "auto"


def test_resnet101_is_the_published_network_and_takes_a_users_folder(tmp_path: Path) -> None:
    file = load_recipe(RECIPES / "resnet101.yaml", (f"data.train={tmp_path}", "epochs=3"))
    model, data = file.recipe.model.options, file.recipe.data
    assert (model["depth"], model["conv"]) == (101, "depthwise_separable")
    assert (model["input_downscale"], model["classes"]) == (4, None)
    assert data.train.source == str(tmp_path)
    assert not data.train.known
    assert data.train.transform.image_size == 224
    assert (file.recipe.epochs, file.recipe.steps) == (3, None)


def test_defaults_are_filled_in() -> None:
    recipe = Recipe(**MINIMAL)
    assert recipe.schedule == Component(name="constant", options={"warmup": 0.0})
    assert recipe.data == DataSpec(train=SourceSpec(source="digits", split="train"))
    assert recipe.evaluate.every == Duration(1, "epochs")
    assert recipe.evaluate.metrics == ("accuracy",)
    assert (recipe.precision, recipe.normalize_over, recipe.stop) == ("auto", "batch", None)


def test_all_problems_at_once_with_file_line_and_nearest_name(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "name: a/b\n"
        "sed: 0\n"
        "batch_size: 0\n"
        "epochs: 1\n"
        "steps: 1\n"
        "model: {name: resnet, depht: 18, conv: foo}\n"
        "data:\n"
        "  train: digts:train\n"
        "  evaluate: {source: mnist, split: tst, transform: {image_size: -2}}\n"
        "objective: cross_entropi\n"
        "optimizer:\n"
        "  name: sgd\n"
        "  lr: -1\n"
        "  nesterov: true\n"
        "  no_decay: [bias, nrom]\n"
        "schedule: {name: step, at: [0.5, 0.2]}\n"
        "evaluate: {every: 1 epok, metrics: [acuracy]}\n"
        "checkpoint: {every: 3, keep: 0}\n"
        "stratgy: auto\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    found = {problem.path: problem for problem in caught.value.problems}
    assert {key: problem.line for key, problem in found.items()} == {
        "name": 1,
        "sed": 2,
        "batch_size": 3,
        "steps": 5,
        "model.depht": 6,
        "model.conv": 6,
        "data.train": 8,
        "data.evaluate.split": 9,
        "data.evaluate.transform.image_size": 9,
        "objective": 10,
        "optimizer.lr": 13,
        "optimizer.nesterov": 14,
        "optimizer.no_decay.1": 15,
        "schedule.at": 16,
        "evaluate.every": 17,
        "evaluate.metrics.0": 17,
        "checkpoint.every": 18,
        "checkpoint.keep": 18,
        "stratgy": 19,
    }
    assert {problem.file for problem in found.values()} == {str(path)}
    for key, near in {
        "sed": "'seed'",
        "model.depht": "'depth'",
        "data.train": "'digits'",
        "objective": "'cross_entropy'",
        "evaluate.metrics.0": "'accuracy'",
        "stratgy": "'strategy'",
    }.items():
        assert near in found[key].message
    assert str(found["optimizer.lr"]).startswith(f"{path}:13: optimizer.lr: must be")
    assert "given -1" in found["optimizer.lr"].message


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"seed": -1}, "seed", "0 or more"),
        ({"seed": True}, "seed", "whole number"),
        ({"batch_size": "8"}, "batch_size", 'whole number, given "8"'),
        ({"batch_size": 8.5}, "batch_size", "whole number"),
        ({"epochs": 3}, "steps", "exactly one of `epochs` and `steps` is needed, given both"),
        ({"steps": None}, "steps", "given neither"),
        ({"name": ""}, "name", "letters"),
        ({"name": ".."}, "name", "letters"),
        ({"normalize_over": 0}, "normalize_over", "'batch' or 1 or more"),
        ({"model": "resnet50"}, "model", "did you mean 'resnet'?"),
        ({"model": {"depth": 18}}, "model.name", "is missing (known: resnet, transformer, mlp)"),
        ({"model": None}, "model", "must be a name"),
        ({"model": print}, "model", "import path of a function"),
        ({"model": "my package.models:build"}, "model", "import path"),
        ({"model": {"name": "m:f", "a b": 1}}, "model.a b", "not the name of an argument"),
        ({"model": {"name": "m:f", "x": {1: 2}}}, "model.x.1", "must be text"),
        ({"model": {"name": "m:f", "x": [float("inf")]}}, "model.x.0", "finite"),
        ({"model": {"name": "m:f", "x": object}}, "model.x", "must be text, a number"),
        ({"model": {"name": "resnet", "depth": 42}}, "model.depth", "18, 34, 50, 101 or 152"),
        ({"model": {"name": "resnet", "residual": 1}}, "model.residual", "true or false"),
        ({"model": {"name": "mlp", "widths": [8, 0]}}, "model.widths.1", "1 or more"),
        ({"model": {"name": "transformer", "vocab": 9}}, "model.length", "is missing"),
        ({"model": {"name": "transformer", "length": 4}}, "model.features", "given neither"),
        (
            {"model": {"name": "transformer", "length": 4, "vocab": 9, "width": 250}},
            "model.heads",
            "must divide `width`, which is 250, given 4",
        ),
        ({"objective": {"name": "mse", "x": 1}}, "objective.x", "not a known key"),
        (
            {"objective": {"name": "cross_entropy", "label_smoothing": 1}},
            "objective.label_smoothing",
            "less than 1",
        ),
        ({"optimizer": "sgd"}, "optimizer.lr", "is missing"),
        ({"optimizer": {"name": "sgd", "lr": "fast"}}, "optimizer.lr", "must be a number"),
        ({"optimizer": {"name": "sgd", "lr": float("nan")}}, "optimizer.lr", "finite"),
        (
            {"optimizer": {"name": "sgd", "lr": 1, "momentum": 1}},
            "optimizer.momentum",
            "less than 1",
        ),
        ({"optimizer": {"name": "sgd", "lr": 1, "nesterov": True}}, "optimizer.nesterov", "momen"),
        ({"optimizer": {"name": "adam", "betas": [0.9, 1.0]}}, "optimizer.betas.1", "less than 1"),
        ({"optimizer": {"name": "adamw", "clip_norm": 0}}, "optimizer.clip_norm", "more than 0"),
        ({"schedule": {"name": "cosine", "warmup": 1}}, "schedule.warmup", "less than 1"),
        ({"data": "digits"}, "data", "must be a mapping"),
        ({"data": {"train": "digits:tran"}}, "data.train", "(known: train, test)"),
        ({"data": {"train": "no_such_folder"}}, "data.train", "known: digits, fashion-mnist"),
        ({"data": {"train": {"split": "train"}}}, "data.train.source", "is missing"),
        ({"data": {"train": 3}}, "data.train", "known data set"),
        ({"data": {"train": "digits", "evaluate": "ato"}}, "data.evaluate", "neither a known"),
        ({"evaluate": {"metrics": ["loss", "loss"]}}, "evaluate.metrics.1", "twice"),
        ({"evaluate": {"metrics": "loss"}}, "evaluate.metrics", "must be a list"),
        ({"evaluate": {"every": "0 steps"}}, "evaluate.every", "more than 0"),
        ({"stop": {"metric": "top5", "patience": "3 epochs"}}, "stop.metric", "loss or one of"),
        ({"stop": {"metric": "loss"}}, "stop.patience", "is missing"),
        (
            {
                "data": {"train": "digits", "evaluate": None},
                "stop": {"metric": "loss", "patience": "2 epochs"},
            },
            "stop.metric",
            "no evaluation",
        ),
        ({"strategy": "dp2"}, "strategy", "no part of a recipe"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], path: str, message: str) -> None:
    found = wrong(**changes)
    assert list(found) == [path]
    assert message in found[path]


def test_an_option_of_ones_own_component_passes_through(tmp_path: Path) -> None:
    options = {"layers": [1, {"a": None}], "lr": 1, "text": "1e-3"}
    recipe = Recipe(**minimal(model={"name": "my_package.models:build", **options}))
    assert not recipe.model.builtin
    assert recipe.model.arguments() == options
    recipe.to_yaml(tmp_path / "r.yaml")
    assert Recipe.from_yaml(tmp_path / "r.yaml") == recipe


def test_a_recipe_cannot_be_changed_not_even_inside() -> None:
    recipe = Recipe(**minimal(model={"name": "a:b", "sizes": [1, 2], "inner": {"x": 1}}))
    before = recipe.fingerprint
    with pytest.raises(TypeError):
        recipe.model.options["sizes"] = 3  # type: ignore[index]
    with pytest.raises(AttributeError):
        recipe.model.options["sizes"].append(3)
    recipe.model.arguments()["sizes"].append(3)
    recipe.to_dict()["model"]["inner"]["x"] = 2
    assert recipe.fingerprint == before
    assert len({recipe, pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe)}) == 1  # noqa: S301


def test_a_folder_without_slash_stays_a_path_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(**minimal(data={"train": "photos"}))
    monkeypatch.chdir("/")
    assert recipe.data.train.source == "./photos"
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_set_reaches_any_key_of_any_form(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "{name: a, batch_size: 8, epochs: 2, model: resnet, data: {train: digits},"
        " objective: mse, optimizer: adam}",
    )
    changes = (
        "model.width=16",
        "optimizer.lr=1e-2",
        "checkpoint.every=5 steps",
        "schedule.warmup=0.1",
        "data.train.transform.image_size=32",
        "data.on_bad_example=skip",
        "stop.metric=loss",
        "stop.patience=2 epochs",
        "evaluate.metrics=[top5, loss]",
        "objective={name: cross_entropy, label_smoothing: 0.2}",
        "steps=7",
        "strategy=dp2",
        "seed=1",
        "seed=2",
    )
    file = load_recipe(path, changes)
    recipe = file.recipe
    assert recipe.model.options["width"] == 16
    assert recipe.optimizer.name == "adam"
    assert recipe.optimizer.options["lr"] == 0.01
    assert recipe.checkpoint.every == Duration(5, "steps")
    assert (recipe.schedule.name, recipe.schedule.options["warmup"]) == ("constant", 0.1)
    assert recipe.data.train == SourceSpec(source="digits", transform=Transform(image_size=32))
    assert recipe.data.on_bad_example == "skip"
    assert recipe.stop == StopSpec(metric="loss", patience=Duration(2, "epochs"))
    assert recipe.evaluate.metrics == ("top5", "loss")
    assert recipe.objective.options["label_smoothing"] == 0.2
    assert (recipe.epochs, recipe.steps, recipe.seed) == (None, 7, 2)
    assert (file.strategy_default, file.path) == ("dp2", path)
    assert Recipe.from_yaml(path).model.options["width"] == 64


def test_a_problem_of_a_set_names_the_set_and_the_others_their_line(tmp_path: Path) -> None:
    path = written(tmp_path, CONTRACT.replace("seed: 0", "seed: -1"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ("model.width=wide", "optimizer.lrr=3", "strategy=2", "batch_size=0"))
    lines = str(caught.value).splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == [
        "--set batch_size=0",
        "--set model.width=wide",
        "--set optimizer.lrr=3",
        "--set strategy=2",
        f"{path}:2",
    ]
    assert "--set optimizer.lrr=3: optimizer.lrr: is not a known key: did you mean 'lr'?" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lr", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("a..b=3", "KEY=VALUE"),
        ("seed=[1", "is not YAML"),
        ("epochs.x=3", "has no key 'x'"),
        ("data.on_bad_example.x=3", "has no key 'x'"),
    ],
)
def test_a_set_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, CONTRACT), (text,))
    assert message in caught.value.problems[0].message
    assert caught.value.problems[0].file == f"--set {text}"


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n"])
def test_a_file_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="must be a mapping of keys to values"):
        load_recipe(written(tmp_path, text))


def test_the_fingerprint_is_of_what_is_computed() -> None:
    recipe = Recipe(**MINIMAL)
    same = recipe.with_changes("checkpoint.every=1 step", "checkpoint.keep=9", "evaluate.every=1s")
    assert same != recipe
    assert same.fingerprint == recipe.fingerprint
    assert recipe.differences(same) == []
    assert Recipe(**minimal(schedule="constant", seed=0)).fingerprint == recipe.fingerprint
    assert len(recipe.fingerprint) == 32
    for change in ("seed=1", "batch_size=9", "model.width=32", "evaluate.metrics=[top5]"):
        assert recipe.with_changes(change).fingerprint != recipe.fingerprint


def test_differences_name_the_keys() -> None:
    recipe = Recipe(**MINIMAL)
    other = recipe.with_changes("optimizer.lr=0.05", "epochs=3")
    assert recipe.differences(other) == [
        "steps: 5 here, nothing there",
        "optimizer.lr: 0.1 here, 0.05 there",
        "epochs: nothing here, 3 there",
    ]


def test_recipes_need_no_torch() -> None:
    code = "import sys, shoal.recipe; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Recipes of every shape, as a person could write them.

shares = st.floats(0, 1, exclude_max=True)
counts = st.integers(1, 10**6)
amounts = st.floats(0, 1e6)
# PyYAML writes U+0085 in a way that it does not read back.
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x85"), max_size=8)
identifiers = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
durations = (
    st.builds("{} {}".format, st.integers(1, 10**9), st.sampled_from(["step", "steps", "epochs"]))
    | st.builds("{:.3f}{}".format, st.floats(0.01, 1e5), st.sampled_from(["s", "min", " h"]))
    | st.builds(Duration, st.floats(1e-9, 1e12), st.sampled_from(["seconds", "epochs"]))
)


def some(name: str, required: dict[str, Any] | None = None, **optional: Any) -> st.SearchStrategy:
    fixed = {"name": st.just(name), **(required or {})}
    return st.fixed_dictionaries(fixed, optional=optional)


own = st.builds(
    lambda name, options: {**options, "name": name},
    st.sampled_from(["pkg.models:build", "script:Net", "a.b.c"]),
    st.dictionaries(identifiers, plain, max_size=3),
)
optimizing = {
    "weight_decay": amounts,
    "no_decay": st.lists(st.sampled_from(["bias", "norm"]), max_size=3),
    "clip_norm": st.none() | counts,
}
models = st.one_of(
    st.sampled_from(["resnet", "mlp", "pkg.models:build"]),
    own,
    some(
        "resnet",
        depth=st.sampled_from([18, 34, 50, 101, 152]),
        residual=st.booleans(),
        norm=st.sampled_from(["batch", "group"]),
        classes=st.none() | counts,
    ),
    some("mlp", widths=st.lists(counts, max_size=3)),
    some("transformer", {"vocab": counts, "length": counts}, dropout=shares),
)
objectives = (
    st.sampled_from(["mse", "binary"]) | own | some("cross_entropy", label_smoothing=shares)
)
optimizers = (
    st.just("adamw")
    | own
    | some("sgd", {"lr": amounts}, momentum=shares, **optimizing)
    | some("adam", betas=st.lists(shares, min_size=2, max_size=2), **optimizing)
)
schedules = (
    own
    | some("cosine", warmup=shares, final=st.floats(0, 1))
    | some("step", at=st.lists(st.floats(0.01, 0.99), max_size=3, unique=True).map(sorted))
)
transforms = st.fixed_dictionaries(
    {},
    optional={
        "image_size": st.none() | counts,
        "normalize": st.booleans(),
        "augment": st.sampled_from(["none", "flip", "crop", "crop_flip"]),
    },
)
known = st.sampled_from(["digits", "digits:train", "fashion-mnist:test"])
paths = texts.map(lambda text: f"folder/{text}")
sources = (
    known
    | paths
    | st.fixed_dictionaries({"source": known}, optional={"transform": transforms})
    | st.fixed_dictionaries({"source": paths}, optional={"split": texts, "transform": transforms})
)
recipes = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "batch_size": counts,
        "model": models,
        "data": st.fixed_dictionaries(
            {"train": sources}, optional={"evaluate": sources | st.just("auto")}
        ),
        "objective": objectives,
        "optimizer": optimizers,
    },
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "precision": st.sampled_from(["auto", "float32", "bf16"]),
        "normalize_over": st.just("batch") | counts,
        "schedule": schedules,
        "evaluate": st.fixed_dictionaries(
            {}, optional={"every": durations, "metrics": st.permutations(METRICS)}
        ),
        "checkpoint": st.fixed_dictionaries({}, optional={"every": durations, "keep": counts}),
        "stop": st.fixed_dictionaries({"metric": st.just("loss"), "patience": durations}),
    },
)


@settings(max_examples=100, deadline=None)
@given(recipes, st.sampled_from(["epochs", "steps"]), counts)
def test_yaml_round_trip(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any], length: str, count: int
) -> None:
    recipe = Recipe(**value, **{length: count})
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    recipe.to_yaml(path)
    again = Recipe.from_yaml(path)
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()
    assert again.fingerprint == recipe.fingerprint
    assert hash(again) == hash(recipe)
    assert recipe.differences(again) == []


def test_every_signature_has_plain_types_and_a_description() -> None:
    for table in SIGNATURES.values():
        for name, signature in table.items():
            assert signature.__doc__, name
            schema = signature.model_json_schema()
            assert schema["additionalProperties"] is False
