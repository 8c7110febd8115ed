"""Which of two places in a kernel comes before the other, where its blocks stand in any order."""

from __future__ import annotations

from collections.abc import Sequence

# (rank of a loop's first block, finished turns of it), for each loop around the place from the
# outermost on; then the rank of the block.
Place = tuple[int, ...]


class Order:
    """Ranks of the blocks, lower than those of all that come after, and the loops around each.

    Attributes:
        rank: By block: where it stands in reverse postorder.
        around: By block: the ranks of the first blocks of its loops, outermost first.
    """

    def __init__(self, follow: Sequence[Sequence[int]]) -> None:
        """`follow` are the blocks that may follow each block."""
        finished, back = _search(follow)
        self.rank = [len(follow)] * len(follow)
        for rank, block in enumerate(reversed(finished)):
            self.rank[block] = rank
        before: list[list[int]] = [[] for _ in follow]
        for block in finished:
            for other in follow[block]:
                before[other].append(block)
        inside: list[set[int]] = [set() for _ in follow]
        for last, head in back:  # a natural loop: what leads there without the head
            body, todo = {head}, [last]
            while todo:
                if (block := todo.pop()) not in body:
                    body.add(block)
                    todo += before[block]
            for block in body:
                inside[block].add(self.rank[head])
        self.around = [tuple(sorted(heads)) for heads in inside]

    def moved(self, place: Place, block: int) -> Place:
        """Where threads are in `block` that come from `place`: in a loop's head, a turn further."""
        turns = dict(zip(place[:-1:2], place[1::2], strict=False))
        rank = self.rank[block]
        after: list[int] = []
        for head in self.around[block]:
            after += (head, turns[head] + (head == rank) if head in turns else 0)
        return (*after, rank)


def _search(follow: Sequence[Sequence[int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Depth first from block 0: blocks as they are finished, and jumps back into what is not."""
    finished: list[int] = []
    back: list[tuple[int, int]] = []
    open_, seen = [(0, iter(follow[0]))], {0}
    while open_:
        block, following = open_[-1]
        for other in following:
            if other not in seen:
                seen.add(other)
                open_.append((other, iter(follow[other])))
                break
            if any(other == b for b, _ in open_):
                back.append((block, other))
        else:
            finished.append(block)
            open_.pop()
    return finished, back
