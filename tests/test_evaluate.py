"""Two sets of clips in, numbers with their protocols out: guards, floors, controls, cache, workers, pages."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideo import cli
from cogvideo.data.tinyworld import MOTIONS, PLACES, TinyWorld, sprites
from cogvideo.data.tinyworld.reading import read
from cogvideo.eval import evaluate as ev
from cogvideo.eval import extractors, features, tinyworld
from cogvideo.eval.clips import Item, choose, find_items, pair
from cogvideo.eval.evaluate import MeanResult, Request, evaluate
from cogvideo.eval.protocol import PRESETS, Protocol
from cogvideo.eval.report import save, table
from cogvideo.video import Clip, TooFewFrames

pytest.importorskip("skimage", reason="the optical flow is scikit-image's")
PROTOCOL = Protocol(frames=9, fps=2, size=48, filter="area")


def write_world(folder: Path, seed: int, count: int, held_out: bool = True) -> Path:
    """Rendered clips of four seconds, each with its caption as the title."""
    folder.mkdir(parents=True)
    world = TinyWorld(sprites(12), seed, held_out, language="en", even=True)
    for i in range(count):
        video = world[i]
        caption = video.caption(np.random.default_rng((seed, i)))
        Clip(video.frames(np.arange(9) / 2, 48), 2.0, caption).save(folder / f"clip-{i}.mp4")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return write_world(root / "a", 1, 12), write_world(root / "b", 2, 12)


@pytest.fixture(scope="module")
def report(world):
    a, b = world
    request = Request(a, b, PROTOCOL, ("efficientnet-lite0", "tinyworld"), few=True, scorer="tinyworld")
    return evaluate(request)


# -- what the numbers mean


def test_a_set_against_itself_is_nearer_than_its_floor(world):
    a, _ = world
    result = evaluate(Request(a, a, PROTOCOL, few=True, controls=False)).sets[0]
    assert result.kind == "frechet" and abs(result.value) < 1e-6 < result.floor.mean


def test_another_world_is_farther_than_the_floor_and_noise_is_farthest(world, tmp_path):
    a, b = world
    noise = tmp_path / "noise"
    noise.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Clip(rng.integers(0, 256, (9, 48, 48, 3), dtype=np.uint8), 2.0).save(noise / f"{i}.mp4")
    alike = evaluate(Request(a, b, PROTOCOL, few=True, controls=False))
    spoilt = evaluate(Request(noise, b, PROTOCOL, few=True, controls=False))
    first, second = (next(r for r in found.sets if r.kind == "frechet") for found in (alike, spoilt))
    assert second.halves.mean > 3 * first.halves.mean
    assert abs(first.halves.mean - first.floor.mean) < 3 * (first.halves.deviation + first.floor.deviation)
    measures = {result.measure: result.value for result in spoilt.generated}
    reference = {result.measure: result.value for result in spoilt.reference}
    assert measures["flicker"] > 5 * reference["flicker"] and measures["motion"] > reference["motion"]
    assert measures["warping error"] > 5 * reference["warping error"]


def test_frozen_clips_have_no_motion_and_the_judge_notices(world, tmp_path):
    a, b = world
    frozen = tmp_path / "frozen"
    frozen.mkdir()
    for item in find_items(a):
        frames = item.frames(PROTOCOL)
        Clip(np.repeat(frames[:1], 9, axis=0), 2.0, item.caption).save(frozen / f"{item.stem}.mp4")
    found = evaluate(Request(frozen, b, PROTOCOL, few=True, scorer="tinyworld", controls=False))
    measures = {result.measure: result.value for result in found.generated}
    reference = {result.measure: result.value for result in found.reference}
    assert all(measures[name] < 0.2 * reference[name] for name in ("motion", "flicker", "warping error"))
    right = {result.measure: result.value for result in found.adherence}
    assert right["sprite right (%)"] > 80 > 40 > right["motion right (%)"]


def test_a_network_that_averages_over_time_is_called_blind(world, monkeypatch):
    class Blind(extractors.Lite0):
        name = "blind"

        def features(self, frames, protocol):
            return super().features(frames, protocol)[:, :80]  # without the change over time

    monkeypatch.setitem(extractors.SHIPPED, "blind", Blind)
    features._extractor.cache_clear()
    a, b = world
    found = evaluate(Request(a, b, PROTOCOL, ("blind",), few=True))
    assert found.sets[0].sees_motion is False
    assert any("blind may be blind to motion" in warning for warning in found.warnings)


def test_every_number_names_its_protocol(report, tmp_path):
    written = json.loads(save(report, tmp_path / "report.json")[0].read_text())
    for result in written["sets"]:
        protocol = result["protocol"]
        assert protocol["sha256"] == result["sha256"] and len(protocol["sha256"]) == 64
        assert protocol["clips"] == [12, 12] and protocol["frames"] == 9 and protocol["fps"] == 2
        assert (
            protocol["filter"] == "area"
            and protocol["order"] == "crop-resize"
            and protocol["versions"]["torch"]
        )
    names = {result["metric"] for result in written["sets"]}
    assert not any("FVD" in name for name in names)
    assert {row["measure"] for row in written["clips"]["generated"]} == set(features.MEASURES)


def test_captions_are_read_and_judged(report):
    values = {result.measure: result.value for result in report.adherence}
    assert values["sprite right (%)"] > 90 and values["all three right (%)"] > 75
    assert [entry.verdict for entry in report.ranked].count("right") >= 9


def test_the_page_holds_its_clips_and_escapes_names(world, tmp_path):
    a, b = world
    evil = tmp_path / "evil"
    evil.mkdir()
    for i, item in enumerate(find_items(a)):
        Clip(item.frames(PROTOCOL), 2.0, "<script>alert(1)</script>").save(evil / f"x{i}.mp4")
    found = evaluate(Request(evil, b, PROTOCOL, few=True, controls=False))
    page = save(found, tmp_path / "r.json")[1].read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count("data:image/webp;base64,") == 12 and "http" not in page.partition("<h2>Protocol")[0]
    assert "warning: 12 clips on a side are few" in table(found)


# -- reading videos


def test_frames_are_chosen_by_time_and_not_by_the_containers_rate(tmp_path):
    """The same ramp of grey at 4 and at 24 fps gives the same frames."""
    for fps in (4, 24):
        times = np.arange(4 * fps + 1) / fps
        grey = (times * 60).round().astype(np.uint8)
        frames = np.broadcast_to(grey[:, None, None, None], (len(times), 32, 32, 3))
        Clip(np.ascontiguousarray(frames), fps).save(tmp_path / str(fps) / "ramp.mp4")
    protocol = Protocol(frames=9, fps=2, size=16)
    slow, fast = (find_items(tmp_path / str(fps))[0].frames(protocol) for fps in (4, 24))
    assert np.abs(slow.astype(int) - fast).max() <= 2
    assert np.abs(fast.mean((1, 2, 3)) - np.arange(9) / 2 * 60).max() < 3


def test_crop_filter_and_order_change_what_is_seen(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 40, 72, 3), dtype=np.uint8)
    Clip(frames, 4).save(tmp_path / "a.mp4")
    (item,) = find_items(tmp_path)
    base = dict(frames=4, fps=4, size=20)
    variants = [
        Protocol(**base),
        Protocol(**base, crop="none"),
        Protocol(**base, filter="area"),
        Protocol(**base, order="resize-crop", filter="bilinear"),
    ]
    seen = [item.frames(variant) for variant in variants]
    assert all(found.shape == (4, 20, 20, 3) for found in seen)
    assert not any(np.array_equal(seen[0], other) for other in seen[1:])


def test_videos_that_are_too_short_are_refused_skipped_or_repeated(tmp_path):
    Clip(np.zeros((3, 16, 16, 3), np.uint8), 4).save(tmp_path / "short.mp4")
    (item,) = find_items(tmp_path)
    with pytest.raises(TooFewFrames, match="short.mp4 lasts 0.50 s, and 9 frames at 4 fps take 2.00 s"):
        item.frames(Protocol(frames=9, fps=4, size=16))
    assert len(item.frames(Protocol(frames=9, fps=4, size=16, short="repeat"))) == 9
    row = features.work(features.Job(item, Protocol(frames=9, fps=4, size=16, short="skip"), ()))
    assert "lasts 0.50 s" in row.skipped
    with pytest.raises(ValueError, match="choose fewer frames"):
        features.work(features.Job(item, Protocol(frames=9, fps=4, size=16), ()))


def test_a_random_start_depends_on_the_seed_and_the_name(tmp_path):
    frames = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None, None] * 3, (64, 16, 16, 3))
    Clip(np.ascontiguousarray(frames), 8).save(tmp_path / "long.mp4")
    (item,) = find_items(tmp_path)
    first, again, other = (
        item.frames(Protocol(frames=4, fps=8, size=16, start="random", seed=seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_lists_tables_folders_and_order(tmp_path, world):
    a, _ = world
    assert [item.stem for item in find_items(a)][:3] == ["clip-0", "clip-1", "clip-2"]  # 2 before 10
    (tmp_path / "list.txt").write_text("\n".join(str(path) for path in sorted(a.glob("*.mp4"))))
    assert len(find_items(tmp_path / "list.txt")) == 12
    rows = [json.dumps({"file_name": str(path), "text": "a dog"}) for path in sorted(a.glob("*.mp4"))]
    (tmp_path / "table.jsonl").write_text("\n".join(rows))
    assert {item.caption for item in find_items(tmp_path / "table.jsonl")} == {"a dog"}
    (tmp_path / "list.txt").write_text("nowhere.mp4")
    with pytest.raises(ValueError, match="nowhere.mp4, which does not exist"):
        find_items(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="there is no .*give a folder of videos"):
        find_items(tmp_path / "nothing")


def test_items_are_chosen_by_the_seed(world):
    items = find_items(world[0])
    assert choose(items, 5, 1) == choose(items, 5, 1) != choose(items, 5, 2)
    with pytest.raises(ValueError, match="choose at most 12"):
        choose(items, 13, 0)


# -- guards


def test_what_would_give_a_worthless_number_is_refused(world, tmp_path):
    a, b = world
    with pytest.raises(ValueError, match="12 clips on a side are too few .* or --few"):
        evaluate(Request(a, b, PROTOCOL))
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for i in range(8):
        (fewer / f"{i}.mp4").write_bytes((a / f"clip-{i}.mp4").read_bytes())
    with pytest.raises(ValueError, match="8 generated and 12 reference clips.*--count 8"):
        evaluate(Request(fewer, b, PROTOCOL, few=True))
    (fewer / "7.mp4").write_bytes((fewer / "0.mp4").read_bytes())
    with pytest.raises(ValueError, match="1 generated clips occur more than once.*0.mp4 and .*7.mp4"):
        evaluate(Request(fewer, fewer, PROTOCOL, few=True, controls=False))
    with pytest.raises(ValueError, match="no reference of the same name, such as 0"):
        evaluate(Request(fewer, b, Protocol(frames=9, fps=2, size=48, count=8), few=True, paired=True))
    for wrong in ({"frames": 0}, {"fps": 0}, {"size": 1}, {"filter": "x"}, {"crop": "x"}, {"count": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Protocol(**wrong)


def test_missing_extras_are_named_before_any_work(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.registration", None)
    with pytest.raises(ValueError, match=r'needs scikit-image: pip install "cogvideo\[eval\]"'):
        evaluate(Request(*world, PROTOCOL, few=True))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'a cluster needs Ray: pip install "cogvideo\[cluster\]"'):
        evaluate(Request(*world, PROTOCOL, few=True, ray="local"))


def test_copies_of_the_reference_are_reported(world):
    a, _ = world
    found = evaluate(Request(a, a, PROTOCOL, few=True, controls=False))
    assert "12 generated clips equal a reference clip, frame by frame" in found.warnings


def test_pairs_are_compared_frame_by_frame(world, tmp_path):
    a, _ = world
    noisy = tmp_path / "noisy"
    noisy.mkdir()
    rng = np.random.default_rng(0)
    for item in find_items(a):
        frames = item.frames(PROTOCOL).astype(int) + rng.integers(-9, 10, (9, 48, 48, 3))
        Clip(frames.clip(0, 255).astype(np.uint8), 2.0).save(noisy / f"{item.stem}.webp")
    found = evaluate(Request(noisy, a, PROTOCOL, few=True, paired=True, controls=False))
    values = {result.measure: result.value for result in found.paired}
    assert 30 < values["PSNR (dB)"] < 36 and 0.5 < values["SSIM"] < 0.99
    pairs = pair(find_items(noisy), find_items(a))
    assert all(one.stem == other.stem for one, other in pairs)


# -- cache and workers


def test_a_second_run_reads_the_cache_and_gives_the_same(world, tmp_path, monkeypatch):
    a, b = world
    request = Request(a, b, PROTOCOL, few=True, cache=tmp_path / "cache")
    first = evaluate(request)

    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(Item, "frames", fail)
    second = evaluate(request)
    assert first.sets == second.sets and first.generated == second.generated
    for file in (tmp_path / "cache").rglob("*.npz"):
        file.write_bytes(b"damaged")
    monkeypatch.undo()
    assert evaluate(request).sets == first.sets


def test_another_protocol_or_other_bytes_are_not_taken_from_the_cache(world, tmp_path):
    a, _ = world
    item = find_items(a)[0]
    keys = set()
    for protocol in (
        PROTOCOL,
        Protocol(frames=8, fps=2, size=48, filter="area"),
        Protocol(frames=9, fps=2, size=32),
    ):
        keys.add(features._key(features.Job(item, protocol, ("efficientnet-lite0",))))
    other = find_items(a)[1]
    keys.add(features._key(features.Job(other, PROTOCOL, ("efficientnet-lite0",))))
    keys.add(features._key(features.Job(item, PROTOCOL, ("tinyworld",))))
    keys.add(features._key(features.Job(item, PROTOCOL, ("tinyworld",), controls=True)))
    assert len(keys) == 6


def test_two_processes_compute_the_same(world):
    a, b = world
    alone = evaluate(Request(a, b, PROTOCOL, few=True))
    shared = evaluate(Request(a, b, PROTOCOL, few=True, workers=2))
    for one, other in zip(alone.sets, shared.sets):
        assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-6)
    assert [r.value for r in alone.generated] == pytest.approx([r.value for r in shared.generated], rel=1e-4)


# -- networks of others, with random weights in the published layouts


def test_missing_weights_are_one_line(world):
    a, b = world
    for name in extractors.FROM_FILES:
        with pytest.raises(
            ValueError, match=rf"{name} needs .* published at https://.*--weights {name}=FILE"
        ):
            evaluate(Request(a, b, PROTOCOL, (name,), {name: Path("/nowhere/x")}, few=True))
    with pytest.raises(ValueError, match="unknown extractor 'fvd'; choose one of efficientnet-lite0"):
        evaluate(Request(a, b, PROTOCOL, ("fvd",), few=True))


class FakeI3D(torch.nn.Module):
    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ):
        assert x.dtype == torch.float32 and x.size(1) == 3
        return torch.cat((x.mean((2, 3, 4)), (x[:, :, 1:] - x[:, :, :-1]).abs().mean((2, 3, 4))), 1)


class FakeInception(torch.nn.Module):
    def forward(self, x: torch.Tensor, return_features: bool = False):
        assert x.dtype == torch.uint8
        return x.float().mean((2, 3))


@pytest.mark.parametrize("name, net, frames", [("i3d", FakeI3D(), 16), ("inception", FakeInception(), 9)])
def test_torchscript_networks_load_from_a_file(world, tmp_path, name, net, frames):
    torch.jit.script(net).save(str(tmp_path / "net.pt"))
    a, b = world
    protocol = Protocol(frames=frames, fps=(frames - 1) / 4, size=48)
    found = evaluate(Request(a, b, protocol, (name,), {name: tmp_path / "net.pt"}, few=True, controls=False))
    frechet = found.sets[0]
    assert frechet.sha256 == extractors.file_digest(tmp_path / "net.pt")
    assert frechet.metric.startswith("FVD" if name == "i3d" else "FID of frames")
    (tmp_path / "net.pt").write_bytes(b"no network")
    features._extractor.cache_clear()
    with pytest.raises(ValueError, match="net.pt is not a TorchScript file"):
        evaluate(Request(a, b, protocol, (name,), {name: tmp_path / "net.pt"}, few=True))


def test_c3d_of_chainer_and_of_torch_are_the_same_network(world, tmp_path):
    torch.manual_seed(0)
    net = extractors.C3DNet(classes=11, width=16)
    state = net.state_dict()
    names = {name: name.replace(".weight", "/W").replace(".bias", "/b") for name in state}
    np.savez(tmp_path / "c3d.npz", **{names[name]: value.numpy() for name, value in state.items()})
    torch.save(state, tmp_path / "c3d.pt")
    item = find_items(world[0])[0]
    protocol = Protocol(frames=16, fps=3.75, size=48)
    frames = item.frames(protocol)
    rows = [extractors.C3D(tmp_path / file).features(frames, protocol) for file in ("c3d.npz", "c3d.pt")]
    assert torch.equal(*rows) and rows[0].shape == (1, 16) and rows[0].abs().sum() > 0
    shares = extractors.C3D(tmp_path / "c3d.npz").probabilities(rows[0])
    assert shares.shape == (1, 11) and shares.sum().item() == pytest.approx(1)
    few = (write_world(tmp_path / "a", 1, 4), write_world(tmp_path / "b", 2, 4))
    request = Request(*few, protocol, ("c3d",), {"c3d": tmp_path / "c3d.npz"}, few=True, controls=False)
    score = evaluate(request).sets[-1]
    assert score.metric == "Inception Score (c3d)" and 1 <= score.value <= 11
    with pytest.raises(ValueError, match="c3d needs clips of 16 frames; the protocol has 9"):
        evaluate(Request(*world, PROTOCOL, ("c3d",), {"c3d": tmp_path / "c3d.npz"}, few=True))
    del state["fc7.bias"]
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="broken.pt holds no C3D: it lacks fc7.bias"):
        extractors.C3D(tmp_path / "broken.pt").features(frames, protocol)


# -- the judge and the reader of captions


def test_a_sentence_is_read_as_its_scene():
    """The world's own captions, and 400 phrasings by hand."""
    from benchmarks import phrasings

    for language in ("en", "zh"):
        world = TinyWorld(sprites(None), 99, None, language=language, even=True, varied=True)
        right = 0
        for i in range(300):
            video = world[i]
            found = read(video.caption(np.random.default_rng((9, i))))
            right += (found.sprite, found.motion, found.place) == (
                video.scene.sprite,
                video.scene.motion,
                video.scene.place,
            )
        assert right >= 0.97 * 300
        rows = [row for row in phrasings.load() if row.language == language]
        found = [read(row.text) for row in rows]
        same = [(f.sprite, f.motion, f.place) == (r.sprite, r.motion, r.place) for f, r in zip(found, rows)]
        assert sum(same) >= 0.97 * len(rows)


def test_what_a_sentence_does_not_say_is_none_and_not_counted():
    found = read("a dog")
    assert (found.sprite, found.motion, found.place) == ("dog", None, None)
    asked = tinyworld.classes().asked(["a dog", "a cat runs to the left in the desert"])
    seen = torch.tensor(
        [[sprites(None).index("dog"), 0, 0], [0, MOTIONS.index("left"), PLACES.index("desert")]]
    )
    right = asked.right(seen)
    assert right[0, 0] == 1 and right[0, 1:].isnan().all()
    assert right[1, 1:3].tolist() == [1, 1] and right[1, 3] == float(sprites(None)[0] == "cat")
    result = MeanResult.of("x", right[:, 1].numpy(), 0)
    assert result.value == 1 and result.clips == 1


def test_left_and_right_of_chinese_captions_are_those_of_the_scene():
    world = TinyWorld(sprites(12), 5, None, language="zh", even=True, varied=True)
    for i in range(1500):
        video = world[i]
        caption = video.caption(np.random.default_rng((9, i)))
        if "从左到右" in caption:
            assert video.scene.handed > 0, caption


def test_the_judge_needs_four_seconds():
    with pytest.raises(ValueError, match=r"sees clips of 4 s; these last 2 s"):
        tinyworld.reduce(np.zeros((17, 48, 48, 3), np.uint8), 8)


# -- the command


def test_the_command_writes_a_report(world, tmp_path, capsys, monkeypatch):
    a, b = world
    arguments = [
        "evaluate",
        str(a),
        str(b),
        "-o",
        str(tmp_path / "r.json"),
        "--few",
        "--frames",
        "9",
        "--fps",
        "2",
    ]
    cli.parse([*arguments, "--size", "48", "--cache", str(tmp_path / "cache"), "--quiet"])()
    out = capsys.readouterr().out
    assert "Frechet distance (efficientnet-lite0, 160)" in out and "floor at 6" in out
    assert json.loads((tmp_path / "r.json").read_text())["protocol"]["size"] == 48
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    for wrong, match in (
        (["--preset", "x"], "unknown preset 'x'; choose one of tinyworld, ucf101"),
        (["--weights", "i3d"], "--weights needs NAME=FILE"),
        (["--workers", "-1"], "workers must be from 0 to 256"),
    ):
        with pytest.raises(ValueError, match=match):
            cli.parse([*arguments, *wrong])()
    alone = ["evaluate", str(a), "-o", str(tmp_path / "alone.json"), "--scorer", "tinyworld", "--quiet"]
    cli.parse([*alone, "--frames", "9", "--fps", "2", "--size", "48", "--cache", str(tmp_path / "cache")])()
    written = json.loads((tmp_path / "alone.json").read_text())
    assert written["reference"] is None and not written["sets"] and written["adherence"]["generated"]
    assert "Clips that are wrong" in (tmp_path / "alone.html").read_text()
    with pytest.raises(ValueError, match="pairs need a reference"):
        Request(a, None, paired=True)
    with pytest.raises(ValueError, match="--out must end in .json"):
        cli.parse(["evaluate", str(a), str(b), "-o", "r.txt"])()


def test_presets_are_protocols_with_known_networks():
    for preset in PRESETS.values():
        assert preset.about and set(preset.extractors) <= {*extractors.SHIPPED, *extractors.FROM_FILES}
    assert PRESETS["ucf101"].protocol.count >= ev.FEWEST


def test_a_cluster_of_two_nodes_computes_the_same(world, monkeypatch):
    """Two raylets on this machine; Ray Data moves the clips to both."""
    pytest.importorskip("ray", reason='Ray is not installed: pip install "cogvideo[cluster]"')
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        shared = evaluate(Request(*world, PROTOCOL, few=True, controls=False, ray=cluster.address))
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    finally:
        ray.shutdown()
        cluster.shutdown()
    alone = evaluate(Request(*world, PROTOCOL, few=True, controls=False))
    for one, other in zip(alone.sets, shared.sets):
        assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def transformers_folders(tmp_path_factory):
    """Tiny random models of VideoMAE and CLIP, saved as transformers saves them."""
    transformers = pytest.importorskip("transformers", reason="VideoMAE and CLIP are those of transformers")
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    videomae = transformers.VideoMAEConfig(**sizes, image_size=32, patch_size=16, num_frames=8)
    transformers.VideoMAEModel(videomae).save_pretrained(root / "videomae")

    vision = {**sizes, "image_size": 32, "patch_size": 16}
    words = {f"{letter}{end}": 0 for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")}
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    last = len(vocabulary) - 1
    text = {**sizes, "vocab_size": len(vocabulary), "bos_token_id": last - 1, "eos_token_id": last}
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(clip).save_pretrained(root / "clip")
    (root / "vocab.json").write_text(json.dumps(vocabulary))
    (root / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"))
    tokenizer.save_pretrained(root / "clip")
    return {"videomae": root / "videomae", "clip": root / "clip"}


def test_networks_of_transformers_load_from_a_folder(world, transformers_folders):
    protocol = Protocol(frames=8, fps=1.75, size=48)
    request = Request(
        *world, protocol, ("videomae", "clip"), transformers_folders, few=True, controls=False, scorer="clip"
    )
    found = evaluate(request)
    names = {result.metric for result in found.sets if result.kind == "frechet"}
    assert names == {"Frechet distance (VideoMAE)", "Frechet distance of frames (CLIP)"}
    assert all(np.isfinite(result.value) for result in found.sets)
    (similarity,) = found.adherence
    assert similarity.measure == "CLIPSIM (CLIP)" and similarity.clips == 12 and -1 < similarity.value < 1
    with pytest.raises(ValueError, match="this VideoMAE needs clips of 8 frames, not 9"):
        evaluate(Request(*world, PROTOCOL, ("videomae",), transformers_folders, few=True))
