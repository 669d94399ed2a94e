import pytest
import torch

from cogvideo.layout import Layout

STAGES = {
    "image": Layout.image(3, 4),
    "stage1": Layout.keyframes(3, 4, 5),
    "stage2": Layout.interpolation(3, 4, 5),
    "image in diagonals": Layout.image(3, 4, skew=2),
    "stage1 in diagonals": Layout.keyframes(3, 4, 5, skew=1),
    "stage2 in diagonals": Layout.interpolation(3, 4, 5, skew=2),
}


def test_masks_are_as_drawn():
    first = Layout.keyframes(2, 1, 3)
    assert first.as_text("temporal") == "# . .\n\n# # .\n\n# # #"
    assert first.as_text("spatial") == "# . .\n\n. # .\n\n. . #"
    second = Layout.interpolation(2, 1, 5)  # laid 0 2 4 1 3
    assert second.as_text("temporal") == "# # # . .\n\n# # # . .\n\n# # # . .\n\n# # # # .\n\n# # # # #"
    assert Layout.image(2, 2).as_text("spatial") == "#...\n##..\n###.\n####"
    given = Layout.interpolation(2, 2, 3).as_text("spatial").split("\n\n")
    assert given[0] == "\n".join(["#### .... ...."] * 4)  # a given frame sees all of itself
    assert given[2] == ".... .... #...\n.... .... ##..\n.... .... ###.\n.... .... ####"


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("shifted", [False, True])
def test_the_rule_token_by_token(name, shifted):
    """Every entry of the mask, from the words of the rule and plain loops."""
    layout, window = STAGES[name], 2
    mask = layout.sees("temporal", window, shifted)
    cut = window // 2 if shifted else 0
    n = layout.frame_tokens

    def tile(raster):
        return (raster // layout.grid + cut) // window, (raster % layout.grid + cut) // window

    def turn(place):
        row, column = divmod(place % n, layout.grid)
        return place // n, column + layout.skew * row if layout.skew else place % n

    for i in range(layout.clip_tokens):
        for j in range(layout.clip_tokens):
            both_given = max(i, j) // n < len(layout.given)
            expected = (turn(j) <= turn(i) or both_given) and tile(i % n) == tile(j % n)
            assert bool(mask[i, j]) == expected


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("channel", ["spatial", "temporal"])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("shifted", [False, True])
def test_cache_segments_hold_exactly_what_a_token_sees(name, channel, window, shifted):
    """Stepping in waves, a token finds in its slice of the cache the tokens that it sees, no others."""
    layout = STAGES[name]
    segments = layout.segments(channel, window, shifted)
    slot = segments.slot
    mask = layout.sees(channel, window, shifted)
    known = len(layout.given)
    holder = {slot[place]: place for place in range(known * layout.frame_tokens)}
    for places in layout.waves(known, window):
        holder.update({slot[place]: place for place in places})
        for place in places:
            slots = range(segments.start[place] + layout.text_len, segments.end[place])
            assert sorted(holder[s] for s in slots) == mask[place].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", STAGES)
def test_waves_make_every_token_once_and_after_all_it_sees(name):
    layout, window = STAGES[name], 2
    known, made = len(layout.given), set(range(len(layout.given) * layout.frame_tokens))
    seen = (
        layout.sees("spatial")
        | layout.sees("temporal", window, False)
        | layout.sees("temporal", window, True)
    )
    waves = list(layout.waves(known, window))
    for places in waves:
        for place, entering in zip(places, layout.entering(places)):
            assert set(seen[place].nonzero().flatten().tolist()) <= made | set(places)
            assert entering in made | {-1}
        assert not made & set(places)
        made |= set(places)
    assert made == set(range(layout.clip_tokens))
    if layout.frames - known > 1:
        assert len(waves) < layout.clip_tokens - known * layout.frame_tokens
    if not layout.skew:  # full attention: one after the other
        assert all(len(places) == 1 for places in layout.waves(known, 0))


def test_a_code_of_a_diagonal_enters_to_the_right_of_it_or_below():
    layout = STAGES["image in diagonals"]
    codes = torch.arange(16).view(1, 1, 16)
    inputs = layout.inputs(codes, start=99).view(4, 4)
    assert inputs.tolist() == [[99, 0, 1, 2], [0, 4, 5, 6], [4, 8, 9, 10], [8, 12, 13, 14]]


def test_a_code_of_a_diagonal_sees_its_neighbours_and_no_later_diagonal():
    """That to the left and the three above are known before it, when the skew is 2."""
    layout = Layout.image(3, 6, skew=2)
    steps = torch.tensor(layout.steps).view(6, 6)
    for row in range(1, 6):
        for column in range(1, 5):
            near = steps[row, column - 1], *steps[row - 1, column - 1 : column + 2]
            assert max(near) < steps[row, column]
    assert layout.as_text("spatial").splitlines()[8].replace(" ", "") == "#####.###..." + "#" + "." * 23


def test_steps_at_the_sizes_of_the_paper():
    layout = Layout.interpolation(64, 20, 5)
    assert len(list(layout.waves(3, 10))) == 590  # of 800, one by one
    assert len(list(Layout.image(32, 16, skew=2).waves(0, 0))) == 46  # of 256


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("channel, window", [("spatial", 0), ("temporal", 0), ("temporal", 2)])
@pytest.mark.parametrize("shifted", [False, True])
def test_groups_hold_every_token_once_and_all_it_sees(name, channel, window, shifted):
    layout = STAGES[name]
    groups = layout.groups(channel, window, shifted)
    assert sorted(groups.flatten().tolist()) == list(range(layout.clip_tokens))
    mask = layout.sees(channel, window, shifted)
    inside = torch.zeros_like(mask)
    for group in groups:
        inside[group[:, None], group[None, :]] = True
    assert not (mask & ~inside).any()


def test_trained_frames_and_loss_mask():
    assert STAGES["image"].trained == (0,)
    assert STAGES["stage1"].trained == (1, 2, 3, 4)  # docs/reference.md, "Loss": not frame 0
    assert STAGES["stage2"].trained == (1, 3)
    assert STAGES["stage2"].loss_mask().view(5, 16).sum(1).tolist() == [0, 0, 0, 16, 16]


def test_positions_follow_time_not_the_laid_order():
    positions = STAGES["stage2"].positions().view(5, 16)
    assert positions[:, 0].tolist() == [0, 32, 64, 16, 48]
    assert positions[3].tolist() == list(range(16, 32))


def test_inputs_are_shifted_by_one_within_a_frame():
    codes = torch.arange(32).view(1, 2, 16)
    inputs = STAGES["stage1"].inputs(codes, start=99).view(2, 16)
    assert inputs[0].tolist() == [99, *range(15)]
    assert inputs[1].tolist() == [99, *range(16, 31)]  # the last token of a frame enters nowhere


def test_lay_and_unlay_are_inverse():
    frames = torch.arange(5).view(1, 5, 1)
    layout = STAGES["stage2"]
    assert layout.lay(frames).flatten().tolist() == [0, 2, 4, 1, 3]
    assert torch.equal(layout.unlay(layout.lay(frames)), frames)


def test_impossible_layouts_are_refused():
    with pytest.raises(ValueError, match="not an order"):
        Layout(2, 4, 3, (0, 1, 1))
    with pytest.raises(ValueError, match="must be laid first"):
        Layout(2, 4, 3, (0, 1, 2), given=(0, 2))
    with pytest.raises(ValueError, match="do not divide"):
        STAGES["stage2"].tiles(3, False)


@pytest.mark.parametrize("grid, window", [(6, 2), (6, 3), (5, 5), (10, 5)])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_of_any_size_are_those_of_the_rolled_map(grid, window, shifted):
    """The original rolls the map back by half a window, rounded down; what is seen lies in one group."""
    layout = Layout.interpolation(2, grid, 3)
    raster = torch.arange(grid**2)
    back = window // 2 if shifted else 0
    rows, columns = (raster // grid - back) // window, (raster % grid - back) // window
    near = (rows[:, None] == rows) & (columns[:, None] == columns)
    mask = layout.sees("temporal", window, shifted)
    assert torch.equal(mask[: grid**2, : grid**2], near)  # a given frame
    together = torch.zeros_like(mask)
    for group in layout.groups("temporal", window, shifted):
        together[group[:, None], group] = True
    assert not (mask & ~together).any()
