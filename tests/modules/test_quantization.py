"""Module 17: what is quantized, how it is prepared and folded, files, kernels and their conditions, and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tinytorch as t
from tinytorch import m17_quantization as m
from tinytorch import m17_quantization_appendix as appendix
from tinytorch import nn, optim, quantization
from tinytorch.backends import get_backend
from tinytorch.m02_tensor import observe
from tinytorch.m14_transformers import llama_config
from tinytorch.m16_acceleration import KERNELS, Kernel
from tinytorch.m16_acceleration_appendix import CPU, example, load, warm_up

OWN = [kernel for kernel in KERNELS if kernel.place.startswith((f"{CPU}.quantized", f"{CPU}.rounding"))]


@pytest.fixture(autouse=True)
def seeded() -> None:
    t.manual_seed(0)


def names(call: Callable[[], Any]) -> list[str]:
    seen = []
    with observe(lambda op, arrays, attributes, proceed: seen.append(op.name) or proceed()):  # type: ignore[func-returns-value]
        call()
    return seen


def calibrated(net: nn.Module, x: t.Tensor, **options: Any) -> nn.Module:
    ready = quantization.prepare(net, **options)
    ready(x)
    return quantization.convert(ready)


def near(ours: t.Tensor, exact: t.Tensor, share: float) -> None:
    """Within a share of the largest value."""
    assert (ours - exact).abs().max().item() <= share * exact.abs().max().item()


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", OWN, ids=lambda kernel: kernel.place.rpartition(".")[2])
@pytest.mark.parametrize("count", [2, 3])
def test_a_kernel_takes_its_example_and_says_what_the_operation_says(kernel: Kernel, count: int) -> None:
    inputs, attributes = example(kernel, count)
    assert kernel.when(*inputs, **attributes)
    xp = get_backend("cpu")
    found, expected = load(kernel.place)(xp, *inputs, **attributes), kernel.op.function(xp, *inputs, **attributes)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for ours, theirs in pairs:
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        tolerance = 1e-5 if kernel.op.name == "int4_linear" else 0
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("kernel", OWN, ids=lambda kernel: kernel.place.rpartition(".")[2])
def test_other_dtypes_and_layouts_go_to_the_operation(kernel: Kernel) -> None:
    inputs, attributes = example(kernel, 2)
    wide = [x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x for x in inputs]
    if kernel.op.name == "max_pool":
        wide = [np.ascontiguousarray(inputs[0])]  # channels apart
    assert not kernel.when(*wide, **attributes)


def test_kernels_are_warmed_up_with_the_others() -> None:
    assert {kernel.place.rpartition(":")[2] for kernel in OWN} >= {"quantize", "int8_linear", "int8_convolution"}
    assert warm_up(OWN[0])["seconds"] > 0


def test_a_weight_is_packed_once_and_only_for_kernels() -> None:
    layer, x = m.QuantizedLinear(64, 64).fill(nn.Linear(64, 64)), t.randn(8, 64)
    with t.reference_kernels():
        reference = layer(x)
        assert layer.packed() is None
    packed = layer.packed()
    assert packed is not None
    assert packed is layer.packed()
    assert layer(x).tolist() == reference.tolist()
    t.m04_layers.overwrite(layer.weight, 1)
    assert layer.packed() is not packed
    near(layer(x), x.sum(1, keepdim=True) * layer.weight_scale + layer.bias, 0.03)


# -- layers ------------------------------------------------------------------------------------------------------------

MLP = lambda: nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 16), nn.Linear(16, 4)).eval()


@pytest.mark.parametrize("make", [quantization.quantize_dynamic, lambda net: calibrated(net, t.randn(200, 12) * 1.2)])
def test_linear_layers_compute_nearly_the_same(make: Callable) -> None:
    net, x = MLP(), t.randn(50, 12)
    small = make(net)
    near(small(x), net(x), 0.05)
    near(small(x[0]), net(x[0]), 0.1)
    near(small(x.reshape(5, 10, 12)), net(x).reshape(5, 10, 4), 0.05)
    assert [type(layer).__name__ for layer in small].count("QuantizedLinear") == 3
    assert all(p.dtype == "int8" for n, p in small.state_dict().items() if n.endswith(".weight"))
    assert not list(small.parameters())
    assert "Dropout" in repr(net)  # it was copied


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    small, x = quantization.quantize_dynamic(MLP()), t.randn(9, 12)
    alone = small(x[3:4])
    x[0] = 1000.0
    assert small(x)[3].tolist() == alone[0].tolist()


def test_static_layers_hand_integers_on() -> None:
    net, x = MLP(), t.randn(300, 12)
    small = calibrated(net, x)
    assert names(lambda: small(x)) == ["quantize", "int8_linear", "int8_linear", "int8_linear"]
    assert [bool(layer.following) for layer in small if isinstance(layer, m.Int8Layer)] == [True, True, False]
    assert small[0].relu
    assert not small[3].relu
    twin: Any = copy.deepcopy(small)
    assert twin[0].following[0] is twin[3]
    assert twin(x).tolist() == small(x).tolist()


def test_what_is_no_row_stays_apart() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU())
    small = calibrated(net, t.randn(100, 8))
    assert [layer.following for layer in (small[0], small[2])] == [(), ()]
    assert small[2].relu
    shared = nn.Linear(8, 8)
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    small, x = calibrated(twice, t.randn(100, 8)), t.randn(20, 8)
    assert small[0] is small[2]
    near(small(x), twice(x), 0.1)


CNNS = {
    "batch norm": lambda: t.SimpleCNN(2, 5, 12, widths=(8, 40), hidden=16, batch_norm=True),
    "strides": lambda: nn.Sequential(
        nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(6, 70, 3, dilation=2, padding="same"), nn.ReLU(), nn.Flatten(),
        nn.Linear(70 * 3 * 6, 5),
    ),
    "residual": lambda: t.ResNet(8, 2, 5, width=4),
    "groups": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3),
        nn.Flatten(), nn.Linear(256, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CNNS)
def test_networks_that_see(name: str) -> None:
    net, x = CNNS[name](), t.randn(24, 2, 12, 12)
    for _ in range(4):
        net(x)
    folded = quantization.fold_batch_norm(net, x[:2])
    near(folded(x), net.eval()(x), 1e-4)
    assert not [layer for layer in folded.modules() if isinstance(layer, nn.BatchNorm2d)]
    small = calibrated(folded, x)
    near(small(x), net(x), 0.12)
    with t.reference_kernels():
        apart = small(x)
    near(small(x), apart, 1e-6)
    again = quantization.load_quantized(CNNS[name](), small.state_dict())
    assert again(x).tolist() == small(x).tolist()
    assert [type(a) for a in again.modules()] == [type(a) for a in small.modules()]


def test_only_norms_behind_a_layer_of_their_own_are_folded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm0, self.conv, self.norm1 = nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.twice, self.norm2, self.linear = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 3)
            self.norm3 = nn.BatchNorm1d(3, affine=False)

        def forward(self, x: t.Tensor) -> t.Tensor:
            x = self.norm1(self.conv(self.norm0(x)))
            x = self.norm2(self.twice(self.twice(x)))
            return self.norm3(self.linear(x.mean((2, 3))))

    net, x = Net(), t.randn(20, 2, 4, 4) * 3 + 1
    for _ in range(3):
        net(x)
    folded = quantization.fold_batch_norm(net, x)
    near(folded(x), net.eval()(x), 1e-4)
    kinds = [type(getattr(folded, name)).__name__ for name in ("norm0", "norm1", "norm2", "norm3")]
    assert kinds == ["BatchNorm2d", "Identity", "BatchNorm2d", "Identity"]
    assert not folded.conv._hooks
    frozen = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    assert type(quantization.fold_batch_norm(frozen, x)[1]) is nn.BatchNorm2d  # it goes by the batch, always


# -- language models ---------------------------------------------------------------------------------------------------

GPTS = {
    "gpt2": t.GPTConfig(40, 16, 2, 2, 16),
    "llama": llama_config(40, context_length=16, num_layers=2, num_heads=2, embed_dim=16),
}


@pytest.mark.parametrize("name", GPTS)
def test_a_language_model(name: str, tmp_path: Any) -> None:
    model, ids = t.GPT(GPTS[name]).eval(), t.randint(40, (3, 12))
    small = quantization.quantize_dynamic(model)
    near(small(ids), model(ids), 0.05)
    floats = {n.rpartition(".")[2] for n, x in small.state_dict().items() if x.dtype.is_floating_point and x.ndim > 1}
    assert floats == set()  # no table or matrix is left
    assert small.generate([1, 2, 3], 5, temperature=0) == small.generate([1, 2, 3], 5, temperature=0)
    t.save(small.state_dict(), tmp_path / "small.safetensors")
    again = quantization.load_quantized(t.GPT(GPTS[name]), t.load(tmp_path / "small.safetensors"))
    assert again(ids).tolist() == small(ids).tolist()


def test_tied_weights_are_stored_once() -> None:
    model = t.GPT(GPTS["gpt2"])
    small = quantization.quantize_dynamic(model)
    state = small.state_dict()
    assert (state["tokens.weight"].dtype, "head.weight" in state) == ("int8", False)
    assert names(lambda: small.scores(t.randn(2, 16))) == ["quantize_rows", "int8_linear"]


# -- four bits ---------------------------------------------------------------------------------------------------------


def test_int4_holds_two_weights_in_a_byte() -> None:
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 5), nn.Linear(5, 3)).eval()
    small, x = quantization.quantize_int4(net, 32), t.randn(40, 64)
    assert [type(layer).__name__ for layer in small] == ["Int4Linear", "ReLU", "Int4Linear", "Linear"]
    assert (small[0].weight.dtype, small[0].weight.shape, small[0].weight_scale.shape) == ("uint8", (96, 32), (96, 2))
    near(small(x), net(x), 0.25)
    near(small(x[:3]), net(x[:3]), 0.25)  # by the kernel
    weight = appendix.unpack_int4(small[0].weight, small[0].weight_scale)
    steps = small[0].weight_scale.repeat_interleave(32, 1)
    assert ((weight - net[0].weight).abs() <= 0.501 * steps).all()
    again = quantization.load_quantized(MLP64(), small.state_dict())
    assert again(x).tolist() == small(x).tolist()


MLP64 = lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 5), nn.Linear(5, 3))


def test_gradients_pass_through_int4() -> None:
    layer, x = quantization.Int4Linear(8, 4, group=4).fill(nn.Linear(8, 4)), t.randn(3, 8, requires_grad=True)
    weights = t.randn(3, 4)
    (layer(x) * weights).sum().backward()
    weight = appendix.unpack_int4(layer.weight, layer.weight_scale)
    near(x.grad, weights @ weight, 1e-5)


# -- observers ---------------------------------------------------------------------------------------------------------


def test_a_percentile_cuts_a_share_off_at_both_ends() -> None:
    observer = quantization.PercentileObserver(99.0)
    values = t.randperm(2001).to("float32") - 700.0
    observer(values[:1000])
    observer(values[1000:])
    low, high = observer.covered()
    assert (low.item(), high.item()) == (-680, 1280)  # 20 of 2,001 are beyond on each side
    with pytest.raises(ValueError, match="PercentileObserver: nothing has passed yet"):
        quantization.PercentileObserver().covered()


# -- training ----------------------------------------------------------------------------------------------------------


def test_qat_moves_ranges_while_training_only() -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), t.randn(64, 4)
    ready = quantization.prepare_qat(net)
    assert ready.training
    ready(x)
    before = ready[0].observer.high.item()
    ready.eval()
    ready(x * 10)
    assert ready[0].observer.high.item() == before
    ready.train()
    ready(x * 10)
    assert ready[0].observer.high.item() > before
    assert set(net.state_dict()) < set(ready.state_dict())  # names stay, ranges come with the state
    assert [type(layer).__name__ for layer in net] == ["Linear", "ReLU", "Linear"]


def test_qat_learns_what_rounding_loses() -> None:
    """With weights of a few large and many small values, the small ones are lost; training brings them back."""
    x = t.randn(256, 6)
    target = x @ t.randn(6, 3)
    net = nn.Sequential(nn.Linear(6, 3))
    net[0].weight.data[...] = 0.0
    ready = quantization.prepare_qat(net)
    optimizer = optim.Adam(ready.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = ((ready(x) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
    small = quantization.convert(ready)
    assert ((small(x) - target) ** 2).mean().item() < 0.01
    assert (small(x) - ready.eval()(x)).abs().max().item() < 1e-3


def test_prepare_sees_without_changing() -> None:
    net, x = MLP(), t.randn(30, 12)
    ready = quantization.prepare(net, quantization.PercentileObserver)
    assert ready(x).tolist() == net(x).tolist()
    assert isinstance(ready[0].observer, quantization.PercentileObserver)
    assert not ready.training


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_say_what_would_be_right() -> None:
    with pytest.raises(ValueError, match="MSEObserver: nothing has passed yet; call the prepared model with some"):
        quantization.convert(quantization.prepare(MLP()))
    small = calibrated(MLP(), t.randn(9, 12))
    with pytest.raises(ValueError, match="int8_linear: input has 11 features, but the weight takes 12"):
        small(t.randn(2, 11))
    with pytest.raises(RuntimeError, match=r"nothing loaded; missing: 0\.weight_scale"):
        small.load_state_dict(MLP().state_dict())
    with pytest.raises(RuntimeError, match=r"unexpected: 0\.weight_scale"):
        MLP().load_state_dict(small.state_dict())
    with pytest.raises(RuntimeError, match="wrong shape"):
        quantization.load_quantized(nn.Sequential(*(nn.Linear(9, 9) for _ in range(5))), small.state_dict())
    with pytest.raises(ValueError, match="a multiple of the group, an even number, got 12 and 32"):
        quantization.Int4Linear(12, 4)
    conv = calibrated(nn.Sequential(nn.Conv2d(2, 3, 3)), t.randn(2, 2, 5, 5))
    with pytest.raises(ValueError, match=r"QuantizedConv2d: expected \(\[N,\] 2, H, W\), got \(1, 3, 5, 5\)"):
        conv(t.randn(3, 5, 5))
    x = t.randn(2, 5, 5)
    assert conv(x).tolist() == conv(x.unsqueeze(0))[0].tolist()
