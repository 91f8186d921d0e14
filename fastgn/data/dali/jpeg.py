"""Finds from the header of a JPEG its size, and whether all decoders decode the JPEG alike."""

import struct

START_OF_IMAGE, END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
FRAMES = {0xC0, 0xC1, 0xC2}
"""Bytes that mark the header of a baseline, extended or progressive JPEG with Huffman coding."""
OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Bytes that mark the header of a lossless, hierarchical or arithmetic-coded JPEG."""
START_OF_SCAN = 0xDA
ADOBE = 0xEE
ALONE = {0x01, *range(0xD0, 0xD8)}
"""Markers of a JPEG that consist of two bytes alone, without a length and data after them."""
RGB = (ord("R"), ord("G"), ord("B"))


def plain_size(content: bytes) -> tuple[int, int] | None:
    """Returns (width, height) in pixels of a complete 8-bit JPEG in grey or YCbCr.

    A rotation in EXIF data is ignored.

    Returns None for images that decoders may decode differently: other formats, CMYK and RGB JPEGs,
    12 bits, rare codings, truncated files, and files with bytes after the end.
    """
    if not content.startswith(START_OF_IMAGE) or not content.endswith(END_OF_IMAGE):
        return None
    position, size, adobe_transform = 2, None, None
    components: tuple[int, ...] = ()
    while position + 4 <= len(content):
        if content[position] != 0xFF:
            return None
        marker = content[position + 1]
        if marker == 0xFF or marker in ALONE:
            position += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", content, position + 2)
        payload = content[position + 4 : position + 2 + length]
        if marker in OTHER_FRAMES or (marker in FRAMES and size is not None):
            return None
        if marker in FRAMES:
            if len(payload) < 6 or payload[0] != 8 or len(payload) < 6 + 3 * payload[5]:
                return None
            height, width = struct.unpack_from(">HH", payload, 1)
            size = (width, height)
            components = tuple(payload[6 : 6 + 3 * payload[5] : 3])
        elif marker == ADOBE and payload.startswith(b"Adobe") and len(payload) >= 12:
            adobe_transform = payload[11]
        elif marker == START_OF_SCAN:
            break
        position += 2 + length
    else:
        return None
    if size is None or 0 in size or len(components) not in (1, 3):
        return None
    if len(components) == 3 and (adobe_transform == 0 or components == RGB):
        return None
    return size
