"""Token ids as words: vocabularies, what of a text is one word, and the coloured text as a page of HTML."""

from __future__ import annotations

import dataclasses
import functools
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxgbp.errors import OnnxgbpError
from onnxgbp.files import read_text
from onnxgbp.render import diverging, scaled

__all__ = ["Piece", "Vocabulary", "collapsed", "colours_of", "pieces_of", "text_page"]

_MARKS = ("Ġ", "▁", "##")  # how a byte-level BPE and SentencePiece begin a word, how WordPiece goes on with one
_FEW = 3  # tokens of a run that are still written out


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """tokens: by id; mark: the one of _MARKS that they use, or ''; path: where they were read."""

    tokens: Mapping[int, str]
    mark: str
    path: Path

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """From vocab.txt (a token on each line, the first has the id 0), vocab.json (ids by token) or tokenizer.json.

        Raises:
            OnnxgbpError: it cannot be read, or is none of these.
        """
        text = read_text(path)
        if path.suffix.lower() == ".json":
            tokens = _from_json(text, path)
        else:  # not splitlines, which takes some characters that are tokens for the end of a line
            tokens = dict(enumerate(line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")))
        if not any(tokens.values()):
            raise OnnxgbpError(f"{path} holds no token")
        # By number: a letter such as Ġ may also be a token of a vocabulary that marks its words in another way.
        counts = {mark: sum(token.startswith(mark) for token in tokens.values()) for mark in _MARKS}
        mark = max(_MARKS, key=lambda mark: counts[mark])
        return cls(tokens, mark if counts[mark] else "", path)


@dataclasses.dataclass(frozen=True)
class Piece:
    """text: of a token, fit to be shown; joined: whether it goes on with the word before; value: its attribution."""

    text: str
    joined: bool
    value: float


def pieces_of(ids: Sequence[int], values: npt.NDArray[np.float64], vocabulary: Vocabulary | None) -> list[Piece]:
    """The tokens of a text and their attribution [L]; without a vocabulary their ids.

    Raises:
        OnnxgbpError: an id that the vocabulary has not.
    """
    if vocabulary is None:
        return [Piece(str(token), False, float(value)) for token, value in zip(ids, values, strict=True)]
    pieces: list[Piece] = []
    apart = True  # the first, and what follows a special token
    for token, value in zip(ids, values, strict=True):
        if int(token) not in vocabulary.tokens:
            raise OnnxgbpError(
                f"token id {token} is not among the {len(vocabulary.tokens)} of {vocabulary.path}: is it the "
                "vocabulary of this model?"
            )
        said = vocabulary.tokens[int(token)]
        special = said[:1] + said[-1:] in ("<>", "[]") and len(said) > 2
        begins = said.startswith(vocabulary.mark) != (vocabulary.mark == "##") if vocabulary.mark else True
        text = said if special else said.removeprefix(vocabulary.mark)
        text = _from_bytes(text) if vocabulary.mark == "Ġ" and not special else text
        pieces.append(Piece(_printable(text), not (begins or special or apart), float(value)))
        apart = special
    return pieces


def collapsed(pieces: Sequence[Piece]) -> list[Piece]:
    """A longer run of one token that is not attributed to, a padding, as one piece that says how often it stands."""
    found: list[Piece] = []
    for (text, zero), group in groupby(pieces, key=lambda piece: (piece.text, piece.value == 0)):
        run = list(group)
        found += [Piece(f"{text} × {len(run)}", False, 0.0)] if zero and len(run) > _FEW else run
    return found


def colours_of(pieces: Sequence[Piece], clip: float) -> list[tuple[str, str]]:
    """The background of each, and black or white for its letters, whichever stands out more: as in '#f7f7f7'."""
    if not pieces:
        return []
    shares = scaled(np.array([[piece.value for piece in pieces]]), clip)
    return [(f"#{r:02x}{g:02x}{b:02x}", _on(r / 255, g / 255, b / 255)) for r, g, b in np.asarray(diverging(shares))[0]]


def _on(*background: float) -> str:
    """Black or white, by the contrast of WCAG 2.2: (L1 + 0.05) / (L2 + 0.05), L the relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "#000000" if luminance + 0.05 > (1.05 * 0.05) ** 0.5 else "#ffffff"


def text_page(pieces: Sequence[Piece], clip: float, *, title: str, note: str) -> str:
    """The coloured text as a page of HTML that needs nothing else; the value of a token shows under the pointer."""
    line_end = "\n"  # which a browser shows as a blank
    spans = [
        f'{"" if piece.joined else line_end}<span style="background:{back};color:{front}" title="{piece.value:.4g}">'
        f"{html.escape(piece.text)}</span>"
        for piece, (back, front) in zip(pieces, colours_of(pieces, clip), strict=True)
    ]
    ends = np.asarray(diverging(np.linspace(-1, 1, 11)[np.newaxis]))[0]
    ramp = ", ".join(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in ends)
    said = html.escape(title)
    return f"""<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{said}</title>
<style>
body {{ background: #ffffff; color: #000000; font: 16px/1.9 system-ui, sans-serif; margin: 2em auto; max-width: 48em;
  padding: 0 1em }}
h1 {{ font-size: 1.1em }}
span {{ border-radius: 3px; padding: 0.15em 0.25em; white-space: pre-wrap; overflow-wrap: anywhere }}
.scale {{ background: linear-gradient(to right, {ramp}); height: 0.8em; margin-top: 2em }}
.ends {{ display: flex; font-size: 0.85em }}
.ends b {{ flex: 1; text-align: center }}
.ends b:first-child {{ text-align: left }}
.ends b:last-child {{ text-align: right }}
</style>
</head>
<body>
<h1>{said}</h1>
<p>{"".join(spans)}
</p>
<div class="scale"></div>
<div class="ends"><b>-{clip:.3g}</b><b>0</b><b>{clip:.3g}</b></div>
<p class="ends">{html.escape(note)}</p>
</body>
</html>
"""


def _from_json(text: str, path: Path) -> dict[int, str]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise OnnxgbpError(f"cannot read {path}: it is no JSON") from None
    try:
        return dict(_entries(said))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise OnnxgbpError(f"{path} is neither a tokenizer.json nor a vocab.json of ids by token") from None


def _entries(said: Any) -> Iterator[tuple[int, str]]:
    """Ids and tokens of a parsed file; any of several exceptions where it is none."""
    held = said["model"]["vocab"] if isinstance(said.get("model"), dict) else said
    if isinstance(held, list):  # Unigram: tokens in the order of their ids, each with its score
        yield from ((number, str(token)) for number, (token, _) in enumerate(held))
    else:
        yield from ((_id(number), token) for token, number in held.items())
    if held is not said:
        yield from ((_id(token["id"]), str(token["content"])) for token in said.get("added_tokens") or ())


def _id(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError
    return number


@functools.cache
def _bytes() -> dict[str, int]:
    """The letters that stand for bytes in a byte-level BPE: printable ones for themselves, from 256 on the others."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _from_bytes(text: str) -> str:
    table = _bytes()
    if not all(letter in table for letter in text):
        return text
    return bytes(table[letter] for letter in text).decode("utf-8", "replace")  # a token may end within a letter


def _printable(text: str) -> str:
    """Without control characters and halves of surrogates; a token of blanks is seen, too."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown.strip() or "␣" * max(len(shown), 1)
