"""GarbleFilter: responses that have fallen apart give no gradient."""

from __future__ import annotations

import zlib
from collections import Counter
from typing import Any

import lightning.pytorch as L

from lit_rl.checks import require
from lit_rl.experience import Experience
from lit_rl.hooks import RLCallback

REPLACEMENT = "�"


class GarbleFilter(RLCallback):
    """Masks garbled responses, as MiniCPM4 does (arXiv 2506.07900, section 3.2.3, which does not say how it tells them). They
    count in their group's advantages, like truncated ones under `mask_truncated`, and give no gradient.

    The rules are ours, and any one is enough. Those on repetition need `shortest` characters or more, since a short
    response repeats little and compresses badly whatever it says. Counted as skipped/garbled, and by rule as
    garbled/compressible, /repeated, /uniform and /unreadable.

    Args:
        compressible: zlib shrinks its UTF-8 bytes to less than this share. English prose is at 0.4 to 0.6, a loop of one
            sentence below 0.1.
        repeated: Its last 40 characters make up more than this share of it, by copies that do not overlap.
        uniform: Less than this share of its runs of four words (of four characters where there are fewer than 20 words) are
            different ones.
        unreadable: More than this share of its characters are U+FFFD, which stands for bytes that are no text, or are not
            printable. Of responses of any length.
        shortest: In characters.
    """

    def __init__(
        self,
        compressible: float = 0.12,
        repeated: float = 0.5,
        uniform: float = 0.1,
        unreadable: float = 0.1,
        shortest: int = 200,
    ) -> None:
        shares = {"compressible": compressible, "repeated": repeated, "uniform": uniform, "unreadable": unreadable}
        for name, value in shares.items():
            require(0 <= value <= 1, name, value, "a share between 0 and 1")
        require(shortest >= 40, "shortest", shortest, "at least 40")
        self.compressible, self.repeated, self.uniform = compressible, repeated, uniform
        self.unreadable, self.shortest = unreadable, shortest

    def on_advantage(self, trainer: L.Trainer, policy: Any, experience: Experience) -> None:
        x, found = experience, Counter[str]()
        for row, text in enumerate(x.texts):
            if x.off_policy[row]:
                continue
            broken = self.rules(text)
            found.update(broken)
            if broken:
                found["any"] += 1
                x.mask[row] = False
        policy.count("skipped/garbled", found["any"])
        for name in ("compressible", "repeated", "uniform", "unreadable"):
            policy.count(f"garbled/{name}", found[name])

    def rules(self, text: str) -> list[str]:
        """The names of those that say the text is garbled."""
        if not text:
            return []
        odd = sum(c == REPLACEMENT or not (c.isprintable() or c.isspace()) for c in text) / len(text)
        measures = {"unreadable": odd > self.unreadable}
        if len(text) >= self.shortest:
            data = text.encode(errors="replace")
            words = text.split()
            units = words if len(words) >= 20 else list(text)
            runs = list(zip(*(units[i:] for i in range(4)), strict=False))
            measures |= {
                "compressible": len(zlib.compress(data)) < self.compressible * len(data),
                "repeated": text.count(text[-40:]) * 40 > self.repeated * len(text),
                "uniform": len(set(runs)) < self.uniform * len(runs),
            }
        return [name for name, broken in measures.items() if broken]
