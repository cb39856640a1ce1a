"""PEFT's format: adapters of mixed ranks and scalings written for it, and read as it reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import sqrt
from typing import Any

from torch import Tensor

from ... import reference
from ...reference.peft_format import PREFIX, of_layer
from ..case import Arguments, CaseSpec, Contract, Implementation
from ..comparison import Rule
from .layouts import View, normal, plain, transposed, with_gaps

EXPORT = "PEFT reads alpha / r · B A = s · B diag(gate) A, for these layers alone"
DELTA = "ΔW = alpha / r · B A, or alpha / sqrt(r) · B A with use_rslora"
SUFFIXES = ("fc", "enc.fc", "xfc", "enc.xfc", "fc2")  # each the end of another, or nearly so
REGEX = ("a+b", "w[0]", "x(1)", "q|v", "c*", "$h", "^t", "back\\slash", "n{2}", "u?")

# ---- peft_export ---------------------------------------------------------------------------------


def layers_of(
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    gate: bool = False,
    d_in: int = 6,
    d_out: int = 5,
    view: View = plain,
) -> dict[str, dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = {}
    for seed, (name, rank) in enumerate(ranks.items()):
        c = normal(rank, seed=100 + seed)
        c[1:2] = 0.0
        layers[name] = {
            "A": view(normal(rank, d_in, seed=200 + seed)),
            "B": view(normal(d_out, rank, seed=300 + seed)),
            "gate": view(c) if gate else None,
            "scaling": scalings[name],
        }
    return layers


def export_arguments(
    ranks: Mapping[str, int], scalings: Mapping[str, float] | float = 2.0, **options: Any
) -> Arguments:
    if not isinstance(scalings, Mapping):
        scalings = dict.fromkeys(ranks, scalings)
    return Arguments((layers_of(ranks, scalings, **options),))


def exported(
    implementation: Implementation, arguments: Arguments, others: Sequence[str] = ()
) -> Any:
    """What PEFT would make of the files, in a model that has linear layers `others`, too."""
    (layers,) = arguments.positional
    tensors, given = implementation(layers)
    config = as_read(given)
    adapted = [name for name, layer in layers.items() if len(layer["A"])]
    empty = [name for name in layers if name not in adapted]
    selected = [name for name in [*layers, *others] if is_target(config, name)]
    left = [
        key for key in tensors if any(key.startswith(f"{PREFIX}{name}.lora_") for name in empty)
    ]
    return {
        "ΔW": {name: reference.peft_delta_weight(tensors, config, name) for name in adapted},
        "rank in the configuration": {
            name: of_layer(config.get("rank_pattern"), name, config.get("r", 8)) for name in adapted
        },
        "target_modules": Rule(
            set(selected) == set(adapted), f"selects {adapted}", f"selects {selected}"
        ),
        "tensors of layers of rank 0": Rule(not left, "none", f"{left}"),
        "kind of adapter": plain_lora(config),
    }


def as_read(config: Any) -> dict[str, Any]:
    """The configuration after it was written to JSON and read again."""
    given = config.to_dict() if hasattr(config, "to_dict") else config
    read: dict[str, Any] = json.loads(json.dumps(given, default=in_json))
    return read


def in_json(value: Any) -> Any:
    """PEFT writes sets as lists; numbers of other libraries are numbers."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.item() if hasattr(value, "item") else str(value)


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """PEFT's rule: a string is a regular expression for whole names, a list holds their ends."""
    chosen, excluded = config.get("target_modules"), config.get("exclude_modules")
    return names_it(chosen, name) and not (excluded and names_it(excluded, name))


def names_it(modules: Any, name: str) -> bool:
    if isinstance(modules, str):
        return modules.lower() == "all-linear" or re.fullmatch(modules, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in modules or ())


def plain_lora(config: Mapping[str, Any]) -> Rule:
    """Does an option make another function of A and B than LoRA's?"""
    options = {key: config[key] for key in ("use_dora", "modules_to_save") if config.get(key)}
    if config.get("bias") not in (None, "none"):
        options["bias"] = config["bias"]
    if config.get("peft_type") != "LORA":
        options["peft_type"] = config.get("peft_type")
    return Rule(not options, "peft_type 'LORA' and no other option", f"{options}")


def export_case(
    name: str,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float] | float = 2.0,
    others: Sequence[str] = ("other", "enc.other"),
    **options: Any,
) -> CaseSpec:
    arguments = partial(export_arguments, ranks, scalings, **options)
    terms = max(ranks.values()) + 4
    return CaseSpec(name, EXPORT, arguments, partial(exported, others=others), terms)


def mixed(names: Sequence[str], ranks: Sequence[int] = (3, 1, 2, 4)) -> dict[str, int]:
    return {name: ranks[i % len(ranks)] for i, name in enumerate(names)}


def mixed_scalings(names: Sequence[str]) -> dict[str, float]:
    return {name: 0.3 + 0.7 * i for i, name in enumerate(names)}


BLOCKS = ("h.1", "h.10", "h.11", "g.h.1", "k.1.fc", "k.10.fc")
OTHER_BLOCKS = ("h.100", "hx1", "k_1.fc", "k.1.fc2", "f.h.1", "k.10.xfc", "1", "10", "g.k.1.fc")
LOOKALIKES = ("aab", "ab", "w0", "x1", "q", "v", "c", "cc", "nn", "u", "", "h", "t", "enc.q")
ENDS = ("dec.fc", "enc.fc2", "enc.enc.fc", "c", "encxfc")
EXPORTS = (
    export_case("rank 1", {"fc": 1}),
    export_case("one layer", {"fc": 3}),
    export_case("a name with dots", {"enc.layer.0.fc": 3}, others=("fc", "layer.0.fc", "0.fc")),
    export_case("gate", {"fc": 3, "up": 2}, gate=True),
    export_case("square", {"fc": 4, "up": 4}, gate=True, d_in=4, d_out=4),
    export_case("equal ranks, equal scalings", mixed(("a", "b", "c"), (2,)), 1.5),
    export_case("equal ranks", mixed(("a", "b", "c"), (2,)), {"a": 0.5, "b": 2.0, "c": 1.0}),
    export_case("equal scalings", mixed(("a", "b", "c", "d"), (2, 4, 1, 4)), 0.5),
    export_case("equal alpha, other ranks", {"a": 1, "b": 2, "c": 4}, {"a": 4, "b": 2, "c": 1}),
    export_case("scaling 1", mixed(("a", "b", "c")), 1.0),
    export_case("scalings", mixed(("a", "b", "c")), {"a": 1e-4, "b": 1 / 3, "c": 300.0}),
    export_case("rank 0", {"a": 2, "b": 0, "c": 1}, gate=True),
    export_case("rank 0 first", {"a": 0, "b": 2}),
    export_case("rank 0, a longer name", {"fc": 2, "enc.fc": 0, "enc.up": 1}),
    export_case("rank 0, a shorter name", {"fc": 0, "enc.fc": 2, "encfc": 0}),
    export_case("common ends", mixed(SUFFIXES), mixed_scalings(SUFFIXES), ENDS),
    export_case(
        "common ends, longest first", mixed(SUFFIXES[::-1]), mixed_scalings(SUFFIXES[::-1]), ENDS
    ),
    export_case("blocks", mixed(BLOCKS), mixed_scalings(BLOCKS), OTHER_BLOCKS),
    export_case(
        "blocks, last first", mixed(BLOCKS[::-1]), mixed_scalings(BLOCKS[::-1]), OTHER_BLOCKS
    ),
    export_case("regex characters", mixed(REGEX), mixed_scalings(REGEX), LOOKALIKES),
    export_case(
        "names that are no regex",
        mixed(("(", "enc.[x", "*w")),
        mixed_scalings(("(", "enc.[x", "*w")),
    ),
    export_case("tensors transposed", mixed(("a", "b")), gate=True, view=transposed),
    export_case("tensors with gaps", mixed(("a", "b")), gate=True, view=with_gaps),
)


def export_twin(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Implementation:
    """The reference's export of layers that were changed before."""

    def twin(layers: Mapping[str, Any]) -> Any:
        return reference.peft_export({name: change(layer) for name, layer in layers.items()})

    return twin


def config_twin(change: Callable[[dict[str, Any], Mapping[str, Any]], Any]) -> Implementation:
    """The reference's export with change(config, ranks) in place of parts of the configuration."""

    def twin(layers: Mapping[str, Any]) -> Any:
        tensors, config = reference.peft_export(layers)
        ranks = {name: len(layer["A"]) for name, layer in layers.items() if len(layer["A"])}
        return tensors, {**config, **change(config, ranks)}

    return twin


def alphas(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    return dict(zip(ranks, config["alpha_pattern"].values(), strict=True))


def scaling_times(factor: Callable[[dict[str, Any]], float]) -> Implementation:
    return export_twin(lambda layer: {**layer, "scaling": layer["scaling"] * factor(layer)})


def with_gate(change: Callable[[Tensor], Tensor | None]) -> Implementation:
    return export_twin(
        lambda layer: {**layer, "gate": None if layer["gate"] is None else change(layer["gate"])}
    )


def with_empty_layers(layers: Mapping[str, Any]) -> Any:
    """Layers of rank 0 are written like the others."""
    tensors, config = reference.peft_export(layers)
    for name, layer in layers.items():
        if len(layer["A"]) == 0:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer["A"]
            tensors[f"{PREFIX}{name}.lora_B.weight"] = layer["B"]
    return tensors, {**config, "target_modules": "|".join(map(re.escape, layers))}


EXPORT_TWINS: dict[str, Implementation] = {
    "an export without the gates": with_gate(lambda gate: None),
    "an export with the gate applied twice": with_gate(lambda gate: gate * gate),
    "an export with the absolute value of the gates": with_gate(lambda gate: gate.abs()),
    "an export without the scaling (alpha = r)": scaling_times(lambda la: 1 / la["scaling"]),
    "an export with alpha = scaling (PEFT divides by r, so that alpha = scaling · r)": (
        scaling_times(lambda layer: 1 / max(len(layer["A"]), 1))
    ),
    "an export with alpha = scaling · sqrt(r), and no use_rslora": scaling_times(
        lambda layer: 1 / max(len(layer["A"]), 1) ** 0.5
    ),
    "an export with the scaling in alpha and in B": scaling_times(lambda layer: layer["scaling"]),
    "an export that asks for use_rslora with alpha = scaling · r": config_twin(
        lambda config, ranks: {"use_rslora": True}
    ),
    "an export without alpha_pattern": config_twin(lambda config, ranks: {"alpha_pattern": {}}),
    "an export without rank_pattern": config_twin(lambda config, ranks: {"rank_pattern": {}}),
    "an export without patterns": config_twin(
        lambda config, ranks: {"rank_pattern": {}, "alpha_pattern": {}}
    ),
    "an export with one alpha, computed from the first layer": config_twin(
        lambda config, ranks: {
            "alpha_pattern": {},
            "lora_alpha": next(iter(config["alpha_pattern"].values())),
        }
    ),
    "an export with escaped keys, which also match the ends of longer names": config_twin(
        lambda config, ranks: {
            "rank_pattern": {re.escape(name): rank for name, rank in ranks.items()},
            "alpha_pattern": {re.escape(n): alpha for n, alpha in alphas(config, ranks).items()},
        }
    ),
    "an export with plain names as keys of patterns (they are regular expressions)": config_twin(
        lambda config, ranks: {"rank_pattern": ranks, "alpha_pattern": alphas(config, ranks)}
    ),
    "an export with target_modules as a list, whose names are taken for ends": config_twin(
        lambda config, ranks: {"target_modules": list(ranks)}
    ),
    "an export with the last parts of the names as target_modules": config_twin(
        lambda config, ranks: {"target_modules": sorted({n.rpartition(".")[2] for n in ranks})}
    ),
    "an export with unescaped names in target_modules": config_twin(
        lambda config, ranks: {"target_modules": "|".join(ranks)}
    ),
    "an export with all-linear as target_modules": config_twin(
        lambda config, ranks: {"target_modules": "all-linear"}
    ),
    "an export for fan_in_fan_out": config_twin(lambda config, ranks: {"fan_in_fan_out": True}),
    "an export with the layers of rank 0": with_empty_layers,
}


# ---- peft_delta_weight ---------------------------------------------------------------------------


def delta_arguments(
    ranks: Mapping[str, int],
    config: Mapping[str, Any],
    others: Sequence[str] = (),
    d_in: int = 7,
    d_out: int = 5,
    view: View = plain,
) -> Arguments:
    """(tensors, config, all the names to ask for)"""
    tensors = {}
    for seed, (name, rank) in enumerate(ranks.items()):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = view(normal(rank, d_in, seed=400 + seed))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = view(normal(d_out, rank, seed=500 + seed))
    full = {"peft_type": "LORA", **config}
    return Arguments((tensors, full, (*ranks, *others)))


def read_layers(implementation: Implementation, arguments: Arguments) -> Any:
    tensors, config, names = arguments.positional
    return {name: implementation(tensors, config, name) for name in names}


def delta_case(
    name: str, ranks: Mapping[str, int], config: Mapping[str, Any], **options: Any
) -> CaseSpec:
    arguments = partial(delta_arguments, ranks, config, **options)
    return CaseSpec(name, DELTA, arguments, read_layers, max(ranks.values()) + 4)


def equal(names: Sequence[str], rank: int = 2) -> dict[str, int]:
    return dict.fromkeys(names, rank)


PATTERNS = {"rank_pattern": {"fc": 3, "up": 1}, "alpha_pattern": {"up": 5, "out": 12.5}}
MIXED = {"fc": 3, "up": 1, "out": 2}
SAME = {"r": 2, "lora_alpha": 3}
DELTAS = (
    delta_case("rank 1", {"fc": 1}, {"r": 1, "lora_alpha": 2}),
    delta_case("r and lora_alpha", equal(("fc", "up"), 3), {"r": 3, "lora_alpha": 6}),
    delta_case("no such layer", {"h.1": 2}, SAME, others=("h", "h.10", "1", "h.1.lora_A", "H.1")),
    delta_case("r of 8 and lora_alpha of 8 are meant", {"fc": 8}, {}, d_in=9, d_out=10),
    delta_case("lora_alpha of 8 is meant", {"fc": 2}, {"r": 2}),
    delta_case(
        "patterns are null", {"fc": 2}, SAME | {"rank_pattern": None, "alpha_pattern": None}
    ),
    delta_case("patterns are empty", {"fc": 2}, SAME | {"rank_pattern": {}, "alpha_pattern": {}}),
    delta_case(
        "rank_pattern", MIXED, {"r": 2, "lora_alpha": 4, "rank_pattern": {"fc": 3, "up": 1}}
    ),
    delta_case(
        "alpha_pattern",
        equal(("fc", "up", "out")),
        {"r": 2, "lora_alpha": 4, "alpha_pattern": {"fc": 3, "up": 0.5}},
    ),
    delta_case("both patterns", MIXED, {"r": 2, "lora_alpha": 4, **PATTERNS}),
    delta_case("use_rslora", {"fc": 3}, {"r": 3, "lora_alpha": 6, "use_rslora": True}),
    delta_case(
        "use_rslora, patterns", MIXED, {"r": 2, "lora_alpha": 4, "use_rslora": True, **PATTERNS}
    ),
    delta_case(
        "use_rslora is null or false",
        {"fc": 3},
        {"r": 3, "lora_alpha": 6, "use_rslora": None, "fan_in_fan_out": False},
    ),
    delta_case(
        "fan_in_fan_out", MIXED, {"r": 2, "lora_alpha": 4, "fan_in_fan_out": True, **PATTERNS}
    ),
    delta_case(
        "fan_in_fan_out, square",
        {"fc": 2},
        SAME | {"fan_in_fan_out": True},
        d_in=4,
        d_out=4,
    ),
    delta_case("square", {"fc": 4}, {"r": 4, "lora_alpha": 6}, d_in=4, d_out=4),
    delta_case(
        "a key matches ends behind a dot",
        equal(SUFFIXES),
        SAME | {"alpha_pattern": {"fc": 7}},
    ),
    delta_case(
        "the first key counts",
        equal(("fc", "enc.fc")),
        SAME | {"alpha_pattern": {"fc": 7, "enc.fc": 11, ".*c": 13}},
    ),
    delta_case(
        "the first key counts, longest first",
        equal(("fc", "enc.fc", "dec.fc")),
        SAME | {"alpha_pattern": {"enc.fc": 11, "fc": 7, ".*": 1}},
    ),
    delta_case(
        "ranks by the first key",
        {"fc": 3, "enc.fc": 3, "dec.fc": 3},
        {"r": 2, "lora_alpha": 5, "rank_pattern": {"fc": 3, "enc.fc": 1, "dec.fc": 2}},
    ),
    delta_case(
        "a key with ^",
        equal(("fc", "enc.fc")),
        SAME | {"alpha_pattern": {"^fc": 7}},
    ),
    delta_case(
        "a key is no start of a name",
        equal(("enc.fc", "h.1", "h.10", "g.1.fc")),
        SAME | {"alpha_pattern": {"enc": 7, "h.1": 11, "g.1": 13}},
    ),
    delta_case(
        "a dot in a key is any character",
        equal(("h.1", "h_1", "h.10", "hx1", "g.h.1", "h1")),
        SAME | {"alpha_pattern": {"h.1": 7}},
    ),
    delta_case(
        "regular expressions",
        equal(("h.0.q", "h.3.q", "h.4.q", "h.12.q", "h.0.v", "g.h.2.v")),
        SAME | {"alpha_pattern": {r"h\.[0-3]\.q": 7, r".*\.v": 11, r"h\.\d+\.q$": 13}},
    ),
    delta_case(
        "alternatives",
        equal(("q", "v", "enc.q", "enc.v", "qx", "xv", "enc.qx")),
        SAME | {"alpha_pattern": {"q|v": 7}},
    ),
    delta_case(
        "a key that is the name, and not itself as an expression",
        equal(("w[0]", "a+b", "x(1)", "w0", "x1", "aab")),
        SAME | {"alpha_pattern": {"w[0]": 7, "a+b": 11, "x(1)": 13}},
    ),
    delta_case(
        "escaped keys",
        equal(REGEX),
        SAME | {"alpha_pattern": {f"^{re.escape(name)}": 3 + i for i, name in enumerate(REGEX)}},
    ),
    delta_case("tensors transposed", MIXED, {"r": 2, **PATTERNS}, view=transposed),
    delta_case("tensors with gaps", MIXED, {"r": 2, **PATTERNS}, view=with_gaps),
)

Find = Callable[[Mapping[str, Any], str, Any], Any]


def delta_twin(
    find: Find = of_layer,
    scaling: Callable[[float, int, bool], float] = lambda alpha, rank, root: (
        alpha / (sqrt(rank) if root else rank)
    ),
) -> Implementation:
    """The reference with another way to find a layer's numbers, or to compute with them."""

    def twin(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Any:
        if f"{PREFIX}{name}.lora_A.weight" not in tensors:
            return None
        rank = find(config.get("rank_pattern") or {}, name, config.get("r", 8))
        alpha = find(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
        factor = scaling(alpha, rank, bool(config.get("use_rslora")))
        plain_config = {"r": 1, "lora_alpha": factor} | {
            key: config[key] for key in ("fan_in_fan_out",) if key in config
        }
        return reference.peft_delta_weight(tensors, plain_config, name)

    return twin


def changed_config(**changes: Any) -> Implementation:
    """The reference with a configuration in which some entries are others."""

    def twin(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Any:
        return reference.peft_delta_weight(tensors, {**config, **changes}, name)

    return twin


def first_key(matches: Callable[[str, str], Any]) -> Find:
    def find(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
        return next((value for key, value in pattern.items() if matches(key, name)), default)

    return find


def last_key(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return of_layer(dict(list(pattern.items())[::-1]), name, default)


def longest_key(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    ordered = sorted(pattern.items(), key=lambda item: -len(item[0]))
    return of_layer(dict(ordered), name, default)


def exact_name_first(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return pattern[name] if name in pattern else of_layer(pattern, name, default)


def or_zeros(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Any:
    """Zeros for a layer without an adapter."""
    found = reference.peft_delta_weight(tensors, config, name)
    if found is not None:
        return found
    A, B = (next(v for k, v in tensors.items() if f".lora_{ab}." in k) for ab in "AB")
    return 0 * B @ A


def by_rows_of_A(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Any:
    """alpha / (the rank in r), whatever rank_pattern says."""
    return reference.peft_delta_weight(tensors, {**config, "rank_pattern": {}}, name)


DELTA_TWINS: dict[str, Implementation] = {
    "ΔW with alpha / r, where use_rslora asks for alpha / sqrt(r)": changed_config(
        use_rslora=False
    ),
    "ΔW with alpha / sqrt(r), where alpha / r is asked for": changed_config(use_rslora=True),
    "B A alone": delta_twin(scaling=lambda alpha, rank, root: 1.0),
    "alpha · B A, not divided by r": delta_twin(scaling=lambda alpha, rank, root: alpha),
    "ΔW with alpha / r², divided by r twice": delta_twin(
        scaling=lambda alpha, rank, root: alpha / rank**2
    ),
    "ΔW in which fan_in_fan_out is not heeded": changed_config(fan_in_fan_out=False),
    "ΔW transposed, as for fan_in_fan_out": changed_config(fan_in_fan_out=True),
    "ΔW without alpha_pattern": changed_config(alpha_pattern={}),
    "ΔW with the rank of r, not of rank_pattern": by_rows_of_A,
    "ΔW without patterns": changed_config(rank_pattern={}, alpha_pattern={}),
    "ΔW with no regard to a key that is the name": delta_twin(
        first_key(lambda key, name: re.match(rf"(.*\.)?({key})$", name))
    ),
    "ΔW with the last key that matches": delta_twin(last_key),
    "ΔW with the longest key that matches": delta_twin(longest_key),
    "ΔW with the key that is the name, before others that match": delta_twin(exact_name_first),
    "ΔW with keys as plain names": delta_twin(first_key(lambda key, name: key == name)),
    "ΔW with keys as ends of names, not expressions": delta_twin(
        first_key(lambda key, name: name == key or name.endswith(f".{key}"))
    ),
    "ΔW with keys as ends of names, also within a word": delta_twin(
        first_key(lambda key, name: name.endswith(key))
    ),
    "ΔW with keys as starts of names": delta_twin(first_key(lambda key, name: re.match(key, name))),
    "ΔW with keys found anywhere in names": delta_twin(
        first_key(lambda key, name: re.search(key, name))
    ),
    "ΔW with keys found anywhere in names, as plain text": delta_twin(
        first_key(lambda key, name: key in name)
    ),
    "ΔW with keys that must match whole names": delta_twin(
        first_key(lambda key, name: re.fullmatch(key, name))
    ),
    "ΔW with alternatives in a key not grouped": delta_twin(
        first_key(lambda key, name: re.match(rf"(.*\.)?{key}$", name))
    ),
    "ΔW with keys matching after any characters, not after a dot": delta_twin(
        first_key(lambda key, name: re.match(rf".*({key})$", name))
    ),
    "ΔW, zeros for a layer without an adapter": or_zeros,
}

CONTRACTS = (
    Contract("peft_export", "PEFT 0.15", reference.peft_export, EXPORTS, EXPORT_TWINS),
    Contract("peft_delta_weight", "PEFT 0.15", reference.peft_delta_weight, DELTAS, DELTA_TWINS),
)
