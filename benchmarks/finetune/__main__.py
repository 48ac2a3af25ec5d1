"""`python -m benchmarks.finetune`: what own steps on the swarm's model are worth to a peer.

Finished runs are kept, so that the command may be interrupted and given again. Progress goes to
stderr; the last line on stdout is the summary as JSON.
"""

from __future__ import annotations

from benchmarks.finetune.plan import Plan, summary_of, table
from benchmarks.privacy import command

if __name__ == "__main__":
    command.run("finetune", __doc__, Plan, summary_of, table)
