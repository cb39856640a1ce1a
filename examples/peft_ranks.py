"""The ranks that two methods of PEFT find, EVA and AdaLoRA, run by PEFT itself.

    ranks = eva_ranks(model, targets, batches, forward, rank=8, max_rank=16)
    trained, ranks = adalora(
        model, targets, rank=8, start_rank=12, steps=500, scaling=2.0, train=my_loop
    )
    ranks = fit_to_budget(ranks, budget, costs, upper)

The model is any nn.Module. Both methods work on a copy of it and leave it unchanged. `targets` are
full names of modules, and exactly these are adapted. Needs peft (pip install 'minirank[examples]');
checked with PEFT 0.21.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minirank.budget import proportional_ranks
from minirank.layers.targets import exact_pattern

ADAPTER = "default"  # PEFT's name of the adapter
EPSILON = 1e-5  # PEFT divides AdaLoRA's alpha by the first rank plus this
MAX_PASSES = 50  # over the batches, in which EVA must converge
LABEL_OUT = -100  # the label of a position that has none, PEFT's default too


# ---- EVA ---------------------------------------------------------------------------------------


def eva_ranks(
    model: nn.Module,
    targets: Sequence[str],
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any],
    *,
    rank: int,
    max_rank: int,
) -> dict[str, int]:
    """The ranks by PEFT's EVA: how much of its inputs' variance each direction explains.

    The principal components of all layers' inputs compete: the `rank` · len(targets) components
    that explain the largest share of their own layer's variance get one rank each. Neither labels
    nor gradients are used. Among layers of equal input (query, key, value) PEFT gives the first the
    highest rank. PEFT takes the batches in order, again and again, until the components of each
    layer stop turning, so that the ranks depend a little on their order.

    Padding: if a batch is a dict with an "attention_mask" (B, T), the positions that it masks are
    left out, and so are those whose "labels" are -100 if the labels have its shape. This is PEFT's
    own rule (`prepare_model_inputs_fn_language_modeling`, `use_label_mask`). Of any other batch all
    positions count, padding too.

    Args:
        batches: for the measurement. Each has at least 2 · max_rank positions.
        forward: forward(model, batch) runs the model.
        rank: the average rank.
        max_rank: the highest rank of a layer (PEFT's rho is max_rank / rank), at most half of the
            narrowest layer's inputs. The width of the outputs bounds nothing here.

    Returns:
        {target: rank}, in the order of `targets`; the sum is rank · len(targets).

    Raises:
        ImportError: peft is absent.
        ValueError: a wrong target, no batch, a rank out of its range; a batch of too few positions,
            or a mask that does not fit a layer's inputs.
        RuntimeError: PEFT has not converged after 50 passes over the batches.

    Source: EVA (arXiv 2410.07170), `peft.tuners.lora.eva.get_eva_state_dict`.
    """
    peft = load_peft()
    modules = _modules(model, targets)
    if not 1 <= rank <= max_rank:
        raise ValueError(f"expected 1 ≤ rank ≤ max_rank, got {rank} and {max_rank}")
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and module.in_features < 2 * max_rank:
            raise ValueError(
                f"{name!r} has {module.in_features} inputs, below 2 · max_rank = {2 * max_rank}, "
                "the directions that PEFT's PCA looks at: lower max_rank or leave it out"
            )
    batches = list(batches)
    if not batches:
        raise ValueError("there is no batch: EVA needs some inputs of the layers")

    passes = _counted(forward, MAX_PASSES * len(batches))
    config = peft.LoraConfig(
        r=rank,
        target_modules=exact_pattern(targets),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=max_rank / rank),
    )
    components = peft.tuners.lora.eva.get_eva_state_dict(
        copy.deepcopy(model),
        batches,
        config,
        forward_fn=passes,
        prepare_model_inputs_fn=lambda batch, _: counted_positions(batch),
        prepare_layer_inputs_fn=lambda inputs, counted, name: layer_inputs(
            inputs, counted, name, 2 * max_rank
        ),
        show_progress_bar=False,
    )
    _require_exactly(targets, components)
    return {name: len(components[name]) for name in targets}


def counted_positions(batch: Any) -> Tensor | None:
    """The positions of a batch that EVA looks at: bool (B, T), or None for all of them."""
    if not isinstance(batch, Mapping) or "attention_mask" not in batch:
        return None
    mask: Tensor = batch["attention_mask"].bool()
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        mask = mask & (labels != LABEL_OUT)
    return mask


def layer_inputs(inputs: Any, counted: Tensor | None, name: str, least: int) -> Tensor:
    """The input vectors of one layer that EVA looks at, (positions, d_in).

    Args:
        inputs: of the layer's forward: x (..., d_in), or a tuple that starts with it.
        counted: bool (B, T), or None for all positions.
        least: the number of positions that are needed.
    """
    x: Tensor = inputs if isinstance(inputs, Tensor) else inputs[0]
    rows = x.reshape(-1, x.shape[-1])
    # A layer above the pooling has one input per sentence, (B, d_in): there is no padding in it.
    per_sentence = counted is not None and x.shape[:-1] == counted.shape[:1]
    if counted is not None and not per_sentence:
        if len(rows) != counted.numel():
            raise ValueError(
                f"the inputs of {name!r} are {tuple(x.shape)}, and the attention_mask is "
                f"{tuple(counted.shape)}: it cannot say which of them are padding. Leave the layer "
                "out, or give batches without padding and mask"
            )
        rows = rows[counted.flatten().to(rows.device)]
    if len(rows) < least:
        raise ValueError(
            f"a batch has {len(rows)} positions at {name!r}, fewer than 2 · max_rank = {least}, "
            "the directions that PEFT's PCA looks at: make the batches larger"
        )
    return rows


def _counted(
    forward: Callable[[nn.Module, Any], Any], most: int
) -> Callable[[nn.Module, Any], None]:
    """`forward`, which raises RuntimeError after `most` calls: PEFT itself would go on for ever."""
    calls = 0

    def counted(model: nn.Module, batch: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > most:
            raise RuntimeError(
                f"EVA has not converged in {MAX_PASSES} passes over the batches: give more or "
                "larger batches, or lower max_rank"
            )
        forward(model, batch)

    return counted


# ---- AdaLoRA -----------------------------------------------------------------------------------


def adalora(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    start_rank: int,
    steps: int,
    scaling: float,
    train: Callable[[nn.Module, Callable[[int], None]], None],
    trainable: Sequence[str] = (),
    orthogonality: float = 0.5,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, int]]:
    """Train a copy of the model by PEFT's AdaLoRA, which prunes ranks by their importance.

    A layer computes W x + scaling · B (E ∘ A x), with start_rank triplets of a row of A, an entry
    of E and a column of B. PEFT trains all of them for the first 10 % of the steps, prunes down
    along a cubic curve, and trains the triplets that are left for the last 30 %. It prunes by
    setting entries of E to 0, every max(1, steps // 100) steps.

    The scaling is constant: PEFT multiplies by alpha / (start_rank + 1e-5) whatever the rank is
    later, and alpha is chosen accordingly.

    The orthogonality penalty: PEFT adds it in `AdaLoraModel.forward` alone, where the model's
    output has a `.loss`; and a PeftModel without a task type, as here, does not call that forward.
    Here the penalty is in the gradients whatever the loss is: each backward() adds the penalty's
    gradient to that of A and B. So no loss that is printed contains it. With a gradient scaler, or
    with several backward() per step, its weight differs accordingly.

    Args:
        rank: the average rank at the end.
        start_rank: the rank of every layer at the start, above `rank`. AdaLoRA's paper takes 1.5
            times `rank`.
        steps: optimizer steps of the training.
        scaling: of every adapter, above 0.
        train: the caller's loop, train(model, on_step): an optimizer over the parameters that
            require gradients, and on_step(step) after optimizer.step() with step = 0, 1, …,
            steps - 1, while the gradients are still there (before the next zero_grad).
        trainable: full names of further modules to train, such as ["head"].
        orthogonality: the penalty's weight, PEFT's orth_reg_weight (0.5 is its default).
        seed: of the starts of A and B. PyTorch's global generator is left as it was.

    Returns:
        The trained PEFT model, and {target: final rank, 0 where none}, in the order of `targets`.
        The ranks sum to rank · len(targets). A triplet costs d_out + d_in + 1 parameters, one more
        than a rank of LoRA.

    Raises:
        ImportError: peft is absent.
        ValueError: a wrong target or name in `trainable`, ranks or steps out of their range, a call
            of on_step out of order or without gradients.
        RuntimeError: `train` returned before its last step.

    Warns:
        The ranks do not sum to rank · len(targets). PEFT prunes all triplets of equal importance
        together, such as those whose gradients are all zero.

    Source: AdaLoRA (arXiv 2303.10512), `peft.AdaLoraModel`.
    """
    peft = load_peft()
    modules = _modules(model, targets)
    last = max(1, round(0.3 * steps))  # steps at the end, at the final ranks
    first = round(0.1 * steps)  # steps at the start, at the start rank
    if not 1 <= rank < start_rank:
        raise ValueError(f"expected 1 ≤ rank < start_rank, got {rank} and {start_rank}")
    if steps < 3:
        raise ValueError(f"AdaLoRA needs at least 3 steps to train, prune and train, got {steps}")
    if not scaling > 0:
        raise ValueError(f"the scaling must be above 0 (PEFT takes 0 for its default): {scaling}")
    _modules(model, trainable)
    for name in trainable:
        inside = [t for t in modules if t == name or t.startswith(f"{name}.")]
        if inside:
            raise ValueError(f"{name!r} in trainable contains the target {inside[0]!r}")

    config = peft.AdaLoraConfig(
        init_r=start_rank,
        target_r=rank,
        tinit=first,
        tfinal=last,
        deltaT=max(1, steps // 100),
        total_step=steps,
        lora_alpha=scaling * (start_rank + EPSILON),
        orth_reg_weight=0.0,
        target_modules=exact_pattern(targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws from the global generator
        adapted: nn.Module = peft.get_peft_model(copy.deepcopy(model), config)
    tuner: Any = adapted.base_model
    layers = {
        name: module
        for name, module in tuner.model.named_modules()
        if isinstance(module, peft.tuners.adalora.SVDLinear)
    }
    _require_exactly(targets, layers)
    for layer in layers.values():
        # In a model that is not float32, PEFT's divisor of alpha becomes a trainable parameter.
        layer.ranknum[ADAPTER].requires_grad_(False)
    for name in trainable:
        tuner.model.get_submodule(name).requires_grad_(True)

    calls = 0

    def on_step(step: int) -> None:
        nonlocal calls
        if step != calls or step >= steps:
            raise ValueError(
                f"on_step({step}) where on_step({calls}) of {steps} steps was due: call it once "
                "after each optimizer step, with step = 0, 1, …"
            )
        for name, layer in layers.items():
            if step < steps - last and layer.lora_E[ADAPTER].grad is None:
                raise ValueError(
                    f"{name!r} has no gradient, which AdaLoRA's importance needs: call on_step "
                    "before zero_grad, and leave out targets that the loss does not depend on"
                )
        tuner.update_and_allocate(step)
        calls += 1

    with _orthogonality_in_gradients(list(layers.values()), orthogonality):
        train(adapted, on_step)
    if calls < steps:
        raise RuntimeError(
            f"train called on_step {calls} times, expected {steps}: AdaLoRA has not reached its "
            "final ranks"
        )
    pattern = config.rank_pattern
    ranks = {name: sum(pattern[f"{name}.lora_E.{ADAPTER}"]) for name in targets}
    planned = rank * len(targets)
    if sum(ranks.values()) != planned:
        warnings.warn(
            f"AdaLoRA ended with {sum(ranks.values())} ranks where {planned} were planned: PEFT "
            "prunes triplets of equal importance together. Are the gradients of some layers zero?",
            stacklevel=2,
        )
    return adapted, ranks


def penalty_gradient(P: Tensor) -> Tensor:
    """The gradient of ‖P Pᵀ - I‖_F with respect to P (r, d); zero at its minimum."""
    difference = P @ P.T - torch.eye(len(P), dtype=P.dtype, device=P.device)
    norm = difference.norm()
    return 2 * difference @ P / norm if norm > 0 else torch.zeros_like(P)


@contextmanager
def _orthogonality_in_gradients(layers: Sequence[Any], weight: float) -> Iterator[None]:
    """Every backward() inside adds the gradient of PEFT's orthogonality penalty: weight times the
    mean of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ over all A and B."""
    share = weight / (2 * len(layers))

    def add_for_rows(A: Any) -> Any:  # A: (r, d_in)
        return A.register_hook(lambda grad: grad + share * penalty_gradient(A.detach()))

    def add_for_columns(B: Any) -> Any:  # B: (d_out, r)
        return B.register_hook(lambda grad: grad + share * penalty_gradient(B.detach().T).T)

    handles = []
    if weight:
        handles += [add_for_rows(layer.lora_A[ADAPTER]) for layer in layers]
        handles += [add_for_columns(layer.lora_B[ADAPTER]) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- both --------------------------------------------------------------------------------------


def fit_to_budget(
    ranks: Mapping[str, int],
    budget: int,
    costs: Mapping[str, int] | None,
    upper: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Ranks in the same proportions, at another budget (`minirank.budget.proportional_ranks`).

    Args:
        budget: in trainable parameters, or in ranks if `costs` is None.
        costs: {module: parameters of one rank, d_out + d_in}.
        upper: {module: its highest rank}; None: no bound.

    Returns:
        {module: rank}. A budget in ranks is met exactly. One in parameters is never exceeded, and
        no further rank fits into what is left.
    """
    return proportional_ranks(ranks, budget, costs=costs, upper=upper)


def load_peft() -> Any:
    """The module peft, imported where it is needed, so that others can import this file."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "EVA and AdaLoRA are run by PEFT, which is not installed: "
            "pip install 'minirank[examples]'"
        ) from error
    return peft


def _modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """{name: module} of the full names `names`."""
    if isinstance(names, str):
        raise ValueError(f"expected a list of full names, got the string {names!r}")
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(f"the model has no module {name!r}: give full names, not patterns")
    if len(set(names)) < len(names):
        raise ValueError(f"a name stands twice in {list(names)}")
    return {name: modules[name] for name in names}


def _require_exactly(targets: Sequence[str], adapted: Mapping[str, Any]) -> None:
    """Raise ValueError unless PEFT adapted these targets and no other module."""
    missing, further = set(targets) - set(adapted), set(adapted) - set(targets)
    if missing or further or not targets:
        raise ValueError(
            f"PEFT left out {sorted(missing)} of {len(targets)} targets and adapted "
            f"{sorted(further)} besides: it adapts plain linear layers"
        )
