"""The curvature contracts pass what is right, in any guise, and say what is wrong."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from minirank import curvature, reference, testing
from minirank.reference.hessian import gradients, mean_loss

MOMENT, HESSIAN = reference.input_second_moment, reference.hessian_diagonal
GAUSS_NEWTON, FISHER = reference.gauss_newton_diagonal, reference.empirical_fisher
DETERMINISTIC = [MOMENT, HESSIAN, GAUSS_NEWTON, FISHER]
HUTCHINSON = reference.hutchinson


# ---- what is right passes ------------------------------------------------------------------------


@pytest.mark.parametrize("right", [*DETERMINISTIC, HUTCHINSON], ids=lambda f: f.__name__)
def test_the_reference_keeps_its_own_contract(right):
    assert {result.status for result in testing.check(right, like=right)} == {"passed"}


def test_the_reference_keeps_its_own_contract_in_bfloat16():
    testing.check(MOMENT, like=MOMENT, dtype=torch.bfloat16)


LIBRARY = {
    "input_second_moment": (curvature.input_second_moment, MOMENT),
    "hessian_diagonal_reference": (curvature.hessian_diagonal_reference, HESSIAN),
    "exact_hessian_diagonal": (curvature.exact_hessian_diagonal, HESSIAN),
    "exact_hessian_diagonal, nothing assumed": (
        partial(curvature.exact_hessian_diagonal, independent=False, chunk_size=5),
        HESSIAN,
    ),
    "gauss_newton": (curvature.gauss_newton, GAUSS_NEWTON),
    "gauss_newton, nothing assumed": (
        partial(curvature.gauss_newton, independent=False),
        GAUSS_NEWTON,
    ),
    "empirical_fisher": (curvature.empirical_fisher, FISHER),
    "hutchinson_weights": (curvature.hutchinson_weights, HUTCHINSON),
    "hutchinson_outputs": (curvature.hutchinson_outputs, HUTCHINSON),
}
ASSUME_SAMPLES = ("exact_hessian_diagonal", "gauss_newton", "empirical_fisher")


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_keeps_the_contract(name):
    mine, like = LIBRARY[name]
    why = "refused: the first dimension of a layer's input does not count samples"
    expected = {"positions as rows*": why} if name in ASSUME_SAMPLES else {}
    testing.check(mine, like=like, expected_failures=expected)


def task_of_functions(model, loss_fn, batches, targets):
    """(targets' weights, a loss as a function of them), without a copy of the model."""
    weights = {f"{name}.weight".lstrip("."): name for name in targets}
    parameters = {key: model.get_parameter(key).detach() for key in weights}
    total = sum(batch_size(batch) for batch in batches)

    def loss(parameters):
        def call(*args, **kwargs):
            return functional_call(model, parameters, args, kwargs)

        with sdpa_kernel(SDPBackend.MATH):
            losses = [batch_size(batch) * loss_fn(call, batch) for batch in batches[::-1]]
        return sum(losses) / total

    return weights, parameters, loss


def batch_size(batch):
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch
    return len(first[0] if isinstance(first, tuple) else first)


def in_eval_mode(function):
    """`function` on the model itself, in eval mode, which is restored module by module."""

    def measured(model, *rest, **options):
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            return function(model, *rest, **options)
        finally:
            for module, training in modes.items():
                module.training = training

    return measured


@in_eval_mode
def functional_hessian(model, loss_fn, batches, targets):
    weights, parameters, loss = task_of_functions(model, loss_fn, batches, targets)
    found = {}
    for key, name in weights.items():
        W = parameters[key]
        of_one = lambda w, key=key: loss({**parameters, key: w})  # noqa: E731
        H = torch.func.jacfwd(torch.func.jacrev(of_one))(W)
        found[name] = H.reshape(W.numel(), W.numel()).diag().reshape(W.shape)
    return found


def in_double(right):
    """In float64 whatever comes in, and returned so."""

    def measured(model, loss_fn, batches, targets, **options):
        def double(batch):
            if isinstance(batch, dict):
                return {key: double(value) for key, value in batch.items()}
            if isinstance(batch, tuple):
                return tuple(map(double, batch))
            return batch.double() if batch.is_floating_point() else batch

        model = copy.deepcopy(model).double()
        return right(model, loss_fn, [double(batch) for batch in batches], targets, **options)

    return measured


def in_float(right):
    """In float32 whatever comes in: noted, not failed."""

    def measured(*task, **options):
        return {name: h.float() for name, h in right(*task, **options).items()}

    return measured


def attached(right):
    """A result that still hangs on a graph, with names in another order, in one buffer."""

    def measured(*task, **options):
        found = right(*task, **options)
        return {name: nn.Parameter(found[name]) * 1.0 for name in reversed(found)}

    return measured


def other_order_of_batches(right):
    return lambda model, loss_fn, batches, targets: right(model, loss_fn, batches[::-1], targets)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_derivatives_of_functions_pass():
    testing.check(functional_hessian, like=HESSIAN)


@pytest.mark.parametrize("right", DETERMINISTIC, ids=lambda f: f.__name__)
def test_better_precision_passes(right):
    testing.check(in_double(right), like=right, dtype=torch.float32)


@pytest.mark.parametrize("harmless", [attached, other_order_of_batches])
@pytest.mark.parametrize("right", [MOMENT, FISHER], ids=lambda f: f.__name__)
def test_harmless_differences_pass(right, harmless):
    testing.check(harmless(right), like=right)


@pytest.mark.parametrize("right", [MOMENT, FISHER], ids=lambda f: f.__name__)
def test_a_narrower_result_is_noted(right):
    report = testing.check(in_float(right), like=right, dtype=torch.float64)
    assert {result.status for result in report} <= {"noted", "passed"}
    assert "the result is float32" in report.with_status("noted")[0].hint


# ---- what is wrong fails, with the reason --------------------------------------------------------


def times(factor):
    """`factor` is a number, or a function of the batches."""
    return lambda right: (
        lambda m, f, b, t: {
            name: h * (factor(b) if callable(factor) else factor)
            for name, h in right(m, f, b, t).items()
        }
    )


def samples_in_all(batches):
    return float(sum(map(batch_size, batches)))


def weighted_alike(right):
    def wrong(model, loss_fn, batches, targets):
        parts = [right(model, loss_fn, [batch], targets) for batch in batches]
        return {name: torch.stack([part[name] for part in parts]).mean(0) for name in targets}

    return wrong


def first_batch(right):
    return lambda m, f, b, t: right(m, f, b[:1], t)


def eval_left(right):
    def wrong(model, *rest):
        return right(model.eval(), *rest)

    return wrong


def all_trained(right):
    """Switches gradients of all parameters on, and leaves it so."""

    def wrong(model, *rest):
        model.requires_grad_(True)
        return right(model, *rest)

    return wrong


def gradients_lost(right):
    def wrong(model, *rest):
        found = right(model, *rest)
        model.zero_grad()
        return found

    return wrong


def hook_left(right):
    def wrong(model, loss_fn, batches, targets):
        model.get_submodule(targets[0]).register_forward_hook(lambda *args: None)
        return right(model, loss_fn, batches, targets)

    return wrong


def mode_forgotten(right):
    """In whatever mode the model comes."""

    def wrong(model, *rest, **options):
        ours = copy.deepcopy(model)
        ours.eval = lambda: ours
        return right(ours, *rest, **options)

    return wrong


def every_layer(right):
    """Ignores the targets."""

    def wrong(model, loss_fn, batches, targets):
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return right(model, loss_fn, batches, names)

    return wrong


def by_suffix(right):
    """Takes the first layer whose name begins with the target's."""

    def wrong(model, loss_fn, batches, targets):
        every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        taken = [next(n for n in sorted(every, reverse=True) if n.startswith(t)) for t in targets]
        found = right(model, loss_fn, batches, list(dict.fromkeys(taken)))
        return {name: found[other] for name, other in zip(targets, taken, strict=True)}

    return wrong


def one_buffer(right):
    """Returns the same tensors at every call."""
    buffers = {}

    def wrong(*task):
        for name, h in right(*task).items():
            key = name, h.shape, h.dtype
            buffers.setdefault(key, torch.zeros_like(h)).copy_(h)
        return {name: buffers[name, h.shape, h.dtype] for name, h in right(*task).items()}

    return wrong


def transposed(right):
    return lambda *task: {name: h.T for name, h in right(*task).items()}


def random_state_used(right):
    def wrong(*task):
        torch.rand(1)
        return right(*task)

    return wrong


COMMON = [  # (wrong, case, part of what the report says)
    (times(samples_in_all), "uneven batches, float64", "the sum over"),
    (times(0.5), "one sample, float32", "equals half the right result"),
    (weighted_alike, "uneven batches, float64", "equals the mean over batches weighted alike"),
    (first_batch, "uneven batches, float64", "equals the result of the first batch alone"),
    (mode_forgotten, "train mode, float64", "equals the result in the modes that the model came"),
    (eval_left, "dropout and batch statistics, float64", "mode, numbers of hooks) changed"),
    (all_trained, "frozen parameters, float64", "requires_grad) changed"),
    (gradients_lost, "frozen parameters, float64", ".grad changed"),
    (hook_left, "hooks, float64", "numbers of hooks) changed"),
    (every_layer, "one target of two, float64", "expected nothing"),
    (by_suffix, "names that begin alike, float64", "expected"),
    (one_buffer, "two layers, float64", "a later call changed what an earlier call had"),
    (transposed, "two layers, float32", "shape"),
    (random_state_used, "two layers, float64", "global random state changed"),
]


def told(wrong, like, case):
    """The text of a failed case."""
    (found,) = testing.cases(like, case)
    result = found.run(wrong)
    assert result.status == "failed", result
    return " ".join(str(result).split())


@pytest.mark.parametrize(("wrong", "case", "said"), COMMON, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("right", DETERMINISTIC[1:], ids=lambda f: f.__name__)
def test_faults_that_any_diagonal_can_have(right, wrong, case, said):
    assert said in told(wrong(right), right, case)


@in_eval_mode
def row_by_row(model, loss_fn, batches, targets, last_call=False, of_gradients=False, at=None):
    """Through the outputs of layers, without the terms between rows."""
    sums = dict.fromkeys(targets, 0)
    total = sum(map(batch_size, batches))
    for batch in batches:
        calls = {name: [] for name in targets}

        def record(name, module, inputs, z, calls=calls):
            calls[name].append((inputs[0], z.clone()))
            return calls[name][-1][1]

        handles = [
            model.get_submodule(name).register_forward_hook(partial(record, name))
            for name in targets
        ]
        with sdpa_kernel(SDPBackend.MATH):
            L = loss_fn(model, batch)
        for handle in handles:
            handle.remove()
        n = batch_size(batch)
        for name in targets:
            for x, z in calls[name][-1:] if last_call else calls[name]:
                (g,) = torch.autograd.grad(L, z, create_graph=True)
                S = (n * g).square() / n
                if not of_gradients:
                    second = [
                        gradients(value, [z])[0].flatten()[k] for k, value in enumerate(g.flatten())
                    ]
                    S = torch.stack(second).view_as(g)
                if at is not None and x.ndim > 2:
                    x, S = x[:, at], S[:, at]
                sums[name] = sums[name] + n / total * torch.einsum("...o,...j->oj", S, x.square())
    return {name: h.detach() for name, h in sums.items()}


def all_ones(model, loss_fn, batches, targets):
    L, weights = mean_loss(model, loss_fn, batches, targets)
    g = gradients(L, list(weights.values()), twice=True)
    H1 = gradients(sum(part.sum() for part in g), list(weights.values()))
    return dict(zip(targets, H1, strict=True))


def raises_without_curvature(model, loss_fn, batches, targets):
    L, weights = mean_loss(model, loss_fn, batches, targets)
    for W in weights.values():
        (g,) = torch.autograd.grad(L, W, create_graph=True)
        torch.autograd.grad(g.sum(), W, retain_graph=True)
    return HESSIAN(model, loss_fn, batches, targets)


def mapped(right, function):
    return lambda *task: {name: function(h) for name, h in right(*task).items()}


def flat_weights_only(model, loss_fn, batches, targets):
    for name in targets:
        model.get_submodule(name).weight.view(-1)
    return HESSIAN(model, loss_fn, batches, targets)


WITHOUT_POSITIONS = "equals the diagonal without the terms between positions"
OF_HESSIAN = {
    "Gauss-Newton": (GAUSS_NEWTON, "two layers, float64", "equals the Gauss-Newton diagonal"),
    "never negative": (
        mapped(HESSIAN, torch.relu),
        "two layers, float32",
        "negative entries set to zero",
    ),
    "absolute": (mapped(HESSIAN, torch.abs), "two layers, float32", "the absolute values"),
    "no terms between positions": (row_by_row, "positions, float64", WITHOUT_POSITIONS),
    "no terms between rows": (row_by_row, "positions as rows, float64", WITHOUT_POSITIONS),
    "no terms between keys": (row_by_row, "attention, float32", WITHOUT_POSITIONS),
    "no terms between calls": (row_by_row, "a layer called twice, float64", WITHOUT_POSITIONS),
    "one call": (
        partial(row_by_row, last_call=True),
        "a layer called twice, float64",
        "last call alone",
    ),
    "one position": (partial(row_by_row, at=-1), "positions, float64", "the last position alone"),
    "first position": (partial(row_by_row, at=0), "positions, float64", "the first position alone"),
    "ones for signs": (all_ones, "two layers, float64", "the row sums of the Hessian"),
    "Fisher": (FISHER, "a linear classifier, float64", "equals the empirical Fisher"),
    "no second graph": (raises_without_curvature, "no curvature, float64", "RuntimeError"),
    "contiguous weights": (flat_weights_only, "views and strides, float64", "view size is not"),
}


@pytest.mark.parametrize("name", OF_HESSIAN)
def test_faults_of_a_hessian_diagonal(name):
    wrong, case, said = OF_HESSIAN[name]
    assert said in told(wrong, HESSIAN, case)


def outputs_alone(model, loss_fn, batches, targets):
    """JᵀJ, with the unit matrix for H_y."""

    def half_square(model, batch):
        x = batch[0]
        return model(x).square().sum() / 2 / len(x)

    scaled = GAUSS_NEWTON(model, half_square, batches, targets)
    return {name: h * len(batches[0][0]) for name, h in scaled.items()}


OF_GAUSS_NEWTON = {
    "Hessian": (HESSIAN, "two layers, float64", "equals the diagonal of the Hessian itself"),
    "Fisher": (FISHER, "cross entropy of classes, (n, 4), float64", "equals the empirical Fisher"),
    "no output Hessian": (outputs_alone, "one sample, float64", "equals the diagonal of JᵀJ"),
    "outputs summed": (
        times(3.0)(GAUSS_NEWTON),
        "squared error of numbers, (n, 3), float64",
        "a sum over outputs in place of the loss's mean",
    ),
    "yes or no, summed": (
        times(2.0)(GAUSS_NEWTON),
        "binary cross entropy of yes or no, (n, T, 2), float32",
        "a sum over outputs",
    ),
    "one sample of labels": (
        partial(row_by_row, of_gradients=True),
        "cross entropy of classes, (n, T, 4), float64",
        "expected",
    ),
}


@pytest.mark.parametrize("name", OF_GAUSS_NEWTON)
def test_faults_of_a_gauss_newton_diagonal(name):
    wrong, case, said = OF_GAUSS_NEWTON[name]
    assert said in told(wrong, GAUSS_NEWTON, case)


def squared_mean(model, loss_fn, batches, targets):
    L, weights = mean_loss(model, loss_fn, batches, targets)
    return {
        n: g.square() for n, g in zip(weights, gradients(L, list(weights.values())), strict=True)
    }


def parts_of_the_mean(model, loss_fn, batches, targets):
    """As BackPACK's sum_grad_squared of a mean loss."""
    sums = 0
    for batch in batches:
        h = FISHER(model, loss_fn, [batch], targets)
        sums = sums + h[targets[0]] / batch_size(batch)
    return {targets[0]: sums}


OF_FISHER = {
    "squared mean": (squared_mean, "two layers, float64", "equals the square of the mean gradient"),
    "each batch": (
        weighted_alike(squared_mean),
        "uneven batches, float64",
        "expected",
    ),
    "parts of the mean": (parts_of_the_mean, "no bias, float64", "without · n"),
    "squares of positions": (
        partial(row_by_row, of_gradients=True),
        "positions, float64",
        "equals squares of single positions",
    ),
    "squares of calls": (
        partial(row_by_row, of_gradients=True),
        "a layer called twice, float32",
        "equals squares of single positions",
    ),
    "root": (mapped(FISHER, torch.sqrt), "two layers, float64", "the square root"),
    "Gauss-Newton": (GAUSS_NEWTON, "two layers, float64", "equals the Gauss-Newton diagonal"),
}


@pytest.mark.parametrize("name", OF_FISHER)
def test_faults_of_an_empirical_fisher(name):
    wrong, case, said = OF_FISHER[name]
    assert said in told(wrong, FISHER, case)


# ---- input second moment -------------------------------------------------------------------------


def of_inputs(reduce, masked=True, keep_mask=False, multiply=False):
    """reduce(batches, for each the (rows, samples) of its calls) -> (d_in,)"""

    @in_eval_mode
    @torch.no_grad()
    def measured(model, loss_fn, batches, targets):
        seen = {name: [] for name in targets}
        mask = None

        def observe(name, module, inputs):
            x = inputs[0].detach().clone()
            if masked and mask is not None and mask.shape == x.shape[:-1]:
                x = x * mask.unsqueeze(-1) if multiply else x[mask != 0]
            seen[name][-1].append((x.reshape(-1, x.shape[-1]), batch_size(batch)))

        handles = [
            model.get_submodule(n).register_forward_pre_hook(partial(observe, n)) for n in targets
        ]
        for batch in batches:
            found = batch.get("attention_mask") if isinstance(batch, dict) else None
            mask = mask if keep_mask and found is None else found
            for of_layer in seen.values():
                of_layer.append([])
            loss_fn(model, batch)
        for handle in handles:
            handle.remove()
        return {name: reduce(of_layer) for name, of_layer in seen.items()}

    return measured


def all_rows(of_layer):
    return torch.cat([rows for calls in of_layer for rows, _ in calls])


def mean_square(of_layer):
    return all_rows(of_layer).square().mean(0)


def by_samples(of_layer):
    sizes = [calls[0][1] for calls in of_layer]
    means = [mean_square([calls]) for calls in of_layer]
    return sum(n * mean for n, mean in zip(sizes, means, strict=True)) / sum(sizes)


def test_another_way_to_the_input_moment_passes():
    testing.check(of_inputs(mean_square), like=MOMENT)


OF_MOMENT = {
    "padding": (
        of_inputs(mean_square, masked=False),
        "large numbers in the padding, float64",
        "equals the mean over all tokens, padding among them",
    ),
    "padding times zero": (
        of_inputs(mean_square, multiply=True),
        "NaN in the padding, float64",
        "nan",
    ),
    "padding counted": (
        of_inputs(mean_square, multiply=True),
        "zeros in the padding, float64",
        "divided by the number of all",
    ),
    "mask as a factor": (
        of_inputs(mean_square, multiply=True),
        "a mask that numbers documents, float64",
        "expected",
    ),
    "yesterday's mask": (
        of_inputs(mean_square, keep_mask=True),
        "some batches with a mask, float64",
        "expected",
    ),
    "batches alike": (
        of_inputs(lambda b: sum(mean_square([c]) for c in b) / len(b)),
        "uneven padding, float64",
        "equals the mean over batches weighted alike",
    ),
    "by samples": (of_inputs(by_samples), "uneven padding, float64", "weighted by samples"),
    "last call": (
        of_inputs(lambda b: mean_square([c[-1:] for c in b])),
        "two calls, float64",
        "last call alone",
    ),
    "first call": (
        of_inputs(lambda b: mean_square([c[:1] for c in b])),
        "two calls under a mask, float64",
        "first call alone",
    ),
    "last batch": (
        of_inputs(lambda b: mean_square(b[-1:])),
        "uneven batches, float64",
        "the last batch alone",
    ),
    "sum": (
        of_inputs(lambda b: all_rows(b).square().sum(0)),
        "uneven batches, float32",
        "the sum over tokens in place of the mean",
    ),
    "root": (of_inputs(lambda b: mean_square(b).sqrt()), "one row, float32", "root of the mean"),
    "variance": (
        of_inputs(lambda b: all_rows(b).var(0, correction=0)),
        "uneven batches, float64",
        "the variance",
    ),
    "train mode": (mode_forgotten(MOMENT), "train mode, float64", "modes that the model came in"),
    "model in eval": (eval_left(MOMENT), "dropout and batch statistics, float64", "changed"),
    "hook left": (hook_left(MOMENT), "hooks, float64", "numbers of hooks) changed"),
}


@pytest.mark.parametrize("name", OF_MOMENT)
def test_faults_of_an_input_moment(name):
    wrong, case, said = OF_MOMENT[name]
    assert said in told(wrong, MOMENT, case)


# ---- Hutchinson ----------------------------------------------------------------------------------


def estimator(draw, weigh=lambda v, Hv: v * Hv, right=mean_loss, each=True):
    """Hutchinson's estimate with vectors draw(weights, generator)."""

    def estimate(model, loss_fn, batches, targets, *, generator, samples):
        L, weights = right(model, loss_fn, batches, targets)
        Ws = list(weights.values())
        g = gradients(L, Ws, twice=True)
        sums = [torch.zeros_like(W) for W in Ws]
        v = draw(Ws, generator)
        for sample in range(samples):
            v = draw(Ws, generator) if each and sample else v
            g_v = torch.stack([(a * b).sum() for a, b in zip(g, v, strict=True)]).sum()
            for h, a, b in zip(sums, v, gradients(g_v, Ws), strict=True):
                h += weigh(a, b) / samples
        return dict(zip(targets, sums, strict=True))

    return estimate


def signs(Ws, generator):
    return [torch.randint(0, 2, W.shape, generator=generator).to(W) * 2 - 1 for W in Ws]


def gaussian(Ws, generator):
    return [torch.randn(W.shape, generator=generator).to(W) for W in Ws]


def one_sign_in_all_layers(Ws, generator):
    (long,) = signs([torch.zeros(max(W.numel() for W in Ws)).to(Ws[0])], generator)
    return [long[: W.numel()].view_as(W) for W in Ws]


def signs_by_row(Ws, generator):
    return [signs([W[:, :1]], generator)[0].expand_as(W) for W in Ws]


def uniform(Ws, generator):
    return [torch.rand(W.shape, generator=generator).to(W) * 2 - 1 for W in Ws]


def zeros_and_ones(Ws, generator):
    return [torch.randint(0, 2, W.shape, generator=generator).to(W) for W in Ws]


def for_each_batch(estimate):
    """Vectors of its own for each batch."""

    def measured(model, loss_fn, batches, targets, **options):
        parts = [
            (batch_size(b), estimate(model, loss_fn, [b], targets, **options)) for b in batches
        ]
        total = sum(n for n, _ in parts)
        return {name: sum(n / total * h[name] for n, h in parts) for name in targets}

    return measured


def with_options(right, change):
    return lambda *task, **options: right(*task, **change(**options))


def seeded(generator, samples):
    return {"generator": torch.Generator().manual_seed(0), "samples": samples}


def cloned(generator, samples):
    return {"generator": generator.clone_state(), "samples": samples}


def ten_samples(generator, samples):
    return {"generator": generator, "samples": 10}


def one_sample(generator, samples):
    return {"generator": generator, "samples": 1}


def global_generator(generator, samples):
    return {"generator": torch.default_generator, "samples": samples}


def rescaled(function):
    return lambda *task, samples, **options: {
        name: function(h, samples)
        for name, h in HUTCHINSON(*task, samples=samples, **options).items()
    }


def test_signs_of_each_batch_pass():
    testing.check(for_each_batch(HUTCHINSON), like=HUTCHINSON)


def test_gaussian_vectors_pass_and_are_noted():
    report = testing.check(estimator(gaussian), like=HUTCHINSON)
    noted = report.with_status("noted")
    assert [result.case for result in noted] == [
        "a diagonal Hessian, float64",
        "a diagonal Hessian, float32",
    ]
    assert "random signs on the weights would be exact here" in noted[0].hint


def test_an_exact_diagonal_passes_and_is_noted():
    def exact(*task, generator, samples):
        return HESSIAN(*task)

    report = testing.check(exact, like=HUTCHINSON)
    assert "no chance is left" in report.with_status("noted")[0].hint


TWO = "two layers of one shape"
OF_HUTCHINSON = {
    "shared signs": (
        estimator(one_sign_in_all_layers),
        TWO,
        "the same random signs in every layer",
    ),
    "signs of rows": (estimator(signs_by_row), TWO, "one sign for each row"),
    "uniform": (estimator(uniform), "a diagonal Hessian, float64", "uniform in [-1, 1]"),
    "zeros and ones": (estimator(zeros_and_ones), TWO, "vectors of zeros and ones"),
    "not multiplied": (estimator(signs, lambda v, Hv: Hv), TWO, "H v not multiplied by v"),
    "absolute": (estimator(signs, lambda v, Hv: (v * Hv).abs()), TWO, "expected"),
    "the same vector": (estimator(signs, each=False), TWO, "a variance that falls to 1/"),
    "samples ignored": (with_options(HUTCHINSON, one_sample), TWO, "drawn anew"),
    "always ten": (with_options(HUTCHINSON, ten_samples), TWO, "a variance that falls to 1/"),
    "own seed": (with_options(HUTCHINSON, seeded), "seeds", "the generator is not used"),
    "a cloned state": (with_options(HUTCHINSON, cloned), "seeds", "from one generator twice"),
    "the global generator": (
        with_options(HUTCHINSON, global_generator),
        "seeds",
        "global random state",
    ),
    "one sample too few": (
        rescaled(lambda h, n: h * (n - 1) / n),
        "a diagonal Hessian, float64",
        "0.9 ± ",
    ),
    "one sample too many": (
        rescaled(lambda h, n: h * n / (n + 1)),
        "a diagonal Hessian, float64",
        "0.9091 ± ",
    ),
    "sum of samples": (rescaled(lambda h, n: h * n), "a diagonal Hessian, float64", "expected"),
    "deviation": (rescaled(lambda h, n: h / n**0.5), TWO, "expected"),
    "train mode": (mode_forgotten(HUTCHINSON), "train mode", "modes that the model came in"),
}


@pytest.mark.parametrize("name", OF_HUTCHINSON)
def test_faults_of_hutchinson_s_estimate(name):
    wrong, case, said = OF_HUTCHINSON[name]
    assert said in told(wrong, HUTCHINSON, case)


def test_batches_weighted_alike_show_in_the_mean():
    def wrong(model, loss_fn, batches, targets, **options):
        parts = [HUTCHINSON(model, loss_fn, [batch], targets, **options) for batch in batches]
        return {name: sum(part[name] for part in parts) / len(parts) for name in targets}

    assert "batches weighted alike" in told(wrong, HUTCHINSON, "a diagonal Hessian, float64")
