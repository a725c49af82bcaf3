"""The shipped recipes do what their comments and the README say, on real data and real ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")


def train(folder, recipe, *options):
    command = [sys.executable, "-m", "shoal", "train", str(RECIPES / recipe), "--json", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_is_a_recipe_named_as_its_file(path):
    assert load_recipe(path).recipe.name == path.stem


@pytest.mark.timeout(300)
def test_digits_reaches_97_percent_on_two_ranks(tmp_path):
    summary = train(tmp_path, "digits.yaml", "--strategy", "dp2")
    assert summary["state"] == "done"
    assert summary["metrics"]["accuracy"] >= 0.97
    assert (tmp_path / summary["run"] / "report.html").stat().st_size > 10_000


@pytest.mark.long
def test_fashion_mnist_reaches_90_percent_on_two_ranks(tmp_path):
    if not FASHION.exists():
        pytest.fail("install Debian's dataset-fashion-mnist: this test is about the real images")
    summary = train(tmp_path, "fashion-mnist.yaml", "--strategy", "dp2")
    assert summary["metrics"]["accuracy"] >= 0.90


@pytest.mark.long
def test_resnet101_runs_without_a_file_from_the_user(tmp_path):
    summary = train(tmp_path, "resnet101.yaml", "--strategy", "dp2")
    assert summary["state"] == "done"
    assert summary["steps"] == 20


@pytest.mark.long
def test_resnet101_takes_any_folder_of_images(tmp_path):
    from PIL import Image

    for label, color in {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (0, 180, 0)}.items():
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(12):
            image = Image.new("RGB", (40 + number, 60), color)
            image.save(tmp_path / "images" / label / f"{number}.jpg")
    change = ["--set", "data.train=images", "--set", "steps=3", "--set", "batch_size=8"]
    summary = train(tmp_path, "resnet101.yaml", "--strategy", "dp2", *change)
    assert summary["steps"] == 3
