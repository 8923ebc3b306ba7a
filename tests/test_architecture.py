"""The walls of the house: imports run downward, _core has one importer, and nothing names a place outside."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lit_fast"

# Rooms from the top to the bottom, as docs/architecture.md has them; a room imports its own floor and below.
FLOORS = [
    "cli compat pytorch",
    "demos models",
    "trainer",
    "attributes",
    "runtime attach",
    "defaults evaluation prediction loop schedule loop_views trackers model_checks connectors interrupts "
    "profiled trial",
    "step plan binding stepping window calls",  # the plan picks one of two step shapes; a step reads its plan
    "module core_hooks precision strategies metrics log_rules log_slots log_sync backward callbacks loggers "
    "checkpoint data profiler config seed hparams export tuner model_summary accelerators flags",
    "optim distributed",
    "ops flat flat_by_torch phase_clock triton",  # triton: kernels; ops hands them what the core has collected
    "_core",
    "rank_zero not_built",
    "errors hooks states progress lazy",
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path, *, at_import_time: bool = False) -> Iterator[str]:
    """Modules of lit_fast that a file imports, in functions too, but never those under TYPE_CHECKING."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo += node.orelse
            continue
        if at_import_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "lit_fast")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide which room is meant"
            if (node.module or "").partition(".")[0] == "lit_fast":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield whole if whole in MODULES or whole == "lit_fast._core" else str(node.module)
        todo += ast.iter_child_nodes(node)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_file_stands_on_a_floor() -> None:
    unknown = {room(name) for name in MODULES} - {""} - set(FLOOR)
    assert not unknown, f"put {sorted(unknown)} on a floor here and in docs/architecture.md"


def test_the_page_has_the_same_floors() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    plan = page.partition("Imports run downward only")[2].partition("## ")[0]
    floors: list[set[str]] = []
    for number, rooms in re.findall(r"^    ([ 0-9]{2})  (\w.*?)  ", plan, re.MULTILINE):
        if number.strip():
            floors.append(set())
        floors[-1] |= set(rooms.split(", "))
    assert floors == [set(rooms.split()) for rooms in FLOORS if rooms != "_core"]
    assert set(FLOOR) - {"_core"} == {room(name) for name in MODULES} - {""}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name)])
def test_imports_run_downward(name: str) -> None:
    upward = [
        other
        for other in imports(MODULES[name])
        if room(other) and FLOOR.get(room(other), len(FLOORS)) < FLOOR[room(name)]
    ]
    assert not upward, f"{name} imports {upward}, which stand above it"


def test_no_circle_of_imports() -> None:
    graph = {name: set(imports(path, at_import_time=True)) & set(MODULES) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            # A package that re-exports and its own files are one thing to a reader.
            circle = trail[trail.index(name) :]
            assert len({room(m) for m in circle}) == 1, f"circle: {' -> '.join((*circle, name))}"
            return
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_ops_imports_the_extension() -> None:
    users = [name for name, path in MODULES.items() if "lit_fast._core" in set(imports(path))]
    assert sorted(users) == ["lit_fast.flat", "lit_fast.ops", "lit_fast.phase_clock"]


def test_the_package_itself_imports_nothing() -> None:
    assert list(imports(PACKAGE / "__init__.py", at_import_time=True)) == []


def test_the_extension_links_no_libtorch_and_no_openmp() -> None:
    import lit_fast._core as core

    binary = Path(core.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libgomp.so"):
        needed = re.findall(rb"\x00(" + library + rb"[\w.-]*\.so[\w.]*)\x00", binary)
        linked = [n for n in needed if n in dynamic_section(binary)]
        assert not linked, linked


def dynamic_section(binary: bytes) -> set[bytes]:
    """Names of the libraries that an ELF file needs (DT_NEEDED of its dynamic section)."""
    import struct

    assert binary[:4] == b"\x7fELF" and binary[4] == 2, "a 64-bit ELF file"
    (offset,) = struct.unpack_from("<Q", binary, 40)
    size, count = struct.unpack_from("<HH", binary, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", binary, offset + i * size) for i in range(count)]
    dynamic = next(s for s in sections if s[1] == 6)
    strings = sections[dynamic[6]][4]
    needed = set()
    for at in range(dynamic[4], dynamic[4] + dynamic[5], 16):
        tag, value = struct.unpack_from("<qQ", binary, at)
        if tag == 1:
            start = strings + value
            needed.add(binary[start : binary.index(b"\x00", start)])
    return needed


def test_every_dependency_is_pinned() -> None:
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*metadata["build-system"]["requires"], *metadata["project"]["dependencies"]]
    wanted += [line for lines in metadata["project"]["optional-dependencies"].values() for line in lines]
    names = {re.split(r"[\[>=<;! ]", line)[0].lower().replace("_", "-") for line in wanted} - {"lit-fast"}
    pinned = set()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            version = r"[0-9.]+(?:b[0-9]+)?"
            found = re.fullmatch(rf'([a-z0-9-]+)=={version}(; python_version (<|>=) "3\.11")?(; platform_.*)?', line)
            assert found, f"not a pin: {line!r}"
            pinned.add(found[1])
    # deepspeed is built against the torch there is.
    assert names - pinned <= {"deepspeed"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 600, f"{len(lines)} lines: split by the question that a reader would ask"
