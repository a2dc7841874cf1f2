"""The server of the app against requests that no page sends."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,  # importing Gradio takes seconds
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
JOIN = "/gradio_api/queue/join"


@contextmanager
def serving(answer: Callable[[float], str], max_size: int = 32) -> Iterator[int]:
    """Serve a slider whose value a function answers; yield the port."""
    import gradio as gr

    from laserlm.web.server import listen, server

    def build() -> gr.Blocks:
        with gr.Blocks(analytics_enabled=False) as blocks:
            slider, text = gr.Slider(0, 10), gr.Textbox()
            slider.input(answer, slider, text, concurrency_limit=1)
        queued: gr.Blocks = blocks.queue(max_size=max_size)
        return queued

    with listen(0) as sock:
        app = server(build)
        thread = threading.Thread(target=app.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield sock.getsockname()[1]
        finally:
            app.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(lambda value: f"it is {int(value)}") as port:
        yield port


def post(port: int, body: str, path: str = JOIN) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", path, body.encode(), {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def event(data: Any, session: str = "s", fn_index: int = 0) -> str:
    return json.dumps({"fn_index": fn_index, "data": data, "session_hash": session})


def output(port: int, session: str) -> str:
    """Return what a page hears of its event."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        response = connection.getresponse()
        lines = iter(response.readline, b"")
        return next(line.decode() for line in lines if b"process_completed" in line)
    finally:
        connection.close()


def begin(port: int, head: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(f"POST {JOIN} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n{head}\r\n\r\n".encode())
    return connection


def test_a_body_that_says_to_be_too_large_is_refused_unread(port: int) -> None:
    with begin(port, "content-length: 200000000") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_without_a_length_is_read_up_to_the_limit(port: int) -> None:
    with begin(port, "transfer-encoding: chunked") as connection:
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(17):
            connection.sendall(chunk)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("body", ['{"data": [NaN]}', '{"data": [-Infinity]}', '{"data": [1e999]}', "[" * 100_000, "{", "\x00"])
def test_what_is_no_json_is_reported_and_raises_nothing(port: int, body: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, text = post(port, body)
    assert status == 400
    assert "the body is no JSON" in json.loads(text)["detail"]
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("data", [["x"], [None], [[]], [{}], [], [10**40], [-1]])
def test_values_that_no_page_sends_get_an_answer(port: int, data: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    session = f"s{abs(hash(json.dumps(data)))}"
    assert post(port, event(data, session))[0] == 200
    assert '"success":false' in output(port, session).replace(" ", "")
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("body", [event([1], fn_index=99), "[]", "null", '{"data": 5}', event([1]).replace("0", '"x"', 1)])
def test_requests_of_another_form_get_an_answer(port: int, body: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert 400 <= post(port, body)[0] < 500
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_plain_request_is_answered(port: int) -> None:
    assert post(port, event([7], "plain"))[0] == 200
    assert "it is 7" in output(port, "plain")


def test_a_full_queue_says_what_to_do() -> None:
    goes_on = threading.Event()
    with serving(lambda value: str(goes_on.wait(20)), max_size=1) as port:
        answers = [post(port, event([1], f"s{i}")) for i in range(8)]
        goes_on.set()
    refused = [text for status, text in answers if status == 503]
    assert refused
    assert {json.loads(text)["detail"] for text in refused} == {
        "too many requests are waiting for this app; try again in a few seconds"
    }
