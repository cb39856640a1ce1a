"""Put LoRA layers into any nn.Module, and take them out again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import as_generator, is_integer, quoted_names, warn_caller
from ..packed import REPACKS, require_not_repacked, why_no_backward, would_repack
from ..placement import is_offloaded, is_sharded, require_unsharded
from .experts import ExpertStack, LoRAExperts, lora_layer, put_into, take_out_of
from .linear import linear_shape
from .lora import LoRALinear, fixed_scaling
from .names import modules_in_wrappers, plain_name, without_wrappers
from .targets import (
    all_names,
    as_patterns,
    explain_no_match,
    first_names,
    layer_shape,
    matching_modules,
    modules_and_stacks,
    modules_by_name,
    refuse_peft,
)
from .unmoved import forget_wrapped, note_wrapped


class AllocationLike(Protocol):
    """What `wrap` and `resize` read of an Allocation. A plain {name: rank} does as well."""

    @property
    def ranks(self) -> Mapping[str, int]: ...

    @property
    def keep(self) -> Mapping[str, Tensor] | None: ...


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of `model` by name, each once, under its first name.

    >>> from minirank import lora_layers, wrap
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> layers = wrap(model, {"0": 3})
    >>> {name: layer.rank for name, layer in lora_layers(model).items()}
    {'0': 3}
    """
    modules = modules_by_name(model)
    return {
        name: module for name in all_names(model) if isinstance(module := modules[name], LoRALinear)
    }


# ---- in -----------------------------------------------------------------------------------------


@torch.inference_mode(False)  # parameters made in inference mode could not train
def wrap(
    model: nn.Module,
    ranks: Mapping[str, int] | AllocationLike,
    *,
    alpha: float | None = None,
    reference_rank: float | None = None,
    rank_stabilized: bool = False,
    scaling: float | None = None,
    gate: float | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    trainable: str | Sequence[str] | None = (),
    generator: torch.Generator | int = 0,
) -> dict[str, LoRALinear]:
    """Put a LoRALinear around each named linear layer; the model's function stays the same.

    A stack of experts, a 3-D parameter, is named as the parameter is, and gets a `LoRAExperts`.
    experts.py says how, and what it costs.

    Each call says what trains from now on: all adapters of the model, those of earlier calls too,
    and the modules in `trainable`. Everything else is frozen. A later call therefore names again
    what shall go on training.

    Make the optimizer after this call. One made before holds the weights that are frozen now and no
    adapter, so nothing would train. `L1RA` and `resize` refuse such an optimizer. In a plain
    training loop a warning says so after some of its steps.

    Args:
        model: any module. Its layers are replaced in place.
        ranks: an Allocation, or {name: rank}. Rank 0 leaves the plain module. Any name of a module
            with several names will do.
        alpha, reference_rank, rank_stabilized: s = alpha / reference_rank, or
            alpha / sqrt(reference_rank) if `rank_stabilized`, the same for every layer. The default
            reference rank is the average rank asked for in this call, zeros included; the default
            alpha is the reference rank, so that s = 1 (√reference_rank if `rank_stabilized`).
        scaling: s itself, in place of these three.
        gate, dropout, dtype: see `LoRALinear`; the same for every layer.
        trainable: names or globs of modules that train beside the adapters, such as a new head.
            Everything else is frozen. None leaves every parameter outside the wrapped layers as it
            is.
        generator: a torch.Generator or a seed, for the new parameters.

    Returns: the new layers by name.

    Warns:
        UserWarning: the model had adapters already, and this call freezes modules that trained
            until now; or 4-bit layers of bitsandbytes on the CPU get no adapter, and would lose
            their gradients if they are evaluated.

    Raises:
        ValueError: an unknown or already wrapped name, a stack of experts whose layout is not known
            or with dropout, a rank out of range, two ranks for one
            module, a module on the meta device, offloaded by accelerate, or one that no gradient
            passes through (quantised for inference); a model in FSDP1 or DeepSpeed ZeRO-3; or a
            name in `trainable` that matches nothing, only adapted layers, or parameters made under
            torch.inference_mode(). The model is left unchanged.
        TypeError: the model itself is the linear layer, so it has no parent to put a layer into; or
            `trainable` holds anything but names.

    >>> from minirank import wrap
    >>> model = nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    >>> wrap(model, {"q": 4, "v": 0}, scaling=2.0, trainable=["head"])["q"].rank
    4
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['q.lora_A', 'q.lora_B', 'head.weight', 'head.bias']
    """
    rank_of = resolve_ranks(model, ranks_by_name(ranks))
    if not any(rank_of.values()):
        raise ValueError(
            "every rank is 0, so there is nothing to wrap: give a module a rank above 0. (A budget "
            "of parameters that is below d_out + d_in pays for none)"
        )
    average_rank = sum(rank_of.values()) / len(rank_of)
    common = fixed_scaling(average_rank, scaling, alpha, reference_rank, rank_stabilized)
    generator = as_generator(generator)

    def make_layer(module: nn.Module, rank: int) -> LoRALinear:
        return lora_layer(
            module,
            rank,
            scaling=common,
            gate=gate,
            dropout=dropout,
            dtype=dtype,
            generator=generator,
        )

    makers = {name: partial(make_layer, rank=rank) for name, rank in rank_of.items() if rank > 0}
    return insert_layers(model, makers, trainable)


def insert_layers(
    model: nn.Module,
    makers: Mapping[str, Callable[[nn.Module], LoRALinear]],
    trainable: str | Sequence[str] | None,
    parameters: Iterable[nn.Parameter] = (),
) -> dict[str, LoRALinear]:
    """Put makers[name](module) into the place of every named module, and freeze as `wrap` says.

    Args:
        makers: by names as `resolve_ranks` returns them.
        trainable: as in `wrap`.
        parameters: these parameters of the model train as well. Those that cannot, since they were
            made under torch.inference_mode(), are left as they are.

    Returns: the new layers by name. If anything raises, the model is left unchanged.
    """
    modules = modules_and_stacks(model)
    earlier = lora_layers(model)
    bases = [layer.base for layer in earlier.values()] + [modules[name] for name in makers]
    adapted = {id(parameter) for base in bases for parameter in base.parameters()}
    named = set() if trainable is None else _named_parameters(model, trainable, adapted)
    named |= {id(parameter) for parameter in parameters}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    layers: dict[str, LoRALinear] = {}
    try:
        for name, make_layer in makers.items():
            layers[name] = make_layer(modules[name])
        _put_in(model, layers)
        for layer in layers.values():
            note_wrapped(layer)
        if trainable is not None:
            _set_requires_grad(model, named - adapted)
            if earlier:
                _warn_of_frozen_modules(model, before)
        _warn_of_repacking(model)
        return layers
    except BaseException:
        _put_back(model, layers.values())
        for parameter, requires_grad in before.items():
            _restore_flag(parameter, requires_grad)
        raise


def ranks_by_name(ranks: Mapping[str, int] | AllocationLike) -> Mapping[str, int]:
    """{name: rank} of an Allocation, or of what is such a mapping already.

    >>> ranks_by_name({"q": 2})
    {'q': 2}
    """
    by_name = ranks if isinstance(ranks, Mapping) else getattr(ranks, "ranks", None)
    if not isinstance(by_name, Mapping) or not by_name:
        is_allocator = callable(getattr(ranks, "allocate", None))
        hint = ", an allocator: pass its allocate(budget)" if is_allocator else ""
        raise ValueError(
            f"expected an Allocation or a non-empty {{module name: rank}}, got {ranks!r}{hint}"
        )
    return by_name


def resolve_ranks(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """`ranks` in module order and under first names, after a check of every module and rank.

    Raises as `wrap` does unless every named module can get a LoRA layer of its rank.

    >>> shared = nn.Linear(4, 4)
    >>> resolve_ranks(nn.Sequential(shared, shared, nn.Linear(4, 2)), {"2": 1, "1": 3})
    {'0': 3, '2': 1}
    """
    refuse_peft(model)
    itself = without_wrappers(model)
    if isinstance(itself, LoRALinear) or linear_shape(itself) is not None:
        raise TypeError(
            f"the model itself is a {type(itself).__name__}, so it has no parent to put a layer "
            "into: wrap nn.Sequential(model), or use LoRALinear"
        )
    require_unsharded(model)
    require_not_repacked(model)
    first, modules = first_names(model), modules_and_stacks(model)
    plain_names = {given: plain_name(given, first) for given in ranks}
    named_ids = {id(modules[name]) for name in plain_names.values() if name in modules}
    fixed_ids = modules_in_wrappers(model)
    resolved: dict[str, int] = {}
    for given, rank in ranks.items():
        name = plain_names[given]
        module = modules.get(name)
        shape = None if module is None or isinstance(module, LoRALinear) else layer_shape(module)
        if module is None or shape is None:
            raise ValueError(explain_no_match(model, given))
        if isinstance(module, ExpertStack):
            _require_readable(name, module, modules[name.rpartition(".")[0]], fixed_ids)
        if id(module) in fixed_ids:
            raise ValueError(
                f"{name!r} has a wrapper of its own (torch.compile?), which goes on calling the "
                "plain layer: wrap() the model first, then compile the layer or what holds it"
            )
        _require_rank(name, rank, shape)
        _require_values(name, module)
        _require_gradients(name, module)
        _require_no_adapter_inside(name, module, named_ids)
        known = resolved.setdefault(first[name], rank)
        if known != rank:
            raise ValueError(
                f"{name!r} and {first[name]!r} are one module, but got ranks {rank} and {known}: "
                "give it one rank"
            )
    return {name: resolved[name] for name in dict.fromkeys(first.values()) if name in resolved}


def _require_readable(
    name: str, stack: ExpertStack, holder: nn.Module, fixed_ids: Collection[int]
) -> None:
    """Raise ValueError unless the module that holds the stack can read another value there."""
    if id(holder) in fixed_ids:
        raise ValueError(
            f"{name!r} lies in a module with a wrapper of its own (torch.compile?), which goes on "
            "reading the parameter: wrap() the model first, then compile"
        )
    if is_sharded(stack.weight):
        raise ValueError(
            f"{name!r} is a stack of experts that is sharded (FSDP2, tensor or expert "
            "parallelism), and the adapter needs all of it: take the unsharded model, or leave the "
            "stack out"
        )
    if is_offloaded(holder):
        raise ValueError(
            f"{name!r} is offloaded by accelerate (device_map or cpu_offload), so that an adapter "
            "beside it could not train: load the model onto devices that hold all of it, then wrap"
        )


def _require_rank(name: str, rank: int, shape: tuple[int, int]) -> None:
    if not is_integer(rank, 0, min(shape)):
        raise ValueError(
            f"rank of {name!r}: expected an integer from 0 to min{shape}, got {rank!r}"
        )


def _require_values(name: str, module: nn.Module) -> None:
    if is_offloaded(module):
        raise ValueError(
            f"{name!r} is offloaded by accelerate (device_map or cpu_offload), so that an adapter "
            "beside it could not train: scores may be taken as it is, but load the model onto "
            "devices that hold all of it, then wrap"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            f"{name!r} is on the meta device: load its weights (to_empty, load_state_dict), then "
            "wrap"
        )


def _require_gradients(name: str, module: nn.Module) -> None:
    reason = why_no_backward(module)
    if reason is not None:
        raise ValueError(
            f"{name!r} is a {type(module).__name__} without gradients, beside which no adapter can "
            f"train: {reason}"
        )


def _require_no_adapter_inside(name: str, module: nn.Module, named_ids: set[int]) -> None:
    for key, inner in module.named_modules():
        if inner is not module and (id(inner) in named_ids or isinstance(inner, LoRALinear)):
            raise ValueError(f"{name!r} contains '{name}.{key}': adapt one of the two, not both")


def _named_parameters(
    model: nn.Module, patterns: str | Sequence[str], adapted: set[int]
) -> set[int]:
    """The ids of the parameters in the modules that the names and globs match.

    Each pattern must match a parameter that is not among the `adapted` ones, and none besides these
    that cannot train.
    """
    named: set[int] = set()
    for pattern in as_patterns(patterns, "trainable"):
        matching = {
            id(parameter): parameter
            for module in matching_modules(model, pattern, "trainable").values()
            for parameter in module.parameters()
            if can_train(parameter)
        }
        if matching and matching.keys() <= adapted:
            raise ValueError(
                f"trainable={pattern!r} names only layers that get an adapter or have one, whose "
                "own weights stay frozen (tied weights too): leave it out of `trainable`, or out "
                "of `ranks`"
            )
        if any(_is_inference(p) for key, p in matching.items() if key not in adapted):
            raise ValueError(
                f"trainable={pattern!r} names parameters that were made under "
                "torch.inference_mode(), and cannot train: make or load the model outside of it, "
                "or leave them out of `trainable`"
            )
        named |= matching.keys()
    return named


def can_train(parameter: Tensor) -> bool:
    """Whether the type of its entries has gradients."""
    return parameter.is_floating_point() or parameter.is_complex()


def _is_inference(parameter: Tensor) -> bool:
    """Whether the parameter was made under torch.inference_mode(), so that it cannot train."""
    return not is_lazy(parameter) and parameter.is_inference()


def _set_requires_grad(model: nn.Module, named: set[int]) -> None:
    """The adapters and the parameters with these ids train, and the others are frozen."""
    trained = named | {
        id(parameter)
        for layer in lora_layers(model).values()
        for parameter in layer.parameters(recurse=False)
    }
    # Set as an attribute: a lazy parameter without values has no requires_grad_().
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad = False
        elif not _is_inference(parameter):  # torch refuses to let an inference tensor train
            parameter.requires_grad = True


def _warn_of_frozen_modules(model: nn.Module, before: Mapping[nn.Parameter, bool]) -> None:
    """Warn the caller of `wrap` or its like of modules that trained before and do not any more."""
    modules = modules_by_name(model)
    frozen = [
        name
        for name in all_names(model)
        if not isinstance(modules[name], LoRALinear)
        and any(
            before.get(parameter, False) and not parameter.requires_grad
            for parameter in modules[name].parameters(recurse=False)
        )
    ]
    if frozen:
        warn_caller(
            f"this call freezes {quoted_names(frozen)}, which required a gradient until now: name "
            "in `trainable` again what shall go on training beside the adapters, or give "
            "trainable=None to leave every requires_grad as it is",
        )


def _warn_of_repacking(model: nn.Module) -> None:
    """Warn the caller of `wrap` or its like of 4-bit layers without an adapter that may repack."""
    adapted = {id(layer.base) for layer in lora_layers(model).values()}
    unguarded = [
        name
        for name, module in model.named_modules()
        if id(module) not in adapted and would_repack(module)
    ]
    if unguarded:
        warn_caller(
            f"{quoted_names(unguarded)}: bitsandbytes repacks such a 4-bit layer for good when it "
            "is called on the CPU in evaluation mode, and no gradient passes through it "
            f"afterwards. Where the model is evaluated and then trained further, set {REPACKS} = "
            "False on these modules first (layers with an adapter are guarded)",
        )


def _restore_flag(parameter: nn.Parameter, requires_grad: bool) -> None:
    """Set `requires_grad`, in inference mode if that is where the parameter was made."""
    with torch.inference_mode(_is_inference(parameter)):
        parameter.requires_grad = requires_grad


def _put_in(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Put every layer into the places of its base."""
    replace_modules(model, {id(layer.base): layer for layer in layers.values()})
    modules = modules_by_name(model)
    for name, layer in layers.items():
        if isinstance(layer, LoRAExperts):
            holder, _, key = name.rpartition(".")
            put_into(modules[holder], key, layer)


def _put_back(model: nn.Module, layers: Iterable[LoRALinear]) -> None:
    """Put every base into the places of its layer."""
    stacks = {id(layer) for layer in layers if isinstance(layer, LoRAExperts)}
    for holder in modules_by_name(model).values():
        for key, child in list(holder._modules.items()):
            if id(child) in stacks:
                take_out_of(holder, key)
    replace_modules(model, {id(layer): layer.base for layer in layers})


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put new[id(old)] into every slot of the model that holds `old`.

    >>> model = nn.Sequential(nn.ReLU())
    >>> replace_modules(model, {id(model[0]): nn.GELU()})
    >>> model
    Sequential(
      (0): GELU(approximate='none')
    )
    """
    for parent in modules_by_name(model).values():
        for key, child in parent._modules.items():
            if id(child) in new:
                parent._modules[key] = new[id(child)]


# ---- out ----------------------------------------------------------------------------------------


def unwrap(model: nn.Module) -> list[str]:
    """Take every LoRA layer out, so that the original modules are in their places again.

    An unmerged layer loses its adapter; the module of a merged one keeps W + ΔW. The parameters of
    these modules get back their old names, and the `requires_grad` that they had when their layer
    was made. Other parameters that `wrap` froze stay frozen: `model.requires_grad_(True)` frees
    them.

    Returns: the names of the layers taken out.

    Raises:
        TypeError: the model itself is a LoRALinear.

    >>> from minirank import unwrap, wrap
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> layers = wrap(model, {"0": 1})
    >>> unwrap(model), model
    (['0'], Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
    ))
    """
    layers = lora_layers(model)
    if model in layers.values():
        raise TypeError("the model itself is a LoRALinear, which no parent holds: take its .base")
    take_out(model, layers.values())
    return list(layers)


def take_out(model: nn.Module, layers: Collection[LoRALinear]) -> None:
    """Put the original modules back into the places of these layers of the model."""
    for layer in layers:
        layer.base.requires_grad_(False)
    # Only now: of two layers with a tied weight the second was made when it was frozen already.
    for layer in layers:
        _restore_requires_grad(layer)
        layer.weight_set_aside = None
        forget_wrapped(layer)
    _put_back(model, layers)


def _restore_requires_grad(layer: LoRALinear) -> None:
    parameters = list(layer.base.named_parameters())
    # A weight that merging set aside may live on in another module that it was tied to.
    parameters += [("weight", weight) for weight in layer.weight_set_aside or ()]
    for name, parameter in parameters:
        if layer.base_requires_grad.get(name, False):
            _restore_flag(parameter, True)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """A block in which the model computes what its base model computes.

    Raises:
        ValueError: a layer is merged, so that its weight holds the adapter.

    >>> from minirank import disabled, wrap
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> layer, x = wrap(model, {"0": 1})["0"], torch.ones(1, 4)
    >>> _ = nn.init.ones_(layer.lora_B)
    >>> with disabled(model):
    ...     torch.equal(model(x), layer.base(x))
    True
    >>> torch.equal(model(x), layer.base(x))
    False
    """
    layers = list(lora_layers(model).values())
    if any(layer.merged for layer in layers):
        raise ValueError(
            "expected unmerged layers: a merged layer's weight holds its adapter, which cannot be "
            "disabled. unmerge() the model first"
        )
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
