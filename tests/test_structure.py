"""The layers of the code: arrows between wings point down, and the names that must stay free stay free."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from repository import BENCHMARKS, ROOT

KERNELS = ROOT / "kernels" / "dpo_fast_kernels"

# From the bottom to the top, one row a floor. A module may import from its own wing and from floors below; wings on one
# floor do not import each other.
FLOORS = (
    {"dpo_fast_kernels", "errors"},
    {"batches", "machine"},
    {"data", "losses"},
    {"config"},
    {"model"},
    {"reference"},
    {"training"},
    {"trainer", "scoring", "integrations"},
    {"commands"},
    {"cli"},
)
# The same inside dpo_fast_kernels.
KERNEL_FLOORS = (
    {"_triton", "autograd"},
    {"gather"},
    {"attention", "head"},
    {"specification"},
)
# dpo_fast.reference.store asks a store without PyTorch.
WITHOUT_TORCH = "dpo_fast.reference.store"


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


def wing(module: str) -> str:
    """The wing that a module belongs to: a folder or a file beside them; all kernels are one."""
    parts = module.split(".")
    return parts[0] if parts[0] == "dpo_fast_kernels" or len(parts) == 1 else parts[1]


def floor(name: str, floors: tuple[set[str], ...]) -> int:
    for height, names in enumerate(floors):
        if name in names:
            return height
    raise AssertionError(f"{name!r} has no floor yet: put it into the table of {Path(__file__).name}")


GRAPH = {
    name: {target for target in imports(name, path) if target.split(".")[0] in ("dpo_fast", "dpo_fast_kernels")}
    - {name}
    for name, path in SOURCES.items()
}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_arrows_point_down(name):
    own = wing(name)
    for target in GRAPH[name] - {"dpo_fast"}:
        other = wing(target)
        assert other == own or floor(other, FLOORS) < floor(own, FLOORS), f"{name} imports {target}, not below it"


@pytest.mark.parametrize(
    "name", sorted(name for name in SOURCES if name.count(".") and wing(name) == "dpo_fast_kernels")
)
def test_arrows_between_kernels_point_down(name):
    own = name.split(".")[1]
    for target in GRAPH[name] - {"dpo_fast_kernels"}:
        other = target.split(".")[1]
        below = floor(other, KERNEL_FLOORS) < floor(own, KERNEL_FLOORS)
        assert other == own or below, f"{name} imports {target}, not below it"


@pytest.mark.parametrize("name", sorted(name for name in SOURCES if name.startswith(WITHOUT_TORCH)))
def test_a_store_needs_no_pytorch(name):
    roots = {target.split(".")[0] for target in imports(name, SOURCES[name])}
    assert not roots & {"torch", "datasets", "transformers"}, f"{name} imports {roots}"


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


@pytest.mark.parametrize("name", sorted(name for name in SOURCES if wing(name) == "dpo_fast_kernels"))
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
    assert {wing(name) for name in SOURCES} == set().union(*FLOORS), "a wing that is gone leaves the table"


def test_every_wing_has_its_tests():
    wings = {path.name for path in (ROOT / "dpo_fast").iterdir() if (path / "__init__.py").exists()}
    for name in sorted(wings | {"kernels", "benchmarks"}):
        assert list((ROOT / "tests" / name).glob("test_*.py")), f"tests/{name} has no test"


def test_a_folder_can_be_read_at_one_look():
    def entries(folder: Path, pattern: str) -> list[str]:
        return [path.name for path in folder.glob(pattern) if path.name != "__pycache__"]

    assert len(entries(ROOT / "dpo_fast", "*")) <= 15  # and __pycache__
    assert len(entries(KERNELS, "*.py")) <= 6
    assert len(entries(BENCHMARKS, "*.py")) <= 3


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
