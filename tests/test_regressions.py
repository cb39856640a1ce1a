"""Faults found in other LoRA libraries, and invariants that the serious ones keep: a test for each.

Adapters: the fault elsewhere, and the test here

    a live layer is re-initialised by a new rank and the optimizer does not get its tensors
        test_peft_reinitialises_a_live_layer_and_forgets_the_optimizer, test_resize:
        ..._survivors_keep_values_gradients_and_moments_...
    AdaLoRA masks ranks, but never really shrinks
        test_shrinking_frees_parameters_and_optimizer_state
    AdaLoRA: ties keep no rank at all
        test_resize: test_equal_contributions_keep_the_earlier_ranks
    AdaLoRA: init_r == target_r crashes
        test_resize: test_nothing_to_do_changes_nothing
    L1RA: broken merge
        test_merge: test_merging_puts_the_sum_into_the_weight_...
    L1RA: no saving, no loading
        test_adapter_file: test_l1ra_goes_on_from_the_file_..., test_l1ra_training:
        test_a_saved_training_goes_on_...
    L1RA: an interval of 0, updates in the middle of a gradient accumulation, a dead zone
        test_l1ra: test_bad_options_are_refused_...,
        test_gradient_accumulation_counts_optimizer_steps, test_the_authors_step_has_a_dead_zone
    L1RA: lost moments, lost ranks
        test_resize: ..._survivors_keep_values_gradients_and_moments_...,
        test_rank_zero_is_the_base_function_and_grows_again
    merging an attention's out_proj twice, unseen by a merged == unmerged test
        test_merging_an_attention_output_applies_its_delta_once,
        test_peft_applies_an_attention_outputs_delta_twice
    merging a tied weight changes the other module
        test_merge: test_merging_a_tied_weight_is_refused_or_unties_it,
        test_peft_merges_into_a_tied_embedding
    one module under two names is wrapped twice
        test_a_shared_module_is_adapted_once_and_applied_once_per_use
    wrapping twice stacks adapters
        test_wrap: test_a_refused_wrap_changes_nothing[already adapted],
        test_wrapping_twice_is_refused_and_adds_no_second_adapter
    bf16 merge and unmerge drift
        test_a_hundred_half_precision_merges_do_not_drift,
        test_peft_drifts_when_half_precision_is_merged_again_and_again
    eval() calls train(False), which merges
        test_merge: test_training_and_evaluating_do_not_merge
    suffix and substring matching
        test_targets: test_names_are_exact_and_globs_cover_the_whole_...,
        test_peft_takes_a_list_of_names_for_suffixes
    a pattern that matches nothing is ignored
        test_targets: ..._finds_nothing_is_an_error_that_helps
    alpha / r rescales silently when ranks change
        test_the_trained_function_is_not_rescaled_when_ranks_change,
        test_peft_rescales_when_the_rank_changes_and_export_does_not
    one module under two names: one is left out
        test_peft_export_refusals: test_a_module_in_two_places_is_refused_...
    PEFT ignores an out_proj's adapter
        test_an_attention_output_is_refused_because_peft_ignores_...
    PEFT's adapters and the encoder's fast path
        test_the_fast_path_of_an_encoder_layer_leaves_pefts_adapter_...
    PEFT sorts its patterns when it saves
        test_peft_sorts_the_keys_when_it_saves

Curvature and budgets: the fault elsewhere, and the test here

    double backward fails in scaled_dot_product_attention and in the encoder's fast path
        test_pytorch_cannot_differentiate_its_attention_twice, test_hessian:
        test_fast_diagonal_equals_...[encoder layer], test_input_moment:
        test_the_transformer_fast_path_does_not_...
    BackPACK: no GELU, LayerNorm, branches, attention
        test_hessian: test_fast_diagonal_equals_the_reference,
        test_entry_by_entry_equals_the_reference
    curvlinops: exact only through H @ I
        test_hessian: test_fast_diagonal_equals_the_reference
    estimators draw from the global generator
        test_hutchinson: test_the_generator_alone_decides, test_input_moment:
        test_the_model_and_the_rng_are_as_before_...
    estimators without standard errors
        test_hutchinson: test_standard_errors_are_those_of_single_samples,
        test_a_95_percent_interval_of_a_trace_covers_...
    a stopping rule stops at a negative trace
        test_hutchinson: test_a_negative_trace_does_not_stop_early
    batches of unequal size count alike
        test_curvature_traps: test_batches_weigh_by_samples_or_as_told
    dict, tuple and tensor batches
        test_curvature_traps: test_batches_of_any_type
    dropout and BatchNorm in training mode
        test_input_moment: test_dropout_is_off, test_curvature_traps:
        test_the_model_is_left_as_it_was_frozen_or_training
    rank budgets are missed
        test_budget: test_rank_budget_is_met_exactly_within_bounds
    AdaLoRA and others: ties lose ranks
        test_budget: test_ties_between_ranks_keep_the_exact_number_in_order

The invariant, and the test here

    identity at init
        test_wrap: test_the_wrapped_model_computes_the_same_function_...
    only adapters change, and every one in 3 steps
        test_only_adapter_parameters_train_and_every_one_does
    disabled adapter = base model
        test_wrap: test_disabled_is_the_base_model_inside_the_block_only
    merged = unmerged = W + ΔW built by hand
        test_merge: test_merging_puts_the_sum_into_the_weight_..., test_lifecycle
    merging twice is a no-op; unmerge is bitwise
        test_merge: test_merging_puts_the_sum_into_the_weight_...
    non-finite adapters refuse to merge
        test_merge: test_an_adapter_that_is_not_finite_refuses_...
    save, load under another seed: equal outputs
        test_adapter_file: test_a_loaded_adapter_is_the_saved_one_bit_for_bit
    no stray keys
        test_mechanisms: test_state_dict_has_the_expected_keys_...
    bf16 and fp16 forward, merge, save
        test_mechanisms: test_half_precision_models, test_merge, test_adapter_file:
        test_a_loaded_adapter_is_the_saved_...
    gradient checkpointing, torch.compile
        test_mechanisms: ..._checkpointing_..., test_torch_compile_...
    deepcopy and pickle
        test_mechanisms: test_copies_are_equal_and_independent
    rank 0 and rank = min(d_in, d_out)
        test_lora: test_rank_zero_is_the_base, test_every_rank_up_to_...
    shrink then grow keeps function and moments
        test_shrinking_and_growing_back_keeps_the_function_and_the_moments
    requires_grad of untouched parameters
        test_wrap: test_with_none_only_the_wrapped_weights_...
    meta-device models load
        test_a_model_from_the_meta_device_is_adapted_once_it_is_loaded

A test named test_peft_... or test_pytorch_... shows that the fault is there, so that the list
stays honest: where one fails after an upgrade, the fault may have been mended.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers.models import (
    TOKENS,
    delta_by_hand,
    inputs,
    randomize,
    with_deltas_by_hand,
    wrapped,
    zoo,
)
from torch import nn

from minirank import lora_layers, merge, resize, unmerge, unwrap, wrap


def test_the_table_names_tests_that_exist():
    files = list(Path(__file__).parent.rglob("test_*.py"))
    known = {path.stem for path in files} | set(
        re.findall(r"def (test_\w+)", "".join(map(Path.read_text, files)))
    )
    for name in re.findall(r"test_\w+|(?<=\.\.\.)_\w+", __doc__):
        assert any(name in full for full in known), name


def small(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    layers = wrap(model, {"0": 4, "2": 3}, **options)
    return model, layers


def test_peft_reinitialises_a_live_layer_and_forgets_the_optimizer():
    """The fault in PEFT, then the same change of rank here."""
    peft = pytest.importorskip(
        "peft", minversion="0.21", reason="update_layer took other arguments before"
    )
    with torch.random.fork_rng():
        theirs = peft.get_peft_model(
            small()[0][0:0].append(nn.Linear(6, 6)), peft.LoraConfig(target_modules=["0"], r=4)
        )
        layer = theirs.base_model.model[0]
        nn.init.normal_(layer.lora_B["default"].weight)
        x = torch.randn(3, 6)
        optimizer, y = torch.optim.Adam(layer.parameters()), theirs(x)
        layer.update_layer("default", 5, lora_alpha=8, config=peft.LoraConfig(r=5))
        assert not torch.allclose(theirs(x), y)
        held = {id(p) for p in optimizer.param_groups[0]["params"]}
        assert id(layer.lora_A["default"].weight) not in held
    model, layers = small()
    randomize(layers)
    optimizer, x = torch.optim.Adam(p for p in model.parameters() if p.requires_grad), inputs(3, 6)
    y = model(x)
    resize(model, {"0": 5}, optimizer)
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)
    assert id(layers["0"].lora_A) in {id(p) for p in optimizer.param_groups[0]["params"]}


def test_peft_merges_into_a_tied_embedding():
    """The fault in PEFT; test_merge has the refusal here."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = zoo(torch.float32)
        theirs = peft.get_peft_model(
            copy.deepcopy(plain), peft.LoraConfig(target_modules=["head"], r=2)
        )
        nn.init.normal_(theirs.base_model.model.head.lora_B["default"].weight)
        merged = theirs.merge_and_unload()
    assert not torch.allclose(merged.emb.weight, plain.emb.weight)


def test_peft_applies_an_attention_outputs_delta_twice():
    """The fault in PEFT: its forward merges, so merged and unmerged outputs agree, both wrong."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = (
            nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}),
            torch.randn(2, 3, 8),
        )
        once, twice = copy.deepcopy(model["attn"]), copy.deepcopy(model["attn"])
        theirs = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["attn"], r=2, lora_alpha=2)
        ).eval()
        layer = theirs.base_model.model["attn"]
        adapters = [layer, layer.base_layer.out_proj]
        for adapter in adapters:
            nn.init.normal_(adapter.lora_B["default"].weight)
    inner, outer = (a.lora_B["default"].weight @ a.lora_A["default"].weight for a in adapters)
    with torch.no_grad():
        for expected, times in ((once, 1), (twice, 2)):
            expected.in_proj_weight += inner
            expected.out_proj.weight += times * outer
        y = layer(x, x, x)[0]
        torch.testing.assert_close(y, twice(x, x, x)[0])
        assert not torch.allclose(y, once(x, x, x)[0], atol=0.1)


def test_peft_drifts_when_half_precision_is_merged_again_and_again():
    """The fault in PEFT; test_a_hundred_half_precision_merges_do_not_drift has it right."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
        before = model[0].weight.detach().clone()
        theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=4))
        nn.init.normal_(theirs.base_model.model[0].lora_B["default"].weight)
    for _ in range(10):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    assert not torch.equal(theirs.base_model.model[0].base_layer.weight, before)


def test_pytorch_cannot_differentiate_its_attention_twice():
    """The fault in PyTorch's default kernel, for which curvature is measured with another one."""
    x = torch.ones(1, 2, 3, 4, requires_grad=True)
    y = nn.functional.scaled_dot_product_attention(x, x, x).square().sum()
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"derivative for .*scaled_dot_product.* is not implemented"
    ):
        torch.autograd.grad(slope.sum(), x)


def test_shrinking_frees_parameters_and_optimizer_state():
    model, layers = small(gate=1.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model(inputs(3, 6)).sum().backward()
    optimizer.step()
    resize(model, {"0": 1, "2": 0}, optimizer)
    assert (
        sum(p.numel() for layer in layers.values() for p in layer.parameters(recurse=False))
        == 6 + 5 + 1
    )
    moments = [state["exp_avg"].numel() for state in optimizer.state.values()]
    assert sum(moments) == 6 + 5 + 1
    assert len(moments) == 6


def test_merging_an_attention_output_applies_its_delta_once():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
    plain, x = copy.deepcopy(model), inputs(2, 3, 6)
    layers = wrap(model, {"out_proj": 3}, alpha=2.0)
    randomize(layers)
    expected = with_deltas_by_hand(plain, layers)(x, x, x)[0]
    assert not torch.allclose(expected, plain(x, x, x)[0])
    for change in (lambda _: None, merge, lambda m: m(x, x, x), unmerge, merge, unwrap):
        change(model)
        for mode in (True, False):
            torch.testing.assert_close(
                model.train(mode)(x, x, x)[0], expected, rtol=1e-12, atol=1e-12
            )
    torch.testing.assert_close(
        model.out_proj.weight,
        plain.out_proj.weight + delta_by_hand(layers["out_proj"]),
        rtol=1e-13,
        atol=1e-13,
    )


def test_a_shared_module_is_adapted_once_and_applied_once_per_use():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(4, 4).double()
    model = nn.ModuleDict({"first": linear, "more": nn.ModuleList([nn.Tanh(), linear])})
    layers = wrap(model, {"first": 2, "more.1": 2})
    randomize(layers)
    assert list(layers) == ["first"]
    assert model["first"] is model["more"][1] is layers["first"]
    W, b, x = linear.weight + delta_by_hand(layers["first"]), linear.bias, inputs(3, 4)
    y = x @ W.T + b
    torch.testing.assert_close(
        model["more"][1](model["first"](x)), y @ W.T + b, rtol=1e-13, atol=1e-13
    )
    unwrap(model)
    assert model["first"] is model["more"][1] is linear


def test_wrapping_twice_is_refused_and_adds_no_second_adapter():
    model, layers = small()
    modules = dict(model.named_modules())
    for name in ("0", "0.base"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            wrap(model, {name: 1})
    assert dict(model.named_modules()) == modules
    assert lora_layers(model) == layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_hundred_half_precision_merges_do_not_drift(dtype):
    plain, model, layers = wrapped(dtype, ranks={"body.up": 3, "like": 2})
    for _ in range(100):
        merge(model)
        assert not torch.equal(layers["like"].base.weight, plain.like.weight)
        unmerge(model)
    for name, layer in layers.items():
        assert torch.equal(layer.base.weight, plain.get_submodule(name).weight)


def test_the_trained_function_is_not_rescaled_when_ranks_change():
    """Pruning ranks that are zero, half of all, must change nothing; alpha / r would double it."""
    for stabilized in (False, True):
        model, layers = small(alpha=4, rank_stabilized=stabilized)
        randomize(layers)
        with torch.no_grad():
            layers["0"].lora_B[:, 1::2] = 0
        x = inputs(3, 6)
        y, scaling = model(x), layers["0"].scaling
        resize(model, {"0": 2})
        assert layers["0"].scaling == scaling
        torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("gate", [None, 1.0, 0.0])
def test_only_adapter_parameters_train_and_every_one_does(gate):
    _, model, _ = wrapped(ranks={"body.up": 2, "head": 3}, gate=None)
    unwrap(model)
    layers = wrap(model, {"body.up": 2, "head": 3}, gate=gate)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).square().sum().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    adapters = {
        f"{n}.{k}" for n, layer in layers.items() for k, _ in layer.named_parameters(recurse=False)
    }
    assert changed == adapters
    assert len(adapters) == (4 if gate is None else 6)


def test_shrinking_and_growing_back_keeps_the_function_and_the_moments():
    model, layers = small(gate=1.0)
    randomize(layers)
    optimizer, x = (
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad]),
        inputs(3, 6),
    )
    model(x).square().sum().backward()
    optimizer.step()
    moments = optimizer.state[layers["0"].lora_A]["exp_avg"].clone()
    kept = resize(model, {"0": 2}, optimizer)["0"].keep
    y = model(x)
    resize(model, {"0": 4}, optimizer)
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)
    now = optimizer.state[layers["0"].lora_A]["exp_avg"]
    assert torch.equal(now, torch.cat([moments[kept], torch.zeros(2, 6, dtype=torch.float64)]))
    assert moments[kept].ne(0).all()


def test_a_model_from_the_meta_device_is_adapted_once_it_is_loaded():
    state = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).state_dict()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="meta device"):
        wrap(model, {"0": 1, "2": 1})
    model.load_state_dict(state, assign=True)
    x = torch.randn(3, 4)
    y = model(x)
    wrap(model, {"0": 1, "2": 1})
    assert torch.equal(model(x), y)
