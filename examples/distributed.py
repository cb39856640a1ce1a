"""Several processes: scores from shards of the data, L1RA in a data-parallel training.

    torchrun --nproc-per-node 2 examples/distributed.py            # a few minutes on 2 cores
    torchrun --nproc-per-node 2 examples/distributed.py --quick    # half a minute

(With --quick the penalty is ten times as high, so that ranks move within 24 steps. The loss then
rises when they do.)

A pretrained MiniLM learns part-of-speech tags (tagging.py). Every process has the whole model and a
part of each batch.

1. `pooled`: each process scores its own shard, and all get the ranks of one process with all data.
2. `sync_gradients` takes the place of DistributedDataParallel: the base is frozen, so that only the
   gradients of the adapters have to be averaged.
3. L1RA moves ranks on each process by itself. Equal gradients give equal ranks, and `group=` checks
   before every update that the parameters are equal bit for bit.
4. Process 0 saves, since all have the same adapter.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import tagging
import torch
import torch.distributed as dist

from minirank import L1RA, SensitivityLoRA, load_adapter, save_adapter, wrap
from minirank.curvature import input_second_moment
from minirank.distributed import check_same, from_first, pooled, sync_gradients

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--quick", action="store_true", help="a tenth of the data and the steps")
quick = options.parse_args().quick
STEPS, SENTENCES = (24, 192) if quick else (240, 1920)
INTERVAL = STEPS // 6
L1 = 72 / STEPS  # high: within the training, a gate that the loss does not hold up reaches zero

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, count = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)


def say(text):
    if rank == 0:
        print(text, flush=True)


data = tagging.load_data()
model = tagging.build_model(seed=0, num_tags=len(data.tags))
encoder = ["encoder.*"]

# 1. Scores. A process measures every count-th batch; `pooled` takes the means over all.
calibration = list(tagging.batches(tagging.spread(data.train, SENTENCES), 24))
allocator = SensitivityLoRA(
    model,
    tagging.loss_fn,
    calibration[rank::count],
    targets=encoder,
    curvature=pooled(input_second_moment),
    progress=False,
)
allocator.score()
allocation = from_first(allocator.allocate(72, min_rank=1, max_rank=8))
say(f"{count} processes, {len(calibration)} batches\n{allocation}")

# 2. and 3. Training: whole batches are drawn alike everywhere, and each process takes its rows.
wrap(model, allocation, gate=1.0, scaling=2.0, trainable=["head"])
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=3e-3)
l1ra = L1RA(model, optimizer, l1=L1, interval=INTERVAL, group=dist.group.WORLD)


def training_batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from tagging.batches(data.train, 24, generator=generator)


for step, batch in zip(range(STEPS), training_batches(), strict=False):
    rows = {name: tensor[rank::count] for name, tensor in batch.items()}
    # The loss is a mean over words, and the processes have unequal numbers of them.
    words = torch.tensor(float(tagging.words(rows)))
    all_words = words.clone()
    dist.all_reduce(all_words)
    loss = tagging.loss_fn(model, rows) * (words * count / all_words)
    optimizer.zero_grad()
    loss.backward()
    sync_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if update := l1ra.step():
        moved = sum(update.given.values())
        say(f"step {step + 1}: loss {loss.item():.2f} on process 0, {moved} ranks moved")

# 4. All agree, so that one file is enough.
check_same(model)
say(f"all {count} processes have the same {l1ra.history.updates[-1].total_rank} ranks, bit for bit")
folder = from_first(tempfile.mkdtemp() if rank == 0 else "")
path = Path(folder, "adapter.safetensors")
if rank == 0:
    save_adapter(model, path)
dist.barrier()
again = tagging.build_model(seed=0, num_tags=len(data.tags))
load_adapter(again, path)
check_same(again)
scores = tagging.evaluate(again, tagging.spread(data.test, SENTENCES // 4)[rank::count])
say(f"loaded from {path.name} on all: {scores['accuracy']:.1f} % of process 0's test words right")
dist.barrier()
if rank == 0:
    shutil.rmtree(folder)
dist.destroy_process_group()
