"""Put LoRA layers into any nn.Module, merge them and take them out again.

Every function works in place and all or nothing: it plans and checks everything first, so a call that raises leaves
the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import as_generator, is_integer
from .linear import applies_weight, linear_shape
from .lora import LoRALinear, check_scaling
from .targets import first_names, matching_modules, no_match, walk


class HasRanks(Protocol):
    """What an Allocation offers (a plain {name: rank} does as well)."""

    @property
    def ranks(self) -> Mapping[str, int]: ...

    @property
    def keep(self) -> Mapping[str, Tensor] | None: ...


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of `model` by name, each once, under its first name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


@torch.inference_mode(False)  # parameters made in inference mode could not train
def wrap(
    model: nn.Module,
    ranks: Mapping[str, int] | HasRanks,
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
    """Put a LoRALinear around each named linear layer; the model computes the same function as before.

    Args:
        ranks: an Allocation, or {name: rank}. Rank 0 leaves the plain module. Any name of a shared module will do.
        scaling: s in y = W x + b + s · B (gate ⊙ A x), the same for every layer.
        alpha, reference_rank, rank_stabilized: the other way to fix s: alpha / reference_rank, or
            alpha / sqrt(reference_rank) if `rank_stabilized`. The default reference rank is the average rank asked
            for in this call, zeros included; the default alpha makes the plain scaling 1.
        gate, dropout, dtype: see `LoRALinear`; the same for every layer.
        trainable: names or globs of modules that train beside the adapters, such as a new head. Everything else in
            the model is frozen. None leaves every parameter outside the wrapped layers as it is.
        generator: a torch.Generator or a seed, for the new parameters.

    A later call on the same model adds to what trains: the adapters and modules of earlier calls go on training, and
    what is frozen stays frozen. The weights inside a LoRA layer are frozen in any case.

    Returns: the new layers by name. Changes: these slots of their parents, and `requires_grad` as said.

    Raises:
        ValueError: unknown or already wrapped name, rank out of range, meta device, two ranks for one module.
        TypeError: the model itself is the linear layer, so there is no parent to put the new one into.
    """
    wanted = resolve_ranks(model, plain_ranks(ranks))
    if not any(wanted.values()):
        raise ValueError("every rank is 0: there is nothing to wrap")
    check_scaling(scaling, alpha, reference_rank, rank_stabilized)
    if reference_rank is None:
        reference_rank = sum(wanted.values()) / len(wanted)
    if scaling is not None:
        alpha = scaling * reference_rank
    generator = as_generator(generator)

    def make(module: nn.Module, rank: int) -> LoRALinear:
        layer = LoRALinear(
            module,
            rank,
            alpha=alpha,
            reference_rank=reference_rank,
            rank_stabilized=rank_stabilized,
            gate=gate,
            dropout=dropout,
            dtype=dtype,
            generator=generator,
        )
        if scaling is not None:
            layer.scaling = float(scaling)  # without the rounding of alpha / reference_rank
        return layer

    return insert_layers(
        model,
        {name: partial(make, rank=rank) for name, rank in wanted.items() if rank > 0},
        trainable,
    )


def insert_layers(
    model: nn.Module,
    make: Mapping[str, Callable[[nn.Module], LoRALinear]],
    trainable: str | Sequence[str] | None,
) -> dict[str, LoRALinear]:
    """Put make[name](module) into the place of every named module; names as `resolve_ranks` returns them, `trainable` as in
    `wrap`. If anything raises, the model is as it was."""
    modules = dict(walk(model))
    adapted = {id(p) for name in make for p in modules[name].parameters()}
    named = set() if trainable is None else _parameters_of(model, trainable, adapted)
    earlier = lora_layers(model)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers: dict[str, LoRALinear] = {}
    try:
        for name, make_layer in make.items():
            layers[name] = make_layer(modules[name])
        bases = [layer.base for layer in [*earlier.values(), *layers.values()]]
        frozen = {id(parameter) for base in bases for parameter in base.parameters()}
        trained = named - frozen
        for parameter in model.parameters():
            # Set as an attribute: a lazy parameter without values has no requires_grad_().
            if id(parameter) in trained:
                parameter.requires_grad = True
            elif trainable is not None and not earlier:
                parameter.requires_grad = False
        _replace(model, {id(layer.base): layer for layer in layers.values()})
        return layers
    except BaseException:
        _replace(model, {id(layer): layer.base for layer in layers.values()})
        for parameter, requires_grad in before:
            parameter.requires_grad = requires_grad
        raise


def plain_ranks(ranks: Mapping[str, int] | HasRanks) -> Mapping[str, int]:
    found = ranks if isinstance(ranks, Mapping) else getattr(ranks, "ranks", None)
    if not isinstance(found, Mapping) or not found:
        raise ValueError(
            f"expected an Allocation or a non-empty {{module name: rank}}, got {ranks!r}"
        )
    return found


def resolve_ranks(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """`ranks` in module order and under first names, checked: every named module can get its LoRA layer."""
    if linear_shape(model) is not None:
        raise TypeError(
            f"the model itself is a {type(model).__name__}: wrap nn.Sequential(model), or use LoRALinear"
        )
    first, modules = first_names(model), dict(walk(model))
    named = {id(modules[name]) for name in ranks if name in modules}
    wanted: dict[str, int] = {}
    for name, rank in ranks.items():
        module = modules.get(name)
        shape = None if module is None or isinstance(module, LoRALinear) else linear_shape(module)
        if module is None or shape is None:
            raise ValueError(no_match(model, name))
        if not is_integer(rank, 0, min(shape)):
            raise ValueError(
                f"rank of {name!r}: expected an integer from 0 to min{shape}, got {rank!r}"
            )
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"{name!r} is on the meta device: load its weights (to_empty, load_state_dict), then wrap"
            )
        for key, inner in module.named_modules():
            if inner is not module and (id(inner) in named or isinstance(inner, LoRALinear)):
                raise ValueError(
                    f"{name!r} contains '{name}.{key}': adapt one of the two, not both"
                )
        if wanted.setdefault(first[name], rank) != rank:
            raise ValueError(
                f"{name!r} and {first[name]!r} are one module, but got ranks {rank} and {wanted[first[name]]}"
            )
    return {name: wanted[name] for name in dict.fromkeys(first.values()) if name in wanted}


def _parameters_of(model: nn.Module, patterns: str | Sequence[str], adapted: set[int]) -> set[int]:
    """The ids of the parameters in the modules that each name or glob matches, some of them not in `adapted`."""
    chosen: set[int] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = matching_modules(model, pattern, "trainable")
        ids = {
            id(p)
            for module in found.values()
            for p in module.parameters()
            if p.is_floating_point() or p.is_complex()
        }
        if ids and ids <= adapted:
            raise ValueError(
                f"trainable={pattern!r} names only layers that get an adapter, whose own weights stay frozen: leave it "
                "out of one of the two"
            )
        chosen |= ids
    return chosen


def _replace(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put new[id(old)] into every slot of the model that holds `old`."""
    for parent in [module for _, module in walk(model)]:
        for key, child in parent._modules.items():
            if id(child) in new:
                parent._modules[key] = new[id(child)]


def unwrap(model: nn.Module) -> list[str]:
    """Take every LoRA layer out: the original modules are back in their places, under their old parameter names and
    with the `requires_grad` that their parameters had when the layer was made. Layers that are not merged lose their adapter; of those that are
    merged the plain module keeps W + ΔW. What `wrap` froze elsewhere in the model stays frozen:
    `model.requires_grad_(True)` thaws it. Returns the names of the layers taken out."""
    layers = lora_layers(model)
    if model in layers.values():
        raise TypeError("the model itself is a LoRALinear: take its .base")
    for layer in layers.values():
        layer.base.requires_grad_(False)
    for layer in (
        layers.values()
    ):  # after that: of layers with a tied weight only the first saw it trainable
        layer.release_base()
    _replace(model, {id(layer): layer.base for layer in layers.values()})
    return list(layers)


@torch.inference_mode(False)
def merge(model: nn.Module, *, untie: bool = False) -> list[str]:
    """Put W + ΔW, computed in float32 or better, into the weight of every LoRA layer that is not merged yet; the
    forward pass then costs what the base model's does. `unmerge` restores W bit for bit.

    A weight that is shared with another module (a head tied to an embedding) is refused, since the two would differ
    from then on; untie=True accepts that, and leaves the other module's weight as it is (transformers may tie the
    two again on loading: set its config.tie_word_embeddings to False). Until `unmerge` or `unwrap`, a merged layer does
    not train, and its state_dict is refused.

    Returns the names of the layers merged now.

    Raises ValueError: tied weight, W + ΔW not finite, or a base that does not compute W x + b from its `weight`
    parameter. Nothing is merged then.
    """
    layers = {name: layer for name, layer in lora_layers(model).items() if not layer.merged}
    shared = _shared_storages(model)
    weights = {}
    for name, layer in layers.items():
        weight = layer.base._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"the weight of {name!r} is computed (a parametrization?), not a parameter: cannot merge it"
            )
        if not applies_weight(layer.base):
            raise ValueError(
                f"{name!r} is a {type(layer.base).__name__} that does not compute W x + b from its weight: merging "
                "would change its function; keep the adapter unmerged"
            )
        own = f"{name}.base.weight" if name else "base.weight"
        others = shared.get(weight.untyped_storage().data_ptr(), set()) - {own}
        if others and not untie:
            raise ValueError(
                f"the weight of {name!r} is tied to {', '.join(sorted(others))}, which merging would leave behind: "
                "merge(model, untie=True) accepts that the two differ, or keep the adapter unmerged"
            )
        with torch.no_grad():
            merged = layer.merged_weight()
            if not torch.isfinite(torch.stack(torch.aminmax(merged))).all():
                raise ValueError(
                    f"W + ΔW of {name!r} is not finite in {merged.dtype}: was the adapter's training stable?"
                )
        weights[name] = merged
    for name, layer in layers.items():
        layer.merge(weights[name])
    return list(layers)


def _shared_storages(model: nn.Module) -> dict[int, set[str]]:
    """{storage address: names of the parameters and buffers in it}."""
    owners: dict[int, set[str]] = {}
    for module_name, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if (
                tensor is None
                or is_lazy(tensor)
                or tensor.is_meta
                or tensor.layout != torch.strided
            ):
                continue
            if tensor.numel() > 0:
                name = f"{module_name}.{key}" if module_name else key
                owners.setdefault(tensor.untyped_storage().data_ptr(), set()).add(name)
    return owners


def unmerge(model: nn.Module) -> list[str]:
    """Put the original weights back, bit for bit (and tied again, where they were). Returns the names of the layers."""
    layers = {name: layer for name, layer in lora_layers(model).items() if layer.merged}
    for layer in layers.values():
        layer.unmerge()
    return list(layers)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model's function inside the block: `with disabled(model): reference = model(x)`. Refused when merged."""
    layers = list(lora_layers(model).values())
    if any(layer.merged for layer in layers):
        raise ValueError(
            "the weight of a merged layer holds its adapter, which cannot be disabled: unmerge() first"
        )
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
