"""Trained linears: what they multiply by is what would be stored, and their gradients are those of
the definition: a numerical check where the function is smooth, a slow twin of the estimator
elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmquant.algorithms import rtn
from llmquant.spec import QuantSpec
from llmquant.training.layers.latent import AdapterLinear, LatentLinear, offsets
from llmquant.training.layers.linear import TrainedLinear, rounding_of
from llmquant.training.layers.norms import norms_of, train_norm
from llmquant.weight import QuantizedWeight, eight_bits, is_portable, portable

SPECS = [
    pytest.param(QuantSpec(2, 8, True), id="w2g8"),
    pytest.param(QuantSpec(3, 16, False), id="w3g16 asym"),
    pytest.param(QuantSpec(4, None, True), id="w4 row"),
    pytest.param(QuantSpec(8, 16, True), id="w8g16"),
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start_of(spec: QuantSpec, ordered: bool = False) -> tuple[Tensor, QuantizedWeight]:
    w = drawn(12, 32) * 0.1
    start = rtn(w, spec)
    if ordered:
        order = torch.arange(32).flip(0) // spec.width(32)
        start = QuantizedWeight(start.codes, start.scales, start.zeros, spec, order.to(torch.int32))
        w = start.dequantize()
    return w, start


def layers_of(spec: QuantSpec, ordered: bool = False) -> list[TrainedLinear]:
    w, start = start_of(spec, ordered)
    return [
        TrainedLinear(start),
        LatentLinear(start, original=w),
        AdapterLinear(start, original=w, rank=3, seed=1),
    ]


def moved(layer: TrainedLinear) -> TrainedLinear:
    """With every parameter somewhere else."""
    with torch.no_grad():
        for i, parameter in enumerate(layer.trained()):
            parameter.add_(drawn(*parameter.shape, seed=i + 7), alpha=0.3 if i else 0.05)
    return layer


@pytest.mark.parametrize("ordered", [False, True], ids=["groups", "g_idx"])
@pytest.mark.parametrize("spec", SPECS)
def test_it_begins_at_the_start(spec: QuantSpec, ordered: bool) -> None:
    _, start = start_of(spec, ordered)
    for layer in layers_of(spec, ordered):
        assert layer.quantized().digest() == start.digest()


@pytest.mark.parametrize("ordered", [False, True], ids=["groups", "g_idx"])
@pytest.mark.parametrize("spec", SPECS)
def test_it_multiplies_by_what_would_be_stored(spec: QuantSpec, ordered: bool) -> None:
    x = drawn(5, 32, seed=3)
    for layer in map(moved, layers_of(spec, ordered)):
        stored = layer.quantized()
        assert torch.equal(layer.weight(), stored.dequantize())
        assert torch.equal(layer(x).detach(), x @ stored.dequantize().T)
        assert is_portable(stored.scales)


@pytest.mark.parametrize("spec", SPECS)
def test_codes_move(spec: QuantSpec) -> None:
    _, start = start_of(spec)
    for layer in map(moved, layers_of(spec)[1:]):
        assert not torch.equal(layer.codes(), start.codes)


@pytest.mark.parametrize("ordered", [False, True], ids=["groups", "g_idx"])
def test_gradients_are_the_numerical_ones_where_the_function_is_smooth(ordered: bool) -> None:
    _, start = start_of(QuantSpec(4, 8, False), ordered)
    layer = TrainedLinear(start).double()
    layer.rounding = lambda scales: scales
    x = drawn(3, 32, seed=3).double().requires_grad_()

    def forward(x: Tensor, factor: Tensor) -> Tensor:
        layer.factor.data = factor.data
        product = type(layer).forward
        layer._parameters["factor"] = factor  # type: ignore[assignment]
        return product(layer, x)

    factor = layer.factor.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, factor), eps=1e-6, atol=1e-6)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Inward(torch.autograd.Function):
    """A clamp whose gradient passes where a step would not lead further out."""

    @staticmethod
    def forward(ctx, x, top):
        ctx.save_for_backward(x)
        ctx.top = top
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        passes = [
            [0 < u < ctx.top or (g < 0 if u <= 0 else g > 0) for u, g in zip(*rows, strict=True)]
            for rows in zip(x.tolist(), grad.tolist(), strict=True)
        ]
        return grad * torch.tensor(passes), None


def twin(layer: TrainedLinear) -> tuple[Tensor, list[Tensor]]:
    """The weight by autograd's own operations, rounding passed straight through; and the
    parameters."""
    parameters = [p.detach().clone().requires_grad_() for p in layer.trained()]
    group = layer.quantized().column_groups()
    start, zeros = layer.get_buffer("start_scales"), layer.get_buffer("zeros").float()
    scaled = start * parameters[0]
    scales = Straight.apply(scaled, layer.rounding(scaled.detach()))
    if isinstance(layer, LatentLinear):
        latent = parameters[1]
    elif isinstance(layer, AdapterLinear):
        a, b = parameters[1:]
        fixed = layer.latent() - (b @ a).detach() / start[:, group]
        latent = fixed + (b @ a) / start[:, group]
        # w = (u - z) s f with u = W / s + z: the factor reaches the merged matrix.
    else:
        latent = layer.codes().float()
    clamped = Inward.apply(latent, layer.spec.max_code)
    codes = Straight.apply(clamped, clamped.detach().round())
    return (codes - zeros[:, group]) * scales[:, group], parameters


@pytest.mark.parametrize("ordered", [False, True], ids=["groups", "g_idx"])
@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_the_estimators(spec: QuantSpec, ordered: bool) -> None:
    for layer in map(moved, layers_of(spec, ordered)):
        if isinstance(layer, AdapterLinear):
            layer.rounding = lambda scales: scales  # its factor stands for the rounded scale
        x = drawn(5, 32, seed=3).requires_grad_()
        wanted_x = x.detach().clone().requires_grad_()
        direction = drawn(5, 12, seed=4)
        (layer(x) * direction).sum().backward()
        weight, parameters = twin(layer)
        (torch.nn.functional.linear(wanted_x, weight) * direction).sum().backward()
        torch.testing.assert_close(x.grad, wanted_x.grad)
        for found, wanted in zip(layer.trained(), parameters, strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-5)


def ladder(scale: float = 0.1) -> QuantizedWeight:
    """Two rows with every code of 3 bits, the second with a negative scale."""
    codes = torch.arange(8, dtype=torch.uint8).expand(2, -1).clone()
    zeros = torch.full((2, 1), 4, dtype=torch.uint8)
    return QuantizedWeight(codes, torch.tensor([[scale], [-scale]]), zeros, QuantSpec(3, 8, True))


def at(start: QuantizedWeight, offset: Tensor) -> Tensor:
    """The weight that lies so many codes from the start's."""
    return (start.codes - 4.0 + offset) * start.scales


def test_latents_keep_their_distances_and_step_0_is_the_start() -> None:
    start = ladder()
    offset = torch.tensor([0.5, 0.49, 0.41, 0.3, 0.0, -0.2, -0.45, -0.5]).expand(2, -1)
    found = offsets(start, at(start, offset))
    torch.testing.assert_close(found, 0.98 * offset, rtol=1e-4, atol=1e-5)
    for layer in (
        LatentLinear(start, original=at(start, offset)),
        AdapterLinear(start, original=at(start, offset), rank=2, seed=0),
    ):
        assert layer.quantized().digest() == start.digest()


def test_beyond_the_grid_a_latent_starts_at_the_end_code_and_may_only_come_back() -> None:
    start = ladder()
    offset = torch.zeros(2, 8)
    offset[:, 0], offset[:, 7] = -0.7, 0.2
    layer = LatentLinear(start, original=at(start, offset))
    assert torch.equal(layer.u.detach(), start.codes.float())
    for direction in (1.0, -1.0):
        layer.zero_grad()
        (layer(torch.eye(8)) * direction).sum().backward()
        slope = layer.u.grad
        assert slope is not None
        # dL/du is the scale times the direction; a step goes against it.
        upwards = torch.tensor([[-direction], [direction]]) > 0
        assert torch.equal(slope[:, :1] != 0, upwards)
        assert torch.equal(slope[:, 7:] != 0, ~upwards)
        assert bool((slope[:, 1:7] != 0).all())


@pytest.mark.parametrize("scale", [2.0**-20 * 1.25, 2.0**-24 * 515, 2.0**-24, 0.0], ids=str)
def test_tiny_scales_and_none_begin_at_the_start(scale: float) -> None:
    """Subnormal numbers of float16 stay what they are, and what has the scale 0 stays 0."""
    start = ladder(0.1).to("cpu")
    start.scales[0] = torch.tensor(scale if scale else 0.0)
    start.scales[1] = torch.tensor(0.1).half().float()
    original = start.dequantize() + 1e-3
    layers = [
        TrainedLinear(start),
        LatentLinear(start, original=original),
        AdapterLinear(start, original=original, rank=2, seed=0),
    ]
    for layer in layers:
        assert torch.equal(layer.weight(), start.dequantize())
        layer(torch.eye(8)).sum().backward()
        for parameter in layer.trained():
            assert parameter.grad is not None
            assert bool(parameter.isfinite().all() & parameter.grad.isfinite().all())
        moved(layer)
        assert layer.weight().isfinite().all()
        assert bool(layer.weight()[0].any()) == (scale != 0)


def shapes_kept(layer: TrainedLinear, x: Tensor) -> list[torch.Size]:
    """Of what a product keeps for its backward pass."""
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    return kept


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_dense_waits_for_the_backward_pass(spec: QuantSpec) -> None:
    x = drawn(5, 32).requires_grad_()
    for layer in layers_of(spec):
        assert shapes_kept(layer, x) == [x.shape, layer.factor.shape]  # and the scales


def test_an_original_that_is_not_near_is_not_believed() -> None:
    _, start = start_of(QuantSpec(4, 8, True))
    layer = LatentLinear(start, original=drawn(12, 32, seed=9))
    assert torch.equal(layer.u.detach(), start.codes.float())


@pytest.mark.parametrize(
    ("scales", "kept"),
    [
        pytest.param(portable(torch.tensor([0.3, -0.01])), "portable", id="portable"),
        pytest.param(eight_bits(torch.tensor([1e-9, 0.1])), "eight_bits", id="wide"),
        pytest.param(torch.tensor([0.1]).half().float(), "_half", id="float16"),
        pytest.param(torch.tensor([0.1]), "_same", id="float32"),
    ],
)
def test_scales_are_rounded_to_what_held_the_starts(scales: Tensor, kept: str) -> None:
    rounding = rounding_of(scales)
    assert rounding.__name__ == kept
    assert torch.equal(rounding(scales), scales)


def test_int8_activations_are_rounded_and_the_gradient_passes() -> None:
    _, start = start_of(QuantSpec(8, None, True))
    x = drawn(2, 32).requires_grad_()
    plain, rounded = TrainedLinear(start), TrainedLinear(start, None, "int8-dynamic")
    assert not torch.equal(plain(x), rounded(x))
    rounded(x).sum().backward()
    torch.testing.assert_close(x.grad, start.dequantize().sum(0).expand(2, -1))


def test_the_model_sees_the_stored_norm_and_the_master_learns() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    assert [name for name, _ in norms_of(model)] == ["0"]
    gain = train_norm(model[0], torch.bfloat16)
    with torch.no_grad():
        gain.factor.fill_(1.001)
    assert torch.equal(model[0].weight, torch.full((4,), 1.0))
    model[0].weight.sum().backward()
    assert torch.equal(gain.factor.grad, torch.ones(4))
    assert float(gain.factor.detach()[0]) == pytest.approx(1.001)


def test_a_rate_moves_gains_by_a_share_and_zeros_by_itself() -> None:
    norm = nn.LayerNorm(5)
    start = torch.tensor([0.02, -1.0, 30.0, 0.0, -0.0])
    start = start.to(torch.bfloat16).float()
    norm.weight.data = start.clone()
    gain = train_norm(norm, torch.bfloat16)
    assert torch.equal(norm.weight, start)
    bits = gain.stored().view(torch.int16)
    assert torch.equal(bits, start.to(torch.bfloat16).view(torch.int16))
    assert gain.stored().dtype == torch.bfloat16
    norm.weight.sum().backward()
    assert torch.equal(gain.factor.grad, torch.where(start == 0, 1.0, start))
    with torch.no_grad():
        gain.factor.fill_(1.25)
    assert torch.equal(
        gain.stored().float(),
        torch.tensor([1, 1, 1, 0.25, 0.25]).where(
            start == 0, (1.25 * start).to(torch.bfloat16).float()
        ),
    )
    assert torch.equal(norm.weight, gain.stored().float())
