"""Speed beside PyTorch, and beside `tokenizers`: `python -m tinytorch.profiling.bench`, or `nox -s bench`; with
`--device cuda` on a GPU, which takes a PyTorch for CUDA.

Each case is one small program that runs on either library, because the names are the same. Every measurement is made in
a process of its own, ours and PyTorch's in turn, so that a machine that slows down slows both. A round's figure is a
median; the figure shown is the fastest round's, because other programs only ever make a round slower. The ratio is the
median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# OpenBLAS reads these when it is loaded, and either can halve its speed; few users have them set.
SLOWING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
ONE_CORE = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # `tokenizers` would take all, and ours one
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
CLEAR_REFS = "/proc/self/clear_refs"  # Linux: a 5 written to it has the peak of the memory start anew


@dataclass(frozen=True)
class Case:
    """Something to time on both libraries. `build(library)` returns the call that is timed.

    reference: the other library.
    calls: how many of what it names the call makes.
    seconds, ratio: what our figure must not exceed: seconds, or a multiple of PyTorch's figure.
    memory: whether the figure is not the time of the call but the bytes that it takes at its peak.
    one_thread: whether NumPy and kernels may use one thread only.
    device: where both compute.
    precision: how both multiply float32 there: "highest", as it is written, or "high", in TF32.
    """

    name: str
    build: Callable[[Any], Callable[[], Any]]
    calls: int = 1
    seconds: float | None = None
    ratio: float | None = None
    memory: bool = False
    reference: str = "torch"
    one_thread: bool = False
    device: str = "cpu"
    precision: str = "highest"


def small_op(requires_grad: bool) -> Callable[[Any], Callable[[], Any]]:
    """A hundred sums of four numbers, so that the call that is timed weighs little beside them."""

    def build(library: Any) -> Callable[[], Any]:
        x = library.ones(4, requires_grad=requires_grad)

        def hundred() -> None:
            for _ in range(100):
                x + x

        return hundred

    return build


def parts_of(library: Any) -> tuple[Any, Any]:
    """`nn` and `optim` of a library."""
    return importlib.import_module(f"{library.__name__}.nn"), importlib.import_module(f"{library.__name__}.optim")


def mlp_step(optimizer: str) -> Callable[[Any], Callable[[], Any]]:
    """A training step of a 784-128-10 network at batch 64: forward, loss, backward, update."""

    def build(library: Any) -> Callable[[], Any]:
        nn, optim = parts_of(library)
        library.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        inputs, labels = library.randn(64, 784), library.randint(0, 10, (64,))
        update = getattr(optim, optimizer)(model.parameters(), lr=1e-3)
        loss = nn.CrossEntropyLoss()

        def step() -> None:
            update.zero_grad()
            loss(model(inputs), labels).backward()
            update.step()

        return step

    return build


@dataclass(frozen=True)
class Convolution:
    """A 3×3 convolution with bias of 64 pictures that keeps their size, divided by the stride."""

    channels: int
    outputs: int
    size: int
    stride: int = 1

    def __str__(self) -> str:
        text = f"conv {self.channels}-{self.outputs}, {self.size}x{self.size}"
        return text if self.stride == 1 else f"{text}, stride {self.stride}"

    def layer(self, library: Any, requires_grad: bool = False) -> tuple[Any, Any]:
        """The layer, and its input."""
        nn, _ = parts_of(library)
        x = library.randn(64, self.channels, self.size, self.size, requires_grad=requires_grad)
        return nn.Conv2d(self.channels, self.outputs, 3, stride=self.stride, padding=1), x

    def forward(self, library: Any) -> Callable[[], Any]:
        """With a ReLU behind it."""
        layer, x = self.layer(library)
        nn, _ = parts_of(library)
        both = nn.Sequential(layer, nn.ReLU())
        return library.no_grad()(lambda: both(x))

    def backward(self, library: Any) -> Callable[[], Any]:
        """Of the input, the weight and the bias."""
        layer, x = self.layer(library, requires_grad=True)
        out = layer(x)
        g, wanted = library.randn(*out.shape), [x, layer.weight, layer.bias]
        return lambda: library.autograd.grad(out, wanted, g, retain_graph=True)


CONVOLUTIONS = (Convolution(3, 32, 32), Convolution(32, 64, 16), Convolution(32, 64, 32), Convolution(64, 128, 16))


def layer_and_back(build: Callable[[Any], Any], *shape: int) -> Callable[[Any], Callable[[], Any]]:
    """Forward and backward of the layer that `build(nn)` makes, for an input of a shape."""

    def make(library: Any) -> Callable[[], Any]:
        layer, x = build(parts_of(library)[0]), library.randn(*shape, requires_grad=True)
        g = library.randn(*layer(x).shape)
        return lambda: library.autograd.grad(layer(x), [x, *layer.parameters()], g)

    return make


def simple_cnn(library: Any) -> Any:
    """The SimpleCNN of module 09 for pictures of 3×32×32, by PyTorch's names."""
    nn, _ = parts_of(library)
    library.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def resnet_8(library: Any) -> Any:
    """The ResNet-8 for CIFAR of module 09's appendix, by PyTorch's names."""
    nn, _ = parts_of(library)
    F = importlib.import_module(f"{library.__name__}.nn.functional")
    library.manual_seed(0)

    class Block(nn.Module):  # type: ignore[name-defined]
        def __init__(self, before: int, width: int, stride: int) -> None:
            super().__init__()
            self.stride, self.added = stride, (width - before) // 2
            self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

        def forward(self, x: Any) -> Any:
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            if self.added:
                x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
            return F.relu(out + x)

    class ResNet(nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
            self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
            self.fc = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            return self.fc(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))

    return ResNet()


def resnet_9(library: Any) -> Any:
    """The ResNet-9 of DAWNBench's entries for CIFAR-10 (Page, "How to train your ResNet", 2018), by PyTorch's names."""
    nn, _ = parts_of(library)
    library.manual_seed(0)

    def layer(before: int, width: int) -> Any:
        return nn.Sequential(nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    class Residual(nn.Module):  # type: ignore[name-defined]
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = nn.Sequential(layer(width, width), layer(width, width))

        def forward(self, x: Any) -> Any:
            return x + self.inner(x)

    return nn.Sequential(
        layer(3, 64), layer(64, 128), nn.MaxPool2d(2), Residual(128), layer(128, 256), nn.MaxPool2d(2),
        layer(256, 512), nn.MaxPool2d(2), Residual(512), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def picture_step(network: Callable[[Any], Any], batch: int) -> Callable[[Any], Callable[[], Any]]:
    """A training step, with Adam, of a network on pictures of 3×32×32 and ten classes."""

    def build(library: Any) -> Callable[[], Any]:
        nn, optim = parts_of(library)
        model = network(library)
        pictures, labels = library.randn(batch, 3, 32, 32), library.randint(0, 10, (batch,))
        update, loss = optim.Adam(model.parameters(), lr=1e-3), nn.CrossEntropyLoss()

        def step() -> None:
            update.zero_grad()
            loss(model(pictures), labels).backward()
            update.step()

        return step

    return build


def picture_inference(network: Callable[[Any], Any], batch: int) -> Callable[[Any], Callable[[], Any]]:
    """The scores of pictures of 3×32×32."""

    def build(library: Any) -> Callable[[], Any]:
        model, pictures = network(library).eval(), library.randn(batch, 3, 32, 32)
        return library.no_grad()(lambda: model(pictures))

    return build


def gpt_step(layers: int, heads: int, width: int, length: int, batch: int) -> Callable[[Any], Callable[[], Any]]:
    """A training step of a GPT-2 of 65 tokens, with AdamW: the one of nanoGPT, by PyTorch's names."""

    def build(library: Any) -> Callable[[], Any]:
        nn, optim = parts_of(library)
        F = importlib.import_module(f"{library.__name__}.nn.functional")
        library.manual_seed(0)

        class Block(nn.Module):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
                self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
                self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

            def forward(self, x: Any) -> Any:
                query, key, value = (
                    part.reshape(batch, length, heads, width // heads).transpose(1, 2)
                    for part in self.qkv(self.norm1(x)).split(width, dim=2)
                )
                out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
                x = x + self.out(out.transpose(1, 2).reshape(batch, length, width))
                return x + self.down(F.gelu(self.up(self.norm2(x))))

        class GPT(nn.Module):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.tokens, self.positions = nn.Embedding(65, width), nn.Embedding(length, width)
                self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(layers))), nn.LayerNorm(width)

            def forward(self, ids: Any) -> Any:
                x = self.tokens(ids) + self.positions(library.arange(length))
                return F.linear(self.norm(self.blocks(x)), self.tokens.weight)

        model = GPT()
        update = optim.AdamW(model.parameters(), lr=1e-3)
        ids, targets = (library.randint(0, 65, (batch, length)) for _ in range(2))

        def step() -> None:
            update.zero_grad()
            F.cross_entropy(model(ids).reshape(-1, 65), targets.reshape(-1)).backward()
            update.step()

        return step

    return build


LAYERS, HEADS, WIDTH, CONTEXT, WRITTEN = 4, 4, 128, 256, 200


def gpt_writing(batch: int) -> Callable[[Any], Callable[[], Any]]:
    """200 tokens behind 16 of a GPT-2 of 65 tokens, always the most probable: ours by `generate`, PyTorch's with a
    cache that is there from the start."""

    def build(library: Any) -> Callable[[], Any]:
        library.manual_seed(0)
        prompts = [[(7 * row + place) % 65 for place in range(16)] for row in range(batch)]
        if library.__name__ == "tinytorch":
            config = library.GPTConfig(65, CONTEXT, LAYERS, HEADS, WIDTH)
            model = library.GPT(config).eval()
            return lambda: model.generate(prompts, WRITTEN, temperature=0)
        library.set_num_threads(1)  # two are slower here: a token's products are too small to be shared
        model = torch_writer(library, batch)
        return lambda: model(library.tensor(prompts)).tolist()

    return build


def torch_writer(torch: Any, batch: int) -> Any:
    """A GPT-2 in PyTorch that keeps keys and values: (batch, T) ids to WRITTEN more."""
    nn, F = torch.nn, torch.nn.functional

    class Block(nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: Any, keys: Any, values: Any, held: int) -> Any:
            count = x.shape[1]
            stacked = self.qkv(self.norm1(x)).view(batch, count, 3, HEADS, WIDTH // HEADS)
            query, key, value = stacked.permute(2, 0, 3, 1, 4).unbind(0)
            keys[:, :, held : held + count], values[:, :, held : held + count] = key, value
            seen = keys[:, :, : held + count], values[:, :, : held + count]
            out = F.scaled_dot_product_attention(query, *seen, is_causal=count > 1)
            x = x + self.out(out.transpose(1, 2).reshape(batch, count, WIDTH))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Writer(nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(65, WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH)

        def forward(self, ids: Any) -> Any:
            kept = torch.empty(LAYERS, 2, batch, HEADS, CONTEXT, WIDTH // HEADS)
            out, held, new = torch.empty(batch, ids.shape[1] + WRITTEN, dtype=torch.long), 0, ids
            for _ in range(WRITTEN):
                out[:, held : held + new.shape[1]] = new
                x = self.tokens(new) + self.positions.weight[held : held + new.shape[1]]
                for block, (keys, values) in zip(self.blocks, kept, strict=True):
                    x = block(x, keys, values, held)
                held += new.shape[1]
                new = F.linear(self.norm(x[:, -1]), self.tokens.weight).argmax(-1, keepdim=True)
            out[:, held:] = new
            return out

    return torch.inference_mode()(Writer().eval())


def megabyte() -> str:
    """The help that comes with Python, again and again, to 1 MB."""
    from pydoc_data.topics import topics

    text = "\n".join(topics.values())
    return (text * (1 + 1_000_000 // len(text)))[:1_000_000]


def bpe_training(library: Any) -> Callable[[], Any]:
    """Learn 4,096 tokens from 1 MB."""
    text = megabyte()
    if library.__name__ == "tinytorch":
        return lambda: library.BPETokenizer.train(text, 4096)
    level = library.pre_tokenizers.ByteLevel(add_prefix_space=False)

    def train() -> Any:
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = level
        trainer = library.trainers.BpeTrainer(vocab_size=4096, initial_alphabet=level.alphabet(), show_progress=False)
        tokenizer.train_from_iterator([text], trainer)
        return tokenizer

    return train


def bpe_encoding(library: Any) -> Callable[[], Any]:
    """Make 1 MB into tokens, by a tokenizer that has not seen anything yet."""
    text, trained = megabyte(), bpe_training(library)()
    if library.__name__ == "tinytorch":
        return lambda: library.BPETokenizer(trained.merges).encode(text)
    content = trained.to_str()
    return lambda: library.Tokenizer.from_str(content).encode(text)


def integer_product(library: Any) -> Callable[[], Any]:
    """1024×1024 by 1024×1024: ours of int8, NumPy's of float32."""
    if library.__name__ == "numpy":
        a, b = (library.ones((1024, 1024), library.float32) for _ in range(2))
        return lambda: a @ b
    library.manual_seed(0)
    a, weight = (library.randint(-128, 128, (1024, 1024)).to(library.int8).data for _ in range(2))
    from tinytorch.backends import get_backend
    from tinytorch.kernels.cpu.quantized import int8_matmul, pack

    packed, backend = pack(weight), get_backend("cpu")
    return lambda: int8_matmul(backend, a, packed)


SLOWEST = 1 / 0.7  # on a GPU, beside PyTorch
ON_A_GPU = tuple(
    Case(f"{name}, {'TF32' if precision == 'high' else 'float32'}", build, calls, ratio=SLOWEST, device="cuda",
         precision=precision)
    for precision in ("highest", "high")
    for name, build, calls in (
        ("SimpleCNN step, batch 256", picture_step(simple_cnn, 256), 1),
        ("ResNet-9 step, batch 512", picture_step(resnet_9, 512), 1),
        ("GPT step, 6 layers, 384 wide, T 256, batch 64", gpt_step(6, 6, 384, 256, 64), 1),
        ("GPT writing, 4 layers, 128 wide, a token, batch 1", gpt_writing(1), WRITTEN),
        ("GPT writing, 4 layers, 128 wide, a token, batch 64", gpt_writing(64), WRITTEN),
    )
)  # fmt: skip
CASES = (
    Case("x + x, 4 elements", small_op(requires_grad=False), calls=100, seconds=1.5e-6),
    Case("x + x, recorded", small_op(requires_grad=True), calls=100),
    Case("MLP step, SGD", mlp_step("SGD"), ratio=0.9),
    Case("MLP step, Adam", mlp_step("Adam"), ratio=0.9),
    *(Case(f"{c} + ReLU, forward", c.forward, ratio=0.95) for c in CONVOLUTIONS),
    *(Case(f"{c}, backward", c.backward, ratio=0.9) for c in CONVOLUTIONS),
    Case("conv 32-64, 32x32, stride 2 + ReLU, forward", Convolution(32, 64, 32, stride=2).forward),
    Case("conv 32-64, 32x32, stride 2, backward", Convolution(32, 64, 32, stride=2).backward),
    Case("batch norm 64x32x32x32, both ways", layer_and_back(lambda nn: nn.BatchNorm2d(32), 64, 32, 32, 32)),
    Case("max pool 2, 64x32x32x32, both ways", layer_and_back(lambda nn: nn.MaxPool2d(2), 64, 32, 32, 32)),
    Case("average pool 2, 64x32x32x32, both ways", layer_and_back(lambda nn: nn.AvgPool2d(2), 64, 32, 32, 32)),
    Case("SimpleCNN step, batch 64", picture_step(simple_cnn, 64), ratio=0.5),
    Case("SimpleCNN inference, batch 64", picture_inference(simple_cnn, 64), ratio=0.35),
    Case("SimpleCNN inference, batch 1", picture_inference(simple_cnn, 1), ratio=0.8),
    Case("SimpleCNN step, batch 256, peak memory", picture_step(simple_cnn, 256), ratio=1.5, memory=True),
    Case("ResNet-8 step, batch 128", picture_step(resnet_8, 128), ratio=0.7),
    Case("GPT step, 4 layers, 128 wide, T 64, batch 12", gpt_step(4, 4, 128, 64, 12), ratio=0.5),
    Case("GPT step, 6 layers, 256 wide, T 128, batch 8", gpt_step(6, 8, 256, 128, 8), ratio=0.5),
    Case("GPT step, 2 layers, 64 wide, T 32, batch 8", gpt_step(2, 2, 64, 32, 8), ratio=0.75),
    Case("GPT writing, 4 layers, 128 wide, a token, batch 1", gpt_writing(1), calls=WRITTEN, ratio=1 / 3),
    Case("GPT writing, 4 layers, 128 wide, a token, batch 8", gpt_writing(8), calls=WRITTEN, ratio=1 / 3),
    Case(
        "1024^3 product, int8 beside NumPy's float32", integer_product, ratio=1 / 3, reference="numpy", one_thread=True
    ),
    Case("BPE training, 1 MB to 4,096 tokens", bpe_training, seconds=10.0, reference="tokenizers"),
    Case("BPE encoding, 1 MB", bpe_encoding, seconds=1.0, reference="tokenizers"),
    Case("import", lambda library: lambda: None, seconds=0.1),  # measured by IMPORT_PROGRAM
    *ON_A_GPU,
)
IMPORT_PROGRAM = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def time_of(call: Callable[[], Any], budget: float = 1.0) -> float:
    """Median seconds of a call: samples of about 2 ms, for `budget` seconds, and seven unless they take too long."""
    one = statistics.median(samples(call, 1, budget / 3))  # a warm-up: the first calls load code and start threads
    return statistics.median(samples(call, max(1, int(0.002 / one)), budget))


def samples(call: Callable[[], Any], calls: int, budget: float) -> list[float]:
    """Seconds of a call, each a mean over `calls` of them."""
    start, found = time.perf_counter(), list[float]()
    while (passed := time.perf_counter() - start) < budget or (len(found) < 7 and passed < 5 * budget):
        before = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - before) / calls)
    return found


def bytes_of(call: Callable[[], Any]) -> float:
    """How far this process's memory rises above what it is now while the call is made a few times."""
    with open(CLEAR_REFS, "w") as file:
        file.write("5")
    before = kilobytes("VmRSS")
    for _ in range(3):
        call()
    return 1024.0 * (kilobytes("VmHWM") - before)


def kilobytes(field: str) -> int:
    """A field of this process's status. Read here: importing our backends would change how PyTorch gets its memory."""
    with open("/proc/self/status") as status:
        return int(dict(line.split(":", 1) for line in status)[field].split()[0])


def measure(library: str, case: str, budget: float = 1.0) -> float:
    """The figure of a case on a library, seconds or bytes, measured for `budget` seconds in a new process."""
    environment = {name: value for name, value in os.environ.items() if name not in SLOWING} | ONE_CORE
    if any(known.one_thread for known in CASES if known.name == case):
        environment |= ONE_THREAD
    command = [sys.executable, "-m", "tinytorch.profiling.bench", "--measure", library, case, "--budget", str(budget)]
    if case == "import":
        command = [sys.executable, "-c", IMPORT_PROGRAM.format(library)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{case} on {library} failed:\n{run.stderr}")
    return float(run.stdout)


def measure_here(library_name: str, name: str, budget: float = 1.0) -> float:
    """The same, in this process."""
    case, library = next(case for case in CASES if case.name == name), importlib.import_module(library_name)
    if case.memory:
        return bytes_of(case.build(library))
    if case.device == "cpu":
        return time_of(case.build(library), budget) / case.calls
    library.set_default_device(case.device)
    library.set_float32_matmul_precision(case.precision)
    if library_name == "torch":  # its convolutions go by a switch of their own, which is on from the start
        library.backends.cudnn.allow_tf32 = case.precision == "high"
    call = case.build(library)

    def waited_for() -> None:
        call()
        library.cuda.synchronize()

    return time_of(waited_for, budget) / case.calls


def compare(case: Case, rounds: int, reference: str | None, budget: float = 1.0) -> dict[str, Any]:
    """Our time, the reference's and their ratio, in turn over the rounds; and whether the limit holds."""
    pairs = [
        (measure("tinytorch", case.name, budget), reference and measure(reference, case.name, budget))
        for _ in range(rounds)
    ]
    ours = min(mine for mine, _ in pairs)
    theirs = min(other for _, other in pairs if other) if reference else None
    ratio = statistics.median(mine / other for mine, other in pairs if other) if reference else None
    within = None
    if case.seconds is not None:
        within = ours <= case.seconds
    elif case.ratio is not None and ratio is not None:
        within = ratio <= case.ratio
    unit = "bytes" if case.memory else "seconds"
    return {"case": case.name, "reference": reference, unit: ours, f"reference_{unit}": theirs, "ratio": ratio,
            "limit_seconds": case.seconds, "limit_ratio": case.ratio, "within": within}  # fmt: skip


def show_figure(row: dict[str, Any], whose: str = "") -> str:
    """Ours, or with "reference_" the other library's."""
    if f"{whose}bytes" in row:
        return f"{row[f'{whose}bytes'] / 1e6:.0f} MB" if row[f"{whose}bytes"] is not None else "–"
    return show(row[f"{whose}seconds"])


def show(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-4 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def show_limit(row: dict[str, Any]) -> str:
    if row["limit_seconds"] is not None:
        return f"{show(row['limit_seconds'])}"
    return f"{row['limit_ratio']:.3g} x" if row["limit_ratio"] is not None else "–"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tinytorch.profiling.bench",
        description="Time TinyTorch beside PyTorch, each measurement in a process of its own.",
        epilog="example: python -m tinytorch.profiling.bench --rounds 3 --only MLP",
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each case on each library (5)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this text in their name")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="which cases: those of cpu (default)")
    parser.add_argument("--budget", type=float, default=1.0, metavar="SECONDS", help="for each measurement (1)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--measure", nargs=2, metavar=("LIBRARY", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if not options.budget > 0:
        parser.error(f"--budget: expected more than 0 seconds, got {options.budget}")
    if options.measure:
        library, case = options.measure
        print(measure_here(library, case, options.budget))
        return 0
    of_device = [case for case in CASES if case.device == options.device]
    measurable = [case for case in of_device if not case.memory or os.path.exists(CLEAR_REFS)]
    chosen = [case for case in measurable if options.only.lower() in case.name.lower()]
    if not chosen:
        parser.error(f"--only: no case has {options.only!r} in its name; they are {[case.name for case in of_device]}")
    if options.device == "cuda":
        from tinytorch import cuda  # an error, if there is none

        print(f"on {cuda.get_device_name()}", file=sys.stderr)
    rows = with_progress(chosen, options.rounds, options.budget, quiet=options.json)
    report(rows, as_json=options.json)
    return 0 if all(row["within"] in (True, None) for row in rows) else 1


def with_progress(cases: list[Case], rounds: int, budget: float, quiet: bool) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True, quiet=quiet)
    here = {case.reference for case in cases if importlib.util.find_spec(case.reference)}
    return [
        compare(case, rounds, case.reference if case.reference in here else None, budget)
        for case in track(cases, "measuring", console=console)
    ]


def report(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"cases": rows, "cpus": os.cpu_count()}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "TinyTorch", "other", "ratio", "limit", "")
    for row in rows:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        verdict = {True: "ok", False: "too slow", None: ""}[row["within"]]
        table.add_row(row["case"], show_figure(row), show_figure(row, "reference_"), ratio, show_limit(row), verdict)
    Console().print(table)
    print("The other library is PyTorch. Beside BPE it is tokenizers, beside int8 NumPy, both on one core.")
    if any(row["ratio"] is None for row in rows):
        print("Where there is no ratio, it is not installed here: nox -s bench installs both.")


if __name__ == "__main__":
    sys.exit(main())
