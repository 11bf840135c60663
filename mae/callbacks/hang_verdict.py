"""What the hang watch does beyond the limit: the verdict on the ranks, and the end of this one.

The file is loaded in a hang only.
"""

import faulthandler
import json
import os
import time
from contextlib import suppress
from typing import NamedTuple, NoReturn

from mae.callbacks.hang_watch import HangWatch
from mae.run.folder import leave_word

NAMED = 8  # ranks at most


class Sign(NamedTuple):
    """How far a rank is: another one each time that it talks."""

    talks: int
    count: int  # of actions begun and ended, in the same order on all ranks
    waited: float  # seconds since the last of them
    limit: float
    place: str


def judge(before: list[list], now: list[list], ranks: int) -> str:
    """Returns who is to speak and the sentence, as JSON: for which ranks the run waits. Empty if one works on.

    before, now  signs of all ranks as this one has heard them, or none; a rank with the same in both is silent
    """
    awaited, known = _awaited([Sign(*sign) for sign in before], [Sign(*sign) for sign in now])
    if not awaited:
        return ""
    names = ", ".join(map(str, awaited[:NAMED])) + (f" and {len(awaited) - NAMED} more" if awaited[NAMED:] else "")
    names = f"all {ranks} ranks" if len(awaited) == ranks > 1 else f"rank {names}"
    speaker = min({*range(ranks)} - {*awaited}, default=0)
    return json.dumps([speaker, f"the run hangs: it waits for {names}, {known}"])


def _awaited(before: list[Sign], now: list[Sign]) -> tuple[list[int], str]:
    """Returns the ranks that the others wait for, none if one works within its limit; what is known of the first."""
    if before == now:  # of this rank too
        return [0], "which holds the store of the process group and does not answer"
    if silent := [rank for rank, sign in enumerate(now) if sign in before]:
        return silent, f"without a sign of life, last seen in {now[silent[0]].place}"
    if any(sign.waited <= sign.limit for sign in now):
        return [], ""
    first = min(now, key=lambda sign: sign.count)
    behind = [rank for rank, sign in enumerate(now) if sign.count == first.count]
    return behind, f"for {first.waited:.0f} s in {first.place}"


def end(watch: HangWatch) -> NoReturn:
    """Writes RUN/hangs/step-00000500-rank-00003.txt, the stacks of this rank, and exits with 1, as after a crash.

    The others are given time to hear the verdict and to write theirs: the launcher ends them at the first exit.
    """
    speaker, sentence = json.loads(watch.verdict)
    file = watch.run / "hangs" / f"step-{watch.trainer.global_step:08d}-rank-{watch.rank:05d}.txt"
    if watch.rank == speaker:
        os.write(2, f"error: {sentence}. Stacks are in {file.parent}; the same command resumes\n".encode())
    with suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        with open(file, "a") as stacks:
            sign, date = Sign(*watch.sign(0)), time.strftime("%Y-%m-%dT%H:%M:%S%z")
            stacks.write(f"{date} {sentence}\nRank {watch.rank}: {sign.waited:.0f} s in {sign.place}\n")
            stacks.flush()
            faulthandler.dump_traceback(stacks)
        if watch.rank == speaker:
            leave_word(watch.run, "failed", sentence)
    time.sleep(3 * watch.period)
    os._exit(1)
