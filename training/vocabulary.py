"""What can stand in a scene, and the words that name it.

Every name is one word, so that it is one token of the language model: the dense loss of training compares a patch
with the embedding of the word for what the patch shows.
"""

PICTURES = {
    "dog": "🐶", "cat": "🐱", "fox": "🦊", "lion": "🦁", "tiger": "🐯", "cow": "🐮", "pig": "🐷", "frog": "🐸",
    "monkey": "🐵", "penguin": "🐧", "owl": "🦉", "turtle": "🐢", "snake": "🐍", "fish": "🐟", "octopus": "🐙",
    "snail": "🐌", "butterfly": "🦋", "bee": "🐝", "crab": "🦀", "elephant": "🐘", "rabbit": "🐰", "panda": "🐼",
    "whale": "🐳", "apple": "🍎", "banana": "🍌", "lemon": "🍋", "grapes": "🍇", "strawberry": "🍓",
    "pineapple": "🍍", "carrot": "🥕", "corn": "🌽", "mushroom": "🍄", "pizza": "🍕", "burger": "🍔", "cake": "🎂",
    "cookie": "🍪", "donut": "🍩", "egg": "🍳", "cheese": "🧀", "car": "🚗", "bus": "🚌", "train": "🚂",
    "airplane": "✈", "rocket": "🚀", "boat": "⛵", "bicycle": "🚲", "clock": "⏰", "umbrella": "☂", "guitar": "🎸",
    "trumpet": "🎺", "drum": "🥁", "key": "🔑", "bell": "🔔", "book": "📖", "camera": "📷", "scissors": "✂",
    "hammer": "🔨", "crown": "👑", "hat": "🎩", "shoe": "👟", "gift": "🎁", "balloon": "🎈", "cactus": "🌵",
    "house": "🏠",
}  # fmt: skip
CLASSES = tuple(PICTURES)

COLORS = {
    "red": (214, 40, 40), "orange": (247, 140, 20), "yellow": (250, 220, 50), "green": (46, 160, 67),
    "blue": (40, 90, 220), "purple": (140, 60, 190), "white": (245, 245, 245), "black": (25, 25, 28),
}  # fmt: skip

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

_WORD_LIST = """
ACE AIR ANT ARM ART ASK BAG BED BIG BOX BOY BUY CAP COD CUP DAY DEN DRY EAR EAST ELF EYE FAN FAR FIG FLY FUN GAS
GEM GOLD GUM HAM HEN HILL HOP HUT ICE INK IVY JAM JAR JET JOB JOY KID KIT LAB LAKE LEG LIP LOG MAP MIX MOON MUD
NET NOD NUT OAK OIL ONE OWN PAN PEN PIN POT QUIZ RAIN RAY ROD RUG SAND SEA SIX SKY STAR SUN TAP TEA TEN TOY TWO
URN VAN VET WAX WEB WIG WIN WOOD YAK YES ZAP ZIP ZOO HELP LOVE
"""
WORDS = tuple(_WORD_LIST.split())

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
COUNTS = ("0", "1", "2", "3", "4")
NOTHING = "nothing"
CENTER_MARK = "object"

ARTICLE = {name: ("an" if name[0] in "aeiou" else "a") for name in CLASSES}


def held_out(class_index: int, color_index: int) -> bool:
    """True for the object and color pairs (one in eight) that no training scene shows together."""
    return (class_index + 3 * (class_index // 8) + color_index) % len(COLORS) == 0
