"""ShapLoRA where torch sets traps: gradients that stop half-way, autocast's cache, default
devices."""

from __future__ import annotations

import pytest
import torch
from helpers.models import randomize
from helpers.shaplora_cases import data, flat, loss_fn, scored, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from minirank import resize, testing, wrap


class Partly(nn.Module):
    """A layer before another one; gradients may stop in between."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.body, self.head = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        if self.how == "reentrant":
            return self.head(checkpoint(self.body, x, use_reentrant=True))
        if self.how == "not reentrant":
            return self.head(checkpoint(self.body, x, use_reentrant=False))
        with torch.set_grad_enabled(self.how != "no_grad"):
            h = self.body(x)
        if self.how == "one branch":  # as in losses that hold one of two views fixed
            with torch.no_grad():
                other = self.body(-x)
            h = h - other
        return self.head(h)


def partly(how, ranks):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Partly(how).double()
    randomize(wrap(model, ranks, gate=0.0))
    return model


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("coalitions", [0, 18])
@pytest.mark.parametrize("how", ["no_grad", "reentrant"])
def test_layers_that_no_gradient_reaches_by_mistake_are_named_and_do_not_score_zero(
    how, coalitions
):
    model = partly(how, {"body": 2, "head": 2})
    with (
        testing.unchanged(model),
        pytest.raises(ValueError, match="'body' is called where no gradient is taken"),
    ):
        scored(model, coalitions=coalitions)
    alone = partly(how, {"body": 2})
    with pytest.raises(
        ValueError, match=r"the loss depends on no adapter.*no re-entrant checkpointing"
    ):
        scored(alone, coalitions=coalitions)


@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # torch 2.4's own
def test_calls_without_gradient_beside_one_with_it_are_the_losss_own_affair():
    ranks = {"body": 2, "head": 2}
    expected, _ = scored(partly("", ranks), coalitions=18)
    scores, _ = scored(partly("not reentrant", ranks), coalitions=18)
    torch.testing.assert_close(flat(scores), flat(expected), rtol=1e-12, atol=0)
    scores, _ = scored(partly("one branch", ranks), coalitions=18)
    assert scores["body"].all()
    model = partly("no_grad", ranks)
    resize(model, {"body": 0})  # has no rank to score
    assert scored(model, coalitions=18)[0]["head"].all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_in_the_same_autocast_block_does_not_matter(context):
    model, batches = trained(torch.float32).eval(), data(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = scored(model, batches, coalitions=18)
    with torch.autocast("cpu", torch.bfloat16):
        with context():
            loss_fn(model, batches[0])
        scores, _ = scored(model, batches, coalitions=18)
    assert torch.equal(flat(scores), flat(expected))


@pytest.mark.parametrize("coalitions", [0, 18])
def test_the_default_device_does_not_matter(coalitions):
    """The meta device stands for an accelerator: nothing can be computed on it, so that one slip
    would show."""
    expected, allocator = scored(coalitions=coalitions)
    model, batches = trained(), data()
    with torch.device("meta"):
        scores, other = scored(model, batches, coalitions=coalitions)
        resize(model, other.allocate(4))
        resize(model, {"up": 1})  # by contribution
    assert torch.equal(flat(scores), flat(expected))
    assert torch.equal(
        flat(other.standard_errors or scores), flat(allocator.standard_errors or expected)
    )
    assert model.up.rank == 1
