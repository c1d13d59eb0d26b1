"""Variants that wait at a rung for what is decided there (`rungs.py`), their states on the disk."""

from dataclasses import dataclass, field

from tunefork.sweep.group import Member
from tunefork.sweep.rungs import Rungs


@dataclass(slots=True)
class Parked:
    """Of one fleet; without rungs nobody waits."""

    rungs: Rungs | None
    members: dict[str, Member] = field(default_factory=dict)

    def keeps(self, member: Member) -> bool:
        """Whether a member waits: at a rung where it is not known that it goes on."""
        if self.rungs is None or not (passed := self.rungs.count(member.name)):
            return False
        verdict = self.rungs.verdict(passed - 1, member.name)
        if verdict is not None and verdict.is_kept:
            return False
        self.members[member.name] = member
        return True

    def step_of(self, member: Member) -> int | None:
        """The step of the last rung that a member has passed."""
        passed = 0 if self.rungs is None else self.rungs.count(member.name)
        return member.rungs[passed - 1] if passed else None

    def rung_at(self, member: Member, step: int) -> int | None:
        """The rung, from 0, that lies at `step` and where a member was not measured yet."""
        if self.rungs is None or step not in member.rungs:
            return None
        rung = member.rungs.index(step)
        return None if self.rungs.measured(rung, member.name) else rung

    def is_past(self, member: Member, step: int) -> bool:
        """Whether a member at `step` has gone by a rung unmeasured, trained on by itself."""
        if self.rungs is None:
            return False
        return any(at < step for at in member.rungs[self.rungs.count(member.name) :])

    def leave_out(self, member: Member) -> None:
        """No rung waits for a member from here on."""
        if self.rungs is not None:
            self.rungs.absent.add(member.name)

    def decided(self) -> tuple[list[Member], list[Member]]:
        """Those whose rung is decided, who wait no longer: they go on, or are dropped."""
        going, dropped = list[Member](), list[Member]()
        for name, member in list(self.members.items()):
            assert self.rungs is not None
            verdict = self.rungs.verdict(self.rungs.count(name) - 1, name)
            if verdict is not None:
                del self.members[name]
                (going if verdict.is_kept else dropped).append(member)
        return going, dropped
