"""unpack.py: what is kept, shared and refused when attention is unpacked and packed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm

from minirank import (
    UniformRanks,
    linear_targets,
    load_adapter,
    merge,
    pack_attention,
    save_adapter,
    unmerge,
    unpack_attention,
    unwrap,
    wrap,
)
from minirank.layers.attention import UnpackedAttention


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(4, 2, **{"batch_first": True, **options}).double()
        for parameter in self.attn.parameters():
            nn.init.normal_(parameter)
        self.up = nn.Linear(4, 8).double()

    def forward(self, x):
        return self.up(self.attn(x, x, x, need_weights=False)[0])


class Subclass(nn.MultiheadAttention):
    pass


X = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def snapshot(model):
    """What an all-or-nothing call leaves as it was: modules, parameters, flags and values."""
    return (
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.shape) for name, p in model.named_parameters()],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][name], value) for name, value in before[2].items())


def move_adapters(layers):
    with torch.no_grad():
        for layer in layers.values():
            nn.init.normal_(layer.lora_B, std=0.3)


# ---- which are unpacked -------------------------------------------------------------------------


def two_blocks():
    return nn.ModuleDict({"encoder": Block(), "decoder": Block(), "head": nn.Linear(4, 2)})


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (None, ["encoder.attn", "decoder.attn"]),
        ("encoder.*", ["encoder.attn"]),
        ("decoder.attn", ["decoder.attn"]),
        (["*.attn"], ["encoder.attn", "decoder.attn"]),
        (["decoder.attn", "encoder.attn"], ["encoder.attn", "decoder.attn"]),
        ("module.decoder.attn", ["decoder.attn"]),
    ],
)
def test_names_and_globs_select(targets, names):
    model = two_blocks()
    assert list(unpack_attention(model, targets)) == names
    kinds = {name: type(model.get_submodule(name)) for name in ("encoder.attn", "decoder.attn")}
    assert [name for name, kind in kinds.items() if kind is UnpackedAttention] == names
    assert pack_attention(model) == names


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ("encoder.att", ValueError, "did you mean"),
        ("head", ValueError, "matches no nn.MultiheadAttention"),
        ("encoder", ValueError, "those inside it are 'encoder.attn'"),
        (["encoder.attn", "head"], ValueError, "'head' matches no"),
        ([nn.Linear], TypeError, "names or globs"),
    ],
)
def test_targets_that_select_nothing_are_refused(targets, error, message):
    model = two_blocks()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        unpack_attention(model, targets)
    assert_unchanged(model, before)


def test_a_model_without_attention_is_refused_and_a_second_call_does_nothing():
    with pytest.raises(ValueError, match="at least one nn"):
        unpack_attention(nn.Sequential(nn.Linear(2, 2)))
    model = two_blocks()
    assert pack_attention(model) == []
    unpack_attention(model, "encoder.attn")
    assert list(unpack_attention(model)) == ["decoder.attn"]
    assert unpack_attention(model) == {}
    assert unpack_attention(model, "encoder.attn") == {}


def test_subclasses_are_named_and_left_as_they_are():
    model = nn.ModuleDict({"own": Subclass(4, 2), "attn": nn.MultiheadAttention(4, 2)})
    own = model["own"]
    with pytest.warns(UserWarning, match=r"'own' \(Subclass\) is left as it is") as caught:
        assert list(unpack_attention(model)) == ["attn"]
    assert caught[0].filename == __file__
    assert model["own"] is own
    with pytest.raises(ValueError, match=r"has none.*'own' \(Subclass\)"):
        unpack_attention(nn.ModuleDict({"own": own}))
    with pytest.raises(ValueError, match=r"'own'.*Subclass"):
        unpack_attention(model, "own")
    quantizable = nn.ModuleList([torch.ao.nn.quantizable.MultiheadAttention(4, 2)])
    with pytest.raises(ValueError, match=r"'0' \(MultiheadAttention\) is left as it is"):
        unpack_attention(quantizable)


def test_one_module_in_two_places_stays_one():
    model = nn.ModuleDict({"a": Block(), "b": Block()})
    model["b"].attn = model["a"].attn
    expected = [model[key](X) for key in "ab"]
    assert list(unpack_attention(model, "b.attn")) == ["a.attn"]
    assert model["a"].attn is model["b"].attn
    for key, value in zip("ab", expected, strict=True):
        same(model[key](X), value)
    assert len(linear_targets(model, "*attn.*")) == 4
    assert pack_attention(model) == ["a.attn"]
    assert model["a"].attn is model["b"].attn


def test_the_model_itself_has_no_parent():
    for model in (nn.MultiheadAttention(4, 2), nn.DataParallel(nn.MultiheadAttention(4, 2))):
        with pytest.raises(TypeError, match=r"nn\.ModuleList\(\[model\]\)"):
            unpack_attention(model)
    model = Block()
    unpack_attention(model)
    with pytest.raises(TypeError, match="no parent"):
        pack_attention(model.attn)


# ---- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 5, "add_bias_kv": True}])
def test_all_but_the_stacked_parameters_are_the_same_objects(options):
    model = Block(**options)
    packed = model.attn
    unpack_attention(model)
    attn = model.attn
    assert attn.out.weight is packed.out_proj.weight
    assert attn.out.bias is packed.out_proj.bias
    assert attn.bias_k is packed.bias_k
    if options:
        assert attn.k.weight is packed.k_proj_weight
    else:
        assert len(packed.in_proj_weight) == 0
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("frozen", [[], ["in_proj_weight"], ["in_proj_bias", "out_proj.weight"]])
def test_requires_grad_and_gradients_are_kept(frozen):
    model = Block()
    packed = model.attn
    for name in frozen:
        packed.get_parameter(name).requires_grad = False
    model(X).sum().backward()
    flags = {name: p.requires_grad for name, p in packed.named_parameters()}
    grads = {name: p.grad for name, p in packed.named_parameters()}
    unpack_attention(model)
    for key in "qkv":
        layer = getattr(model.attn, key)
        assert layer.weight.requires_grad == flags["in_proj_weight"]
        assert layer.bias.requires_grad == flags["in_proj_bias"]
    pack_attention(model)
    assert {name: p.requires_grad for name, p in packed.named_parameters()} == flags
    for name, grad in grads.items():
        found = packed.get_parameter(name).grad
        assert found is grad or torch.equal(found, grad)


@pytest.mark.parametrize(("changed", "expected"), [("qkv", False), ("q", True)])
def test_flags_that_disagree_leave_the_stacked_one_as_it_was(changed, expected):
    model = Block()
    unpack_attention(model)
    for key in changed:
        getattr(model.attn, key).weight.requires_grad = False
    pack_attention(model)
    assert model.attn.in_proj_weight.requires_grad == expected


def test_hooks_see_the_same_calls_and_their_handles_remove_them():
    model = Block()
    seen = []
    handle = model.attn.register_forward_hook(lambda module, args, output: seen.append("out"))
    model.attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True
    )
    model.attn.register_full_backward_hook(lambda *_: seen.append("back"))
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    expected, seen[:] = list(seen), []
    unpack_attention(model)
    model(x).sum().backward()
    assert seen == expected == [["need_weights"], "out", "back"]
    handle.remove()
    model.attn.register_forward_hook(lambda *_: seen.append("new"))
    pack_attention(model)
    seen.clear()
    model(X)
    assert seen == [["need_weights"], "new"]


def test_a_state_dict_of_the_unpacked_model_loads_back():
    model, twin = Block(), Block()
    unpack_attention(model)
    unpack_attention(twin)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    assert "attn.q.weight" in state
    for assign in (False, True):
        twin.load_state_dict(state, assign=assign)
        model.load_state_dict(state)
        same(twin(X), model(X))
        expected = model(X)
        for each in (model, twin):
            pack_attention(each)
            same(each(X), expected)
            assert {name for name, _ in each.attn.named_parameters()} == {
                "in_proj_weight",
                "in_proj_bias",
                "out_proj.weight",
                "out_proj.bias",
            }
            unpack_attention(each)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stand_alone(how):
    model = Block()
    unpack_attention(model)
    expected = model(X)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    same(twin(X), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    same(twin(X), expected)
    assert pack_attention(twin) == ["attn"]
    same(twin(X), expected)


def test_a_conversion_meanwhile_is_the_packed_module_s_too():
    model = Block()
    unpack_attention(model)
    model.float().to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    expected = model(X.float())
    pack_attention(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(X.float()), expected, rtol=1e-5, atol=1e-5)


def test_a_model_on_the_meta_device_and_one_made_in_inference_mode():
    with torch.device("meta"):
        model = Block()
    unpack_attention(model)
    assert model.attn.q.weight.is_meta
    pack_attention(model)
    assert model.attn.in_proj_weight.shape == (12, 4)
    with torch.inference_mode():
        model = Block()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode\(\)"):
        unpack_attention(model)
    assert_unchanged(model, before)
    model = Block()
    with torch.inference_mode():  # the parts can train nevertheless
        unpack_attention(model)
    model(X).sum().backward()
    assert model.attn.q.weight.grad is not None


def test_weights_assigned_to_a_model_on_the_meta_device_are_packed():
    model = Block()
    unpack_attention(model)
    expected = model(X)
    with torch.device("meta"):
        twin = Block()
    twin.to(X.dtype)
    unpack_attention(twin)
    twin.load_state_dict(model.state_dict(), assign=True)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(not name.startswith("attn."))
    assert pack_attention(twin) == pack_attention(model)
    assert not any(p.is_meta for p in twin.parameters())
    flags = {name: p.requires_grad for name, p in twin.named_parameters()}
    assert flags == {name: not name.startswith("attn.") for name in flags}
    same(twin(X), expected)


# ---- training -----------------------------------------------------------------------------------


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)


def step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def test_plain_training_is_the_same_and_packs():
    packed, model = Block(), Block()
    unpack_attention(model)
    optimizers = sgd(packed), sgd(model)
    for _ in range(3):
        step(packed, optimizers[0])
        step(model, optimizers[1])
    torch.testing.assert_close(model(X), packed(X), rtol=1e-10, atol=1e-10)
    pack_attention(model)
    for name, value in packed.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-10, atol=1e-10)


def test_an_optimizer_made_before_is_stopped():
    model = Block()
    old = sgd(model)
    unpack_attention(model)
    with pytest.raises(RuntimeError, match=r"unpack_attention\(\) has split in_proj_(weight|bias)"):
        step(model, old)
    new = sgd(model)
    step(model, new)
    pack_attention(model)
    with pytest.raises(RuntimeError, match=r"pack_attention\(\) has put it in in_proj_"):
        step(model, new)
    before = model.attn.in_proj_weight.clone()
    step(model, old)  # holds what trains again
    assert not torch.equal(model.attn.in_proj_weight, before)


def test_an_optimizer_of_parameters_that_are_frozen_now_is_not_stopped():
    model = Block()
    old = sgd(model)
    unpack_attention(model)
    model.attn.requires_grad_(False)
    step(model, old)


@pytest.mark.parametrize("layer", ["attn.q", "attn.v"])
def test_an_optimizer_made_before_that_cannot_move_the_adapter_is_told(layer):
    model = Block()
    old = sgd(model)
    unpack_attention(model)
    layers = wrap(model, {layer: 1})
    with torch.no_grad():
        layers[layer].lora_B.fill_(0.1)
    for _ in range(3):
        step(model, old)
    with pytest.warns(UserWarning, match="have not moved in 3 steps"):
        step(model, old)


# ---- merging, files -----------------------------------------------------------------------------

ALL = {"attn.q": 2, "attn.k": 1, "attn.v": 2, "attn.out": 1, "up": 1}


@pytest.mark.parametrize("ranks", [ALL, {"attn.q": 1}, {"attn.out": 2}, {"up": 1}])
def test_merged_adapters_go_into_the_packed_weights(ranks):
    model = Block()
    packed, plain = model.attn, model(X)
    parameters = dict(packed.named_parameters())
    unpack_attention(model)
    move_adapters(wrap(model, ranks))
    expected = model(X)
    assert not torch.allclose(expected, plain)
    merge(model)
    pack_attention(model)
    assert model.attn is packed
    same(model(X), expected)
    for name, parameter in parameters.items():
        assert packed.get_parameter(name) is parameter, name
    if ranks is ALL:
        assert all(parameter.requires_grad for parameter in parameters.values())
    assert ("up" in [n for n, m in model.named_modules() if hasattr(m, "lora_A")]) == (
        "up" in ranks
    )


def test_unmerged_adapters_are_not_lost():
    model = Block()
    unpack_attention(model)
    move_adapters(wrap(model, ALL))
    before, expected = snapshot(model), model(X)
    with pytest.raises(
        ValueError, match=r"'attn.q', 'attn.k', 'attn.v' and 1 more.*merge\(model\)"
    ):
        pack_attention(model)
    assert_unchanged(model, before)
    merge(model)
    unmerge(model)
    with pytest.raises(ValueError, match="would be lost"):
        pack_attention(model)
    same(model(X), expected)
    unwrap(model)
    assert pack_attention(model) == ["attn"]
    same(model(X), Block()(X))


def test_a_weight_that_is_tied_elsewhere_keeps_its_own_value():
    model = nn.ModuleDict({"block": Block(), "twin": nn.Linear(4, 4, dtype=torch.float64)})
    W = model["twin"].weight = model["block"].attn.out_proj.weight
    before = W.clone()
    unpack_attention(model)
    assert model["block"].attn.out.weight is W
    move_adapters(wrap(model, {"block.attn.out": 1}))
    expected = model["block"](X)
    with pytest.raises(ValueError, match=r"tied to twin\.weight"):
        merge(model)
    merge(model, untie=True)
    pack_attention(model)
    same(model["block"](X), expected)
    assert model["twin"].weight is W
    assert torch.equal(W, before)


def test_two_outputs_that_were_tied_keep_their_own_values():
    model = tied("out_proj")
    assert model["a"].attn.out_proj is model["b"].attn.out_proj
    model["b"].attn.out_proj = nn.Linear(4, 4, dtype=torch.float64)
    model["b"].attn.out_proj.weight = model["a"].attn.out_proj.weight
    unpack_attention(model)
    move_adapters(wrap(model, {"a.attn.out": 1, "b.attn.out": 2}))
    expected = [block(X) for block in model.values()]
    merge(model, untie=True)
    pack_attention(model)
    for block, value in zip(model.values(), expected, strict=True):
        same(block(X), value)


def test_adapter_files_fit_into_another_unpacked_model(tmp_path):
    model, twin = Block(), Block()
    for each in (model, twin):
        unpack_attention(each)
    move_adapters(wrap(model, ALL))
    save_adapter(model, tmp_path / "adapter.safetensors")
    load_adapter(twin, tmp_path / "adapter.safetensors")
    assert torch.equal(twin(X), model(X))
    with pytest.raises(ValueError, match="unpack_attention"):
        load_adapter(Block(), tmp_path / "adapter.safetensors")


# ---- what is refused ----------------------------------------------------------------------------


def tied(key):
    model = nn.ModuleDict({"a": Block(), "b": Block()})
    setattr(model["b"].attn, key, getattr(model["a"].attn, key))
    return model


def with_out_proj(change):
    model = Block()
    model.attn.out_proj = change(model.attn.out_proj)
    return model


def changed(change):
    model = Block()
    replaced = change(model)
    return model if replaced is None else replaced


def view_of_its_weight(model):
    model.register_buffer("first_rows", model.attn.in_proj_weight.detach()[:2])


def quantised_weight(model):
    model.attn.in_proj_weight = nn.Parameter(
        torch.zeros(12, 4, dtype=torch.int8), requires_grad=False
    )


def offloaded(model):
    model.attn.forward = model.attn.forward


UNPACKABLE = {
    "tied weights": (lambda: tied("in_proj_weight"), r"tied to 'b\.attn\.in_proj_weight'"),
    "tied biases": (lambda: tied("in_proj_bias"), r"tied to 'b\.attn\.in_proj_bias'"),
    "a view": (lambda: changed(view_of_its_weight), "tied to 'first_rows'"),
    "an adapter": (lambda: changed(lambda m: wrap(m, {"attn.out_proj": 1}) and m), "an adapter"),
    "another out_proj": (lambda: with_out_proj(lambda out: nn.Sequential(out)), "a Sequential"),
    "weight_norm": (
        lambda: changed(lambda m: WeightNorm.apply(m.attn, "in_proj_weight", 0) and m),
        "weight_norm",
    ),
    "parametrized": (
        lambda: changed(lambda m: parametrizations.orthogonal(m.attn, "in_proj_weight") and m),
        "has none.*ParametrizedMultiheadAttention",
    ),
    "quantised": (lambda: changed(quantised_weight), "before it is quantised"),
    "a forward of its own": (lambda: changed(offloaded), "its forward has been replaced"),
    "a buffer": (
        lambda: changed(lambda m: m.attn.register_buffer("cache", torch.zeros(2))),
        "'cache'",
    ),
    "compiled by itself": (
        lambda: changed(lambda m: setattr(m, "attn", torch.compile(m.attn, backend="eager"))),
        "wrapper of its own",
    ),
}


@pytest.mark.parametrize("case", UNPACKABLE)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_cannot_be_unpacked_is_refused_and_nothing_changes(case):
    make, message = UNPACKABLE[case]
    model = nn.ModuleDict({"first": Block(), "model": make()})
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        unpack_attention(model["model"])
    if case != "parametrized":  # which is left as it is
        with pytest.raises(ValueError, match="model.*" if "tied" in case else "cannot|plain|tied"):
            unpack_attention(model)
    assert_unchanged(model, before)


UNPACKED_AND = {
    "another layer": (
        lambda attn: setattr(attn, "q", nn.Sequential(attn.q)),
        r"'model\.attn\.q' to be a plain nn\.Linear, got a Sequential",
    ),
    "parametrized": (lambda attn: parametrizations.weight_norm(attn.k), "ParametrizedLinear"),
    "two types": (lambda attn: attn.v.float(), "torch.float64.*torch.float32"),
    "a forward of its own": (
        lambda attn: setattr(attn.out, "forward", attn.out.forward),
        "its forward has been replaced",
    ),
    "a bias less": (lambda attn: setattr(attn.q, "bias", None), "all with a bias or none"),
}


@pytest.mark.parametrize("case", UNPACKED_AND)
def test_what_cannot_be_packed_is_refused_and_nothing_changes(case):
    change, message = UNPACKED_AND[case]
    model = nn.ModuleDict({"first": Block(), "model": Block()})
    unpack_attention(model)
    change(model["model"].attn)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pack_attention(model)
    assert_unchanged(model, before)


# ---- what others say of it ----------------------------------------------------------------------


def test_the_note_of_what_is_left_out_says_that_it_can_be_unpacked():
    allocator = UniformRanks(Block(), targets="up")
    allocator.score()
    note = str(allocator.allocate(2)).splitlines()[-2:]
    assert all("unpack_attention" in line for line in note)
    model = Block()
    unpack_attention(model)
    allocator = UniformRanks(model)
    allocator.score()
    assert allocator.allocate(5).coverage.share == 1
    own = nn.ModuleDict({"own": Subclass(4, 2), "up": nn.Linear(4, 4)})
    allocator = UniformRanks(own, targets="up")
    allocator.score()
    assert "(a parameter, not a layer): own" in str(allocator.allocate(2)).splitlines()[-1]


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        ("attn.q", "'attn' is an nn.MultiheadAttention"),
        ("*.q", "'attn' is an nn.MultiheadAttention"),
        ("attn", "'attn' is an nn.MultiheadAttention"),
        ("attn.in_proj_weight", "'attn' is an nn.MultiheadAttention"),
        ("*out_proj", "give its exact name"),
    ],
)
def test_names_of_layers_that_unpacking_would_make(targets, part):
    with pytest.raises(ValueError, match=rf"{part}.*unpack_attention\(model\)"):
        linear_targets(Block(), targets)
    if "*" not in targets:
        with pytest.raises(ValueError, match=r"unpack_attention\(model\)"):
            wrap(Block(), {targets: 1})


def test_a_model_of_attention_alone_is_told_what_to_do():
    with pytest.raises(ValueError, match=r"unpack_attention\(model\)"):
        linear_targets(nn.ModuleList([nn.MultiheadAttention(4, 2)]))
