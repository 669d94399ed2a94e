"""A blind study: what is shown, what is kept, what is left out, and a session in a real browser."""

import json
import multiprocessing
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cogvideo import cli
from cogvideo.eval import study_report
from cogvideo.eval.protocol import Protocol
from cogvideo.eval.study import QUALITIES, Ballot, Key, Plan, Rules, create, load
from cogvideo.video import Clip

SMALL = Protocol(frames=4, fps=4, size=32)
SYSTEMS = ("alpha-model", "beta-model", "rendered")


def write_systems(root: Path, prompts: int = 6) -> list[Path]:
    """Folders of clips, each system in a colour of its own."""
    folders = []
    for number, name in enumerate(SYSTEMS):
        (root / name).mkdir(parents=True)
        for i in range(prompts):
            frames = np.zeros((4, 32, 32, 3), np.uint8)
            frames[..., number] = 120 + 20 * i
            for t in range(4):
                frames[t, 4 * t : 4 * t + 8, 8:16] = 255
            Clip(frames, 4, f"prompt {i}").save(root / name / f"out-{i}.mp4")
        folders.append(root / name)
    return folders


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    return write_systems(tmp_path_factory.mktemp("systems"))


def new_study(folder: Path, systems, mode: str = "pairs", **options) -> Path:
    create(
        folder,
        Plan(systems, mode, protocol=SMALL, real="rendered", **{"per_rater": 8, "repeats": 2, **options}),
    )
    return folder


# -- preparing


def test_the_trials_are_listed_before_the_first_vote_and_name_no_system(systems, tmp_path):
    folder = new_study(tmp_path / "s", systems)
    study = load(folder)
    normal = [trial for trial in study.trials if trial.kind == "normal"]
    assert len(normal) == 6 * 3 and sum(trial.kind == "trap" for trial in study.trials) == 3
    public = (folder / "study.json").read_text()
    names = [path.name for path in (folder / "clips").iterdir()]
    for name in SYSTEMS:
        assert name not in public and not any(name in file for file in names)
    assert all(re.fullmatch(r"[0-9a-f]{16}\.mp4", name) for name in names)
    key = Key.load(folder)
    for trial in normal:
        pair = [key.clips[clip] for clip in trial.clips]
        assert len({system for system, _ in pair}) == 2 and {f"prompt {n}" for _, n in pair} == {trial.prompt}


def test_all_clips_have_the_same_fps_size_and_length_and_no_title(systems, tmp_path):
    folder = new_study(tmp_path / "s", systems)
    clips = [Clip.load(path) for path in (folder / "clips").iterdir()]
    assert {(clip.frames.shape, clip.fps, clip.caption) for clip in clips} == {((4, 32, 32, 3), 4.0, "")}


def test_the_trap_does_not_flash(systems, tmp_path):
    folder = new_study(tmp_path / "s", systems)
    traps = [name for name, (system, _) in Key.load(folder).clips.items() if system == "trap"]
    assert len(traps) == 3
    for name in traps:
        frames = Clip.load(folder / "clips" / f"{name}.mp4").frames.astype(int)
        assert np.abs(frames[1:] - frames[:-1]).mean() < 3 < frames[0].std()


def test_the_order_depends_on_seed_and_rater_and_repeats_with_sides_swapped(systems, tmp_path):
    study = load(new_study(tmp_path / "s", systems))
    first, second = "a" * 32, "b" * 32
    order = study.order(first)
    assert order == study.order(first) != study.order(second)
    assert len(order) == 8 + 1 + 2 and [again for _, again in order] == [False] * 9 + [True] * 2
    traps = [i for i, (number, _) in enumerate(order) if study.trials[number].kind == "trap"]
    assert len(traps) == 1 and traps[0] >= 2
    for i, (number, again) in enumerate(order):
        if again:
            before = next(j for j, (other, _) in enumerate(order) if other == number)
            assert study.shown(first, i) == study.shown(first, before)[::-1]


def test_every_system_stands_on_either_side_alike(systems, tmp_path):
    folder = new_study(tmp_path / "s", systems, per_rater=18)
    study, key = load(folder), Key.load(folder)
    left = Counter()
    for i in range(60):
        rater = f"{i:032x}"
        for position, (number, _) in enumerate(study.order(rater)):
            if study.trials[number].kind == "normal":
                left[key.clips[study.shown(rater, position)[0]][0]] += 1
    shares = np.array([left[name] for name in SYSTEMS]) / sum(left.values())
    assert np.abs(shares - 1 / 3).max() < 0.04


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mode": "ranks"}, "mode must be one of pairs, ratings, best; got 'ranks'"),
        ({"real": "gamma"}, "real must be one of the systems alpha-model, beta-model, rendered; got gamma"),
        ({"per_rater": 0}, "per_rater must be from 1 to"),
        ({"repeats": 9}, "repeats must be from 0 to the 8 trials of a rater; got 9"),
    ],
)
def test_bad_plans_are_refused(systems, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        options = {"mode": "pairs", "real": "rendered", "per_rater": 8, "repeats": 2, **change}
        create(tmp_path / "s", Plan(systems, protocol=SMALL, **options))
    assert not (tmp_path / "s").exists()


def test_systems_that_do_not_fit_together_are_refused(systems, tmp_path):
    with pytest.raises(ValueError, match="pairs needs two systems or more; got 1"):
        Plan(systems[:1])
    shutil.copytree(systems[0], tmp_path / "short")
    (tmp_path / "short" / "out-5.mp4").unlink()
    with pytest.raises(ValueError, match="short has 5 videos, but alpha-model has 6"):
        create(tmp_path / "s", Plan([systems[0], tmp_path / "short"], protocol=SMALL))
    shutil.copytree(systems[0], tmp_path / "other")
    shutil.copy(systems[0] / "out-1.mp4", tmp_path / "other" / "out-2.mp4")
    with pytest.raises(
        ValueError, match="out-2.mp4 shows 'prompt 1', but .* 'prompt 2'; order the videos of other"
    ):
        create(tmp_path / "s", Plan([systems[0], tmp_path / "other"], protocol=SMALL))
    (tmp_path / "prompts.txt").write_text("only one\n")
    with pytest.raises(ValueError, match="1 prompts for 6 videos; give one for each"):
        create(tmp_path / "s", Plan(systems, prompts=tmp_path / "prompts.txt", protocol=SMALL))
    folder = new_study(tmp_path / "full", systems)
    with pytest.raises(ValueError, match="full exists; choose another folder"):
        new_study(folder, systems)
    with pytest.raises(ValueError, match="is no study: study.json is missing"):
        load(tmp_path)


# -- votes


def test_votes_are_kept_in_order_once_and_survive_a_restart(systems, tmp_path):
    folder = new_study(tmp_path / "s", systems)
    ballot = Ballot(folder)
    rater = ballot.join()
    shown = ballot.study.shown(rater, 0)
    ballot.vote(rater, 0, shown[1], {}, 2.5)
    assert ballot.vote(rater, 0, shown[0], {}, 1.0).choice == shown[1]  # the first one counts
    with pytest.raises(ValueError, match="the trials before it have no vote yet"):
        ballot.vote(rater, 5, "", {}, 1.0)
    other = ballot.study.trials[ballot.study.order(rater)[3][0]].clips[0]
    with pytest.raises(ValueError, match="one of the clips that are shown"):
        ballot.vote(rater, 1, "f" * 16 if other in ballot.study.shown(rater, 1) else other, {}, 1.0)
    with (folder / "votes.jsonl").open("a") as stream:
        stream.write('{"rater": "half a li')  # of a process that was killed
    again = Ballot(folder)
    assert again.raters == {rater} and again.next_position(rater) == 1
    again.vote(rater, 1, "", {}, 1.0)
    third = Ballot(folder)
    assert [third.votes[rater, i].choice for i in (0, 1)] == [shown[1], ""]


def vote_and_wait(folder: Path, rater: str) -> None:
    ballot = Ballot(folder)
    for position in range(4):
        ballot.vote(rater, position, ballot.study.shown(rater, position)[0], {}, 1.0)
    print("voted", flush=True)
    time.sleep(60)


def test_no_vote_is_lost_when_the_process_is_killed(systems, tmp_path):
    folder = new_study(tmp_path / "s", systems)
    rater = Ballot(folder).join()
    process = multiprocessing.get_context("spawn").Process(target=vote_and_wait, args=(folder, rater))
    process.start()
    deadline = time.monotonic() + 60
    while (
        len((folder / "votes.jsonl").read_bytes().splitlines() if (folder / "votes.jsonl").exists() else [])
        < 4
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.join()
    assert Ballot(folder).next_position(rater) == 4


def test_ratings_need_a_score_in_range_for_every_quality(systems, tmp_path):
    folder = new_study(tmp_path / "s", systems, "ratings")
    ballot = Ballot(folder)
    rater = ballot.join()
    good = {"texture": 5, "motion": 1, "relevance": 3, "total": 10}
    for wrong in ({**good, "total": 11}, {**good, "motion": 0}, {"texture": 3}, {**good, "more": 1}):
        with pytest.raises(ValueError, match="must be from 1|a score for each of"):
            ballot.vote(rater, 0, "", wrong, 1.0)
    assert ballot.vote(rater, 0, "", good, 1.0).scores == good


# -- the report


def simulate(folder: Path, raters: int, strength: dict[str, float], seed: int = 0, lazy: int = 0) -> None:
    """Raters who prefer systems by Bradley-Terry strengths, and `lazy` ones who always take the left clip."""
    ballot, key = Ballot(folder), Key.load(folder)
    rng = np.random.default_rng(seed)
    for number in range(raters + lazy):
        rater = ballot.join()
        for position in range(len(ballot.study.order(rater))):
            shown = ballot.study.shown(rater, position)
            names = [key.clips[clip][0] for clip in shown]
            if ballot.study.mode == "ratings":
                center = strength.get(names[0], 1.0)
                scores = {q: int(np.clip(round(center + rng.normal(0, 0.7)), 1, 5)) for q in QUALITIES}
                scores["total"] = int(np.clip(round(2 * center + rng.normal(0, 1)), 1, 10))
                ballot.vote(rater, position, "", scores, 3.0)
                continue
            if number >= raters:
                choice = shown[0]
            elif "trap" in names:
                choice = shown[1 - names.index("trap")]
            else:
                weights = np.exp([strength[name] for name in names])
                choice = shown[int(rng.choice(len(shown), p=weights / weights.sum()))]
            ballot.vote(rater, position, choice, {}, 3.0)


def test_simulated_preferences_are_recovered_within_the_interval(systems, tmp_path):
    pytest.importorskip("evalica")
    true = {"alpha-model": -1.0, "beta-model": 0.0, "rendered": 1.0}
    folder = new_study(tmp_path / "s", systems, per_rater=18)
    simulate(folder, 40, true)
    report = study_report.tally(folder, resamples=200)
    strengths = report.scores["Bradley-Terry (log strength)"]
    for name, value in true.items():
        assert strengths[name].low <= value <= strengths[name].high, (name, strengths[name])
        assert strengths[name].high - strengths[name].low < 1.2
    chosen = report.scores["chosen (%)"]
    assert chosen["rendered"].low > chosen["beta-model"].high > chosen["alpha-model"].high
    assert 0.05 < report.alpha["choice"] < 0.6 and not report.excluded and report.votes == 40 * 18


def test_the_best_of_several_is_recovered(systems, tmp_path):
    pytest.importorskip("evalica")
    true = {"alpha-model": -1.0, "beta-model": 0.0, "rendered": 1.0}
    folder = new_study(tmp_path / "s", systems, "best", per_rater=6)
    simulate(folder, 60, true)
    chosen = study_report.tally(folder, resamples=200).scores["chosen (%)"]
    shares = np.exp(list(true.values())) / np.exp(list(true.values())).sum() * 100
    for name, share in zip(true, shares):
        assert chosen[name].low <= share <= chosen[name].high


def test_mean_opinion_scores_are_recovered_and_agreement_is_high(systems, tmp_path):
    pytest.importorskip("evalica")
    true = {"alpha-model": 2.0, "beta-model": 3.0, "rendered": 4.5}
    folder = new_study(tmp_path / "s", systems, "ratings", per_rater=18)
    simulate(folder, 25, true)
    report = study_report.tally(folder, resamples=200)
    for name in ("alpha-model", "beta-model"):
        score = report.scores["motion (1 to 5)"][name]
        assert score.low - 0.1 <= true[name] <= score.high + 0.1
    assert report.scores["total (1 to 10)"]["rendered"].value > 8
    assert report.alpha["motion (1 to 5)"] > 0.5 and report.real == "rendered"


def test_raters_are_left_out_by_the_rules_of_the_study_alone(systems, tmp_path):
    pytest.importorskip("evalica")
    true = {"alpha-model": -1.0, "beta-model": 0.0, "rendered": 1.0}
    folder = new_study(tmp_path / "s", systems, rules=Rules(least_agreement=0.5, least_seconds=2.0))
    simulate(folder, 6, {name: 9 * value for name, value in true.items()}, lazy=8)
    ballot = Ballot(folder)
    hasty = ballot.join()
    for position in range(len(ballot.study.order(hasty))):
        ballot.vote(hasty, position, "", {}, 0.2)
    report = study_report.tally(folder, resamples=20)
    assert report.excluded[hasty] == "took 0.20 s a vote"
    # whoever always takes the left clip takes the trap half of the time, and never repeats an answer
    assert Counter(report.excluded.values()) == Counter(
        {"took 0.20 s a vote": 1, **Counter(r for r in report.excluded.values() if r != "took 0.20 s a vote")}
    )
    assert len(report.excluded) == 9 and report.raters == 15 and report.votes == 6 * 8


def test_the_report_is_written_as_json_csv_and_a_page(systems, tmp_path, capsys):
    pytest.importorskip("evalica")
    folder = new_study(tmp_path / "s", systems)
    with pytest.raises(ValueError, match="has no votes yet"):
        cli.parse(["judge", "report", str(folder)])()
    simulate(folder, 3, {"alpha-model": -1.0, "beta-model": 0.0, "rendered": 1.0})
    cli.parse(["judge", "report", str(folder)])()
    assert "rendered" in capsys.readouterr().out
    assert json.loads((folder / "report.json").read_text())["real"] == "rendered"
    rows = (folder / "report.csv").read_text().splitlines()
    assert rows[0] == "prompt,votes,alpha-model,beta-model,rendered" and len(rows) == 7
    assert "<h2>Agreement</h2>" in (folder / "report.html").read_text()


# -- the server


@pytest.fixture
def server(systems, tmp_path):
    """Start the page of a study in a process of its own, as `cogvideo judge serve` does."""
    pytest.importorskip("fastapi", reason='the page needs pip install "cogvideo[eval]"')
    pytest.importorskip("uvicorn")
    processes = []

    def start(mode: str = "pairs", folder: Path | None = None) -> tuple[str, Path]:
        """Of a folder that is given, the server before is killed."""
        if folder is not None:
            processes[-1].kill()
            processes[-1].wait()
        folder = folder or new_study(tmp_path / mode, systems, mode, per_rater=5, repeats=1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "cogvideo", "judge", "serve", str(folder), "--port", str(port)]
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        url = f"http://127.0.0.1:{port}"
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{url}/").read()
                return url, folder
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server does not answer")

    yield start
    for process in processes:
        process.kill()
        process.wait()


def ask(url: str, body: object = None, raw: bytes | None = None) -> tuple[int, dict, dict]:
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.loads(response.read()), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), dict(error.headers)


def test_no_response_tells_a_system_a_trap_or_a_repetition(server):
    url, folder = server()
    rater = ask(f"{url}/api/join", {})[1]["rater"]
    for position in range(7):
        status, trial, headers = ask(f"{url}/api/trial/{rater}")
        text = json.dumps([trial, headers])
        assert status == 200 and trial["position"] == position and trial["count"] == 7
        assert not any(name in text for name in (*SYSTEMS, "trap", "again", "intact"))
        assert headers["content-security-policy"].startswith("default-src 'none'")
        clip = urllib.request.urlopen(f"{url}/clips/{trial['clips'][0]}.mp4")
        assert clip.headers["content-type"] == "video/mp4" and "attachment" not in str(clip.headers)
        assert (
            ask(f"{url}/api/vote/{rater}", {"position": position, "choice": trial["clips"][0], "seconds": 1})[
                0
            ]
            == 200
        )
    assert ask(f"{url}/api/trial/{rater}")[1]["position"] == 7
    assert len(Ballot(folder).votes) == 7


def test_bad_requests_are_refused_and_reach_no_other_file(server):
    url, folder = server()
    rater = ask(f"{url}/api/join", {})[1]["rater"]
    for path in (
        "key.json",
        "study.json",
        "votes.jsonl",
        "clips/..%2Fkey.json.mp4",
        "clips/../key.json",
        "..%2Fkey.json",
    ):
        assert ask(f"{url}/{path}")[0] == 404
    assert ask(f"{url}/api/trial/{'0' * 32}")[0] == 404 and ask(f"{url}/api/trial/x")[0] == 404
    vote = f"{url}/api/vote/{rater}"
    bodies: list[object] = ["no object", [], {}, {"position": "0"}, {"position": 99}, {"position": True}]
    bodies += [
        {"position": 0, **wrong} for wrong in ({"choice": "x"}, {"scores": {"total": 3}}, {"seconds": -1})
    ]
    for body in [*bodies, {"position": 1}]:
        assert ask(vote, body)[0] == 400, body
    assert ask(vote, raw=b"[" * 9000)[0] == 400 and ask(vote, raw=b"x" * 20_000)[0] == 413
    assert ask(vote, raw=b'{"position": 0, "seconds": 1e999}')[0] == 400
    assert not Ballot(folder).votes


def test_a_rater_goes_on_after_the_server_was_killed(server):
    url, folder = server()
    rater = ask(f"{url}/api/join", {})[1]["rater"]
    ask(f"{url}/api/vote/{rater}", {"position": 0, "seconds": 1})
    again, _ = server(folder=folder)
    assert ask(f"{again}/api/trial/{rater}")[1]["position"] == 1


def test_a_study_has_one_server(server):
    _, folder = server()
    command = [sys.executable, "-m", "cogvideo", "judge", "serve", str(folder), "--port", "1025"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"is writing into {folder}; wait until it ends" in done.stderr


# -- a real browser


def test_a_session_with_the_keyboard_and_a_reload_in_the_middle(browser, server):
    url, folder = server()
    page = browser.new_context().new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.get_by_text("I agree, start").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    for position in range(7):
        page.get_by_text(f"{position + 1} of 7").wait_for()
        if position == 3:
            page.reload()
            page.get_by_text("4 of 7").wait_for()
        if position == 0:
            page.wait_for_function(
                "() => [...document.querySelectorAll('video')].every(v => v.readyState > 1)"
            )
        page.keyboard.press("0" if position == 5 else "1")
    page.get_by_text("Thank you").wait_for()
    votes = sorted(Ballot(folder).votes.values(), key=lambda vote: vote.position)
    assert len(votes) == 7 and not errors
    for vote in votes:
        assert vote.choice == ("" if vote.position == 5 else vote.shown[0]) and vote.seconds > 0
    page.reload()
    page.get_by_text("Thank you").wait_for()


def test_two_raters_at_once_have_lists_of_their_own(browser, server):
    url, folder = server()
    pages = [browser.new_context().new_page() for _ in range(2)]
    for page in pages:
        page.goto(url)
        page.get_by_text("I agree, start").click()
    for position in range(7):
        for page in pages:
            page.get_by_text(f"{position + 1} of 7").wait_for()
            page.locator(".clip button").nth(1).click()
    for page in pages:
        page.get_by_text("Thank you").wait_for()
    ballot = Ballot(folder)
    assert len(ballot.raters) == 2 and len(ballot.votes) == 14


def test_ratings_on_a_phone_by_keyboard(browser, server):
    url, folder = server("ratings")
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(url)
    page.get_by_text("I agree, start").tap()
    page.get_by_text("1 of 7").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    send = page.locator("#send")
    assert send.is_disabled()
    for name in QUALITIES:
        page.locator(f"input[name={name}][value='3'] + span").tap()
    assert send.is_enabled()
    page.locator("input[name=total][value='3']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.get_by_text("2 of 7").wait_for()
    (vote,) = Ballot(folder).votes.values()
    assert vote.scores == {"texture": 3, "motion": 3, "relevance": 3, "total": 4}


def test_the_page_says_when_the_server_is_gone_and_goes_on(browser, server):
    url, folder = server()
    page = browser.new_context().new_page()
    page.goto(url)
    page.get_by_text("I agree, start").click()
    page.get_by_text("1 of 7").wait_for()
    page.wait_for_function("() => [...document.querySelectorAll('video')].every(v => v.readyState > 1)")
    page.route("**/api/vote/**", lambda route: route.abort())
    page.keyboard.press("1")
    page.get_by_text("Not stored").wait_for()
    page.unroute("**/api/vote/**")
    page.keyboard.press("1")
    page.get_by_text("2 of 7").wait_for()
    assert len(Ballot(folder).votes) == 1
