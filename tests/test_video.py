"""Videos: what is read and refused, what is written, and going on after a stop."""

import csv
import multiprocessing
import os
import re
import signal
import struct
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from opensan import outputs
from opensan.checkpoints.native import load_folder, save_folder
from opensan.cli import main
from opensan.errors import UserError
from opensan.images import ImageError
from opensan.jobs.video import VideoReader, VideoRun, reader
from opensan.jobs.video import writer as film
from opensan.jobs.video.steady import Steadier, motion, moved
from opensan.lab.films import make_film
from opensan.lab.scenes import SEGMENTATION_NAMES, label_map, make_scene
from opensan.segmenters.san import SanSegmenter, load_san
from opensan.vocabulary import Vocabulary

av = pytest.importorskip("av", reason="videos need PyAV (the extra `video`)")

WORDS = Vocabulary.parse("one, two, three", background="four")
TIMES = [0, 40, 80, 200, 210, 290, 300, 320]
"""Milliseconds: frames as a telephone takes them."""


@pytest.fixture(scope="module")
def small(small_model):
    return SanSegmenter(small_model, text_cache=False)


def pictures(count=len(TIMES), size=(48, 66)):
    return [frame.scene.image for frame in make_film(1, 0, count, size)]


def write_clip(
    path, images=None, times=TIMES, *, sound=None, sound_at=0.0, sound_seconds=0.5, codec="libx264", options=None
):
    """A small video; `sound` is a codec for half a second of a tone."""
    images = pictures() if images is None else images
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": "4", **(options or {})})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        tone = container.add_stream(sound, rate=16_000) if sound else None
        for image, milliseconds in zip(images, times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if tone:
            wave = np.sin(np.arange(int(16_000 * sound_seconds)) / 8).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16_000, int(16_000 * sound_at)
            container.mux(tone.encode(frame))
            container.mux(tone.encode())
    return path


def run(segmenter, path, out, **options):
    with VideoRun(segmenter, WORDS, path, out, **options) as video:
        return list(video.results()), video


def assert_same_results(one, other):
    """The same files with the same content: films but for x264, which does not repeat itself exactly, and labels but
    for a pixel now and then, because products of matrices are rounded by where in memory they lie.
    """
    files = [
        {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()} for out in (one, other)
    ]
    assert files[0].keys() == files[1].keys()
    for name, path in files[0].items():
        like = files[1][name]
        if name.endswith(".mp4"):
            for before, after in zip(frames_of(path), frames_of(like), strict=True):
                assert before.pts == after.pts
                assert np.abs(before.image.astype(int) - after.image).mean() < 4
        elif name.endswith(".png"):
            assert (outputs.read_label_map(path) != outputs.read_label_map(like)).mean() < 0.002, name
        elif name != "manifest.sqlite":  # which says when and where
            tables = [list(csv.reader(file.open(encoding="utf-8", newline=""))) for file in (path, like)]
            assert tables[0][0] == tables[1][0]
            np.testing.assert_allclose(*(np.array(table[1:], dtype=float) for table in tables), atol=0.002)


def frames_of(path):
    with VideoReader(path) as clip:
        return list(clip.frames())


# ----------------------------------------------------------------------------------------------------------- reading


def test_frames_have_the_times_and_colours_of_the_file(tmp_path):
    images = pictures()
    frames = frames_of(write_clip(tmp_path / "clip.mp4", images, options={"crf": "1"}))
    assert [round(1000 * frame.seconds) for frame in frames] == TIMES
    assert [frame.number for frame in frames] == list(range(len(TIMES)))
    for frame, image in zip(frames, images, strict=True):
        assert frame.image.shape == image.shape and frame.image.dtype == np.uint8
        assert np.abs(frame.image.astype(int) - image).mean() < 8  # colour is stored at half the resolution


@pytest.mark.parametrize(("angle", "turns"), [(90, 3), (180, 2), (270, 1)])
def test_a_rotated_clip_is_read_upright(tmp_path, angle, turns):
    """MP4 says in a matrix by how much a player is to turn the picture clockwise."""
    path = write_clip(tmp_path / "clip.mp4")
    plain = frames_of(path)
    content = path.read_bytes()
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[angle]
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    track = content.index(b"tkhd")
    path.write_bytes(content[:track] + content[track:].replace(upright, turned, 1))
    for before, now in zip(plain, frames_of(path), strict=True):
        np.testing.assert_array_equal(now.image, np.rot90(before.image, turns))


MATRICES = {
    (1, 0, 0, 1): lambda image: image,
    (-1, 0, 0, 1): lambda image: image[:, ::-1],
    (1, 0, 0, -1): lambda image: image[::-1],
    (-1, 0, 0, -1): lambda image: image[::-1, ::-1],
    (0, 1, 1, 0): lambda image: image.swapaxes(0, 1),
    (0, 1, -1, 0): lambda image: image.swapaxes(0, 1)[:, ::-1],
    (0, -1, 1, 0): lambda image: image.swapaxes(0, 1)[::-1],
    (0, -1, -1, 0): lambda image: image.swapaxes(0, 1)[::-1, ::-1],
}
"""What players do for a display matrix (a, b, c, d): column x, row y is shown at column a x + c y, row b x + d y."""


@pytest.mark.parametrize("matrix", MATRICES)
def test_all_eight_orientations(tmp_path, matrix):
    """Front cameras and screen recorders mirror the picture."""
    path = write_clip(tmp_path / "clip.mp4", pictures(2), TIMES[:2])
    plain = frames_of(path)
    content = path.read_bytes()
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (number << 16 for number in matrix)
    track = content.index(b"tkhd")
    path.write_bytes(
        content[:track] + content[track:].replace(upright, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30), 1)
    )
    for before, now in zip(plain, frames_of(path), strict=True):
        np.testing.assert_array_equal(now.image, MATRICES[matrix](before.image))


def milliseconds(frames):
    return [round(1000 * frame.seconds) for frame in frames]


def test_times_begin_at_zero_and_durations_last_until_the_next_frame(tmp_path):
    """As of a clip that was cut out of a longer one."""
    late = frames_of(write_clip(tmp_path / "late.mp4", times=[one + 10_000 for one in TIMES]))
    assert milliseconds(late) == TIMES
    assert [late[0].pts, late[0].duration] == [0, late[1].pts]
    lengths = [(one.duration, two.pts - one.pts) for one, two in pairwise(late)]
    assert all(told == until_next for told, until_next in lengths)
    assert late[-1].duration > 0
    path = write_clip(tmp_path / "late.ts", times=[one + 10_000 for one in range(0, 320, 40)])
    with VideoReader(path) as clip:
        third = list(clip.frames(3))
        assert milliseconds(third) == [0, 120, 240]
        assert [float(one.duration * clip.time_base) for one in third] == pytest.approx([0.12, 0.12, 0.08], abs=0.001)


def joined(tmp_path, *parts, **options):
    """MPEG-TS recordings, one file after the other."""
    content = b""
    for number, times in enumerate(parts):
        content += write_clip(tmp_path / f"{number}.ts", pictures(len(times)), times, **options).read_bytes()
    (tmp_path / "joined.ts").write_bytes(content)
    return tmp_path / "joined.ts"


@pytest.mark.parametrize("first", [0, 5_000])
def test_times_that_jump_back_go_on_from_there(tmp_path, first):
    times = range(first, first + 480, 40)
    with VideoReader(joined(tmp_path, times, range(0, 480, 40), times)) as clip:
        frames = list(clip.frames())
        assert milliseconds(frames)[:12] == list(range(0, 480, 40)) and len(frames) == 36
        steps = [1000 * float((two.pts - one.pts) * clip.time_base) for one, two in pairwise(frames)]
        assert max(steps) < 5_500 and steps.count(pytest.approx(40, abs=0.1)) >= 33 and min(steps) > 0
        assert clip.ends_early is None


def test_times_that_stand_still_or_leave_a_gap(tmp_path):
    """In disorder by a frame, and then nothing for an hour: the picture stays, as in the file."""
    clock = reader._Clock(40)

    class Picture:
        dts, duration = None, 0

        def __init__(self, pts):
            self.pts = pts

    told = [100, 140, 140, 120, 180, None, 3_600_260, 0, 40]
    shown = [clock.tell(Picture(pts)) for pts in told]
    assert shown == [0, 40, 41, 42, 80, 120, 3_600_160, 3_600_200, 3_600_240]
    assert (clock.jumps, clock.end) == (1, 3_600_280)


@pytest.mark.parametrize("every", [1, 5])
def test_sound_that_goes_back_costs_the_sound_and_never_the_run(small, tmp_path, every):
    path = joined(tmp_path, range(0, 480, 40), range(0, 480, 40), sound="aac")
    found, video = run(small, path, tmp_path / "out", every=every, steady=False)
    assert len(found) == -(-24 // every)
    assert video.notes == ["the sound can't be copied (its times go back): the overlay video is silent from 0.5 s on"]
    with av.open(str(tmp_path / "out/joined.overlay.mp4")) as film_:
        assert 0.4 < float(film_.streams.audio[0].duration * film_.streams.audio[0].time_base) < 0.7
    assert len(frames_of(tmp_path / "out/joined.overlay.mp4")) == len(found)


def test_sound_and_picture_stay_together_when_both_start_late(small, tmp_path):
    """The first frame is at 10.0 s, the sound at 10.0 s too."""
    path = write_clip(tmp_path / "clip.mkv", times=[one + 10_000 for one in TIMES], sound="aac", sound_at=10.0)
    _, video = run(small, path, tmp_path / "out", steady=False)
    assert not video.notes
    with av.open(str(tmp_path / "out/clip.overlay.mp4")) as film_:
        starts = [float((stream.start_time or 0) * stream.time_base) for stream in film_.streams]
        assert starts == pytest.approx([0, 0], abs=0.1)
        assert 0.4 < film_.duration / 1_000_000 < 0.7


def test_sound_that_ends_before_the_first_picture_is_told(small, tmp_path):
    path = write_clip(tmp_path / "clip.ts", times=[one + 7_000 for one in TIMES], sound="aac", sound_seconds=4)
    _, video = run(small, path, tmp_path / "out", every=4, steady=False)
    assert video.notes == ["all of the sound is before the first picture: the overlay video is silent"]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("first", [0, 7_000])
def test_sound_that_is_longer_is_no_early_end(tmp_path, suffix, first):
    times = [first + one for one in range(0, 320, 40)]
    path = write_clip(tmp_path / f"clip.{suffix}", times=times, sound="aac", sound_seconds=4)
    with VideoReader(path) as clip:
        assert len(list(clip.frames())) == 8
        assert clip.ends_early is None


def test_a_last_frame_that_stays_is_no_early_end(tmp_path):
    """Slides: each is shown for seconds, the last one too."""
    path = write_clip(tmp_path / "clip.mp4", pictures(3), [0, 5_000, 10_000])
    with VideoReader(path) as clip:
        frames = list(clip.frames())
        assert clip.ends_early is None and milliseconds(frames) == [0, 5_000, 10_000]


def test_the_largest_track_is_taken(tmp_path):
    """Some cameras put a small preview first."""
    with av.open(str(tmp_path / "two.mp4"), "w") as container:
        streams = []
        for height, width in ((24, 32), (48, 64), (48, 64)):
            streams.append(stream := container.add_stream("libx264", rate=25))
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for _ in range(3):
            for number, stream in enumerate(streams):
                image = np.full((stream.height, stream.width, 3), 100 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    for frame in frames_of(tmp_path / "two.mp4"):
        assert frame.image.shape == (48, 64, 3) and abs(frame.image.mean() - 100) < 10


def test_the_overlay_video_shows_each_frame_for_as_long(small, tmp_path):
    """Frames as a telephone takes them, of which each third is shown."""
    path = write_clip(tmp_path / "clip.mp4")
    run(small, path, tmp_path / "out", every=3, steady=False)
    with av.open(str(tmp_path / "out/clip.overlay.mp4")) as film_:
        stream = film_.streams.video[0]
        packets = sorted((packet.pts, packet.duration) for packet in film_.demux(stream) if packet.size)
        shown = [
            (round(1000 * float(pts * stream.time_base)), round(1000 * float(duration * stream.time_base)))
            for pts, duration in packets
        ]
    last = shown.pop()
    assert shown == [(0, 200), (200, 100)] and last[0] == 300 and last[1] >= 20


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mkv", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("ts", "libx264")]
)
def test_any_container(tmp_path, suffix, codec):
    frames = frames_of(write_clip(tmp_path / f"clip.{suffix}", codec=codec, times=range(0, 40 * len(TIMES), 40)))
    assert [round(1000 * frame.seconds) for frame in frames] == list(range(0, 40 * len(TIMES), 40))


def test_what_is_no_video_is_refused_in_a_line(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "truncated.mp4").write_bytes(clip.read_bytes()[:2000])  # the table of frames stands at the end
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {clip}\n")
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        tone = container.add_stream("aac", rate=16_000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(tone.encode(frame))
        container.mux(tone.encode())
    reasons = {
        "empty.mp4": "not a video that can be read",
        "text.mp4": "not a video that can be read",
        "truncated.mp4": "not a video that can be read",
        "list.m3u8": "not a video that can be read",
        "list.mp4": "not a video that can be read",
        "song.mp4": "has no video in it",
        "missing.mp4": "does not exist",
        ".": "not a file",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=rf"{re.escape(str(tmp_path / name))}: {reason}") as caught:
            frames_of(tmp_path / name)
        assert "\n" not in str(caught.value), name


def test_large_frames_are_refused_before_they_are_decoded(tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    with pytest.raises(ImageError, match="66 x 48 is 3,168 pixels, more than the limit of 3,000"):
        VideoReader(path, max_pixels=3_000)
    with VideoReader(path, max_pixels=3_168) as clip:
        assert len(list(clip.frames())) == len(TIMES)


def test_of_a_clip_that_was_cut_off_the_beginning_is_read(small, tmp_path):
    path = write_clip(tmp_path / "clip.mkv", pictures(40), range(0, 1600, 40))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    found, video = run(small, path, tmp_path / "out")
    assert 5 < len(found) < 35
    ends = (len(found) - 1) / 25
    assert video.notes == [f"{path}: the frames end after {ends:.1f} s, the file's length is 1.6 s"]
    path.write_bytes(content[:1000])
    with pytest.raises(ImageError, match="no frame of it can be decoded"):
        frames_of(path)


def test_damaged_places_are_counted_and_left_out(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", pictures(40), range(0, 1600, 40))
    content = bytearray(path.read_bytes())
    content[4000:4200] = bytes(200)
    path.write_bytes(content)
    with VideoReader(path) as clip:
        assert 5 < len(list(clip.frames())) < 40
        assert clip.damaged > 0


def test_a_clip_whose_size_changes_is_refused(tmp_path):
    """MPEG-TS streams may be joined end to end."""
    first = write_clip(tmp_path / "a.ts", times=range(0, 320, 40)).read_bytes()
    other = pictures(size=(96, 64))
    second = write_clip(tmp_path / "b.ts", other, times=range(320, 640, 40)).read_bytes()
    (tmp_path / "both.ts").write_bytes(first + second)
    with pytest.raises(ImageError, match=r"frame \d+ is 64 x 96 pixels, those before are 66 x 48: cut the video"):
        frames_of(tmp_path / "both.ts")


# ----------------------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """A clip with sound and its results, which an odd height and width make no easier."""
    folder = tmp_path_factory.mktemp("video")
    path = write_clip(folder / "clip.mkv", sound="aac")
    found, video = run(small, path, folder / "out", steady=False)
    return path, folder / "out", found, video


def test_every_frame_is_labelled_as_if_it_were_a_photograph(small, done):
    path, out, found, _ = done
    frames = frames_of(path)
    assert [one.number for one in found] == list(range(len(TIMES)))
    assert sorted(file.name for file in (out / "clip.labels").iterdir()) == [f"{i:06}.png" for i in range(len(TIMES))]
    for frame, one in zip(frames, found, strict=True):
        expected = small.segment(frame.image, WORDS).labels
        np.testing.assert_array_equal(outputs.read_label_map(out / f"clip.labels/{frame.number:06}.png"), expected)
        np.testing.assert_array_equal(one.pixels, [(expected == word).sum() for word in range(3)])
        assert one.total == expected.size


def test_less_sure_pixels_stay_unlabelled_in_every_frame(small, done, tmp_path):
    path, _, _, _ = done
    with VideoRun(small, Vocabulary.parse(WORDS), path, tmp_path, steady=False, threshold=0.5) as run:
        found = list(run.results())
    for frame, one in zip(frames_of(path), found, strict=True):
        expected = small.segment(frame.image, WORDS, threshold=0.5).labels
        np.testing.assert_array_equal(outputs.read_label_map(tmp_path / f"clip.labels/{frame.number:06}.png"), expected)
        assert sum(one.pixels) == (expected >= 0).sum()
    assert sum(sum(one.pixels) for one in found) < sum(one.total for one in found)


def test_the_table_has_times_and_areas(done):
    _, out, found, _ = done
    with (out / "clip.frames.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["frame", "seconds", "one", "two", "three", "unlabelled"]
    assert [round(1000 * float(row["seconds"])) for row in rows] == TIMES
    for row, one in zip(rows, found, strict=True):
        shares = [float(row[name]) for name in ("one", "two", "three")]
        np.testing.assert_allclose(shares, one.pixels / one.total, atol=1e-5)
        assert sum(shares) + float(row["unlabelled"]) == pytest.approx(1, abs=1e-5)


def test_the_overlay_video_keeps_times_and_sound(done):
    path, out, _, video = done
    assert not video.notes
    overlay = frames_of(out / "clip.overlay.mp4")
    assert [round(1000 * frame.seconds) for frame in overlay] == TIMES
    height, width = overlay[0].image.shape[:2]
    assert width % 2 == height % 2 == 0
    with av.open(str(path)) as before, av.open(str(out / "clip.overlay.mp4")) as after:
        assert after.streams.video[0].codec_context.name == "h264"
        assert after.streams.video[0].codec_context.pix_fmt == "yuv420p"
        sounds = [[bytes(packet) for packet in one.demux(audio=0) if packet.size] for one in (before, after)]
    assert sounds[0] == sounds[1] and sounds[0]


def test_the_overlay_video_shows_the_labels_and_a_legend_that_stays(done):
    path, out, _, _ = done
    legends = []
    for frame, shown in zip(frames_of(path), frames_of(out / "clip.overlay.mp4"), strict=True):
        labels = outputs.read_label_map(out / f"clip.labels/{frame.number:06}.png")
        expected = outputs.overlay(frame.image, labels, list(WORDS.names), dict.fromkeys(WORDS.names, 0.5))
        height, width = labels.shape
        expected = np.asarray(expected)[:height, :width].astype(int)
        assert np.abs(shown.image[:height, :width] - expected).mean() < 16  # compressed, colour at half the resolution
        legends.append(shown.image[:, width + 2 :].astype(int))
    assert legends[0].size
    assert all(np.abs(legend - legends[0]).mean() < 2 for legend in legends)
    assert np.unique(legends[0].reshape(-1, 3) // 64, axis=0).shape[0] > 5  # colours, and letters on white


def test_every_third_frame(small, tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    path = path.rename(tmp_path / "http: %03d|.mp4")  # FFmpeg gives such names a meaning
    found, _ = run(small, path, tmp_path / "out", every=3, batch=2)
    assert [one.number for one in found] == [0, 3, 6]
    assert sorted(file.name for file in (tmp_path / "out/http: %03d|.labels").iterdir()) == [
        "000000.png",
        "000003.png",
        "000006.png",
    ]
    overlay = frames_of(tmp_path / "out/http: %03d|.overlay.mp4")
    assert [round(1000 * frame.seconds) for frame in overlay] == [0, 200, 300]


def test_without_h264_the_overlay_video_is_mpeg4(small, tmp_path, monkeypatch):
    encoders = {"libnothing": {}, "mpeg4": film.ENCODERS["mpeg4"]}
    monkeypatch.setattr(film, "ENCODERS", encoders)
    path = write_clip(tmp_path / "clip.ts", times=range(0, 320, 40))  # its unit of time is finer than MPEG-4's
    _, video = run(small, path, tmp_path / "out")
    assert video.notes == ["this PyAV has no H.264 encoder: the overlay video is MPEG-4, which browsers do not show"]
    overlay = frames_of(tmp_path / "out/clip.overlay.mp4")
    assert [round(1000 * frame.seconds) for frame in overlay] == list(range(0, 320, 40))


def test_sound_that_mp4_cannot_hold_is_left_out(small, tmp_path):
    path = write_clip(tmp_path / "clip.mkv", sound="pcm_u8")
    _, video = run(small, path, tmp_path / "out")
    assert video.notes == ["MP4 can't hold sound as pcm_u8: the overlay video is silent"]
    assert len(frames_of(tmp_path / "out/clip.overlay.mp4")) == len(TIMES)


# --------------------------------------------------------------------------------------------------------- steadying


def film_frames(segmenter, count, **options):
    """Drawn frames with what the network reads, and their encodings."""
    for frame in make_film(1, 0, count, (96, 128), **options):
        read = segmenter.read(frame.scene.image)
        yield frame, read.prepared.pixels.numpy(), segmenter.encode_read([read])[0]


def test_motion_is_found():
    canvas = make_scene(3, 0, (140, 180), split="test", objects=(5, 7)).image.mean(axis=2) / 68
    before, now = canvas[20:120, 20:160], canvas[23:123, 16:156]
    flow = motion(now.astype(np.float32), before.astype(np.float32))
    inside = flow[:, 10:-10, 10:-10]
    np.testing.assert_allclose(np.median(inside, axis=(1, 2)), [3, -4], atol=0.1)
    assert np.abs(inside - np.array([3, -4])[:, None, None]).mean() < 0.5
    assert np.abs(moved(before, flow) - now)[10:-10, 10:-10].mean() < 0.3 * np.abs(before - now).mean()


def test_a_still_picture_stays_as_it_is(small):
    ((_, pixels, encoding),) = film_frames(small, 1)
    steadier = Steadier()
    for _ in range(3):
        steadied = steadier.steadied(encoding, pixels)
        np.testing.assert_allclose(steadied.mask_logits, encoding.mask_logits, atol=1e-4)
        np.testing.assert_allclose(steadied.mask_embeddings, encoding.mask_embeddings, atol=1e-5)


def test_another_scene_begins_without_a_past(small):
    frames = list(film_frames(small, 3))
    steadier = Steadier()
    for _, pixels, encoding in frames:
        mixed = steadier.steadied(encoding, pixels)
    assert np.abs(mixed.mask_logits - encoding.mask_logits.numpy()).max() > 0.01
    after_cut = 1 - frames[0][1]
    cut = steadier.steadied(frames[0][2], after_cut)
    np.testing.assert_array_equal(cut.mask_logits, frames[0][2].mask_logits)
    np.testing.assert_array_equal(cut.mask_embeddings, frames[0][2].mask_embeddings)


def test_steadying_lessens_flicker_and_costs_no_accuracy():
    """With the packaged model, on a drawn film of which every point's way is known; bench/video.py has the figures."""
    segmenter = load_san("tiny", text_cache=False)
    words = Vocabulary.parse(list(dict.fromkeys(name.split()[-1] for name in SEGMENTATION_NAMES)))
    true = np.array([words.names.index(name.split()[-1]) for name in SEGMENTATION_NAMES])
    changed, right = {False: 0, True: 0}, {False: 0, True: 0}
    steadier, last = Steadier(), {}
    for frame, pixels, encoding in film_frames(segmenter, 8, speed=0.02):
        seen = frame.before[..., 0] >= 0
        row, column = frame.before[seen].T
        for steady, given in ((False, encoding), (True, steadier.steadied(encoding, pixels))):
            labels = segmenter.segment(given, words).labels
            right[steady] += (labels == true[label_map(frame.scene)]).sum()
            if last.get(steady) is not None:
                changed[steady] += (labels[seen] != last[steady][row, column]).sum()
            last[steady] = labels
    assert changed[True] < 0.7 * changed[False]
    assert right[True] > 0.98 * right[False]


# ------------------------------------------------------------------------------------------------------------ legend


def test_with_many_words_each_takes_a_place_when_it_is_seen_and_keeps_it(monkeypatch):
    monkeypatch.setattr(film, "MOST_WORDS", 3)
    legend = film.LegendOverTime([f"word {i}" for i in range(9)], background=False)
    picture = np.zeros((60, 80, 3), dtype=np.uint8)

    def places(*seen):
        pixels = np.zeros(9, dtype=int)
        pixels[list(seen)] = 1000
        canvas = legend.beside(picture, pixels)
        return legend._places, canvas.shape

    first, shape = places(5)
    assert first == [5, None, None]
    assert places(2, 5) == ([5, 2, None], shape)
    assert places(2, 7) == ([5, 2, 7], shape)
    assert places(7, 8) == ([8, 2, 7], shape)  # 5 was not seen for longest
    assert places(1, 2, 3, 4, 8)[0][1:] == [2, 3] or places(1, 2, 3, 4, 8)[1] == shape


# ------------------------------------------------------------------------------------------------------------ resume


class Stops(SanSegmenter):
    """Stops in the middle, as if something had gone wrong."""

    left = 20

    def encode_prepared(self, batch):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().encode_prepared(batch)


def test_a_run_that_was_stopped_goes_on_and_leaves_nothing_half_done(small, small_model, tmp_path):
    images = pictures(40)
    path = write_clip(tmp_path / "clip.mp4", images, range(0, 1600, 40))
    run(small, path, tmp_path / "undisturbed")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(Stops(small_model, text_cache=False), path, out)
    assert [file.name for file in out.iterdir()] == [".clip.part"]
    with VideoRun(small, WORDS, path, out) as video:
        finished = video.finished
        assert 15 <= finished <= 20  # of the 20 frames that were computed, those that were drawn too
        with pytest.raises(ValueError, match="another run is writing it"), VideoRun(small, WORDS, path, out):
            pass
    going_on = Stops(small_model, text_cache=False)
    going_on.left = 40 - finished
    assert len(run(going_on, path, out)[0]) == 40
    assert going_on.left == 0
    assert_same_results(out, tmp_path / "undisturbed")


def test_other_words_begin_anew_and_replace_the_results(small, small_model, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", pictures(30), range(0, 1200, 40))
    out = tmp_path / "out"
    run(small, path, out)
    (out / "clip.labels" / "notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        run(Stops(small_model, text_cache=False), path, out)
    assert len(list((out / "clip.labels").iterdir())) == 31  # what is there stays until the new one is complete
    with VideoRun(small, Vocabulary.parse("five, six"), path, out, every=10) as video:
        assert video.finished == 0
        list(video.results())
    assert {file.name for file in out.iterdir()} == {
        *("clip.labels", "clip.frames.csv", "clip.overlay.mp4", "manifest.sqlite")
    }
    assert {file.name for file in (out / "clip.labels").iterdir()} == {
        "000000.png",
        "000010.png",
        "000020.png",
        "notes.txt",
    }


def test_label_frames_that_somebody_corrected_are_kept(small, tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    out = tmp_path / "out"
    run(small, path, out)
    corrected = out / "clip.labels" / "000005.png"
    outputs.save_label_map(corrected, np.full((48, 66), 2), 3)
    content = corrected.read_bytes()
    with VideoRun(small, Vocabulary.parse("five, six"), path, out, every=2) as video:
        list(video.results())
    assert video.notes == [
        "1 of 1 images were done with other words, other every: they are done again",
        "1 results were changed since they were written: kept as *.changed",
    ]
    assert (out / "clip.labels" / "000005.png.changed").read_bytes() == content
    assert sorted(file.name for file in (out / "clip.labels").glob("*.png")) == [f"{n:06}.png" for n in (0, 2, 4, 6)]


def test_unfinished_work_of_other_words_is_told(small, small_model, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", pictures(30), range(0, 1200, 40))
    with pytest.raises(KeyboardInterrupt):
        run(Stops(small_model, text_cache=False), path, tmp_path / "out")
    with VideoRun(small, Vocabulary.parse("five, six"), path, tmp_path / "out") as video:
        assert video.finished == 0
        part = tmp_path / "out" / ".clip.part"
        assert video.notes == [f"{part}: unfinished work with other words: it is begun anew"]


def test_clips_of_one_stem_keep_their_results(small, tmp_path):
    """Cameras write DJI_1.MP4 beside DJI_1.MOV."""
    one, two = write_clip(tmp_path / "a.mp4"), write_clip(tmp_path / "a.mov", pictures(4), TIMES[:4])
    out = tmp_path / "out"
    for path in (one, two, one):
        run(small, path, out)
    assert len(list((out / "a.labels").iterdir())) == 8 and len(list((out / "a.mov.labels").iterdir())) == 4
    assert {path.name for path in out.glob("*.csv")} == {"a.frames.csv", "a.mov.frames.csv"}
    (tmp_path / "other").mkdir()
    other = write_clip(tmp_path / "other" / "a.mov", pictures(3), TIMES[:3])
    with pytest.raises(UserError, match=r"holds the results of .*a\.mov, which have the same names"):
        run(small, other, out)
    assert not list(out.glob(".*"))


def _run_of_its_own(model, path, out):
    run(SanSegmenter(load_folder(model), text_cache=False), path, out)


def test_killed_at_any_time_the_results_are_the_same(small, small_model, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", pictures(36), range(0, 1440, 40))
    out = tmp_path / "out"
    arguments = (save_folder(small_model, tmp_path / "model"), path, out)
    process = multiprocessing.get_context("spawn").Process(target=_run_of_its_own, args=arguments)
    process.start()
    deadline = time.monotonic() + 60
    while not (out / ".clip.part" / "labels" / "000018.png").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -9
    assert [file.name for file in out.iterdir()] == [".clip.part"]
    with VideoRun(small, WORDS, path, out) as video:
        assert 1 <= video.finished < 36
        assert len(list(video.results())) == 36
    run(small, path, tmp_path / "undisturbed")
    assert_same_results(out, tmp_path / "undisturbed")


# ----------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.mp4", "--words", "sky"], 1, "missing.mp4: does not exist"),
        (["broken.mp4", "--words", "sky"], 1, "broken.mp4: not a video that can be read"),
        (["clip.mp4"], 2, "give the words by exactly one of"),
        (["clip.mp4", "--words", "sky", "--max-pixels", "100"], 1, "more than the limit of 100"),
        (["clip.mp4", "--words", "sky", "--every", "0"], 2, "--every"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    write_clip(Path("clip.mp4"))
    Path("broken.mp4").write_bytes(Path("clip.mp4").read_bytes()[:500])
    with pytest.raises(SystemExit) as caught:
        main(["segment-video", *arguments, "--model", "tiny"])
    assert caught.value.code == code
    found = capsys.readouterr()
    assert message in found.err and found.err.count("\n") == 1
    assert not found.out


def test_frames_keep_unlabelled_what_no_word_deserves(tmp_path, capsys):
    clip = tmp_path / "clip.mp4"
    write_clip(clip)
    with pytest.raises(SystemExit) as caught:
        main(["segment-video", str(clip), "--words", "star", "--rest", "--model", "tiny", "--out", str(tmp_path)])
    assert not caught.value.code
    assert "unlabelled" in capsys.readouterr().out
    labels = [outputs.read_label_map(path) for path in sorted((tmp_path / "clip.labels").iterdir())]
    assert labels and (np.stack(labels) == -1).mean() > 0.9  # without --rest, all of it is the star


# ------------------------------------------------------------------------------------------------------- drawn films


def test_a_drawn_film_knows_where_its_points_were():
    """Without grain, a point that is seen in two frames looks the same in both; its word is the same in any case."""
    frames = list(make_film(2, 1, 4, (90, 120), speed=0.03, grain=0))
    for before, now in pairwise(frames):
        found = now.before[..., 0] >= 0
        assert 0.8 < found.mean() < 1
        row, column = now.before[found].T
        difference = np.abs(before.scene.image[row, column].astype(int) - now.scene.image[found]).mean()
        unmoved = np.abs(before.scene.image.astype(int) - now.scene.image).mean()
        assert difference < 0.7 * unmoved
        np.testing.assert_array_equal(label_map(before.scene)[row, column], label_map(now.scene)[found])
