"""The faults that `run.py` plants: small mistakes, of the kind that people make, in the modules and the backends.

Each is a text that occurs once in a file, what it becomes, and the mistake in words. When a text has changed, the fault
changes with it; a fault that no test sees asks for a test, and is not made easier to see.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The tests of each floor, quickest first; patterns, because a floor's tests may lie in more than one file.
EDGES = "tests/modules/test_edges.py"
CHAPTER_TESTS = {
    "01": ("tinytorch/m01_*.py", EDGES, "tests/checkpoints/test_01_*.py"),
    "02": ("tinytorch/m02_*.py", EDGES, "tests/modules/test_tensor*.py", "tests/checkpoints/test_02_*.py"),
    "03": ("tinytorch/m03_*.py", EDGES, "tests/modules/test_activations*.py", "tests/checkpoints/test_03_*.py"),
    "04": ("tinytorch/m04_*.py", EDGES, "tests/modules/test_layers*.py", "tests/modules/test_save_load*.py"),
    "05": ("tinytorch/m05_*.py", EDGES, "tests/modules/test_losses*.py", "tests/checkpoints/test_05_*.py"),
    "06": ("tinytorch/m06_*.py", EDGES, "tests/modules/test_autograd*.py", "tests/checkpoints/test_06_*.py"),
    "07": ("tinytorch/m07_*.py", EDGES, "tests/modules/test_optimizer*.py", "tests/checkpoints/test_07_*.py"),
    "08": ("tinytorch/m08_*.py", EDGES, "tests/modules/test_training*.py", "tests/checkpoints/test_08_*.py"),
    "09": ("tinytorch/m09_*.py", EDGES, "tests/modules/test_spatial*.py", "tests/checkpoints/test_09_*.py"),
    "10": ("tinytorch/m10_*.py", "tests/modules/test_dataloader.py", "tests/checkpoints/test_10_*.py"),
    "11": ("tinytorch/m11_*.py", "tests/modules/test_tokenization*.py", "tests/checkpoints/test_11_*.py"),
    "backends": ("tests/backends", EDGES, "tests/modules/test_tensor*.py", "tests/modules/test_autograd*.py"),
}
VALUES = ("tests/ops/test_ops.py::test_limits", "tests/ops/test_ops.py::test_values_and_dtypes")
PROMOTION = ("tests/ops/test_properties.py::test_promotion_of_two_tensors",)
RULES = ("tests/ops/test_ops.py::test_slopes_where_there_is_a_choice", "tests/ops/test_ops.py::test_gradients")


SPATIAL_TESTS = ("tinytorch/m09_*.py", "tests/modules/test_spatial*.py", "tests/checkpoints/test_09_*.py")
DATASETS = ("tests/modules/test_datasets.py",)
TRANSFORMS = ("tests/modules/test_transforms.py",)


@dataclass(frozen=True)
class Fault:
    """One mistake: in a file, a text that occurs once, and what it becomes.

    Attributes:
        what: the mistake in words.
        patterns: the tests that should see it: files, patterns of files, or test functions in them.
        devices: what they run on.
    """

    file: str
    old: str
    new: str
    what: str
    patterns: tuple[str, ...]
    devices: str = "cpu"

    def tests(self) -> tuple[str, ...]:
        """The tests that the patterns stand for, in the files that exist."""
        found = []
        for pattern in self.patterns:
            files, colons, function = pattern.partition("::")
            found += [path.relative_to(ROOT).as_posix() + colons + function for path in sorted(ROOT.glob(files))]
        return tuple(found)

    def planted(self, source: str) -> str:
        """The file's text with the fault in it; ValueError if it has no place there, or is no Python."""
        if source.count(self.old) != 1:
            raise ValueError(f"its text occurs {source.count(self.old)} times in {self.file}, not once: {self.old!r}")
        text = source.replace(self.old, self.new)
        try:
            compile(text, self.file, "exec")
        except SyntaxError as error:
            raise ValueError(f"it is no Python: {error}") from None
        return text


def faults_in(file: str, *rows: tuple[str, str, str], tests: tuple[str, ...] = (), devices: str = "cpu") -> list[Fault]:
    """Faults of one file, (old, new, what) each; seen by the tests of its floor unless others are named."""
    floor = "backends" if file.startswith("backends/") else Path(file).name[1:3]
    return [Fault(file, old, new, what, tests or CHAPTER_TESTS[floor], devices) for old, new, what in rows]


TENSOR = [
    *faults_in(
        "tinytorch/m02_tensor.py",
        ('host.cast(array, dtype or _default["dtype"])', 'host.cast(array, _default["dtype"])',
         "Python floats are rounded to float32 on their way to float64"),
        ("backend.asarray(_to_array(data, dtype, backend.device), copy=True)",
         "backend.asarray(_to_array(data, dtype, backend.device))", "tensor(array) shares the array's memory"),
        ("lambda self, other: call(other, self)", "lambda self, other: call(self, other)", "2 - x is x - 2"),
        ('@op(dtypes="float")\ndef div(', '@op(dtypes="common")\ndef div(', "integers divided give float64"),
        ("in NUMBERS and b == 2 else", "in NUMBERS and b >= 2 else", "x ** 3 is x * x"),
        ('xp.sum(x if xp.is_floating(x) else xp.cast(x, "int64"), axis=dim', "xp.sum(x, axis=dim",
         "the sum of small integers has the array library's dtype"),
        ("return xp.max(x, axis=dim, keepdims=keepdim)", "return xp.max(x, axis=dim)", "amax forgets keepdim"),
        ("dim %= x.ndim + 1", "dim %= x.ndim", "unsqueeze(-1) is off by one"),
        ("cat([unsqueeze(x, dim) for x in tensors], dim)", "cat([unsqueeze(x, dim) for x in tensors])",
         "stack joins along axis 0 whatever dim is"),
        ('"""A copy."""\n    return xp.asarray(x, copy=True)', '"""A copy."""\n    return xp.asarray(x)',
         "clone is a view"),
    ),
    *faults_in(
        "tinytorch/m02_tensor.py",
        ("if x.dtype is not dtype:\n                dtype = SEVERAL",
         "if x.dtype is not dtype:\n                pass",
         "the door takes inputs of different dtypes for alike"),
        ("a, b = xp.promote([a, b])", "a, b = a, b", "where does not promote its branches"),
        ("xp.concat(xp.promote(list(tensors)), axis=dim)", "xp.concat(list(tensors), axis=dim)",
         "cat does not promote"),
        tests=PROMOTION,
    ),
    *faults_in(
        "tinytorch/m02_tensor.py",
        ("x.shape[i - lead] if n == -1", "x.shape[i] if n == -1", "-1 in expand counts from the wrong side"),
        tests=VALUES,
    ),
    *faults_in(
        "tinytorch/m02_tensor_appendix.py",
        ("from None\n        Writes.note(self.data)", "from None", "x.add_(…) is not noted as a write"),
        ("[x.data, raw]) from None\n    Writes.note(x.data)", "[x.data, raw]) from None",
         "x[i] = … is not noted as a write"),
        ("recorder.wants(self, *others)", "recorder.wants(self)",
         "an untracked tensor is changed by a tracked one without a record"),
        ("if backend.is_floating(value) and not backend.is_floating(array):", "if False:",
         "floats are written into integers, truncated"),
        ("copied.watched = self.watched", "copied.watched = False", "a deep copy forgets that it requires grad"),
        ("return clone(reshape(x, shape=shape))", "return reshape(x, shape=shape)", "repeat(1, 1) is a view"),
        ("/ weights\n    return topk(race", "* weights\n    return topk(race", "multinomial prefers small weights"),
        ("drawn = drawn * bounds[..., -1:]", "drawn = drawn", "multinomial takes weights for probabilities"),
        ("rand_like(probabilities) < probabilities", "rand_like(probabilities) > probabilities",
         "bernoulli draws 0 for 1"),
    ),
    *faults_in(
        "tinytorch/m02_tensor_appendix.py",
        ("axis=dim, correction=correction", "axis=dim, correction=0", "var ignores its correction"),
        ("xp.log(xp.sum(xp.exp(x - top), axis=dim, keepdims=True)) + top",
         "xp.log(xp.sum(xp.exp(x), axis=dim, keepdims=True))", "logsumexp overflows"),
        ("top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))", "top = top + 0", "logsumexp of -inf is nan"),
        ("** (1 / p)", "** 0.5", "every p-norm takes the square root"),
        ("for i in range(len(pad) - 2, -1, -2)]", "for i in range(0, len(pad), 2)]", "pad counts axes from the first"),
        ("xp.scatter_add(xp.asarray(x, copy=True), index, values)", "xp.scatter_add(x, index, values)",
         "index_add writes into its input"),
        ("_rows_minus_columns(x) >= -diagonal", "_rows_minus_columns(x) > -diagonal", "tril loses its diagonal"),
        ("-(-x.shape[dim] // chunks)", "x.shape[dim] // chunks", "chunk rounds the length of a piece down"),
        tests=VALUES,
    ),
]  # fmt: skip

BACKENDS = [
    *faults_in(
        "backends/base.py",
        ('self.default_float if strongest is float else "int64"', '"float64" if strongest is float else "int64"',
         "integers times a Python float are float64"),
        ("return a if rank_a > rank_b else b", 'return "float64"', "int64 with float32 is float64"),
        ("wanted = name if wanted is None else self.promoted_name(wanted, name)", "wanted = wanted or name",
         "the first array's dtype wins"),
    ),
    *faults_in(
        "backends/numpy.py",
        ("np.add.at(x, index, values)", "x[index] += values", "scatter_add counts a repeated place once"),
        ("array.base is None\n", "array is not None\n", "a view is taken for the owner of its memory"),
        ("while isinstance(array.base, np.ndarray):\n            array", "while False:\n            array",
         "a write into a view is not a write into its tensor"),
        ("float(x) if type(x) is np.float64 else x", "x", "NumPy's float scalars widen float32"),
        ("np.clip(x, np.float32(-4), np.float32(4))", "np.clip(x, np.float32(-3), np.float32(3))",
         "erf of float32 stops at 0.99998"),
        ("for s in (*stride, *dilation)", "for s in (*dilation, *stride)",
         "sliding windows exchange stride and dilation"),
    ),
    *faults_in(
        "backends/generic.py",
        ("np.add.at(host, self._to_host(index), self.to_numpy(values))",
         "host[self._to_host(index)] += self.to_numpy(values)", "scatter_add counts a repeated place once"),
        ("x[parts if ... in parts else (*parts, ...)]", "x[index]",
         "axes that an index leaves out are not written out"),
        devices="array_api_strict",
    ),
    *faults_in(
        "backends/__init__.py",
        ("    backend.seed(_seed)\n", "", "a backend that is made after manual_seed is not seeded"),
    ),
    *faults_in(
        "tinytorch/m01_setup.py",
        ("temporary.unlink(missing_ok=True)\n        raise", "raise",
         "a failed atomic_write leaves its temporary file"),
        ("os.replace(temporary, path)", "path.write_bytes(temporary.read_bytes())\n        temporary.unlink()",
         "atomic_write copies where it should rename"),
    ),
]  # fmt: skip

ACTIVATIONS = [
    *faults_in(
        "tinytorch/m03_activations.py",
        ("return xp.maximum(x, 0)\n", "return x * xp.astype(x > 0, x.dtype)\n", "relu of -inf is nan"),
        ("y /= 1 + xp.exp(-xp.abs(x))", "y /= 1 + xp.exp(-x)", "sigmoid is wrong, or overflows, below 0"),
        ("xp.erf(x * math.sqrt(0.5))", "xp.erf(x * 0.5)", "gelu divides by 2 in the place of its root"),
        ("inner *= 0.044715", "inner *= 0.04715", "a digit of gelu's constant is lost"),
        ("    y /= beta\n", "", "softplus is not divided by beta"),
        ("xp.astype(z <= threshold, x.dtype)", "xp.astype(x <= threshold, x.dtype)",
         "softplus compares x, not beta x, with its threshold"),
        ("y *= alpha\n    y += xp.maximum(x, 0.0)", "y += xp.maximum(x, 0.0)\n    y *= alpha",
         "elu multiplies its right side by alpha too"),
        ("y = x - xp.max(x, axis=dim, keepdims=True)\n    y = xp.exp(y)", "y = xp.exp(x)", "softmax overflows"),
        ("y /= xp.sum(y, axis=dim, keepdims=True)", "y /= xp.sum(y, axis=-1, keepdims=True)",
         "softmax adds up the last axis whatever dim is"),
        ("y -= xp.log(xp.sum(xp.exp(y), axis=dim, keepdims=True))",
         "y = x - xp.log(xp.sum(xp.exp(x), axis=dim, keepdims=True))", "log_softmax overflows"),
        ("y -= xp.log(xp.sum(xp.exp(y), axis=dim, keepdims=True))\n    return y",
         "return xp.log(softmax.function(xp, x, dim=dim))", "log_softmax is the logarithm of 0"),
        ("type(self).operation(x, **vars(self))", "type(self).operation(x)",
         "activation layers forget their attributes"),
    ),
    *faults_in(
        "tinytorch/m03_activations_appendix.py",
        ("minimum(x, 0.0) - log1p(exp(-abs(x)))", "-log1p(exp(-x))", "logsigmoid overflows"),
        ("alpha * elu(x / alpha)", "alpha * elu(x)", "celu does not divide by alpha"),
        ("value, gate = chunk(x, 2, dim)", "gate, value = chunk(x, 2, dim)", "glu exchanges value and gate"),
        ("value, gate = chunk(x, 2, dim)", "value, gate = chunk(x, 2, -1)", "glu halves the last axis whatever dim is"),
        ("(count, *(1,) * (x.ndim - 2))", "(count,)", "prelu's slopes belong to the last axis"),
        ("where(abs(x) <= lambd, 0, x)", "where(abs(x) < lambd, 0, x)", "hardshrink keeps lambd itself"),
    ),
]  # fmt: skip

LAYERS = [
    *faults_in(
        "tinytorch/m04_layers.py",
        ("for module in self.modules():\n            module.training = bool(mode)", "self.training = bool(mode)",
         "eval() stops at the first level"),
        ("if id(value) not in seen:", "if value is not None:", "a shared parameter is counted twice"),
        ("if self._buffers[name] and not isinstance(buffer, Parameter):", "if isinstance(buffer, Parameter):",
         "the state lacks the buffers"),
        ("if self._buffers[name] and not isinstance(buffer, Parameter):", "if not isinstance(buffer, Parameter):",
         "buffers that are not persistent are saved"),
        ("overwrite(own[name], array)", "own[name].data = array", "load_state_dict shares the memory of the state"),
        ("if found != own[name].shape:", "if len(found) != len(own[name].shape):",
         "load_state_dict compares the numbers of axes only"),
        ('{"missing": missing, "unexpected": unexpected} if strict else {}', '{"missing": missing} if strict else {}',
         "unexpected names are passed over"),
        ("_write(x.data, ..., values)\n    Writes.note(x.data)", "_write(x.data, ..., values)",
         "overwriting a parameter is not noted as a write"),
        ("to(Tensor(x.data), device=moved.device)\n", "moved\n", "to(float64) makes integer buffers floats"),
        ("return x.shape[1] * window, x.shape[0] * window", "return x.shape[0] * window, x.shape[1] * window",
         "fan_in and fan_out are exchanged"),
        ('[mode == "fan_out"]', '[mode == "fan_in"]', "Kaiming's modes are exchanged"),
        ("bound = 1 / math.sqrt(self.in_features)", "bound = 1 / math.sqrt(self.out_features)",
         "the bias starts at the scale of the outputs"),
        (") >= p\n", ") < p\n", "dropout drops with probability 1 - p"),
        ("kept.to(x.dtype) * (0.0 if p == 1 else 1 / (1 - p))", "kept.to(x.dtype)",
         "dropout does not scale what it keeps"),
        ("if not training or p == 0:", "if p == 0:", "dropout goes on in evaluation mode"),
        ("output = output if changed is None else changed", "output = changed or output",
         "a hook's result is judged by its truth"),
        ("return dict(list(self._layers().items())[index])", "return _numbered(list(self)[index])",
         "a slice of a Sequential renames its layers"),
    ),
    *faults_in(
        "tinytorch/m04_layers_appendix.py",
        ("if stated is not None and stated != _checksum(header, payload):", "if stated is not None and not stated:",
         "the checksum of a file is not compared"),
        ("    digest.update(payload)\n", "", "the checksum is of the header alone"),
        ('atomic_write(path, lambda file: file.writelines([len(text).to_bytes(8, "little"), text, payload]))',
         'Path(path).write_bytes(len(text).to_bytes(8, "little") + text + bytes(payload))',
         "save writes over the old file"),
        ('header = {name: header[name] for name in ("__metadata__", *tensors)}', "header = dict(header)",
         "a saved state loses its order"),
        ("<< 16)", "<< 8)", "bfloat16 is read in the wrong place"),
        ("while xp.any(outside", "if xp.any(outside", "trunc_normal_ draws again only once"),
        ("math.sqrt(2 / sum(fans(x)))", "math.sqrt(1 / sum(fans(x)))", "xavier_normal_ halves the variance"),
        ("layers.insert(index, layer)", "layers.insert(index + 1, layer)", "ModuleList.insert is off by one"),
    ),
]  # fmt: skip

LOSSES = [
    *faults_in(
        "tinytorch/m05_losses.py",
        ("clipped * (difference - 0.5 * clipped)", "clipped * (difference - clipped)", "Huber's loss has no half"),
        ("_huber(difference, beta) / beta if beta", "_huber(difference, beta) if beta",
         "smooth_l1_loss is not divided by beta"),
        ("shifted = logits - xp.max(logits, axis=1, keepdims=True)", "shifted = logits + 0", "cross-entropy overflows"),
        ("int(xp.max(classes)) < count", "int(xp.max(classes)) <= count", "label C is taken for a class"),
        ("losses = where(ignored, 0.0, losses)", "losses = losses * (ignored == False).to(losses.dtype)",
         "an ignored loss of infinity makes nan"),
        ("shares = where(ignored, 0.0, 1.0 if shares is None else shares)",
         "shares = None if shares is None else where(ignored, 0.0, shares)", "ignored positions count in the mean"),
        ("shares = where(ignored, 0.0, 1.0 if shares is None else shares)",
         "shares = where(ignored, 0.0, 1.0) if shares is None else shares",
         "ignored positions count in the weighted mean"),
        ("return sum(losses) / sum(shares)", "return mean(losses)", "the weighted mean is divided by N"),
        ("reshape(movedim(input, axis, -1), shape=(", "reshape(input, shape=(",
         "scores of images are reshaped unmoved"),
        ("even = -mean(_times(log_probabilities, weight), dim=1)",
         "even = -sum(_times(log_probabilities, weight), dim=1) / (rows.shape[1] - 1)",
         "label smoothing shares among C - 1 classes"),
        ("label_smoothing / input.shape[axis]", "label_smoothing / (input.shape[axis] - 1)",
         "label smoothing of probabilities shares among C - 1 classes"),
        ("shape=(-1, *(1,) * (input.ndim - axis - 1))", "shape=(-1,)", "class weights belong to the last axis"),
        ("yes = xp.maximum(xp.log(probabilities), -100.0)", "yes = xp.log(probabilities)",
         "binary cross-entropy of a certain mistake is infinite"),
        ("no = (1 - target) * softplus(input, threshold=math.inf)",
         "no = _times((1 - target) * softplus(input, threshold=math.inf), pos_weight)",
         "pos_weight counts for zeros too"),
        ("return sum(losses) / losses.shape[0]", "return mean(losses)", "batchmean is the mean over elements"),
        ("log(where(target == 0, 1.0, target))", "log(target)", "kl_div of a zero is nan"),
    ),
    *faults_in(
        "tinytorch/m05_losses_appendix.py",
        ("0.5 * (log(floored) + (input - target) ** 2 / floored)",
         "log(floored) + 0.5 * (input - target) ** 2 / floored", "gaussian_nll_loss counts log(var) twice"),
        ("relu(margin - target * (input1 - input2))", "relu(margin + target * (input1 - input2))",
         "margin_ranking_loss prefers the wrong order"),
        ("where(target == 1, 1 - cosine, relu(cosine - margin))",
         "where(target == 1, 1 - cosine, relu(cosine + margin))",
         "the margin of cosine_embedding_loss has the wrong sign"),
        ("where(target > 1, stirling, 0.0)", "stirling", "Stirling's formula is added below 2"),
        ("minimum(far, pairwise_distance(positive, negative, p, eps))", "pairwise_distance(positive, negative, p, eps)",
         "triplet_margin_loss swaps always"),
    ),
]  # fmt: skip

AUTOGRAD = [
    *faults_in(
        "tinytorch/m06_autograd.py",
        ("self._places(rules.together, tuple(tracked)))]", "self._places(rules.together, ()))]",
         "a rule for all inputs is not told which are tracked"),
        ("found += [(self.parents[j], part[i]) for j, i in k]", "found += [(self.parents[j], part[j]) for j, i in k]",
         "a rule's gradients go to the wrong inputs if not all are tracked"),
        ("b=lambda g: -g)", "b=lambda g: g)", "the rule of a - b has the wrong sign"),
        ("b=lambda g, b, out: -(g * out) / b)", "b=lambda g, b, out: -(g * out))", "the rule of a / b divides once"),
        ("x=lambda g, out: g / (2 * out))", "x=lambda g, out: g / out)", "the rule of sqrt lacks its half"),
        ("spread(g / reduced_count(x_shape, dim), x_shape", "spread(g, x_shape", "the rule of mean is that of sum"),
        (" * mask / sum(mask, dim=dim, keepdim=True)", " * mask", "equal maxima each get the whole gradient"),
        ("permute(g, dims=sorted(range(len(dims)), key=lambda i: dims[i] % len(dims)))", "permute(g, dims=dims)",
         "the rule of permute does not invert it"),
        ("b=lambda g, condition: where(condition, 0, g))", "b=lambda g, condition: where(condition, g, 0))",
         "both branches of where get the gradient of the first"),
        ("mul(g, out > 0)", "mul(g, out >= 0)", "relu passes gradients on where it is 0"),
        ("out * (g - sum(g * out, dim=dim, keepdim=True))", "out * (g - sum(g * out, dim=-1, keepdim=True))",
         "the rule of softmax sums over the last axis"),
        ("g - exp(out) * sum(g, dim=dim, keepdim=True)", "g - exp(out) * g", "the rule of log_softmax lacks its sum"),
        ("x=lambda g, out: g * (1 - out * out))", "x=lambda g, out: g * (1 - out))",
         "the rule of tanh lacks its square"),
        ("take_index(out, hits) - scale", "take_index(out, hits) - 1", "cross-entropy's rule takes every scale for 1"),
        ("start = builtins.sum(shape[dim] for shape in tensors_shape[:position])",
         "start = position * tensors_shape[position][dim]", "the rule of cat takes all pieces for equally long"),
        ("return xp.scatter_add(zero, index, g)", "xp.assign(zero, index, g)\n    return zero",
         "x[[0, 0]] passes one of two gradients on"),
        ("return g * 0 if b == 0 else", "return", "x ** 0 has the slope nan at 0"),
        tests=RULES,
    ),
    *faults_in(
        "tinytorch/m06_autograd.py",
        ("reshape(sum(g, dim=axes, keepdim=True), shape=tuple(shape))",
         "reshape(mean(g, dim=axes, keepdim=True), shape=tuple(shape))", "un-broadcasting takes the mean"),
        ("if part.shape != target.shape:", "if len(part.shape) != len(target.shape):",
         "axes of length 1 are not summed back"),
        ("if array.dtype != target.dtype:", "if target is None:", "gradients keep the widest dtype"),
        ("return clone(part) if part is g and target is not parent and part is array else part", "return part",
         "two leaves share one gradient array"),
        ("Tensor(g if backend.owns_memory(g) else backend.asarray(g, copy=True))", "Tensor(g)",
         "a leaf's gradient is a view of somebody's array"),
        ("    return a + b\n", "    a += b\n    return a\n", "gradients are added up in an array that others hold"),
        ("leaf.grad.data += g\n", "leaf.grad.data = g\n", "a second backward replaces the gradient"),
        ("leaf.grad.data += g\n        Writes.note(leaf.grad.data)", "leaf.grad.data += g",
         "adding to a gradient is not noted as a write"),
        ('(value,) if kind in ("input", "out") else ()', '(value,) if kind == "input" else ()',
         "a changed output is not noticed"),
        ("if Writes.latest > self.number:", "if Writes.latest < self.number:", "a changed value is not noticed"),
        ("(-node.number, node)", "(node.number, node)", "backward visits the oldest first"),
        ("if not (create_graph if retain_graph is None else retain_graph):", "if retain_graph is False:",
         "backward does not free the graph"),
        ("g = call_hook(hook, g)", "call_hook(hook, g)", "what a hook returns is dropped"),
        ("if wanted is None:\n                accumulate(node, g)", "accumulate(node, g)", "grad() adds to .grad"),
        ("mode.enabled = self.before.pop()", "mode.enabled = True", "the inner of two no_grad() ends both"),
        ("if x.watched and isinstance(leaf_of(x), Leaf):", "if False:", "a leaf is changed in place while recording"),
    ),
    *faults_in(
        "tinytorch/m06_autograd_appendix.py",
        ("(2 / (count - correction) if", "(2 / count if", "the rule of var ignores the correction"),
        ("g = where(x >= min, g, 0)", "g = where(x > min, g, 0)", "clamp's bound has no gradient"),
        ("where(eq(zero_count, 0), rest / others, only_zero)", "rest / others", "the rule of prod forgets zeros"),
        ("m02.flip(m02.cumsum(m02.flip(g, dims=(dim,)), dim=dim), dims=(dim,))", "m02.cumsum(g, dim=dim)",
         "the rule of cumsum sums forwards"),
        ("where(eq(out, 0), 0, x / where(eq(out, 0), 1, out))", "x / out", "the norm of 0 has the slope nan"),
        ("if isinstance(shifts, tuple) else -shifts", "if isinstance(shifts, tuple) else shifts",
         "the rule of roll shifts the same way"),
        ("out *= 3 * 0.044715", "out *= 0.044715", "the rule of gelu's approximation lacks a 3"),
        ("(3 * 0.044715)", "0.044715", "under create_graph the rule of gelu's approximation lacks a 3"),
        ("        out *= 1 - cdf\n", "", "the rule of gelu's approximation is that of exp"),
        ("where(x * beta > threshold, g, g * sigmoid(x * beta))", "g * sigmoid(x)",
         "the rule of softplus ignores beta"),
        ("exp(m02.clamp(x, max=0)) * alpha", "exp(m02.clamp(x, max=0))", "the rule of elu ignores alpha"),
        ("(out * out * out) * -0.5)", "(out * out * out) * 0.5)", "the rule of rsqrt has the wrong sign"),
        tests=RULES,
    ),
    *faults_in(
        "tinytorch/m06_autograd_appendix.py",
        ("set_rng_state(self.state)", "self.state", "a checkpointed dropout drops others the second time"),
        ("set_rng_state(now)", "now", "computing again disturbs the random numbers that follow"),
        ("m02.Writes.since(raw(x[0] if isinstance(x, tuple) else x), self.time)", "None",
         "a Function does not notice that what it saved was changed"),
        ("weakref.ref(y._trace) if y.watched", "(lambda: y._trace) if y.watched",
         "a Function's call keeps its own output, which is a cycle"),
        ("parameter.grad.detach().zero_()", "parameter.grad.zero_",
         "zero_grad(set_to_none=False) sets nothing to zero"),
    ),
]  # fmt: skip

OPTIMIZERS = [
    *faults_in(
        "tinytorch/m07_optimizers.py",
        ('group["lr"] * correction / (1 - beta1**t), group["eps"] * correction', 'group["lr"], group["eps"]',
         "Adam does not correct its means"),
        ('group["eps"] * correction', 'group["eps"]', "Adam's epsilon is not corrected along with the root"),
        ("square if largest is None else into(largest, xp.maximum, largest, square)", "square",
         "amsgrad divides by the current mean"),
        ('if decay and group.get("decoupled_weight_decay"):', 'if decay and group.get("decoupled"):',
         "AdamW's weight decay is a penalty"),
        ('parameter *= 1 - group["lr"] * decay', "parameter *= 1 - decay", "decoupled decay forgets the rate"),
        ("            scratch += grad\n            grad = scratch", "            grad = velocity",
         "Nesterov's form is plain momentum"),
        ("Tensor(xp.zeros_like(parameter)), 0\n", "Tensor(xp.zeros_like(parameter)), dampening\n",
         "the first velocity is dampened"),
        ("xp.subtract if maximize else xp.add", "xp.add", "maximize minimizes"),
        ("        Writes.note(parameter)\n", "", "a step is not noted as a write"),
        ("key = (xp, array.shape, array.dtype, number)", "key = (xp, array.shape, array.dtype)",
         "two scratch arrays are one"),
        ("None if set_to_none else p.grad.zero_()", "None", "zero_grad(set_to_none=False) drops the gradients"),
        ("device=p.device).clone()", "device=p.device)", "a loaded state shares the memory of the saved one"),
        ("        self.state = state\n        for group, saved_group", "        for group, saved_group",
         "a loaded optimizer has forgotten the past"),
        ("self.last_epoch % self.step_size == 0", "(self.last_epoch + 1) % self.step_size == 0",
         "StepLR is off by one"),
        ("% (2 * self.T_max) == 0", "% self.T_max == 0", "a cosine takes its top for its bottom"),
        ("self._starting or self.last_epoch > self.total_iters",
         "self._starting or self.last_epoch >= self.total_iters", "a warm-up stops one step early"),
        ("bisect_right(self.milestones, self.last_epoch)", "bisect_right(self.milestones, self.last_epoch - 1)",
         "SequentialLR changes over one step late"),
        ("total = length(stack(norms), float(norm_type))", "total = stack(norms).amax()",
         "clipping takes the longest gradient for all of them"),
        ("array *= to(scale, grad).data",
         "array *= to(clamp(float(max_norm) / (length(grad, float(norm_type)) + 1e-6), max=1.0), grad).data",
         "each gradient is clipped by its own norm"),
        ("clamp(float(max_norm) / (total + 1e-6), max=1.0)", "float(max_norm) / (total + 1e-6)",
         "clipping lengthens short gradients"),
        ("        Writes.note(array)\n", "", "clipping is not noted as a write"),
    ),
    *faults_in(
        "tinytorch/m07_optimizers_appendix.py",
        ("into(scratch, xp.subtract, square, scratch)", "into(scratch, xp.add, square, scratch)",
         "centered RMSprop adds the squared mean"),
        ('rate = group["lr"] / (1 + state["step"] * group["lr_decay"])\n        state["step"] += 1',
         'state["step"] += 1\n        rate = group["lr"] / (1 + state["step"] * group["lr_decay"])',
         "Adagrad's decay is off by one"),
        ('group["lr"], *group["betas"])', 'group["lr"], *group["betas"][::-1])', "Lion's betas are exchanged"),
        ("lr * self.gamma ** self.milestones.count(self.last_epoch)",
         "lr * (self.gamma if self.last_epoch in self.milestones else 1)", "a milestone listed twice counts once"),
        ("1 if self._starting else self.gamma", "self.gamma", "ExponentialLR starts one step late"),
        ("self.total_iters: 1 / self.factor}", "self.total_iters + 1: 1 / self.factor}",
         "ConstantLR ends one epoch late"),
        ("if self.T_cur >= self.T_i:", "if self.T_cur > self.T_i:", "a warm restart comes one epoch late"),
        ("else [up - 1, last]", "else [up, last]", "the peak of OneCycleLR comes one step late"),
        ("if self.num_bad_epochs > self.patience:", "if self.num_bad_epochs >= self.patience:",
         "ReduceLROnPlateau has one epoch less of patience"),
        ("self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0", "self.num_bad_epochs = 0",
         "ReduceLROnPlateau does not cool down"),
        ("p.grad.clamp_(min=-float(clip_value), max=float(clip_value))", "p.grad.clamp_(max=float(clip_value))",
         "clip_grad_value_ clips one side"),
        ("1 - self.decay if self.n_averaged else 1", "1 - self.decay", "the first average is not a copy"),
        ("        try:\n            yield\n        finally:\n            self.restore()",
         "        yield\n        self.restore()", "an error in applied() leaves the averages in the model"),
        ("x.data[...] = to(source[name].detach(), x).data\n            Writes.note(x.data)",
         "x.data = to(source[name].detach(), x).data", "the model and its averages share memory"),
    ),
]  # fmt: skip

TRAINING = [
    *faults_in(
        "tinytorch/m08_training.py",
        ("self.sums.get(name, 0.0) + value * count", "self.sums.get(name, 0.0) + value * 1",
         "batches of different sizes count alike"),
        ("module.training = mode", "module.training = True", "evaluation leaves all modules in training mode"),
        ("    model.eval()\n    try:", "    try:", "evaluation is done in training mode"),
        ("grad.mul_(1 / self.value)", "grad.mul_(1)", "scaled gradients are not unscaled"),
        ("self.good_steps + 1 if self._finite else 0", "self.good_steps + 1",
         "an overflow does not start the count anew"),
        ("        if finite:\n            self.optimizer.step()", "        self.optimizer.step()",
         "a step is made with gradients that overflowed"),
        ("            loss = loss * count\n", "            loss = loss * self.accumulate\n",
         "accumulated batches are not weighted by their size"),
        ("p.grad.div_(self.examples)", "p.grad.div_(self.accumulate)",
         "accumulated gradients are divided by a constant"),
        ("        self.optimizer.zero_grad()\n        self.step += 1", "        self.step += 1",
         "gradients pile up from step to step"),
        ("        if self.waiting:\n            self._step()\n", "", "the last batches of an epoch are not used"),
        ("if not math.isfinite(value):\n            self._refuse", "if value == math.inf:\n            self._refuse",
         "training goes on with a loss of nan"),
        ("        if bad:\n            raise", "        if bad and self.waiting:\n            raise",
         "weights of nan are saved over good ones"),
        ('"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler"', '"optimizer": self.optimizer, "scaler"',
         "a checkpoint lacks the schedule"),
        ('            "rng": now,\n', '            "rng": {},\n', "a checkpoint lacks the random state"),
        ("self._epoch_rng if self.batch else now", "now", "a checkpoint lacks the random state of the epoch's start"),
        ('skip = 0 if "batches" in told else self.batch', "skip = 0", "a resumed run begins its epoch anew"),
        ("        _restore_rng(self._epoch_rng)\n", "", "a resumed run shuffles in another order"),
        ('            _restore_rng(place["rng"])\n', "            pass\n", "a resumed run drops other elements"),
        ('Totals(**state["totals"])', "Totals()", "a resumed epoch forgets what it had measured"),
        ("callback.load_state_dict(mine[1])", "callback.state_dict()", "callbacks forget what they knew"),
        ("for name in (LAST, PREVIOUS) if", "for name in (LAST,) if", "the older checkpoint is not looked for"),
        ("    @no_grad\n    def predict", "    def predict", "predict records what it computes"),
        ('self.scheduler.step(row.get("val_loss", row["loss"]))', 'self.scheduler.step(row["loss"])',
         "the schedule looks at the training loss"),
    ),
    *faults_in(
        "tinytorch/m08_training_appendix.py",
        ("gt(outputs, threshold)", "gt(outputs, 0.5)", "binary_accuracy ignores its threshold"),
        ("sign * (row[name] - self.value) > self.min_delta", "sign * (row[name] - self.value) >= 0",
         "any change is an improvement"),
        ("self.bad_epochs += 1\n            trainer.stop = trainer.stop or self.bad_epochs >= self.patience",
         "self.bad_epochs += 1\n            trainer.stop = trainer.stop or self.bad_epochs > self.patience",
         "early stopping waits an epoch more"),
        ("{name: x.clone() for name, x in trainer.model.state_dict().items()}", "dict(trainer.model.state_dict())",
         "the best weights go on changing"),
        ("            self.bad_epochs = 0\n", "            pass\n", "an improvement does not start the count anew"),
        ("            os.replace(last, self.folder / PREVIOUS)", "            pass", "no older checkpoint is kept"),
        ("trainer.step % self.every == 0", "trainer.step % self.every == 1", "checkpoints are made a step late"),
        ('return {"best": self.best and self.best.value}', 'return {"best": None}',
         "a resumed run forgets its best epoch"),
        ("return self.ema.state_dict()", "return {}", "averaged weights are not saved"),
        ('elif line.endswith("\\n"):', "else:", "a line that a kill cut off makes the history unreadable"),
    ),
]  # fmt: skip

SPATIAL = [
    *faults_in(
        "tinytorch/m09_spatial.py",
        ("kaiming_uniform_(self.weight, a=math.sqrt(5))", "kaiming_uniform_(self.weight)",
         "a convolution's first weights are too large"),
        ("if running is not None:", "if running is None:", "running averages are never kept"),
        ("variance * (count / (count - 1))", "variance", "the running variance is the biased one"),
        ('in ("float16", "bfloat16") else x', 'in ("bfloat16",) else x', "batch norm of float16 overflows"),
        ("step = max(1, BLOCK //", "step = max(1 << 20, BLOCK //",
         "a convolution holds the columns of the whole batch"),
        tests=SPATIAL_TESTS,
    ),
    *faults_in(
        "tinytorch/m09_spatial.py",
        (" and not any(map(any, self.padding))", "", "a 1x1 kernel that meets the border is taken for the picture"),
        ("total // 2, total - total // 2", "total - total // 2, total // 2", "padding 'same' is longer on the left"),
        ("count -= ceil_mode and", "count -= False and", "a window that begins in the border is counted"),
        ("amount = amount - part", "amount = amount", "every one of equal maxima gets the gradient"),
        ("windows.padded(xp, x, math.nan)", "windows.padded(xp, x, -math.inf)",
         "the border is taken for the largest of a window of -inf"),
        ("total += xp.sum(xp.matmul(grouped", "total = xp.sum(xp.matmul(grouped",
         "the weight's gradient is that of the last pictures"),
        ("bound = 1 / math.sqrt(fans(self.weight)[0])", "bound = 1 / math.sqrt(fans(self.weight)[1])",
         "a convolution's first biases go by its outputs"),
        ("x = pad(x, (left, right, top, bottom), self", "x = pad(x, (top, bottom, left, right), self",
         "Conv2d's borders of other modes are on the wrong sides"),
        ("with evaluating(network), observe", "with observe", "counting FLOPs trains batch norm"),
        ("        frozen = self.training and not", "        frozen = False and not",
         "averages that are frozen go on moving"),
        ("for t in (scale, -running_mean))", "for t in (scale, running_mean))", "batch norm adds the mean"),
        tests=SPATIAL_TESTS,
    ),
    *faults_in(
        "tinytorch/m09_spatial.py",
        ("x=lambda h, g, windows, groups: convolution_input_gradient(g, h,",
         "x=lambda h, g, windows, groups: -convolution_input_gradient(g, h,", "a second derivative has the wrong sign"),
        tests=("tests/ops/test_ops.py::test_gradients_of_gradients",),
    ),
    *faults_in(
        "tinytorch/m09_spatial_appendix.py",
        ("starts = [i * s - before for i in", "starts = [i * s for i in", "averages miscount windows in the border"),
        ("output_padding must be", "stride must be", "an error blames the stride for an output_padding"),
        ("math.floor(n * f)", "math.ceil(n * f)", "interpolate rounds sizes up"),
        ("clamp(places, min=0, max=n - 1), 1)", "places, 1)", "bilinear interpolation is dark at the border"),
        ("inside = (rows >= 0) &", "inside = (rows > 0) &", "grid_sample loses the first row"),
        ("out + reshape(bias, shape=(-1, 1, 1))", "out", "a transposed convolution forgets its bias"),
        ("shape=(*shape[1:3], 1)", "shape=(*shape[1:3][::-1], 1)", "group norm deals its weights wrongly"),
        tests=(*VALUES, *RULES, "tests/ops/test_ops.py::test_errors"),
    ),
    *faults_in(
        "tinytorch/m09_spatial_appendix.py",
        ("x[:, :, :: self.stride, :: self.stride]", "x[:, :, 1 :: self.stride, 1 :: self.stride]",
         "a shortcut takes the wrong pixels"),
        ('mode="fan_out", nonlinearity="relu"', 'mode="fan_out", nonlinearity="linear"',
         "a ResNet's signal shrinks from layer to layer"),
        ("1.0, x.dtype, x.device), p, training)", "1.0, x.dtype, x.device), 1 - p, training)",
         "dropout of channels keeps what it should drop"),
        ("/ to(stops - starts, x.dtype)", "/ to((stops - starts).amax(), x.dtype)",
         "adaptive averages count the longest window"),
        ("min(start + i, stop - 1)", "min(start + i, n - 1)", "adaptive maxima look into the next window"),
        ("first, length = (0.0, n - 1) if align_corners", "first, length = (0.0, n) if align_corners",
         "reflection counts a pixel too many"),
        tests=SPATIAL_TESTS,
    ),
    *faults_in(
        "tinytorch/m02_tensor_appendix.py",
        ("narrow(x, dim, 1, first), dims=dim)", "narrow(x, dim, 0, first), dims=dim)",
         "reflection repeats the outermost element"),
        ("narrow(middle, dim, rest - first, first), narrow(middle, dim, 0, last)",
         "narrow(x, dim, 0, first), narrow(x, dim, n - last, last)", "circular borders come from the near end"),
        tests=VALUES,
    ),
]  # fmt: skip

DATALOADER = [
    *faults_in(
        "tinytorch/m10_dataloader.py",
        ("            with seeded((self.seed, epoch, number + 1)):", "            with seeded((self.seed, epoch)):",
         "all batches of an epoch are cropped and mirrored alike"),
        ("            with draws:  # entered for each", "            if True:  # entered for each",
         "an epoch's order is drawn from the program's own generator"),
        ("        draws = seeded((self.seed, epoch))\n", "        draws = seeded(self.seed)\n",
         "every epoch has the same order"),
        ("        if self._newest is not None:\n            self.epoch, self.batch = self.epoch + 1, 0\n", "",
         "an epoch that was left in the middle is begun again"),
        ("self.waited += time.perf_counter() - start", "self.waited = time.perf_counter() - start",
         "only the wait for the last batch is counted"),
        ("islice(self._tasks(epoch), first, None)", "islice(self._tasks(epoch), 0, None)",
         "a resumed epoch begins with its first batch"),
        ("ahead = self.num_workers * self.prefetch_factor - len(pending)",
         "ahead = self.num_workers * self.prefetch_factor",
         "workers run further and further ahead"),
        ("        self._newest = self._idle = None  # workers", "        self._newest = None  # workers",
         "workers that were kept go on with the seed before load_state_dict"),
        ("self.seed = state[\"epoch\"], state[\"batch\"], state[\"seed\"]",
         "self.seed = state[\"epoch\"], state[\"batch\"], self.seed",
         "a resumed loader keeps its own seed"),
        ("            if state[name] != mine[name]:", "            if False:", "a state of other data is accepted"),
        ("        workers = 1 if isinstance(loader.dataset, IterableDataset) else loader.num_workers",
         "        workers = loader.num_workers", "a stream is read by several workers at once"),
        ("                self.read += 1\n", "                self.read = number + 1\n",
         "a resumed stream does not skip what was read"),
        ("            if crew is not None and not (done and "
         "self.persistent_workers):\n                crew.close()\n", "            pass\n",
         "workers are left to the garbage collector"),
        ("        del item, future  # a batch", "        pass  # a batch",
         "a worker keeps its batch until the next one is there"),
        ("            if x.shape != tensors[0].shape:", "            if False:",
         "collate says nothing of which example differs"),
        ("host.integers(0, rows, (n,)), host.integers(0, columns, (n,))",
         "host.integers(0, rows, (n,)), host.integers(0, rows, (n,))",
         "a crop's left edge is drawn from the number of rows"),
        ("            padded[:, :, p : p + height, p : p + width] = images",
         "            padded[:, :, :height, :width] = images",
         "padding lies on two sides only"),
        ("xp.flip(xp.take_index(images, chosen), axis=-1)", "xp.flip(xp.take_index(images, chosen), axis=-2)",
         "pictures are turned upside down"),
        ("        unit, floats = (1, images)", "        unit, floats = (255, images)",
         "floating pictures are divided by 255"),
        ("            left -= len(drawn)", "            left -= n", "drawing with replacement gives too few"),
    ),
    *faults_in(
        "tinytorch/m10_dataloader_appendix.py",
        ("    threading.Thread(target=end_with_parent, daemon=True).start()\n", "",
         "a busy worker outlives a main program that is killed"),
        ("    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n", "    before = set()\n",
         "Ctrl-C reaches workers that are starting"),
        ("    set_default_dtype(dtype)\n", "", "a process collates to another dtype than a thread"),
        ("        self.process.terminate()\n", "", "an abandoned iterator waits for its workers to end by themselves"),
        ("worker.id, worker.seed = number, worker", "worker.seed = worker", "every process is worker 0"),
        tests=("tests/modules/test_dataloader_workers.py",),
    ),
    *faults_in(
        "tinytorch/m10_dataloader_appendix.py",
        ('drawn.data, side="right")', 'drawn.data * 0.5, side="right")', "weighted sampling prefers the first ones"),
        ("            counts[i % len(counts)] += 1\n", "            counts[0] += 1\n",
         "random_split gives all that is left by rounding to the first part"),
    ),
]  # fmt: skip

SEEDED = faults_in(
    "backends/base.py",
    ("class Own(threading.local):", "class Own:", "a seeded block is in force in every thread"),
    ("        self.outer.append([backend._own.generator for backend, _ in self.generators])",
     "        self.outer.append([None for backend, _ in self.generators])", "a nested seeded block ends the outer one"),
    ("        if self._own.generator is None:\n            self._everyones = self.new_generator(seed)\n        else:\n"
     "            self._own.generator = self.new_generator(seed)\n",
     "        self._everyones = self.new_generator(seed)\n",
     "manual_seed inside a seeded block disturbs everyone's generator"),
)  # fmt: skip

DATALOADER_APPENDIX = [
    *faults_in(
        "tinytorch/m10_dataloader_appendix.py",
        ("            while packed.read(1 << 20):  # to the end, where gzip's checksum stands\n                pass\n",
         "",
         "an archive's checksum is never reached, so damage in its middle is taken for pixels"),
        ("        for column, labels in enumerate(self.label_counts):\n            row =",
         "        for column, labels in list(enumerate(self.label_counts))[-1:]:\n            row =",
         "only the last label of a record is checked"),
        ("[::5]:\n            is_test[i] = True", "[4::5]:\n            is_test[i] = True",
         "other digits are for testing than everybody's"),
        ("            parts.append(self._read(path, name))",
         "            parts.append(parse_idx(unpacked(path), path))",
         "MNIST's files are read without being checked"),
        ("        if self.transform is None or self.white != 255:", "        if self.transform is None:",
         "a transform of Digits is given 0 to 16, which it takes for nearly black"),
        ('self.text = text.replace("\\r\\n", "\\n").replace("\\r", "\\n")', 'self.text = text.replace("\\r", "\\n")',
         "a line's end of two characters makes an empty line"),
        tests=DATASETS,
    ),
    *faults_in(
        "tinytorch/m10_dataloader_appendix.py",
        ("[[1, height / width, 2 / width], [width / height, 1, 2 / height]]", "[[1, 1, 2 / width], [1, 1, 2 / height]]",
         "pictures that are not square are distorted when they are turned"),
        ("        kept = 1 - height * width / (rows * columns)\n", "        kept = share\n",
         "CutMix's labels do not know that rectangles are cut off at the edges"),
        ("weighted(share, a_labels, b_labels)", "weighted(1 - share, a_labels, b_labels)",
         "MixUp gives the labels the other picture's share"),
        ("        height = height * (host.any(fits, axis=1) & ", "        height = height * (",
         "a rectangle that fits nowhere is erased all the same"),
        ("    middle = xp.mean(luma(x), axis=(1, 2, 3), keepdims=True)", "    middle = xp.mean(luma(x))",
         "contrast is about the mean of the whole batch"),
        ("        period = 2 * (length - once)", "        period = 2 * length",
         "a reflected border repeats the outermost pixel"),
        tests=TRANSFORMS,
    ),
    *faults_in(
        "tinytorch/m01_setup_appendix.py",
        ("                have = 0  # this server sends everything again\n", "                pass\n",
         "a server that ignores Range has its whole answer put behind the part"),
        ("                part.unlink(missing_ok=True)\n", "                pass\n",
         "a part that is not the start of the file is kept for ever"),
        tests=DATASETS,
    ),
]  # fmt: skip

TOKENIZATION = [
    *faults_in(
        "tinytorch/m11_tokenization.py",
        (
            "            if not whole or min(whole) >= 0:\n",
            "            if True:\n",
            "decode takes -1 for the last token",
        ),
        (
            'return self.decode_bytes(ids).decode("utf-8", "replace")',
            'return self.decode_bytes(ids).decode("utf-8", "ignore")',
            "half a character is left out of the text",
        ),
        (
            'self._decoder = codecs.getincrementaldecoder("utf-8")("replace")',
            'self._decoder = codecs.getincrementaldecoder("latin-1")("replace")',
            "a stream shows bytes as characters",
        ),
        ('self._decoder.decode(b"", final=True)', 'self._decoder.decode(b"")', "what is left at the end is not shown"),
        (
            "        self.characters = sorted(set(characters))",
            "        self.characters = list(dict.fromkeys(characters))",
            "characters are numbered as they come",
        ),
        (
            "key=lambda pair: (-counts[pair], pair))",
            "key=lambda pair: -counts[pair])",
            "the plain trainer breaks ties by place",
        ),
        (
            "            self.times += [times] * (len(self.ids) - start)",
            "            self.times += [1] * (len(self.ids) - start)",
            "how often a chunk occurs is forgotten",
        ),
        ("                counts[x, a] -= times\n", "", "the pair to the left of a merge keeps its count"),
        ("                counts[b, x] -= times\n", "", "the pair to the right of a merge keeps its count"),
        ("                made[x, new].append(before)\n", "", "new pairs to the left are not found again"),
        (
            "            right[place], left[after] = after, place\n            if (x",
            "            right[place] = after\n            if (x",
            "the list of left neighbours is not mended in training",
        ),
        (
            "                heappush(heap, (-chains.counts[pair], pair))",
            "                pass",
            "a pair whose count fell is not looked at again",
        ),
        (
            "        if progress and time.perf_counter() - start > 2:",
            "        if progress:",
            "a bar is shown for the shortest training",
        ),
        ("            del ranks[i]\n", "            del ranks[-1]\n", "ranks and ids of a short chunk get out of step"),
        (
            "self.apply_short(ids) if len(ids) < 128 else self.apply_long(ids)",
            "self.apply_short(ids)",
            "long chunks are merged in quadratic time",
        ),
        (
            "iter(sorted(places.pop(rank)))",
            "iter(sorted(places.pop(rank), reverse=True))",
            "of three letters the last two are merged",
        ),
        (
            "                            made[rank] += waiting\n",
            "                            pass\n",
            "an earlier merge that becomes possible has to wait",
        ),
        (
            "    if sum(map(len, chunks)) == len(text):",
            "    if chunks or not text:",
            "what a pattern does not match is lost",
        ),
        (
            "sorted(names, key=len, reverse=True)",
            "sorted(names, key=len)",
            "the shorter of two special tokens goes first",
        ),
        ("map(regex.escape, sorted(names", "map(str, sorted(names", "signs of special tokens are taken for a pattern"),
        (
            "chr(byte if id < len(PRINTED) else 256 + id - len(PRINTED))",
            "chr(byte if id < len(PRINTED) else 255 + id - len(PRINTED))",
            "signs of bytes are off by one",
        ),
        ("            if a + b not in self._ids:\n", "            if True:\n", "two merges never make the same token"),
        (
            "train_merges(chunks, vocab_size - len(special_tokens), progress)",
            "train_merges(chunks, vocab_size, progress)",
            "special tokens do not count towards vocab_size",
        ),
        (
            "        return self.always.union(allowed)",
            "        return frozenset(allowed)",
            "tokens that are always recognised are not",
        ),
        (
            'if self.add_prefix_space and text and text[0] != " ":',
            "if self.add_prefix_space:",
            "a second space is put before",
        ),
        (
            "        if self.ignore_merges and data in self._ids:",
            "        if data in self._ids:",
            "merges are ignored in any case",
        ),
        (
            "        if len(self._cache) >= self.CACHE:\n            self._cache.clear()\n",
            "",
            "the cache grows without bound",
        ),
        ("        if len(chunk) <= 64:\n", "        if True:\n", "the cache keeps whole books"),
        ('"special": name not in self.always}', '"special": True}', "a file forgets what is always recognised"),
        (
            '    cutter = level | {"use_regex": self.pattern == "gpt2"}',
            '    cutter = level | {"use_regex": True}',
            "the file cuts a second time",
        ),
        ("        if id < 0 or table[id] is not None:", "        if id < 0:", "a special token takes another's place"),
        (
            "(len(self.ids) - self.length - 1) // self.stride + 1",
            "(len(self.ids) - self.length - 1) // self.stride",
            "the last window is left out",
        ),
        (
            "        starts = xp.where(chosen < 0, chosen + len(self), chosen)",
            "        starts = xp.where(chosen < 0, chosen + len(self.ids), chosen)",
            "window -1 is not the last one",
        ),
        (
            "        return windows[:, :-1], windows[:, 1:]",
            "        return windows[:, :-1], windows[:, :-1]",
            "targets are the inputs",
        ),
    ),
    *faults_in(
        "tinytorch/m11_tokenization_appendix.py",
        (
            '    for name in ("truncation", "padding", "normalizer"):',
            '    for name in ("truncation", "padding"):',
            "a normalizer is passed over",
        ),
        ('    tokenizer.post_processor = data.get("post_processor")\n', "", "a post-processor is lost in saving"),
        (
            'if level.get("use_regex", True) else "none"',
            'if level.get("use_regex") else "none"',
            "files from before use_regex are not cut",
        ),
        ('        if not token.get("special"):\n', "        if True:\n", "special tokens are recognised in every text"),
        (
            '        for option in ("lstrip", "rstrip", "single_word"):',
            "        for option in ():",
            "options of added tokens are passed over",
        ),
        (
            "        if escape[1] in UNLIKE_ESCAPES:\n            return escape\n",
            "        pass\n",
            "\\w of another library is taken for ours",
        ),
        ('not line.startswith("#version")', 'not line.startswith("#")', "merges of number signs are left out"),
        (
            "            missing |= dict.fromkeys(lacking)\n",
            "            pass\n",
            "merges of missing tokens are left out",
        ),
        (
            '    atomic_write(folder / MERGES, "\\n".join(["#version: 0.2", *model["merges"], ""]).encode())',
            '    atomic_write(folder / MERGES, "\\n".join(model["merges"]).encode())',
            "merges.txt has no first line",
        ),
    ),
]

ROWS = faults_in(
    "backends/numpy.py",
    ("np.matmul(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[1])",
     "np.matmul(a.reshape(-1, a.shape[-1]), b)",
     "a product of a batch with one matrix loses its axes"),
    ("return total.reshape(*x.shape[:-1], 1) if keepdims else total.reshape(x.shape[:-1])",
     "return total.reshape(x.shape[:-1])", "the sums of many rows lose their axis"),
    ("total.reshape((1,) * lead + x.shape[lead:] if keepdims else x.shape[lead:])",
     "total.reshape(x.shape[lead:])", "the sums of many columns lose their axes"),
    ("largest.reshape(*x.shape[:-1], 1) if keepdims else largest.reshape(x.shape[:-1])",
     "largest.reshape(x.shape[:-1])", "the largest of many rows lose their axis"),
    ("axes == list(range(len(axes))) and len(axes) < x.ndim", "len(axes) < x.ndim",
     "sums over inner axes are taken for sums over the first ones"),
    tests=("tests/backends/test_rows.py",),
)  # fmt: skip

FAULTS = [*TENSOR, *BACKENDS, *ACTIVATIONS, *LAYERS, *LOSSES, *AUTOGRAD, *OPTIMIZERS, *TRAINING, *SPATIAL, *SEEDED,
          *DATALOADER, *DATALOADER_APPENDIX, *TOKENIZATION, *ROWS]  # fmt: skip
