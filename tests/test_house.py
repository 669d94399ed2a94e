"""Who may import whom. A room may import the levels below its own, never its own level or one above, its own
folder apart."""

import ast
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "cogvideo"
LEVELS = [
    {"files", "hardware", "progress"},
    {"layout", "draft", "text", "vqvae", "video", "sampling", "foreign"},
    {"model", "data", "eval", "prompts"},
    {"weights", "generate", "presets", "estimate"},
    {"parts"},
    {"direct"},
    {"train", "pipeline", "convert"},
    {"preview"},
    {"cli"},
    {"__main__"},
]
LIBRARIES = {
    "av": "video",
    "sentencepiece": "text",
    "safetensors": "weights",
    "tyro": "cli",
    "rich": "progress",
    "tokenizers": "text",
    "huggingface_hub": "weights",
}  # an outside library has one room
ROOMS = sorted(HOUSE.rglob("*.py"))


def level(room: str) -> int:
    return next(i for i, rooms in enumerate(LEVELS) if room in rooms)


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
            names.extend(
                [node.module] if node.module != "cogvideo" else [f"cogvideo.{a.name}" for a in node.names]
            )
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
            assert other == mine and len(parts) > 1 or level(other) < level(mine), f"{mine} imports {name}"


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: str(p.relative_to(HOUSE)))
def test_an_outside_library_has_one_room(path):
    mine = path.relative_to(HOUSE).with_suffix("").parts[0]
    for name in imports(path):
        assert LIBRARIES.get(name.split(".")[0], mine) == mine, f"{mine} imports {name}"


def test_the_model_knows_no_data_training_or_processes():
    for path in (HOUSE / "model").glob("*.py"):
        for name in imports(path):
            assert not name.startswith(
                ("torch.distributed", "cogvideo.data", "cogvideo.train", "cogvideo.sampling")
            )


def test_no_drawers():
    assert not {path.stem for path in ROOMS} & {"utils", "common", "base", "builders", "helpers", "misc"}
