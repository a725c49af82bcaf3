"""A graph as one Python function: a line an operation, each value freed after its last use.

    def run(x, weight):
        h = f0(x, weight)
        del x
        ...

    function = emit(graph)
    outputs = function(*placeholders)          # the output node's argument, a tuple

Not `torch.fx`'s own code generation: this one takes any callable as an operation's target, and runs
the nodes marked ``meta["autocast"] = (device, dtype, enabled)`` in such a region.
"""

import linecache
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

Function = Callable[..., Any]


def emit(graph: Graph, name: str = "segment") -> Function:
    """Compile ``graph``: a function of its placeholders, in order, to what its output names."""
    writer = _Writer()
    writer.write(graph)
    source = "\n".join(writer.lines) + "\n"
    file = f"<{name} {next(_numbers)}>"
    # So that a traceback shows the line that failed.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = writer.scope
    exec(compile(source, file, "exec"), scope)
    return scope["run"]  # type: ignore[no-any-return]


_numbers = iter(range(1 << 62))


class _Writer:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.scope: dict[str, Any] = {"autocast": torch.autocast}
        self._names: dict[Node, str] = {}
        self._bound: dict[int, str] = {}
        self._region: Any = None

    def write(self, graph: Graph) -> None:
        last = _last_uses(graph)
        places = [node for node in graph.nodes if node.op == "placeholder"]
        for node in graph.nodes:
            self._names[node] = f"v{len(self._names)}"
        self.lines.append(f"def run({', '.join(self._names[node] for node in places)}):")
        if dead := [self._names[node] for node in places if not node.users]:
            self.lines.append(f"    del {', '.join(dead)}")
        for node in graph.nodes:
            if node.op == "call_function":
                self._call(node, last.get(node, []))
            elif node.op == "output":
                self.lines.append(f"    return {self._text(node.args[0])}")

    def _call(self, node: Node, dead: list[Node]) -> None:
        indent = self._enter(node.meta.get("autocast"))
        arguments = [self._text(value) for value in node.args]
        arguments += [f"{key}={self._text(value)}" for key, value in node.kwargs.items()]
        call = f"{self._bind(node.target)}({', '.join(arguments)})"
        target = f"{self._names[node]} = " if node.users else ""
        place = node.meta.get("line") or node.name
        self.lines.append(f"{indent}{target}{call}  # {node.name}: {_one_line(place)}")
        if dead:
            self.lines.append(f"{indent}del {', '.join(self._names[n] for n in dead)}")

    def _enter(self, region: Any) -> str:
        if region is not None and region != self._region:
            device, dtype, enabled = region
            wanted = f"{device!r}, dtype={self._bind(dtype)}, enabled={enabled}"
            self.lines.append(f"    with autocast({wanted}):")
        self._region = region
        return "    " if region is None else "        "

    def _text(self, value: Any) -> str:
        if isinstance(value, Node):
            return self._names[value]
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if type(value) in (tuple, list) or (isinstance(value, list | tuple) and _has_nodes(value)):
            inside = "".join(f"{self._text(item)}, " for item in value)
            return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
        if isinstance(value, dict):
            return "{" + "".join(f"{k!r}: {self._text(v)}, " for k, v in value.items()) + "}"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(self._text(part) for part in parts)})"
        return self._bind(value)

    def _bind(self, value: Any) -> str:
        name = self._bound.get(id(value))
        if name is None:
            name = self._bound[id(value)] = f"c{len(self._bound)}"
            self.scope[name] = value  # keeps it alive, so its id stays its own
        return name


def _last_uses(graph: Graph) -> dict[Node, list[Node]]:
    """For each node, the values that nobody needs after it."""
    seen: set[Node] = set()
    found: dict[Node, list[Node]] = {}
    for node in reversed(graph.nodes):
        for value in node.all_input_nodes:
            if value not in seen:
                seen.add(value)
                found.setdefault(node, []).append(value)
    return found


def _has_nodes(value: Any) -> bool:
    found: list[Node] = []
    map_arg(value, found.append)
    return bool(found)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\r", " ")
