"""What an index says of one file."""

import av
import numpy as np
import pytest

from flperf.data.index import summary
from flperf.data.probing import Row, frame_intervals, probe_file

SAMPLE_RATE = 8000


def write_with_sound(path, seconds: float, sound: float) -> None:
    """A video of 25 frames a second with a second stream, of sound; each may be longer. Packets are interleaved."""
    noise = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        video = container.add_stream("flv1" if path.suffix == ".flv" else "libx264", 25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("pcm_s16le", SAMPLE_RATE, layout="mono")
        for frame in range(round(25 * max(seconds, sound))):
            if frame < 25 * seconds:
                picture = noise.integers(0, 255, (48, 64, 3), dtype=np.uint8)
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            if frame < 25 * sound:
                block = av.AudioFrame.from_ndarray(np.zeros((1, SAMPLE_RATE // 25), np.int16), "s16", "mono")
                block.sample_rate, block.pts = SAMPLE_RATE, frame * SAMPLE_RATE // 25
                container.mux(audio.encode(block))
        container.mux(video.encode())
        container.mux(audio.encode())


def test_variable_frame_rate(videos):
    """The frames of this file begin 40 ms apart, then ever later; the last begins at 3.18 s."""
    row = probe_file(videos, "variable.mkv", 0)
    assert row.error == "" and row.frames == 40
    assert row.duration == pytest.approx(3.18 * 40 / 39, abs=0.02)
    assert row.is_variable and row.shortest_interval == pytest.approx(0.04, abs=0.002)
    assert row.longest_interval == pytest.approx(0.38, abs=0.002) and row.seconds == pytest.approx(3.18, abs=0.002)
    for name in ("h264.mp4", "vp9.webm", "h264.ts", "mjpeg.avi"):
        assert not probe_file(videos, name, 0).is_variable
    assert "1 files have a variable frame rate" in summary([row])
    assert frame_intervals(np.array([0.0])) == frame_intervals(np.array([])) == (0.0, 0.0)


@pytest.mark.parametrize("suffix", [".mkv", ".flv"])
@pytest.mark.parametrize(("seconds", "sound"), [(4, 4), (4, 6), (6, 4), (2, 6)])
def test_a_file_with_sound_is_cut_short_if_all_of_it_ends_early(tmp_path, suffix, seconds, sound):
    """Its header has one duration, that of the longest stream. Sound that goes on after the video is no damage."""
    whole, half = tmp_path / f"whole{suffix}", tmp_path / f"half{suffix}"
    write_with_sound(whole, seconds, sound)
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    rows = [probe_file(str(tmp_path), file.name, 0) for file in (whole, half)]
    assert [row.error for row in rows] == ["", ""] and "cut short" not in rows[0].notes
    assert f"of {max(seconds, sound)}." in rows[1].notes and rows[1].notes.startswith("cut short: ")


def test_notes_are_counted_by_file_in_the_summary():
    rows = [
        Row(str(seconds), 0, "h264", frames=25, duration=1, notes=f"cut short: {seconds} of 9 s") for seconds in (1, 2)
    ]
    assert "       2 files: cut short" in summary(rows)
