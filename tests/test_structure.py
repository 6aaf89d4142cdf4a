"""The layers of the code: arrows between files point down, and the names that must stay free stay free.

cli, arguments, doctor, bench, demo, integrations → trainer → data, sampler, reference, coupling, forward, metrics
    → groups, losses, head, attention → dpo_fast_kernels
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "dpo_fast_kernels"

# From the bottom to the top. A file may import from its own layer and from those below it.
LAYERS = (
    {"dpo_fast_kernels"},
    {"batches", "machine", "errors"},
    {"data", "losses"},
    {"config"},
    {"model"},
    {"reference"},
    {"training"},
    {"trainer", "scoring", "integrations"},
    {"commands"},
    {"cli"},
)
ENTRIES = {"cli", "integrations"}

# The same inside dpo_fast_kernels, whose units are its folders and the files beside them.
KERNEL_LAYERS = (
    {"_triton", "autograd"},
    {"gather"},
    {"attention", "head"},
    {"specification"},
    {""},
)


def sources() -> dict[str, Path]:
    """Module name → file, for every module of both packages but the lazy facade `dpo_fast`."""
    found = {}
    for package in (ROOT / "dpo_fast", KERNELS):
        for path in sorted(package.rglob("*.py")):
            parts = [*path.relative_to(package.parent).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name != "dpo_fast"}


SOURCES = sources()


def imports(name: str, path: Path, top_level: bool = False) -> set[str]:
    """Modules that a file imports, wherever in the file, or only those it imports when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            inner = {f"{base}.{alias.name}" for alias in node.names} & set(SOURCES)
            found |= inner or {base}
    return found


def unit(module: str) -> str:
    """The name by which LAYERS knows a module: kernels, demo and integrations are one each."""
    parts = module.split(".")
    return parts[0] if parts[0] == "dpo_fast_kernels" or len(parts) == 1 else parts[1]


def layer(module: str) -> int:
    for height, units in enumerate(LAYERS):
        if unit(module) in units:
            return height
    raise AssertionError(f"{module} has no layer yet: put {unit(module)!r} into LAYERS of {Path(__file__).name}")


GRAPH = {
    name: {target for target in imports(name, path) if target.split(".")[0] in ("dpo_fast", "dpo_fast_kernels")}
    - {name}
    for name, path in SOURCES.items()
}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_arrows_point_down(name):
    for target in GRAPH[name] - {"dpo_fast"}:
        assert layer(target) <= layer(name), f"{name} imports {target}, which lies above it"
        assert unit(target) not in ENTRIES or unit(target) == unit(name), f"{name} imports {target}, an entry point"


def test_no_import_cycle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' → '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for target in sorted(GRAPH.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(GRAPH):
        visit(name, ())


@pytest.mark.parametrize("name", sorted(name for name in SOURCES if unit(name) == "dpo_fast_kernels"))
def test_kernels_know_tensors_only(name):
    allowed = {"dpo_fast_kernels", "torch", "triton", *sys.stdlib_module_names}
    path = SOURCES[name]
    for when, extra in ((True, set()), (False, {"flash_attn"})):
        roots = {target.split(".")[0] for target in imports(name, path, top_level=when)}
        assert roots <= allowed | extra, f"{name} imports {roots - allowed - extra}"


def test_the_reader_of_imports_sees_them():
    """Guards the guards: an import that is missed would make every test above pass."""
    assert "dpo_fast.trainer" in GRAPH["dpo_fast.commands.train"], "an import inside a function is one"
    assert "dpo_fast_kernels" in GRAPH["dpo_fast.batches.packing"]
    assert {unit(name) for name in SOURCES} >= {"cli", "trainer", "batches", "commands", "dpo_fast_kernels"}


@pytest.mark.parametrize("name", ["dpo_fast", *sorted(SOURCES)])
def test_a_file_fits_a_head(name):
    path = SOURCES.get(name, ROOT / "dpo_fast" / "__init__.py")
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines: make it two files"


def python(code: str) -> str:
    """Runs code in a fresh interpreter that sees what is installed, and not the repository's root."""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("package", "heavy"), [("dpo_fast", ["triton", "transformers"]), ("dpo_fast_kernels", ["transformers"])]
)
def test_importing_is_light(package, heavy):
    assert python(f"import sys, {package}; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_the_name_kernels_stays_free():
    """It belongs to Hugging Face's package, which transformers asks for."""
    assert str(ROOT) not in python("from importlib.util import find_spec; print(find_spec('kernels'))")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists(), "it would put the repository's root on sys.path"
