"""Short words in pictures, without a font library.

Responsible for: a 5 x 7 pixel font for lower-case row labels. Not responsible for: where labels go (``previews.py``).
"""

import numpy as np

_WIDTH, HEIGHT = 5, 7

# Five columns a letter, one byte a column, lowest bit at the top.
_COLUMNS = {
    "a": "2054545478", "b": "7f48444438", "c": "3844444420", "d": "384444487f", "e": "3854545418", "f": "087e090102",
    "g": "081454543c", "h": "7f08040478", "i": "00447d4000", "j": "2040443d00", "k": "7f10284400", "l": "00417f4000",
    "m": "7c04180478", "n": "7c08040478", "o": "3844444438", "p": "7c14141408", "q": "081414187c", "r": "7c08040408",
    "s": "4854545420", "t": "043f444020", "u": "3c4040207c", "v": "1c2040201c", "w": "3c4030403c", "x": "4428102844",
    "y": "0c5050503c", "z": "4464544c44", "0": "3e5149453e", "1": "00427f4000", "2": "4261514946", "3": "2141454b31",
    "4": "1814127f10", "5": "2745454539", "6": "3c4a494930", "7": "0171090503", "8": "3649494936", "9": "064949291e",
    " ": "0000000000", "-": "0808080808", ".": "0060600000", "/": "2010080402",
}  # fmt: skip
_UNKNOWN = "7f4141417f"


def lettering(text: str) -> np.ndarray:
    """The text as bool [7, 6 * letters]; underscores become spaces, letters are lower-cased, unknown ones are boxes."""
    columns = []
    for letter in text.lower().replace("_", " "):
        columns += [*bytes.fromhex(_COLUMNS.get(letter, _UNKNOWN)), 0]
    return (np.array(columns, np.uint8)[None, :] >> np.arange(HEIGHT)[:, None] & 1).astype(bool)


def lettering_width(text: str) -> int:
    """Pixels that ``lettering(text)`` is wide."""
    return (_WIDTH + 1) * len(text)
