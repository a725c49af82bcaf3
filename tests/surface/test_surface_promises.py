"""The names, options and rules that others may rely on."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shoal

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/shoal"

# As far as this version goes; sinks and traces of `train` come with later ones.
OPTIONS = {
    "train": {
        "--strategy", "-s", "--out", "--set", "--resume", "--max-restarts", "--comm", "--verbose",
        "--replay", "--json", "--debug", "--help", "-h",
    },
    "predict": {
        "--how", "--strategy", "-s", "--data", "--out", "--compare", "--skip-damaged", "--json",
        "--debug", "--help", "-h",
    },
    "export": {"--how", "--out", "--json", "--debug", "--help", "-h"},
    "verify": {
        "--strategy", "-s", "--steps", "--dtype", "--set", "--out", "--json", "--debug", "--help",
        "-h",
    },
}  # fmt: skip


def test_public_names():
    assert set(shoal.__all__) == {
        "Certificate", "Cluster", "Recipe", "Run", "Strategy", "__version__", "errors",
        "export", "predict", "train", "verify",
    }  # fmt: skip
    for name in shoal.__all__:
        assert getattr(shoal, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = shoal.trian


@pytest.mark.parametrize("verb", OPTIONS)
def test_options_of_the_verbs(verb):
    from typer.main import get_command

    from shoal.cli.app import app

    command = get_command(app).commands[verb]
    found = {"--help", "-h"}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            found.update(parameter.opts)
    assert found == OPTIONS[verb]


def test_layers():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def modules():
    return {
        path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text())
        for path in SOURCE.rglob("*.py")
    }


def uses(tree, *names):
    """The dotted names (`os.environ`) and imports of a module that are among `names`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in names:
            found.add(ast.unparse(node))
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in names)
        if isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            found.update(whole & set(names))
    return found


def who_uses(*names):
    return {path for path, tree in modules().items() if uses(tree, *names)}


def test_only_env_reads_the_environment():
    assert who_uses("os.environ", "os.getenv", "os.environb", "os.putenv") == {"env.py"}


def test_nothing_is_unpickled_but_functions_of_our_own_parent():
    assert who_uses("cloudpickle") == {"launch/supervisor.py", "launch/worker.py"}
    assert who_uses("cloudpickle.loads") == {"launch/worker.py"}
    forbidden = ("pickle", "torch.load", "torch.save", "marshal", "shelve", "dill", "joblib")
    assert who_uses(*forbidden) == set()
    assert who_uses("numpy.load", "np.load") == set()


def test_groups_are_made_in_one_place():
    made = ("dist.init_process_group", "dist.new_group", "torch.distributed.new_group")
    assert {path.split("/")[0] for path in who_uses(*made)} == {"comm"}


def test_no_module_is_over_400_lines_and_no_import_is_relative():
    for path, tree in modules().items():
        assert len((SOURCE / path).read_text().splitlines()) <= 400, path
        assert not any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(tree)), path


def test_every_room_says_what_it_is_for():
    for path, tree in modules().items():
        if path != "__init__.py":
            assert ast.get_docstring(tree), path


def test_no_unfinished_business():
    for path in modules():
        text = (SOURCE / path).read_text()
        assert not re.search(r"TODO|FIXME|XXX", text), path
        assert not re.search(r"except Exception:\s*\n\s*pass", text), path
