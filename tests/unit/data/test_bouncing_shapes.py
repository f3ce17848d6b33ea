"""Bouncing shapes: pure functions of (seed, index), and motion that obeys its law."""

import numpy as np
import pytest
import torch

from flperf.config import Config, Dataset, Shapes
from flperf.data import BatchShare, open_dataset
from flperf.data.bouncing_shapes import bounce, clip_centres, heatmap_centres, patch_heatmaps, to_pixels, to_unit
from flperf.data.canvas import BACKGROUND, DISK_COLOUR, SQUARE_COLOUR, Canvas, extents, whole_frames
from flperf.data.preprocessing import Preprocessing
from flperf.errors import UserError

CPU = torch.device("cpu")
SHAPES = Shapes(train_clips=10, validation_clips=4, image_size=64, square_size=12, disk_radius=5)
PREPROCESSING = Preprocessing((32, 32), None, 1 / 255, (0.0,) * 3, (1.0,) * 3)


def draw_clips(indices, shapes, seed, n_frames, stride, size):
    """Video `b f h w c` and centres `b f 2 2` of the clips with these indices."""
    centres = clip_centres(indices, shapes, seed, n_frames, stride)
    return on_a_cpu(centres, shapes, size), torch.from_numpy(centres)


def on_a_cpu(centres, shapes, size):
    video, _ = Canvas(centres.shape[1], size, CPU).draw(centres, shapes)
    return video


def as_on_a_gpu(centres, shapes, size):
    square, _, rows = extents(torch.from_numpy(centres).flatten(0, 1), shapes, size)
    return whole_frames(square, rows, size).unflatten(0, centres.shape[:2])


def centre_of(video, colour):
    """Mean (x, y) of the pixels of one colour, f 2."""
    mask = (video == torch.tensor(colour, dtype=torch.uint8)).all(-1).float()  # f h w
    y, x = torch.meshgrid(torch.arange(video.shape[1]) + 0.5, torch.arange(video.shape[2]) + 0.5, indexing="ij")
    return torch.stack([(mask * axis).sum((1, 2)) / mask.sum((1, 2)) for axis in (x, y)], dim=-1)


def test_shapes_are_drawn_around_their_centres():
    video, centres = draw_clips([0, 1, 2], SHAPES, 0, 40, 1, (64, 64))
    assert video.shape == (3, 40, 64, 64, 3) and video.dtype == torch.uint8 and centres.shape == (3, 40, 2, 2)
    for clip in range(3):
        assert (centre_of(video[clip], DISK_COLOUR) - centres[clip, :, 1]).abs().max() < 1  # nothing lies over the disk
        apart = (centres[clip, :, 0] - centres[clip, :, 1]).norm(dim=-1) > 5 + 12 * 0.5**0.5
        assert (centre_of(video[clip], SQUARE_COLOUR) - centres[clip, :, 0]).abs()[apart].max() < 1


def test_a_clip_depends_on_seed_and_index_alone():
    together, _ = draw_clips([3, 4, 5], SHAPES, 7, 6, 2, (32, 32))
    alone, _ = draw_clips([4], SHAPES, 7, 6, 2, (32, 32))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(alone, draw_clips([4], SHAPES, 8, 6, 2, (32, 32))[0])
    twice, _ = draw_clips([4], SHAPES, 7, 3, 4, (32, 32))
    assert torch.equal(alone[:, ::2], twice)  # a stride skips frames


def test_the_square_bounces_elastically():
    shapes = Shapes(image_size=64, square_size=12, square_init=[20.0, 30.0], square_vel=[3.0, -2.0])
    _, centres = draw_clips([0], shapes, 0, 200, 1, (64, 64))
    square = centres[0, :, 0].double()
    position, velocity = torch.tensor([20.0, 30.0], dtype=torch.float64), torch.tensor([3.0, -2.0], dtype=torch.float64)
    for frame in range(200):
        assert torch.allclose(square[frame], position, atol=1e-4), frame
        position = position + velocity
        for axis in range(2):
            if not 6 <= position[axis] <= 58:
                position[axis] = (12 if position[axis] < 6 else 116) - position[axis]
                velocity[axis] = -velocity[axis]


def test_bounce_keeps_within_walls_of_each_axis():
    path = bounce(np.array([5.0, 9.0]), np.array([7.3, -11.1]), np.arange(500.0), 4.0, np.array([20.0, 11.0]))
    assert (path >= 4).all() and (path <= [20, 11]).all()


def test_the_disk_stays_on_its_circle():
    _, centres = draw_clips([1], SHAPES, 0, 100, 1, (64, 64))
    radius = (centres[0, :, 1] - 32).norm(dim=-1)
    assert radius.std() < 1e-4 and radius.max() <= 32 - 5 + 1e-3


def dataset(**keys):
    return open_dataset(
        Config(dataset=Dataset(kind="bouncing_shapes", shapes=SHAPES, stride=1, **keys)), PREPROCESSING, 0
    )


@pytest.mark.parametrize("n_frames", [1, 8])
def test_as_a_dataset(n_frames):
    shapes = dataset(n_frames=n_frames)
    share = BatchShare(0, 1, 5, 5)
    batches = shapes.train_batches(0, share, CPU)
    epoch = [next(batches), next(batches)]
    assert (shapes.train_size, shapes.validation_size) == (10, 4)
    assert sorted(torch.cat([batch.clip for batch in epoch]).tolist()) == list(range(10))
    assert epoch[0].video.shape == (5, n_frames, 32, 32, 3)
    held_out = torch.cat([batch.video for batch in shapes.validation_batches(share, 2, None, CPU)])
    seen = torch.cat([batch.video for batch in epoch])
    assert not any(torch.equal(a, b) for a in held_out for b in seen)


def test_a_limit_moves_no_clip():
    share = BatchShare(0, 1, 1, 1)
    whole, limited = (
        next(dataset(n_frames=2, limit=limit).validation_batches(share, 2, None, CPU)) for limit in (None, 2)
    )
    assert torch.equal(whole.video, limited.video)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"square_size": 300}, r"dataset.shapes: the square \(300\)"),
        ({"disk_radius": 64}, r"dataset.shapes: the square \(40\) or disk \(64\) is too large"),
        ({"square_init": [0.0, 50.0]}, "dataset.shapes.square_init: .* beyond the walls"),
    ],
)
def test_shapes_that_do_not_fit_the_canvas_are_refused(keys, named):
    with pytest.raises(UserError, match=named):
        open_dataset(Config(dataset=Dataset(kind="bouncing_shapes", shapes=Shapes(**keys))), PREPROCESSING, 0)


def test_a_spliced_clip_goes_on_as_another():
    whole, _ = draw_clips([3], Shapes(), 0, 8, 1, (32, 32))
    spliced, centres = draw_clips([3], Shapes(splice_at=5), 0, 8, 1, (32, 32))
    assert torch.equal(whole[:, :5], spliced[:, :5]) and not torch.equal(whole[:, 5], spliced[:, 5])
    assert torch.equal(torch.from_numpy(clip_centres([3], Shapes(splice_at=5), 0, 8, 1)), centres)


def compared_pixel_by_pixel(centres, shapes, size):
    """The frames `f h w 3` by the definition of the shapes."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    position = torch.stack([x * shapes.image_size / width, y * shapes.image_size / height], dim=-1).double()
    offset = position - torch.from_numpy(centres).double()[:, :, None, None]  # f object h w 2
    square = (offset[:, 0].abs() <= shapes.square_size / 2).all(-1)
    disk = offset[:, 1].square().sum(-1) <= shapes.disk_radius**2
    return torch.tensor([BACKGROUND, SQUARE_COLOUR, DISK_COLOUR], dtype=torch.uint8)[
        torch.where(disk, 2, square.long())
    ]


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (16, 16)])
def test_a_shape_is_drawn_on_every_pixel_whose_centre_it_covers(size):
    """Also on memory that was released. A batch that was not released stays as it is."""
    canvas, kept, addresses = Canvas(30, size, CPU), [], set()
    for clip in range(5):
        centres = clip_centres([clip, clip + 5], SHAPES, 0, 30, 1)
        video, release = canvas.draw(centres, SHAPES)
        addresses.add(video.data_ptr())
        if clip in (1, 2):
            release()
        else:
            kept.append((video, centres))
    assert len(addresses) == 3
    for video, centres in kept:
        for drawn, where in zip(video, centres, strict=True):
            assert torch.equal(drawn, compared_pixel_by_pixel(where, SHAPES, size))


@pytest.mark.parametrize("draw", [on_a_cpu, as_on_a_gpu])
def test_shapes_partly_beyond_the_edge_are_cut(draw):
    # the second frame shows neither
    centres = np.array([[[[1.0, 63.0], [62.5, -2.0]], [[-30.0, 20.0], [90.0, 90.0]]]], dtype=np.float32)
    drawn = draw(centres, SHAPES, (64, 64))
    assert drawn.shape == (1, 2, 64, 64, 3) and torch.equal(
        drawn[0], compared_pixel_by_pixel(centres[0], SHAPES, (64, 64))
    )


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (1, 7)])
def test_a_gpu_draws_what_a_cpu_draws(size):
    centres = clip_centres([0, 1, 2], SHAPES, 0, 20, 1)
    assert torch.equal(as_on_a_gpu(centres, SHAPES, size), on_a_cpu(centres, SHAPES, size))


@pytest.mark.gpu
def test_the_canvas_of_a_gpu_is_on_it():
    centres = clip_centres([0, 1, 2], SHAPES, 0, 20, 1)
    drawn, _ = Canvas(20, (64, 64), torch.device("cuda")).draw(centres, SHAPES)
    assert drawn.is_cuda and drawn.is_contiguous() and torch.equal(drawn.cpu(), on_a_cpu(centres, SHAPES, (64, 64)))


def test_heatmaps_are_distributions_around_the_centre():
    centres = torch.rand(50, 2, 2) * 48 + 8  # within the outermost patches' centres
    heatmaps = patch_heatmaps(centres, 64, 4, 8)
    torch.testing.assert_close(heatmaps.sum((-2, -1)), torch.ones(50, 2))
    assert (heatmaps >= 0).all() and ((heatmaps > 0).sum((-2, -1)) <= 4).all()
    torch.testing.assert_close(heatmap_centres(heatmaps, 64), centres)
    clamped = heatmap_centres(patch_heatmaps(torch.tensor([[0.0, 63.0]]), 64, 8, 4), 64)
    torch.testing.assert_close(clamped, torch.tensor([[8.0, 60.0]]))
    torch.testing.assert_close(to_pixels(to_unit(centres, 64), 64), centres)
    torch.testing.assert_close(to_unit(torch.tensor([0.0, 32.0, 64.0]), 64), torch.tensor([-1.0, 0.0, 1.0]))


def test_batches_hold_centres_and_visualisation_is_a_split_of_its_own():
    share = BatchShare(0, 1, 4, 4)
    shapes = dataset(n_frames=3)
    batch = next(shapes.validation_batches(share, 4, None, CPU))
    for video, centres in zip(batch.video, batch.centres, strict=True):
        assert torch.equal(video, compared_pixel_by_pixel(centres.numpy(), SHAPES, (32, 32)))
    shown = next(shapes.chosen_batches([range(8)], 8, "visualisation", CPU)).video
    others = torch.cat([batch.video, *(next(shapes.chosen_batches([range(10)], 10, "train", CPU)).video[None])])
    assert len(shapes.splits["visualisation"]) == 8 and not any(torch.equal(a, b) for a in shown for b in others)
