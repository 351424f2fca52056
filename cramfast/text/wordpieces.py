"""WordPiece on bytes: the ids of new words without the tokenizer's general machinery, many times as fast."""

import json

import numba
import numpy as np
from tokenizers import Tokenizer

from cramfast.text.specials import UNK
from cramfast.text.spelling import KEPT
from cramfast.text.tokenizer import LONGEST_WORD

OTHER, LETTER, SIGN, SPACE, BREAK = range(5)  # other: control, or part of a character outside ASCII


def _kind(byte: int) -> int:
    character = chr(byte)
    if character in " \n\r\t":
        return SPACE if character == " " else BREAK
    if not 33 <= byte <= 126:
        return OTHER
    return LETTER if character.isalnum() else SIGN


KINDS = np.array([_kind(byte) for byte in range(256)], np.uint8)


class Pieces:
    """The vocabulary of a WordPiece tokenizer as a tree: what it makes of printable ASCII, without the detour through
    its general machinery.

    Attributes:
        children: (nodes, 128) int32, by character; 0 where there is none, since no child is the root.
        tokens: (nodes,) int32, id of the token that ends here, or -1.
        continued: node of "##", where the pieces after the first begin.
        signs: (code points,) int32, id of each sign outside ASCII that stays itself, [UNK] for any other character.
    """

    def __init__(self, vocabulary: dict[str, int]):
        children, tokens = [dict[int, int]()], [-1]

        def node_of(text: str) -> int:
            node = 0
            for letter in text.encode():
                if letter not in children[node]:
                    children[node][letter] = len(children)
                    children.append({})
                    tokens.append(-1)
                node = children[node][letter]
            return node

        for token, index in vocabulary.items():
            if token.isascii():
                tokens[node_of(token)] = index
        self.continued = node_of("##")
        self.signs = np.full(ord(max(KEPT)) + 1, UNK, np.int32)
        for sign in KEPT:
            self.signs[ord(sign)] = vocabulary.get(sign, UNK)
        self.tokens = np.array(tokens, np.int32)
        self.children = np.zeros((len(children), 128), np.int32)
        for node, following in enumerate(children):
            self.children[node, list(following)] = list(following.values())

    @staticmethod
    def of(tokenizer: Tokenizer) -> "Pieces | None":
        """The pieces of our own kind of WordPiece; None for any other tokenizer."""
        model = json.loads(tokenizer.to_str())["model"]
        ours = {"type": "WordPiece", "continuing_subword_prefix": "##", "unk_token": "[UNK]"}
        if any(model.get(key) != value for key, value in ours.items()) or model["vocab"].get("[UNK]") != UNK:
            return None
        return Pieces(model["vocab"]) if model["max_input_chars_per_word"] >= LONGEST_WORD else None

    def spell(self, spelling: np.ndarray, ends: np.ndarray, spelled: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the words end to end, int32, and the number of them in each, int64.

        Args:
            spelling: (bytes,) uint8, UTF-8 of the words end to end.
            ends: (words,) where each ends therein; words as look_up() in wordcache.py cuts them.
            spelled: whether they went through ascii_of(), so that what is not ASCII is a sign that stays itself.

        Returns:
            -1 as the number, and no ids, for a word that is not ASCII and not spelled.
        """
        ids, sizes = np.empty(len(spelling), np.int32), np.empty(len(ends), np.int64)
        tree = self.children, self.tokens, self.continued, self.signs
        written = _spell(spelling, ends, *tree, spelled, ids, sizes)
        return ids[:written], sizes


@numba.njit(cache=True, nogil=True)
def _spell(spelling, ends, children, tokens, continued, signs, spelled, ids, sizes):
    """Greedy longest-match WordPiece (Wu et al., arXiv:1609.08144) after lower-casing and splitting at
    spaces and signs.

    Args:
        spelling: (bytes,) uint8; ends: (words,) where each word ends therein.
        children, tokens, continued, signs: as in Pieces; spelled: as in Pieces.spell().
        ids, sizes: receive what Pieces.spell() returns.

    Returns:
        The number of ids.
    """
    place = written = 0
    for w in range(len(ends)):
        first, end = written, ends[w]
        sizes[w] = 0
        while place < end and sizes[w] == 0:
            kind = KINDS[spelling[place]]
            stop = place + 1
            if spelling[place] >= 128:
                if not spelled:
                    sizes[w] = -1
                    break
                while stop < end and 128 <= spelling[stop] < 192:
                    stop += 1
                ids[written] = signs[_code_point(spelling[place:stop], len(signs))]
                written += 1
            elif kind == LETTER:
                while stop < end and stop - place < LONGEST_WORD and KINDS[spelling[stop]] == LETTER:
                    stop += 1
            if kind in (LETTER, SIGN):
                written = _spell_part(spelling[place:stop], children, tokens, continued, ids, written)
            place = stop
        if sizes[w] < 0:
            place, written = end, first
        else:
            sizes[w] = written - first
    return written


@numba.njit(cache=True, nogil=True)
def _code_point(character, signs):
    """Of UTF-8 in two or three bytes; 0, which is no sign, where it is none of so many."""
    point = np.int64(character[0]) & (0x1F if len(character) == 2 else 0x0F)
    for byte in character[1:]:
        point = point << 6 | (np.int64(byte) & 0x3F)
    return point if len(character) <= 3 and point < signs else 0


@numba.njit(cache=True, nogil=True)
def _spell_part(part, children, tokens, continued, ids, written):
    """Append the pieces of one sign or one stretch of letters, or [UNK]; the number of ids afterwards."""
    first, place, root = written, 0, 0
    while place < len(part):
        node, best, longest, at = root, -1, place, place
        while at < len(part):
            letter = part[at]
            node = children[node, letter + 32 if 65 <= letter <= 90 else letter]
            if node == 0:
                break
            at += 1
            if tokens[node] >= 0:
                best, longest = tokens[node], at
        if best < 0:
            ids[first] = UNK
            return first + 1
        ids[written] = best
        written += 1
        place, root = longest, continued
    return written
