"""Going on in a stream whose position a checkpoint has.

Responsible for: whether the stream still is the same one, the new segment where it may change, and the record of block
lists. Not responsible for: the plan itself (``mixture.py``) or saving (``scaling4d/checkpoints.py``).
"""

from dataclasses import dataclass
from typing import Any

from scaling4d.data.blocked import BlockList
from scaling4d.data.mixture import Plan, Share
from scaling4d.errors import UserError


@dataclass(frozen=True)
class Resume:
    """What a start goes on from.

    data: the checkpoint's ``data`` item. source: where it lies, for messages. allow_changes: other data sets, rates or
    repeats begin a new segment at this position; without, they are an error.
    """

    data: dict[str, Any]
    source: str
    allow_changes: bool = False


def continued(resume: Resume, fresh: Plan, fingerprint: dict[str, Any], at: int) -> tuple[Plan, list[str]]:
    """The plan that goes on at global example ``at``, and lines that say what changed; raises UserError.

    A checkpoint from before there were plans has one data set alone.
    """
    stored = resume.data["fingerprint"]
    fixed = sorted((stored.keys() | fingerprint.keys()) - {"task", "clips", "records"})
    changed = [key for key in fixed if stored.get(key) != fingerprint.get(key)]
    if changed:
        values = "; ".join(f"{key} was {stored.get(key)}, is {fingerprint.get(key)}" for key in changed)
        raise UserError(
            f"{resume.source} was saved on other data ({values}): its position in the stream means nothing here; "
            "give back the same, or start a new --model_dir"
        )
    segments = resume.data.get("plan") or [_segment_of_one(stored)]
    plan = Plan.from_json(fresh.seed, segments)
    differences = _differences(plan, fresh)
    if differences and not resume.allow_changes:
        raise UserError(
            f"{resume.source} was saved on other data ({'; '.join(differences)}): give back the same data sets and "
            "rates, or go on with the new ones from here: --allow_config_changes"
        )
    notes = [f"data from example {at:,} on: {'; '.join(differences)}"] if differences else []
    return plan.continued(fresh, at), notes


def block_lists(resume: Resume | None, current: BlockList, at: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The history of block lists for the next checkpoint, with an entry where it changed, and lines that say so."""
    history = list(resume.data.get("blocked", ())) if resume else []
    last = history[-1]["digest"] if history else ""
    if current.digest == last:
        return history, []
    entry = {"start": at, "sources": len(current.sources), "digest": current.digest}
    was = f" (were {history[-1]['sources']:,})" if history else ""
    return [*history, entry], [f"blocked sources from example {at:,} on: {len(current.sources):,}{was}"]


def _segment_of_one(fingerprint: dict[str, Any]) -> dict[str, Any]:
    share = {"name": fingerprint["task"], "clips": fingerprint["clips"], "records": fingerprint["records"]}
    return {"start": 0, "repeats": 1, "chunk": 1, "shares": [share | {"draws": 1, "first": 0, "key": 0}]}


def _differences(plan: Plan, fresh: Plan) -> list[str]:
    """What is drawn otherwise, data set by data set; empty where nothing is."""
    old, new = plan.segments[-1], fresh.segments[-1]
    was, now = ({share.records: share for share in segment.shares} for segment in (old, new))
    lines = [_told(share, "was there") for records, share in was.items() if records not in now]
    lines += [_told(share, "is new") for records, share in now.items() if records not in was]
    for records in was.keys() & now.keys():
        before, after = was[records], now[records]
        if before.draws * new.block != after.draws * old.block:
            rates = before.draws / old.block, after.draws / new.block
            lines.append(f"'{after.name}' was {rates[0]:.3g} of the clips, is {rates[1]:.3g}")
    if old.repeats != new.repeats:
        lines.append(f"repeats was {old.repeats}, is {new.repeats}")
    return sorted(lines)


def _told(share: Share, what: str) -> str:
    return f"'{share.name}' ({share.clips:,} clips, records {share.records[:8]}) {what}"
