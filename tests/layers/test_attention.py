"""attention.py: the unpacked module is the same function as nn.MultiheadAttention."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers.attention import ATTENTION, inputs_of, run, slow_path
from hypothesis import given, settings
from torch import nn

from minirank import pack_attention, unpack_attention
from minirank.layers.attention import UnpackedAttention


def attention(dtype=torch.float64, **options):
    """A small module, in a list, with biases that are not zero."""
    torch.manual_seed(0)
    made = nn.MultiheadAttention(4, 2, **{"batch_first": True, **options}, dtype=dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.7)
    return nn.ModuleList([made])


def x_of(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- every option -------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(ATTENTION)
def test_same_outputs_weights_and_gradients(case):
    model, arguments, options = inputs_of(case)
    expected = run(model[0], arguments, options)
    unpack_attention(model)
    assert type(model[0]) is UnpackedAttention
    found = run(model[0], arguments, options)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12, msg=key)


@settings(max_examples=40, deadline=None)
@given(ATTENTION)
def test_packing_gives_the_original_back(case):
    model, arguments, options = inputs_of(case)
    original = model[0]
    parameters = dict(original.named_parameters())
    state = {key: value.clone() for key, value in original.state_dict().items()}
    expected = run(original, arguments, options)
    unpack_attention(model)
    assert pack_attention(model) == ["0"]
    assert model[0] is original
    assert dict(original.named_parameters()).keys() == parameters.keys()
    assert all(original.get_parameter(key) is value for key, value in parameters.items())
    for key, value in original.state_dict().items():
        assert torch.equal(value, state[key])
    assert run(original, arguments, options).keys() == expected.keys()


def test_dropout_draws_the_same_numbers():
    x = x_of(2, 5, 4)
    for need_weights in (False, True):
        model = attention(dropout=0.4)
        torch.manual_seed(3)
        expected = model[0](x, x, x, need_weights=need_weights)[0]
        unpack_attention(model)
        torch.manual_seed(3)
        found = model[0](x, x, x, need_weights=need_weights)[0]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(model[0](x, x, x, need_weights=need_weights)[0], expected)
        state = torch.get_rng_state()
        model.eval()[0](x, x, x)
        assert torch.equal(torch.get_rng_state(), state)


def test_unpacking_draws_no_numbers():
    model = attention()
    state = torch.get_rng_state()
    unpack_attention(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dropout_that_changes_meanwhile_is_the_original_s_too():
    model = attention()
    original = model[0]
    unpack_attention(model)
    model[0].dropout = 0.25
    model.eval()
    pack_attention(model)
    assert original.dropout == 0.25
    assert not original.training
    assert not original.out_proj.training


# ---- what is refused ----------------------------------------------------------------------------

REFUSED = {
    "causal without a mask": (lambda x: ((x, x, x), {"is_causal": True}), "give attn_mask"),
    "one dimension": (lambda x: ((x[0, 0],) * 3, {}), "of two without a batch"),
    "batch and no batch": (lambda x: ((x, x[0], x[0]), {}), "3, 2 and 2 dimensions"),
    "fewer values": (lambda x: ((x, x, x[:, 1:]), {}), "as many keys as values"),
    "another batch size": (lambda x: ((x, x[:1], x[:1]), {}), "one batch size"),
    "integers": (
        lambda x: ((x, x, x), {"attn_mask": torch.zeros(3, 3, dtype=torch.long)}),
        "floating-point numbers",
    ),
    "a mask that broadcasts": (
        lambda x: ((x, x, x), {"attn_mask": torch.zeros(1, 3, dtype=torch.bool)}),
        r"attn_mask of shape \(3, 3\) or \(4, 3, 3\)",
    ),
    "a padding mask that broadcasts": (
        lambda x: ((x, x, x), {"key_padding_mask": torch.zeros(1, 3, dtype=torch.bool)}),
        r"key_padding_mask of shape \(2, 3\)",
    ),
    "a nested tensor": (
        lambda x: ((torch.nested.nested_tensor([x[0], x[1]]),) * 3, {}),
        "nested tensor.*use_nested_tensor",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_does_not_fit_is_refused_as_by_torch(case):
    make, message = REFUSED[case]
    model = attention()
    arguments, options = make(x_of(2, 3, 4))
    with slow_path(), pytest.raises((AssertionError, RuntimeError, ValueError)):
        model[0](*arguments, **options)
    unpack_attention(model)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        model[0](*arguments, **options)


def test_who_reads_a_packed_weight_is_told():
    model = attention()
    unpack_attention(model)
    with pytest.raises(AttributeError, match=r"'in_proj_weight'.*pack_attention\(model\)"):
        _ = model[0].in_proj_weight
    assert not hasattr(model[0], "out_proj")
    with pytest.raises(AttributeError, match="no attribute 'fc'"):
        _ = model[0].fc


# ---- inside torch's transformers ----------------------------------------------------------------


def encoder(norm_first=False, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    made = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return nn.ModuleDict({"encoder": made})


def padding(n, length):
    """Left-aligned: the nested-tensor path of nn.TransformerEncoder takes no other."""
    mask = torch.zeros(n, length, dtype=torch.bool)
    mask[0, length - 2 :] = True
    return mask


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both"])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_encoder_computes_the_same(norm_first, training, grad, masks, frozen):
    model = encoder(norm_first).train(training).requires_grad_(not frozen)
    x, options = x_of(3, 5, 8), {}
    if masks in ("padding", "both"):
        options["src_key_padding_mask"] = padding(3, 5)
    if masks in ("causal", "both"):
        options["mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
        options["is_causal"] = masks == "causal"
    with torch.set_grad_enabled(grad):
        with slow_path():
            expected = model.encoder(x, **options)
        fast = model.encoder(x, **options)
        unpack_attention(model)
        found = model.encoder(x, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    real = ~options.get("src_key_padding_mask", torch.zeros(3, 5, dtype=torch.bool))
    torch.testing.assert_close(found[real], fast[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_decoder_computes_the_same(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    model = nn.ModuleDict({"decoder": nn.TransformerDecoder(layer, 2)})
    x, memory = x_of(2, 4, 8), x_of(2, 3, 8, seed=1)
    options = {
        "tgt_mask": torch.ones(4, 4, dtype=torch.bool).triu(1),
        "memory_key_padding_mask": padding(2, 3),
    }
    for training in (False, True):
        model.train(training)
        expected = model.decoder(x, memory, **options)
        assert list(unpack_attention(model)) == [
            f"decoder.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn", "multihead_attn")
        ]
        with torch.no_grad():
            found = model.decoder(x, memory, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        pack_attention(model)


def test_the_nested_path_is_switched_off_while_anything_is_unpacked():
    model = encoder().eval()
    x, mask = x_of(3, 5, 8), padding(3, 5)
    assert model.encoder.use_nested_tensor
    for targets in ("encoder.layers.0.*", "encoder.layers.1.*", None):
        unpack_attention(model, targets)
        assert not model.encoder.use_nested_tensor
        with torch.no_grad():
            model.encoder(x, src_key_padding_mask=mask)
    twin = copy.deepcopy(model)
    for packed in (model, twin):
        pack_attention(packed)
        assert packed.encoder.use_nested_tensor
        assert vars(packed.encoder).keys() == vars(encoder().encoder).keys()
    never = encoder()
    never.encoder.use_nested_tensor = False
    unpack_attention(never)
    pack_attention(never)
    assert not never.encoder.use_nested_tensor


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layer", [0, 1])
def test_an_encoder_that_was_not_seen_says_what_to_do(layer):
    model = encoder().eval()
    unpack_attention(model.encoder.layers, f"{layer}.*")  # the encoder is not in it
    x, mask = x_of(3, 5, 8), padding(3, 5)
    error = AttributeError if layer == 0 else ValueError
    with torch.no_grad(), pytest.raises(error, match="use_nested_tensor to False"):
        model.encoder(x, src_key_padding_mask=mask)
    model.encoder.use_nested_tensor = False
    with torch.no_grad():
        model.encoder(x, src_key_padding_mask=mask)


def test_an_encoder_made_of_an_unpacked_layer_says_that_it_nests_nothing():
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
    unpack_attention(model)
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        nn.TransformerEncoder(model[0], 1)


# ---- compilers and precision --------------------------------------------------------------------


def test_it_compiles_to_one_graph_and_exports():
    model = encoder().eval()
    unpack_attention(model)
    x, mask = x_of(2, 4, 8), torch.ones(4, 4, dtype=torch.bool).triu(1)
    # Otherwise nn.TransformerEncoder looks into the mask, which no compiler can follow.
    causal = {"is_causal": True}
    expected = model.encoder(x, mask, **causal)
    torch._dynamo.reset()
    compiled = torch.compile(model.encoder, backend="eager", fullgraph=True)
    for training in (False, True):
        model.train(training)
        torch.testing.assert_close(compiled(x, mask, **causal), expected, rtol=1e-12, atol=1e-12)
    for options in ({"strict": False}, {"strict": True}):
        exported = torch.export.export(model.encoder.eval(), (x, mask), causal, **options)
        found = exported.module()(x, mask, **causal)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(
    torch.__version__.startswith(("2.4.", "2.5.")), reason="that exporter fixes some lengths"
)
def test_it_exports_with_a_length_that_varies():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention()[0]

        def forward(self, x, mask):
            return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    model = Attends().eval()
    unpack_attention(model)
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {"x": {1: length}, "mask": {0: length, 1: length}}
    exported = torch.export.export(
        model, (x_of(2, 5, 4), torch.zeros(5, 5, dtype=torch.float64)), dynamic_shapes=shapes
    ).module()
    x, mask = x_of(2, 9, 4), x_of(9, 9, seed=2)
    torch.testing.assert_close(exported(x, mask), model(x, mask), rtol=1e-12, atol=1e-12)


def test_autocast_gives_the_same_type_and_nearly_the_same_values():
    for options in ({}, {"add_bias_kv": True, "add_zero_attn": True}):
        for need_weights in (False, True):
            model = attention(torch.float32, **options)
            x = x_of(2, 5, 4, dtype=torch.float32)
            mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
            with torch.autocast("cpu", torch.bfloat16):
                expected = model[0](x, x, x, attn_mask=mask, need_weights=need_weights)
                unpack_attention(model)
                found = model[0](x, x, x, attn_mask=mask, need_weights=need_weights)
            assert found[0].dtype == expected[0].dtype == torch.bfloat16
            torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=2e-2)
            if need_weights:
                assert found[1].dtype == expected[1].dtype
                torch.testing.assert_close(found[1], expected[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype):
    model = attention(dtype)
    x = x_of(2, 5, 4, dtype=dtype)
    expected = model[0](x, x, x)[0]
    unpack_attention(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    torch.testing.assert_close(model[0](x, x, x)[0], expected, rtol=3e-2, atol=3e-2)


def test_gradients_of_single_samples_by_vmap():
    model = attention()
    unpack_attention(model)
    parameters = dict(model[0].named_parameters())

    def loss(values, x):
        return torch.func.functional_call(model[0], values, (x, x, x))[0].square().sum()

    x = x_of(3, 5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels without a batching rule
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        expected = torch.func.grad(loss)(parameters, x[i])
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)])
@pytest.mark.parametrize("need_weights", [True, False])
def test_no_samples_and_no_positions(shape, need_weights):
    model = nn.ModuleList([nn.MultiheadAttention(4, 2, batch_first=True)])
    x = torch.zeros(shape)
    expected = model[0](x, x, x, need_weights=need_weights)
    unpack_attention(model)
    found = model[0](x, x, x, need_weights=need_weights)
    assert [None if t is None else t.shape for t in found] == [
        None if t is None else t.shape for t in expected
    ]
