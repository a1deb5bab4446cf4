"""Synthetic requests: prompts of a given number of tokens that no prefix cache has seen."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

# Short common words: one token each to the byte-pair vocabularies in use, so that a prompt's
# length in words is its length in tokens.
_TEXT = """
about ahead air almost area art away base below better blood blue board book box boy bread build
cause chair change church city clear cold cost could cover create cross day death deep die
divide dollar double down draw dream drop dry east edge end energy equal even event every face
fair far feel field fight final fine fire first five flat flow food foot forest fresh friend
game girl gold gone got govern grand gray great ground group grow half hand hard head heart help
high home hour house ice inch joy kind king know lake least leave left leg length light list
listen little log long lost love low made major make man many map mark mean metal middle mine
miss modern moon mother motion mount mouth music must name near need never night note noun once
one open order our out over party pass pick pitch plain plan planet please post pound pretty
print pull push quiet radio raise ran rather reach repeat rest result ring rise road room root
rose round rule safe same sand sat say school score sea seat seed self sense set seven shell
ship side sight sign simple since single sleep slip some south space speech speed spread spring
state stay stone stood story string sun supply symbol table take thank that the there they thing
think this three tie tiny tone total train type unit vary verb voice wait war wash watch way
wheel where whose wide wild wind winter work world would wrong yard yes your
"""
_WORDS = _TEXT.split()


class Job(NamedTuple):
    """One request to send."""

    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Span:
    """An inclusive range of token counts, drawn from uniformly."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """`128` or `32:512`. Raises ValueError on anything else."""
        low, _, high = text.partition(":")
        span = cls(int(low), int(high or low))
        if not 1 <= span.low <= span.high:
            raise ValueError(f"{text!r} is no range of token counts: give N or LOW:HIGH, from 1 up")
        return span

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Workload:
    """What the requests look like; the same seed gives the same requests.

    Every prompt is random from its first word, so no two share a prefix, but for the first
    `shared_prefix` tokens, which all have in common.
    """

    prompt_tokens: Span
    output_tokens: Span
    shared_prefix: int = 0
    seed: int = 0

    def probe(self) -> Job:
        """A short request of the longest prompt, unlike any of `jobs`."""
        longest = Span(self.prompt_tokens.high, self.prompt_tokens.high)
        other = replace(self, prompt_tokens=longest, shared_prefix=0, seed=self.seed + 1)
        return next(other.jobs())._replace(max_tokens=8)

    def jobs(self, extra_tokens: int = 0) -> Iterator[Job]:
        """Requests without end. `extra_tokens` is what the server's template adds to a prompt."""
        rng = random.Random(self.seed)
        prefix = rng.choices(_WORDS, k=self.shared_prefix)
        while True:
            own = self.prompt_tokens.draw(rng) - extra_tokens - self.shared_prefix
            words = prefix + rng.choices(_WORDS, k=max(1, own))
            yield Job(" ".join(words), self.output_tokens.draw(rng))
