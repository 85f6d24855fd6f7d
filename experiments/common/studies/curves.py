"""Records of a training run that was stopped and resumed, step by step."""

from collections.abc import Sequence

from experiments.common.results import Record


def by_step(records: Sequence[Record], kind: str) -> dict[int, Record]:
    """The records of one kind by step, of a run that was stopped and resumed.

    What was recorded after a checkpoint that the run then went on from, was trained
    anew: it is left out, and the last record of a step holds.
    """
    found: dict[int, Record] = {}
    for record in records:
        if record["kind"] == "run":
            found = {s: r for s, r in found.items() if s <= record["from_step"]}
        elif record["kind"] == kind:
            found[record["step"]] = record
    return dict(sorted(found.items()))
