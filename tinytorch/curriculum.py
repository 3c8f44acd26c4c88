"""The table of the course: which modules there are and where each of their names is found.

The package's faces (`tinytorch`, `tinytorch.nn`, `tinytorch.optim` …), the command line, the documentation and the
tests all read `MODULES`; nothing else lists the modules.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

PACKAGE = "tinytorch"


@dataclass(frozen=True)
class Module:
    """One chapter, and the names that it and its appendix show in each face.

    `exports` maps a face ("" is tinytorch itself) to names, separated by spaces; "bool=bool_" shows `bool_` as `bool`.
    `exercises` are the definitions of the chapter that a learner writes, separated by spaces: "relu Linear.forward".
    """

    number: int
    name: str
    title: str
    part: str
    checkpoint: str  # what a reader can do after it; tests/checkpoints/ shows each
    exports: Mapping[str, str] = field(default_factory=dict)
    exercises: str = ""

    @property
    def file(self) -> str:
        """The chapter's file name, without its suffix: "m02_tensor"."""
        return f"m{self.number:02}_{self.name}"

    @property
    def appendix(self) -> str:
        """The file name of the appendix, which not every chapter has."""
        return f"{self.file}_appendix"

    def modules(self) -> list[str]:
        """What to import, in order: the chapter, and the appendix where there is one."""
        names = [f"{PACKAGE}.{self.file}", f"{PACKAGE}.{self.appendix}"]
        return names if importlib.util.find_spec(names[1]) else names[:1]

    def names(self, face: str) -> dict[str, str]:
        """What this module shows in a face: from the name there to the name in the chapter or its appendix."""
        pairs = [word.partition("=") for word in self.exports.get(face, "").split()]
        return {shown: own or shown for shown, _, own in pairs}


MODULES = (
    Module(
        number=1,
        name="setup",
        title="Setup",
        part="Foundations",
        checkpoint="Check a machine, and run a chapter's own tests",
        exports={"": "doctor manual_seed get_rng_state set_rng_state"},
        exercises="""
            assert_close seconds print_table atomic_write manual_seed run_test findings first_line
            check_data_folder report
        """,
    ),
    Module(
        number=2,
        name="tensor",
        title="Tensors",
        part="Foundations",
        checkpoint="Compute with tensors as with NumPy's arrays, on any array library",
        exports={
            "": """
                Tensor dtype=DType device=Device set_default_device get_default_device
                set_default_dtype get_default_dtype
                set_float32_matmul_precision get_float32_matmul_precision
                float16 bfloat16 float32 float64 int8 int16 int32 int64 uint8 bool=bool_
                half=float16 float=float32 double=float64 short=int16 int=int32 long=int64
                tensor as_tensor is_tensor from_numpy from_dlpack zeros ones full empty eye arange linspace
                zeros_like ones_like full_like empty_like rand randn randint rand_like randn_like randperm
                multinomial bernoulli stack cat concatenate clone where meshgrid tril triu
                matmul mm=matmul bmm=matmul mv=matmul einsum outer dot
                add sub mul div pow neg floor_divide remainder reciprocal square
                eq ne lt le gt ge equal allclose isnan isinf isfinite
                logical_and logical_or logical_not bitwise_and bitwise_or bitwise_xor bitwise_not
                exp log log1p expm1 sqrt rsqrt sin cos tanh erf abs sign clamp floor ceil round maximum minimum
                sum mean var std prod max min amax amin argmax argmin any all cumsum logsumexp norm
                reshape flatten unflatten squeeze unsqueeze transpose permute movedim
                broadcast_tensors broadcast_shapes split chunk unbind narrow roll flip repeat_interleave
                gather take_along_dim index_select index_add index_put scatter_add masked_fill masked_select
                nonzero topk sort argsort
            """,
            "cuda": """
                is_available=cuda_is_available device_count=cuda_device_count synchronize=cuda_synchronize
                memory_allocated memory_reserved empty_cache mem_get_info get_device_name
                Event Stream stream OutOfMemoryError
            """,
            "nn.functional": "one_hot pad",
        },
        exercises="tensor full where sum mean transpose unsqueeze stack matmul to",
    ),
    Module(
        number=3,
        name="activations",
        title="Activations",
        part="Foundations",
        checkpoint="Bend a line: activations and a softmax that stays stable",
        exports={
            "": "relu sigmoid softmax log_softmax",
            "nn": """
                ReLU LeakyReLU Sigmoid Tanh GELU SiLU Softplus ELU Hardtanh Softmax LogSoftmax
                ReLU6 Hardsigmoid Hardswish Mish Softsign LogSigmoid Softmin Threshold Tanhshrink Softshrink
                Hardshrink SELU CELU GLU
            """,
            "nn.functional": """
                relu leaky_relu sigmoid tanh gelu silu softplus elu hardtanh softmax log_softmax
                relu6 hardsigmoid hardswish mish softsign logsigmoid softmin threshold tanhshrink softshrink
                hardshrink selu celu glu prelu
            """,
        },
        exercises="relu leaky_relu sigmoid gelu_and_cdf softplus elu softmax log_softmax Activation.__call__",
    ),
    Module(
        number=4,
        name="layers",
        title="Layers",
        part="Foundations",
        checkpoint="Build a network from layers, and save and load its state",
        exports={
            "": "save load",
            "nn": """
                Parameter Module Linear Sequential ModuleList ModuleDict Flatten Unflatten Identity Dropout
            """,
            "nn.functional": "linear dropout",
            "nn.init": """
                kaiming_uniform_ kaiming_normal_ xavier_uniform_ xavier_normal_ normal_ uniform_ zeros_ ones_ constant_
                trunc_normal_ orthogonal_ eye_ calculate_gain
            """,
        },
        exercises="""
            Parameter.__init__ Module.__call__ Module.named_modules Module.train Module.to
            Module.load_state_dict fans linear Sequential.forward drop
        """,
    ),
    Module(
        number=5,
        name="losses",
        title="Losses",
        part="Foundations",
        checkpoint="Say in one number how wrong a network is",
        exports={
            "nn": """
                MSELoss L1Loss HuberLoss SmoothL1Loss CrossEntropyLoss NLLLoss BCELoss BCEWithLogitsLoss KLDivLoss
                GaussianNLLLoss PoissonNLLLoss SoftMarginLoss MarginRankingLoss HingeEmbeddingLoss
                CosineEmbeddingLoss TripletMarginLoss
            """,
            "nn.functional": """
                mse_loss l1_loss huber_loss smooth_l1_loss cross_entropy nll_loss binary_cross_entropy
                binary_cross_entropy_with_logits kl_div
                gaussian_nll_loss poisson_nll_loss soft_margin_loss margin_ranking_loss hinge_embedding_loss
                cosine_similarity cosine_embedding_loss pairwise_distance triplet_margin_loss
            """,
        },
        exercises="""
            reduce mse_loss _huber softmax_cross_entropy _average cross_entropy bernoulli_cross_entropy
            binary_cross_entropy_with_logits kl_div
        """,
    ),
    Module(
        number=6,
        name="autograd",
        title="Autograd",
        part="Foundations",
        checkpoint="Differentiate any program of tensor operations",
        exports={
            "": "no_grad enable_grad inference_mode is_grad_enabled set_grad_enabled",
            "autograd": "grad backward Function gradcheck gradgradcheck detect_anomaly draw",
            "autograd.functional": "jacobian hessian vjp jvp",
            "utils.checkpoint": "checkpoint",
        },
        exercises="""
            spread matmul_left matmul_right Recorder.record sum_to propagate joined
            accumulate differences
        """,
    ),
    Module(
        number=7,
        name="optimizers",
        title="Optimizers",
        part="Foundations",
        checkpoint="Follow the gradient downhill, with any of the usual optimizers and schedules",
        exports={
            "optim": "Optimizer SGD Adam AdamW RMSprop Adagrad Lion EMA",
            "optim.lr_scheduler": """
                LRScheduler StepLR MultiStepLR ExponentialLR ConstantLR LinearLR
                CosineAnnealingLR CosineAnnealingWarmRestarts OneCycleLR LambdaLR ReduceLROnPlateau SequentialLR
            """,
            "nn.utils": "clip_grad_norm_ clip_grad_value_",
        },
        exercises="""
            Optimizer.zero_grad Optimizer.step _sgd Adam.recall _adam StepLR.get_lr CosineAnnealingLR.get_lr
            LinearLR.get_lr SequentialLR.step clip_grad_norm_
        """,
    ),
    Module(
        number=8,
        name="training",
        title="Training",
        part="Foundations",
        checkpoint="Train a network that survives being killed at any moment",
        exports={
            "": """
                Trainer TrainingError accuracy binary_accuracy model_state read_history plot_history
                Callback ProgressBar Checkpointing EarlyStopping History LearningRateLog AveragedWeights
                autocast GradScaler
            """,
            "amp": "autocast GradScaler",
        },
        exercises="""
            accuracy Totals.add evaluating cast_inputs GradScaler.unscale_ GradScaler.update unpack
            Trainer._learn Trainer._step Trainer.evaluate
        """,
    ),
    Module(
        number=9,
        name="spatial",
        title="Convolutions",
        part="Vision",
        checkpoint="Build a network that sees, and say what it costs",
        exports={
            "": "SimpleCNN LeNet5 ResNet count_parameters count_flops",
            "nn": """
                Conv1d Conv2d ConvTranspose1d ConvTranspose2d Unfold Fold
                MaxPool1d MaxPool2d AvgPool1d AvgPool2d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveMaxPool2d
                BatchNorm1d BatchNorm2d GroupNorm InstanceNorm1d InstanceNorm2d Dropout1d Dropout2d
                Upsample PixelShuffle PixelUnshuffle PReLU
                ZeroPad2d ConstantPad2d ReflectionPad2d ReplicationPad2d CircularPad2d
            """,
            "nn.functional": """
                conv1d conv2d conv_transpose1d conv_transpose2d unfold fold
                max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d
                batch_norm group_norm instance_norm dropout1d dropout2d
                interpolate pixel_shuffle pixel_unshuffle affine_grid grid_sample
            """,
        },
        exercises="""
            convolve_by_loops Windows.places lay_windows to_columns from_columns convolution_weight_gradient
            max_pool normalize normalize_gradients batch_norm
        """,
    ),
    Module(
        number=10,
        name="dataloader",
        title="Data loading",
        part="Vision",
        checkpoint="Have the next batch ready before it is asked for, and the same one every time",
        exports={
            "utils.data": """
                Dataset TensorDataset IterableDataset Subset ConcatDataset random_split
                Sampler SequentialSampler RandomSampler SubsetRandomSampler WeightedRandomSampler BatchSampler
                DataLoader default_collate=collate get_worker_info
            """,
            "datasets": "Digits MNIST FashionMNIST CIFAR10 CIFAR100 TextFile Shakespeare PythonDocs",
            "transforms": """
                Transform Compose ToFloat Normalize RandomCrop RandomHorizontalFlip
                RandomVerticalFlip CenterCrop Pad Resize RandomAffine RandomRotation RandomErasing Cutout
                Grayscale ColorJitter Lambda RandomApply RandomChoice MixUp CutMix
            """,
        },
        exercises="""
            TensorDataset.get_batch collate ConcatDataset.__getitem__ RandomSampler.__iter__
            BatchSampler.__iter__ Normalize.apply RandomCrop.apply RandomHorizontalFlip.apply Recipe.__call__
            DataLoader._tasks
        """,
    ),
    Module(
        number=11,
        name="tokenization",
        title="Tokenization",
        part="Language",
        checkpoint="Turn any text into numbers and back, with your own vocabulary or a published one",
        exports={
            "": "CharTokenizer BPETokenizer load_tokenizer save_vocabulary mergeable_ranks",
            "utils.data": "TokenWindows",
        },
        exercises="""
            CharTokenizer.encode replace_pair train_plainly encode_plainly Chains.merge Merges.apply_short cut
            TokenWindows.get_batch
        """,
    ),
    Module(
        number=12,
        name="embeddings",
        title="Embeddings",
        part="Language",
        checkpoint="Give tokens vectors, and tell a network where they stand",
        exports={
            "nn": "Embedding EmbeddingBag LearnedPositions SinusoidalPositions RotaryEmbedding",
            "nn.functional": "embedding embedding_bag sinusoidal_positions rotary_tables alibi_slopes alibi_bias",
        },
        exercises="""
            embed_by_one_hot embedding_lookup sums_of_equals check_ids sinusoidal_positions rotate
            RotaryEmbedding.forward alibi_bias
        """,
    ),
    Module(
        number=13,
        name="attention",
        title="Attention",
        part="Language",
        checkpoint="Let each place of a sequence choose what it takes from the others",
        exports={
            "nn": "MultiheadAttention SelfAttention",
            "nn.functional": "scaled_dot_product_attention",
        },
        exercises="""
            causal_mask padding_mask attention_weights attention attention_gradients split_heads
            SelfAttention.heads SelfAttention.forward
        """,
    ),
    Module(
        number=14,
        name="transformers",
        title="Transformers",
        part="Language",
        checkpoint="Train a GPT, let it write, and load the weights of a published one",
        exports={
            "": "GPT GPTConfig",
            "nn": """
                LayerNorm RMSNorm TransformerEncoderLayer TransformerEncoder TransformerDecoderLayer TransformerDecoder
                Transformer
            """,
            "nn.functional": "layer_norm rms_norm",
        },
        exercises="""
            rms_norm SwiGLU.forward TransformerBlock.forward GPT.features penalized next_probabilities draw
            reads_whole
        """,
    ),
    Module(
        number=15,
        name="profiling",
        title="Profiling",
        part="Systems",
        checkpoint="Say where a program's time, memory and arithmetic go, and what each part could reach",
        exports={"": "profile summary", "profiler": "profile record_function"},
        exercises="""
            matmul_flops attention_products owner_of Ledger.show Ledger.history look_around Profile._observe
            summarize
        """,
    ),
    Module(
        number=16,
        name="acceleration",
        title="Acceleration",
        part="Systems",
        checkpoint="Make an operation as fast as the machine allows, and say what the limit is",
        exports={"": "kernels_enabled reference_kernels"},
        exercises="by_loops window_offsets convolve by_arrays by_tiles pack speedup on_probation",
    ),
    Module(
        number=17,
        name="quantization",
        title="Quantization",
        part="Systems",
        checkpoint="Do with one byte what was learned with four, and say what it cost",
        exports={
            "quantization": """
                choose_scale quantize dequantize fake_quantize quantize_rows
                MinMaxObserver MovingAverageMinMaxObserver PercentileObserver MSEObserver
                fold_batch_norm prepare prepare_qat convert quantize_dynamic quantize_int4 load_quantized
                QuantizedLinear QuantizedConv2d QuantizedEmbedding Int4Linear
            """,
        },
        exercises="choose_scale quantize in_range int8_linear quantize_rows MSEObserver.covered fold link",
    ),
    Module(
        number=18,
        name="compression",
        title="Compression",
        part="Systems",
        checkpoint="Make a network smaller, and measure what that costs and what it brings",
        exports={
            "compression": """
                GradualPruning cubic_sparsity weights_of free_channels prune_channels nm_mask prune_nm
                factorized factorize share_weights DistillationLoss distillation_loss
                made_plain save=save_compressed load=load_compressed restore compression_report print_report
            """,
            "nn.utils.prune": """
                l1_unstructured random_unstructured ln_structured random_structured global_unstructured
                custom_from_mask identity is_pruned remove L1Unstructured=magnitudes RandomUnstructured=chances
            """,
        },
        exercises="masked without_lowest cubic_sparsity with_marks factorized k_means distillation_loss pack_bits",
    ),
    Module(
        number=19,
        name="caching",
        title="Caching",
        part="Systems",
        checkpoint="Write a token in the time of reading one, whatever the text before it",
        exports={"": "KVCache caching bytes_per_token speculative_generate"},
        exercises="""
            bytes_per_token Store.make_room remember attend shared_length KVCache._take_over settle
            speculative_generate
        """,
    ),
    Module(
        number=20,
        name="benchmarking",
        title="Benchmarking",
        part="Systems",
        checkpoint="Say which of two programs is faster, and by how much, and be right",
        exports={
            "utils.benchmark": """
                benchmark Measurement Timer memory_of quantile interval compare Comparison scaling Scaling fit_power
                offline serve server Load ServerResult Candidate pareto_front SimulatedMachine
                Report save_report load_report regressions Regression
                plot_latencies plot_scaling plot_server plot_pareto
            """
        },
        exercises="quantile ranks independent_count transient verdict fit_power serve Candidate.dominates",
    ),
)

FACES = (
    "",
    "amp",
    "autograd",
    "autograd.functional",
    "compression",
    "cuda",
    "datasets",
    "nn",
    "nn.functional",
    "nn.init",
    "nn.utils",
    "nn.utils.prune",
    "optim",
    "optim.lr_scheduler",
    "profiler",
    "quantization",
    "transforms",
    "utils",
    "utils.benchmark",
    "utils.checkpoint",
    "utils.data",
)

SUBPACKAGES = ("backends", "kernels", "milestones", "profiling")  # those that `import tinytorch` is enough for, too


def find_module(label: str) -> Module:
    """The module meant by "6", "06", "autograd", "m06" or "m06_autograd"; ValueError with the choices otherwise."""
    for module in MODULES:
        if label.lower() in (
            str(module.number),
            f"{module.number:02}",
            f"m{module.number:02}",
            module.name,
            module.file,
        ):
            return module
    known = ", ".join(f"{module.number:02} {module.name}" for module in MODULES)
    raise ValueError(f"no module {label!r}; the modules are {known}")


# -- faces -------------------------------------------------------------------------------------------------------------


@cache
def face_names(face: str) -> dict[str, Module]:
    """The names that a face shows, and the module that each comes from."""
    return {name: module for module in MODULES for name in module.names(face)}


@cache
def load_modules() -> None:
    """Import every module of the course, in order: a later one may attach something to an earlier one's tensors."""
    for module in MODULES:
        for name in module.modules():
            importlib.import_module(name)


def find_export(module: Module, face: str, shown: str) -> Any:
    """What a module shows in a face, from its chapter or else its appendix; ImportError, naming both, if in neither."""
    name = module.names(face)[shown]
    places = module.modules()
    for place in places:
        namespace = vars(importlib.import_module(place))
        if name in namespace:
            return namespace[name]
    raise ImportError(
        f"curriculum.py says that {module.file} exports {name!r}, but {' and '.join(places)} have no such name"
    )


def face_getattr(namespace: dict[str, Any], name: str) -> Any:
    """The body of a face's `__getattr__`: loads the modules, finds the name and keeps it in the face's namespace."""
    face = _face(namespace["__name__"])
    names = face_names(face)
    if name == "__all__":
        return list(names)
    child = f"{face}.{name}".removeprefix(".")
    if child in FACES or child in SUBPACKAGES:
        return importlib.import_module(f"{PACKAGE}.{child}")
    if name not in names:
        raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}{_suggestion(name, face)}")
    load_modules()
    namespace[name] = find_export(names[name], face, name)  # from now on it is found without coming here
    return namespace[name]


def face_dir(package: str) -> list[str]:
    """The body of a face's `__dir__`: its names from the table, and the faces below it."""
    face = _face(package)
    start = f"{face}." if face else ""
    children = [other.removeprefix(start) for other in FACES if other and other.startswith(start)]
    return sorted({*face_names(face), *(child for child in children if "." not in child)})


def _face(package: str) -> str:
    """The face that a package shows: "" for tinytorch, "nn.functional" for tinytorch.nn.functional."""
    return package.removeprefix(PACKAGE).removeprefix(".")


def _suggestion(name: str, face: str) -> str:
    """ "; did you mean …?" with close names of this face, or with another face that has this very name."""
    if name.startswith("_"):
        return ""
    elsewhere = [other for other in FACES if other != face and name in face_names(other)]
    if elsewhere:
        return "; it is " + " and ".join(f"{PACKAGE}.{other}.{name}".replace("..", ".") for other in elsewhere)
    from difflib import get_close_matches  # only needed here, and takes time to import

    close = get_close_matches(name, face_names(face), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
