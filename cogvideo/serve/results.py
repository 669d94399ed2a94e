"""Where videos, drafts and uploads lie: a folder, or any URL of fsspec (s3://, gs://, sftp:// ...).

    ID/input.npz            frames of the client, decoded
    ID/draft.npz            tokens after the last finished phase
    ID/video-0.mp4          and thumbnail-0.webp, spritesheet-0.webp, animation-0.gif

A file appears under its name when it is complete.
"""

import mimetypes
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

VARIANTS = {  # of a result
    "video": "video-{}.mp4",
    "thumbnail": "thumbnail-{}.webp",
    "spritesheet": "spritesheet-{}.webp",
    "gif": "animation-{}.gif",
}
CHUNK = 256 * 1024  # bytes


@dataclass(frozen=True)
class Stored:
    """A file of the results."""

    path: str
    size: int

    @property
    def media_type(self) -> str:
        return mimetypes.guess_type(self.path)[0] or "application/octet-stream"


class Results:
    """Files of jobs, by the job's name and their own; both come from the program, never from a request."""

    def __init__(self, url: str):
        self.url = url
        self._files: Any
        try:
            self._files, self._root = fsspec.core.url_to_fs(url, auto_mkdir=True)
        except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is missing
            raise ValueError(f"results cannot be kept at {url}: {error}") from None

    def _path(self, id: str, name: str) -> str:
        assert id.isidentifier() and "/" not in name
        return f"{self._root}/{id}/{name}"

    def put(self, id: str, name: str, data: bytes) -> None:
        path = self._path(id, name)
        part = f"{path}.{secrets.token_hex(4)}.part"
        try:
            with self._files.open(part, "wb") as stream:
                stream.write(data)
            if isinstance(self._files, fsspec.implementations.local.LocalFileSystem):
                Path(part).replace(path)
            else:
                self._files.mv(part, path)
        except BaseException:
            if self._files.exists(part):
                self._files.rm(part)
            raise

    def get(self, id: str, name: str) -> bytes | None:
        path = self._path(id, name)
        if not self._files.exists(path):
            return None
        data: bytes = self._files.cat_file(path)
        return data

    def find(self, id: str, name: str) -> Stored | None:
        path = self._path(id, name)
        if not self._files.exists(path):
            return None
        return Stored(path, int(self._files.size(path)))

    def read(self, stored: Stored, first: int, count: int) -> Iterator[bytes]:
        """`count` bytes from byte `first` on, in chunks."""
        with self._files.open(stored.path, "rb") as stream:
            stream.seek(first)
            while count > 0:
                chunk = stream.read(min(CHUNK, count))
                if not chunk:
                    return
                count -= len(chunk)
                yield chunk

    def remove(self, id: str) -> None:
        """All files of a job."""
        folder = f"{self._root}/{id}"
        if self._files.exists(folder):
            self._files.rm(folder, recursive=True)

    def ids(self) -> list[str]:
        """The names of all jobs that have files."""
        if not self._files.exists(self._root):
            return []
        return [Path(path).name for path in self._files.ls(self._root, detail=False)]
