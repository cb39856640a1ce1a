"""A faster function of your own, held against its reference in one line."""

import torch

from minirank import reference, testing


def all_coalitions_at_once(loss, params, batches, masks, scale=len):
    """ShapLoRA's sensitivity with one backward pass for all coalitions, by torch.func."""
    sizes = [scale(batch[0]) for batch in batches]
    ranks = [len(own["gate"]) for own in params.values()]

    def mean_loss(adapters):
        losses = [n * loss(adapters, batch) for n, batch in zip(sizes, batches, strict=True)]
        return torch.stack(losses).sum() / sum(sizes)

    def san(mask):
        members = dict(zip(params, mask.split(ranks), strict=True))
        inside = {n: own | {"gate": own["gate"] * members[n]} for n, own in params.items()}
        gradients = torch.func.grad(mean_loss)(inside)
        keys = ("gate", "P", "Q")
        return {
            n: reference.san(*(inside[n][k] for k in keys), *(gradients[n][k] for k in keys))
            for n in params
        }

    return {name: scores.mean(0) for name, scores in torch.func.vmap(san)(masks).items()}


def batches_weighted_alike(*args):
    return all_coalitions_at_once(*args, scale=lambda samples: 1)


# This function takes batches that are tuples. The others are left out, with a reason.
TUPLES = {"batches as *": "only tuples so far"}


def test_all_coalitions_at_once():
    testing.check(all_coalitions_at_once, like=reference.shapley_sensitivity, skip=TUPLES)


if __name__ == "__main__":
    for mine in (all_coalitions_at_once, batches_weighted_alike):
        print(f"---- {mine.__name__}")
        options = {"dtype": torch.float64, "skip": TUPLES, "on_fail": None}
        print(testing.check(mine, like=reference.shapley_sensitivity, **options))
