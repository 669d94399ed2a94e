"""Scenes drawn on a device are those that Pillow draws."""

import numpy as np
import pytest
import torch

from cogvideo.data.tinyworld import MOTIONS, picture, sprites
from cogvideo.data.tinyworld.canvas import Canvas, views
from cogvideo.data.tinyworld.world import TinyWorld

SIZE = 48


@pytest.fixture(scope="module")
def canvas():
    return Canvas(SIZE)


@pytest.fixture(scope="module")
def seen():
    """Two frames of each motion: (scene, times)."""
    world, found = TinyWorld(sprites(), 3, even=True, varied=True), {}
    for number in range(400):
        scene = world[number].scene
        found.setdefault(scene.motion, (scene, np.random.default_rng(number).uniform(0, 4, 2)))
    assert found.keys() == set(MOTIONS)
    return list(found.values())


def test_a_canvas_draws_what_pillow_draws(canvas, seen):
    for scene, times in seen:
        right = picture.render(scene, times, SIZE).astype(float)
        made = (255 * canvas.draw(views(scene, times))).permute(0, 2, 3, 1).numpy()
        difference = np.abs(made - right)
        assert difference.mean() < 0.2 and (difference > 1.01).mean() < 0.002, scene.motion


def test_a_canvas_knows_what_an_object_covers(canvas, seen):
    for scene, times in seen:
        for cells in (4, 16):
            right = picture.cover(scene, times, cells)
            assert np.abs(canvas.cover(views(scene, times), cells).numpy() - right).max() < 0.03


def test_the_fixed_way_draws_the_same(canvas, seen):
    rows = torch.from_numpy(np.concatenate([views(scene, times) for scene, times in seen])).float()
    frames, cover = canvas.both(rows, 16)
    difference = 255 * (frames - canvas.draw(rows)).abs().amax((1, 2, 3))
    turning = rows[:, 4] != 0
    assert turning.any() and difference[~turning].max() < 1.01 and difference[turning].max() < 16
    assert (cover - canvas.cover(rows, 16)).abs().max() < 0.01


def test_a_batch_is_drawn_as_its_frames_alone(canvas, seen):
    rows = np.concatenate([views(scene, times) for scene, times in seen])
    alone = torch.cat([canvas.draw(row[None]) for row in rows])
    assert (canvas.draw(rows) - alone).abs().max() <= 1.01 / 255
