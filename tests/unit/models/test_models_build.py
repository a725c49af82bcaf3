"""Models by name: built in, and the user's own from a file that is really imported."""

import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shoal import models
from shoal.errors import UsageError, UserCodeError
from shoal.recipe import Component


def named(name: str, **options) -> SimpleNamespace:
    return SimpleNamespace(name=name, options=options)


def build(name: str, classes=10, in_channels=1, image_size=8, **options) -> nn.Module:
    return models.build(
        named(name, **options), classes=classes, in_channels=in_channels, image_size=image_size
    )


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's on the path; gone, with what it imported, when the test ends."""
    (tmp_path / "own_models.py").write_text(
        textwrap.dedent(
            """
            from torch import nn

            class Net(nn.Module):
                def __init__(self, units, classes=2, in_channels=7):
                    super().__init__()
                    self.given = (units, classes, in_channels)

                @classmethod
                def tiny(cls):
                    return cls(1)

            def build(units):
                return nn.Linear(units, units)

            def anything(**options):
                assert not options, options
                return nn.Identity()

            def lists(widths, more):
                assert type(widths) is list and type(more) is dict, (widths, more)
                return nn.Identity()

            def broken():
                raise RuntimeError("no weights here")

            def text():
                return "a model"

            NUMBER = 3
            """
        )
    )
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    (tmp_path / "own_needs.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("own_models", "own_broken", "own_needs"):
        sys.modules.pop(name, None)


def test_the_options_of_the_data_fill_what_the_recipe_leaves_open():
    model = build("resnet", width=4, classes=7, in_channels=2)
    assert model(torch.randn(3, 2, 8, 8)).shape == (3, 7)
    assert isinstance(model.maxpool, nn.Identity)


def test_an_option_goes_before_the_data():
    component = named("resnet", width=4, classes=5, in_channels=None)
    model = models.build(component, classes=10, in_channels=1, image_size=64)
    assert (model.fc.out_features, model.conv1.in_channels) == (5, 1)
    assert isinstance(model.maxpool, nn.MaxPool2d)


def test_a_component_of_a_recipe_is_taken_as_it_is():
    component = Component(name="resnet", options={"depth": 18, "width": 4, "classes": None})
    model = models.build(component, classes=3, in_channels=1, image_size=8)
    assert model.fc.out_features == 3


def test_mlp_and_transformer():
    model = build("mlp", widths=(16, 12))
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [16, 12, 10]
    assert model(torch.randn(0, 1, 8, 8)).shape == (0, 10)
    assert len(list(build("mlp", widths=[]).parameters())) == 2
    model = build("transformer", features=8, length=8, width=8, layers=1)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "missing", "said"),
    [
        ("resnet", "classes", "'resnet' needs classes"),
        ("resnet", "in_channels", "'resnet' needs in_channels"),
        ("mlp", "image_size", "'mlp' needs image_size"),
    ],
)
def test_what_nobody_says_is_named(name, missing, said):
    with pytest.raises(UsageError, match=said):
        build(name, **{missing: None})


def test_an_unknown_name_has_its_nearest():
    with pytest.raises(UsageError, match="did you mean resnet"):
        build("resnet18")


@pytest.mark.parametrize("name", ["resnet", "mlp", "transformer"])
def test_an_option_that_does_not_exist_is_named(name):
    with pytest.raises(UsageError, match="'hights'"):
        build(name, hights=3)


@pytest.mark.usefixtures("own")
class TestUsersModels:
    def test_both_spellings_and_attributes_of_attributes(self):
        assert isinstance(build("own_models:build", units=3), nn.Linear)
        assert isinstance(build("own_models.build", units=3), nn.Linear)
        assert build("own_models:Net.tiny").given == (1, 2, 7)

    def test_classes_and_channels_are_given_where_they_are_named(self):
        assert build("own_models:Net", units=1).given == (1, 10, 1)
        assert build("own_models:Net", classes=None, units=1).given == (1, 2, 1)
        component = named("own_models:Net", units=1, classes=4)
        model = models.build(component, classes=10, in_channels=None, image_size=None)
        assert model.given == (1, 4, 7)
        assert isinstance(build("own_models:anything"), nn.Identity)

    def test_frozen_options_arrive_as_lists_and_dicts(self):
        component = Component(name="own_models:lists", options={"widths": [1], "more": {"a": 1}})
        models.build(component, classes=None, in_channels=None, image_size=None)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("own_models:biuld", "own_models has no attribute 'biuld'(.|\n)*Did you mean build"),
            ("own_modles:build", "there is no module 'own_modles'"),
            ("nowhere.at.all:build", "there is no module 'nowhere'"),
            ("own_broken:build", "importing own_broken raised ZeroDivisionError"),
            ("own_needs:build", "importing own_needs raised ModuleNotFoundError"),
            ("own_models:NUMBER", "is a int, which cannot be called"),
            ("own_models:text", "returned a str"),
            ("own_models:", "names no function"),
            (":build", "names no function"),
        ],
    )
    def test_what_cannot_be_imported_is_named(self, name, said):
        with pytest.raises(UsageError, match=said):
            build(name)

    def test_wrong_options_are_found_before_the_call(self):
        with pytest.raises(UsageError, match=r"unexpected keyword argument 'unit'|missing a req"):
            build("own_models:build", unit=3)

    def test_what_it_raises_is_the_users(self):
        with pytest.raises(UserCodeError, match="raised RuntimeError: no weights here"):
            build("own_models:broken")
