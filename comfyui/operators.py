"""The attention operators of pladis-surgery in one file. Apache-2.0. Needs torch alone.

Joined mechanically from its surgery/nn folder by comfyui/join.py, as in an artifact; change it there.
"""


# -------------------- compat.py --------------------

# What this folder uses of torch, diffusers and accelerate although they do not promise it, each in one place.
#
# An upgrade that moves such a name breaks its function here, which says what moved, and fails its test in
# tests/nn/test_compat.py.

import contextlib
import ctypes
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def _private(package: str, name: str) -> Iterator[None]:
    """Within this block a name of `package` that is not there becomes a RuntimeError that says so."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"{package} {metadata.version(package)} has moved {name}, which PLADIS uses although it is not promised "
            f"({error}); install an older {package}"
        ) from error


# torch


def compiled_cpp(source: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """A C++ source as a loaded library, by the cache of compiled code that inductor has: by source, flags, machine.

    On Linux inductor compiles with -march=native, and what more it would find out of this machine's vectors, for code
    that it writes itself, is not asked: that takes a dozen compilations once and seconds in every process.
    """
    with _private("torch", "torch._inductor.codecache.CppCodeCache"):
        from torch._inductor.codecache import CppCodeCache

        load = CppCodeCache.load
        knows = "needs_vec_isa" in inspect.signature(CppCodeCache.load_async).parameters  # torch 2.13
    more = {"needs_vec_isa": False} if knows and sys.platform == "linux" else {}
    return load(source, extra_flags=flags, **more)


def is_dispatched() -> bool:
    """Whether a mode of torch_dispatch (make_fx, FakeTensorMode) or a transform of torch.func is on."""
    try:  # at every small attention, so without _private
        return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
    except AttributeError:
        with _private("torch", "the stacks of its modes and transforms in torch._C"):
            raise


def set_constant(function: Callable) -> Callable:
    """Have torch.compile take a function's result as a constant, as torch.compiler.assume_constant_result does.

    Which would import the compiler here and now.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def fused_choice(query: Tensor, key: Tensor, value: Tensor, qk_scale: float) -> int:
    """Which of its kernels, a value of SDPBackend, scaled_dot_product_attention runs for these tensors on a GPU."""
    with _private("torch", "torch._fused_sdp_choice"):
        choice = torch._fused_sdp_choice
    return choice(query, key, value, None, 0.0, False, scale=qk_scale, enable_gqa=query.shape[1] != key.shape[1])


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor, qk_scale: float) -> tuple[Tensor, Tensor]:
    """(dense attention, log-sum-exp of the scores) by cuDNN; (batch, heads, queries, ...). Heads may share keys."""
    attention = _native("_scaled_dot_product_cudnn_attention")
    output, lse = attention(query, key, value, None, True, 0.0, False, False, scale=qk_scale)[:2]
    return output, lse.view(query.shape[:3])


def flash_attention(query: Tensor, key: Tensor, value: Tensor, qk_scale: float) -> tuple[Tensor, Tensor]:
    """As `cudnn_attention`, by the flash kernel."""
    return _native("_scaled_dot_product_flash_attention")(query, key, value, 0.0, False, scale=qk_scale)[:2]


def flash_attention_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, qk_scale: float
) -> tuple[Tensor, Tensor]:
    """As `cudnn_attention`, on a CPU; a query whose keys are all masked has a log-sum-exp of 0 there.

    mask: additive, of query's dtype, (batch, heads, queries, keys).
    """
    return _native("_scaled_dot_product_flash_attention_for_cpu")(
        query, key, value, 0.0, False, attn_mask=mask, scale=qk_scale
    )


@functools.cache
def _native(name):
    with _private("torch", f"torch.{name}"):  # which is called sooner than the same of torch.ops.aten
        return getattr(torch, name)


class KeepsFloat32:
    """A part of a module whose buffers of the names in `float32_buffers` stay float32, whatever is asked of it."""

    float32_buffers = ()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        for name in self.float32_buffers:  # load_state_dict(assign=True) takes the dtype of what it is given
            if name in self._buffers:
                self._buffers[name] = self._buffers[name].float()

    def _apply(self, fn, recurse=True):
        before = {name: self._buffers[name] for name in self.float32_buffers if name in self._buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new.dtype != old.dtype:  # follow the device, not the dtype: bf16 would turn 1.3 into 1.296875
                meta = "meta" in (new.device.type, old.device.type)
                self._buffers[name] = torch.empty_like(old, device=new.device) if meta else old.to(new.device)
        return self


# diffusers


class _KeptInFloat32:
    def __init__(self, names):
        self.names = names

    def __get__(self, model, cls):
        stock = cls.stock._keep_in_fp32_modules
        return [*(stock or []), *self.names] if model is None else stock


def keep_in_float32(cls: type, names: Iterable[str]) -> None:
    """Have from_pretrained(torch_dtype=...), which asks the class, keep the buffers of these names in float32.

    Not the instance: `.to(dtype)`, which leaves the buffers as they are, would warn that it does not.
    """
    cls._keep_in_fp32_modules = _KeptInFloat32(tuple(names))


def rounding_all(cls: type) -> type:
    """A model class without such a list, which from_pretrained(low_cpu_mem_usage=False) refuses."""
    return type(cls.__name__, (cls,), {"_keep_in_fp32_modules": None, "__module__": cls.__module__})


def set_config(model: torch.nn.Module, values: dict) -> None:
    """Replace a model's config; unlike register_to_config, keeping what was set on it as an attribute alone.

    diffusers' IP-Adapter loader marks the UNet so (config.encoder_hid_dim_type), and the adapter goes without that.
    """
    with _private("diffusers", "ConfigMixin._internal_dict"):
        old: Any = model._internal_dict
    model._internal_dict = type(old)(values)
    for name, value in vars(old).items():
        if name in values and value is not old[name]:
            setattr(model._internal_dict, name, value)


def share_lora_scales(stock: str, patched: str) -> None:
    """Have weights of LoRA by block spelt out for a patched class as for the stock class, by their names."""
    from diffusers.loaders import peft  # here, as the operators alone do without diffusers

    by_name = getattr(peft, "_SET_ADAPTER_SCALE_FN_MAPPING", {})  # without it no other LoRA is lost
    if stock in by_name:
        by_name[patched] = by_name[stock]


def with_attention(call: Callable, dispatched: Callable, scaled: Callable) -> Callable:
    """A processor's `__call__` with the attention function inside it replaced, whichever of the two it calls.

    dispatched: in the place of diffusers' dispatch_attention_fn; scaled: of F.scaled_dot_product_attention. The rest
    of the function is diffusers' own, in a copy of the namespace that it was written in.
    """
    names = call.__code__.co_names
    # Without its name, by which torch.compile would find the module, and in it the attention function that is replaced.
    namespace = {name: value for name, value in call.__globals__.items() if name != "__name__"}
    with _private("diffusers", f"the attention call of {call.__qualname__}"):
        if "dispatch_attention_fn" in names:
            namespace["dispatch_attention_fn"] = dispatched
        elif "scaled_dot_product_attention" in names and "F" in names:
            functions = {name: getattr(namespace["F"], name) for name in names if hasattr(namespace["F"], name)}
            namespace["F"] = types.SimpleNamespace(**{**functions, "scaled_dot_product_attention": scaled})
        else:
            raise AttributeError("it calls neither dispatch_attention_fn nor F.scaled_dot_product_attention")
    return types.FunctionType(call.__code__, namespace, call.__name__, call.__defaults__, call.__closure__)


def as_scaled(
    scaled: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, how: Mapping[str, Any]
) -> Tensor:
    """A call of dispatch_attention_fn by what stands for scaled_dot_product_attention.

    query, key, value: (batch, length, heads, head_dim), as the output. how: the other arguments; backend and
    parallel_config, which scaled_dot_product_attention has none of, are left out.
    """
    how = {name: value for name, value in how.items() if name not in ("backend", "parallel_config")}
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled(query, key, value, **how).transpose(1, 2)


def is_context_parallel(processor: object) -> bool:
    """Whether context parallelism is switched on for an attention processor."""
    return getattr(processor, "_parallel_config", None) is not None


def hooks_of_diffusers(module: torch.nn.Module) -> list:
    """The hooks of diffusers on a module."""
    return list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values())


def hooks_of_accelerate(module: torch.nn.Module) -> tuple:
    """The hooks of accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,))) if hook is not None else ()


def rebind_forward(module: torch.nn.Module, old: Callable, bound: Callable) -> None:
    """Put `bound` where hooks of diffusers and accelerate keep a module's forward(), of which `old` is the function."""
    for holder in (module, *getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())):
        _rebind(holder, old, bound)


def _rebind(holder, old, bound):
    # "forward" of the module itself outlives the hook; "__wrapped__" is where inspect.signature looks.
    for name in ("forward", "original_forward", "_old_forward", "_original_forward", "__wrapped__"):
        held = vars(holder).get(name)
        if getattr(held, "__func__", None) is old:
            setattr(holder, name, bound)
        elif isinstance(held, functools.partial):
            _rebind(held, old, bound)


# -------------------- operators.py --------------------

# The attention operators: one table, without torch, that recipes, configs, live patches, cards and kernels read.
#
# With z the scores over the temperature, T_d = softmax(z) V is dense attention and T_s = entmax_alpha(z / T) V the sparse
# one, T its own `sparse_temperature`. GAG's base is T_s, so at zeta = 1 and eta = infinity it is PLADIS with a scale one
# larger. `unit` is over what an operator projects or solves for its weights; the paper does not say: "head" (each head's
# own channels, for each query), "token" (the channels of all heads together, for each query) or "image" (all of an image
# of the batch: heads, channels and queries), as the code of APG has it, from which GAG takes the projection.
#
# Anderson acceleration (GAG, eq. 6 and Appendix F) weighs iterates F(x_i) by the simplex weights w that minimise
# |sum w_i (F(x_i) - x_i)|. F is the attention and x its query, as in Theorem 1: "x acts as the query and (K, V) as stored
# memories". Appendix F has no history inside one layer and takes T_s, T_low and T_d of one query in its place: since the
# weights sum to 1 their combination is the point of that triangle which is nearest to the query. "anderson_least_squares"
# is that; with alpha_low 1, where T_low is T_d, two terms are left: m = 1. "anderson_history" has the true history of
# section 3.5: the module keeps x and T_s(x) of the step before. "anderson" are the same three outputs with weights of
# one's own.
#
# A new operator is one entry here and its arithmetic: in kernels/reference.py, which defines it, and in the kernels, or,
# where it is a combination of whole outputs (no `code`), in kernels/combined.py alone.
#
# ADDITIONS are what a module may have besides its operator, at most one of each `role` (additions.py has their arithmetic
# and their order): a negative prompt's keys and values, and what is done to the text's. Their hyperparameters have names
# of their own, so that all of a module's are one flat table.

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

OperatorName = Literal["pladis", "sparse", "gag", "anderson", "anderson_least_squares", "anderson_history"]
AdditionName = Literal["nag", "vsf", "regions", "taca", "words", "shares", "reinject", "rebalance", "diversity"]
Role = Literal["text", "scores", "keys", "shares", "origin", "gain", "noise"]
TOLD_ROLES = ("text", "keys", "shares", "noise")  # whose modules are told of a run's prompts
Unit = Literal["head", "token", "image"]
UNITS: tuple[Unit, ...] = get_args(Unit)

LARGEST = 1e30  # what eta = infinity is stored as: JSON has no infinity, and no step is as long


@dataclass(frozen=True)
class Hyperparameter:
    """What a hyperparameter may be, low <= value <= high, which float32 holds; and what it is.

    must: the range in words, behind "must". positive: that its least value stands for "above 0". later: that configs
    and recipes from before there was it do not say it; they mean its default.
    """

    low: float
    high: float
    must: str
    meaning: str
    positive: bool = False
    later: bool = False


@dataclass(frozen=True)
class Operator:
    """An operator: its hyperparameters with their defaults, in the order in which the kernels take them.

    title: what a card calls it. formula: in Markdown. source: paper and equation. code: its number in the kernels; None
    for what combines whole outputs of theirs (kernels/combined.py). off: the hyperparameters at which it is dense
    attention, which a schedule sets outside its window. projects: that it has a `unit`. keeps: that a module keeps
    something from one step to the next (history.py).
    """

    title: str
    formula: str
    source: str
    code: int | None
    defaults: Mapping[str, float]
    off: Mapping[str, float] = field(default_factory=lambda: {"scale": 0.0})
    projects: bool = False
    keeps: bool = False
    role: Role | None = None  # of an addition

    @property
    def settings(self) -> tuple[str, ...]:
        """All that may be set of it: its hyperparameters, and the unit where it has one."""
        return (*self.defaults, *(["unit"] if self.projects else []))


_ALPHA = (1.0, 2.0, "lie in [1, 2] (1 is softmax, 2 is sparsemax)")
_FINITE = (-LARGEST, LARGEST, "be a finite number")
_SHARE = (0.0, 1.0, "lie in [0, 1]")
HYPERPARAMETERS = {
    "alpha": Hyperparameter(*_ALPHA, "of the sparse map"),
    "alpha_low": Hyperparameter(*_ALPHA, "of the second sparse map"),
    "scale": Hyperparameter(*_FINITE, "the papers' lambda; above 1 it extrapolates, and weights may be negative"),
    "scale_low": Hyperparameter(*_FINITE, "the share of the second sparse map"),
    "temperature": Hyperparameter(
        1e-30, LARGEST, "be above 0 (1e-30 to 1e30)", "divides the scores of every map (PLADIS, eq. 36)", positive=True
    ),
    "sparse_temperature": Hyperparameter(
        1e-4, 1e4, "lie in [0.0001, 10000]", "divides the scores of the sparse maps alone (PLADIS, Fig. 9)", later=True
    ),
    "zeta": Hyperparameter(*_FINITE, "the share of the step's part that is orthogonal to T_s"),
    "parallel": Hyperparameter(
        *_FINITE, "the share of the step's part along T_s; 0 with zeta 1 is the orthogonal part alone", later=True
    ),
    "eta": Hyperparameter(0.0, math.inf, "be 0 or above", "the step's largest length"),
    "phi": Hyperparameter(*_FINITE, "how far NAG goes from the negative prompt's output"),
    "tau": Hyperparameter(
        1e-30, LARGEST, "be above 0 (1e-30 to 1e30)", "NAG's largest L1 norm, in that of the prompt's", positive=True
    ),
    "blend": Hyperparameter(*_SHARE, "the share of NAG's output, the rest being the prompt's; the paper's alpha"),
    "flip": Hyperparameter(*_FINITE, "what a negative prompt's values are multiplied by, less their sign"),
    "offset": Hyperparameter(*_FINITE, "taken from the scores of a negative prompt's keys"),
    "base": Hyperparameter(*_SHARE, "the share of the prompt's output in a region, the rest being its own prompt's"),
    "gamma": Hyperparameter(
        1e-30, LARGEST, "be above 0 (1e-30 to 1e30)", "multiplies the image's scores with the text", positive=True
    ),
    "kept": Hyperparameter(*_SHARE, "what the weights of start, end and padding are multiplied by"),
    "weight": Hyperparameter(*_FINITE, "how much of the second block's text is brought back"),
    "gain": Hyperparameter(*_FINITE, "multiplies a block's text"),
    "strength": Hyperparameter(*_FINITE, "of the noise on the text, in its standard deviation"),
    "portion": Hyperparameter(*_SHARE, "of the text's numbers that get noise"),
    "held": Hyperparameter(*_SHARE, "how far softmax's shares of start, words and padding are held"),
}

_PLADIS = "PLADIS (Kim and Sim 2025, arXiv 2503.07677)"
_GAG = "GAG (Kim 2026, arXiv 2603.02531)"
_DENSE_MAPS = {"alpha": 1.0, "sparse_temperature": 1.0}  # at which T_s is T_d
OPERATORS: dict[OperatorName, Operator] = {
    "pladis": Operator(
        title=_PLADIS,
        formula="`T_d + scale (T_s - T_d)`",
        source="PLADIS, eq. 15",
        code=0,
        defaults={"alpha": 1.5, "scale": 2.0, "temperature": 1.0, "sparse_temperature": 1.0},
    ),
    "sparse": Operator(  # without a sparse_temperature: its map is the sparse one alone
        title=f"purely sparse attention, which is {_PLADIS} at scale 1",
        formula="`T_s`",
        source="PLADIS, eq. 15 at scale 1",
        code=1,
        defaults={"alpha": 1.5, "temperature": 1.0},
        off={"alpha": 1.0},
    ),
    "gag": Operator(
        title=f"{_GAG}, a refinement of {_PLADIS}",
        formula=(
            "`T_s + scale min(1, eta / |u|) u`, where `u = parallel r_par + zeta r_orth` and `r = T_s - T_d` is split "
            "along `T_s`"
        ),
        source="GAG, eq. 11-13",
        code=3,
        defaults={
            "alpha": 1.5,
            "scale": 10.0,
            "temperature": 1.0,
            "zeta": 0.0,
            "eta": 15.0,
            "sparse_temperature": 1.0,
            "parallel": 1.0,
        },
        off={"scale": 0.0, **_DENSE_MAPS},  # at scale 0 it is T_s, which has to be the dense map
        projects=True,
    ),
    "anderson": Operator(
        title=f"the Anderson surrogate of {_GAG} with given weights, an extension of {_PLADIS}",
        formula=("`scale T_s + scale_low T_low + (1 - scale - scale_low) T_d`, where `T_low = entmax_alpha_low(z) V`"),
        source="GAG, Appendix F, with given weights",
        code=2,
        defaults={
            "alpha": 1.5,
            "scale": 1.0,
            "temperature": 1.0,
            "alpha_low": 1.25,
            "scale_low": 1.0,
            "sparse_temperature": 1.0,
        },
        off={"scale": 0.0, "scale_low": 0.0},
    ),
    "anderson_least_squares": Operator(
        title=f"the Anderson surrogate of {_GAG}, an extension of {_PLADIS}",
        formula=(
            "`w_0 T_s + w_1 T_low + w_2 T_d`, where the `w` of 0 or above, with sum 1, minimise "
            "`|w_0 (T_s - q) + w_1 (T_low - q) + w_2 (T_d - q)|` for the query `q`"
        ),
        source="GAG, Appendix F",
        code=None,
        defaults={"alpha": 1.5, "temperature": 1.0, "alpha_low": 1.25, "sparse_temperature": 1.0},
        off={**_DENSE_MAPS, "alpha_low": 1.0},
        projects=True,
    ),
    "anderson_history": Operator(
        title=f"Anderson acceleration over the denoising steps, as {_GAG} describes it, of {_PLADIS}",
        formula=(
            "`T_s + scale w (T_s' - T_s)`, where `'` is the step before and `w` in [0, 1] minimises "
            "`|(1 - w) (T_s - q) + w (T_s' - q')|` for the queries `q`"
        ),
        source="GAG, eq. 6 with m = 1, and section 3.5",
        code=None,
        defaults={"alpha": 1.5, "scale": 1.0, "temperature": 1.0},
        off={"scale": 0.0, "alpha": 1.0},
        projects=True,
        keeps=True,
    ),
}
ADDITIONS: dict[AdditionName, Operator] = {
    "nag": Operator(
        title="NAG (Chen et al. 2025, arXiv 2505.21179), a negative prompt in attention,",
        formula=(
            "`blend Z + (1 - blend) Z+`, where `Z = u min(1, tau |Z+| / |u|)`, `u = Z+ + phi (Z+ - Z-)`, with the L1 "
            "norm over the heads of a token, and `Z+`, `Z-` are the outputs for the prompt and the negative prompt"
        ),
        source="NAG, its method section; the released code's `nag_scale` is phi + 1",
        code=None,
        defaults={"phi": 5.0, "tau": 2.5, "blend": 0.25},
        off={"blend": 0.0},
        role="text",
    ),
    "vsf": Operator(
        title="VSF (Guo and Du 2025, arXiv 2508.10931), a negative prompt in attention,",
        formula="over the keys `[K+, K-]` with the values `[V+, -flip V-]`, `offset` taken from the scores of `K-`",
        source="VSF, and its released code",
        code=None,
        defaults={"flip": 3.5, "offset": 0.1},
        off={"flip": 0.0, "offset": LARGEST},
        role="text",
    ),
    "regions": Operator(
        title="regional prompts, after Chen et al. 2024 (arXiv 2411.02395),",
        formula=(
            "`base Z + (1 - base) Z_r` for the queries in a region, `Z_r` being the output over the keys of its own "
            "prompt (of all that it lies in), and `Z`, everyone else's, over the prompt's"
        ),
        source="arXiv 2411.02395, and its released code's `base_ratio`",
        code=None,
        defaults={"base": 0.3},
        off={"base": 1.0},
        role="text",
    ),
    "taca": Operator(
        title="TACA (Lv et al. 2025, arXiv 2506.07986)",
        formula="over the scores of image queries with text keys times `gamma`, in the one softmax of joint attention",
        source="TACA, and its released code",
        code=None,
        defaults={"gamma": 1.2},
        off={"gamma": 1.0},
        role="scores",
    ),
    "words": Operator(
        title="weights of start, end and padding tokens reduced",
        formula="with the softmax weights of all keys but words times `kept` before they are normed (0 masks them)",
        source="ours",
        code=None,
        defaults={"kept": 0.0},
        off={"kept": 1.0},
        role="keys",
    ),
    "shares": Operator(
        title="softmax's shares of start, words and padding held",
        formula=(
            "`held sum_g m_g T_g + (1 - held) T`, `T_g` being the operator over the keys of group `g` alone and `m_g` "
            "their share of the softmax"
        ),
        source="ours",
        code=None,
        defaults={"held": 1.0},
        off={"held": 0.0},
        role="shares",
    ),
    "reinject": Operator(
        title="Prompt Reinjection (arXiv 2602.06886)",
        formula=(
            "with a block's text `x` as `z(z(x) + weight z(o)) s(x) + mean(x)`, `o` being the second block's and `z` "
            "less the mean over the standard deviation `s`, of a token"
        ),
        source="Prompt Reinjection, and its released code without rotations",
        code=None,
        defaults={"weight": 0.025},
        off={"weight": 0.0},
        role="origin",
    ),
    "rebalance": Operator(
        title="text weighted block by block (after arXiv 2601.02211)",
        formula="with a block's text times `gain`",
        source="arXiv 2601.02211",
        code=None,
        defaults={"gain": 1.1},
        off={"gain": 1.0},
        role="gain",
    ),
    "diversity": Operator(
        title="noise on the text for more difference between seeds",
        formula=(
            "with the text plus `strength` times its standard deviation times normal noise in a `portion` of its "
            "numbers, the same in every step of an image, by its seed"
        ),
        source="ours, after the seed variance nodes of ComfyUI",
        code=None,
        defaults={"strength": 0.5, "portion": 0.5},
        off={"strength": 0.0},
        role="noise",
    ),
}
OPERATIONS: dict[str, Operator] = {**OPERATORS, **ADDITIONS}  # all that a recipe's `operator` may name
DENSE = {"operator": "pladis", **OPERATORS["pladis"].defaults, "scale": 0.0}  # what an addition stands on by itself


def value_problem(name: str, value: object) -> str | None:
    """What is wrong with a hyperparameter's value, as "must ..., not ..."; None if its operator is defined for it."""
    limits = HYPERPARAMETERS[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and limits.low <= value <= limits.high:
        return None
    return f"must {limits.must}, not {value!r}"


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str | None:
    """That `name` is none of the known ones, as a sentence; None if it is."""
    known = tuple(known)
    return None if name in known else f"unknown {kind} {name!r}; there are {', '.join(known)}"


def has_no(operator: str, name: str) -> str:
    """That an operator or addition has nothing of this name, as a sentence."""
    return f"{operator} has no {name}; it has {', '.join(OPERATIONS[operator].settings)}"


def setting_problems(setting: Mapping[str, object]) -> list[str]:
    """What is wrong with {"operator", hyperparameters, "unit"}, a sentence each; what is left out takes its default."""
    operator = setting.get("operator")
    if problem := unknown_name("operator", operator, OPERATIONS):
        return [problem]
    operator = str(operator)
    own, problems = OPERATIONS[operator], []
    if "unit" in setting:
        unit_problem = None if own.projects else has_no(operator, "unit")
        problems.append(unknown_name("unit", setting["unit"], UNITS) or unit_problem)
    given = {name: value for name, value in setting.items() if name not in ("operator", "unit")}
    problems += [has_no(operator, name) for name in sorted(given.keys() - own.defaults.keys())]
    for name in own.defaults:
        problem = value_problem(name, given[name]) if name in given else None
        problems.append(problem and f"{name} {problem}")
    return [problem for problem in problems if problem]


def whole_setting(setting: Mapping[str, Any]) -> dict[str, Any]:
    """A setting without problems, as a config holds it: what is left out by its default, in the operator's order."""
    own = OPERATIONS[setting["operator"]]
    numbers = {name: min(float(setting.get(name, default)), LARGEST) for name, default in own.defaults.items()}
    unit = {"unit": setting.get("unit", UNITS[0])} if own.projects else {}
    return {"operator": setting["operator"], **numbers, **unit}


def standing(operations: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Operations, as a config writes them, with dense attention beneath the additions that have no operator."""
    operations = [dict(one) for one in operations]
    operated = {path for one in operations if one["operator"] in OPERATORS for path in one["layers"]}
    bare = dict.fromkeys(path for one in operations for path in one["layers"] if path not in operated)
    return [*operations, *([{**DENSE, "layers": list(bare)}] if bare else [])]


def later_defaults(operator: str) -> dict[str, float]:
    """{name: value} of an operator's hyperparameters that a config from before there were them means unsaid."""
    return {name: value for name, value in OPERATIONS[operator].defaults.items() if HYPERPARAMETERS[name].later}


def operators_table() -> list[str]:
    """Markdown for a page of documentation: a table of the operators and one of their hyperparameters, line by line."""
    lines = ["| operator | attention | source | settings and defaults |", "|---|---|---|---|"]
    for name, own in OPERATIONS.items():
        settings = [f"{key} {value:g}" for key, value in own.defaults.items()]
        settings += [f"unit {UNITS[0]}"] if own.projects else []
        formula = own.formula.replace("|", r"\|")
        lines.append(f"| `{name}` | {formula} | {own.source} | {', '.join(settings)} |")
    lines += ["", "| hyperparameter | meaning | must |", "|---|---|---|"]
    lines += [f"| `{name}` | {limits.meaning} | {limits.must} |" for name, limits in HYPERPARAMETERS.items()]
    return [*lines, f"| `unit` | over what an operator projects or solves for weights | be one of {', '.join(UNITS)} |"]


# -------------------- kernels/combined.py --------------------

# What combines whole outputs of the kernels in plain torch: GAG, and Anderson's weights by least squares.
#
# A kernel of one tile can take the sums of a query's own channels, or of a token's; those of a whole image, and the three
# outputs among which Anderson acceleration chooses, it does not hold. There the kernels make T_s, T_d and T_low one after
# the other, in float32, and what follows costs a few passes over tensors of the output's size.
#
# No quantity is squared before it is divided by the largest of its unit, so nothing overflows or vanishes.

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


_DIMS = {"head": (-1,), "token": (1, -1), "image": (1, 2, 3)}  # of (batch, heads, queries, head_dim)
_THIN = 1e-12  # of two squared lengths: what is shorter is rounding


def of_one_step(operator: OperatorName, settings: list[Tensor]) -> tuple[OperatorName, list[Tensor]]:
    """What an operator computes of one step alone, which is what a kernel is asked for: (operator, its settings)."""
    if not OPERATORS[operator].keeps:
        return operator, settings
    named = dict(zip(OPERATORS[operator].defaults, settings, strict=True))
    return "sparse", [named[name] for name in OPERATORS["sparse"].defaults]


def is_combined(operator: OperatorName, unit: Unit) -> bool:
    """Whether no single kernel computes it, but `from_outputs` does. operator: as `of_one_step` gives it."""
    return OPERATORS[operator].code is None or (OPERATORS[operator].projects and unit == "image")


def from_outputs(
    run: Callable[[list[Tensor], bool], tuple[Tensor, Tensor | None]],
    query: Tensor,
    settings: list[Tensor],
    operator: OperatorName,
    unit: Unit,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(output, log-sum-exp or None) of an operator that `is_combined`, in float32.

    run: ([alpha, temperature], with_lse) -> (entmax_alpha(scores / temperature) V in float32, log-sum-exp or None).
    query: (batch, heads, queries, head_dim). settings: scalar tensors in the order of OPERATORS.
    """
    named = dict(zip(OPERATORS[operator].defaults, settings, strict=True))
    temperature = named["temperature"] * named["sparse_temperature"]
    dense, lse = run([torch.ones_like(named["alpha"]), named["temperature"]], with_lse)
    sparse, _ = run([named["alpha"], temperature], False)
    if operator == "gag":
        return geometry_aware(sparse, sparse - dense, named, unit), lse
    low, _ = run([named["alpha_low"], temperature], False)
    return nearest_of_three(sparse, low, dense, query, unit), lse


def geometry_aware(sparse: Tensor, residual: Tensor, settings: Mapping[str, Tensor], unit: Unit) -> Tensor:
    """GAG, eq. 11-13: sparse + scale min(1, eta/|u|) u, u = parallel r_par + zeta r_orth, r split along `sparse`.

    sparse: T_s, (batch, heads, queries, head_dim) in float32 or float64; residual: r = T_s - T_d, the same.
    """
    dims = _DIMS[unit]
    direction = sparse / _at_least_tiny(sparse.abs().amax(dims, keepdim=True))
    length = (direction * direction).sum(dims, keepdim=True)  # at least 1, or the output is zero
    parallel = (residual * direction).sum(dims, keepdim=True) / length.clamp_min(1.0) * direction
    update = settings["parallel"] * parallel + settings["zeta"] * (residual - parallel)
    largest = _at_least_tiny(update.abs().amax(dims, keepdim=True))
    norm = largest * (update / largest).square().sum(dims, keepdim=True).sqrt()
    eta = settings["eta"]
    gain = torch.where(norm > eta, eta / _at_least_tiny(norm), torch.ones_like(norm))
    return sparse + settings["scale"] * gain * update


def nearest_of_three(sparse: Tensor, low: Tensor, dense: Tensor, query: Tensor, unit: Unit) -> Tensor:
    """GAG, Appendix F: w_0 sparse + w_1 low + w_2 dense by the simplex weights whose residual is the shortest."""
    weight, weight_low = weights_of_three(sparse, low, dense, query, unit)
    return dense + weight * (sparse - dense) + weight_low * (low - dense)


def weights_of_three(sparse: Tensor, low: Tensor, dense: Tensor, query: Tensor, unit: Unit) -> tuple[Tensor, Tensor]:
    """(w_0, w_1) of `nearest_of_three`, w_2 being what is left to 1; each broadcastable to the outputs.

    The residuals are each output less the query, so with a sum of 1 this is the point of their triangle that is nearest
    to the query: inside it, or on one of its sides. All: (batch, heads, queries, head_dim), the first three float32 or
    float64. unit: what shares its weights.
    """
    dims = _DIMS[unit]
    query = query.to(dense.dtype)
    parts = sparse - dense, low - dense, query - dense
    largest = _at_least_tiny(torch.stack([part.abs().amax(dims, keepdim=True) for part in parts]).amax(0))
    first, second, goal = (part / largest for part in parts)

    def dot(one, other):
        return (one * other).sum(dims, keepdim=True)

    def along(step, aim):  # the share of `step`, in [0, 1], that comes nearest to `aim`
        square = dot(step, step)
        return (dot(step, aim) / _at_least_tiny(square)).clamp(0.0, 1.0)

    # By Gram and Schmidt, as both sides may be nearly one line.
    square = _at_least_tiny(dot(first, first))
    shared = dot(first, second) / square
    upright = second - shared * first
    height = dot(upright, upright)
    inner_low = dot(upright, goal) / _at_least_tiny(height)
    inner = dot(first, goal) / square - shared * inner_low
    is_inside = (height > _THIN * dot(second, second)) & (inner > 0.0) & (inner_low > 0.0) & (inner + inner_low < 1.0)

    on_first, on_second, on_third = along(first, goal), along(second, goal), along(first - second, goal - second)
    best = on_first, torch.zeros_like(on_first)
    shortest = _square_of(goal - on_first * first, dims)
    for weight, weight_low in ((torch.zeros_like(on_second), on_second), (on_third, 1.0 - on_third)):
        left = _square_of(goal - weight * first - weight_low * second, dims)
        best = torch.where(left < shortest, weight, best[0]), torch.where(left < shortest, weight_low, best[1])
        shortest = torch.minimum(left, shortest)
    return torch.where(is_inside, inner, best[0]), torch.where(is_inside, inner_low, best[1])


def share_of_before(query: Tensor, output: Tensor, query_before: Tensor, output_before: Tensor, unit: Unit) -> Tensor:
    """Anderson's weight of the iterate before (GAG, eq. 6 with m = 1): w in [0, 1], of each `unit`, that minimises
    |(1 - w) (output - query) + w (output_before - query_before)|.

    All: (batch, heads, queries, head_dim), float32. Returns it broadcastable to them.
    """
    dims = _DIMS[unit]
    residual = output - query
    fall = residual - (output_before - query_before)
    largest = _at_least_tiny(torch.maximum(residual.abs(), fall.abs()).amax(dims, keepdim=True))
    residual, fall = residual / largest, fall / largest
    square = _square_of(fall, dims)
    return ((residual * fall).sum(dims, keepdim=True) / _at_least_tiny(square)).clamp(0.0, 1.0)


def _square_of(vector, dims):
    return vector.square().sum(dims, keepdim=True)


def _at_least_tiny(value):
    return value.clamp_min(torch.finfo(value.dtype).tiny)


# -------------------- kernels/entmax.py --------------------

# alpha-entmax without a sort: Newton's method on the norm of the positive part.
#
# `p = [(alpha-1) z - tau]_+^(1/(alpha-1))` with tau such that p sums to one (Peters et al. 2019, arXiv 1905.05702,
# eq. 10). With r = 1/(alpha-1) the sum is one exactly where `||relu(x - t)||_r = 1`, x = (alpha-1)(z - max z). That norm
# is convex and decreasing in t, so Newton's iterates rise monotonically from t = -1 to the root: a small fixed number
# of steps serves every alpha, with only elementwise operations and row sums.
#
# Two choices make it hold over the whole of [1, 2] in float32. The threshold is carried as `lift = t + 1`, and powers
# are taken as exp(r log1p(.)): near alpha = 1, where r is huge and relu(x - t) is close to one, the plain power would
# lose every digit, while this form goes over into softmax. And alpha is data, never a branch, so that a compiled graph
# serves every alpha.

import torch
from torch import Tensor



def newton_steps(keys: int) -> int:
    """Steps that reach float32 rounding for rows of `keys` scores, at any alpha and any spread of the scores.

    Found by searching for the slowest rows; `tests/nn/test_entmax.py` holds them to the float64 oracle.
    """
    if isinstance(keys, torch.SymInt):  # a graph for any number of keys; a comparison would fix it to a range
        return 10
    return 6 if keys <= 128 else 8 if keys <= 1024 else 10


def shift_by_row_max(scores: Tensor) -> Tensor:
    """Scores less the largest of their row, in float32 at least; a row that is masked whole stays -inf."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if scores.shape[-1] == 0:
        return scores
    row_max = scores.amax(dim=-1, keepdim=True)
    # -inf - -inf is NaN: a row without any key keeps its -inf and comes out as zeros.
    return scores - torch.where(row_max == float("-inf"), torch.zeros_like(row_max), row_max)


def softmax_of_shifted(shifted: Tensor) -> Tensor:
    """Softmax over the last dimension of max-shifted scores; zeros where every key is masked."""
    weights = shifted.exp()
    # The largest score of a row contributes exp(0) = 1, so only a row without keys has a sum below one.
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1.0)


def entmax_of_shifted(shifted: Tensor, alpha: Tensor) -> Tensor:
    """alpha-entmax over the last dimension of max-shifted scores; zeros where every key is masked.

    `alpha` is a tensor that broadcasts against `shifted`.
    """
    # At the smallest alpha - 1 that the dtype can tell from zero, entmax is softmax to rounding.
    alpha_minus_one = (alpha.to(shifted.dtype) - 1.0).clamp_min(torch.finfo(shifted.dtype).eps)
    r = 1.0 / alpha_minus_one
    x = shifted * alpha_minus_one
    lift = torch.zeros_like(x[..., :1])
    for _ in range(newton_steps(shifted.shape[-1])):
        power_r_minus_1, base = _powers(x - lift, r)
        norm_r = (power_r_minus_1 * base).sum(dim=-1, keepdim=True).clamp_min(1.0)  # ||.||_r ** r, at least 1 here
        log_norm = norm_r.log() / r
        # (N - 1) N^(r-1) / sum p^(r-1), with N = norm_r ** (1/r)
        step = torch.expm1(log_norm) * torch.exp((r - 1.0) * log_norm)
        lift = lift + step / power_r_minus_1.sum(dim=-1, keepdim=True).clamp_min(1.0)
    power_r_minus_1, base = _powers(x - lift, r)
    weights = power_r_minus_1 * base
    # What is left of the residual is float32's resolution of the threshold, times the number of keys. One more Newton
    # step in the weights instead of the threshold removes it: d weights = (1 - sum) p^(r-1) / sum p^(r-1).
    total_slope = power_r_minus_1.sum(dim=-1, keepdim=True)
    residual = 1.0 - weights.sum(dim=-1, keepdim=True)
    correction = residual / torch.where(total_slope > 0, total_slope, torch.ones_like(total_slope))
    return torch.addcmul(weights, correction, power_r_minus_1).clamp_min(0.0)


def _powers(depth, r):
    """`(1 + depth)^(r-1)` and `1 + depth` where depth > -1, zero elsewhere; NaN stays NaN."""
    # log1p(-1) is -inf, and 0 * -inf is NaN at alpha = 2; what lies outside the support is masked to zero below.
    above_minus_one = -1.0 + torch.finfo(depth.dtype).eps / 2
    power = torch.exp((r - 1.0) * torch.log1p(depth.clamp_min(above_minus_one)))
    outside = depth <= -1.0
    return power.masked_fill(outside, 0.0), (1.0 + depth).masked_fill(outside, 0.0)


def entmax(scores: Tensor, alpha: float | Tensor, dim: int = -1) -> Tensor:
    """alpha-entmax of `scores` along `dim`: softmax at alpha = 1, sparsemax at alpha = 2.

    scores: any shape, any floating dtype; solved in float32 (float64 input in float64) and returned in its own dtype.
        A score of -inf is a masked key; a row of nothing else comes out as zeros.
    alpha: a number in [1, 2], or a tensor that broadcasts against `scores` with `dim` moved last (its values are the
        caller's to check: reading them would stop the device).
    Raises ValueError for a number outside [1, 2], TypeError for scores that are not floating. Source: Peters et al.
    2019 for the definition; the solver is ours.
    """
    if scores.ndim == 0:
        return torch.ones_like(scores)
    if not scores.is_floating_point():
        raise TypeError(f"entmax needs floating scores, not {scores.dtype}")
    if not isinstance(alpha, torch.Tensor):
        if problem := value_problem("alpha", float(alpha)):
            raise ValueError(f"alpha {problem}")
        alpha = torch.tensor(float(alpha), dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
    shifted = shift_by_row_max(scores.movedim(dim, -1))
    return entmax_of_shifted(shifted, alpha.to(shifted.device)).movedim(-1, dim).to(scores.dtype)


# -------------------- kernels/cpu.py --------------------

# The fused operators on CPUs: one C++ kernel from query, key and value to the output.
#
# Its source (cpu.cpp) is compiled once by the machine's own C++ compiler through torch, which keeps the result on
# disk. Where there is none, `compiler_is_available` is False and the blocked torch form is used.

import ctypes
import functools
import platform
import warnings

import torch



@functools.cache
def compiler_is_available() -> bool:
    """Whether the kernel compiles and loads here; tries it, once a process. Says why not in a warning."""
    try:
        _library()
    except Exception as error:  # whatever a missing or broken tool chain raises
        reason = str(error).strip().splitlines()
        warnings.warn(
            f"the C++ attention kernel cannot be built ({type(error).__name__}: {reason[0] if reason else 'no message'}"
            "); using the slower torch form. A C++ compiler such as g++ is what it needs",
            stacklevel=2,
        )
        return False
    return True


def library_is_loaded() -> bool:
    """Whether the kernel has been built and loaded in this process already. Never builds it."""
    return _library.cache_info().currsize > 0


@functools.cache
def _library():
    """The C++ source's pladis_attention."""
    function = compiled_cpp(cpp_source(), compiler_flags()).pladis_attention
    function.argtypes = [ctypes.c_void_p] * 10
    function.restype = None
    return function


def compiler_flags() -> tuple[str, ...]:
    """What the compiler is told beside what torch tells it for code of its own."""
    if platform.system() == "Windows":
        return ()
    # inductor vectorises by hand and tells the compiler not to; what is left to do here is the compiler's.
    flags = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
    return (*flags, "-mprefer-vector-width=512") if platform.machine() in ("x86_64", "AMD64") else flags


_SIZES = ("batch", "heads", "key_heads", "queries", "keys", "channels", "value_channels")


class _Plan(ctypes.Structure):
    """The C++ source's struct Plan."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((f"{tensor}_{dim}", ctypes.c_int64) for tensor in ("query", "key", "value") for dim in "bhn"),
        *((f"mask_{dim}", ctypes.c_int64) for dim in "bhqk"),
        *((f"{tensor}_{dim}", ctypes.c_int64) for tensor in ("output", "dense", "dense_lse") for dim in "bhn"),
        ("qk_scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("kind", "whole_token", "steps", "threads", "dtype", "mask_kind")),
    ]


_DTYPES_IN_C = (torch.float32, torch.float16, torch.bfloat16)
_MOST_PLANS = 512

# What a call has in common with the next of its kind: {everything that _planned reads: its result}. A plan is never
# changed once it is made, so threads may share it.
_plans = {}


def fused_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    settings: list[torch.Tensor],
    *,
    operator: str,
    unit: str,
    mask: torch.Tensor | None,
    qk_scale: float,
    with_lse: bool = False,
    joined: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `reference`, with nothing beyond the output in memory. float32; float16 and bfloat16, computed in float32.

    query: (batch, heads, queries, head_dim); key, value: (batch, key_heads, keys, head_dim). Returns (output,
    log-sum-exp or None), (batch, heads, queries, head_dim) and (batch, heads, queries).
    joined: (attention of the same queries to other keys, its log-sum-exp in float32, where to write the attention to
    both), for what `joins_on_cpu` passes.
    """
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    # Small calls take a few microseconds, of which Python should not add many: what is asked of tensors is kept.
    kind = (
        query.shape,
        query.stride(),
        key.shape,
        key.stride(),
        value.shape,
        value.stride(),
        query.dtype,
        key.dtype,
        value.dtype,
        None if mask is None else (mask.shape, mask.stride(), mask.dtype),
        None if joined is None else tuple(tensor.stride() for tensor in joined),
        operator,
        unit,
        qk_scale,
        torch.get_num_threads(),
    )
    planned = _plans.get(kind)
    if planned is None:
        planned = _planned(query, key, value, mask, joined, operator, unit, qk_scale)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[kind] = planned
    plan, address, shape, strides = planned
    if plan is None or shape is None or strides is None:
        tensors = _for_c(query, key, value)
        output, lse = fused_on_cpu(
            *tensors, settings, operator=operator, unit=unit, mask=mask, qk_scale=qk_scale, with_lse=with_lse
        )
        return output.to(value.dtype), lse
    dense, dense_lse, output = joined or (None, None, torch.empty_strided(shape, strides, dtype=value.dtype))
    lse = torch.empty(shape[:3]) if with_lse else None
    if plan.keys == 0 or 0 in shape:
        return output.zero_(), None if lse is None else lse.fill_(-torch.inf)
    numbers = [s if s.dtype is torch.float32 and s.is_cpu else s.to("cpu", torch.float32) for s in settings]
    _library()(
        address,
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if mask is None else mask.data_ptr(),
        output.data_ptr(),
        None if lse is None else lse.data_ptr(),
        None if dense is None else dense.data_ptr(),
        None if dense_lse is None else dense_lse.data_ptr(),
        _ADDRESSES[len(numbers)](*[number.data_ptr() for number in numbers]),
    )
    return output, lse


_ADDRESSES = [ctypes.c_void_p * count for count in range(8)]


def joins_on_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, operator: str, unit: str) -> bool:
    """Whether `fused_on_cpu` takes `joined`: tensors as they are, and a head of an operator at a time."""
    as_they_are = all(new is old for new, old in zip(_for_c(query, key, value), (query, key, value), strict=True))
    return as_they_are and key.shape[2] > 0 and not (operator == "gag" and unit == "token")


def _planned(query, key, value, mask, joined, operator, unit, qk_scale):
    """(plan, its address, output shape, output strides); a plan of None where the tensors have to be copied first."""
    if any(new is not old for new, old in zip(_for_c(query, key, value), (query, key, value), strict=True)):
        return None, None, None, None
    batch, heads, queries, channels = query.shape
    shape = (batch, heads, queries, value.shape[3])
    # As empty_outputs lays it out: (batch, queries, heads, head_dim), transposed.
    row = max(1, shape[3])
    strides = (row * max(1, heads) * max(1, queries), row, row * max(1, heads), 1)
    plan = _Plan(
        *(batch, heads, key.shape[1], queries, key.shape[2], channels, value.shape[3]),
        *(stride for tensor in (query, key, value) for stride in tensor.stride()[:3]),
        *((0, 0, 0, 0) if mask is None else mask.expand(batch, heads, queries, key.shape[2]).stride()),
        *(joined[2].stride() if joined else strides)[:3],
        *((*joined[0].stride()[:3], *joined[1].stride()) if joined else (0,) * 6),
        qk_scale,
        kind=OPERATORS[operator].code,
        whole_token=operator == "gag" and unit == "token",
        steps=4 * newton_steps(key.shape[2]),  # it stops when it is there: no row is known that needs half as many
        threads=torch.get_num_threads(),
        dtype=_DTYPES_IN_C.index(query.dtype),
        mask_kind=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
    )
    return plan, ctypes.addressof(plan), shape, strides


def _for_c(*tensors):
    """The tensors in a form that the kernel reads: of one dtype, each with its channels side by side."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.float() for tensor in tensors]
    return [t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in tensors]


# -------------------- kernels/reference.py --------------------

# The operators in plain torch: the definition that every faster implementation is tested against.
#
# `reference` works on whole tensors and is what a graph is decomposed into. `blocked` calls it on pieces that fit a
# cache, so that long inputs never hold all their scores at once.

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from torch import Tensor


BLOCK_SCORES = 1 << 20  # scores at once in a blocked pass: 4 MB in float32


def is_autocast(query: Tensor) -> bool:
    """Whether torch.autocast is on for the tensor's device."""
    kind = query.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three as they are; under autocast those that differ in dtype, as after a norm in float32, in autocast's own.

    As scaled_dot_product_attention has it, which takes no tensors of different dtypes otherwise.
    """
    if query.dtype == key.dtype == value.dtype or not is_autocast(query):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def without_autocast(function: Callable) -> Callable:
    """`function`, whose first argument is a tensor, with autocast off, under which matmul makes halves of float32."""

    @functools.wraps(function)
    def computed(tensor, *more, **how):
        if not is_autocast(tensor):
            return function(tensor, *more, **how)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *more, **how)

    return computed


@without_autocast
def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: list[Tensor],
    *,
    operator: OperatorName,
    unit: Unit,
    mask: Tensor | None,
    qk_scale: float,
    with_lse: bool = False,
    sparse_map: Callable[[Tensor, Tensor], Tensor] = entmax_of_shifted,
) -> tuple[Tensor, Tensor | None]:
    """(output, log-sum-exp or None) of an operator; shapes and meaning as in `attention`, the batch being query's.

    settings: the operator's hyperparameters as scalar tensors, in the order of OPERATORS. Differentiable.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    named = {
        name: setting.to(dtype=dtype, device=query.device)
        for name, setting in zip(OPERATORS[operator].defaults, settings, strict=True)
    }
    scores = attention_scores(query, key, mask, qk_scale)
    shifted = shift_by_row_max(scores) / named["temperature"]
    dense = softmax_of_shifted(shifted)
    lse = _log_sum_exp(scores) if with_lse else None
    sharpened = shifted / named["sparse_temperature"] if "sparse_temperature" in named else shifted
    sparse = sparse_map(sharpened, named["alpha"])
    if operator in ("gag", "anderson_least_squares"):
        # In float32: what is left of T_s - T_d in half precision is mostly rounding.
        heads_value = value.to(dtype)
        sparse_output = product_of_groups(sparse, heads_value)
        if operator == "gag":
            residual = product_of_groups(sparse - dense, heads_value)
            return geometry_aware(sparse_output, residual, named, unit).to(value.dtype), lse
        low, dense = (product_of_groups(m, heads_value) for m in (sparse_map(sharpened, named["alpha_low"]), dense))
        return nearest_of_three(sparse_output, low, dense, query, unit).to(value.dtype), lse
    # dense + scale (sparse - dense), not (1 - scale) dense + ...: dense is left untouched at scale 0.
    scale = named.get("scale")
    weights = sparse if scale is None else dense + scale * (sparse - dense)
    if operator == "anderson":
        weights = weights + named["scale_low"] * (sparse_map(sharpened, named["alpha_low"]) - dense)
    return product_of_groups(weights.to(value.dtype), value), lse


@without_autocast
def blocked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: list[Tensor],
    *,
    operator: OperatorName,
    unit: Unit,
    mask: Tensor | None,
    qk_scale: float,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `reference`, over one batch entry and as many heads and queries at a time as BLOCK_SCORES allows.

    Not of what is combined from whole outputs (kernels/combined.py).
    """
    output, lse = empty_outputs(query, value, with_lse)
    for batch, heads, rows, block_mask in blocks(query, key, mask, whole_heads=operator == "gag" and unit == "token"):
        piece, shared = (batch, heads, rows), (batch, key_heads_of(heads, query, key))
        output[piece], block_lse = reference(
            query[piece],
            key[shared],
            value[shared],
            settings,
            operator=operator,
            unit=unit,
            mask=block_mask,
            qk_scale=qk_scale,
            with_lse=with_lse,
        )
        if lse is not None and block_lse is not None:
            lse[piece] = block_lse
    return output, lse


def blocks(
    query: Tensor, key: Tensor, mask: Tensor | None, whole_heads: bool = False, size: int = BLOCK_SCORES
) -> Iterator[tuple[slice, slice, slice, Tensor | None]]:
    """Slices (batch, heads, queries) that cut the scores into pieces of about `size`, each with its part of the mask.

    Each slice keeps its dimension. whole_heads: never cut between heads. A piece has whole groups of heads that share
    keys, or a part of one.
    """
    batch, heads, queries, _ = query.shape
    keys = max(1, key.shape[2])
    if mask is not None:
        mask = mask.expand(batch, heads, queries, key.shape[2])
    heads_at_once = heads if whole_heads else max(1, min(heads, size // max(1, queries * keys)))
    group = heads // max(1, key.shape[1])
    if heads_at_once > group:
        heads_at_once -= heads_at_once % group
    elif group:
        heads_at_once = next(count for count in range(heads_at_once, 0, -1) if group % count == 0)
    rows_at_once = max(1, min(queries, size // (heads_at_once * keys)))
    for entry in range(batch):
        for head in range(0, heads, heads_at_once):
            for row in range(0, queries, rows_at_once):
                piece = (
                    slice(entry, entry + 1),
                    slice(head, head + heads_at_once),
                    slice(row, row + rows_at_once),
                )
                yield (*piece, None if mask is None else mask[piece])


def key_heads_of(heads: slice, query: Tensor, key: Tensor) -> slice:
    """The heads of `key` to which these of `query` attend, as `blocks` cuts them."""
    group = query.shape[1] // max(1, key.shape[1])
    return slice(heads.start // group, -(-min(heads.stop, query.shape[1]) // group))


def product_of_groups(rows: Tensor, shared: Tensor) -> Tensor:
    """rows @ shared, each head of `shared` being that of a group of heads in a row: nothing of `shared` is copied.

    rows: (batch, heads, n, m); shared: (batch, key_heads, m, k). Returns (batch, heads, n, k).
    """
    if rows.shape[1] == shared.shape[1]:
        return torch.matmul(rows, shared)
    # In one step each way: of two onnxscript makes none where the sizes allow it, and takes another group's heads.
    product = torch.matmul(rows.reshape(rows.shape[0], shared.shape[1], -1, rows.shape[-1]), shared)
    return product.reshape(*rows.shape[:-1], shared.shape[-1])


def empty_outputs(
    query: Tensor, value: Tensor, with_lse: bool, wanted: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Uninitialised (output, log-sum-exp or None); the output lies in memory as (batch, queries, heads, head_dim).

    That is how scaled_dot_product_attention lays out its own, and what the projection behind it reads without a copy.
    wanted: the output's dtype, value's unless given.
    """
    batch, heads, queries, _ = query.shape
    output = value.new_empty(batch, queries, heads, value.shape[-1], dtype=wanted or value.dtype).transpose(1, 2)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, query.new_empty(batch, heads, queries, dtype=dtype) if with_lse else None


def attention_scores(query: Tensor, key: Tensor, mask: Tensor | None = None, qk_scale: float | None = None) -> Tensor:
    """`query key^T qk_scale`, masked: (batch, heads, queries, keys) in float32 (float64 for float64).

    The product is taken in float32: half-precision scores are off by a percent of a weight, and SD 2.1's overflow.
    -inf is a masked key; a row with a score of inf, or that is no number, is no number, as in dense attention.
    key: (batch, key_heads, keys, head_dim), heads being a multiple of key_heads.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    factor = query.shape[-1] ** -0.5 if qk_scale is None else qk_scale
    scores = product_of_groups(query.to(dtype) * factor, key.to(dtype).transpose(-1, -2))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(dtype)
    return scores


def entmax_by_package(shifted: Tensor, alpha: Tensor) -> Tensor:
    """alpha-entmax by the entmax package, zeros for masked rows. Reads alpha's value, so it breaks graphs."""
    try:
        package = importlib.import_module("entmax")
    except ImportError as error:
        raise ImportError('implementation="entmax" needs the entmax package: pip install entmax') from error
    number = float(alpha)
    # The package's cumulative sums turn -inf into NaN. Below -1e4 every alpha > 1.0001 gives zero anyway.
    finite = shifted.clamp_min(-1.0e4)
    if number == 1.0:
        sparse = torch.softmax(finite, dim=-1)
    elif number == 1.5:
        sparse = package.entmax15(finite, dim=-1)
    elif number == 2.0:
        sparse = package.sparsemax(finite, dim=-1)
    else:
        sparse = package.entmax_bisect(finite, alpha=number, dim=-1)
    return sparse.masked_fill(shifted == float("-inf"), 0.0)


def empty_results(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: list[Tensor],
    operator: OperatorName,
    unit: Unit,
    qk_scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """What the fused operators return in shape, dtype and layout: all that a tracing compiler needs of them."""
    output, lse = empty_outputs(query, value, with_lse)
    return output, query.new_empty(0, dtype=torch.float32) if lse is None else lse


def no_gradient(context: object, *gradients: Tensor | None) -> NoReturn:
    """What the fused operators do when autograd wants their gradient: RuntimeError saying what has one."""
    raise RuntimeError(
        "the fused attention operators are for inference and have no gradient; surgery.nn.attention uses plain "
        "operations, which have one, where its inputs require gradients"
    )


def _log_sum_exp(scores):
    """log sum exp(scores) of each row: (batch, heads, queries); -inf for a row without keys."""
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], float("-inf"))
    return scores.logsumexp(dim=-1)


# -------------------- kernels/triton_tiles.py --------------------

# What both Triton kernels do with a tile of scores: maps in powers of two, the entmax threshold by Newton's method.
#
# A row of scores is x = log2(e) (scores / temperature - their largest), so x <= 0. Its dense weights are e = 2^x over
# their sum; its sparse ones p = max(x - tau, 0)^r over theirs, of an x that is over the sparse map's own temperature too.
# There r = 1 / (alpha - 1), and tau is such that the norm (sum p)^(1/r) is unit = r log2(e). In these units tau / unit is
# the usual threshold of (alpha - 1) scores (Peters et al. 2019, arXiv 1905.05702, eq. 10), and exp2 needs no product.
#
# The norm is convex in tau, so Newton's method rises to the root from tau = -unit, where the threshold cannot lie above
# it. Every step but the first adds what the inverse cubic through the last two norms and slopes says beyond Newton's
# step: no work for a score, and three steps then do what four did. Weights are over their own sum, so a threshold that is
# a little off loses no mass.
#
# KIND is the way that an alpha wants: 1.5 (15), 2 (20) and 1.25 (125), whose powers are products, or any other (99),
# whose power is exp2(r log2). A kernel holds all of them, reads alpha and takes the right one. Of KIND 99 the threshold
# is kept as lift = tau + unit and scores over unit, b = 1 + (x - lift) / unit: near alpha 1, where unit is huge, tau
# itself would have no digits left. EXACT is float32: its sums are of float32 weights, its logarithms to the last bit.
#
# These functions are Triton's, but not before it is imported (`triton_kernel.jitted_kernels`): an artifact imports
# neither Triton nor a compiler where it is loaded.

import types

# Stands for triton.language until that is imported; the functions need no more of it when they are defined.
tl = types.SimpleNamespace(constexpr="constexpr")
libdevice = None
INTERPRETED = False  # TRITON_INTERPRET=1, which has neither libdevice nor products of bfloat16

TILE_FUNCTIONS = []


def tile_function(function):
    """Mark a function as Triton's; it becomes so when Triton is first needed."""
    TILE_FUNCTIONS.append(function)
    return function


@tile_function
def fast_log2(x):
    """log2 of x >= 0 in one instruction, to 2^-22; of zero it is -inf. tl.log2 takes twenty."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@tile_function
def fast_reciprocal(x):
    """1 / x of x > 0, in two instructions; a division takes eight."""
    y = tl.rsqrt(x)
    return y * y


@tile_function
def dot_tiles(left, right, sum_so_far, TF32X3: tl.constexpr):
    """left @ right + sum_so_far in float32. TF32X3: of float32, by three products on the tensor cores."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    if TF32X3:
        return tl.dot(left, right, sum_so_far, input_precision="tf32x3")
    else:
        return tl.dot(left, right, sum_so_far, input_precision="ieee")


@tile_function
def sum_of_rows(tile, more, TWO: tl.constexpr):
    """Row sums over two column tiles: folded within a thread first, then across a warp once."""
    if TWO:
        folded = tl.reshape(tile, (tile.shape[0], tile.shape[1] // more.shape[1], more.shape[1]))
        return tl.sum(tl.sum(folded, 1) + more, 1)
    else:
        return tl.sum(tile, 1)


@tile_function
def max_of_rows(tile, more, TWO: tl.constexpr):
    """Row maxima over two column tiles."""
    if TWO:
        folded = tl.reshape(tile, (tile.shape[0], tile.shape[1] // more.shape[1], more.shape[1]))
        return tl.max(tl.maximum(tl.max(folded, 1), more), 1)
    else:
        return tl.max(tile, 1)


@tile_function
def sum_of_weights(tile, more, TWO: tl.constexpr, TENSOR: tl.constexpr):
    """Row sums of weights as they meet the values; TENSOR: by a product with ones, which costs the tensor cores little.

    Of weights that are rounded to half precision that is the sum of what is left of them.
    """
    if TENSOR:
        total = tl.zeros((tile.shape[0], 8), tl.float32)
        total = dot_tiles(tile, tl.full((tile.shape[1], 8), 1.0, tile.dtype), total, False)
        if TWO:
            total = dot_tiles(more, tl.full((more.shape[1], 8), 1.0, tile.dtype), total, False)
        return tl.max(total, 1)  # every column is the sum
    else:
        return sum_of_rows(tile, more, TWO)


@tile_function
def exponent_of(alpha, EXACT: tl.constexpr):
    """r = 1 / (alpha - 1), as far as the logarithms carry it: half precision sees no difference at 1000."""
    if EXACT:
        return 1.0 / tl.minimum(tl.maximum(alpha - 1.0, 1.1920929e-07), 0.999999)
    else:
        return 1.0 / tl.minimum(tl.maximum(alpha - 1.0, 1e-3), 0.99999)


@tile_function
def newton_steps_of(alpha, keys, HALF_BITS: tl.constexpr, LONG: tl.constexpr):
    """Steps after which a row's weights are right to the dtype, whatever the scores (tests/nn/test_triton_steps.py).

    HALF_BITS: 8 for bfloat16, 11 for float16, 24 for float32.
    """
    steps = 6
    if alpha <= 1.07:
        steps = 1
    elif alpha <= 1.2:
        steps = 2
    elif alpha <= 1.5:
        steps = 3
    elif alpha <= 1.75:
        steps = 4
    elif alpha <= 1.9:
        steps = 5
    if LONG:
        steps += 1
        if keys > 1024:
            steps += 1
    if HALF_BITS == 24:
        steps += 2
    elif HALF_BITS == 11:
        if alpha <= 1.07 or (alpha <= 1.5 and keys > 80):
            steps += 1
    return steps


@tile_function
def power_tiles(x, tau, r, unit, KIND: tl.constexpr, EXACT: tl.constexpr):
    """t^(r-1) and t^r of t = max(x - tau, 0); of KIND 99 b^(r-1) and b^r, which are both over their unit."""
    if KIND == 15:
        t = tl.maximum(x - tau[:, None], 0.0)
        return t, t * t
    elif KIND == 20:
        t = tl.maximum(x - tau[:, None], 0.0)
        return tl.where(t > 0.0, 1.0, 0.0), t
    elif KIND == 125:
        t = tl.maximum(x - tau[:, None], 0.0)
        square = t * t
        return square * t, square * square
    elif EXACT:
        d = (x - tau[:, None]) / unit
        b = tl.maximum(1.0 + d, 0.0)
        inside = tl.maximum(b, 1.1754944e-38)
        # log(1 + d): what rounding lost in 1 + d is put back to first order, or alpha near 1 would lose all.
        lost = tl.where(b > 0.0, d - (inside - 1.0), 0.0)
        g = tl.where(b > 0.0, tl.exp((r - 1.0) * (tl.log(inside) + lost * (2.0 - inside))), 0.0)
        return g, g * b
    else:
        over = 1.0 / unit
        b = tl.maximum(x * over + (1.0 - tau * over)[:, None], 0.0)
        g = tl.exp2((r - 1.0) * fast_log2(b))
        return g, g * b


@tile_function
def near_softmax(x, log_sum, alpha):
    """b^r up to a factor of the row, where alpha - 1 is at most 0.001, at alpha = 1 softmax. log_sum: log2 sum 2^x.

    r log(b) by its series in 1 / r, with the threshold that alpha = 1 would have, which is off by as little. At
    alpha = 1 it is 2^x to the last bit, so that GAG's residual is zero.
    """
    x = tl.maximum(x, -200.0)  # a masked score times zero would be no number
    y = x - log_sum[:, None]
    a = 0.6931471805599453 * (alpha - 1.0)
    return tl.exp2(x - a * y * y * (0.5 - a * y * (1.0 / 3.0)))


@tile_function
def power_sums(x0, x1, tau, r, unit, KIND: tl.constexpr, EXACT: tl.constexpr, TWO: tl.constexpr):
    """Row sums of both powers."""
    WIDTH: tl.constexpr = x0.shape[1] + (x1.shape[1] if TWO else 0)
    if not EXACT and (KIND == 15 or KIND == 20):
        # By max(x, tau), which saves the subtraction and costs some 1e-5; what is no key counts as tau.
        m0 = tl.maximum(x0, tau[:, None])
        m1 = tl.maximum(x1, tau[:, None])
        total = sum_of_rows(m0, m1, TWO)
        above = total - WIDTH * tau
        if KIND == 15:
            return above, sum_of_rows(m0 * m0, m1 * m1, TWO) - tau * (total + above)
        else:
            count0 = tl.where(x0 > tau[:, None], 1.0, 0.0)
            count1 = tl.where(x1 > tau[:, None], 1.0, 0.0)
            return sum_of_rows(count0, count1, TWO), above
    else:
        g0, p0 = power_tiles(x0, tau, r, unit, KIND, EXACT)
        g1, p1 = power_tiles(x1, tau, r, unit, KIND, EXACT)
        return sum_of_rows(g0, g1, TWO), sum_of_rows(p0, p1, TWO)


@tile_function
def expm1_of(y):
    """exp(y) - 1, with the digits that the difference would lose where it is small."""
    return tl.where(tl.abs(y) < 0.02, y * (1.0 + y * (0.5 + y * (1.0 / 6.0 + y / 24.0))), tl.exp(y) - 1.0)


@tile_function
def norm_of_sums(slope, total, r, unit, KIND: tl.constexpr):
    """The norm less what it shall be, and -d tau / d norm, from the row sums of t^(r-1) and t^r."""
    if KIND == 15:
        norm = total * tl.rsqrt(total)
        return norm - unit, norm * fast_reciprocal(slope)
    elif KIND == 20:
        return total - unit, fast_reciprocal(slope)
    elif KIND == 125:
        root = total * tl.rsqrt(total)
        norm = root * tl.rsqrt(root)
        return norm - unit, total * fast_reciprocal(norm * slope)
    else:
        above = expm1_of(tl.log(total) / r)
        return unit * above, total / ((1.0 + above) * slope)


@tile_function
def beyond_newton(norm, rate, tau, last_norm, last_rate, last_tau):
    """What the inverse cubic through two thresholds, their norms and rates adds to Newton's step norm * rate.

    At most as much again and never back: without these bounds it can run in circles near alpha 2.
    """
    over = fast_reciprocal(tl.maximum(last_norm - norm, 1e-4))
    secant = (tau - last_tau) * over
    more = norm * norm * over * (rate - secant - last_norm * over * (2.0 * secant - rate - last_rate))
    return tl.maximum(tl.minimum(more, norm * rate), 0.0)


@tile_function
def next_threshold(slope, total, tau, low, last_tau, last_norm, last_rate, step, highest, r, unit, KIND: tl.constexpr):
    """One step: (tau, low, norm, rate). low: the best end of Newton's own steps, each below the root as n is convex."""
    norm, rate = norm_of_sums(slope, total, r, unit, KIND)
    new = tau + norm * rate
    low = tl.maximum(low, new)
    more = beyond_newton(norm, rate, tau, last_norm, last_rate, last_tau)
    new = tl.maximum(new + tl.where(step > 0, more, 0.0), low)
    return tl.minimum(new, highest), low, norm, rate


@tile_function
def start_of(r, unit, keys, KIND: tl.constexpr):
    """(tau to start from, the highest it can be: where all scores are equal)."""
    highest = -unit * tl.exp2(-tl.log2(tl.cast(keys, tl.float32)) / r)
    if KIND == 99:
        return 0.0, -unit * expm1_of(-tl.log(tl.cast(keys, tl.float32)) / r)  # the same and unit more
    else:
        return -unit, highest


@tile_function
def add_mask(scores, at, inside, BOOLEAN: tl.constexpr):
    """Scores with what a mask, boolean or additive, adds; -inf where there is no key.

    at: where its elements are, of each score, or of each key for all rows.
    """
    if BOOLEAN:
        keep = tl.load(at, mask=inside, other=0) != 0
        if len(at.shape) == 1:
            keep = keep[None, :]
        return tl.where(keep, scores, float("-inf"))
    else:
        bias = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        if len(at.shape) == 1:
            bias = bias[None, :]
        return scores + bias


@tile_function
def load_tile(
    at, rows, columns, row_stride, column_stride, all_rows, all_columns, WHOLE_R: tl.constexpr, WHOLE_C: tl.constexpr
):
    """The tile at `rows` and `columns`; zero outside all_rows x all_columns."""
    at = at + rows[:, None] * row_stride + columns[None, :] * column_stride
    if WHOLE_R and WHOLE_C:
        return tl.load(at)
    elif WHOLE_R:
        return tl.load(at, mask=(columns < all_columns)[None, :], other=0.0)
    elif WHOLE_C:
        return tl.load(at, mask=(rows < all_rows)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(rows < all_rows)[:, None] & (columns < all_columns)[None, :], other=0.0)


@tile_function
def store_tile(
    at, tile, rows, columns, row_stride, all_rows, all_columns, WHOLE_R: tl.constexpr, WHOLE_C: tl.constexpr
):
    """Write a tile; channels lie side by side."""
    at = at + rows[:, None] * row_stride + columns[None, :]
    tile = tile.to(at.dtype.element_ty)
    if WHOLE_R and WHOLE_C:
        tl.store(at, tile)
    elif WHOLE_R:
        tl.store(at, tile, mask=(columns < all_columns)[None, :])
    elif WHOLE_C:
        tl.store(at, tile, mask=(rows < all_rows)[:, None])
    else:
        tl.store(at, tile, mask=(rows < all_rows)[:, None] & (columns < all_columns)[None, :])


@tile_function
def log_sum_exp(top, total, qk_scale, SCALED: tl.constexpr):
    """log sum exp of each row, from its largest score and the sum of exponentials below it; -inf without a key."""
    if not SCALED:
        top = top * qk_scale
    return tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))


@tile_function
def geometry_of_sums(along, length, square, scale, zeta, eta, of_parallel):
    """GAG's output is a T_s + b (T_s - T_d): (a, b) of each row (GAG, arXiv 2603.02531, eq. 11-13).

    along, length, square: <r, T_s>, |T_s|^2 and |r|^2, r = T_s - T_d. u = zeta r + (of_parallel - zeta) c T_s with
    c = <r, T_s> / |T_s|^2, and its two parts, of_parallel r_par and zeta r_orth, are orthogonal.
    """
    share = along / tl.where(length > 0.0, length, 1.0)
    parallel = tl.abs(of_parallel) * tl.sqrt(tl.maximum(share * along, 0.0))
    orthogonal = tl.abs(zeta) * tl.sqrt(tl.maximum(square - share * along, 0.0))
    longer = tl.maximum(parallel, orthogonal)
    ratio = tl.minimum(parallel, orthogonal) / tl.where(longer > 0.0, longer, 1.0)
    norm = longer * tl.sqrt(1.0 + ratio * ratio)
    gain = scale * tl.where(norm > eta, eta / tl.where(norm > eta, norm, 1.0), 1.0)
    return 1.0 + gain * share * (of_parallel - zeta), gain * zeta


@tile_function
def store_sums(sums, batch, rows, is_row, queries, along, length, square):
    """Write a head's part of what `sums_of_tokens` reads."""
    heads = tl.num_programs(1)
    plane = tl.num_programs(2).to(tl.int64) * heads * queries
    at = sums + (batch * heads + tl.program_id(1)) * queries + rows
    tl.store(at, along, mask=is_row)
    tl.store(at + plane, length, mask=is_row)
    tl.store(at + 2 * plane, square, mask=is_row)


@tile_function
def sums_of_tokens(sums, batch, rows, is_row, queries, ROWS: tl.constexpr):
    """<r, T_s>, |T_s|^2 and |r|^2 of whole tokens, from those of each head, (3, batch, heads, queries)."""
    heads = tl.num_programs(1)
    plane = tl.num_programs(2).to(tl.int64) * heads * queries
    along = tl.zeros((ROWS,), tl.float32)
    length = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for head in tl.range(0, heads):
        at = sums + (batch * heads + head) * queries + rows
        along += tl.load(at, mask=is_row, other=0.0)
        length += tl.load(at + plane, mask=is_row, other=0.0)
        square += tl.load(at + 2 * plane, mask=is_row, other=0.0)
    return along, length, square


# -------------------- kernels/triton_solver.py --------------------

# The entmax threshold of rows that are longer than one tile, for the long Triton kernel.
#
# No scores are kept: each pass computes them again from query and keys, tile by tile, so there may be any number of keys.



@tile_function
def scores_of_tile(held, sizes: tl.constexpr, start):
    """Scores of the W keys from `start` on, -inf where there is no key; without qk_scale unless SCALED."""
    q0, q1, key, key_n, mask, mask_n, mask_k, rows, left, keys, qk_scale = held
    D: tl.constexpr = sizes[0]
    D0: tl.constexpr = sizes[1]
    D1: tl.constexpr = sizes[2]
    W: tl.constexpr = sizes[3]
    WHOLE_M: tl.constexpr = sizes[4]
    MASKED: tl.constexpr = sizes[5]
    MASK_ROWS: tl.constexpr = sizes[6]
    SCALED: tl.constexpr = sizes[7]
    TF32X3: tl.constexpr = sizes[8]
    m = tl.arange(0, W)
    here = keys - start
    key += tl.cast(start, tl.int64) * key_n
    z = tl.zeros((q0.shape[0], W), tl.float32)
    z = dot_tiles(q0, load_tile(key, tl.arange(0, D0), m, 1, key_n, D, here, D0 <= D, WHOLE_M), z, TF32X3)
    if D1 > 0:
        k1 = load_tile(key, D0 + tl.arange(0, D1), m, 1, key_n, D, here, D0 + D1 <= D, WHOLE_M)
        z = dot_tiles(q1, k1, z, TF32X3)
    if SCALED:
        z = z * qk_scale
    if MASKED > 0:
        mask += tl.cast(start, tl.int64) * mask_k
        if MASK_ROWS:
            at = mask + rows[:, None] * mask_n + m[None, :] * mask_k
            return add_mask(z, at, (rows < left)[:, None] & (m < here)[None, :], MASKED == 1)
        else:
            return add_mask(z, mask + m * mask_k, m < here, MASKED == 1)
    elif WHOLE_M:
        return z
    else:
        return tl.where((m < here)[None, :], z, float("-inf"))


@tile_function
def shifted_tile(held, sizes: tl.constexpr, start, sharpness, shift):
    """x of the W keys from `start` on."""
    z = scores_of_tile(held, sizes, start)
    return tl.minimum(z * sharpness[:, None] - shift[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)


@tile_function
def weights_of_tile(x, tau, alpha, r, unit, EXACT: tl.constexpr):
    """t^(r-1) and t^r of a tile, by the way that alpha wants."""
    if alpha == 1.5:
        g, p = power_tiles(x, tau, r, unit, 15, EXACT)
    elif alpha == 2.0:
        g, p = power_tiles(x, tau, r, unit, 20, EXACT)
    elif alpha == 1.25:
        g, p = power_tiles(x, tau, r, unit, 125, EXACT)
    elif alpha < 1.001 and not EXACT:
        p = near_softmax(x, tau, alpha)
        g = p
    else:
        g, p = power_tiles(x, tau, r, unit, 99, EXACT)
    return g, p


@tile_function
def solve_long(
    held,
    sizes: tl.constexpr,
    sharpness,
    shift,
    alpha,
    r,
    unit,
    KIND: tl.constexpr,
    LINEAR: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """(tau, sum t^(r-1), sum t^r) of each row.

    LINEAR: the sums are those at tau, whose last step is left to the weights. That is worth a step of the threshold,
    but up to alpha 1.5 (bfloat16: below it).
    """
    EXACT: tl.constexpr = HALF_BITS == 24
    keys = held[9]
    steps = newton_steps_of(alpha, keys, HALF_BITS, True)
    if LINEAR:
        if alpha < 1.5 or (alpha == 1.5 and HALF_BITS > 8):
            steps += 1
    start, highest = start_of(r, unit, keys, KIND)
    tau = tl.zeros_like(shift) + start
    low = tau
    last_tau = tau
    norm = tau
    rate = tau
    slope = tau
    total = tau
    for step in tl.range(0, steps):
        slope = tl.zeros_like(shift)
        total = tl.zeros_like(shift)
        for at in tl.range(0, keys, sizes[3]):
            x = shifted_tile(held, sizes, at, sharpness, shift)
            g, p = power_tiles(x, tau, r, unit, KIND, EXACT)
            slope += tl.sum(g, 1)
            total += tl.sum(p, 1)
        slope = tl.maximum(slope, 1e-6)  # a row may have no key at all
        total = tl.maximum(total, 1e-6)
        if not LINEAR or step < steps - 1:
            new, low, norm, rate = next_threshold(
                slope, total, tau, low, last_tau, norm, rate, step, highest, r, unit, KIND
            )
            last_tau = tau
            tau = new
    return tau, slope, total


@tile_function
def sparse_long(
    held,
    sizes: tl.constexpr,
    sharpness,
    shift,
    sharp_sum,
    alpha,
    r,
    unit,
    LINEAR: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """(tau, factor of t^r, factor of t^(r-1)): the sparse weights, whose sum is one; the factors mean LINEAR alone.

    sharp_sum: sum 2^x.
    """
    EXACT: tl.constexpr = HALF_BITS == 24
    near_one = alpha < 1.001 and not EXACT
    goal = 1.0
    if alpha == 1.5:
        tau, slope, total = solve_long(
            held, sizes, sharpness, shift, 1.5, 2.0, 2.8853900817779268, 15, LINEAR, HALF_BITS
        )
        goal = 8.325475924022431
    elif alpha == 2.0:
        tau, slope, total = solve_long(
            held, sizes, sharpness, shift, 2.0, 1.0, 1.4426950408889634, 20, LINEAR, HALF_BITS
        )
        goal = 1.4426950408889634
    elif alpha == 1.25:
        tau, slope, total = solve_long(
            held, sizes, sharpness, shift, 1.25, 4.0, 5.7707801635558537, 125, LINEAR, HALF_BITS
        )
        goal = 1109.0167897836345
    elif near_one:
        tau = tl.log2(sharp_sum)
        slope = tl.zeros_like(shift)
        total = tl.zeros_like(shift) + 1.0
        for at in tl.range(0, held[9], sizes[3]):
            slope += tl.sum(near_softmax(shifted_tile(held, sizes, at, sharpness, shift), tau, alpha), 1)
    else:
        tau, slope, total = solve_long(held, sizes, sharpness, shift, alpha, r, unit, 99, LINEAR, HALF_BITS)
    slope = tl.maximum(slope, 1e-6)
    of_power = tl.zeros_like(shift) + 1.0 / goal
    if near_one:
        of_power = 1.0 / slope
    return tau, of_power, (goal - total) / (goal * slope)


@tile_function
def exponents_of(alpha, EXACT: tl.constexpr):
    """(r, unit); of the alphas whose powers are products to the last bit."""
    r = exponent_of(alpha, EXACT)
    r = tl.where(alpha == 1.5, 2.0, tl.where(alpha == 2.0, 1.0, tl.where(alpha == 1.25, 4.0, r)))
    return r, r * 1.4426950408889634


@tile_function
def pass_tile(z, top, dense_sum, lse_sum, over_temperature, to_log2, temperature, WITH_LSE: tl.constexpr):
    """A tile of scores in the first pass: (largest so far, the same or 0, x by it, both sums so far)."""
    new = tl.maximum(top, tl.max(z, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # a row without keys has no largest score
    below = z - safe[:, None]
    before = top - safe
    x = tl.minimum(below * over_temperature, 0.0, propagate_nan=tl.PropagateNan.ALL)
    dense_sum = dense_sum * tl.exp2(before * over_temperature) + tl.sum(tl.exp2(x), 1)
    if WITH_LSE:
        if temperature != 1.0:
            lse_sum = lse_sum * tl.exp2(before * to_log2) + tl.sum(tl.exp2(tl.minimum(below * to_log2, 0.0)), 1)
    return new, safe, x, dense_sum, lse_sum


@tile_function
def lse_of_rows(top, lse_sum, dense_sum, temperature, qk_scale, SCALED: tl.constexpr, WANTED: tl.constexpr):
    """log sum exp of the scores not over temperature; -inf where no key is left."""
    if WANTED:
        if temperature == 1.0:
            lse_sum = dense_sum
        return log_sum_exp(top, lse_sum, qk_scale, SCALED)
    else:
        return top


@tile_function
def share_of_rows(places, own_lse, held, WITH_LSE: tl.constexpr, JOINED: tl.constexpr):
    """Store the log-sum-exp; how much of a joint row is its own keys': sigmoid(own - the others'), 0 without any."""
    lse = places[5]
    dense_lse = places[6]
    rows = held[7]
    left = held[8]
    if WITH_LSE:
        tl.store(lse + rows, own_lse, mask=rows < left)
    if JOINED:
        other = tl.load(dense_lse + rows, mask=rows < left, other=0.0)
        return tl.where(own_lse == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp(other - own_lse)))
    else:
        return own_lse


@tile_function
def store_rows(
    places,
    out,
    channels,
    share,
    held,
    D: tl.constexpr,
    WHOLE_R: tl.constexpr,
    WHOLE_C: tl.constexpr,
    JOINED: tl.constexpr,
):
    """Write channels of the output, in joint attention mixed with the dense attention to the other keys."""
    value, value_n, output, output_n, dense, lse, dense_lse, dense_n = places
    rows = held[7]
    left = held[8]
    if JOINED:
        there = load_tile(dense, rows, channels, dense_n, 1, left, D, WHOLE_R, WHOLE_C).to(tl.float32)
        out = there + share[:, None] * (out - there)
    store_tile(output, out, rows, channels, output_n, left, D, WHOLE_R, WHOLE_C)


# -------------------- kernels/triton_held.py --------------------

# Rows whose scores the long Triton kernel keeps in registers: up to 320 keys, half precision, alpha 1.5, one product.
#
# What is kept is x (triton_tiles.py) as float16, two tiles to one of 32 bits. float16 holds x to 2^-11 of itself, so that
# what is near the row's largest, which is what the sparse map is made of, is nearly exact. The compiler would unpack all
# of them before the solver's loop and hold twice as many registers, so packing and unpacking are instructions that it may
# not move (inline assembly, NVIDIA's).



@tile_function
def pack_tiles(low, high, like: tl.constexpr):
    """Two float32 tiles as one of 32 bits, each rounded to float16 or, if `like` is that, bfloat16."""
    if INTERPRETED:
        low = low.to(like).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = high.to(like).to(tl.uint16, bitcast=True).to(tl.uint32)
        return ((high << 16) | low).to(tl.int32, bitcast=True)
    elif like == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )


@tile_function
def halves_of(packed, like: tl.constexpr):
    """Both tiles of a packed one, in the dtype that they were packed in, here and now."""
    if INTERPRETED:
        bits = packed.to(tl.uint32, bitcast=True)
        low = (bits & 0xFFFF).to(tl.uint16).to(like, bitcast=True)
        high = (bits >> 16).to(tl.uint16).to(like, bitcast=True)
        return low, high
    else:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(tl.int16, tl.int16), is_pure=False, pack=1
        )
        return low.to(like, bitcast=True), high.to(like, bitcast=True)


@tile_function
def unpack_x(packed):
    """Both tiles of x in float32, here and now."""
    if INTERPRETED:
        low, high = halves_of(packed, tl.float16)
        return low.to(tl.float32), high.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
            "=f,=f,r",
            [packed],
            dtype=(tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@tile_function
def depths_of(packed, tau_pair):
    """max(x - tau, 0) of both tiles in float32, subtracted as float16. tau_pair: tau twice, packed."""
    if INTERPRETED:
        low, high = halves_of(packed, tl.float16)
        tau, _ = halves_of(tau_pair, tl.float16)
        return tl.maximum(low - tau, 0.0).to(tl.float32), tl.maximum(high - tau, 0.0).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; .reg .b16 l, h; sub.rn.f16x2 t, $2, $3; max.f16x2 t, t, $4;"
            " mov.b32 {l, h}, t; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
            "=f,=f,r,r,r",
            [packed, tau_pair, tau_pair ^ tau_pair],
            dtype=(tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@tile_function
def sums_of_held(xs, tau, PAIRS: tl.constexpr):
    """Row sums of t and of t^2 over all keys, added within a thread first."""
    tau_pair = pack_tiles(tau, tau, tl.float16)[:, None]
    slope = tl.zeros(xs[0].shape, tl.float32)
    total = tl.zeros(xs[0].shape, tl.float32)
    for i in tl.static_range(PAIRS):
        low, high = depths_of(xs[i], tau_pair)
        slope += low + high
        total += low * low + high * high
    return tl.sum(slope, 1), tl.sum(total, 1)


@tile_function
def solve_held(xs, like_row, keys, PAIRS: tl.constexpr, HALF_BITS: tl.constexpr):
    """(tau, sum t, sum t^2) of each row at alpha 1.5, the sums at tau: the last step is left to the weights."""
    unit = 2.8853900817779268
    steps = newton_steps_of(1.5, keys, HALF_BITS, True)
    if keys > 256 or HALF_BITS == 11:  # the last one, in the weights, is worth one of the threshold up to here
        steps += 1
    start, highest = start_of(2.0, unit, keys, 15)
    # tau is kept as the float16 at which the sums are taken.
    tau = (tl.zeros_like(like_row) + start).to(tl.float16).to(tl.float32)
    low = tau
    last_tau = tau
    norm = tau
    rate = tau
    slope = tau
    total = tau
    for step in tl.range(0, steps):
        slope, total = sums_of_held(xs, tau, PAIRS)
        slope = tl.maximum(slope, 1e-6)  # a row may have no key at all
        total = tl.maximum(total, 1e-6)
        if step < steps - 1:
            new, low, norm, rate = next_threshold(
                slope, total, tau, low, last_tau, norm, rate, step, highest, 2.0, unit, 15
            )
            last_tau = tau
            tau = new.to(tl.float16).to(tl.float32)
    return tau, slope, total


@tile_function
def mix_held(xs, scale, dense_sum, tau, slope, total, like: tl.constexpr, PAIRS: tl.constexpr):
    """(1 - scale) dense + scale sparse weights in place of the x that are kept, packed likewise in the dtype `like`."""
    goal = 8.325475924022431
    of_power = scale / goal
    of_slope = (of_power * (goal - total) / slope)[:, None]
    off = tl.log2(dense_sum)[:, None]
    of_dense = 1.0 - scale
    ws = ()
    for i in tl.static_range(PAIRS):
        low, high = unpack_x(xs[i])
        t0 = tl.maximum(low - tau[:, None], 0.0)
        t1 = tl.maximum(high - tau[:, None], 0.0)
        low = tl.exp2(low - off) * of_dense + t0 * (t0 * of_power + of_slope)
        high = tl.exp2(high - off) * of_dense + t1 * (t1 * of_power + of_slope)
        ws = ws + (pack_tiles(low, high, like),)
    return ws


@tile_function
def first_pass_held(
    held, sizes: tl.constexpr, over_temperature, to_log2, temperature, PAIRS: tl.constexpr, WITH_LSE: tl.constexpr
):
    """(x of all keys, largest score, sum of exponentials over temperature, and not) of each row."""
    W: tl.constexpr = sizes[3]
    ROWS: tl.constexpr = held[0].shape[0]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    dense_sum = tl.zeros((ROWS,), tl.float32)
    lse_sum = tl.zeros((ROWS,), tl.float32)
    # A loop that is one, and what it finds put where it belongs by selection: unrolled, the compiler would compute all
    # products first, and could not keep them.
    nothing = tl.full((ROWS, W), float("-inf"), tl.float32)
    nothing = pack_tiles(nothing, nothing, tl.float16)
    xs = ()
    tops = ()
    for _ in tl.static_range(PAIRS):
        xs = xs + (nothing,)
        tops = tops + (top,)
    for pair in tl.range(0, PAIRS):
        at = 2 * pair * W
        z = scores_of_tile(held, sizes, at)
        top, before, x0, dense_sum, lse_sum = pass_tile(
            z, top, dense_sum, lse_sum, over_temperature, to_log2, temperature, WITH_LSE
        )
        z = scores_of_tile(held, sizes, at + W)
        top, safe, x1, dense_sum, lse_sum = pass_tile(
            z, top, dense_sum, lse_sum, over_temperature, to_log2, temperature, WITH_LSE
        )
        packed = pack_tiles(x0 + ((before - safe) * over_temperature)[:, None], x1, tl.float16)
        new_xs = ()
        new_tops = ()
        for i in tl.static_range(PAIRS):
            new_xs = new_xs + (tl.where(pair == i, packed, xs[i]),)
            new_tops = new_tops + (tl.where(pair == i, safe, tops[i]),)
        xs = new_xs
        tops = new_tops
    top = tl.where(top == float("-inf"), 0.0, top)
    moved = ()  # x less the row's largest of all keys
    for i in tl.static_range(PAIRS):
        x0, x1 = unpack_x(xs[i])
        back = ((tops[i] - top) * over_temperature)[:, None]
        moved = moved + (pack_tiles(x0 + back, x1 + back, tl.float16),)
    return moved, top, dense_sum, lse_sum


@tile_function
def held_rows(
    held,
    sizes: tl.constexpr,
    places,
    numbers,
    like: tl.constexpr,
    WHOLE: tl.constexpr,
    PAIRS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOINED: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """A block of rows from scores to output. places, numbers: as the long kernel has them."""
    D: tl.constexpr = sizes[0]
    D0: tl.constexpr = sizes[1]
    D1: tl.constexpr = sizes[2]
    SCALED: tl.constexpr = sizes[7]
    HALF: tl.constexpr = 64 if D0 > 64 else D0
    to_log2, temperature, qk_scale, scale = numbers
    keys = held[9]
    xs, top, dense_sum, lse_sum = first_pass_held(
        held, sizes, to_log2 / temperature, to_log2, temperature, PAIRS, WITH_LSE or JOINED
    )
    own_lse = lse_of_rows(top, lse_sum, dense_sum, temperature, qk_scale, SCALED, WITH_LSE or JOINED)
    dense_sum = tl.where(dense_sum == 0.0, 1.0, dense_sum)  # zeros where a row has no key
    tau, slope, total = solve_held(xs, dense_sum, keys, PAIRS, HALF_BITS)
    ws = mix_held(xs, scale, dense_sum, tau, slope, total, like, PAIRS)
    share = share_of_rows(places, own_lse, held, WITH_LSE, JOINED)
    # So many channels at a time as there are registers for, in a loop that is one: unrolled, the compiler would keep
    # all addresses and weights of the first half for the second.
    for at in tl.range(0, D0, HALF, num_stages=1):
        write_held(ws, at, HALF, D0 <= D, held, sizes, places, share, like, WHOLE, PAIRS, JOINED)
    if D1 > 0:
        write_held(ws, D0, D1, D0 + D1 <= D, held, sizes, places, share, like, WHOLE, PAIRS, JOINED)


@tile_function
def write_held(
    ws,
    channel,
    COUNT: tl.constexpr,
    WHOLE_C: tl.constexpr,
    held,
    sizes: tl.constexpr,
    places,
    share,
    like: tl.constexpr,
    WHOLE: tl.constexpr,
    PAIRS: tl.constexpr,
    JOINED: tl.constexpr,
):
    """The output's COUNT channels from `channel` on."""
    D: tl.constexpr = sizes[0]
    W: tl.constexpr = sizes[3]
    WHOLE_M: tl.constexpr = sizes[4]
    keys = held[9]
    value = places[0]
    value_n = places[1]
    d = channel + tl.arange(0, COUNT)
    m = tl.arange(0, W)
    out = tl.zeros((held[0].shape[0], COUNT), tl.float32)
    for pair in tl.range(0, PAIRS):
        chosen = ws[0]
        for i in tl.static_range(1, PAIRS):
            chosen = tl.where(pair == i, ws[i], chosen)
        low, high = halves_of(chosen, like)
        at = 2 * pair * W
        place = value + tl.cast(at, tl.int64) * value_n
        v = load_tile(place, m, d, value_n, 1, keys - at, D, WHOLE_M, WHOLE_C)
        out = dot_tiles(low, v, out, False)
        place += W * value_n
        v = load_tile(place, m, d, value_n, 1, keys - at - W, D, WHOLE_M, WHOLE_C)
        out = dot_tiles(high, v, out, False)
    store_rows(places, out, d, share, held, D, WHOLE, WHOLE_C, JOINED)


# -------------------- kernels/triton_long.py --------------------

# The Triton kernel for texts of any length, over tiles of their keys.
#
# It goes over the keys once for the largest score and the sum of exponentials, once for each step of the solver and once
# for the output. Up to 320 keys in half precision the scores of the first pass are kept (PAIRS); else it keeps none, as
# flash attention, and computes them again on the tensor cores. Where the output is one product (all operators but GAG)
# the sparse weights are t^r plus a share of t^(r-1) that makes their sum one, by the sums of the last step: a Newton step
# in the weights, so no pass is spent on their sum.
#
# In joint attention (JOINED) the kernel also takes the dense attention of the same rows to the other keys, and mixes it
# with its own by their log-sum-exps while its output is still in registers.


MOST_HELD_KEYS = 320


@tile_function
def product_long(w, value, value_n, at, keys, out0, out1, sizes: tl.constexpr):
    """Weights of the W keys from `at` on, times their values, added to both tiles of the output."""
    D: tl.constexpr = sizes[0]
    D0: tl.constexpr = sizes[1]
    D1: tl.constexpr = sizes[2]
    W: tl.constexpr = sizes[3]
    WHOLE_M: tl.constexpr = sizes[4]
    TF32X3: tl.constexpr = sizes[8]
    m = tl.arange(0, W)
    value += tl.cast(at, tl.int64) * value_n
    v0 = load_tile(value, m, tl.arange(0, D0), value_n, 1, keys - at, D, WHOLE_M, D0 <= D)
    out0 = dot_tiles(w, v0, out0, TF32X3)
    if D1 > 0:
        v1 = load_tile(value, m, D0 + tl.arange(0, D1), value_n, 1, keys - at, D, WHOLE_M, D0 + D1 <= D)
        out1 = dot_tiles(w, v1, out1, TF32X3)
    return out0, out1


@tile_function
def gag_of_tile(
    x,
    back,
    maps,
    value,
    value_n,
    at,
    keys,
    out0,
    out1,
    residual0,
    residual1,
    sparse_sum,
    like,
    sizes: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Both maps of a tile times its values, not normed, and the sparse map's sum so far. back: as in `stream_rows`."""
    tau, alpha, r, unit = maps
    g, p = weights_of_tile(x, tau, alpha, r, unit, EXACT)
    sparse_sum += tl.sum(p, 1)
    out0, out1 = product_long(p.to(like), value, value_n, at, keys, out0, out1, sizes)
    e = tl.exp2(x * back[:, None]).to(like)
    residual0, residual1 = product_long(e, value, value_n, at, keys, residual0, residual1, sizes)
    return out0, out1, residual0, residual1, sparse_sum


@tile_function
def mix_of_tile(
    x,
    back,
    of_dense,
    maps,
    low_maps,
    value,
    value_n,
    at,
    keys,
    out0,
    out1,
    like,
    sizes: tl.constexpr,
    EXACT: tl.constexpr,
    ANDERSON: tl.constexpr,
):
    """One product of a tile's mixed maps with its values, added to the output. back: as in `stream_rows`."""
    tau, alpha, r, unit, of_power, of_slope = maps
    g, p = weights_of_tile(x, tau, alpha, r, unit, EXACT)
    w = tl.exp2(x * back[:, None]) * of_dense[:, None] + p * of_power[:, None] + g * of_slope[:, None]
    if ANDERSON:
        tau, alpha, r, unit, of_power, of_slope = low_maps
        g, p = weights_of_tile(x, tau, alpha, r, unit, EXACT)
        w = w + p * of_power[:, None] + g * of_slope[:, None]
    return product_long(w.to(like), value, value_n, at, keys, out0, out1, sizes)


@tile_function
def stream_rows(
    held,
    sizes: tl.constexpr,
    places,
    numbers,
    rest,
    like: tl.constexpr,
    OPERATOR: tl.constexpr,
    WHOLE: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOINED: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """A block of rows from scores to output, keeping no scores."""
    D: tl.constexpr = sizes[0]
    D0: tl.constexpr = sizes[1]
    D1: tl.constexpr = sizes[2]
    W: tl.constexpr = sizes[3]
    SCALED: tl.constexpr = sizes[7]
    MORE: tl.constexpr = D1 > 0
    GAG: tl.constexpr = OPERATOR >= 3
    EXACT: tl.constexpr = HALF_BITS == 24
    ROWS: tl.constexpr = held[0].shape[0]
    to_log2, temperature, qk_scale, scale = numbers
    alpha, sparse_temperature, sums, first_at, second_at, parallel_at, batch, first, queries = rest
    value = places[0]
    value_n = places[1]
    rows = held[7]
    left = held[8]
    keys = held[9]
    over_temperature = to_log2 / temperature
    r, unit = exponents_of(alpha, EXACT)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    dense_sum = tl.zeros((ROWS,), tl.float32)
    lse_sum = tl.zeros((ROWS,), tl.float32)
    for at in tl.range(0, keys, W):
        z = scores_of_tile(held, sizes, at)
        top, safe, x, dense_sum, lse_sum = pass_tile(
            z, top, dense_sum, lse_sum, over_temperature, to_log2, temperature, WITH_LSE or JOINED
        )
    top = tl.where(top == float("-inf"), 0.0, top)
    own_lse = lse_of_rows(top, lse_sum, dense_sum, temperature, qk_scale, SCALED, WITH_LSE or JOINED)
    dense_sum = tl.where(dense_sum == 0.0, 1.0, dense_sum)  # zeros where a row has no key
    out0 = tl.zeros((ROWS, D0), tl.float32)
    out1 = tl.zeros((ROWS, D1 if MORE else D0), tl.float32)
    # Where scores over temperature are huge their differences are below rounding: the product must not overflow.
    most = 1048576.0 / tl.maximum(tl.abs(top), 1e-30)
    # x is of the sparse map's own temperature from here on; times `back` it is that of the dense one.
    sharpness = tl.minimum(over_temperature / sparse_temperature, most)
    back = tl.minimum(over_temperature, most) / sharpness
    shift = top * sharpness

    sharp_sum = dense_sum
    if sparse_temperature != 1.0:
        sharp_sum = tl.zeros_like(dense_sum)
        for at in tl.range(0, keys, W):
            sharp_sum += tl.sum(tl.exp2(shifted_tile(held, sizes, at, sharpness, shift)), 1)
        sharp_sum = tl.where(sharp_sum == 0.0, 1.0, sharp_sum)
    if OPERATOR > 0 or scale != 0.0:
        tau, of_power, of_slope = sparse_long(
            held, sizes, sharpness, shift, sharp_sum, alpha, r, unit, not GAG, HALF_BITS
        )
    else:  # dense attention alone: nothing to solve
        tau = tl.zeros_like(shift)
        of_power = tl.zeros_like(shift)
        of_slope = tl.zeros_like(shift)
    if GAG:
        residual0 = out0
        residual1 = out1
        sparse_sum = tl.zeros((ROWS,), tl.float32)
        maps = (tau, alpha, r, unit)
        for at in tl.range(0, keys, W):
            x = shifted_tile(held, sizes, at, sharpness, shift)
            out0, out1, residual0, residual1, sparse_sum = gag_of_tile(
                x,
                back,
                maps,
                value,
                value_n,
                at,
                keys,
                out0,
                out1,
                residual0,
                residual1,
                sparse_sum,
                like,
                sizes,
                EXACT,
            )
        sparse_sum = tl.where(sparse_sum == 0.0, 1.0, sparse_sum)
        over_sparse = fast_reciprocal(sparse_sum)[:, None]
        over_dense = fast_reciprocal(dense_sum)[:, None]
        out0 = out0 * over_sparse  # T_s
        residual0 = out0 - residual0 * over_dense  # T_s - T_d
        along = tl.sum(out0 * residual0, 1)
        length = tl.sum(out0 * out0, 1)
        square = tl.sum(residual0 * residual0, 1)
        if MORE:
            out1 = out1 * over_sparse
            residual1 = out1 - residual1 * over_dense
            along += tl.sum(out1 * residual1, 1)
            length += tl.sum(out1 * out1, 1)
            square += tl.sum(residual1 * residual1, 1)
        if OPERATOR == 4:
            store_sums(sums, batch, first + rows, rows < left, queries, along, length, square)
        else:
            if OPERATOR == 5:  # over whole tokens: all heads' sums, found before
                along, length, square = sums_of_tokens(sums, batch, first + rows, rows < left, queries, ROWS)
            of_sparse, of_residual = geometry_of_sums(
                along, length, square, scale, tl.load(first_at), tl.load(second_at), tl.load(parallel_at)
            )
            out0 = out0 * of_sparse[:, None] + residual0 * of_residual[:, None]
            if MORE:
                out1 = out1 * of_sparse[:, None] + residual1 * of_residual[:, None]
    else:
        of_dense = 1.0 - scale
        maps = (tau, alpha, r, unit, of_power * scale, of_slope * scale)
        low_maps = maps
        if OPERATOR == 2:  # anderson
            alpha_low = tl.load(first_at)
            r_low, unit_low = exponents_of(alpha_low, EXACT)
            tau_low, power_low, slope_low = sparse_long(
                held, sizes, sharpness, shift, sharp_sum, alpha_low, r_low, unit_low, True, HALF_BITS
            )
            scale_low = tl.load(second_at)
            of_dense = of_dense - scale_low
            low_maps = (tau_low, alpha_low, r_low, unit_low, power_low * scale_low, slope_low * scale_low)
        of_dense = of_dense / dense_sum
        for at in tl.range(0, keys, W):
            x = shifted_tile(held, sizes, at, sharpness, shift)
            out0, out1 = mix_of_tile(
                x,
                back,
                of_dense,
                maps,
                low_maps,
                value,
                value_n,
                at,
                keys,
                out0,
                out1,
                like,
                sizes,
                EXACT,
                OPERATOR == 2,
            )
    if OPERATOR != 4:
        share = share_of_rows(places, own_lse, held, WITH_LSE, JOINED)
        store_rows(places, out0, tl.arange(0, D0), share, held, D, WHOLE, D0 <= D, JOINED)
        if MORE:
            store_rows(places, out1, D0 + tl.arange(0, D1), share, held, D, WHOLE, D0 + D1 <= D, JOINED)


@tile_function
def long_kernel(
    query,
    key,
    value,
    mask,
    output,
    lse,
    sums,
    dense,
    dense_lse,
    alpha_at,
    scale_at,
    temperature_at,
    first_at,
    second_at,
    sparse_temperature_at,
    parallel_at,
    query_b,
    query_h,
    query_n,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    output_b,
    output_h,
    output_n,
    dense_b,
    dense_h,
    dense_n,
    mask_b,
    mask_h,
    mask_n,
    mask_k,
    queries,
    keys,
    qk_scale,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    OPERATOR: tl.constexpr,
    MASKED: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOINED: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_M: tl.constexpr,
    TF32X3: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    MORE: tl.constexpr = D1 > 0
    C0: tl.constexpr = D0 <= D
    C1: tl.constexpr = D0 + D1 <= D
    like: tl.constexpr = query.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    key_head = head // GROUP  # heads in a row share one of keys
    start = tl.program_id(0) * ROWS
    first = start.to(tl.int64)
    rows = tl.arange(0, ROWS)
    left = queries - start
    # Strides count UNITs of elements, so that the compiler sees that addresses allow wide loads.
    query_n = query_n * UNIT
    key_n = key_n * UNIT
    value_n = value_n * UNIT
    output_n = output_n * UNIT
    query += batch * (query_b * UNIT) + head * (query_h * UNIT) + first * query_n
    key += batch * (key_b * UNIT) + key_head * (key_h * UNIT)
    value += batch * (value_b * UNIT) + key_head * (value_h * UNIT)
    output += batch * (output_b * UNIT) + head * (output_h * UNIT) + first * output_n
    dense_n = dense_n * UNIT
    dense += batch * (dense_b * UNIT) + head * (dense_h * UNIT) + first * dense_n
    lse += (batch * tl.num_programs(1) + head) * queries + first  # of (batch, heads, queries)
    dense_lse += (batch * tl.num_programs(1) + head) * queries + first
    if MASKED > 0:
        mask += batch * mask_b + head * mask_h + first * mask_n
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1 if MORE else D0)
    q0 = load_tile(query, rows, d0, query_n, 1, left, D, WHOLE, C0)
    q1 = q0
    if MORE:
        q1 = load_tile(query, rows, d1, query_n, 1, left, D, WHOLE, C1)
    qk_scale = tl.cast(qk_scale, tl.float32)  # inductor hands a Python float over as float64
    held = (q0, q1, key, key_n, mask, mask_n, mask_k, rows, left, keys, qk_scale)
    sizes: tl.constexpr = (D, D0, D1, W, WHOLE_M, MASKED, MASK_ROWS, SCALED, TF32X3)
    alpha = tl.load(alpha_at)
    temperature = tl.load(temperature_at)
    to_log2 = 1.4426950408889634
    if not SCALED:  # scores are scaled where they are shifted, by the same product
        to_log2 = to_log2 * qk_scale
    scale = 1.0
    sparse_temperature = 1.0
    if OPERATOR != 1:
        scale = tl.load(scale_at)
        sparse_temperature = tl.load(sparse_temperature_at)
    places = (value, value_n, output, output_n, dense, lse, dense_lse, dense_n)
    numbers = (to_log2, temperature, qk_scale, scale)
    rest = (alpha, sparse_temperature, sums, first_at, second_at, parallel_at, batch, first, queries)
    if PAIRS > 0:
        if alpha == 1.5 and sparse_temperature == 1.0:
            half: tl.constexpr = (D, D0, D1, 32, WHOLE_M, MASKED, MASK_ROWS, SCALED, False)
            held_rows(held, half, places, numbers, like, WHOLE, PAIRS, WITH_LSE, JOINED, HALF_BITS)
        else:
            stream_rows(held, sizes, places, numbers, rest, like, OPERATOR, WHOLE, WITH_LSE, JOINED, HALF_BITS)
    else:
        stream_rows(held, sizes, places, numbers, rest, like, OPERATOR, WHOLE, WITH_LSE, JOINED, HALF_BITS)


# -------------------- kernels/triton_short.py --------------------

# The Triton kernel for short texts, up to 128 keys: scores stay in registers, queries are read from memory once.
#
# A program takes one block of queries of one head, 16 rows to a warp, so that a row never leaves its warp and no step of
# the solver waits for shared memory. Keys and channels are two tiles each where that saves
# padding (77 keys as 64 + 16). Neither map is normed before its product with the values: outputs are scaled instead.


MOST_SHORT_KEYS = 128


@tile_function
def solve_short(x0, x1, alpha, keys, KIND: tl.constexpr, TWO: tl.constexpr, HALF_BITS: tl.constexpr):
    """tau of each row, for KIND 99 less -unit (triton_tiles.py)."""
    EXACT: tl.constexpr = HALF_BITS == 24
    WIDE: tl.constexpr = x0.shape[1] > 64  # more than 80 keys
    if KIND == 15:
        r = 2.0
        steps = 5 if EXACT else 4 if WIDE else 3
    elif KIND == 20:
        r = 1.0
        steps = 8 if EXACT else 6 if WIDE or HALF_BITS == 11 else 5
    elif KIND == 125:
        r = 4.0
        steps = 5 if EXACT else 3
    else:
        r = exponent_of(alpha, EXACT)
        steps = newton_steps_of(alpha, keys, HALF_BITS, False)
    unit = r * 1.4426950408889634
    start, highest = start_of(r, unit, keys, KIND)
    tau = tl.zeros((x0.shape[0],), tl.float32) + start
    low = tau
    last_tau = tau
    norm = tau
    rate = tau
    for step in tl.range(0, steps):
        slope, total = power_sums(x0, x1, tau, r, unit, KIND, EXACT, TWO)
        slope = tl.maximum(slope, 1e-6)  # a row may have no key at all
        total = tl.maximum(total, 1e-6)
        new, low, norm, rate = next_threshold(
            slope, total, tau, low, last_tau, norm, rate, step, highest, r, unit, KIND
        )
        last_tau = tau
        tau = new
    return tau


@tile_function
def weigh_short(x0, x1, tau, alpha, like, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Both tiles of the sparse weights, not normed, in the dtype of `like`."""
    r = exponent_of(alpha, EXACT)  # which KIND 99 alone reads
    unit = r * 1.4426950408889634
    g0, p0 = power_tiles(x0, tau, r, unit, KIND, EXACT)
    g1, p1 = power_tiles(x1, tau, r, unit, KIND, EXACT)
    return p0.to(like), p1.to(like)


@tile_function
def sparse_short(x0, x1, alpha, keys, like, TWO: tl.constexpr, HALF_BITS: tl.constexpr):
    """Both tiles of the sparse weights, not normed, by the way that alpha wants."""
    EXACT: tl.constexpr = HALF_BITS == 24
    if alpha == 1.5:
        tau = solve_short(x0, x1, alpha, keys, 15, TWO, HALF_BITS)
        p0, p1 = weigh_short(x0, x1, tau, alpha, like, 15, EXACT)
    elif alpha == 2.0:
        tau = solve_short(x0, x1, alpha, keys, 20, TWO, HALF_BITS)
        p0, p1 = weigh_short(x0, x1, tau, alpha, like, 20, EXACT)
    elif alpha == 1.25:
        tau = solve_short(x0, x1, alpha, keys, 125, TWO, HALF_BITS)
        p0, p1 = weigh_short(x0, x1, tau, alpha, like, 125, EXACT)
    elif alpha < 1.001 and not EXACT:
        log_sum = tl.log2(tl.maximum(sum_of_rows(tl.exp2(x0), tl.exp2(x1), TWO), 1.0))
        p0 = near_softmax(x0, log_sum, alpha).to(like)
        p1 = near_softmax(x1, log_sum, alpha).to(like)
    else:
        tau = solve_short(x0, x1, alpha, keys, 99, TWO, HALF_BITS)
        p0, p1 = weigh_short(x0, x1, tau, alpha, like, 99, EXACT)
    return p0, p1


@tile_function
def product_short(w0, w1, v0, v1, sum_so_far, TWO: tl.constexpr, TF32X3: tl.constexpr):
    """weights @ values + sum_so_far over both tiles of keys."""
    sum_so_far = dot_tiles(w0, v0, sum_so_far, TF32X3)
    if TWO:
        sum_so_far = dot_tiles(w1, v1, sum_so_far, TF32X3)
    return sum_so_far


@tile_function
def short_kernel(
    query,
    key,
    value,
    mask,
    output,
    lse,
    sums,
    alpha_at,
    scale_at,
    temperature_at,
    first_at,
    second_at,
    sparse_temperature_at,
    parallel_at,
    query_b,
    query_h,
    query_n,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    output_b,
    output_h,
    output_n,
    mask_b,
    mask_h,
    mask_n,
    mask_k,
    queries,
    keys,
    qk_scale,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    OPERATOR: tl.constexpr,
    MASKED: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    M0: tl.constexpr,
    M1: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    TF32X3: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    TWO: tl.constexpr = M1 > 0
    MORE: tl.constexpr = D1 > 0
    C0: tl.constexpr = D0 <= D
    C1: tl.constexpr = D0 + D1 <= D
    EXACT: tl.constexpr = HALF_BITS == 24
    like: tl.constexpr = query.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    key_head = head // GROUP  # heads in a row share one of keys
    # Strides count UNITs of elements, so that the compiler sees that addresses allow wide loads.
    query_n = query_n * UNIT
    key_n = key_n * UNIT
    value_n = value_n * UNIT
    output_n = output_n * UNIT
    query += batch * (query_b * UNIT) + head * (query_h * UNIT)
    key += batch * (key_b * UNIT) + key_head * (key_h * UNIT)
    value += batch * (value_b * UNIT) + key_head * (value_h * UNIT)
    output += batch * (output_b * UNIT) + head * (output_h * UNIT)
    m0 = tl.arange(0, M0)
    m1 = M0 + tl.arange(0, M1 if TWO else M0)
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1 if MORE else D0)
    # k10: the second tile of channels with the first of keys
    k00 = load_tile(key, d0, m0, 1, key_n, D, keys, C0, TWO)
    v00 = load_tile(value, m0, d0, value_n, 1, keys, D, TWO, C0)
    k01 = k00
    k10 = k00
    k11 = k00
    v01 = v00
    v10 = v00
    v11 = v00
    if MORE:
        k10 = load_tile(key, d1, m0, 1, key_n, D, keys, C1, TWO)
        v01 = load_tile(value, m0, d1, value_n, 1, keys, D, TWO, C1)
    if TWO:
        k01 = load_tile(key, d0, m1, 1, key_n, D, keys, C0, False)
        v10 = load_tile(value, m1, d0, value_n, 1, keys, D, False, C0)
        if MORE:
            k11 = load_tile(key, d1, m1, 1, key_n, D, keys, C1, False)
            v11 = load_tile(value, m1, d1, value_n, 1, keys, D, False, C1)
    if MASKED > 0:
        mask += batch * mask_b + head * mask_h
    alpha = tl.load(alpha_at)
    temperature = tl.load(temperature_at)
    qk_scale = tl.cast(qk_scale, tl.float32)  # inductor hands a Python float over as float64
    over_temperature = 1.4426950408889634 / temperature
    if not SCALED:  # scores are scaled where they are shifted, by the same product
        over_temperature = over_temperature * qk_scale
    rows = tl.arange(0, ROWS)

    start = tl.program_id(0) * ROWS
    first = start.to(tl.int64)
    left = queries - start
    query_at = query + first * query_n
    output_at = output + first * output_n
    z0 = tl.zeros((ROWS, M0), tl.float32)
    q0 = load_tile(query_at, rows, d0, query_n, 1, left, D, WHOLE, C0)
    z0 = dot_tiles(q0, k00, z0, TF32X3)
    z1 = z0
    if TWO:
        z1 = dot_tiles(q0, k01, tl.zeros((ROWS, M1 if TWO else M0), tl.float32), TF32X3)
    if MORE:
        q1 = load_tile(query_at, rows, d1, query_n, 1, left, D, WHOLE, C1)
        z0 = dot_tiles(q1, k10, z0, TF32X3)
        if TWO:
            z1 = dot_tiles(q1, k11, z1, TF32X3)
    if SCALED:
        z0 = z0 * qk_scale
        z1 = z1 * qk_scale
    if MASKED > 0:
        mask_at = mask + first * mask_n
        if MASK_ROWS:
            is_row = (rows < left)[:, None]
            z0 = add_mask(
                z0, mask_at + rows[:, None] * mask_n + m0[None, :] * mask_k, is_row & (m0 < keys)[None, :], MASKED == 1
            )
            z1 = add_mask(
                z1, mask_at + rows[:, None] * mask_n + m1[None, :] * mask_k, is_row & (m1 < keys)[None, :], MASKED == 1
            )
        else:
            z0 = add_mask(z0, mask + m0 * mask_k, m0 < keys, MASKED == 1)
            z1 = add_mask(z1, mask + m1 * mask_k, m1 < keys, MASKED == 1)
    elif TWO:
        z1 = tl.where((m1 < keys)[None, :], z1, float("-inf"))
    else:
        z0 = tl.where((m0 < keys)[None, :], z0, float("-inf"))
    if not TWO:
        z1 = z0

    top = max_of_rows(z0, z1, TWO)
    top = tl.where(top == float("-inf"), 0.0, top)  # a row without keys has no largest score
    if WITH_LSE:  # of the scores not over temperature
        to_log2 = 1.4426950408889634
        if not SCALED:
            to_log2 = to_log2 * qk_scale
        total = sum_of_rows(
            tl.exp2(tl.minimum(z0 - top[:, None], 0.0) * to_log2),
            tl.exp2(tl.minimum(z1 - top[:, None], 0.0) * to_log2),
            TWO,
        )
        at = (batch * tl.num_programs(1) + head) * queries + first
        tl.store(lse + at + rows, log_sum_exp(top, total, qk_scale, SCALED), mask=rows < left)
    # Where scores over temperature are huge their differences are below rounding: the product must not overflow.
    most = 1048576.0 / tl.maximum(tl.abs(top), 1e-30)
    sharpness = tl.minimum(over_temperature, most)
    if OPERATOR != 1:  # x is of the sparse map's own temperature; times `back` it is that of the dense one
        dense_sharpness = sharpness
        sharpness = tl.minimum(over_temperature / tl.load(sparse_temperature_at), most)
        back = dense_sharpness / sharpness
    x0 = tl.minimum(z0 * sharpness[:, None] - (top * sharpness)[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    x1 = tl.minimum(z1 * sharpness[:, None] - (top * sharpness)[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)

    p0, p1 = sparse_short(x0, x1, alpha, keys, like, TWO, HALF_BITS)
    sparse_sum = sum_of_weights(p0, p1, TWO, not EXACT)
    sparse_sum = tl.where(sparse_sum == 0.0, 1.0, sparse_sum)  # zeros where a row has no key
    if OPERATOR == 2:  # anderson
        low0, low1 = sparse_short(x0, x1, tl.load(first_at), keys, like, TWO, HALF_BITS)
        low_sum = sum_of_weights(low0, low1, TWO, not EXACT)
        low_sum = tl.where(low_sum == 0.0, 1.0, low_sum)
    if OPERATOR != 1:
        x0 = x0 * back[:, None]
        x1 = x1 * back[:, None]
    e0 = tl.exp2(x0).to(like)
    e1 = tl.exp2(x1).to(like)
    dense_sum = sum_of_weights(e0, e1, TWO, not EXACT)
    dense_sum = tl.where(dense_sum == 0.0, 1.0, dense_sum)

    zeros = tl.zeros((ROWS, D0), tl.float32)
    if OPERATOR >= 3:  # gag: T_s and T_s - T_d
        over_sparse = fast_reciprocal(sparse_sum)[:, None]
        over_dense = fast_reciprocal(dense_sum)[:, None]
        t_sparse = product_short(p0, p1, v00, v10, zeros, TWO, TF32X3) * over_sparse
        residual = t_sparse - product_short(e0, e1, v00, v10, zeros, TWO, TF32X3) * over_dense
        along = tl.sum(t_sparse * residual, 1)
        length = tl.sum(t_sparse * t_sparse, 1)
        square = tl.sum(residual * residual, 1)
        t_sparse1 = t_sparse
        residual1 = residual
        if MORE:
            zeros1 = tl.zeros((ROWS, D1 if MORE else D0), tl.float32)
            t_sparse1 = product_short(p0, p1, v01, v11, zeros1, TWO, TF32X3) * over_sparse
            residual1 = t_sparse1 - product_short(e0, e1, v01, v11, zeros1, TWO, TF32X3) * over_dense
            along += tl.sum(t_sparse1 * residual1, 1)
            length += tl.sum(t_sparse1 * t_sparse1, 1)
            square += tl.sum(residual1 * residual1, 1)
        if OPERATOR == 4:
            store_sums(sums, batch, first + rows, rows < left, queries, along, length, square)
        else:
            if OPERATOR == 5:  # over whole tokens: all heads' sums, found before
                along, length, square = sums_of_tokens(sums, batch, first + rows, rows < left, queries, ROWS)
            of_sparse, of_residual = geometry_of_sums(
                along, length, square, tl.load(scale_at), tl.load(first_at), tl.load(second_at), tl.load(parallel_at)
            )
            of_sparse = of_sparse[:, None]
            of_residual = of_residual[:, None]
            if D > 128:  # so many channels are not kept: both products once more, as one
                over_sparse = over_sparse * (of_sparse + of_residual)
                over_dense = over_dense * of_residual
                w0 = (p0.to(tl.float32) * over_sparse - e0.to(tl.float32) * over_dense).to(like)
                w1 = (p1.to(tl.float32) * over_sparse - e1.to(tl.float32) * over_dense).to(like)
                t_sparse = product_short(w0, w1, v00, v10, zeros, TWO, TF32X3)
                store_tile(output_at, t_sparse, rows, d0, output_n, left, D, WHOLE, C0)
                t_sparse1 = product_short(w0, w1, v01, v11, zeros1, TWO, TF32X3)
                store_tile(output_at, t_sparse1, rows, d1, output_n, left, D, WHOLE, C1)
            else:
                out = t_sparse * of_sparse + residual * of_residual
                store_tile(output_at, out, rows, d0, output_n, left, D, WHOLE, C0)
                if MORE:
                    out = t_sparse1 * of_sparse + residual1 * of_residual
                    store_tile(output_at, out, rows, d1, output_n, left, D, WHOLE, C1)
    elif OPERATOR == 2:
        scale = tl.load(scale_at)
        scale_low = tl.load(second_at)
        of_sparse = (scale / sparse_sum)[:, None]
        of_low = (scale_low / low_sum)[:, None]
        of_dense = ((1.0 - scale - scale_low) / dense_sum)[:, None]
        w0 = (p0.to(tl.float32) * of_sparse + low0.to(tl.float32) * of_low + e0.to(tl.float32) * of_dense).to(like)
        w1 = (p1.to(tl.float32) * of_sparse + low1.to(tl.float32) * of_low + e1.to(tl.float32) * of_dense).to(like)
        out = product_short(w0, w1, v00, v10, zeros, TWO, TF32X3)
        store_tile(output_at, out, rows, d0, output_n, left, D, WHOLE, C0)
        if MORE:
            zeros1 = tl.zeros((ROWS, D1 if MORE else D0), tl.float32)
            out = product_short(w0, w1, v01, v11, zeros1, TWO, TF32X3)
            store_tile(output_at, out, rows, d1, output_n, left, D, WHOLE, C1)
    else:
        # (1 - scale) e V / sum e + scale p V / sum p, in one accumulator: the first product is scaled so that
        # what the second leaves is the output times (sum p / scale).
        scale = 1.0
        if OPERATOR == 0:
            scale = tl.load(scale_at)
            scale = tl.where(tl.abs(scale) < 1e-15, 1e-15, scale)
        of_sparse = scale * fast_reciprocal(sparse_sum)
        of_dense = (1.0 - scale) / (dense_sum * of_sparse)
        out = dot_scaled(e0, e1, p0, p1, v00, v10, zeros, of_dense, of_sparse, TWO, TF32X3)
        store_tile(output_at, out, rows, d0, output_n, left, D, WHOLE, C0)
        if MORE:
            zeros1 = tl.zeros((ROWS, D1 if MORE else D0), tl.float32)
            out = dot_scaled(e0, e1, p0, p1, v01, v11, zeros1, of_dense, of_sparse, TWO, TF32X3)
            store_tile(output_at, out, rows, d1, output_n, left, D, WHOLE, C1)


@tile_function
def dot_scaled(e0, e1, p0, p1, v0, v1, zeros, of_dense, of_sparse, TWO: tl.constexpr, TF32X3: tl.constexpr):
    """((e V) of_dense + p V) of_sparse."""
    out = product_short(e0, e1, v0, v1, zeros, TWO, TF32X3) * of_dense[:, None]
    return product_short(p0, p1, v0, v1, out, TWO, TF32X3) * of_sparse[:, None]


# -------------------- kernels/triton_kernel.py --------------------

# The fused operators on GPUs: which of two Triton kernels, with which tiles, and how they are launched.
#
# Up to 128 keys take the short kernel, more the long one, and there is no most. alpha, like every hyperparameter, is read
# from memory by the kernel: one compiled kernel serves every value, and a value that changes between two replays of a
# CUDA graph acts. What is fixed when a kernel is compiled are tiles, dtype, operator and kind of mask.
#
# Eager calls launch directly and keep what they found out about a shape; torch.library's operator is for what traces.
# Triton is imported at the first call, not before. TRITON_INTERPRET=1 runs the same code without a GPU.

import contextlib
import functools
import importlib
import importlib.util
import operator as operators
import os
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


MOST_CHANNELS = 256
MOST_HEADS = 65535  # of a grid's second and third dimension
_CODES = {name: operator.code for name, operator in OPERATORS.items()}  # the kernels' OPERATOR
_GAG_SUMS, _GAG_ROWS = 4, 5  # gag over whole tokens: first the sums of each head, then the output
_MORE_OF = {"gag": ("zeta", "eta"), "anderson": ("alpha_low", "scale_low")}  # what two of their arguments are
_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
_MOST_LAUNCHES = 1024  # that are kept: a few for each shape that a process meets
_find_spec = functools.cache(importlib.util.find_spec)  # a search of the disk where it fails; asked at every call


def triton_refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, as one sentence; None if they can."""
    batch, heads, _, channels = query.shape
    if query.dtype not in _BITS:
        return f"{query.dtype} is not float32, float16 or bfloat16"
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value differ in dtype"
    if key.shape[2] == 0:
        return "there are no keys"
    if channels > MOST_CHANNELS or value.shape[3] != channels:
        return f"head_dim {channels} and {value.shape[3]} are not the same number up to {MOST_CHANNELS}"
    if any(isinstance(n, int) and n > MOST_HEADS for n in (batch, heads)):
        return f"a batch of {batch} with {heads} heads is more than {MOST_HEADS} of one"
    if not query.is_cuda and not _is_interpreted():
        return f"the tensors are on {query.device}, not on a GPU"
    if not triton_is_ready():
        return "Triton is not installed"
    return None


def tiles_of(
    keys: int,
    head_dim: int,
    dtype: torch.dtype,
    code: int,
    short: bool,
    mask_rows: bool = False,
    capability: int = 9,
    traced: bool = False,
) -> tuple[dict[str, int], int, int]:
    """(tile sizes, warps, stages) of a program: a block of rows and all keys where `short`, or W of them at a time.

    code: the kernels' OPERATOR. mask_rows: that there is a mask with rows of its own. capability: the GPU's major
    compute capability. traced: for a graph. benchmarks/triton_registers.py shows what the compiler makes of each; in
    half precision none spills. No program of 64 rows has 8 warps: with tiles 16 wide Triton 3.6 then reads shared
    memory out of bounds.
    """
    exact = dtype == torch.float32
    d0, d1 = _in_two(head_dim, (16, 32, 48, 64, 80, 128, 160, 256))
    heavy = head_dim > 128 or mask_rows  # more numbers for each row than there are registers for 64 rows
    if short:
        m0, m1 = _in_two(keys, (16, 32, 64, 80, 128))
        few = exact or heavy or (capability < 9 and (keys > 80 or head_dim > 80))
        return {"D0": d0, "D1": d1, "M0": m0, "M1": m1, "ROWS": 32 if few else 64}, 4, 1
    if exact or heavy or capability < 9:
        rows = 16 if code == _CODES["anderson"] and head_dim > 80 else 32
        d0, d1 = _in_two(head_dim, (16, 32, 64, 128, 160, 256))
        return {"D0": d0, "D1": d1, "W": 32, "ROWS": rows, "PAIRS": 0}, 4, 2
    held = code in (_CODES["pladis"], _CODES["sparse"]) and torch.version.hip is None
    # What a kernel writes is found from its code, where inline assembly counts as writing to every tensor.
    held = held and not traced and keys <= MOST_HELD_KEYS
    return {"D0": d0, "D1": d1, "W": 64, "ROWS": 64, "PAIRS": -(-keys // 64) if held else 0}, 4, 3


def _in_two(length, sizes):
    """The smallest of `sizes` that holds `length`, as one or two powers of two, the first of them at most 128."""
    whole = next(size for size in sizes if size >= length)
    first = min(128, 1 << (whole.bit_length() - 1))
    return first, whole - first


def is_short(keys: int, code: int) -> bool:
    """Whether the short kernel takes so many keys. A number that a graph leaves open takes the long one."""
    most = 80 if code == _CODES["anderson"] else MOST_SHORT_KEYS  # three maps at once
    return isinstance(keys, int) and keys <= most


class _Launch:
    """One launch of a kernel: its grid and all of its arguments that are not tensors.

    Those are found from shapes, strides and dtypes, so eager calls of one shape share them, and `direct` with them: how
    Triton launches what it compiled, without looking at every argument again.
    """

    def __init__(self, query, key, value, mask, output, dense, code, qk_scale, with_lse, capability=None, traced=False):
        batch, heads, queries, head_dim = query.shape
        keys = key.shape[2]
        self.short = dense is None and is_short(keys, code)
        mask_rows = mask is not None and mask.stride(2) != 0
        tiles, warps, stages = tiles_of(
            keys, head_dim, query.dtype, code, self.short, mask_rows, capability or _capability(query), traced
        )
        rows = tiles["ROWS"]
        self.grid = (-(-queries // rows), heads, batch)
        read = [query, key, value, output]
        if not self.short:
            read.append(query if dense is None else dense)
        strides = [stride for tensor in read for stride in tensor.stride()[:3]]
        unit = 4 if query.dtype == torch.float32 else 8  # 16 bytes
        unit = unit if all(_divides(unit, stride) for stride in strides) else 1
        mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
        self.numbers = (*(stride // unit for stride in strides), *mask_strides, queries, keys, qk_scale)
        kind = 0 if mask is None else 1 if mask.dtype == torch.uint8 else 2
        fixed = {
            "UNIT": unit,
            "GROUP": heads // max(1, key.shape[1]),
            "OPERATOR": code,
            "MASKED": kind,
            "MASK_ROWS": mask_rows,
            "SCALED": kind > 0 or qk_scale <= 0.0,  # the largest score is then not that of the largest product
            "WITH_LSE": with_lse,
            "D": head_dim,
            "WHOLE": _divides(rows, queries),
            "TF32X3": query.dtype == torch.float32,
            "HALF_BITS": _BITS[query.dtype],
            **tiles,
        }
        if not self.short:
            fixed["JOINED"] = dense is not None
            fixed["WHOLE_M"] = _divides(tiles["W"], keys)
        self.fixed = {**fixed, "num_warps": warps, "num_stages": stages}
        self.direct, self.tail = None, ()

    def trace(self, tensors: list[Tensor]) -> None:
        """Launch through torch, which puts the launch into the graph that it makes."""
        kernel = torch.library.wrap_triton(jitted_kernels()[0 if self.short else 1])
        kernel[self.grid](*tensors, *self.numbers, **self.fixed)

    def now(self, tensors: list[Tensor]) -> None:
        """Launch. tensors: those that the kernel takes, in its order."""
        pointers = [tensor.data_ptr() for tensor in tensors]
        # What is compiled takes addresses to be multiples of 16 where the first ones were.
        aligned = not functools.reduce(operators.or_, pointers) & 15
        if aligned and self.direct is not None:
            return self.direct(*pointers, *self.tail)
        kernel = jitted_kernels()[0 if self.short else 1]
        compiled = kernel[self.grid](*tensors, *self.numbers, **self.fixed)
        if aligned and compiled is not None:  # interpreted it is None
            self.tail = (*self.numbers, *(self.fixed[name] for name in kernel.arg_names if name in self.fixed))
            self.direct = compiled[self.grid]
        return None


def _capability(tensor):
    """The major compute capability of the tensor's GPU; without one that of an H100."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda and torch.cuda.is_available() else 9


def _divides(divisor, number):
    """Whether a number is a multiple of another; of one that a graph leaves open, whether every value is."""
    if isinstance(number, int):
        return number % divisor == 0
    return torch.fx.experimental.symbolic_shapes.statically_known_true(number % divisor == 0)


def _arguments(query, key, value, mask, output, lse, sums, dense, dense_lse, settings, operator, short):
    """All tensors that a kernel takes, in its order; one that is not read is the query."""
    more = [query if tensor is None else tensor for tensor in (mask, output, lse, sums)]
    if not short:
        more += [query if tensor is None else tensor for tensor in (dense, dense_lse)]
    named = dict(zip(OPERATORS[operator].defaults, settings, strict=True))
    first, second = _MORE_OF.get(operator, ("alpha", "alpha"))
    taken = ("alpha", "scale", "temperature", first, second, "sparse_temperature", "parallel")
    return [query, key, value, *more, *(named.get(name, settings[0]) for name in taken)]


def _prepared(query, key, value, mask):
    """The tensors as the kernels read them: channels side by side, a mask of all rows and keys, booleans as bytes."""
    query, key, value = (t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in (query, key, value))
    if mask is not None:
        mask = _as_bytes(mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2]))
    return query, key, value, mask


def _as_bytes(mask):
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _codes(operator, unit):
    return (_GAG_SUMS, _GAG_ROWS) if operator == "gag" and unit == "token" else (_CODES[operator],)


def _sums(query, codes):
    """Uninitialised sums of each head, for gag over whole tokens; None for what has none."""
    return query.new_empty(3, *query.shape[:3], dtype=torch.float32) if _GAG_SUMS in codes else None


def launch_by_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: list[Tensor],
    operator: OperatorName,
    unit: Unit,
    qk_scale: float,
    with_lse: bool,
    dense: Tensor | None = None,
    dense_lse: Tensor | None = None,
    output: Tensor | None = None,
    wanted: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(output, log-sum-exp or None) by a kernel, launched here and now, of tensors that `triton_refusal` passes.

    dense, dense_lse: attention of the same queries to other keys, (batch, heads, queries, head_dim), and its
    log-sum-exp, float32 and contiguous; the output is then attention to both, as joint attention has it (joint.py).
    output: where to write instead of a tensor of its own, its channels side by side; then without a log-sum-exp.
    wanted: the dtype of its own, value's unless given.
    """
    if query.numel() == 0:
        return empty_outputs(query, value, with_lse, wanted)
    if is_combined(operator, unit):

        def run(numbers, with_lse):
            how = ("sparse", "head", qk_scale, with_lse)
            return launch_by_triton(query, key, value, mask, numbers, *how, wanted=torch.float32)

        output, lse = from_outputs(run, query, settings, operator, unit, with_lse)
        return output.to(value.dtype), lse
    query, key, value, mask = _prepared(query, key, value, mask)
    device = query.device
    settings = [
        s if s.dtype is torch.float32 and s.device == device else s.to(device=device, dtype=torch.float32)
        for s in settings
    ]
    codes = _codes(operator, unit)
    lse = None
    if output is None:
        output, lse = empty_outputs(query, value, with_lse, wanted)
    sums = _sums(query, codes)
    found = (
        query.shape,
        query.stride(),
        key.shape,
        key.stride(),
        value.stride(),
        query.dtype,
        device,
        None if mask is None else (mask.stride(), mask.dtype),
        output.stride(),
        output.dtype,
        None if dense is None else dense.stride(),
        operator,
        unit,
        qk_scale,
        with_lse,
    )
    launches = _LAUNCHES.get(found)
    if launches is None:
        if len(_LAUNCHES) >= _MOST_LAUNCHES:
            _LAUNCHES.clear()
        launches = _LAUNCHES[found] = [
            _Launch(query, key, value, mask, output, dense, code, qk_scale, with_lse) for code in codes
        ]
    with _on_device_of(query):
        for launch in launches:
            launch.now(
                _arguments(
                    query, key, value, mask, output, lse, sums, dense, dense_lse, settings, operator, launch.short
                )
            )
    return output, lse


_LAUNCHES = {}


def _on_device_of(tensor):
    """A context in which the tensor's GPU is the current one, which is where Triton launches."""
    if not tensor.is_cuda or torch.cuda.current_device() == tensor.device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def fused_by_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: list[Tensor],
    *,
    operator: OperatorName,
    unit: Unit,
    mask: Tensor | None,
    qk_scale: float,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `reference`, by a kernel, as one node of a graph."""
    arguments = (query, key, value, mask, list(settings), operator, unit, qk_scale, with_lse)
    output, lse = torch.ops.pladis.attention_triton_v5(*arguments)
    return output, lse if with_lse else None


def _traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: Sequence[Tensor],
    operator: str,
    unit: str,
    qk_scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    # The kernel gets the mask as it is, not expanded: inductor may lay an expanded tensor out anew, and by then the
    # kernel has its strides.
    given = mask if mask is None else _as_bytes(mask.contiguous())
    query, key, value, mask = _prepared(query, key, value, given)
    settings = [setting.to(device=query.device, dtype=torch.float32) for setting in settings]

    def run(operator, unit, settings, with_lse, wanted=None):
        codes = _codes(operator, unit)
        output, lse = empty_outputs(query, value, with_lse, wanted)
        sums = _sums(query, codes)
        more = (given, output, lse, sums, None, None, settings, operator)
        for code in codes:
            launch = _Launch(query, key, value, mask, output, None, code, qk_scale, with_lse, traced=True)
            launch.trace(_arguments(query, key, value, *more, launch.short))
        return output, lse

    if is_combined(operator, unit):
        part = functools.partial(run, "sparse", "head", wanted=torch.float32)
        whole, lse = from_outputs(part, query, settings, operator, unit, with_lse)
        output = empty_outputs(query, value, False)[0].copy_(whole)
    else:
        output, lse = run(operator, unit, settings, with_lse)
    return output, query.new_empty(0, dtype=torch.float32) if lse is None else lse


@set_constant
def triton_is_ready() -> bool:
    """Whether Triton is installed; if so, the operator is registered from here on.

    torch.compile and AOTInductor take the kernel out of that operator, torch.export keeps it whole. Not at import:
    torch.library.triton_op imports torch's compiler and Triton, which takes seconds.
    """
    if _find_spec("triton") is None:
        return False
    if not hasattr(torch.ops.pladis, "attention_triton_v5"):  # another copy of this file may have registered it
        operator = torch.library.triton_op("pladis::attention_triton_v5", _traced, mutates_args=())
        operator.register_fake(empty_results)
        operator.register_autograd(no_gradient)
    return True


def _is_interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def jitted_kernels() -> tuple[Callable, Callable]:
    """(short, long): the kernels as Triton's, each compiled at its first launch for a kind of arguments.

    Every function of the tiles becomes Triton's under the name by which the others of its module find it.
    """
    triton = importlib.import_module("triton")
    language = importlib.import_module("triton.language")
    libdevice = importlib.import_module("triton.language.extra.libdevice")
    made = {function: triton.jit(function) for function in TILE_FUNCTIONS}
    for names in {id(function.__globals__): function.__globals__ for function in TILE_FUNCTIONS}.values():
        names.update(tl=language, libdevice=libdevice, INTERPRETED=language.constexpr(_is_interpreted()))
        names.update({name: made[value] for name, value in names.items() if _is_made(value, made)})
    return made[short_kernel], made[long_kernel]


def _is_made(value, made):
    return isinstance(value, types.FunctionType) and value in made


# -------------------- kernels/fused.py --------------------

# Which code computes an attention where, and `torch.ops.pladis.attention_v4`: the operators as one node of a graph.
#
# torch.compile, torch.export and AOTInductor see this one node (on a GPU attention_triton_v5, the kernel's own) and need
# not trace the solver; `decompositions` turns it into plain operations for a backend that does not know it (TensorRT,
# ONNX, a C++ program without Python). Its version is part of its name: a graph that was exported with it finds what it
# was made for, or nothing. Where nothing traces, a call goes straight to the kernel's Python: torch.library's own way
# there costs more than a small attention.

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor


# "auto" is the fused operator; the others are for comparison, or for a backend that wants plain operations.
Implementation = Literal["auto", "reference", "entmax", "blocked", "cpp", "triton"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

_NAME = "pladis::attention_v4"
_IN_ONE_PASS = 1 << 16  # scores
# From so many scores on "auto" is the C++ kernel wherever it can be built: only toys have fewer. The limit is low, and
# nothing asks whether the kernel happens to be built already, because the two forms differ in the last bits: if a
# model's first large layer switched its small ones from one to the other, a seed would not draw the same image twice.
_WORTH_A_KERNEL = 1 << 10

_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def choice_problem(operator: str, unit: str, implementation: str) -> str | None:
    """What is wrong with these names, as one sentence; None if they are all known."""
    return (
        unknown_name("operator", operator, OPERATORS)
        or unknown_name("unit", unit, UNITS)
        or unknown_name("implementation", implementation, IMPLEMENTATIONS)
    )


def attention_by(
    implementation: Implementation,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: list[Tensor],
    operator: OperatorName,
    unit: Unit,
    qk_scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(output, log-sum-exp or None) by one of IMPLEMENTATIONS, of tensors and names that were checked before.

    As in `attention`, but key and value have query's batch. settings: scalar tensors in the order of
    OPERATORS. Raises RuntimeError where gradients are wanted of an implementation that has none.
    """
    operator, settings = of_one_step(operator, settings)
    arguments = (query, key, value, mask, settings, operator, unit, qk_scale, with_lse)
    if implementation == "auto":
        if gradient_is_wanted(query, key, value, *settings):
            return _by(reference, arguments)  # plain operations, which autograd follows
        return _as_a_node(arguments) if is_traced(query, key, value, mask, *settings) else computed(*arguments)
    if implementation == "reference":
        return _by(reference, arguments)
    if implementation == "entmax":
        return _by(reference, arguments, sparse_map=entmax_by_package)
    if gradient_is_wanted(query, key, value, *settings):
        raise RuntimeError(f"implementation={implementation!r} has no gradient; use 'reference' or 'auto' for training")
    if implementation == "triton":
        return _on_triton(arguments)
    return _by_kernel(blocked if implementation == "blocked" else _on_cpu, arguments)


def gradient_is_wanted(*tensors: Tensor) -> bool:
    """Whether autograd follows a call on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors (or None) has to be an operator's, because something records or reroutes it.

    dynamo and torch.export answer is_compiling(), and so never look at what runs otherwise. make_fx, FakeTensorMode and
    every other mode of torch_dispatch are on a stack, torch.func's transforms on another (`is_dispatched`). Tensor
    subclasses have a torch_dispatch of their own.
    """
    return (
        torch.compiler.is_compiling()
        or is_dispatched()
        or torch.jit.is_tracing()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def choose_implementation(query: Tensor, key: Tensor, value: Tensor) -> Implementation:
    """What "auto" runs for these tensors: "triton", "cpp", "blocked" or "reference"."""
    if query.is_cuda and triton_refusal(query, key, value) is None:
        return "triton"
    batch, heads, queries, _ = query.shape
    scores = batch * heads * queries * key.shape[2]
    if scores >= _WORTH_A_KERNEL and query.is_cpu and _dtype_is_fused(query, value) and compiler_is_available():
        return "cpp"
    # One pass over small inputs; pieces where all the scores at once would be the largest thing in memory.
    return "reference" if scores <= _IN_ONE_PASS else "blocked"


def attention_decompositions() -> dict[Callable, Callable]:
    """{operator: plain torch function} of the fused operator, for surgery.nn.decompositions."""
    fused = [torch.ops.pladis.attention_v4]
    if triton_is_ready():
        fused.append(torch.ops.pladis.attention_triton_v5)
    return {operator.default: _decomposed for operator in fused}


def _by(function, arguments, **more):
    """Call one of the implementations, which take by name what makes no difference to how they are chosen."""
    query, key, value, mask, settings, operator, unit, qk_scale, with_lse = arguments
    how = {"operator": operator, "unit": unit, "mask": mask, "qk_scale": qk_scale, "with_lse": with_lse}
    return function(query, key, value, settings, **how, **more)


def _by_kernel(function, arguments):
    """As `_by`, of a form that has its operators one unit of `unit` at a time; the rest is combined of its outputs."""
    query, key, value, mask, settings, operator, unit, qk_scale, with_lse = arguments
    if not is_combined(operator, unit):
        return _by(function, arguments)
    exact = value.to(torch.promote_types(value.dtype, torch.float32))
    of_one_dtype = (query.to(exact.dtype), key.to(exact.dtype), exact, mask)

    def run(numbers, with_lse):
        return _by(function, (*of_one_dtype, numbers, "sparse", "head", qk_scale, with_lse))

    output, lse = from_outputs(run, query, settings, operator, unit, with_lse)
    return output.to(value.dtype), lse


def _as_a_node(arguments):
    """By an operator of torch.library, which a graph holds as one node."""
    if arguments[0].is_cuda and triton_refusal(*arguments[:3]) is None:
        return _by(fused_by_triton, arguments)
    output, lse = torch.ops.pladis.attention_v4(*arguments)
    return output, lse if arguments[-1] else None


def computed(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """`attention_by` "auto" where nothing traces and no gradient is wanted: its other arguments, in that order."""
    chosen = choose_implementation(*arguments[:3])
    if chosen == "triton":
        return launch_by_triton(*arguments)
    if chosen == "reference":
        return _by(reference, arguments)
    return _by_kernel(fused_on_cpu if chosen == "cpp" else blocked, arguments)


def _on_cpu(query, key, value, settings, **how):
    if query.device.type != "cpu" or not _dtype_is_fused(query, value):
        raise ValueError(f"implementation='cpp' is for float32, float16 and bfloat16 on a CPU, not {query.dtype}")
    if not compiler_is_available():
        raise RuntimeError("implementation='cpp' needs a C++ compiler, such as g++")
    return fused_on_cpu(query, key, value, settings, **how)


def _on_triton(arguments):
    reason = triton_refusal(*arguments[:3])
    if reason:
        raise ValueError(f"implementation='triton' cannot take this: {reason}")
    if is_traced(*arguments[:4], *arguments[4]):
        return _by(fused_by_triton, arguments)
    return launch_by_triton(*arguments)


def _dtype_is_fused(query, value):
    return query.dtype in _FUSED_DTYPES and query.dtype == value.dtype


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: Sequence[Tensor],
    operator: str,
    unit: str,
    qk_scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    names = cast("OperatorName", operator), cast("Unit", unit)  # a schema has no Literal
    arguments = (query, key, value, mask, list(settings), *names, qk_scale, with_lse)
    output, lse = computed(*arguments)
    wanted, wanted_lse = empty_results(*arguments)
    if output.stride() != wanted.stride():  # what the compiler was told to expect
        output = wanted.copy_(output)
    return output, wanted_lse if lse is None else lse.contiguous()


def _decomposed(*arguments):
    output, lse = _by(reference, arguments)
    return output, arguments[0].new_empty(0, dtype=torch.float32) if lse is None else lse


# A process may hold several copies of this file; the first one registers.
if not hasattr(torch.ops.pladis, "attention_v4"):
    _operator = torch.library.custom_op(_NAME, _dispatch, mutates_args=())
    _operator.register_fake(empty_results)
    _operator.register_autograd(no_gradient)


# -------------------- functional.py --------------------

# The attention operators as one function over query, key, value.

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor



def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    operator: OperatorName = "pladis",
    alpha: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    temperature: float | Tensor | None = None,
    sparse_temperature: float | Tensor | None = None,
    zeta: float | Tensor | None = None,
    parallel: float | Tensor | None = None,
    eta: float | Tensor | None = None,
    unit: Unit = "head",
    alpha_low: float | Tensor | None = None,
    scale_low: float | Tensor | None = None,
    mask: Tensor | None = None,
    qk_scale: float | None = None,
    implementation: Implementation = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by one of OPERATORS (`operators.py` has their formulas), on the scores `query key^T qk_scale`.

    query: (batch, heads, queries, head_dim); key, value: (batch, key_heads, keys, head_dim); any floating dtype. Where
        there are fewer heads of keys, query head i has key head i // (heads / key_heads), which is not copied for each
        (grouped-query attention, as scaled_dot_product_attention's enable_gqa). Scores, both maps and their combination
        are float32 whatever the inputs (float64 for float64 input).
    operator: "pladis" (PLADIS, arXiv 2503.07677, eq. 15), "sparse" (PLADIS at scale 1), "gag" (GAG, arXiv
        2603.02531, eq. 11-13), "anderson_least_squares" (its Appendix F), "anderson" (that with given weights) or
        "anderson_history" (its eq. 6; here its first step, which is "sparse": a module keeps the step before).
    alpha: of the sparse map, in [1, 2]; 1.5 unless given. scale: the papers' lambda; 2 unless given (gag: 10,
        anderson: 1). 0 is dense attention for pladis; above 1 it extrapolates and weights may be negative. temperature:
        > 0, divides the scores of every map (PLADIS eq. 36); sparse_temperature: those of the sparse maps alone, once
        more (Fig. 9), 1 unless given. zeta, parallel, eta: gag's shares of the orthogonal and the parallel part and its
        bound on the step; 0, 1, 15 unless given. unit: over what gag projects and anderson_least_squares solves,
        "head", "token" or "image". alpha_low, scale_low: the second sparse map of both andersons; 1.25 and 1 unless
        given. Each is a number or a tensor of one element; a tensor's value is not checked, and changing it never
        recompiles a graph. What an operator does not have is not read.
    mask: boolean (True keeps a key) or additive, broadcastable to (batch, heads, queries, keys). A query whose keys
        are all masked gets zeros.
    qk_scale: 1/sqrt(head_dim) unless given.
    implementation: "auto" picks by device and shape and is one operator in a compiled or exported graph. "reference" is
        plain torch, "blocked" the same in pieces, "entmax" the entmax package's functions, the papers' own arithmetic;
        "cpp" and "triton" are the kernels for CPUs and GPUs. What is combined of whole outputs (unit "image",
        anderson_least_squares) they compute in two or three passes and plain torch. Where gradients are wanted "auto"
        is "reference".
    Returns (batch, heads, queries, head_dim) in value's dtype; with return_lse also the log-sum-exp of the scores (not
    over temperature), (batch, heads, queries) in float32, -inf where every key is masked.
    Raises ValueError for numbers out of range, an unknown operator, unit or implementation, shapes that do not fit, or
    tensors that the named kernel does not take; TypeError for dtypes; ImportError or RuntimeError when a named
    implementation needs a package or compiler that is missing, or has no gradient.
    """
    problem = choice_problem(operator, unit, implementation)
    if problem:
        raise ValueError(problem)
    given = {
        "alpha": alpha,
        "scale": scale,
        "temperature": temperature,
        "sparse_temperature": sparse_temperature,
        "zeta": zeta,
        "parallel": parallel,
        "eta": eta,
        "alpha_low": alpha_low,
        "scale_low": scale_low,
    }
    settings = checked_settings(query, key, value, mask, operator, given)
    key, value = fitting(query, key, value)
    factor = query.shape[-1] ** -0.5 if qk_scale is None else float(qk_scale)
    output, lse = attention_by(implementation, query, key, value, mask, settings, operator, unit, factor, return_lse)
    return output if lse is None else (output, lse)


def fitting(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(key, value) with the batch of query. Raises as `attention` where tensors do not fit together.

    A kernel reads memory by these shapes, so a module's call asks here too, and in as few questions as will do: what
    its projections make is floating, and a mask that does not broadcast cannot be expanded.
    """
    shape, (batch, heads, _, channels) = key.shape, query.shape
    if shape == (batch, heads, shape[2], channels) and shape[:3] == value.shape[:3] and mask is None:
        return key, value
    _check_tensors(query, key, value, mask)
    if shape[0] != batch:
        key, value = (tensor.expand(batch, -1, -1, -1) for tensor in (key, value))
    return key, value


def checked_settings(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    operator: OperatorName,
    given: Mapping[str, float | Tensor | None],
) -> list[Tensor]:
    """The operator's hyperparameters as scalar tensors in the order of OPERATORS, `given` or their defaults.

    Raises as `attention` where the tensors do not fit together or a number is out of range.
    """
    _check_tensors(query, key, value, mask)
    if operator == "anderson_least_squares" and value.shape[3] != query.shape[3]:
        raise ValueError(
            f"{operator} takes outputs less queries, so value must have {query.shape[3]} channels, not {value.shape[3]}"
        )
    return [
        _as_tensor(name, default if given.get(name) is None else given[name], query)
        for name, default in OPERATORS[operator].defaults.items()
    ]


def _check_tensors(query, key, value, mask):
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, not {tensor.dtype}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head_dim), not {tuple(tensor.shape)}")
    (batch, heads, _, channels), (key_batch, key_heads, _, key_channels) = query.shape, key.shape
    shared = heads == key_heads or (key_heads > 0 and heads % key_heads == 0)
    if key_batch not in (1, batch) or not shared or key_channels != channels:
        raise ValueError(f"key {tuple(key.shape)} does not fit query {tuple(query.shape)}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value {tuple(value.shape)} does not fit key {tuple(key.shape)}")
    if mask is not None and not _broadcasts(mask.shape, (*query.shape[:3], key.shape[2])):
        raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to {(*query.shape[:3], key.shape[2])}")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be boolean (True keeps a key) or additive floating, not {mask.dtype}")


def _broadcasts(shape, wanted):
    return len(shape) <= len(wanted) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(wanted), strict=False)
    )


def _as_tensor(name, number, query):
    """The hyperparameter as a scalar tensor on query's device, float32 (float64 for float64 queries)."""
    if isinstance(number, torch.Tensor):
        if number.numel() != 1:
            raise ValueError(f"{name} must have one element, not {number.numel()}; give each layer its own module")
        return number if number.ndim == 0 else number.reshape(())
    if problem := value_problem(name, number):
        raise ValueError(f"{name} {problem}")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.full((), float(number), dtype=dtype, device=query.device)


def text_and_image(length: int, text_length: int, text_first: bool) -> tuple[slice, slice]:
    """(slice of the text, slice of the image) in a joint sequence."""
    if text_first:
        return slice(0, text_length), slice(text_length, length)
    return slice(length - text_length, length), slice(0, length - text_length)


def mask_block(mask: Tensor | None, rows: slice, columns: slice) -> Tensor | None:
    """The rows and columns of a mask that may have one of either."""
    if mask is None:
        return None
    if mask.ndim >= 2 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return mask[..., columns] if mask.shape[-1] > 1 else mask


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, qk_scale: float | None = None
) -> Tensor:
    """scaled_dot_product_attention, where heads may share keys as in `attention`.

    On a GPU its kernels for masks and for float32 have no such heads, and its plain form would hold all scores at once:
    keys are repeated there.
    """
    shared = key.shape[1] != query.shape[1]
    if shared and query.is_cuda and (mask is not None or query.dtype == torch.float32):
        key, value = (for_all_heads(states, query.shape[1]) for states in (key, value))
        shared = False
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=qk_scale, enable_gqa=shared)


def for_all_heads(states: Tensor, heads: int) -> Tensor:
    """Keys or values, (batch, heads or a divisor, length, head_dim), with each head for the queries that share it."""
    return states if states.shape[1] == heads else states.repeat_interleave(heads // states.shape[1], dim=1)


# -------------------- additions.py --------------------

# What a module does besides its operator: a negative prompt's keys and values, and what becomes of the text's.
#
# In one module they act in this order, whatever the order in which a recipe names them:
#
#     taca     the scores of image queries with text keys are multiplied, in joint attention
#     words    the weights of keys that are no words are reduced
#     -        the operator: T
#     shares   T within start, words and padding, each with its share of the softmax
#     nag      all of this for the prompt, Z+, and for the negative prompt, Z-; then Z is led from Z- away
#     vsf      or all of this over the prompt's and the negative prompt's keys together
#     regions  or all of this for the prompt, and for the queries of a region over the keys of its own prompt
#
# The negative prompt's tokens are the last of the text's (prompts.py puts them there), so a model's own projections,
# norms and blocks make keys and values of them as of the prompt's. In joint attention they are a second text: they attend
# to the image and to themselves, the image attends to each text apart, and the prompt does not see them. That is what the
# code of NAG's authors computes for FLUX with a batch twice as large, as all else in a block is token by token.
#
# VSF's negative tokens are there twice in joint attention: as keys of their own text, and with their values' sign turned
# as keys of the image. Its padding is no key of the image; NAG's is, as in its authors' code.

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


START, WORD, PADDING = 0, 1, 2  # kinds of text tokens; the end token is padding, as which CLIP repeats it


class Told(NamedTuple):
    """What the modules of one call of a model are told of its text.

    negative: how many of the text's last tokens are the negative prompt's. start: the first row of the batch that has a
    prompt; those before it are CFG's without. active: (batch - start,) bool, which of the rest have a negative prompt.
    attended: (batch, negative) bool, which of its tokens are no padding. kinds: (batch, text) of START, WORD, PADDING;
    None where nobody has told. shown: (batch, negative) bool, which of its tokens are keys, where the model was told
    that none is; else the call's own mask says. lengths: of the texts among them, one after the other. encoded:
    (tokens, mask, the arguments of the call, more), for a model that takes the texts at its blocks. areas: where the
    texts are of regions, (regions, queries) bool for each level of the model, which of the image's tokens lie in each.
    """

    negative: int = 0
    start: int = 0
    active: Tensor | None = None
    attended: Tensor | None = None
    kinds: Tensor | None = None
    shown: Tensor | None = None
    lengths: tuple[int, ...] = ()
    encoded: tuple[Any, ...] = ()
    areas: tuple[Tensor, ...] = ()


class Teller:
    """What the modules of one model ask: what they are `told` of the call that goes on."""

    def __init__(self) -> None:
        self.told = Told()
        self.origin: Tensor | None = None  # the text at the second block (text_stream.py)
        self.kept: Any = None  # by a model, of what it makes of the texts, from its first block to the others


def led_away(positive: Tensor, negative: Tensor, phi: Tensor, tau: Tensor, blend: Tensor) -> Tensor:
    """NAG: blend Z + (1 - blend) Z+, Z being u = Z+ + phi (Z+ - Z-) cut to tau times the L1 norm of Z+.

    positive, negative: Z+ and Z-, (batch, heads, queries, head_dim); norms over all heads of a token. In float32 or
    more; returns it in the dtype of `positive`. phi, tau, blend: scalars.
    """
    dtype = torch.promote_types(positive.dtype, torch.float32)
    exact = positive.to(dtype)
    led = exact + phi * (exact - negative.to(dtype))
    size, length = (states.abs().sum((1, 3), keepdim=True) for states in (exact, led))
    led = led * (tau * size / length.clamp_min(torch.finfo(dtype).tiny)).clamp_max(1.0)
    return torch.lerp(exact, led, blend.to(dtype)).to(positive.dtype)


def attend_with_additions(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, qk_scale: float
) -> Tensor:
    """Cross-attention by a module's operator and additions. query: (batch, heads, queries, head_dim), the others alike.

    mask: boolean or additive, broadcastable to (batch, heads, queries, keys). Raises ValueError where an addition asks
    what kinds of tokens there are, and nobody has told.
    """
    told, count = module.pladis_teller.told, negative_count(module)
    kinds = kinds_told(module, key.shape[2])
    length = key.shape[2] - count
    mask = shown_in(mask, told, slice(length, None), query.shape[0])
    prompt, rest = slice(0, length), slice(length, None)

    def operated(rows, columns):
        own_kinds = None if kinds is None else kinds[rows, columns]
        own_mask = part_of_mask(mask, rows, columns)
        parts = (query[rows], key[rows, :, columns], value[rows, :, columns])
        return _operated(module, *parts, own_mask, own_kinds, qk_scale)

    everyone = slice(None)
    if not count:
        return operated(everyone, everyone)
    if "vsf" in module.pladis_additions:
        value = torch.cat([value[:, :, prompt], flipped(module, value[:, :, rest])], dim=2)
        mask = with_bias(mask, F.pad(negative_bias(module, query.shape[0]), (length, 0)))
        return operated(everyone, everyone)
    positive = operated(everyone, prompt)
    if "regions" in module.pladis_additions:
        seen = seen_by_regions(module, query.shape[2]).T  # (queries, keys)
        mask = seen[None, None] if mask is None else within(mask[..., rest] if mask.shape[-1] > 1 else mask, seen)
        mask = F.pad(mask, (length, 0))
        return in_regions(module, positive, operated(slice(told.start, None), rest))
    return led_rows(module, positive, operated(slice(told.start, None), rest))


def _operated(module, query, key, value, mask, kinds, qk_scale):
    """The operator over these keys, with `words` and `shares`."""
    if kinds is not None and "words" in module.pladis_additions:
        mask = with_bias(mask, words_bias(module, kinds))

    def by_operator(own_mask, with_lse):
        return attention_by(
            module.pladis_implementation,
            query,
            key,
            value,
            own_mask,
            module.hyperparameter_tensors(),
            module.pladis_operator,
            module.pladis_unit,
            qk_scale,
            with_lse,
        )

    output, _ = by_operator(mask, False)
    if kinds is None or "shares" not in module.pladis_additions:
        return module.accelerated(query, output)
    outputs, sums = [], []
    for kind in (START, WORD, PADDING):
        only = torch.where(kinds == kind, 0.0, -torch.inf)[:, None, None]
        found, lse = by_operator(with_bias(mask, only), True)
        assert lse is not None
        outputs.append(found)
        sums.append(lse)
    shares = torch.stack(sums).softmax(0).unsqueeze(-1).to(output.dtype)
    held = (shares * torch.stack(outputs)).sum(0)
    return torch.lerp(output, held, module.number("held").to(output.dtype))


def negative_count(module: Any) -> int:
    """How many of the text's tokens, the last ones, are the negative prompt's to a module."""
    return module.pladis_teller.told.negative if negative_role(module) else 0  # else prompts.py hides them


def negative_role(module: Any) -> bool:
    """Whether a patched module has an addition for negative prompts."""
    return any(ADDITIONS[name].role == "text" for name in module.pladis_additions)


def kinds_told(module: Any, length: int) -> Tensor | None:
    """(batch, length) kinds of the text's tokens, where the module needs them; ValueError where nobody has told."""
    wanting = [name for name in ("words", "shares") if name in module.pladis_additions]
    if not wanting:
        return None
    kinds = module.pladis_teller.told.kinds
    if kinds is None:
        raise ValueError(
            f"{wanting[0]} needs to know which tokens are words, which a pipeline tells that surgery.patch or "
            "surgery.load was given: call that, or tell the denoiser by its tell()"
        )
    return kinds[:, :length]


def led_rows(module: Any, positive: Tensor, negative: Tensor) -> Tensor:
    """NAG's output where rows have a negative prompt, Z+ elsewhere. negative: Z- of the rows that have a prompt."""
    told = module.pladis_teller.told
    with_prompt = positive[told.start :]
    led = led_away(with_prompt, negative, *(module.number(name) for name in ("phi", "tau", "blend")))
    assert told.active is not None
    led = torch.where(told.active[:, None, None, None], led, with_prompt)
    return torch.cat([positive[: told.start], led]) if told.start else led


def area_of(module: Any, queries: int) -> Tensor:
    """(regions, queries) bool of a call of so many of the image's tokens; what stands behind the image is in none."""
    areas = module.pladis_teller.told.areas
    for area in areas:
        if area.shape[1] == queries:
            return area
    if len(areas) == 1 and (behind := queries - areas[0].shape[1]) > 0:
        return F.pad(areas[0], (0, behind))
    raise ValueError(f"regions: an attention of {queries} tokens of the image is of no size of this call's image")


def seen_by_regions(module: Any, queries: int) -> Tensor:
    """(tokens, queries) bool: which of the regional prompts' tokens belong to the image's tokens."""
    area = area_of(module, queries)
    lengths = torch.tensor(module.pladis_teller.told.lengths, device=area.device)
    return area.repeat_interleave(lengths, dim=0, output_size=sum(module.pladis_teller.told.lengths))


def within(mask: Tensor, seen: Tensor) -> Tensor:
    """A mask of either kind that also leaves out what is not seen, bool and broadcastable to it."""
    return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -torch.inf)


def in_regions(module: Any, output: Tensor, regional: Tensor) -> Tensor:
    """The output over the prompt, with its regions' where a query lies in one. regional: of the rows with a prompt."""
    start = module.pladis_teller.told.start
    inside = area_of(module, output.shape[2]).any(0)[:, None]
    own = output[start:]
    base = module.number("base").to(output.dtype)
    own = torch.where(inside, torch.lerp(regional, own, base), own)
    return torch.cat([output[:start], own]) if start else own


def flipped(module: Any, value: Tensor) -> Tensor:
    """VSF's values of the negative prompt's tokens, in the dtype of `value`."""
    return (value * -module.number("flip")).to(value.dtype)


def negative_bias(module: Any, batch: int) -> Tensor:
    """(batch, 1, 1, negative) float32: what VSF adds to the scores of the negative prompt's keys.

    -infinity where a row has none, and at its padding.
    """
    told = module.pladis_teller.told
    assert told.active is not None
    active = F.pad(told.active, (batch - told.active.shape[0], 0))[:, None]
    active = active.expand(batch, told.negative) if told.attended is None else active & told.attended
    bias = -module.number("offset").clamp(-LARGEST, LARGEST).expand(active.shape)
    return torch.where(active, bias, -torch.inf)[:, None, None]


def words_bias(module: Any, kinds: Tensor) -> Tensor:
    """(batch, 1, 1, keys) float32: what `words` adds to scores, the logarithm of `kept` at keys that are no words."""
    return torch.where(kinds == WORD, 0.0, module.number("kept").log())[:, None, None]


def with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """An additive mask: one of either kind, or none, with `bias` added to it."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def shown_in(mask: Tensor | None, told: Told, columns: slice, batch: int) -> Tensor | None:
    """A call's mask of keys with what is told of the negative prompt's, at these columns, in place of what it says."""
    if mask is None or told.shown is None or mask.shape[-1] == 1:
        return mask
    shown = told.shown[:, None, None]
    own = shown if mask.dtype == torch.bool else torch.where(shown, 0.0, -torch.inf).to(mask.dtype)
    mask = mask.expand(batch, *mask.shape[1:])
    own = own.expand(*mask.shape[:-1], own.shape[-1])
    stop = mask.shape[-1] if columns.stop is None else columns.stop
    return torch.cat([mask[..., : columns.start], own, mask[..., stop:]], dim=-1)


def placed(module: Any, places: Tensor, dim: int = 0) -> Tensor:
    """What stands for the text's places, in order along `dim`, with those of a prompt for each further text."""
    told = module.pladis_teller.told
    if not negative_count(module):
        return places
    own = places.narrow(dim, 0, places.shape[dim] - told.negative)
    return torch.cat([own, *(places.narrow(dim, 0, length) for length in told.lengths)], dim=dim)


def part_of_mask(mask: Tensor | None, rows: Any, columns: Any) -> Tensor | None:
    """Some rows of the batch and some keys of a mask that may have one of either."""
    if mask is None:
        return None
    if mask.ndim == 4 and mask.shape[0] > 1:
        mask = mask[rows]
    return mask[..., columns] if mask.shape[-1] > 1 else mask


# -------------------- joint_additions.py --------------------

# Joint attention with a module's additions (additions.py): with two texts, and with changed scores of the text's keys.
#
# The image's queries see each key of the text with `taca` and `words`; the text's own queries see none of it.

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


# (query, key, value, mask, how many are text, whether a boolean mask leaves out text alone) -> joint attention
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, int, bool], Tensor]


def attend_jointly_with_additions(
    module: Any,
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_length: int,
    text_first: bool,
    mask: Tensor | None,
    only_text_is_masked: bool,
) -> Tensor:
    """As joint.py's `attend_jointly`; attend: that without additions, by the module's operator."""
    told, length = module.pladis_teller.told, query.shape[2]
    count = negative_count(module)
    text, image = text_and_image(length, text_length, text_first)
    prompt, rest = slice(text.start, text.stop - count), slice(text.stop - count, text.stop)
    if mask is not None and count:
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        mask = shown_in(mask, told, rest, query.shape[0])
    sequence = _Sequence(module, attend, (query, key, value, mask), text_first, only_text_is_masked, text_length)
    if not count:
        return sequence.attended([prompt], image)
    rows = slice(told.start, None)
    if "vsf" in module.pladis_additions:
        of_prompt, of_rest = sequence.of_text(prompt, image), sequence.of_text(rest, image, rows)
        _, of_image = _text_and_image(sequence.attended([prompt, rest], image, turned=rest), text_length, text_first)
    else:
        regional = "regions" in module.pladis_additions
        of_prompt, of_image = _text_and_image(sequence.attended([prompt], image), text_length - count, text_first)
        seen = _seen(module, image, count, text_first) if regional else None
        of_rest, to_rest = _text_and_image(sequence.attended([rest], image, rows, seen=seen), count, text_first)
        of_image = (in_regions if regional else led_rows)(module, of_image, to_rest)
    if told.start:  # what CFG's rows without a prompt have there is read by nobody
        of_rest = torch.cat([of_rest.new_zeros(told.start, *of_rest.shape[1:]), of_rest])
    texts = [of_prompt, of_rest]
    return torch.cat([*texts, of_image] if text_first else [of_image, *texts], dim=2)


def _text_and_image(output, text_length, text_first):
    return [output[:, :, part] for part in text_and_image(output.shape[2], text_length, text_first)]


def _seen(module, image, count, text_first):
    """(tokens, tokens) bool of regional prompts and image: a region's see themselves and their part of the image."""
    area = seen_by_regions(module, image.stop - image.start)  # (texts' tokens, image's tokens)
    place = torch.arange(count, device=area.device)
    ends = torch.tensor(module.pladis_teller.told.lengths, device=area.device).cumsum(0)
    region = torch.searchsorted(ends, place, right=True)
    same, image_to_image = region[:, None] == region, area.new_ones(area.shape[1], area.shape[1])
    if text_first:
        return torch.cat([torch.cat([same, area], dim=1), torch.cat([area.T, image_to_image], dim=1)])
    return torch.cat([torch.cat([image_to_image, area.T], dim=1), torch.cat([area, same], dim=1)])


class _Sequence:
    """The tokens of a joint attention, of which it attends to some. tensors: query, key, value and mask."""

    def __init__(self, module: Any, attend: Attend, tensors: Any, text_first: bool, text_alone: bool, length: int):
        self.module, self.attend, self.tensors = module, attend, tensors
        self.text_first, self.text_alone = text_first, text_alone
        self.kinds = kinds_told(module, length)

    def attended(
        self,
        texts: list[slice],
        image: slice,
        rows: slice = slice(None),
        turned: slice | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Joint attention among these texts and the image, in their order. turned: the text that VSF turns, if any.

        seen: (tokens, tokens) bool among them, which leaves out no token of the image to another; None for all.
        """
        order = self._order(texts, image)
        query, key, value = self._tokens(order, rows)
        mask = self._mask(rows, order, order)
        text_alone = self.text_alone or mask is None
        if seen is not None:
            mask = seen[None, None] if mask is None else within(mask, seen)
        length = sum(part.stop - part.start for part in texts)
        at_text = slice(0, length) if self.text_first else slice(key.shape[2] - length, key.shape[2])
        more, bias = self._of_image_to_text(texts, image, rows, turned, key, value, at_text)
        if more is None and bias is None:
            return self.attend(query, key, value, mask, length, text_alone)
        key, value = more or (key, value)
        output = self.attend(query, key, value, mask if bias is None else with_bias(mask, bias), length, text_alone)
        if turned is not None:  # whose rows are not its own
            return output
        _, of_image = _text_and_image(output, length, self.text_first)
        of_text = self.of_text(texts[0], image, rows, seen)
        return torch.cat([of_text, of_image] if self.text_first else [of_image, of_text], dim=2)

    def of_text(self, text: slice, image: slice, rows: slice = slice(None), seen: Tensor | None = None) -> Tensor:
        """Dense attention of a text's queries to itself and the image. seen: as `attended` has it."""
        order = self._order([text], image)
        query, key, value = self._tokens(order, rows)
        query, mask = self.tensors[0][rows, :, text], self._mask(rows, [text], order)
        if seen is not None:
            count = text.stop - text.start
            seen = seen[:count] if self.text_first else seen[-count:]
            mask = seen[None, None] if mask is None else within(mask, seen)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        return dense_attention(query, key, value, mask)

    def _order(self, texts, image):
        return [*texts, image] if self.text_first else [image, *texts]

    def _tokens(self, order, rows):
        return [torch.cat([tensor[rows, :, part] for part in order], dim=2) for tensor in self.tensors[:3]]

    def _mask(self, rows, queries, keys):
        mask = self.tensors[3]
        if mask is None:
            return None
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        if mask.shape[2] > 1:
            mask = torch.cat([mask[:, :, part] for part in queries], dim=2)
        if mask.shape[3] > 1:
            mask = torch.cat([mask[..., part] for part in keys], dim=3)
        return part_of_mask(mask, rows, slice(None))

    def _of_image_to_text(self, texts, image, rows, turned, key, value, at_text):
        """((key, value) or None, bias over all keys or None) as the image's queries see them."""
        module, more, bias = self.module, None, None
        keys = key.shape[2]
        before = 0 if self.text_first else keys - (at_text.stop - at_text.start)
        after = keys - at_text.stop
        if "taca" in module.pladis_additions:
            gain = torch.ones(keys, dtype=torch.float32, device=key.device)
            gain = torch.where(_inside(keys, at_text, key.device), module.number("gamma"), gain)
            more = (key * gain[:, None]).to(key.dtype), value
        if "words" in module.pladis_additions:
            assert self.kinds is not None
            start = 0 if self.text_first else image.stop  # the text's place in the whole sequence
            kinds = torch.cat([self.kinds[rows, part.start - start : part.stop - start] for part in texts], dim=1)
            bias = F.pad(words_bias(module, kinds), (before, after))
        if turned is not None:
            count = turned.stop - turned.start
            first = at_text.stop - count
            key, value = more or (key, value)
            parts = [
                value[:, :, :first],
                flipped(module, value[:, :, first : at_text.stop]),
                value[:, :, at_text.stop :],
            ]
            more = key, torch.cat(parts, dim=2)
            own = F.pad(negative_bias(module, value.shape[0]), (first, after))
            bias = own if bias is None else bias + own
        return more, bias


def _inside(length, part, device):
    place = torch.arange(length, device=device)
    return (place >= part.start) & (place < part.stop)


# -------------------- history.py --------------------

# What "anderson_history" keeps of the denoising step before: Anderson acceleration over true iterates (GAG, eq. 6).
#
# GAG 3.5: one attention layer has no history, "the missing F(x_{k-1}) must be approximated by a proxy". Over denoising
# steps there is one: each module keeps its query x and its T_s(x) of the step before, and weighs both by the least
# squares of their residuals T_s(x) - x, m = 1.
#
# The model says before each call at what timestep it is, and in which of the calls of a step that a pipeline names
# (`cache_context`, where CFG takes two); in a batch of two each row has its own history. Where the timestep does not fall
# a run begins, which knows nothing of the one before. A second call at the same timestep, of a scheduler of second order
# or of a weakened guidance branch, neither has a history nor becomes one; nor does a step at which a schedule has the
# operator switched off. All of it is tensors written in place, so a compiled graph stays whole; it is compiled a second
# time when the first tensors are there.
#
# Costs two tensors of the output's size for each module and each call of a step, in its dtype. Nothing of it is saved.

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


_MOST_KINDS = 4  # of calls, by name and shape, whose last step is kept


class Clock:
    """When and in which call of a step a model is, for all modules of the model that keep a history.

    place, name: where among the arguments of forward() its timestep stands, and what it is called there; rises: that it
    does while noise falls.
    """

    def __init__(self, place: int, name: str = "timestep", rises: bool = False) -> None:
        self.place, self.name, self.rises = place, name, rises
        self.timestep: Tensor | None = None  # float32, no dimensions
        self.call: str | None = None

    def __call__(self, model: nn.Module, arguments: tuple, named: Mapping[str, Any]) -> None:
        """Take the time from a call's arguments: a forward_pre_hook of the model."""
        timestep = named[self.name] if self.name in named else arguments[self.place]
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, dtype=torch.float32)
        timestep = timestep.detach().to(torch.float32).amax()
        self.timestep = -timestep if self.rises else timestep


class History:
    """What one module keeps: {(call of a step, shape): (query, output, timestep)}. clock: its model's."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock(0)
        self.kept: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}

    def accelerated(self, query: Tensor, output: Tensor, scale: Tensor, unit: Unit) -> Tensor:
        """T_s of this step, `output`, moved to Anderson's combination with that of the step before; keeps both.

        query: the attention's query, x; output: (batch, heads, queries, head_dim), both. scale: how far it is moved, 0
        is not at all. unit: what shares its weights. Returns `output` where nothing says at what timestep the model is.
        """
        if self.clock.timestep is None:
            return output
        now = self.clock.timestep.to(output.device)
        kind = (self.clock.call, tuple(output.shape))
        kept = self.kept.get(kind)
        if kept is None or kept[1].device != output.device or kept[1].dtype != output.dtype:
            kept = (torch.zeros_like(query), torch.zeros_like(output), torch.full_like(now, float("-inf")))
            while len(self.kept) >= _MOST_KINDS:
                del self.kept[next(iter(self.kept))]
            self.kept[kind] = kept
        query_before, output_before, before = kept
        exact, exact_before = output.float(), output_before.float()
        share = share_of_before(query.float(), exact, query_before.float(), exact_before, unit)
        moved = exact + scale.to(output.device) * share * (exact_before - exact)
        moved = torch.where(now < before, moved, exact).to(output.dtype)
        with torch.no_grad():
            again = now == before
            query_before.copy_(torch.where(again, query_before, query))
            output_before.copy_(torch.where(again, output_before, output))
            before.copy_(torch.where(scale.to(now.device) == 0.0, float("-inf"), now))
        return moved


# -------------------- hooks.py --------------------

# What hooks of diffusers and accelerate keep of a live module: its forward(), copies of its tensors, a device.
#
# They take it when they are put on, so a class or a buffer that changes later has to reach it.

import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn



def arguments_of(method: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """{name: value} of what a method, as its class has it, is called with behind self."""
    names = list(inspect.signature(method).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def change_class(module: nn.Module, new: type) -> None:
    """Give a live module another class, and whatever keeps its bound forward() that of the new class."""
    old = type(module).forward
    module.__class__ = new
    rebind_forward(module, old, types.MethodType(new.forward, module))


def offloaded_to(model: nn.Module, modules: Iterable[nn.Module]) -> str | None:
    """Where the buffers of patched modules are offloaded, so that writes are lost: "to disk" and so on; None if not."""
    if any(module.pladis_alpha.is_meta for module in modules):
        return "to the meta device"
    for group in _groups(model):
        copied = {**group.cpu_param_dict, **getattr(group, "tensor_to_key", {})}
        if any(module.pladis_alpha in copied for module in modules):
            return "to disk" if group.offload_to_disk_path else "through a stream"
    return None


def misses_new_buffers(model: nn.Module, modules: Iterable[nn.Module]) -> bool:
    """Whether an offloading hook would fail on buffers that these modules get now, or put older ones in their place."""
    streamed = [part for group in _groups(model) if group.cpu_param_dict for part in group.modules]
    aligned = [(owner, hook) for owner in model.modules() for hook in _alignments(owner) if hook.offload_buffers]
    streamed += [owner for owner, hook in aligned if hook.place_submodules]
    found = {module for owner in streamed for module in owner.modules()} | {owner for owner, _ in aligned}
    return not found.isdisjoint(modules)


def forget_buffers(model: nn.Module, names: Collection[str]) -> None:
    """Tell accelerate's offloading that the buffers of these names are gone: it would want to put them back."""
    for module in model.modules():
        for hook in _alignments(module):
            hook.original_devices = {
                path: device for path, device in hook.original_devices.items() if path.rpartition(".")[2] not in names
            }


def execution_device(module: nn.Module) -> torch.device | None:
    """The device that an offloading hook in a module computes on; None without one."""
    groups = (group.onload_device for group in _groups(module))
    aligned = (
        getattr(hook, "execution_device", None) for part in module.modules() for hook in hooks_of_accelerate(part)
    )
    return next((device for device in (*groups, *aligned) if device is not None), None)


def _groups(model):
    """diffusers' groups of modules that are offloaded together."""
    for module in model.modules():
        for hook in hooks_of_diffusers(module):
            if hasattr(hook, "group"):
                yield hook.group


def _alignments(module):
    """The hooks of accelerate on a module that offload it tensor by tensor."""
    return [hook for hook in hooks_of_accelerate(module) if getattr(hook, "offload", False)]


# -------------------- schedule.py --------------------

# Hyperparameters that change from one denoising step to the next, as a pipeline's `callback_on_step_end`.
#
# A schedule is plain data beside an operation, {"steps": [5, 20]} and the like:
#
#     steps     [first, end]   the operator acts from step `first` up to, not including, step `end` (null: to the last)
#     fraction  [from, to]     the same as parts of all steps: step i of n lies in it if from <= i/n < to
#     sigma     [low, high]    the operator acts while the noise level of the model's input lies in [low, high]
#     <name>    [v0, v1, ...]  values of a hyperparameter: one for each step, or stretched evenly over any number of steps
#
# Steps are those that `num_inference_steps` asks for, counted from 0 at the most noise. A run that leaves some out keeps
# their numbers: from an image of strength 0.5, 10 steps begin at step 5; with `denoising_end` 0.5 they end with step 4.
# A scheduler of second order calls the model twice a step: both calls are that step.
#
# A step must lie in every window that is named; outside, attention is dense. Values are written into the modules'
# buffers between two calls of the model, so a compiled graph stays whole and is not compiled again.

import functools
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

Window = Literal["steps", "fraction", "sigma"]
WINDOWS: tuple[Window, ...] = get_args(Window)


def schedule_problems(schedule: object, operator: str) -> list[tuple[str | None, str]]:
    """What is wrong with a schedule for an operator or addition: [(key or None, message)]; empty if nothing is."""
    if not isinstance(schedule, dict) or not schedule:
        return [(None, f"must name {', '.join(WINDOWS)} or a hyperparameter, with a list each")]
    problems = []
    for key, values in schedule.items():
        if key not in WINDOWS and key not in OPERATIONS[operator].defaults:
            known = ", ".join((*WINDOWS, *OPERATIONS[operator].defaults))
            problems.append((key, f"is no window and no hyperparameter of {operator}; there are {known}"))
        elif not isinstance(values, (list, tuple)) or not values:
            problems.append((key, f"must be a list, not {values!r}"))
        elif key in WINDOWS:
            problems += [(key, message) for message in window_problems(key, values)]
        else:
            wrong = [problem for value in values if (problem := value_problem(key, value))]
            problems += [(key, problem) for problem in wrong[:1]]
    return problems


def stored_schedule(schedule: Mapping[str, Sequence]) -> dict[str, list]:
    """A copy of a schedule as a config holds it: lists, and the largest number in place of infinity."""
    return {
        key: [LARGEST if value is not None and value > LARGEST else value for value in values]
        for key, values in schedule.items()
    }


def window_problems(key: Window, values: Sequence) -> list[str]:
    """What is wrong with a window, [from, to], of one of WINDOWS; empty if nothing is."""
    if len(values) != 2:
        return [f"must be two numbers, from and to, not {len(values)}"]
    low, high = values
    if key == "steps":
        if not _is_count(low) or not (high is None or _is_count(high)):
            return [f"must be two step numbers of 0 or above (the second may be null), not {list(values)!r}"]
        return [] if high is None or low < high else [f"must rise: {low} to {high} holds no step"]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return [f"must be two numbers, not {list(values)!r}"]
    if not 0 <= low < high or math.isinf(low) or (key == "fraction" and high > 1):
        return [f"must rise from 0 or above{' to at most 1' if key == 'fraction' else ''}, not {list(values)!r}"]
    return []


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def step_values(
    schedule: dict[str, list], operator: str, step: int, steps: int, sigma: float | None = None
) -> dict[str, float]:
    """The hyperparameters that a schedule sets at `step` (from 0) of `steps`: {name: float}; others stay as they are.

    sigma: the noise level; needed where the schedule has a window of it.
    """
    if not is_inside(schedule, step, steps, sigma):
        return dict(OPERATIONS[operator].off)
    lists = {name: values for name, values in schedule.items() if name not in WINDOWS}
    return {name: float(values[step * len(values) // steps]) for name, values in lists.items()}


def is_inside(windows: dict[str, list], step: int, steps: int, sigma: float | None = None) -> bool:
    """Whether `step` (from 0) of `steps` lies in every window of a schedule; sigma: its noise level, as there."""
    inside = True
    for key in WINDOWS:
        if key in windows:
            low, high = windows[key]
            position = {"steps": step, "fraction": step / steps, "sigma": sigma}[key]
            # An end that was infinite is stored as LARGEST, and pure noise is an infinite level.
            below_end = position <= high or high >= LARGEST if key == "sigma" else high is None or position < high
            inside = inside and low <= position and below_end
    return inside


class StepSchedule:
    """Carries out the schedules of a model's modules, or of several models', in one run of their pipeline.

    It is a `callback_on_step_end`:

        with StepSchedule(pipe, pipe.unet) as callback:
            pipe(prompt, num_inference_steps=25, callback_on_step_end=callback)

    The first call's values are set when it is made, and again when the pipeline sets its scheduler. After the last
    step, or on leaving the block, every buffer is as it was. steps, timesteps: taken, but not needed: the scheduler
    tells them. then: another callback_on_step_end to call after it.
    Raises ValueError where no module has a schedule, the buffers are offloaded to the meta device, or a window of sigma
    meets a scheduler that tells no noise level.
    """

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        model: nn.Module | Iterable[nn.Module],
        steps: int | None = None,
        then: Callable | None = None,
        timesteps: list | None = None,
    ):
        models = [model] if isinstance(model, nn.Module) else list(model)
        self._modules: list[Any] = [part for own in models for part in own.modules() if schedules_of(part)]
        self._then = then
        if not self._modules:
            raise ValueError("no module of this model has a schedule")
        if where := next(filter(None, (offloaded_to(own, self._modules) for own in models)), None):
            raise ValueError(
                f"a schedule cannot change buffers that are offloaded {where}; use "
                "enable_model_cpu_offload() instead of sequential or group offload of buffers"
            )
        self._needs_sigma = any("sigma" in own for module in self._modules for _, own in schedules_of(module))
        self._before = [module.hyperparameters() for module in self._modules]
        self._watched = []
        scheduler = pipeline.scheduler
        if getattr(scheduler, "timesteps", None) is not None:
            self._set(scheduler, 0)
        # No callback comes before the first call of the model. A pipeline that may begin late asks itself where.
        self._watch(scheduler, "set_timesteps", lambda _: self._set(scheduler, 0))
        if hasattr(pipeline, "get_timesteps"):
            self._watch(
                pipeline,
                "get_timesteps",
                lambda found: self._set(scheduler, len(scheduler.timesteps) - len(found[-2])),
            )

    def __call__(self, pipeline, step, timestep, tensors):
        """Set the values of the call after the one at `timestep`; returns `tensors`, as diffusers wants."""
        scheduler = pipeline.scheduler
        count = len(scheduler.timesteps)
        # Fewer where the run begins late, from an image of some strength, or ends early, with denoising_end.
        run = getattr(pipeline, "num_timesteps", None) or count
        index = getattr(scheduler, "step_index", None)  # of the next call
        if index is None:
            index = index_of(scheduler, timestep, count - run + step, step) + 1
        if step + 1 < run and index < count:
            self._set(scheduler, index)
        else:
            self.restore()
        return self._then(pipeline, step, timestep, tensors) if self._then else tensors

    def restore(self) -> None:
        """Put back the hyperparameters that the modules had before."""
        for module, values in zip(self._modules, self._before, strict=True):
            module.set_hyperparameters(values)
        for holder, name in self._watched:
            vars(holder).pop(name, None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.restore()

    def _watch(self, holder, name, then):
        """Have then(result) called after each call of a method."""
        method = getattr(type(holder), name)

        @functools.wraps(method)
        def watched(self, *args, **kwargs):
            result = method(self, *args, **kwargs)
            if self is holder:  # not a copy of it
                then(result)
            return result

        setattr(holder, name, types.MethodType(watched, holder))
        self._watched.append((holder, name))

    def _set(self, scheduler, index):
        step, steps = step_at(scheduler, index)
        sigma = sigma_at(scheduler, index) if self._needs_sigma else None
        for module, before in zip(self._modules, self._before, strict=True):
            for name, schedule in schedules_of(module):
                before = {**before, **step_values(schedule, name, step, steps, sigma)}
            module.set_hyperparameters(before)


def schedules_of(module: nn.Module) -> list[tuple[str, dict[str, list]]]:
    """[(operator or addition, its schedule)] of a module, where it has any."""
    own = [(getattr(module, "pladis_operator", ""), getattr(module, "pladis_schedule", None))]
    own += getattr(module, "pladis_additions", {}).items()  # copies of older code have none
    return [(name, schedule) for name, schedule in own if schedule]


def index_of(scheduler: "SchedulerMixin", timestep: float | Tensor, *counted: int) -> int:
    """Where among a scheduler's timesteps the model's call at `timestep` stands, for a scheduler that does not tell.

    counted: where it may be by count, the likeliest first: which it is of several equal ones, or if there is none.
    """
    timestep = float(timestep.flatten()[0] if hasattr(timestep, "flatten") else timestep)
    places = [index for index, value in enumerate(scheduler.timesteps.tolist()) if value == timestep]
    return next((index for index in counted if index in places), (places or counted)[0])


def step_at(scheduler: "SchedulerMixin", index: int) -> tuple[int, int]:
    """(step from 0, how many were asked for) of the model's call at an index of a scheduler's timesteps."""
    calls, order = len(scheduler.timesteps), getattr(scheduler, "order", 1)
    asked: Any = getattr(scheduler, "num_inference_steps", None)
    if order > 1:
        return index // order, -(-calls // order)  # the last step is of first order
    if hasattr(scheduler, "prk_timesteps"):  # PNDM: four calls for each of its first three steps, or two for the first
        four = len(scheduler.prk_timesteps)
        return (index // 4 if index < four else max(index - max(four * 3 // 4, 1), 0)), asked
    return index, asked if asked == calls - 1 else calls  # SCM's last timestep is the end, not a call


def sigma_at(scheduler: "SchedulerMixin", index: int) -> float:
    """The noise level at an index of a scheduler's timesteps, noise over signal: of its sigmas, else of its alphas."""
    sigmas, timesteps = getattr(scheduler, "sigmas", None), scheduler.timesteps
    between = getattr(scheduler, "order", 1) == 2 and index % 2 and timesteps[index] != timesteps[index + 1]
    if sigmas is not None and len(sigmas) >= len(timesteps) and not between:
        return float(sigmas[index])
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} tells no noise level; use a window of steps or fraction instead")
    # KDPM2's second calls lie between two sigmas, at a timestep that is no whole number.
    alphas, timestep = scheduler.alphas_cumprod, float(timesteps[index])
    low, part = int(timestep), timestep % 1
    level = _sigma_of_alpha(float(alphas[low]))
    return level * (_sigma_of_alpha(float(alphas[low + 1])) / level) ** part if part else level


def _sigma_of_alpha(alpha_cumprod):
    return math.sqrt(max(0.0, 1.0 - alpha_cumprod) / alpha_cumprod) if alpha_cumprod > 0.0 else math.inf


# -------------------- module.py --------------------

# What every patched attention module is: a diffusers module whose class was changed, with float32 buffers added.
#
# It is made from a live module by changing the class of that very object and registering buffers. So nothing that holds
# the module loses it: parents, LoRA layers, quantised Linears, IP-Adapter processors, offload and forward hooks, compiled
# blocks. Taking the buffers away and setting the class back is the exact inverse.

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn


_BUFFERS_OF = {operator: tuple(f"pladis_{name}" for name in own.defaults) for operator, own in OPERATORS.items()}
SELF_ATTENTION = "self-attention"  # an operation's `replace`, where that is what it replaces
BUFFERS = tuple(f"pladis_{name}" for name in HYPERPARAMETERS)  # "scale" alone would clash with Attention.scale


class PladisModule(KeepsFloat32, nn.Module if TYPE_CHECKING else object):
    """The part that all patched modules share; it stands before the diffusers class among a class's bases.

    Buffers `pladis_alpha`, `pladis_temperature` and those that the operator has besides (`pladis_scale`, the papers'
    lambda, and so on): float32 scalars that stay float32 under .half(), .to(dtype) and
    from_pretrained(torch_dtype=...). Change them in place (`fill_`, `surgery.tune`): a compiled graph need not be
    compiled again. `pladis_schedule`: how they change over the denoising steps (schedule.py), or None.
    `pladis_additions`: {name of one of ADDITIONS: its schedule or None}, whose hyperparameters are buffers likewise.

    A class has: `stock`, the diffusers class that it is made from; `kind`, "cross" or "joint"; `processors`, the names
    of the processors whose computation its forward() replaces; `own_refusal(module)`; `takes_self_attention`, that it
    computes self-attention too, as an experiment that has to be asked for; and forward().
    """

    stock: Any = None
    kind = "cross"
    processors: tuple[str, ...] = ()
    takes_self_attention = False
    float32_buffers = BUFFERS
    heads: int  # as the diffusers classes have them
    processor: Any
    pladis_operator: OperatorName
    pladis_unit: Unit
    pladis_schedule: dict[str, list] | None
    pladis_replace: str | None
    pladis_implementation: Implementation
    pladis_history: History | None
    pladis_additions: dict[AdditionName, dict[str, list] | None]
    pladis_teller: Teller  # its model's, where it has additions

    @classmethod
    def own_refusal(cls, module: nn.Module) -> str | None:
        """Why a module of the stock class and with one of the processors cannot be converted; None if it can."""
        return None

    @classmethod
    def refusal(cls, module: nn.Module, self_attention: bool = False) -> str | None:
        """Why `module` cannot be converted, as one sentence; None if it can.

        self_attention: that it is asked for as the experiment of PLADIS, Fig. 3, which destroys images.
        """
        if type(module) is not cls.stock:
            return f"{type(module).__name__} is not diffusers' {cls.stock.__name__} class"
        if self_attention:
            reason = cls.self_attention_refusal(module)
        else:
            reason = cls.own_refusal(module) or (split_sequence(module) if cls.kind == "joint" else None)
        if reason:
            return reason
        processor = type(module.processor).__name__
        if processor not in cls.processors:
            return (
                f"its processor {processor} computes attention in its own way, which PLADIS would replace; "
                "go back to the model's default processor first"
            )
        return None

    @classmethod
    def self_attention_refusal(cls, module: nn.Module) -> str | None:
        """Why a module of the stock class cannot be converted as self-attention; None if it can."""
        if cls.kind == "joint":
            return "its self-attention is one softmax with that to the text, of which image to image stays dense"
        if not cls.takes_self_attention:
            return f"{cls.__name__} does not compute self-attention, whose queries and keys turn by their place"
        return "it is no self-attention" if module.is_cross_attention else None

    @classmethod
    def convert(
        cls,
        module: nn.Module,
        operator: OperatorName = "pladis",
        *,
        unit: Unit = "head",
        schedule: dict[str, list] | None = None,
        replace: str | None = None,
        implementation: Implementation = "auto",
        device: torch.device | None = None,
        **hyperparameters: float,
    ) -> Self:
        """Turn a live module of the stock class into this class in place and return it; parameters are not touched.

        hyperparameters: the operator's own; what is left out takes its default. replace: "self-attention" for that
        experiment. device: of the buffers; that of the parameters unless given.
        Raises ValueError for a module that `refusal` names a reason against, an unknown operator, unit, hyperparameter
        or implementation.
        """
        reason = cls.refusal(module, replace == SELF_ATTENTION)
        if reason:
            raise ValueError(reason)
        setting = {"operator": operator, **hyperparameters, **({} if unit == "head" else {"unit": unit})}
        for problem in (*setting_problems(setting), unknown_name("implementation", implementation, IMPLEMENTATIONS)):
            if problem:
                raise ValueError(problem)
        if schedule is not None:
            for key, message in schedule_problems(schedule, operator):
                raise ValueError(f"schedule{f'.{key}' if key else ''} {message}")
        if device is None:
            device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
        change_class(module, cls)
        assert isinstance(module, cls)
        module.pladis_operator, module.pladis_unit = operator, unit
        module.pladis_schedule = None if schedule is None else stored_schedule(schedule)
        module.pladis_implementation, module.pladis_replace = implementation, replace
        module.pladis_history = History() if OPERATORS[operator].keeps else None
        module.pladis_additions, module.pladis_teller = {}, Teller()
        module._register_numbers(whole_setting(setting), device)
        return module

    def _register_numbers(self, setting, device):
        for name in (key for key in setting if key not in ("operator", "unit")):
            # No device given on the meta device's behalf: diffusers builds models there and loads the buffers after.
            self.register_buffer(f"pladis_{name}", torch.tensor(setting[name], dtype=torch.float32, device=device))

    def add(self, name: AdditionName, schedule: dict[str, list] | None = None, **hyperparameters: float) -> None:
        """Give this module one of ADDITIONS, which fits it (configs.py, addition_problems).

        hyperparameters, schedule: its own, as in `convert`; raises ValueError as that.
        """
        setting = {"operator": name, **hyperparameters}
        for problem in setting_problems(setting):
            raise ValueError(problem)
        for key, message in () if schedule is None else schedule_problems(schedule, name):
            raise ValueError(f"schedule{f'.{key}' if key else ''} {message}")
        self.pladis_additions[name] = None if schedule is None else stored_schedule(schedule)
        self._register_numbers(whole_setting(setting), self.pladis_alpha.device)

    def revert(self) -> nn.Module:
        """Turn this very object back into what it was, and return it."""
        for name in self._number_names():
            del self._buffers[f"pladis_{name}"]
        for name in ("operator", "unit", "schedule", "implementation", "replace", "history", "additions", "teller"):
            delattr(self, f"pladis_{name}")
        change_class(self, self.stock)
        return self

    def hyperparameters(self) -> dict[str, float]:
        """{name: float} of all hyperparameters, the additions' too, each the shortest float for its float32 value."""
        return {name: shortest_float(self.number(name)) for name in self._number_names()}

    def _number_names(self):
        own = (OPERATORS[self.pladis_operator], *(ADDITIONS[name] for name in self.pladis_additions))
        return [name for part in own for name in part.defaults]

    def set_hyperparameters(self, values: dict[str, float]) -> None:
        """Write hyperparameters, {name: float}, into the buffers in place."""
        for name, value in values.items():
            self.number(name).fill_(min(float(value), LARGEST))

    def setting(self) -> dict[str, Any]:
        """All that the operator is, as a config says it: with its unit, and self-attention and a schedule if any."""
        setting = self._setting_of(self.pladis_operator, OPERATORS[self.pladis_operator])
        if OPERATORS[self.pladis_operator].projects:
            setting["unit"] = self.pladis_unit
        if self.pladis_replace is not None:
            setting["replace"] = self.pladis_replace
        return setting if self.pladis_schedule is None else {**setting, "schedule": self.pladis_schedule}

    def addition_settings(self) -> list[dict[str, Any]]:
        """All that its additions are, as a config says them."""
        return [
            {**self._setting_of(name, ADDITIONS[name]), **({} if schedule is None else {"schedule": schedule})}
            for name, schedule in self.pladis_additions.items()
        ]

    def _setting_of(self, name, own):
        return {"operator": name, **{key: shortest_float(self.number(key)) for key in own.defaults}}

    def extra_repr(self) -> str:
        """As print(model) shows it: the operator, what its hyperparameters are now, its unit and schedule."""
        parts = [super().extra_repr(), self.pladis_operator]
        for name in self._number_names():
            buffer = self.number(name)
            held = type(buffer) is torch.Tensor and not buffer.is_meta  # not where a compiler stands in for its value
            parts.append(f"{name}={shortest_float(buffer) if held else '?'}")
        more = {"unit": self.pladis_unit if OPERATORS[self.pladis_operator].projects else None}
        more |= {"replace": self.pladis_replace, "schedule": self.pladis_schedule}
        more |= {"additions": self.pladis_additions or None}
        parts += [f"{name}={value!r}" for name, value in more.items() if value is not None]
        return ", ".join(filter(None, parts))

    def set_processor(self, processor: object) -> None:
        """As the stock class's, but a processor with an attention of its own is refused, not ignored."""
        self.check_processor(processor)
        super().set_processor(processor)

    def check_processor(self, processor: object) -> None:
        """Raises ValueError for a processor with an attention of its own, which forward() would not run."""
        name = type(processor).__name__
        if name not in self.processors:
            raise ValueError(
                f"{type(self).__name__} computes attention itself and cannot run {name}; call surgery.unpatch(pipe) "
                "first"
            )

    def fuse_projections(self, *args: object, **kwargs: object) -> None:
        """Nothing: a fused projection goes stale when it is unfused, and forward() reads the separate ones."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, qk_scale: float | None = None
    ) -> Tensor:
        """`attention` by this module's operator. query: (batch, heads, queries, head_dim); the others as there."""
        query, key, value = of_one_dtype(query, key, value)
        key, value = fitting(query, key, value, mask)
        factor = query.shape[3] ** -0.5 if qk_scale is None else qk_scale
        if self.pladis_additions:
            return attend_with_additions(self, query, key, value, mask, factor)
        output, _ = attention_by(
            self.pladis_implementation,
            query,
            key,
            value,
            mask,
            self.hyperparameter_tensors(),
            self.pladis_operator,
            self.pladis_unit,
            factor,
            False,
        )
        return self.accelerated(query, output)

    def accelerated(self, query: Tensor, output: Tensor) -> Tensor:
        """An attention's output, by the history of an operator that keeps one; else as it is. Shapes as `attend`."""
        if self.pladis_history is None:
            return output
        return self.pladis_history.accelerated(query, output, self.number("scale"), self.pladis_unit)

    def number(self, name: str) -> Tensor:
        """A hyperparameter's buffer, a scalar in float32."""
        buffer = self._buffers[f"pladis_{name}"]
        assert buffer is not None
        return buffer

    def _split_heads(self, projected):
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, length, head_dim)

    def _merge_heads(self, output, like):
        """(batch, heads, length, head_dim) as (batch, length, channels), in the dtype of `like`."""
        output = output.transpose(1, 2).flatten(2)
        return output if output.dtype == like.dtype else output.to(like.dtype)

    def _mask_per_head(self, attention_mask, text):
        """An additive mask (batch, 1 or queries, keys) as (batch, 1 or heads, 1 or queries, keys); None as it is."""
        if attention_mask is None:
            return None
        batch, keys, _ = text.shape
        if attention_mask.ndim == 3 and attention_mask.shape[0] == batch and attention_mask.shape[2] == keys:
            return attention_mask.unsqueeze(1)
        attention_mask = self.prepare_attention_mask(attention_mask, keys, batch)  # one of each head, as diffusers does
        return attention_mask.view(batch, self.heads, -1, attention_mask.shape[-1])

    def hyperparameter_tensors(self) -> list[Tensor]:
        """The operator's hyperparameters, the buffers themselves, in the order of OPERATORS."""
        buffers: Any = self._buffers
        return [buffers[name] for name in _BUFFERS_OF[self.pladis_operator]]


def is_pladis(module: nn.Module) -> bool:
    """Whether `module` is a patched attention module, of this file or of any other copy of it.

    By its buffers: diffusers runs a shipped file anew at every load, and each time makes classes of the same name.
    """
    return "pladis_alpha" in module._buffers and "pladis_temperature" in module._buffers


def split_sequence(module: nn.Module) -> str | None:
    """Why joint attention cannot run under context parallelism, where that is switched on; else None."""
    if not is_context_parallel(module.processor):
        return None
    return "context parallelism splits its sequence over devices, and the operator needs all of the text; switch it off"


def warn_of_unknown(keywords: dict[str, Any]) -> None:
    """Log that keyword arguments of a call (cross_attention_kwargs, joint_attention_kwargs) mean nothing here."""
    if keywords:
        from diffusers.utils import logging  # here, as the operators alone do without diffusers

        names = ", ".join(sorted(keywords))
        logging.get_logger(__name__).warning(f"attention arguments {names} mean nothing here; ignored")


def shortest_float(tensor: Tensor) -> float:
    """The float32 scalar as the Python float of fewest digits that rounds to it: 1.3, not 1.2999999523162842."""
    value = tensor.float()
    for digits in range(1, 10):
        candidate = float(f"{value.item():.{digits}g}")
        if torch.tensor(candidate, dtype=torch.float32) == value.cpu():
            return candidate
    return value.item()


# -------------------- joint.py --------------------

# Joint attention (MMDiT): an operator where image queries meet text keys, in a sequence that holds both.
#
# With p the dense map over all keys, an image query's share of text is m = sum of p over the text keys, and
#
#     output = sum over image keys of p V  +  m * operator(the query, the text keys)
#
# so text keeps its share of every row, the text's own queries stay dense, and scale 0 is the base model. Sparsifying the
# whole row would sparsify attention between image tokens. The papers give no formula for joint attention; this is ours.
#
# Computed in three parts that together cost one dense attention and the operator's map: image to image on the fast
# kernel, which returns its log-sum-exp, image to text by the operator's kernel, which does too, and the text's rows. Then
# m = sigmoid(lse_text - lse_image), whatever the temperature of the operator. On a GPU the operator's kernel mixes them.

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend


_JOINT_NAME = "pladis::joint_attention_v3"
_HALVES = (torch.float16, torch.bfloat16)


class _Joint(NamedTuple):
    """What a call is told beside its tensors, as in `joint_attention`; in the order in which the operator takes it."""

    operator: str
    unit: str
    qk_scale: float
    text_length: int
    text_first: bool
    only_text_is_masked: bool


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text_length: int,
    text_first: bool = True,
    operator: OperatorName = "pladis",
    unit: Unit = "head",
    mask: Tensor | None = None,
    only_text_is_masked: bool = False,
    qk_scale: float | None = None,
    implementation: Implementation = "auto",
    **hyperparameters: float | Tensor | None,
) -> Tensor:
    """Attention over text and image together, with one of OPERATORS where image queries meet text keys.

    query, key, value: (batch, heads, length, head_dim), text and image one after the other; heads of keys may be fewer,
        as in `attention`. text_length: how many tokens are text: the first ones, or with text_first=False the last.
    mask: boolean (True keeps a key) or additive, broadcastable to (batch, heads, length, length). A text key that is
        masked is none of the operator's keys either. only_text_is_masked: that it keeps every image key, which spares
        image to image the slower kernels for masks; not checked.
    operator, unit, qk_scale, implementation, hyperparameters: as in `attention`. The temperature is the text block's;
        the share of text is the dense map's at temperature 1.
    Returns (batch, heads, length, head_dim) in value's dtype. Raises as `attention`, and ValueError for a text_length
    that is not between 0 and length.
    """
    problem = choice_problem(operator, unit, implementation)
    if problem:
        raise ValueError(problem)
    if unknown := sorted(hyperparameters.keys() - OPERATORS[operator].defaults.keys()):
        raise ValueError(has_no(operator, unknown[0]))
    _check_lengths(query, key, text_length)
    settings = checked_settings(query, key, value, mask, operator, hyperparameters)
    key, value = fitting(query, key, value)
    factor = query.shape[-1] ** -0.5 if qk_scale is None else float(qk_scale)
    how = _Joint(operator, unit, factor, text_length, text_first, only_text_is_masked)
    return _joint_attention_by(implementation, query, key, value, mask, settings, how)


def attend_jointly(
    module: PladisModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_length: int,
    text_first: bool,
    mask: Tensor | None = None,
    only_text_is_masked: bool = False,
) -> Tensor:
    """`joint_attention` by the operator of a patched `module`. query: (batch, heads, length, head_dim).

    query, key and value are of one shape, but that keys may have fewer heads. Raises ValueError where context
    parallelism was switched on after the module was patched, and for a text_length that is not between 0 and length.
    """
    reason = split_sequence(module)
    if reason:
        raise ValueError(reason)
    _check_lengths(query, key, text_length)
    setting = (module.pladis_operator, module.pladis_unit, query.shape[3] ** -0.5)
    settings = module.hyperparameter_tensors()
    then = None if module.pladis_history is None else module.accelerated

    if not module.pladis_additions:  # without the closure: a call of small tensors is timed by its Python
        how = _Joint(*setting, text_length, text_first, only_text_is_masked)
        return _joint_attention_by(module.pladis_implementation, query, key, value, mask, settings, how, then)

    def attend(query, key, value, mask, text_length, only_text_is_masked):
        how = _Joint(*setting, text_length, text_first, only_text_is_masked)
        return _joint_attention_by(module.pladis_implementation, query, key, value, mask, settings, how, then)

    given = (query, key, value, text_length, text_first, mask, only_text_is_masked)
    return attend_jointly_with_additions(module, attend, *given)


def _check_lengths(query, key, text_length):
    queries, keys = query.shape[2], key.shape[2]
    if not (queries == keys and 0 <= text_length <= keys):
        raise ValueError(f"{text_length} text tokens do not fit {queries} queries and {keys} keys")


def _joint_attention_by(implementation, query, key, value, mask, settings, how, then=None):
    """By one of IMPLEMENTATIONS, of what was checked before; settings as scalar tensors in the order of OPERATORS.

    then: (query, output) -> output, of the operator's part: what keeps a history, which no node of a graph does.
    """
    query, key, value = of_one_dtype(query, key, value)
    operator, settings = of_one_step(how.operator, settings)
    if operator != how.operator:
        how = how._replace(operator=operator)
    arguments = (query, key, value, mask, settings)
    if implementation == "auto":
        if gradient_is_wanted(query, key, value, *settings):
            return _whole(*arguments, how, "reference", then)
        if is_traced(query, key, value, mask, *settings):
            if then is not None:
                return _whole(*arguments, how, "reference", then)
            return torch.ops.pladis.joint_attention_v3(*arguments, *how)
    elif implementation in ("reference", "entmax"):
        return _whole(*arguments, how, implementation, then)
    return _in_parts(*arguments, how, implementation, then)


def dense_with_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, qk_scale: float
) -> tuple[Tensor, Tensor]:
    """(softmax attention, log-sum-exp of its scores in float32) on the fastest kernel that returns both.

    mask: boolean or additive, broadcastable to the scores, or None. The log-sum-exp: (batch, heads, queries), -inf
    where every key is masked.
    """
    if query.is_cpu and query.shape[3] == value.shape[3] and query.shape[2] and key.shape[2]:
        return _dense_on_cpu(query, key, value, mask, qk_scale)
    if query.is_cuda and mask is None and query.dtype in _HALVES:
        # The kernel that the unpatched model would run: on an H100 cuDNN's, which is a third faster than flash.
        stock = fused_choice(query, key, value, qk_scale)
        if stock == SDPBackend.CUDNN_ATTENTION.value:
            return cudnn_attention(query, key, value, qk_scale)
        if stock == SDPBackend.FLASH_ATTENTION.value:
            return flash_attention(query, key, value, qk_scale)
    # No other kernel of torch's takes every mask, float32 and odd channels: our own does, at scale 0.
    off = {**OPERATORS["pladis"].defaults, **OPERATORS["pladis"].off}
    settings = [query.new_full((), number, dtype=torch.float32) for number in off.values()]
    output, lse = attention_by("auto", query, key, value, mask, settings, "pladis", "head", qk_scale, True)
    assert lse is not None
    return output, lse


def _dense_on_cpu(query, key, value, mask, qk_scale):
    if mask is None:
        return flash_attention_on_cpu(query, key, value, None, qk_scale)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    whole = mask.expand(*query.shape[:3], key.shape[2])
    output, lse = flash_attention_on_cpu(query, key, value, whole, qk_scale)
    return output, lse.masked_fill(mask.amax(-1) == float("-inf"), float("-inf"))  # where that kernel says 0


@without_autocast
def _in_parts(query, key, value, mask, settings, how, by, then=None):
    output, _ = empty_outputs(query, value, False)
    operator, unit, qk_scale, text_length, text_first, only_text_is_masked = how
    length = key.shape[2]
    if text_length == 0 or text_length == length:  # one of the two kinds of token alone: dense
        return output.copy_(dense_attention(query, key, value, mask, qk_scale))
    text_mask = image_mask = to_text_mask = None
    if mask is not None:
        text, image = text_and_image(length, text_length, text_first)
        text_mask, to_text_mask = mask_block(mask, text, slice(None)), mask_block(mask, image, text)
        image_mask = None if only_text_is_masked else mask_block(mask, image, image)
    parts = _split(text_length, text_first, query, key, value, output)
    (text_query, query), (text_key, image_key), (text_value, image_value), (text_output, image_output) = parts
    # The longest kernel first: a GPU runs it while Python launches the others.
    dense, dense_lse = dense_with_lse(query, image_key, image_value, image_mask, qk_scale)
    text_output.copy_(dense_attention(text_query, key, value, text_mask, qk_scale))
    if (
        then is None and not is_combined(operator, unit) and _kernel_joins(by, query, text_key, text_value)
    ):  # the kernel mixes both while its part is in registers
        joined = {"dense": dense, "dense_lse": dense_lse.contiguous(), "output": image_output}
        launch_by_triton(query, text_key, text_value, to_text_mask, settings, operator, unit, qk_scale, False, **joined)
        return output
    if then is None and by in ("auto", "cpp") and _is_joined_on_cpu(query, text_key, text_value, operator, unit):
        how = {"operator": operator, "unit": unit, "mask": to_text_mask, "qk_scale": qk_scale}
        fused_on_cpu(query, text_key, text_value, settings, **how, joined=(dense, dense_lse, image_output))
        return output
    arguments = (query, text_key, text_value, to_text_mask, settings, operator, unit, qk_scale, True)
    changed, changed_lse = computed(*arguments) if by == "auto" else attention_by(by, *arguments)
    changed = changed if then is None else then(query, changed)
    if image_mask is not None:  # a row without any key is zero in both, and so in whatever share
        dense_lse = dense_lse.clamp_min(torch.finfo(dense_lse.dtype).min)
    _merge(dense, dense_lse, changed, changed_lse, image_output)
    return output


def _kernel_joins(by, query, key, value):
    wanted = by == "triton" or (by == "auto" and query.is_cuda)
    return wanted and triton_refusal(query, key, value) is None


def _is_joined_on_cpu(query, key, value, operator, unit):
    chosen = query.is_cpu and not is_combined(operator, unit) and choose_implementation(query, key, value) == "cpp"
    return chosen and joins_on_cpu(query, key, value, operator, unit)


def _split(text_length, text_first, *tensors):
    """(text's part, image's part) of each tensor, (batch, heads, length, channels)."""
    image_length = tensors[0].shape[2] - text_length
    if text_first:
        return [tensor.split_with_sizes((text_length, image_length), 2) for tensor in tensors]
    return [tensor.split_with_sizes((image_length, text_length), 2)[::-1] for tensor in tensors]


def _merge(dense, dense_lse, changed, changed_lse, out):
    """Write attention over two sets of keys as one into `out`: `changed` has the share of its keys in the softmax.

    dense, changed, out: (batch, heads, queries, channels); dense_lse, changed_lse: (batch, heads, queries), not both
    infinite.
    """
    share = (changed_lse - dense_lse).sigmoid_().unsqueeze(-1)
    share = share if share.dtype == dense.dtype else share.to(dense.dtype)
    torch.lerp(dense, changed, share, out=out)


@without_autocast
def _whole(query, key, value, mask, settings, how, by, then=None):
    """The same in plain operations over all the scores at once: the definition, differentiable, and what a graph is
    decomposed into.
    """
    operator, unit, qk_scale, text_length, text_first, _ = how
    text, image = text_and_image(key.shape[2], text_length, text_first)
    dense = softmax_of_shifted(shift_by_row_max(attention_scores(query, key, mask, qk_scale)))
    output = product_of_groups(dense.to(value.dtype), value)
    if text_length == 0 or text_length == key.shape[2]:  # one of the two kinds of token alone: dense
        return output
    to_text = dense[:, :, image, text]
    named = {"operator": operator, "unit": unit, "mask": mask_block(mask, image, text), "qk_scale": qk_scale}
    arguments = (query[:, :, image], key[:, :, text], value[:, :, text], settings)
    changed, _ = reference(*arguments, **named, sparse_map=entmax_by_package if by == "entmax" else entmax_of_shifted)
    changed = changed if then is None else then(query[:, :, image], changed)
    share = to_text.sum(dim=-1, keepdim=True).to(value.dtype)
    to_image = product_of_groups(dense[:, :, image, image].to(value.dtype), value[:, :, image])
    parts = [output[:, :, text], to_image + share * changed]
    return torch.cat(parts if text_first else parts[::-1], dim=2)


def _joint_dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: Sequence[Tensor],
    operator: str,
    unit: str,
    qk_scale: float,
    text_length: int,
    text_first: bool,
    text_only: bool,
) -> Tensor:
    how = _Joint(operator, unit, qk_scale, text_length, text_first, text_only)
    return _in_parts(query, key, value, mask, list(settings), how, "auto")


def _empty_joint(query, key, value, *more):
    return empty_outputs(query, value, False)[0]


def _joint_decomposed(query, key, value, mask, settings, *how):
    return _whole(query, key, value, mask, settings, _Joint(*how), "reference")


def joint_decompositions() -> dict[Callable, Callable]:
    """{operator: plain torch function} of the joint operator, for surgery.nn.decompositions."""
    return {torch.ops.pladis.joint_attention_v3.default: _joint_decomposed}


# A process may hold several copies of this file; the first one registers.
if not hasattr(torch.ops.pladis, "joint_attention_v3"):
    _joint_operator = torch.library.custom_op(_JOINT_NAME, _joint_dispatch, mutates_args=())
    _joint_operator.register_fake(_empty_joint)
    _joint_operator.register_autograd(no_gradient)


def decompositions() -> dict[Callable, Callable]:
    """{operator: plain torch function}, for `exported_program.run_decompositions` and the like.

    Everything but the operators of this package stays as it is; merge it into a backend's own table.
    """
    return {**attention_decompositions(), **joint_decompositions()}


# -------------------- kernels/cpu.cpp --------------------

def cpp_source():
    """The C++ kernel's source."""
    return r"""
// The fused operators on CPUs: one pass from query, key and value to the output.
//
// A tile is a few dozen queries of one head; its scores never leave the cache. They lie as (keys, queries), the output
// as (queries, channels), so only the queries have to be turned.

// The CPU kernel's solver, from scores to attention maps.
//
// Scores lie as (keys, queries), so that neighbouring queries fill a register and no sum runs across one. Newton's
// method on the norm (entmax.py), sped up by inverse cubics, stops when the queries of two registers have converged.
// Where r, that is 1/(alpha-1), is 1, 2, 3 or 4 (4/3 is not exact in float32) no power function is needed. Any other
// under 4 starts from where a polynomial in its place has its root, a larger one from a bound.

// The CPU kernel's products, in vectors of whatever registers the machine has, and its numbers as they lie in memory.
//
// Products are summed in registers, by a broadcast and multiply-adds.

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

// Vectors of GCC and Clang: any operation on them is on all lanes, in whatever registers the machine has. MAX and MIN
// (b where either is NaN) are written out where GCC makes no single instruction of a comparison. IN_REGISTER keeps it
// from reading a vector from memory at each use: two loads a cycle are fewer than the multiply-adds.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kAccumulators = 24;
#define MAX(a, b) _mm512_max_ps(a, b)
#define MIN(a, b) _mm512_min_ps(a, b)
#define IN_REGISTER(x) asm("" : "+v"(x))
#elif defined(__AVX__)
constexpr int kLanes = 8, kAccumulators = 12;
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#define IN_REGISTER(x) asm("" : "+x"(x))
#else
constexpr int kLanes = 4, kAccumulators = 12;
#define MAX(a, b) a > b ? a : b
#define MIN(a, b) a < b ? a : b
#define IN_REGISTER(x)
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4), aligned(4)));

constexpr float kLn2 = 0.693147181f, kLog2e = 1.44269504f;
constexpr float kFar = -1.0e9f;  // scores are at least this far below their row's largest: nothing, at any alpha

inline Vector all(float x) { return Vector{} + x; }
inline Vector load(const float* p) { return *(const Vector*)p; }
inline void store(float* p, Vector x) { *(Vector*)p = x; }
inline Vector larger(Vector a, Vector b) { return MAX(a, b); }
inline Vector smaller(Vector a, Vector b) { return MIN(a, b); }

// out[i][j] = sum over t of left[i * across + t * along] * right[t * right_n + j], of R rows i and V vectors j; added
// to what is there if `more`. R x V sums stay in registers.
template <int R, int V>
inline void product_tile(const float* left, int64_t across, int64_t along, int64_t length, const float* right,
                         int64_t right_n, float* out, int64_t out_n, bool more) {
  Vector sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = more ? load(out + r * out_n + v * kLanes) : Vector{};
  for (int64_t t = 0; t < length; t++) {
    // The fewer of the factors and vectors are held in registers, and one of the others.
    if constexpr (R <= V) {
      Vector factor[R];
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) factor[r] = all(left[r * across + t * along]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        Vector row = load(right + t * right_n + v * kLanes);
        IN_REGISTER(row);
#pragma GCC unroll 24
        for (int r = 0; r < R; r++) sum[r][v] += factor[r] * row;
      }
    } else {
      Vector row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        row[v] = load(right + t * right_n + v * kLanes);
        IN_REGISTER(row[v]);
      }
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
        const Vector factor = all(left[r * across + t * along]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] += factor * row[v];
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(out + r * out_n + v * kLanes, sum[r][v]);
}

template <int V>
void product_columns(const float* left, int64_t across, int64_t along, int64_t rows, int64_t length, const float* right,
                     int64_t right_n, float* out, int64_t out_n, bool more) {
  constexpr int R = std::min(kAccumulators / V, 12);
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    product_tile<R, V>(left + i * across, across, along, length, right, right_n, out + i * out_n, out_n, more);
  for (; i + 2 <= rows; i += 2)
    product_tile<2, V>(left + i * across, across, along, length, right, right_n, out + i * out_n, out_n, more);
  if (i < rows)
    product_tile<1, V>(left + i * across, across, along, length, right, right_n, out + i * out_n, out_n, more);
}

// As product_tile, of `rows` rows and `columns` vectors.
void product(const float* left, int64_t across, int64_t along, int64_t rows, int64_t length, const float* right,
             int64_t right_n, int64_t columns, float* out, int64_t out_n, bool more) {
  for (int64_t width; columns > 0; columns -= width, right += width * kLanes, out += width * kLanes) {
    width = columns == 5 ? 3 : std::min<int64_t>(columns, 4);
    if (width == 1) product_columns<1>(left, across, along, rows, length, right, right_n, out, out_n, more);
    if (width == 2) product_columns<2>(left, across, along, rows, length, right, right_n, out, out_n, more);
    if (width == 3) product_columns<3>(left, across, along, rows, length, right, right_n, out, out_n, more);
    if (width == 4) product_columns<4>(left, across, along, rows, length, right, right_n, out, out_n, more);
  }
}

// to[c * to_n + j] = from[j * from_n + c] * scale of 8 rows and columns.
inline void transpose(const float* from, int64_t from_n, float scale, float* to, int64_t to_n) {
#if defined(__AVX__)
  __m256 m[8], n[8];
  for (int j = 0; j < 8; j++) m[j] = _mm256_loadu_ps(from + j * from_n) * _mm256_set1_ps(scale);
  for (int j = 0; j < 8; j += 2)
    n[j] = _mm256_unpacklo_ps(m[j], m[j + 1]), n[j + 1] = _mm256_unpackhi_ps(m[j], m[j + 1]);
  for (int j = 0; j < 8; j += 4) {
    for (int i = 0; i < 2; i++) {
      m[j + 2 * i] = _mm256_shuffle_ps(n[j + i], n[j + i + 2], 0x44);
      m[j + 2 * i + 1] = _mm256_shuffle_ps(n[j + i], n[j + i + 2], 0xee);
    }
  }
  for (int c = 0; c < 4; c++) {
    _mm256_storeu_ps(to + c * to_n, _mm256_permute2f128_ps(m[c], m[c + 4], 0x20));
    _mm256_storeu_ps(to + (c + 4) * to_n, _mm256_permute2f128_ps(m[c], m[c + 4], 0x31));
  }
#else
  for (int c = 0; c < 8; c++)
    for (int j = 0; j < 8; j++) to[c * to_n + j] = from[j * from_n + c] * scale;
#endif
}

// float16 and bfloat16, by their bits.
struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Brain x) { return as_float((uint32_t)x.bits << 16); }
inline float to_float(Half x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = (uint32_t)(x.bits & 0x7fff) << 13;
  const float number = as_float(rest) * 5.19229686e33f;  // 2^112; takes in the subnormal ones
  return as_float(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : as_bits(number)));
}
inline void from_float(float x, float* to) { *to = x; }
inline void from_float(float x, Brain* to) {
  const uint32_t bits = as_bits(x);
  to->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void from_float(float x, Half* to) {
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  uint32_t half;
  if (size >= 0x47800000)
    half = size > 0x7f800000 ? 0x7e00 : 0x7c00;  // NaN, or too large
  else if (size < 0x38800000)
    half = as_bits(as_float(size) + 0.5f) - 0x3f000000;  // subnormal: the addition rounds
  else
    half = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
  to->bits = sign | half;
}

template <class T>
void copy_rows(const T* from, int64_t from_n, int64_t rows, int64_t columns, float* to, int64_t to_n) {
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t c = 0; c < columns; c++) to[i * to_n + c] = to_float(from[i * from_n + c]);
    for (int64_t c = columns; c < to_n; c++) to[i * to_n + c] = 0.0f;
  }
}

}  // namespace

namespace {

// Steps of V vectors at once, side by side: each step has to wait for the one before it.
#define EACH(v) _Pragma("GCC unroll 4") for (int v = 0; v < V; v++)

// 2^x for x <= 120, to 2 ulp; zero below -126.5, NaN for NaN. The magic constant rounds to the nearest integer.
template <int V>
inline void to_exp2(Vector (&x)[V]) {
  Vector y[V], power[V];
  EACH(v) {
    x[v] = larger(all(-127.0f), x[v]);
    const Vector shifted = x[v] + 12582912.0f;
    x[v] = x[v] - (shifted - 12582912.0f);
    power[v] = (Vector)(((Integers)shifted + 127) << 23);
  }
  EACH(v) y[v] = x[v] * 1.3276476e-3f + 9.6755419e-3f;
  EACH(v) y[v] = y[v] * x[v] + 5.5507131e-2f;
  EACH(v) y[v] = y[v] * x[v] + 2.40221202e-1f;
  EACH(v) y[v] = y[v] * x[v] + 6.93146944e-1f;
  EACH(v) y[v] = y[v] * x[v] + 1.00000012f;
  EACH(v) x[v] = y[v] * power[v];
}

// log2(x) in place of d = x - 1, to 2e-7 of itself even where d is tiny; some number for x <= 0.
template <int V>
inline void to_log2(const Vector (&x)[V], Vector (&d)[V]) {
  Vector y[V], exponent[V];
  EACH(v) {
    const Integers bits = (Integers)x[v], e = (bits - 0x3f3504f3) >> 23;
    const Vector f = (Vector)(bits - (e << 23)) - 1.0f;
    d[v] = e == 0 ? d[v] : f;
    exponent[v] = __builtin_convertvector(e, Vector);
  }
  EACH(v) y[v] = d[v] * -1.45811588e-1f + 2.34042421e-1f;
  EACH(v) y[v] = y[v] * d[v] - 2.48876914e-1f;
  EACH(v) y[v] = y[v] * d[v] + 2.87098706e-1f;
  EACH(v) y[v] = y[v] * d[v] - 3.60239625e-1f;
  EACH(v) y[v] = y[v] * d[v] + 4.80923235e-1f;
  EACH(v) y[v] = y[v] * d[v] - 7.21352816e-1f;
  EACH(v) y[v] = y[v] * d[v] + 1.4426949f;
  EACH(v) d[v] = y[v] * d[v] + exponent[v];
}

inline Vector exp2_of(Vector x) {
  Vector one[1] = {x};
  return to_exp2<1>(one), one[0];
}
inline Vector log2_of(Vector x) {
  Vector one[1] = {x}, less[1] = {x - 1.0f};
  return to_log2<1>(one, less), less[0];
}

// The thresholds of kLanes x V rows, and of each the sums of p^r and p^(r-1) there: p = z c + height where positive,
// c = unit / r, z scores in units of log2 less their row's largest, unit ln 2 over the temperature of the sparse map.
// The largest p is the height, and all are small in a flat row: it is what has to be exact. A large r takes all of them
// near one, and is solved for height - 1.
template <int V>
struct Rows {
  Vector height[V], sum[V], slope[V];
};

constexpr int kSmall = -1, kLarge = -2;  // any r under, and over, 4
constexpr int kFitted = -3;              // any r under 4, with Fit in the place of the power

// p^(r-1) where r - 1 = kWhole is 0, 1, 2 or 3.
template <int kWhole>
inline Vector power_of(Vector p) {
  if constexpr (kWhole == 0) return p > 0.0f ? all(1.0f) : Vector{};
  return kWhole == 1 ? p : kWhole == 2 ? p * p : p * p * p;
}

constexpr int64_t kSummedAtOnce = 32;
constexpr int kFittedSteps = 5;

// t^r over [0, 1] as a polynomial c0 t + c1 t^2 + ... that is 1 at 1: least squares, whose normal equations are a
// Cauchy matrix's.
struct Fit {
  static constexpr int kTerms = 4;
  float c[kTerms];

  explicit Fit(float r) {
    double sum = 0.0, of[kTerms];
    for (int j = 1; j <= kTerms; j++) {
      double part = (2.0 * j + 1.0) / (r + j + 1.0);
      for (int i = 1; i <= kTerms; i++)
        if (i != j) part *= (i + j + 1.0) * (r - i) / ((r + i + 1.0) * (j - i));
      sum += of[j - 1] = part;
    }
    for (int j = 0; j < kTerms; j++) c[j] = (float)(of[j] / sum);
  }
};

// As evaluate, to 1 in 50: p^r is height^r t^r, t = p / height.
template <int W, int V>
inline void evaluate_fit(const float* z, int64_t keys, float r, float unit, Rows<V>& rows, const Fit& fit) {
  constexpr int kLast = Fit::kTerms - 1;
  Vector c[V], sum[V]{}, slope[V]{};
  EACH(v) c[v] = unit / r / rows.height[v];
  for (int64_t k = 0; k < keys; k++) {
    Vector t[V], y[V], d[V];
    EACH(v) t[v] = larger(load(z + k * W + v * kLanes) * c[v] + 1.0f, Vector{});
    EACH(v) y[v] = all(fit.c[kLast]), d[v] = all(fit.c[kLast] * (kLast + 1));
#pragma GCC unroll 4
    for (int j = kLast - 1; j >= 0; j--) {
      EACH(v) y[v] = y[v] * t[v] + fit.c[j];
      EACH(v) d[v] = d[v] * t[v] + fit.c[j] * (j + 1);
    }
    EACH(v) sum[v] += y[v] * t[v];
    EACH(v) slope[v] += t[v] > 0.0f ? d[v] : Vector{};
  }
  EACH(v) {
    const Vector power = exp2_of(log2_of(rows.height[v]) * (r - 1.0f));
    rows.sum[v] = sum[v] * power * rows.height[v], rows.slope[v] = slope[v] * power * (1.0f / r);
  }
}

// kWhole: as above, or kSmall or kLarge for any other r.
template <int kWhole, int W, int V>
inline void evaluate(const float* z, int64_t keys, float r, float unit, Rows<V>& rows, float* powers) {
  const float c = unit / r, r_minus_1 = r - 1.0f;
  Vector height[V];
  for (int v = 0; v < V; v++) height[v] = rows.height[v], rows.sum[v] = rows.slope[v] = Vector{};
  for (int64_t k = 0; k < keys;) {
    Vector sum[V]{}, slope[V]{};  // of a few keys: added to the whole one at a time, small terms would lose digits
    for (const int64_t end = std::min(k + kSummedAtOnce, keys); k < end; k++) {
      Vector d[V], p[V], q[V];
      EACH(v) d[v] = load(z + k * W + v * kLanes) * c + height[v];
      EACH(v) p[v] = larger(kWhole == kLarge ? d[v] + 1.0f : d[v], Vector{});
      if constexpr (kWhole < 0) {
        if constexpr (kWhole == kSmall)
          EACH(v) d[v] = p[v] - 1.0f;
        to_log2<V>(p, d);
        EACH(v) d[v] *= r_minus_1;
        to_exp2<V>(d);
        EACH(v) store(powers + k * W + v * kLanes, q[v] = p[v] > 0.0f ? d[v] : Vector{});
      } else {
        EACH(v) q[v] = power_of<kWhole>(p[v]);
      }
      EACH(v) slope[v] += q[v];
      EACH(v) sum[v] += q[v] * p[v];
    }
    for (int v = 0; v < V; v++) rows.sum[v] += sum[v], rows.slope[v] += slope[v];
  }
}

inline float largest_of(Vector x) {
  for (int l = 1; l < kLanes; l++) x[0] = std::max(x[0], x[l]);
  return x[0];
}

// total^(-1/r), or that less 1 where r > 4, of the sum `total` of a row's exp: no height is smaller, and none larger
// where all scores are equal. A little less, to be so in spite of rounding; as a series where digits would be lost.
inline Vector lowest_of(float r, Vector log_total) {
  const Vector x = log_total * (1.0f / r);
  if (r >= 64.0f) return -x * (1.0f - x * (1.0f / 2) * (1.0f - x * (1.0f / 3) * (1.0f - x * (1.0f / 4))));
  return r > 4.0f ? exp2_of(x * -kLog2e) - 1.000001f : exp2_of(x * -kLog2e) * 0.999999f;
}

constexpr float kEnough = 3.0e-4f;  // of a residual that the step in the weights squares

// Newton's method on N = ||relu(z c + height)||_r = 1, until every sum is one to `tolerance` for a slope of 1, or as
// nearly as a float32 height can make it, or `steps` are done. N is convex: a step ends above its root wherever it
// starts. Later ones go below that by what the inverse cubic through the last two norms and slopes says, at most as
// far again. Where many keys leave the support at once the slope jumps: this can lead far below the root, from there
// a step far above it, and so for ever. So no height is above an earlier end, or below one that was too small: two
// steps gain what one of plain Newton would. From an end that is too low, by rounding, the next goes back by a
// quarter of its step.
template <int kWhole, int W, int V>
void newton(const float* z, int64_t keys, float r, float unit, int steps, float tolerance, const Vector* log_total,
            Rows<V>& rows, float* powers) {
  const Fit fit(r);  // which kFitted alone reads
  const Vector highest = all(kWhole == kLarge ? 0.0f : 1.0f);
  // Height, N - 1 and d height / d N of the last step; the least height, the largest too small, and the lowest end.
  Vector before[V], off_before[V]{}, inverse_before[V]{}, lowest[V], least[V], most[V];
  for (int v = 0; v < V; v++) {
    before[v] = lowest[v] = least[v] = lowest_of(r, log_total[v]), most[v] = highest;
    rows.height[v] = larger(rows.height[v], lowest[v]);
  }
  for (int step = 0;; step++) {
    if constexpr (kWhole == kFitted)
      evaluate_fit<W, V>(z, keys, r, unit, rows, fit);
    else
      evaluate<kWhole, W, V>(z, keys, r, unit, rows, powers);
    Vector worst{};
    for (int v = 0; v < V; v++) {
      const Vector off = rows.sum[v] - 1.0f, resolved = kWhole == kLarge ? all(1.0f) : rows.height[v];
      const Vector enough = larger(smaller(rows.slope[v] * tolerance, all(kEnough)), all(tolerance));
      const Vector left = larger(off, -off) - larger(enough, rows.slope[v] * resolved * (r * 1.5e-7f));
      worst = larger(rows.slope[v] > 0.0f ? left : Vector{}, worst);
    }
    if (step == steps || !(largest_of(worst) > 0.0f)) return;
    for (int v = 0; v < V; v++) {
      const Vector s = larger(rows.sum[v], all(1.0e-6f));
      const Vector norm = kWhole == 0 ? s : exp2_of(log2_of(s) * (1.0f / r));
      const Vector off = norm - 1.0f, inverse = s / (norm * larger(rows.slope[v], all(1.0e-6f)));
      const Vector height = rows.height[v], fall = off * inverse, end = height - fall;
      Vector beyond{};
      if (step > 0) {
        const Vector apart = off_before[v] - off;
        const Vector i = apart * apart > 1.0e-8f ? 1.0f / apart : Vector{};
        const Vector secant = (before[v] - height) * i;
        beyond = off * off * i * (inverse - secant - off_before[v] * i * (2.0f * secant - inverse - inverse_before[v]));
        beyond = larger(smaller(beyond, larger(fall, -fall)), Vector{});
      }
      const Vector back = height + larger(height, -height) * 1.0e-7f + (before[v] - height) * 0.25f;
      const Vector again = smaller(end, before[v] > height ? back : highest);
      most[v] = (off < 0.0f) & (height >= most[v]) ? again : smaller(end, most[v]);
      least[v] = off < 0.0f ? larger(height, least[v]) : least[v];
      before[v] = height, off_before[v] = off, inverse_before[v] = inverse;
      rows.height[v] = smaller(larger(end - (end - beyond > least[v] ? beyond : Vector{}), lowest[v]), most[v]);
    }
  }
}

// Find the heights. Returns r - 1 if 0, 1, 2 or 3; else kSmall or kLarge, with p^(r-1) of every score in `powers`.
template <int W, int V>
int solve(const float* z, int64_t keys, float r, float unit, int steps, const Vector* log_total, Rows<V>& rows,
          float* powers) {
  // A step in the weights follows, which squares what is left of the residual; only keys within
  // delta = |sum - 1| / (r slope) of the threshold, slope >= 1, are off by up to delta^r. Sums are exact to about 1e-6.
  const float exact = r * std::pow(5.0e-6f / (float)keys, 1.0f / r), tolerance = std::clamp(exact, 1.0e-6f, kEnough);
  const int below = (int)r;
  for (int v = 0; v < V; v++) rows.height[v] = all(1.0f);
  if ((float)below == r && below <= 4) {
    const auto few = below == 1 ? newton<0, W, V> : newton<1, W, V>;
    const auto many = below == 3 ? newton<2, W, V> : newton<3, W, V>;
    (below < 3 ? few : many)(z, keys, r, unit, steps, tolerance, log_total, rows, powers);
    return below - 1;
  }
  if (r > 4.0f) {  // starts from the lowest
    for (int v = 0; v < V; v++) rows.height[v] = all(-1.0f);
    newton<kLarge, W, V>(z, keys, r, unit, steps, tolerance, log_total, rows, powers);
    return kLarge;
  }
  newton<kFitted, W, V>(z, keys, r, unit, kFittedSteps, 1.0e-2f, log_total, rows, powers);
  newton<kSmall, W, V>(z, keys, r, unit, steps, tolerance, log_total, rows, powers);
  return kSmall;
}

// to = to * w_to + w_sparse * sparse map; the sparse map alone in sparse_to where that is asked for.
template <int kWhole, int W, int V>
void write_maps(const float* z, int64_t keys, float r, float unit, const Rows<V>& rows, const Vector* w_to,
                const Vector* w_sparse, const Vector* w_alone, const float* powers, float* to, float* sparse_to) {
  const float c = unit / r;
  Vector correction[V];
  // One more Newton step, in the weights: d weights = (1 - sum) p^(r-1) / sum p^(r-1).
  for (int v = 0; v < V; v++) correction[v] = rows.slope[v] > 0.0f ? (1.0f - rows.sum[v]) / rows.slope[v] : Vector{};
  for (int64_t k = 0; k < keys; k++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const int64_t at = k * W + v * kLanes;
      const Vector d = load(z + at) * c + rows.height[v];
      const Vector p = larger(kWhole == kLarge ? d + 1.0f : d, Vector{});
      const Vector q = kWhole < 0 ? load(powers + at) : power_of<kWhole>(p);
      const Vector sparse = larger(q * (p + correction[v]), Vector{});
      store(to + at, load(to + at) * w_to[v] + w_sparse[v] * sparse);
      if (sparse_to) store(sparse_to + at, sparse * w_alone[v]);
    }
  }
}

// As maps_of where alpha is 1 but the temperature is not: the sparse map is a softmax of its own.
template <int W, int V>
void softmax_maps(const float* z, int64_t keys, float over, const Vector* w_to, const Vector* w_sparse,
                  const Vector* w_alone, float* to, float* sparse_to) {
  Vector sum[V]{};
  for (int64_t k = 0; k < keys; k++) {
    Vector e[V];
    EACH(v) e[v] = load(z + k * W + v * kLanes) * over;
    to_exp2<V>(e);
    EACH(v) sum[v] += e[v];
  }
  EACH(v) sum[v] = sum[v] == 0.0f ? Vector{} : 1.0f / sum[v];
  for (int64_t k = 0; k < keys; k++) {
    Vector e[V];
    EACH(v) e[v] = load(z + k * W + v * kLanes) * over;
    to_exp2<V>(e);
    EACH(v) {
      const int64_t at = k * W + v * kLanes;
      const Vector sparse = e[v] * sum[v];
      store(to + at, load(to + at) * w_to[v] + w_sparse[v] * sparse);
      if (sparse_to) store(sparse_to + at, sparse * w_alone[v]);
    }
  }
}

// `to` holds each score's exp on entry, and weights of the values on return: if `divide`, w_dense of what it held over
// its sum `total`, else just that, plus w_sparse of the sparse map. That alone goes to sparse_to where it is asked for;
// sparse_to may be z.
template <int W, int V>
void maps_of(const float* z, int64_t keys, float alpha, float over, int steps, const float* total, float w_dense,
             float w_sparse, bool divide, float* powers, float* to, float* sparse_to) {
  Rows<V> rows;
  Vector inverse[V], w_to[V], w_alone[V], w_s[V], log_total[V];
  const float r = 1.0f / std::max(alpha - 1.0f, 1.1920929e-7f);
  const bool alike = alpha - 1.0f < 2.4e-7f, dense = (w_sparse == 0.0f && !sparse_to) || (alike && over == 1.0f);
  for (int v = 0; v < V; v++) {
    const Vector t = load(total + v * kLanes);
    inverse[v] = t == 0.0f ? Vector{} : 1.0f / t;  // a row without keys is zeros, one with a NaN is NaN
    // Sharper scores have a smaller sum of exp, which bounds the heights all the same; flatter ones have keys at most.
    log_total[v] = log2_of(over < 1.0f ? all((float)keys) : larger(t, all(1.0f))) * kLn2;
    w_to[v] = divide ? inverse[v] * (dense ? w_dense + w_sparse : w_dense) : all(1.0f);
    w_alone[v] = inverse[v] * 0.0f + 1.0f;
    w_s[v] = w_alone[v] * w_sparse;
  }
  if (dense) {
    for (int64_t k = 0; k < keys; k++)
      for (int64_t v = 0, at = k * W; v < V; v++, at += kLanes) {
        if (sparse_to) store(sparse_to + at, load(to + at) * inverse[v]);
        store(to + at, load(to + at) * w_to[v]);
      }
    return;
  }
  if (alike) return softmax_maps<W, V>(z, keys, over, w_to, w_s, w_alone, to, sparse_to);
  const float unit = kLn2 * over;
  switch (solve<W, V>(z, keys, r, unit, steps, log_total, rows, powers)) {
#define WRITE(whole) return write_maps<whole, W, V>(z, keys, r, unit, rows, w_to, w_s, w_alone, powers, to, sparse_to)
    case 0: WRITE(0);
    case 1: WRITE(1);
    case 2: WRITE(2);
    case 3: WRITE(3);
    case kSmall: WRITE(kSmall);
    default: WRITE(kLarge);
#undef WRITE
  }
}

}  // namespace

enum { kPladis, kSparse, kAnderson, kGag };  // each operator's code in operators.py
enum { kFloat, kHalf, kBrain };
enum { kNoMask, kBoolean, kAdditive };

// What a call has in common with the next of its kind, as cpu.py's _Plan lays it out. Strides are in elements;
// that of a channel is 1.
extern "C" struct Plan {
  int64_t batch, heads, key_heads, queries, keys, channels, value_channels;
  int64_t query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n;
  int64_t mask_b, mask_h, mask_q, mask_k, output_b, output_h, output_n;
  int64_t dense_b, dense_h, dense_n, dense_lse_b, dense_lse_h, dense_lse_n;
  float qk_scale;
  int32_t kind, whole_token, steps, threads, dtype, mask_kind;
};

namespace {

constexpr int64_t kKeysAtOnce = 96;  // of the values in a product: as many as the first cache holds beside the weights
constexpr int64_t kHeldFloats = 1 << 20;  // of all heads' keys and values that a thread keeps packed

struct Call : Plan {
  const void *query, *key, *value, *mask;
  void* output;
  float* lse;
  const void* dense;  // attention of the same queries to other keys, to be joined with this; nullptr if none
  const float* dense_lse;
  float alpha, scale, temperature, zeta, eta, alpha_low, scale_low, over_sparse = 1.0f, parallel = 1.0f;
};

inline float* aligned(std::vector<float>& storage, int64_t size) {
  if ((int64_t)storage.size() < size + 16) storage.resize(size + 16);
  return (float*)(((uintptr_t)storage.data() + 63) & ~(uintptr_t)63);
}

// A thread's work on W queries at a time, elements of type T.
template <class T, int W>
struct Tile {
  static constexpr int kColumns = W / kLanes, kTogether = std::min(kColumns, 2);
  const Call& call;
  const int64_t padded, packs;
  const float *key, *value;
  int64_t key_n, value_n;
  float *rows, *turned, *scores, *weights, *powers, *sparse, *t_sparse, *residual, *packed;
  std::vector<int64_t> held;
  alignas(64) float total[W], share[W];

  static int64_t padded_of(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

  Tile(const Call& c, std::vector<float>& storage)
      : call(c), padded(padded_of(c.value_channels)), packs(packs_of(c)), held(packs_of(c), -1) {
    const int64_t map = c.keys * W, results = (c.whole_token ? c.heads : 1) * padded * W;
    const bool gag = c.kind == kGag;
    float* at = aligned(storage, 2 * W * padded_of(c.channels) + 4 * map + 2 * results + packs * one_pack(c));
    auto take = [&](int64_t n) {
      float* here = at;
      at += n;
      return here;
    };
    rows = take(W * padded_of(c.channels)), turned = take(W * padded_of(c.channels));
    scores = take(map), weights = take(map), powers = take(map), sparse = scores;
    t_sparse = take(results), residual = gag ? take(results) : nullptr, packed = take(packs * one_pack(c));
  }

  static int64_t one_pack(const Call& c) { return c.keys * (padded_of(c.channels) + padded_of(c.value_channels)); }
  static int64_t packs_of(const Call& c) {
    return c.whole_token && c.key_heads * one_pack(c) <= kHeldFloats ? c.key_heads : 1;
  }

  // Of the keys and values that head h shares with its group, side by side: what a product reads then stays in the
  // cache, and has no remainder.
  void fetch(int64_t b, int64_t query_head) {
    const int64_t h = query_head / (call.heads / call.key_heads), id = b * call.key_heads + h, slot = h % packs;
    float* keys_at = packed + slot * one_pack(call);
    float* values_at = keys_at + call.keys * padded_of(call.channels);
    const T* from = (const T*)call.key + b * call.key_b + h * call.key_h;
    const T* values_from = (const T*)call.value + b * call.value_b + h * call.value_h;
    key = keys_at, value = values_at, key_n = padded_of(call.channels), value_n = padded;
    const bool few = call.queries <= 2 * W;  // for whom a copy does not pay
    const bool key_lies = sizeof(T) == 4 && (few || call.key_n == call.channels);
    const bool value_lies =
        sizeof(T) == 4 && (few || call.value_n == call.value_channels) && call.value_channels == padded;
    if (key_lies) key = (const float*)from, key_n = call.key_n;
    if (value_lies) value = (const float*)values_from, value_n = call.value_n;
    if (held[slot] == id) return;
    held[slot] = id;
    if (!key_lies) copy_rows(from, call.key_n, call.keys, call.channels, keys_at, key_n);
    if (!value_lies) copy_rows(values_from, call.value_n, call.keys, call.value_channels, values_at, value_n);
  }

  void add_mask(int64_t b, int64_t h, int64_t first, int64_t width) {
    const int64_t start = b * call.mask_b + h * call.mask_h + first * call.mask_q;
    const uint8_t* keeps = (const uint8_t*)call.mask + start;
    const float* bias = (const float*)call.mask + start;
    for (int64_t k = 0; k < call.keys; k++) {
      for (int64_t j = 0; j < width; j++) {
        const int64_t at = j * call.mask_q + k * call.mask_k;
        float& score = scores[k * W + j];
        if (call.mask_kind == kAdditive)
          score += bias[at];
        else
          score = keeps[at] ? score : -INFINITY;
      }
    }
  }

  // Scores in units of log2, over temperature, less their row's largest; 2 to them in `weights`, its sums in `total`.
  void score(int64_t b, int64_t h, int64_t first, int64_t width) {
    fetch(b, h);
    const int64_t channels = call.channels, blocks = channels - channels % 8;
    const T* from = (const T*)call.query + b * call.query_b + h * call.query_h + first * call.query_n;
    const float* query = (const float*)from;
    int64_t query_n = call.query_n;
    if (sizeof(T) != 4 || width < W) {
      copy_rows(from, call.query_n, width, channels, rows, padded_of(channels));
      std::memset(rows + width * padded_of(channels), 0, (W - width) * padded_of(channels) * 4);
      query = rows, query_n = padded_of(channels);
    }
    for (int64_t c = 0; c < blocks; c += 8)
      for (int j = 0; j < W; j += 8) transpose(query + j * query_n + c, query_n, call.qk_scale, turned + c * W + j, W);
    for (int64_t c = blocks; c < channels; c++)
      for (int j = 0; j < W; j++) turned[c * W + j] = query[j * query_n + c] * call.qk_scale;
    product(key, key_n, 1, call.keys, channels, turned, W, kColumns, scores, W, false);
    if (call.mask_kind != kNoMask) add_mask(b, h, first, width);

    Vector top[kColumns], sum[kColumns];
    for (int v = 0; v < kColumns; v++) top[v] = all(-INFINITY);
    for (int64_t k = 0; k < call.keys; k++)
      for (int v = 0; v < kColumns; v++) top[v] = larger(load(scores + k * W + v * kLanes), top[v]);
    for (int v = 0; v < kColumns; v++) top[v] = top[v] == -INFINITY ? Vector{} : top[v];
    const bool with_lse = call.lse || call.dense, lse_apart = with_lse && call.temperature != 1.0f;
    if (lse_apart) weigh(top, kLog2e, sum, false), write_lse(b, h, first, width, top, sum);
    weigh(top, kLog2e / call.temperature, sum, true);
    if (with_lse && !lse_apart) write_lse(b, h, first, width, top, sum);
    for (int v = 0; v < kColumns; v++) store(total + v * kLanes, sum[v]);
  }

  void weigh(const Vector* top, float unit, Vector* sum, bool keep) {
    constexpr int V = kColumns;
    EACH(v) sum[v] = Vector{};
    for (int64_t k = 0; k < call.keys; k++) {
      float *z = scores + k * W, *e = weights + k * W;
      Vector x[V];
      EACH(v) x[v] = larger(all(kFar), (load(z + v * kLanes) - top[v]) * unit);
      if (keep)
        EACH(v) store(z + v * kLanes, x[v]);
      to_exp2<V>(x);
      EACH(v) sum[v] += x[v];
      if (keep)
        EACH(v) store(e + v * kLanes, x[v]);
    }
  }

  void write_lse(int64_t b, int64_t h, int64_t first, int64_t width, const Vector* top, const Vector* sum) {
    for (int64_t j = 0; j < width; j++) {
      const float t = sum[j / kLanes][j % kLanes];
      const float own = top[j / kLanes][j % kLanes] + std::log(t);
      if (call.lse) call.lse[(b * call.heads + h) * call.queries + first + j] = own;
      if (!call.dense) continue;
      const float other = call.dense_lse[b * call.dense_lse_b + h * call.dense_lse_h + (first + j) * call.dense_lse_n];
      share[j] = own == -INFINITY ? 0.0f : 1.0f / (1.0f + std::exp(other - own));
    }
  }

  // Of the rows that were written their share, the rest of the dense attention to the other keys.
  void join(int64_t b, int64_t h, int64_t first, int64_t width) {
    for (int64_t j = 0; j < width; j++) {
      const T* there = (const T*)call.dense + b * call.dense_b + h * call.dense_h + (first + j) * call.dense_n;
      T* to = output_of(b, h, first + j);
      for (int64_t c = 0; c < call.value_channels; c++) {
        const float other = to_float(there[c]);
        from_float(other + share[j] * (to_float(to[c]) - other), to + c);
      }
    }
  }

  void maps(float alpha, float w_dense, float w_sparse, bool divide, float* sparse_to) {
    constexpr int V = kTogether;
    for (int v = 0; v < kColumns; v += V) {
      const int at = v * kLanes;
      maps_of<W, V>(scores + at, call.keys, alpha, call.over_sparse, call.steps, total + at, w_dense, w_sparse, divide, powers + at,
                    weights + at, sparse_to ? sparse_to + at : nullptr);
    }
  }

  // out (rows of `out_n`) = the map (keys, W), turned, times value
  void times_value(const float* map, int64_t width, float* out, int64_t out_n) {
    for (int64_t k = 0; k < call.keys; k += kKeysAtOnce)
      product(map + k * W, 1, W, width, std::min(kKeysAtOnce, call.keys - k), value + k * value_n, value_n,
              padded / kLanes, out, out_n, k > 0);
  }

  T* output_of(int64_t b, int64_t h, int64_t query) {
    return (T*)call.output + b * call.output_b + h * call.output_h + query * call.output_n;
  }

  void linear(int64_t b, int64_t h, int64_t first, int64_t width) {
    score(b, h, first, width);
    if (call.kind == kSparse) {
      maps(call.alpha, 0.0f, 1.0f, true, nullptr);
    } else if (call.kind == kPladis) {
      maps(call.alpha, 1.0f - call.scale, call.scale, true, nullptr);
    } else {  // a second map at alpha 1 and no temperature of its own is the dense one again
      const bool low = call.scale_low != 0.0f && (call.alpha_low - 1.0f >= 2.4e-7f || call.over_sparse != 1.0f);
      maps(call.alpha, low ? 1.0f - call.scale - call.scale_low : 1.0f - call.scale, call.scale, true, nullptr);
      if (low) maps(call.alpha_low, 0.0f, call.scale_low, false, nullptr);
    }
    T* output = output_of(b, h, first);
    if (sizeof(T) == 4 && padded == call.value_channels)
      return times_value(weights, width, (float*)output, call.output_n);
    times_value(weights, width, t_sparse, padded);
    for (int64_t j = 0; j < width; j++)
      for (int64_t c = 0; c < call.value_channels; c++)
        from_float(t_sparse[j * padded + c], output + j * call.output_n + c);
  }

  // GAG, eq. 11-13: T_s and r = T_s - T_d of one head, or of all that are projected together, then their combination.
  void gag(int64_t b, int64_t h, int64_t heads, int64_t first, int64_t width) {
    const int64_t size = padded * W;
    for (int64_t i = 0; i < heads; i++) {
      score(b, h + i, first, width);
      maps(call.alpha, -1.0f, 1.0f, true, sparse);
      times_value(sparse, width, t_sparse + i * size, padded);
      times_value(weights, width, residual + i * size, padded);
    }
    for (int64_t j = 0; j < width; j++) {
      float along, across;  // of the output: T_s (1 + along) + r across
      combine(heads, j, &along, &across);
      for (int64_t i = 0; i < heads; i++) {
        const float *s = t_sparse + i * size + j * padded, *r = residual + i * size + j * padded;
        T* to = output_of(b, h + i, first + j);
        int64_t c = 0;
        if (sizeof(T) == 4)
          for (; c + kLanes <= call.value_channels; c += kLanes)
            store((float*)to + c, load(s + c) + (load(s + c) * along + load(r + c) * across));
        for (; c < call.value_channels; c++) from_float(s[c] + (s[c] * along + r[c] * across), to + c);
      }
    }
  }

  // u = zeta r + (parallel - zeta) r_par, as a combination of T_s and r, times its gain.
  void combine(int64_t heads, int64_t j, float* along, float* across) {
    const int64_t size = padded * W;
    Vector ss{}, sr{}, rr{};
    for (int64_t i = 0; i < heads; i++) {
      const float *s = t_sparse + i * size + j * padded, *r = residual + i * size + j * padded;
      for (int64_t c = 0; c < padded; c += kLanes) {
        const Vector x = load(s + c), y = load(r + c);
        ss += x * x, sr += x * y, rr += y * y;
      }
    }
    const float length = sum_of(ss), dot = sum_of(sr), square = sum_of(rr), zeta = call.zeta;
    float share = (call.parallel - zeta) * (dot / length);
    float norm = std::sqrt(std::max(zeta * zeta * square + 2.0f * zeta * share * dot + share * share * length, 0.0f));
    const bool safe =
        length > 1.0e-20f && length < 1.0e20f && square < 1.0e20f && zeta >= 0.0f && zeta <= call.parallel;
    if (!safe || !(square > 1.0e-20f || call.eta > 1.0e-8f)) return combine_wide(heads, j, along, across);
    const float gain = call.scale * (norm > call.eta ? call.eta / norm : 1.0f);
    *along = gain * share, *across = gain * zeta;
  }

  // The same in float64, where squares leave float32's range or terms cancel; u replaces r.
  void combine_wide(int64_t heads, int64_t j, float* along, float* across) {
    const int64_t size = padded * W;
    double length = 0.0, dot = 0.0, square = 0.0;
    const auto each = [&](auto&& visit) {
      for (int64_t i = 0; i < heads; i++)
        for (int64_t c = 0; c < padded; c++)
          visit(t_sparse[i * size + j * padded + c], residual[i * size + j * padded + c]);
    };
    each([&](double s, float r) { length += s * s, dot += s * r; });
    const double share = length <= 1.0e-75 ? 0.0 : ((double)call.parallel - call.zeta) * dot / length;
    each([&](double s, float& r) { r = (float)(call.zeta * (double)r + share * s), square += (double)r * r; });
    const double norm = std::sqrt(square);
    *along = 0.0f, *across = (float)(call.scale * (norm > call.eta ? call.eta / norm : 1.0));
  }

  static float sum_of(Vector x) {
    for (int s = kLanes / 2; s > 0; s /= 2)
      for (int l = 0; l < s; l++) x[l] += x[l + s];
    return x[0];
  }
};

// What a thread works in, kept for its next call unless it is large.
std::vector<float>& kept_storage() {
  static thread_local std::vector<float> storage;
  return storage;
}

template <class T, int W>
void work(const Call& call, int64_t tiles, int64_t across, int64_t groups, int64_t together, std::atomic<int64_t>& next,
          int64_t at_once) {
  std::vector<float>& storage = kept_storage();
  {
    Tile<T, W> tile(call, storage);
    for (int64_t start; (start = next.fetch_add(at_once)) < tiles;) {
      for (int64_t i = start; i < std::min(start + at_once, tiles); i++) {
        const int64_t first = i % across * W, width = std::min<int64_t>(W, call.queries - first);
        const int64_t b = i / across / groups, h = i / across % groups * together;
        if (call.kind == kGag)
          tile.gag(b, h, together, first, width);
        else
          tile.linear(b, h, first, width);
        if (call.dense) tile.join(b, h, first, width);
      }
    }
  }
  if (storage.size() > 1 << 19) std::vector<float>().swap(storage);
}

template <class T, int W>
void run(const Call& call) {
  const int64_t across = (call.queries + W - 1) / W, together = call.whole_token ? call.heads : 1;
  const int64_t groups = call.heads / together, tiles = call.batch * groups * across;
  const int threads = (int)std::min<int64_t>(call.threads, tiles);
  // Neighbouring tiles share a head's keys, so a thread takes several.
  const int64_t at_once = std::max<int64_t>(1, std::min<int64_t>(16, tiles / (threads * 8)));
  std::atomic<int64_t> next{0};
  if (threads == 1) return work<T, W>(call, tiles, across, groups, together, next, at_once);
#pragma omp parallel num_threads(threads)
  work<T, W>(call, tiles, across, groups, together, next, at_once);
}

template <class T>
void run_wide(const Call& call) {
  // A tile stays in the second-level cache.
  if (call.keys > 1024 || call.queries <= 2 * kLanes)
    run<T, std::max(kLanes, 8)>(call);
  else
    run<T, 4 * kLanes>(call);
}

}  // namespace

// settings: the hyperparameters, in the order of operators.py.
extern "C" void pladis_attention(const Plan* plan, const void* query, const void* key, const void* value,
                                 const void* mask, void* output, float* lse, const void* dense, const float* dense_lse,
                                 const float* const* settings) {
  Call call{*plan, query, key, value, mask, output, lse, dense, dense_lse};
  call.alpha = *settings[0];
  if (call.kind == kSparse) {
    call.temperature = *settings[1];
  } else {
    call.scale = *settings[1], call.temperature = *settings[2];
    if (call.kind == kGag) call.zeta = *settings[3], call.eta = *settings[4], call.parallel = *settings[6];
    if (call.kind == kAnderson) call.alpha_low = *settings[3], call.scale_low = *settings[4];
    call.over_sparse = 1.0f / *settings[call.kind == kPladis ? 3 : 5];
  }
  switch (call.dtype) {
    case kFloat: return run_wide<float>(call);
    case kHalf: return run_wide<Half>(call);
    default: return run_wide<Brain>(call);
  }
}
"""
