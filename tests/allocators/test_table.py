"""table.py: every rank can be read, and no line has more than 100 columns."""

from __future__ import annotations

import re

from hypothesis import example, given
from hypothesis import strategies as st

from minirank.allocators.history import History, Update
from minirank.allocators.table import BAR, draw_table, printable

KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
KINDS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def decoder(layers, head):
    ranks = {
        f"model.layers.{i}.{kind}": (i + j) % 9
        for i in range(layers)
        for j, kind in enumerate(KINDS)
    }
    return ranks | ({"lm_head": 4} if head else {})


def unet():
    """Names of diffusers' UNet2DConditionModel."""
    inner = [f"attn{i}.to_{kind}" for i in (1, 2) for kind in ("q", "k", "v", "out.0")]
    inner += ["ff.net.0.proj", "ff.net.2"]
    names = [f"time_embedding.linear_{i}" for i in (1, 2)]
    for part in ("down_blocks.0", "up_blocks.1", "mid_block"):
        for i in range(3):
            names += [f"{part}.attentions.{i}.transformer_blocks.0.{kind}" for kind in inner]
        names += [f"{part}.resnets.{i}.time_emb_proj" for i in range(2)]
    return {name: i % 7 for i, name in enumerate(names)}


def width(text):
    return max(map(len, text.splitlines()))


def test_a_decoder_is_a_grid_with_and_without_its_head():
    for ranks in (decoder(30, head=False), decoder(30, head=True)):
        lines = draw_table(ranks).splitlines()
        assert max(map(len, lines)) <= 100
        assert len(lines) == 2 + 30 + ("lm_head" in ranks) + 2
        assert lines[1].split()[-1] == "sum"
        total = sum(ranks.values())
        assert lines[-2].split()[-1] == str(total)


def test_a_wide_grid_becomes_blocks_with_sums_in_the_last():
    ranks = {f"layer.{i}.kind_{j:02}_with_a_long_name": j for i in range(4) for j in range(6)}
    text = draw_table(ranks)
    assert width(text) <= 100
    first, second = (
        block.splitlines() for block in text.removesuffix("\n· is rank 0: no adapter").split("\n\n")
    )
    assert [line.split()[0] for line in first[1:]] == [*(f"layer.{i}" for i in range(4)), "sum"]
    assert first[0].split() == [f"kind_{j:02}_with_a_long_name" for j in range(3)]
    assert second[0].split() == [f"kind_{j:02}_with_a_long_name" for j in range(3, 6)] + ["sum"]
    assert second[1].split()[::2] == ["layer.0", "██▍", "███▎", "████"]
    assert second[-1].split() == ["sum", "12", "16", "20", "60"]


def test_many_kinds_become_a_list_under_the_names_of_their_layers():
    ranks = unet()
    lines = draw_table(ranks).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["sum"]
    assert read_list(lines[1:-2]) == ranks
    assert lines[-2].split() == ["sum", str(sum(ranks.values()))]


def read_list(lines):
    """{name: rank} of a table that is a list, as a reader joins them."""
    ranks, layer = {}, ""
    for line in lines:
        if line.startswith("  "):
            kind, rank = line.split()[:2]
            ranks[f"{layer}.{kind}"] = 0 if rank == "·" else int(rank)
        else:
            layer = line.split()[0]
    return ranks


# One line each: no line breaks, which the table escapes, and nothing that looks like a rank.
part = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"), min_size=1, max_size=70)
number = st.integers(0, 99).map(str)
dotted = st.lists(part | number, min_size=1, max_size=6).map(".".join)
any_ranks = st.dictionaries(dotted, st.integers(0, 10**6), min_size=1, max_size=40)


@given(any_ranks)
@example({"a" * 500: 3, f"layer.0.{'b' * 300}.c": 10**6, "layer.0.q": 0})
def test_any_names_fit_and_every_rank_stands_in_the_table(ranks):
    text = draw_table(ranks)
    assert width(text) <= 100
    body = text.removesuffix("\n· is rank 0: no adapter")
    cells = re.findall(rf"(?:^|\s)(\d+|·) ?(?=[{BAR[1:]}]|\s|$)", body, flags=re.MULTILINE)
    for rank in ranks.values():
        assert ("·" if rank == 0 else str(rank)) in cells
    letters = re.sub(r"\s", "", body)
    for name in ranks:  # each part of a name, though it may be cut into lines
        if all(len(p) < 60 for p in name.split(".")) and len(name) < 60:
            assert all(p in letters for p in name.split("."))


@given(st.dictionaries(st.text(max_size=150), st.integers(0, 5000), max_size=8))
def test_any_text_at_all_fits(ranks):
    lines = draw_table(ranks).splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line.isprintable() for line in lines)


def test_two_long_names_can_be_told_apart():
    ranks = {f"{'a' * 120}{middle}{'b' * 120}.0.c": rank for middle, rank in (("x", 3), ("y", 5))}
    text = draw_table(ranks)
    assert width(text) <= 100
    rows = "".join(line.strip() for line in text.splitlines())
    for name in ranks:
        assert name.removesuffix(".c") in rows


counts = st.dictionaries(st.text(max_size=120), st.integers(1, 10**4), max_size=8)


@given(counts, counts, st.integers(0, 10**7), st.lists(st.text(), max_size=3))
def test_the_record_of_moves_fits_too(pruned, given_ranks, step, reset):
    history = History({"a": 1})
    ranks = {"a": 10**6}
    history.updates.append(Update(step, ranks, pruned, given_ranks, 10**10, tuple(reset)))
    lines = str(history).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[2].split()[0] == str(step)
    if pruned:
        assert printable(next(iter(pruned)))[:8].strip() in str(history)


def test_long_moves_take_a_line_for_each_side():
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(9)]
    update = Update(50, {"a": 9}, dict.fromkeys(names, 1), {names[3]: 9}, 100)
    assert [line.strip() for line in update.line().splitlines()] == [
        "50      9         100       9  model.layers.0.self_attn.q_proj, 8 more",
        "→ 9× model.layers.3.self_attn.q_proj",
    ]
