"""Serving: a queue that loses no job and doubles none, the endpoints as clients speak them, uploads, faults.

The server and its workers are real: other processes where it matters that they die.
"""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image

from cogvideo import cli
from cogvideo.generate.cogvideo import load
from cogvideo.serve import uploads
from cogvideo.serve.app import Service, build_app, byte_range
from cogvideo.serve.doors import Doors, check_address, read_keys
from cogvideo.serve.generation import Cancelled, Generation, Place
from cogvideo.serve.jobs import (
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    MAX_ATTEMPTS,
    QUEUED,
    Held,
    JobStore,
    QueueFull,
    new_id,
)
from cogvideo.serve.request import Catalogue, Refusal
from cogvideo.serve.results import VARIANTS, Results
from cogvideo.serve.statistics import Statistics
from cogvideo.serve.worker import Pace, Settings, Worker
from cogvideo.video import Clip
from scripts.postgres import find_programs, postgres

WORDS = "a dog runs to the right"


@pytest.fixture(scope="session")
def server_of_postgres():
    if find_programs() is None:
        pytest.skip("PostgreSQL is not installed")
    with postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'jobs.sqlite'}"
        return
    server = request.getfixturevalue("server_of_postgres")
    store = JobStore(server.url)
    from cogvideo.serve.jobs import metadata

    metadata.drop_all(store.engine)
    store.engine.dispose()
    yield server.url


@pytest.fixture(scope="module")
def catalogue(nano):
    return Catalogue([str(nano)])


@pytest.fixture
def store(url):
    made = JobStore(url)
    yield made
    made.engine.dispose()


@pytest.fixture
def local(tmp_path):
    made = JobStore(f"sqlite:///{tmp_path / 'local.sqlite'}")
    yield made
    made.engine.dispose()


def add(store, catalogue, prompt=WORDS, **more):
    return store.add(new_id(), catalogue.check({"prompt": prompt, **more}), [])


# -- requests --


@pytest.mark.parametrize(
    ("given", "param", "says"),
    [
        ({}, "prompt", "write a sentence"),
        ({"prompt": " "}, "prompt", "write a sentence"),
        ({"prompt": 3}, "prompt", "must be a text"),
        ({"prompt": "a\0b"}, "prompt", "no text"),
        ({"prompt": "dog " * 400}, "prompt", "tokens"),
        ({"prompt": "d" * 3000}, "prompt", "characters"),
        ({"prompt": WORDS, "model": "sora-2"}, "model", "choose one of nano"),
        ({"prompt": WORDS, "size": "1280x720"}, "size", "choose one of"),
        ({"prompt": WORDS, "seconds": "8"}, "seconds", "choose one of 4"),
        ({"prompt": WORDS, "num_frames": 7}, "num_frames", "1, 5, 9, 17, 33"),
        ({"prompt": WORDS, "fps": 3}, "fps", "1, 2, 4, 8"),
        ({"prompt": WORDS, "fps": 2, "num_frames": 33}, "fps", "leave fps out"),
        ({"prompt": WORDS, "seed": -1}, "seed", "from 0"),
        ({"prompt": WORDS, "seed": 1.5}, "seed", "whole number"),
        ({"prompt": WORDS, "seed": True}, "seed", "a number"),
        ({"prompt": WORDS, "n": 17}, "n", "from 1 to 16"),
        ({"prompt": WORDS, "guidance_scale": 0.5}, "guidance_scale", "from 1 to 1000"),
        ({"prompt": WORDS, "guidance_scale": "nan"}, "guidance_scale", "finite"),
        ({"prompt": WORDS, "style": "noir"}, "style", "unknown field"),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_field(catalogue, given, param, says):
    with pytest.raises(Refusal, match=says) as refused:
        catalogue.check(given)
    error = refused.value.body["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["code"]


def test_what_is_left_out_is_the_models_own(catalogue):
    request = catalogue.check({"prompt": WORDS})
    assert (request.model, request.num_frames, request.fps, request.seconds) == ("nano", 33, 8.0, "4")
    assert request.n == 1 and request.seed is not None
    assert catalogue.check({"prompt": WORDS, "seed": "7", "fps": "2"}).num_frames == 9  # of a form
    assert catalogue.check({"prompt": WORDS}).seed != catalogue.check({"prompt": WORDS}).seed


def test_a_deterministic_model_refuses_what_it_cannot_do():
    catalogue = Catalogue(["direct-tiny"])
    assert catalogue.check({"prompt": WORDS, "seed": 5}).seed == 5
    for name, value in (("guidance_scale", 2), ("n", 2)):
        with pytest.raises(Refusal, match="deterministic"):
            catalogue.check({"prompt": WORDS, name: value})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "0"], "--port must be from 1 to 65535"),
        (["--workers", "-1"], "--workers must be from 0 to 256"),
        (["--host", "0.0.0.0"], "--api-keys"),
        (["--models", "tiny", "/elsewhere/tiny"], "same name"),
        (["--models", "nowhere"], "nowhere"),
        (["--database", "mysql+nothing://x"], "--database"),
    ],
)
def test_the_command_says_what_is_wrong_before_it_starts(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cogvideo", "serve", "--data", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_before_anything_starts(tmp_path, capsys, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        arguments = ["cogvideo", "serve", "--port", port, "--data", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit):
            cli.main()
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


def test_the_command_names_the_packages_that_are_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    with pytest.raises(ValueError, match=r"pip install \"cogvideo\[serve\]\""):
        cli.serve()


# -- the queue --


def test_jobs_are_taken_in_order_and_in_groups(store, catalogue):
    first = add(store, catalogue, seed=1)
    other = add(store, catalogue, seed=2, num_frames=5)
    third = add(store, catalogue, seed=3)
    batch = store.take({"nano": 16}, 10)
    assert [job.id for job in batch.jobs] == [first.id, third.id]  # of one group
    assert [job.id for job in store.take({"nano": 16}, 10).jobs] == [other.id]
    assert store.take({"nano": 16}, 10) is None and store.take({"other": 16}, 10) is None
    assert {store.get(job.id).status for job in (first, other, third)} == {IN_PROGRESS}


def test_a_batch_has_no_more_videos_than_asked_for(store, catalogue):
    ids = [add(store, catalogue, n=3).id for _ in range(3)]
    assert [job.id for job in store.take({"nano": 6}, 10).jobs] == ids[:2]
    assert [job.id for job in store.take({"nano": 1}, 10).jobs] == ids[2:]  # the first in line always


def test_many_takers_take_each_job_once(store, catalogue):
    ids = {add(store, catalogue, seed=i, num_frames=5).id for i in range(24)}

    def take(_):
        taken = []
        while (batch := store.take({"nano": 2}, 30)) is not None:
            taken += [job.id for job in batch.jobs]
        return taken

    with ThreadPoolExecutor(6) as pool:
        taken = [id for part in pool.map(take, range(6)) for id in part]
    assert sorted(taken) == sorted(ids)


def test_a_lease_that_ends_gives_the_job_back_and_its_holder_changes_nothing(store, catalogue):
    job = add(store, catalogue)
    lost = store.take({"nano": 1}, -1)  # has ended already
    again = store.take({"nano": 1}, 30)
    assert [j.id for j in again.jobs] == [job.id] and again.jobs[0].attempts == 2
    assert store.renew(lost.lease, 30).ids == frozenset()
    assert not store.finish(lost.lease, job.id, 5)
    store.fail(lost.lease, job.id, "x", "y")
    store.report(lost.lease, 99, "late")
    store.show(lost.lease, job.id, "late", 5, b"x")
    now = store.get(job.id)
    assert (now.status, now.progress) == (IN_PROGRESS, 0) and store.preview(job.id) is None
    assert store.finish(again.lease, job.id, 5) and not store.finish(again.lease, job.id, 5)
    assert store.get(job.id).status == COMPLETED


def test_the_jobs_of_a_dead_worker_are_queued_at_once(store, catalogue):
    dead, other = (add(store, catalogue, num_frames=n) for n in (5, 9))
    store.take({"nano": 1}, 30, "aaaa")
    store.take({"nano": 1}, 30, "bbbb")
    store.release_lost("aaaa")
    assert (store.get(dead.id).status, store.get(other.id).status) == (QUEUED, IN_PROGRESS)


def test_a_job_that_ends_its_workers_fails_in_the_end(store, catalogue):
    job = add(store, catalogue)
    for _ in range(MAX_ATTEMPTS):
        assert store.take({"nano": 1}, -1)
    assert store.take({"nano": 1}, 30) is None
    assert (store.get(job.id).status, store.get(job.id).error_code) == (FAILED, "worker_lost")


def test_a_worker_that_stops_gives_its_jobs_back_without_an_attempt(store, catalogue):
    job = add(store, catalogue)
    store.release(store.take({"nano": 1}, 30).lease)
    assert (store.get(job.id).status, store.get(job.id).attempts) == (QUEUED, 0)


def test_removing_cancels_or_forgets(store, catalogue):
    waiting, running, done = (add(store, catalogue, num_frames=n) for n in (5, 9, 17))
    batches = [store.take({"nano": 1}, 30) for _ in range(3)]
    store.release(batches[0].lease)
    store.finish(batches[2].lease, done.id, 5)
    assert all(store.remove(job.id) for job in (waiting, running, done))
    assert store.get(done.id) is None and not store.remove(done.id)
    for job in (waiting, running):
        assert (store.get(job.id).status, store.get(job.id).error_code) == (FAILED, "cancelled")
    assert store.renew(batches[1].lease, 30).ids == frozenset()
    assert store.page(10, None, True) == ([], False)


def test_the_list_has_pages_in_both_orders(store, catalogue):
    ids = [add(store, catalogue).id for _ in range(5)]
    seen, after, more = [], None, True
    while more:
        page, more = store.page(2, after, True)
        seen += [job.id for job in page]
        after = seen[-1]
    assert seen == ids[::-1]
    page, more = store.page(2, ids[1], False)
    assert [job.id for job in page] == ids[2:4] and more
    with pytest.raises(KeyError):
        store.page(2, "video_unknown", True)


def test_a_full_queue_refuses_and_says_when_to_come_back(url, catalogue):
    store = JobStore(url, max_queue=2)
    for _ in range(2):
        add(store, catalogue)
    with pytest.raises(QueueFull) as full:
        add(store, catalogue)
    assert full.value.retry_after >= 1
    store.engine.dispose()


def test_what_expires_and_what_is_above_the_quota_is_forgotten_but_no_unfinished_job(url, catalogue):
    store = JobStore(url, keep_seconds=0.0)
    old = add(store, catalogue)
    store.finish(store.take({"nano": 1}, 30).lease, old.id, 10)
    store.keep_seconds = 1000.0
    kept = []
    for _ in range(3):
        kept.append(add(store, catalogue))
        store.finish(store.take({"nano": 1}, 30).lease, kept[-1].id, 10)
    waiting = add(store, catalogue)
    time.sleep(0.05)
    assert store.sweep() == [old.id]
    assert store.sweep(quota=20) == [kept[0].id]  # the oldest
    assert {store.get(job.id).status for job in kept[1:]} == {COMPLETED}
    assert store.get(waiting.id).status == QUEUED
    assert store.unknown([old.id, waiting.id]) == [old.id]
    store.engine.dispose()


def test_previews_are_of_the_holder_and_grow_in_number(store, catalogue):
    job = add(store, catalogue)
    batch = store.take({"nano": 1}, 30)
    store.watch(job.id, 30)
    assert store.renew(batch.lease, 30).watched == {job.id}
    for image in (b"one", b"two"):
        store.show(batch.lease, job.id, "5 frames", 5, image)
    assert (store.preview(job.id).version, store.preview(job.id).image) == (2, b"two")
    assert store.preview(job.id, newer_than=2) is None
    assert store.look(job.id, 1) == (store.get(job.id), store.preview(job.id))
    assert store.look(job.id, 2) == (store.get(job.id), None) and store.look("none", 0) == (None, None)
    store.finish(batch.lease, job.id, 1)
    assert store.preview(job.id) is None


# -- generation --


@pytest.fixture(scope="module")
def pipe(nano):
    return load(nano)


def generate(store, results, pipe, held=None, most=16):
    """One batch, in this thread; return what was done."""
    batch = store.take({"nano": most}, 600)

    def holds():
        return store.renew(batch.lease, 600)

    generation = Generation(pipe, batch, Place(store, results, held or holds))
    generation.run()
    return generation


def files(results, id, n=1):
    return {v: results.get(id, name.format(i)) for v, name in VARIANTS.items() for i in range(n)}


def test_the_same_request_gives_the_same_file_alone_or_in_a_batch(local, catalogue, pipe, tmp_path):
    results = Results(str(tmp_path / "videos"))
    alone = add(local, catalogue, seed=11, guidance_scale=2)
    generate(local, results, pipe)
    pair = add(local, catalogue, "a cat jumps", seed=3, n=2, guidance_scale=2)
    same = add(local, catalogue, seed=11, guidance_scale=2)
    assert generate(local, results, pipe).first_frame_seconds > 0
    assert files(results, alone.id) == files(results, same.id)
    assert all(local.get(job.id).status == COMPLETED for job in (alone, pair, same))
    videos = [results.get(pair.id, VARIANTS["video"].format(i)) for i in range(2)]
    assert videos[0] and videos[1] and videos[0] != videos[1]

    (clip,) = pipe(WORDS, seed=11, guidance_scale=2, progress=False)
    clip.save(tmp_path / "direct.mp4")
    assert (tmp_path / "direct.mp4").read_bytes() == results.get(alone.id, "video-0.mp4")


def test_a_job_resumes_from_its_last_phase_to_the_same_file(local, catalogue, pipe, tmp_path, monkeypatch):
    results = Results(str(tmp_path / "videos"))
    whole = add(local, catalogue, seed=5, num_frames=17)
    generate(local, results, pipe)
    job = add(local, catalogue, seed=5, num_frames=17)
    interpolate = pipe.interpolate
    begun = []

    def dies(draft, **options):
        begun.append(draft.codes.shape[1])
        if len(begun) == 2:
            raise MemoryError
        return interpolate(draft, **options)

    monkeypatch.setattr(pipe, "interpolate", dies)
    with pytest.raises(MemoryError):
        generate(local, results, pipe)
    assert local.get(job.id).frames == 9
    local.sweep()
    with local.engine.begin() as connection:
        from cogvideo.serve.jobs import jobs as table

        connection.execute(table.update().values(leased_until=0))  # the worker is gone
    generate(local, results, pipe)
    assert begun == [5, 9, 9]  # not from the beginning
    assert files(results, job.id) == files(results, whole.id)


def test_a_cancelled_job_ends_the_work_and_leaves_no_file(local, catalogue, pipe, tmp_path):
    results = Results(str(tmp_path / "videos"))
    job = add(local, catalogue)
    calls = []

    def held():
        calls.append(1)
        if len(calls) == 3:
            local.remove(job.id)
            results.remove(job.id)
        return Held(frozenset() if len(calls) >= 3 else frozenset([job.id]))

    with pytest.raises(Cancelled):
        generate(local, results, pipe, held)
    assert local.get(job.id).error_code == "cancelled" and not results.ids()


def test_the_others_of_a_batch_do_not_mind_a_cancelled_one(local, catalogue, pipe, tmp_path):
    results = Results(str(tmp_path / "videos"))
    gone, kept = (add(local, catalogue, seed=seed, num_frames=9) for seed in (1, 2))
    only = add(local, catalogue, seed=2, num_frames=9)
    removed = []

    def held():
        if not removed:
            removed.append(local.remove(gone.id))
        return Held(frozenset([kept.id, only.id]))

    generate(local, results, pipe, held)
    assert local.get(gone.id).error_code == "cancelled"
    assert files(results, kept.id) == files(results, only.id)
    assert results.get(gone.id, "video-0.mp4") is None


def test_previews_show_the_frames_so_far(local, catalogue, pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("cogvideo.serve.generation.PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr("cogvideo.serve.generation.PREVIEW_SHARE", 1e9)
    monkeypatch.setattr("cogvideo.serve.generation.KEYFRAMES_SHARE", 1e9)
    shown = []
    monkeypatch.setattr(JobStore, "show", lambda self, *told: shown.append(told))
    job = add(local, catalogue, num_frames=9)
    local.watch(job.id, 60)
    generate(local, Results(str(tmp_path / "videos")), pipe)
    counts = [frames for _, _, _, frames, _ in shown]
    assert counts == sorted(counts) and set(counts) == {1, 5, 9}
    pictures = [Image.open(io.BytesIO(image)).convert("RGBA") for *_, image in shown]
    assert [picture.size for picture in pictures] == [(96 * count, 96) for count in counts]
    first, keyframes = (np.asarray(pictures[i])[..., 3] for i in (0, len(counts) - 1 - counts[::-1].index(5)))
    assert first.min() == 0 < first.max()  # some cells are missing
    assert keyframes.min() == 255  # none is, at the end of a phase


def test_no_preview_is_drawn_that_nobody_watches(local, catalogue, pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("cogvideo.serve.generation.PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr("cogvideo.serve.generation.PREVIEW_SHARE", 1e9)
    monkeypatch.setattr("cogvideo.serve.generation.KEYFRAMES_SHARE", 1e9)
    monkeypatch.setattr("cogvideo.serve.jobs.NEW_SECONDS", -1.0)
    job = add(local, catalogue, num_frames=5)
    monkeypatch.setattr(JobStore, "show", lambda *told: pytest.fail("drawn"))
    generate(local, Results(str(tmp_path / "videos")), pipe)
    assert local.get(job.id).status == COMPLETED


def test_a_job_that_fails_says_why_and_the_others_are_generated(
    local, catalogue, nano, tmp_path, monkeypatch
):
    results = Results(str(tmp_path / "videos"))
    worker = Worker(local, results, Settings(models=(str(nano),)))
    bad = add(local, catalogue, "a cat jumps", seed=1, num_frames=5)
    good = add(local, catalogue, seed=2, num_frames=5)
    pipe = worker.models.get("nano")
    keyframes = pipe.keyframes

    def fails(prompts, seeds, **options):
        if "a cat jumps" in prompts:
            raise RuntimeError("it is a cat")
        return keyframes(prompts, seeds, **options)

    monkeypatch.setattr(pipe, "keyframes", fails)
    monkeypatch.setattr(worker.pace, "most", lambda model: 2)  # both in one batch
    assert worker.work() and not worker.work()
    assert local.get(good.id).status == COMPLETED
    failed = local.get(bad.id)
    assert (failed.status, failed.error_code) == (
        FAILED,
        "generation_failed",
    ) and "cat" in failed.error_message


def test_a_worker_regresses_as_well(local, tmp_path):
    results = Results(str(tmp_path / "videos"))
    job = local.add(new_id(), Catalogue(["direct-tiny"]).check({"prompt": WORDS}), [])
    assert Worker(local, results, Settings(models=("direct-tiny",))).work()
    assert local.get(job.id).status == COMPLETED and results.get(job.id, "video-0.mp4")


def test_models_leave_the_memory_least_used_first(nano, tmp_path):
    from cogvideo.serve.worker import Models

    names = ["one", "two", "three"]
    for name in names:
        shutil.copytree(nano, tmp_path / name)
    models = Models({name: str(tmp_path / name) for name in names}, "cpu", 1e12)
    one = models.get("one")
    assert models.get("one") is one
    models.memory = 2.5 * models.used
    models.get("two")
    models.get("one")
    models.get("three")
    assert list(models._loaded) == ["one", "three"] and models.used <= models.memory


def test_batches_grow_while_that_is_worth_it():
    pace = Pace(5.0)
    assert pace.most("tiny") == 1
    pace.learn("tiny", 1, 8.0, 0.5)
    assert pace.most("tiny") == 2  # tried
    pace.learn("tiny", 2, 16.0, 1.0)
    assert pace.most("tiny") == 1  # of no use: each takes as long
    pace.learn("gpu", 1, 8.0, 0.5)
    pace.learn("gpu", 2, 9.0, 0.5)
    assert pace.most("gpu") == 4
    pace.learn("gpu", 4, 10.0, 4.0)
    assert pace.most("gpu") == 5  # with more, the first frame would come after 5 s
    pace.learn("gpu", 5, 10.0, None)
    assert pace.most("gpu") == 5 and pace.most("tiny") == 1


# -- uploads --


def png(side=40, color=(200, 30, 30)):
    stream = io.BytesIO()
    Image.new("RGB", (side, side), color).save(stream, "png")
    return stream.getvalue()


def test_an_image_becomes_a_frame_and_a_video_its_last_ones(tmp_path):
    begin = uploads.decode(png(), 16, 1.0, 4)
    clip = uploads.load(begin.data)
    assert (begin.kind, begin.frames, clip.frames.shape) == ("image", 1, (1, 16, 16, 3))
    assert abs(clip.frames[0, 8, 8].astype(int) - (200, 30, 30)).max() < 3
    frames = np.zeros((33, 32, 32, 3), np.uint8) + np.arange(33, dtype=np.uint8)[:, None, None, None] * 7
    Clip(frames, 8.0).save(tmp_path / "clip.mp4")
    begin = uploads.decode((tmp_path / "clip.mp4").read_bytes(), 16, 1.0, 4)
    clip = uploads.load(begin.data)
    assert (begin.kind, begin.frames) == ("video", 4)
    means = clip.frames.mean((1, 2, 3))
    assert abs(means - frames[[8, 16, 24, 32]].mean((1, 2, 3))).max() < 6


@pytest.mark.parametrize("data", [b"", b"nonsense" * 100, png()[:60], b"\x89PNG" + b"\0" * 50])
def test_what_is_no_picture_is_refused_in_one_line(data):
    with pytest.raises(Refusal, match="input_reference") as refused:
        uploads.decode(data, 16, 1.0, 4)
    assert "\n" not in str(refused.value) and "/tmp" not in str(refused.value)


def test_a_decompression_bomb_is_refused():
    import struct
    import zlib

    side = 30_000  # 900 million pixels in a megabyte
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(b"\0" * (side // 8 + 1) * 1000) for _ in range(side // 1000)) + rows.flush()

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    assert len(bomb) < 2**20
    with pytest.raises(Refusal, match="input_reference"):
        uploads.decode(bomb, 16, 1.0, 4)


# -- doors --


def test_others_need_a_key_or_an_explicit_word(tmp_path):
    check_address("127.0.0.1", (), False)
    check_address("0.0.0.0", ("k" * 16,), False)
    check_address("0.0.0.0", (), True)
    with pytest.raises(ValueError, match="--api-keys"):
        check_address("0.0.0.0", (), False)
    (tmp_path / "keys").write_text("a" * 20 + "\n\n" + "b" * 20 + "\n")
    assert read_keys(tmp_path / "keys", f" {'c' * 20}, ") == ("a" * 20, "b" * 20, "c" * 20)
    with pytest.raises(ValueError, match="16 characters"):
        read_keys(None, "short")
    doors = Doors(("a" * 20,))
    assert doors.knows(f"Bearer {'a' * 20}") and doors.knows(f"bearer {'a' * 20}")
    for wrong in ("", "Bearer", "Bearer x", "a" * 20, f"Basic {'a' * 20}", "Bearer \udcff"):
        assert not doors.knows(wrong)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", None),
        ("bytes=0-9", (0, 9)),
        ("bytes=90-", (90, 99)),
        ("bytes=-5", (95, 99)),
        ("bytes=-500", (0, 99)),
        ("bytes=50-500", (50, 99)),
        ("bytes=100-", (1, 0)),
        ("bytes=-0", (1, 0)),
        ("bytes=1-2,4-5", None),
        ("bytes=a-b", None),
        ("bytes=-", None),
        ("pages=1-2", None),
        ("bytes=²-3", None),
    ],
)
def test_ranges(header, expected):
    assert byte_range(header, 100) == expected


# -- HTTP --


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(app, port=None):
    """A real server in a thread; its address."""
    import uvicorn

    config = uvicorn.Config(app, port=port or free_port(), log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{config.port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def service(nano, tmp_path_factory, catalogue):
    folder = tmp_path_factory.mktemp("service")
    store = JobStore(f"sqlite:///{folder / 'jobs.sqlite'}", max_queue=500)
    results = Results(str(folder / "videos"))
    yield Service(catalogue, store, results, Doors(max_upload=2**20), Statistics(store))
    store.engine.dispose()


@pytest.fixture(scope="module")
def address(service, nano):
    """A server with one worker, in threads of this process."""
    worker = Worker(service.store, service.results, Settings(models=(str(nano),)))
    thread = threading.Thread(target=worker.run)
    thread.start()
    with running(build_app(service)) as at:
        yield at
    worker.stopping.set()
    thread.join()


def call(address, path, method="GET", body=None, headers=None):
    """Status, headers and body of a request."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    more = {"Content-Type": "application/json"} if isinstance(body, dict) else {}
    request = urllib.request.Request(address + path, data, {**more, **(headers or {})}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except HTTPError as error:
        return error.code, error.headers, error.read()


def ask(address, **fields):
    status, _, body = call(address, "/v1/videos", "POST", {"prompt": WORDS, **fields})
    assert status == 200, body
    return json.loads(body)


def wait(address, id, seconds=120):
    for _ in range(10 * seconds):
        video = json.loads(call(address, f"/v1/videos/{id}")[2])
        if video["status"] in ("completed", "failed"):
            return video
        time.sleep(0.1)
    raise AssertionError(f"{id} is not finished: {video}")


def test_a_video_by_the_openai_client(address, tmp_path):
    """The published client, unchanged: form with an image, poll, content, list, remix, delete."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    file = tmp_path / "begin.png"
    file.write_bytes(png())
    video = client.videos.create_and_poll(
        prompt=WORDS, model="nano", seconds="4", input_reference=file, extra_body={"seed": 3, "fps": 1}
    )
    assert video.status == "completed" and video.progress == 100 and video.object == "video"
    assert video.size and video.seconds == "4" and video.error is None and video.completed_at
    content = client.videos.download_content(video.id)
    content.write_to_file(tmp_path / "video.mp4")
    assert Clip.load(tmp_path / "video.mp4").frames.shape[0] == 5
    for variant in ("thumbnail", "spritesheet"):
        Image.open(io.BytesIO(client.videos.download_content(video.id, variant=variant).read())).verify()

    other = client.videos.remix(video.id, prompt="a cat jumps")
    assert other.remixed_from_video_id == video.id and other.prompt == "a cat jumps"
    client.videos.poll(other.id)
    ids = [one.id for one in client.videos.list(limit=1)]  # goes through all pages
    assert ids[:2] == [other.id, video.id]
    assert client.videos.delete(other.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(other.id)
    with pytest.raises(openai.BadRequestError, match="choose one of") as refused:
        client.videos.create(prompt=WORDS, size="1280x720")
    assert refused.value.param == "size" and refused.value.code == "invalid_value"
    assert [model.id for model in client.models.list()] == ["nano"]


def test_content_has_ranges_and_an_etag_and_is_there_when_it_is_completed(address):
    id = ask(address, num_frames=5, seed=1)["id"]
    wait(address, id)
    path = f"/v1/videos/{id}/content"
    status, headers, whole = call(address, path)
    assert status == 200 and headers["Content-Type"] == "video/mp4" and headers["Accept-Ranges"] == "bytes"
    assert int(headers["Content-Length"]) == len(whole)
    status, part_headers, part = call(address, path, headers={"Range": "bytes=10-19"})
    assert (status, part) == (206, whole[10:20])
    assert part_headers["Content-Range"] == f"bytes 10-19/{len(whole)}"
    assert call(address, path, headers={"Range": f"bytes={len(whole)}-"})[0] == 416
    assert call(address, path, headers={"If-None-Match": headers["ETag"]})[0] == 304
    assert call(address, path, headers={"Range": "bytes=0-1", "If-Range": '"other"'})[0] == 200
    assert call(address, path + "?variant=poster")[0] == 400 and call(address, path + "?index=1")[0] == 400


def test_events_tell_progress_and_show_frames_until_the_end(address):
    id = ask(address, num_frames=9)["id"]
    _, headers, body = call(address, f"/v1/videos/{id}/events")
    assert headers["Content-Type"].startswith("text/event-stream")
    blocks = [block for block in body.decode().split("\n\n") if block.startswith("event")]
    named = [(b.split("\n")[0][7:], json.loads(b.split("\n")[1][6:])) for b in blocks]
    progress = [data["progress"] for name, data in named if name == "progress"]
    assert progress == sorted(progress) and progress[-1] == 100
    assert named[-1][1]["status"] == "completed"
    for data in (data for name, data in named if name == "preview"):
        image = Image.open(io.BytesIO(base64.b64decode(data["image"].partition(",")[2])))
        assert image.width == data["frames"] * image.height


def test_deleting_stops_the_work_within_a_second(address, service):
    ids = [ask(address, n=16, seed=i)["id"] for i in range(2)]
    for _ in range(200):
        if json.loads(call(address, f"/v1/videos/{ids[0]}")[2])["status"] == "in_progress":
            break
        time.sleep(0.05)
    for id in ids:
        assert json.loads(call(address, f"/v1/videos/{id}", "DELETE")[2])["deleted"]
        assert json.loads(call(address, f"/v1/videos/{id}")[2])["error"]["code"] == "cancelled"
    started = time.monotonic()
    quick = ask(address, num_frames=1)["id"]
    while json.loads(call(address, f"/v1/videos/{quick}")[2])["status"] == "queued":
        assert time.monotonic() - started < 3
        time.sleep(0.02)
    wait(address, quick)
    assert not {*ids} & {*service.results.ids()}
    assert call(address, f"/v1/videos/{ids[0]}/content")[0] == 409


@pytest.mark.parametrize(
    ("path", "method", "body", "status", "code"),
    [
        ("/v1/videos/video_none", "GET", None, 404, "not_found"),
        ("/v1/videos/..%2F..%2Fetc", "GET", None, 404, "not_found"),
        ("/v1/videos/video_none", "DELETE", None, 404, "not_found"),
        ("/v1/videos/video_none/content", "GET", None, 404, "not_found"),
        ("/v1/videos/video_none/events", "GET", None, 404, "not_found"),
        ("/v1/videos/video_none/remix", "POST", {"prompt": "x"}, 404, "not_found"),
        ("/v1/videos?limit=1000", "GET", None, 400, "invalid_value"),
        ("/v1/videos?after=x", "GET", None, 404, "not_found"),
        ("/v1/videos?order=up", "GET", None, 400, "invalid_value"),
        ("/v1/videos", "POST", b"{", 400, "invalid_json"),
        ("/v1/videos", "POST", b"[1]", 400, "invalid_json"),
        ("/v1/videos", "POST", b"[" * 100_000, 400, "invalid_json"),
        ("/v1/videos", "POST", b"x" * (2**20 + 1), 413, "too_large"),
        (
            "/v1/videos",
            "POST",
            {"prompt": "x", "input_reference": "file:///etc/passwd"},
            400,
            "invalid_value",
        ),
        ("/v1/videos", "PUT", {}, 405, "method_not_allowed"),
        ("/v1/models/sora", "GET", None, 404, "model_not_found"),
        ("/page/..%2Fapp.py", "GET", None, 404, "not_found"),
        ("/nowhere", "GET", None, 404, "not_found"),
    ],
)
def test_errors_have_one_shape(address, path, method, body, status, code):
    found, headers, text = call(address, path, method, body, {"Content-Type": "application/json"})
    error = json.loads(text)["error"]
    assert (found, error["code"]) == (status, code) and error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_body_without_a_length_is_cut_off_too(address):
    """Chunks, more of them than a request may have."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as line:
        line.sendall(
            b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: application/json\r\n\r\n"
        )
        try:
            for _ in range(40):
                line.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            line.sendall(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            return
        line.settimeout(10)
        assert b" 413 " in line.recv(200)


def test_unknown_words_are_warnings_and_hints(address, service):
    status, _, body = call(address, "/v1/models/nano/hints?prompt=a%20zyzzyva%20runs")
    assert status == 200 and "zyzzyva" in json.loads(body)["unknown"]
    video = ask(address, prompt="a zyzzyva runs", num_frames=1)
    assert any("zyzzyva" in warning for warning in video["warnings"])


def test_health_metrics_and_documents(address):
    assert json.loads(call(address, "/health")[2])["status"] == "ok"
    text = call(address, "/metrics")[2].decode()
    assert 'cogvideo_jobs{status="completed"}' in text and "cogvideo_request_seconds_bucket" in text
    assert call(address, "/docs")[0] == 200
    paths = json.loads(call(address, "/openapi.json")[2])["paths"]
    assert {"/v1/videos", "/v1/videos/{video_id}", "/v1/models"} <= paths.keys()
    status, headers, body = call(address, "/")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"] and b"<html" in body


def test_keys_are_asked_for_at_all_doors_but_the_page(service):
    from dataclasses import replace

    with running(build_app(replace(service, doors=Doors(("k" * 20,))))) as at:
        assert call(at, "/")[0] == 200 and call(at, "/health")[0] == 200
        for path in ("/v1/videos", "/v1/models", "/metrics", "/v1/videos/x/content"):
            status, headers, body = call(at, path)
            assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
            assert headers["WWW-Authenticate"] == "Bearer"
        assert call(at, "/v1/models", headers={"Authorization": f"Bearer {'k' * 20}"})[0] == 200


def test_other_pages_may_call_only_where_they_are_named(service):
    from dataclasses import replace

    origin = {"Origin": "https://example.org"}
    with running(build_app(service)) as at:
        assert "Access-Control-Allow-Origin" not in call(at, "/v1/models", headers=origin)[1]
    with running(build_app(replace(service, doors=Doors(origins=("https://example.org",))))) as at:
        headers = call(at, "/v1/models", headers=origin)[1]
        assert headers["Access-Control-Allow-Origin"] == "https://example.org"


def test_a_full_queue_answers_429(catalogue, tmp_path):
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}", max_queue=1)
    service = Service(catalogue, store, Results(str(tmp_path / "v")), Doors(), Statistics(store))
    with running(build_app(service)) as at:
        ask(at)
        status, headers, body = call(at, "/v1/videos", "POST", {"prompt": WORDS})
    assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full") and int(
        headers["Retry-After"]
    ) >= 1


def test_no_request_of_the_schema_gives_an_error_of_the_server(address, tmp_path):
    """Schemathesis: requests that fit the schema and that do not, with and without a real video."""
    pytest.importorskip("schemathesis")
    done = ask(address, num_frames=5)["id"]
    wait(address, done)
    schema = json.loads(call(address, "/openapi.json")[2])
    known = {"video_id": [done, "video_none"], "model": ["nano", "none"]}
    for methods in schema["paths"].values():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path" and method != "delete":
                    parameter["schema"]["enum"] = known[parameter["name"]]
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(schema))
    program = Path(sys.executable).with_name("schemathesis")
    options = ["--checks", "not_a_server_error", "--max-examples", "12", "--seed", "1"]
    options += ["--phases", "coverage,fuzzing", "--request-timeout", "30", "--no-color"]
    command = [program, "run", file, "--url", address, *options]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
    assert re.search(r"[1-9][0-9]{2,} generated", found.stdout), found.stdout[-2000:]


# -- faults --


def start(command, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen([sys.executable, "-m", "cogvideo", *command], env=environment)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_two_workers_of_one_database_one_killed_in_the_middle(nano, url, catalogue, tmp_path, monkeypatch):
    """Every job is completed once, to the file that its seed gives."""
    store = JobStore(url)
    results = Results(str(tmp_path / "videos"))
    jobs = [add(store, catalogue, seed=seed % 3) for seed in range(9)]
    command = ["worker", "--database", url, "--results", results.url, "--models", str(nano)]
    workers = [start(command) for _ in range(2)]
    try:
        for _ in range(600):
            if any(store.get(job.id).status == IN_PROGRESS for job in jobs):
                break
            time.sleep(0.05)
        kill(workers[0])
        for _ in range(900):
            if all(store.get(job.id).status == COMPLETED for job in jobs):
                break
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()
    assert [store.get(job.id).status for job in jobs] == [COMPLETED] * 9
    videos = [results.get(job.id, "video-0.mp4") for job in jobs]
    assert all(videos[i] == videos[i % 3] for i in range(9)) and len(set(videos)) == 3
    store.engine.dispose()


def test_a_server_killed_and_started_again_finishes_what_was_asked(nano, tmp_path):
    port = free_port()
    at = f"http://127.0.0.1:{port}"
    command = ["serve", "--port", str(port), "--data", str(tmp_path), "--models", str(nano)]

    def up():
        process = start(command)
        for _ in range(600):
            try:
                if call(at, "/health")[0] == 200:
                    return process
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the server does not start")

    server = up()
    ids = [ask(at, seed=1)["id"] for _ in range(3)]
    kill(server)
    server = up()
    try:
        assert {wait(at, id)["status"] for id in ids} == {"completed"}
        videos = {call(at, f"/v1/videos/{id}/content")[2] for id in ids}
        assert len(videos) == 1
    finally:
        server.terminate()
        server.wait()


def test_the_examples_of_the_readme_run_as_printed(nano, tmp_path):
    """The lines of curl and the program of the client, but for the port, and the model that serves; and
    examples/client.py."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    pytest.importorskip("openai")
    port = free_port()
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    chapter = readme.partition("## Serve\n")[2].partition("\n## ")[0].replace("8000", str(port))
    (shell,) = re.findall("```bash\n(.*?)```", chapter, re.DOTALL)
    (program,) = re.findall("```py\n(.*?)```", chapter, re.DOTALL)
    server = start(["serve", "--port", str(port), "--data", str(tmp_path / "data"), "--models", str(nano)])
    try:
        for _ in range(600):
            with suppress(OSError):
                if call(f"http://127.0.0.1:{port}", "/health")[0] == 200:
                    break
            time.sleep(0.05)
        made = []
        for command in (["bash", "-ec", shell], [sys.executable, "-c", program]):
            subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
            made.append((tmp_path / "dog.mp4").read_bytes())
            (tmp_path / "dog.mp4").unlink()
        example = Path(__file__).parent.parent / "examples" / "client.py"
        address = f"http://127.0.0.1:{port}"
        subprocess.run([sys.executable, example, address], cwd=tmp_path, check=True, timeout=120)
        made.append((tmp_path / "client.mp4").read_bytes())
        assert made[0] == made[1] == made[2] and b"ftyp" in made[0][:12]  # the same seed
        assert "event: progress" in (tmp_path / "progress.txt").read_text()
    finally:
        server.terminate()
        server.wait()


def test_a_database_that_goes_and_comes_back(nano, catalogue, tmp_path):
    """503 while it is away; then everything goes on by itself."""
    if find_programs() is None:
        pytest.skip("PostgreSQL is not installed")
    with postgres() as server:
        store = JobStore(server.url)
        results = Results(str(tmp_path / "videos"))
        worker = Worker(store, results, Settings(models=(str(nano),)))
        thread = threading.Thread(target=worker.run)
        thread.start()
        service = Service(catalogue, store, results, Doors(), Statistics(store))
        try:
            with running(build_app(service)) as at:
                id = ask(at)["id"]
                server.stop()
                status, headers, body = call(at, f"/v1/videos/{id}")
                assert (status, json.loads(body)["error"]["code"]) == (503, "unavailable")
                assert headers["Retry-After"] and call(at, "/health")[0] == 503
                time.sleep(1)
                server.start()
                assert wait(at, id)["status"] == "completed"
        finally:
            worker.stopping.set()
            thread.join()
            store.engine.dispose()


def test_results_that_cannot_be_written_fail_the_job_with_the_reason(
    local, catalogue, nano, tmp_path, monkeypatch
):
    results = Results(str(tmp_path / "videos"))
    worker = Worker(local, results, Settings(models=(str(nano),)))
    job = add(local, catalogue, num_frames=1)
    monkeypatch.setattr(
        Results, "put", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    worker.work()
    failed = local.get(job.id)
    assert (failed.status, failed.error_code) == (FAILED, "storage_error") and "space" in failed.error_message
