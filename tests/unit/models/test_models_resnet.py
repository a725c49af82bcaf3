"""ResNets against the published counts, and on every kind of batch that a rank can be given."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shoal.errors import UsageError
from shoal.models import ResNet, ResNetOptions
from shoal.models.resnet import SCALE_BEFORE_SKIP, downscale
from shoal.recipe import SIGNATURES


def on_meta(**options) -> ResNet:
    with torch.device("meta"):
        return ResNet(ResNetOptions(**options))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def giga_macs(model: nn.Module, size: int) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2e9


def tiny(**options) -> ResNet:
    torch.manual_seed(0)
    given = {"width": 4, "classes": 10, "in_channels": 1, "image_size": 8} | options
    return ResNet(ResNetOptions(**given))


@pytest.mark.parametrize(
    ("depth", "count"),
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_published_numbers_of_parameters(depth, count):
    assert parameters(on_meta(depth=depth)) == count


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
@pytest.mark.parametrize("conv", ["standard", "depthwise_separable"])
def test_depth_is_the_number_of_layers_on_the_main_path(depth, conv):
    model = on_meta(depth=depth, conv=conv)
    main = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and "downsample" not in name and "depthwise" not in name
    ]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(main) == depth - 1
    assert len(linear) == 1


def test_the_worked_example_has_the_counts_of_the_claims():
    standard = on_meta(depth=101)
    separable = on_meta(depth=101, conv="depthwise_separable")
    assert giga_macs(standard, 224) == pytest.approx(7.80, abs=0.005)
    assert giga_macs(separable, 224) == pytest.approx(4.43, abs=0.005)
    assert giga_macs(on_meta(depth=101, input_downscale=4), 224) == pytest.approx(0.60, abs=0.005)
    assert parameters(separable) == pytest.approx(25.67e6, abs=0.005e6)


def test_a_separable_network_keeps_stem_and_1x1_convolutions():
    standard, separable = on_meta(depth=50), on_meta(depth=50, conv="depthwise_separable")
    shapes = {name: value.shape for name, value in separable.named_parameters()}
    changed = {
        name for name, value in standard.named_parameters() if shapes.get(name) != value.shape
    }
    assert changed == {
        f"layer{layer}.{block}.conv2.weight"
        for layer, blocks in enumerate((3, 4, 6, 3), start=1)
        for block in range(blocks)
    }
    assert shapes["layer2.0.conv2.depthwise.weight"] == (128, 1, 3, 3)
    assert shapes["layer2.0.conv2.pointwise.weight"] == (128, 128, 1, 1)


def test_names_are_those_of_published_weights():
    names = set(on_meta(depth=50).state_dict())
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv3.weight",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.num_batches_tracked",
        "layer4.2.bn3.bias",
        "fc.bias",
    } <= names


def test_a_bottleneck_has_its_stride_on_the_3x3():
    block = on_meta(depth=50).layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


def test_without_residual_there_is_neither_skip_nor_projection():
    model = tiny(residual=False).eval()
    assert not [name for name, _ in model.named_modules() if "downsample." in name]
    block, x = model.layer1[0], torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), block.body(x).relu())
    with_skip = tiny().eval().layer1[0]
    torch.testing.assert_close(with_skip(x), (with_skip.body(x) + x).relu())


@pytest.mark.parametrize(
    ("image_size", "factor", "small"),
    [(8, 1, True), (55, 1, True), (56, 1, False), (224, 4, False), (223, 4, False), (220, 4, True)],
)
def test_auto_stem_is_small_under_56_pixels_after_the_downscale(image_size, factor, small):
    options = ResNetOptions(image_size=image_size, input_downscale=factor)
    assert options.small_stem is small
    assert isinstance(
        on_meta(image_size=image_size, input_downscale=factor).maxpool, nn.Identity
    ) is (small)


def test_auto_stem_is_standard_where_the_size_is_not_known_and_can_be_chosen():
    assert not ResNetOptions().small_stem
    assert ResNetOptions(stem="small", image_size=224).small_stem
    assert not ResNetOptions(stem="standard", image_size=8).small_stem


@pytest.mark.parametrize(
    ("height", "width", "factor"), [(8, 8, 2), (224, 224, 4), (7, 10, 3), (5, 3, 8)]
)
def test_downscale_gives_the_ceiling_for_any_size(height, width, factor):
    images = torch.randn(2, 3, height, width)
    assert downscale(images, factor).shape == (
        2,
        3,
        math.ceil(height / factor),
        math.ceil(width / factor),
    )


def test_downscale_averages_away_what_is_too_fine():
    checkers = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    smaller = downscale(checkers[None, None].double(), 4)
    assert smaller.abs().max() < 0.05
    plain = torch.nn.functional.interpolate(
        checkers[None, None], scale_factor=1 / 3, mode="nearest"
    )
    assert plain.abs().max() == 1


def test_downscale_keeps_a_ramp_a_ramp_and_one_changes_nothing():
    ramp = torch.arange(32, dtype=torch.float64).expand(1, 1, 32, 32)
    inside = downscale(ramp, 4)[0, 0, 4, 1:-1]
    torch.testing.assert_close(inside, torch.arange(1, 7, dtype=torch.float64) * 4 + 1.5)
    assert downscale(ramp, 1) is ramp


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows_give_gradients_of_zero_and_leave_statistics_alone(norm, dtype):
    model = tiny(norm=norm, conv="depthwise_separable", input_downscale=2).to(dtype)
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    outputs = model(torch.empty(0, 1, 8, 8, dtype=dtype))
    outputs.sum().backward()
    assert outputs.shape == (0, 10)
    assert all((parameter.grad == 0).all() for parameter in model.parameters())
    for name, value in before.items():
        assert torch.equal(dict(model.named_buffers())[name], value)


@pytest.mark.parametrize("conv", ["standard", "depthwise_separable"])
@pytest.mark.parametrize("depth", [18, 50])
def test_every_parameter_learns_from_small_one_channel_images(depth, conv):
    model = tiny(depth=depth, conv=conv).double()
    model(torch.randn(4, 1, 8, 8, dtype=torch.float64)).square().sum().backward()
    still = [name for name, value in model.named_parameters() if not value.grad.abs().max() > 0]
    assert still == []


def test_channels_last_computes_the_same():
    model, images = tiny().double().eval(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    expected = model(images)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), expected)


def test_bf16_autocast_is_near_float32():
    model, images = tiny(input_downscale=2).eval(), torch.randn(3, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images)
    assert outputs.dtype == torch.bfloat16
    expected = model(images)
    assert (outputs - expected).abs().max() < 0.05 * expected.abs().max()


def test_he_initialisation_keeps_the_scale_through_many_layers():
    torch.manual_seed(0)
    model = ResNet(ResNetOptions(depth=34, residual=False, width=32, stem="small", classes=10))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels // module.groups * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name


def test_a_depthwise_convolution_is_initialised_by_its_own_fan():
    torch.manual_seed(0)
    model = ResNet(ResNetOptions(conv="depthwise_separable"))
    weight = model.layer4[1].conv2.depthwise.weight
    assert weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)


@pytest.mark.parametrize("depth", [18, 50])
def test_only_the_norm_before_a_skip_starts_small(depth):
    last = "bn2" if depth == 18 else "bn3"
    for residual in (True, False):
        for name, module in tiny(depth=depth, residual=residual).named_modules():
            if isinstance(module, nn.BatchNorm2d):
                small = residual and name.startswith("layer") and name.endswith(f".{last}")
                assert (module.weight == (SCALE_BEFORE_SKIP if small else 1)).all(), name


@pytest.mark.parametrize("width", [1, 3, 8, 9, 32, 64])
def test_group_norms_fit_every_width_with_two_channels_a_group(width):
    model = on_meta(norm="group", width=width)
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert norms
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_channels in (1,) or norm.num_groups < norm.num_channels for norm in norms)


def test_the_same_seed_gives_the_same_weights():
    first, second = tiny().state_dict(), tiny().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_defaults_are_those_of_the_recipe():
    options = SIGNATURES["model"]["resnet"]().options()
    ours = ResNetOptions()
    for name, value in options.items():
        if name not in ("classes", "in_channels"):
            assert getattr(ours, name) == value, name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 20}, "depth is 20"),
        ({"conv": "seperable"}, "conv is 'seperable'"),
        ({"input_downscale": 0}, "input_downscale is 0"),
    ],
)
def test_options_that_do_not_exist_are_named(options, said):
    with pytest.raises(UsageError, match=said):
        ResNetOptions(**options)


def test_it_exports_with_a_dynamic_batch():
    model = tiny().eval()
    rows = torch.export.Dim("rows", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model, (torch.randn(4, 1, 8, 8),), dynamic_shapes=({0: rows},), strict=False
        )
    images = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(program.module()(images), model(images))
