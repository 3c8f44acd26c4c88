"""Modules, containers and layers beyond what their chapter tests: every rule of naming, order, mode and refusal."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Tensor, float32, float64, int64, ones, randn, tensor, zeros
from tinytorch.m03_activations import ReLU, relu
from tinytorch.m04_layers import (
    Dropout,
    Flatten,
    Linear,
    Module,
    Parameter,
    Sequential,
    calculate_gain,
    dropout,
    kaiming_uniform_,
    linear,
    overwrite,
    uniform_,
)
from tinytorch.m04_layers_appendix import (
    Identity,
    ModuleDict,
    ModuleList,
    Unflatten,
    constant_,
    eye_,
    ones_,
    orthogonal_,
    trunc_normal_,
    xavier_normal_,
    zeros_,
)


class Norm(Module):
    """A parameter, a saved and an unsaved buffer, in an order that differs from the saved one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", zeros(size))
        self.register_buffer("scratch", zeros(size), persistent=False)
        self.register_buffer("count", tensor(0))
        self.weight = Parameter(ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.weight


class Net(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Sequential(Linear(4, 3), ReLU(), Norm(3))
        self.scale = Parameter(tensor(2.0))
        self.head = Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x) * self.scale)


# -- what a module has -------------------------------------------------------------------------------------------------


def test_names_and_order() -> None:
    net = Net()
    names = ["scale", "layers.0.weight", "layers.0.bias", "layers.2.weight", "head.weight"]
    assert [name for name, _ in net.named_parameters()] == names
    assert [id(p) for p in net.parameters()] == [id(p) for _, p in net.named_parameters()]
    assert [name for name, _ in net.named_parameters("net")] == [f"net.{name}" for name in names]
    assert [name for name, _ in net.named_parameters(recurse=False)] == ["scale"]
    assert [name for name, _ in net.named_buffers()] == ["layers.2.mean", "layers.2.scratch", "layers.2.count"]
    assert [name for name, _ in net.named_modules()] == ["", "layers", "layers.0", "layers.2", "head"]
    assert [name for name, _ in net.named_children()] == ["layers", "head"]
    assert [type(child) for child in net.children()] == [Sequential, Linear]
    assert net.get_submodule("layers.2") is net.layers[2]
    assert net.get_submodule("") is net


def test_state_has_persistent_buffers_after_parameters() -> None:
    state = Net().state_dict("model.")
    assert list(state) == [
        "model.scale", "model.layers.0.weight", "model.layers.0.bias", "model.layers.2.weight",
        "model.layers.2.mean", "model.layers.2.count", "model.head.weight",
    ]  # fmt: skip
    assert not any(value.watched for value in state.values())


def test_shared_parameters_are_listed_once_and_saved_under_each_name() -> None:
    net = Sequential(Linear(3, 3), Linear(3, 3))
    net[1].weight = net[0].weight
    assert len(list(net.parameters())) == 3
    assert list(net.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    twin = copy.deepcopy(net)
    assert twin[1].weight is twin[0].weight
    assert twin[0].weight is not net[0].weight
    net.double()
    assert net[1].weight is net[0].weight
    assert net[0].weight.dtype == float64


def test_replacing_and_removing_parts() -> None:
    net = Net()
    net.head = ReLU()  # any callable is a layer
    assert [name for name, _ in net.named_modules()] == ["", "layers", "layers.0", "layers.2"]
    net.scale = None
    assert "scale" not in net.state_dict()
    net.scale = Parameter(ones(1))
    assert next(iter(net.state_dict())) == "scale"
    del net.layers
    assert list(net.state_dict()) == ["scale"]


def test_apply_visits_children_first() -> None:
    seen: list[str] = []
    net = Net()
    assert net.apply(lambda module: seen.append(type(module).__name__)) is net
    assert seen == ["Linear", "Norm", "Sequential", "Linear", "Net"]


def test_modes_and_freezing() -> None:
    net = Net()
    assert net.eval() is net
    assert {m.training for m in net.modules()} == {False}
    net.layers.train()
    assert (net.training, net.layers[0].training) == (False, True)
    assert net.freeze() is net
    assert {p.watched for p in net.parameters()} == {False}
    net.layers.unfreeze()
    assert (net.scale.watched, net.layers[0].weight.watched) == (False, True)


def test_conversion_keeps_parameters_and_leaves_integers() -> None:
    net = Net()
    mask = ones(3)
    net.register_buffer("mask", mask)
    before = list(net.parameters())
    assert net.to(dtype=float64) is net
    assert list(map(id, net.parameters())) == list(map(id, before))
    assert {p.dtype for p in net.parameters()} == {float64}
    assert (net.layers[2].mean.dtype, net.layers[2].count.dtype) == (float64, int64)
    assert (net.mask.dtype, mask.dtype) == (float64, float32)  # another's tensor is not changed
    assert net(randn(2, 4, dtype=float64)).dtype == float64
    assert {p.dtype for p in net.float().parameters()} == {float32}
    assert {p.dtype for p in net.half().parameters()} == {"float16"}
    with pytest.raises(TypeError, match=r"Net\.to: expected a floating dtype, got int64"):
        net.to(int64)


def test_moving_to_another_library_and_back() -> None:
    net, x = Net(), randn(2, 4)
    expected = net(x)
    before = list(net.parameters())
    net.to("array_api_strict")
    assert {str(p.device) for p in net.parameters()} == {"array_api_strict"}
    assert str(net.layers[2].count.device) == "array_api_strict"
    assert_close(net(x.to("array_api_strict")), expected)
    with pytest.raises(TypeError, match="linear: one input is on"):
        net(x)
    assert_close(net.cpu()(x), expected)
    assert list(map(id, net.parameters())) == list(map(id, before))


def test_an_unknown_device_changes_nothing() -> None:
    net = Net()
    with pytest.raises((RuntimeError, ValueError)):
        net.to("abacus")
    assert {str(p.device) for p in net.parameters()} == {"cpu"}


def test_deepcopy_is_independent() -> None:
    net, x = Net(), randn(2, 4)
    twin = copy.deepcopy(net)
    expected = net(x).tolist()
    for parameter in twin.parameters():
        assert type(parameter) is Parameter
        assert parameter.watched
        overwrite(parameter, 0.0)
    assert net(x).tolist() == expected
    assert [n for n, _ in twin.named_buffers()] == [n for n, _ in net.named_buffers()]
    with pytest.raises(TypeError, match="save"):
        pickle.dumps(net)


def test_extend_class_adds_and_never_replaces() -> None:
    class Own(Module):
        pass

    Own.extend_class(size=lambda self: sum(p.numel() for p in self.parameters()))
    own = Own()
    own.layer = Linear(3, 2)
    assert own.size() == 8
    for name in ("size", "forward", "parameters"):
        with pytest.raises(AttributeError, match="never replaces"):
            Own.extend_class(**{name: None})


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_assignments_that_would_lose_something_are_refused() -> None:
    net = Net()
    with pytest.raises(TypeError, match=r"Net\.scale is a Parameter.*copy_"):
        net.scale = ones(1)
    with pytest.raises(TypeError, match=r"Net\.head is a Module"):
        net.head = ones(1)
    with pytest.raises(TypeError, match=r"Norm\.mean is a buffer"):
        net.layers[2].mean = 0.5
    net.layers[2].mean = ones(3)
    assert net.layers[2].state_dict()["mean"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["", "a.b", 3])
def test_impossible_names(name) -> None:
    for register in (Module().register_buffer, Module().register_parameter, Module().add_module):
        with pytest.raises(KeyError, match="without dots"):
            register(name, None)


def test_names_that_are_taken() -> None:
    with pytest.raises(KeyError, match="of its own"):
        Module().register_buffer("forward", ones(1))
    with pytest.raises(KeyError, match="of its own"):
        Sequential(OrderedDict(forward=Linear(1, 1)))
    with pytest.raises(KeyError, match="of its own"):
        ModuleDict({"items": Linear(1, 1)})
    with pytest.raises(TypeError, match="expected a tensor for 'a', got float"):
        Module().register_buffer("a", 1.0)
    with pytest.raises(TypeError, match="expected a Parameter for 'a', got Tensor"):
        Module().register_parameter("a", ones(1))


def test_a_module_that_is_not_set_up_says_so() -> None:
    class Forgetful(Module):
        def __init__(self, value) -> None:
            self.plain = 1
            self.plain = 2
            self.part = value

    for value in (Parameter(ones(1)), Linear(1, 1)):
        with pytest.raises(AttributeError, match=r"Forgetful: call super\(\).__init__\(\) before assigning 'part'"):
            Forgetful(value)
    for use in (lambda m: m.state_dict(), lambda m: m.training, lambda m: m.register_buffer("a", ones(1))):
        with pytest.raises(AttributeError, match=r"did not call super\(\).__init__\(\)"):
            use(Forgetful(None))


def test_no_forward() -> None:
    class Empty(Module):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty defines no forward"):
        Empty()(ones(1))
    with pytest.raises(NotImplementedError, match=r"ModuleList defines no forward"):
        ModuleList([Linear(1, 1)])(ones(1))


# -- load_state_dict ---------------------------------------------------------------------------------------------------


def test_loading_from_arrays_of_other_libraries_and_dtypes() -> None:
    net = Linear(2, 2)
    memory = net.weight.data
    net.load_state_dict({"weight": np.array([[1.0, 2.0], [3.0, 4.0]]), "bias": tensor([5, 6]).to("array_api_strict")})
    assert (net.weight.tolist(), net.bias.tolist()) == ([[1, 2], [3, 4]], [5, 6])
    assert (net.weight.dtype, net.bias.dtype, str(net.bias.device)) == (float32, float32, "cpu")
    assert net.weight.data is memory


def test_not_strict_allows_other_names_but_no_other_shapes() -> None:
    net = Linear(2, 2)
    keys = net.load_state_dict({"bias": ones(2), "more": ones(1)}, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["weight"], ["more"])
    assert net.bias.tolist() == [1, 1]
    with pytest.raises(RuntimeError, match=r"nothing loaded; wrong shape: weight \(3,\), expected \(2, 2\)$"):
        net.load_state_dict({"bias": zeros(2), "weight": ones(3)}, strict=False)
    assert net.bias.tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="wrong shape: bias str, expected"):
        net.load_state_dict({"bias": "zeros", "weight": zeros(2, 2)})
    with pytest.raises(TypeError, match="expected tensors by name, got Linear"):
        net.load_state_dict(net)


# -- hooks, repr -------------------------------------------------------------------------------------------------------


def test_hooks_run_in_order_and_may_remove_themselves() -> None:
    layer, seen = Identity(), []

    def once(module, inputs, output) -> None:
        seen.append("once")
        handle.remove()

    handle = layer.register_forward_hook(once)
    layer.register_forward_hook(lambda module, inputs, output: seen.append((module is layer, inputs, output)))
    layer(3)
    layer(4)
    assert seen == ["once", (True, (3,), 3), (True, (4,), 4)]


def test_repr_is_a_tree() -> None:
    assert repr(Net()) == (
        "Net(\n"
        "  (layers): Sequential(\n"
        "    (0): Linear(in_features=4, out_features=3, bias=True)\n"
        "    (1): ReLU()\n"
        "    (2): Norm()\n"
        "  )\n"
        "  (head): Linear(in_features=3, out_features=2, bias=False)\n"
        ")"
    )
    assert repr(Parameter(tensor([1.0]))).startswith("Parameter containing:\ntensor([1.")
    assert repr(Sequential(relu, ReLU())) == "Sequential(\n  (0): relu\n  (1): ReLU()\n)"
    assert repr(ModuleList()) == "ModuleList()"
    blocks = [Flatten(), Flatten(), Dropout(), Unflatten(1, (2, 2)), Identity(7, a=1)]
    assert repr(ModuleList(blocks)) == (
        "ModuleList(\n"
        "  (0-1): 2 x Flatten(start_dim=1, end_dim=-1)\n"
        "  (2): Dropout(p=0.5, inplace=False)\n"
        "  (3): Unflatten(dim=1, unflattened_size=(2, 2))\n"
        "  (4): Identity()\n"
        ")"
    )


# -- containers --------------------------------------------------------------------------------------------------------


def test_sequential_of_named_layers() -> None:
    net = Sequential(OrderedDict(first=Linear(2, 3), act=ReLU(), last=Linear(3, 1)))
    assert net.first is net[0]
    assert list(net.state_dict()) == ["first.weight", "first.bias", "last.weight", "last.bias"]
    assert list(net[1:].state_dict()) == ["last.weight", "last.bias"]
    assert net[1:][1] is net.last
    net.last = Linear(3, 5)  # keeps its place
    assert net(randn(4, 2)).shape == (4, 5)
    assert net[-1] is net.last
    with pytest.raises(IndexError):
        net[3]


def test_sequential_is_edited_like_a_list() -> None:
    layers = [Linear(2, 2) for _ in range(4)]
    net = Sequential(*layers[:2])
    assert net.append(layers[2]).extend([layers[3]]) is net
    assert list(net) == layers
    net[1] = relu
    del net[0]
    assert list(net) == [relu, *layers[2:]]
    assert [name for name, _ in net.named_children()] == ["1", "2"]
    del net[1:]
    assert (len(net), list(net.parameters())) == (1, [])
    assert Sequential()(3) == 3
    with pytest.raises(TypeError, match="must be a Module or another callable, not 3"):
        Sequential(3)


def test_a_subclass_of_sequential_may_have_its_own_constructor() -> None:
    class Block(Sequential):
        def __init__(self, size: int) -> None:
            super().__init__(Linear(size, size), ReLU())
            self.size = size

    block, x = Block(3), randn(2, 3)
    assert_close(block[1:](block[:1](x)), block(x))
    assert copy.deepcopy(block)(x).tolist() == block(x).tolist()


def test_module_list() -> None:
    layers = [Linear(1, 1) for _ in range(4)]
    row = ModuleList(layers[:2])
    row += layers[2:3]
    row.insert(0, layers[3])
    expected = [layers[3], *layers[:3]]
    assert list(row) == expected
    assert [name for name, _ in row.named_children()] == ["0", "1", "2", "3"]
    assert list(row[1:3].state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(row + ModuleList([relu])) == [*expected, relu]
    assert row.pop() is expected[3]
    assert (len(row), layers[3] in row, layers[2] in row) == (3, True, False)


def test_module_dict() -> None:
    table = ModuleDict({"a": Linear(1, 2), "act": ReLU()})
    table["b"] = Linear(2, 1)
    table.update([("a", Linear(1, 3))])  # keeps its place
    assert (list(table), list(table.keys()), len(table)) == (["a", "act", "b"], ["a", "act", "b"], 3)
    assert list(table.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert table["a"].out_features == 3
    assert dict(table.items())["b"] is list(table.values())[2]
    assert ("act" in table, "c" in table) == (True, False)
    removed = table.pop("a")
    assert removed.out_features == 3
    assert list(table.state_dict()) == ["b.weight", "b.bias"]
    with pytest.raises(KeyError):
        table["a"]


# -- layers on every device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (0, 5), (7, 5), (2, 3, 5), (2, 0, 5), (2, 1, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_shapes(device, shape, bias) -> None:
    layer, x = Linear(5, 4, bias=bias), randn(*shape)
    expected = np.asarray(x.numpy(), np.float64) @ np.asarray(layer.weight.numpy(), np.float64).T
    if bias:
        expected = expected + layer.bias.numpy()
    out = layer(x)
    assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert (out.dtype, out.device) == (float32, x.device)


def test_linear_leaves_its_inputs_alone(device) -> None:
    x, weight, bias = randn(3, 2), randn(4, 2), randn(4)
    before = [t.tolist() for t in (x, weight, bias)]
    linear(x, weight, bias)
    assert [t.tolist() for t in (x, weight, bias)] == before
    assert_close(linear(x.T, weight[:, :1].expand(4, 3), bias), x.T @ weight[:, :1].expand(4, 3).T + bias, rtol=1e-4)


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        (((64, 512), (10, 784)), ValueError,
         r"^linear: input has 512 features, but the weight takes 784 \(input \(64, 512\), weight \(10, 784\)\)$"),
        (((), (10, 784)), ValueError, r"linear: expected an input \(…, in\) and a weight \(out, in\)"),
        (((3, 4), (4,)), ValueError, r"linear: expected an input \(…, in\) and a weight \(out, in\)"),
        (((3, 4), (2, 4), (4,)), ValueError, r"linear: expected a float32 bias \(2,\), got float32 \(4,\)"),
        (((3, 4), (2, 4), (1,)), ValueError, r"linear: expected a float32 bias \(2,\), got float32 \(1,\)"),
    ],
)  # fmt: skip
def test_linear_errors(device, shapes, error, message) -> None:
    with pytest.raises(error, match=message):
        linear(*(zeros(*shape) for shape in shapes))


@pytest.mark.parametrize("dtype", ["int64", "bool", "float64"])
def test_linear_takes_one_dtype(device, dtype) -> None:
    with pytest.raises(TypeError, match=rf"linear: input is {dtype}, but the weight is float32; input\.to\("):
        Linear(4, 2)(zeros(3, 4).to(dtype))
    with pytest.raises(ValueError, match="linear: expected a float32 bias"):
        linear(zeros(3, 4), zeros(2, 4), zeros(2).to(dtype))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 3)])
def test_linear_needs_features(sizes) -> None:
    with pytest.raises(ValueError, match="Linear: expected at least 1 feature"):
        Linear(*sizes)


def test_layers_are_made_where_and_as_asked() -> None:
    layer = Linear(3, 2, dtype=float64, device="array_api_strict")
    assert (layer.weight.dtype, str(layer.bias.device)) == (float64, "array_api_strict")


def test_parameter(device) -> None:
    x = randn(2)
    assert Parameter(x).data is x.data
    assert not Parameter(tensor([1, 2]), watched=False).watched
    assert type(Parameter(x) * 2) is Tensor
    with pytest.raises(TypeError, match="expected floats, which can be adjusted, got int64"):
        Parameter(tensor([1, 2]))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_and_scales(device, p) -> None:
    manual_seed(5)
    x = randn(100, 100) + 5
    out = dropout(x, p)
    kept = out != 0
    share = kept.to(float32).mean().item()
    assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / 1e4)
    assert_close(out, x * kept.to(float32) / (1 - p), rtol=1e-6)
    manual_seed(5)
    randn(100, 100)
    assert dropout(x, p).tolist() == out.tolist()


def test_dropout_edges(device) -> None:
    x = randn(3, 4)
    assert dropout(x, 0.0) is x
    assert dropout(x, 0.9, training=False) is x
    assert dropout(x, 1.0).abs().sum().item() == 0
    assert dropout(x.to(float64), 0.5).dtype == float64
    memory = x.clone()
    assert dropout(memory, 0.5, inplace=True) is memory
    assert memory.tolist() != x.tolist()
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="dropout: p is a probability"):
            dropout(x, p)
        with pytest.raises(ValueError, match="Dropout: p is a probability"):
            Dropout(p)
    with pytest.raises(TypeError, match="dropout: expected floats, got int64"):
        dropout(tensor([1, 2]), 0.5)


def test_shape_layers(device) -> None:
    x = randn(2, 3, 4)
    assert Sequential(Flatten(), Unflatten(1, (3, 4)), Identity())(x).tolist() == x.tolist()
    assert Unflatten(-1, [2, -1])(x).shape == (2, 3, 2, 2)


# -- initial values on every device ------------------------------------------------------------------------------------


def test_init_writes_in_place_and_keeps_the_dtype(device) -> None:
    for dtype in (float32, float64):
        x = Parameter(zeros(20, 30, dtype=dtype))
        memory = x.data
        for init in (uniform_, kaiming_uniform_, xavier_normal_, trunc_normal_, orthogonal_, eye_, ones_, zeros_):
            assert init(x) is x
            assert (x.data is memory, x.dtype) == (True, dtype)
        assert set(constant_(x, 2.5).flatten().tolist()) == {2.5}


def test_trunc_normal_has_no_tails(device) -> None:
    manual_seed(2)
    x = trunc_normal_(zeros(20_000), mean=1.0, std=2.0, a=0.0, b=2.0)
    assert 0 <= x.amin().item() <= x.amax().item() <= 2
    assert_close(x.mean(), 1.0, atol=0.02)
    assert_close(trunc_normal_(zeros(20_000), std=0.02).std(), 0.02, rtol=0.03)
    for bounds in ((5.0, 9.0), (1.0, 1.0), (2.0, -2.0)):
        with pytest.raises(ValueError, match="holds next to nothing"):
            trunc_normal_(x, 0.0, 1.0, *bounds)


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (4, 2, 3)])
def test_orthogonal(device, shape) -> None:
    rows = shape[0]
    matrix = orthogonal_(zeros(*shape), gain=2.0).reshape(rows, -1)
    gram = matrix @ matrix.T if rows <= matrix.shape[1] else matrix.T @ matrix
    assert_close(gram, 4 * np.eye(gram.shape[0]), atol=1e-5)


def test_init_errors() -> None:
    with pytest.raises(ValueError, match=r"shape \(out, in, …\), got \(3,\)"):
        kaiming_uniform_(zeros(3))
    with pytest.raises(ValueError, match="expected mode 'fan_in' or 'fan_out', got 'fan'"):
        kaiming_uniform_(zeros(3, 3), mode="fan")
    with pytest.raises(ValueError, match=r"calculate_gain: expected leaky_relu or one of linear.*got 'gelu'"):
        calculate_gain("gelu")
    with pytest.raises(ValueError, match="expected at least 2 axes"):
        orthogonal_(zeros(3))
