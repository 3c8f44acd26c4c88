"""After module 17: do with one byte what was learned with four, and say what it cost."""

from __future__ import annotations

from pathlib import Path

from tinytorch.m01_setup import assert_close, manual_seed
from tinytorch.m02_tensor import Tensor
from tinytorch.m04_layers import Module
from tinytorch.m04_layers_appendix import load, save
from tinytorch.m05_losses import cross_entropy
from tinytorch.m06_autograd import no_grad
from tinytorch.m07_optimizers import SGD
from tinytorch.m09_spatial import SimpleCNN
from tinytorch.m10_dataloader_appendix import Digits
from tinytorch.m17_quantization import convert, fold_batch_norm, prepare, prepare_qat, quantize_dynamic
from tinytorch.m17_quantization_appendix import load_quantized


def digits(train: bool) -> tuple[Tensor, Tensor]:
    data = Digits(train=train)
    return (data.data.to("float32") / data.white - 0.3) / 0.4, data.targets


def network() -> SimpleCNN:
    return SimpleCNN(1, 10, 8, widths=(16, 32), hidden=128, batch_norm=True)


def train(net: Module, epochs: int, lr: float) -> None:
    pictures, labels = digits(train=True)
    optimizer = SGD(net.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for first in range(0, len(pictures), 64):
            optimizer.zero_grad()
            cross_entropy(net(pictures[first : first + 64]), labels[first : first + 64]).backward()
            optimizer.step()


@no_grad()
def accuracy(net: Module) -> float:
    pictures, labels = digits(train=False)
    return (net(pictures).argmax(1) == labels).sum().item() / len(labels)


def test_a_network_becomes_a_quarter_of_its_size_and_reads_as_well(tmp_path: Path) -> None:
    manual_seed(0)
    net = network()
    train(net, 4, lr=0.05)
    pictures, exact = digits(train=True)[0], accuracy(net.eval())
    assert exact > 0.95
    folded = fold_batch_norm(net, pictures[:8])
    assert_close(folded(pictures[:8]), net(pictures[:8]), atol=1e-3)

    ready = prepare(folded)
    ready(pictures[:200])
    static, dynamic = convert(ready), quantize_dynamic(folded)
    aware = prepare_qat(folded)
    train(aware, 1, lr=0.005)
    for small, lost in ((static, 0.01), (dynamic, 0.01), (convert(aware), 0.01)):
        assert accuracy(small) >= exact - lost

    save(net.state_dict(), tmp_path / "float.safetensors")
    save(static.state_dict(), tmp_path / "int8.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("float", "int8")]
    assert sizes[0] / sizes[1] > 3.3  # scales, biases and names weigh something in a file of 300 kilobytes
    again = load_quantized(network(), load(tmp_path / "int8.safetensors"))
    assert again(pictures[:50]).tolist() == static(pictures[:50]).tolist()
