"""The ranks of PEFT's EVA and AdaLoRA: exact sums, exact targets, a model left unchanged."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def peft_ranks(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import peft_ranks

    return peft_ranks


class Two(nn.Module):
    """Two linear layers side by side. All inputs of `poor` are multiples of one vector."""

    def __init__(self):
        super().__init__()
        self.rich, self.poor = nn.Linear(32, 8), nn.Linear(32, 8)
        self.inner = nn.ModuleDict({"rich": nn.Linear(32, 8)})  # a name that ends like another
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        along = torch.linspace(1, 2, 32, dtype=x.dtype)
        poor = x[..., :1] * along
        return self.head(
            torch.tanh(self.rich(x)) + self.poor(poor) + self.inner["rich"](x.flip(-1))
        )


TARGETS = ["poor", "rich"]


def two(dtype=torch.float64):
    torch.manual_seed(0)
    return Two().to(dtype)


def unchanged(model, before, names):
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def call(model, x):
    return model(x)


# ---- EVA ---------------------------------------------------------------------------------------


def test_eva_gives_least_to_a_layer_whose_input_has_rank_one(peft_ranks):
    pytest.importorskip("peft")
    model = two().train()
    before, names = copy.deepcopy(model.state_dict()), [n for n, _ in model.named_modules()]
    state = torch.get_rng_state()
    batches = [torch.randn(64, 32, dtype=torch.float64) for _ in range(4)]
    drawn = torch.get_rng_state()
    ranks = peft_ranks.eva_ranks(model, TARGETS, batches, call, rank=3, max_rank=5)
    assert not torch.equal(state, drawn)
    assert torch.equal(drawn, torch.get_rng_state())
    assert ranks == {"poor": 1, "rich": 5}
    assert list(ranks) == TARGETS
    assert model.training
    unchanged(model, before, names)


def test_eva_uses_the_budget_and_max_rank(peft_ranks):
    pytest.importorskip("peft")
    batches = [torch.randn(64, 32, dtype=torch.float64) for _ in range(4)]
    targets = ["inner.rich", "poor", "rich"]
    ranks = peft_ranks.eva_ranks(two(), targets, batches, call, rank=4, max_rank=7)
    assert sum(ranks.values()) == 12
    assert max(ranks.values()) <= 7
    # No freedom: every layer has the average rank.
    equal = peft_ranks.eva_ranks(two(), targets, batches, call, rank=3, max_rank=3)
    assert equal == dict.fromkeys(targets, 3)


class Words(nn.Module):
    """Embeddings, two layers on every word, and a layer on the mean of the words."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.first, self.second, self.pooled = (
            nn.Linear(24, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 2),
        )

    def forward(self, input_ids, attention_mask, labels=None):
        hidden = self.second(torch.tanh(self.first(self.embedding(input_ids))))
        return self.pooled((hidden * attention_mask[..., None]).mean(1))


def padded_batches(garbage):
    """Batches of 16 sentences with 6 words and 4 positions of padding, which holds `garbage`."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        ids = torch.randint(50, (16, 10), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, 6:] = 0
        ids[:, 6:] = garbage
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def by_call(model, batch):
    return model(**batch)


def test_eva_leaves_padding_out_as_peft_does(peft_ranks):
    pytest.importorskip("peft")
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    torch.manual_seed(0)
    model = Words()
    targets = ["first", "second"]
    batches = padded_batches(garbage=0)
    ranks = peft_ranks.eva_ranks(model, targets, batches, by_call, rank=3, max_rank=6)
    config = LoraConfig(
        r=3, target_modules=targets, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)
    )
    by_peft = get_eva_state_dict(copy.deepcopy(model), batches, config, show_progress_bar=False)
    assert ranks == {name: len(rows) for name, rows in by_peft.items()}
    other = padded_batches(garbage=7)
    assert ranks == peft_ranks.eva_ranks(model, targets, other, by_call, rank=3, max_rank=6)


def test_eva_counts_the_positions_that_peft_counts(peft_ranks):
    pytest.importorskip("peft")
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import (
        prepare_layer_inputs_fn_language_modeling,
        prepare_model_inputs_fn_language_modeling,
    )

    batch = padded_batches(garbage=0)[0]
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, ::2] = -100
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig())
    x = torch.randn(16, 10, 24)
    counted = peft_ranks.counted_positions(batch)
    indices = prepare_model_inputs_fn_language_modeling(batch, config)
    expected = prepare_layer_inputs_fn_language_modeling((x,), indices, "first")
    assert expected.shape == (48, 24)
    assert torch.equal(peft_ranks.layer_inputs((x,), counted, "first", 1), expected)
    # Labels of sentences, not of words, mask nothing; a batch without a mask is used whole.
    batch["labels"] = torch.zeros(16)
    assert int(peft_ranks.counted_positions(batch).sum()) == 96
    assert peft_ranks.counted_positions(x) is None
    assert len(peft_ranks.layer_inputs(x, None, "first", 1)) == 160
    # One input per sentence is no padding; any other shape cannot be matched with the mask.
    assert len(peft_ranks.layer_inputs(x[:, 0], counted, "pooled", 1)) == 16
    assert torch.equal(peft_ranks.layer_inputs(x.flatten(0, 1), counted, "", 1), expected)
    with pytest.raises(ValueError, match="cannot say which of them are padding"):
        peft_ranks.layer_inputs(x[:, 1:], counted, "first", 1)


def test_eva_refuses_what_peft_would_not_end_on(peft_ranks, monkeypatch):
    pytest.importorskip("peft")
    batches = [torch.randn(8, 32, dtype=torch.float64)]
    with pytest.raises(ValueError, match=r"a batch has 8 positions at 'rich', fewer than .* = 10"):
        peft_ranks.eva_ranks(two(), TARGETS, batches, call, rank=3, max_rank=5)
    with pytest.raises(ValueError, match="'head' has 8 inputs, below"):
        peft_ranks.eva_ranks(two(), ["head"], batches, call, rank=3, max_rank=5)
    with pytest.raises(ValueError, match="expected 1 ≤ rank ≤ max_rank, got 3 and 2"):
        peft_ranks.eva_ranks(two(), TARGETS, batches, call, rank=3, max_rank=2)
    with pytest.raises(ValueError, match="there is no batch"):
        peft_ranks.eva_ranks(two(), TARGETS, [], call, rank=3, max_rank=5)
    with pytest.raises(ValueError, match=r"the model has no module 'r\.\*'"):
        peft_ranks.eva_ranks(two(), ["r.*"], batches, call, rank=3, max_rank=5)
    with pytest.raises(ValueError, match=r"PEFT left out \[''\]"):
        peft_ranks.eva_ranks(two(), ["", "rich"], batches * 9, call, rank=1, max_rank=1)
    monkeypatch.setattr(peft_ranks, "MAX_PASSES", 1)
    batches = [torch.randn(64, 32, dtype=torch.float64)]
    with pytest.raises(RuntimeError, match="EVA has not converged in 1 passes"):
        peft_ranks.eva_ranks(two(), TARGETS, batches, call, rank=3, max_rank=5)


# ---- AdaLoRA -----------------------------------------------------------------------------------


def planted(steps, after=lambda model: None):
    """(model, train): the labels are those of `rich` changed by a matrix of rank 3."""
    model = two()
    teacher = copy.deepcopy(model)
    teacher.rich.weight.data += torch.randn(8, 3, dtype=torch.float64) @ torch.randn(
        3, 32, dtype=torch.float64
    )

    def train(student, on_step):
        parameters = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        for step in range(steps):
            x = torch.randn(64, 32, dtype=torch.float64)
            loss = (student(x) - teacher(x).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            on_step(step)
        after(student)

    return model, train


def test_adalora_ends_with_the_planned_total_and_finds_the_planted_layer(peft_ranks):
    pytest.importorskip("peft")
    model, train = planted(200)
    before, names = copy.deepcopy(model.state_dict()), [n for n, _ in model.named_modules()]
    trained, ranks = peft_ranks.adalora(
        model,
        TARGETS,
        rank=2,
        start_rank=4,
        steps=200,
        scaling=2.0,
        train=train,
        trainable=["head"],
        orthogonality=0.0,  # near the minimum the penalty would rule the importance
    )
    assert sum(ranks.values()) == 4
    assert list(ranks) == TARGETS
    assert ranks["rich"] > ranks["poor"]
    inner = trained.base_model.model
    entries = {name: inner.get_submodule(name).lora_E["default"] for name in ranks}
    nonzero = {name: int((entry != 0).sum()) for name, entry in entries.items()}
    assert nonzero == ranks
    assert not torch.equal(inner.head.weight, model.head.weight)
    assert torch.equal(inner.inner["rich"].weight, model.inner["rich"].weight)
    assert torch.equal(inner.rich.base_layer.weight, model.rich.weight)
    assert not any(p._backward_hooks for p in trained.parameters())
    unchanged(model, before, names)


def test_adalora_scales_by_the_scaling_whatever_the_rank(peft_ranks):
    pytest.importorskip("peft")
    model, train = planted(20)
    trained, ranks = peft_ranks.adalora(
        model, TARGETS, rank=1, start_rank=5, steps=20, scaling=1.7, train=train
    )
    x = torch.randn(7, 32, dtype=torch.float64)
    assert sorted(ranks.values()) != [5, 5]
    for name in TARGETS:
        layer, plain = trained.base_model.model.get_submodule(name), model.get_submodule(name)
        A, E, B = (getattr(layer, f"lora_{letter}")["default"] for letter in "AEB")
        expected = plain(x) + 1.7 * (x @ A.T * E.T) @ B.T
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_adaloras_penalty_has_the_gradient_that_pefts_own_loss_has(peft_ranks):
    peft = pytest.importorskip("peft")
    from types import SimpleNamespace

    class WithLoss(Two):
        def forward(self, x):
            return SimpleNamespace(loss=super().forward(x).square().mean())

    def gradients(weight, ours):
        torch.manual_seed(0)
        model = WithLoss().double()
        config = peft.AdaLoraConfig(
            init_r=3,
            target_r=1,
            total_step=9,
            orth_reg_weight=0.0 if ours else weight,
            target_modules="poor|rich",
        )
        adapted = peft.get_peft_model(model, config)
        x = torch.randn(16, 32, dtype=torch.float64)
        layers = [adapted.base_model.model.get_submodule(name) for name in TARGETS]
        for layer in layers:
            layer.lora_E["default"].data.fill_(0.3)
            layer.ranknum["default"].requires_grad_(False)
        with peft_ranks._orthogonality_in_gradients(layers, weight if ours else 0.0):
            adapted.base_model(x).loss.backward()  # PeftModel.forward does not add the penalty
        return {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}

    own, theirs, without = gradients(0.5, True), gradients(0.5, False), gradients(0.0, True)
    assert own.keys() == theirs.keys()
    assert len(own) == 6
    for name, gradient in theirs.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-12, atol=1e-12)
        assert torch.equal(own[name], without[name]) == ("lora_E" in name)


def test_adalora_refuses_a_loop_that_does_not_do_its_part(peft_ranks):
    pytest.importorskip("peft")
    model, train = planted(20)

    def run(loop, **changes):
        options = {"rank": 1, "start_rank": 3, "steps": 20, "scaling": 2.0, **changes}
        return peft_ranks.adalora(model, TARGETS, train=loop, **options)

    with pytest.raises(RuntimeError, match="train called on_step 20 times, expected 30"):
        run(train, steps=30)
    with pytest.raises(ValueError, match=r"on_step\(1\) where on_step\(0\) of 20 steps was due"):
        run(lambda student, on_step: on_step(1))
    with pytest.raises(ValueError, match="'rich' has no gradient"):
        run(lambda student, on_step: on_step(0))
    with pytest.raises(ValueError, match="expected 1 ≤ rank < start_rank, got 3 and 3"):
        run(train, rank=3)
    with pytest.raises(ValueError, match="at least 3 steps"):
        run(train, steps=2)
    with pytest.raises(ValueError, match="the scaling must be above 0"):
        run(train, scaling=0.0)
    with pytest.raises(ValueError, match="'rich' in trainable contains the target 'rich'"):
        run(train, trainable=["rich"])
    with pytest.raises(ValueError, match="the model has no module 'tail'"):
        run(train, trainable=["tail"])


def test_adalora_warns_where_ties_prune_too_much(peft_ranks):
    pytest.importorskip("peft")
    model, _ = planted(10)

    def zero_gradients(student, on_step):
        for step in range(10):
            (student(torch.ones(2, 32, dtype=torch.float64)) * 0).sum().backward()
            on_step(step)

    with pytest.warns(UserWarning, match="ended with 0 ranks where 2 were planned"):
        peft_ranks.adalora(
            model,
            TARGETS,
            rank=1,
            start_rank=3,
            steps=10,
            scaling=2.0,
            train=zero_gradients,
            orthogonality=0.0,
        )


# ---- both --------------------------------------------------------------------------------------


def test_ranks_are_fitted_to_an_exact_budget(peft_ranks):
    ranks = {"a": 6, "b": 2, "c": 0}
    assert peft_ranks.fit_to_budget(ranks, 20, None) == {"a": 15, "b": 5, "c": 0}
    capped = peft_ranks.fit_to_budget(ranks, 20, None, {"a": 10, "b": 9, "c": 9})
    assert capped == {"a": 10, "b": 9, "c": 1}
    costs = {"a": 10, "b": 30, "c": 7}
    fitted = peft_ranks.fit_to_budget(ranks, 241, costs)
    left = 241 - sum(rank * costs[name] for name, rank in fitted.items())
    assert 0 <= left < 7
    assert fitted["a"] == 12


def test_without_peft_the_error_says_what_to_install(peft_ranks, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'minirank\[examples\]'"):
        peft_ranks.eva_ranks(two(), TARGETS, [], call, rank=1, max_rank=1)
