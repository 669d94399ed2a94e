"""Models and adapters on the Hugging Face hub: downloads and uploads.

Downloads go to the hub's cache. Cached files need no network, and an interrupted download resumes. Large
files are checked once against the SHA-256 that the hub names for them.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cogvideo.files import file_digest

HUB_ID = r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?"  # owner/name, and a branch, tag or commit but for the newest
MODEL_FILES = ("*.json", "*.safetensors", "text.model", "*.npy", "README.md", "*.webp")


class HubError(ValueError):
    """The hub did not give or take something; the message says what and why."""


def is_hub_id(name: str | Path) -> bool:
    """Whether a name is that of a repository, and not of a folder on this machine, or of one inside it."""
    return re.fullmatch(HUB_ID, str(name), re.ASCII) is not None and not Path(name).parent.exists()


def download(name: str, files: Sequence[str]) -> Path:
    """The folder in the cache with files of a repository, owner/name or owner/name@revision. HubError if they
    cannot be had, or if one is damaged."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = name.partition("@")
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise HubError(f"{name} is no folder here, and the hub did not give it: {why}") from None
    except Exception as error:  # of the hub's client, of its HTTP library, of the network and of the disk
        why = getattr(error, "strerror", None) or "it cannot be reached"
        raise HubError(f"{name} is no folder here, and the hub did not give it: {why}") from None
    for file in folder.iterdir():
        check_download(file)
    return folder


def check_download(file: Path) -> None:
    """Compare a large file of the cache with its SHA-256, which is the name of what it links to; once for
    each version of the file. HubError if they differ."""
    blob = file.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return  # small files are named by git
    stat = blob.stat()
    mark = blob.with_name(f"{blob.name}.checked")
    now = f"{stat.st_size} {stat.st_mtime_ns}"
    if mark.exists() and mark.read_text() == now:
        return
    if file_digest(blob) != blob.name:
        raise HubError(f"the download of {file.name} is damaged; delete {blob} and try again")
    with suppress(OSError):  # of a cache that cannot be written
        mark.write_text(now)


def upload(folder: Path, name: str, files: Sequence[str], private: bool, message: str) -> str:
    """Put files of a folder into a repository, which is created if there is none; return its address.
    HubError if the hub refuses."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise HubError("the hub does not know who you are; set HF_TOKEN, or run hf auth login")
    repository, _, revision = name.partition("@")
    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(files),
            revision=revision or None,
            commit_message=message,
        )
    except (HfHubHTTPError, OSError) as error:
        raise HubError(f"the hub did not take {name}: {str(error).splitlines()[0]}") from None
    return str(made)
