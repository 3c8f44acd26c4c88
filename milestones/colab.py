# %% [markdown]
# # TinyTorch on a GPU
#
# A CNN that sees and a GPT that writes, trained on whatever this machine has: in Colab, choose *Runtime → Change
# runtime type → T4 GPU* first. Without a GPU the same cells run on the CPU, with NumPy in CuPy's place.
#
# The notebook is made of `milestones/colab.py` by `nox -s notebook`.

# %%
import importlib.util
import math
import subprocess
import sys

if importlib.util.find_spec("tinytorch") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "tinytorch-systems[cuda12]"], check=True)

import tinytorch as tt
from tinytorch import Trainer, nn, optim
from tinytorch.utils.data import DataLoader, Subset

device = "cuda" if tt.cuda.is_available() else "cpu"
tt.set_default_device(device)
tt.manual_seed(0)
print(f"computing on {tt.cuda.get_device_name() if device == 'cuda' else 'the CPU'}")

# %% [markdown]
# ## A network that sees
# 1,437 handwritten digits of 8×8 pixels to learn from, 360 to be tested with. Batches are made ahead on the CPU, in
# page-locked memory where there is a GPU, which copies them from there on its own.

# %%
pictures, unseen = tt.datasets.Digits(), tt.datasets.Digits(train=False)
batches = DataLoader(pictures, batch_size=64, shuffle=True, pin_memory=True)
cnn = tt.SimpleCNN(1, 10, 8, widths=(32, 64), batch_norm=True).to(device)
trainer = Trainer(
    cnn, optim.AdamW(cnn.parameters(), lr=3e-3), nn.CrossEntropyLoss(), metrics={"accuracy": tt.accuracy},
    callbacks=[tt.ProgressBar()], device=device,
)  # fmt: skip
history = trainer.fit(batches, epochs=8, validation=DataLoader(unseen, batch_size=360))
print(f"reads {history[-1]['val_accuracy']:.1%} of digits that it has not seen")

# %% [markdown]
# ## Where does the time go?
# Each operation of one step, forward and backward, with its arithmetic and its traffic. On a GPU, "device ms" is how
# long it was busy; the rest is Python, which runs ahead of it.

# %%
inputs, labels = (part.to(device) for part in next(iter(batches)))
with tt.profile() as p:
    nn.functional.cross_entropy(cnn(inputs), labels).backward()
print(p.table(rows=8))

# %% [markdown]
# ## A network that writes
# A GPT reads Python's own help text a character at a time, and learns what comes next. With a GPU it is larger, and its
# products are of float16: a `GradScaler` keeps small gradients from becoming 0.

# %%
text = tt.datasets.PythonDocs().text
tokenizer = tt.CharTokenizer.train(text)
ids = tokenizer.encode(text)
layers, width, context, steps = (6, 384, 256, 1000) if device == "cuda" else (2, 64, 32, 150)


def loss(scores: tt.Tensor, targets: tt.Tensor) -> tt.Tensor:
    """The mean over all places of a batch: (B, T, V) scores of what comes next, and (B, T) what does."""
    return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())


gpt = tt.GPT(tt.GPTConfig(tokenizer.vocab_size, context, layers, width // 32, width)).to(device)
windows = tt.utils.data.TokenWindows(ids, context)
chosen = Subset(windows, tt.randint(len(windows), (16 * steps,), device="cpu").tolist())
writer = Trainer(
    gpt, optim.AdamW(gpt.parameters(), lr=1e-3), loss, clip_norm=1.0, callbacks=[tt.ProgressBar()],
    precision="float16" if device == "cuda" else "float32", device=device,
)  # fmt: skip
learned = writer.fit(DataLoader(chosen, batch_size=16, pin_memory=True), epochs=1)
print(f"{learned[-1]['loss']:.2f} nats a character on average; guessing takes {math.log(tokenizer.vocab_size):.2f}")

# %%
start = "def "
(written,) = gpt.generate([tokenizer.encode(start)], 200, temperature=0.8, top_k=20, seed=1)
print(tokenizer.decode(written))

# %% [markdown]
# ## How much memory?
# What arrays take of the device, and what CuPy keeps to hand out again. `tinytorch doctor`, `tinytorch profile gpt
# --device cuda` and `tinytorch bench gpt --device cuda` tell more.

# %%
if device == "cuda":
    free, total = tt.cuda.mem_get_info()
    print(f"arrays {tt.cuda.memory_allocated() / 1e6:,.0f} MB, CuPy's pool {tt.cuda.memory_reserved() / 1e6:,.0f} MB, "
          f"free {free / 1e6:,.0f} of {total / 1e6:,.0f} MB")  # fmt: skip
