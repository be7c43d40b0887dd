"""Whether the next cycle drafts, and how wide: what brings the most tokens a second.

Every width gives the same text, so this is a matter of time alone: the time of a cycle at each
width, as lately seen, against the tokens that it is expected to give, by the drafts that lately
were right. Host code alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FIRST_GUESS = 0.8  # the share of right drafts before any was seen
MEMORY = 30  # drafts at a position over which its share is averaged
TRUST = 4  # drafts for which the average over all requests stands in a new request's own
FINDING_OUT = 0.01  # of the time without drafts that looking for better ones may take
QUICKNESS = 0.1  # of an average of times: the weight of the newest one


class Acceptance:
    """How many drafts in a row are right: by position, the share of right ones where all before
    them were right.

    A share changes only where a cycle could show it: up to the first wrong draft, and never past
    the cycle's width (the estimate of Kaplan and Meier, with a memory).
    """

    def __init__(self, shares: Sequence[float], trust: int = TRUST) -> None:
        self.shares = list(shares)
        self._counts = [trust] * len(self.shares)

    def saw(self, n_right: int, n_drafts: int) -> None:
        """A cycle had ``n_drafts`` drafts, of which the first ``n_right`` were right."""
        for i in range(min(n_right + 1, n_drafts)):
            self._counts[i] = min(self._counts[i] + 1, MEMORY)
            self.shares[i] += ((i < n_right) - self.shares[i]) / self._counts[i]

    def expected_tokens(self, widths: Sequence[int]) -> list[float]:
        """Tokens of a cycle at each of the ``widths``, ascending."""
        found, tokens, reached = [], 1.0, 1.0
        at = 0
        for width in widths:
            for share in self.shares[at : width - 1]:
                reached *= share
                tokens += reached
            at = max(at, width - 1)
            found.append(tokens)
        return found


class Times:
    """Seconds by width, as lately seen; of a width not seen yet, guessed from the others."""

    def __init__(self, guesses: Mapping[int, float], seen: bool = False) -> None:
        self._seconds = dict(guesses)
        self._seen = set(guesses) if seen else set[int]()

    def __getitem__(self, width: int) -> float:
        return self._seconds[width]

    def saw(self, width: int, seconds: float) -> None:
        """A launch of this width took so long. One that took very long says little: a pause."""
        if width not in self._seconds:
            return
        if width in self._seen:
            known = self._seconds[width]
            self._seconds[width] += QUICKNESS * (min(seconds, 2 * known) - known)
            return
        ratio = seconds / self._seconds[width]
        self._seen.add(width)
        self._seconds[width] = seconds
        for other in self._seconds.keys() - self._seen:
            self._seconds[other] *= ratio

    def widest_within(self, seconds: float) -> int:
        """The greatest width that takes no longer, or the smallest one."""
        fitting = [width for width, of in self._seconds.items() if of <= seconds]
        return max(fitting, default=min(self._seconds))


class WidthPolicy:
    """Chooses among ``widths``, of which 1 means not to draft; ``fixed`` is one always to draft at.

    ``times`` are those of whole cycles at these widths.
    """

    def __init__(self, widths: Sequence[int], times: Times, fixed: int | None = None) -> None:
        self.widths = sorted({1, *widths})
        self.times = times
        self.fixed = fixed
        self._all = Acceptance([FIRST_GUESS] * (self.widths[-1] - 1))
        self._credit = 0.0  # seconds that finding out may take now
        self._n_new = 0  # requests since the last choice

    def start(self) -> Acceptance:
        """The estimate for a new request: what the others' drafts were like lately."""
        self._n_new += 1
        return Acceptance(self._all.shares)

    def saw(self, acceptance: Acceptance, n_right: int, n_drafts: int) -> None:
        """A cycle of one request had ``n_drafts`` drafts, the first ``n_right`` of them right."""
        acceptance.saw(n_right, n_drafts)
        self._all.saw(n_right, n_drafts)

    def choose(self, drafting: Sequence[Acceptance], n_others: int) -> int:
        """The width of the next cycle of ``drafting`` and ``n_others`` that do not draft.

        Where drafts don't pay, a cycle with them comes now and then, to find out whether they do
        again: when it costs no more than a small share of the time since the last one. A new
        request brings what it takes to look at it once, as far as it is alone.
        """
        if not drafting:
            return 1
        if self.fixed is not None:
            return self.fixed
        n = len(drafting) + n_others
        each = [one.expected_tokens(self.widths) for one in drafting]
        tokens = [n_others + sum(column) for column in zip(*each, strict=True)]
        rates = {w: t / self.times[w] for w, t in zip(self.widths, tokens, strict=True)}
        best = max(self.widths, key=lambda width: rates[width])
        if best > 1:
            self._n_new = 0
            return best
        narrow = self.times[1]
        width = max(self.widths[1:], key=lambda width: rates[width])
        loss = self.times[width] - tokens[self.widths.index(width)] / n * narrow
        self._credit += FINDING_OUT * narrow + self._n_new * loss / n
        self._n_new = 0
        if self._credit < loss:
            return 1
        self._credit = 0.0
        return width
