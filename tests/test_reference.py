"""Inference computes what the original's inference computed: stepping, guidance, boost, samplers, prompts."""

from dataclasses import replace

import pytest
import torch
from data.goldens import read
from torch import Tensor

from cogvideo.convert import cogvideo as convert
from cogvideo.generate import cogvideo as pipeline
from cogvideo.generate.cogvideo import CogVideo
from cogvideo.generate.fill import FillState
from cogvideo.generate.sampling import Sampling, guide, sample, stages
from cogvideo.layout import Layout
from cogvideo.model.folder import ModelFolder
from cogvideo.model.transformer import DualChannelTransformer

TOLERANCE = 3e-5  # of logits whose deviation is about 2.5; guidance adds up three of them


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, DualChannelTransformer]:
    from test_convert import STAGE1, quiet, sat

    made = tmp_path_factory.mktemp("reference")
    convert.convert_sat([STAGE1], made / "stage1", 256, quiet)
    stage2 = sat(made / "sat", [read("weights_stage2")], cogvideo_stage=2, window_size=10)
    convert.convert_sat([stage2], made / "stage2", 256, quiet)
    folders = {part: ModelFolder(made / part) for part in ("stage1", "stage2")}
    bases = {part: folder.load("base") for part, folder in folders.items()}
    found = {part: DualChannelTransformer(bases[part], folders[part].load(part)) for part in bases}
    return {name: model.eval() for name, model in found.items()} | {
        "image": DualChannelTransformer(bases["stage1"]).eval()
    }


def padded(rows: list[Tensor], length: int, pad: int) -> Tensor:
    return torch.stack([torch.cat((row.new_full((length - len(row),), pad), row)) for row in rows])


def stepped(
    model: DualChannelTransformer,
    layout: Layout,
    text: list[Tensor],
    codes: Tensor,
    known: int,
    steps: int,
    boost: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Logits of the given frames and of the steps after them, [B, known * N, V] and [B, steps, V].

    text: ids of every row; codes [B, F, N] in laid order, of which the first `known` are the prompt.
    """
    cache = model.new_cache(layout, len(text))
    inputs, first = layout.inputs(codes, model.config.start), known * layout.frame_tokens
    prompt = torch.cat((padded(text, layout.text_len, model.config.pad), inputs[:, :first]), 1)
    with torch.inference_mode():
        before = model(prompt, layout, boost)
        model.prefill(prompt, layout, cache, boost)
        made = [model.step(inputs[:, at : at + 1], cache, [at]) for at in range(first, first + steps)]
    return before, torch.cat(made, 1)


def case(name: str) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    """The golden, its text, and its codes [B, F, N] as they are laid."""
    golden = read(name)
    tokens, length = golden["in.teacher_tokens"].long(), int(golden["text_len"])
    return golden, list(tokens[:, :length]), tokens[:, length + 1 :].unflatten(1, (-1, 400))


def far(made: Tensor, golden: dict[str, Tensor], name: str = "out.step_logits") -> float:
    """The largest difference at the steps that the golden keeps."""
    return float((made[:, golden["kept"].long()] - golden[name]).abs().max())


KEYFRAMES = replace(Layout.keyframes(64, 20, 5), reference=True)
INTERPOLATION = replace(Layout.interpolation(64, 20, 5), reference=True)


@pytest.mark.parametrize(
    "name, stage, layout, known, steps, boost",
    [
        ("stage1_infer_first_frame", "image", Layout.image(64, 20), 0, 400, 1.4),
        ("stage1_infer_cached", "stage1", KEYFRAMES, 1, 1600, 0.0),
        ("stage1_infer_boost", "stage1", KEYFRAMES, 1, 420, 1.4),
        ("stage2_infer_cached", "stage2", INTERPOLATION, 3, 800, 1.4),
        ("stage2_infer_cached_noboost", "stage2", INTERPOLATION, 3, 800, 0.0),
    ],
)
def test_steps_are_the_original_ones(models, name, stage, layout, known, steps, boost):
    golden, text, codes = case(name)
    prompt, made = stepped(models[stage], layout, text, codes, known, steps, boost)
    assert far(made, golden) < TOLERANCE
    if known and "out.prompt_logits" in golden:
        assert (prompt[:1, ::19] - golden["out.prompt_logits"]).abs().max() < TOLERANCE


def test_guidance_is_two_rows_of_one_batch(models):
    golden, text, codes = case("stage1_infer_guidance")
    guider = golden["in.guider_seq"].long()[0, : int(golden["guider_len"])]
    steps = int(golden["kept"].max()) + 1
    _, made = stepped(models["stage1"], KEYFRAMES, [*text, guider], codes.expand(2, -1, -1), 1, steps)
    assert far(made[1:], golden, "out.guider_logits") < TOLERANCE
    assert far(guide(made.flatten(0, 1), 3.0)[None], golden, "out.guided_logits") < 3 * TOLERANCE


def test_without_its_quirks_inference_follows_training(models):
    """Of stage 2: the region mask and the boost of the prompt make the difference, and each shows."""
    golden, text, codes = case("stage2_infer_cached")
    model, layout, rows = models["stage2"], replace(INTERPOLATION, reference=False), (text[:1], codes[:1])
    inputs = layout.inputs(codes[:1], model.config.start)
    tokens = torch.cat((padded(text[:1], 64, model.config.pad), inputs), 1)
    with torch.inference_mode():
        trained = model(tokens, layout)[:, 1200:]
    _, made = stepped(model, layout, *rows, 3, 800)
    assert (made - trained).abs().max() < TOLERANCE
    _, quirky = stepped(model, INTERPOLATION, *rows, 3, 800)
    assert (quirky - trained).abs().max() > 0.1
    _, boosted = stepped(model, layout, *rows, 3, 800, 1.4)
    assert far(boosted, {**golden, "out.step_logits": golden["out.step_logits"][:1]}) > 0.1


@pytest.mark.parametrize(
    "name, sampling",
    [
        ("cogview2", Sampling(1.0, 16, token_temperature=0.89)),
        ("cogvideo", Sampling(1.05, 12, token_temperature=0.89)),
        ("dsr", Sampling(1.0, 6, token_temperature=0.6)),
    ],
)
def test_clusters_are_drawn_as_in_the_original(name, sampling):
    """By the shares of evenly spread numbers: of the clusters, and of the codes of one of them."""
    golden, count = read("sampling"), 400
    sampling = replace(sampling, clusters=golden["labels"].long())
    even = (torch.arange(count) + 0.5) / count
    for row, logits in enumerate(golden["logits"]):
        drawn = torch.cat([sample(logits.expand(len(u), -1), sampling, u) for u in even.split(100)])
        drawn_clusters = sampling.clusters[drawn]
        shares = golden[f"{name}.cluster_probs_topk_normalised"][row]
        ranked = golden["cogvideo.topk_clusters" if name == "cogvideo" else "cogview2.topk_clusters"][row]
        chosen = ranked[: len(shares)].long()  # dsr has the temperature of cogview2
        found = (drawn_clusters[:, None] == chosen).float().mean(0)
        assert abs(float(found.sum()) - 1) < 1e-6 and (found - shares).abs().max() < 1.5 / count
        one = drawn[drawn_clusters == golden[f"{name}.selected_cluster"][row]]
        codes = torch.bincount(one, minlength=20000) / len(one)
        assert (codes - golden[f"{name}.token_probs"][row]).abs().max() < 1.5 / len(one)


def test_a_run_asks_for_what_the_original_asked(nano, monkeypatch):
    """Two samples of one prompt: texts, options and given frames of every fill, and at last the frames."""
    trace = {key: value.long() for key, value in read("pipeline_trace").items()}
    parts = [[0], [1], [2], [3], [4, 5]]  # the original cut the 16 windows of the last round in two
    pipe = CogVideo.from_pretrained(nano, dtype="float32", reference_quirks=True)
    pipe.spec = replace(pipe.spec, model=replace(pipe.spec.model, grid=20))
    pipe.sampling, pipe.templates = stages(convert.SAMPLING), convert.PROMPTS
    asked, encoded, encode = [], [], pipe.text.encode

    def fill(model, layout, text, known, sampling, uniform, *, unconditional, last, cache):
        fills = parts[len(asked)]
        given, made = (torch.cat([trace[f"fill{n}.{key}"] for n in fills]) for key in ("seq", "out"))
        frames = (made.shape[1] - 1) // 400 * 400
        if len(asked):
            assert torch.equal(known.flatten(1), given[:, -frames:][:, : known[0].numel()])
        asked.append((sampling, last, layout.reference))
        yield FillState(layout.unlay(made[:, -frames:].unflatten(1, (-1, 400))), 1, 1, torch.zeros(()))

    monkeypatch.setattr(pipeline, "fill", fill)
    monkeypatch.setattr(pipe.text, "encode", lambda text: encoded.append(text) or encode(text))
    prompt = "一只小狗在跑步"
    draft = pipe.keyframes([prompt] * 2, [1, 2])
    while draft.fps < 8:
        draft = pipe.interpolate(draft)
    assert torch.equal(draft.codes, trace["dsr.image_tokens"].unflatten(0, (2, 33)))
    durations = [f"{seconds}秒" for seconds in ("4.0", "2.0", "1.0", "0.5")]
    wanted = {f"{prompt} 高清摄影", f"{prompt} 视频", "视频", prompt, *durations}
    assert wanted <= set(encoded) <= wanted | {"高清摄影", ""}
    options = Sampling(1.05, 12, text_boost=1.4, token_temperature=0.89)
    guided = replace(options, guidance_scale=3.0)
    assert asked[0] == (replace(options, temperature=1.0, top_k=16), guided, True)
    assert asked[1:] == [(guided, None, True)] + [(options, None, True)] * 3
