"""The page and the API as a Hugging Face Space, on a free CPU: put this folder into a Space."""

import os
import sys

command = [sys.executable, "-m", "cogvideo", "serve", "--host", "0.0.0.0", "--no-auth"]
command += ["--port", os.environ.get("PORT", "7860"), "--data", os.environ.get("DATA", "/tmp/cogvideo")]
os.execv(sys.executable, [*command, "--max-queue", "50", "--quota", "2", "--keep-days", "1"])
