"""A second mixer, in plain Python from csrc/FORMAT.md, section 7: slow, with integers of any size and no hash table."""

from __future__ import annotations

ORDERS = (1, 2, 3, 4, 6, 12)
AGES = [65536]
while len(AGES) < 16:
    AGES.append(AGES[-1] * 218 // 256)


def towards_zero(a: int, b: int) -> int:
    return a // b if a >= 0 else -(-a // b)


class Mixer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.places: dict[tuple[int, ...], list[int]] = {}
        self.trusts: dict[tuple[int, int, int], list[int]] = {}
        self.shares: dict[int, list[int]] = {}

    def known(self) -> list[tuple[list[int], list[int]] | None]:
        """For every order the tokens that followed its context, youngest first, and its trust; None: not known."""
        found: list[tuple[list[int], list[int]] | None] = []
        for order, n_context in enumerate(ORDERS):
            context = tuple(self.tokens[-n_context:])
            places = self.places.get(context, []) if len(context) == n_context else []
            if not places:
                found.append(None)
                continue
            followers = [self.tokens[p] for p in places[:-17:-1]]
            n = len(followers)
            size = [n <= 1, n <= 2, n <= 3, n <= 5, n <= 8, n <= 15, True].index(True)
            key = (order, size, min(len(set(followers)), 4) - 1)
            found.append((followers, self.trusts.setdefault(key, [32768, 0])))
        return found

    def added(self, total: int) -> dict[int, int]:
        """What is added to the weight of each token in a row of this total."""
        known = self.known()
        which = 0
        for order, step in enumerate(known):
            if step is not None:
                which = (order + 1) * 8 + (min(len(step[0]), 4) - 1) * 2 + (len(set(step[0])) == 1)
        self.share = self.shares.setdefault(which, [1677721] * 6 + [6710884])
        masses: dict[int, int] = {}
        reach = 0
        for order in range(5, -1, -1):
            reach += self.share[order + 1] * 64
            step = known[order]
            if step is None:
                continue
            followers, (trust, _) = step
            below = reach * trust >> 16
            unit = ((reach - below) << 16) // sum(AGES[: len(followers)])
            for age, token in zip(AGES, followers, strict=False):
                masses[token] = masses.get(token, 0) + (unit * age >> 16)
            reach = below
        reach += self.share[0] * 64
        scale = (total << 13) // max(reach, (total >> 19) + 1)
        return {token: scale * mass >> 13 for token, mass in masses.items()}

    def take(self, token: int, weight: int, total: int) -> None:
        """Learns from the token that came, after `added`; `weight` and `total` are the model's own."""
        chances = [(weight << 30) // total + 1]
        for step in self.known():
            chances.append(chances[-1])
            if step is None:
                continue
            followers, trust = step
            below = chances[-1] * trust[0]
            seen = sum(age for age, follower in zip(AGES, followers, strict=False) if follower == token)
            own = (seen << 30) // sum(AGES[: len(followers)])
            chances[-1] = (below + own * (65536 - trust[0]) >> 16) + 1
            trust[0] += towards_zero(below // chances[-1] - trust[0], trust[1] + 3)
            trust[0] = min(max(trust[0], 256), 65280)
            trust[1] = min(trust[1] + 1, 47)
        whole = sum(a * h for a, h in zip(self.share, chances, strict=True)) >> 24
        for i, chance in enumerate(chances):
            credit = self.share[i] * chance // (whole + 1)
            self.share[i] = max(self.share[i] + towards_zero(credit - self.share[i], 20), 1024)
        for n_context in ORDERS:
            if len(self.tokens) >= n_context:
                self.places.setdefault(tuple(self.tokens[-n_context:]), []).append(len(self.tokens))
        self.tokens.append(token)


def mixed_weights(mixer: Mixer, weights: list[int]) -> list[int]:
    """A whole row with what is added."""
    mixed = list(weights)
    for token, added in mixer.added(sum(weights)).items():
        mixed[token] += added
    return mixed
