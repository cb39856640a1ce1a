"""The LoRA layer, and the surgery that puts it into any nn.Module.

    linear.py           what counts as a linear layer, which way round its weight lies, and which
                        dimension of its inputs holds features
                        (packed.py, beside the folders: quantised weights)
    names.py            names of modules, without those of torch.compile's and DDP's wrappers
    merge.py            W + ΔW goes into the weight, and W comes back: merge, unmerge
    pretrained.py       what save_pretrained writes of a wrapped model, and who can read it
    replaced.py         parameters that layers replaced, and optimizers that still hold them
    read_weights.py     layers that nobody calls, since another module reads their weight
    lora.py             the layer itself: LoRALinear
    experts.py          LoRAExperts: adapters for parameters that stack the weights of experts
    attention.py        attention that calls its linear layers q, k, v and out
    coverage.py         which part of a model's matrices targets reach, and what is left out
    hints.py            what a name or glob that matches nothing was meant to be
    modules.py          modules and stacks of experts under their names
    targets.py          which modules get ranks: linear_targets
    peft_names.py       how PEFT is told which modules get adapters
    unmoved.py          adapters that never move, since the optimizer was made before wrap
    wrap.py             layers go in and come out: wrap, unwrap, disabled, lora_layers
    unpack.py           packed attention becomes linear layers: unpack_attention
    pack.py             and packed attention again: pack_attention
    optimizers.py       what counts as an optimizer, and what schedule-free ones keep
    optimizer_state.py  what an optimizer knows of each rank, slice by slice
    resize.py           other ranks in the middle of training: resize

A file imports only from files above it. In this folder, only `wrap`, `resize`, `merge`, `unmerge`,
`unwrap`, `unpack_attention` and `pack_attention` change a model. Each checks everything first, so
a call that raises leaves the model unchanged. (`disabled` switches adapters off for a block, and
making a `LoRALinear` freezes the module that it is given.)

One layer serves all three methods: y = W x + b + s · B (gate ⊙ A x).

    symbol  code              shape          meaning
    W       `base.weight`     (d_out, d_in)  the frozen weight; Conv1D stores (d_in, d_out), a
                                             convolution (d_out, d_in, 1, …)
    b       `base.bias`       (d_out,)       the frozen bias, or None
    A       `lora_A`          (r, d_in)      down-projection; trains
    B       `lora_B`          (d_out, r)     up-projection; trains
    c, λ    `gate`            (r,)           one scale per rank: L1RA's c, ShapLoRA's λ; None in
                                             plain LoRA, where every rank counts fully
    s       `scaling`         scalar         alpha / r_ref, or alpha / sqrt(r_ref) if
                                             rank-stabilised (arXiv 2312.03732)
    r       `rank`            integer        number of ranks, from 0 to min(d_in, d_out)
    ΔW      `delta_weight()`  (d_out, d_in)  s · B diag(gate) A

Scaling never follows the rank. It is fixed when a layer is made, by `scaling=` or by a reference
rank, and stays when ranks are pruned or added: computing alpha / r anew would silently change the
trained function. The default reference rank is the average rank asked for in a call of `wrap`, so
that all layers of that call have one scaling. A state_dict holds A, B and gates, but not the
scaling; `save_adapter`'s file holds everything.

Loading a state_dict adopts its ranks, layer by layer. A layer that gets other ranks gets new
parameters, so make the optimizer, L1RA and the scheduler after loading. Where they exist already,
call resize(model, ranks, optimizer) with the saved ranks first: then loading replaces nothing.
(L1RA's state has them as state["ranks"]; of any state they are
{name: state[f"{name}.lora_A"].shape[-2] for name in lora_layers(model)}.) An optimizer that still
holds replaced parameters is stopped at its next step, by a hook on all optimizers (replaced.py).

A module that a model holds in several places is one module. Any of its names selects it, results
list it under its first name, it gets one adapter, and the adapter works in every place.
Two modules with one weight (a head tied to an embedding) stay two modules: each gets an adapter of
its own, and `merge` refuses them without `untie=True`. By default a tied head gets none.

The wrappers of torch.compile, DataParallel and DistributedDataParallel have no part in names, so
that files are the same with and without them. Names that have their part ("_orig_mod.encoder.fc",
"module.encoder.fc") are understood, in arguments and in files.

An nn.Conv1d, Conv2d or Conv3d with kernel 1, stride 1, one group, no padding and torch's own
forward is a linear layer over its channels, which lie in dimension 1. Its positions count as tokens
do: they are averaged in the input second moment and are positions of a sample in the other
curvatures. An input without samples, (channels, …), is one sample. Other convolutions are left out.

Packed layers (bitsandbytes, torchao, quanto, HQQ; `linear_shape` says what counts) are targets like
any other, and are never called by a probe. Their adapters are float32 unless `dtype=` says
otherwise, and the output has the base's type. `merge` refuses them, since W + ΔW cannot go back
without loss; `weight` dequantises where the module says how, or raises; `unwrap` always works.
bitsandbytes' 4-bit layer would repack its weight when it is evaluated on the CPU, and lose its
gradient for good: while it has an adapter, or is measured, it is kept from that.

A stack of experts, a 3-D parameter, is a target if it is named, as the parameter is. Its W, ΔW, A
and B have one more axis in front, for the experts, and its rank counts for all of them. Nothing can
be measured there, so that default targets leave it out, and SensitivityLoRA and curvatures refuse
it. experts.py has the rest.

nn.MultiheadAttention reads its out_proj's weight without calling the module. An adapter there
works, but nothing can be measured there and adapter dropout has no effect, so that out_proj is
selected by its exact name alone. Its packed in_proj_weight is no linear layer and is not adapted.
`unpack_attention` gives such a module linear layers q, k, v and out that it calls, which are
targets like any others, and `pack_attention` puts the module back. Between the two, state_dicts and
files have the names of the linear layers; a model that reads them, in PEFT too, is unpacked first.
"""
