"""Verdicts from the command line: python -m rewards GRADER < pairs.jsonl > verdicts.jsonl

reads lines {"text": ..., "reference": ...} and writes one line {"score": 0..1 or null, "reason": ..., "seconds": ...}
for each, in order; null is a fault, no statement about the text.
"""

import json
import os
import queue
import sys
import threading
from dataclasses import asdict

from rewards import GRADERS, Grader, Verdict
from rewards.worker import threads


def grade_line(grader: Grader, name: str, line: bytes) -> Verdict:
    try:
        row = json.loads(line)
        text, reference = row["text"], row["reference"]
        if not isinstance(text, str):
            raise TypeError("text must be a string")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"fault: not a JSON object with text and reference ({type(error).__name__}: {error})"
        return Verdict(None, reason)
    return grader.grade_one(name, text, reference)


def main() -> int:
    grader = Grader()
    try:
        if len(sys.argv) != 2:
            raise ValueError(f"usage: python -m rewards GRADER < pairs.jsonl, GRADER one of: {', '.join(GRADERS)}")
        grader.require(sys.argv[1])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    under_way: queue.Queue = queue.Queue(maxsize=256)

    def write():
        while verdict := under_way.get():
            print(json.dumps(asdict(verdict.result())), flush=True)

    writer = threading.Thread(target=write)
    writer.start()
    for line in sys.stdin.buffer:
        under_way.put(threads(os.getpid()).submit(grade_line, grader, sys.argv[1], line))
    under_way.put(None)
    writer.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
