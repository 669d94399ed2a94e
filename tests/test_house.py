"""Who may import whom. A room may import the floors below its own and its own wing, never one above."""

import ast
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "cogvideo"
FLOORS = [
    {"cluster", "files", "hardware", "layout", "limits", "progress", "stopping", "text", "video"},
    {"model"},
    {"convert", "data"},
    {"generate"},
    {"train"},
    {"eval"},
    {"serve"},
    {"cli"},
    {"__main__"},
]
LIBRARIES = {
    "av": "video",
    "sentencepiece": "text",
    "safetensors": "model.folder",
    "tyro": "cli.parsing",
    "rich": "progress",
    "ray": "cluster",
    "tokenizers": "text",
    "huggingface_hub": "model.hub",
    "sqlalchemy": "serve.jobs",
    "fsspec": "serve.results",
    "prometheus_client": "serve.statistics",
}  # an outside library has one room
GROUND = FLOORS[0]
ROOMS = sorted(HOUSE.rglob("*.py"))


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def is_room(name: str) -> bool:
    """Whether a dotted name is a file or folder of the house."""
    place = HOUSE.parent.joinpath(*name.split("."))
    return place.is_relative_to(HOUSE) and (place.is_dir() or place.with_suffix(".py").exists())


def imports(path: Path) -> list[str]:
    """Dotted names of all modules a file imports, inside functions as well, but not for type checking
    only."""
    names = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.append(inner if is_room(inner) else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: str(p.relative_to(HOUSE)))
def test_imports_go_down(path):
    parts = path.relative_to(HOUSE).with_suffix("").parts
    if parts == ("__init__",):
        return  # the front door names what is behind it
    mine = parts[0]
    for name in imports(path):
        if name.startswith("cogvideo."):
            other = name.split(".")[1]
            inside = other == mine and len(parts) > 1
            assert inside or floor(other) < floor(mine) or mine in GROUND, f"{mine} imports {name}"
            assert mine not in GROUND or other in GROUND, f"{mine} imports {name}"


def test_no_circles():
    """No room reaches itself by its imports."""
    arrows = {}
    for path in ROOMS:
        room = ".".join(path.relative_to(HOUSE.parent).with_suffix("").parts).removesuffix(".__init__")
        arrows[room] = {name for name in imports(path) if name.startswith("cogvideo.")}

    def reached(room: str, seen: set[str]) -> set[str]:
        for other in arrows.get(room, set()) - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    for room in arrows:
        if room != "cogvideo":
            assert room not in reached(room, set()), f"{room} imports itself"


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: str(p.relative_to(HOUSE)))
def test_an_outside_library_has_one_room(path):
    mine = ".".join(path.relative_to(HOUSE).with_suffix("").parts)
    for name in imports(path):
        assert LIBRARIES.get(name.split(".")[0], mine) == mine, f"{mine} imports {name}"


def test_the_model_knows_no_data_sampling_or_processes():
    for path in (HOUSE / "model").glob("*.py"):
        for name in imports(path):
            assert not name.startswith(("torch.distributed", "cogvideo.data", "cogvideo.generate"))


def test_every_wing_says_what_it_is_for():
    """Its first file names each of its rooms."""
    for wing in HOUSE.iterdir():
        if (wing / "__init__.py").exists() and wing.name != "gpt2":
            words = (wing / "__init__.py").read_text().split()
            rooms = {path.stem for path in wing.glob("*.py")} - {"__init__"}
            assert rooms <= set(words), f"{wing.name} does not name {rooms - set(words)}"


def test_no_drawers():
    assert not {path.stem for path in ROOMS} & {"utils", "common", "base", "builders", "helpers", "misc"}


def test_the_tree_in_contributing_has_a_line_for_every_room():
    text = (HOUSE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.partition("    cogvideo/\n")[2].partition("    scripts/")[0]
    folders: list[str] = []
    named = set()
    for line in tree.splitlines():
        name, _, purpose = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2 - 3  # the first level is indented by 6
        folders = [*folders[:depth], name.rstrip("/")]
        assert purpose.strip(), f"{name} has no purpose"
        if name.endswith(".py"):
            named.add("/".join(folders))
    assert named == {str(path.relative_to(HOUSE)) for path in ROOMS if not path.stem.startswith("__")}
