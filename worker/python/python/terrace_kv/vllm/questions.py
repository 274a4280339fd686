"""How much of a prompt is there, for every group and every rank: asked once, and answered by leases."""

import threading
from dataclasses import dataclass, field

from .._engine import Reading, Store, StoreSpace
from .groups import Group


@dataclass(frozen=True)
class Shelf:
    """Where the blocks of a group are: a space for each rank."""

    group: Group
    spaces: list[StoreSpace]


@dataclass
class Question:
    """Which blocks of tokens ``start`` to ``end`` are there? The answer holds them."""

    start: int
    end: int
    keys: list[list[bytes]]
    """By group, of the blocks from ``start`` on."""
    deadline: float
    used_start: int = 0
    in_step: bool = False
    prefixes: dict[int, int] = field(default_factory=dict)
    """By group, how many of its first blocks were there a moment ago, where that is known."""
    answer_end: int = 0
    """All tokens before it can be loaded."""
    holds: list[Reading] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    dropped: bool = False

    def keys_of(self, place: int, group: Group, blocks: range) -> list[bytes]:
        """Keys of these blocks of a prompt."""
        first = self.start // group.tokens
        return self.keys[place][blocks.start - first : blocks.stop - first]

    def answer(self, end: int, holds: list[Reading]) -> None:
        with self.lock:
            if not self.dropped:
                self.answer_end, self.holds = end, holds
                holds = []
        for hold in holds:
            hold.close()
        self.done.set()

    def drop(self) -> None:
        """Gives back what was leased, or will be."""
        with self.lock:
            self.dropped = True
            holds, self.holds = self.holds, []
        for hold in holds:
            hold.close()


def needed(group: Group, start: int, end: int) -> range:
    """Blocks of a group that must be loaded when ``start`` tokens are there and ``end`` shall be."""
    stop = end // group.tokens
    return range(min(stop, max(start // group.tokens, group.first_needed(end))), stop)


def look_up(
    store: Store, shelves: list[Shelf], question: Question, *, step: int, least: int, wait: float
) -> tuple[int, list[Reading]]:
    """Up to which token all groups and ranks have what is needed, and what holds it there.

    Of groups that see everything, the prefix counts; of windows, whether a prefix ends behind a whole one.
    """
    start, end = question.start, question.end
    chains = [(place, shelf) for place, shelf in enumerate(shelves) if shelf.group.is_chain]
    windows = [(place, shelf) for place, shelf in enumerate(shelves) if not shelf.group.is_chain]
    for place, shelf in chains:
        found = question.prefixes.get(place)
        if found is None:
            found = store.prefix(shelf.spaces, question.keys_of(place, shelf.group, _blocks(shelf.group, start, end)))
        end = _whole(start, min(end, start + found * shelf.group.tokens), step)
    flags = {}
    for place, shelf in windows:
        names = question.keys_of(place, shelf.group, _blocks(shelf.group, start, end))
        flags[place] = store.present(shelf.spaces, names)
    end = _longest(windows, flags, start, end, step)
    holds: list[Reading] = []
    if end - start < least:
        return start, holds
    for place, shelf in chains:
        for space in shelf.spaces:
            # Workers compare the bytes; here they are only kept.
            names = question.keys_of(place, shelf.group, _blocks(shelf.group, start, end))
            holds.append(space.read(names, wait=wait, verify=False))
            end = _whole(start, min(end, start + holds[-1].prefix * shelf.group.tokens), step)
    end = _longest(windows, flags, start, end, step)
    for place, shelf in windows:
        blocks = needed(shelf.group, start, end)
        for space in shelf.spaces:
            holds.append(space.read(question.keys_of(place, shelf.group, blocks), wait=wait, verify=False))
            if holds[-1].prefix < len(blocks):
                return start, holds
    return end, holds


def _blocks(group: Group, start: int, end: int) -> range:
    return range(start // group.tokens, end // group.tokens)


def _whole(start: int, end: int, step: int) -> int:
    return start + (end - start) // step * step


def _longest(windows: list[tuple[int, Shelf]], flags: dict[int, list[bool]], start: int, end: int, step: int) -> int:
    """The last end whose windows are all there."""

    def there(place: int, group: Group, end: int) -> bool:
        blocks, first = needed(group, start, end), start // group.tokens
        return all(flags[place][blocks.start - first : blocks.stop - first])

    ends = range(end, start, -step)
    return next((end for end in ends if all(there(place, shelf.group, end) for place, shelf in windows)), start)
