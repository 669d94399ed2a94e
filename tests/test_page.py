"""The page in a real browser: generate, watch, reload, cancel, a server that restarts, a phone, Chinese.

The server and its worker are threads of this process; screenshots go to $PAGE_PICTURES, if that is set.
"""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cogvideo.serve.app import Service, build_app
from cogvideo.serve.doors import Doors
from cogvideo.serve.jobs import JobStore
from cogvideo.serve.request import Catalogue
from cogvideo.serve.results import Results
from cogvideo.serve.statistics import Statistics
from cogvideo.serve.worker import Settings, Worker
from tests.test_serve import call, free_port, running

PICTURES = os.environ.get("PAGE_PICTURES")
WORDS = "a dog runs to the right"


@pytest.fixture
def service(nano, tmp_path):
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    results = Results(str(tmp_path / "videos"))
    yield Service(Catalogue([str(nano)]), store, results, Doors(), Statistics(store))
    store.engine.dispose()


@pytest.fixture
def worker(service, nano):
    made = Worker(service.store, service.results, Settings(models=(str(nano),)))
    thread = threading.Thread(target=made.run)
    thread.start()
    yield made
    made.stopping.set()
    thread.join()


@pytest.fixture
def slow(monkeypatch):
    """Generation that can be watched: a pause at each report of progress, previews without any."""
    from cogvideo.serve.generation import Generation

    report = Generation._report

    def slowly(self, percent, task):
        time.sleep(0.05)
        report(self, percent, task)

    monkeypatch.setattr(Generation, "_report", slowly)
    monkeypatch.setattr("cogvideo.serve.generation.PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr("cogvideo.serve.generation.PREVIEW_SHARE", 1e9)
    monkeypatch.setattr("cogvideo.serve.generation.KEYFRAMES_SHARE", 1e9)
    monkeypatch.setattr("cogvideo.serve.app.EVENT_SECONDS", 0.03)


@pytest.fixture
def open_page(browser):
    """Open the page; at the end there must have been no error in it."""
    errors = []
    contexts = []

    def open_(address, key=None, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.goto(address)
        if key is not None:
            page.locator("#ask-key[open]").wait_for()
            page.fill("#key-value", key)
            page.get_by_role("button", name="Enter").click()
        page.locator("#model option").first.wait_for(state="attached")
        return page

    open_.errors = errors
    yield open_
    for context in contexts:
        context.close()
    assert not [error for error in errors if "Failed to load resource" not in error]


def picture(page, name):
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"), full_page=True)


def finished(page, count=1, seconds=60):
    page.wait_for_function(
        "(n) => document.querySelectorAll('#made .clip video').length >= n", arg=count, timeout=1000 * seconds
    )


def test_a_sentence_becomes_a_video_that_is_watched_on_the_way(open_page, service, worker, slow):
    """With the keyboard alone; the strip doubles with each round."""
    with running(build_app(service)) as at:
        page = open_page(at)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        page.locator("#prompt").focus()
        page.keyboard.type(WORDS)
        page.keyboard.press("Control+Enter")
        page.locator(".job").wait_for()
        counts = set()
        for _ in range(3000):
            counts.add(page.locator(".strip canvas").count())
            if page.locator(".steps li[aria-current]").count():
                picture(page, "generating") if 9 in counts else None
            if page.locator("#made .clip").count():
                break
        assert {1, 5, 9, 17} <= counts, counts
        finished(page)
        page.wait_for_function("() => document.querySelector('#made video').readyState > 1")
        assert page.locator(".job").count() == 0 and WORDS in page.locator("#made .clip").inner_text()
        picture(page, "generated")


def test_a_reload_in_the_middle_loses_nothing(open_page, service, worker, slow):
    with running(build_app(service)) as at:
        page = open_page(at)
        page.fill("#prompt", WORDS)
        page.click("#go")
        page.locator(".strip canvas").first.wait_for()
        page.reload()
        page.locator(".job").wait_for()
        finished(page)
        assert len(service.store.page(10, None, True)[0]) == 1


def test_cancel_takes_the_job_away(open_page, service, worker, slow):
    with running(build_app(service)) as at:
        page = open_page(at)
        page.fill("#prompt", WORDS)
        page.click("#go")
        page.locator(".strip canvas").first.wait_for()
        page.locator(".job").get_by_role("button", name="Cancel").click()
        page.locator(".job").wait_for(state="detached")
        assert service.store.page(10, None, True) == ([], False)
        assert page.locator("#made .clip").count() == 0


def test_a_server_that_restarts_under_an_open_page(open_page, service, worker, slow):
    port = free_port()
    with running(build_app(service), port) as at:
        page = open_page(at)
        page.fill("#prompt", WORDS)
        page.click("#go")
        page.locator(".strip canvas").first.wait_for()
    page.get_by_text("The server does not answer").wait_for(timeout=20_000)
    picture(page, "lost")
    with running(build_app(service), port):
        finished(page)
        assert page.locator("#line").inner_text() == ""
    open_page.errors[:] = [error for error in open_page.errors if "net::ERR" not in error]


def test_the_gallery(open_page, service, worker, nano):
    """Another seed, go on from here, two side by side, delete."""
    with running(build_app(service)) as at:
        for seed in (1, 2):
            body = {"prompt": WORDS, "seed": seed, "num_frames": 9}
            assert call(at, "/v1/videos", "POST", body)[0] == 200
        page = open_page(at)
        finished(page, 2)
        boxes = page.locator("#made input[type=checkbox]")
        boxes.nth(0).check()
        assert page.locator("#compare").is_hidden()
        boxes.nth(1).check()
        page.click("#compare")
        page.wait_for_function(
            "() => [...document.querySelectorAll('#pair video')].filter(v => v.readyState > 1).length === 2"
        )
        picture(page, "compared")
        page.click("#pair-close")

        page.locator("#made .clip").first.get_by_role("button", name="Another seed").click()
        finished(page, 3)
        page.locator("#made .clip").first.get_by_role("button", name="Go on from here").click()
        assert page.input_value("#prompt") == WORDS
        page.click("#go")
        finished(page, 4)
        newest = service.store.page(1, None, True)[0][0]
        assert newest.request.begin == "video" and newest.request.begin_frames == 4

        with page.expect_download() as download:
            page.locator("#made .clip").first.get_by_role("link", name="gif").click()
        assert Path(download.value.path()).read_bytes()[:4] == b"GIF8"
        page.locator("#made .clip").first.get_by_role("button", name="Delete").click()
        page.wait_for_function("() => document.querySelectorAll('#made .clip').length === 3")
        assert service.store.get(newest.id) is None


def test_a_user_begins_with_an_image(open_page, service, worker, tmp_path):
    from tests.test_serve import png

    (tmp_path / "mine.png").write_bytes(png())
    with running(build_app(service)) as at:
        page = open_page(at)
        page.fill("#prompt", WORDS)
        page.locator("#options summary").click()
        page.set_input_files("#file", tmp_path / "mine.png")
        page.fill("#seed", "9")
        page.select_option("#frames", "5")
        page.click("#go")
        finished(page)
        job = service.store.page(1, None, True)[0][0]
        assert (job.request.begin, job.request.seed, job.request.num_frames) == ("image", 9, 5)


def test_unknown_words_are_underlined_and_the_nearest_offered(open_page, service):
    with running(build_app(service)) as at:
        page = open_page(at)
        page.fill("#prompt", "a dogg <b>runs</b> to the right")
        page.locator("#marks mark").first.wait_for()
        assert "dogg" in page.locator("#marks mark").all_inner_texts()
        assert page.locator("#ask b b").count() == 0  # what is typed is text, never markup
        page.locator("#hints").get_by_role("button", name="dog", exact=True).first.click()
        assert "a dog <b>" in page.input_value("#prompt")
        page.locator("#words summary").click()
        page.locator("#known button").first.click()
        assert len(page.input_value("#prompt")) > len("a dog <b>runs</b> to the right")


def test_what_is_refused_is_said_by_the_page(open_page, service):
    with running(build_app(service)) as at:
        page = open_page(at)
        page.fill("#prompt", "dog " * 400)
        page.click("#go")
        page.locator("#problem").get_by_text("tokens").wait_for()
        assert page.locator(".job").count() == 0 and page.locator("#go").is_enabled()


def test_a_phone_in_chinese_and_in_the_dark(open_page, service, worker):
    with running(build_app(service)) as at:
        page = open_page(
            at,
            viewport={"width": 375, "height": 740},
            has_touch=True,
            is_mobile=True,
            locale="zh-CN",
            color_scheme="dark",
        )
        assert page.locator("#go").inner_text() == "生成"
        page.locator("#examples button").first.tap()
        page.locator("#go").tap()
        finished(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        assert page.evaluate("document.documentElement.lang") == "zh"
        picture(page, "phone")
        page.locator("#language").tap()
        assert page.locator("#go").inner_text() == "Generate"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_to_read(open_page, service, scheme):
    """WCAG AA: 4.5 for text, of each colour that is used on each ground."""
    with running(build_app(service)) as at:
        page = open_page(at, color_scheme=scheme)
        pairs = page.evaluate(
            """() => {
              const style = getComputedStyle(document.documentElement);
              const light = (name) => {
                const hex = style.getPropertyValue(name).trim().replace(/^#(.)(.)(.)$/, '#$1$1$2$2$3$3');
                const parts = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
                  .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
              };
              const pairs = [['--ink', '--back'], ['--ink', '--card'], ['--soft', '--back'],
                ['--soft', '--card'], ['--on-mark', '--mark'], ['--bad', '--back'], ['--bad', '--card'],
                ['--back', '--bad']];
              return pairs.map(([a, b]) => {
                const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
                return [`${a} on ${b}`, (high + 0.05) / (low + 0.05)];
              });
            }"""
        )
        assert all(ratio >= 4.5 for _, ratio in pairs), pairs


def test_nothing_moves_by_itself_for_those_who_do_not_want_it(open_page, service, worker):
    with running(build_app(service)) as at:
        page = open_page(at, reduced_motion="reduce")
        page.fill("#prompt", WORDS)
        page.click("#go")
        finished(page)
        page.wait_for_timeout(500)
        assert page.evaluate("document.querySelector('#made video').paused")
        assert page.evaluate("document.querySelector('#made video').controls")


def test_a_key_is_asked_for_and_stays_in_the_tab(open_page, service, worker):
    with running(build_app(replace(service, doors=Doors(("k" * 20,))))) as at:
        page = open_page(at, key="k" * 20)
        page.fill("#prompt", WORDS)
        page.click("#go")
        finished(page)
        page.wait_for_function("() => document.querySelector('#made video').src.startsWith('blob:')")
        page.wait_for_function("() => document.querySelector('#made video').readyState > 1")
        assert page.evaluate("[localStorage.getItem('key'), sessionStorage.getItem('key')]") == [
            None,
            "k" * 20,
        ]
