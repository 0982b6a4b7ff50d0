"""Write the overlay video: frames under their words' colours, a legend with fixed positions, the sound."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opensan.errors import UserError
from opensan.jobs.video.reader import Frame, VideoReader, pyav, reason
from opensan.outputs.colours import palette, rgb
from opensan.outputs.drawing import Entry, Legend
from opensan.outputs.fonts import readable

ENCODERS = {"libx264": {"preset": "veryfast", "crf": "20", "bf": "0"}, "libopenh264": {}, "mpeg4": {"qscale": "4"}}
"""The first one that FFmpeg has is used, with these options; the first two write H.264. Frames are stored in their
order (no "bf"): only then does MP4 store for how long each is shown, whatever the frame rate does."""

COARSEST_TIME = Fraction(1, 60_000)
"""MPEG-4 (the last of the encoders) has no finer unit of time than 1/65,535 s."""

EARLIEST_SOUND = 0.1
"""Seconds before the first frame from which sound is copied, because decoders need some earlier packets."""

MOST_WORDS = 16
"""Most words in the legend; with more words, it shows those in the frame."""

SHOWN = 0.001
"""A word with a smaller share of the frame may be missing in the legend."""


class Film:
    """An overlay video, written frame by frame. Use as a context manager: on exit it is complete."""

    def __init__(self, path: Path, clip: VideoReader, names: Sequence[str], *, background: bool) -> None:
        """`background`: whether pixels may be unlabelled, for which the legend then has an entry."""
        self._path = path
        self._clip = clip
        self._legend = LegendOverTime(names, background)
        self.notes: list[str] = []
        """Messages for the user about it; each one line."""

    def __enter__(self) -> "Film":
        name = f"file:{self._path.absolute()}"  # "file:" keeps FFmpeg from reading a name as an address
        self._container = pyav().open(name, "w", format="mp4", options={"movflags": "faststart"})
        self._video: Any = None
        self._sound: Any = None
        self._sound_dts, self._sound_ends = -(1 << 62), 0.0
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None and self._video is not None:
                self._mux_sound(self._clip.sound_after)
                if self._sound is not None and not self._sound_ends:
                    self.notes.append("all of the sound is before the first picture: the overlay video is silent")
                self._container.mux(self._video.encode())
        finally:
            self._container.close()

    def add(self, frame: Frame, picture: np.ndarray, pixels: np.ndarray) -> None:
        """Write the next frame, under its words' colours ([H0, W0, 3] uint8 RGB); `pixels` [K] counts each word's."""
        av = pyav()
        from av.video.reformatter import ColorRange, Colorspace

        canvas = self._legend.beside(picture, pixels)
        if self._video is None:
            self._begin(canvas.shape[1], canvas.shape[0])
        shown = av.VideoFrame.from_ndarray(canvas, format="rgb24")
        shown = shown.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        shown.pts, shown.time_base, shown.duration = frame.pts, self._clip.time_base, frame.duration
        self._mux_sound(frame.sound)
        self._container.mux(self._video.encode(shown))

    def _begin(self, width: int, height: int) -> None:
        encoder = _encoder()
        if encoder == "mpeg4":
            self.notes.append("this PyAV has no H.264 encoder: the overlay video is MPEG-4, which browsers do not show")
        self._video = self._container.add_stream(encoder, rate=self._clip.rate, options=ENCODERS[encoder])
        self._video.width, self._video.height, self._video.pix_fmt = width, height, "yuv420p"
        context = self._video.codec_context
        exact = encoder != "mpeg4" or self._clip.time_base >= COARSEST_TIME
        context.time_base = self._clip.time_base if exact else COARSEST_TIME
        context.sample_aspect_ratio = self._clip.pixel_aspect
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # 16 to 235
        sound = self._clip.sound
        if sound is not None and sound.codec_context.name in self._container.supported_codecs:
            self._sound = self._container.add_stream_from_template(sound)
        elif sound is not None:
            self.notes.append(f"MP4 can't hold sound as {sound.codec_context.name}: the overlay video is silent")

    def _mux_sound(self, packets: Sequence[Any]) -> None:
        """Copy sound, with the times of the frames. On an error the rest of the sound is left out."""
        for packet in packets if self._sound is not None else ():
            shift = round(self._clip.shift * self._clip.time_base / packet.time_base)
            packet.pts, packet.dts = (None if time is None else time + shift for time in (packet.pts, packet.dts))
            if packet.dts * packet.time_base < -EARLIEST_SOUND:
                continue  # before the first frame
            if packet.dts <= self._sound_dts:
                return self._end_sound("its times go back")
            dts, end = packet.dts, float((packet.dts + (packet.duration or 0)) * packet.time_base)
            packet.stream = self._sound
            try:
                self._container.mux(packet)
            except pyav().FFmpegError as error:
                return self._end_sound(reason(error))
            self._sound_dts, self._sound_ends = dts, end

    def _end_sound(self, why: str) -> None:
        self._sound = None
        self.notes.append(
            f"the sound can't be copied ({why}): the overlay video is silent from {self._sound_ends:.1f} s on"
        )


def _encoder() -> str:
    codec = pyav().codec
    for name in ENCODERS:
        try:
            codec.Codec(name, "w")
        except codec.codec.UnknownCodecError:
            continue
        return name
    raise UserError(f"this PyAV can't write videos: it has none of {', '.join(ENCODERS)}")


class LegendOverTime:
    """A legend in which every word keeps its position.

    With few words all stand in it from the first frame on. Of more, each takes a place when it is first seen; when
    there is none, that of the word that has not been seen for longest.
    """

    def __init__(self, names: Sequence[str], background: bool) -> None:
        self._names = [readable(name) for name in names]
        self._rest = [Entry("unlabelled", "", None, 0.0)] if background else []
        self._colours = palette(len(names))
        self._canvas: np.ndarray | None = None

    def beside(self, picture: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """Draw `picture` [H, W, 3] and the legend on a canvas of even sides, the same array each time."""
        height, width, _ = picture.shape
        if self._canvas is None:
            self._plan(width, height)
        before = list(self._places)
        self._place(pixels / (height * width))
        if self._canvas is None or before != self._places:
            self._canvas = self._draw(width, height)
        self._canvas[:height, :width] = picture
        return self._canvas

    def _plan(self, width: int, height: int) -> None:
        entries = min(len(self._names), MOST_WORDS) + len(self._rest)
        texts = [*self._names, *(entry.name for entry in self._rest)]
        self._legend = Legend.beside((width, height), texts, [""], entries)
        room = self._legend.rows * self._legend.columns - len(self._rest)
        everything = len(self._names) <= room
        self._places: list[int | None] = list(range(len(self._names))) if everything else [None] * room
        self._last_seen = np.full(len(self._names), -1)
        self._frames = 0

    def _place(self, areas: np.ndarray) -> None:
        self._frames += 1
        largest = np.argsort(-areas, kind="stable")[: len(self._places)]
        seen = [int(word) for word in largest if areas[word] >= SHOWN]
        self._last_seen[seen] = self._frames
        for word in seen:
            if word not in self._places:
                ages = [-2 if held is None else self._last_seen[held] for held in self._places]
                self._places[int(np.argmin(ages))] = word

    def _draw(self, width: int, height: int) -> np.ndarray:
        words = [
            Entry("", "", None, 0.0, swatch=False)
            if word is None
            else Entry(self._names[word], "", rgb(self._colours[word]), 0.0)
            for word in self._places
        ]
        drawn = np.asarray(self._legend.draw(Image.new("RGB", (width, height)), words, self._rest))
        even = [(0, side % 2) for side in drawn.shape[:2]]
        return np.pad(drawn, [*even, (0, 0)], constant_values=255)
