"""The attention branch and the layers."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awconv import AWConv1d, AWConv2d, AWConv3d, convert
from awconv.ops import aw_conv2d

LAYERS = {1: (AWConv1d, nn.Conv1d), 2: (AWConv2d, nn.Conv2d), 3: (AWConv3d, nn.Conv3d)}


def test_the_layer_is_deterministic_in_forward_and_backward(device: str) -> None:
    layer = AWConv2d(8, 8, 3, padding=1).to(device)
    input = torch.randn(4, 8, 10, 7, device=device, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        gradients = [torch.autograd.grad(layer(input).square().sum(), (input, *layer.parameters())) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    "rates", [dict(), dict(in_expansion=2, out_expansion=3), dict(in_expansion=1), dict(kernel_expansion=3)]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_layer_is_the_papers_branch_and_one_convolution_for_each_sample(
    activation: str, residual: bool, rates: dict[str, int], groups: int
) -> None:
    in_channels, out_channels = 8, 6
    arguments = dict(groups=groups, activation=activation, residual=residual, **rates)
    layer = AWConv2d(in_channels, out_channels, 3, 2, 1, **arguments).double()
    branch = layer.attention
    for norm in (branch.norm1, branch.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    input = torch.randn(3, in_channels, 9, 7, dtype=torch.float64)

    def normalised(value: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        mean, variance = value.mean((0, 2, 3), keepdim=True), value.var((0, 2, 3), keepdim=True, unbiased=False)
        scaled = (value - mean) / (variance + 1e-5).sqrt()
        return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]

    taps = 3 // rates.get("kernel_expansion", 1)
    pooled = F.adaptive_avg_pool2d(input, taps)
    hidden = normalised(torch.einsum("hc,ncij->nhij", branch.conv1.weight[..., 0, 0], pooled), branch.norm1).clamp(0)
    last = normalised(torch.einsum("oh,nhij->noij", branch.conv2.weight[..., 0, 0], hidden), branch.norm2)
    compact = ACTIVATIONS[activation](last)
    group_in = in_channels // groups
    r_in, r_out = rates.get("in_expansion", group_in), rates.get("out_expansion", 1)
    expanded = torch.empty(3, out_channels, group_in, 3, 3, dtype=torch.float64)
    for p in range(out_channels):
        for c in range(group_in):
            block = compact[:, p // r_out * (group_in // r_in) + c // r_in]
            expanded[:, p, c] = block if taps == 3 else block.expand(-1, 3, 3)
    attended = layer.weight * expanded + (layer.weight if residual else 0)
    expected = torch.cat(
        [F.conv2d(input[n : n + 1], attended[n], layer.bias, 2, 1, groups=groups) for n in range(len(input))]
    )
    torch.testing.assert_close(layer(input), expected)
    torch.testing.assert_close(layer.attention(input).flatten(1, 2), compact)


def switch_attention_off(layer: nn.Module) -> None:
    """ReLU of a last norm without weight and bias is zero, and K + 0 * K is K."""
    nn.init.zeros_(layer.attention.norm2.weight)
    nn.init.zeros_(layer.attention.norm2.bias)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=3, padding="same", dilation=2),
        dict(kernel_size=2, padding="same", bias=False),
        dict(kernel_size=3, stride=2, padding=2, groups=4),
        dict(kernel_size=1),
    ],
)
def test_without_attention_the_layer_is_the_plain_convolution(
    dims: int, padding_mode: str, arguments: dict[str, Any]
) -> None:
    aw, plain = LAYERS[dims]
    plain_layer = plain(4, 8, padding_mode=padding_mode, **arguments)
    layer = aw(4, 8, padding_mode=padding_mode, **arguments, activation="relu")
    result = layer.load_state_dict(plain_layer.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys
    assert all(key.startswith("attention.") for key in result.missing_keys)
    switch_attention_off(layer)
    input = torch.randn(2, 4, *(7, 6, 5)[:dims])
    torch.testing.assert_close(layer(input), plain_layer(input))


def test_the_branch_of_resnet50_has_the_papers_size() -> None:
    widths = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3
    layers = [AWConv2d(width, width, 3, device="meta") for width in widths]
    convolutions = sum(b.numel() for layer in layers for n, b in layer.attention.named_parameters() if "conv" in n)
    norms = sum(b.numel() for layer in layers for n, b in layer.attention.named_parameters() if "norm" in n)
    assert (convolutions, norms) == (157_184, 8_024)


def test_every_parameter_of_the_branch_gets_a_gradient() -> None:
    layer = AWConv2d(16, 8, 3)
    layer(torch.randn(4, 16, 8, 8)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_copies_and_pickles_compute_the_same(dims: int) -> None:
    layer = LAYERS[dims][0](4, 8, 3, padding=1).eval()
    input = torch.randn(2, 4, *(6, 5, 4)[:dims])
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.weight is not layer.weight
        assert torch.equal(copied(input), layer(input))


def test_a_pickle_finds_the_branch_where_the_layers_are() -> None:
    layer = AWConv2d(4, 8, 3).eval()
    of_before = pickle.dumps(layer).replace(b"awconv.branch", b"awconv.layers")
    assert b"awconv.branch" not in of_before
    input = torch.randn(2, 4, 6, 5)
    assert torch.equal(pickle.loads(of_before)(input), layer(input))


def test_dtype_and_device_reach_the_branch() -> None:
    for layer in (AWConv2d(4, 8, 3, dtype=torch.float64), AWConv2d(4, 8, 3).to(torch.float64)):
        assert {p.dtype for p in layer.parameters()} == {torch.float64}
        assert layer(torch.randn(2, 4, 8, 8, dtype=torch.float64)).dtype == torch.float64
    with torch.device("meta"):
        built_under_a_context = AWConv2d(4, 8, 3)
    for layer in (AWConv2d(4, 8, 3, device="meta"), AWConv2d(4, 8, 3).to("meta"), built_under_a_context):
        assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
        assert layer(torch.empty(2, 4, 8, 8, device="meta")).shape == (2, 8, 6, 6)


def test_the_repr_shows_the_attentions_arguments() -> None:
    text = repr(AWConv2d(8, 4, 3, reduction=2, out_expansion=2, activation="tanh", residual=False))
    assert "AWConv2d(\n  8, 4, kernel_size=(3, 3), stride=(1, 1), reduction=2, in_expansion=8, out_expansion=2" in text
    assert "activation='tanh', residual=False" in text


def test_a_single_sample_is_taken_as_by_a_plain_convolution() -> None:
    layer = AWConv2d(4, 8, 3).eval()
    input = torch.randn(4, 6, 6)
    assert torch.equal(layer(input), layer(input[None])[0])


def test_the_layer_is_a_convolution_for_code_that_asks() -> None:
    assert all(isinstance(aw(4, 8, 3), plain) for aw, plain in LAYERS.values())


@pytest.mark.parametrize("kernel", [dict(kernel_size=1), dict(kernel_size=3, kernel_expansion=3)])
def test_batch_statistics_of_one_value_are_refused_clearly(kernel: dict[str, int]) -> None:
    layer = AWConv2d(4, 8, **kernel)
    one = torch.randn(1, 4, 5, 5)
    with pytest.raises(ValueError, match=r"batch size 1 and is pooled to \(1, 1\).*at least 2 samples.*norm_layer"):
        layer(one)
    assert layer.eval()(one).shape[0] == 1
    assert layer.train()(one.repeat(2, 1, 1, 1)).shape[0] == 2
    assert AWConv2d(4, 8, **kernel, norm_layer=functools.partial(nn.GroupNorm, 1))(one).shape[0] == 1
    assert AWConv2d(4, 8, **kernel, norm_layer=None)(one).shape[0] == 1
    frozen = AWConv2d(4, 8, **kernel)
    frozen.attention.eval()
    assert frozen(one).shape[0] == 1


def test_an_empty_batch_passes_in_evaluation() -> None:
    assert AWConv2d(4, 8, 3, padding=1).eval()(torch.randn(0, 4, 6, 6)).shape == (0, 8, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(activation="gelu"), r"AWConv2d: activation must be one of \['sigmoid', 'tanh', 'relu'\], .*; got 'gelu'"),
        (dict(reduction=0), r"AWConv2d: reduction must be a positive integer, got 0"),
        (dict(residual="false"), r"AWConv2d: residual must be True or False, got 'false'"),
        (dict(in_expansion=3), r"AWConv2d: in_expansion must divide in_channels / groups, 4, got 3"),
        (dict(out_expansion=5), r"AWConv2d: out_expansion must divide out_channels, 8, got 5"),
        (dict(kernel_expansion=2), r"AWConv2d: kernel_expansion must divide each kernel size, 3, got 2"),
        (dict(out_expansion=0), r"AWConv2d: out_expansion must divide out_channels, 8, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AWConv2d(4, 8, 3, **arguments)


@pytest.mark.parametrize("norm_layer", ["group", nn.BatchNorm2d(4)], ids=str)
def test_what_makes_no_norms_is_refused(norm_layer: Any) -> None:
    with pytest.raises(
        TypeError, match=r"AWConv2d: norm_layer must be 'batch', None or something called with a number"
    ):
        AWConv2d(4, 8, 3, norm_layer=norm_layer)


@pytest.mark.parametrize(("dims", "norm"), [(1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)])
def test_branches_have_batch_norms_of_the_layers_axes_by_default(dims: int, norm: type[nn.Module]) -> None:
    branch = LAYERS[dims][0](4, 8, 3).attention
    assert type(branch.norm1) is type(branch.norm2) is norm


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (8, 8), (2, 4, 8, 8, 8)])
def test_a_wrong_input_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"AWConv2d: input must have shape \(N, 4, H, W\), got \("):
        AWConv2d(4, 8, 3)(torch.randn(shape))


def test_autocast_trains_the_layer() -> None:
    layer = AWConv2d(8, 8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(torch.randn(2, 8, 6, 6))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert layer.attention.conv1.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("strict", [False, True])
def test_the_layer_compiles_without_breaks_and_exports_with_dynamic_sizes(strict: bool) -> None:
    torch._dynamo.reset()
    layer = AWConv2d(8, 8, 3, padding=1)
    input = torch.randn(4, 8, 9, 9)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), layer(input))
    layer.eval()
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=4), 3: torch.export.Dim("width", min=4)}
    exported = torch.export.export(layer, (input,), dynamic_shapes=(sizes,), strict=strict).module()
    for shape in ((1, 8, 9, 9), (7, 8, 12, 5)):
        input = torch.randn(shape)
        torch.testing.assert_close(exported(input), layer(input))


def warnings_about_plain_weights(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "plain weights were loaded" in record.getMessage()]


@pytest.mark.parametrize("init", ["fresh", "identity"])
def test_plain_weights_in_aw_layers_are_logged_once(init: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3)))
    model = convert(copy.deepcopy(plain), init=init)
    if init == "identity":
        model.load_state_dict(plain.state_dict(), strict=False)
        assert not warnings_about_plain_weights(caplog)  # it computes with them
        nn.init.ones_(model[1].attention.norm2.weight)  # as if trained
        nn.init.ones_(model[2][0].attention.norm2.weight)
    model.load_state_dict(plain.state_dict(), strict=False)
    (message,) = warnings_about_plain_weights(caplog)
    assert "the first is '1'" in message
    assert 'awconv.convert(network, init="identity")' in message


def test_whole_and_other_states_load_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    model.load_state_dict(model.state_dict())
    model.load_state_dict(model.state_dict(), strict=False)
    model.load_state_dict({"0.bias": torch.zeros(4)}, strict=False)  # no weight of an AW layer
    assert not warnings_about_plain_weights(caplog)


def test_lora_merged_into_the_weight_is_another_function() -> None:
    # What the docstring says of it: beside the layer it adds, in the weight it is multiplied by 1 + a.
    layer, delta, input = AWConv2d(4, 8, 3).eval(), torch.randn(8, 4, 3, 3), torch.randn(2, 4, 6, 6)
    beside = layer(input) + F.conv2d(input, delta)
    attention = layer.attention(input)
    with torch.no_grad():
        layer.weight += delta
    assert (layer(input) - beside).abs().max() > 0.1
    torch.testing.assert_close(layer(input) - beside, aw_conv2d(input, delta, attention, residual=False))


def test_what_is_done_to_the_branch_alone_is_heeded() -> None:
    """By hooks that change what comes in or take one argument, and a forward that is replaced."""
    layer, input = AWConv2d(16, 16, 3, padding=1).eval(), torch.randn(2, 16, 5, 5)
    doubled = aw_conv2d(input, layer.weight, layer.attention(2 * input), layer.bias, padding=1)
    seen: list[tuple[Tensor | None, ...]] = []
    before = layer.attention.register_forward_pre_hook(lambda module, args: (2 * args[0],) if len(args) == 1 else None)
    after = layer.attention.register_full_backward_hook(lambda module, grads, _: seen.append(grads))
    output = layer(input.requires_grad_())
    torch.testing.assert_close(output, doubled)
    output.sum().backward()
    assert [len(grads) for grads in seen] == [1]
    before.remove()
    after.remove()
    forward = layer.attention.forward
    layer.attention.forward = lambda input: forward(2 * input)  # type: ignore[method-assign]
    torch.testing.assert_close(layer(input), doubled)
