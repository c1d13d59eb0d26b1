"""As much of vLLM's HTTP API as the engine uses, without a model; started like vLLM, as a program.

    fake_vllm.py -m vllm.entrypoints.cli.main serve BASE --port N ...

What it answers tells the adapter: token 1000 + its number, over and over. The first id of a prompt
may ask for trouble. Needs nothing but the standard library, and starts in a blink.
"""

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DIES, FAILS, IS_SLOW, BREAKS_OFF, REFUSES = 1, 2, 3, 4, 5
"""First ids of prompts."""

loaded: dict[str, str] = {}
calls: list[list[Any]] = []


def option(name: str, default: str = "") -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, fields: Any) -> None:
        body = fields.encode() if isinstance(fields, str) else json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def is_allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {os.environ['VLLM_API_KEY']}"

    def do_GET(self) -> None:
        match self.path:
            case "/health":
                self.reply(200, "")
            case "/version":
                self.reply(200, {"version": "0.0-fake"})
            case "/calls":
                self.reply(200, calls)
            case "/metrics":
                name = '{engine="0",model_name="base"}'
                size = 'vllm:cache_config_info{block_size="16",kv_cache_size_tokens="4096"} 1.0'
                self.reply(200, f"vllm:num_requests_waiting{name} 0.0\n{size}\n"
                                f"vllm:kv_cache_usage_perc{name} 0.25\n")  # fmt: skip
            case _ if not self.is_allowed():
                self.reply(401, {"error": "Unauthorized"})
            case "/v1/models":
                cards = [{"id": "base", "root": "x", "parent": None, "max_model_len": 256}]
                cards += [{"id": n, "root": r, "parent": "base"} for n, r in loaded.items()]
                self.reply(200, {"data": cards})

    def do_POST(self) -> None:
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        calls.append([self.path, fields])
        if not self.is_allowed() and self.path.startswith("/v1"):
            self.reply(401, {"error": "Unauthorized"})
            return
        match self.path:
            case "/v1/load_lora_adapter":
                self.load(fields["lora_name"], fields["lora_path"])
            case "/v1/unload_lora_adapter":
                known = loaded.pop(fields["lora_name"], None)
                time.sleep(0.2 * fields["lora_name"].startswith("slow"))
                self.reply(200 if known else 404, "")
            case "/v1/completions":
                self.complete(fields)
            case _:
                self.reply(404, "")

    def load(self, name: str, path: str) -> None:
        if name.startswith("large"):
            self.reply(400, {"error": {"message": "CUDA out of memory. Tried to allocate"}})
            return
        if name in loaded or not Path(path, "adapter_model.safetensors").is_file():
            self.reply(400, {"error": {"message": f"cannot load from {path}"}})
            return
        loaded[name] = path
        self.reply(200, "")

    def complete(self, fields: Any) -> None:
        first, model = fields["prompt"][0], fields["model"]
        if model != "base" and model not in loaded:
            self.reply(404, {"error": {"message": "no such model"}})
            return
        if first == REFUSES:
            self.reply(400, {"error": {"message": "prompt is not liked"}})
            return
        token = 1000 + ([*loaded].index(model) + 1 if model in loaded else 0)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fields.get("structured_outputs") == {"regex": "(fails"}:
            self.event({"error": {"message": "Internal server error", "code": 500}})
            self.chunk(b"")
            return
        for number in range(fields["max_tokens"]):
            is_last = number + 1 == fields["max_tokens"]
            choice = {
                "text": "x",
                "token_ids": [token],
                "finish_reason": "length" * is_last or None,
            }
            if fields.get("logprobs") is not None:
                top = {f"token_id:{token - i}": -0.5 - i for i in range(fields["logprobs"] + 1)}
                choice["logprobs"] = {"tokens": [f"token_id:{token}"], "token_logprobs": [-0.5],
                                      "top_logprobs": [top]}  # fmt: skip
            self.event({"choices": [choice]})
            if number == 2 and first == DIES:
                os._exit(9)
            if number == 2 and first in (FAILS, BREAKS_OFF):
                if first == FAILS:
                    self.event({"error": {"message": "out of luck", "code": 500}})
                self.chunk(b"")
                return
            time.sleep(0.05 if first == IS_SLOW else 0.0)
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def event(self, fields: Any) -> None:
        self.chunk(b"data: " + json.dumps(fields).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


if __name__ == "__main__":
    if os.environ.get("FAKE_VLLM_FAILS"):
        sys.exit("RuntimeError: no room for the model")
    # a process that would outlive its parent, as vLLM's engine does
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
