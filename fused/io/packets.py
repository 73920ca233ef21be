"""Facts read from bytes without decoding: where decoding can begin, whether a frame is hidden, if a file's end is missing."""

from pathlib import Path
from typing import Any


def starts_anew(codec: str, extradata: bytes | None, packet: Any) -> bool:
    """Return whether a key frame of H.264 or HEVC can be decoded, with what follows, without anything before it.

    One from which a picture is only refreshed step by step is marked as a key frame too. Only packets of MP4 and Matroska,
    whose NAL units have their length in front, are looked into. Source: ITU-T H.264, 7.3.1 and D.1.8; H.265, 7.4.2.2.
    """
    if codec not in ("h264", "hevc") or not extradata or extradata[0] != 1:
        return True
    prefix = (extradata[4 if codec == "h264" else 21] & 3) + 1 if len(extradata) > 21 or codec == "h264" else 4
    data, place = bytes(packet), 0
    while place + prefix < len(data):
        size = int.from_bytes(data[place : place + prefix], "big")
        unit = data[place + prefix : place + prefix + size]
        if codec == "hevc" and unit and 16 <= unit[0] >> 1 & 63 <= 21:
            return True
        if codec == "h264" and unit and (unit[0] & 31 == 5 or unit[0] & 31 == 6 and _recovers_at_once(unit[1:])):
            return True
        place += prefix + size
    return False


def _recovers_at_once(messages: bytes) -> bool:
    """Return whether the SEI messages of a unit of H.264 say that pictures are right from here on."""
    place = 0
    while place + 2 < len(messages):
        kind, place = _sum_of_bytes(messages, place)
        size, place = _sum_of_bytes(messages, place)
        if kind == 6:  # a recovery point: the number of frames until then begins with bit 1 if it is 0
            return place < len(messages) and messages[place] >= 0x80
        place += size
    return False


def _sum_of_bytes(data: bytes, place: int) -> tuple[int, int]:
    """Return a number of an SEI message, a sum of bytes up to the first that is not 255, and the place behind it."""
    total = 0
    while place < len(data) and data[place] == 255:
        total, place = total + 255, place + 1
    return total + (data[place] if place < len(data) else 0), place + 1


def is_hidden_vp9(data: bytes) -> bool:
    """Return whether a packet of VP9 holds a single frame that is not shown. Source: VP9 bitstream specification, 6.2."""
    if not data or data[-1] & 0xE0 == 0xC0:  # a superframe ends with the frame that is shown
        return False
    bits = f"{int.from_bytes(data[:2], 'big'):016b}"
    place = 5 if bits[2:4] == "11" else 4  # profile 3 has one more bit
    shows_existing, shown = bits[place] == "1", bits[place + 2] == "1"
    return not shows_existing and not shown


def ends_before_its_segment(path: Path) -> bool:
    """Return whether a Matroska file is shorter than its segment states. Source: RFC 8794, RFC 9559 section 5.1."""
    with path.open("rb") as file:
        data = file.read(4096)
    start = data.find(b"\x18\x53\x80\x67") + 4  # the segment's identifier
    if start < 4 or start >= len(data):
        return False
    length = 9 - data[start].bit_length()
    if length > 8 or start + length > len(data):
        return False
    size = int.from_bytes(data[start : start + length], "big") - (1 << 7 * length)
    unknown = (1 << 7 * length) - 1
    return size != unknown and start + length + size > path.stat().st_size
