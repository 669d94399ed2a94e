"""Publishing and downloading with the hub's own client, against a hub of a few lines on this machine."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_serve import free_port

from cogvideo.generate.publish import prepare
from cogvideo.model.folder import ModelError

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: repositories of one commit a branch, files in memory."""

    protocol_version = "HTTP/1.1"
    files: dict[str, dict[str, bytes]] = {}  # by branch
    breaks: list[str] = []  # files of which the next download stops half-way
    damaged: list[str] = []
    gets: list[tuple[str, str | None]] = []

    home = ""

    def log_message(self, *_):
        pass

    def answer(self, value, code=200):
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    @staticmethod
    def branch(name):
        """Of a commit, or of itself."""
        commits = {hashlib.sha1(branch.encode()).hexdigest(): branch for branch in Hub.files}
        return commits.get(name, name)

    @staticmethod
    def row(name, data):
        row = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if name.endswith(".safetensors"):
            sha = hashlib.sha256(data).hexdigest()
            row["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 130}
        return row

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.path == "/api/repos/create":
            return self.answer({"url": f"{self.home}/me/{json.loads(body)['name']}"})
        if "/branch/" in self.path:
            Hub.files.setdefault(self.path.rsplit("/", 1)[1], {})
            return self.answer({})
        if "/preupload/" in self.path:
            rows = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.answer({"files": [row | {"shouldIgnore": False} for row in rows]})
        if "/commit/" in self.path:
            branch = self.path.rsplit("/", 1)[1]
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    content = base64.b64decode(row["value"]["content"])
                    Hub.files.setdefault(branch, {})[row["value"]["path"]] = content
            url = f"{self.home}/me/mine/commit/{COMMIT}"
            return self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self.answer({"errors": [], "warnings": []})

    def do_GET(self, head=False):
        info = re.fullmatch(r"/api/models/me/mine(?:/revision/([^?]+))?(\?.*)?", self.path)
        if info:
            branch = info[1] or "main"
            if branch not in Hub.files:
                return self.answer({"error": "Revision Not Found"}, 404)
            names = [{"rfilename": name} for name in Hub.files[branch]]
            commit = hashlib.sha1(branch.encode()).hexdigest()
            return self.answer(
                {"_id": "1", "id": "me/mine", "sha": commit, "siblings": names, "private": False}
            )
        tree = re.fullmatch(r"/api/models/me/mine/tree/([^/?]+).*", self.path)
        if tree:
            files = Hub.files[self.branch(tree[1])]
            return self.answer([self.row(name, data) for name, data in files.items()])
        file = re.fullmatch(r"/me/mine/resolve/([^/]+)/([^?]+)(\?.*)?", self.path)
        if not file:
            return self.answer({"error": "Not Found"}, 404)
        branch, name = self.branch(file[1]), file[2]
        data = Hub.files.get(branch, {}).get(name)
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        large = name.endswith(".safetensors")
        etag = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(data).hexdigest()
        wanted = self.headers.get("Range")
        first = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        sent = data if name not in Hub.damaged else bytes(len(data))
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", file[1])
        self.send_header("Content-Length", str(len(data) - first))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if head:
            return None
        Hub.gets.append((name, wanted))
        if name in Hub.breaks:
            Hub.breaks.remove(name)
            self.wfile.write(sent[first : len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return None
        self.wfile.write(sent[first:])
        return None

    def do_HEAD(self):
        self.do_GET(head=True)


@pytest.fixture(scope="module")
def hub():
    Hub.files, Hub.breaks, Hub.damaged, Hub.gets = {}, [], [], []
    port = free_port()
    server = ThreadingHTTPServer(("127.0.0.1", port), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.home = f"http://127.0.0.1:{port}"
    yield Hub.home
    server.shutdown()


def call(hub, home, *arguments, token="secret", **more):
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}
    environment.pop("HF_TOKEN", None)
    if token:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-m", "cogvideo", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def pushed(hub, nano, tmp_path_factory):
    """A copy of the nano model on the hub, on two branches."""
    import shutil

    folder = tmp_path_factory.mktemp("push") / "nano"
    shutil.copytree(nano, folder)
    (folder / "secret.txt").write_text("not for others")
    home = tmp_path_factory.mktemp("home")
    done = call(hub, home, "push", folder, "me/mine", "--prompt", "a dog runs to the right")
    assert done.returncode == 0, done.stderr
    done = call(hub, home, "push", folder, "me/mine@small")
    assert done.returncode == 0, done.stderr
    return folder


def generate(hub, home, out, model, **more):
    return call(
        hub, home, "generate", "a dog runs", "--model", model, "-o", out, "--seed", "1", "--quiet", **more
    )


def test_a_pushed_model_has_a_card_and_nothing_private(pushed):
    files = Hub.files["main"]
    assert set(files) >= {"config.json", "text.model", "base.safetensors", "README.md", "strip.webp"}
    assert "secret.txt" not in files and Hub.files["small"].keys() == files.keys()
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: cogvideo\n")
    assert "![frames of a generated video](strip.webp)" in card


def test_a_download_that_breaks_is_taken_up_and_generates_the_same(pushed, hub, tmp_path):
    Hub.breaks.append("base.safetensors")
    Hub.gets.clear()
    done = generate(hub, tmp_path / "home", tmp_path / "a.png", "me/mine")
    assert done.returncode == 0, done.stderr
    assert not Hub.breaks
    ranges = [wanted for name, wanted in Hub.gets if name == "base.safetensors"]
    assert len(ranges) == 2  # again, from the last 10 MB that arrived: here from the start
    here = generate(hub, tmp_path / "home", tmp_path / "b.png", pushed)
    assert here.returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    offline = generate(
        "http://127.0.0.1:9", tmp_path / "home", tmp_path / "c.png", "me/mine", HF_HUB_OFFLINE="1"
    )
    assert offline.returncode == 0, offline.stderr
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_revisions_are_branches(pushed, hub, tmp_path):
    done = generate(hub, tmp_path / "home", tmp_path / "a.png", "me/mine@small")
    assert done.returncode == 0, done.stderr
    wrong = generate(hub, tmp_path / "home", tmp_path / "a.png", "me/mine@none")
    assert wrong.returncode == 2 and "the hub did not give it" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1


def test_a_damaged_download_is_found_by_its_hash(pushed, hub, tmp_path):
    Hub.damaged.append("stage1.safetensors")
    done = generate(hub, tmp_path / "home", tmp_path / "a.png", "me/mine")
    Hub.damaged.clear()
    assert done.returncode == 2
    assert "the download of stage1.safetensors is damaged; delete" in done.stderr


def test_what_cannot_be_published_is_refused_before_the_network(nano, tmp_path):
    with pytest.raises(ValueError, match="owner/name; got 'mine'"):
        prepare(nano, "mine", "mit", None)
    with pytest.raises(ModelError, match="neither a model"):
        prepare(tmp_path, "me/mine", "mit", None)


def test_without_a_token_the_hub_says_what_to_do(pushed, hub, tmp_path):
    done = call(hub, tmp_path, "push", pushed, "me/mine", token=None)
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and len(done.stderr.splitlines()) == 1
