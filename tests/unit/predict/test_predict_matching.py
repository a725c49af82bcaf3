"""Permuted units are found and put back; what cannot be permuted is named."""

import pytest
import torch
from torch import nn

from shoal.errors import Refused
from shoal.models import ResNet, ResNetOptions, mlp
from shoal.predict.matching import match
from shoal.predict.merging import average
from shoal.predict.permutations import permute, spaces_of

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def resnet(**options):
    return ResNet(ResNetOptions(width=4, classes=5, in_channels=1, image_size=8, **options))


MODELS = {
    "mlp": lambda: mlp(64, 5, [12, 9]),
    "resnet": lambda: resnet(depth=18),
    "bottleneck": lambda: resnet(depth=50),
    "separable": lambda: resnet(depth=18, conv="depthwise_separable", input_downscale=2),
    "flattened": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)
    ),
}


def random_state(model):
    """Norms and their statistics away from what they start at."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(tensor.shape, generator=generator) + 0.5
        if "running_var" in name
        else torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_matching_undoes_a_permutation(name):
    model = MODELS[name]().eval()
    spaces = spaces_of(model, IMAGES, rows=2)
    assert spaces
    state = random_state(model)
    shuffled = dict(state)
    for number, space in enumerate(spaces):
        order = torch.randperm(space.units, generator=torch.Generator().manual_seed(number))
        shuffled = permute(shuffled, space, order)
    assert any(not torch.equal(state[key], shuffled[key]) for key in state)

    model.load_state_dict(state)
    expected = model(IMAGES).detach()
    model.load_state_dict(shuffled)  # the same function
    assert torch.allclose(model(IMAGES), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())

    parameters = {key for key, _ in model.named_parameters()}
    aligned = match(state, shuffled, spaces, parameters)
    mean = average([state, aligned])
    for key, tensor in state.items():
        assert torch.equal(aligned[key], tensor), key
        assert torch.allclose(mean[key], tensor, rtol=1e-6, atol=0), key


def test_a_model_in_training_mode_stays_in_it():
    model = resnet(depth=18)
    spaces_of(model, IMAGES, rows=2)
    assert model.training
    assert model.bn1.training


def test_channels_of_a_group_stay():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 3, 1))
    assert spaces_of(model, IMAGES, rows=2) == ()


class Ordered(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 8)

    def forward(self, x):
        h = self.linear(x.flatten(1))
        return h * torch.cumsum(h, 1)


def test_an_operation_without_a_rule_is_named():
    with pytest.raises(Refused, match=r"units pass through cumsum at .*test_predict_matching\.py"):
        spaces_of(Ordered(), IMAGES, rows=2)
