"""The plan: which dimensions of which parameters are cut over the ranks, into what, and why.

    made = plan(traced, ranks=2, model=model)
    print(made.text())
    fc1.weight, fc1.bias, fc2.weight: cut along 512, 256 a rank
    norm.weight, norm.bias: whole: layer_norm of norm: normalises over it

A class of dimensions is tried alone on a copy of the graph first; what the rewriting refuses stays
whole. Of those that work `choose` takes the best that do not exclude each other, and the whole plan
is tried once more.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

from torch import Tensor, nn
from torch.fx import Graph, Node

from shoal.comm import Group
from shoal.layout import Part, Slice
from shoal.parallel.tensor.choose import choose
from shoal.parallel.tensor.classes import Analysis, Class, find_classes
from shoal.parallel.tensor.relation import Relation
from shoal.parallel.tensor.rewrite import Rewriting, with_gradient
from shoal.parallel.tensor.sizes import numel, shape
from shoal.parallel.tensor.split import Block, CannotCut, Cut, Split, even_bounds

G = TypeVar("G", bound="Graphed")

FEW_CLASSES = 32
"""An output with fewer classes stays whole: its weights are small beside what is gathered."""
MOVES_MORE = "what would be moved is more than what would be saved"
WORK = 64
"""Multiplications for each element moved, from which on a weight is cut though what enters it is
whole. At 77 GFLOP/s and 1 GB/s (one core, loopback) time breaks even at some 300; memory is saved
in any case."""
MOVED = 0.1  # how much a share of bytes moved counts beside a share of parameters


class Graphed(Protocol):
    """What is used of `shoal.trace.Traced`."""

    graph: Graph
    state: dict[str, str]
    inputs: tuple[str, ...]
    cut_outputs: dict[int, int]

    def copy(self) -> Self: ...


@dataclass(frozen=True)
class TensorPlan:
    """`cuts`: qualified name → how it lies on the ranks, for what is cut; the rest is whole.

    ``reasons``: one sentence for each set of names. ``shapes``: of all parameters and buffers, by
    the first name of each; ``first_names``: further names of tied ones → their first.
    """

    ranks: int
    cuts: Mapping[str, Cut]
    shapes: Mapping[str, tuple[int, ...]]
    first_names: Mapping[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def part(self, name: str, rank: int) -> Part:
        """What `rank` holds of the parameter or buffer `name`."""
        whole = self.shapes[name]
        cut = self.cuts.get(name)
        if cut is None:
            return Part.whole(whole)
        boxes = []
        for start, stop in cut.split.ranges(rank) or [(0, 0)]:
            offset, size = [0] * len(whole), list(whole)
            offset[cut.dim], size[cut.dim] = start, stop - start
            boxes.append(Slice(whole, tuple(offset), tuple(size)))
        return Part(tuple(boxes), cut.dim)

    def layout(self, rank: int) -> dict[str, Part]:
        """The parts of `rank`, by qualified name."""
        return {name: self.part(name, rank) for name in self.shapes}

    @property
    def share_cut(self) -> float:
        """The share of all elements of parameters and buffers that is cut."""
        numbers = {name: numel(whole) for name, whole in self.shapes.items()}
        return sum(numbers[name] for name in self.cuts) / max(1, sum(numbers.values()))

    def text(self) -> str:
        """Reasons and warnings, a line each."""
        return "\n".join([*self.reasons, *(f"warning: {each}" for each in self.warnings)])


@dataclass
class _Trial:
    """What cutting one class alone gives."""

    one: Class
    cuts: dict[str, Cut] = field(default_factory=dict)
    elements: int = 0
    macs: int = 0
    moved: int = 0
    why_not: str | None = None


def plan(traced: Graphed, ranks: int, model: nn.Module) -> TensorPlan:
    """Decide what is cut over `ranks`. The traced graph is not changed.

    A model of which nothing can be cut is no error: the plan warns, and all is whole.
    """
    shapes = {name: tuple(each.shape) for name, each in _tensors(model)}
    if ranks == 1:
        return TensorPlan(1, {}, shapes, reasons=("all whole: one rank",))
    first_names = _first_names(model)
    traced = _with_first_names(traced, first_names)
    trained = trained_placeholders(traced, model)
    analysis = Analysis(traced.graph, traced.state, set(traced.inputs))
    tried = _Trying(traced, ranks, trained, analysis.relations)
    classes = find_classes(analysis)
    trials = [tried.alone(each) for each in classes]
    working = {each.one.number: each for each in trials if each.why_not is None}
    gains = _gains(working.values())
    while True:
        conflicts = {key: trial.one.conflicts for key, trial in working.items()}
        chosen = choose({key: gains[key] for key in working}, conflicts)
        cuts = {name: cut for key in sorted(chosen) for name, cut in working[key].cuts.items()}
        why_not = tried.why_not(cuts)
        if why_not is None:
            break
        # Each works alone but not all together: without the smallest, until it does.
        smallest = min(chosen, key=lambda key: (gains[key], -key))
        working.pop(smallest).why_not = why_not
    cuts, alone = _with_single_weights(tried, analysis, cuts)
    named = {traced.state[name]: cut for name, cut in cuts.items()}
    reasons = _reasons(traced, trials, chosen, gains, shapes, ranks, alone)
    warnings = () if named else (_NOTHING,)
    return TensorPlan(ranks, named, shapes, first_names, reasons, warnings)


def nothing(ranks: int, model: nn.Module) -> TensorPlan:
    """The plan of a model whose operations are not known: all of it is whole, with a warning."""
    shapes = {name: tuple(each.shape) for name, each in _tensors(model)}
    return TensorPlan(ranks, {}, shapes, _first_names(model), warnings=(_NOTHING,))


_NOTHING = "nothing to cut: all parameters are whole on each rank"


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a tied tensor but its first → the first that the module gives it."""
    first = {id(each): name for name, each in _tensors(model)}
    every = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: first[id(each)] for name, each in every if first[id(each)] != name}


def _with_first_names(traced: G, first_names: Mapping[str, str]) -> G:
    copy = traced.copy()
    copy.state = {name: first_names.get(path, path) for name, path in traced.state.items()}
    return copy


def trained_placeholders(traced: Graphed, model: nn.Module) -> frozenset[str]:
    """The placeholders of parameters that want a gradient."""
    wanted = {
        name for name, each in model.named_parameters(remove_duplicate=False) if each.requires_grad
    }
    return frozenset(name for name, path in traced.state.items() if path in wanted)


class _Trying:
    """Tries cuts out on the graph, which stays as it is."""

    def __init__(
        self,
        traced: Graphed,
        ranks: int,
        trained: frozenset[str],
        relations: dict[Node, Relation],
    ) -> None:
        self._relations = relations
        self._traced, self.ranks, self.trained = traced, ranks, trained
        self._order = {node: at for at, node in enumerate(traced.graph.nodes)}
        self._needs = with_gradient(traced.graph, trained)
        self._placeholders = {
            node.name: node for node in traced.graph.nodes if node.op == "placeholder"
        }

    def walk(self, cuts: dict[str, Cut], rank: int = 0) -> Rewriting:
        """Raises `CannotCut`."""
        walk = Rewriting(self._traced.graph, cuts, Group(rank, self.ranks), self.trained)
        walk.try_out(self._order, self._needs, self._relations)
        return walk

    def alone(self, one: Class) -> _Trial:
        """What cutting this class alone gives."""
        trial = _Trial(one, why_not=one.veto)
        if trial.why_not is None and one.units < self.ranks:
            trial.why_not = f"{one.units} cannot be cut into {self.ranks}"
        if trial.why_not is not None:
            return trial
        trial.cuts = {
            name: _cut(dim, axis, self.ranks) for name, (dim, axis) in one.tensors.items()
        }
        state = self._traced.state
        once = {state[name]: name for name in one.tensors}.values()  # tied ones count once
        trial.elements = sum(
            numel(self._placeholders[name].meta["val"].shape)
            for name in once
            if name in self.trained
        )
        try:
            walk = self.walk(trial.cuts)
        except CannotCut as error:
            trial.why_not = str(error)
            return trial
        trial.macs, trial.moved = walk.macs, walk.moved
        trial.why_not = _not_worth(walk, trial, set(self._traced.inputs))
        return trial

    def pays(self, cuts: dict[str, Cut]) -> bool:
        """Whether cutting a single weight along what it sums over is worth what is moved."""
        try:
            walk = self.walk(cuts)
        except CannotCut:
            return False
        return walk.macs >= WORK * walk.moved and not walk.cut_outputs

    def why_not(self, cuts: dict[str, Cut]) -> str | None:
        """Why these cuts do not go together, on the first or the last rank."""
        try:
            for rank in (0, self.ranks - 1):
                self.walk(cuts, rank)
        except CannotCut as error:
            return str(error)
        return None


def _not_worth(walk: Rewriting, trial: _Trial, inputs: set[str]) -> str | None:
    for at, cut in walk.cut_outputs.items():
        if cut.split.size < FEW_CLASSES:
            return f"only {cut.split.size} classes of output {at}"
    if not trial.macs and trial.moved >= trial.elements:
        return MOVES_MORE
    if walk.narrowed & inputs and trial.macs < WORK * trial.moved:
        return "too little is computed along the model's inputs"
    return None


def _with_single_weights(
    tried: _Trying, analysis: Analysis, cuts: dict[str, Cut]
) -> tuple[dict[str, Cut], list[str]]:
    """`cuts`, and weights that are left, each cut along what it sums over; names of those.

    What enters such a weight stays whole: each rank takes its part of it (the third convolution of
    a bottleneck, whose other two share a cut).
    """
    found: dict[str, Cut] = {}
    for node, dim in _summed_weights(analysis, tried.trained):
        size = shape(node.meta["val"])[dim]
        if node.name in cuts or node.name in found or size < tried.ranks:
            continue
        cut = Cut(dim, Split(1, (Block(size, even_bounds(size, tried.ranks, size)),)))
        if tried.pays({node.name: cut}):
            found[node.name] = cut
    if tried.why_not({**cuts, **found}) is None:
        return {**cuts, **found}, list(found)
    alone = []
    for name, cut in found.items():
        if tried.why_not({**cuts, name: cut}) is None:
            cuts = {**cuts, name: cut}
            alone.append(name)
    return cuts, alone


def _summed_weights(analysis: Analysis, trained: frozenset[str]) -> Iterable[tuple[Node, int]]:
    for relation in analysis.relations.values():
        for operand in relation.operands if relation.macs else ():
            if operand.node.name in trained and len(operand.terms) > 1:
                for dim, term in enumerate(operand.terms):
                    if len(term.labels) == 1 and term.labels[0] in relation.sums:
                        yield operand.node, dim


def _cut(dim: int, axis: Any, ranks: int) -> Cut:
    blocks = [Block(size, even_bounds(atom.units, ranks, size)) for size, atom in axis.expand()]
    return Cut(dim, Split.made(axis.outer, tuple(blocks)))


def _gains(trials: Iterable[_Trial]) -> dict[int, float]:
    trials = list(trials)
    elements = max(1, sum(each.elements for each in trials))
    macs = max(1, sum(each.macs for each in trials))
    moved = max(1, sum(each.moved for each in trials))
    return {
        each.one.number: each.elements / elements + each.macs / macs - MOVED * each.moved / moved
        for each in trials
    }


def _reasons(
    traced: Graphed,
    trials: list[_Trial],
    chosen: set[int],
    gains: dict[int, float],
    shapes: Mapping[str, tuple[int, ...]],
    ranks: int,
    alone: list[str],
) -> tuple[str, ...]:
    """A line for each class that is cut, then why the others of what is whole are not."""
    lines, told = [], set()
    for trial in trials:
        if trial.one.number in chosen:
            names = list(dict.fromkeys(traced.state[name] for name in trial.one.tensors))
            told.update(names)
            lines.append(f"{', '.join(names)}: {_described(trial, ranks)}")
    if alone:
        names = [traced.state[name] for name in alone]
        told.update(names)
        lines.append(f"{', '.join(names)}: cut along what is summed over; what enters is whole")
    whole: dict[str, list[str]] = {}
    for trial in trials:
        for name in trial.one.tensors:
            path = traced.state[name]
            if path not in told:
                told.add(path)
                whole.setdefault(_why(trial, gains, trials, chosen), []).append(path)
    for name, size in shapes.items():
        if name not in told:
            why = "a single number" if numel(size) == 1 else "not used by the model's forward"
            whole.setdefault(why, []).append(name)
    lines += [f"{', '.join(names)}: whole: {why}" for why, names in whole.items()]
    return tuple(lines)


def _described(trial: _Trial, ranks: int) -> str:
    cut = max(trial.cuts.values(), key=lambda each: each.split.size)
    sizes = [cut.split.local(rank) for rank in range(ranks)]
    shares = f"{sizes[0]} a rank" if len(set(sizes)) == 1 else " + ".join(map(str, sizes))
    units = trial.one.units
    by = f" in {units} units" if units != cut.split.size else ""
    return f"cut along {cut.split.size}{by}, {shares}"


def _why(trial: _Trial, gains: dict[int, float], trials: list[_Trial], chosen: set[int]) -> str:
    if trial.why_not is not None:
        return trial.why_not
    if gains.get(trial.one.number, 0.0) <= 0:
        return MOVES_MORE
    others = [each for each in trials if each.one.number in trial.one.conflicts & chosen]
    names = [name for each in others for name in each.one.tensors]
    return f"beside {len(names)} tensors that are cut along another dimension"
