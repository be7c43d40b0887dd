"""The structure of the package: who may import whom, and how long functions and files may be.

Read from the source, imports within functions included, so that nothing has to be imported here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Bottom up. A module imports from the floors below its own; a package's modules share its floor,
# and import from each other, too.
FLOORS = [
    ["errors", "launch", "options"],
    ["files", "grammar", "results"],
    ["config", "hub", "chat_template", "sampling"],
    ["cache", "tokenizer", "prompts"],
    ["encoding", "kernels", "matching", "text"],
    ["attention"],
    ["model"],
    ["quantization", "steps"],
    ["checkpoint"],
    ["runners"],
    ["engine", "invariance"],
    ["answer", "tensor_parallel"],
    ["decoder"],
    ["fingerprint", "loading", "tuning"],
    ["bench", "server"],
    ["cli"],
    ["__main__"],
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

MOST_LINES = 50  # of a function; of a Triton kernel without its long signature and its docstring
LIMITS = {
    "the core": 10800,
    "engine": 930,
    "tuning": 280,
    "bench": 1750,
    "server": 2215,  # without its page
    "model.py": 400,
    "benchmarks/report.py": 645,
}


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    files = sorted((ROOT / "orthrus_fast").rglob("*.py"))
    names = (file.relative_to(ROOT).with_suffix("").parts for file in files)
    dotted = (".".join(parts).removesuffix(".__init__") for parts in names)
    return dict(zip(dotted, files, strict=True))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is imported anywhere in the tree; the package has no relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """The package's own module that a dotted name lies in; None for those of others."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports.

    The package itself is a front door: it has names that it looks up when they are asked for.
    """
    graph = {}
    for name, file in modules().items():
        found = {module_of(imported) for imported in imported_names(parse(file))}
        graph[name] = {one for one in found if one is not None} - {name, "orthrus_fast"}
    del graph["orthrus_fast"]
    return graph


def part_of(module: str) -> str:
    return module.split(".")[1]


def test_every_module_has_a_floor() -> None:
    assert {part_of(module) for module in imports()} <= FLOOR_OF.keys()


def test_imports_point_down() -> None:
    up = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in sorted(others)
        if part_of(module) != part_of(other)
        and FLOOR_OF[part_of(module)] <= FLOOR_OF[part_of(other)]
    ]
    assert up == []


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn; an empty list where there are none."""
    path: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(graph[module]):
            if circle := visit(other):
                return circle
        path.pop()
        done.add(module)
        return []

    return next(filter(None, map(visit, graph)), [])


def test_there_are_no_circles() -> None:
    assert circle_in(imports()) == []


def test_a_circle_would_be_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle_in({"a": {"b", "c"}, "b": set(), "c": {"d"}, "d": {"c"}}) == ["c", "d", "c"]


def test_the_front_door_imports_what_needs_no_torch() -> None:
    tree = parse(modules()["orthrus_fast"])
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert {module_of(name) for name in imported_names(node)} <= {
                None,
                "orthrus_fast.errors",
            }
    errors = set(imported_names(parse(modules()["orthrus_fast.errors"])))
    assert not any(name.split(".")[0] == "torch" for name in errors)


@pytest.mark.parametrize("module", ["triton", "transformers", "matplotlib", "torch._dynamo"])
def test_what_only_some_need_is_imported_where_it_is_used(module: str) -> None:
    """No module imports these at its top but those that are themselves imported when needed."""
    allowed = {"triton": ("kernels.", "attention.triton"), "matplotlib": (), "transformers": ()}
    early = [
        name
        for name, file in modules().items()
        for node in parse(file).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for imported in imported_names(node)
        if imported == module or imported.startswith(module + ".")
    ]
    prefixes = tuple(f"orthrus_fast.{prefix}" for prefix in allowed.get(module, ()))
    assert [name for name in early if not name.startswith(prefixes)] == []


@pytest.mark.parametrize(
    "module", ["fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "ray"]
)
def test_what_the_server_needs_is_imported_by_the_server_alone(module: str) -> None:
    others = [
        name
        for name, file in modules().items()
        if not name.startswith("orthrus_fast.server.")
        for imported in imported_names(parse(file))
        if imported.split(".")[0] == module
    ]
    assert others == []


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(file: Path) -> Iterator[Function]:
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_triton_kernel(function: Function) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def sources() -> list[Path]:
    folders = ("orthrus_fast", "benchmarks", "scripts")
    return [ROOT / "generate.py", *(p for f in folders for p in sorted((ROOT / f).rglob("*.py")))]


def test_functions_fit_on_a_screen() -> None:
    long = []
    for file in sources():
        for function in functions(file):
            assert function.end_lineno is not None
            begin = function.lineno
            if is_triton_kernel(function):
                begin = function.body[1 if ast.get_docstring(function) else 0].lineno
            n_lines = function.end_lineno - begin + 1
            if n_lines > MOST_LINES:
                long.append(f"{file.relative_to(ROOT)}: {function.name}: {n_lines} lines")
    assert long == []


def n_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def test_files_stay_within_their_limits() -> None:
    sizes = dict.fromkeys(LIMITS, 0)
    for module, file in modules().items():
        part = part_of(module) if "." in module else ""
        if part != "cli":
            sizes[part if part in LIMITS else "the core"] += n_lines(file)
    sizes["model.py"] = n_lines(modules()["orthrus_fast.model"])
    sizes["benchmarks/report.py"] = n_lines(ROOT / "benchmarks" / "report.py")
    assert {name: size for name, size in sizes.items() if size > LIMITS[name]} == {}
