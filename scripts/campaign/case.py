"""A command with something bad in it, and what its error must say."""

import base64
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """`files` are written into the working directory first, in place of what is there."""

    arguments: list[str]
    names: list[str] = field(default_factory=list)  # of which an error must have one; none: any error will do
    wrong: bool = False  # whether an exit without an error is a defect
    files: dict[str, bytes] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    writes_elsewhere: bool = False  # whether the command itself says where it writes

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        files = {name: base64.b85encode(data).decode() for name, data in self.files.items()}
        return asdict(self) | {"files": files}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Case":
        files = {name: base64.b85decode(text) for name, text in values["files"].items()}
        return cls(**{**values, "files": files})
