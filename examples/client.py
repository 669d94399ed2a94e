"""A client of cogvideo serve: python examples/client.py [ADDRESS] writes client.mp4.

It needs nothing but the standard library; any client of OpenAI's videos works as well.
"""

import json
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(address + path, data, {"Content-Type": "application/json"})) as answer:
        return answer.read()


video = json.loads(call("/v1/videos", {"prompt": "a dog runs to the right", "seed": 7}))
while video["status"] in ("queued", "in_progress"):
    time.sleep(0.5)
    video = json.loads(call(f"/v1/videos/{video['id']}"))
    print(f"{video['status']} {video['progress']} %")
if video["status"] == "failed":
    sys.exit(video["error"]["message"])
Path("client.mp4").write_bytes(call(f"/v1/videos/{video['id']}/content"))
