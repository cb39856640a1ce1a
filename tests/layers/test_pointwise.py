"""Convolutions with a kernel of size 1 are linear layers over channels: the same model with
nn.Linear over the last dimension gives the same numbers, from scores to merged weights."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.models import assert_unchanged, randomize, snapshot
from torch import nn

from minirank import (
    L1RA,
    LoRALinear,
    SensitivityLoRA,
    ShapLoRA,
    SingularValues,
    disabled,
    linear_targets,
    load_adapter,
    lora_layers,
    merge,
    resize,
    save_adapter,
    testing,
    unmerge,
    unwrap,
    wrap,
)
from minirank.curvature import (
    empirical_fisher,
    exact_hessian_diagonal,
    gauss_newton,
    hessian_diagonal_reference,
    hutchinson_outputs,
    hutchinson_weights,
    input_second_moment,
)
from minirank.layers.coverage import coverage
from minirank.layers.linear import applies_weight, linear_shape

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POINTWISE = ["up", "down", "head"]
SAME = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


class ChannelsLast(nn.Module):
    """An nn.Linear over the channels of (n, d, …), or of (d, …) where there are no samples."""

    def __init__(self, dimensions, d_in, d_out, bias=True):
        super().__init__()
        self.dim = -1 - dimensions
        self.linear = nn.Linear(d_in, d_out, bias)

    def forward(self, x):
        return self.linear(x.movedim(self.dim, -1)).movedim(-1, self.dim)


class Net(nn.Module):
    """A convolution over neighbours, two over channels, and a head over the mean of positions."""

    def __init__(self, dimensions, convolutions):
        super().__init__()
        self.dimensions = dimensions
        conv = CONVOLUTION[dimensions]
        make = conv if convolutions else functools.partial(ChannelsLast, dimensions)
        more = {"kernel_size": 1, "dilation": 2} if convolutions else {}
        self.stem = conv(2, 4, 3, padding=1)
        self.up = make(4, 6, **more)
        self.down = make(6, 4, bias=False, **more)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(x.flatten(-self.dimensions).mean(-1))


def pair(dimensions=2):
    """A model with convolutions, and one with nn.Linear instead that has the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(dimensions, True).double()
    twin = Net(dimensions, False).double()
    state = {
        key.replace("up.", "up.linear.").replace("down.", "down.linear."): value
        if key.startswith("stem")
        else value.flatten(1)
        if key.endswith("weight")
        else value
        for key, value in model.state_dict().items()
    }
    twin.load_state_dict(state)
    return model, twin


def of_twin(names):
    return {f"{name}.linear" if name != "head" else name: value for name, value in names.items()}


def batches(dimensions=2, count=2):
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2, *(3, 2, 2)[:dimensions])
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64), torch.tensor([0, 2, i % 3]))
        for i in range(count)
    ]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


RANKS = {"up": 2, "down": 3, "head": 1}


def trained_pair(dimensions=2, **options):
    model, twin = pair(dimensions)
    randomize(wrap(model, RANKS, scaling=2.0, **options))
    randomize(wrap(twin, of_twin(RANKS), scaling=2.0, **options))
    return model, twin


# ---- what counts --------------------------------------------------------------------------------


def test_only_a_map_of_the_channels_alone_is_linear():
    for conv, kernel in ((nn.Conv1d, 1), (nn.Conv2d, (1, 1)), (nn.Conv3d, 1)):
        assert linear_shape(conv(3, 5, kernel)) == (5, 3)
        assert linear_shape(conv(3, 5, kernel, bias=False, dilation=3)) == (5, 3)
        assert linear_shape(conv(3, 5, kernel, padding="same")) == (5, 3)
        assert linear_shape(conv(3, 5, kernel, padding_mode="circular")) == (5, 3)
    others = [
        nn.Conv2d(3, 5, 3),
        nn.Conv2d(3, 5, (1, 3)),
        nn.Conv2d(3, 5, 1, stride=2),
        nn.Conv2d(3, 5, 1, stride=(1, 2)),
        nn.Conv2d(3, 5, 1, padding=1),
        nn.Conv2d(3, 5, 1, padding=(0, 1)),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, 1, groups=4),
        nn.ConvTranspose2d(3, 5, 1),
        nn.LazyConv2d(5, 1),
        nn.Conv2d(3, 5, 1, dtype=torch.complex64),
    ]
    for module in others:
        assert linear_shape(module) is None, module
        with pytest.raises(TypeError, match="or a convolution with kernel 1, stride 1"):
            LoRALinear(module, 1)


def test_targets_find_them_and_name_why_others_are_left_out():
    model, _ = pair()
    assert list(linear_targets(model)) == POINTWISE
    assert list(linear_targets(model, nn.Conv2d)) == ["up", "down"]
    with pytest.raises(
        ValueError, match=r"'stem' is of type Conv2d.*kernel 1, stride 1, one group"
    ):
        linear_targets(model, "stem")
    with pytest.raises(
        ValueError, match=r"'stem' is of type Conv2d.*kernel 1, stride 1, one group"
    ):
        wrap(model, {"stem": 1})
    part = coverage(model, POINTWISE)
    assert (part.reached, part.total) == (4 * 6 + 6 * 4 + 4 * 3, 60 + 4 * 2 * 9)
    assert "1 × convolution (a kernel above 1, strides, groups, padding, own forward): stem" in str(
        part
    )
    assert coverage(model, ["head"]).left_out[1][:3] == ("linear layer", 2, 48)


def test_a_subclass_with_a_forward_of_its_own_is_no_linear_layer():
    class Transposed(nn.Conv1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    class Normed(nn.Conv2d):
        def forward(self, x):
            return F.relu(F.layer_norm(super().forward(x), (2, 2)))

    model = nn.ModuleDict({"a": Transposed(5, 5, 1), "b": Normed(3, 5, 1), "c": nn.Conv2d(3, 5, 1)})
    assert list(linear_targets(model, "*")) == ["c"]
    with pytest.raises(ValueError, match="'a'"):
        wrap(model, {"a": 2})


def test_a_subclass_with_another_weight_is_adapted_and_not_merged():
    class Standardized(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    assert [applies_weight(kind(3, 5, 1)) for kind in (nn.Conv2d, Standardized)] == [True, False]
    model = nn.Sequential(Standardized(3, 5, 1))
    x = torch.ones(1, 3, 2, 2)
    layer = randomized(wrap(model, {"0": 2}))["0"]
    rows = (x.movedim(1, -1) @ layer.delta_weight().t()).movedim(-1, 1)
    torch.testing.assert_close(model(x), layer.base(x) + rows)
    with pytest.raises(ValueError, match="does not compute W x"):
        merge(model)


def randomized(layers):
    randomize(layers)
    return layers


# ---- scores -------------------------------------------------------------------------------------


def generator():
    return torch.Generator().manual_seed(3)


ESTIMATORS = {
    "proxy": input_second_moment,
    "fisher": empirical_fisher,
    "gauss_newton": gauss_newton,
    "exact": exact_hessian_diagonal,
    "exact, of a batch": functools.partial(exact_hessian_diagonal, independent=False),
    "reference": hessian_diagonal_reference,
}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_scores_are_those_of_linear_layers(name, dimensions):
    model, twin = pair(dimensions)
    data = batches(dimensions)
    with testing.unchanged(model):
        scores = ESTIMATORS[name](model, loss_fn, data)
    expected = ESTIMATORS[name](twin, loss_fn, data)
    assert list(scores) == POINTWISE
    SAME(of_twin(scores), dict(expected))
    assert all(score.any() for score in scores.values())


def test_the_hessian_is_that_of_autograd():
    model, _ = pair(1)
    data = batches(1, count=1)
    scores = exact_hessian_diagonal(model, loss_fn, data, "up")
    weight = model.up.weight.detach()

    def loss(flat):
        parameters = {"up.weight": flat.view_as(weight)}
        return F.cross_entropy(
            torch.func.functional_call(model, parameters, data[0][0]), data[0][1]
        )

    H = torch.autograd.functional.hessian(loss, weight.flatten())
    SAME(scores["up"], H.diagonal().view(6, 4))


@pytest.mark.parametrize("estimator", [hutchinson_weights, hutchinson_outputs])
def test_random_signs_give_the_mean_of_the_exact_diagonal(estimator):
    model, twin = pair(1)
    data = batches(1, count=1)
    options = {"generator": generator(), "samples": 40}
    scores = estimator(model, loss_fn, data, **options)
    expected = estimator(twin, loss_fn, data, **options | {"generator": generator()})
    SAME(of_twin(scores), dict(expected))  # the same signs at the same positions


@pytest.mark.parametrize("name", ["proxy", "fisher", "exact"])
def test_an_input_without_samples_is_one_sample(name):
    data = [(x[0], y[0]) for x, y in batches(2)]
    with_sample = [(x[None], y[None]) for x, y in data]
    model, _ = pair()
    scores = (
        ESTIMATORS[name](model, loss_fn, data, batch_weight=lambda batch: 1.0)
        if (name != "proxy")
        else ESTIMATORS[name](model, loss_fn, data)
    )
    SAME(dict(scores), dict(ESTIMATORS[name](model, loss_fn, with_sample)))


def test_a_mask_of_positions_drops_padding_of_a_convolution_over_time():
    model, _ = pair(1)
    x = batches(1)[0][0]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    only = nn.ModuleDict({"up": model.up})

    def loss(model, batch):
        return model["up"](batch["x"].repeat(1, 2, 1)).sum()

    scores = input_second_moment(only, loss, [{"x": x, "attention_mask": mask}])
    real = x.repeat(1, 2, 1).movedim(1, -1)[mask != 0]
    SAME(scores["up"], real.square().mean(0))


def test_one_input_of_a_convolution_and_a_linear_layer_is_seen_both_ways():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv1d(4, 2, 1), nn.Linear(4, 2)

        def forward(self, x):
            return self.conv(x).sum() + self.linear(x).sum()

    x = torch.randn(3, 4, 4, dtype=torch.float64)
    scores = input_second_moment(Both().double(), lambda model, x: model(x), [x])
    SAME(scores["conv"], x.square().mean((0, 2)))
    SAME(scores["linear"], x.square().mean((0, 1)))


# ---- the layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("gate", [None, 1.0])
def test_outputs_gradients_and_training_are_those_of_linear_layers(dimensions, gate):
    model, twin = trained_pair(dimensions, gate=gate)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin)]
    for batch in batches(dimensions):
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss_fn(one, batch).backward()
        for layer, other in zip(
            lora_layers(model).values(), lora_layers(twin).values(), strict=True
        ):
            SAME(layer.lora_A.grad, other.lora_A.grad)
            SAME(layer.lora_B.grad, other.lora_B.grad)
        for optimizer in optimizers:
            optimizer.step()
        SAME(model(batch[0]), twin(batch[0]))
        SAME(model(batch[0][0]), twin(batch[0])[0])  # without samples


def test_the_output_keeps_the_memory_format_of_the_base():
    model, _ = trained_pair()
    x = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        plain, adapted = model.up.base(given), model.up(given)
        assert adapted.stride() == plain.stride()
        assert not torch.equal(adapted, plain)
    assert model.up(x).view(3, -1).shape == (3, 6 * 35)
    SAME(model.up(x.contiguous(memory_format=torch.channels_last)), model.up(x))


def test_parents_read_the_settings_of_a_convolution_as_before():
    class PadsByItself(nn.Module):  # as MobileNet does in transformers
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 1, dilation=2, dtype=torch.float64)

        def forward(self, x):
            conv = self.conv
            assert (conv.in_channels, conv.out_channels, conv.padding) == (3, 5, (0, 0))
            assert (conv.groups, conv.padding_mode) == (1, "zeros")
            (k, _), (step, _), (d, _) = conv.kernel_size, conv.stride, conv.dilation
            return conv(F.pad(x, (d * (k - 1) + step - 1,) * 4))

    model = PadsByItself()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    y = model(x)
    wrap(model, {"conv": 2})
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", [0, "same", "valid"])
def test_without_padding_its_mode_means_nothing(padding, padding_mode):
    model = nn.Sequential(nn.Conv2d(3, 5, 1, padding=padding, padding_mode=padding_mode)).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    (scores,) = empirical_fisher(model, lambda m, x: m(x).square().mean(), [x]).values()
    layer = randomized(wrap(model, {"0": 2}))["0"]
    SAME(model(x), F.conv2d(x, layer.weight, layer.bias))
    g = 2 * layer.base(x).flatten(2) / layer.base(x).numel() * len(x)  # ∂(loss of a sample) / ∂y
    SAME(scores, torch.einsum("nop,nip->noi", g, x.flatten(2)).square().mean(0))


def test_merging_is_that_of_the_matrix_and_undone_bit_for_bit():
    model, twin = trained_pair()
    x = batches()[0][0]
    before, y = snapshot(model), model(x)
    for layer, other in zip(lora_layers(model).values(), lora_layers(twin).values(), strict=True):
        W = layer.base.weight
        SAME(layer.weight.flatten(1), other.weight)
        assert layer.weight.shape == W.shape
    weight = model.up.base.weight
    assert merge(model) == POINTWISE
    assert model.up.base.weight.shape == (6, 4, 1, 1)
    SAME(model(x), y)
    unmerge(model)
    assert model.up.base.weight is weight
    assert_unchanged(model, before)
    merge(model)
    unwrap(model)
    assert type(model.up) is nn.Conv2d
    SAME(model(x), y)


def test_other_ranks_copies_files_and_states(tmp_path):
    model, _ = trained_pair(gate=1.0)
    x = batches()[0][0]
    optimizer = torch.optim.Adam(model.parameters())
    loss_fn(model, batches()[0]).backward()
    optimizer.step()
    y = model(x).detach()
    resize(model, {"up": 4}, optimizer)
    SAME(model(x), y)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    save_adapter(model, tmp_path / "adapter.safetensors")
    again = pair()[0]
    load_adapter(again, tmp_path / "adapter.safetensors")
    assert torch.equal(again(x), model(x))
    fresh = pair()[0]
    wrap(fresh, RANKS, scaling=2.0, gate=1.0)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert fresh.up.rank == 4
    with disabled(model):
        assert torch.equal(model(x), pair()[0](x))


def test_half_precision_bases_and_autocast():
    model, _ = pair()
    model.bfloat16()
    randomize(wrap(model, RANKS, dtype=torch.float32))
    x = batches()[0][0].bfloat16()
    assert model(x).dtype == torch.bfloat16
    rows = model.up(torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)) - model.up.base(
        torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)
    )
    expected = model.up.delta_weight().sum(1)[:, None, None].expand(6, 2, 2)
    torch.testing.assert_close(rows[0].float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu"):
        assert model(x.float()).dtype == torch.bfloat16


def test_vmap_and_a_compiled_layer():
    model, _ = trained_pair()
    x = batches()[0][0]
    SAME(torch.vmap(model)(x), model(x))
    graph = torch.compile(model, backend="eager", fullgraph=True)
    SAME(graph(x), model(x))


# ---- methods ------------------------------------------------------------------------------------


def test_sensitivity_allocates_as_for_linear_layers():
    model, twin = pair()
    one, other = (
        SensitivityLoRA(m, loss_fn, batches(), curvature=empirical_fisher) for m in (model, twin)
    )
    one.score()
    other.score()
    assert of_twin(one.allocate(8).ranks) == dict(other.allocate(8).ranks)
    parameters = one.allocate(60, unit="parameters")
    assert parameters.parameters <= 60
    assert sum((4 + 6) * r if n != "head" else 7 * r for n, r in parameters.ranks.items()) <= 60


def test_l1ra_moves_the_same_ranks():
    outcomes, outputs = [], []
    for model in pair():
        names = list(linear_targets(model))
        wrap(model, dict.fromkeys(names, 2), gate=1.0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        l1ra = L1RA(model, optimizer, l1=0.5, gate_lr=0.2, interval=2)
        for batch in itertools.islice(itertools.cycle(batches()), 8):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            l1ra.step()
        outcomes.append([layer.rank for layer in lora_layers(model).values()])
        outputs.append(model(batches()[0][0]).detach())
    assert outcomes[0] == outcomes[1] != [2, 2, 2]
    SAME(outputs[0], outputs[1])


def test_shaplora_and_singular_values_score_as_linear_layers():
    model, twin = trained_pair(gate=0.0)
    scores = [ShapLoRA(m, loss_fn, batches(), coalitions=18).score() for m in (model, twin)]
    SAME(of_twin(scores[0]), scores[1])
    scores = [SingularValues(m, loss_fn, batches()).score() for m in (model, twin)]
    SAME(of_twin(scores[0]), scores[1])


def test_an_idle_convolution_with_an_adapter_has_no_singular_values():
    model, _ = trained_pair()
    model.idle = LoRALinear(nn.Conv2d(4, 4, 1, dtype=torch.float64), 1)
    randomize(model.idle)
    with pytest.warns(UserWarning, match="'idle'"):
        assert SingularValues(model, loss_fn, batches()).score()["idle"].tolist() == [0.0]
