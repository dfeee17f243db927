"""Hangs are found from outside: each rank leaves signs of life in memory, and a process beside it reads them.

    record.py      what a rank leaves: a page of memory that other processes may map
    heartbeat.py   the rank's side: `begin_step`, `doing`, `beat`, and a thread that shows that Python runs
    machine.py     the ranks of one machine, as the process beside them sees them: signs, stacks, their end
    judgement.py   whether a run hangs, and which rank is late
    watchdog.py    that process: one on each machine, that of rank 0 decides
    report.py      what is written of a hang

Nothing here imports torch: the process starts in a tenth of a second and holds some 15 MB.
"""
