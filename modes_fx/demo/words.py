"""The words of the demo: what a picture can show, where it can stand, and the names of the 13 tasks.

Every picture is named by its Unicode code points, spelled as in `emoji-datasource` file names, so that the
pack can be rebuilt from the registries. `PICTURES` is the order of the drawings in `pictures.npz`.
"""

from __future__ import annotations

from dataclasses import dataclass

TASKS = (
    "object",
    "category",
    "color",
    "tone",
    "flag",
    "digit",
    "read",
    "sum",
    "count",
    "exist",
    "spatial",
    "row",
    "easyvqa",
)

NOUNS = {
    "animal": "dog:1f436 cat:1f431 horse:1f434 cow:1f42e pig:1f437 rabbit:1f430 bear:1f43b tiger:1f42f "
    "elephant:1f418 monkey:1f435 fox:1f98a lion:1f981",
    "bird": "chicken:1f414 penguin:1f427 duck:1f986 owl:1f989 eagle:1f985 parrot:1f99c",
    "marine": "octopus:1f419 whale:1f433 crab:1f980 shark:1f988 dolphin:1f42c shrimp:1f990",
    "bug": "bee:1f41d ant:1f41c butterfly:1f98b snail:1f40c ladybug:1f41e spider:1f577-fe0f",
    "fruit": "apple:1f34e banana:1f34c grapes:1f347 lemon:1f34b pear:1f350 cherries:1f352 strawberry:1f353 "
    "pineapple:1f34d",
    "food": "pizza:1f355 hamburger:1f354 bread:1f35e cake:1f370 cookie:1f36a egg:1f95a cheese:1f9c0 "
    "doughnut:1f369",
    "plant": "cactus:1f335 tulip:1f337 rose:1f339 sunflower:1f33b mushroom:1f344 palm:1f334",
    "vehicle": "car:1f697 bus:1f68c bicycle:1f6b2 rocket:1f680 airplane:2708-fe0f tractor:1f69c train:1f686 "
    "helicopter:1f681",
    "clothing": "shirt:1f455 dress:1f457 boot:1f462 crown:1f451 glasses:1f453 scarf:1f9e3 jeans:1f456 "
    "socks:1f9e6",
    "music": "guitar:1f3b8 violin:1f3bb trumpet:1f3ba drum:1f941 saxophone:1f3b7 piano:1f3b9",
}
COLORS = {
    "heart": "red:2764-fe0f orange:1f9e1 yellow:1f49b green:1f49a blue:1f499 purple:1f49c brown:1f90e "
    "black:1f5a4 white:1f90d",
    "circle": "red:1f534 orange:1f7e0 yellow:1f7e1 green:1f7e2 blue:1f535 purple:1f7e3 brown:1f7e4 "
    "black:26ab white:26aa",
    "square": "red:1f7e5 orange:1f7e7 yellow:1f7e8 green:1f7e9 blue:1f7e6 purple:1f7ea brown:1f7eb "
    "black:2b1b white:2b1c",
    "book": "red:1f4d5 green:1f4d7 blue:1f4d8 orange:1f4d9",
}
HANDS = {"thumb": "1f44d", "fist": "270a", "hand": "270b", "victory": "270c"}
TONES = {
    "light": "1f3fb",
    "medium-light": "1f3fc",
    "medium": "1f3fd",
    "medium-dark": "1f3fe",
    "dark": "1f3ff",
}
FLAGS = {
    "japan": "jp",
    "france": "fr",
    "germany": "de",
    "italy": "it",
    "brazil": "br",
    "canada": "ca",
    "america": "us",
    "britain": "gb",
    "china": "cn",
    "india": "in",
    "korea": "kr",
    "spain": "es",
    "mexico": "mx",
    "sweden": "se",
    "turkey": "tr",
    "greece": "gr",
}

# The nine cells of a scene in reading order, and the three rows.
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
ROWS = ("top", "middle", "bottom")
# Direction in the question -> step to the neighbouring cell as (rows, columns).
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Thing:
    """One kind of picture: what a cell can hold, without its pose.

    `word` answers "what is it", `attribute` is its colour, tone, country or digit ("" for a plain object),
    `code` is the picture's file stem ("" for a handwritten digit).
    """

    kind: str
    word: str
    attribute: str
    code: str
    category: str = ""

    @property
    def caption(self) -> str:
        """The thing with its attribute, as the `row` task lists it."""
        if self.kind == "digit":
            return self.attribute
        if self.kind == "flag":
            return f"{self.word} {self.attribute}"
        return f"{self.attribute} {self.word}".strip()


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(word, code) for word, _, code in (entry.partition(":") for entry in text.split())]


def _flag_code(country: str) -> str:
    return "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in country)


OBJECTS = tuple(
    Thing("object", word, "", code, category)
    for category, nouns in NOUNS.items()
    for word, code in _pairs(nouns)
)
COLORED = tuple(
    Thing("color", shape, color, code) for shape, colors in COLORS.items() for color, code in _pairs(colors)
)
GESTURES = tuple(
    Thing("hand", hand, tone, f"{code}-{tint}")
    for hand, code in HANDS.items()
    for tone, tint in TONES.items()
)
BANNERS = tuple(Thing("flag", "flag", country, _flag_code(code)) for country, code in FLAGS.items())
DIGITS = tuple(Thing("digit", "digit", str(value), "") for value in range(10))

PICTURES = OBJECTS + COLORED + GESTURES + BANNERS
CATEGORY = {thing.word: thing.category for thing in OBJECTS}
COUNTABLE = (*CATEGORY, *COLORS, *HANDS, "flag", "digit")

# Words of the questions that the tables above do not hold.
PHRASES = (
    "user assistant system what is at the kind color tone which country digit read digits add two how "
    "many there a left right of above below list everything row nothing yes no name"
)


def vocabulary(extra: tuple[str, ...] = ()) -> list[str]:
    """All words of questions and answers, sorted; `extra` texts (easy-VQA's) are split into words."""
    texts = [PHRASES, *extra, *CELLS, *ROWS, *NOUNS]
    texts += [text for thing in PICTURES + DIGITS for text in (thing.word, thing.attribute)]
    return sorted({word for text in texts for word in text.split()})
