"""Models of transformers with stacks of experts: the function by hand, training, files, PEFT."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from minirank import (
    L1RA,
    UniformRanks,
    export_peft,
    import_peft,
    linear_targets,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
    unwrap,
    wrap,
)

hf = pytest.importorskip("transformers", minversion="5")  # earlier ones have experts of nn.Linear

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 20}
MODELS = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "Qwen2Moe": {**QWEN, "intermediate_size": 24, "shared_expert_intermediate_size": 12},
    "Qwen3Moe": {**QWEN, "intermediate_size": 24, "head_dim": 8},
    "GptOss": {
        "num_local_experts": 4,
        "intermediate_size": 24,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
Q_PROJ = "model.layers.0.self_attn.q_proj"
every_model = pytest.mark.parametrize("kind", MODELS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume:UserWarning"),
]


def made(kind, how="eager"):
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**SIZES, **MODELS[kind])
    model = getattr(hf, f"{kind}ForCausalLM")(config)
    model.set_experts_implementation(how)
    return model if how == "grouped_mm" else model.double()


def wrapped(model, **options):
    """Random adapters for all stacks, of ranks 1, 2, 3, … and for one attention layer."""
    stacks = linear_targets(model, "*.experts.*")
    ranks = {name: 1 + i for i, name in enumerate(stacks)}
    layers = wrap(model, {**ranks, Q_PROJ: 2}, scaling=1.5, **options)
    for layer in layers.values():
        for parameter in layer.parameters(recurse=False):
            torch.nn.init.normal_(parameter, std=0.3)
    return layers


def ids():
    return torch.arange(20).view(2, 10)


def logits(model):
    return model(ids()).logits


def by_hand(plain, layers):
    model = copy.deepcopy(plain)
    for name, layer in layers.items():
        if name == Q_PROJ:
            model.get_submodule(name).weight.data += layer.delta_weight()
            continue
        parameter = model.get_parameter(name)
        for e in range(4):
            delta = 1.5 * layer.lora_B[e] @ torch.diag(layer.gate) @ layer.lora_A[e]
            parameter.data[e] += delta.T if type(plain).__name__[:3] == "Gpt" else delta
    return model


@every_model
@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_reads_the_sum(kind, how):
    model = made(kind, how)
    plain = copy.deepcopy(model)
    layers = wrapped(model, gate=1.0)
    assert len(layers) == 5
    y, tolerance = logits(model), 1e-5 if how == "grouped_mm" else 1e-12
    torch.testing.assert_close(y, logits(by_hand(plain, layers)), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(y, logits(plain), atol=1e-3)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), y)
    model(ids(), labels=ids()).loss.backward()
    for layer in layers.values():
        assert all(p.grad.any() for p in layer.parameters(recurse=False))
        assert layer.base.weight.grad is None
    merge(model)
    torch.testing.assert_close(logits(model), y, rtol=tolerance, atol=tolerance)


@every_model
def test_checkpointed_training_with_l1ra_and_files(kind, tmp_path):
    model = made(kind)
    plain = copy.deepcopy(model)
    stacks = linear_targets(model, "*.experts.*")
    layers = wrap(model, {**dict.fromkeys(stacks, 2), Q_PROJ: 2}, gate=1.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    l1ra = L1RA(model, optimizer, interval=2, l1=2.0)
    layers[Q_PROJ].gate.data[0] = 0.01
    losses = []
    for _ in range(6):
        loss = model(ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        l1ra.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert layers[Q_PROJ].rank == 1
    assert sum(l1ra.ranks.values()) == 10
    model.eval()
    save_adapter(model, tmp_path / "adapter")
    twin = copy.deepcopy(plain).eval()
    load_adapter(twin, tmp_path / "adapter")
    assert torch.equal(logits(twin), logits(model))
    unwrap(twin)
    assert torch.equal(logits(twin), logits(plain.eval()))
    for name, parameter in plain.named_parameters():
        assert torch.equal(twin.get_parameter(name), parameter)


@pytest.mark.filterwarnings("ignore:save_pretrained writes the weights:UserWarning")
@pytest.mark.parametrize(("kind", "takes_apart"), [("Mixtral", True), ("GptOss", False)])
def test_save_pretrained_does_not_take_adapters_apart(kind, takes_apart, tmp_path):
    model = made(kind)
    wrapped(model)
    if takes_apart:
        with pytest.raises(RuntimeError, match=r"would take the adapter of .* apart.*save_adapter"):
            model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path, save_original_format=False)
    else:
        model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() <= model.state_dict().keys()
    assert sum("lora_A" in name for name in written) == 5
    y = logits(model)
    merge(model)
    unwrap(model)
    model.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain", dtype=torch.float64)
    again.set_experts_implementation("eager")
    assert torch.equal(logits(again), y)


@every_model
@pytest.mark.parametrize("portable", [False, True])
def test_peft_computes_the_same_function(kind, portable, tmp_path):
    peft = pytest.importorskip("peft", minversion="0.21")
    model = made(kind)
    plain = copy.deepcopy(model)
    layers = wrapped(model, gate=1.0)
    export_peft(model, tmp_path, portable=portable)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        logits(loaded.merge_and_unload()), logits(by_hand(plain, layers)), rtol=1e-12, atol=1e-12
    )
    with pytest.raises(ValueError, match=r"sets target_parameters=\['model.layers"):
        import_peft(plain, tmp_path)
    assert not lora_layers(plain)


@pytest.mark.parametrize("targets", ["*.experts.*", ["*.q_proj", "*.experts.*"]])
def test_an_allocation_goes_to_peft(targets):
    peft = pytest.importorskip("peft", minversion="0.21")
    model = made("Qwen2Moe")
    allocator = UniformRanks(model, targets)
    allocator.score()
    allocation = allocator.allocate(9)
    config = peft.LoraConfig(
        r=8,
        target_modules=allocation.target_modules,
        target_parameters=allocation.target_parameters,
        rank_pattern=allocation.rank_pattern,
        alpha_pattern=allocation.alpha_pattern(1.5),
    )
    adapted = peft.get_peft_model(model, config)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == allocation.parameters


def test_peft_gets_one_stack_of_a_module_alone(tmp_path):
    peft = pytest.importorskip("peft", minversion="0.21")
    for i, key in enumerate(("gate_up_proj", "down_proj")):
        model = made("Qwen2Moe")
        plain = copy.deepcopy(model)
        layer = wrap(model, {f"model.layers.1.mlp.experts.{key}": 2})
        torch.nn.init.normal_(next(iter(layer.values())).lora_B)
        export_peft(model, tmp_path / str(i))
        loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path / str(i)))
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-12, atol=1e-12)


def test_what_peft_cannot_load_is_refused(tmp_path):
    model = made("Mixtral")
    wrapped(model)
    lora_layers(model)[Q_PROJ].dropout = 0.1
    with pytest.raises(ValueError, match=r"q_proj' have adapter dropout, beside which PEFT"):
        export_peft(model, tmp_path)
    experts = made("Mixtral").model.layers[0].mlp.experts
    wrap(experts, {"down_proj": 1})
    with pytest.raises(ValueError, match=r"'down_proj' is a parameter of the model itself"):
        export_peft(experts, tmp_path)
    assert not list(tmp_path.iterdir())
