"""The local app in a browser: what it shows, that it keeps users apart, and that nothing leaves the machine."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build as make_model
from playwright.sync_api import Browser, Locator, Page, expect

from laserlm.models import LanguageModel
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.store import Store
from laserlm.tasks import Example
from laserlm.web.app import PROMPTS, build, stylesheet
from laserlm.web.board import board_rows
from laserlm.web.playground import Variants, answer
from laserlm.web.server import listen, server

pytestmark = [
    pytest.mark.browser,
    # Gradio sums up its queue in ways of an older pandas.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
HOSTILE = (
    "</td></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`${alert(3)}{{value}} *b* [l](javascript:alert(4))"
)
ASKED = "<img src=x onerror=alert(5)>"
"""Short enough for the model."""
EXAMPLES = [Example(f"e{i}", f"Question {i} {ASKED} is", f"answer {i} {HOSTILE}") for i in range(6)]
BEST = "0.fc_in@0.5"
TRIALS = {
    "": ("01", 2.0),
    BEST: ("124", 1.0),
    "0.fc_in@0.1": ("", 3.0),
    "0.v_proj@0.1": ("0", 2.25),
    "2.v_proj@0.1": ("01", 2.5),
}
"""Of each intervention, the places of the correct examples and the loss."""
ON_GUARD = {"": 2.0, "0.fc_in@0.1": 2.25}
"""Of the interventions whose harm was measured, the loss on the guard."""


def evaluation(text: str, split: str) -> Evaluation:
    right, loss = TRIALS[text]
    model = text or "base"
    scores = tuple(
        ExampleScore(e.id, str(i) in right, -loss, 1, f"{model} says {HOSTILE}", e.answer) for i, e in enumerate(EXAMPLES)
    )
    return Evaluation(HOSTILE, HOSTILE, split, "answer", text, scores, 1.0)


def record(store: Store) -> str:
    settings = {"model": HOSTILE, "task": HOSTILE, "guards": [{"name": HOSTILE, "hash": ""}]}
    with store.run(kind="search", key="k", settings=settings, provenance={}) as run:
        for text in TRIALS:
            run.record(evaluation(text, "validation"), EXAMPLES)
        for text in ("", BEST):
            run.record(evaluation(text, "test"), EXAMPLES)
        for text, loss in ON_GUARD.items():
            scores = [replace(score, logprob=-loss) for score in evaluation(text, "").scores]
            run.record(replace(evaluation(text, "guard 0 choosing"), scores=tuple(scores)), EXAMPLES)
        run.finish({"best": BEST, "test": {"base": 2 / 6, "best": 0.5, "gain": 1 / 6, "interval": [-0.2, 0.5], "n": 6}})
    return run.id


@dataclass
class Served:
    """The app while it is served."""

    url: str
    lm: LanguageModel
    store: Store
    run: str
    connected: list[Any]

    @property
    def port(self) -> int:
        return int(self.url.rstrip("/").rpartition(":")[2])


@dataclass
class Visit:
    """One user's page, and what happened on it."""

    page: Page
    requests: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def side(self, number: int) -> Locator:
        return self.page.locator(f"#side-{number}")

    def ask(self, text: str) -> None:
        """Ask for a reduction, and wait until what is shown answers it."""
        self.page.get_by_label("Or reductions as text").fill(text)
        self.page.get_by_role("button", name="Answer").click()
        expect(self.side(1).locator("p").first).to_have_text(text)

    def shown(self) -> list[tuple[str, list[str]]]:
        """Return the texts and the rows of likeliest tokens that are shown."""
        sides = [self.side(i) for i in range(3)]
        return [(s.locator(".laser-text").inner_text(), s.locator("tbody tr").all_inner_texts()) for s in sides]


def expected(sides: Variants, prompt: str) -> list[tuple[str, list[str]]]:
    return [(prompt + s.text, [f"{t!r}\t{p:.1%}" for t, p in s.top]) for s in sides]


@contextmanager
def serving(lm: LanguageModel, folder: Path, *, recorded: bool) -> Iterator[Served]:
    """Serve the app with an empty database, or with one that holds a search."""
    lm.cache = folder
    connected: list[Any] = []
    connect = socket.socket.connect

    def noted(self: socket.socket, address: Any) -> None:
        connected.append(address)
        connect(self, address)

    with Store.open(folder / "runs.db") as store, listen(0) as sock, pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", noted)
        run = record(store) if recorded else ""
        app = server(lambda: build(store, lm), stylesheet())
        thread = threading.Thread(target=app.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{sock.getsockname()[1]}/", lm, store, run, connected)
        finally:
            app.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    lm = make_model("llama")
    lm.name = HOSTILE
    lm.require_tokenizer().chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    with serving(lm, tmp_path_factory.mktemp("app"), recorded=True) as server:
        yield server


@pytest.fixture
def visit(served: Served, browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Open the app as a new user; at the end nothing may have been asked of another machine, and nothing gone wrong."""
    expect.set_options(timeout=60_000)
    contexts = []
    visits: list[Visit] = []

    def open_(url: str = served.url, **options: Any) -> Visit:
        contexts.append(browser.new_context(**options))
        user = Visit(contexts[-1].new_page())
        visits.append(user)
        user.page.set_default_timeout(60_000)
        user.page.on("request", lambda r: user.requests.append(r.url))
        user.page.on("console", lambda m: user.log.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
        user.page.on("pageerror", lambda e: user.log.append(str(e)))
        user.page.on("dialog", lambda d: (user.log.append(f"dialog: {d.message}"), d.dismiss()))
        user.page.goto(url)
        user.page.get_by_role("tab", name="Leaderboard").wait_for()
        return user

    yield open_
    for context in contexts:
        context.close()
    for user in visits:
        assert user.requests
        assert all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in user.requests)
        assert user.log == []
    assert all(address[0] in ("127.0.0.1", "::1") for address in served.connected if isinstance(address, tuple))


def test_the_tabs_are_there_and_the_leaderboard_can_be_searched(visit: Callable[..., Visit], served: Served) -> None:
    user = visit()
    assert user.page.get_by_role("tab").all_inner_texts() == ["Leaderboard", "Explorer", "Playground", "Chat", "Examples"]
    rows = user.page.locator("#board tbody tr")
    expect(rows.first).to_contain_text(f"run {served.run}")
    assert rows.first.locator("td").all_inner_texts()[3:6] == ["33.3%", "50.0%", "+16.7 [-20.0, +50.0]"]
    assert rows.count() > 20
    user.page.get_by_label("Find a row").fill("GPT-J fever")
    fitting = [row for row in board_rows(served.store) if "gpt-j" in row.model and row.task == "fever"]
    expect(rows).to_have_count(len(fitting))
    expect(rows.first).to_contain_text("gpt-j-6b")


def test_the_playground_answers_as_the_model_does(visit: Callable[..., Visit]) -> None:
    user = visit()
    user.tab("Playground")
    expect(user.page.get_by_label("Or reductions as text")).to_have_value(BEST)  # of the latest search
    user.page.get_by_role("button", name="Answer").click()
    expect(user.side(2).locator("tbody tr")).to_have_count(5)
    alone = answer(make_model("llama"), PROMPTS[0], BEST, 8)
    assert user.shown() == expected(alone, PROMPTS[0])
    # A slider that is moved asks by itself, and empties the text.
    user.page.get_by_role("slider", name="Kept fraction").press("ArrowRight")
    expect(user.side(1).locator("p").first).to_have_text("2.fc_out@0.105")
    expect(user.page.get_by_label("Or reductions as text")).to_have_value("")
    # Text goes before the sliders.
    user.ask("1.fc_in@0.2+2.v_proj@r3")
    assert user.shown() == expected(answer(make_model("llama"), PROMPTS[0], "1.fc_in@0.2+2.v_proj@r3", 8), PROMPTS[0])


def test_a_chat_goes_on_in_two_conversations(visit: Callable[..., Visit], served: Served) -> None:
    user = visit()
    user.tab("Chat")
    sides = [user.page.locator(f"#chat-{name} .laser-turn") for name in ("base", "edited")]
    for turns in (2, 4):
        user.page.get_by_label("Message").fill(ASKED)
        user.page.get_by_role("button", name="Send").click()
        for side in sides:
            expect(side).to_have_count(turns)
            expect(side.nth(turns - 2)).to_have_text(f"user {ASKED}")
    user.page.get_by_role("button", name="New conversation").click()
    for side in sides:
        expect(side).to_have_count(0)
    user.page.get_by_role("button", name="Send").click()
    expect(user.page.get_by_role("alert").filter(has_text="must end with a message")).to_be_visible()


def test_what_cannot_be_answered_is_reported_as_text(visit: Callable[..., Visit]) -> None:
    user = visit()
    user.tab("Playground")
    for text, problem in ((HOSTILE, "cannot read the reduction"), ("7.fc_in@0.5", "no layer 7")):
        user.page.get_by_label("Or reductions as text").fill(text)
        user.page.get_by_role("button", name="Answer").click()
        expect(user.page.get_by_role("alert").filter(has_text=problem)).to_be_visible()
    user.ask("1.fc_in@0.5")
    expect(user.page.get_by_role("alert")).to_have_count(0)


def test_a_cell_of_the_map_shows_what_its_candidate_changed(visit: Callable[..., Visit]) -> None:
    user = visit()
    user.tab("Explorer")
    cells = user.page.locator(".laser-map button")
    expect(cells).to_have_text(["+0.250", "-1.000", "+0.500"])
    cells.nth(1).click()
    changes = user.page.locator("#changes")
    expect(changes.locator("h3").first).to_have_text(BEST)
    expect(changes).to_contain_text("33.3% before, 50.0% after")
    expect(changes).to_contain_text("+16.7 points")
    corrected, broken = changes.locator("table").nth(1), changes.locator("table").nth(2)
    expect(corrected.locator("tbody tr")).to_have_count(2)
    expect(broken.locator("tbody tr")).to_have_count(1)
    expect(changes.locator("details")).to_contain_text(f" {ASKED} is")  # the end of all prompts
    for place, cell in enumerate(("Question 0 …", EXAMPLES[0].answer, f"base says {HOSTILE}", f"{BEST} says {HOSTILE}")):
        expect(broken.locator("td").nth(place)).to_have_text(cell)
    # By the keyboard: the map is one stop, within which arrows move.
    assert cells.evaluate_all("all => all.map(b => b.tabIndex)") == [0, -1, -1]
    for key in ("ArrowDown", "ArrowRight", "ArrowLeft", "ArrowDown"):  # there is no cell at the first two places
        user.page.keyboard.press(key)
    expect(cells.nth(2)).to_be_focused()
    assert cells.evaluate_all("all => all.map(b => b.tabIndex)") == [-1, -1, 0]
    user.page.keyboard.press("Enter")
    expect(changes.locator("h3").first).to_have_text("2.v_proj@0.1")
    assert cells.evaluate_all("all => all.map(b => b.ariaPressed)") == ["false", "false", "true"]


def test_sizes_and_candidates_are_chosen_next_to_the_map(visit: Callable[..., Visit]) -> None:
    user = visit()
    user.tab("Explorer")
    cells = user.page.locator(".laser-map button")
    expect(cells).to_have_text(["+0.250", "-1.000", "+0.500"])
    user.page.get_by_label("Size").click()
    user.page.get_by_role("option", name="0.1", exact=True).click()
    expect(cells).to_have_text(["+0.250", "+1.000", "+0.500"])
    user.page.get_by_label("Candidate").click()
    user.page.get_by_role("option", name="2.v_proj@0.1").click()
    expect(user.page.locator("#changes h3").first).to_have_text("2.v_proj@0.1")
    expect(user.page.locator("#changes")).to_contain_text("Corrected (0)")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_map_is_coloured_by_harm_where_it_was_measured(width: int, visit: Callable[..., Visit]) -> None:
    user = visit()
    user.page.set_viewport_size({"width": width, "height": 900})
    user.tab("Explorer")
    cells = user.page.locator(".laser-map button")
    expect(cells).to_have_text(["+0.250", "-1.000", "+0.500"])
    user.page.get_by_label("harm", exact=True).check()
    expect(cells).to_have_text(["+0.250"])
    expect(user.page.locator(".laser-soft", has_text="Harm: rise")).to_contain_text("measured for 1 of 4 reductions")
    cells.first.click()
    expect(user.page.locator("#changes h3").first).to_have_text("0.fc_in@0.1")
    user.page.get_by_label("change of loss", exact=True).check()
    expect(cells).to_have_text(["+0.250", "-1.000", "+0.500"])
    assert user.page.evaluate("document.documentElement.scrollWidth") <= width


def test_examples_fill_the_playground(visit: Callable[..., Visit]) -> None:
    user = visit()
    user.tab("Examples")
    user.page.get_by_role("button", name=PROMPTS[1]).click()
    expect(user.page.get_by_label("Prompt")).to_have_value(PROMPTS[1])
    expect(user.side(0).locator(".laser-text")).to_contain_text(PROMPTS[1])
    user.tab("Examples")
    questions = user.page.locator(".laser-list button", has_text="Question")
    expect(questions).to_have_count(2)
    questions.first.click()
    expect(user.page.get_by_label("Prompt")).to_have_value(EXAMPLES[2].prompt)
    expect(user.page.get_by_label("Or reductions as text")).to_have_value(BEST)
    expect(user.side(1).locator("p").first).to_have_text(BEST)


def test_hostile_strings_are_text_everywhere(visit: Callable[..., Visit], served: Served) -> None:
    user = visit()
    page = user.page
    expect(page.locator("b").first).to_have_text(HOSTILE)
    expect(page.locator("#board td").filter(has_text=HOSTILE[:40]).first).to_contain_text(HOSTILE)
    user.tab("Explorer")
    assert HOSTILE in page.get_by_label("Search", exact=True).input_value()
    page.get_by_label("Search", exact=True).click()
    expect(page.get_by_role("option").first).to_contain_text(HOSTILE)
    page.keyboard.press("Escape")
    page.locator(".laser-map button").nth(1).click()
    expect(page.locator("#changes td").filter(has_text=HOSTILE).first).to_be_visible()
    user.tab("Examples")
    expect(page.locator(".laser-list button").filter(has_text=HOSTILE).first).to_be_visible()
    page.locator(".laser-list button").filter(has_text=HOSTILE).first.click()
    expect(user.side(1).locator(".laser-text")).to_contain_text(ASKED)
    assert page.locator("img[src=x], [onerror], [onload], a[href^=javascript]").count() == 0


def test_an_empty_database_says_so_and_a_model_may_have_several_stacks(visit: Callable[..., Visit], tmp_path: Path) -> None:
    with serving(make_model("t5"), tmp_path, recorded=False) as other:
        user = visit(other.url)
        user.tab("Explorer")
        expect(user.page.get_by_role("alert")).to_contain_text("no search in this database yet; make one: laser search bundled")
        user.tab("Playground")
        user.page.get_by_role("button", name="Answer").click()
        expect(user.side(1).locator("p").first).to_have_text("decoder.1.fc_out@0.1")
        user.page.get_by_label("Stack").click()
        user.page.get_by_role("option", name="encoder").click()
        expect(user.side(1).locator("p").first).to_have_text("encoder.1.fc_out@0.1")
        user.ask("decoder.1.fc_in@0.1")
        assert user.shown() == expected(answer(make_model("t5"), PROMPTS[0], "decoder.1.fc_in@0.1", 8), PROMPTS[0])


def test_two_users_at_once_do_not_meet_each_others_reductions(visit: Callable[..., Visit], served: Served) -> None:
    before = {name: p.data.clone() for name, p in served.lm.model.named_parameters()}
    users = [visit(), visit()]
    questions = [[f"{i % 3}.{matrix}@0.{1 + i}" for i in range(6)] for matrix in ("fc_in", "out_proj")]
    alone = make_model("llama")
    for user in users:
        user.tab("Playground")
    for pair in zip(*questions, strict=True):
        for user, text in zip(users, pair, strict=True):  # both are asked before either has answered
            user.page.get_by_label("Or reductions as text").fill(text)
            user.page.get_by_role("button", name="Answer").click()
        for user, text in zip(users, pair, strict=True):
            expect(user.side(1).locator("p").first).to_have_text(text)
            assert user.shown() == expected(answer(alone, PROMPTS[0], text, 8), PROMPTS[0])
    assert all(torch.equal(p.data, before[name]) for name, p in served.lm.model.named_parameters())


@pytest.mark.parametrize("width", [390, 1280])
def test_the_app_is_as_wide_as_the_window(width: int, visit: Callable[..., Visit]) -> None:
    user = visit(viewport={"width": width, "height": 800})
    for name in ("Leaderboard", "Explorer", "Playground", "Chat", "Examples"):
        user.tab(name)
        user.page.wait_for_timeout(300)
        assert user.page.evaluate("document.documentElement.scrollWidth") == width


FILES = [
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=../../../etc/passwd",
    "/gradio_api/file/etc/passwd",
    "/file=/etc/passwd",
]
OUT = ["/gradio_api/file=http://example.org/", "/gradio_api/proxy=http://example.org/", "/gradio_api/upload", "/monitoring"]
PATHS = [f"/{of}/{up}etc/passwd" for of in ("static", "assets", "gradio_api/queue") for up in ("../" * 12, "..%2f" * 12, "/")]


@pytest.mark.parametrize("path", [*FILES, *OUT, *PATHS, "/gradio_api/custom_component/1/client/component/../../x"])
def test_nothing_but_the_app_is_given_out(path: str, served: Served) -> None:
    for method in ("GET", "POST"):
        status, _, body = request(served, method, path)
        assert 400 <= status < 500
        assert b"root:" not in body


def test_other_sites_are_refused_and_pages_are_kept_here(served: Served) -> None:
    own = f"127.0.0.1:{served.port}"
    status, headers, _ = request(served, "GET", "/")
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert request(served, "GET", "/", Host=own, Origin=f"http://{own}")[0] == 200
    assert request(served, "GET", "/", Host="laser.example.org")[0] == 400
    for origin in ("http://example.org", "null", "http://127.0.0.1:1"):
        assert request(served, "POST", "/gradio_api/queue/join", Host=own, Origin=origin)[0] == 403


def request(served: Served, method: str, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a request as it is written, without the tidying that other clients do to a path."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()
