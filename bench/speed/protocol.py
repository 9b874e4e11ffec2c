"""How a process is told what to do: lines of JSON on stdin, for each a line on stdout that answers it."""

from __future__ import annotations

import json
import os
import sys
import traceback


def serve(child: object) -> None:
    """Answers until stdin ends. `{"do": name, ...}` calls the method `name`, which returns the reply.

    A call that fails is answered with `{"failed": traceback}`, and the next line is read.
    """
    # Libraries print to stdout as well; replies have it for themselves.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            reply = getattr(child, order.pop("do"))(**order)
        except Exception:  # whatever it is, the parent raises it
            reply = {"failed": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)
