"""A real HTTP server that answers as an OpenAI-compatible one does, well or badly."""

import json
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Bad:
    """An answer that is none.

    Args:
        status: of the response.
        body: sent as it is; `{key}` becomes the key that the client sent.
        headers: further ones.
        delay: seconds before anything is sent.
        drip: seconds between bytes.
        cut: bytes that are promised but do not come.
    """

    status: int = 200
    body: str = ""
    headers: dict = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0
    cut: int = 0


def completion(content, *, finish_reason="stop", usage=True):
    """The body of an answer."""
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
    answer["choices"][0]["finish_reason"] = finish_reason
    return json.dumps(answer | ({"usage": {"total_tokens": 10}} if usage else {}))


@dataclass
class FakeServer:
    url: str
    requests: list = field(default_factory=list)
    keys: list = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0


@contextmanager
def fake_server(behave):
    """Serve `behave(number, request)`: a text, or a `Bad`; requests are counted from 0."""
    lock = threading.Lock()
    server = FakeServer("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.requests)
                server.requests.append(request)
                server.keys.append(self.headers.get("Authorization", "").removeprefix("Bearer "))
                server.in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.in_flight)
            try:
                answer = behave(number, request)
            finally:
                with lock:  # before the client hears of it and sends the next
                    server.in_flight -= 1
            with suppress(OSError):  # the client has gone
                self._send(answer if isinstance(answer, Bad) else Bad(body=completion(answer)), server.keys[number])

        def _send(self, bad, key):
            time.sleep(bad.delay)
            body = bad.body.replace("{key}", key).encode()
            self.send_response(bad.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body) + bad.cut))
            for name, value in bad.headers.items():
                self.send_header(name, value)
            self.end_headers()
            for place in range(0, len(body), 1 if bad.drip else len(body)):
                self.wfile.write(body[place:] if not bad.drip else body[place : place + 1])
                self.wfile.flush()
                time.sleep(bad.drip)
            self.close_connection = True

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.block_on_close = False
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
