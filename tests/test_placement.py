"""Models whose parameters are sharded or offloaded: what works is right, the rest is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from helpers.estimators import LOSS_BASED
from torch import nn

from minirank import (
    L1RA,
    SensitivityLoRA,
    export_peft,
    linear_targets,
    merge,
    resize,
    save_adapter,
    wrap,
)
from minirank.curvature import gauss_newton, input_second_moment

ESTIMATORS = {**LOSS_BASED, "proxy": input_second_moment}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_fn(model, x):
    return model(x).square().mean()


def batches():
    return [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def assert_same_estimates(name, model):
    expected = ESTIMATORS[name](plain(), loss_fn, batches())
    estimate = ESTIMATORS[name](model, loss_fn, batches())
    assert estimate.keys() == expected.keys()
    for layer, diagonal in expected.items():
        assert torch.equal(estimate[layer], diagonal)


# ---- accelerate's offloading --------------------------------------------------------------------

MIXED = {"0": "cpu", "1": "cpu", "2": "disk", "3": "cpu", "4": "disk"}


def offloaded(kind, folder, model=None):
    accelerate = pytest.importorskip("accelerate")
    model, cpu = model or plain(), torch.device("cpu")
    if kind == "cpu":
        return accelerate.cpu_offload(model, execution_device=cpu)
    if kind == "disk":
        return accelerate.disk_offload(model, folder, execution_device=cpu)
    return accelerate.dispatch_model(model, MIXED, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("kind", ["cpu", "disk", "mixed"])
@every_estimator
def test_an_offloaded_model_is_scored_as_one_that_is_here(name, kind, tmp_path):
    model = offloaded(kind, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert_same_estimates(name, model)
    assert any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_layer_gets_no_adapter(kind, tmp_path):
    model = offloaded(kind, tmp_path)
    scores = SensitivityLoRA(model, loss_fn, batches(), progress=False).score()
    assert scores == SensitivityLoRA(plain(), loss_fn, batches(), progress=False).score()
    with pytest.raises(ValueError, match="'2' is offloaded by accelerate"):
        wrap(model, {"2": 2})
    assert isinstance(model[2], nn.Linear)


def test_an_idle_layer_of_an_offloaded_model_gets_zeros_that_have_values(tmp_path):
    class WithIdle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    for estimate in (input_second_moment, gauss_newton):
        model = offloaded("cpu", tmp_path, WithIdle())
        with pytest.warns(UserWarning, match="reached 'idle'"):
            zeros = estimate(model, loss_fn, batches())["idle"]
        assert zeros.device.type == "cpu"
        assert float(zeros.sum()) == 0


def test_what_offloading_leaves_unknown_is_refused(tmp_path):
    half = offloaded("cpu", tmp_path, plain().bfloat16())
    inputs = [x.bfloat16() for x in batches()]
    assert input_second_moment(half, loss_fn, inputs)["0"].isfinite().all()
    with pytest.raises(ValueError, match="half precision that have no values here"):
        gauss_newton(half, loss_fn, inputs)

    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    model = offloaded("cpu", tmp_path, nn.Sequential(Doubled(4, 2)))
    with pytest.raises(ValueError, match="'0' is a Doubled that accelerate offloads"):
        gauss_newton(model, loss_fn, batches())
    assert input_second_moment(model, loss_fn, batches())["0"].shape == (4,)


def test_a_device_map_without_offloading_works(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(plain(), {"": "cpu"}, force_hooks=True)
    assert_same_estimates("proxy", model)
    layers = wrap(model, {"2": 2}, gate=1.0)
    loss_fn(model, batches()[0]).backward()
    assert layers["2"].lora_A.grad is not None
    assert merge(model) == ["2"]


def test_adapters_that_are_offloaded_later_are_not_resized_or_merged(tmp_path):
    model = plain()
    wrap(model, {"2": 2}, gate=1.0)
    offloaded("cpu", tmp_path, model)
    with pytest.raises(ValueError, match=r"change of ranks needs the values of 2\.lora_A, but"):
        resize(model, {"2": 1})
    with pytest.raises(ValueError, match=r"merge needs the values of 2\.lora_A, but it is on the"):
        merge(model)


# ---- FSDP ---------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    if not dist.is_available():
        pytest.skip("torch without torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fully_sharded(model):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("from torch 2.6")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in (model[0], model[2], model[4]):
        fsdp.fully_shard(layer, mesh=mesh)
    return fsdp.fully_shard(model, mesh=mesh)


@pytest.mark.usefixtures("one_process")
@every_estimator
def test_scores_of_fsdp2_are_right_or_refused(name):
    model = fully_sharded(plain())
    if name in ("proxy", "Gauss-Newton", "Gauss-Newton, sampled", "empirical Fisher"):
        assert_same_estimates(name, model)
    else:
        with pytest.raises(ValueError, match="FSDP2 frees weights that second derivatives need"):
            ESTIMATORS[name](model, loss_fn, batches())


@pytest.mark.usefixtures("one_process")
def test_adapters_in_a_sharded_model_are_whole_and_move(tmp_path):
    model = fully_sharded(plain())
    layers = wrap(model, {"0": 2, "2": 2}, gate=1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    l1ra = L1RA(model, optimizer, interval=1, l1=0.5, gate_lr=0.25)
    with torch.no_grad():
        layers["0"].gate[0] = 0.125
    loss_fn(model, batches()[0]).backward()
    optimizer.step()
    assert l1ra.step().ranks == {"0": 1, "2": 3}
    export_peft(model, tmp_path / "peft")
    with pytest.raises(ValueError, match=r"merge needs 0\.base\.weight whole, .*export_peft"):
        merge(model)
    assert not layers["0"].merged


@pytest.mark.usefixtures("one_process")
def test_adapters_that_were_sharded_too_are_refused():
    model = plain()
    wrap(model, {"2": 2}, gate=1.0)
    fully_sharded(nn.Sequential(*model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    message = r"2\.lora_A whole, but it is a DTensor .*shard the plain model first, then wrap"
    for refused in (
        lambda: resize(model, {"2": 1}, optimizer),
        lambda: L1RA(model, optimizer, interval=1),
        lambda: merge(model),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def assert_refused_everywhere(model, wrapped, message, tmp_path):
    """model: plain. wrapped: with an adapter at `0`."""
    for refused in (
        lambda: linear_targets(model),
        lambda: wrap(model, {"0": 1}),
        lambda: SensitivityLoRA(model, loss_fn, batches()),
        lambda: input_second_moment(model, loss_fn, batches()),
        lambda: gauss_newton(model, loss_fn, batches()),
        lambda: resize(wrapped, {"0": 1}),
        lambda: L1RA(wrapped, torch.optim.SGD(wrapped.parameters()), interval=1),
        lambda: merge(wrapped),
        lambda: save_adapter(wrapped, tmp_path / "adapter.safetensors"),
        lambda: export_peft(wrapped, tmp_path / "peft"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_by_name(use_orig_params, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    def sharded(model):
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )

    wrapped = plain()
    wrap(wrapped, {"0": 2}, gate=1.0, trainable=["2", "4"])
    if not use_orig_params:
        wrapped.requires_grad_(True)  # flat parameters need one requires_grad
    assert_refused_everywhere(sharded(plain()), sharded(wrapped), "FSDP1", tmp_path)


def as_zero_3(model):
    """What DeepSpeed leaves of parameters between forward passes. A stand-in: DeepSpeed itself has
    never been run here."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
        parameter.ds_shape, parameter.ds_tensor = parameter.shape, parameter.data.flatten()
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return model


def test_zero_3_is_refused_by_name_and_gathered_parameters_are_not(tmp_path):
    wrapped = plain()
    wrap(wrapped, {"0": 2}, gate=1.0)
    whole = copy.deepcopy(wrapped)
    assert_refused_everywhere(as_zero_3(plain()), as_zero_3(wrapped), "ZeRO-3", tmp_path)
    for number, parameter in enumerate(whole.parameters()):
        parameter.ds_id = number  # inside GatheredParameters they have their shape
    save_adapter(whole, tmp_path / "adapter.safetensors")
