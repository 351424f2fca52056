"""What NVIDIA's cards can do at most, by their data sheets, from Turing on.

A row holds what the data sheet says and what that follows from, and tests/cost/test_cards.py holds one to the other:
bandwidth = bus width x data rate / 8, tensor rate = multiprocessors x FLOPs a clock x boost clock. FLOPs a clock are
those of dense half-precision products summed in float32, which GeForce cards of every generation do at half the rate of
workstation cards with the same chip. Not here: GeForce 16 (no tensor cores), laptop cards (their clocks are the
maker's), and cards of which a figure could not be confirmed.
"""

import difflib
import re
from dataclasses import dataclass

from cramfast.errors import UserError


@dataclass(frozen=True)
class Chip:
    """What a card's figures follow from.

    Attributes:
        multiprocessors: of the card.
        flops: of one multiprocessor in a clock, on its tensor cores, summed in float32.
        lanes: float32 units of a multiprocessor, two FLOPs a clock each.
        megahertz: boost clock.
        bus: width of the memory's interface in bits.
        gigabits: per second on each line of it.
    """

    multiprocessors: int
    flops: int
    lanes: int
    megahertz: int
    bus: int
    gigabits: float


@dataclass(frozen=True)
class Card:
    """What a device can do at most.

    Attributes:
        bandwidth: bytes/s of its memory.
        tensor_flops: FLOP/s of half-precision products summed in float32, without sparsity.
        plain_flops: FLOP/s of float32 outside the tensor cores.
        memory_bytes: size of its memory.
        capability: CUDA compute capability; None for a CPU, whose two rates are one.
        source: where the figures come from.
        chip: what they follow from; None where only the figures are published.
    """

    name: str
    bandwidth: float
    tensor_flops: float
    plain_flops: float
    memory_bytes: int
    capability: tuple[int, int] | None
    source: str
    chip: Chip | None = None

    @property
    def dtype(self) -> str:
        """The half precision that its tensor cores multiply: no bfloat16 before sm_80."""
        return "bfloat16" if self.capability is None or self.capability >= (8, 0) else "float16"


TURING = "NVIDIA Turing GPU Architecture whitepaper, reference clocks"
GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper"
ADA = "NVIDIA Ada GPU Architecture whitepaper"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
SHEET = "NVIDIA {} data sheet"
PAGE = "NVIDIA {} product page: cores, clock and memory; the rates follow"

# (capability, FLOPs a multiprocessor and clock, float32 lanes): as Chip and Card have them
GEFORCE_20, QUADRO_RTX = ((7, 5), 512, 64), ((7, 5), 1024, 64)
GEFORCE_30, WORKSTATION_30, A100 = ((8, 6), 512, 128), ((8, 6), 1024, 128), ((8, 0), 2048, 64)
GEFORCE_40, WORKSTATION_40 = ((8, 9), 512, 128), ((8, 9), 1024, 128)
GEFORCE_50, WORKSTATION_50 = ((12, 0), 512, 128), ((12, 0), 1024, 128)
HOPPER = ((9, 0), 4096, 128)

# name: kind, multiprocessors, MHz, bus in bits, Gbit/s a line | GB, GB/s, TFLOP/s of half products | source
TABLE = (
    ("T4", QUADRO_RTX, 40, 1590, 256, 10, 16, 320, 65, SHEET),
    ("RTX 2060", GEFORCE_20, 30, 1680, 192, 14, 6, 336, 25.8, PAGE),
    ("RTX 2060 Super", GEFORCE_20, 34, 1650, 256, 14, 8, 448, 28.7, PAGE),
    ("RTX 2070", GEFORCE_20, 36, 1620, 256, 14, 8, 448, 29.9, TURING),
    ("RTX 2070 Super", GEFORCE_20, 40, 1770, 256, 14, 8, 448, 36.2, PAGE),
    ("RTX 2080", GEFORCE_20, 46, 1710, 256, 14, 8, 448, 40.3, TURING),
    ("RTX 2080 Super", GEFORCE_20, 48, 1815, 256, 15.5, 8, 496, 44.6, PAGE),
    ("RTX 2080 Ti", GEFORCE_20, 68, 1545, 352, 14, 11, 616, 53.8, TURING),
    ("Titan RTX", QUADRO_RTX, 72, 1770, 384, 14, 24, 672, 130.5, PAGE),
    ("Quadro RTX 4000", QUADRO_RTX, 36, 1545, 256, 13, 8, 416, 57.0, SHEET),
    ("Quadro RTX 5000", QUADRO_RTX, 48, 1815, 256, 14, 16, 448, 89.2, SHEET),
    ("Quadro RTX 6000", QUADRO_RTX, 72, 1770, 384, 14, 24, 672, 130.5, SHEET),
    ("Quadro RTX 8000", QUADRO_RTX, 72, 1770, 384, 14, 48, 672, 130.5, SHEET),
    ("RTX 3050", GEFORCE_30, 20, 1777, 128, 14, 8, 224, 18.2, PAGE),
    ("RTX 3060", GEFORCE_30, 28, 1777, 192, 15, 12, 360, 25.5, PAGE),
    ("RTX 3060 Ti", GEFORCE_30, 38, 1665, 256, 14, 8, 448, 32.4, PAGE),
    ("RTX 3070", GEFORCE_30, 46, 1725, 256, 14, 8, 448, 40.6, GA102),
    ("RTX 3070 Ti", GEFORCE_30, 48, 1770, 256, 19, 8, 608, 43.5, PAGE),
    ("RTX 3080", GEFORCE_30, 68, 1710, 320, 19, 10, 760, 59.5, GA102),
    ("RTX 3080 12GB", GEFORCE_30, 70, 1710, 384, 19, 12, 912, 61.3, PAGE),
    ("RTX 3080 Ti", GEFORCE_30, 80, 1665, 384, 19, 12, 912, 68.2, PAGE),
    ("RTX 3090", GEFORCE_30, 82, 1695, 384, 19.5, 24, 936, 71, GA102),
    ("RTX 3090 Ti", GEFORCE_30, 84, 1860, 384, 21, 24, 1008, 80, PAGE),
    ("RTX A2000", WORKSTATION_30, 26, 1200, 192, 12, 6, 288, 31.9, SHEET),
    ("RTX A2000 12GB", WORKSTATION_30, 26, 1200, 192, 12, 12, 288, 31.9, SHEET),
    ("RTX A4000", WORKSTATION_30, 48, 1560, 256, 14, 16, 448, 76.7, SHEET),
    ("RTX A4500", WORKSTATION_30, 56, 1650, 320, 16, 20, 640, 94.6, SHEET),
    ("RTX A5000", WORKSTATION_30, 64, 1695, 384, 16, 24, 768, 111.1, SHEET),
    ("RTX A5500", WORKSTATION_30, 80, 1665, 384, 16, 24, 768, 136.4, SHEET),
    ("RTX A6000", WORKSTATION_30, 84, 1800, 384, 16, 48, 768, 154.8, GA102),
    ("A2", WORKSTATION_30, 10, 1770, 128, 12.5, 16, 200, 18.1, SHEET),
    ("A10", WORKSTATION_30, 72, 1695, 384, 12.5, 24, 600, 125, SHEET),
    ("A16", WORKSTATION_30, 10, 1755, 128, 12.5, 16, 200, 17.9, SHEET + ", one of its four GPUs"),
    ("A40", WORKSTATION_30, 84, 1740, 384, 14.5, 48, 696, 149.7, SHEET),
    ("A30", A100, 56, 1440, 3072, 2.43, 24, 933, 165, SHEET),
    ("A100", A100, 108, 1410, 5120, 3.186, 80, 2039, 312, SHEET + ", SXM 80 GB"),
    ("A100 40GB", A100, 108, 1410, 5120, 2.43, 40, 1555, 312, SHEET + ", 40 GB"),
    ("A100 PCIe", A100, 108, 1410, 5120, 3.024, 80, 1935, 312, SHEET + ", PCIe 80 GB"),
    ("RTX 4060", GEFORCE_40, 24, 2460, 128, 17, 8, 272, 30.2, PAGE),
    ("RTX 4060 Ti", GEFORCE_40, 34, 2535, 128, 18, 8, 288, 44.1, PAGE),
    ("RTX 4060 Ti 16GB", GEFORCE_40, 34, 2535, 128, 18, 16, 288, 44.1, PAGE),
    ("RTX 4070", GEFORCE_40, 46, 2475, 192, 21, 12, 504, 58.3, PAGE),
    ("RTX 4070 Super", GEFORCE_40, 56, 2475, 192, 21, 12, 504, 71, PAGE),
    ("RTX 4070 Ti", GEFORCE_40, 60, 2610, 192, 21, 12, 504, 80.2, PAGE),
    ("RTX 4070 Ti Super", GEFORCE_40, 66, 2610, 256, 21, 16, 672, 88.2, PAGE),
    ("RTX 4080", GEFORCE_40, 76, 2505, 256, 22.4, 16, 716.8, 97.5, ADA),
    ("RTX 4080 Super", GEFORCE_40, 80, 2550, 256, 23, 16, 736, 104.4, PAGE),
    ("RTX 4090", GEFORCE_40, 128, 2520, 384, 21, 24, 1008, 165.2, ADA),
    ("RTX 2000 Ada", WORKSTATION_40, 22, 2130, 128, 14, 16, 224, 48, SHEET),
    ("RTX 4000 SFF Ada", WORKSTATION_40, 48, 1560, 160, 14, 20, 280, 76.7, SHEET),
    ("RTX 4000 Ada", WORKSTATION_40, 48, 2175, 160, 18, 20, 360, 106.9, SHEET),
    ("RTX 4500 Ada", WORKSTATION_40, 60, 2580, 192, 18, 24, 432, 158.5, SHEET),
    ("RTX 5000 Ada", WORKSTATION_40, 100, 2550, 256, 18, 32, 576, 261.1, SHEET),
    ("RTX 6000 Ada", WORKSTATION_40, 142, 2505, 384, 20, 48, 960, 364.2, SHEET),
    ("L4", WORKSTATION_40, 58, 2040, 192, 12.5, 24, 300, 121, SHEET),
    ("L40", GEFORCE_40, 142, 2490, 384, 18, 48, 864, 181, SHEET),
    ("L40S", WORKSTATION_40, 142, 2490, 384, 18, 48, 864, 362, SHEET),
    ("RTX 5050", GEFORCE_50, 20, 2572, 128, 20, 8, 320, 26.3, PAGE),
    ("RTX 5060", GEFORCE_50, 30, 2497, 128, 28, 8, 448, 38.4, PAGE),
    ("RTX 5060 Ti", GEFORCE_50, 36, 2572, 128, 28, 8, 448, 47.4, PAGE),
    ("RTX 5060 Ti 16GB", GEFORCE_50, 36, 2572, 128, 28, 16, 448, 47.4, PAGE),
    ("RTX 5070", GEFORCE_50, 48, 2512, 192, 28, 12, 672, 61.7, BLACKWELL),
    ("RTX 5070 Ti", GEFORCE_50, 70, 2452, 256, 28, 16, 896, 87.9, BLACKWELL),
    ("RTX 5080", GEFORCE_50, 84, 2617, 256, 30, 16, 960, 112.6, BLACKWELL),
    ("RTX 5090", GEFORCE_50, 170, 2407, 512, 28, 32, 1792, 209.5, BLACKWELL),
    ("RTX PRO 6000 Blackwell", WORKSTATION_50, 188, 2617, 512, 28, 96, 1792, 503.8, SHEET + ", workstation edition"),
    ("H100 PCIe", HOPPER, 114, 1620, 5120, 3.186, 80, 2039, 756, SHEET + ", PCIe"),
    ("H100", HOPPER, 132, 1830, 5120, 5.23, 80, 3350, 989, SHEET + ", SXM"),
    ("H200", HOPPER, 132, 1830, 6144, 6.25, 141, 4800, 989, SHEET + ", SXM"),
)
# Float32 outside the tensor cores runs at another clock there: TFLOP/s of the data sheets.
OTHER_CLOCK = {"H100 PCIe": 51, "H100": 67, "H200": 67}
SHEETS_ALONE = (
    Card("H100 NVL", 3.9e12, 835e12, 60e12, 94 * 10**9, (9, 0), "NVIDIA H100 data sheet, NVL"),
    Card("B200", 8e12, 2250e12, 75e12, 180 * 10**9, (10, 0), "NVIDIA DGX B200 data sheet, one of eight"),
)


def _card(name, kind, multiprocessors, megahertz, bus, gigabits, memory, bandwidth, teraflops, source) -> Card:
    capability, flops, lanes = kind
    chip = Chip(multiprocessors, flops, lanes, megahertz, bus, gigabits)
    plain = OTHER_CLOCK.get(name) or round(multiprocessors * lanes * 2 * megahertz / 1e6, 1)
    decimal = capability == (9, 0) or name.startswith("A100")  # how the data sheets count, and drivers find
    size = memory * 10**9 if decimal else memory << 30
    return Card(name, bandwidth * 1e9, teraflops * 1e12, plain * 1e12, size, capability, source.format(name), chip)


CARDS = (*(_card(*row) for row in TABLE), *SHEETS_ALONE)

# Words of a driver's or a shop's name that tell no two cards of the table apart.
NOISE = {"nvidia", "geforce", "graphics", "card", "generation", "workstation", "server", "edition", "sxm", "sxm2"}
NOISE |= {"sxm4", "sxm5", "hbm3", "hbm3e", "gpu", "tensor", "core", "tesla"}
LAPTOP = {"laptop", "mobile", "q"}  # "Max-Q"


def words(name: str) -> frozenset[str]:
    """The words that tell a card from others: of "NVIDIA GeForce RTX 2080Ti" rtx, 2080 and ti."""
    text = re.sub(r"\brtx(?=\d)", "rtx ", name.lower())
    text = re.sub(r"(?<=\d)(ti|super|gb)\b", r" \1", text)
    text = re.sub(r"(\d+) gb\b", r"\1gb", text)
    return frozenset(re.findall(r"[a-z0-9]+", text)) - NOISE


def sizes(card: Card) -> set[str]:
    """What a name may say of the card's memory: a card of another size is another card."""
    return {f"{card.memory_bytes >> 30}gb", f"{card.memory_bytes // 10**9}gb"}


def find_card(name: str) -> Card:
    """The card of that name, upper or lower case, with or without the words before it (2080 ti, NVIDIA H200).

    Raises:
        UserError: a card that is not in the table, with the nearest names, or a name that fits several.
    """
    asked = words(name)
    if asked & LAPTOP:
        raise UserError(
            f"--gpu {name!r}: a laptop's clocks are its maker's, so no table has them — plan there without --gpu"
        )
    inside = [card for card in CARDS if words(card.name) <= asked and asked - words(card.name) <= sizes(card)]
    around = [card for card in CARDS if asked and asked <= words(card.name)]
    for found, size in ((inside, lambda card: -len(words(card.name))), (around, lambda card: len(words(card.name)))):
        best = [card for card in found if size(card) == min(map(size, found))]
        if len(best) == 1:
            return best[0]
        if best:
            raise UserError(f"--gpu {name!r}: fits several — use one of {', '.join(card.name for card in best)}")
    spelled = {" ".join(re.findall(r"[a-z0-9]+", card.name.lower())): card.name for card in CARDS}
    text = " ".join(word for word in re.findall(r"[a-z0-9]+", name.lower()) if word in asked)
    near = [spelled[match] for match in difflib.get_close_matches(text, spelled, n=3, cutoff=0.4)]
    hint = f"nearest: {', '.join(near)}; " if near else ""
    raise UserError(f"--gpu {name!r}: not in the table — {hint}use one of {', '.join(card.name for card in CARDS)}")
