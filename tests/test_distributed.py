"""Several processes against one process with all of the data: gloo, on one machine."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.fsdp
from helpers import distributed_cases as cases
from helpers.processes import Failed, Processes

from minirank import SensitivityLoRA, ShapLoRA, import_peft, load_adapter
from minirank.curvature import empirical_fisher, input_second_moment
from minirank.distributed import TESTED_DDP, pooled

needs_fsdp2 = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "fully_shard"), reason="from torch 2.6"
)
needs_refresh = pytest.mark.skipif(
    not torch.__version__.startswith(TESTED_DDP), reason="refresh() refuses other versions of torch"
)


@pytest.fixture(scope="module")
def two():
    processes = Processes(2)
    yield processes
    processes.stop()


@pytest.fixture(scope="module")
def three():
    processes = Processes(3)
    yield processes
    processes.stop()


def same_on_all(results):
    """The result of the first process, after a check that all have the same bits."""
    assert not any(isinstance(result, Failed) for result in results), results
    first, *others = results
    for other in others:
        assert bits(other) == bits(first)
    return first


def bits(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.tolist()
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(entry) for entry in value]
    return value


UNEQUAL = [4, 7, 2, 5, 3]  # sizes of batches: shards of unequal numbers and weights


@pytest.mark.parametrize("name", cases.DETERMINISTIC)
def test_a_pooled_curvature_is_that_of_all_batches(two, three, name):
    batches = cases.batches_of(UNEQUAL)
    diagonals, errors, weights, samples = cases.estimate(name, batches)
    for processes in (two, three):
        pooled = same_on_all(processes(cases.pooled_estimate, name, batches))
        assert pooled[0].keys() == diagonals.keys()
        for layer, diagonal in diagonals.items():
            torch.testing.assert_close(pooled[0][layer], diagonal, rtol=1e-12, atol=0)
            assert pooled[1][layer] == pytest.approx(errors[layer], rel=1e-9)
            assert pooled[2][layer] == weights[layer]
        assert pooled[3] == samples


def test_the_layout_of_a_diagonal_in_memory_does_not_count(two):
    pooled = same_on_all(two(cases.pooled_of_other_layout))
    assert pooled.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_gradients_belong_together_by_name(two):
    a, b = same_on_all(two(cases.gradients_in_other_order))
    assert a.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert not b.any()


def test_one_process_scores_a_ddp_alone(two):
    scores = same_on_all(two(cases.score_on_one_process, cases.batches_of([4, 5])))
    assert list(scores) == ["0"]


@pytest.mark.parametrize("name", cases.SAMPLED)
def test_a_pooled_sample_has_an_honest_error(two, name):
    batches = cases.batches_of(UNEQUAL)
    exact = "gauss_newton" if name.startswith("gauss") else "exact_hessian_diagonal"
    expected = cases.estimate(exact, batches)[0]
    diagonals, errors, weights, samples = same_on_all(two(cases.pooled_sample, name, batches))
    assert samples == 40
    for layer, diagonal in expected.items():
        assert weights[layer] == sum(UNEQUAL)
        assert abs(float(diagonals[layer].sum() - diagonal.sum())) < 4 * errors[layer]


def test_stability_and_settling_are_those_of_one_process(two):
    pairs = cases.batches_of([6] * 24)
    joined = [
        (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
        for a, b in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    theta, *expected = cases.stability(joined)
    pooled_theta, *pooled = same_on_all(two(cases.pooled_stability, pairs))
    assert pooled == expected
    for layer, value in theta.items():
        torch.testing.assert_close(pooled_theta[layer], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("coalitions", [0, 18])
def test_shapley_scores_are_those_of_one_process_bit_for_bit(two, three, coalitions):
    batches = cases.batches_of([4, 6])
    expected = cases.shapley_scores(batches, coalitions)
    for processes in (two, three):
        shared = same_on_all(processes(cases.shared_shapley_scores, batches, coalitions))
        assert bits(shared) == bits(expected)


@pytest.mark.parametrize(("max_moved", "coalitions"), [(7, 18), (-1, 36)])
def test_coalitions_settle_as_on_one_process(three, max_moved, coalitions):
    batches = cases.batches_of([3, 4])
    *expected, stopped = cases.settled_shapley_scores(batches, max_moved)
    shared = three(cases.shared_settled_shapley_scores, batches, max_moved)
    *scores, stopped_together = same_on_all(shared)
    assert stopped_together == stopped
    assert stopped[0] == coalitions
    assert [bits(one) for one in scores] == [bits(one) for one in expected]


@pytest.mark.parametrize(
    "train",
    [
        cases.train_with_sync_gradients,
        pytest.param(cases.train_with_ddp, marks=needs_refresh),
    ],
)
def test_l1ra_trains_as_on_one_process(two, train):
    ranks, parameters, given = cases.train_alone()
    assert any(given), "no rank moves in this training, which would show nothing"
    other_ranks, other_parameters, other_given = same_on_all(two(train))
    assert (other_ranks, other_given) == (ranks, given)
    for name, parameter in parameters.items():
        torch.testing.assert_close(other_parameters[name], parameter, rtol=0, atol=1e-9)


@needs_refresh
@pytest.mark.parametrize("train", ["train_with_trainer", "train_with_accelerate"])
def test_l1ra_trains_in_other_peoples_loops_as_on_one_process(two, train):
    trainers = pytest.importorskip("helpers.distributed_trainers")
    ranks, parameters, given = getattr(trainers, train)(1)
    assert any(given), "no rank moves in this training, which would show nothing"
    other_ranks, other_parameters, other_given = same_on_all(two(getattr(trainers, train), 2))
    assert (other_ranks, other_given) == (ranks, given)
    for name, parameter in parameters.items():
        torch.testing.assert_close(other_parameters[name], parameter, rtol=0, atol=1e-5)


def test_gradients_that_some_processes_lack(three):
    some, bias, none = same_on_all(three(cases.gradients_on_some))
    assert some.tolist() == [[3.0, 0.0]]
    assert bias is None
    assert none is None


def test_the_scores_of_slices_of_the_targets_are_those_of_all(two):
    """As the docstring of `pooled` says for diagonals that are too large to hold together."""
    batches = cases.batches_of(UNEQUAL)
    allocator = SensitivityLoRA(
        cases.small_model(), cases.cross_entropy, batches, curvature=empirical_fisher
    )
    theta = same_on_all(two(cases.theta_by_slices, batches))
    torch.testing.assert_close(
        theta, torch.stack(list(allocator.score().values())), rtol=1e-12, atol=0
    )


# ---- what must not be silent --------------------------------------------------------------------


def messages(results):
    """The error of every process; all must have raised."""
    assert all(isinstance(result, Failed) for result in results), results
    return [result.args[0] for result in results]


@pytest.mark.parametrize(
    ("fault", "own_error", "others_error"),
    [
        ("exception", "KeyError", "process 1 of 2 raised KeyError: 'no such key'"),
        ("no batch", "batches is empty", "process 1 of 2 raised ValueError: batches is empty"),
        ("other targets", "what was measured differs", "what was measured differs"),
        ("unequal groups", "the same number of batches", "the same number of batches"),
        ("equal seeds", "generators in the same state", "generators in the same state"),
        ("equal seeds in a closure", "in the same state", "in the same state"),
        ("broken loader", "the disk is gone", "process 1 of 2 raised OSError"),
    ],
)
def test_a_fault_of_one_process_is_an_error_on_all(two, fault, own_error, others_error):
    batches = cases.batches_of([4] * 11)
    other, own = messages(two(cases.score_with_a_fault, fault, batches))
    assert own_error in own
    assert others_error in other


def test_models_in_another_order_are_refused(two):
    for message in messages(two(cases.score_in_other_order)):
        assert "what was measured differs" in message


def test_coalitions_of_other_seeds_are_refused(two):
    for message in messages(two(cases.shapley_scores_of_own_coalitions)):
        assert "the same coalitions= and generator=" in message


def test_frozen_layers_in_a_ddp_are_not_refused(two):
    for message in messages(two(cases.frozen_layers_in_a_ddp_that_was_kept)):
        assert "refresh(ddp) after the change" in message  # at the layer whose B trains


@pytest.mark.parametrize("find_unused", [False, True])
def test_a_ddp_that_was_kept_over_an_update_is_refused_at_the_next_step(two, find_unused):
    for message in messages(two(cases.train_with_ddp, False, find_unused, False)):
        assert "refresh(ddp) after the change" in message


def test_a_model_that_is_wrapped_inside_a_ddp_is_refused_at_its_first_step(two):
    for message in messages(two(cases.wrap_inside_ddp)):
        assert "made before a layer got its present ranks" in message


def test_fresh_ranks_of_other_seeds_are_refused_before_the_update(two):
    for message in messages(two(cases.train_on_own_rows)):
        assert "the state of L1RA's generator differs" in message


def test_processes_that_do_not_average_are_refused_at_the_next_update(two):
    for message in messages(two(cases.train_without_averages)):
        assert "'0.lora_A' is not the same on process 0" in message


def test_sparse_gradients_are_refused_on_all(two):
    for message in messages(two(cases.sparse_gradients)):
        assert "the gradient of 'weight' is sparse" in message


def test_gradients_of_other_shapes_are_refused(two):
    for message in messages(two(cases.unequal_ranks)):
        assert "have drifted apart" in message


def test_shards_of_the_validation_data_are_refused(two):
    for message in messages(two(cases.sharded_shapley_scores, cases.batches_of(UNEQUAL))):
        assert "needs all of the validation data on every process" in message
    for message in messages(two(cases.unlike_shapley_scores)):
        assert "needs all of the validation data on every process" in message


def sharded_loader():
    data = torch.zeros(8, 6)
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=0)
    return torch.utils.data.DataLoader(data, sampler=sampler)


def test_a_loader_of_shards_is_noticed_where_nothing_combines_them():
    model = cases.small_model()
    with pytest.warns(UserWarning, match=r"this process's part of the data of 2 processes.*pooled"):
        SensitivityLoRA(model, cases.cross_entropy, sharded_loader())
    SensitivityLoRA(
        model, cases.cross_entropy, sharded_loader(), curvature=pooled(input_second_moment)
    )
    batches = torch.utils.data.BatchSampler(sharded_loader().sampler, 2, drop_last=False)
    nested = torch.utils.data.DataLoader(torch.zeros(8, 6), batch_sampler=batches)
    with pytest.warns(UserWarning, match="pooled"):
        SensitivityLoRA(model, cases.cross_entropy, nested)
    with pytest.warns(UserWarning, match="all of the validation data"):
        ShapLoRA(cases.trained_trial(), cases.cross_entropy, sharded_loader())


# ---- FSDP2 --------------------------------------------------------------------------------------


@needs_fsdp2
@pytest.mark.parametrize("name", ["input_second_moment", "gauss_newton", "empirical_fisher"])
def test_a_sharded_model_is_scored_like_a_whole_one(two, name):
    batches = cases.batches_of([4, 7, 2, 5])  # as many for both: each pass gathers the shards
    diagonals = cases.estimate(name, batches)[0]
    pooled_diagonals = same_on_all(two(cases.sharded_estimate, name, batches))[0]
    for layer, diagonal in diagonals.items():
        torch.testing.assert_close(pooled_diagonals[layer], diagonal, rtol=1e-12, atol=0)


@needs_fsdp2
def test_a_packed_and_sharded_model_is_scored_by_its_inputs(two):
    batches = cases.batches_of([4, 7, 2, 5])
    moments = cases.packed_moments(batches)
    pooled_moments = same_on_all(two(cases.sharded_packed_moments, batches))
    assert list(pooled_moments) == ["0", "2", "4"]
    for layer, moment in moments.items():
        torch.testing.assert_close(pooled_moments[layer], moment, rtol=1e-6, atol=0)


@needs_fsdp2
def test_adapters_beside_a_sharded_base_train_move_and_are_saved(two, tmp_path):
    ranks, parameters, given = cases.train_alone()
    result, outputs, refusals = same_on_all(two(cases.train_with_fsdp2, str(tmp_path)))
    assert (result[0], result[2]) == (ranks, given)
    for name, parameter in parameters.items():
        torch.testing.assert_close(result[1][name], parameter, rtol=0, atol=1e-9)
    assert torch.equal(*outputs)
    assert "merge needs 0.base.weight whole, but it is a DTensor" in refusals["merge"]
    assert "use gauss_newton, empirical_fisher" in refusals["exact"]
    assert "call load_adapter on all processes with group=" in refusals["load without group"]
    assert "load_adapter will not notice another base" in refusals["save without group"]

    # One process loads the file, which knows the base that was sharded.
    whole = cases.small_model()
    load_adapter(whole, tmp_path / "adapter.safetensors")
    x = cases.training_batches()[0][0]
    torch.testing.assert_close(whole(x), outputs[0], rtol=1e-12, atol=1e-14)
    other = cases.small_model()
    other[0].weight.data.add_(1.0)
    with pytest.raises(ValueError, match="not the base weights"):
        load_adapter(other, tmp_path / "adapter.safetensors")
    imported = cases.small_model()
    import_peft(imported, tmp_path / "peft1")
    torch.testing.assert_close(imported(x), outputs[0], rtol=1e-5, atol=1e-5)


@needs_fsdp2
def test_unequal_numbers_of_batches_of_a_sharded_model_are_refused(two):
    batches = cases.batches_of([4] * 5)
    for message in messages(two(cases.sharded_estimate_of_unequal_numbers, batches)):
        assert "every process needs the same number of batches" in message
    for message in messages(two(cases.sharded_estimate_within_tolerance, batches)):
        assert "each of them would stop by itself" in message


@needs_fsdp2
def test_merge_refuses_a_base_that_fsdp2_has_gathered_for_a_time(two):
    for message in messages(two(cases.merge_what_is_whole_for_now)):
        assert "is managed by FSDP2" in message


def test_a_fault_of_one_process_is_an_error_of_save_and_load_on_all(two, tmp_path):
    other, own = messages(two(cases.save_what_is_not_finite, str(tmp_path)))
    assert "0.lora_A is not finite" in own
    assert "process 1 of 2 raised ValueError: 0.lora_A is not finite" in other
    other, own = messages(two(cases.load_beside_another_base, str(tmp_path)))
    assert "not the base weights" in own
    assert "process 1 of 2 raised ValueError: '0': not the base weights" in other


@needs_fsdp2
def test_another_sharded_base_is_refused_on_all(two, tmp_path):
    for message in messages(two(cases.another_base, str(tmp_path))):
        assert "not the base weights that the adapter was trained beside" in message


@needs_fsdp2
def test_shapley_scores_beside_a_sharded_base(two):
    batches = cases.batches_of([4, 6])
    expected = cases.shapley_scores(batches, 18)[0]
    scores = same_on_all(two(cases.sharded_shapley, batches))
    for layer, score in expected.items():
        torch.testing.assert_close(scores[layer], score, rtol=1e-12, atol=0)
